"""Which variables depend, through derivatives, on which sources."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxhess._typing import UnsupportedOperationError
from jaxhess.engine.graph import Graph, Operation

__all__ = ["Reached", "reach"]

Reached = dict[int, frozenset[int]]

_WITHOUT_DERIVATIVE = {"ceil", "floor", "is_finite", "round", "sign", "stop_gradient"}
_NONE: frozenset[int] = frozenset()


def reach(graph: Graph, operations: Sequence[Operation], sources: Reached) -> Reached:
    """The sources of every variable that has one, in the bodies of loops too, given those of the first variables.

    Raises:
        UnsupportedOperationError: for a complex variable, or a loop whose number of steps is not known, among them.
    """
    reached = dict(sources)
    for operation in operations:
        if operation.loop is not None:
            _reach_loop(graph, operation, reached)
            continue
        found = _NONE.union(*(reached.get(i, _NONE) for i in operation.inputs))
        if found and operation.name not in _WITHOUT_DERIVATIVE:
            for output in operation.outputs:
                _mark(graph, operation, output, found, reached)
    return reached


def _reach_loop(graph: Graph, operation: Operation, reached: Reached) -> None:
    loop = operation.loop
    assert loop is not None
    first, stacked = len(loop.shared), len(loop.shared) + len(loop.carry)
    for part, whole in zip(loop.slices, operation.inputs[stacked:], strict=True):
        _mark(graph, operation, part, reached.get(whole, _NONE), reached)
    carried = [reached.get(i, _NONE) for i in operation.inputs[first:stacked]]
    while True:
        for variable, found in zip(loop.carry, carried, strict=True):
            _mark(graph, operation, variable, found, reached)
        reached |= reach(graph, loop.operations, reached)
        grown = [found | reached.get(i, _NONE) for i, found in zip(loop.next_carry, carried, strict=True)]
        if grown == carried:
            break
        carried = grown
    ends = [*carried, *(reached.get(i, _NONE) for i in loop.emitted)]
    for output, found in zip(operation.outputs, ends, strict=True):
        _mark(graph, operation, output, found, reached)


def _mark(graph: Graph, operation: Operation, variable: int, found: frozenset[int], reached: Reached) -> None:
    aval = graph.avals[variable]
    if not found or not jnp.issubdtype(aval.dtype, jnp.inexact):
        return
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        raise UnsupportedOperationError(
            f"{operation.name} at {operation.where} gives a complex {aval.shape} array that depends on the parameters; "
            "curvature is exact for real arrays only. Write the real and imaginary parts as real arrays."
        )
    if operation.name == "while":
        raise UnsupportedOperationError(
            f"while at {operation.where}: how often the loop runs depends on data, parameters or earlier results, and JAX "
            "cannot differentiate such a loop twice. Use jax.lax.scan or jax.lax.fori_loop with a fixed number of steps, "
            "and jnp.where for steps that are not to count."
        )
    reached[variable] = found
