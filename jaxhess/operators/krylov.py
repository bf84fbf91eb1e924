"""Krylov methods for symmetric systems `A x = b` on trees of arrays, by products with A alone.

`minres` (Paige and Saunders, 1975) takes indefinite and singular A; conjugate gradients (Hestenes and Stiefel, 1952) need a
positive definite one. With a preconditioner M, positive definite and like A^-1, the Lanczos process

    β_{k+1} z_{k+1} = A v_k - α_k z_k - β_k z_{k-1},     v_k = M z_k,     v_j . z_k = [j = k]

makes A tridiagonal; reflections (c_k, s_k) turn that matrix into a triangular one, column by column, and

    x_k = x_{k-1} + φ_k w_k           φ_k = c_k φ̄_{k-1},    φ̄_k = s_k φ̄_{k-1} = ||r_k||_M
    r_k = s_k^2 r_{k-1} - c_k φ̄_k z_{k+1}                   ||A r_{k-1}||_M = φ̄_{k-1} root_k

r_k is kept, so that the residual itself, not its norm in M, is held against the tolerance. Where `||A r||` vanishes before r
does, b is not in the range of A, and r is what no x can remove. The x of least squares is A^+ b once its part along r is
taken off: all of it that is in the null space (Liu, Milzarek and Roosta, *Obtaining pseudo-inverse solutions with MINRES*).

Rounding makes r_k drift from `b - A x_k`. So `refine` computes that at the end, and starts again from it while that still
helps: the residual that it returns is the true one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.operators.vectors import dot, dot_abs, dtype_of, like, measured, plus, times, where

__all__ = ["Refined", "conjugate_gradients", "minres", "refine", "step_limit"]

Product = Callable[[PyTree], PyTree]

# Restarts aim a little below the tolerance, and end when they no longer gain a factor of two.
_MARGIN = 0.9
_GAIN = 0.5


class _Limits(NamedTuple):
    """When a pass ends: at a residual of `target`, after `steps`, or at `||A r|| <= flat ||A|| ||r||`, where `largest` is
    what is known of ||A|| from below."""

    target: Array
    steps: Array
    flat: Array
    largest: Array


class _Pass(NamedTuple):
    """What a method found, starting at zero: `solution`, `steps`, whether it ended where A r is `flat` or broke down, and
    what it learnt of ||A||."""

    solution: PyTree
    steps: Array
    flat: Array
    broken: Array
    largest: Array


class Refined(NamedTuple):
    """A solution with its true `residual` norm; `steps` in all, and whether it ended in least squares or broke down."""

    solution: PyTree
    residual: Array
    steps: Array
    least_squares: Array
    broken: Array


def refine(
    method: Callable[..., _Pass],
    product: Product,
    precondition: Product | None,
    vector: PyTree,
    start: PyTree | None,
    target: Any,
    max_steps: int,
    size_of: Callable[[PyTree], Array],
) -> Refined:
    """Solve to `size_of(vector - product(x)) <= target` by `method`, started again from the true residual while that helps.

    Where a pass ends with `A r` near zero, but not r, A may be singular, or have small eigenvalues: a second pass, from r,
    tells, as it solves for those. Each pass works on a residual scaled to entries of at most 1: nothing under- or overflows.
    """

    def product_like(v: PyTree) -> PyTree:
        return like(v, product(v))

    def precondition_like(v: PyTree) -> PyTree:
        return v if precondition is None else like(v, precondition(v))

    def again(carry: tuple) -> Array:
        (_, _, _, size), steps, _, going, *_ = carry
        return going & (size > target) & (steps < max_steps)

    def one_pass(carry: tuple) -> tuple:
        before, steps, strict, _, _, _, largest = carry
        x, r, scale, size = before
        allowed = jnp.where(strict, jnp.minimum(max_steps - steps, 2 * steps + 10), max_steps - steps)
        # No pass gains more digits than there are; the next one may.
        aim = jnp.maximum(_MARGIN * target, eps * size) / scale
        limits = _Limits(aim, allowed, jnp.where(strict, 10 * eps, eps**0.5), largest)
        found = method(product_like, precondition_like, times(1 / scale, r), limits, size_of)
        x = plus(x, scale, found.solution)
        r = plus(vector, -1, product_like(x))
        moved = (x, r, *measured(r, size_of))
        after = where(moved[-1] < size, moved, before)
        gained = after[-1] < _GAIN * size
        going = ~found.broken & (gained | (found.flat & ~strict))
        steps, largest = steps + found.steps, jnp.maximum(largest, found.largest)
        return after, steps, strict | found.flat, going, strict & ~gained, found.broken, largest

    dtype = dtype_of(vector)
    eps = jnp.asarray(jnp.finfo(dtype).eps, dtype)
    x = jax.tree.map(jnp.zeros_like, vector) if start is None else start
    r = vector if start is None else plus(vector, -1, product_like(x))
    no = jnp.zeros((), bool)
    first = (x, r, *measured(r, size_of)), jnp.zeros((), jnp.int32), no, ~no, no, no, jnp.zeros((), dtype)
    (x, r, scale, size), steps, _, _, least_squares, broken, _ = jax.lax.while_loop(again, one_pass, first)

    def of_least_norm(x: PyTree) -> tuple[PyTree, Array, Array]:
        moved = x if start is None else plus(x, -1, start)
        unit = times(1 / scale, r)
        lifted = plus(x, -dot(moved, unit) / dot(unit, unit), unit)
        size_lifted = measured(plus(vector, -1, product_like(lifted)), size_of)[1]
        # Along what was no null space after all, the residual grows.
        holds = size_lifted <= (1 + eps**0.5) * size
        return where(holds, lifted, x), jnp.where(holds, size_lifted, size), holds

    if method is minres:
        x, size, least_squares = jax.lax.cond(least_squares, of_least_norm, lambda x: (x, size, least_squares), x)
    x = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(size), leaf, jnp.nan), x)
    return Refined(x, size, steps, least_squares, broken)


def minres(
    product: Product,
    precondition: Product,
    vector: PyTree,
    limits: _Limits,
    size_of: Callable[[PyTree], Array],
) -> _Pass:
    """One pass of MINRES from zero; the letters are those of the module's docstring."""
    zero = jax.tree.map(jnp.zeros_like, vector)
    y = precondition(vector)
    squared = dot(vector, y)
    dtype = squared.dtype
    beta = jnp.sqrt(squared)

    class State(NamedTuple):
        x: Any
        r: Any
        size: Any  # of r
        w: Any
        w_old: Any
        z: Any  # β_k z_k, of which y is M times
        z_old: Any
        y: Any
        beta: Any
        beta_old: Any
        d_bar: Any  # entries of the triangular factor under way
        e: Any
        phi_bar: Any
        c: Any
        s: Any
        largest: Any  # column norm of the tridiagonal matrix
        steps: Any
        flat: Any
        broken: Any

    def again(state: State) -> Array:
        return (state.size > limits.target) & (state.steps < limits.steps) & ~state.flat & ~state.broken

    def one_step(state: State) -> State:
        beta = state.beta
        inverse = 1 / jnp.where(beta > 0, beta, 1)
        v = times(inverse, state.y)
        u = product(v)
        u = plus(u, -beta / jnp.where(state.beta_old > 0, state.beta_old, 1), state.z_old)
        alpha = dot(v, u)
        u = plus(u, -alpha * inverse, state.z)
        y = precondition(u)
        squared = dot(u, y)
        beta_next = jnp.sqrt(jnp.maximum(squared, 0))

        delta = state.c * state.d_bar + state.s * alpha
        g_bar = state.s * state.d_bar - state.c * alpha
        e, d_bar = state.s * beta_next, -state.c * beta_next
        root, gamma = jnp.hypot(g_bar, d_bar), jnp.hypot(g_bar, beta_next)
        # The first β is the norm of the vector, no entry of the matrix.
        column = jnp.sqrt(alpha**2 + beta_next**2 + jnp.where(state.steps > 0, beta**2, 0))
        largest = jnp.maximum(state.largest, column)
        flat = root <= limits.flat * largest
        broken = squared < -100 * jnp.finfo(dtype).eps * dot_abs(u, y)

        safe = jnp.where(gamma > 0, gamma, 1)
        c, s = g_bar / safe, beta_next / safe
        phi, phi_bar = c * state.phi_bar, s * state.phi_bar
        w = times(1 / safe, plus(plus(v, -state.e, state.w_old), -delta, state.w))
        x = plus(state.x, phi, w)
        r = plus(times(s * s, state.r), -c * phi_bar / jnp.where(beta_next > 0, beta_next, 1), u)

        after = State(
            x, r, size_of(r), w, state.w, u, state.z, y, beta_next, beta, d_bar, e, phi_bar, c, s, largest,
            state.steps + 1, flat, broken,
        )  # fmt: skip
        # In either case this step's update is void.
        stays = flat | broken
        kept = {name: where(stays, getattr(state, name), getattr(after, name)) for name in ("x", "r", "size")}
        return after._replace(**kept)

    nought, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    state = State(
        zero, vector, size_of(vector), zero, zero, vector, zero, y, beta, nought, nought, nought, beta, -one, nought,
        limits.largest.astype(dtype), jnp.zeros((), jnp.int32), jnp.zeros((), bool), ~(squared > 0),
    )  # fmt: skip
    state = jax.lax.while_loop(again, one_step, state)
    return _Pass(state.x, state.steps, state.flat, state.broken, state.largest)


