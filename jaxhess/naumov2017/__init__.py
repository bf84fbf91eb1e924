"""The recursions of Naumov (2017) as printed, and corrected, for comparison only: feedforward and recurrent networks."""

from jaxhess.naumov2017.feedforward import (
    Curvatures,
    Forward,
    Gradients,
    corrected_hessian,
    forward,
    gradient,
    kronecker_block,
    printed_hessian,
    printed_relu_hessian,
)
from jaxhess.naumov2017.recurrent import (
    RecurrentForward,
    RecurrentGradients,
    RecurrentHessians,
    corrected_recurrent_gradient,
    corrected_recurrent_hessian,
    printed_recurrent_gradient,
    printed_recurrent_hessian,
    printed_recurrent_relu_hessian,
    recurrent_forward,
)

__all__ = [
    "Curvatures",
    "Forward",
    "Gradients",
    "RecurrentForward",
    "RecurrentGradients",
    "RecurrentHessians",
    "corrected_hessian",
    "corrected_recurrent_gradient",
    "corrected_recurrent_hessian",
    "forward",
    "gradient",
    "kronecker_block",
    "printed_hessian",
    "printed_recurrent_gradient",
    "printed_recurrent_hessian",
    "printed_recurrent_relu_hessian",
    "printed_relu_hessian",
    "recurrent_forward",
]
