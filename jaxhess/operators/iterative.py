"""Iterative solves of `(H + λI) x = b`, by products with H alone, for any symmetric lineax operator on arrays or trees.

    conjugate gradients     H known to be positive semidefinite: the shortest error in the norm of H + λI at every step
    MINRES                  any other H: the shortest residual at every step

What is told of the result is measured at the end: `||b - (H + λI) x|| / ||b||`, never a recurrence's idea of it.
Derivatives with respect to the operator, the damping and the vector go by the equation, not through the iterations:

    (H + λI) dx = db - (dH + dλ) x
"""

import dataclasses
import functools
import numbers
import operator as operators
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.core import Tracer

from jaxhess._linalg import widened
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.krylov import Refined, conjugate_gradients, minres, refine, step_limit
from jaxhess.operators.mapped import require_symmetric
from jaxhess.operators.minres import MINRES
from jaxhess.operators.paths import spread
from jaxhess.operators.preconditioner import block_preconditioner, kronecker_preconditioner
from jaxhess.operators.vectors import dtype_of, measured, norm, plus

__all__ = ["MINRES", "SolveInfo", "block_preconditioner", "iterative_solve", "kronecker_preconditioner"]

_METHODS = {"cg": conjugate_gradients, "minres": minres}
_TOLERANCES = {32: 1e-5, 64: 1e-10}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SolveInfo:
    """How a solve of `(H + damping I) x = b` went.

    `method` is "eigh", "cholesky", "lu", "cg" or "minres"; `reason` says why it was taken, "" where it was asked for;
    `iterations`, 0-d, is 0 for direct methods; `residual` is `||b - (H + damping I) x|| / ||b||`, 0-d, computed from x (the
    norm itself where b is zero); `converged`, 0-d, whether that is within the tolerance; `eigenvalue` is the eigenvalue of
    H nearest to -damping where a direct method knows it, else None.

    >>> import jax.numpy as jnp
    >>> SolveInfo("cg", "", jnp.array(12), jnp.array(3e-7), jnp.array(True))
    SolveInfo(cg: converged, 12 iterations, relative residual 3e-07)
    """

    method: str = dataclasses.field(metadata={"static": True})
    reason: str = dataclasses.field(metadata={"static": True})
    iterations: Array
    residual: Array
    converged: Array
    eigenvalue: Array | None = None

    def __repr__(self) -> str:
        converged = _text(self.converged)
        parts = [{"True": "converged", "False": "NOT converged"}.get(converged, f"converged {converged}")]
        if self.method in _METHODS:
            count = _text(self.iterations)
            parts.append(f"{count} iteration{'' if count == '1' else 's'}")
        parts.append(f"relative residual {_text(self.residual)}")
        if self.eigenvalue is not None:
            parts.append(f"nearest eigenvalue {_text(self.eigenvalue)}")
        reason = f"; {self.reason}" if self.reason else ""
        return f"SolveInfo({self.method}: {', '.join(parts)}{reason})"


