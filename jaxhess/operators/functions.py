"""Functions of a symmetric operator: its extremes, h(H), roots, samples, positive parts.

All by an eigendecomposition in the operator's reduced space of k dimensions (`jaxhess.operators.reduction`); extremes by
iterations where that is too large.

    H = V diag(λ) V^T      h(H) = V diag(h(λ)) V^T      x = (H + λI)^(-1/2) ε,  ε ~ N(0, I)  has covariance (H + λI)^-1
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from jaxhess._linalg import available_bytes, widened
from jaxhess._typing import Array, InputError, NotConvergedError, PyTree
from jaxhess.operators.eigen import Eigen, eigen_of, refuse, refuse_indefinite, refuse_singular, rounding
from jaxhess.operators.extremes import ExtremesInfo, extreme_eigenpairs
from jaxhess.operators.mapped import require_symmetric
from jaxhess.operators.paths import paths_of, spread
from jaxhess.operators.reduction import Reduction, dense_reduction, flat_dtype, unravel
from jaxhess.operators.support import as_scalar, sign_of

__all__ = [
    "NegativeCurvature",
    "SpectralFunctions",
    "as_damping",
    "check_method",
    "dampings_of",
    "is_scalar",
    "late",
    "provides",
    "times",
    "wide",
]

_DIRECT = 6144
SMALL = 256

# What makes operators of others is known only above them: modules there put their functions here.
late: dict[str, Callable[..., Any]] = {}


def provides(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as what operators call by `name`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        late[name] = function
        return function

    return register


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NegativeCurvature:
    """The lowest eigenvalue, 0-d, and its direction of length 1; both zero where no eigenvalue is negative."""

    eigenvalue: Array
    direction: PyTree


class SpectralFunctions(lx.AbstractLinearOperator):
    """Mixin of the symmetric operators: what is made of eigenvalues and eigenvectors."""

    if TYPE_CHECKING:
        tags: frozenset[object]

    def _reduction(self) -> Reduction:
        """The operator in the smallest space there is; its dense form by default."""
        return dense_reduction(self)

    def _reduced_size(self) -> int:
        """k of `_reduction`, without computing it."""
        return self.in_size()

    def _eigen(self) -> Eigen:
        return _eigen(self)

    def _held(self) -> str:
        """Why `_eigen` takes next to nothing, "" where it does not."""
        return ""

    def _absorb(self, dampings: list[Any]) -> tuple[Any, float, list[Array] | None]:
        """An operator K, a number μ and scales S with `H + D = S^-1 (K + μ I) S^-1`, D a damping for each parameter."""
        positive = all(sign_of(d) in (0, 1) for d in dampings) and lx.is_positive_semidefinite(self)
        return late["damped"](self, dampings, lx.positive_semidefinite_tag if positive else ()), 0.0, None

    def _choose(self, method: str) -> tuple[str, str]:
        """The method for a solve, and why."""
        if method != "auto":
            return method, ""
        if self._held():
            return "eigh", self._held()
        k = self._reduced_size()
        needed = 4 * k * k * 8
        if k <= _DIRECT and needed < available_bytes() / 2:
            kind = "eigh" if k <= SMALL else "direct"
            return kind, f"{k} dimensions of the reduced space are factored"
        return "iterate", f"the reduced space has {k} dimensions, too many to factor"

    def eigh(
        self,
        k: int | None = None,
        *,
        which: Any = "magnitude",
        method: str = "auto",
        tolerance: float = 1e-6,
        return_info: bool = False,
    ) -> Any:
        """Extreme eigenvalues (k,) in ascending order, and their eigenvectors: the structure with a leading axis k.

        `which` are those of largest "magnitude", the "largest", the "smallest", or "both" ends; all N without `k`.
        `method` is "exact" (in the reduced space), "iterative" (block Krylov, to `tolerance` of the largest |eigenvalue|)
        or "auto". With `return_info`, a third result says how many products were taken and each value's error.

        Raises `NotConvergedError` where iterations stop before the tolerance and `return_info` is not set, `InputError`
        for a k beyond N.
        """
        name = f"{type(self).__name__}.eigh"
        check_method(name, method, ("auto", "exact", "iterative"))
        require_symmetric(self, "eigh")
        count = self.in_size() if k is None else k
        if not 0 < count <= self.in_size():
            raise InputError(f"{name}: there are {self.in_size()} eigenvalues, k={k} were asked for")
        if method == "auto":
            method = "exact" if self._held() else method
        if method == "auto":
            few = self._reduced_size() > SMALL * 4 and 8 * count <= self._reduced_size()
            method = "iterative" if few and self._reduced_size() >= self.in_size() else "exact"
            method = "iterative" if few and self._choose("auto")[0] == "iterate" else method
        if method == "exact":
            values, vectors, error = _extremes(self._eigen(), count, which)
            info = ExtremesInfo(jnp.zeros((), int), error, jnp.ones((), bool))
        else:
            start = self._start()
            values, vectors, info = extreme_eigenpairs(self, count, which=which, tolerance=tolerance, start=start)
        if return_info:
            return values, vectors, info

        def message() -> str:
            return (
                f"{name}: the {count} eigenvalues asked for are not converged to {tolerance:g} of the largest. Take fewer, "
                "a wider tolerance, or method='exact'; return_info=True returns what there is."
            )

        return refuse(~info.converged, NotConvergedError, message, values, vectors)

    def _start(self) -> Any:
        """Where iterations for extremes start, or None."""
        return None

    def matrix_function(self, function: Callable[[Array], Array]) -> Any:
        """`h(H)`: the operator with the same eigenvectors and `function` of every eigenvalue (an array function). Where H is
        tagged positive semidefinite, eigenvalues that rounding has made negative are zero before."""
        require_symmetric(self, "matrix_function")
        eigen = self._eigen()
        if lx.is_positive_semidefinite(self):
            eigen = eigen.mapped(lambda values: jnp.maximum(values, 0))
        return late["spectral"](eigen.mapped(function), ())

    def absolute(self, *, per_example: bool = False) -> Any:
        """`|H|`: the same eigenvectors, absolute values of the eigenvalues. With `per_example`, `|Q_i|` of every example
        before the sum, which keeps the structure; only where there are such Q."""
        return self._positive(jnp.abs, "absolute", per_example)

    def positive_part(self, *, per_example: bool = False) -> Any:
        """The nearest positive semidefinite operator: negative eigenvalues replaced by zero. With `per_example`, those of
        every example's Q before the sum, which keeps the structure; only where there are such Q."""
        return self._positive(lambda values: jnp.maximum(values, 0), "positive_part", per_example)

    def _positive(self, function: Callable[[Array], Array], what: str, per_example: bool) -> Any:
        require_symmetric(self, what)
        if per_example:
            return self._per_example(function, what)
        if lx.is_positive_semidefinite(self):
            return self
        return late["spectral"](self._eigen().mapped(function), lx.positive_semidefinite_tag)

    def _per_example(self, function: Callable[[Array], Array], what: str) -> Any:
        if lx.is_positive_semidefinite(self):
            return self
        raise InputError(
            f"{type(self).__name__}.{what}: there is no matrix of each example to take it of, as there is for a weight that "
            "meets one vector of each example and, in the whole operator, for its bias; leave out per_example"
        )

    def inverse(self, damping: Any = 0.0) -> Any:
        """`(H + damping I)^-1` as an operator. Raises `SingularError` where there is none."""
        require_symmetric(self, "inverse")
        damping, given = as_damping(self, damping), damping
        positive = lx.is_positive_semidefinite(self) and sign_of(given) in (0, 1)
        eigen = refuse_singular(f"{type(self).__name__}.inverse", self._eigen(), damping)
        tags = lx.positive_semidefinite_tag if positive else ()
        return late["spectral"](eigen.mapped(lambda values: 1 / (values + damping)), tags)

    def inverse_sqrt(self, damping: Any = 0.0) -> Any:
        """`(H + damping I)^(-1/2)`, symmetric. Raises `SingularError` unless `H + damping I` is positive definite."""
        require_symmetric(self, "inverse_sqrt")
        damping = as_damping(self, damping)
        eigen = refuse_indefinite(f"{type(self).__name__}.inverse_sqrt", self._eigen(), damping)
        return late["spectral"](eigen.mapped(lambda values: 1 / jnp.sqrt(values + damping)), lx.positive_semidefinite_tag)

    def sample(self, key: Array, damping: Any = 0.0, shape: tuple[int, ...] = ()) -> PyTree:
        """Draws from the normal distribution with mean zero and covariance `(H + damping I)^-1`: the operator's structure
        with `shape` as leading axes. Raises `SingularError` unless `H + damping I` is positive definite."""
        if not is_scalar(damping):
            operator, rest, scales = self._absorb(dampings_of(f"{type(self).__name__}.sample", damping, self.in_structure()))
            return times(scales, operator.sample(key, rest, shape))
        root = self.inverse_sqrt(damping)
        structure, size = self.in_structure(), self.in_size()
        draws = jax.random.normal(key, (math.prod(shape), size), flat_dtype(structure))
        samples = jax.vmap(lambda draw: root.mv(unravel(structure, draw)))(draws)
        return jax.tree.map(lambda s: s.reshape(*shape, *s.shape[1:]), samples)

    def negative_curvature_direction(self) -> NegativeCurvature:
        """The eigenvector of the lowest eigenvalue, where that is negative: `NegativeCurvature(eigenvalue, direction)`."""
        values, vectors = self.eigh(min(2, self.in_size()), which="both")
        negative = values[0] < -rounding(values.dtype) * jnp.max(jnp.abs(values))
        direction = jax.tree.map(lambda v: jnp.where(negative, v[0], 0), vectors)
        return NegativeCurvature(jnp.where(negative, values[0], 0), direction)


