"""Learning rate and momentum from the quadratic model itself.

For a direction d and the last step v, the minimum of m(s) = g^T s + s^T (C + λ) s / 2 over s = α d + μ v:

    [d^T C d   d^T C v] [α]      [d^T g]
    [d^T C v   v^T C v] [μ]  = - [v^T g]           C + λ in the place of C

(Martens and Grosse 2015, section 7). Where v is zero, or along d, α alone is chosen.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.operators.vectors import dot, plus, times

__all__ = ["Combination", "best_combination", "best_length"]


class Combination(NamedTuple):
    """`step` = `learning_rate` d + `momentum` v, and C times it."""

    step: PyTree
    product: PyTree
    learning_rate: Array
    momentum: Array


def best_length(
    gradient: PyTree, direction: PyTree, product: PyTree, damping: Array, previous: PyTree | None, momentum: Array
) -> Combination:
    """α d, with the α that minimises the model, plus a given μ v; `product` is C d. The product is of α d alone."""
    curved = dot(direction, product) + damping * dot(direction, direction)
    length = jnp.where(curved > 0, -dot(gradient, direction) / jnp.where(curved > 0, curved, 1), 1)
    step = times(length, direction)
    if previous is not None:
        step = plus(step, momentum, previous)
    return Combination(step, times(length, product), length, momentum)


def best_combination(
    gradient: PyTree, direction: PyTree, product: PyTree, previous: PyTree, previous_product: PyTree, damping: Array
) -> Combination:
    """α d + μ v with the α and μ that minimise the model; `product` is C d and `previous_product` C v."""
    a = dot(direction, product) + damping * dot(direction, direction)
    b = dot(direction, previous_product) + damping * dot(direction, previous)
    c = dot(previous, previous_product) + damping * dot(previous, previous)
    p, q = -dot(gradient, direction), -dot(gradient, previous)
    # Up to rounding, d and v lie apart where the determinant is a part of what it is made of.
    determinant = a * c - b * b
    apart = (a > 0) & (c > 0) & (determinant > 1e3 * jnp.finfo(a.dtype).eps * a * c)
    safe = jnp.where(apart, determinant, 1)
    alone = jnp.where(a > 0, p / jnp.where(a > 0, a, 1), 1)
    length = jnp.where(apart, (c * p - b * q) / safe, alone)
    momentum = jnp.where(apart, (a * q - b * p) / safe, 0)
    return Combination(
        plus(times(length, direction), momentum, previous),
        plus(times(length, product), momentum, previous_product),
        length,
        momentum,
    )
