"""The error of a sequence: the sum of a loss over its time steps (equation 49).

    E = sum_t E^(t)(z^(l,t), z*^(t))                                                                     (49)

so dE/dz^(l,t) is the gradient of one step's loss, and d2E/dz^(l,s) dz^(l,t) is zero for s != t: all coupling between
time steps comes from the network. Steps that a mask leaves out are taken out twice: their outputs and targets are
replaced by zeros before the loss sees them, and what it makes of the zeros is replaced by zero. Either alone would let
a NaN of the padding through, in the value or as `0 * NaN` in a derivative.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, InputError, Shaped

__all__ = ["over_time"]


def over_time(
    loss: Callable[[Array, Array], Array],
    outputs: Shaped[Array, "tau ..."],
    targets: Shaped[Array, "tau ..."],
    mask: Shaped[Array, "#tau"] | None = None,
) -> Shaped[Array, ""]:
    """The sum of `loss(outputs[t], targets[t])` over the time steps t of one sequence.

    Args:
        loss: a `Loss`, or any callable from one step's output and target to a scalar.
        outputs: (tau, ...), at least one step, each of a shape that the loss takes.
        targets: (tau, ...), likewise; class labels (tau,), for example.
        mask: boolean, broadcast to (tau,): the steps that count. The others contribute exactly zero to the value and to
            every derivative, whatever their outputs and targets are (NaN too). If no step counts, the sum is zero.

    Returns:
        The scalar E. It is a sum: for a mean, divide by tau, or by the number of steps that count.

    Raises:
        InputError: if outputs and targets do not have the same number of steps or have none, outputs are not
            floating-point, the mask is not boolean or does not fit, or the loss returns more than a scalar; the message
            has all shapes. What the loss itself refuses of one step.

    Source: Naumov (2017), equation (49).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess.losses import over_time, squared_error
        >>> outputs, targets = jnp.array([[1.0], [2.0], [jnp.nan]]), jnp.array([[0.0], [4.0], [0.0]])
        >>> mask = jnp.array([True, True, False])
        >>> float(over_time(squared_error, outputs, targets, mask))
        2.5
        >>> jax.grad(lambda outputs: over_time(squared_error, outputs, targets, mask))(outputs).tolist()
        [[1.0], [-2.0], [0.0]]
    """
    if not callable(loss):
        raise InputError(f"over_time: loss must be callable, got {type(loss).__name__}")
    z, t = jnp.asarray(outputs), jnp.asarray(targets)
    counted = None if mask is None else jnp.asarray(mask)
    shapes = f"outputs {z.shape}, targets {t.shape}, mask {None if counted is None else counted.shape}"
    _check(z, t, counted, shapes)

    def step(z: Array, t: Array) -> Array:
        error = jnp.asarray(loss(z, t))
        if error.shape != ():
            raise InputError(f"over_time: the loss of one step must be a scalar, got shape {error.shape} ({shapes})")
        return error

    if counted is None:
        return jnp.sum(jax.vmap(step)(z, t))
    counted = jnp.broadcast_to(counted, z.shape[:1])
    errors = jax.vmap(step)(_zero_unless(counted, z), _zero_unless(counted, t))
    return jnp.sum(jnp.where(counted, errors, 0))


def _zero_unless(counted: Array, values: Array) -> Array:
    return jnp.where(counted.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)


def _check(outputs: Array, targets: Array, mask: Array | None, shapes: str) -> None:
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise InputError(f"over_time: outputs must be floating-point, got {outputs.dtype} ({shapes})")
    if outputs.ndim == 0 or targets.ndim == 0 or outputs.shape[0] != targets.shape[0]:
        raise InputError(f"over_time: outputs and targets must have the same number of time steps first ({shapes})")
    if outputs.shape[0] == 0:
        raise InputError(f"over_time: outputs must have at least one time step ({shapes})")
    if mask is not None and mask.dtype != jnp.bool_:
        raise InputError(f"over_time: mask must be boolean, got {mask.dtype} ({shapes})")
    if mask is not None and mask.shape not in ((), (1,), outputs.shape[:1]):
        raise InputError(f"over_time: mask must broadcast to {outputs.shape[:1]} ({shapes})")
