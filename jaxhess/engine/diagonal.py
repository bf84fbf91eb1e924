"""The diagonal of the Hessian without its blocks.

A weight that meets one vector of each example, `y = W z`, needs the diagonal of Q alone,

    diag(H_W) = (1/r) sum_i diag(Q_i) (z_i * z_i)^T                                     (math.md, section 3)

and below the last layer whose Q is needed in full the sweep carries no more than that. With C = S J^T M J S + D behind a
narrow place, `diag(W^T C W) = sum_k (J S W)_k * (M J S W)_k + diag(D)^T (W * W)`: no (units, units) matrix at all.
"""

import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.engine import kinds
from jaxhess.engine.assemble import block, structured_gradients
from jaxhess.engine.batch import sweep_batch
from jaxhess.engine.labels import scale_of, use_of, view_of
from jaxhess.engine.parameters import Relevant, own_curvature, shares_parameter
from jaxhess.engine.plan import Plan
from jaxhess.operators.contraction import contract
from jaxhess.operators.uses import EXAMPLE

__all__ = ["examples_at_once", "hessian_diagonals", "is_inert"]

_BUDGET_BYTES = 2**28
_COPIES = 4


def hessian_diagonals(plan: Plan, environment: dict[int, Array], batch: list[Array], examples: int) -> list[Array]:
    """The diagonal of the mean error's Hessian for each parameter, in its shape."""
    relevant = _relevant(plan)
    leaves = _diagonal_leaves(plan, relevant)
    result = sweep_batch(plan, environment, batch, examples, None, relevant, second_order=True, diagonal=leaves)
    fast = [all(n in leaves for n in _members(plan, root) if _matters(plan, n, relevant)) for root in plan.parameters]
    own = own_curvature(plan, result, environment, diagonal=all(fast))
    gradients = {} if all(fast) else structured_gradients(plan, result)
    diagonals = []
    for number, root in enumerate(plan.parameters):
        shape, dtype = plan.graph.avals[root].shape, plan.graph.avals[root].dtype
        kind = own.get((number, number))
        if not fast[number]:
            diagonals.append(block(plan, result, environment, root, kind, gradients).diagonal())
            continue
        total = jnp.zeros(shape, dtype) if kind is None else kinds.diagonal_of(kind).values.reshape(shape)
        for n in _members(plan, root):
            if n in result.diagonals:
                total = total + _of_use(plan, n, root, result.diagonals[n], result.inputs[n], environment)
        diagonals.append(total)
    return diagonals


def examples_at_once(plan: Plan, examples: int) -> int:
    """How many examples to process at once, by a rough bound on what the sweep holds for one."""
    sizes = [
        max((plan.graph.avals[i].size for i in step.inputs), default=1) * max(plan.graph.avals[o].size for o in step.outputs)
        for step in plan.steps
        if step.kind not in ("componentwise", "indexing")
    ]
    itemsize = plan.graph.avals[plan.graph.output].dtype.itemsize
    return max(1, min(examples, _BUDGET_BYTES // (_COPIES * itemsize * max(sizes, default=1))))


def _of_use(plan: Plan, n: int, root: int, diagonal: Array, inputs: Array, environment: dict[int, Array]) -> Array:
    view = view_of(plan, n, root)
    assert view is not None
    use = use_of(plan, plan.leaves[n], view, EXAMPLE + 1)
    assert use.input is not None
    D = diagonal.reshape(-1, *use.output_sizes)
    Z = inputs.reshape(-1, *use.input_sizes)
    total = contract((D, Z**2), ((EXAMPLE, *use.output), (EXAMPLE, *use.input)), use.weight) / len(D)
    scale = scale_of(view, environment)
    return (total if scale is None else total * scale**2).reshape(plan.graph.avals[root].shape)


def _members(plan: Plan, root: int) -> list[int]:
    return [n for n, leaf in enumerate(plan.leaves) if root in leaf.roots]


def _relevant(plan: Plan) -> Relevant:
    """Pairs of leaves of one parameter, but for those that enter the error linearly (a penalty, say): no curvature."""
    inert = {n for n, leaf in enumerate(plan.leaves) if not leaf.structured and not leaf.implicit and is_inert(plan, n)}
    shared = shares_parameter(plan.leaves)
    return lambda j, k: shared(j, k) and (j == k or not {j, k} & inert)


def _matters(plan: Plan, n: int, relevant: Relevant) -> bool:
    return plan.leaves[n].structured or plan.leaves[n].implicit or not is_inert(plan, n)


def is_inert(plan: Plan, n: int) -> bool:
    """Whether the error is linear in a leaf, a penalty say."""
    below = {plan.leaves[n].variable}
    for step in plan.steps:
        if below.intersection(step.inputs):
            if step.kind not in ("linear", "indexing") and not step.linear:
                return False
            below.update(step.outputs)
    return True


def _diagonal_leaves(plan: Plan, relevant: Relevant) -> frozenset[int]:
    """The leaves that give the diagonal of their parameter by the diagonal of their own curvature."""
    chosen = set()
    for n, leaf in enumerate(plan.leaves):
        if leaf.implicit or any(relevant(n, k) for k in range(len(plan.leaves)) if k != n) or len(leaf.roots) > 1:
            continue
        (root,) = leaf.roots
        view = view_of(plan, n, root)
        if leaf.structured:
            if view is not None and not use_of(plan, leaf, view, EXAMPLE + 1).positions:
                chosen.add(n)
        elif leaf.variable == root:
            chosen.add(n)
    return frozenset(chosen)
