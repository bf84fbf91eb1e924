"""The Jacobian of a network's outputs and the curvature of the loss, example by example (math.md, section 7).

    V_j = d(output)/dy_j  (M, places.., y)          B = d2E/d(output)2  (M, M)

Every structured use has a probe added to its y at every place, other variables a shift, as in `jaxhess.engine.implicit`;
one reverse pass for each of the M outputs gives all V_j. B comes from the sweep over the operations after the outputs, so
that of a loss which is a sum over its components stays diagonal. No second derivative of the model is taken.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import symmetrise, widened
from jaxhess._typing import Array, InputError
from jaxhess.engine import kinds
from jaxhess.engine.graph import Operation, Probe, evaluate, leading_to
from jaxhess.engine.plan import Leaf, Plan, Step, make_steps
from jaxhess.engine.reach import reach
from jaxhess.engine.sweep import sweep

__all__ = ["Head", "Jacobian", "chunked", "flat_outputs", "head_of", "output_curvature", "output_jacobian", "outputs_of"]


@dataclasses.dataclass(frozen=True)
class Head:
    """The loss: the operations between the outputs and the error, and the sweep over them; `live` are the variables that
    depend on an output."""

    operations: tuple[Operation, ...]
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    live: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Jacobian:
    """Of one example, or of all with a leading axis: by the leaves' numbers, `rows` V_j (M, places.., y) and, of structured
    uses, `inputs` z_j (places.., z). `curvature` is B (M, M), its diagonal (M,), or None for the identity."""

    rows: dict[int, Array]
    inputs: dict[int, Array]
    curvature: Array | None


def head_of(plan: Plan) -> Head:
    """The loss of a plan that ends with the outputs.

    Raises:
        InputError: if the error does not depend on the outputs.
    """
    marks = [operation for operation in plan.graph.operations if set(operation.outputs) & set(plan.outputs)]
    operations = leading_to([op for op in plan.graph.operations if op not in marks], [plan.graph.output])
    live = frozenset(reach(plan.graph, operations, {o: frozenset([o]) for o in plan.outputs}))
    if not marks or plan.graph.output not in live:
        raise InputError("The loss does not depend on a floating-point output of the model: there is no curvature.")
    named = dataclasses.replace(plan.graph, names=plan.graph.names | dict.fromkeys(plan.outputs, "the model's output"))
    steps = make_steps(named, operations, live, {plan.graph.output, *plan.outputs}, {})
    first = {o: min((n for n, step in enumerate(steps) if o in step.inputs), default=len(steps)) for o in plan.outputs}
    leaves = tuple(Leaf(o, first[o], frozenset([o])) for o in plan.outputs)
    return Head(tuple(operations), steps, leaves, live)


def outputs_of(plan: Plan) -> int:
    """M, the number of outputs of one example."""
    return sum(plan.graph.avals[o].size for o in plan.outputs)


def output_jacobian(
    plan: Plan, head: Head | None, environment: dict[int, Array], example: Sequence[Array], copies: int
) -> Jacobian:
    """V, z and B of one example. `environment` holds the values of all that depends on no data, `example` the arrays in
    graph order; `copies` is the number of examples held in memory at once. Without a head, B is the identity."""
    avals = plan.graph.avals
    structured = {n: leaf for n, leaf in enumerate(plan.leaves) if leaf.structured}
    base = {**plan.graph.constants, **environment, **dict(zip(_data(plan), example, strict=True))}

    def outputs(probes: dict[int, Array], shifts: dict[int, Array]) -> tuple[Array, Any]:
        local = dict(base)
        for n, shift in shifts.items():
            variable = plan.leaves[n].variable
            local[plan.shifted[variable]] = local[variable] + shift
        placed = {leaf.operation: Probe(probes[n], leaf.input) for n, leaf in structured.items() if leaf.operation}
        seen = evaluate(plan.probed, local, placed)
        read = {n: seen[leaf.operation] for n, leaf in structured.items() if leaf.operation}
        values = {o: local[plan.shifted.get(o, o)] for o in plan.outputs}
        return flat_outputs(values), (read, values)

    probes = {
        n: jnp.zeros((*leaf.places, *avals[leaf.output].shape), avals[leaf.output].dtype) for n, leaf in structured.items()
    }
    others = {n: avals[leaf.variable] for n, leaf in enumerate(plan.leaves) if not leaf.structured}
    shifts = {n: jnp.zeros(aval.shape, aval.dtype) for n, aval in others.items()}
    flat, pull, (read, values) = jax.vjp(outputs, probes, shifts, has_aux=True)
    of_probes, of_shifts = jax.vmap(pull)(jnp.eye(flat.size, dtype=flat.dtype))
    rows = {n: widened(V) for n, V in (of_probes | of_shifts).items()}
    inputs = {n: widened(z) for n, z in read.items()}
    if head is None:
        poison = jnp.where(jnp.isnan(flat), jnp.nan, 0).sum()
        return Jacobian({n: V + poison.astype(V.dtype) for n, V in rows.items()}, inputs, None)
    return Jacobian(rows, inputs, output_curvature(plan, head, {**base, **values}, copies))


def output_curvature(plan: Plan, head: Head, environment: dict[int, Array], copies: int = 1) -> Array:
    """B (M, M), or its diagonal (M,) where nothing else is in it; NaN throughout where the error is."""
    environment = {**environment}
    evaluate([op for op in head.operations if not environment.keys() >= set(op.outputs)], environment)
    error = environment[plan.graph.output]
    names = plan.graph.names | dict.fromkeys(plan.outputs, "the model's output")
    graph, seed = dataclasses.replace(plan.graph, names=names), {plan.graph.output: jnp.ones((), error.dtype)}
    swept = sweep(graph, head.steps, head.leaves, environment, seed, {}, lambda j, k: True, copies=copies).curvatures
    sizes = [plan.graph.avals[o].size for o in plan.outputs]
    poison = widened(jnp.where(jnp.isnan(error), jnp.nan, 0).astype(error.dtype))
    if all(j == k and isinstance(kind, kinds.Diagonal) for (j, k), kind in swept.items()):
        diagonals = {j: kind.values for (j, _), kind in swept.items() if isinstance(kind, kinds.Diagonal)}
        parts = [diagonals.get(n, jnp.zeros(size, poison.dtype)) for n, size in enumerate(sizes)]
        return widened(jnp.concatenate(parts)) + poison
    blocks = {pair: kinds.as_dense(kind) for pair, kind in swept.items()}
    blocks |= {(k, j): block.T for (j, k), block in blocks.items() if j != k}
    places = range(len(sizes))
    rows = [[blocks.get((j, k), jnp.zeros((sizes[j], sizes[k]), poison.dtype)) for k in places] for j in places]
    return symmetrise(widened(jnp.block(rows))) + poison


def flat_outputs(values: dict[int, Array]) -> Array:
    """All outputs of one example in one vector (M,)."""
    return jnp.concatenate([widened(value).reshape(-1) for value in values.values()])


def chunked(
    function: Callable[[list[Array], int], Any],
    arrays: Sequence[Array],
    examples: int,
    batch_size: int | None,
    *,
    summed: bool = False,
) -> Any:
    """`function(arrays, count)` of all examples, `batch_size` at a time: its results one after the other (their leading axes
    are the examples') or, `summed`, their sum."""
    size = examples if batch_size is None else min(batch_size, examples)
    whole, rest = divmod(examples, size)
    if whole == 1:
        result = function([a[:size] for a in arrays], size)
    else:
        parts = [a[: whole * size].reshape(whole, size, *a.shape[1:]) for a in arrays]
        if summed:
            shapes = jax.eval_shape(lambda: function([p[0] for p in parts], size))
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            result, _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, function(part, size)), None), zero, parts
            )
        else:
            _, result = jax.lax.scan(lambda _, part: (None, function(part, size)), None, parts)
            result = jax.tree.map(lambda a: a.reshape(whole * size, *a.shape[2:]), result)
    if not rest:
        return result
    tail = function([a[whole * size :] for a in arrays], rest)
    return jax.tree.map(jnp.add if summed else lambda a, b: jnp.concatenate([a, b]), result, tail)


def _data(plan: Plan) -> list[int]:
    return plan.graph.inputs[len(plan.parameters) :]
