"""The quadratic model's minimum, nearly: conjugate gradients beside the last step.

    x ≈ -(C + λ)^-1 g,     x in span{v} + {P r, P A P r, ..},     A = C + λ,  r = -g - μ A v,  μ = -v^T g / v^T A v

The last step v is in the space from the start, with whatever factor is best, and every direction after it is conjugate to
it: a warm start that costs nothing where v is of no use. One iteration has the plane of a direction and momentum (Martens
and Grosse 2015, section 7); those after it add what the preconditioner P misses. They stop at the first one that lowers the
model by less than a share of what all have (Martens 2010, section 4.4): a better answer to the model is no better step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.operators.vectors import dot, like, norm, plus, times, where
from jaxhess.optimizers.quadratic import Combination, Quadratic

__all__ = ["Minimum", "minimise"]


class Minimum(NamedTuple):
    """The step with the first iteration's length and v's factor at the start; the number of iterations; ||r|| / ||g||."""

    combination: Combination
    iterations: Array
    residual: Array


class _Iterate(NamedTuple):
    step: PyTree
    residual: PyTree
    direction: PyTree
    slope: Array  # r^T P r
    gain: Array
    last: Array
    first_length: Array
    done: Array
    convex: Array


def minimise(
    model: Quadratic,
    precondition: Callable[[PyTree], PyTree],
    previous: PyTree,
    damping: Array,
    most: int,
    progress: Any,
) -> Minimum:
    """At most `most` iterations, until one gains less than `progress` of all. A direction without positive curvature ends
    them; the first one is then taken as it is."""
    gradient = model.gradient

    def multiply(vector: PyTree) -> PyTree:
        return plus(model.multiply(vector), damping, vector)

    least = jnp.maximum(jnp.asarray(progress, damping.dtype), jnp.finfo(damping.dtype).eps)
    right, product = times(-1, gradient), multiply(previous)
    curved = dot(previous, product)
    useful = (curved > 0) & jnp.isfinite(curved)
    safe = jnp.where(useful, curved, 1)
    momentum = jnp.where(useful, dot(previous, right) / safe, 0)
    conjugate = where(useful, previous, jax.tree.map(jnp.zeros_like, previous))

    def freed(direction: PyTree, base: PyTree) -> PyTree:
        """`base`, conjugate to v."""
        return plus(base, -jnp.where(useful, dot(product, direction) / safe, 0), conjugate)

    step = times(momentum, conjugate)
    residual = where(useful, plus(right, -momentum, product), right)
    direction = precondition(residual)
    slope = dot(residual, direction)
    zero = jnp.zeros_like(slope)
    start = _Iterate(
        step, residual, freed(direction, direction), slope, momentum * dot(previous, right) / 2, zero, zero,
        jnp.zeros((), jnp.int32), jnp.ones((), bool),
    )  # fmt: skip

    def unfinished(at: _Iterate) -> Array:
        worthwhile = (at.done < 1) | (at.last > least * at.gain)
        return (at.done < most) & worthwhile & at.convex & ~(at.slope <= 0)

    def advance(at: _Iterate) -> _Iterate:
        image = multiply(at.direction)
        curved = dot(at.direction, image)
        convex = ~(curved <= 0)  # what is not a number goes on to the step, which is refused then
        # Not r^T P r, which is the same but for rounding: so the model falls whatever the direction has become.
        along = dot(at.residual, at.direction)
        length = jnp.where(convex, along / jnp.where(convex, curved, 1), jnp.where(at.done == 0, 1, 0))
        residual = plus(at.residual, -length, image)
        direction = precondition(residual)
        slope = dot(residual, direction)
        last = length * along / 2
        following = plus(direction, slope / at.slope, at.direction)
        return _Iterate(
            plus(at.step, length, at.direction), residual, freed(direction, following), slope, at.gain + last, last,
            jnp.where(at.done == 0, length, at.first_length), at.done + 1, convex,
        )  # fmt: skip

    found = jax.lax.while_loop(unfinished, lambda at: like(at, advance(at)), start)
    # (C + λ) x = -g - r
    image = plus(plus(right, -1, found.residual), -damping, found.step)
    size = norm(gradient)
    left = norm(found.residual) / jnp.where(size > 0, size, 1)
    combination = Combination(found.step, dot(found.step, image), found.first_length, momentum)
    return Minimum(combination, found.done, left)
