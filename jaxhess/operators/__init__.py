"""What a Hessian is: structured linear operators on the arrays of one parameter, or on a tree of them."""

from jaxhess.operators.base import CurvatureOperator, OperatorSum, StructuredOperator
from jaxhess.operators.block import BlockDiagonal, FactorizedBlocks
from jaxhess.operators.contraction import ContractionOperator
from jaxhess.operators.cross import CrossBlock, KroneckerCross
from jaxhess.operators.damped import Damped
from jaxhess.operators.dense import Dense, Diagonal
from jaxhess.operators.direct import Factorization
from jaxhess.operators.extremes import ExtremesInfo, KroneckerGuess, extreme_eigenpairs, kronecker_guess
from jaxhess.operators.full import FullHessian
from jaxhess.operators.functions import NegativeCurvature
from jaxhess.operators.gauss_newton import GaussNewtonBlock, GaussNewtonCrossBlock
from jaxhess.operators.gauss_newton_full import GaussNewton
from jaxhess.operators.implicit import ImplicitKroneckerSum
from jaxhess.operators.iterative import MINRES, SolveInfo, iterative_solve
from jaxhess.operators.jacobian import JacobianUse, OutputJacobian, Through
from jaxhess.operators.kronecker import KroneckerProduct, KroneckerProductSum
from jaxhess.operators.layer import LayerBlock
from jaxhess.operators.layout import Layout
from jaxhess.operators.low_rank import LowRank
from jaxhess.operators.mapped import Inertia, mapped_diagonal, mapped_frobenius_norm, mapped_matrix, mapped_trace
from jaxhess.operators.nearest import KroneckerApproximation, mean_kronecker, nearest_kronecker
from jaxhess.operators.preconditioner import (
    BlockPreconditioner,
    KroneckerPreconditioner,
    block_preconditioner,
    kronecker_preconditioner,
)
from jaxhess.operators.preconditioning import preconditioner_of
from jaxhess.operators.pullback import Pullback
from jaxhess.operators.restricted import JointHessian, RestrictedHessian
from jaxhess.operators.spectral import SpectralOperator

__all__ = [
    "MINRES",
    "BlockDiagonal",
    "BlockPreconditioner",
    "ContractionOperator",
    "CrossBlock",
    "CurvatureOperator",
    "Damped",
    "Dense",
    "Diagonal",
    "ExtremesInfo",
    "Factorization",
    "FactorizedBlocks",
    "FullHessian",
    "GaussNewton",
    "GaussNewtonBlock",
    "GaussNewtonCrossBlock",
    "ImplicitKroneckerSum",
    "Inertia",
    "JacobianUse",
    "JointHessian",
    "KroneckerApproximation",
    "KroneckerCross",
    "KroneckerGuess",
    "KroneckerPreconditioner",
    "KroneckerProduct",
    "KroneckerProductSum",
    "LayerBlock",
    "Layout",
    "LowRank",
    "NegativeCurvature",
    "OperatorSum",
    "OutputJacobian",
    "Pullback",
    "RestrictedHessian",
    "SolveInfo",
    "SpectralOperator",
    "StructuredOperator",
    "Through",
    "block_preconditioner",
    "extreme_eigenpairs",
    "iterative_solve",
    "kronecker_guess",
    "kronecker_preconditioner",
    "mapped_diagonal",
    "mapped_frobenius_norm",
    "mapped_matrix",
    "mapped_trace",
    "mean_kronecker",
    "nearest_kronecker",
    "preconditioner_of",
]
