"""Nearest and mean Kronecker products against the dense singular value decomposition of Van Loan and Pitsianis."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from jaxhess._typing import DenseTooLargeError, InputError
from jaxhess.operators import Dense, Diagonal, KroneckerProduct, KroneckerProductSum, Layout
from jaxhess.operators.nearest import mean_kronecker, nearest_kronecker
from jaxhess.operators.rearranged import mean_of_sum, nearest_to_dense, nearest_to_sum, norm_of_sum


def random_terms(seed, r, m, n, definite=False):
    rng = np.random.default_rng(seed)
    Q, Z = rng.standard_normal((r, m, m)), rng.standard_normal((r, n))
    return (Q @ np.swapaxes(Q, 1, 2) if definite else Q + np.swapaxes(Q, 1, 2)), Z


def rearranged(matrix, m, n):
    return matrix.reshape(m, n, m, n).transpose(0, 2, 1, 3).reshape(m * m, n * n)


def dense_nearest(matrix, m, n):
    """kron(A, B), and its relative error by the other singular values."""
    U, s, V = np.linalg.svd(rearranged(matrix, m, n))
    product = np.kron(U[:, 0].reshape(m, m), V[0].reshape(n, n)) * s[0]
    return product, np.sqrt(np.sum(s[1:] ** 2) / np.sum(s**2))


def true_error(matrix, product):
    return np.linalg.norm(matrix - product) / np.linalg.norm(matrix)


def check(A, B, error, matrix, m, n, tolerance=1e-10):
    product, least = dense_nearest(matrix, m, n)
    np.testing.assert_allclose(np.kron(A, B), product, atol=tolerance * np.linalg.norm(matrix), rtol=0)
    np.testing.assert_allclose(error, least, rtol=tolerance)
    np.testing.assert_allclose(A, A.T, atol=0)
    np.testing.assert_allclose(B, B.T, atol=0)
    np.testing.assert_allclose(np.linalg.norm(A), np.linalg.norm(B), rtol=1e-12)
    assert np.trace(B) >= 0


# Fewer examples than inputs, as many, and more than either side of R has.
@pytest.mark.parametrize(("r", "m", "n"), [(4, 5, 6), (3, 4, 3), (40, 3, 4)])
@pytest.mark.parametrize("start", ["examples", "rows", "columns", "random"])
def test_every_way_against_the_dense_decomposition(r, m, n, start, helpers):
    Q, Z = random_terms(r, r, m, n)
    A, B, error = nearest_to_sum(Q, Z, definite=False, start=start, direct=start in ("examples", "rows"))
    check(A, B, error, helpers.mean_of_krons(Q, Z), m, n)


@pytest.mark.parametrize("start", ["rows", "columns", "random"])
def test_every_way_from_a_dense_matrix(start, helpers):
    for m, n in ((3, 4), (4, 3)):
        Q, Z = random_terms(m, 5, m, n)
        matrix = helpers.mean_of_krons(Q, Z)
        A, B, error = nearest_to_dense(matrix, Layout.of_matrix(m, n), definite=False, start=start)
        check(A, B, error, matrix, m, n)


def test_large_sides_by_products_alone():
    # r and both sides beyond the largest Gram matrix; here R can still be decomposed.
    r, m, n = 530, 32, 33
    Q, Z = random_terms(0, r, m, n, definite=True)
    H = KroneckerProductSum(Q, Z, tags=lx.positive_semidefinite_tag)
    nearest, error = nearest_kronecker(H)
    R = Q.reshape(r, -1).T @ (Z[:, :, None] * Z[:, None]).reshape(r, -1) / r
    U, s, V = np.linalg.svd(R, full_matrices=False)
    np.testing.assert_allclose(error, np.sqrt(np.sum(s[1:] ** 2) / np.sum(s**2)), rtol=1e-10)
    for ours, theirs in ((nearest.A, U[:, 0].reshape(m, m)), (nearest.B, V[0].reshape(n, n))):
        theirs = theirs * np.sign(np.trace(theirs)) * np.sqrt(s[0])
        np.testing.assert_allclose(ours, theirs, atol=1e-10 * np.sqrt(s[0]))


def test_no_other_product_is_nearer(helpers, rng):
    Q, Z = random_terms(3, 6, 3, 4)
    matrix = helpers.mean_of_krons(Q, Z)
    nearest, error = nearest_kronecker(KroneckerProductSum(Q, Z))
    np.testing.assert_allclose(error, true_error(matrix, np.kron(nearest.A, nearest.B)), rtol=1e-12)
    R = rearranged(matrix, 3, 4)
    for size in (2.0, 1e-1, 1e-3):
        for _ in range(20):  # near it, the other factor and the scale being the best for this one
            A = np.asarray(nearest.A) + size * rng.standard_normal((3, 3))
            B = (A.reshape(-1) @ R).reshape(4, 4) / np.sum(A**2)
            assert true_error(matrix, np.kron(A, B)) > error
    assert mean_kronecker(KroneckerProductSum(Q, Z)).relative_error > error


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("size", [1e-1, 1e-4, 1e-7])
def test_small_errors_keep_their_digits(size, direct, helpers):
    # All terms alike in z, far apart in Q: what is left of them after the mean is small by cancellation alone.
    Q, Z = random_terms(5, 6, 3, 4)
    Z = Z[:1] + size * Z
    matrix = helpers.mean_of_krons(Q, Z)
    A, B, error = nearest_to_sum(Q, Z, definite=False, direct=direct)
    s = np.linalg.svd(rearranged(matrix, 3, 4), compute_uv=False)
    least = np.sqrt(np.sum(s[1:] ** 2) / np.sum(s**2))
    assert 1e-3 * size < least < 10 * size
    np.testing.assert_allclose(error, least, rtol=1e-12 / size + 1e-10)
    np.testing.assert_allclose(error, true_error(matrix, np.kron(A, B)), rtol=1e-12 / size + 1e-10)
    A, B, error = mean_of_sum(Q, Z)
    np.testing.assert_allclose(error, true_error(matrix, np.kron(A, B)), rtol=1e-12 / size + 1e-10)


def test_a_perturbed_product_read_densely(helpers, rng):
    A, B, P = helpers.symmetric(rng, 3, 3), helpers.symmetric(rng, 4, 4), helpers.symmetric(rng, 12, 12)
    R = rearranged(P, 3, 4).reshape(3, 3, 4, 4)
    R = (R + R.swapaxes(0, 1) + R.swapaxes(2, 3) + R.swapaxes(0, 1).swapaxes(2, 3)) / 4
    matrix = np.kron(A, B) + 1e-7 * R.transpose(0, 2, 1, 3).reshape(12, 12)
    nearest, error = nearest_kronecker(Dense(matrix, (3, 4)))
    product, least = dense_nearest(matrix, 3, 4)
    np.testing.assert_allclose(nearest.as_matrix(), product, atol=1e-13 * np.linalg.norm(matrix))
    np.testing.assert_allclose(error, least, rtol=1e-7)
    # The antisymmetric part, which no symmetric factors reach, counts.
    nearest, error = nearest_kronecker(Dense(np.kron(A, B) + P, (3, 4)))
    np.testing.assert_allclose(error, true_error(np.kron(A, B) + P, np.kron(nearest.A, nearest.B)), rtol=1e-12)


def test_norm_of_a_sum_that_cancels(rng):
    Q, Z = random_terms(6, 3, 3, 4)
    pairs, Z2 = np.concatenate([Q, 1e-9 * Q - Q]), np.concatenate([Z, Z])
    left = norm_of_sum(1e-9 * Q, Z, direct=True) / 2
    for direct in (False, True):
        np.testing.assert_allclose(norm_of_sum(pairs, Z2, direct=direct), left, rtol=1e-5)


def test_mean_factors(helpers):
    layout = Layout.transposed(3, 4)
    for definite in (False, True):
        Q, Z = random_terms(7, 9, 3, 4, definite)
        tags = lx.positive_semidefinite_tag if definite else ()
        mean, error = mean_kronecker(KroneckerProductSum(Q, Z, layout, tags))
        matrix = helpers.mean_of_krons(Q, Z)
        product = np.kron(Q.mean(0), Z.T @ Z / 9)
        np.testing.assert_allclose(mean.as_matrix(), helpers.reordered(product, layout), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(error, true_error(matrix, product), rtol=1e-12)
        assert lx.is_symmetric(mean)
        assert lx.is_positive_semidefinite(mean) == definite


def test_layouts(helpers):
    Q, Z = random_terms(8, 5, 3, 4)
    matrix = helpers.mean_of_krons(Q, Z)
    product, least = dense_nearest(matrix, 3, 4)
    for layout in (Layout.transposed(3, 4), Layout((2, 2, 3), (2, 2, 3), (2,), (1, 0))):
        expected = helpers.reordered(product, layout)
        for block in (KroneckerProductSum(Q, Z, layout), Dense(helpers.reordered(matrix, layout), layout.shape)):
            nearest, error = nearest_kronecker(block, layout)
            np.testing.assert_allclose(nearest.as_matrix(), expected, atol=1e-11)
            np.testing.assert_allclose(error, least, rtol=1e-10)
            assert (nearest.A.shape, nearest.B.shape, nearest.layout) == ((3, 3), (4, 4), layout)
    # Another reading of the same parameter is another problem.
    other = Layout((3, 4), (3, 2, 2), (0, 1), (2,))
    nearest, error = nearest_kronecker(KroneckerProductSum(Q, Z), other)
    assert nearest.A.shape == (6, 6)
    np.testing.assert_allclose(error, true_error(matrix, np.asarray(nearest.as_matrix())), rtol=1e-12)


def test_definite_blocks_have_definite_factors():
    Q, Z = random_terms(9, 7, 4, 3, definite=True)
    H = KroneckerProductSum(Q, Z, tags=lx.positive_semidefinite_tag)
    unknown = nearest_kronecker(KroneckerProductSum(Q, Z))
    assert not lx.is_positive_semidefinite(unknown.operator)
    for block in (H, Dense(H.as_matrix(), (4, 3), lx.positive_semidefinite_tag)):
        nearest, error = nearest_kronecker(block)
        assert lx.is_positive_semidefinite(nearest)
        np.testing.assert_allclose(nearest.as_matrix(), unknown.operator.as_matrix(), atol=1e-11)
        np.testing.assert_allclose(error, unknown.relative_error, rtol=1e-10)
        assert min(np.linalg.eigvalsh(nearest.A).min(), np.linalg.eigvalsh(nearest.B).min()) > 0
    # Two equal largest singular values: products with indefinite factors are as near.
    units = np.stack([np.outer(e, e) for e in np.eye(2)])
    H = KroneckerProductSum(units, np.eye(2), tags=lx.positive_semidefinite_tag)
    for block in (H, Dense(H.as_matrix(), (2, 2), lx.positive_semidefinite_tag)):
        nearest, error = nearest_kronecker(block)
        np.testing.assert_allclose(error, np.sqrt(0.5), rtol=1e-12)
        assert min(np.linalg.eigvalsh(nearest.A).min(), np.linalg.eigvalsh(nearest.B).min()) > -1e-15
        np.testing.assert_allclose(np.linalg.norm(H.as_matrix() - nearest.as_matrix()), 0.5, rtol=1e-12)


@pytest.mark.parametrize(("r", "m", "n"), [(1, 4, 3), (5, 1, 3), (5, 3, 1), (2, 1, 1), (3, 2, 0)])
def test_exact_ones(r, m, n, helpers):
    Q, Z = random_terms(10, r, m, n)
    H = KroneckerProductSum(-Q, Z)
    matrix = helpers.mean_of_krons(-Q, Z)
    for block in (H, Dense(matrix, (m, n))):
        nearest, error = nearest_kronecker(block)
        np.testing.assert_allclose(nearest.as_matrix(), matrix, rtol=1e-12, atol=1e-12)
        assert error <= (0 if block is H or 1 in (m, n) else 1e-15)
        assert np.trace(nearest.B) >= 0


def test_vectors_scalars_and_products_are_themselves(rng, helpers):
    matrix = helpers.symmetric(rng, 5, 5)
    nearest, error = nearest_kronecker(Dense(matrix))
    assert error == 0
    assert nearest.in_structure().shape == (5,)
    np.testing.assert_allclose(nearest.as_matrix(), matrix, rtol=1e-14)
    nearest, error = nearest_kronecker(Diagonal(np.array(-3.0)))
    np.testing.assert_allclose(nearest.as_matrix(), [[-3.0]], rtol=1e-15)
    product = KroneckerProduct(rng.standard_normal((2, 2)), rng.standard_normal((3, 3)))
    for function in (nearest_kronecker, mean_kronecker):
        assert function(product).operator is product
        assert function(product).relative_error == 0


def test_zeros():
    Q, Z = random_terms(11, 6, 3, 4)
    Z[:5] = 0
    nearest, error = nearest_kronecker(KroneckerProductSum(Q, Z))
    np.testing.assert_allclose(nearest.as_matrix(), np.kron(Q[5], np.outer(Z[5], Z[5])) / 6, atol=1e-13)
    assert error < 1e-14
    zero = KroneckerProductSum(Q, 0 * Z)
    for block in (zero, KroneckerProductSum(0 * Q, Z), Dense(jnp.zeros((12, 12)), (3, 4))):
        nearest, error = nearest_kronecker(block)
        assert error == 0
        np.testing.assert_array_equal(nearest.as_matrix(), np.zeros((12, 12)))
    assert mean_kronecker(zero).relative_error == 0
    # The block is zero and the product of its mean factors is not.
    Q[1], Z[1], Z[2:] = -Q[0], Z[0] + 1, 0
    Z[0] = Z[1]
    assert nearest_kronecker(KroneckerProductSum(Q, Z)).relative_error <= 1
    assert mean_kronecker(KroneckerProductSum(Q, Z)).relative_error > 1e10


def test_float32_of_any_scale(helpers):
    Q, Z = random_terms(12, 6, 3, 4)
    product, least = dense_nearest(helpers.mean_of_krons(Q, Z), 3, 4)
    for q, z in ((1, 1), (1e-12, 1e-8), (1e12, 1e8)):
        H = KroneckerProductSum(np.float32(q * Q), np.float32(z * Z))
        nearest, error = nearest_kronecker(H)
        assert nearest.A.dtype == nearest.B.dtype == error.dtype == mean_kronecker(H).relative_error.dtype == jnp.float32
        ours = np.kron(np.float64(nearest.A), np.float64(nearest.B)) / (q * z**2)
        np.testing.assert_allclose(ours, product, atol=1e-5 * np.linalg.norm(product))
        np.testing.assert_allclose(error, least, rtol=1e-5)
    # Small errors: the singular values of R, not their squares, are what rounding limits.
    Z = Z[:1] + 1e-4 * Z
    matrix = helpers.mean_of_krons(Q, Z)
    _, error = nearest_kronecker(KroneckerProductSum(np.float32(Q), np.float32(Z)))
    np.testing.assert_allclose(error, dense_nearest(matrix, 3, 4)[1], rtol=2e-2)


class Convertible(Dense):
    """A block that has Kronecker terms, or says that it has not as the library's operators do."""

    terms: object

    def __init__(self, terms, matrix):
        super().__init__(matrix, (3, 4))
        self.terms = terms

    def kronecker_terms(self):
        if self.terms is None:
            raise InputError("none")
        return self.terms


