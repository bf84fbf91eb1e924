"""Which variables get their curvature as a linear function, and which as matrices.

What leads into a loop has curvature between all its steps, and what is used at many places of one example between all of
them: a matrix Q of (places x units)^2 entries, which soon costs more than a product with it by one pass forward and one
backward.
"""

import math
from collections.abc import Sequence

from jaxhess.engine.graph import Graph, Operation
from jaxhess.engine.reach import Reached, reach
from jaxhess.engine.rules.elementwise import COMPONENTWISE
from jaxhess.engine.rules.linear import INDEXING

__all__ = ["implicit_variables"]

_PASSES = 4
_ENTRIES = 2**24  # of one example's Q: 64 MiB in float32, which no batch is to have many of
_OWN_ENTRIES = 2**26  # of the mean over the batch: 256 MiB


def implicit_variables(
    graph: Graph, operations: Sequence[Operation], candidates: Sequence[int], reached: Reached
) -> set[int]:
    """The frontier variables that lead into loops or whose curvature is cheaper as a linear function, and those that share
    a parameter with one."""
    origins = reach(graph, operations, {f: frozenset([f]) for f in candidates})
    looped = {f for op in operations if op.loop is not None for i in op.inputs for f in origins.get(i, ())}
    others = set(candidates) - looped
    chosen = looped | _widespread(graph, operations, others, origins) | _large(graph, operations, others, origins)
    while True:
        roots = {root for f in chosen for root in reached[f]}
        grown = {f for f in candidates if roots & reached[f]}
        if grown == chosen:
            return chosen
        chosen = grown


def _widespread(graph: Graph, operations: Sequence[Operation], candidates: set[int], origins: Reached) -> set[int]:
    """The variables used at many places of an example, where Q would have more entries than a product with it by forward and
    backward substitution has operations (tokens of a sequence, say, that meet in few places), or than memory should hold
    (pixels of an image)."""
    many = {f for op in operations for f in candidates.intersection(op.inputs) if _places(graph, op, f) > 1}
    work, widest = dict.fromkeys(many, 0), dict.fromkeys(many, 0)
    for operation in operations:
        size = sum(graph.avals[o].size for o in operation.outputs)
        for f in many.intersection(*(origins.get(o, frozenset()) for o in operation.outputs)):
            work[f] += size * _depth(graph, operation)
            widest[f] = max(widest[f], size)
    return {f for f in many if widest[f] ** 2 > min(_PASSES * work[f], _ENTRIES)}


def _large(graph: Graph, operations: Sequence[Operation], candidates: set[int], origins: Reached) -> set[int]:
    """The variables that are not contracted (a table of positions, say), too large for a matrix of their own curvature, and
    mixed with each other later, so that it is no diagonal one."""
    elsewhere = {i for op in operations if op.name != "dot_general" for i in op.inputs}
    large = {f for f in candidates & elsewhere if graph.avals[f].size ** 2 > _OWN_ENTRIES}
    mixing = [op for op in operations if op.name not in COMPONENTWISE | INDEXING | {"reduce_sum", "name"}]
    return {f for f in large if any(f in origins.get(i, frozenset()) for op in mixing for i in op.inputs)}


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
