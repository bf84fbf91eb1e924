"""The Kronecker product nearest to each block of a tree, in the parameters' own axes.

    H_w ≈ A ⊗ B,        w read as (m, n): a vector is all rows, of more than two axes the last one is the rows

For `(1/r) sum_ic b_ic kron(v_ic v_ic^T, z_i z_i^T)`, rows v of a Jacobian, by alternating least squares,

    A = sum_ic b_ic (z_i^T B z_i) v_ic v_ic^T / (r ||B||^2)        B = sum_ic b_ic (v_ic^T A v_ic) z_i z_i^T / (r ||A||^2)

two matrix products each, from the B of an earlier block where there is one: over a run the rounds go on from block to block.
For other blocks by `nearest_kronecker`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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

__all__ = ["Nearest", "bias_side", "factors_of", "layout_of"]

_MOST_NUMBERS = 2**27  # of the gradients of outputs


def layout_of(shape: tuple[int, ...]) -> Layout:
    """How a parameter of this shape is read as (m, n)."""
    axes = tuple(range(len(shape)))
    return Layout(shape, shape, axes[-1:], axes[:-1]) if len(shape) > 2 else Layout(shape, shape, axes[:1], axes[1:])


class Nearest(NamedTuple):
    """A (m, m) and B (n, n) of the product nearest to a block, and `exact`: of U (m, k) and V (n, l) the diagonal
    `(u_k ⊗ v_l)^T H (u_k ⊗ v_l)` (k, l) of H itself, or None where that costs more than the factors do."""

    A: Array
    B: Array
    exact: Callable[[Array, Array], Array] | None = None

    def swapped(self) -> "Nearest":
        """Of the transposed parameter."""
        exact = self.exact
        return Nearest(self.B, self.A, None if exact is None else lambda U, V: exact(V, U).T)


def factors_of(block: Any, with_bias: bool = False, known: tuple[Array, Array] | None = None) -> Nearest:
    """The factors in the layout of `layout_of`; `with_bias` of [W b] in the layer's own one, of `bias_side`. `known` are the
    factors of a block that is near, of these sides or larger, zeros for none."""
    block = wide(block)
    layout = layout_of(block.in_structure().shape)
    if layout.n == 1 and not with_bias:
        return Nearest(symmetrise(block.as_matrix()), jnp.ones((1, 1), block.in_structure().dtype))
    own = _own_layout(block) or layout
    along_axes = _own_layout(block) is not None and _side(own, layout) is not None
    if along_axes and _has_simple_rows(block):
        side = _side(own, layout)
        found = _nearest_of_rows(block, with_bias, None if known is None else known[side or 0])
        return found if side == 1 else found.swapped()
    if isinstance(block, GaussNewtonBlock) and not with_bias and _has_few_gradients(block):
        return _nearest_of_gradients(block, layout, None if known is None else known[1])
    if with_bias:
        assert isinstance(block, KroneckerProductSum)
        Z = jnp.concatenate([block.Z, jnp.ones((len(block.Z), 1), block.Z.dtype)], axis=1)
        joint = KroneckerProductSum(block.Q, Z, tags=block.tags)
        operator = nearest_kronecker(joint).operator
        found = Nearest(operator.A, operator.B, _diagonal_of_terms(joint))
        return found if _side(own, layout) == 1 else found.swapped()
    operator = nearest_kronecker(block, None if along_axes else layout).operator
    exact = _diagonal_of_terms(block) if isinstance(block, KroneckerProductSum) and along_axes else None
    found = Nearest(operator.A, operator.B, exact)
    return found if _same_order(operator.layout, layout) else found.swapped()


def bias_side(block: Any) -> int | None:
    """Where a bias joins a weight that is read by `layout_of`: 1, as a further column; 0, as a further row, of a weight
    stored (in, out); None where the two have no common factors."""
    block = wide(block)
    if not (isinstance(block, KroneckerProductSum) or _has_simple_rows(block)):
        return None
    own = _own_layout(block)
    return None if own is None else _side(own, layout_of(block.in_structure().shape))


def _own_layout(block: Any) -> Layout | None:
    """How the layer itself reads its parameter, where it is one matrix that meets one vector of each example."""
    if isinstance(block, GaussNewtonBlock):
        return None if block.jacobian.matrix_sizes is None else jax.eval_shape(block.kronecker_terms).layout
    return getattr(block, "layout", None)


def _has_simple_rows(block: Any) -> bool:
    return isinstance(block, GaussNewtonBlock) and (block.curvature is None or block.curvature.ndim == 2)


def _has_few_gradients(block: GaussNewtonBlock) -> bool:
    J = block.jacobian
    return _has_simple_rows(block) and J.examples * J.outputs * block.in_size() <= _MOST_NUMBERS


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


def _nearest_of_rows(block: GaussNewtonBlock, with_bias: bool, known: Array | None) -> Nearest:
    """In the layer's own layout, without the matrices Q of the examples."""
    J = block.jacobian
    use = J.uses[0]
    r, M = J.examples, J.outputs
    assert use.inputs is not None
    V, Z = use.scale * use.rows.reshape(r, M, -1), use.inputs.reshape(r, -1)
    if with_bias:
        Z = jnp.concatenate([Z, jnp.ones((r, 1), Z.dtype)], axis=1)
    weights = jnp.ones((r, M), V.dtype) if block.curvature is None else block.curvature
    weights = block.factor * weights / r

    def left(B: Array) -> Array:
        lengths = jnp.sum(matmul(Z, B) * Z, axis=1)
        weighted = (weights * lengths[:, None])[:, :, None] * V
        return symmetrise(matmul(weighted.reshape(r * M, -1).T, V.reshape(r * M, -1)))

    def right(A: Array) -> Array:
        lengths = jnp.sum(weights * jnp.sum(matmul(V, A) * V, axis=2), axis=1)
        return symmetrise(matmul((lengths[:, None] * Z).T, Z))

    def exact(U: Array, W: Array) -> Array:
        along = jnp.sum(weights[:, :, None] * matmul(V, U) ** 2, axis=1)
        return matmul(along.T, matmul(Z, W) ** 2)

    return Nearest(*_alternated(left, right, lambda: matmul(Z.T, Z), known), exact)


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
    return Nearest(*_alternated(left, right, lambda: jnp.eye(layout.n, dtype=G.dtype), known), exact)


def _alternated(
    left: Callable[[Array], Array], right: Callable[[Array], Array], first: Callable[[], Array], known: Array | None
) -> tuple[Array, Array]:
    """A and B by alternating least squares: half a round from the `known` B, more from the `first` one."""

    def begun() -> Array:
        return right(_unit(left(_unit(first()))))

    if known is None:
        B = begun()
    else:
        size = jax.eval_shape(begun).shape[0]
        known = known[:size, :size]
        B = jax.lax.cond(jnp.any(known != 0), lambda: known, begun)
    A = _unit(left(_unit(B)))
    return A, right(A)


def _unit(X: Array) -> Array:
    size = jnp.linalg.norm(X)
    return X / jnp.where(size > 0, size, 1)
