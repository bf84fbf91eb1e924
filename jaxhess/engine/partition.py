"""Which variables get their curvature as a linear function, and which as matrices.

What leads into a loop has curvature between all its steps, and what is used at many places of one example between all of
them: a matrix Q of (places x units)^2 entries, which soon costs more than a product with it by one pass forward and one
backward.
"""

import math
from collections.abc import Sequence

from jaxhess.engine.graph import Graph, Operation
from jaxhess.engine.reach import Reached, reach

__all__ = ["implicit_variables"]

_PASSES = 4


def implicit_variables(
    graph: Graph, operations: Sequence[Operation], candidates: Sequence[int], reached: Reached
) -> set[int]:
    """The frontier variables that lead into loops or whose curvature is cheaper as a linear function, and those that share
    a parameter with one."""
    origins = reach(graph, operations, {f: frozenset([f]) for f in candidates})
    looped = {f for op in operations if op.loop is not None for i in op.inputs for f in origins.get(i, ())}
    chosen = looped | _widespread(graph, operations, set(candidates) - looped, origins)
    while True:
        roots = {root for f in chosen for root in reached[f]}
        grown = {f for f in candidates if roots & reached[f]}
        if grown == chosen:
            return chosen
        chosen = grown


def _widespread(graph: Graph, operations: Sequence[Operation], candidates: set[int], origins: Reached) -> set[int]:
    """The variables used at many places of an example, where Q would have more entries than a product with it by forward and
    backward substitution has operations: tokens of a sequence, say, that meet in few places."""
    many = {f for op in operations for f in candidates.intersection(op.inputs) if _places(graph, op, f) > 1}
    work, widest = dict.fromkeys(many, 0), dict.fromkeys(many, 0)
    for operation in operations:
        size = sum(graph.avals[o].size for o in operation.outputs)
        for f in many.intersection(*(origins.get(o, frozenset()) for o in operation.outputs)):
            work[f] += size * _depth(graph, operation)
            widest[f] = max(widest[f], size)
    return {f for f in many if widest[f] ** 2 > _PASSES * work[f]}


def _places(graph: Graph, operation: Operation, variable: int) -> float:
    """How often an operation uses each component of a variable."""
    size = graph.avals[operation.outputs[0]].size / max(graph.avals[variable].size, 1)
    return size * _depth(graph, operation) if operation.name in ("dot_general", "broadcast_in_dim") else 1


def _depth(graph: Graph, operation: Operation) -> int:
    """How many products are summed for a component of the result."""
    if operation.name != "dot_general":
        return 1
    (contracted, _), _ = operation.params["dimension_numbers"]
    return math.prod(graph.avals[operation.inputs[0]].shape[axis] for axis in contracted)
