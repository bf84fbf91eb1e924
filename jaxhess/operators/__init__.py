"""What a Hessian is: structured linear operators on the arrays of one parameter, or on a tree of them."""

from jaxhess.operators.base import CurvatureOperator, OperatorSum, StructuredOperator
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.contraction import ContractionOperator
from jaxhess.operators.cross import CrossBlock, KroneckerCross
from jaxhess.operators.dense import Dense, Diagonal
from jaxhess.operators.full import FullHessian, RestrictedHessian
from jaxhess.operators.gauss_newton import GaussNewtonBlock, GaussNewtonCrossBlock
from jaxhess.operators.gauss_newton_full import GaussNewton
from jaxhess.operators.implicit import ImplicitKroneckerSum
from jaxhess.operators.jacobian import JacobianUse, OutputJacobian, Through
from jaxhess.operators.kronecker import KroneckerProduct, KroneckerProductSum
from jaxhess.operators.layout import Layout
from jaxhess.operators.low_rank import LowRank
from jaxhess.operators.mapped import Inertia, mapped_diagonal, mapped_frobenius_norm, mapped_matrix, mapped_trace
from jaxhess.operators.pullback import Pullback

__all__ = [
    "BlockDiagonal",
    "ContractionOperator",
    "CrossBlock",
    "CurvatureOperator",
    "Dense",
    "Diagonal",
    "FullHessian",
    "GaussNewton",
    "GaussNewtonBlock",
    "GaussNewtonCrossBlock",
    "ImplicitKroneckerSum",
    "Inertia",
    "JacobianUse",
    "KroneckerCross",
    "KroneckerProduct",
    "KroneckerProductSum",
    "Layout",
    "LowRank",
    "OperatorSum",
    "OutputJacobian",
    "Pullback",
    "RestrictedHessian",
    "StructuredOperator",
    "Through",
    "mapped_diagonal",
    "mapped_frobenius_norm",
    "mapped_matrix",
    "mapped_trace",
]
