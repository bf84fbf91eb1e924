"""From Jacobians of the outputs to Gauss-Newton operators, diagonals and products (math.md, section 7).

    G = (1/r) sum_i J_i^T B_i J_i         for a use  y = W z:   J_i X = V_i (X z_i),   V_i = d(output)/dy (M, m)

Where the uses of a parameter have no more entries m than there are outputs M, `Q_i = V_i^T B_i V_i` (m, m) takes the place
of both: then V_i = I with B_i = Q_i is the same operator.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array
from jaxhess.engine.assemble import weights_of
from jaxhess.engine.graph import Operation, evaluate, leading_to, nested
from jaxhess.engine.jacobian import Head, Jacobian, chunked, output_jacobian, outputs_of
from jaxhess.engine.labels import number_uses, own_views, scale_of, view_of
from jaxhess.engine.plan import Plan
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.dense import Dense, Diagonal
from jaxhess.operators.gauss_newton import GaussNewtonBlock, kronecker_sum, pulled_back
from jaxhess.operators.jacobian import JacobianUse, OutputJacobian, Through

__all__ = ["Case", "blocks_of", "diagonals_of", "jacobians_of", "product_of"]

_PSD = lx.positive_semidefinite_tag


@dataclasses.dataclass(frozen=True)
class Case:
    """What an evaluation starts from: a plan that ends with the outputs, its head or None for B = I, `environment` with the
    values of all that depends on no data, and the batch's `arrays` (r, ...) in graph order, in chunks of `batch_size`."""

    plan: Plan
    head: Head | None
    environment: dict[int, Array]
    arrays: Sequence[Array]
    examples: int
    batch_size: int | None

    def jacobian(self, arrays: Sequence[Array], count: int) -> Jacobian:
        """Of `count` examples, with a leading axis of them."""
        size = self.examples if self.batch_size is None else min(self.batch_size, self.examples)
        found = jax.vmap(
            lambda example: _as_dict(output_jacobian(self.plan, self.head, self.environment, example, size)), axis_size=count
        )(list(arrays))
        return Jacobian(**found)

    def members(self, root: int) -> list[int]:
        """The leaves that depend on a parameter."""
        return [n for n, leaf in enumerate(self.plan.leaves) if root in leaf.roots]

    def width(self, leaves: Sequence[int]) -> int:
        """The entries of all y of the leaves, places included."""
        avals, total = self.plan.graph.avals, 0
        for leaf in (self.plan.leaves[n] for n in leaves):
            places = jax.ShapeDtypeStruct(leaf.places, jnp.float32).size
            total += places * avals[leaf.output].size if leaf.structured else avals[leaf.variable].size
        return total


def blocks_of(case: Case) -> list[CurvatureOperator]:
    """The block of each parameter."""
    members = {root: case.members(root) for root in case.plan.parameters}
    narrow = {root for root, leaves in members.items() if 0 < case.width(leaves) <= outputs_of(case.plan)}
    wide = {n for root, leaves in members.items() if root not in narrow for n in leaves}
    read = {n for leaves in members.values() for n in leaves}

    def chunk(arrays: list[Array], count: int) -> dict[str, Any]:
        J = case.jacobian(arrays, count)
        return {
            "rows": {n: V for n, V in J.rows.items() if n in wide},
            "inputs": {n: z for n, z in J.inputs.items() if n in read},
            "curvature": J.curvature if wide else None,
            "narrow": {root: _pull_back(J, members[root], count) for root in narrow},
        }

    kept = chunked(chunk, case.arrays, case.examples, case.batch_size)
    J = Jacobian(kept["rows"], kept["inputs"], kept["curvature"])
    return [
        _narrow_block(case, J.inputs, kept["narrow"][root], root) if root in narrow else _wide_block(case, J, root)
        for root in case.plan.parameters
    ]