def iterative_solve(
    operator: lx.AbstractLinearOperator,
    vector: PyTree,
    damping: PyTree = 0.0,
    *,
    method: str = "auto",
    preconditioner: lx.AbstractLinearOperator | None = None,
    tolerance: Any = None,
    max_steps: int | None = None,
    start: PyTree | None = None,
    reason: str = "",
) -> tuple[PyTree, SolveInfo]:
    """The solution x of `(operator + damping I) x = vector`, and what is to be known of it.

    `operator` is symmetric, on one array or on a tree of them; `vector` and `start`, a first guess, have its structure.
    `damping` is a number or 0-d array, or a tree of them, a prefix of the vector's: one for each parameter. `method` is
    "cg", "minres" or "auto": conjugate gradients where the operator is tagged positive semidefinite, unless the damping is
    known to be negative; `reason` stands before the reason for that in `SolveInfo`. `preconditioner` is a lineax operator
    like the INVERSE of `operator + damping I`, tagged positive semidefinite. `tolerance` is that of
    `||b - A x|| / ||b||`, 1e-10 by default (1e-5 in float32); `max_steps` is 10 N, at most 10,000.

    Nothing is raised for a solve that fails: `SolveInfo.converged` is False then, with the true residual, and x is the best
    found; NaN where input is not finite. On a singular operator MINRES gives the least-squares solution of least norm
    (with neither `start` nor `preconditioner`). Derivatives are defined for regular ones; they are NaN where their own
    solve does not converge. bfloat16 and float16 are solved, and returned, in float32.

    Raises `InputError` for an operator not known to be symmetric, for arguments of other structures or shapes, and for
    names of methods that there are not.

    >>> import jax.numpy as jnp, lineax as lx
    >>> H = lx.MatrixLinearOperator(jnp.array([[1.0, 3.0], [3.0, 1.0]]), lx.symmetric_tag)
    >>> x, info = iterative_solve(H, jnp.array([8.0, 8.0]), damping=4.0)
    >>> x.round(4).tolist(), info.method, info.iterations.item()
    ([1.0, 1.0], 'minres', 1)
    """
    require_symmetric(operator, "iterative_solve")
    if method != "auto" and method not in _METHODS:
        raise InputError(f"iterative_solve: method={method!r} is not known; there is 'auto', 'cg', 'minres'")
    structure = operator.in_structure()
    vector = _as_working("vector", structure, vector)
    start = None if start is None else _as_working("start", structure, start)
    dampings = _dampings(structure, damping)
    if preconditioner is not None:
        _check_preconditioner(structure, preconditioner)
    if max_steps is not None and operators.index(max_steps) < 0:
        raise InputError(f"iterative_solve: max_steps must not be negative, got {max_steps}")
    method, reason = _chosen(operator, dampings, method, reason)
    tolerance = _TOLERANCES[jnp.finfo(dtype_of(vector)).bits] if tolerance is None else tolerance
    if isinstance(tolerance, int | float) and not tolerance >= 0:
        raise InputError(f"iterative_solve: tolerance must not be negative, got {tolerance}")

    arrays, frame = _split((operator, preconditioner))
    limit = step_limit(max_steps, vector)
    solve = _compiled if frame.is_hashable else _solve
    x, iterations, residual, converged = solve(method, limit, frame, arrays, dampings, vector, start, tolerance)
    return x, SolveInfo(method, reason, iterations, residual, converged)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _solve(method, limit, frame, arrays, dampings, vector, start, tolerance):
    """The solution, the steps, the relative residual and whether that is within the tolerance."""
    _, preconditioner = frame.joined(arrays)
    product = functools.partial(_damped, frame, arrays, dampings)
    _, size = measured(vector)
    tolerance = jnp.asarray(tolerance).astype(size.dtype)
    if start is not None:
        # From a zero vector there is one answer, and no scale for a tolerance.
        start = jax.tree.map(lambda x: jnp.where(size == 0, 0, x), start)
    precondition = None if preconditioner is None else preconditioner.mv
    found: Refined = refine(_METHODS[method], product, precondition, vector, start, tolerance * size, limit, norm)
    residual = found.residual / jnp.where(size == 0, 1, size)
    return found.solution, found.steps, residual, residual <= tolerance


@_solve.defjvp
def _solve_jvp(method, limit, frame, primals, tangents):
    arrays, dampings, _, _, tolerance = primals
    arrays_dot, dampings_dot, vector_dot, _, _ = tangents
    x, steps, residual, converged = _solve(method, limit, frame, *primals)
    # With respect to the operator and its damping, x held still.
    _, image_dot = jax.jvp(
        lambda arrays, dampings: _damped(frame, arrays, dampings, x), (arrays, dampings), (arrays_dot, dampings_dot)
    )
    right = plus(vector_dot, -1, image_dot)

    def solved(_, b):
        z, _, _, converged = _solve(method, limit, frame, arrays, dampings, b, None, tolerance)
        return jax.tree.map(lambda leaf: jnp.where(converged, leaf, jnp.nan), z)

    x_dot = jax.lax.custom_linear_solve(
        functools.partial(_damped, frame, arrays, dampings), right, solve=solved, symmetric=True
    )
    still = np.zeros(steps.shape, jax.dtypes.float0), jnp.zeros_like(residual), np.zeros(steps.shape, jax.dtypes.float0)
    return (x, steps, residual, converged), (x_dot, *still)


_compiled = jax.jit(_solve, static_argnums=(0, 1, 2))


