"""Second-order optimizers as optax transformations, with exact curvature among the arguments of `update`."""

from jaxhess.optimizers.damping import TrustRadius, constant, levenberg_marquardt
from jaxhess.optimizers.gauss_newton import choose_solver, gauss_newton, scale_by_gauss_newton
from jaxhess.optimizers.kronecker_newton import kronecker_newton, scale_by_kronecker_newton
from jaxhess.optimizers.newton import newton, scale_by_newton
from jaxhess.optimizers.state import SOLVERS, Optimizer, SecondOrderState, StepInfo, find_state
from jaxhess.optimizers.training import Metrics, step

__all__ = [
    "SOLVERS",
    "Metrics",
    "Optimizer",
    "SecondOrderState",
    "StepInfo",
    "TrustRadius",
    "choose_solver",
    "constant",
    "find_state",
    "gauss_newton",
    "kronecker_newton",
    "levenberg_marquardt",
    "newton",
    "scale_by_gauss_newton",
    "scale_by_kronecker_newton",
    "scale_by_newton",
    "step",
]
