"""Learning rate and momentum of the quadratic model against its minimum in the plane of two vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess.optimizers.quadratic import Quadratic, best_combination, best_length, combination_of

N = 5


def case(seed, definite=True):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(N, N))
    C = A @ A.T + 0.1 * np.eye(N) if definite else A + A.T
    return C, *rng.normal(size=(3, N))


def tree(vector):
    return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:]).reshape(3, 1)}


def flat(vector):
    return jnp.concatenate([jnp.ravel(vector["a"]), jnp.ravel(vector["b"])])


def stacked(vectors):
    return jax.tree.map(lambda *parts: jnp.stack(parts), *map(tree, vectors))


def quadratic(C, g):
    return Quadratic(tree(g), lambda vector: tree(C @ flat(vector)))


@jax.jit
def combined(C, g, d, v, damping):
    plane = quadratic(C, g).restricted(stacked([d, v]))
    return combination_of([tree(d), tree(v)], plane, best_combination(plane, damping))


def model(C, g, damping, s):
    return g @ s + s @ C @ s / 2 + damping * s @ s / 2


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_the_minimum_in_the_plane(damping):
    for seed in range(5):
        C, g, d, v = case(seed)
        found = combined(C, g, d, v, damping)
        s = flat(found.step)
        plane = np.stack([d, v], axis=1)
        A = C + damping * np.eye(N)
        exact = -np.linalg.solve(plane.T @ A @ plane, plane.T @ g)
        np.testing.assert_allclose([found.learning_rate, found.momentum], exact, rtol=1e-9)
        np.testing.assert_allclose(s, plane @ exact, rtol=1e-9)
        np.testing.assert_allclose(found.curved, s @ C @ s, rtol=1e-9)
        # None of a grid around it is lower.
        lowest = model(C, g, damping, s)
        for a in exact[0] + np.linspace(-1, 1, 7):
            for b in exact[1] + np.linspace(-1, 1, 7):
                assert model(C, g, damping, plane @ [a, b]) >= lowest - 1e-12


@pytest.mark.parametrize("definite", [True, False])
def test_restricted_to_several_vectors(definite):
    C, g, d, v = case(7, definite)
    vectors = np.stack([d, v, g, d + v])
    restricted = quadratic(C, g).restricted(stacked(vectors))
    np.testing.assert_allclose(restricted.forms, vectors @ C @ vectors.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(restricted.inner, vectors @ vectors.T, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(restricted.slopes, vectors @ g, rtol=1e-12)
    c = np.array([0.3, -2.0])
    part = restricted.part([1, 3])
    np.testing.assert_allclose(part.gain(c, 0.4), -model(C, g, 0.4, c @ vectors[[1, 3]]), rtol=1e-10)
    # What is given in the place of products is taken.
    given = quadratic(C, g)._replace(forms=lambda vectors: jnp.full((len(vectors["a"]),) * 2, 2.0))
    np.testing.assert_array_equal(given.restricted(stacked([d, v])).forms, np.full((2, 2), 2.0))


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1e-9, 1e9])
def test_last_steps_that_add_nothing(factor):
    # Zero, or along the direction: the length alone is chosen.
    C, g, d, _ = case(1)
    found = combined(C, g, d, factor * d, 0.3)
    A = C + 0.3 * np.eye(N)
    np.testing.assert_allclose(flat(found.step), -(g @ d) / (d @ A @ d) * d, rtol=1e-8)
    assert np.isfinite(float(found.momentum))
    s = flat(found.step)
    np.testing.assert_allclose(found.curved, s @ C @ s, rtol=1e-7, atol=1e-12)


def test_nearly_parallel_is_no_worse_than_the_length_alone():
    C, g, d, v = case(2)
    for part in (1e-3, 1e-6, 1e-8, 1e-10):
        found = combined(C, g, d, 2 * d + part * v, 0.3)
        alone = -(g @ d) / (d @ (C + 0.3 * np.eye(N)) @ d) * d
        assert model(C, g, 0.3, flat(found.step)) <= model(C, g, 0.3, alone) + 1e-9 * abs(model(C, g, 0.3, alone))


def test_nothing_to_go_by():
    C, g, d, v = case(3)
    zero = np.zeros(N)
    for found in (combined(C, g, zero, v, 0.3), combined(C, g, zero, zero, 0.0), combined(C, zero, zero, v, 0.3)):
        assert np.isfinite(flat(found.step)).all()
        assert np.isfinite(found.curved)
    np.testing.assert_array_equal(flat(combined(C, g, zero, zero, 0.0).step), zero)
    # Without slope the minimum is where it is.
    np.testing.assert_allclose(flat(combined(C, zero, d, v, 0.3).step), zero, atol=1e-12)
    # Without curvature along d the step is d itself.
    np.testing.assert_array_equal(flat(combined(0 * C, g, d, 0 * v, 0.0).step), d)


def test_an_indefinite_plane_has_no_minimum_and_is_left_alone():
    C = np.diag([1.0, -5.0, 1.0, 1.0, 1.0])
    d, v, g = np.eye(N)[0], np.eye(N)[1], -np.ones(N)
    found = combined(C, g, d, v, 0.0)
    np.testing.assert_allclose(flat(found.step), d)
    assert found.momentum == 0
    # Both definite along, indefinite between.
    C = np.eye(N)
    C[0, 1] = C[1, 0] = 2
    np.testing.assert_allclose(flat(combined(C, g, d, v, 0.0).step), d)


def test_length_alone_beside_a_given_momentum():
    C, g, d, v = case(4)
    A = C + 0.2 * np.eye(N)
    length = -(g @ d + 0.9 * d @ A @ v) / (d @ A @ d)
    plane = quadratic(C, g).restricted(stacked([d, v]))
    found = combination_of([tree(d), tree(v)], plane, best_length(plane, jnp.asarray(0.2), 0.9))
    np.testing.assert_allclose([found.learning_rate, found.momentum], [length, 0.9], rtol=1e-10)
    s = length * d + 0.9 * v
    np.testing.assert_allclose(flat(found.step), s, rtol=1e-10)
    np.testing.assert_allclose(found.curved, s @ C @ s, rtol=1e-10)
    line = quadratic(-C, g).restricted(stacked([d]))
    found = combination_of([tree(d)], line, best_length(line, jnp.asarray(0.2)))
    np.testing.assert_allclose(flat(found.step), d)
    assert found.momentum == 0
