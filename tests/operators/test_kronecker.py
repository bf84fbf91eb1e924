"""Sums of Kronecker products over the whole range of shapes, and what is special to them."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhess._typing import DenseTooLargeError, InputError
from jaxhess.operators import KroneckerProduct, KroneckerProductSum, Layout, OperatorSum

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def random_sum(seed, r, m, n, zero_rows=0):
    rng = np.random.default_rng(seed)
    Q, Z = rng.standard_normal((r, m, m)), rng.standard_normal((r, n))
    Q = Q + np.swapaxes(Q, 1, 2)
    Z[:zero_rows] = 0
    return Q, Z, sum(np.kron(q, np.outer(z, z)) for q, z in zip(Q, Z, strict=True)) / r


def reordered(matrix, layout):
    position = np.asarray(layout.to_matrix(jnp.arange(matrix.shape[0]).reshape(layout.shape))).reshape(-1)
    out = np.zeros_like(matrix)
    out[np.ix_(position, position)] = matrix
    return out


@settings(max_examples=15)
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 9),
    st.booleans(),
)
def test_any_shape(seed, r, m, n, zero_rows, transposed):
    Q, Z, matrix = random_sum(seed, r, m, n, zero_rows)
    layout = Layout.transposed(m, n) if transposed else Layout.of_matrix(m, n)
    X = np.random.default_rng(seed).standard_normal((m, n))

    @jax.jit
    def everything(Q, Z, X):
        H = KroneckerProductSum(Q, Z, layout)
        numbers = H.frobenius_norm(), H.trace(), H.eigvalsh()
        return numbers, layout.to_matrix(H.mv(layout.from_matrix(X))), layout.to_matrix(H.diagonal()), H.as_matrix()

    (norm, trace, eigenvalues), product, diagonal, dense = everything(Q, Z, X)
    np.testing.assert_allclose(product.reshape(-1), matrix @ X.reshape(-1), **TOLERANCE)
    np.testing.assert_allclose(diagonal.reshape(-1), np.diag(matrix), **TOLERANCE)
    np.testing.assert_allclose(norm, np.linalg.norm(matrix), **TOLERANCE)
    np.testing.assert_allclose(trace, np.trace(matrix), **TOLERANCE)
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(matrix), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(dense, reordered(matrix, layout), **TOLERANCE)


@pytest.mark.parametrize(
    ("r", "m", "n"), [(1, 1, 1), (3, 1, 4), (3, 4, 1), (1, 5, 6), (4, 5, 4), (300, 2, 1), (700, 5, 3), (600, 3, 2)]
)
def test_dense_form_by_either_way(r, m, n):
    Q, Z, matrix = random_sum(0, r, m, n)
    np.testing.assert_allclose(KroneckerProductSum(Q, Z).as_matrix(), matrix, **TOLERANCE)


def test_vec_is_row_major(rng):
    Q, Z, _ = random_sum(1, 1, 3, 4)
    X = rng.standard_normal((3, 4))
    kron = np.kron(Q[0], np.outer(Z[0], Z[0]))
    np.testing.assert_allclose(kron @ X.reshape(-1), (Q[0] @ X @ np.outer(Z[0], Z[0])).reshape(-1), **TOLERANCE)
    np.testing.assert_allclose(KroneckerProductSum(Q, Z).as_matrix(), kron, **TOLERANCE)


def test_equation_45(rng):
    A, B, X = rng.standard_normal((3, 3)), rng.standard_normal((4, 4)), rng.standard_normal((3, 4))
    H = KroneckerProduct(A, B)
    np.testing.assert_allclose(H.mv(X), A @ X @ B.T, **TOLERANCE)
    np.testing.assert_allclose(H.as_matrix() @ X.reshape(-1), (A @ X @ B.T).reshape(-1), **TOLERANCE)


def test_equation_46():
    Q, Z, matrix = random_sum(2, 1, 4, 5)
    H = KroneckerProductSum(Q, Z)
    expected = np.sort(np.concatenate([np.sum(Z**2) * np.linalg.eigvalsh(Q[0]), np.zeros(4 * (5 - 1))]))
    np.testing.assert_allclose(H.eigvalsh(), expected, **TOLERANCE)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), expected, rtol=1e-12, atol=1e-12)
    positive = int(np.sum(np.linalg.eigvalsh(Q[0]) > 0))
    assert [int(c) for c in H.inertia()] == [positive, 4 - positive, 4 * (5 - 1)]


def test_few_eigenvalues_of_a_large_operator():
    # r = 1: an m x m eigenproblem, where the dense form would have 10^12 entries.
    Q, Z, _ = random_sum(3, 1, 3, 2)
    H = KroneckerProductSum(Q, np.tile(Z, (1, 100_000)))
    assert sum(int(c) for c in H.inertia()) == H.in_size() == 600_000
    assert H.eigvalsh().shape == (600_000,)


def test_dependent_and_zero_inputs():
    Q, Z, _ = random_sum(4, 3, 2, 6)
    Z[1], Z[2] = 2 * Z[0], 0
    matrix = sum(np.kron(q, np.outer(z, z)) for q, z in zip(Q, Z, strict=True)) / 3
    H = KroneckerProductSum(Q, Z)
    np.testing.assert_allclose(H.eigvalsh(), np.linalg.eigvalsh(matrix), **TOLERANCE)
    assert int(H.inertia().zero) == 12 - 2
    assert [int(c) for c in KroneckerProductSum(Q, 0 * Z).inertia()] == [0, 0, 12]


def test_dense_form_needs_no_second_array_of_its_size():
    Q, Z, _ = random_sum(5, 64, 32, 32)
    compiled = jax.jit(lambda Q, Z: KroneckerProductSum(Q, Z).as_matrix()).lower(Q, Z).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 2


@pytest.mark.parametrize("method", ["mv", "diagonal", "trace", "frobenius_norm"])
def test_closed_forms_never_build_the_matrix(method):
    Q, Z, _ = random_sum(6, 2, 16, 2)
    Z = np.tile(Z, (1, 100))

    def call(H, X):
        return H.mv(X) if method == "mv" else getattr(H, method)()

    H = KroneckerProductSum(Q, Z)
    compiled = jax.jit(call).lower(H, jnp.ones((16, 200))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < H.dense_bytes / 100


def test_too_large_is_refused():
    H = KroneckerProductSum(np.ones((1, 2000, 2000), np.float32), np.ones((1, 3000), np.float32))
    with pytest.raises(DenseTooLargeError, match=r"KroneckerProductSum: the dense 6000000 x 6000000 form.*Call mv"):
        H.as_matrix()
    assert H.dense_bytes == 4 * 6_000_000**2
    assert "instead of 131.0 TiB" in repr(H)


def test_repr():
    H = KroneckerProductSum(np.ones((256, 64, 64), np.float32), np.ones((256, 64), np.float32))
    expected = "4096 x 4096, r=256, Q (256, 64, 64), Z (256, 64), 4.1 MiB instead of 64.0 MiB"
    assert repr(H) == f"KroneckerProductSum({expected})"


def test_sum_of_two_stays_a_sum():
    Q, Z, matrix = random_sum(7, 3, 2, 3)
    H = KroneckerProductSum(Q, Z, tags=lx.positive_semidefinite_tag)
    assert isinstance(H + H, OperatorSum)
    assert len((H + (H + H)).terms) == 3
    assert lx.is_positive_semidefinite(H + H)
    np.testing.assert_allclose((H + H * 2).as_matrix(), 3 * matrix, **TOLERANCE)


def test_float32_is_kept():
    Q, Z, matrix = random_sum(8, 5, 3, 4)
    H = KroneckerProductSum(Q.astype(np.float32), Z.astype(np.float32)) * 2.0
    X = jnp.ones((3, 4), jnp.float32)
    for array in (H.mv(X), H.as_matrix(), H.diagonal(), H.trace(), H.frobenius_norm(), H.eigvalsh()):
        assert array.dtype == jnp.float32
    np.testing.assert_allclose(H.as_matrix(), 2 * matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("Q", "Z"), [((3, 2, 2), (4, 5)), ((3, 2, 1), (3, 5)), ((2, 2), (3, 5)), ((3, 2, 2), (5,)), ((0, 2, 2), (0, 5))]
)
def test_wrong_factors_are_refused(Q, Z):
    with pytest.raises(InputError, match=r"KroneckerProductSum: needs Q \(r, m, m\) and Z \(r, n\) with r >= 1, got"):
        KroneckerProductSum(np.ones(Q), np.ones(Z))


def test_other_refusals():
    with pytest.raises(InputError, match=r"A must be a square matrix, got shape \(2, 3\)"):
        KroneckerProduct(np.ones((2, 3)), np.eye(2))
    with pytest.raises(InputError, match="belong to a 2 x 3 matrix, the layout describes 3 x 2"):
        KroneckerProduct(np.eye(2), np.eye(3), Layout.of_matrix(3, 2))
    with pytest.raises(InputError, match="Q must be a real floating-point array, got dtype int"):
        KroneckerProductSum(np.ones((1, 2, 2), int), np.ones((1, 2)))
    with pytest.raises(InputError, match=r"different structures: \(2, 3\) and \(3, 2\)"):
        KroneckerProduct(np.eye(2), np.eye(3)) + KroneckerProduct(np.eye(3), np.eye(2))
