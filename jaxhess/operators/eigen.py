"""Eigendecompositions in a reduced space, and what follows from one: functions of an operator, extremes, refusals.

H = ρ I + sum_e (λ_e - ρ) u_e u_e^T            k eigenpairs, and the eigenvalue ρ on all that is orthogonal to them
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxhess._linalg import matmul
from jaxhess._typing import Array, InputError, PyTree, SingularError
from jaxhess.operators.mapped import Inertia, count_signs
from jaxhess.operators.paths import within
from jaxhess.operators.reduction import Columns, Reduction, ravel, unravel

__all__ = [
    "Eigen",
    "eigen_of",
    "nearest_to_zero",
    "refuse",
    "refuse_indefinite",
    "refuse_singular",
    "rounding",
    "select",
    "singular_message",
]

_CHUNK_BYTES = 2**26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigen:
    """`values` (k,) and the vectors `columns.push(rotation[:, e])`, divided by the roots of `norms` (k,) where they are not
    of length 1; `rest` is the eigenvalue of all that is orthogonal to them. Without `rotation` it is the identity."""

    columns: Columns
    rotation: Array | None
    values: Array
    norms: Array | None
    rest: Array

    @property
    def missing(self) -> int:
        """N - k."""
        return self.columns.missing

    @property
    def beyond(self) -> Array:
        """ρ, or 0 where nothing is orthogonal to all eigenvectors."""
        return jnp.zeros_like(self.rest) if self.norms is None and self.missing == 0 else self.rest

    @property
    def weights(self) -> Array:
        """What the columns are multiplied by: λ - ρ, over their squared length; 0 for those without a length."""
        if self.norms is None:
            return self.values - self.beyond
        known = self.known
        return jnp.where(known, (self.values - self.rest) / jnp.where(known, self.norms, 1), 0)

    @property
    def known(self) -> Array:
        """Which eigenvectors there are, (k,)."""
        if self.norms is None:
            return jnp.ones(self.values.shape, bool)
        return self.norms > rounding(self.values.dtype) * jnp.max(self.norms, initial=0)

    def rotated(self, coefficients: Array) -> Array:
        """Of the columns, from those of the eigenvectors."""
        return coefficients if self.rotation is None else matmul(self.rotation, coefficients)

    def coefficients(self, vector: PyTree) -> Array:
        """u_e . x times the columns' length, (k,)."""
        pulled = self.columns.pull(vector)
        return pulled if self.rotation is None else matmul(self.rotation.T, pulled)

    def product(self, vector: PyTree) -> PyTree:
        """H x."""
        pushed = self.columns.push(self.rotated(self.weights * self.coefficients(vector)))
        if self.norms is None and self.missing == 0:
            return pushed
        return jax.tree.map(lambda x, p: self.rest.astype(p.dtype) * x + p, vector, pushed)

    def mapped(self, function: Callable[[Array], Array]) -> "Eigen":
        """The same with a function of every eigenvalue."""
        return dataclasses.replace(self, values=function(self.values), rest=function(self.rest))

    def all_values(self) -> Array:
        """All N eigenvalues in ascending order."""
        return jnp.sort(jnp.concatenate([self.values, jnp.full(self.missing, self.rest, self.values.dtype)]))

    def inertia(self, tolerance: Any) -> Inertia:
        """How many eigenvalues are above the tolerance, below its negative, and between."""
        if tolerance is None:
            largest = jnp.maximum(jnp.max(jnp.abs(self.values), initial=0), jnp.abs(self.rest) * (self.missing > 0))
            tolerance = self.values.size * jnp.finfo(self.values.dtype).eps * largest
        counts = count_signs(self.values, self.columns.count, tolerance)
        rest = count_signs(self.rest[None], 1, tolerance)
        return Inertia(*(jnp.where(a < 0, a, a + self.missing * b) for a, b in zip(counts, rest, strict=True)))

    def rows(self, start: Any, count: int) -> Array:
        """`count` eigenvectors times the columns' length, as rows (count, N)."""

        def one(index: Array) -> Array:
            unit = jnp.zeros(self.values.shape, self.values.dtype).at[index].set(1)
            return ravel(self.columns.push(self.rotated(unit)))

        return jax.vmap(one)(start + jnp.arange(count))

    def chunk(self) -> int:
        """How many eigenvectors are formed at once."""
        needed = self.values.dtype.itemsize * max(1, self.columns.size)
        return max(1, min(self.values.size, _CHUNK_BYTES // needed))

    def diagonal(self) -> Array:
        """The diagonal, (N,)."""
        weights = self.weights

        def add(total: Array, index: Array) -> tuple[Array, None]:
            return total + weights[index] * self.rows(index, 1)[0] ** 2, None

        total = jnp.full(self.columns.size, self.beyond, self.values.dtype)
        return jax.lax.scan(add, total, jnp.arange(self.values.size))[0]

    def matrix(self) -> Array:
        """The dense form, (N, N)."""
        rows = self.rows(0, self.values.size)
        return matmul(rows.T, self.weights[:, None] * rows) + self.beyond * jnp.eye(self.columns.size, dtype=rows.dtype)

    def extremes(self, count: int, which: str) -> tuple[Array, Array]:
        """`count` eigenvalues in ascending order and their vectors (count, N); orthogonal to the held ones where those do
        not suffice."""
        known = self.known
        norms = jnp.ones_like(self.values) if self.norms is None else jnp.where(known, self.norms, 1)
        free = min(count, self.missing if self.norms is None else self.columns.size)
        values = jnp.concatenate([self.values, jnp.full(free, self.rest, self.values.dtype)])
        spare = jnp.arange(free) < self.missing + jnp.sum(~known)
        chosen = select(values, jnp.concatenate([known, spare]), count, which)
        held = jnp.minimum(chosen, self.values.size - 1)
        units = jnp.zeros((count, self.values.size), values.dtype).at[jnp.arange(count), held].set(1)
        vectors = jax.vmap(lambda unit: ravel(self.columns.push(self.rotated(unit))))(units / jnp.sqrt(norms[held])[:, None])
        if free:
            others = self._orthogonal(free)[jnp.clip(chosen - self.values.size, 0, free - 1)]
            vectors = jnp.where((chosen >= self.values.size)[:, None], others, vectors)
        return values[chosen], vectors

    def _orthogonal(self, count: int) -> Array:
        """Orthonormal vectors (count, N) that are orthogonal to the known eigenvectors."""
        rows = jax.random.normal(jax.random.key(0), (count, self.columns.size), self.values.dtype)
        lengths = jnp.where(self.known, 1 if self.norms is None else 1 / jnp.where(self.known, self.norms, 1), 0)

        def without(row: Array) -> Array:
            vector = unravel(self.columns.structure, row)
            return row - ravel(self.columns.push(self.rotated(lengths * self.coefficients(vector))))

        for _ in range(2):
            rows = jnp.linalg.qr(jax.vmap(without)(rows).T)[0].T
        return rows


def eigen_of(reduction: Reduction) -> Eigen:
    """The eigendecomposition of a reduced operator."""
    values, rotation = jnp.linalg.eigh(reduction.matrix)
    norms = None if reduction.sign is None else jnp.maximum(reduction.sign * values, 0)
    return Eigen(reduction.columns, rotation, values, norms, jnp.zeros((), values.dtype))


def select(values: Array, there: Array, count: int, which: str) -> Array:
    """The places of the `count` extreme ones of the values that are there, in ascending order of those."""
    if which == "both":
        low = select(values, there, count // 2, "smallest")
        taken = there.at[low].set(False) if count // 2 else there
        chosen = jnp.concatenate([low, select(values, taken, count - count // 2, "largest")])
    else:
        keys = {"magnitude": jnp.abs, "largest": lambda v: v, "smallest": lambda v: -v}
        if which not in keys:
            raise InputError(f"eigh: which must be 'magnitude', 'largest', 'smallest' or 'both', got {which!r}")
        chosen = jax.lax.top_k(jnp.where(there, keys[which](values), -jnp.inf), count)[1]
    return chosen[jnp.argsort(values[chosen])]


def refuse(wrong: Array, error: type[Exception], message: Callable[[], str], *arrays: Any) -> Any:
    """`arrays`, or `error` where `wrong`: at once where that is known, when it runs where it is traced."""
    if isinstance(wrong, Tracer):
        return eqx.error_if(arrays, wrong, within() + message())
    if bool(wrong):
        raise error(message())
    return arrays


def rounding(dtype: Any) -> float:
    """What computed eigenvalues are uncertain by, as a part of the largest: LAPACK's are within a few units of rounding."""
    return 10 * float(jnp.finfo(dtype).eps)


def nearest_to_zero(eigen: Eigen, damping: Any) -> tuple[Array, Array, Array]:
    """The eigenvalue of `H + λI` nearest to zero, whether it is zero to rounding, and the tolerance for that."""
    values = eigen.values + damping
    tolerance = rounding(values.dtype) * jnp.max(jnp.abs(values), initial=0)
    tolerances = jnp.full(values.shape, tolerance)
    if eigen.missing:  # what is orthogonal to the columns is exact
        values, tolerances = jnp.append(values, eigen.rest + damping), jnp.append(tolerances, 0)
    if not values.size:
        return jnp.ones((), values.dtype), jnp.zeros((), bool), tolerance
    place = jnp.argmin(jnp.abs(values))
    return values[place], jnp.any(~(jnp.abs(values) > tolerances)), tolerance


def refuse_singular(what: str, eigen: Eigen, damping: Any) -> Eigen:
    """Raise `SingularError` where `H + λI` is singular to rounding."""
    nearest, wrong, tolerance = nearest_to_zero(eigen, damping)

    def message() -> str:
        return singular_message(what, eigen.columns.size, damping, nearest - damping, tolerance)

    return refuse(wrong, SingularError, message, eigen)[0]


def refuse_indefinite(what: str, eigen: Eigen, damping: Any) -> Eigen:
    """Raise `SingularError` unless `H + λI` is positive definite."""
    values = jnp.append(eigen.values, eigen.rest) if eigen.missing else eigen.values
    lowest = jnp.min(values, initial=jnp.inf) + damping
    _, wrong, _ = nearest_to_zero(eigen, damping)

    def message() -> str:
        number = "?" if isinstance(lowest, Tracer) else f"{float(lowest - damping):.6g}"
        return (
            f"{what}: H + damping I ({eigen.columns.size} unknowns) is not positive definite: the lowest eigenvalue of H is "
            f"{number}. Take more damping, or absolute() or positive_part() of H first."
        )

    return refuse(wrong | ~(lowest > 0), SingularError, message, eigen)[0]


def singular_message(what: str, size: int, damping: Any, eigenvalue: Any, tolerance: Any) -> str:
    """What `SingularError` says; without numbers where they are traced."""

    def text(number: Any) -> str:
        return "?" if isinstance(number, Tracer) else f"{float(number):.6g}"

    return (
        f"{what}: H + {text(damping)} I ({size} x {size}) is singular to rounding: H has the eigenvalue {text(eigenvalue)}, "
        f"and its sum with the damping is within {text(tolerance)} of zero. Choose another damping; for an indefinite H, "
        "absolute() or positive_part() plus any positive damping can be solved with."
    )
