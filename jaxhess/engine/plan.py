"""What the sweep will do, from the graph alone: which parameters are used where, and which rule passes each operation.

Operations that depend on no data run once, before the batch (`before`); the others once for each example (`steps`). The
variables that cross from the one to the other are the frontier. A frontier variable that a parameter reaches is a leaf
of the sweep over an example: contracted with data or activations it is a structured use (`y = W z + probe`), anywhere
else it is a variable with a curvature matrix of its own.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from jaxhess._typing import UnsupportedOperationError
from jaxhess.engine.rules.elementwise import has_no_second_derivative, is_componentwise
from jaxhess.engine.rules.linear import INDEXING, LINEAR
from jaxhess.engine.rules.local import BILINEAR
from jaxhess.engine.trace import Graph, Operation
from jaxhess.engine.views import View

__all__ = ["Leaf", "Plan", "Step", "make_plan"]

_WITHOUT_DERIVATIVE = {"ceil", "floor", "is_finite", "nextafter", "round", "sign", "stop_gradient"}


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation of the sweep, or a cluster of component-wise ones; `inputs` and `outputs` are the live variables.

    `kind` is one of 'contraction' (with a leaf; `leaf` is its number), 'componentwise', 'indexing', 'linear', 'bilinear'
    and 'local'.
    """

    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kind: str
    linear: bool = False
    leaf: int | None = None


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A use of a frontier variable. `step` is the earliest step that uses it, `operand` the position of a structured
    use in its contraction, `roots` the parameters that it depends on."""

    variable: int
    step: int
    roots: frozenset[int]
    operand: int | None = None

    @property
    def structured(self) -> bool:
        """Whether the use is a contraction."""
        return self.operand is not None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The two stages; `live` holds every variable that a parameter reaches through derivatives."""

    graph: Graph
    parameters: tuple[int, ...]
    before: tuple[Operation, ...]
    during: tuple[Operation, ...]
    frontier: tuple[int, ...]
    before_steps: tuple[Step, ...]
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    views: dict[int, View]
    live: frozenset[int]


def make_plan(graph: Graph, parameters: int) -> Plan:
    """The plan for a graph whose first `parameters` inputs are the parameters' leaves."""
    roots = tuple(graph.inputs[:parameters])
    data = set(graph.inputs[parameters:])
    reached = {root: frozenset([root]) for root in roots}
    before: list[Operation] = []
    during: list[Operation] = []
    for operation in graph.operations:
        if data.intersection(operation.inputs):
            data.update(operation.outputs)
            during.append(operation)
        else:
            before.append(operation)
        sources = frozenset().union(*(reached.get(i, frozenset()) for i in operation.inputs))
        if sources and operation.name not in _WITHOUT_DERIVATIVE:
            for output in operation.outputs:
                if jnp.issubdtype(graph.avals[output].dtype, jnp.inexact):
                    _check_real(graph, operation, output)
                    reached[output] = sources
    live = frozenset(reached)
    used = {i for operation in during for i in operation.inputs} | {graph.output}
    frontier = tuple(sorted(used - data - set(graph.constants)))
    views = _views(graph, roots, before, live)
    steps, leaves = _uses(graph, during, [f for f in frontier if f in live], live, reached)
    return Plan(
        graph, roots, tuple(before), tuple(during), frontier, _steps(graph, before, live, set(frontier), {}), steps,
        leaves, views, live,
    )  # fmt: skip


def _check_real(graph: Graph, operation: Operation, output: int) -> None:
    if jnp.issubdtype(graph.avals[output].dtype, jnp.complexfloating):
        raise UnsupportedOperationError(
            f"{operation.name} at {operation.where} gives a complex {graph.avals[output].shape} array that depends on the "
            "parameters; curvature is exact for real arrays only. Write the real and imaginary parts as real arrays."
        )


