"""What every symmetric operator can do beyond products: solve, logarithms of determinants, extremes, functions of itself.

All of it is exact where the operator, in its reduced space of k dimensions (`jaxhess.operators.reduction`), can be factored;
beyond that, solves and extremes go by iterations (`method` says which, and why), whose tolerance is checked: one that was
not reached raises `NotConvergedError`, or is told by `info` on request.
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
from jax.core import Tracer

from jaxhess._linalg import available_bytes
from jaxhess._typing import Array, InputError, NotConvergedError, PyTree
from jaxhess.operators import direct
from jaxhess.operators.eigen import (
    Eigen,
    eigen_of,
    nearest_to_zero,
    refuse,
    refuse_indefinite,
    refuse_singular,
    rounding,
)
from jaxhess.operators.extremes import ExtremesInfo, extreme_eigenpairs
from jaxhess.operators.iterative import SolveInfo, iterative_solve
from jaxhess.operators.mapped import require_symmetric
from jaxhess.operators.paths import leaves_like, spread
from jaxhess.operators.reduction import Reduction, dense_reduction, flat_dtype, ravel, unravel
from jaxhess.operators.support import as_scalar

__all__ = ["NegativeCurvature", "Solvable", "late", "provides"]

_DIRECT = 6144
_SMALL = 256

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


class Solvable(lx.AbstractLinearOperator):
    """Mixin of the symmetric operators. `damping` is λ in `H + λI`, a number; `solve`, `logdet` and `sample` of an operator
    on a tree also take one for each parameter, as a tree of numbers that leads the parameters'."""

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

    def factorize(self, damping: Any = None, *, method: str = "auto") -> Any:
        """Factor once, to solve many times.

        Without `damping`: an eigendecomposition in the reduced space, as a `SpectralOperator` that equals this one; any
        damping and any function of the operator then costs two small matrix products. With it: a `Factorization` for
        that damping alone, Cholesky where the operator is tagged positive semidefinite and LU otherwise, in a tenth of
        the time. `method` is "auto", "eigh", "cholesky" or "lu".

        Raises `SingularError` if `H + damping I` is singular to rounding, `DenseTooLargeError` if the reduced matrix does
        not fit in memory.
        """
        _check_method("factorize", method, ("auto", "eigh", "cholesky", "lu"))
        require_symmetric(self, "factorize")
        if method == "eigh" or (method == "auto" and damping is None):
            return late["spectral"](self._eigen(), self.tags)
        if damping is None:
            raise InputError(f"{type(self).__name__}.factorize: method={method!r} needs a damping; without one, take 'eigh'")
        return self._factored(_as_damping(self, damping), method).checked(f"{type(self).__name__}.factorize")

    def _factored(self, damping: Array, method: str) -> direct.Factorization:
        kind = method if method in ("cholesky", "lu") else "cholesky" if lx.is_positive_semidefinite(self) else "lu"
        return direct.factored(self._reduction(), damping, kind)

    def solve(
        self,
        vector: PyTree,
        damping: Any = 0.0,
        *,
        method: str = "auto",
        preconditioner: Any = "auto",
        tolerance: float | None = None,
        max_steps: int | None = None,
        start: PyTree | None = None,
        return_info: bool = False,
    ) -> Any:
        """`(H + damping I)^-1` times a vector of the operator's structure.

        `method` is "eigh", "cholesky" or "lu" (exact, in the reduced space), "cg" or "minres" (iterations by products), or
        "auto": exact where the reduced matrix is small enough in size and memory. The others matter to iterations only:
        `preconditioner`, an operator like the inverse, "auto" (of Kronecker form where there is one) or None; `tolerance`,
        the relative residual; `max_steps`; `start`, a first guess. With `return_info`, the pair of the solution and its
        `SolveInfo`: method, why, iterations, true residual, whether converged; nothing is raised then.

        Raises `SingularError` where `H + damping I` is singular to rounding, naming the eigenvalue near `-damping`;
        `NotConvergedError` where iterations stop before the tolerance; `InputError` for a vector of other shapes.
        """
        name = f"{type(self).__name__}.solve"
        _check_method(name, method, ("auto", "eigh", "cholesky", "lu", "cg", "minres"))
        require_symmetric(self, "solve")
        structure = self.in_structure()
        leaves = leaves_like(name, structure, vector)
        shapes, treedef = jax.tree.flatten(structure)
        vector = jax.tree.unflatten(treedef, [jnp.asarray(x, s.dtype) for x, s in zip(leaves, shapes, strict=True)])
        if not is_scalar(damping):
            options = {"method": method, "tolerance": tolerance, "max_steps": max_steps, "start": start}
            return self._solve_weighted(vector, damping, preconditioner=preconditioner, return_info=return_info, **options)
        chosen, reason = self._choose(method)
        if chosen in ("cg", "minres", "iterate"):
            if isinstance(preconditioner, str):
                preconditioner = self._preconditioner(preconditioner, damping)
            solution, info = iterative_solve(
                self, vector, damping, method="auto" if chosen == "iterate" else chosen, preconditioner=preconditioner,
                tolerance=tolerance, max_steps=max_steps, start=start, reason=reason,
            )  # fmt: skip
            return (solution, info) if return_info else _converged(name, solution, info)
        damping = _as_damping(self, damping)
        if chosen == "eigh":
            eigen = self._eigen()
            nearest, singular, _ = nearest_to_zero(eigen, damping)
            if not return_info:
                eigen = refuse_singular(name, eigen, damping)
            solution = _solved(eigen, vector, damping)
            nearest = nearest - damping
        else:
            factors = self._factored(damping, chosen)
            if not return_info:
                factors = factors.checked(name)
            solution, nearest, singular = direct.solution(factors, vector), factors.eigenvalue, factors.singular
            chosen = factors.kind
        if not return_info:
            return solution
        residual = _residual(self, vector, solution, damping)
        zero = jnp.zeros((), int)
        return solution, SolveInfo(chosen, reason, zero, residual, ~singular, nearest)

    def _solve_weighted(
        self, vector: PyTree, damping: PyTree, *, preconditioner: Any, return_info: bool, method: str, **options: Any
    ) -> Any:
        """`solve` with a damping for each parameter."""
        name, structure = f"{type(self).__name__}.solve", self.in_structure()
        dampings = spread(name, damping, structure)
        chosen, reason = self._choose(method)
        if chosen in ("cg", "minres", "iterate"):
            if isinstance(preconditioner, str):
                preconditioner = self._preconditioner(preconditioner, damping)
            kind, tree = (
                "auto" if chosen == "iterate" else chosen,
                jax.tree.unflatten(jax.tree.structure(structure), dampings),
            )
            solution, info = iterative_solve(
                self, vector, tree, method=kind, preconditioner=preconditioner, reason=reason, **options
            )
            return (solution, info) if return_info else _converged(name, solution, info)
        operator, rest, scales = self._absorb(dampings)
        result = operator.solve(_times(scales, vector), rest, method=method, return_info=return_info)
        if not return_info:
            return _times(scales, result)
        return _times(scales, result[0]), result[1]

    def _absorb(self, dampings: list[Any]) -> tuple[Any, float, list[Array] | None]:
        """An operator K, a number μ and scales S with `H + D = S^-1 (K + μ I) S^-1`, D a damping for each parameter."""
        return late["damped"](self, dampings), 0.0, None

    def _choose(self, method: str) -> tuple[str, str]:
        """The method for a solve, and why."""
        if method != "auto":
            return method, ""
        k = self._reduced_size()
        needed = 4 * k * k * 8
        if k <= _DIRECT and needed < available_bytes() / 2:
            kind = "eigh" if k <= _SMALL else "direct"
            return kind, f"{k} dimensions of the reduced space are factored"
        return "iterate", f"the reduced space has {k} dimensions, too many to factor"

    def _preconditioner(self, which: str, damping: Any) -> Any:
        """An approximate inverse by its name, or None where there is none."""
        _check_method(f"{type(self).__name__}.solve", which, ("auto", "kronecker"), "preconditioner")
        found = late["preconditioner"](self, damping, asked=which == "kronecker")
        if found is None and which == "kronecker":
            raise InputError(
                f"{type(self).__name__}.solve: there are no factors for a Kronecker preconditioner; pass an operator"
            )
        return found

    def logdet(self, damping: Any = 0.0) -> Array:
        """`log |det(H + damping I)|`, 0-d, exact in the reduced space; -inf where singular to rounding.

        Raises `DenseTooLargeError` where that does not fit; `jaxhess.spectra.stochastic_logdet` estimates it.
        """
        return self.slogdet(damping)[1]

    def slogdet(self, damping: Any = 0.0) -> tuple[Array, Array]:
        """The sign of `det(H + damping I)` and the logarithm of its absolute value, 0-d both, as `jnp.linalg.slogdet`."""
        require_symmetric(self, "slogdet")
        if not is_scalar(damping):
            operator, rest, scales = self._absorb(spread(f"{type(self).__name__}.slogdet", damping, self.in_structure()))
            sign, value = operator.slogdet(rest)
            sizes = [leaf.size for leaf in jax.tree.leaves(self.in_structure())]
            return sign, value - 2 * sum(n * jnp.log(s) for n, s in zip(sizes, scales or (), strict=False))
        return _slogdet(self._eigen(), _as_damping(self, damping))

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
        _check_method(name, method, ("auto", "exact", "iterative"))
        require_symmetric(self, "eigh")
        count = self.in_size() if k is None else k
        if not 0 < count <= self.in_size():
            raise InputError(f"{name}: there are {self.in_size()} eigenvalues, k={k} were asked for")
        if method == "auto":
            few = self._reduced_size() > _SMALL * 4 and 8 * count <= self._reduced_size()
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
        """`h(H)`: the operator with the same eigenvectors and `function` of every eigenvalue (an array function)."""
        require_symmetric(self, "matrix_function")
        return late["spectral"](self._eigen().mapped(function), ())

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
            f"{type(self).__name__}.{what}: there is no matrix of each example to take it of; leave out per_example"
        )

    def inverse(self, damping: Any = 0.0) -> Any:
        """`(H + damping I)^-1` as an operator. Raises `SingularError` where there is none."""
        require_symmetric(self, "inverse")
        damping = _as_damping(self, damping)
        eigen = refuse_singular(f"{type(self).__name__}.inverse", self._eigen(), damping)
        return late["spectral"](eigen.mapped(lambda values: 1 / (values + damping)), _definite(self))

    def inverse_sqrt(self, damping: Any = 0.0) -> Any:
        """`(H + damping I)^(-1/2)`, symmetric. Raises `SingularError` unless `H + damping I` is positive definite."""
        require_symmetric(self, "inverse_sqrt")
        damping = _as_damping(self, damping)
        eigen = refuse_indefinite(f"{type(self).__name__}.inverse_sqrt", self._eigen(), damping)
        return late["spectral"](eigen.mapped(lambda values: 1 / jnp.sqrt(values + damping)), lx.positive_semidefinite_tag)

    def sample(self, key: Array, damping: Any = 0.0, shape: tuple[int, ...] = ()) -> PyTree:
        """Draws from the normal distribution with mean zero and covariance `(H + damping I)^-1`: the operator's structure
        with `shape` as leading axes. Raises `SingularError` unless `H + damping I` is positive definite."""
        if not is_scalar(damping):
            operator, rest, scales = self._absorb(spread(f"{type(self).__name__}.sample", damping, self.in_structure()))
            return _times(scales, operator.sample(key, rest, shape))
        root = self.inverse_sqrt(damping)
        structure, size = self.in_structure(), self.in_size()
        draws = jax.random.normal(key, (math.prod(shape), size), flat_dtype(structure))
        samples = jax.vmap(lambda draw: root.mv(unravel(structure, draw)))(draws)
        return jax.tree.map(lambda s: s.reshape(*shape, *s.shape[1:]), samples)

    def negative_curvature_direction(self) -> NegativeCurvature:
        """The eigenvector of the lowest eigenvalue, where that is negative: `NegativeCurvature(eigenvalue, direction)`."""
        values, vectors = self.eigh(min(2, self.in_size()), which="both")
        negative = values[0] < -rounding(self._reduced_size(), values.dtype) * jnp.max(jnp.abs(values))
        direction = jax.tree.map(lambda v: jnp.where(negative, v[0], 0), vectors)
        return NegativeCurvature(jnp.where(negative, values[0], 0), direction)


