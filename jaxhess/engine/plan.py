"""What the sweep will do, from the graph alone: which parameters are used where, and which rule passes each operation.

Operations that depend on no data run once, before the batch (`before`); the others once for each example (`steps`). The
variables that cross from the one to the other are the frontier. A frontier variable that a parameter reaches has leaves:
contracted with data or activations it is a structured use (`y = W z + probe`), anywhere else it is a variable with
curvature of its own.

What leads into a loop, or is used inside one, is left implicit (`jaxhess.engine.implicit`): its curvature couples all steps.
The sweep over an example covers the rest.
"""

import dataclasses
from collections.abc import Iterable, Sequence

from jaxhess.engine.contractions import with_contractions
from jaxhess.engine.graph import Graph, Operation, leading_to, nested, renumbered
from jaxhess.engine.partition import implicit_variables
from jaxhess.engine.reach import Reached, reach
from jaxhess.engine.rules.elementwise import has_no_second_derivative, is_componentwise
from jaxhess.engine.rules.linear import INDEXING, LINEAR
from jaxhess.engine.rules.local import BILINEAR
from jaxhess.engine.views import View

__all__ = ["Leaf", "Plan", "Step", "make_plan", "make_steps"]


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
    """A use of a frontier variable; `roots` are the parameters that it depends on.

    A structured use is the operand at position `operand` of the contraction `operation`, within `loops`; the other operand
    is z, which depends on the leaf's own parameters if `sensitive`. `step` is the earliest step of the sweep that uses the
    leaf, None for an implicit one.
    """

    variable: int
    step: int | None
    roots: frozenset[int]
    operation: Operation | None = None
    operand: int = 0
    loops: tuple[Operation, ...] = ()
    sensitive: bool = True

    @property
    def structured(self) -> bool:
        """Whether the use is a contraction."""
        return self.operation is not None

    @property
    def implicit(self) -> bool:
        """Whether the sweep leaves it out."""
        return self.step is None

    @property
    def places(self) -> tuple[int, ...]:
        """The lengths of the loops around the use."""
        return tuple(operation.loop.length for operation in self.loops if operation.loop is not None)

    @property
    def input(self) -> int:
        """The variable z of a structured use."""
        assert self.operation is not None
        return self.operation.inputs[1 - self.operand]

    @property
    def output(self) -> int:
        """The variable y of a structured use."""
        assert self.operation is not None
        return self.operation.outputs[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The two stages; `live` holds every variable that a parameter reaches through derivatives, `swept` those that a leaf of
    the sweep does. `leaves` are those of the sweep, then the implicit ones. `probed` are the operations of an example with
    other numbers, `shifted`, for the implicit variables outside of their structured uses. `outputs` are the variables that
    it ends with, where that is not the graph's output."""

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
    swept: frozenset[int]
    probed: tuple[Operation, ...]
    shifted: dict[int, int]
    outputs: tuple[int, ...] = ()

    @property
    def explicit(self) -> tuple[Leaf, ...]:
        """The leaves of the sweep."""
        return tuple(leaf for leaf in self.leaves if not leaf.implicit)


def make_plan(graph: Graph, parameters: int, *, marked: str | None = None, all_pairs: bool = True) -> Plan:
    """The plan for a graph whose first `parameters` inputs are the parameters' leaves.

    With `marked`, it ends with the variables that `jax.ad_checkpoint.checkpoint_name` gave a name that begins so, and every
    leaf is implicit. Without `all_pairs` there is no S_jk of uses of different parameters, and convolutions cost less.
    """
    graph = with_contractions(graph, parameters, all_pairs=all_pairs and marked is None)
    roots = tuple(graph.inputs[:parameters])
    data = set(graph.inputs[parameters:])
    before: list[Operation] = []
    during: list[Operation] = []
    outputs = () if marked is None else tuple(_marked(graph.operations, marked))
    ends = set(outputs or (graph.output,))
    for operation in leading_to(graph.operations, outputs) if outputs else graph.operations:
        if data.intersection(operation.inputs):
            data.update(operation.outputs)
            during.append(operation)
        else:
            before.append(operation)
    reached = reach(graph, graph.operations, {root: frozenset([root]) for root in roots})
    live = frozenset(reached)
    before, during = _defer_broadcasts(graph, before, during, ends)
    used = {i for operation in during for i in operation.inputs} | ends
    made = {o for operation in during for o in operation.outputs}
    frontier = tuple(sorted(used - data - made - set(graph.constants)))
    candidates = [f for f in frontier if f in live]
    implicit = set(candidates) if outputs else implicit_variables(graph, during, candidates, reached)
    explicit = [f for f in candidates if f not in implicit]
    swept = frozenset(reach(graph, during, {f: reached[f] for f in explicit}))
    steps, leaves = _uses(graph, during, explicit, swept, reached)
    implicit_leaves = _implicit_leaves(graph, during, implicit, reached, ends)
    probed, shifted = _shifted(graph, during, implicit_leaves)
    return Plan(
        graph, roots, tuple(before), tuple(during), frontier, make_steps(graph, before, live, set(frontier), {}), steps,
        (*leaves, *implicit_leaves), _views(graph, roots, before, live), live, swept, probed, shifted, outputs,
    )  # fmt: skip


def _marked(operations: Sequence[Operation], name: str) -> list[int]:
    marks = [operation for operation in operations if operation.name == "name"]
    return [operation.outputs[0] for operation in marks if str(operation.params["name"]).startswith(name)]


def _defer_broadcasts(
    graph: Graph, before: Sequence[Operation], during: Sequence[Operation], ends: set[int]
) -> tuple[list[Operation], list[Operation]]:
    """What only repeats a variable for the examples' own operations, a bias at every step, is better done there: the
    variable itself is then the leaf."""
    needed = {i for operation in before for i in operation.inputs} | ends
    deferred = [
        operation
        for operation in before
        if operation.name == "broadcast_in_dim"
        and not needed.intersection(operation.outputs)
        and graph.avals[operation.outputs[0]].size > graph.avals[operation.inputs[0]].size
    ]
    return [operation for operation in before if operation not in deferred], [*deferred, *during]


def _implicit_leaves(
    graph: Graph, operations: Sequence[Operation], variables: set[int], reached: Reached, ends: set[int]
) -> list[Leaf]:
    leaves, elsewhere = [], set(ends)
    for operation, loops in nested(operations):
        mine = [place for place, i in enumerate(operation.inputs) if i in variables]
        if operation.name == "dot_general" and len(mine) == 1 and operation.outputs[0] in reached:
            variable, z = operation.inputs[mine[0]], operation.inputs[1 - mine[0]]
            sensitive = bool(reached.get(z, frozenset()) & reached[variable])
            leaves.append(Leaf(variable, None, reached[variable], operation, mine[0], loops, sensitive))
        elif operation.loop is not None:
            loop = operation.loop
            elsewhere.update(operation.inputs[len(loop.shared) :], loop.next_carry, loop.emitted)
        else:
            elsewhere.update(operation.inputs)
    return leaves + [Leaf(v, None, reached[v]) for v in sorted(variables & elsewhere)]


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


def _shifted(
    graph: Graph, operations: Sequence[Operation], leaves: Sequence[Leaf]
) -> tuple[tuple[Operation, ...], dict[int, int]]:
    """The operations with a number of its own for each variable that is a leaf, wherever it has no structured use: a shift
    of the one must not move the other."""
    numbers: dict[int, int] = {}
    for leaf in leaves:
        if not leaf.structured:
            numbers[leaf.variable] = len(graph.avals)
            graph.avals[len(graph.avals)] = graph.avals[leaf.variable]
    structured = {leaf.operation for leaf in leaves if leaf.operation is not None}
    return tuple(renumbered(operation, numbers, structured) for operation in operations), numbers


def _uses(
    graph: Graph,
    operations: Sequence[Operation],
    candidates: Sequence[int],
    live: frozenset[int],
    reached: Reached,
) -> tuple[tuple[Step, ...], tuple[Leaf, ...]]:
    """The steps over an example, and the leaves: structured uses first, then variables with curvature of their own."""
    structured = {
        operation: [i in candidates for i in operation.inputs].index(True)
        for operation in operations
        if operation.name == "dot_general" and sum(i in candidates for i in operation.inputs) == 1
    }
    contractions = list(structured)
    steps = make_steps(graph, operations, live, {graph.output, *candidates}, {op: n for n, op in enumerate(contractions)})
    position = {step.leaf: index for index, step in enumerate(steps) if step.leaf is not None}
    leaves = [
        Leaf(op.inputs[structured[op]], position[n], reached[op.inputs[structured[op]]], op, structured[op])
        for n, op in enumerate(contractions)
        if n in position
    ]
    for variable in candidates:
        uses = [index for index, step in enumerate(steps) if variable in step.inputs]
        if uses or variable == graph.output:
            leaves.append(Leaf(variable, min(uses, default=len(steps)), reached[variable]))
    return steps, tuple(leaves)


def make_steps(
    graph: Graph,
    operations: Sequence[Operation],
    live: frozenset[int],
    outside: set[int],
    contractions: dict[Operation, int],
) -> tuple[Step, ...]:
    """Live operations in order, component-wise ones fused where no one else uses what lies between them; variables of
    `outside` are not hidden in between. `contractions` gives the structured uses their leaves."""
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