def jacobians_of(case: Case) -> tuple[list[OutputJacobian], Array | None]:
    """The Jacobian with respect to each parameter, and B."""
    read = sorted({n for root in case.plan.parameters for n in case.members(root)})
    narrow = 0 < case.width(read) <= outputs_of(case.plan)

    def chunk(arrays: list[Array], count: int) -> dict[str, Any]:
        J = case.jacobian(arrays, count)
        if narrow:
            return {"rows": {}, "inputs": J.inputs, "curvature": _pull_back(J, read, count)}
        return _as_dict(J)

    J = Jacobian(**chunked(chunk, case.arrays, case.examples, case.batch_size))
    if narrow:
        J = dataclasses.replace(J, rows=_selectors(case, read, case.examples))
    outputs = case.width(read) if narrow else outputs_of(case.plan)
    return [_of_parameter(case, J, root, case.examples, outputs) for root in case.plan.parameters], J.curvature


def diagonals_of(case: Case) -> list[Array]:
    """The diagonal for each parameter, holding no more than a chunk of examples."""

    def chunk(arrays: list[Array], count: int) -> list[Array]:
        J = case.jacobian(arrays, count)
        found = [_of_parameter(case, J, root, count, outputs_of(case.plan)) for root in case.plan.parameters]
        return [A.diagonal(J.curvature) for A in found]

    return [d / case.examples for d in chunked(chunk, case.arrays, case.examples, case.batch_size, summed=True)]


def product_of(case: Case, vectors: Sequence[Array]) -> list[Array]:
    """G times `vectors`, one for each parameter, by one pass forward and one backward through each chunk of examples."""
    plan, head, environment = case.plan, case.head, case.environment
    assert head is not None
    moving = [f for f in plan.frontier if f in plan.live]
    data = plan.graph.inputs[len(plan.parameters) :]

    def weights(values: list[Array]) -> list[Array]:
        local = {**plan.graph.constants, **dict(zip(plan.parameters, values, strict=True))}
        evaluate(plan.before, local)
        return [local[f] for f in moving]

    point = [environment[root] for root in plan.parameters]
    values, push, pull = _both_ways(weights, point, plan.before)
    tangents = push(list(vectors))

    def chunk(arrays: list[Array], count: int) -> list[Array]:
        def outputs(values: list[Array]) -> list[Array]:
            def one(example: list[Array]) -> list[Array]:
                local = {**plan.graph.constants, **environment, **dict(zip(moving, values, strict=True))}
                local |= dict(zip(data, example, strict=True))
                evaluate(plan.during, local)
                return [local[o] for o in plan.outputs]

            return jax.vmap(one, axis_size=count)(arrays)

        def curve(example: list[Array], outputs: list[Array], tangents: list[Array]) -> list[Array]:
            def error(outputs: list[Array]) -> tuple[Array, Array]:
                local = {**plan.graph.constants, **environment, **dict(zip(data, example, strict=True))}
                local |= dict(zip(plan.outputs, outputs, strict=True))
                evaluate([op for op in head.operations if not local.keys() >= set(op.outputs)], local)
                return local[plan.graph.output], local[plan.graph.output]

            (_, value), (products, _) = jax.jvp(jax.grad(error, has_aux=True), (outputs,), (tangents,))
            return [p + jnp.where(jnp.isnan(value), jnp.nan, 0).astype(p.dtype) for p in products]

        found, push, pull = _both_ways(outputs, values, plan.during)
        return pull(jax.vmap(curve, axis_size=count)(arrays, found, push(tangents)))

    total = chunked(chunk, case.arrays, case.examples, case.batch_size, summed=True)
    return [product / case.examples for product in pull(total)]


def _both_ways(function: Any, point: list[Array], operations: Sequence[Operation]) -> tuple[Any, Any, Any]:
    """The value, the tangent map and its transpose; a `custom_vjp` function has no tangent map but that transpose's own."""
    if any(operation.name.startswith("custom_vjp") for operation, _ in nested(operations)):
        values, vjp = jax.vjp(function, point)
        transposed = jax.linear_transpose(lambda cotangents: vjp(cotangents)[0], values)
        return values, lambda tangents: transposed(tangents)[0], lambda cotangents: vjp(cotangents)[0]
    values, push = jax.linearize(function, point)
    transposed = jax.linear_transpose(push, point)
    return values, push, lambda cotangents: transposed(cotangents)[0]


