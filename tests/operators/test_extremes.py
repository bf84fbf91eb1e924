"""The extreme eigenpairs from products, against numpy's dense ones."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from jaxhess._typing import InputError
from jaxhess.operators.extremes import (
    KroneckerGuess,
    extreme_eigenpairs,
    kronecker_guess,
    kronecker_start,
)
from jaxhess.operators.kronecker import KroneckerProduct, KroneckerProductSum
from jaxhess.operators.layout import Layout

ALL = ("magnitude", "largest", "smallest", "both")
N, K = 300, 5
TRACES = itertools.count()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Q diag(λ) Q^T on a vector, or on a tree of two arrays."""

    values: jax.Array
    vectors: jax.Array
    tree: bool = dataclasses.field(default=False, metadata={"static": True})

    def in_size(self):
        return self.values.size

    def in_structure(self):
        dtype, half = self.values.dtype, self.values.size // 2
        if not self.tree:
            return jax.ShapeDtypeStruct((2 * half,), dtype)
        return {"w": jax.ShapeDtypeStruct((half // 5, 5), dtype), "b": jax.ShapeDtypeStruct((half,), dtype)}

    def mv(self, vector):
        next(TRACES)
        flat = jnp.concatenate([vector["w"].reshape(-1), vector["b"]]) if self.tree else vector
        flat = self.vectors @ (self.values * (self.vectors.T @ flat))
        if not self.tree:
            return flat
        return {"w": flat[: flat.size // 2].reshape(vector["w"].shape), "b": flat[flat.size // 2 :]}


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def spectrum(name):
    rng = np.random.default_rng(7)
    bulk = rng.normal(size=N)
    return {
        "indefinite": bulk,
        "repeated": np.concatenate([np.full(9, 4.0), np.full(9, -4.0), bulk[18:]]),
        "rank-deficient": np.concatenate([[3.0, 1.0, 0.5], np.zeros(N - 3)]),
        "definite": np.exp(bulk),
        "zero": np.zeros(N),
        "identity": np.ones(N),
    }[name]


def operator_of(values, dtype: type = np.float64, tree=False):
    return Spectrum(jnp.asarray(values, dtype), jnp.asarray(orthogonal(len(values)), dtype), tree)


def expected(values, k, which):
    values = np.sort(np.asarray(values, np.float64))
    if which == "magnitude":
        return np.sort(values[np.argsort(-abs(values), kind="stable")[:k]])
    low = {"largest": 0, "smallest": k, "both": k // 2}[which]
    return np.concatenate([values[:low], values[len(values) - k + low :]])


def rows(vectors):
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in (vectors["w"], vectors["b"])], axis=1)


def check(operator, values, k, which, result, tolerance=1e-5, rounding=1e-13):
    """Converged, right, within its own bounds; the vectors orthonormal and such as the bounds say."""
    eigenvalues, vectors, info = result
    X = rows(vectors) if isinstance(vectors, dict) else np.asarray(vectors)
    true, scale = expected(values, k, which), np.max(np.abs(values), initial=0)
    magnitudes = (np.sort(abs(np.asarray(eigenvalues))), np.sort(abs(true)))  # of equal magnitude, either sign is right
    distance = np.abs(np.subtract(*magnitudes) if which == "magnitude" else np.asarray(eigenvalues) - true)
    assert bool(info.converged)
    assert np.all(np.diff(eigenvalues) >= 0)
    assert np.all(distance <= tolerance * scale)
    if which != "magnitude":
        assert np.all(distance <= np.asarray(info.error) + rounding * scale)
    np.testing.assert_allclose(X @ X.T, np.eye(k), atol=20 * np.finfo(X.dtype).eps ** 0.9)
    vectors_of = np.asarray(operator.vectors, np.float64)
    residual = X @ vectors_of * np.asarray(operator.values) @ vectors_of.T - np.asarray(eigenvalues)[:, None] * X
    assert np.all(np.linalg.norm(residual, axis=1) <= 0.02 * scale)


@pytest.mark.parametrize("which", ALL)
def test_eigenpairs_of_every_spectrum(which):
    """Repeated, rank-deficient, zero: all through one compiled function."""
    solve = jax.jit(lambda operator: extreme_eigenpairs(operator, K, which=which))
    for name in ("indefinite", "repeated", "rank-deficient", "definite", "zero", "identity"):
        operator = operator_of(spectrum(name))
        result = solve(operator)
        check(operator, operator.values, K, which, result)
        assert int(result[2].products) < 1500, name


def test_tight_tolerance_takes_restarts_to_rounding():
    values = spectrum("indefinite")
    operator = operator_of(values)
    result = extreme_eigenpairs(operator, K, which="largest", tolerance=1e-12)
    check(operator, values, K, "largest", result, tolerance=1e-12)
    assert int(result[2].products) > 100  # the search space holds fewer


def test_trees_float32_and_a_second_call_without_tracing():
    operator = operator_of(spectrum("indefinite"), np.float32, tree=True)
    result = extreme_eigenpairs(operator, K)
    assert result[1]["w"].shape == (K, N // 10, 5)
    assert result[1]["b"].dtype == result[0].dtype == jnp.float32
    check(operator, operator.values, K, "magnitude", result, tolerance=2e-5)
    before = next(TRACES)
    other = dataclasses.replace(operator, values=2 * operator.values)
    check(other, other.values, K, "magnitude", extreme_eigenpairs(other, K), tolerance=2e-5)
    assert next(TRACES) == before + 1  # mv was not traced again


@pytest.mark.parametrize(("size", "k"), [(1, 1), (3, 1), (6, 6), (40, 12)])
def test_small_operators(size, k):
    """k = 1, k = N, N smaller than the first block: N products, exact."""
    values = np.linspace(-1, 2, size) if size > 1 else np.array([-3.0])
    operator = dense(values)
    for which in ALL:
        eigenvalues, vectors, info = extreme_eigenpairs(operator, k, which=which)
        np.testing.assert_allclose(eigenvalues, expected(values, k, which), atol=1e-13)
        assert vectors.shape == (k, size)
        assert int(info.products) == size
        assert bool(info.converged)


def dense(values):
    U = jnp.asarray(orthogonal(len(values), seed=3))
    return lx.MatrixLinearOperator((U * jnp.asarray(values)[None, :]) @ U.T, lx.symmetric_tag)


def test_one_eigenpair():
    values = spectrum("indefinite")
    operator = operator_of(values)
    for which in ("largest", "smallest"):
        check(operator, values, 1, which, extreme_eigenpairs(operator, 1, which=which))


@pytest.mark.parametrize("max_products", [12, 20, 32])
def test_too_few_products_are_reported_with_honest_errors(max_products):
    values = np.sort(spectrum("indefinite"))
    operator = operator_of(values)
    eigenvalues, _, info = extreme_eigenpairs(operator, K, which="largest", max_products=max_products)
    assert not bool(info.converged)
    assert int(info.products) <= max_products
    nearest = np.min(np.abs(np.asarray(eigenvalues)[:, None] - values), axis=1)
    assert np.all(nearest <= np.asarray(info.error) + 1e-13)
    assert np.all(np.asarray(eigenvalues) <= values[-K:] + 1e-13)  # Ritz values are below


def test_starts():
    """A start saves products, and one that lies in the wrong invariant subspace misleads nobody."""
    values = np.sort(spectrum("definite"))
    operator = operator_of(values)
    solve = functools.partial(extreme_eigenpairs, operator, K, which="largest")
    near = operator.vectors[:, -K:].T + 0.01 * np.random.default_rng(1).normal(size=(K, N)) / np.sqrt(N)
    wrong = operator.vectors[:, :K].T
    by_key = solve(start=jax.random.key(3))
    from_near, from_wrong = solve(start=near), solve(start=wrong)
    for result in (by_key, from_near, from_wrong, solve(start=jnp.zeros((2, N)))):
        check(operator, values, K, "largest", result)
    assert int(from_near[2].products) < int(by_key[2].products)


def test_kronecker_start_and_guess():
    rng = np.random.default_rng(5)
    A, B = (jnp.asarray(a + a.T) for a in (rng.normal(size=(8, 8)), rng.normal(size=(20, 20))))
    dense = np.kron(A, B)
    for which in ALL:
        start = np.asarray(kronecker_start(A, B, 6, which)).reshape(6, -1)
        np.testing.assert_allclose(start @ start.T, np.eye(6), atol=1e-12)
        quotients = np.sum(start * (start @ dense), axis=1)
        np.testing.assert_allclose(np.sort(quotients), expected(np.linalg.eigvalsh(dense), 6, which), rtol=1e-10)
    residuals = jnp.asarray(rng.normal(size=(3, 8, 20)))
    theta = np.abs(dense).sum() * jnp.array([1.0, -1.0, 2.0])  # nothing is near, so nothing is bounded
    directions = np.asarray(kronecker_guess(A, B).directions(residuals, theta)).reshape(3, -1)
    for r, d, t in zip(residuals.reshape(3, -1), directions, theta, strict=True):
        np.testing.assert_allclose(dense @ d - t * d, r, rtol=1e-9, atol=1e-9)


def test_a_guess_saves_products_in_any_layout():
    rng = np.random.default_rng(6)
    r, m, n = 40, 16, 20
    J = rng.normal(size=(r, m, 4)) * np.linspace(0.3, 2, m)[:, None]
    Z = rng.normal(size=(r, n)) * np.linspace(0.2, 2, n)
    Q, Z = jnp.asarray(J @ J.transpose(0, 2, 1)), jnp.asarray(Z)
    layout = Layout.transposed(m, n)
    H = KroneckerProductSum(Q, Z, layout)
    values = np.linalg.eigvalsh(H.as_matrix())
    guess = kronecker_guess(Q.mean(0), Z.T @ Z / r, layout)
    assert isinstance(guess, KroneckerGuess)
    blind, guided = (extreme_eigenpairs(H, 4, which="largest", start=start) for start in (None, guess))
    for eigenvalues, vectors, info in (blind, guided):
        assert vectors.shape == (4, n, m)
        assert bool(info.converged)
        assert np.all(np.abs(eigenvalues - values[-4:]) <= np.asarray(info.error) + 1e-12)
    assert int(guided[2].products) < int(blind[2].products)
    exact = KroneckerProduct(Q[0] + np.eye(m), Z.T @ Z, tags=lx.symmetric_tag)
    found, _, info = extreme_eigenpairs(exact, 4, which="smallest", start=kronecker_guess(exact.A, exact.B))
    assert bool(info.converged)
    np.testing.assert_allclose(found, exact.eigvalsh()[:4], atol=1e-5 * np.max(np.abs(exact.eigvalsh())))


def test_a_turned_operator_is_searched_in_its_coordinates():
    """Start and directions are those of the guess in any coordinates, and so are the eigenpairs."""
    rng = np.random.default_rng(8)
    r, m, n = 60, 12, 24
    Q, Z = rng.normal(size=(r, m, m)), rng.normal(size=(r, n)) * np.linspace(0.3, 2, n)
    for layout in (Layout.of_matrix(m, n), Layout.transposed(m, n)):
        H = KroneckerProductSum(jnp.asarray(Q + Q.transpose(0, 2, 1)), jnp.asarray(Z), layout)
        guess = H._start()
        plain = dataclasses.replace(guess, turned=None)
        for W, X in (
            (plain.start(6, "both"), guess.start_coordinates(6, "both")),
            (H.mv(plain.start(1)[0])[None], guess.turned.mv(guess.start_coordinates(1, "magnitude")[0])[None]),
        ):
            np.testing.assert_allclose(guess.from_coordinates(X), W, atol=1e-12)
        X, theta = jnp.asarray(rng.normal(size=(3, n, m))), jnp.array([3.0, -2.0, 0.1])
        directions = guess.from_coordinates(guess.direction_coordinates(X, theta))
        np.testing.assert_allclose(directions, plain.directions(guess.from_coordinates(X), theta), atol=1e-10)
        eigenvalues, vectors, info = H.eigh(4, which="both", method="iterative", tolerance=1e-9, return_info=True)
        assert int(info.products) < m * n  # not the dense way
        assert vectors.shape == (4, *layout.shape)
        np.testing.assert_allclose(eigenvalues, expected(np.linalg.eigvalsh(H.as_matrix()), 4, "both"), atol=1e-10)
        np.testing.assert_allclose(jax.vmap(H.mv)(vectors), eigenvalues[:, None, None] * vectors, atol=1e-3)


def test_refusals():
    operator = operator_of(spectrum("zero"))
    with pytest.raises(InputError, match="k must be between 1 and the operator's size 300, got 301"):
        extreme_eigenpairs(operator, 301)
    with pytest.raises(InputError, match="magnitude, largest, smallest or both, got 'top'"):
        extreme_eigenpairs(operator, 2, which="top")
    with pytest.raises(InputError, match=r"max_products >= .*, got 3"):
        extreme_eigenpairs(operator, 5, max_products=3)
    with pytest.raises(InputError, match=r"leading axis, got \(2, 7\)"):
        extreme_eigenpairs(operator, 5, start=jnp.ones((2, 7)))
    with pytest.raises(InputError, match="square"):
        kronecker_guess(jnp.ones((2, 3)), jnp.eye(2))
    with pytest.raises(InputError, match="4 x 5"):
        kronecker_guess(jnp.eye(2), jnp.eye(3), Layout.of_matrix(4, 5))
    with pytest.raises(InputError, match="7 eigenvectors of a 6 x 6"):
        kronecker_start(jnp.eye(2), jnp.eye(3), 7)