def is_scalar(damping: Any) -> bool:
    """Whether a damping is one number for all parameters, rather than a tree of them."""
    return isinstance(damping, numbers.Number | np.generic | np.ndarray | jax.Array)


def _as_damping(operator: Any, damping: Any) -> Array:
    if not is_scalar(damping):
        raise InputError(
            f"{type(operator).__name__}: the damping must be one number here, got {jax.tree.structure(damping)}; several, "
            "one for each parameter, are for solve() of operators on trees"
        )
    return as_scalar(f"{type(operator).__name__}, damping", damping, flat_dtype(operator.in_structure()))


def _times(scales: list[Array] | None, vector: PyTree) -> PyTree:
    """A tree with each leaf multiplied by its number."""
    if scales is None:
        return vector
    leaves, treedef = jax.tree.flatten(vector)
    return jax.tree.unflatten(treedef, [s.astype(leaf.dtype) * leaf for s, leaf in zip(scales, leaves, strict=True)])


def _check_method(name: str, method: str, known: tuple[str, ...], what: str = "method") -> None:
    if method not in known:
        raise InputError(f"{name}: {what}={method!r} is not known; there is {', '.join(map(repr, known))}")


def _definite(operator: Any) -> Any:
    return lx.positive_semidefinite_tag if lx.is_positive_semidefinite(operator) else ()


