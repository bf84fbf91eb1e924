"""The sweep over every example of a batch, in chunks that bound the memory.

What belongs to structured uses is kept for each example (`KroneckerProductSum` and its kin are made of it); everything
else is averaged on the way. What the plan leaves implicit comes first, for all examples at once: it is no larger than they
are, and gives the sweep the values that it starts from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import widened
from jaxhess._typing import Array
from jaxhess.engine import kinds
from jaxhess.engine.failure import naming_the_culprit
from jaxhess.engine.graph import evaluate
from jaxhess.engine.implicit import Implicit, differentiate
from jaxhess.engine.kinds import Dense, Diagonal, Kind
from jaxhess.engine.plan import Plan
from jaxhess.engine.sweep import sweep

__all__ = ["BatchResult", "sweep_batch"]

Part = dict[int, Array]


@dataclasses.dataclass
class BatchResult:
    """By the leaves' numbers. `outputs[j]` (r, *y.shape) holds g_j and `inputs[j]` (r, *z.shape) holds z_j of structured
    uses; `curvatures[j, k]` (r, size y_j, size y_k) holds Q_jk where one of the two is structured; `sensitivities[j, k]`
    (r, size z_j, size y_k) S_jk, or (r, size) its diagonal. `gradients[j]` and `means[j, k]` are the averages for the other
    leaves. Where no more was asked for, `diagonals[j]` (r, size y_j) is the diagonal of Q_jj. Implicit leaves have outputs,
    inputs and gradients, and all their curvature in `implicit`."""

    value: Array
    examples: int
    gradients: dict[int, Array]
    means: dict[tuple[int, int], Kind]
    outputs: dict[int, Array]
    inputs: dict[int, Array]
    curvatures: dict[tuple[int, int], Array]
    sensitivities: dict[tuple[int, int], Array]
    diagonals: dict[int, Array] = dataclasses.field(default_factory=dict)
    implicit: Implicit | None = None


def sweep_batch(
    plan: Plan,
    environment: dict[int, Array],
    batch: Sequence[Array],
    examples: int,
    batch_size: int | None,
    relevant: Callable[[int, int], bool],
    *,
    second_order: bool,
    diagonal: frozenset[int] = frozenset(),
) -> BatchResult:
    """Sweep over all examples. `environment` holds the frontier's values, `batch` the arrays (r, ...) in graph order;
    `relevant` and `diagonal` say what is asked for, as in `sweep`."""
    arrays = dict(zip(plan.graph.inputs[len(plan.parameters) :], batch, strict=True))
    implicit = None
    if len(plan.explicit) < len(plan.leaves):
        read = {i for step in plan.steps for operation in step.operations for i in operation.inputs}
        wanted = sorted({*read, plan.graph.output} - {*plan.frontier, *plan.graph.constants, *arrays})
        implicit = differentiate(plan, environment, batch, examples, wanted, second_order=second_order)
        arrays |= implicit.values
    with naming_the_culprit(plan):
        result = _sweep_batch(
            plan, environment, arrays, examples, batch_size, relevant, second_order=second_order, diagonal=diagonal
        )
    if implicit is not None:
        result.outputs |= implicit.outputs
        result.inputs |= implicit.inputs
        result.gradients |= {n: g / examples for n, g in implicit.gradients.items()}
        result.implicit = implicit
    return result


def _sweep_batch(
    plan: Plan,
    environment: dict[int, Array],
    batch: dict[int, Array],
    examples: int,
    batch_size: int | None,
    relevant: Callable[[int, int], bool],
    *,
    second_order: bool,
    diagonal: frozenset[int],
) -> BatchResult:
    size = examples if batch_size is None else min(batch_size, examples)
    shared = {f: environment[f] for f in plan.frontier}

    def one(shared: Part, example: Part) -> tuple[dict[str, Any], dict[str, Any]]:
        return _one_example(plan, shared, example, relevant, second_order, diagonal, size)

    def chunk(part: Part, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
        summed, kept = jax.vmap(one, in_axes=(None, 0), axis_size=count)(shared, part)
        return jax.tree.map(lambda a: jnp.sum(a, axis=0), summed), kept

    whole, rest = divmod(examples, size)
    if whole == 1:
        summed, kept = chunk({i: a[:size] for i, a in batch.items()}, size)
    else:
        parts = {i: a[: whole * size].reshape(whole, size, *a.shape[1:]) for i, a in batch.items()}
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(lambda: chunk({i: p[0] for i, p in parts.items()}, size)[0]),
        )

        def step(total: dict[str, Any], part: Part) -> tuple[dict[str, Any], dict[str, Any]]:
            summed, kept = chunk(part, size)
            return jax.tree.map(jnp.add, total, summed), kept

        summed, kept = jax.lax.scan(step, zero, parts)
        kept = jax.tree.map(lambda a: a.reshape(whole * size, *a.shape[2:]), kept)
    if rest:
        more, tail = chunk({i: a[whole * size :] for i, a in batch.items()}, rest)
        summed = jax.tree.map(jnp.add, summed, more)
        kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, tail)
    return BatchResult(examples=examples, **jax.tree.map(lambda a: a / examples, summed), **kept)


def _one_example(
    plan: Plan,
    shared: dict[int, Array],
    example: dict[int, Array],
    relevant: Callable[[int, int], bool],
    second_order: bool,
    diagonal: frozenset[int],
    copies: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    environment = {**plan.graph.constants, **shared, **example}
    if plan.graph.output not in environment:
        evaluate(plan.during, environment)
    value = environment[plan.graph.output]
    seed = {plan.graph.output: jnp.ones((), value.dtype)} if plan.graph.output in plan.swept else {}
    result = sweep(
        plan.graph, plan.steps, plan.explicit, environment, seed, {}, relevant,
        second_order=second_order, diagonal=diagonal, copies=copies,
    )  # fmt: skip
    poison = jnp.where(jnp.isnan(value), jnp.nan, 0).astype(value.dtype)
    structured = {n for n, leaf in enumerate(plan.explicit) if leaf.structured}
    summed: dict[str, Any] = {"value": value, "gradients": {}, "means": {}}
    kept: dict[str, Any] = {
        "outputs": {},
        "inputs": {},
        "curvatures": {},
        "sensitivities": result.sensitivities,
        "diagonals": {},
    }
    for j, g in result.gradients.items():
        if j in structured:
            kept["outputs"][j] = widened(g + poison)
            kept["inputs"][j] = widened(environment[plan.leaves[j].input])
        else:
            summed["gradients"][j] = g + poison
    for pair, kind in result.sensitivities.items():
        kept["sensitivities"][pair] = kind.values if isinstance(kind, Diagonal) else kinds.as_dense(kind)
    for (j, k), kind in result.curvatures.items():
        if j == k and j in structured & diagonal:
            kept["diagonals"][j] = widened(kinds.diagonal_of(kind).values + poison)
        elif structured.intersection((j, k)):
            kept["curvatures"][j, k] = kinds.as_dense(kind) + poison
        elif isinstance(kind, Diagonal):
            summed["means"][j, k] = Diagonal(kind.values + poison)
        else:
            summed["means"][j, k] = Dense(kinds.as_dense(kind) + poison)
    return summed, kept
