"""Functions with a derivative of their author's (`custom_jvp`, `custom_vjp`): is it the derivative of their value?

A straight-through estimator, a reversed or a clipped gradient has no Hessian: `jax.hessian` differentiates the rule once
and the value once, and what comes out is not symmetric. The sweep applies the rule on both sides, which is exact if and
only if the rule is the value's derivative. So the rule is held against autodiff of the value before anything is computed:
a sample, at numbers of both signs and two sizes, with cotangents of two sizes, which tell a clipped one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from jaxhess._typing import Array, UnsupportedOperationError
from jaxhess.engine.graph import Graph, Operation, everything, nested
from jaxhess.engine.plan import Plan
from jaxhess.engine.trace import body_of

__all__ = ["check_custom_derivatives", "check_derivatives_of"]

_COTANGENTS = (1.0, 1e4)


def check_custom_derivatives(plan: Plan) -> None:
    """`check_derivatives_of` all operations of a plan."""
    check_derivatives_of(plan.graph, (*plan.before, *plan.during), plan.live)


def check_derivatives_of(graph: Graph, operations: Sequence[Operation], live: frozenset[int]) -> None:
    """Raise `UnsupportedOperationError` for the first function whose rule, with respect to the variables of `live`, is not
    the derivative of its value.

    Functions that cannot be run at a fixed point (keys of random numbers, values traced outside) and values that JAX
    cannot differentiate are passed over: there the rule is all there is.
    """
    operations = [operation for operation, _ in nested(operations)]
    moving = [operation for operation in operations if any(i in live for i in operation.inputs)]
    inside = [inner for operation in moving for inner in everything(operation.branches)]
    live |= {i for op in inside for i in op.inputs if jnp.issubdtype(graph.avals[i].dtype, jnp.floating)}
    candidates = [
        operation
        for operation in (*operations, *inside)
        if operation.name.startswith("custom_")
        and body_of(operation.equation) is not None
        and any(i in live for i in operation.inputs)
        and all(isinstance(graph.avals[i].dtype, np.dtype) for i in operation.inputs)
    ]
    results = _run(graph, live, candidates)
    if results is None:  # one of them cannot be run; the others can still be judged
        results = [part[0] if (part := _run(graph, live, [operation])) else None for operation in candidates]
    for operation, comparisons in zip(candidates, results, strict=True):
        narrow = any(graph.avals[i].dtype.itemsize < 4 for i in operation.inputs if i in live)
        tolerance = 5e-2 if narrow else 1e-3
        if comparisons is None or any(all(_equal(*c, tolerance) for c in group) for group in comparisons):
            continue
        name = operation.equation.params.get("name") or operation.name
        raise UnsupportedOperationError(
            f"{name} at {operation.where} has a derivative rule that is not the derivative of its value (as a "
            "straight-through estimator, a reversed or a clipped gradient), so the error has a gradient but no "
            "Hessian. Write its value so that the rule is its derivative, for example "
            "x + jax.lax.stop_gradient(value - x), or leave the function out of the Hessian."
        )


Comparison = tuple[Any, Sequence[np.ndarray], Sequence[np.ndarray]]
Comparisons = list[list[Comparison]]


def _run(graph: Graph, live: frozenset[int], operations: Sequence[Operation]) -> list[Comparisons] | None:
    """For each operation, group of points and size of the cotangent, with a leading axis of points: whether the value is
    finite there, what the rule and what the value's autodiff pull back."""
    points = [list(_points([graph.avals[i] for i in operation.inputs])) for operation in operations]

    def pull_back(points: list[list[list[Array]]]) -> list[Any]:
        return [
            [jax.lax.map(functools.partial(_both, live, op), group) for group in groups]
            for op, groups in zip(operations, points, strict=True)
        ]

    try:
        # Compiled and run on its own: the values of an enclosing trace would only be known later.
        results = jax.jit(pull_back).lower(points).compile()(points)
        return jax.tree.map(lambda a: np.asarray(a, np.float64), results)
    except Exception:  # whatever keeps a value from being differentiated, or run here, leaves nothing to compare
        return None


def _both(moves: frozenset[int], operation: Operation, values: Sequence[Array]) -> list[Any]:
    live = [i in moves for i in operation.inputs]
    body = body_of(operation.equation)
    assert body is not None

    def fill(moving: Sequence[Array]) -> list[Array]:
        given = iter(moving)
        return [next(given) if flag else v for v, flag in zip(values, live, strict=True)]

    moving = [v for v, flag in zip(values, live, strict=True) if flag]
    outputs, rule = jax.vjp(lambda *x: _floating(operation.apply(*fill(x))), *moving)
    _, value = jax.vjp(lambda *x: _floating(jaxpr_as_fun(body)(*fill(x))), *moving)
    cotangents = [jnp.asarray(_numbers(o.shape, 7 + n), o.dtype) for n, o in enumerate(outputs)]
    scaled = [[size * c for c in cotangents] for size in _COTANGENTS]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(o)) for o in outputs])) if outputs else True
    return [(finite, rule(c), value(c)) for c in scaled]


def _equal(finite: Any, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], tolerance: float) -> bool:
    for point in np.flatnonzero(finite):
        for a, b in zip(found, expected, strict=True):
            known = np.isfinite(b[point])
            scale = np.max(np.abs(b[point][known]), initial=1e-30)
            if not np.all(np.abs(a - b)[point][known] <= tolerance * scale):
                return False
    return True


def _points(avals: Sequence[jax.ShapeDtypeStruct]) -> Iterator[list[np.ndarray]]:
    """Groups of points, stacked, in one of which the two must agree throughout: general numbers, and where there are square
    matrices, symmetric positive definite ones."""
    values = [_value(aval, n) for n, aval in enumerate(avals)]
    yield [np.stack([size * v for size in (1, -1, 5, -5)]).astype(v.dtype) for v in values]
    square = [len(aval.shape) == 2 and aval.shape[0] == aval.shape[1] for aval in avals]
    if any(square):
        yield [
            (v + v.T + 2 * len(v) * np.eye(len(v))).astype(v.dtype)[None] if is_square else v[None]
            for v, is_square in zip(values, square, strict=True)
        ]


def _value(aval: Any, seed: int) -> np.ndarray:
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return np.zeros(aval.shape, aval.dtype)
    return _numbers(aval.shape, seed).astype(aval.dtype)


@functools.lru_cache(maxsize=64)
def _numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 0.8, shape)


def _floating(outputs: Sequence[Array]) -> list[Array]:
    return [o for o in outputs if jnp.issubdtype(o.dtype, jnp.floating)]
