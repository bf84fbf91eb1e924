"""A symmetric matrix from its blocks, in the memory of the matrix itself.

Compilers run independent loops side by side and keep all their results; here each block's rows are written into the
matrix as soon as they are there, in a loop that carries it.
"""

from collections.abc import Callable

import jax

from jaxhess._typing import Array
from jaxhess.operators.base import StructuredOperator
from jaxhess.operators.cross import KroneckerCross
from jaxhess.operators.cross import rows_of_unit as rows_of_cross
from jaxhess.operators.kronecker import KroneckerProductSum, rows_of_unit

__all__ = ["put_symmetric"]


def put_symmetric(matrix: Array, block: StructuredOperator, row: int, column: int) -> Array:
    """The matrix with the dense form of a block at (row, column), and its transpose at (column, row)."""
    if isinstance(block, KroneckerProductSum) and block.layout.is_plain:
        m, n = block.layout.m, block.layout.n
        rows = rows_of_unit(block.Q, block.Z)
        return _by_rows(matrix, lambda i: rows(i).reshape(n, m * n), m, n, row, column, mirrored=False)
    if isinstance(block, KroneckerCross) and block.row_layout.is_plain and block.column_layout.is_plain:
        first, second = (column, row) if block.flipped else (row, column)
        m, n = block.row_layout.m, block.row_layout.n
        return _by_rows(matrix, rows_of_cross(block), m, n, first, second, mirrored=True)
    part = block.as_matrix().astype(matrix.dtype)
    matrix = jax.lax.dynamic_update_slice(matrix, part, (row, column))
    return matrix if row == column else jax.lax.dynamic_update_slice(matrix, part.T, (column, row))


def _by_rows(
    matrix: Array, rows: Callable[[Array], Array], m: int, n: int, row: int, column: int, *, mirrored: bool
) -> Array:
    def put(i: Array, matrix: Array) -> Array:
        part = rows(i).astype(matrix.dtype)
        matrix = jax.lax.dynamic_update_slice(matrix, part, (row + i * n, column))
        return jax.lax.dynamic_update_slice(matrix, part.T, (column, row + i * n)) if mirrored else matrix

    return jax.lax.fori_loop(0, m, put, matrix)
