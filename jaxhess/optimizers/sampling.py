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

from jaxhess._typing import Array, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.transforms import fisher

__all__ = ["sampled_curvature"]


def sampled_curvature(
    model: Callable[..., Any], loss: Callable[..., Array], params: PyTree, xs: PyTree, *targets: PyTree, key: Array
) -> BlockDiagonal:
    """Blocks whose expectation over `key` are those of `jaxhess.gauss_newton(model, loss)(params, xs, *targets)`."""
    outputs = jax.vmap(model, (None, 0))(params, xs)

    def direction(output: PyTree, key: Array, *target: PyTree) -> Array:
        flat, unravel = ravel_pytree(output)
        curvature = jax.hessian(lambda flat: loss(unravel(flat), *target))(flat)
        values, vectors = jnp.linalg.eigh(curvature)
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return vectors @ (jnp.sqrt(jnp.maximum(values, 0)) * (vectors.T @ signs))

    examples = jax.tree.leaves(xs)[0].shape[0]
    directions = jax.vmap(direction)(outputs, jax.random.split(key, examples), *targets)

    def along(params: PyTree, x: PyTree, direction: Array) -> Array:
        return jnp.vdot(direction, ravel_pytree(model(params, x))[0])

    return fisher(along)(params, xs, directions)
