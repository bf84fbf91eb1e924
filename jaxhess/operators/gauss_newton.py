"""Gauss-Newton and Fisher curvature of one parameter, and of a pair of them, by the Jacobian's factors (math: section 7).

    H = (1/r) sum_i A_i^T B_i A_i           A_i (M, N) as in `jaxhess.operators.jacobian`, B_i = d2E/d(output)2 (M, M)

A product is one with A, one with B and one with A^T. With `B = S S^T` and all rows of A below each other, (rM, N), the
eigenvalues of H other than zero are those of the Gram matrix

    (1/r) S^T K S,       K[(i,c),(j,d)] = A_i[c] . A_j[d],       (V_ic . V_jd)(z_i . z_j) for one vector an example

so that where rM < N nothing of N^2 entries is needed. H is positive semidefinite for every B that is.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, InputError
from jaxhess.operators.base import CurvatureOperator, StructuredOperator
from jaxhess.operators.gram import gram, gram_eigenvalues, gram_is_smaller, gram_norm, gram_reduction, with_zeros
from jaxhess.operators.jacobian import JacobianUse, OutputJacobian, in_chunks, times_curvature
from jaxhess.operators.kronecker import KroneckerProductSum
from jaxhess.operators.layout import Layout
from jaxhess.operators.mapped import count_signs, dense_eigvalsh, mapped_frobenius_norm, require_symmetric
from jaxhess.operators.reduction import dense_reduction
from jaxhess.operators.support import (
    as_scalar,
    as_tags,
    check_operator_fits,
    check_vector,
    describe,
    scaled_tags,
    shape_text,
)

__all__ = ["GaussNewtonBlock", "GaussNewtonCrossBlock", "cross_matrix"]


class GaussNewtonBlock(CurvatureOperator):
    """H = (1/r) sum_i A_i^T B_i A_i for one parameter, `factor` times that.

    `jacobian` is A, its factors `jacobian.uses[j].rows` V (r, M, places.., y) and `.inputs` z (r, places.., z);
    `curvature` is B (r, M, M), its diagonals (r, M), or None for the identity, as of an empirical Fisher matrix (M = 1).
    Positive semidefinite, which trusts B to be. Source: section 7 of the mathematics.

    >>> import jax.numpy as jnp, jaxhess
    >>> G = jaxhess.fisher(lambda w, x: jnp.sum(w @ x))(jnp.ones((2, 3)), jnp.eye(3)).blocks
    >>> type(G).__name__, round(G.trace().item(), 4), [int(count) for count in G.inertia()]
    ('GaussNewtonBlock', 2.0, [3, 0, 3])
    """

    jacobian: OutputJacobian
    curvature: Array | None
    factor: Array

    def __init__(self, jacobian: OutputJacobian, curvature: Array | None, factor: Any = 1, tags: Any = None):
        self.jacobian, self.curvature = jacobian, curvature
        self.factor = as_scalar("GaussNewtonBlock", factor, jacobian.dtype)
        self.tags = as_tags(lx.positive_semidefinite_tag if tags is None else tags) | {lx.symmetric_tag}

    def in_structure(self):
        return self.jacobian.structure

    def mv(self, vector):
        check_vector("GaussNewtonBlock", vector, self.jacobian.shape)
        return _product(self.jacobian, self.jacobian, self.curvature, self.factor, vector)

    def as_matrix(self):
        check_operator_fits(self)
        terms = self.kronecker_terms()
        if terms is not None and self.jacobian.outputs > 1:
            return terms.as_matrix()
        return cross_matrix((self.jacobian,), None, self.curvature, self.factor)

    def kronecker_terms(self) -> KroneckerProductSum | None:
        """The same operator with `Q_i = V_i^T B_i V_i` (r, m, m); None where the parameter is not one matrix that meets one
        vector of each example. Q has m / M times the entries of V."""
        J = self.jacobian
        if J.matrix_sizes is None:
            return None
        V = J.uses[0].rows.reshape(J.examples, J.outputs, -1)
        return kronecker_sum(J.uses[0], pulled_back(V, self.curvature), J.shape, self.factor, self.tags)

    def transpose(self):
        return self

    def diagonal(self):
        return _diagonal(self.jacobian, self.curvature, self.factor)

    def trace(self):
        return jnp.sum(self.diagonal())

    def frobenius_norm(self):
        if gram_is_smaller([self.jacobian], self.in_size()):
            return gram_norm((self.jacobian,), self.curvature, self.factor)
        terms = self.kronecker_terms()
        return mapped_frobenius_norm(self) if terms is None else terms.frobenius_norm()

    def scaled(self, factor):
        scaled = self.factor * as_scalar("GaussNewtonBlock", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self):
        if not gram_is_smaller([self.jacobian], self.in_size()):
            return dense_eigvalsh(self)
        return with_zeros(gram_eigenvalues((self.jacobian,), self.curvature, self.factor), self.in_size())

    def inertia(self, tolerance=None):
        if not gram_is_smaller([self.jacobian], self.in_size()):
            return count_signs(self.eigvalsh(), self.in_size(), tolerance)
        require_symmetric(self, "inertia")
        return count_signs(gram_eigenvalues((self.jacobian,), self.curvature, self.factor), self.in_size(), tolerance)

    def _plan(self) -> str:
        """Which reduced space has the fewest dimensions: "gram", "kronecker" or "dense"."""
        J = self.jacobian
        sizes = {"dense": self.in_size(), "gram": J.examples * J.outputs}
        if J.matrix_sizes is not None:
            m, n = J.matrix_sizes
            sizes["kronecker"] = m * min(n, J.examples)
        return min(sizes, key=lambda name: sizes[name])

    def _reduced_size(self):
        J, plan = self.jacobian, self._plan()
        if plan == "kronecker" and J.matrix_sizes is not None:
            return J.matrix_sizes[0] * min(J.matrix_sizes[1], J.examples)
        return J.examples * J.outputs if plan == "gram" else self.in_size()

    def _reduction(self):
        plan = self._plan()
        if plan == "gram":
            return gram_reduction((self.jacobian,), self.curvature, self.factor, None)
        terms = self.kronecker_terms() if plan == "kronecker" else None
        return dense_reduction(self) if terms is None else terms._reduction()

    def __repr__(self):
        J = self.jacobian
        shapes = ", ".join(shape_text(use.rows) for use in J.uses)
        return describe(self, f"r={J.examples}", f"M={J.outputs}", f"V {shapes}", f"B {shape_text(self.curvature)}")


class GaussNewtonCrossBlock(StructuredOperator):
    """`(1/r) sum_i A_i^T B_i C_i`, A for the parameter of the rows and C for that of the columns: maps an array of the shape
    of the latter to one of the former. It has no diagonal, trace or eigenvalues of its own; asking raises `InputError`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(p, x):
    ...     return p["b"] * jnp.sum(p["w"] @ x)
    >>> F = jaxhess.fisher(error, blocks="full")({"w": jnp.ones((2, 3)), "b": jnp.ones(())}, jnp.eye(3))
    >>> F["w"]["b"].mv(jnp.ones(())).shape, F["w"]["b"].as_matrix().shape
    ((2, 3), (6, 1))
    """

    rows: OutputJacobian
    columns: OutputJacobian
    curvature: Array | None
    factor: Array

    def __init__(
        self, rows: OutputJacobian, columns: OutputJacobian, curvature: Array | None, factor: Any = 1, tags: Any = ()
    ):
        self.rows, self.columns, self.curvature = rows, columns, curvature
        self.factor = as_scalar("GaussNewtonCrossBlock", factor, jnp.result_type(rows.dtype, columns.dtype))
        self.tags = as_tags(tags)

    def in_structure(self):
        return self.columns.structure

    def out_structure(self):
        return self.rows.structure

    def mv(self, vector):
        check_vector("GaussNewtonCrossBlock", vector, self.columns.shape)
        return _product(self.rows, self.columns, self.curvature, self.factor, vector)

    def as_matrix(self):
        check_operator_fits(self, instead="mv or frobenius_norm()")
        return cross_matrix((self.rows,), (self.columns,), self.curvature, self.factor)

    def transpose(self):
        return GaussNewtonCrossBlock(self.columns, self.rows, self.curvature, self.factor)

    def diagonal(self):
        raise InputError("GaussNewtonCrossBlock.diagonal: a block of two parameters has none; take as_matrix() apart")

    def trace(self):
        raise InputError("GaussNewtonCrossBlock.trace: a block of two parameters has none; take as_matrix() apart")

    def frobenius_norm(self):
        if gram_is_smaller([self.rows, self.columns], min(self.in_size(), self.out_size())):
            return _cross_norm(self.rows, self.columns, self.curvature, self.factor)
        narrow = self if self.in_size() <= self.out_size() else self.transpose()
        return mapped_frobenius_norm(narrow)

    def scaled(self, factor):
        scaled = self.factor * as_scalar("GaussNewtonCrossBlock", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def _plus(self, other):
        return None

    def __repr__(self):
        return describe(self, f"r={self.rows.examples}", f"M={self.rows.outputs}", f"B {shape_text(self.curvature)}")


def kronecker_sum(use: JacobianUse, Q: Array, shape: Sequence[int], factor: Any, tags: Any) -> KroneckerProductSum:
    """The operator of a single use with one vector an example, Q (r, m, m)."""
    labels = use.labels
    assert use.inputs is not None
    assert labels.input is not None
    first = min(labels.weight, default=0)
    rows, columns = (tuple(label - first for label in side) for side in (labels.output, labels.input))
    layout = Layout(tuple(shape), labels.weight_sizes, rows, columns)
    Z = use.inputs.reshape(use.inputs.shape[0], math.prod(labels.input_sizes))
    return KroneckerProductSum(Q * (factor * use.scale**2).astype(Q.dtype), Z, layout, tags)


def pulled_back(V: Array, curvature: Array | None) -> Array:
    """`Q_i = V_i^T B_i V_i` (r, m, m) from V (r, M, m)."""
    return symmetrise(matmul(jnp.swapaxes(V, 1, 2), times_curvature(curvature, V)))


# Compiled here once for each structure: called outside of a user's `jit`, their loops would be compiled every time.


@jax.jit
def _product(rows: OutputJacobian, columns: OutputJacobian, curvature: Array | None, factor: Array, vector: Array) -> Array:
    curved = (factor / rows.examples) * times_curvature(curvature, columns.push(vector))
    return rows.pull(curved.astype(rows.dtype))


@jax.jit
def _diagonal(jacobian: OutputJacobian, curvature: Array | None, factor: Array) -> Array:
    return (factor / jacobian.examples) * jacobian.diagonal(curvature)


@jax.jit
def cross_matrix(
    rows: tuple[OutputJacobian, ...], columns: tuple[OutputJacobian, ...] | None, curvature: Array | None, factor: Array
) -> Array:
    """The dense `(factor/r) sum_i A_i^T B_i C_i` for parameters side by side, a product for each chunk of examples; the
    columns' are the rows' if None."""
    r, M = rows[0].examples, rows[0].outputs
    chunk = max(1, min(J.chunk() for J in (*rows, *(columns or ()))) // max(len(rows), len(columns or ())))

    def some(start: Any, count: int) -> Array:
        left = jnp.concatenate([J.some(start, count).dense() for J in rows], axis=2)
        right = left if columns is None else jnp.concatenate([J.some(start, count).dense() for J in columns], axis=2)
        B = None if curvature is None else jax.lax.dynamic_slice_in_dim(curvature, start, count)
        left, right = left.reshape(count * M, -1), times_curvature(B, right).reshape(count * M, -1)
        return matmul(left.T, right) if columns is not None else _upper_part(left, right)

    matrix = (factor / r) * in_chunks(some, r, chunk)
    return matrix if columns is not None else jnp.triu(matrix) + jnp.triu(matrix, 1).T


def _upper_part(left: Array, right: Array) -> Array:
    """`left^T right` in strips from the diagonal on: a symmetric product for a little more than half the work."""
    size = left.shape[1]
    count = max(1, min(8, size // 128))
    ends = [size * n // count for n in range(count + 1)]
    strips = [
        jnp.pad(matmul(left[:, start:end].T, right[:, start:]), ((0, 0), (start, 0)))
        for start, end in itertools.pairwise(ends)
    ]
    return jnp.concatenate(strips)


@jax.jit
def _cross_norm(rows: OutputJacobian, columns: OutputJacobian, curvature: Array | None, factor: Array) -> Array:
    left, right = (times_curvature(curvature, gram([J])) for J in (rows, columns))
    size = rows.examples * rows.outputs
    squared = jnp.sum(left.reshape(size, size) * right.reshape(size, size).T)
    return jnp.abs(factor) / rows.examples * jnp.sqrt(jnp.maximum(squared, 0))
