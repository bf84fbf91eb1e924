"""Softmax cross entropy `E = -sum_i t_i log p_i`, `p = softmax(z)`, with closed-form derivatives free of cancellation.

    dE/dz = p sum(t) - t             d2E/dz2 = sum(t) (diag(p) - p p^T)

With logits far apart one probability p_k rounds to 1, and everything that contains `1 - p_k` would round to 0 although
the other probabilities are known to full accuracy. At most one p_k exceeds 1/2, so:

* `1 - p_k` is the sum of the others, and `p_i sum(t) - t_i = p_i sum_{j != i} t_j - t_i sum_{j != i} p_j`;
* `(diag(p) - p p^T) v` is unchanged by adding a constant to v: with v_k = 0, p_k multiplies nothing.

Logits `z` and target probabilities `t` are floating-point vectors (M,) of one dtype.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhess._typing import Array


def _argmax_mask(x: Array) -> Array:
    return jax.lax.iota(jnp.int32, x.size) == jnp.argmax(x).astype(jnp.int32)


def _sum_of_others(x: Array) -> Array:
    """`sum_{j != i} x_j` for each i, x nonnegative: only the largest one would cancel in `sum(x) - x_i`."""
    largest = _argmax_mask(x)
    others = jnp.sum(jnp.where(largest, 0, x))
    return jnp.where(largest, others, jnp.sum(x) - x)


def _softmax(z: Array) -> Array:
    u = jnp.exp(z - jax.lax.stop_gradient(jnp.max(z)))
    return u / jnp.sum(u)


def _hessian_product(z: Array, v: Array) -> Array:
    """`(diag(p) - p p^T) v`. With `p_k > 1/2`, v is shifted by v_k first: then no sum contains the dominant p_k."""
    p = _softmax(z)
    dominant = _argmax_mask(p) & (p > 0.5)
    v = v - jnp.sum(jnp.where(dominant, v, 0))
    return p * (v - jnp.sum(p * v))


def _excess(z: Array) -> Array:
    """`log(sum_j exp(z_j)) - z_i` for each i, accurate when it is close to 0."""
    shifted = z - jnp.max(z)
    return jnp.log1p(jnp.sum(jnp.where(_argmax_mask(z), 0, jnp.exp(shifted)))) - shifted


@jax.custom_jvp
def gradient(z: Array, t: Array) -> Array:
    """dE/dz (M,)."""
    p = _softmax(z)
    return p * _sum_of_others(t) - t * _sum_of_others(p)


@functools.partial(gradient.defjvp, symbolic_zeros=True)
def _gradient_jvp(primals, tangents):
    (z, t), (z_dot, t_dot) = primals, tangents
    terms = []
    if not isinstance(z_dot, SymbolicZero):
        terms.append(jnp.sum(t) * _hessian_product(z, z_dot))
    if not isinstance(t_dot, SymbolicZero):
        terms.append(_softmax(z) * jnp.sum(t_dot) - t_dot)
    return gradient(z, t), sum(terms[1:], terms[0])


@jax.custom_jvp
def value(z: Array, t: Array) -> Array:
    """The scalar E; a class with t_i = 0 may have the logit -inf."""
    return jnp.sum(jnp.where(t == 0, 0, t * _excess(z)))


@functools.partial(value.defjvp, symbolic_zeros=True)
def _value_jvp(primals, tangents):
    (z, t), (z_dot, t_dot) = primals, tangents
    terms = []
    if not isinstance(z_dot, SymbolicZero):
        terms.append(jnp.sum(gradient(z, t) * z_dot))
    if not isinstance(t_dot, SymbolicZero):
        terms.append(jnp.sum(_excess(z) * t_dot))
    return value(z, t), sum(terms[1:], terms[0])


def hessian(z: Array, t: Array) -> Array:
    """d2E/dz2 (M, M)."""
    p = _softmax(z)
    off_diagonal = -p[:, None] * p[None, :]
    diagonal = jnp.broadcast_to((p * _sum_of_others(p))[:, None], off_diagonal.shape)
    return jnp.sum(t) * jnp.where(jnp.eye(p.size, dtype=bool), diagonal, off_diagonal)
