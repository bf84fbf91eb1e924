"""Direct solves at one damping: a Cholesky or LU factorisation of the operator in its reduced space.

    positive semidefinite, λ > 0      M + λI = L L^T            k^3 / 3 multiplications
    indefinite                        P (M + λI) = L U          2 k^3 / 3, where an eigendecomposition takes about 9 k^3

That `H + λI` is not singular is seen by inverse iteration with the factors, which finds its eigenvalue nearest to zero.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxhess._linalg import matmul
from jaxhess._typing import Array, InputError, PyTree, SingularError
from jaxhess.operators.eigen import refuse, rounding, singular_message
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.reduction import Reduction

__all__ = ["Factorization", "factored", "solution"]

_STEPS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factorization:
    """`H + damping I` factored once, for many solves; `H.factorize(damping)` makes it.

    `eigenvalue` is that of H nearest to `-damping`, as inverse iteration sees it. For other dampings, take
    `H.factorize()`, an eigendecomposition.

    >>> import jax.numpy as jnp
    >>> from jaxhess.operators import Dense
    >>> F = Dense(jnp.array([[1.0, 0.0], [0.0, 3.0]])).factorize(1.0)
    >>> F.solve(jnp.array([2.0, 4.0])).tolist(), round(F.logdet().item(), 4)
    ([1.0, 1.0], 2.0794)
    """

    reduction: Reduction
    factors: tuple[Array, ...]
    damping: Array
    eigenvalue: Array
    tolerance: Array
    kind: str = dataclasses.field(metadata={"static": True})

    def solve(self, vector: PyTree, damping: Any = None) -> PyTree:
        """`(H + damping I)^-1` times a vector like those that H maps.

        Raises `SingularError` if that is singular to rounding, `InputError` for another damping than the factored one.
        """
        self._check_damping(damping)
        leaves_like("Factorization.solve", self.reduction.columns.structure, vector)
        return solution(self.checked("Factorization.solve"), vector)

    def logdet(self, damping: Any = None) -> Array:
        """`log |det(H + damping I)|`, 0-d; -inf where singular to rounding."""
        return self.slogdet(damping)[1]

    def slogdet(self, damping: Any = None) -> tuple[Array, Array]:
        """The sign of `det(H + damping I)` and the logarithm of its absolute value, as `jnp.linalg.slogdet`."""
        self._check_damping(damping)
        return _slogdet(self)

    @property
    def singular(self) -> Array:
        """Whether `H + damping I` is singular to rounding, 0-d."""
        lacking = self.reduction.columns.missing > 0 or self.reduction.sign is not None
        inside = ~(jnp.abs(self.eigenvalue + self.damping) > self.tolerance)
        return inside | ~(jnp.abs(self.damping) > 0) if lacking else inside

    def checked(self, what: str) -> "Factorization":
        """Itself; raises `SingularError` where singular."""
        size = self.reduction.columns.size

        def message() -> str:
            return singular_message(what, size, self.damping, self.eigenvalue, self.tolerance)

        return refuse(self.singular, SingularError, message, self)[0]

    def _check_damping(self, damping: Any) -> None:
        known = not isinstance(damping, Tracer) and not isinstance(self.damping, Tracer)
        if damping is not None and (not known or float(damping) != float(self.damping)):
            raise InputError(
                f"Factorization: H was factored at damping {self.damping}, not at {damping}. For several dampings hold an "
                "eigendecomposition: factorize() without one."
            )

    def __repr__(self):
        return f"Factorization({self.kind} of {self.reduction.matrix.shape[0]}^2 for {self.reduction.columns.size} unknowns)"


@jax.jit
def solution(factored: Factorization, vector: PyTree) -> PyTree:
    """`(H + λI)^-1 x`, not checked to be regular."""
    vector = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), vector, factored.reduction.columns.structure)
    return factored.reduction.solution(vector, lambda c: _inner(factored.kind, factored.factors, c), factored.damping)


@jax.jit
def _slogdet(factored: Factorization) -> tuple[Array, Array]:
    diagonal = jnp.diagonal(factored.factors[0])
    if factored.kind == "cholesky":
        sign, value = jnp.ones((), diagonal.dtype), 2 * jnp.sum(jnp.log(diagonal))
    else:
        swaps = jnp.sum(factored.factors[1] != jnp.arange(diagonal.size))
        sign = jnp.prod(jnp.sign(diagonal)) * jnp.where(swaps % 2 == 0, 1, -1)
        value = jnp.sum(jnp.log(jnp.abs(diagonal)))
    missing = factored.reduction.columns.missing
    value = value + (missing * jnp.log(jnp.abs(factored.damping)) if missing else 0)
    sign = sign * (jnp.sign(factored.damping) ** (missing % 2) if missing else 1)
    singular = factored.singular
    return jnp.where(singular, 0, sign).astype(diagonal.dtype), jnp.where(singular, -jnp.inf, value).astype(diagonal.dtype)


def _inner(kind: str, factors: tuple[Array, ...], c: Array) -> Array:
    if kind == "cholesky":
        return jax.scipy.linalg.cho_solve((factors[0], True), c)
    return jax.scipy.linalg.lu_solve((factors[0], factors[1]), c)


def factored(reduction: Reduction, damping: Any, kind: str) -> Factorization:
    """The factorisation, "cholesky" or "lu", of a reduced operator plus a damping; not checked to be regular."""
    return _factored(reduction, jnp.asarray(damping, reduction.matrix.dtype), kind)


@functools.partial(jax.jit, static_argnums=2)
def _factored(reduction: Reduction, damping: Array, kind: str) -> Factorization:
    damped = reduction.damped(damping)
    k, dtype = damped.shape[0], damped.dtype
    if kind == "cholesky":
        factors: tuple[Array, ...] = (jnp.linalg.cholesky(damped),)
    else:
        factors = jax.scipy.linalg.lu_factor(damped)
    if k == 0:
        zero = jnp.zeros((), dtype)
        return Factorization(reduction, factors, damping, zero - damping + 1, zero, kind)
    x = jax.random.normal(jax.random.key(0), (k,), dtype)
    for _ in range(_STEPS):
        x = _inner(kind, factors, x / jnp.linalg.norm(x))
    nearest = jnp.vdot(x, matmul(damped, x)) / jnp.vdot(x, x)
    # A pivot of exactly zero leaves infinities, a Cholesky factor of what is not positive definite NaN.
    nearest = jnp.where(jnp.isfinite(nearest), nearest, 0)
    # The largest row sum of absolute values is at least the largest eigenvalue, and at most sqrt(k) times it.
    largest = jnp.max(jnp.sum(jnp.abs(damped), axis=1)) / math.sqrt(k)
    tolerance = rounding(k, dtype) * largest
    return Factorization(reduction, factors, damping, nearest - damping, tolerance, kind)