def _damped(frame: "_Frame", arrays: Any, dampings: list[Any], vector: PyTree) -> PyTree:
    operator, _ = frame.joined(arrays)
    leaves, treedef = jax.tree.flatten(vector)
    images = jax.tree.leaves(operator.mv(vector))
    damped = [
        image.astype(leaf.dtype) + jnp.asarray(damping).astype(leaf.dtype) * leaf
        for image, damping, leaf in zip(images, dampings, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, damped)


@dataclasses.dataclass(frozen=True)
class _Frame:
    """A tree without its arrays; hashable, unless something in it is not."""

    treedef: Any
    others: tuple[Any, ...]
    places: tuple[bool, ...]

    @property
    def is_hashable(self) -> bool:
        try:
            hash(self)
        except TypeError:
            return False
        return True

    def joined(self, arrays: Any) -> Any:
        arrays, others = iter(arrays), iter(self.others)
        return jax.tree.unflatten(self.treedef, [next(arrays if is_array else others) for is_array in self.places])


def _split(tree: Any) -> tuple[list[Any], _Frame]:
    leaves, treedef = jax.tree.flatten(tree)
    places = tuple(isinstance(leaf, jax.Array | np.ndarray | np.generic | numbers.Number) for leaf in leaves)
    arrays = [leaf for leaf, is_array in zip(leaves, places, strict=True) if is_array]
    others = tuple(leaf for leaf, is_array in zip(leaves, places, strict=True) if not is_array)
    return arrays, _Frame(treedef, others, places)


def _as_working(what: str, structure: PyTree, tree: PyTree) -> PyTree:
    """The tree in the structure's dtypes, or wider where it is wider itself, and float32 at least."""
    shapes, treedef = jax.tree.flatten(structure)
    leaves, given = jax.tree.flatten(tree)
    if treedef != given:
        raise InputError(f"iterative_solve: the {what} must have the operator's structure, {treedef}, got {given}")
    for leaf, shape in zip(leaves, shapes, strict=True):
        if jnp.shape(leaf) != shape.shape:
            raise InputError(f"iterative_solve: the {what} needs shapes {_shapes(shapes)}, got {_shapes(leaves)}")
        if jnp.iscomplexobj(leaf):
            raise InputError(f"iterative_solve: the {what} is complex; solve for the real and imaginary parts")
    arrays = [widened(jnp.asarray(x, jnp.result_type(x, s.dtype))) for x, s in zip(leaves, shapes, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def _dampings(structure: PyTree, damping: PyTree) -> list[Any]:
    """One damping for each leaf."""
    dampings = spread("iterative_solve", damping, structure)
    if any(one is None or jnp.iscomplexobj(one) for one in dampings):
        raise InputError(f"iterative_solve: a damping must be a real number, got {damping!r}")
    return [jnp.asarray(one) for one in dampings]


def _check_preconditioner(structure: PyTree, preconditioner: Any) -> None:
    if not lx.is_positive_semidefinite(preconditioner):
        raise InputError(
            f"iterative_solve: the preconditioner, a {type(preconditioner).__name__}, is not tagged as positive semidefinite"
        )
    expected, given = (jax.tree.flatten(s) for s in (structure, preconditioner.in_structure()))
    if expected[1] != given[1] or _shapes(expected[0]) != _shapes(given[0]):
        raise InputError(
            f"iterative_solve: the preconditioner must have the operator's structure, shapes {_shapes(expected[0])}, got "
            f"{_shapes(given[0])}"
        )


def _chosen(operator: Any, dampings: list[Any], method: str, reason: str) -> tuple[str, str]:
    if method != "auto":
        return method, reason
    known = [one for one in dampings if not isinstance(one, Tracer)]
    if not lx.is_positive_semidefinite(operator):
        method, why = "minres", "the operator is not known to be positive semidefinite"
    elif any(float(one) < 0 for one in known):
        method, why = "minres", "the damping is negative"
    else:
        method, why = "cg", "the operator is positive semidefinite"
    return method, f"{reason}; {why}" if reason else why


def _shapes(leaves: list[Any]) -> str:
    return ", ".join(str(jnp.shape(leaf)) for leaf in leaves)


def _text(value: Any) -> str:
    """A 0-d array as text; the shape of anything else."""
    if isinstance(value, Tracer) or not hasattr(value, "shape"):
        return "traced" if hasattr(value, "shape") else str(value)
    if value.shape != ():
        return f"of shape {tuple(value.shape)}"
    try:
        return f"{value.item():.3g}" if jnp.issubdtype(value.dtype, jnp.floating) else str(value.item())
    except (AttributeError, TypeError):  # a shape without a value
        return "?"