def _views(graph: Graph, roots: Sequence[int], before: Iterable[Operation], live: frozenset[int]) -> dict[int, View]:
    views = {root: View.of(root, graph.avals[root].shape) for root in roots}
    scalar = {i: i for i, aval in graph.avals.items() if aval.shape == ()}
    before = list(before)
    scalar |= {op.outputs[0]: op.inputs[0] for op in before if op.name == "broadcast_in_dim" and op.inputs[0] in scalar}
    for operation in before:
        moving = [i for i in operation.inputs if i in live]
        if len(moving) != 1 or moving[0] not in views or len(operation.outputs) != 1:
            continue
        (source,), (output,) = moving, operation.outputs
        if operation.name == "neg":
            view = views[source].scaled(None, 1)
        elif operation.name in ("mul", "div"):
            others = [i for i in operation.inputs if i != source]
            by_scalar = len(others) == 1 and others[0] in scalar
            numerator = operation.name == "mul" or operation.inputs[0] == source
            view = (
                views[source].scaled(scalar[others[0]], 1 if operation.name == "mul" else -1)
                if by_scalar and numerator
                else None
            )
        else:
            view = views[source].after(operation.name, operation.params, graph.avals[output].shape)
        if view is not None:
            views[output] = view
    return views


def _uses(
    graph: Graph,
    operations: Sequence[Operation],
    candidates: Sequence[int],
    live: frozenset[int],
    reached: dict[int, frozenset[int]],
) -> tuple[tuple[Step, ...], tuple[Leaf, ...]]:
    """The steps over an example, and the leaves: structured uses first, then variables with curvature of their own."""
    structured = {
        operation: [i in candidates for i in operation.inputs].index(True)
        for operation in operations
        if operation.name == "dot_general" and sum(i in candidates for i in operation.inputs) == 1
    }
    contractions = list(structured)
    steps = _steps(graph, operations, live, {graph.output, *candidates}, {op: n for n, op in enumerate(contractions)})
    position = {step.leaf: index for index, step in enumerate(steps) if step.leaf is not None}
    leaves = [
        Leaf(op.inputs[structured[op]], position[n], reached[op.inputs[structured[op]]], structured[op])
        for n, op in enumerate(contractions)
        if n in position
    ]
    for variable in candidates:
        uses = [index for index, step in enumerate(steps) if variable in step.inputs]
        if uses or variable == graph.output:
            leaves.append(Leaf(variable, min(uses, default=len(steps)), reached[variable]))
    return steps, tuple(leaves)


def _steps(
    graph: Graph,
    operations: Sequence[Operation],
    live: frozenset[int],
    outside: set[int],
    contractions: dict[Operation, int],
) -> tuple[Step, ...]:
    """Live operations in order, component-wise ones fused where no one else uses what lies between them."""
    active = [op for op in operations if any(o in live for o in op.outputs) and any(i in live for i in op.inputs)]
    users: dict[int, set[int]] = {}
    for index, operation in enumerate(active):
        for i in operation.inputs:
            users.setdefault(i, set()).add(index)
    cluster_of: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    for index in reversed(range(len(active))):
        operation = active[index]
        flags = [i in live for i in operation.inputs]
        shapes = [graph.avals[i].shape for i in operation.inputs]
        out = [graph.avals[o].shape for o in operation.outputs]
        if operation in contractions or not is_componentwise(operation, flags, shapes, out):
            continue
        (output,) = operation.outputs
        heads = {cluster_of.get(user) for user in users.get(output, ())}
        head = heads.pop() if len(heads) == 1 and output not in outside else None
        if head is None or graph.avals[active[head].outputs[0]].shape != out[0]:
            head = index
        cluster_of[index] = head
        members.setdefault(head, []).append(index)
    steps = []
    for index, operation in enumerate(active):
        if cluster_of.get(index, index) != index:
            continue
        group = [active[i] for i in sorted(members.get(index, [index]))]
        inner = {o for op in group for o in op.outputs}
        inputs = tuple(sorted({i for op in group for i in op.inputs if i in live} - inner))
        outputs = tuple(o for o in operation.outputs if o in live)
        if operation in contractions:
            leaf = contractions[operation]
            weight = [i for i in operation.inputs if i in outside]
            inputs = tuple(i for i in inputs if i not in weight)
            steps.append(Step((operation,), inputs, outputs, "contraction", leaf=leaf))
        elif index in cluster_of:
            linear = all(has_no_second_derivative(op, [i in live for i in op.inputs]) for op in group)
            steps.append(Step(tuple(group), inputs, outputs, "componentwise", linear))
        else:
            steps.append(Step((operation,), inputs, outputs, _kind(operation, inputs)))
    return tuple(steps)


def _kind(operation: Operation, inputs: Sequence[int]) -> str:
    moving = [i for i in operation.inputs if i in inputs]
    if operation.name in LINEAR:
        return "indexing" if operation.name in INDEXING else "linear"
    if operation.name in BILINEAR:
        return "linear" if len(moving) == 1 else "bilinear" if len(inputs) == 2 else "local"
    return "local"
