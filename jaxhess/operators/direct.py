"""Direct solves at one damping: the operator factored in its reduced space.

    positive semidefinite, λ > 0      M + λI = L L^T            k^3 / 3 multiplications
    indefinite                        P (M + λI) = L U          2 k^3 / 3
    diagonalised already              (M + λI) U = U (μ + λ)    none, where an eigendecomposition takes about 9 k^3

That `H + λI` is not singular is seen by inverse iteration with the factors, for a few vectors X at once. The eigenvalue
nearest to zero is 1/σ, σ the largest in magnitude of those of `X^T (M + λI)^-1 X`, which is never too near to zero.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, InputError, PyTree, SingularError
from jaxhess.operators.eigen import Eigen, nearest_to_zero, refuse, rounding, singular_message
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.reduction import Reduction

__all__ = ["Factorization", "diagonalised", "diagonalised_solution", "factored", "slogdet", "solution"]

_STEPS = 4
_VECTORS = 3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factorization:
    """`H + damping I` factored once, for many solves; `H.factorize(damping)` makes it.

    `kind` is "cholesky", "lu" or "eigh"; `eigenvalue` is that of H nearest to `-damping`, as inverse iteration sees it but
    for "eigh"; `singular` says whether their sum is zero to rounding, within `tolerance`. For other dampings, take
    `H.factorize()`, an eigendecomposition.

    >>> import jax.numpy as jnp
    >>> from jaxhess.operators import Dense
    >>> F = Dense(jnp.array([[1.0, 0.0], [0.0, 3.0]])).factorize(1.0)
    >>> F.solve(jnp.array([2.0, 4.0])).tolist(), round(F.logdet().item(), 4)
    ([1.0, 1.0], 2.0794)
    """

    reduction: Reduction | Eigen
    factors: tuple[Array, ...]
    damping: Array
    eigenvalue: Array
    tolerance: Array
    singular: Array
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
        return slogdet(self)

    def checked(self, what: str, result: Any = None) -> Any:
        """`result`, by default itself; raises `SingularError` where singular."""
        size = self.reduction.columns.size

        def message() -> str:
            if self.kind == "cholesky" and (isinstance(self.eigenvalue, Tracer) or bool(np.isnan(self.eigenvalue))):
                damping = "damping" if isinstance(self.damping, Tracer) else f"{float(self.damping):.6g}"
                return (
                    f"{what}: H + {damping} I ({size} x {size}) is not positive definite to rounding, so it has no Cholesky "
                    f"factorisation: H has an eigenvalue of -{damping} or less, or is not finite. Take more damping, or "
                    "method='lu' or 'eigh'."
                )
            return singular_message(what, size, self.damping, self.eigenvalue, self.tolerance)

        return refuse(self.singular, SingularError, message, self if result is None else result)[0]

    def _check_damping(self, damping: Any) -> None:
        known = not isinstance(damping, Tracer) and not isinstance(self.damping, Tracer)
        if damping is not None and (
            not known or bool(np.any(np.asarray(damping, self.damping.dtype) != np.asarray(self.damping)))
        ):
            raise InputError(
                f"Factorization: H was factored at damping {self.damping}, not at {damping}. For several dampings hold an "
                "eigendecomposition: factorize() without one."
            )

    def __repr__(self):
        columns = self.reduction.columns
        return f"Factorization({self.kind} of {columns.count}^2 for {columns.size} unknowns)"


@jax.jit
def solution(factored: Factorization, vector: PyTree) -> PyTree:
    """`(H + λI)^-1 x`, not checked to be regular."""
    vector = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), vector, factored.reduction.columns.structure)
    if isinstance(factored.reduction, Eigen):
        return factored.reduction.mapped(lambda values: 1 / (values + factored.damping)).product(vector)
    return factored.reduction.solution(vector, lambda c: _inner(factored.kind, factored.factors, c), factored.damping)


@jax.jit
def slogdet(factored: Factorization) -> tuple[Array, Array]:
    """The sign and the logarithm of `|det(H + λI)|`; 0 and -inf where singular to rounding, NaN where not finite."""
    held, damping, dtype = factored.reduction, factored.damping, factored.damping.dtype
    rest = damping + held.rest if isinstance(held, Eigen) else damping
    if isinstance(held, Eigen):
        pivots, swaps, power = held.values + damping, 0, 1
    elif factored.kind == "cholesky":
        pivots, swaps, power = jnp.diagonal(factored.factors[0]), 0, 2
    else:
        pivots, power = jnp.diagonal(factored.factors[0]), 1
        swaps = jnp.sum(factored.factors[1] != jnp.arange(pivots.size))
    sign = jnp.prod(jnp.sign(pivots)) * jnp.where(swaps % 2 == 0, 1, -1)
    value = power * jnp.sum(jnp.log(jnp.abs(pivots)))
    missing = held.columns.missing
    if missing:
        sign, value = sign * jnp.sign(rest) ** (missing % 2), value + missing * jnp.log(jnp.abs(rest))
    zero = factored.singular & ~jnp.isnan(value)
    return jnp.where(zero, 0, sign).astype(dtype), jnp.where(zero, -jnp.inf, value).astype(dtype)


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
    lacking = reduction.columns.missing > 0 or reduction.sign is not None
    # The largest row sum of absolute values is at least the largest eigenvalue, and at most sqrt(k) times it.
    largest = jnp.max(jnp.sum(jnp.abs(damped), axis=1), initial=0) / math.sqrt(max(k, 1))
    tolerance = rounding(dtype) * largest
    nearest = jnp.full((), jnp.inf, dtype) if k == 0 else _nearest(kind, factors, jnp.where(largest > 0, largest, 1))
    # A pivot of exactly zero leaves infinities, a Cholesky factor of what is not positive definite NaN.
    nearest = nearest if kind == "cholesky" else jnp.where(jnp.isnan(nearest) & jnp.isfinite(largest), 0, nearest)
    singular = ~(jnp.abs(nearest) > tolerance)
    if lacking:
        singular = singular | ~(jnp.abs(damping) > 0)
        nearest = jnp.where(jnp.abs(damping) < jnp.abs(nearest), damping, nearest)
    return Factorization(reduction, factors, damping, nearest - damping, tolerance, singular, kind)


def _nearest(kind: str, factors: tuple[Array, ...], scale: Array) -> Array:
    """The eigenvalue nearest to zero, NaN where the factors are not finite or have a pivot of zero."""
    size = factors[0].shape[0]
    X = jax.random.normal(jax.random.key(0), (size, min(size, _VECTORS)), factors[0].dtype)
    for _ in range(_STEPS):
        X = jnp.linalg.qr(scale * _inner(kind, factors, X))[0]
    if 2 * X.shape[1] <= size:  # where eigenvalues are as near on both sides of zero, X and its image span what X does not
        X = jnp.linalg.qr(jnp.concatenate([X, scale * _inner(kind, factors, X)], axis=1))[0]
    S = matmul(X.T, scale * _inner(kind, factors, X))
    inverses = jnp.linalg.eigvalsh(symmetrise(jnp.where(jnp.isfinite(S), S, 0)))
    return jnp.where(jnp.all(jnp.isfinite(S)), scale / inverses[jnp.argmax(jnp.abs(inverses))], jnp.nan)


@jax.jit
def diagonalised(eigen: Eigen, damping: Any) -> Factorization:
    """The factorisation that an eigendecomposition is, for one damping; not checked to be regular."""
    damping = jnp.asarray(damping, eigen.values.dtype)
    nearest, singular, tolerance = nearest_to_zero(eigen, damping)
    return Factorization(eigen, (), damping, nearest - damping, tolerance, singular, "eigh")


@jax.jit
def diagonalised_solution(eigen: Eigen, damping: Any, vector: PyTree) -> tuple[Factorization, PyTree]:
    """`diagonalised` and `solution` in one program: for a held eigendecomposition the call takes more than the solve."""
    factors = diagonalised(eigen, damping)
    return factors, solution(factors, vector)
