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
from jaxhess._typing import Array, InputError
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.functions import wide
from jaxhess.operators.gauss_newton import GaussNewtonBlock
from jaxhess.operators.layout import Layout
from jaxhess.operators.nearest import nearest_kronecker
from jaxhess.operators.paths import naming
from jaxhess.operators.preconditioner import KroneckerPreconditioner, kronecker_preconditioner

__all__ = ["factors_of", "layout_of", "preconditioners_of"]

_ROUNDS = 3


def layout_of(shape: tuple[int, ...]) -> Layout:
    """How a parameter of this shape is read as (m, n)."""
    axes = tuple(range(len(shape)))
    return Layout(shape, shape, axes[-1:], axes[:-1]) if len(shape) > 2 else Layout(shape, shape, axes[:1], axes[1:])


def factors_of(block: Any) -> tuple[Array, Array]:
    """A (m, m) and B (n, n) of the product nearest to a block, in the layout of `layout_of`.

    Raises `InputError` where the block is a sum of Kronecker products along other axes.
    """
    block = wide(block)
    layout = layout_of(block.in_structure().shape)
    if layout.n == 1:
        return symmetrise(block.as_matrix()), jnp.ones((1, 1), block.in_structure().dtype)
    if isinstance(block, GaussNewtonBlock) and block.jacobian.matrix_sizes is not None:
        own = jax.eval_shape(block.kronecker_terms).layout
        if block.curvature is None or block.curvature.ndim == 2:
            return _in_layout(*_nearest_of_rows(block), own, layout)
    found = nearest_kronecker(block) if len(layout.shape) <= 2 else nearest_kronecker(block, layout)
    return _in_layout(found.operator.A, found.operator.B, found.operator.layout, layout)


def preconditioners_of(blocks: BlockDiagonal) -> list[KroneckerPreconditioner]:
    """`(A ⊗ B + λ)^-1` for each parameter, for a λ yet to be given."""
    inverses = []
    for path, block in blocks.items():
        with naming(path):
            A, B = factors_of(block)
            inverses.append(kronecker_preconditioner(A, B, layout=layout_of(block.in_structure().shape)))
    return inverses


def _in_layout(A: Array, B: Array, own: Layout, layout: Layout) -> tuple[Array, Array]:
    if _same_order(own, layout):
        return A, B
    if _same_order(Layout(own.shape, own.sizes, own.columns, own.rows), layout):
        return B, A
    raise InputError(
        f"the layer reads its {layout.shape} parameter as rows {own.rows} and columns {own.columns} of {own.sizes}, which "
        "has no Kronecker factors along the parameter's own axes"
    )


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


def _unit(X: Array) -> Array:
    size = jnp.linalg.norm(X)
    return X / jnp.where(size > 0, size, 1)