def is_scalar(damping: Any) -> bool:
    """Whether a damping is one number for all parameters, rather than a tree of them."""
    return isinstance(damping, numbers.Number | np.generic | np.ndarray | jax.Array)


def as_damping(operator: Any, damping: Any) -> Array:
    if not is_scalar(damping) or jnp.ndim(damping) != 0:
        raise InputError(
            f"{type(operator).__name__}: the damping must be one number here, got {_found(damping)}; several, "
            "one for each parameter, are for solve() of operators on trees"
        )
    return as_scalar(f"{type(operator).__name__}, damping", damping, flat_dtype(operator.in_structure()))


def dampings_of(what: str, damping: Any, structure: PyTree) -> list[Any]:
    """One damping for each leaf of `structure`, from a tree that leads it. Raises `InputError` for what is no number."""
    dampings = spread(what, damping, structure)
    for path, each in zip(paths_of(structure), dampings, strict=True):
        if not is_scalar(each) or jnp.iscomplexobj(each):
            raise InputError(f"{what}: the damping of {path or 'the parameter'!r} must be a real number, got {each!r}")
    return dampings


def _found(damping: Any) -> str:
    return f"an array of shape {jnp.shape(damping)}" if is_scalar(damping) else str(jax.tree.structure(damping))


def wide(operator: Any) -> Any:
    """The operator with arrays of float32 at least: there are no factorisations in less."""
    narrow = jnp.finfo(jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(operator.in_structure())))).bits < 32
    return jax.tree.map(widened, operator) if narrow else operator


def times(scales: list[Array] | None, vector: PyTree) -> PyTree:
    """A tree with each leaf multiplied by its number."""
    if scales is None:
        return vector
    leaves, treedef = jax.tree.flatten(vector)
    return jax.tree.unflatten(treedef, [s.astype(leaf.dtype) * leaf for s, leaf in zip(scales, leaves, strict=True)])


def check_method(name: str, method: str, known: tuple[str, ...], what: str = "method") -> None:
    if method not in known:
        raise InputError(f"{name}: {what}={method!r} is not known; there is {', '.join(map(repr, known))}")


# Compiled here once for each structure.


@jax.jit
def _eigen(operator: Any) -> Eigen:
    return eigen_of(wide(operator)._reduction())


@functools.partial(jax.jit, static_argnums=(1, 2))
def _extremes(eigen: Eigen, count: int, which: str) -> tuple[Array, PyTree, Array]:
    values, vectors = eigen.extremes(count, which)
    error = rounding(values.dtype) * jnp.max(jnp.abs(eigen.values), initial=0)
    tree = jax.vmap(lambda row: unravel(eigen.columns.structure, row))(vectors)
    return values, tree, jnp.full(values.shape, error)
