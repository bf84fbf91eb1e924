"""The Kronecker product nearest to each block of a tree, in the parameters' own axes.

    H_w ≈ A ⊗ B,        w read as (m, n): a vector is all rows, of more than two axes the last one is the rows

By alternating least squares where the curvature of the outputs is diagonal, from the B of an earlier block where there is
one: over a run the rounds go on from block to block. For other blocks by `nearest_kronecker`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array
from jaxhess.operators.functions import wide
from jaxhess.operators.gauss_newton import GaussNewtonBlock
from jaxhess.operators.kronecker import KroneckerProductSum
from jaxhess.operators.layout import Layout
from jaxhess.operators.nearest import nearest_kronecker
from jaxhess.optimizers.kronecker_places import MOST_NUMBERS, Nearest, alternated, has_rows, places_of

__all__ = ["bias_side", "factors_of", "layout_of"]


def layout_of(shape: tuple[int, ...]) -> Layout:
    """How a parameter of this shape is read as (m, n)."""
    axes = tuple(range(len(shape)))
    return Layout(shape, shape, axes[-1:], axes[:-1]) if len(shape) > 2 else Layout(shape, shape, axes[:1], axes[1:])


def factors_of(block: Any, with_bias: bool = False, known: tuple[Array, Array] | None = None) -> Nearest:
    """The factors in the layout of `layout_of`; `with_bias` of [W b] in the layer's own one, of `bias_side`. `known` are the
    factors of a block that is near, of these sides or larger, zeros for none. By the first of these ways that there is:

    a vector                                            the matrix itself
    one matrix, a diagonal curvature of the outputs     V and Z of each place (`Places`), if there is one, or few of them
    a diagonal curvature of the outputs                 the outputs' gradients, if they are no more than 2^27 numbers
    one matrix, Q (m, m) of each example                `nearest_kronecker` of these terms, with the bias as a column of z
    any other                                           `nearest_kronecker`
    """
    block = wide(block)
    layout = layout_of(block.in_structure().shape)
    if layout.n == 1 and not with_bias:
        return Nearest(symmetrise(block.as_matrix()), jnp.ones((1, 1), block.in_structure().dtype))
    if isinstance(block, GaussNewtonBlock) and has_rows(block):
        found = places_of(block)
        side = None if found is None else _side(found[1], layout)
        if found is not None and side is not None and (found[0].cheaper or not _has_few_gradients(block)):
            places = found[0].with_ones() if with_bias else found[0]
            nearest = places.nearest(None if known is None else known[side])
            return nearest if side == 1 else nearest.swapped()
        if not with_bias and _has_few_gradients(block):
            return _nearest_of_gradients(block, layout, None if known is None else known[1])
    own = _own_layout(block)
    side = None if own is None else _side(own, layout)
    if isinstance(block, KroneckerProductSum) and side is not None:
        Z = jnp.concatenate([block.Z, jnp.ones_like(block.Z[:, :1])], axis=1) if with_bias else block.Z
        terms = KroneckerProductSum(block.Q, Z, tags=block.tags)
        operator = nearest_kronecker(terms).operator
        nearest = Nearest(operator.A, operator.B, _diagonal_of_terms(terms))
        return nearest if side == 1 else nearest.swapped()
    operator = nearest_kronecker(block, layout if side is None else None).operator
    nearest = Nearest(operator.A, operator.B)
    return nearest if _same_order(operator.layout, layout) else nearest.swapped()


def bias_side(block: Any) -> int | None:
    """Where a bias joins a weight that is read by `layout_of`: 1, as a further column; 0, as a further row, of a weight
    stored (in, out); None where the two have no common factors."""
    block = wide(block)
    if not (isinstance(block, KroneckerProductSum) or (isinstance(block, GaussNewtonBlock) and has_rows(block))):
        return None
    own = _own_layout(block)
    return None if own is None else _side(own, layout_of(block.in_structure().shape))


def _own_layout(block: Any) -> Layout | None:
    """How the layer itself reads its parameter, where it is one matrix that meets one vector of each example."""
    if isinstance(block, GaussNewtonBlock):
        return None if block.jacobian.matrix_sizes is None else jax.eval_shape(block.kronecker_terms).layout
    return getattr(block, "layout", None)


def _has_few_gradients(block: GaussNewtonBlock) -> bool:
    return block.jacobian.examples * block.jacobian.outputs * block.in_size() <= MOST_NUMBERS


def _same_order(a: Layout, b: Layout) -> bool:
    """Whether two layouts read the same matrix."""
    entries = np.arange(a.m * a.n)

    def read(layout: Layout) -> Any:
        order = layout.rows + layout.columns
        return np.transpose(entries.reshape(layout.sizes), order).reshape(layout.m, layout.n)

    return (a.m, a.n) == (b.m, b.n) and bool(np.array_equal(read(a), read(b)))


def _side(own: Layout, layout: Layout) -> int | None:
    """1 where a layer's own layout reads the matrix of `layout`, 0 where it reads its transpose, else None."""
    swapped = Layout(own.shape, own.sizes, own.columns, own.rows)
    return 1 if _same_order(own, layout) else 0 if _same_order(swapped, layout) else None


def _diagonal_of_terms(terms: KroneckerProductSum) -> Callable[[Array, Array], Array]:
    def exact(U: Array, V: Array) -> Array:
        along = jnp.sum(matmul(terms.Q, U) * U[None], axis=1)
        return matmul(along.T, matmul(terms.Z, V) ** 2) / len(terms.Z)

    return exact


def _nearest_of_gradients(block: GaussNewtonBlock, layout: Layout, known: Array | None) -> Nearest:
    """A and B where a parameter meets several vectors of an example (along time, say): from the gradients G_ic (m, n) of the
    outputs themselves, `A = sum_ic b_ic G_ic B G_ic^T` and `B = sum_ic b_ic G_ic^T A G_ic`."""
    J = block.jacobian
    count = J.examples * J.outputs
    G = jax.vmap(layout.to_matrix)(J.dense().reshape(count, *J.shape))
    factor = block.factor / J.examples
    by_row, by_column = jnp.moveaxis(G, 1, 0), jnp.moveaxis(G, 2, 0)  # so that all products below are of two matrices

    def weighted(X: Array) -> Array:
        return X if block.curvature is None else block.curvature.reshape(1, -1, 1) * X

    def side(X: Array, other: Array) -> Array:
        """`sum_ic b_ic X_ic other X_ic^T`, of X (rows, examples, columns)."""
        product = weighted(matmul(X, other))
        return factor * symmetrise(matmul(X.reshape(len(X), -1), product.reshape(len(X), -1).T))

    def exact(U: Array, W: Array) -> Array:
        turned = matmul(U.T, by_row.reshape(layout.m, -1)).reshape(-1, count, layout.n)
        return factor * jnp.sum(weighted(matmul(turned, W) ** 2), axis=1)

    left, right = functools.partial(side, by_row), functools.partial(side, by_column)
    return Nearest(*alternated(left, right, lambda: jnp.eye(layout.n, dtype=G.dtype), known), exact)
