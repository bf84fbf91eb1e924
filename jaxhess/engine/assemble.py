"""From the sweep's matrices to operators, a block for each parameter.

A structured use of W contributes its pairs with every other use of the same parameter (math.md, section 6):

    d2E/dW_j dW_k [(i,q),(p,s)] = Q_jk[i,p] z_j[q] z_k[s] + g_j[i] S_jk[q,p] z_k[s] + g_k[p] S_kj[s,i] z_j[q]

One use with one input vector is `KroneckerProductSum`; everything else is a labelled contraction. Uses of other kinds
are averaged matrices, which the sweep has carried to the parameter already.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array
from jaxhess.engine import kinds
from jaxhess.engine.batch import BatchResult
from jaxhess.engine.graph import Operation, evaluate, leading_to, nested
from jaxhess.engine.labels import number_uses, own_views, scale_of, use_of, view_of
from jaxhess.engine.plan import Plan
from jaxhess.engine.views import View
from jaxhess.operators import (
    ContractionOperator,
    CurvatureOperator,
    Dense,
    Diagonal,
    KroneckerProductSum,
    Layout,
    LowRank,
    OperatorSum,
)
from jaxhess.operators.contraction import contract
from jaxhess.operators.implicit import ImplicitKroneckerSum
from jaxhess.operators.linearised import ImplicitTerm, ImplicitUse
from jaxhess.operators.pullback import Pullback
from jaxhess.operators.uses import EXAMPLE, PairTerm, Use, pair_terms

__all__ = ["block", "factored", "structured_gradients", "weights_of"]


def structured_gradients(plan: Plan, result: BatchResult) -> dict[int, Array]:
    """`(1/r) sum_i v_i z_i^T` by the frontier variables with structured uses: one matrix product over the batch for each
    use (Corollary 1)."""
    gradients: dict[int, Array] = {}
    for number, G in result.outputs.items():
        leaf = plan.leaves[number]
        shape = plan.graph.avals[leaf.variable].shape
        use = use_of(plan, leaf, View.of(leaf.variable, shape), EXAMPLE + 1)
        assert use.input is not None
        G = G.reshape(result.examples, *use.output_sizes)
        Z = result.inputs[number].reshape(result.examples, *use.input_sizes)
        gradient = contract((G, Z), ((EXAMPLE, *use.output), (EXAMPLE, *use.input)), use.weight) / result.examples
        gradients[leaf.variable] = gradients[leaf.variable] + gradient if leaf.variable in gradients else gradient
    return gradients


def block(
    plan: Plan,
    result: BatchResult,
    environment: dict[int, Array],
    root: int,
    own: kinds.Kind | None,
    gradients: dict[int, Array],
) -> CurvatureOperator:
    """The Hessian block of one parameter; `own` is its curvature outside structured uses, `gradients` those of
    `structured_gradients`."""
    shape, dtype = plan.graph.avals[root].shape, plan.graph.avals[root].dtype
    members = {n for n, leaf in enumerate(plan.leaves) if root in leaf.roots}
    implicit = sorted(n for n in members if plan.leaves[n].implicit)
    if implicit and result.implicit is not None:
        return _implicit(plan, result, environment, root, implicit, gradients)
    terms: list[CurvatureOperator] = []
    if isinstance(own, kinds.Diagonal):
        terms.append(Diagonal(own.values.reshape(shape)))
    elif own is not None:
        terms.append(Dense(kinds.as_dense(own), shape))
    both = [*result.curvatures, *((min(pair), max(pair)) for pair in result.sensitivities)]
    pairs = [pair for pair in dict.fromkeys(both) if members.issuperset(pair)]
    derived = {n for n in members & set(result.outputs) if view_of(plan, n, root) is None}
    involved = sorted(derived.union(*pairs))
    views = {n: view for n in involved if (view := view_of(plan, n, root)) is not None}
    if len(views) < len(involved) or len({view.sizes for view in views.values()}) > 1:
        variables = list(dict.fromkeys(plan.leaves[n].variable for n in involved))
        derived_terms = _derived_terms(plan, result, involved, variables, pairs)
        terms.append(_pullback(plan, environment, root, variables, derived_terms, gradients))
    elif pairs:
        terms += _direct_terms(plan, result, environment, views, pairs, shape)
    if not terms:
        return Diagonal(jnp.zeros(shape, dtype))
    return terms[0] if len(terms) == 1 else OperatorSum(terms)


def factored(plan: Plan, result: BatchResult, root: int) -> LowRank | None:
    """The gradient of a matrix as `left right^T`, or None where the parameter is not a matrix with structured uses only."""
    shape = plan.graph.avals[root].shape
    members = [n for n, leaf in enumerate(plan.leaves) if root in leaf.roots and n in {*result.outputs, *result.gradients}]
    lefts, rights = [], []
    for n in members:
        view = view_of(plan, n, root)
        if len(shape) != 2 or n not in result.outputs or view is None or view.sizes != shape or view.factors:
            return None
        use = use_of(plan, plan.leaves[n], view, EXAMPLE + 1)
        assert use.input is not None
        sides_of = [set(use.weight).intersection(labels) for labels in (use.output, use.input)]
        if [len(side) for side in sides_of] != [1, 1] or sides_of[0] == sides_of[1]:
            return None
        G = result.outputs[n].reshape(result.examples, *use.output_sizes)
        Z = result.inputs[n].reshape(result.examples, *use.input_sizes)
        sides = {}
        for array, labels in ((G / result.examples, use.output), (Z, use.input)):
            (axis,) = [label for label in labels if label in use.weight]
            ordered = (EXAMPLE, *use.positions, axis)
            moved = jnp.transpose(array, [(EXAMPLE, *labels).index(label) for label in ordered])
            sides[axis] = moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1]).T
        lefts.append(sides[use.weight[0]])
        rights.append(sides[use.weight[1]])
    if not lefts:
        return None
    return LowRank(jnp.concatenate(lefts, axis=1), jnp.concatenate(rights, axis=1))


def _direct_terms(
    plan: Plan,
    result: BatchResult,
    environment: dict[int, Array],
    views: dict[int, View],
    pairs: Sequence[tuple[int, int]],
    shape: tuple[int, ...],
) -> list[CurvatureOperator]:
    uses = number_uses(plan, views)
    single = _kronecker(result, environment, views, uses, pairs, shape)
    if single is not None:
        return [single]
    terms: list[CurvatureOperator] = []
    for j, k in pairs:
        scales = [s for s in (scale_of(views[n], environment) for n in (j, k)) if s is not None]
        factor = math.prod(scales, start=jnp.ones(())) / result.examples
        for term in pair_terms(uses, result.outputs, result.inputs, result.curvatures, result.sensitivities, j, k):
            tags = () if term.symmetrised else lx.symmetric_tag
            terms.append(
                ContractionOperator(
                    term.operands, term.labels, term.rows, term.columns, shape, factor,
                    symmetrised=term.symmetrised, tags=tags,
                )
            )  # fmt: skip
    return terms


def _kronecker(
    result: BatchResult,
    environment: dict[int, Array],
    views: dict[int, View],
    uses: dict[int, Use],
    pairs: Sequence[tuple[int, int]],
    shape: tuple[int, ...],
) -> KroneckerProductSum | None:
    """Theorem 1: one use of the parameter with one input vector for each example."""
    if len(uses) != 1 or len(pairs) != 1:
        return None
    ((n, use),) = uses.items()
    if use.input is None or set(use.output) & set(use.input):
        return None
    rows = tuple(label - use.weight[0] for label in use.output) if use.weight else ()
    columns = tuple(label - use.weight[0] for label in use.input) if use.weight else ()
    m, n_inputs = math.prod(use.output_sizes), math.prod(use.input_sizes)
    Q = result.curvatures[n, n].reshape(result.examples, m, m)
    Z = result.inputs[n].reshape(result.examples, n_inputs)
    scale = scale_of(views[n], environment)
    layout = Layout(shape, use.weight_sizes, rows, columns)
    return KroneckerProductSum(Q if scale is None else Q * jnp.asarray(scale**2, Q.dtype), Z, layout)


def _implicit(
    plan: Plan,
    result: BatchResult,
    environment: dict[int, Array],
    root: int,
    involved: Sequence[int],
    gradients: dict[int, Array],
) -> CurvatureOperator:
    """The block of a parameter that leads into a loop."""
    known = {n: view for n in involved if (view := view_of(plan, n, root)) is not None}
    direct = len(known) == len(involved)
    variables = list(dict.fromkeys(plan.leaves[n].variable for n in involved))
    uses = [
        ImplicitUse(
            None if n not in result.outputs else result.outputs[n].reshape(result.examples, *use.output_sizes),
            None if n not in result.inputs else result.inputs[n].reshape(result.examples, *use.input_sizes),
            use,
            key=n,
            place=place if direct else variables.index(plan.leaves[n].variable),
            sensitive=plan.leaves[n].structured and plan.leaves[n].sensitive,
        )
        for place, (n, use) in enumerate(number_uses(plan, known if direct else own_views(plan, involved)).items())
    ]
    assert result.implicit is not None
    assert result.implicit.linear is not None
    term = ImplicitTerm(result.implicit.linear, tuple(uses), result.implicit.shapes, result.examples)
    if direct:
        one = jnp.ones((), plan.graph.avals[root].dtype)
        scales = [one if (scale := scale_of(known[n], environment)) is None else scale * one for n in involved]
        return ImplicitKroneckerSum(term, scales, plan.graph.avals[root].shape)
    total = dict(gradients)
    for n in involved:
        if n in result.gradients:
            variable = plan.leaves[n].variable
            total[variable] = total[variable] + result.gradients[n] if variable in total else result.gradients[n]
    return _pullback(plan, environment, root, variables, [term], total)


def _derived_terms(
    plan: Plan, result: BatchResult, involved: Sequence[int], variables: Sequence[int], pairs: Sequence[tuple[int, int]]
) -> list[PairTerm]:
    place = {n: variables.index(plan.leaves[n].variable) for n in involved}
    uses = number_uses(plan, own_views(plan, involved))
    return [
        dataclasses.replace(
            term,
            operands=(term.operands[0] / result.examples, *term.operands[1:]),
            pair=(place[term.pair[0]], place[term.pair[1]]),
        )
        for j, k in pairs
        for term in pair_terms(uses, result.outputs, result.inputs, result.curvatures, result.sensitivities, j, k)
    ]


def _pullback(
    plan: Plan,
    environment: dict[int, Array],
    root: int,
    variables: Sequence[int],
    terms: Sequence[PairTerm | ImplicitTerm],
    gradients: dict[int, Array],
) -> Pullback:
    avals = plan.graph.avals
    weights = [gradients[v] if v in gradients else jnp.zeros(avals[v].shape, avals[v].dtype) for v in variables]
    operations = tuple(leading_to(plan.before, variables))
    read = {i for operation in operations for i in operation.inputs}
    others = {i: environment[i] for i in {*plan.parameters, *read.intersection(plan.graph.constants)} - {root}}
    return Pullback(
        terms,
        environment[root],
        others,
        weights,
        weights_of(operations, root, tuple(variables)),
        reverse_only=any(operation.name.startswith("custom_vjp") for operation, _ in nested(operations)),
    )


def weights_of(
    operations: tuple[Operation, ...], root: int, variables: tuple[int, ...]
) -> Callable[[Array, dict[int, Array]], tuple[Array, ...]]:
    def weights(point: Array, others: dict[int, Array]) -> tuple[Array, ...]:
        environment = {**others, root: point}
        evaluate(operations, environment)
        return tuple(environment[v] for v in variables)

    return weights
