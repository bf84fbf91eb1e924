"""The fully connected layer (equations 10 and 11) and Lemma 1.

    y = W z + b        output = f(y)                                            (10), (11)
    v = g * f'(y)      dE/dW = v z^T      dE/db = v      dE/dz = W^T v          (16)-(19), with g = dE/d(output)

With leading axes (batch, time) the sum of the `v z^T` over all of them is ONE matrix product `V Z^T` (Corollary 1,
equation 26).

A `jax.custom_vjp` that states Lemma 1 would take away `jax.jvp`, `jax.jacfwd`, `jax.linearize` and with them
`jax.hessian` and every library that pushes tangents through the user's model. So the tangent map is stated instead,

    d(output) = f'(y) * (dW z + W dz + db)

and the transpose that JAX derives from it is Lemma 1 to the letter: multiply by f'(y) once, then one product for each
of dW and dz. Both maps keep W, z and f'(y) only (not y, not the output), and use the accurate f' of
`jaxhess.activations`. Tangents that are known to be zero (the data of a first layer) cost no product.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhess._typing import Array, Shaped
from jaxhess.activations import Activation, identity
from jaxhess.layers._common import apply, check_parameters, named_arrays, preactivation, resolve_activation

__all__ = ["dense"]


def dense(
    weight: Shaped[Array, "m n"],
    bias: Shaped[Array, " m"] | None,
    inputs: Shaped[Array, "*batch n"],
    activation: Activation | Callable[[Array], Array] = identity,
) -> Shaped[Array, "*batch m"]:
    """`activation(weight @ inputs + bias)`, differentiable in both modes and to any order.

    Args:
        weight: (m, n), outputs by inputs as in the paper.
        bias: (m,), or None for no bias.
        inputs: (..., n), any number of leading axes.
        activation: an `Activation`, or any callable from (..., m) to (..., m); one that is not component-wise (a
            softmax) is differentiated by `jax.jvp`. It is a static argument: pass the same object each time, not a new
            lambda.

    Returns:
        (..., m), in the common dtype of the three arrays. Products are at full float32 precision.

    Raises:
        InputError: if the shapes do not fit together (the message has all of them), an array is not floating-point, or
            the activation is unhashable or closes over traced values.

    Source: Naumov (2017), equations (10)-(11), Lemma 1 (16)-(19), Corollary 1 (26).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess.activations import relu
        >>> from jaxhess.layers.dense import dense
        >>> W, b, z = jnp.array([[1.0, 2.0], [3.0, -4.0]]), jnp.array([0.0, 1.0]), jnp.array([1.0, 1.0])
        >>> dense(W, b, z, relu).tolist()
        [3.0, 0.0]
        >>> jax.grad(lambda W: dense(W, b, z, relu).sum())(W).tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    arrays, shapes = named_arrays({"weight": weight, "bias": bias, "inputs": inputs})
    check_parameters("dense", arrays, shapes)
    dtype = jnp.result_type(*arrays.values())
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    W, z = arrays["weight"], arrays["inputs"]
    resolved = resolve_activation("dense", activation, (*z.shape[:-1], W.shape[0]), dtype)
    return _dense(resolved, W, arrays.get("bias"), z)


@partial(jax.jit, static_argnums=0)
def jaxhess_dense(activation: Callable[[Array], Array], weight: Array, bias: Array | None, inputs: Array) -> Array:
    """The layer's value. The engine knows the layer by this function's name in the traced graph."""
    return activation(preactivation(weight, bias, inputs))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _dense(activation: Callable[[Array], Array], weight: Array, bias: Array | None, inputs: Array) -> Array:
    return jaxhess_dense(activation, weight, bias, inputs)


@partial(_dense.defjvp, symbolic_zeros=True)
def _dense_jvp(activation, primals, tangents):
    (W, b, z), (W_dot, b_dot, z_dot) = primals, tangents
    y = preactivation(W, b, z)
    terms = []
    if not isinstance(W_dot, SymbolicZero):
        terms.append(apply(W_dot, z))
    if not isinstance(z_dot, SymbolicZero):
        terms.append(apply(W, z_dot))
    if b is not None and not isinstance(b_dot, SymbolicZero):
        terms.append(jnp.broadcast_to(b_dot, y.shape))
    y_dot = sum(terms[1:], terms[0])
    if not isinstance(activation, Activation):
        return jax.jvp(activation, (y,), (y_dot,))
    if activation.kind == "linear":
        return jax.jvp(activation.value, (y,), (y_dot,))
    return activation(y), activation.derivative(y) * y_dot