def _converged(name: str, solution: PyTree, info: SolveInfo) -> PyTree:
    def message() -> str:
        if isinstance(info.residual, Tracer):
            reached = "?"
        else:
            reached = f"{float(info.residual):.3g} after {int(info.iterations)} steps"
        return (
            f"{name}: {info.method} stopped at a relative residual of {reached}, above the tolerance. Give more max_steps "
            "or damping, a preconditioner, or a wider tolerance; return_info=True returns what there is."
        )

    return refuse(~info.converged, NotConvergedError, message, solution)[0]


# Compiled here once for each structure.


@jax.jit
def _eigen(operator: Any) -> Eigen:
    return eigen_of(operator._reduction())


@jax.jit
def _solved(eigen: Eigen, vector: PyTree, damping: Array) -> PyTree:
    return eigen.mapped(lambda values: 1 / (values + damping)).product(vector)


@jax.jit
def _slogdet(eigen: Eigen, damping: Array) -> tuple[Array, Array]:
    values = eigen.values + damping
    missing, rest = eigen.missing, eigen.rest + damping
    _, singular, _ = nearest_to_zero(eigen, damping)
    sign, value = jnp.prod(jnp.sign(values)), jnp.sum(jnp.log(jnp.abs(values)))
    if missing:
        sign, value = sign * jnp.sign(rest) ** (missing % 2), value + missing * jnp.log(jnp.abs(rest))
    dtype = values.dtype
    return jnp.where(singular, 0, sign).astype(dtype), jnp.where(singular, -jnp.inf, value).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _extremes(eigen: Eigen, count: int, which: str) -> tuple[Array, PyTree, Array]:
    values, vectors = eigen.extremes(count, which)
    error = rounding(eigen.columns.count, values.dtype) * jnp.max(jnp.abs(eigen.values), initial=0)
    tree = jax.vmap(lambda row: unravel(eigen.columns.structure, row))(vectors)
    return values, tree, jnp.full(values.shape, error)


@jax.jit
def _residual(operator: Any, vector: PyTree, solution: PyTree, damping: Array) -> Array:
    left = jax.tree.map(lambda b, h, x: b - h - damping * x, vector, operator.mv(solution), solution)
    norm = jnp.linalg.norm(ravel(vector))
    return jnp.linalg.norm(ravel(left)) / jnp.where(norm > 0, norm, 1)
