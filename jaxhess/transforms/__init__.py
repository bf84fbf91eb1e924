"""Transformations of functions of one example into functions of a batch."""

from jaxhess.transforms.diagonals import hessian_diagonal, hessian_trace
from jaxhess.transforms.gauss_newton import fisher, fisher_diagonal, gauss_newton, gauss_newton_diagonal, gauss_newton_vp
from jaxhess.transforms.hessian import factored_gradient, hessian, value_grad_and_hessian
from jaxhess.transforms.products import hvp, linearized_hvp
from jaxhess.transforms.targets import laplacian

__all__ = [
    "factored_gradient",
    "fisher",
    "fisher_diagonal",
    "gauss_newton",
    "gauss_newton_diagonal",
    "gauss_newton_vp",
    "hessian",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "laplacian",
    "linearized_hvp",
    "value_grad_and_hessian",
]