def test_blocks_with_kronecker_terms(helpers):
    Q, Z = random_terms(13, 5, 3, 4)
    H, matrix = KroneckerProductSum(Q, Z), helpers.mean_of_krons(Q, Z)
    product, least = dense_nearest(matrix, 3, 4)
    for terms in (H, None, (jnp.asarray(Q), jnp.asarray(Z))):
        nearest, error = nearest_kronecker(Convertible(terms, matrix))
        np.testing.assert_allclose(nearest.as_matrix(), product, atol=1e-11)
        np.testing.assert_allclose(error, least, rtol=1e-10)
    assert mean_kronecker(Convertible(H, 0 * matrix)).relative_error == mean_kronecker(H).relative_error
    with pytest.raises(InputError, match=r"mean_kronecker: .*Convertible.* no factors Q_i and z_i"):
        mean_kronecker(Convertible(None, matrix))


def test_jit_vmap_and_no_second_compilation():
    Q, Z = random_terms(14, 5, 3, 4)
    H = KroneckerProductSum(Q, Z)
    eager = nearest_kronecker(H), mean_kronecker(H)
    traced = jax.jit(lambda H: (nearest_kronecker(H), mean_kronecker(H)))(H)
    for one, other in zip(jax.tree.leaves(eager), jax.tree.leaves(traced), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
    pairs = jnp.stack([Q, Q[::-1]]), jnp.stack([Z, Z[::-1]])
    errors = jax.vmap(lambda Q, Z: nearest_kronecker(KroneckerProductSum(Q, Z)).relative_error)(*pairs)
    np.testing.assert_allclose(errors, [eager[0].relative_error] * 2, rtol=1e-10)
    compiled = nearest_to_sum._cache_size(), mean_of_sum._cache_size()
    nearest_kronecker(H * 2.0), mean_kronecker(H * 2.0)
    assert compiled == (nearest_to_sum._cache_size(), mean_of_sum._cache_size())


def test_a_sum_is_never_made_dense():
    H = KroneckerProductSum(np.ones((3, 300, 300), np.float32), np.ones((3, 400), np.float32))
    compiled = jax.jit(nearest_kronecker).lower(H).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < H.dense_bytes / 1000


def test_refusals():
    with pytest.raises(InputError, match=r"Diagonal\(.* no factors Q_i and z_i of single examples"):
        mean_kronecker(Diagonal(jnp.ones((2, 3))))
    with pytest.raises(InputError, match=r"which axes of the parameter of shape \(2, 3, 4\) belong to A"):
        nearest_kronecker(Diagonal(jnp.ones((2, 3, 4))))
    with pytest.raises(InputError, match=r"the layout is for a parameter of shape \(3, 2\), not \(2, 3\)"):
        nearest_kronecker(Diagonal(jnp.ones((2, 3))), Layout.of_matrix(3, 2))
    product = KroneckerProduct(jnp.ones((2, 2)), jnp.ones((3, 3)))
    with pytest.raises(InputError, match=r"nearest_kronecker: the operator is not known to be symmetric"):
        nearest_kronecker(product, Layout((2, 3), (2, 3), (1,), (0,)))
    with pytest.raises(DenseTooLargeError, match=r"Diagonal.nearest_kronecker: the dense 6000000 x 6000000 form"):
        nearest_kronecker(Diagonal(jnp.ones((2000, 3000), jnp.float32)))
