"""From the frontier, the arrays that examples use, to the parameters: gradients and curvature through what depends on no
data (masks, normalisation, transposes), by a sweep of its own."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.engine import kinds
from jaxhess.engine.batch import BatchResult
from jaxhess.engine.plan import Leaf, Plan
from jaxhess.engine.sweep import sweep

__all__ = ["Relevant", "own_curvature", "parameter_gradients", "shares_parameter"]

Relevant = Callable[[int, int], bool]


def shares_parameter(leaves: tuple[Leaf, ...]) -> Relevant:
    """Which pairs of leaves matter to the diagonal blocks: those of one parameter."""
    return lambda j, k: bool(leaves[j].roots & leaves[k].roots)


def _root_leaves(plan: Plan) -> tuple[Leaf, ...]:
    """The parameters themselves, as the leaves of the sweep over what depends on no data."""
    first = {
        root: min((index for index, step in enumerate(plan.before_steps) if root in step.inputs), default=len(plan.steps))
        for root in plan.parameters
    }
    return tuple(Leaf(root, first[root], frozenset([root])) for root in plan.parameters)


def parameter_gradients(
    plan: Plan, result: BatchResult, weights: dict[int, Array], environment: dict[int, Array]
) -> list[Array]:
    """The gradients of the mean error, from those of the frontier: `weights` of structured uses, the rest in `result`."""
    seeds = dict(weights)
    for n, g in result.gradients.items():
        variable = plan.leaves[n].variable
        seeds[variable] = seeds[variable] + g if variable in seeds else g
    leaves = _root_leaves(plan)
    swept = sweep(
        plan.graph, plan.before_steps, leaves, environment, seeds, {}, shares_parameter(leaves), second_order=False
    )
    shapes = [plan.graph.avals[root] for root in plan.parameters]
    return [swept.gradients.get(n, jnp.zeros(s.shape, s.dtype)) for n, s in enumerate(shapes)]


def own_curvature(
    plan: Plan, result: BatchResult, environment: dict[int, Array], *, diagonal: bool = False, every_pair: bool = False
) -> dict[tuple[int, int], kinds.Kind]:
    """The parameters' curvature outside structured uses, carried from the frontier to the parameters: by pairs of their
    numbers, each with itself unless `every_pair` is asked for; only its `diagonal` on request."""
    leaves = _root_leaves(plan)
    seeds = {plan.leaves[n].variable: g for n, g in result.gradients.items() if not plan.leaves[n].implicit}
    curvatures = {(plan.leaves[j].variable, plan.leaves[k].variable): kind for (j, k), kind in result.means.items()}
    swept = sweep(
        plan.graph, plan.before_steps, leaves, environment, seeds, curvatures,
        (lambda j, k: True) if every_pair else shares_parameter(leaves),
        diagonal=range(len(leaves)) if diagonal else (),
    )  # fmt: skip
    return swept.curvatures
