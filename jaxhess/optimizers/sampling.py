"""The Gauss-Newton matrix from one random direction of each example's outputs: what Kronecker factors are made of.

    G = E[(1/r) sum_i (J_i^T S_i ε)(J_i^T S_i ε)^T],      B_i = S_i S_i^T,  ε = ±1 in each component

(Martens and Grosse 2015, with signs in the place of sampled targets: the mean is the same for every convex loss). It costs a
gradient, whatever the number of outputs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhess._linalg import add_diagonal
from jaxhess._typing import Array, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.transforms import fisher, gauss_newton

__all__ = ["sampled_curvature"]

_FEW = 24


def sampled_curvature(
    model: Callable[..., Any], loss: Callable[..., Array], params: PyTree, xs: PyTree, *targets: PyTree, key: Array
) -> BlockDiagonal:
    """Blocks whose expectation over `key` are those of `jaxhess.gauss_newton(model, loss)(params, xs, *targets)`."""
    outputs = jax.vmap(model, (None, 0))(params, xs)
    flat = jax.vmap(lambda output: ravel_pytree(output)[0])(outputs)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], outputs))[1]
    signs = jax.random.rademacher(key, flat.shape, flat.dtype)

    def slope(output: Array, *target: PyTree) -> Array:
        return jax.grad(lambda flat: loss(unravel(flat), *target))(output)

    known = jax.eval_shape(gauss_newton(model, loss, blocks="full"), params, xs, *targets).curvature
    if known is not None and known.ndim == 3:
        directions = _times_root(jax.vmap(jax.jacfwd(slope))(flat, *targets), signs)
    else:  # B is diagonal: its product with ones
        _, diagonal = jax.jvp(lambda flat: jax.vmap(slope)(flat, *targets), (flat,), (jnp.ones_like(flat),))
        directions = jnp.sqrt(jnp.maximum(diagonal, 0)) * signs

    def along(params: PyTree, x: PyTree, direction: Array) -> Array:
        return jnp.vdot(direction, ravel_pytree(model(params, x))[0])

    return fisher(along)(params, xs, directions)


def _times_root(B: Array, signs: Array) -> Array:
    """L ε for Cholesky factors of semidefinite B_i = L L^T (r, M, M), softmax's singular ones too.

    Many outputs by LAPACK, of B_i plus a few units of its rounding; where one of them is no semidefinite matrix even so, and
    for few outputs, column by column.
    """
    size = signs.shape[1]
    largest = jnp.max(jnp.diagonal(B, axis1=1, axis2=2), axis=1)
    floor = size * jnp.finfo(B.dtype).eps * largest
    if size <= _FEW:
        return _eliminated(B, signs, floor)
    some = ~(largest <= 0)  # what is not a number included
    factors = jnp.linalg.cholesky(add_diagonal(B, jnp.where(some, 4 * floor, 1)[:, None] * jnp.ones_like(signs)))
    results = jnp.where(some[:, None], jnp.sum(factors * signs[:, None, :], axis=2), 0)
    return jax.lax.cond(jnp.all(jnp.isfinite(results)), lambda: results, lambda: _eliminated(B, signs, floor))


def _eliminated(B: Array, signs: Array, floor: Array) -> Array:
    """L ε, where a pivot that is zero up to rounding, `floor` (r,), has a column of zeros."""

    def eliminated(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, total = carry
        column = jax.lax.dynamic_index_in_dim(left, j, axis=2, keepdims=False)
        pivot = jax.lax.dynamic_index_in_dim(column, j, axis=1, keepdims=False)
        good = pivot > floor
        column = column * jnp.where(good, jax.lax.rsqrt(jnp.where(good, pivot, 1)), 0)[:, None]
        sign = jax.lax.dynamic_index_in_dim(signs, j, axis=1)
        return left - column[:, :, None] * column[:, None, :], total + sign * column

    return jax.lax.fori_loop(0, B.shape[1], eliminated, (B, jnp.zeros_like(signs)))[1]
