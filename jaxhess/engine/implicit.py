"""First order, and curvature as a linear function, of what the sweep leaves out: all that leads into loops.

Every structured use gets a probe dy_j, added to its y at every place, and a pull c_j; variables used otherwise a shift.
With `Phi = E + sum_j c_j . z_j` the gradient of Phi with respect to the probes, pulls and shifts at 0 is (g_j, z_j, dE/dw),
and its linearisation is the map K of `jaxhess.operators.linearised`. For a loop it runs two substitutions (math.md,
section 6, "A scan"): forward, `dh_s = J_s (dh_{s-1}, du_s)`, and backward with the body's Jacobian transposed and its
second derivative B_s. Nothing of the size (places)^2 is formed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import widened
from jaxhess._typing import Array
from jaxhess.engine.failure import naming_the_culprit
from jaxhess.engine.graph import Probe, evaluate
from jaxhess.engine.plan import Plan

__all__ = ["Implicit", "differentiate"]

Parts = dict[str, dict[int, Array]]


@dataclasses.dataclass(frozen=True)
class Implicit:
    """By the leaves' numbers, for all examples: `outputs` g_j (r, places.., y) and `inputs` z_j (r, places.., z) of
    structured uses, `gradients` of the summed error for variables. `values` (r, ...) are those of the variables asked for.
    `linear` is K, and `shapes` describe its argument."""

    outputs: dict[int, Array]
    inputs: dict[int, Array]
    gradients: dict[int, Array]
    values: dict[int, Array]
    linear: Callable[[Parts], Parts] | None
    shapes: tuple[tuple[str, int, tuple[int, ...], Any], ...]


def differentiate(
    plan: Plan,
    environment: dict[int, Array],
    batch: Sequence[Array],
    examples: int,
    wanted: Sequence[int],
    *,
    second_order: bool,
) -> Implicit:
    """Evaluate the error of every example, and differentiate it with respect to the plan's implicit leaves.

    Raises:
        UnsupportedOperationError: if an operation cannot be differentiated twice.
    """
    avals, data = plan.graph.avals, plan.graph.inputs[len(plan.parameters) :]
    leaves = {n: leaf for n, leaf in enumerate(plan.leaves) if leaf.implicit}
    structured = {n: leaf for n, leaf in leaves.items() if leaf.structured}
    sensitive = [n for n, leaf in structured.items() if leaf.sensitive]

    def total(probes: dict[int, Array], shifts: dict[int, Array], pulls: dict[int, Array]):
        shared = {f: environment[f] for f in plan.frontier}
        shared |= {plan.shifted[leaves[n].variable]: environment[leaves[n].variable] + s for n, s in shifts.items()}

        def one(example: Sequence[Array], probes: dict[int, Array]):
            local = {**plan.graph.constants, **shared, **dict(zip(data, example, strict=True))}
            placed = {leaf.operation: Probe(probes[n], leaf.input) for n, leaf in structured.items() if leaf.operation}
            seen = evaluate(plan.probed, local, placed)
            read = {n: seen[leaf.operation] for n, leaf in structured.items() if leaf.operation}
            return local[plan.shifted.get(plan.graph.output, plan.graph.output)], read, {v: local[v] for v in wanted}

        errors, read, values = jax.vmap(one, in_axes=(0, 0), axis_size=examples)(list(batch), probes)
        known = jax.lax.stop_gradient(jnp.where(jnp.isnan(errors), jnp.nan, 1).astype(errors.dtype))
        read = {n: widened(z) for n, z in read.items()}
        return jnp.sum(known * errors) + sum(jnp.vdot(pulls[n], read[n]) for n in sensitive), (read, values)

    def first_order(parts: Parts):
        (probes, shifts), (read, values) = jax.grad(total, argnums=(0, 1), has_aux=True)(
            parts["probes"], parts["shifts"], parts["pulls"]
        )
        kept = {n: z for n, z in read.items() if n not in sensitive}
        return {"probes": probes, "shifts": shifts, "pulls": {n: read[n] for n in sensitive}}, (kept, values)

    zeros: Parts = {
        "probes": {
            n: jnp.zeros((examples, *leaf.places, *avals[leaf.output].shape), avals[leaf.output].dtype)
            for n, leaf in structured.items()
        },
        "shifts": {
            n: jnp.zeros(avals[leaf.variable].shape, avals[leaf.variable].dtype)
            for n, leaf in leaves.items()
            if not leaf.structured
        },
        "pulls": {
            n: widened(jnp.zeros((examples, *leaf.places, *avals[leaf.input].shape), avals[leaf.input].dtype))
            for n, leaf in structured.items()
            if leaf.sensitive
        },
    }
    with naming_the_culprit(plan):
        if second_order:
            first, linear, (kept, values) = jax.linearize(first_order, zeros, has_aux=True)
        else:
            (first, (kept, values)), linear = first_order(zeros), None
    shapes = tuple((kind, n, a.shape, a.dtype) for kind, part in zeros.items() for n, a in part.items())
    outputs = {n: widened(g) for n, g in first["probes"].items()}
    return Implicit(outputs, {**kept, **first["pulls"]}, first["shifts"], values, linear, shapes)
