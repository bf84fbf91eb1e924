"""Spectra against numpy's, and estimates against exact values within the errors that they tell."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import jaxhess
from jaxhess._typing import InputError
from jaxhess.operators import BlockDiagonal, Diagonal, KroneckerProductSum
from jaxhess.spectra import (
    InertiaHistory,
    Spectrum,
    exact_density,
    inertia_by_block,
    spectra_by_block,
    spectral_density,
    spectrum,
    stochastic_logdet,
    stochastic_trace,
)

SIZE = 48


def symmetric(eigenvalues, dtype=float, tags=()):
    """An operator with these eigenvalues and random eigenvectors, on an array (N, 1)."""
    eigenvalues = np.asarray(eigenvalues, float)
    U = np.linalg.qr(np.random.default_rng(0).normal(size=(eigenvalues.size,) * 2))[0]
    return KroneckerProductSum(jnp.asarray(((U * eigenvalues) @ U.T)[None], dtype), jnp.ones((1, 1), dtype), tags=tags)


def semicircle(seed=1):
    A = np.random.default_rng(seed).normal(size=(SIZE, SIZE))
    return np.linalg.eigvalsh(A + A.T)


def decaying(rate):
    return np.exp(-np.arange(SIZE) / rate)


def network():
    """The error of a small net, its parameters and a batch."""

    def error(p, x):
        h = jnp.tanh(p["hidden"]["w"] @ x + p["hidden"]["b"])
        return jnp.sum((p["out"] @ h - 1.0) ** 2)

    random = np.random.default_rng(2)
    p = {"hidden": {"w": random.normal(size=(3, 4)), "b": random.normal(size=3)}, "out": random.normal(size=(2, 3))}
    return error, jax.tree.map(jnp.asarray, p), jnp.asarray(random.normal(size=(5, 4)))


@functools.cache
def hessians():
    error, p, x = network()
    return {
        "blocks": jaxhess.hessian(error)(p, x),
        "full": jaxhess.hessian(error, blocks="full")(p, x),
        "gauss_newton": jaxhess.fisher(error, blocks="full")(p, x),
    }


SPECTRA = {
    "semicircle": semicircle(),
    "outliers": np.r_[-30.0, np.linspace(-1, 1, SIZE - 3), 50.0, 200.0],
    "low rank": np.r_[np.zeros(SIZE - 4), -2.0, 1.0, 3.0, 4.0],
    "few distinct": np.repeat([-1.0, 0.5, 2.0], SIZE // 3),
    "tiny": 1e-20 * semicircle(),
}


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("steps", [12, SIZE])
def test_ritz_values_are_as_near_as_they_say(steps, dtype):
    """Also past the end of a Krylov space, and where squares underflow in float32."""
    tolerance = 1e-13 if dtype == jnp.float64 else 1e-5
    for name, eigenvalues in SPECTRA.items():
        found = spectrum(symmetric(eigenvalues, dtype), method="lanczos", steps=steps, key=jax.random.key(3))
        values, error = np.asarray(found.eigenvalues, float), np.asarray(found.error, float)
        assert found.eigenvalues.dtype == dtype
        assert (values.shape, found.size, found.exact) == ((steps,), SIZE, False)
        assert np.all(np.diff(values) >= 0)
        nearest = np.min(np.abs(values[:, None] - eigenvalues), axis=1)
        assert np.all(nearest <= error), name
        largest = np.abs(eigenvalues).max()
        if steps == SIZE or name in ("low rank", "few distinct"):
            # Bounds are of the order of rounding where there is no other error, and no eigenvalue is missed.
            assert np.all(error < 2000 * tolerance * largest), name
            missed = np.min(np.abs(values[:, None] - eigenvalues), axis=0)
            assert np.all(missed < tolerance * largest * SIZE), name


def test_the_ends_come_first():
    eigenvalues = np.sort(SPECTRA["outliers"])
    found = spectrum(symmetric(eigenvalues), method="lanczos", steps=24)
    np.testing.assert_allclose(found.eigenvalues[jnp.array([0, -2, -1])], eigenvalues[[0, -2, -1]], rtol=1e-8)
    assert np.all(found.error[jnp.array([0, -2, -1])] < 1e-8)
    assert np.max(found.error) > 1e-3
    three = spectrum(symmetric(eigenvalues), method="lanczos", steps=24, count=3)
    np.testing.assert_array_equal(three.eigenvalues, found.eigenvalues[jnp.array([0, -2, -1])])
    np.testing.assert_array_equal(three.error, found.error[jnp.array([0, -2, -1])])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_multiples_of_the_identity(value):
    H = Diagonal(jnp.full(20, value))
    found = spectrum(H, method="lanczos", steps=20)
    np.testing.assert_allclose(found.eigenvalues, value, rtol=1e-14)
    assert np.all(found.error <= 1e-13)
    density = spectral_density(H, jax.random.key(0), steps=20, probes=3, points=101)
    np.testing.assert_allclose(density.density, exact_density(H, grid=density.grid, width=density.width).density, rtol=1e-9)
    assert np.all(np.isfinite(density.standard_error))


def test_exact_where_it_can_be():
    H = symmetric(semicircle())
    found = spectrum(H)
    assert found.exact
    np.testing.assert_allclose(found.eigenvalues, semicircle(), atol=1e-12)
    np.testing.assert_array_equal(found.error, 0)
    ends = spectrum(H, count=2).eigenvalues
    np.testing.assert_array_equal(np.sort(np.abs(ends)), np.sort(np.abs(found.eigenvalues))[-2:])
    random = np.random.default_rng(0)
    # 6000 rows, factored as 3 x 3; and a dense form of 4800 rows, which is not.
    one = KroneckerProductSum(jnp.eye(3)[None], jnp.asarray(random.normal(size=(1, 2000))))
    many = KroneckerProductSum(jnp.ones((80, 60, 60)), jnp.asarray(random.normal(size=(80, 80))))
    assert spectrum(one).exact
    assert not spectrum(many, steps=3).exact


@pytest.mark.parametrize("kind", ["blocks", "full", "gauss_newton"])
def test_trees(kind):
    H = hessians()[kind]
    eigenvalues = np.linalg.eigvalsh(H.as_matrix())
    np.testing.assert_allclose(spectrum(H).eigenvalues, eigenvalues, atol=1e-12)
    found = spectrum(H, method="lanczos", steps=18)
    assert np.all(np.min(np.abs(np.asarray(found.eigenvalues)[:, None] - eigenvalues), axis=1) <= found.error)
    np.testing.assert_allclose(found.eigenvalues[-1], eigenvalues[-1], rtol=1e-8)
    estimate = stochastic_trace(H, jax.random.key(0), products=30)
    assert abs(estimate.value - H.trace()) <= 4 * estimate.standard_error + 1e-12
    density = spectral_density(H, jax.random.key(0), steps=H.in_size(), probes=8, points=200)
    np.testing.assert_allclose(np.trapezoid(density.density, density.grid), 1, rtol=1e-6)
    for path, of_block in spectra_by_block(H).items():
        assert of_block.exact
        np.testing.assert_allclose(of_block.eigenvalues, np.linalg.eigvalsh(H.block(path).as_matrix()), atol=1e-12)


def test_density_against_the_exact_one():
    H = symmetric(semicircle())
    found = spectral_density(H, jax.random.key(4), steps=SIZE, probes=60)
    exact = exact_density(spectrum(H), grid=found.grid, width=found.width)
    # Exact by its definition:
    z = (np.asarray(found.grid)[:, None] - semicircle()) / float(found.width)
    expected = np.mean(np.exp(-(z**2) / 2), axis=1) / (float(found.width) * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(exact.density, expected, atol=1e-10)
    for density in (found, exact):
        np.testing.assert_allclose(np.trapezoid(density.density, density.grid), 1, rtol=1e-8)
        np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, rtol=1e-12)
    seen = expected > 1e-3 * expected.max()
    deviations = (np.asarray(found.density) - expected)[seen] / np.asarray(found.standard_error)[seen]
    assert np.max(np.abs(deviations)) < 5
    assert 0.5 < np.sqrt(np.mean(deviations**2)) < 2
    np.testing.assert_array_equal(found.truncation, 0)
    # The moments of each quadrature are those of its probe up to degree 2 steps - 1.
    few = spectral_density(H, jax.random.key(4), steps=6, probes=60, grid=found.grid, width=found.width)
    for degree in range(12):
        moments = np.sum(few.weights * few.nodes**degree, axis=1)
        np.testing.assert_allclose(moments, np.sum(found.weights * found.nodes**degree, axis=1), rtol=1e-9, atol=1e-9)
    # The change since half of the steps tells of the error that steps make.
    assert np.max(np.abs(few.density - found.density)) < np.max(few.truncation)


def test_a_density_of_a_diagonal_needs_no_luck():
    H = Diagonal(jnp.arange(10.0))
    found = spectral_density(H, jax.random.key(0), steps=10, probes=2)
    np.testing.assert_allclose(found.density, exact_density(H, grid=found.grid, width=found.width).density, atol=1e-10)
    assert np.max(found.standard_error) < 1e-10
    assert np.all(np.isnan(spectral_density(H, jax.random.key(0), steps=10, probes=1).standard_error))


def over_keys(estimate, count=100):
    """Estimates with many keys, in one compilation."""
    return jax.jit(lambda keys: jax.lax.map(estimate, keys))(jax.random.split(jax.random.key(5), count))


def check_statistics(estimates, exact):
    """No bias, honest standard errors."""
    values, errors = np.asarray(estimates.value), np.asarray(estimates.standard_error)
    spread = np.std(values, ddof=1)
    assert abs(np.mean(values) - exact) < 4 * spread / np.sqrt(values.size)
    assert 0.7 < np.sqrt(np.mean(errors**2)) / spread < 1.4
    assert np.mean(np.abs(values - exact) < 4 * errors) > 0.97
    return spread


def test_trace():
    """Hutch++ has the smaller variance for the same products where eigenvalues decay."""
    H = symmetric(decaying(4.0), tags=lx.positive_semidefinite_tag)
    spreads = [
        check_statistics(over_keys(lambda key, m=method: stochastic_trace(H, key, products=30, method=m)), H.trace())
        for method in ("hutchinson", "hutch++")
    ]
    assert spreads[1] < spreads[0] / 4
    assert np.all(np.asarray(stochastic_trace(H, jax.random.key(0)).truncation) == 0)


def test_hutch_plus_plus_is_exact_for_low_ranks():
    H = symmetric(SPECTRA["low rank"])
    for products in (12, 3 * SIZE + 5):  # a sketch of the rank, and one of all
        found = stochastic_trace(H, jax.random.key(0), products=products)
        np.testing.assert_allclose(found.value, 6.0, rtol=1e-12)
        assert found.standard_error < 1e-12


def test_logdet():
    eigenvalues = decaying(4.0)
    H = symmetric(eigenvalues, tags=lx.positive_semidefinite_tag)
    exact = np.sum(np.log(eigenvalues + 1e-2))
    check_statistics(over_keys(lambda key: stochastic_logdet(H, key, 1e-2, steps=16, probes=10)), exact)
    # Gauss and Gauss-Radau enclose the limit, with the same probes.
    limit = stochastic_logdet(H, jax.random.key(0), 1e-2, steps=SIZE)
    assert limit.truncation < 1e-9
    for steps in (2, 8):
        found = stochastic_logdet(H, jax.random.key(0), 1e-2, steps=steps)
        assert found.value - found.truncation <= limit.value + 1e-9
        assert limit.value - 1e-9 <= found.value
        assert found.truncation > 1e-3
    without = stochastic_logdet(symmetric(eigenvalues + 1, tags=lx.positive_semidefinite_tag), jax.random.key(0), steps=16)
    assert abs(without.value - np.sum(np.log1p(eigenvalues))) < 4 * without.standard_error
    assert np.isinf(without.truncation)


def test_logdet_of_what_has_none():
    H = symmetric(semicircle())
    with pytest.raises(InputError, match="not tagged as positive semidefinite"):
        stochastic_logdet(H, jax.random.key(0), 1e-2)
    vouched = stochastic_logdet(H.with_tags(lx.positive_semidefinite_tag), jax.random.key(0), 1e-2, steps=8, probes=3)
    assert np.all(np.isnan(vouched))


def test_compiled_and_repeated():
    H = symmetric(decaying(6.0), jnp.float32, lx.positive_semidefinite_tag)

    def everything(H, key, damping):
        return (
            spectrum(H, method="lanczos", steps=8, key=key),
            spectral_density(H, key, steps=8, probes=3, points=20),
            stochastic_trace(H, key, products=9),
            stochastic_logdet(H, key, damping, steps=8, probes=3),
            spectrum(H),
        )

    key, damping = jax.random.key(7), 0.5
    plain, again = everything(H, key, damping), everything(H, key, damping)
    jax.tree.map(np.testing.assert_array_equal, plain, again)
    assert {leaf.dtype for leaf in jax.tree.leaves(plain)} == {jnp.dtype("float32")}
    compiled = jax.jit(everything)(H, key, damping)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), plain, compiled)
    assert isinstance(compiled[0], Spectrum)
    assert not compiled[0].exact
    other = stochastic_trace(H, jax.random.key(8), products=9)
    assert other.value != plain[2].value


def test_a_second_call_does_not_compile_again(monkeypatch):
    traces, mv = [], KroneckerProductSum.mv
    monkeypatch.setattr(KroneckerProductSum, "mv", lambda self, vector: traces.append(1) or mv(self, vector))
    counts = []
    for factor in (1.0, 2.0):
        H, key = factor * symmetric(decaying(6.0)[:9], tags=lx.positive_semidefinite_tag), jax.random.key(int(factor))
        spectrum(H, method="lanczos", steps=3, key=key)
        spectral_density(H, key, steps=3, probes=2, points=5)
        stochastic_trace(H, key, products=9)
        stochastic_logdet(H, key, factor, steps=3, probes=2)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1]


def test_any_symmetric_lineax_operator():
    eigenvalues = semicircle()
    matrix = symmetric(eigenvalues).as_matrix()
    H = lx.FunctionLinearOperator(lambda v: matrix @ v, jax.ShapeDtypeStruct((SIZE,), matrix.dtype), lx.symmetric_tag)
    np.testing.assert_allclose(spectrum(H).eigenvalues, eigenvalues, atol=1e-12)
    np.testing.assert_allclose(spectrum(H, method="lanczos").eigenvalues, eigenvalues, atol=1e-10)


def test_inertia_over_training():
    error, p, x = network()
    history = InertiaHistory()
    step = jax.jit(lambda p: inertia_by_block(jaxhess.hessian(error)(p, x)))
    for scale in (0.1, 1.0):
        scaled = jax.tree.map(lambda leaf, scale=scale: scale * leaf, p)
        history.append(10 * scale, step(scaled))
        dense = jaxhess.hessian(error)(scaled, x)
        for place, (path, block) in enumerate(dense.items()):
            eigenvalues = np.linalg.eigvalsh(block.as_matrix())
            zero = 1e-12 * np.abs(eigenvalues).max()
            counts = [history.positive[-1, place], history.negative[-1, place], history.zero[-1, place]]
            expected = np.sum(eigenvalues > zero), np.sum(eigenvalues < -zero), np.sum(np.abs(eigenvalues) <= zero)
            np.testing.assert_array_equal(counts, expected)
            assert history.paths[place] == path
    assert len(history) == 2
    np.testing.assert_array_equal(history.steps, [1.0, 10.0])
    np.testing.assert_array_equal(history.sizes, [3, 12, 6])
    history.append(20, jaxhess.hessian(error)(jax.tree.map(lambda leaf: leaf * jnp.nan, p), x))
    np.testing.assert_array_equal(history.negative[-1], -1)
    np.testing.assert_array_equal(history.sizes, [3, 12, 6])
    with pytest.raises(InputError, match="those of the steps before"):
        history.append(30, BlockDiagonal({"other": Diagonal(jnp.ones(2))}))


@pytest.mark.parametrize("kind", ["full", "gauss_newton"])
def test_inertia_of_the_blocks_of_a_whole(kind):
    H = hessians()[kind]
    for path, counts in inertia_by_block(H, 1e-10).items():
        eigenvalues = np.linalg.eigvalsh(H.block(path).as_matrix())
        assert (counts.positive, counts.negative) == (np.sum(eigenvalues > 1e-10), np.sum(eigenvalues < -1e-10))
        assert sum(counts) == eigenvalues.size


def test_arguments_that_do_not_fit():
    H, key = Diagonal(jnp.ones(4)), jax.random.key(0)
    asymmetric = lx.MatrixLinearOperator(jnp.ones((3, 3)))
    for reading in (spectrum, spectra_by_block, lambda H: spectral_density(H, key), lambda H: stochastic_trace(H, key)):
        with pytest.raises(InputError, match=r"not known to be symmetric|needs a Hessian with blocks"):
            reading(asymmetric)
    for wrong, message in (
        (lambda: spectrum(jnp.ones((3, 3))), "needs a linear operator"),
        (lambda: spectrum(H, method="power"), "method must be"),
        (lambda: spectrum(H, count=5), "count=5 of 4 values"),
        (lambda: spectrum(H, method="lanczos", steps=2, count=3), "count=3 of 2 values; take more steps"),
        (lambda: spectrum(H, steps=0), "steps must be a positive integer"),
        (lambda: spectral_density(H, key, probes=1.5), "probes must be a positive integer"),
        (lambda: spectral_density(H, key, grid=jnp.ones((2, 2))), "grid must be one-dimensional"),
        (lambda: spectral_density(H, key, width=jnp.ones(2)), "width must be one real number"),
        (lambda: exact_density(spectrum(H, count=2)), "has 2 values of 4"),
        (lambda: exact_density(jnp.ones((2, 2))), r"needs eigenvalues \(N,\)"),
        (lambda: stochastic_trace(H, key, products=2), "at least 3 products"),
        (lambda: stochastic_trace(H, key, method="exact"), "method must be"),
        (lambda: inertia_by_block(lx.DiagonalLinearOperator(jnp.ones(2))), "needs a Hessian with blocks"),
        (
            lambda: stochastic_logdet(H.with_tags(lx.positive_semidefinite_tag), key, jnp.ones(2)),
            "damping must be one real number",
        ),
    ):
        with pytest.raises(InputError, match=message):
            wrong()
