"""Kronecker products of small matrices: one, and the mean of a batch of them.

With the row-major vec, `vec(X) = X.reshape(-1)`, and X of W's shape (m, n):

    kron(A, B) vec(X) = vec(A X B^T)                                                (45)

The Hessian of a batch with respect to the weight of `y_i = W z_i`, `Q_i = d2E_i/dy_i2` (section 3 of the mathematics):

    H = (1/r) sum_i kron(Q_i, z_i z_i^T)            Q (r, m, m), Z (r, n)
    mv(X) = (1/r) sum_i (Q_i X z_i) z_i^T           diagonal = (1/r) sum_i diag(Q_i) (z_i * z_i)^T
    trace = (1/r) sum_i tr(Q_i) ||z_i||^2           ||H||_F^2 = (1/r^2) sum_ij <Q_i, Q_j> (z_i . z_j)^2

With the thin QR factorisation `Z^T = P R`, `H = (I ⊗ P) M (I ⊗ P)^T` with `M = (1/r) sum_i kron(Q_i, R_i R_i^T)`, R_i
the column i of R: the eigenvalues of H are those of M, and zeros. For r = 1 they are

    ||z||^2 λ_i(Q), i = 1..m,  and 0, m(n-1) times                                  (46)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from jaxhess._linalg import PRECISION, check_dense_fits, einsum, matmul, symmetrise
from jaxhess._typing import Array, Float, InputError
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.coarse import KroneckerGuess, kronecker_guess
from jaxhess.operators.eigen import Eigen
from jaxhess.operators.layout import Layout
from jaxhess.operators.mapped import count_signs, require_symmetric
from jaxhess.operators.reduction import KroneckerColumns, OuterColumns, Reduction
from jaxhess.operators.support import (
    as_real_arrays,
    as_scalar,
    as_tags,
    check_operator_fits,
    check_vector,
    describe,
    scaled_tags,
    shape_text,
    transposed_tags,
)


class KroneckerProduct(CurvatureOperator):
    """kron(A, B) with A (m, m) and B (n, n): X of W's shape goes to A X B^T, equation (45).

    `layout` says how the parameter is read as W, by default as (m, n). Symmetric only if its `tags` say so, which then
    vouches for A and B each. Raises `InputError` for factors that are not square or do not fit the layout.

    >>> import jax.numpy as jnp
    >>> H = KroneckerProduct(jnp.array([[2.0]]), jnp.array([[1.0, 0.0], [0.0, 3.0]]))
    >>> H.mv(jnp.array([[1.0, 1.0]])).tolist()
    [[2.0, 6.0]]
    """

    A: Float[Array, "m m"]
    B: Float[Array, "n n"]
    layout: Layout = dataclasses.field(metadata={"static": True})

    def __init__(self, A: Array, B: Array, layout: Layout | None = None, tags: Any = ()):
        A, B = as_real_arrays("KroneckerProduct", ["A", "B"], [A, B])
        for name, factor in (("A", A), ("B", B)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                raise InputError(f"KroneckerProduct: {name} must be a square matrix, got shape {factor.shape}")
        self.A, self.B = A, B
        self.layout = _checked_layout("KroneckerProduct", layout, A.shape[0], B.shape[0])
        self.tags = as_tags(tags)

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.layout.shape, self.A.dtype)

    def mv(self, vector):
        check_vector("KroneckerProduct", vector, self.layout.shape)
        X = self.layout.to_matrix(vector)
        return self.layout.from_matrix(matmul(matmul(self.A, X), self.B.T))

    def as_matrix(self):
        check_operator_fits(self)
        return self.layout.reorder(jnp.kron(self.A, self.B))

    def transpose(self):
        if lx.is_symmetric(self):
            return self
        return KroneckerProduct(self.A.T, self.B.T, self.layout, transposed_tags(self.tags))

    def diagonal(self):
        return self.layout.from_matrix(jnp.outer(jnp.diagonal(self.A), jnp.diagonal(self.B)))

    def trace(self):
        return jnp.trace(self.A) * jnp.trace(self.B)

    def frobenius_norm(self):
        return jnp.linalg.norm(self.A) * jnp.linalg.norm(self.B)

    def scaled(self, factor):
        A = self.A * as_scalar("KroneckerProduct", factor, self.A.dtype)
        return KroneckerProduct(A, self.B, self.layout, scaled_tags(self.tags, factor))

    def eigvalsh(self):
        require_symmetric(self, "eigvalsh")
        return jnp.sort(jnp.outer(jnp.linalg.eigvalsh(self.A), jnp.linalg.eigvalsh(self.B)).reshape(-1))

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def _eigen(self):
        return _product_eigen(self)

    def _held(self):
        return "its factors are diagonalised"

    def __repr__(self):
        return describe(self, f"A {shape_text(self.A)}", f"B {shape_text(self.B)}")


class KroneckerProductSum(CurvatureOperator):
    """H = (1/r) sum_i kron(Q_i, z_i z_i^T): the exact Hessian of a batch's mean error with respect to a weight.

    `Q` (r, m, m), each Q_i symmetric (trusted), and `Z` (r, n), r >= 1; `layout` says how the parameter is read as W
    (m, n). The (mn, mn) array is formed by `as_matrix` only. Tag it positive semidefinite where every Q_i is. Raises
    `InputError` for other shapes. Source: Naumov (2017), Theorem 1; a batch as in section 3 of the mathematics.

    >>> import jax.numpy as jnp
    >>> H = KroneckerProductSum(Q=jnp.array([[[2.0]], [[4.0]]]), Z=jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> H.as_matrix().tolist()
    [[3.0, 2.0], [2.0, 2.0]]
    >>> H.mv(jnp.array([[1.0, -1.0]])).tolist()
    [[1.0, 0.0]]
    >>> [int(count) for count in H.inertia()]
    [2, 0, 0]
    """

    Q: Float[Array, "r m m"]
    Z: Float[Array, "r n"]
    layout: Layout = dataclasses.field(metadata={"static": True})

    def __init__(self, Q: Array, Z: Array, layout: Layout | None = None, tags: Any = ()):
        Q, Z = as_real_arrays("KroneckerProductSum", ["Q", "Z"], [Q, Z])
        if Q.ndim != 3 or Z.ndim != 2 or Q.shape[1] != Q.shape[2] or Q.shape[0] != Z.shape[0] or Z.shape[0] == 0:
            raise InputError(f"KroneckerProductSum: needs Q (r, m, m) and Z (r, n) with r >= 1, got {Q.shape} and {Z.shape}")
        self.Q, self.Z = Q, Z
        self.layout = _checked_layout("KroneckerProductSum", layout, Q.shape[1], Z.shape[1])
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.layout.shape, self.Q.dtype)

    def mv(self, vector):
        check_vector("KroneckerProductSum", vector, self.layout.shape)
        return self.layout.from_matrix(_product(self.Q, self.Z, self.layout.to_matrix(vector)))

    def as_matrix(self):
        check_operator_fits(self)
        return self.layout.reorder(_dense(self.Q, self.Z))

    def transpose(self):
        return self

    def diagonal(self):
        diagonals = jnp.diagonal(self.Q, axis1=1, axis2=2)
        return self.layout.from_matrix(matmul(diagonals.T, self.Z**2) / self.Q.shape[0])

    def trace(self):
        traces = jnp.sum(jnp.diagonal(self.Q, axis1=1, axis2=2), axis=1)
        return jnp.sum(traces * jnp.sum(self.Z**2, axis=1)) / self.Q.shape[0]

    def frobenius_norm(self):
        return _frobenius_norm(self.Q, self.Z)

    def scaled(self, factor):
        Q = self.Q * as_scalar("KroneckerProductSum", factor, self.Q.dtype)
        return KroneckerProductSum(Q, self.Z, self.layout, scaled_tags(self.tags, factor))

    def eigvalsh(self):
        eigenvalues = self._reduced_eigenvalues()
        zeros = jnp.zeros(self.in_size() - eigenvalues.size, eigenvalues.dtype)
        return jnp.sort(jnp.concatenate([eigenvalues, zeros]))

    def inertia(self, tolerance=None):
        return count_signs(self._reduced_eigenvalues(), self.in_size(), tolerance)

    def _reduced_eigenvalues(self) -> Float[Array, "k"]:
        """The eigenvalues but for those m(n - min(n, r)) that are zero whatever the numbers."""
        check_dense_fits("KroneckerProductSum", self._reduced_size(), self._reduced_size(), self.Q.dtype.itemsize, "Use mv.")
        return jnp.linalg.eigvalsh(self._reduction().matrix)

    def _reduced_size(self):
        r, n = self.Z.shape
        return self.layout.m * min(r, n)

    def _reduction(self):
        check_dense_fits("KroneckerProductSum", self._reduced_size(), self._reduced_size(), self.Q.dtype.itemsize, "Use mv.")
        return _reduced(self)

    def _per_example(self, function, what):
        return _of_examples(self, function)

    def _start(self):
        guess, Z = _guess(self)
        # Outside of the `jit`, which would copy Q.
        return dataclasses.replace(
            guess, turned=KroneckerProductSum(self.Q, Z, Layout.transposed(self.layout.m, self.layout.n))
        )

    def __repr__(self):
        r = shape_text(self.Z).strip("()").split(",")[0]
        return describe(self, f"r={r}", f"Q {shape_text(self.Q)}", f"Z {shape_text(self.Z)}")


def _checked_layout(what: str, layout: Layout | None, m: int, n: int) -> Layout:
    if layout is None:
        return Layout.of_matrix(m, n)
    if (layout.m, layout.n) != (m, n):
        raise InputError(f"{what}: the factors belong to a {m} x {n} matrix, the layout describes {layout.m} x {layout.n}")
    return layout


def _product(Q: Array, Z: Array, X: Array) -> Array:
    # Written axis by axis so that `vmap` over X widens the same three products, each in the order of its operands in
    # memory: (r, n) x (n, m), r times 1 x m x m, (n, r) x (r, m). What gets transposed has X's size, never Q's.
    Y = jax.lax.dot_general(Z, X.T, (((1,), (0,)), ((), ())), precision=PRECISION)
    V = jax.lax.dot_general(Y, Q, (((1,), (1,)), ((0,), (0,))), precision=PRECISION)
    return jax.lax.dot_general(Z.T, V, (((1,), (0,)), ((), ())), precision=PRECISION).T / Q.shape[0]


@jax.jit
def _reduced(operator: KroneckerProductSum) -> Reduction:
    (r, n), m, Z = operator.Z.shape, operator.layout.m, operator.Z
    if r == 1:  # (46)
        norm = jnp.linalg.norm(Z)
        P = (Z / jnp.where(norm > 0, norm, 1)).T if n > 1 else jnp.ones((1, 1), Z.dtype)
        # Where z is zero any direction will do: M is zero.
        P = jnp.where(norm > 0, P, jnp.zeros_like(P).at[0].set(1))
        return Reduction(KroneckerColumns(P, operator.layout), norm**2 * operator.Q[0])
    if r >= n:
        P, R = jnp.eye(n, dtype=Z.dtype), Z.T
    else:  # no rank is detected: where Z has dependent rows, M just has the zeros that H has
        P, R = jnp.linalg.qr(Z.T)
    matrix = _dense(operator.Q, R.T).reshape(m * min(r, n), m * min(r, n))
    return Reduction(KroneckerColumns(P, operator.layout), symmetrise(matrix))


@functools.partial(jax.jit, static_argnums=1)
def _of_examples(operator: KroneckerProductSum, function: Callable[[Array], Array]) -> KroneckerProductSum:
    values, vectors = jnp.linalg.eigh(operator.Q)
    Q = matmul(vectors * function(values)[:, None, :], jnp.swapaxes(vectors, 1, 2))
    return KroneckerProductSum(symmetrise(Q), operator.Z, operator.layout, lx.positive_semidefinite_tag)


@jax.jit
def _guess(operator: KroneckerProductSum) -> tuple[KroneckerGuess, Array]:
    """kron(mean of Q, mean of z z^T) by its eigenvectors, and Z in those of its right factor."""
    Q, Z = operator.Q, operator.Z
    guess = kronecker_guess(jnp.mean(Q, axis=0), matmul(Z.T, Z) / Z.shape[0], operator.layout)
    return guess, matmul(Z, guess.column_vectors)


@jax.jit
def _product_eigen(operator: KroneckerProduct) -> Eigen:
    (a, left), (b, right) = jnp.linalg.eigh(operator.A), jnp.linalg.eigh(operator.B)
    columns = OuterColumns(left, right, operator.layout)
    return Eigen(columns, None, jnp.outer(a, b).reshape(-1), None, jnp.zeros((), a.dtype))


@jax.jit
def _dense(Q: Array, Z: Array) -> Array:
    # H[i,q,p,s] = (1/r) sum_r Q[r,i,p] Z[r,q] Z[r,s], one i at a time, in its final order: there is no second
    # array of its size.
    m, n = Q.shape[1], Z.shape[1]
    return jax.lax.map(rows_of_unit(Q, Z), jnp.arange(m)).reshape(m * n, m * n)


def rows_of_unit(Q: Array, Z: Array) -> Callable[[Array], Array]:
    """The rows (i, q) of the dense form for one i, as a function of i giving (n, m, n)."""
    r, m, _ = Q.shape
    return _row_by_symmetry(Q, Z) if m >= 4 and r <= 2 * m * m else _row_by_chunks(Q, Z)


def _row_by_symmetry(Q: Array, Z: Array) -> Callable[[Array], Array]:
    # H[i,q,p,s] is the same with q and s exchanged: half of the products z z^T do. They have r n^2 / 2 entries, which
    # is less than the result has while r < 2 m^2.
    r, n = Z.shape
    half_q, half_s = np.triu_indices(n)
    ZZ = Z[:, half_q] * Z[:, half_s]
    position = np.zeros((n, n), int)
    position[half_q, half_s] = position[half_s, half_q] = np.arange(half_q.size)

    def row(i):
        half = matmul(jax.lax.dynamic_index_in_dim(Q, i, 1, keepdims=False).T, ZZ)
        return jnp.transpose(half[:, position], (1, 0, 2)) / r

    return row


def _row_by_chunks(Q: Array, Z: Array) -> Callable[[Array], Array]:
    # Z^T (Q[:, i] Z) with the products of Q and Z in the bracket formed for some examples at a time.
    (r, m, _), n = Q.shape, Z.shape[1]
    chunk = min(r, max(m * n, 256))
    padding = -r % chunk
    Q_chunks = jnp.pad(Q, ((0, padding), (0, 0), (0, 0))).reshape(-1, chunk, m, m)
    Z_chunks = jnp.pad(Z, ((0, padding), (0, 0))).reshape(-1, chunk, n)

    def row(i):
        def add(total, operands):
            Q_c, Z_c = operands
            QZ = jax.lax.dynamic_index_in_dim(Q_c, i, 1, keepdims=False)[:, :, None] * Z_c[:, None, :]
            return total + matmul(Z_c.T, QZ.reshape(chunk, m * n)), None

        total, _ = jax.lax.scan(add, jnp.zeros((n, m * n), Q.dtype), (Q_chunks, Z_chunks))
        return total.reshape(n, m, n) / r

    return row


@jax.jit
def _frobenius_norm(Q: Array, Z: Array) -> Array:
    r, m, _ = Q.shape

    def terms(pair):
        Q_i, z_i = pair
        return jnp.sum(einsum("rpq,pq->r", Q, Q_i) * matmul(Z, z_i) ** 2)

    squared = jnp.sum(jax.lax.map(terms, (Q, Z), batch_size=max(1, min(r, m * m))))
    return jnp.sqrt(jnp.maximum(squared, 0)) / r
