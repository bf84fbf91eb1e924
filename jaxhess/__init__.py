"""Exact Hessians of neural networks in JAX, as structured linear operators."""

from jaxhess import test_util
from jaxhess.transforms import factored_gradient, hessian, value_grad_and_hessian

__all__ = ["factored_gradient", "hessian", "test_util", "value_grad_and_hessian"]
__version__ = "0.1.0"
