"""The minimum of a quadratic within a ball, from the eigendecomposition of its matrix; it need not be definite.

    minimise g^T s + s^T H s / 2 over ||s|| <= Δ         s(λ) = -(H + λ)^-1 g,  λ >= max(0, -λ_min),  λ (||s|| - Δ) = 0

In the eigenvectors' coordinates c = U^T g, `||s(λ)||^2 = sum_e c_e^2 / (μ_e + λ)^2` falls with λ, so the λ of ||s|| = Δ is
found by bisection, to rounding. In the hard case, where c has no part along the eigenvectors of λ_min, what is missing to Δ
is taken along one of them (Moré and Sorensen 1983).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, Float

__all__ = ["InBall", "minimum_in_ball"]


class InBall(NamedTuple):
    """The minimum's coordinates (k,), the λ of its equation, and its length, 0-d."""

    coordinates: Array
    damping: Array
    length: Array


def minimum_in_ball(eigenvalues: Float[Array, "k"], gradient: Float[Array, "k"], radius: Array) -> InBall:
    """The minimum of `g^T s + s^T diag(μ) s / 2` within `||s|| <= radius`, all in the eigenvectors' coordinates.

    >>> import jax.numpy as jnp
    >>> found = minimum_in_ball(jnp.array([3.0, 5.0]), jnp.array([4.0, 0.0]), 1.0)
    >>> jnp.round(found.coordinates[0], 2).item(), jnp.round(found.damping, 2).item()
    (-1.0, 1.0)
    """
    dtype = eigenvalues.dtype
    eps = jnp.finfo(dtype).eps
    radius = jnp.asarray(radius, dtype)
    slope = jnp.sqrt(jnp.sum(gradient**2)) / jnp.where(radius > 0, radius, 1)
    place = jnp.argmin(eigenvalues)
    low = jnp.maximum(0, -eigenvalues[place])
    # λ = low + δ, so that the smallest eigenvalue of what is solved with is δ to full relative accuracy.
    mu = eigenvalues + low

    def at(delta: Array) -> Array:
        shifted = mu + delta
        return jnp.where(shifted > 0, -gradient / jnp.where(shifted > 0, shifted, 1), 0)

    def length(delta: Array) -> Array:
        return jnp.sqrt(jnp.sum(at(delta) ** 2))

    # ||s|| <= ||g|| / δ: at the upper end the step is within the ball.
    high = slope * (1 + 4 * eps)
    floor = eps**2 * jnp.maximum(jnp.max(jnp.abs(eigenvalues)), slope)
    inside = (eigenvalues[place] > 0) & (length(jnp.zeros((), dtype)) <= radius)

    def halved(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        below, above = ends
        middle = jnp.sqrt(below) * jnp.sqrt(above)  # between powers: the scale of δ is not known
        outside = length(middle) > radius
        return jnp.where(outside, middle, below), jnp.where(outside, above, middle)

    steps = 2 * jnp.finfo(dtype).nmant
    _, above = jax.lax.fori_loop(0, steps, halved, (floor, jnp.maximum(high, floor)))
    delta = jnp.where(inside, 0, jnp.where(length(floor) <= radius, floor, above))
    step = at(delta)
    # The hard case: along the lowest eigenvector, downhill if there is a slope at all.
    missing = jnp.sqrt(jnp.maximum(radius**2 - jnp.sum(step**2), 0))
    hard = (~inside) & (eigenvalues[place] < 0) & (length(floor) < radius)
    towards = jnp.where(gradient[place] > 0, -1, 1).astype(dtype)
    step = jnp.where(hard, step.at[place].add(towards * missing), step)
    step = jnp.where(radius == 0, 0, step)
    return InBall(step, low + delta, jnp.sqrt(jnp.sum(step**2)))
