"""Curvature of each example's error with respect to variables of its graph: inputs of the function, and named activations.

The variables are the leaves of the reverse sweep (math.md, section 6), `C[a, b] = d2E / da db` for each pair of them. An
input of the function is a variable as it is. An activation y that is named is computed by other operations, so it gets a
probe, y + delta at delta = 0: what the sweep finds for delta is the total derivative downstream of y, whatever is upstream.

The sweep multiplies every operation's Jacobian with a matrix of the width of what it passes. Few components that lead into
wide layers are cheaper one by one, as tangents of the gradient of the same graph, and so is what leads into a loop, which
couples all its steps:

    column i of C[a, b] = d/d epsilon (dE/da)(b + epsilon e_i)             trace C[a, a] = sum_i e_i . C[a, a] e_i
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxhess._typing import Array, InputError, UnsupportedOperationError
from jaxhess.engine.graph import Graph, Operation, evaluate
from jaxhess.engine.kinds import as_dense, diagonal_of
from jaxhess.engine.plan import Leaf, Step, make_steps
from jaxhess.engine.reach import Reached, reach
from jaxhess.engine.sweep import sweep
from jaxhess.engine.trace import body_of

__all__ = ["Targets", "at_taps", "make_targets", "second_derivatives"]


_AT_ONCE = 16  # components whose tangents are in memory together, for a trace


@dataclasses.dataclass(frozen=True)
class Targets:
    """`variables` of `graph` to take curvature of, `probes` those that are zero. `before` runs once, `during` for each
    example. `reached` has the targets that each live variable depends on, `looped` are those that lead into loops, and
    `stepwise` those, and all others whose components are cheaper one by one if the targets are taken together or apart."""

    graph: Graph
    variables: tuple[int, ...]
    probes: frozenset[int]
    before: tuple[Operation, ...]
    during: tuple[Operation, ...]
    reached: Reached
    looped: frozenset[int]
    stepwise: frozenset[int]


def make_targets(
    graph: Graph, parameters: int, labels: Mapping[int, str], probes: Sequence[int] = (), *, together: bool
) -> Targets:
    """What to do for the variables that `labels` names, in a graph whose first `parameters` inputs are the parameters; if
    `together`, with the curvature between them.

    Raises:
        UnsupportedOperationError: if a complex array, or a loop whose number of steps is not known, depends on them.
    """
    graph = dataclasses.replace(graph, names={**graph.names, **labels})
    changing = {*graph.inputs[parameters:], *labels}
    before: list[Operation] = []
    during: list[Operation] = []
    for operation in graph.operations:
        if changing.intersection(operation.inputs):
            changing.update(operation.outputs)
            during.append(operation)
        else:
            before.append(operation)
    reached = reach(graph, during, {v: frozenset([v]) for v in labels})
    ends = [reached.get(o, frozenset()) for op in during if op.loop is not None for o in op.outputs]
    looped = frozenset[int]().union(*ends)
    groups = [frozenset(labels)] if together else [frozenset([v]) for v in labels]
    chosen = [group for group in groups if group & looped or _is_cheaper_by_component(graph, during, reached, group)]
    stepwise = frozenset[int]().union(*chosen)
    return Targets(graph, tuple(labels), frozenset(probes), tuple(before), tuple(during), reached, looped, stepwise)


def _is_cheaper_by_component(graph: Graph, operations: Sequence[Operation], reached: Reached, group: frozenset[int]) -> bool:
    """Whether a tangent forward and one backward for each component are fewer operations than the sweep, which pulls as many
    rows through each operation as its output has components, and then as its input has."""
    swept = by_component = 0
    for operation in operations:
        ends = [o for o in operation.outputs if reached.get(o, frozenset()) & group]
        width = sum(graph.avals[v].size for v in ends)
        work = width * _depth(graph, operation)
        width += max((graph.avals[i].size for i in operation.inputs if reached.get(i, frozenset()) & group), default=0)
        swept += work * width
        by_component += 2 * work * sum(graph.avals[v].size for v in group)
    return by_component < swept


def _depth(graph: Graph, operation: Operation) -> int:
    """How many products are summed for a component of the result."""
    if operation.name not in ("dot_general", "conv_general_dilated"):
        return 1
    dimensions, kernel = operation.params["dimension_numbers"], graph.avals[operation.inputs[1]].shape
    if operation.name == "conv_general_dilated":
        return math.prod(kernel) // max(kernel[dimensions.rhs_spec[0]], 1)
    (_, contracted), _ = dimensions
    return math.prod(kernel[axis] for axis in contracted)


def at_taps(graph: Graph, names: Sequence[str], jaxpr: Callable[[], ClosedJaxpr]) -> tuple[Graph, dict[int, str]]:
    """The graph with a probe at each of the named activations, and the probes' labels in the order of the names; `jaxpr`
    gives the whole function, where names are looked up that the error does not depend on.

    Raises:
        InputError: if a name is not there, or more than once, or in a loop, or not of a real floating array.
    """
    operations, avals, labels = list(graph.operations), dict(graph.avals), {}
    there = [found for operation in operations for found in _names_of(operation)]
    for name in names:
        places = [(aval, container) for other, aval, container in there if other == name]
        if not places:
            everything = list(_names_in(jaxpr().jaxpr))
            places = [(aval, container) for other, aval, container in everything if other == name]
            _check_is_there(name, places, sorted({other for other, _, _ in everything}))
        _check_is_alone(name, places, [op.where for op in operations if _is_tap(op, name)])
        probe, aval = len(avals), places[0][0]
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            raise InputError(
                f"The tap {name!r} is of an array {aval.dtype}{list(aval.shape)}; there is curvature with respect to real "
                "floating-point arrays only."
            )
        avals[probe], labels[probe] = jax.ShapeDtypeStruct(aval.shape, aval.dtype), f"the tap {name!r}"
        operations = [_with_probe(operation, probe) if _is_tap(operation, name) else operation for operation in operations]
    return dataclasses.replace(graph, operations=operations, avals=avals), labels


def _is_tap(operation: Operation, name: str) -> bool:
    return operation.name == "name" and operation.params["name"] == name


def _with_probe(tap: Operation, probe: int) -> Operation:
    return dataclasses.replace(
        tap, name="add", inputs=(*tap.inputs, probe), apply=lambda y, delta: [y + delta], params={}
    )  # fmt: skip


def _check_is_there(name: str, places: Sequence[Any], known: Sequence[str]) -> None:
    if not places:
        others = f"there is {', '.join(map(repr, known))}" if known else "nothing is tapped there"
        raise InputError(f"The function has no tap {name!r}; {others}. Name an activation by y = jaxhess.tap({name!r}, y).")


def _check_is_alone(name: str, places: Sequence[tuple[Any, str | None]], where: Sequence[str]) -> None:
    container = next((container for _, container in places if container is not None), None)
    if container is not None:
        raise InputError(
            f"The tap {name!r} is inside of a {container}, where one name stands for many arrays or for none. Return the "
            f"array from it (a scan stacks what its body emits) and tap the result: ys = jaxhess.tap({name!r}, ys)."
        )
    if len(places) > 1:
        found = f", at {' and '.join(dict.fromkeys(where))}" if where else ""
        raise InputError(
            f"The name {name!r} is tapped {len(places)} times{found}; curvature with respect to it could mean any of them. "
            "Give each a name of its own, for example with the number of the layer."
        )


Named = tuple[str, jax.ShapeDtypeStruct, str | None]


def _names_of(operation: Operation) -> Iterator[Named]:
    """The names at and inside of an operation, with what they are inside of that cannot be looked into."""
    around = next((e.primitive.name for e in operation.callers if not _is_call(e)), None)
    yield from ((name, aval, around or container) for name, aval, container in _names_at(operation.equation))


def _names_at(equation: JaxprEqn) -> Iterator[Named]:
    if equation.primitive.name == "name":
        aval: Any = equation.outvars[0].aval
        yield equation.params["name"], aval, None
    container = None if _is_call(equation) else equation.primitive.name
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
        if isinstance(inner, ClosedJaxpr | Jaxpr):
            body = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            yield from ((name, aval, container or deeper) for name, aval, deeper in _names_in(body))


def _names_in(jaxpr: Jaxpr) -> Iterator[Named]:
    for equation in jaxpr.eqns:
        yield from _names_at(equation)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)


def _is_call(equation: JaxprEqn) -> bool:
    return body_of(equation) is not None and not equation.primitive.name.startswith("custom_")


def second_derivatives(
    targets: Targets,
    environment: dict[int, Array],
    batch: Mapping[int, Array],
    examples: int,
    batch_size: int | None,
    *,
    mixed: bool,
    trace: bool,
) -> dict[tuple[int, int], Array]:
    """`C[a, b]` (r, size a, size b) by positions of the targets, those with a <= b: all of them if `mixed`, else a = b; the
    traces (r,) of C[a, a] if `trace`. `environment` holds the values of what runs before the examples, `batch` those of the
    inputs (r, ...).

    Raises:
        DenseTooLargeError: if a curvature matrix on the way would not fit in memory.
        UnsupportedOperationError: if an operation cannot be differentiated twice.
    """
    size = examples if batch_size is None else min(batch_size, examples)

    def one(example: Mapping[int, Array]) -> dict[tuple[int, int], Array]:
        return _one_example(targets, environment, example, mixed and not trace, trace, size)

    if size == examples:
        return jax.vmap(one, axis_size=examples)(batch)
    return jax.lax.map(one, batch, batch_size=size)


def _one_example(
    targets: Targets, shared: dict[int, Array], example: Mapping[int, Array], mixed: bool, trace: bool, copies: int
) -> dict[tuple[int, int], Array]:
    avals, variables = targets.graph.avals, targets.variables
    local = {**targets.graph.constants, **shared, **example}
    local |= {v: jnp.zeros(avals[v].shape, avals[v].dtype) for v in targets.probes}
    environment = dict(local)
    evaluate(targets.during, environment)
    found = _by_sweep(targets, environment, [v for v in variables if v not in targets.stepwise], mixed, trace, copies)
    found |= _by_component(targets, local, environment, [v for v in variables if v in targets.stepwise], mixed, trace)
    value = environment[targets.graph.output]
    poison = jnp.where(jnp.isnan(value), jnp.nan, 0)
    results = {}
    for j, a in enumerate(variables):
        for k, b in enumerate(variables):
            if j == k or (mixed and j < k):
                dtype = jnp.promote_types(jnp.promote_types(avals[a].dtype, avals[b].dtype), jnp.float32)
                zero = jnp.zeros(() if trace else (avals[a].size, avals[b].size), dtype)
                results[j, k] = (found.get((a, b), zero) + poison).astype(dtype)
    return results


Found = dict[tuple[int, int], Array]


def _steps_from(targets: Targets, variables: Sequence[int]) -> tuple[tuple[Step, ...], tuple[Leaf, ...]]:
    """The steps of the sweep that these variables reach, and their leaves."""
    chosen = frozenset(variables)
    live = frozenset(v for v, sources in targets.reached.items() if sources & chosen)
    steps = make_steps(targets.graph, targets.during, live, {targets.graph.output, *variables}, {})

    def first(variable: int) -> int:
        return min((index for index, step in enumerate(steps) if variable in step.inputs), default=len(steps))

    return steps, tuple(Leaf(v, first(v), frozenset([v])) for v in variables)


def _by_sweep(
    targets: Targets, environment: dict[int, Array], variables: Sequence[int], mixed: bool, trace: bool, copies: int
) -> Found:
    steps, leaves = _steps_from(targets, variables)
    output = targets.graph.output
    if not targets.reached.get(output, frozenset()).intersection(variables):
        return {}
    seed = {output: jnp.ones((), environment[output].dtype)}
    result = sweep(
        targets.graph, steps, leaves, environment, seed, {}, lambda j, k: mixed or j == k,
        diagonal=range(len(leaves)) if trace else (), copies=copies,
    )  # fmt: skip
    found: Found = {}
    for (j, k), kind in result.curvatures.items():
        found[variables[j], variables[k]] = jnp.sum(diagonal_of(kind).values) if trace else as_dense(kind)
    return found


def _by_component(
    targets: Targets,
    local: dict[int, Array],
    environment: dict[int, Array],
    variables: Sequence[int],
    mixed: bool,
    trace: bool,
) -> Found:
    """The second derivatives of the graph itself: loops are passed by their tangent maps."""
    if not variables:
        return {}

    def error(*values: Array) -> Array:
        here = {**local, **dict(zip(variables, values, strict=True))}
        evaluate(targets.during, here)
        return here[targets.graph.output]

    values, sizes = [local[v] for v in variables], [local[v].size for v in variables]
    found: Found = {}
    try:
        if trace:
            return {(v, v): _trace(error, values, n) for n, v in enumerate(variables)}
        for n, b in enumerate(variables):
            rows = range(n + 1) if mixed else [n]
            columns = jax.jacfwd(jax.grad(error, argnums=tuple(rows)), argnums=n)(*values)
            found |= {(variables[m], b): c.reshape(sizes[m], sizes[n]) for m, c in zip(rows, columns, strict=True)}
        return found
    except (NotImplementedError, TypeError, ValueError, ArithmeticError) as failure:
        swept = _by_sweep(targets, environment, variables, mixed, trace, 1)  # if that fails too, it names the operation
        if not targets.looped.intersection(variables):
            return swept
        names = " and ".join(targets.graph.names[v] for v in variables)
        raise UnsupportedOperationError(
            f"The exact curvature with respect to {names} could not be computed: JAX cannot differentiate something between "
            f"it and the error twice ({failure})."
        ) from failure


def _trace(error: Callable[..., Array], values: Sequence[Array], position: int) -> Array:
    def gradient(value: Array) -> Array:
        return jax.grad(lambda v: error(*values[:position], v, *values[position + 1 :]))(value)

    value = values[position]

    def entry(index: Array) -> Array:
        unit = (jnp.arange(value.size) == index).astype(value.dtype).reshape(value.shape)
        return jnp.vdot(unit, jax.jvp(gradient, (value,), (unit,))[1])

    if value.size <= _AT_ONCE:
        return jnp.sum(jax.vmap(entry)(jnp.arange(value.size)))
    return jnp.sum(jax.lax.map(jax.checkpoint(entry, prevent_cse=False), jnp.arange(value.size), batch_size=_AT_ONCE))
