"""The whole Hessian: its linearised product at once, its blocks and dense form when they are asked for."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._typing import Array, PyTree
from jaxhess.engine.assemble import block, structured_gradients
from jaxhess.engine.batch import BatchResult, sweep_batch
from jaxhess.engine.full import between, cross_block, is_layer, plain_parameters
from jaxhess.engine.parameters import own_curvature, shares_parameter
from jaxhess.operators.assembly import put_symmetric
from jaxhess.operators.base import CurvatureOperator, StructuredOperator
from jaxhess.operators.full import FullHessian, Readings
from jaxhess.operators.kronecker import KroneckerProductSum
from jaxhess.operators.layer import LayerBlock
from jaxhess.transforms.checks import Error, Shared, widened
from jaxhess.transforms.diagonals import wide_diagonal
from jaxhess.transforms.products import linearise
from jaxhess.transforms.traced import Traced, traced

__all__ = ["full_hessian"]

_CHUNK_BYTES = 2**24


def full_hessian(
    fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None
) -> tuple[Array, PyTree, FullHessian]:
    """The mean error, its gradient and its whole Hessian, for checked arguments."""
    linearised = linearise(fun, params, batch, examples)
    leaves, treedef = jax.tree.flatten(params)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    readings = _OfFunction(fun, examples, batch_size)
    hessian = FullHessian(linearised.linear, (params, batch), jax.tree.unflatten(treedef, shapes), readings)
    return linearised.value, linearised.gradient, hessian


@dataclasses.dataclass(frozen=True)
class _OfFunction(Readings):
    """The readings of a function's Hessian; a point is its parameters and batch."""

    fun: Error
    examples: int
    batch_size: int | None

    def matrix(self, point: Any, product: Any, factor: Array | np.ndarray) -> Array:
        return _matrix(self.fun, *point, self.examples, self.batch_size, product, factor)

    def diagonal(self, point: Any) -> PyTree:
        params, batch = point
        return wide_diagonal(self.fun, params, batch, self.examples, self.batch_size)

    def layer(self, point: Any, places: tuple[int, ...], structure: PyTree) -> StructuredOperator | None:
        if len(places) != 2:
            return None
        for weight, bias in (places, places[::-1]):
            terms = _of_layer(self.fun, *point, self.examples, self.batch_size, weight, bias).tree
            if terms is not None:
                Z = jnp.concatenate([terms.Z, jnp.ones((self.examples, 1), terms.Z.dtype)], axis=1)
                joint = KroneckerProductSum(terms.Q, Z)
                return LayerBlock.of(joint, terms.layout, structure, bias_first=bias == places[0])
        return None

    def block(self, point: Any, row: int, column: int) -> StructuredOperator | None:
        return _block(self.fun, *point, self.examples, self.batch_size, row, column).tree


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def _block(
    fun: Error,
    params: PyTree,
    batch: tuple[PyTree, ...],
    examples: int,
    batch_size: int | None,
    row: int,
    column: int,
) -> Shared:
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch)
        if row == column:
            root = given.plan.parameters[row]
            shared = shares_parameter(given.plan.leaves)
            mine = {n for n, leaf in enumerate(given.plan.leaves) if root in leaf.roots}
            result = _sweep(given, examples, batch_size, lambda j, k: shared(j, k) and {j, k} <= mine)
            return Shared(_diagonal_block(given, result, row))
        if not {row, column} <= plain_parameters(given.plan):
            return Shared(None)
        result = _sweep(given, examples, batch_size, between(given.plan, (row, column)))
        own = own_curvature(given.plan, result, given.environment, every_pair=True)
        return Shared(cross_block(given.plan, result, given.environment, own, row, column))


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def _of_layer(
    fun: Error,
    params: PyTree,
    batch: tuple[PyTree, ...],
    examples: int,
    batch_size: int | None,
    weight: int,
    bias: int,
) -> Shared:
    """The weight's block, where it and the bias are of one layer; None where they are not."""
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch)
        if not is_layer(given.plan, weight, bias):
            return Shared(None)
        shared, root = shares_parameter(given.plan.leaves), given.plan.parameters[weight]
        mine = {n for n, leaf in enumerate(given.plan.leaves) if root in leaf.roots}
        result = _sweep(given, examples, batch_size, lambda j, k: shared(j, k) and {j, k} <= mine)
        own = _diagonal_block(given, result, weight)
        return Shared(own if isinstance(own, KroneckerProductSum) else None)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _matrix(
    fun: Error,
    params: PyTree,
    batch: tuple[PyTree, ...],
    examples: int,
    batch_size: int | None,
    product: Any,
    factor: Array | np.ndarray,
) -> Array:
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch)
        plan, values = given.plan, [widened(value) for value in given.values]
        plain = sorted(plain_parameters(plan))
        applied = functools.partial(product, jax.tree.leaves((params, batch)))
        starts = [sum(value.size for value in values[:n]) for n in range(len(values) + 1)]
        matrix = jnp.zeros((starts[-1], starts[-1]), jnp.result_type(*values))
        if plain:
            result = _sweep(given, examples, batch_size, between(plan, plain))
            own = own_curvature(plan, result, given.environment, every_pair=True)
            for place, row in enumerate(plain):
                diagonal = _diagonal_block(given, result, row).scaled(factor)
                matrix = put_symmetric(matrix, diagonal, starts[row], starts[row])
                for column in plain[place + 1 :]:
                    cross = cross_block(plan, result, given.environment, own, row, column).scaled(factor)
                    matrix = put_symmetric(matrix, cross, starts[row], starts[column])
        for n in sorted(set(range(len(values))) - set(plain)):
            rows = _rows(applied, values, n).astype(matrix.dtype) * jnp.asarray(factor, matrix.dtype)
            matrix = jax.lax.dynamic_update_slice(matrix, rows, (starts[n], 0))
            matrix = jax.lax.dynamic_update_slice(matrix, rows.T, (0, starts[n]))
        return matrix


def _sweep(given: Traced, examples: int, batch_size: int | None, relevant: Any) -> BatchResult:
    return sweep_batch(given.plan, given.environment, given.arrays, examples, batch_size, relevant, second_order=True)


def _diagonal_block(given: Traced, result: BatchResult, number: int) -> CurvatureOperator:
    plan, environment = given.plan, given.environment
    own = own_curvature(plan, result, environment).get((number, number))
    gradients = structured_gradients(plan, result)
    return block(plan, result, environment, plan.parameters[number], own, gradients)


def _rows(product: Any, values: Sequence[Array], n: int) -> Array:
    """The rows of the matrix that belong to one parameter, by products with unit vectors."""
    size, total = values[n].size, sum(value.size for value in values)
    if size == 0:
        return jnp.zeros((0, total), values[n].dtype)

    def row(i: Array) -> Array:
        unit = jnp.zeros(size, values[n].dtype).at[i].set(1).reshape(values[n].shape)
        zeros = [jnp.zeros(value.shape, value.dtype) for value in values]
        results = product([*zeros[:n], unit, *zeros[n + 1 :]])
        return jnp.concatenate([part.reshape(-1) for part in results])

    chunk = max(1, min(size, _CHUNK_BYTES // (4 * max(total, 1))))
    return jax.lax.map(row, jnp.arange(size), batch_size=chunk)
