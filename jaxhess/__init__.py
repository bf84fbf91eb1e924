"""Exact Hessians of neural networks in JAX, as structured linear operators."""

from jaxhess import activations, bounds, losses, naumov2017, operators, test_util
from jaxhess.activations import (
    elu,
    gelu,
    gelu_tanh,
    identity,
    leaky_relu,
    relu,
    sigmoid,
    silu,
    sin,
    softplus,
    tanh,
)
from jaxhess.layers import dense, recurrent
from jaxhess.transforms import factored_gradient, hessian, value_grad_and_hessian

__all__ = [
    "activations",
    "bounds",
    "dense",
    "elu",
    "factored_gradient",
    "gelu",
    "gelu_tanh",
    "hessian",
    "identity",
    "leaky_relu",
    "losses",
    "naumov2017",
    "operators",
    "recurrent",
    "relu",
    "sigmoid",
    "silu",
    "sin",
    "softplus",
    "tanh",
    "test_util",
    "value_grad_and_hessian",
]
__version__ = "0.1.0"