def conjugate_gradients(
    product: Product,
    precondition: Product,
    vector: PyTree,
    limits: _Limits,
    size_of: Callable[[PyTree], Array],
) -> _Pass:
    """One pass of conjugate gradients from zero; it breaks down where the operator or M is not positive definite.

    Not lineax's, which gives NaN where `p . A p` is below `100 N eps` times `r . M r`: in float32 that is every operator
    with eigenvalues of about 1 from a hundred thousand parameters on.
    """
    p = precondition(vector)
    gamma = dot(vector, p)

    def again(carry: tuple) -> Array:
        _, _, size, _, _, steps, broken = carry
        return (size > limits.target) & (steps < limits.steps) & ~broken

    def one_step(carry: tuple) -> tuple:
        x, r, size, p, gamma, steps, _ = carry
        image = product(p)
        curvature = dot(p, image)
        broken = ~(curvature > 0)
        alpha = jnp.where(broken, 0, gamma / jnp.where(broken, 1, curvature))
        x, r = plus(x, alpha, p), plus(r, -alpha, image)
        y = precondition(r)
        gamma_next = dot(r, y)
        size = size_of(r)
        broken = broken | (~(gamma_next > 0) & (size > limits.target))
        p = plus(y, gamma_next / gamma, p)
        return x, r, size, p, gamma_next, steps + 1, broken

    zero = jax.tree.map(jnp.zeros_like, vector)
    first = (zero, vector, size_of(vector), p, gamma, jnp.zeros((), jnp.int32), ~(gamma > 0))
    x, _, _, _, _, steps, broken = jax.lax.while_loop(again, one_step, first)
    return _Pass(x, steps, jnp.zeros((), bool), broken, limits.largest)


def step_limit(max_steps: int | None, vector: PyTree) -> int:
    """`max_steps`, or by default 10 N, at most 10,000."""
    if max_steps is None:
        return min(10 * sum(leaf.size for leaf in jax.tree.leaves(vector)), 10_000)
    return max_steps
