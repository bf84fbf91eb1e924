"""A registry of operators, each with the dense matrix it stands for; every case enters every test of `test_algebra.py`."""

import jax
import lineax as lx
import numpy as np
import pytest

from jaxhess import operators as ops

CASES = {}


def case(build):
    """Register `build(rng) -> (operator, dense matrix in row-major order)` under its name."""
    CASES[build.__name__] = build
    return build


def symmetric(rng, *shape):
    a = rng.standard_normal(shape)
    return a + np.swapaxes(a, -1, -2)


def mean_of_krons(Q, Z):
    return sum(np.kron(q, np.outer(z, z)) for q, z in zip(Q, Z, strict=True)) / len(Q)


def reordered(matrix, layout):
    """`matrix` over vec(W) as one over the parameter's entries, by the positions that the layout gives them."""
    position = np.asarray(layout.to_matrix(np.arange(matrix.shape[0]).reshape(layout.shape))).reshape(-1)
    out = np.zeros_like(matrix)
    out[np.ix_(position, position)] = matrix
    return out


@case
def dense(rng):
    a = symmetric(rng, 6, 6)
    return ops.Dense(a, (2, 3)), a


@case
def diagonal(rng):
    values = rng.standard_normal((2, 3))
    return ops.Diagonal(values), np.diag(values.reshape(-1))


@case
def zero(rng):
    return ops.Diagonal(np.zeros((3,))), np.zeros((3, 3))


@case
def kronecker_product(rng):
    A, B = rng.standard_normal((3, 3)), rng.standard_normal((2, 2))
    return ops.KroneckerProduct(A, B), np.kron(A, B)


@case
def kronecker_product_symmetric_transposed(rng):
    A, B, layout = symmetric(rng, 3, 3), symmetric(rng, 2, 2), ops.Layout.transposed(3, 2)
    return ops.KroneckerProduct(A, B, layout, tags=lx.symmetric_tag), reordered(np.kron(A, B), layout)


@case
def kronecker_sum_short(rng):
    Q, Z = symmetric(rng, 2, 4, 4), rng.standard_normal((2, 5))
    return ops.KroneckerProductSum(Q, Z), mean_of_krons(Q, Z)


@case
def kronecker_sum_long_transposed(rng):
    Q, Z, layout = symmetric(rng, 7, 3, 3), rng.standard_normal((7, 2)), ops.Layout.transposed(3, 2)
    return ops.KroneckerProductSum(Q, Z, layout), reordered(mean_of_krons(Q, Z), layout)


@case
def kronecker_sum_heads(rng):
    layout = ops.Layout(shape=(3, 4, 2), sizes=(3, 4, 2), rows=(2, 0), columns=(1,))
    Q, Z = symmetric(rng, 3, 6, 6), rng.standard_normal((3, 4))
    return ops.KroneckerProductSum(Q, Z, layout), reordered(mean_of_krons(Q, Z), layout)


@case
def kronecker_sum_one(rng):
    Q, Z = symmetric(rng, 1, 4, 4), rng.standard_normal((1, 3))
    return ops.KroneckerProductSum(Q, Z), mean_of_krons(Q, Z)


def cross_term(rng, **options):
    """Two uses of one (2, 3) parameter: (1/r) sum_r Q[r, i, p] z[r, q] y[r, s]."""
    Q, z, y = rng.standard_normal((4, 2, 2)), rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    operator = ops.ContractionOperator((Q, z, y), ("rip", "rq", "rs"), "iq", "ps", (2, 3), 1 / 4, **options)
    return operator, np.einsum("rip,rq,rs->iqps", Q, z, y).reshape(6, 6) / 4


@case
def contraction(rng):
    return cross_term(rng)


@case
def contraction_symmetrised(rng):
    operator, matrix = cross_term(rng, symmetrised=True)
    return operator, matrix + matrix.T


@case
def contraction_refined(rng):
    # A (4, 3) parameter indexed as (2, 2, 3), summed over places u and v as a convolution's is.
    Q, z = rng.standard_normal((2, 5, 2, 5, 2)), rng.standard_normal((2, 5, 2, 3))
    operator = ops.ContractionOperator(
        (Q, z, z), [(0, 1, 2, 3, 4), (0, 1, 5, 6), (0, 3, 7, 8)], (5, 2, 6), (7, 4, 8), (4, 3), symmetrised=True
    )
    matrix = np.einsum("ruavb,ruik,rvjl->iakjbl", Q, z, z).reshape(12, 12)
    return operator, matrix + matrix.T


@case
def operator_sum(rng):
    first, a = kronecker_sum_short(rng)
    values = rng.standard_normal((4, 5))
    return first + ops.Diagonal(values) + first, 2 * a + np.diag(values.reshape(-1))


@case
def operator_sum_general(rng):
    (first, a), (second, b) = kronecker_product(rng), kronecker_product(rng)
    return first + second, a + b


@case
def low_rank(rng):
    left, right = rng.standard_normal((4, 2)), rng.standard_normal((3, 2))
    return ops.LowRank(left, right), left @ right.T


@case
def low_rank_square(rng):
    left, right = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    return ops.LowRank(left, right), left @ right.T


@case
def low_rank_symmetric(rng):
    left = rng.standard_normal((3, 2))
    return ops.LowRank(left, left, tags=lx.positive_semidefinite_tag), left @ left.T


@case
def block_diagonal(rng):
    (w, a), (b, c) = kronecker_sum_long_transposed(rng), dense(rng)
    blocks = {"layer": {"w": w, "b": b}, "alpha": [ops.Diagonal(np.array([1.0, 2.0]))]}
    matrix = np.zeros((14, 14))
    matrix[:2, :2], matrix[2:8, 2:8], matrix[8:, 8:] = np.diag([1.0, 2.0]), c, a
    return ops.BlockDiagonal(blocks), matrix


@case
def block_diagonal_general(rng):
    (w, a), (v, b) = kronecker_product(rng), diagonal(rng)
    matrix = np.zeros((12, 12))
    matrix[:6, :6], matrix[6:, 6:] = a, b
    return ops.BlockDiagonal((w, v)), matrix


@pytest.fixture(params=CASES)
def pair(request):
    """An operator and its dense matrix."""
    return CASES[request.param](np.random.default_rng(0))


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.fixture
def helpers():
    """`symmetric`, `mean_of_krons`, `reordered`, `like` for the test modules."""
    return HELPERS


def like(operator, rng, batch=()):
    """A random input of the operator, with leading axes `batch`."""
    return jax.tree.map(lambda s: jax.numpy.asarray(rng.standard_normal(batch + s.shape)), operator.in_structure())


class HELPERS:
    symmetric = staticmethod(symmetric)
    mean_of_krons = staticmethod(mean_of_krons)
    reordered = staticmethod(reordered)
    like = staticmethod(like)
