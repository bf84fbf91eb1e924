"""The minimum within a ball against its optimality conditions, and against bisection in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxhess
from jaxhess import optimizers
from jaxhess.operators import Dense
from jaxhess.optimizers.trust_region import minimum_in_ball


@functools.cache
def compiled():
    return jax.jit(minimum_in_ball)


def minimum(H, g, radius):
    """s, λ and ||s||, by the eigendecomposition of H."""
    values, vectors = np.linalg.eigh(H)
    found = compiled()(jnp.asarray(values), jnp.asarray(vectors.T @ g), radius)
    return vectors @ np.asarray(found.coordinates), float(found.damping), float(found.length)


def by_bisection(H, g, radius):
    """s(λ) of ||s|| = radius; not for the hard case."""
    eye, low = np.eye(len(g)), max(0.0, -np.linalg.eigvalsh(H)[0])

    def step(damping):
        return -np.linalg.solve(H + damping * eye, g)

    if low == 0 and np.linalg.eigvalsh(H)[0] > 0 and np.linalg.norm(step(0.0)) <= radius:
        return step(0.0)
    above = low + 2 * np.linalg.norm(g) / radius
    below = low
    for _ in range(200):
        middle = (below + above) / 2
        below, above = (middle, above) if np.linalg.norm(step(middle)) > radius else (below, middle)
    return step(above)


def check(H, g, radius, tolerance=1e-8):
    """Necessary and sufficient: (H + λ) s = -g, H + λ >= 0, λ >= 0, ||s|| <= Δ, equal where λ > 0 (Moré and Sorensen)."""
    s, damping, length = minimum(H, g, radius)
    lowest, size = np.linalg.eigvalsh(H)[0], np.linalg.norm(H, 2)
    scale = np.linalg.norm(g) + (size + damping) * radius
    assert np.isfinite(s).all()
    np.testing.assert_allclose(length, np.linalg.norm(s), rtol=1e-12)
    assert length <= radius * (1 + 1e-9)
    assert damping >= 0
    assert damping >= -lowest - tolerance * size
    assert np.linalg.norm(H @ s + damping * s + g) <= tolerance * scale
    assert damping * (radius - length) * radius <= tolerance * scale * radius
    return s, damping


def random_case(seed, k=5):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(k, k))
    return A + A.T, rng.normal(size=k)


@pytest.mark.parametrize("radius", [1e-6, 1e-2, 0.3, 1.0, 30.0, 1e5])
def test_random_indefinite_matrices(radius):
    for seed in range(8):
        H, g = random_case(seed)
        s, _ = check(H, g, radius)
        np.testing.assert_allclose(np.linalg.norm(s), radius, rtol=1e-8)
        np.testing.assert_allclose(s, by_bisection(H, g, radius), rtol=1e-6, atol=1e-7 * radius)


def test_definite_matrices_inside_and_at_the_boundary():
    for seed in range(4):
        A, g = random_case(seed)
        H = A @ A.T + 0.1 * np.eye(5)
        newton = -np.linalg.solve(H, g)
        length = np.linalg.norm(newton)
        s, damping = check(H, g, 1.01 * length)
        np.testing.assert_allclose(s, newton, rtol=1e-9)
        assert damping == 0
        s, damping = check(H, g, 0.9 * length)
        np.testing.assert_allclose(s, by_bisection(H, g, 0.9 * length), rtol=1e-7)
        assert damping > 0


def test_the_hard_case():
    # The gradient has no part along the lowest eigenvector: what is missing to the radius is taken along it.
    H, g = np.diag([-2.0, 1.0, 3.0, 3.0, 4.0]), np.array([0.0, 1.0, 0.5, -0.5, 0.0])
    inner = -g[1:] / (np.diag(H)[1:] + 2)
    s, damping = check(H, g, 2.0)
    np.testing.assert_allclose(damping, 2.0, rtol=1e-9)
    np.testing.assert_allclose(s[1:], inner, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(abs(s[0]), np.sqrt(4 - inner @ inner), rtol=1e-9)
    # Within a smaller ball it is not hard.
    _, damping = check(H, g, 0.1)
    assert damping > 2.1
    # A slope that is nearly nothing: downhill along it.
    for slope in (1e-12, -1e-12, 1e-300):
        s, _ = check(H, g + np.array([slope, 0, 0, 0, 0]), 2.0)
        assert s[0] * slope < 0
    # Lowest eigenvalue twice, and a saddle without a slope.
    check(np.diag([-2.0, -2.0, 1.0, 1.0, 1.0]), g * [0, 0, 1, 1, 1], 3.0)
    s, _ = check(np.diag([-2.0, 1.0, 1.0, 1.0, 1.0]), np.zeros(5), 3.0)
    np.testing.assert_allclose(np.abs(s), [3, 0, 0, 0, 0], atol=1e-12)


def test_singular_matrices():
    H = np.diag([0.0, 0.0, 1.0, 2.0, 3.0])
    # No slope where there is no curvature: the minimum of the rest.
    s, _ = check(H, np.array([0.0, 0.0, 1.0, -2.0, 3.0]), 10.0)
    np.testing.assert_allclose(s, [0, 0, -1, 1, -1], atol=1e-9)
    # A slope there: as far as the radius goes.
    s, _ = check(H, np.array([1.0, 0.0, 1.0, -2.0, 3.0]), 10.0)
    np.testing.assert_allclose(np.linalg.norm(s), 10.0, rtol=1e-9)
    assert s[0] < -9
    # No curvature and no slope at all.
    s, _ = check(np.diag([0.0, 1.0, 1.0, 1.0, 1.0]), np.zeros(5), 1.0)
    np.testing.assert_array_equal(s, np.zeros(5))


def test_without_any_curvature_the_step_is_along_the_gradient():
    g = np.array([3.0, 4.0, 0.0, 0.0, 0.0])
    for radius in (1e-3, 1.0, 1e3):
        s, _ = check(np.zeros((5, 5)), g, radius)
        np.testing.assert_allclose(s, -radius * g / 5, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e20])
def test_scale_is_no_matter(scale):
    for seed in range(3):
        H, g = random_case(seed)
        s, damping = check(H, g, 0.7)
        scaled, scaled_damping = check(scale * H, scale * g, 0.7)
        np.testing.assert_allclose(scaled, s, rtol=1e-8)
        np.testing.assert_allclose(scaled_damping, scale * damping, rtol=1e-8)
        np.testing.assert_allclose(check(H, scale * g, 0.7 * scale)[0], scale * s, rtol=1e-8)


def test_float32():
    H, g = random_case(1)
    values, vectors = np.linalg.eigh(H)
    found = compiled()(jnp.asarray(values, jnp.float32), jnp.asarray(vectors.T @ g, jnp.float32), 0.5)
    assert found.coordinates.dtype == jnp.float32
    np.testing.assert_allclose(vectors @ np.asarray(found.coordinates), by_bisection(H, g, 0.5), rtol=2e-4, atol=1e-5)
    assert found.length <= 0.5 * (1 + 1e-5)


NUMBERS = st.floats(-3, 3, allow_subnormal=False)


@settings(max_examples=60)
@given(
    st.lists(NUMBERS, min_size=4, max_size=4), st.lists(NUMBERS, min_size=4, max_size=4), st.floats(1e-3, 1e3),
    st.integers(0, 2**31),
)  # fmt: skip
def test_no_point_of_the_ball_is_lower(values, gradient, radius, seed):
    mu, g = np.array(values), np.array(gradient)
    found = compiled()(jnp.asarray(mu), jnp.asarray(g), radius)
    s = np.asarray(found.coordinates)
    points = np.random.default_rng(seed).normal(size=(200, 4))
    points *= radius / np.linalg.norm(points, axis=1, keepdims=True)
    points = np.concatenate([points, points * np.linspace(0, 1, 200)[:, None], np.eye(4) * radius, -np.eye(4) * radius])

    def model(x):
        return x @ g + np.sum(mu * x**2, axis=-1) / 2

    scale = radius * np.linalg.norm(g) + radius**2 * np.max(np.abs(mu))
    assert np.linalg.norm(s) <= radius * (1 + 1e-9)
    assert model(s) <= np.min(model(points)) + 1e-9 * scale


def made(decay=0.0):
    rule = optimizers.TrustRadius(0.2)
    return optimizers.scale_by_newton("trust_region", "full", damping=rule, weight_decay=decay)


def test_the_optimizer_steps_to_the_minimum_within_its_radius(net, helpers):
    D, (value, gradient) = net.dense_hessian(), net.value_and_gradient
    assert np.linalg.eigvalsh(D)[0] < -1e-3
    H = jax.jit(jaxhess.hessian(net.error, blocks="full"))(net.params, *net.batch)
    optimizer = made()
    update = jax.jit(lambda g, s, p, H: optimizer.update(g, s, p, curvature=H, value=value, value_fn=net.mean))
    updates, state = update(gradient, optimizer.init(net.params), net.params, H)
    s = by_bisection(D, net.gradient, 0.2)
    helpers.close(-helpers.flat(updates), s, 1e-7)
    info = state.info
    assert info.solver_name == "trust region by eigendecomposition"
    helpers.close(info.predicted, -(net.gradient @ s + s @ D @ s / 2), 1e-7)
    fell = float(value - net.mean(net.tree(net.flat + s)))
    helpers.close(info.ratio, fell / float(info.predicted), 1e-6)
    assert info.accepted
    ratio = float(info.ratio)
    helpers.close(state.control.damping, 0.4 if ratio > 0.75 else 0.2 if ratio >= 0.25 else 0.05, 1e-7)


def test_weight_decay_is_the_penalty(net, helpers):
    penalised = functools.partial(net.mean, error=net.penalised)
    H = jax.jit(jaxhess.hessian(net.error, blocks="full"))(net.params, *net.batch)
    (value, gradient), D = net.value_and_gradient, net.dense_hessian(net.penalised)
    optimizer = made(net.decay)
    update = jax.jit(lambda g, s, p, H: optimizer.update(g, s, p, curvature=H, value=value, value_fn=net.mean))
    updates, state = update(gradient, optimizer.init(net.params), net.params, H)
    s = by_bisection(D, net.gradient + net.decay * net.flat, 0.2)
    helpers.close(-helpers.flat(updates), s, 1e-7)
    helpers.close(state.info.loss, penalised(net.params))
    helpers.close(state.info.new_loss, penalised(net.tree(net.flat + s)), 1e-7)


def quadratic_update(f, x, rule, **options):
    """One eager update at x of a function of two numbers."""
    optimizer = optimizers.scale_by_newton("trust_region", "full", damping=rule, **options)
    params = {"x": jnp.asarray(x, float)}

    def error(p, scale):
        return scale * f(p["x"])

    ones = jnp.ones(1)
    H = jaxhess.hessian(error, blocks="full")(params, ones)
    grads = jax.grad(error)(params, 1.0)
    state = optimizer.init(params)
    return optimizer.update(grads, state, params, curvature=H, value=f(params["x"]), value_fn=lambda p: f(p["x"]))


def test_a_point_without_slope_keeps_the_radius():
    updates, state = quadratic_update(lambda x: jnp.sum(x**2), [0.0, 0.0], optimizers.TrustRadius(0.5))
    np.testing.assert_array_equal(updates["x"], [0, 0])
    assert state.control.damping > 0


def test_a_saddle_is_left_though_there_is_no_slope():
    updates, state = quadratic_update(lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4, [0.0, 0.0], optimizers.TrustRadius(0.5))
    np.testing.assert_allclose(np.abs(updates["x"]), [0, 0.5], atol=1e-9)
    assert state.info.accepted


def test_refused_steps_are_tried_with_a_quarter_of_the_radius():
    # The slope at 0 says down to the right; it rises again within 0.1.
    def f(x):
        return jnp.sum(-x + 1e-3 * x**2 + 100 * x**4 * jnp.sign(x))

    updates, state = quadratic_update(f, [0.0, 0.0], optimizers.TrustRadius(4.0))
    lengths = 4.0 / 4.0 ** np.arange(8)
    expected = next(length for length in lengths if f(jnp.full(2, length / np.sqrt(2))) <= 0)
    np.testing.assert_allclose(-np.asarray(updates["x"]), np.full(2, expected / np.sqrt(2)), rtol=1e-8)
    assert state.info.attempts == 1 + list(lengths).index(expected)
    updates, state = quadratic_update(f, [0.0, 0.0], optimizers.TrustRadius(4.0), max_attempts=2)
    np.testing.assert_array_equal(updates["x"], [0, 0])
    np.testing.assert_allclose(state.control.damping, 4.0 / 16, rtol=1e-8)
    assert not state.info.accepted


def test_the_value_alone_judges_the_last_step():
    H, g = np.diag([1.0, -2.0]), np.ones(2)
    optimizer = optimizers.scale_by_newton("trust_region", "full", damping=optimizers.TrustRadius(0.4))
    update = jax.jit(lambda s, value: optimizer.update(jnp.ones(2), s, curvature=Dense(jnp.asarray(H)), value=value))
    for ratio, radius in ((1.0, 0.8), (0.5, 0.4), (0.1, 0.1), (-1.0, 0.1)):
        updates, state = update(optimizer.init(jnp.ones(2)), 3.0)
        np.testing.assert_allclose(-updates, by_bisection(H, g, 0.4), rtol=1e-8)
        updates, state = update(state, 3.0 - ratio * float(state.info.predicted))
        np.testing.assert_allclose(state.control.damping, radius, rtol=1e-9)
        np.testing.assert_allclose(-updates, by_bisection(H, g, radius), rtol=1e-8)


def test_the_value_alone_does_not_enlarge_a_radius_that_was_not_reached():
    H, optimizer = Dense(jnp.diag(jnp.array([1.0, 2.0]))), optimizers.scale_by_newton("trust_region", "full")
    state = optimizer.init(jnp.ones(2))
    value, g = 3.0, jnp.array([0.1, 0.2])  # Newton's step has the length 0.14, the radius is 1
    for _ in range(3):
        _, state = optimizer.update(g, state, curvature=H, value=value)
        value = value - float(state.info.predicted)
    np.testing.assert_allclose(state.info.length, np.hypot(0.1, 0.1), rtol=1e-9)
    assert state.control.damping == 1


@pytest.mark.parametrize("learning_rate", [0.5, 1.0])
def test_a_radius_limits_the_direction_whatever_the_learning_rate(learning_rate):
    def f(x):
        return -jnp.sum(x) + 1e-9 * jnp.sum(x**2)  # as far as one goes, the model is right

    updates, state = quadratic_update(f, [0.0, 0.0], optimizers.TrustRadius(0.5), learning_rate=learning_rate)
    np.testing.assert_allclose(np.linalg.norm(updates["x"]), 0.5 * learning_rate, rtol=1e-6)
    np.testing.assert_allclose(state.control.damping, 1.0, rtol=1e-9)


def test_no_radius_no_step():
    found = minimum_in_ball(jnp.array([1.0, -2.0]), jnp.ones(2), jnp.zeros(()))
    np.testing.assert_array_equal(found.coordinates, [0, 0])


def test_a_single_array_with_a_dense_operator():
    optimizer = optimizers.scale_by_newton("trust_region", "full", damping=optimizers.TrustRadius(0.1))
    params, H = jnp.ones(2), Dense(jnp.diag(jnp.array([1.0, -2.0])))
    updates, _ = optimizer.update(jnp.ones(2), optimizer.init(params), params, curvature=H, value=0.0)
    np.testing.assert_allclose(-updates, by_bisection(np.diag([1.0, -2.0]), np.ones(2), 0.1), rtol=1e-8)
