"""Which Kronecker preconditioner an operator has: that of the means of its factors, block by block for trees."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import matmul
from jaxhess._typing import Array
from jaxhess.operators.base import StructuredOperator
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.dense import Dense, Diagonal
from jaxhess.operators.full import FullHessian
from jaxhess.operators.functions import provides
from jaxhess.operators.gauss_newton import GaussNewtonBlock
from jaxhess.operators.gauss_newton_full import GaussNewton
from jaxhess.operators.kronecker import KroneckerProduct, KroneckerProductSum
from jaxhess.operators.layout import Layout
from jaxhess.operators.paths import spread
from jaxhess.operators.preconditioner import block_preconditioner, kronecker_preconditioner

__all__ = ["preconditioner_of"]


@provides("preconditioner")
def preconditioner_of(operator: Any, damping: Any, *, asked: bool = False) -> Any:
    """An approximate inverse of `operator` plus a damping, or None where there are no factors to make it of.

    For a sum of Kronecker products the means of Q and z z^T; for operators on trees those of the diagonal blocks, which of a
    `FullHessian` cost a sweep and are made only if `asked` for.
    """
    if isinstance(operator, GaussNewton | BlockDiagonal) or (asked and isinstance(operator, FullHessian)):
        return _of_tree(operator, damping)
    factors = _factors(operator)
    return None if factors is None else kronecker_preconditioner(*factors[:2], damping, factors[2])


def _of_tree(operator: Any, damping: Any) -> Any:
    structure = operator.in_structure()
    dampings = spread("solve", damping, structure)
    if isinstance(operator, GaussNewton):
        blocks = jax.tree.leaves(operator._map(lambda J: operator._block(J, J)), is_leaf=_is_operator)
    elif isinstance(operator, BlockDiagonal):
        blocks = [block for _, block in operator.items()]
    else:
        blocks = [operator._diagonal_block(n) for n in range(len(dampings))]
    inverses = []
    for block, d in zip(blocks, dampings, strict=True):
        factors = _factors(block)
        if factors is None:
            inverses.append(_by_diagonal(block.diagonal(), d))
        else:
            inverses.append(kronecker_preconditioner(*factors[:2], d, factors[2]))
    return block_preconditioner(jax.tree.unflatten(jax.tree.structure(structure), inverses))


def _factors(operator: Any) -> tuple[Array, Array, Layout] | None:
    if isinstance(operator, KroneckerProduct):
        return operator.A, operator.B, operator.layout
    if isinstance(operator, GaussNewtonBlock):
        operator = _terms_of_bias(operator) if operator.jacobian.matrix_sizes is None else operator.kronecker_terms()
    if isinstance(operator, KroneckerProductSum):
        return (*_means(operator.Q, operator.Z), operator.layout)
    if isinstance(operator, Dense) and operator.in_size() <= 2048:
        shape = operator.parameter_shape
        return operator.array, jnp.ones((1, 1), operator.array.dtype), Layout(shape, shape, tuple(range(len(shape))), ())
    return None


def _terms_of_bias(block: GaussNewtonBlock) -> Dense | None:
    small = math.prod(block.in_structure().shape) <= 2048
    return Dense(block.as_matrix(), block.in_structure().shape) if small else None


@jax.jit
def _means(Q: Array, Z: Array) -> tuple[Array, Array]:
    return jnp.mean(Q, axis=0), matmul(Z.T, Z) / Z.shape[0]


@jax.jit
def _by_diagonal(diagonal: Array, damping: Any) -> Diagonal:
    values = jnp.abs(diagonal) + damping
    floor = jnp.maximum(jnp.finfo(values.dtype).eps * jnp.max(values, initial=0), jnp.finfo(values.dtype).tiny)
    inverse = 1 / jnp.maximum(values, floor)
    return Diagonal(inverse, lx.positive_semidefinite_tag)


def _is_operator(node: Any) -> bool:
    return isinstance(node, StructuredOperator)
