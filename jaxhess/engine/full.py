"""The blocks between all parameters, from a sweep that keeps every pair of uses (math.md, section 6).

A parameter is plain where all its uses are views of it outside of loops: its blocks with other plain ones are made of Q_jk,
g_j and S_jk. What remains, weights computed from parameters and uses in loops, has its blocks by products.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.engine import kinds
from jaxhess.engine.batch import BatchResult
from jaxhess.engine.diagonal import is_inert
from jaxhess.engine.labels import layout_of, number_uses, scale_of, view_of
from jaxhess.engine.parameters import Relevant
from jaxhess.engine.plan import Plan
from jaxhess.engine.views import View
from jaxhess.operators.cross import CrossBlock, KroneckerCross
from jaxhess.operators.uses import PairTerm, pair_terms

__all__ = ["between", "cross_block", "is_layer", "layers_of", "plain_parameters"]

Pair = tuple[int, int]


def plain_parameters(plan: Plan) -> frozenset[int]:
    """The places of the parameters whose blocks are made of small matrices."""
    derived = {
        root
        for n, leaf in enumerate(plan.leaves)
        for root in leaf.roots
        if leaf.implicit
        or (leaf.structured and view_of(plan, n, root) is None)
        or (not leaf.structured and leaf.variable != root and not is_inert(plan, n))
    }
    return frozenset(n for n, root in enumerate(plan.parameters) if root not in derived)


def between(plan: Plan, parameters: Sequence[int]) -> Relevant:
    """Which pairs of leaves matter to the blocks between these parameters, given by place."""
    roots = {plan.parameters[n] for n in parameters}
    chosen = {
        n
        for n, leaf in enumerate(plan.leaves)
        if not leaf.implicit and leaf.roots & roots and (leaf.structured or not is_inert(plan, n))
    }
    return lambda j, k: {j, k} <= chosen


def is_layer(plan: Plan, weight: int, bias: int) -> bool:
    """Whether the error sees two parameters, given by place, only as `W z + b`: a contraction whose result is used once, to
    add what is used nowhere else."""
    w, b = plan.parameters[weight], plan.parameters[bias]
    uses = [[leaf for leaf in plan.leaves if root in leaf.roots] for root in (w, b)]
    if any(len(leaves) != 1 or leaves[0].loops or (leaves[0].implicit and not plan.outputs) for leaves in uses):
        return False
    (product,), (added,) = uses
    if not product.structured or added.structured:
        return False
    views = [
        view_of(plan, plan.leaves.index(leaf), root) for leaf, root in ((product, w), (added, b)) if leaf.variable != root
    ]
    if any(view is None or view.factors for view in views):
        return False
    if added.variable != b and not _keeps_order(views[-1]):
        return False
    if plan.graph.avals[w].dtype != plan.graph.avals[b].dtype:
        return False
    if product.output == plan.graph.output:
        return False
    readers = [o for o in plan.during if {product.output, added.variable} & set(o.inputs)]
    shapes = [plan.graph.avals[variable].shape for variable in (product.output, added.variable)]
    return (
        [o.name for o in readers] == ["add"]
        and set(readers[0].inputs) == {product.output, added.variable}
        and shapes[0] == shapes[1] == plan.graph.avals[readers[0].outputs[0]].shape
        and plan.graph.avals[b].size == plan.graph.avals[added.variable].size
    )


def layers_of(plan: Plan) -> tuple[tuple[int, int], ...]:
    """The places of the weight and the bias of each layer, as `is_layer` has it."""
    places = {root: place for place, root in enumerate(plan.parameters)}
    added: dict[int, list[int]] = {}
    for leaf in plan.leaves:
        if not leaf.structured and len(leaf.roots) == 1:
            added.setdefault(leaf.variable, []).extend(places[root] for root in leaf.roots)
    partners: dict[int, list[int]] = {}
    for operation in plan.during:
        if operation.name == "add" and len(operation.inputs) == 2:
            for one, other in (operation.inputs, operation.inputs[::-1]):
                partners.setdefault(one, []).extend(added.get(other, ()))
    pairs = []
    for leaf in plan.leaves:
        if leaf.structured and len(leaf.roots) == 1:
            (weight,) = (places[root] for root in leaf.roots)
            pairs += [(weight, bias) for bias in partners.get(leaf.output, ()) if is_layer(plan, weight, bias)]
    return tuple(pairs)


def _keeps_order(view: View | None) -> bool:
    """Whether a view's entries are in the order of the parameter's."""
    if view is None:
        return False
    atoms = [atom for axis in view.axes for atom in axis if view.sizes[atom] > 1]
    return atoms == sorted(atoms)


def cross_block(
    plan: Plan,
    result: BatchResult,
    environment: dict[int, Array],
    own: dict[Pair, kinds.Kind],
    row: int,
    column: int,
) -> KroneckerCross | CrossBlock:
    """The block from the plain parameter at place `column` to that at `row`; `own` is the parameters' curvature outside of
    structured uses."""
    roots = plan.parameters[row], plan.parameters[column]
    shapes = plan.graph.avals[roots[0]].shape, plan.graph.avals[roots[1]].shape
    members = [[n for n, leaf in enumerate(plan.leaves) if root in leaf.roots] for root in roots]
    known = {*result.curvatures, *result.sensitivities}
    pairs = [(j, k) for j in members[0] for k in members[1] if known & {(j, k), (k, j)}]
    kind = own.get((min(row, column), max(row, column)))
    if kind is None and len(pairs) == 1:
        single = _kronecker(plan, result, environment, pairs[0])
        if single is not None:
            return single
    terms = [term for j, k in pairs for term in _terms(plan, result, environment, j, k, roots)]
    if kind is not None:
        matrix = kinds.as_dense(kind if row <= column else kinds.transpose(kind))
        terms.append(PairTerm((matrix,), ((1, 2),), (1,), (2,), (0, 1), False))
    if not terms:
        dtype = plan.graph.avals[roots[0]].dtype
        sides = [jnp.zeros((plan.graph.avals[root].size, 0), dtype) for root in roots]
        terms.append(PairTerm(tuple(sides), ((1, 3), (2, 3)), (1,), (2,), (0, 1), False))
    return CrossBlock(terms, *shapes)


def _terms(plan: Plan, result: BatchResult, environment: dict[int, Array], j: int, k: int, roots: Pair) -> list[PairTerm]:
    views = {n: view for n, root in ((j, roots[0]), (k, roots[1])) if (view := view_of(plan, n, root)) is not None}
    uses = number_uses(plan, views)
    scale = jnp.ones((), plan.graph.avals[roots[0]].dtype) / result.examples
    for view in views.values():
        factor = scale_of(view, environment)
        scale = scale if factor is None else scale * factor
    first, second = min(j, k), max(j, k)
    terms = []
    for term in pair_terms(uses, result.outputs, result.inputs, result.curvatures, result.sensitivities, first, second):
        rows, columns = (term.rows, term.columns) if term.pair == (j, k) else (term.columns, term.rows)
        operands = (term.operands[0] * scale.astype(term.operands[0].dtype), *term.operands[1:])
        terms.append(PairTerm(operands, term.labels, rows, columns, (0, 1), False))
    return terms


def _kronecker(plan: Plan, result: BatchResult, environment: dict[int, Array], pair: Pair) -> KroneckerCross | None:
    """One vector of each example on both sides."""
    j, k = pair
    if not (plan.leaves[j].structured and plan.leaves[k].structured):
        return None
    flipped = (k, j) in result.sensitivities
    if flipped:
        j, k = k, j
    r, row, column = result.examples, layout_of(plan, j), layout_of(plan, k)
    if row is None or column is None:
        return None
    key = min(j, k), max(j, k)
    if key in result.curvatures:
        Q = result.curvatures[key]
        Q = Q if j <= k else jnp.swapaxes(Q, 1, 2)
    else:
        Q = jnp.zeros((r, row.m, column.m), result.outputs[j].dtype)
    S = result.sensitivities.get((j, k))
    scale = jnp.ones((), Q.dtype)
    for n in (j, k):
        factor = scale_of(plan.views[plan.leaves[n].variable], environment)
        scale = scale if factor is None else scale * factor
    return KroneckerCross(
        Q, result.inputs[j].reshape(r, row.n), result.inputs[k].reshape(r, column.n), row, column,
        None if S is None else result.outputs[j].reshape(r, row.m), S, scale, flipped=flipped,
    )  # fmt: skip
