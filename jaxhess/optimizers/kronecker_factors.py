"""The Kronecker product nearest to each block of a tree, in the parameters' own axes.

    H_w ≈ A ⊗ B,        w read as (m, n): a vector is all rows, of more than two axes the last one is the rows

For `(1/r) sum_ic b_ic kron(v_ic v_ic^T, z_i z_i^T)`, rows v of a Jacobian, by alternating least squares,

    A = sum_ic b_ic (z_i^T B z_i) v_ic v_ic^T / (r ||B||^2)        B = sum_ic b_ic (v_ic^T A v_ic) z_i z_i^T / (r ||A||^2)

two matrix products each; for other blocks by `nearest_kronecker`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.functions import wide
from jaxhess.operators.gauss_newton import GaussNewtonBlock
from jaxhess.operators.layout import Layout
from jaxhess.operators.nearest import nearest_kronecker
from jaxhess.operators.paths import naming
from jaxhess.operators.preconditioner import KroneckerPreconditioner, kronecker_preconditioner

__all__ = ["factors_of", "layout_of", "preconditioners_of"]

_ROUNDS = 3
_MOST_NUMBERS = 2**27  # of the gradients of outputs


def layout_of(shape: tuple[int, ...]) -> Layout:
    """How a parameter of this shape is read as (m, n)."""
    axes = tuple(range(len(shape)))
    return Layout(shape, shape, axes[-1:], axes[:-1]) if len(shape) > 2 else Layout(shape, shape, axes[:1], axes[1:])


def factors_of(block: Any) -> tuple[Array, Array]:
    """A (m, m) and B (n, n) of the product nearest to a block, in the layout of `layout_of`."""
    block = wide(block)
    layout = layout_of(block.in_structure().shape)
    if layout.n == 1:
        return symmetrise(block.as_matrix()), jnp.ones((1, 1), block.in_structure().dtype)
    own = _own_layout(block) or layout
    swapped = Layout(own.shape, own.sizes, own.columns, own.rows)
    along_axes = _own_layout(block) is not None and (_same_order(own, layout) or _same_order(swapped, layout))
    simple = isinstance(block, GaussNewtonBlock) and (block.curvature is None or block.curvature.ndim == 2)
    if along_axes and simple:
        A, B = _nearest_of_rows(block)
        return (A, B) if _same_order(own, layout) else (B, A)
    if isinstance(block, GaussNewtonBlock) and _has_few_gradients(block):
        return _nearest_of_gradients(block, layout)
    found = nearest_kronecker(block, None if along_axes else layout).operator
    return (found.A, found.B) if _same_order(found.layout, layout) else (found.B, found.A)


def preconditioners_of(blocks: BlockDiagonal) -> list[KroneckerPreconditioner]:
    """`(A ⊗ B + λ)^-1` for each parameter, for a λ yet to be given."""
    inverses = []
    for path, block in blocks.items():
        with naming(path):
            A, B = factors_of(block)
            inverses.append(kronecker_preconditioner(A, B, layout=layout_of(block.in_structure().shape)))
    return inverses


def _own_layout(block: Any) -> Layout | None:
    """How the layer itself reads its parameter, where it is one matrix that meets one vector of each example."""
    if isinstance(block, GaussNewtonBlock):
        return None if block.jacobian.matrix_sizes is None else jax.eval_shape(block.kronecker_terms).layout
    return getattr(block, "layout", None)


def _has_few_gradients(block: GaussNewtonBlock) -> bool:
    J = block.jacobian
    simple = block.curvature is None or block.curvature.ndim == 2
    return simple and J.examples * J.outputs * block.in_size() <= _MOST_NUMBERS


def _same_order(a: Layout, b: Layout) -> bool:
    """Whether two layouts read the same matrix."""
    entries = np.arange(a.m * a.n)

    def read(layout: Layout) -> Any:
        order = layout.rows + layout.columns
        return np.transpose(entries.reshape(layout.sizes), order).reshape(layout.m, layout.n)

    return (a.m, a.n) == (b.m, b.n) and bool(np.array_equal(read(a), read(b)))


def _nearest_of_rows(block: GaussNewtonBlock) -> tuple[Array, Array]:
    """A and B without the matrices Q of the examples."""
    J = block.jacobian
    use = J.uses[0]
    r, M = J.examples, J.outputs
    assert use.inputs is not None
    V, Z = use.scale * use.rows.reshape(r, M, -1), use.inputs.reshape(r, -1)
    weights = jnp.ones((r, M), V.dtype) if block.curvature is None else block.curvature
    weights = block.factor * weights / r

    def left(B: Array) -> Array:
        lengths = jnp.sum(matmul(Z, B) * Z, axis=1)
        weighted = (weights * lengths[:, None])[:, :, None] * V
        return symmetrise(matmul(weighted.reshape(r * M, -1).T, V.reshape(r * M, -1)))

    def right(A: Array) -> Array:
        lengths = jnp.sum(weights * jnp.sum(matmul(V, A) * V, axis=2), axis=1)
        return symmetrise(matmul((lengths[:, None] * Z).T, Z))

    A = _unit(left(_unit(matmul(Z.T, Z))))
    for _ in range(_ROUNDS):
        A = _unit(left(_unit(right(A))))
    return A, right(A)


def _nearest_of_gradients(block: GaussNewtonBlock, layout: Layout) -> tuple[Array, Array]:
    """A and B where a parameter meets several vectors of an example (along time, say): from the gradients G_ic (m, n) of the
    outputs themselves, `A = sum_ic b_ic G_ic B G_ic^T` and `B = sum_ic b_ic G_ic^T A G_ic`."""
    J = block.jacobian
    count = J.examples * J.outputs
    G = jax.vmap(layout.to_matrix)(J.dense().reshape(count, *J.shape))
    weights = jnp.ones(count, G.dtype) if block.curvature is None else block.curvature.reshape(-1)
    weights = (block.factor / J.examples * weights)[:, None, None]
    by_row, by_column = (jnp.moveaxis(X, 1, 0).reshape(X.shape[1], -1) for X in (G, jnp.swapaxes(G, 1, 2)))

    def left(B: Array) -> Array:
        weighted = weights * matmul(G, B)
        return symmetrise(matmul(by_row, jnp.moveaxis(weighted, 1, 0).reshape(layout.m, -1).T))

    def right(A: Array) -> Array:
        weighted = weights * matmul(jnp.swapaxes(G, 1, 2), A)
        return symmetrise(matmul(by_column, jnp.moveaxis(weighted, 1, 0).reshape(layout.n, -1).T))

    A = _unit(left(jnp.eye(layout.n, dtype=G.dtype) / layout.n**0.5))
    for _ in range(_ROUNDS):
        A = _unit(left(_unit(right(A))))
    return A, right(A)


def _unit(X: Array) -> Array:
    size = jnp.linalg.norm(X)
    return X / jnp.where(size > 0, size, 1)
