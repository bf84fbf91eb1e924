"""Blocks of the Hessian between two different parameters, rectangular, without their dense form.

Between the weights of two uses `y_j = W_j z_j` and `y_k = W_k z_k`, k upstream of j, one vector of each example,

    H_jk[(i,q),(p,s)] = (1/r) sum_r  z_k[s] (Q_jk[i,p] z_j[q] + g_j[i] S_jk[q,p])              (math: section 6)

`KroneckerCross` is that; `CrossBlock` is any sum of labelled contractions (several places, tied weights, biases).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import einsum, matmul
from jaxhess._typing import Array, InputError
from jaxhess.operators.base import StructuredOperator, sum_of
from jaxhess.operators.contraction import contract
from jaxhess.operators.layout import Layout
from jaxhess.operators.mapped import mapped_frobenius_norm
from jaxhess.operators.support import (
    as_scalar,
    as_tags,
    check_operator_fits,
    check_square,
    check_vector,
    describe,
    scaled_tags,
    transposed_tags,
)
from jaxhess.operators.uses import PairTerm

__all__ = ["CrossBlock", "KroneckerCross", "rows_of_unit"]


class _Rectangular(StructuredOperator):
    """What the two have in common."""

    def diagonal(self):
        check_square(self, "diagonal")
        return jnp.diagonal(self.as_matrix()).reshape(self.in_structure().shape)

    def trace(self):
        check_square(self, "trace")
        return jnp.trace(self.as_matrix())

    def frobenius_norm(self):
        return mapped_frobenius_norm(self if self.in_size() <= self.out_size() else self.transpose())

    def _plus(self, other):
        return None


class CrossBlock(_Rectangular):
    """The sum of `terms`, `PairTerm`s whose rows are those of a parameter of shape `row_shape` and whose columns those of
    one of `column_shape`, times `factor`. Raises `InputError` if there is no term or if one does not fit."""

    terms: tuple[PairTerm, ...]
    factor: Array
    row_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    column_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        terms: Iterable[PairTerm],
        row_shape: tuple[int, ...],
        column_shape: tuple[int, ...],
        factor: Any = 1,
        tags: Any = (),
    ):
        self.terms = tuple(terms)
        if not self.terms:
            raise InputError("CrossBlock: there is no term")
        self.row_shape, self.column_shape = tuple(row_shape), tuple(column_shape)
        self.factor = as_scalar("CrossBlock", factor, self.terms[0].operands[0].dtype)
        self.tags = as_tags(tags)

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.column_shape, self.factor.dtype)

    def out_structure(self):
        return jax.ShapeDtypeStruct(self.row_shape, self.factor.dtype)

    def mv(self, vector):
        check_vector("CrossBlock", vector, self.column_shape)
        products = (
            contract(
                (*term.operands, jnp.reshape(vector, term.sizes_of(term.columns))),
                (*term.labels, term.columns),
                term.rows,
            )
            for term in self.terms
        )
        return self.factor * sum_of(product.reshape(self.row_shape) for product in products)

    def as_matrix(self):
        check_operator_fits(self, instead="mv or frobenius_norm()")
        shape = self.out_size(), self.in_size()
        matrices = (contract(term.operands, term.labels, term.rows + term.columns).reshape(shape) for term in self.terms)
        return self.factor * sum_of(matrices)

    def transpose(self):
        terms = [dataclasses.replace(term, rows=term.columns, columns=term.rows) for term in self.terms]
        return CrossBlock(terms, self.column_shape, self.row_shape, self.factor, transposed_tags(self.tags))

    def scaled(self, factor):
        scaled = self.factor * as_scalar("CrossBlock", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def __repr__(self):
        return describe(self, f"{len(self.terms)} terms")


class KroneckerCross(_Rectangular):
    """The block between the weights of two uses, rows those of the downstream one; with `flipped`, its transpose.

    `Q` (r, m_j, m_k), `Z_row` (r, n_j), `Z_column` (r, n_k); `G_row` (r, m_j) and `S` (r, n_j, m_k), or its diagonal
    (r, n_j) where z_j = f(y_k), or None both where z_j does not depend on y_k. The layouts say how the parameters are read
    as (m, n).

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1))
    >>> H = KroneckerCross(jnp.full((1, 1, 2), 3.0), one, 2 * one, Layout.of_matrix(1, 1), Layout.of_matrix(2, 1))
    >>> H.as_matrix().tolist(), H.transpose().mv(jnp.ones((1, 1))).tolist()
    ([[6.0, 6.0]], [[6.0], [6.0]])
    """

    Q: Array
    Z_row: Array
    Z_column: Array
    G_row: Array | None
    S: Array | None
    factor: Array
    row_layout: Layout = dataclasses.field(metadata={"static": True})
    column_layout: Layout = dataclasses.field(metadata={"static": True})
    flipped: bool = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        Q: Array,
        Z_row: Array,
        Z_column: Array,
        row_layout: Layout,
        column_layout: Layout,
        G_row: Array | None = None,
        S: Array | None = None,
        factor: Any = 1,
        *,
        flipped: bool = False,
        tags: Any = (),
    ):
        (r, m_j, m_k), n_j, n_k = Q.shape, Z_row.shape[1], Z_column.shape[1]
        fits = len(Z_row) == len(Z_column) == r and (G_row is None) == (S is None)
        fits = fits and (S is None or S.shape in ((r, n_j, m_k), (r, n_j))) and (G_row is None or G_row.shape == (r, m_j))
        fits = fits and (row_layout.m, row_layout.n, column_layout.m, column_layout.n) == (m_j, n_j, m_k, n_k)
        if not fits:
            shapes = [None if a is None else a.shape for a in (Q, Z_row, Z_column, G_row, S)]
            raise InputError(f"KroneckerCross: the shapes of Q, Z_row, Z_column, G_row, S do not fit: {shapes}")
        self.Q, self.Z_row, self.Z_column, self.G_row, self.S = Q, Z_row, Z_column, G_row, S
        self.row_layout, self.column_layout, self.flipped = row_layout, column_layout, flipped
        self.factor = as_scalar("KroneckerCross", factor, Q.dtype)
        self.tags = as_tags(tags)

    def in_structure(self):
        return jax.ShapeDtypeStruct((self.row_layout if self.flipped else self.column_layout).shape, self.Q.dtype)

    def out_structure(self):
        return jax.ShapeDtypeStruct((self.column_layout if self.flipped else self.row_layout).shape, self.Q.dtype)

    def mv(self, vector):
        check_vector("KroneckerCross", vector, self.in_structure().shape)
        return _product(self, jnp.asarray(vector, self.Q.dtype))

    def as_matrix(self):
        check_operator_fits(self, instead="mv or frobenius_norm()")
        matrix = _dense(self)
        return matrix.T if self.flipped else matrix

    def transpose(self):
        return dataclasses.replace(self, flipped=not self.flipped, tags=transposed_tags(self.tags))

    def scaled(self, factor):
        scaled = self.factor * as_scalar("KroneckerCross", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def __repr__(self):
        kept = [f"Q {self.Q.shape}"] + ([] if self.S is None else [f"S {self.S.shape}"])
        return describe(self, *kept)


@jax.jit
def _product(block: KroneckerCross, vector: Array) -> Array:
    scale = block.factor / len(block.Q)
    S, g = block.S, block.G_row
    if block.flipped:
        X = block.row_layout.to_matrix(vector)
        pulled = einsum("rip,ri->rp", block.Q, matmul(block.Z_row, X.T))
        if S is not None and g is not None:
            pulled = pulled + (matmul(g, X) * S if S.ndim == 2 else einsum("rqp,rq->rp", S, matmul(g, X)))
        return block.column_layout.from_matrix(scale * matmul(pulled.T, block.Z_column))
    pushed = matmul(block.Z_column, block.column_layout.to_matrix(vector).T)
    product = matmul(einsum("rip,rp->ri", block.Q, pushed).T, block.Z_row)
    if S is not None and g is not None:
        product = product + matmul(g.T, pushed * S if S.ndim == 2 else einsum("rqp,rp->rq", S, pushed))
    return block.row_layout.from_matrix(scale * product)


@jax.jit
def _dense(block: KroneckerCross) -> Array:
    (_, m_j, m_k), n_j, n_k = block.Q.shape, block.Z_row.shape[1], block.Z_column.shape[1]
    matrix = jax.lax.map(rows_of_unit(block), jnp.arange(m_j)).reshape(m_j * n_j, m_k * n_k)
    matrix = _reordered(matrix, block.row_layout)
    return _reordered(matrix.T, block.column_layout).T if not block.column_layout.is_plain else matrix


def rows_of_unit(block: KroneckerCross) -> Callable[[Array], Array]:
    """The rows (i, q) of the dense form for one i, not flipped and in the order of vec(W) on both sides, as a function of i
    giving (n_j, m_k n_k)."""
    (r, m_j, m_k), n_j, n_k = block.Q.shape, block.Z_row.shape[1], block.Z_column.shape[1]
    Z_column = block.Z_column * (block.factor / r)
    # Of all n_j n_k products z z^T there are r, fewer numbers than the result has; if not, those of one Q[i] at a time.
    few = r <= m_j * m_k
    ZZ = (block.Z_row[:, :, None] * Z_column[:, None, :]).reshape(r, n_j * n_k) if few else None

    def rows(i: Array) -> Array:
        Q_i = jax.lax.dynamic_index_in_dim(block.Q, i, 1, keepdims=False)
        if ZZ is not None:
            part = jnp.swapaxes(matmul(Q_i.T, ZZ).reshape(m_k, n_j, n_k), 0, 1)
        else:
            part = matmul((block.Z_row[:, :, None] * Q_i[:, None, :]).reshape(r, n_j * m_k).T, Z_column)
            part = part.reshape(n_j, m_k, n_k)
        if block.S is None or block.G_row is None:
            return part.reshape(n_j, m_k * n_k)
        gz = jax.lax.dynamic_index_in_dim(block.G_row, i, 1) * Z_column
        if block.S.ndim == 2:
            part = part + jnp.eye(n_j, dtype=part.dtype)[:, :, None] * matmul(block.S.T, gz)[:, None, :]
        else:
            part = part + jnp.moveaxis(matmul(gz.T, block.S.reshape(r, n_j * m_k)).reshape(n_k, n_j, m_k), 0, 2)
        return part.reshape(n_j, m_k * n_k)

    return rows


def _reordered(matrix: Array, layout: Layout) -> Array:
    """Rows in the order of vec(W) brought to that of the parameter."""
    if layout.is_plain:
        return matrix
    order = layout.from_matrix(jnp.arange(layout.m * layout.n).reshape(layout.m, layout.n)).reshape(-1)
    return matrix[order]
