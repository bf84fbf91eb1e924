"""What the layers share: `W z + b` over any leading axes, and the checks of their arguments."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import PRECISION
from jaxhess._typing import Array, InputError
from jaxhess.activations import NotComponentWiseError, as_activation

__all__ = ["apply", "check_parameters", "named_arrays", "preactivation", "resolve_activation"]


def apply(weight: Array, inputs: Array) -> Array:
    """`W z` for z of shape (..., n)."""
    contraction = (((inputs.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(inputs, weight, contraction, precision=PRECISION)


def preactivation(weight: Array, bias: Array | None, inputs: Array) -> Array:
    """`W z + b` for z of shape (..., n), b may be None."""
    y = apply(weight, inputs)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def named_arrays(given: Mapping[str, Any]) -> tuple[dict[str, Array], str]:
    """The arguments that are not None, as arrays, and the shapes of all of them for messages."""
    arrays = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
    return arrays, ", ".join(f"{name} {arrays[name].shape if name in arrays else None}" for name in given)


def check_parameters(layer: str, arrays: Mapping[str, Array], shapes: str) -> None:
    """Raise `InputError` unless all arrays are floating-point and weight, bias and the inputs' last axis fit together."""
    weight, inputs, bias = arrays["weight"], arrays["inputs"], arrays.get("bias")
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{layer}: {name} must be floating-point, got {array.dtype} ({shapes})")
    if weight.ndim != 2:
        raise InputError(f"{layer}: weight must have shape (m, n), got {weight.shape} ({shapes})")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{layer}: bias must have shape {weight.shape[:1]}, got {bias.shape} ({shapes})")
    if inputs.ndim == 0 or inputs.shape[-1] != weight.shape[1]:
        raise InputError(f"{layer}: the last axis of inputs must be {weight.shape[1]}, got {inputs.shape} ({shapes})")


def resolve_activation(layer: str, activation, shape: tuple[int, ...], dtype: jnp.dtype) -> Callable[[Array], Array]:
    """The `Activation` of a component-wise callable; any other hashable callable that keeps the shape, as it is."""
    try:
        hash(activation)
    except TypeError:
        raise InputError(f"{layer}: activation must be hashable, got an unhashable {type(activation).__name__}") from None
    try:
        return as_activation(activation)
    except NotComponentWiseError:
        result = jax.eval_shape(activation, jax.ShapeDtypeStruct(shape, dtype))
        if getattr(result, "shape", None) != shape:
            raise InputError(f"{layer}: activation must keep the shape, but maps {shape} to {result}") from None
        return activation
