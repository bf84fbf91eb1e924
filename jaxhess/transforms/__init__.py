"""Transformations of functions of one example into functions of a batch."""

from jaxhess.transforms.hessian import factored_gradient, hessian, value_grad_and_hessian

__all__ = ["factored_gradient", "hessian", "value_grad_and_hessian"]
