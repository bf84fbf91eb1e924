"""Factors from V and Z of each place against the dense block: layers in time and space, matrices in several uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess
from jaxhess.operators import KroneckerProductSum
from jaxhess.optimizers import kronecker_factors
from jaxhess.optimizers.kronecker_factors import factors_of, layout_of
from jaxhess.optimizers.kronecker_places import places_of

R, T = 3, 4


def scanned(p, x):
    h, _ = jax.lax.scan(lambda h, z: (jnp.tanh(p["w"] @ z + p["f"] @ h), None), jnp.zeros(5), x)
    return p["out"] @ h


def unrolled(p, x):
    h = jnp.tanh(p["w"] @ x[0])
    for z in x[1:]:
        h = jnp.tanh(p["w"] @ z + p["f"] @ h)
    return p["out"] @ h


def input_first(p, x):
    h, _ = jax.lax.scan(lambda h, z: (jnp.tanh(z @ p["w"].T + h @ p["f"].T), None), jnp.zeros(5), x)
    return h @ p["out"].T


def at_all_places(p, x):
    return p["out"] @ jnp.mean(jnp.tanh(x @ p["w"].T) @ p["f"].T, axis=0)


def convolved(p, x):
    image = jnp.pad(x, ((0, 2), (0, 0))).reshape(1, 3, 2, 3)
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return p["out"] @ jnp.mean(jnp.tanh(jax.lax.conv_general_dilated(image, p["kernel"], **options))[0], axis=(0, 1))


MODELS = {model.__name__: model for model in (scanned, unrolled, input_first, at_all_places, convolved)}


def params_of(name):
    shapes = {"w": (5, 3), "f": (5, 5), "out": (2, 5)}
    if name == "convolved":
        shapes = {"kernel": (2, 2, 3, 5), "out": (2, 5)}
    rng = np.random.default_rng(1)
    return {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}


def blocks_of(name, kind, r=R):
    rng = np.random.default_rng(2)
    model, params = MODELS[name], params_of(name)
    xs, ts = jnp.asarray(rng.normal(size=(r, T, 3))), jnp.asarray(rng.normal(size=(r, 2)))
    if kind == "fisher":
        return jaxhess.fisher(lambda p, x, t: jaxhess.losses.squared_error(model(p, x), t))(params, xs, ts)
    return jaxhess.gauss_newton(model, lambda y, t: jnp.sum(jnp.array([1.0, 3.0]) * (y - t) ** 2))(params, xs, ts)


def reordered(block, shape):
    """The dense block over the entries of the (m, n) matrix that the parameter is read as, (m, n, m, n)."""
    layout = layout_of(shape)
    order = np.asarray(layout.to_matrix(jnp.arange(np.prod(shape)).reshape(shape))).ravel().astype(int)
    dense = np.asarray(block.as_matrix())[np.ix_(order, order)]
    return dense.reshape(layout.m, layout.n, layout.m, layout.n)


@pytest.mark.parametrize("kind", ["fisher", "gauss_newton"])
@pytest.mark.parametrize("name", MODELS)
def test_the_sides_and_the_diagonal(helpers, name, kind):
    found_any = False
    rng = np.random.default_rng(3)
    for path, block in blocks_of(name, kind).items():
        if isinstance(block, KroneckerProductSum):
            continue
        found = places_of(block)
        assert found is not None, path
        places, layout = found
        found_any = found_any or not places.one
        H = reordered(block, block.in_structure().shape)
        if (layout.m, layout.n) != H.shape[:2] or layout.rows != layout_of(block.in_structure().shape).rows:
            H = H.transpose(1, 0, 3, 2)
        m, n = H.shape[:2]
        A, B = (X @ X.T for X in (rng.normal(size=(m, m)), rng.normal(size=(n, n))))
        helpers.close(places.left(jnp.asarray(B)), np.einsum("ijkl,jl->ik", H, B), 1e-11)
        helpers.close(places.right(jnp.asarray(A)), np.einsum("ijkl,ik->jl", H, A), 1e-11)
        U, W = np.linalg.qr(rng.normal(size=(m, m)))[0], np.linalg.qr(rng.normal(size=(n, n)))[0]
        helpers.close(
            places.diagonal(jnp.asarray(U), jnp.asarray(W)), np.einsum("ijkl,ia,jb,ka,lb->ab", H, U, W, U, W), 1e-11
        )
    assert found_any


@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_of_the_gradients(helpers, name, monkeypatch):
    """The same rounds of alternating least squares by whatever way, with factors that are known and without."""
    for path, block in blocks_of(name, "fisher").items():
        if path == "out":
            continue
        layout = layout_of(block.in_structure().shape)
        known = jnp.eye(layout.m) + 0.1, jnp.eye(layout.n) + 0.3
        results = []
        for which in (places_of, lambda block: None):
            monkeypatch.setattr(kronecker_factors, "places_of", which)
            results.append([factors_of(block, known=known), factors_of(block)])
        for found, expected in zip(*results, strict=True):
            helpers.close(jnp.kron(found.A, found.B), jnp.kron(expected.A, expected.B), 1e-2)
            U, W = jnp.linalg.eigh(found.A)[1], jnp.linalg.eigh(found.B)[1]
            helpers.close(found.exact(U, W), expected.exact(U, W), 1e-11)


def test_many_gradients_are_not_formed(monkeypatch):
    block = dict(blocks_of("scanned", "fisher").items())["f"]
    assert factors_of(block).exact is not None
    monkeypatch.setattr("jaxhess.optimizers.kronecker_places.MOST_NUMBERS", 10)
    monkeypatch.setattr("jaxhess.optimizers.kronecker_factors.MOST_NUMBERS", 10)
    found = factors_of(block)
    assert found.exact is None
    dense = block.as_matrix()
    nearest = jaxhess.operators.nearest_kronecker(block)
    assert np.linalg.norm(np.kron(found.A, found.B) - dense) <= 1.05 * float(nearest.relative_error) * np.linalg.norm(dense)


def test_what_is_no_matrix_that_meets_vectors():
    def masked(p, x):
        return jnp.tanh(x @ (p["w"] * jnp.tril(jnp.ones((3, 3)))).T)

    def entry_by_entry(p, x):
        return jnp.tanh(x * p["w"])

    def both_ways(p, x):
        return jnp.tanh(p["w"].T @ jnp.tanh(p["w"] @ x[0]))

    xs, ts = jnp.ones((2, T, 3)), jnp.zeros((2, 3))
    for model, shape in ((masked, (3, 3)), (entry_by_entry, (T, 3)), (both_ways, (3, 3))):
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=shape))}

        def error(p, x, t, model=model):
            return jnp.sum((model(p, x) - jnp.broadcast_to(t, model(p, x).shape)) ** 2)

        blocks = jaxhess.fisher(error)(params, xs, ts)
        assert places_of(blocks["w"]) is None
        A, B, _ = factors_of(blocks["w"])
        dense = np.asarray(blocks["w"].as_matrix())
        least = float(jaxhess.operators.nearest_kronecker(blocks["w"]).relative_error) * np.linalg.norm(dense)
        assert np.linalg.norm(np.kron(A, B) - dense) <= 1.05 * least
