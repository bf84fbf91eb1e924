"""The recurrent layer (equations 47 and 48) and Lemma 2, corrected for stacked layers.

    y_s = W x_s + U z_{s-1} + b        z_s = f(y_s)                                                  (47), (48)
    g_s = dE/dz_s + U^T v_{s+1}        v_s = g_s * f'(y_s)                                           (55)-(60)
    dE/dW = sum_s v_s x_s^T            dE/dU = sum_s v_s z_{s-1}^T       dE/db = sum_s v_s           (71), (72)
    dE/dx_s = W^T v_s

with dE/dz_s what reaches z_s from outside of the layer, the layer above at all of its time steps included. Only the
recursion for g runs backwards in time; the sums over s, and over the batch, are ONE matrix product each (Corollary 3:
rank <= r tau), not tau products with an accumulated (m, n) array as autodiff of a scan makes them.

As in `dense`, what is stated is the tangent map, and with it both modes:

    e_s = dW x_s + W dx_s + dU z_{s-1} + db            all s together, outside of the scan
    dz_s = f'(y_s) * (e_s + U dz_{s-1})                a scan, linear in (e, dz_0)

Its transpose, which JAX derives, is the above: a scan backwards that carries g alone, then the products. The scan is the
linearisation of the states in `W x_s` and z_0, and keeps U and f'(y_s) only. A step that the mask leaves out has
z_s = z_{s-1}, hence dz_s = dz_{s-1} and v_s = 0.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhess._linalg import matmul
from jaxhess._typing import Array, InputError, Shaped
from jaxhess.activations import Activation, tanh
from jaxhess.layers._common import apply, check_parameters, named_arrays, preactivation, resolve_activation

__all__ = ["recurrent"]

Function = Callable[[Array], Array]


def recurrent(
    weight: Shaped[Array, "m n"],
    feedback: Shaped[Array, "m m"],
    bias: Shaped[Array, " m"] | None,
    inputs: Shaped[Array, "*batch tau n"],
    activation: Activation | Function = tanh,
    initial_state: Shaped[Array, "*#batch m"] | None = None,
    *,
    mask: Shaped[Array, "*#batch #tau"] | None = None,
) -> Shaped[Array, "*batch tau m"]:
    """All states `z_s = activation(weight @ x_s + feedback @ z_{s-1} + bias)` of the inputs `x_1 .. x_tau`.

    Differentiable in both modes and to any order, with respect to everything but the mask.

    Args:
        weight: (m, n), outputs by inputs as in the paper.
        feedback: (m, m), the recurrent weight.
        bias: (m,), or None for no bias.
        inputs: (..., tau, n), any number of leading axes, at least one time step.
        activation: an `Activation`, or any callable from (..., m) to (..., m); one that is not component-wise (a
            softmax) is differentiated by `jax.jvp`. It is a static argument: pass the same object each time, not a new
            lambda.
        initial_state: `z_0`, (m,) or (..., m), broadcast against the leading axes of inputs; None is zero.
        mask: boolean, broadcast to (..., tau): where it is False the step is left out and the state held,
            `z_s = z_{s-1}`, whatever the inputs are there (NaN too). With sequences padded at the end, `states[..., -1, :]`
            is the state after the last real step of each.

    Returns:
        (..., tau, m), in the common dtype of all arrays. Products are at full float32 precision.

    Raises:
        InputError: if the shapes do not fit together (the message has all of them), there is no time step, an array is
            not floating-point (the mask: not boolean), or the activation is unhashable or closes over traced values.

    Source: Naumov (2017), equations (47)-(48), Lemma 2 (55)-(60) with the total derivative in place of (58), Corollary 3
    (71)-(72).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess.activations import identity
        >>> from jaxhess.layers.recurrent import recurrent
        >>> W, U, x = jnp.array([[1.0]]), jnp.array([[2.0]]), jnp.array([[1.0], [0.0], [3.0]])
        >>> recurrent(W, U, None, x, identity)[:, 0].tolist()
        [1.0, 2.0, 7.0]
        >>> recurrent(W, U, None, x, identity, mask=jnp.array([True, True, False]))[:, 0].tolist()
        [1.0, 2.0, 2.0]
        >>> jax.grad(lambda U: recurrent(W, U, None, x, identity)[-1, 0])(U).tolist()
        [[4.0]]
    """
    given = {"weight": weight, "feedback": feedback, "bias": bias, "inputs": inputs, "initial_state": initial_state}
    arrays, shapes = named_arrays(given | {"mask": mask})
    taken = arrays.pop("mask", None)
    _check(arrays, taken, shapes)
    dtype = jnp.result_type(*arrays.values())
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    W, U, x = arrays["weight"], arrays["feedback"], arrays["inputs"]
    state = (*x.shape[:-2], W.shape[0])
    z0 = jnp.broadcast_to(arrays.get("initial_state", jnp.zeros((), dtype)), state)
    if taken is not None:
        taken = jnp.broadcast_to(taken, x.shape[:-1])
        x = jnp.where(taken[..., None], x, 0)
    return _recurrent(resolve_activation("recurrent", activation, state, dtype), W, U, arrays.get("bias"), x, z0, taken)


def _check(arrays: Mapping[str, Array], mask: Array | None, shapes: str) -> None:
    check_parameters("recurrent", arrays, shapes)
    weight, feedback, inputs = (arrays[name] for name in ("weight", "feedback", "inputs"))
    z0 = arrays.get("initial_state")
    m, n = weight.shape
    if feedback.shape != (m, m):
        raise InputError(f"recurrent: feedback must have shape {(m, m)}, got {feedback.shape} ({shapes})")
    if inputs.ndim < 2:
        raise InputError(f"recurrent: inputs must have shape (..., tau, {n}), got {inputs.shape} ({shapes})")
    if inputs.shape[-2] == 0:
        raise InputError(f"recurrent: inputs must have at least one time step, got {inputs.shape} ({shapes})")
    state, steps = (*inputs.shape[:-2], m), inputs.shape[:-1]
    if z0 is not None and (z0.shape[-1:] != (m,) or not _broadcasts(z0.shape, state)):
        raise InputError(f"recurrent: initial_state must broadcast from (..., {m}) to {state}, got {z0.shape} ({shapes})")
    if mask is not None and mask.dtype != jnp.bool_:
        raise InputError(f"recurrent: mask must be boolean, got {mask.dtype} ({shapes})")
    if mask is not None and not _broadcasts(mask.shape, steps):
        raise InputError(f"recurrent: mask must broadcast to {steps}, got {mask.shape} ({shapes})")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))


@partial(jax.jit, static_argnums=0)
def jaxhess_recurrent(
    activation: Function, weight: Array, feedback: Array, bias: Array | None, inputs: Array, state: Array, mask: Array | None
) -> Array:
    """The layer's value. The engine knows the layer by this function's name in the traced graph."""
    driven, taken = jnp.moveaxis(preactivation(weight, bias, inputs), -2, 0), _time_first(mask, weight.shape[0])
    return jnp.moveaxis(_scan(activation, partial(apply, feedback), driven, state, taken), 0, -2)


def _time_first(mask: Array | None, m: int) -> Array | None:
    """The mask of every component of the state, time first."""
    if mask is None:
        return None
    return jnp.broadcast_to(jnp.moveaxis(mask, -1, 0)[..., None], (mask.shape[-1], *mask.shape[:-1], m))


def _scan(activation: Function, fed_back: Function, driven: Array, z0: Array, mask: Array | None) -> Array:
    """All `z_s = f(driven_s + fed_back(z_{s-1}))`; time is the first axis."""

    def step(z: Array, at_step: tuple[Array, Array | None]):
        driven, taken = at_step
        new = activation(driven + fed_back(z))
        new = new if taken is None else jnp.where(taken, new, z)
        return new, new

    return jax.lax.scan(step, z0, (driven, mask))[1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recurrent(activation: Function, W: Array, U: Array, b: Array | None, x: Array, z0: Array, mask: Array | None) -> Array:
    return jaxhess_recurrent(activation, W, U, b, x, z0, mask)


@partial(_recurrent.defjvp, symbolic_zeros=True)
def _recurrent_jvp(activation, primals, tangents):
    (W, U, b, x, z0, mask), (W_dot, U_dot, b_dot, x_dot, z0_dot, _) = primals, tangents
    x, taken, transposed = jnp.moveaxis(x, -2, 0), _time_first(mask, W.shape[0]), U.T

    def fed_back(z: Array) -> Array:
        y = _fed_back(U, transposed, z)
        return y if b is None else y + jnp.broadcast_to(b, y.shape)

    def states(driven: Array, z0: Array) -> Array:
        return _scan(activation, fed_back, driven, z0, taken)

    # The linear scan is left to JAX to derive: older releases do not transpose one that is written out.
    z, push = jax.linearize(states, apply(W, x), z0)
    terms = []
    if not isinstance(W_dot, SymbolicZero):
        terms.append(apply(W_dot, x))
    if not isinstance(x_dot, SymbolicZero):
        terms.append(apply(W, jnp.moveaxis(x_dot, -2, 0)))
    if not isinstance(U_dot, SymbolicZero):
        terms.append(apply(U_dot, jnp.concatenate([z0[None], z[:-1]])))
    if b is not None and not isinstance(b_dot, SymbolicZero):
        terms.append(jnp.broadcast_to(b_dot, z.shape))
    e = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(z)
    z_dot = push(e, jnp.zeros_like(z0) if isinstance(z0_dot, SymbolicZero) else z0_dot)
    return jnp.moveaxis(z, 0, -2), jnp.moveaxis(z_dot, 0, -2)


@jax.custom_jvp
def _fed_back(U: Array, transposed: Array, z: Array) -> Array:
    """`U z` by U^T, laid out once and not in every step; the tangent by U, whose transpose needs no other layout."""
    return matmul(z, transposed)


@partial(_fed_back.defjvp, symbolic_zeros=True)
def _fed_back_jvp(primals, tangents):
    (U, transposed, z), (U_dot, _, z_dot) = primals, tangents
    result = apply(U, z_dot)
    return matmul(z, transposed), result if isinstance(U_dot, SymbolicZero) else result + apply(U_dot, z)
