"""Eigenvalue bounds against the eigenvalues of the dense matrix."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess
from jaxhess import naumov2017
from jaxhess._typing import InputError
from jaxhess.activations import relu, softplus, tanh
from jaxhess.bounds import cross_term_bounds, naumov_bounds, weyl_bounds
from jaxhess.operators import KroneckerProductSum, Layout

BOUNDS = [weyl_bounds, naumov_bounds]


def _data(r, steps, m, n, seed=0):
    """Indefinite Q (r, τ, m, τ, m), each symmetric as a (τm, τm) matrix, and Z (r, τ, n)."""
    random = np.random.default_rng(seed)
    Q = random.normal(size=(r, steps, m, steps, m))
    return jnp.asarray(Q + Q.transpose(0, 3, 4, 1, 2)), jnp.asarray(random.normal(size=(r, steps, n)))


def _dense(Q, Z):
    size = Q.shape[2] * Z.shape[2]
    return jnp.einsum("rsitj,rsq,rtp->iqjp", Q, Z, Z).reshape(size, size) / len(Q)


def _check_contains(bounds, eigenvalues):
    tolerance = 1e-12 * max(1.0, float(jnp.max(jnp.abs(eigenvalues))))
    assert bounds.lower.shape == bounds.upper.shape == eigenvalues.shape
    assert bool(jnp.all(jnp.diff(bounds.lower) >= 0))
    assert bool(jnp.all(jnp.diff(bounds.upper) >= 0))
    assert bool(jnp.all(bounds.lower <= eigenvalues + tolerance))
    assert bool(jnp.all(bounds.upper >= eigenvalues - tolerance))


def _check(Q, Z, eigenvalues, anchor=None):
    tight, wide = weyl_bounds(Q, Z, anchor=anchor), naumov_bounds(Q, Z, anchor=anchor)
    _check_contains(tight, eigenvalues)
    _check_contains(wide, eigenvalues)
    assert bool(jnp.all(wide.lower <= tight.lower + 1e-12))
    assert bool(jnp.all(wide.upper >= tight.upper - 1e-12))


@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 4), (1, 3, 2, 4), (4, 1, 3, 2), (3, 4, 2, 3), (2, 3, 1, 1), (2, 2, 3, 1)], ids=str
)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_contain_the_eigenvalues_for_every_anchor(shape, seed):
    Q, Z = _data(*shape, seed=seed)
    eigenvalues = jnp.linalg.eigvalsh(_dense(Q, Z))
    _check(Q, Z, eigenvalues)
    for anchor in itertools.product(range(shape[0]), range(shape[1])):
        _check(Q, Z, eigenvalues, anchor)


@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_of_semidefinite_terms_keep_the_sign(sign):
    Q, Z = _data(5, 1, 3, 4)
    Q = sign * jnp.einsum("rsitk,rsjtk->rsitj", Q, Q)
    bounds = weyl_bounds(Q, Z)
    _check(Q, Z, jnp.linalg.eigvalsh(_dense(Q, Z)))
    assert bool(jnp.all(bounds.lower >= 0) if sign > 0 else jnp.all(bounds.upper <= 0))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("n", [1, 4])
def test_one_term_is_exact(bounds, n):
    Q, Z = _data(1, 1, 3, n)
    lower, upper = bounds(Q, Z)
    np.testing.assert_allclose(lower, jnp.linalg.eigvalsh(_dense(Q, Z)), atol=1e-13)
    np.testing.assert_array_equal(lower, upper)


def test_the_formulas_term_by_term():
    """Section 8 of the mathematics, written out with dense terms."""
    r, steps, m, n = 2, 3, 2, 3
    Q, Z = (np.asarray(a) for a in _data(r, steps, m, n))
    terms = {(i, s): np.kron(Q[i, s, :, s], np.outer(Z[i, s], Z[i, s])) for i in range(r) for s in range(steps)}
    extremes = {place: np.linalg.eigvalsh(B)[[0, -1]] for place, B in terms.items()}
    cross = [
        np.linalg.norm(Q[i, s, :, t], 2) * np.linalg.norm(Z[i, s]) * np.linalg.norm(Z[i, t])
        for i in range(r)
        for s, t in itertools.combinations(range(steps), 2)
    ]
    for anchor in terms:
        kept = np.linalg.eigvalsh(terms[anchor])
        low, high = np.array([e for place, e in extremes.items() if place != anchor]).T
        tight, wide = weyl_bounds(Q, Z, anchor=anchor), naumov_bounds(Q, Z, anchor=anchor)
        np.testing.assert_allclose(tight.lower, (kept + low.sum() - 2 * sum(cross)) / r, atol=1e-12)
        np.testing.assert_allclose(tight.upper, (kept + high.sum() + 2 * sum(cross)) / r, atol=1e-12)
        pairs = r * steps * (steps - 1)
        np.testing.assert_allclose(wide.lower, (kept + len(low) * low.min() - pairs * max(cross)) / r, atol=1e-12)
        np.testing.assert_allclose(wide.upper, (kept + len(low) * high.max() + pairs * max(cross)) / r, atol=1e-12)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_ways_to_give_the_data_agree(bounds):
    Q, Z = _data(1, 3, 2, 4)
    for anchor in range(-3, 3):
        np.testing.assert_array_equal(bounds(Q[0], Z[0], anchor=anchor), bounds(Q, Z, anchor=(0, anchor)))
    np.testing.assert_array_equal(bounds(Q[0], Z[0]), bounds(Q, Z, anchor=(0, 2)))
    Q, Z = _data(3, 1, 2, 4)
    for anchor in range(-3, 3):
        np.testing.assert_array_equal(bounds(Q[:, 0, :, 0], Z[:, 0], anchor=anchor), bounds(Q, Z, anchor=(anchor, 0)))
    H = KroneckerProductSum(Q[:, 0, :, 0], Z[:, 0])
    np.testing.assert_array_equal(bounds(H), bounds(Q, Z))
    np.testing.assert_array_equal(bounds(H, anchor=1), bounds(Q, Z, anchor=(1, 0)))


@pytest.mark.parametrize("f", [tanh, relu, softplus])
@pytest.mark.parametrize("start", [1, 4])
def test_bounds_of_a_recurrent_network(f, start):
    """W and b of both layers; the blocks of `corrected_recurrent_hessian` are tested against `jax.hessian`."""
    random = np.random.default_rng(0)
    shapes = [(3, 2), (2, 3)]
    weights = [jnp.asarray(random.normal(size=shape)) for shape in shapes]
    feedbacks = [jnp.asarray(random.normal(size=(m, m))) for m, _ in shapes]
    biases = [jnp.asarray(random.normal(size=m)) for m, _ in shapes]
    inputs, targets = jnp.asarray(random.normal(size=(4, 2))), jnp.asarray(random.normal(size=(4, 2)))
    H = naumov2017.corrected_recurrent_hessian(weights, feedbacks, biases, f, inputs, targets, start)
    z = naumov2017.recurrent_forward(weights, feedbacks, biases, f, inputs).outputs
    for k in range(2):
        for anchor in range(4):
            _check(H.Q[k], z[k], jnp.linalg.eigvalsh(H.weights[k]), anchor)
            _check(H.Q[k], jnp.ones((4, 1)), jnp.linalg.eigvalsh(H.biases[k]), anchor)


def test_bounds_of_a_recurrent_weight_by_autodiff_alone():
    random = np.random.default_rng(1)
    W, U, x = (jnp.asarray(random.normal(size=shape)) for shape in [(3, 2), (3, 3), (4, 2)])

    def error(W, probes):
        state, total = jnp.zeros(3), 0.0
        for s in range(4):
            state = jnp.tanh(W @ x[s] + U @ state + probes[s])
            total += jnp.sum((state - 1.0) ** 2)
        return total

    probes = jnp.zeros((4, 3))
    dense = jax.jit(jax.hessian(error))(W, probes).reshape(6, 6)
    _check(jax.jit(jax.hessian(error, 1))(W, probes), x, jnp.linalg.eigvalsh(dense))


def test_bounds_of_a_batch_of_a_network():
    random = np.random.default_rng(2)
    w, v, x = (jnp.asarray(random.normal(size=shape)) for shape in [(4, 3), (2, 4), (5, 3)])

    def loss(parameters, x):
        return jnp.sum((parameters["v"] @ jnp.tanh(parameters["w"] @ x)) ** 2 - jnp.sin(x[0]))

    parameters = {"w": w, "v": v}
    H = jaxhess.hessian(loss)(parameters, x)["w"]
    _check(H, None, jnp.linalg.eigvalsh(H.as_matrix()))
    assert bool(jnp.any(H.eigvalsh() < 0))


def test_bounds_of_an_operator_do_not_depend_on_its_layout():
    Q, Z = _data(3, 1, 2, 4)
    H = KroneckerProductSum(Q[:, 0, :, 0], Z[:, 0], Layout.transposed(2, 4))
    _check(H, None, jnp.linalg.eigvalsh(H.as_matrix()))


@pytest.mark.parametrize("bounds", BOUNDS)
def test_transformations(bounds):
    Q, Z = _data(2, 3, 2, 4)
    plain = bounds(Q, Z, anchor=(1, 0))
    np.testing.assert_allclose(jax.jit(lambda Q, Z: bounds(Q, Z, anchor=(1, 0)))(Q, Z), plain, atol=1e-12)
    each = jax.vmap(bounds)(Q, Z)
    for i in range(2):
        np.testing.assert_allclose((each.lower[i], each.upper[i]), bounds(Q[i], Z[i]), atol=1e-12)
    H = KroneckerProductSum(Q[0, :, :, 0], Z[0])
    np.testing.assert_allclose(jax.jit(bounds)(H), bounds(H), atol=1e-12)


@pytest.mark.parametrize(("dtype", "result"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32)])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_dtypes(bounds, dtype, result):
    Q, Z = (a.astype(dtype) for a in _data(2, 3, 2, 4))
    for bound, expected in zip(bounds(Q, Z), bounds(Q.astype(float), Z.astype(float)), strict=True):
        assert bound.dtype == result
        np.testing.assert_allclose(bound, expected, rtol=1e-5, atol=1e-4)
    assert cross_term_bounds(Q[0, 0, :, 1], Z[0, 0], Z[0, 1]).dtype == result


def _cross_terms():
    random = np.random.default_rng(3)
    for m, n, seed in itertools.product((1, 2, 4), (1, 2, 3), range(20)):
        Q = random.normal(size=(m, m)) if seed % 2 else np.outer(random.normal(size=m), random.normal(size=m))
        z, w = random.normal(size=(2, n))
        w = (w, z, -z)[seed % 3]
        B = np.kron(Q, np.outer(z, w))
        yield Q, z, w, np.linalg.eigvalsh(B + B.T)


def test_cross_term_bounds_hold():
    for Q, z, w, eigenvalues in _cross_terms():
        bounds = cross_term_bounds(jnp.asarray(Q), jnp.asarray(z), jnp.asarray(w))
        assert bounds.shape == eigenvalues.shape
        assert np.all(np.sort(np.abs(eigenvalues)) <= bounds + 1e-12)
        greatest = 2 * np.linalg.norm(Q, 2) * np.linalg.norm(z) * np.linalg.norm(w)
        np.testing.assert_allclose(bounds[-1], greatest, rtol=1e-12)


def test_107_as_printed_fails():
    """|λ_q| with λ ascending, against σ_q(C) + σ_m(C), q = 1..m: λ_1 may be as large as -2 σ_m, and σ_1 zero."""
    failures = 0
    for Q, z, w, eigenvalues in _cross_terms():
        singular = np.sort(np.linalg.svd(Q, compute_uv=False))
        printed = np.linalg.norm(z) * np.linalg.norm(w) * (singular + singular[-1])
        failures += np.any(np.abs(eigenvalues[: len(Q)]) > printed * (1 + 1e-9))
    assert failures > 20
    z = jnp.array([1.0, 0.0])
    Q = jnp.diag(jnp.array([1.0, 0.0]))
    B = -jnp.kron(Q, jnp.outer(z, z))
    np.testing.assert_allclose(jnp.linalg.eigvalsh(B + B.T)[0], -2.0)  # printed: at most 0 + 1 in absolute value


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    ("q_shape", "z_shape"),
    [
        ((2, 3, 4, 3, 4), (2, 2, 5)),
        ((2, 3, 4, 3, 4), (3, 5)),
        ((3, 4, 3, 5), (3, 5)),
        ((3, 4, 3, 4), (1, 3, 5)),
        ((3, 4, 4), (2, 5)),
        ((3, 4, 4), (1, 3, 5)),
        ((3, 4, 4), (5,)),
        ((3, 4, 4), ()),
        ((4, 4), (5,)),
        ((), (3, 5)),
        ((0, 4, 4), (0, 5)),
        ((3, 4, 4), (3, 0)),
    ],
)
def test_shapes_that_do_not_fit(bounds, q_shape, z_shape):
    with pytest.raises(InputError) as caught:
        bounds(jnp.ones(q_shape), jnp.ones(z_shape))
    assert f"got {q_shape} and {z_shape}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "anchor"),
    [("both", 0), ("both", (2, 0)), ("both", (0, 3)), ("both", (0, 0, 0)), ("time", 3), ("time", -4), ("batch", (0, 0))],
)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_anchors_that_are_no_term(bounds, kind, anchor):
    Q, Z = _data(2, 3, 2, 4)
    data = {"both": (Q, Z), "time": (Q[0], Z[0]), "batch": (Q[:, 0, :, 0], Z[:, 0])}[kind]
    with pytest.raises(InputError, match="anchor must be the place of one of"):
        bounds(*data, anchor=anchor)


@pytest.mark.parametrize("bounds", BOUNDS)
def test_other_arguments_that_do_not_fit(bounds):
    Q, Z = jnp.ones((3, 2, 2)), jnp.ones((3, 4))
    H = KroneckerProductSum(Q, Z)
    with pytest.raises(InputError, match=r"own Z, got another of shape \(3, 4\)"):
        bounds(H, Z)
    with pytest.raises(InputError, match="or an operator that holds them, got a Diagonal alone"):
        bounds(jaxhess.operators.Diagonal(Z))
    for anchor in (1.5, "last", [0]):
        with pytest.raises(InputError, match="Python integers"):
            bounds(Q, Z, anchor=anchor)
    with pytest.raises(InputError, match="Python integers"):
        jax.jit(lambda anchor: bounds(Q, Z, anchor=anchor))(1)
    with pytest.raises(InputError, match="must be a real floating-point array, got dtype int"):
        bounds(jnp.ones((3, 2, 2), int), Z)


@pytest.mark.parametrize("shapes", [((2, 3), (4,), (4,)), ((2,), (4,), (4,)), ((2, 2), (4,), (3,)), ((2, 2), (0,), (0,))])
def test_cross_term_shapes_that_do_not_fit(shapes):
    with pytest.raises(InputError) as caught:
        cross_term_bounds(*(jnp.ones(shape) for shape in shapes))
    assert "got {}, {} and {}".format(*shapes) in str(caught.value)