def _as_dict(J: Jacobian) -> dict[str, Any]:
    return {"rows": J.rows, "inputs": J.inputs, "curvature": J.curvature}


def _pull_back(J: Jacobian, leaves: Sequence[int], count: int) -> Array:
    """`Q_i` (r, m, m) over the y of several leaves."""
    rows = [J.rows[n].reshape(*J.rows[n].shape[:2], -1) for n in leaves]
    return pulled_back(jnp.concatenate(rows, axis=2), J.curvature)


def _selectors(case: Case, leaves: Sequence[int], examples: int) -> dict[int, Array]:
    """The identity (m, m) over the y of several leaves, cut into V_j (r, m, y) and the same for all examples."""
    width = case.width(leaves)
    eye = jnp.broadcast_to(jnp.eye(width), (examples, width, width))
    rows, start = {}, 0
    for n in leaves:
        size = case.width([n])
        rows[n], start = eye[:, :, start : start + size], start + size
    return rows


def _narrow_block(case: Case, inputs: dict[int, Array], Q: Array, root: int) -> CurvatureOperator:
    leaves = case.members(root)
    aval = case.plan.graph.avals[root]
    structured = any(case.plan.leaves[n].structured for n in leaves)
    if not structured:  # then examples differ in Q only
        Q = jnp.mean(Q, axis=0, keepdims=True)
    rows = {n: V.astype(Q.dtype) for n, V in _selectors(case, leaves, Q.shape[0]).items()}
    A = _of_parameter(case, Jacobian(rows, inputs, Q), root, Q.shape[0], Q.shape[1])
    block = GaussNewtonBlock(A, Q)
    if A.plain and not structured:
        return Dense(block.as_matrix(), aval.shape, _PSD)
    single = A.uses[0].labels
    if A.plain and not set(single.output) & set(single.input or ()):
        return kronecker_sum(A.uses[0], Q, aval.shape, jnp.ones(()), _PSD)
    return block


def _wide_block(case: Case, J: Jacobian, root: int) -> CurvatureOperator:
    if not case.members(root):
        aval = case.plan.graph.avals[root]
        return Diagonal(jnp.zeros(aval.shape, aval.dtype), _PSD)
    return GaussNewtonBlock(_of_parameter(case, J, root, case.examples, outputs_of(case.plan)), J.curvature)


def _of_parameter(case: Case, J: Jacobian, root: int, examples: int, outputs: int) -> OutputJacobian:
    """A for one parameter, from V and z by leaves."""
    plan, aval = case.plan, case.plan.graph.avals[root]
    leaves = case.members(root)
    known = {n: view for n in leaves if (view := view_of(plan, n, root)) is not None}
    direct = len(known) == len(leaves)
    variables = [root] if direct else list(dict.fromkeys(plan.leaves[n].variable for n in leaves))
    one = jnp.ones((), aval.dtype)
    uses = []
    for n, labels in number_uses(plan, known if direct else own_views(plan, leaves)).items():
        scale = scale_of(known[n], case.environment) if direct else None
        uses.append(
            JacobianUse(
                J.rows[n].reshape(examples, outputs, *labels.output_sizes).astype(aval.dtype),
                J.inputs[n].reshape(examples, *labels.input_sizes).astype(aval.dtype) if n in J.inputs else None,
                one if scale is None else scale * one,
                labels,
                0 if direct else variables.index(plan.leaves[n].variable),
            )
        )
    sizes = tuple(plan.graph.avals[v].shape for v in variables)
    through = None if direct else _through(case, root, variables)
    return OutputJacobian(tuple(uses), through, aval.shape, aval.dtype, examples, outputs, sizes)


def _through(case: Case, root: int, variables: Sequence[int]) -> Through:
    plan, environment = case.plan, case.environment
    operations = tuple(leading_to(plan.before, variables))
    read = {i for operation in operations for i in operation.inputs}
    others = {i: environment[i] for i in {*plan.parameters, *read.intersection(plan.graph.constants)} - {root}}
    reverse_only = any(operation.name.startswith("custom_vjp") for operation, _ in nested(operations))
    return Through(environment[root], others, weights_of(operations, root, tuple(variables)), reverse_only)
