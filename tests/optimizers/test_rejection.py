"""Steps that raise the loss, and numbers that are not finite: nothing is taken, and all is as before but the damping."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import jaxhess
from jaxhess import optimizers
from jaxhess.operators import BlockDiagonal, Dense, Diagonal
from jaxhess.optimizers import TrustRadius, gauss_newton, kronecker_newton, levenberg_marquardt, newton

X = jnp.array([1.0, -2.0])
H = jnp.array([[2.0, 0.5], [0.5, 1.0]])
RULE = {"damping": levenberg_marquardt(0.1)}
OPTIMIZERS = {
    "newton": functools.partial(newton, **RULE),
    "trust_region": functools.partial(newton, "trust_region", "full", damping=TrustRadius(1.0)),
    "gauss_newton": functools.partial(gauss_newton, **RULE),
    "kronecker_newton": functools.partial(kronecker_newton, every=1, **RULE),
}
RAISED = (RuntimeError, ValueError)  # as JAX passes on what compiled code raises
each = pytest.mark.parametrize("name", OPTIMIZERS)


def loss(x):
    return x @ H @ x / 2


@functools.cache
def updating(name, function=loss, **options):
    """The optimizer, and its update compiled for parameters, state, gradient, curvature and value."""
    optimizer = OPTIMIZERS[name](**options)

    @jax.jit
    def update(x, state, g, matrix, value):
        dense = Dense(matrix, tags=lx.positive_semidefinite_tag if name == "gauss_newton" else ())
        curvature = BlockDiagonal(dense) if name != "trust_region" else dense
        return optimizer.update(g, state, x, curvature=curvature, value=value, value_fn=function)

    return optimizer, update


def rises(x):
    """As much as there is to find: every other point is worse."""
    return jnp.where(jnp.all(x == X), 1.0, 2.0)


@each
def test_where_all_attempts_fail_nothing_moves(name, helpers):
    optimizer, update = updating(name, rises, max_attempts=3, max_failures=2)
    state = optimizer.init(X)
    control = helpers.find(state).control
    damping, growth = float(control.damping), 2.0
    for _ in range(4):  # mere refusals are no failures: more of them than max_failures
        before = float(helpers.find(state).control.damping)
        updates, state = update(X, state, H @ X, H, 1.0)
        np.testing.assert_array_equal(updates, [0, 0])
        found = helpers.find(state)
        assert not found.info.accepted
        assert found.info.attempts == 3
        assert found.failures == 0
        assert found.info.new_loss == 2
        if name == "trust_region":
            assert 0 < found.control.damping <= before / 64 * (1 + 1e-9)
        else:
            for _ in range(3):
                damping, growth = damping * growth, min(2 * growth, 16)
            np.testing.assert_allclose(found.control.damping, damping, rtol=1e-12)
    assert found.count == 4


@pytest.mark.parametrize(
    ("times_too_long", "taken", "attempts"),
    # The parabola is the error itself: its minimum is 1 / times_too_long of the step, but no less than a tenth.
    [(1.2, 1.2, 1), (2.5, 1.0, 1), (4.0, 1.0, 1), (9.0, 1.0, 1), (15.0, 1.5, 1), (30.0, 1.5, 2)],
)
def test_a_step_that_is_too_long_is_shortened_to_the_minimum_of_a_parabola(helpers, times_too_long, taken, attempts):
    optimizer, update = updating("kronecker_newton", damping=1e-13)
    updates, state = update(X, optimizer.init(X), H @ X, H / times_too_long, loss(X))
    np.testing.assert_allclose(updates, -taken * X, rtol=1e-9)
    info = helpers.find(state).info
    assert (info.attempts, info.accepted) == (attempts, True)
    part = taken / times_too_long
    np.testing.assert_allclose(info.predicted, loss(X) * (2 * taken - times_too_long * part**2), rtol=1e-9)
    np.testing.assert_allclose(info.new_loss, loss((1 - taken) * X), rtol=1e-9, atol=1e-16)
    np.testing.assert_allclose(info.ratio * info.predicted, loss(X) - info.new_loss, rtol=1e-9)


@pytest.mark.parametrize("options", [{"max_iterations": 1}, {"momentum": None}], ids=str)
def test_a_shortened_step_is_that_of_its_learning_rate(helpers, options):
    optimizer, update = updating("kronecker_newton", damping=1e-13, **options)
    updates, state = update(X, optimizer.init(X), H @ X, H / 2.5, loss(X))
    np.testing.assert_allclose(updates, -X, rtol=1e-9)
    info = helpers.find(state).info
    np.testing.assert_allclose(info.learning_rate * 2.5, 1, rtol=1e-9)
    assert info.attempts == 1


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.0}], ids=str)
def test_a_given_length_is_not_shortened(helpers, options):
    optimizer, update = updating("kronecker_newton", damping=1e-13, learning_rate=1.0, **options)
    updates, state = update(X, optimizer.init(X), H @ X, H / 1.8, loss(X))
    np.testing.assert_allclose(updates, -1.8 * X, rtol=1e-9)
    assert helpers.find(state).info.ratio < 0.5


@each
@pytest.mark.parametrize("what", ["loss", "gradient", "curvature"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_numbers_that_are_not_finite(name, helpers, what, bad):
    optimizer, update = updating(name, max_failures=3)
    good = {"g": H @ X, "matrix": H, "value": loss(X)}
    spoiled = {
        "loss": good | {"value": bad},
        "gradient": good | {"g": good["g"].at[1].set(bad)},
        "curvature": good | {"matrix": H.at[0, 0].set(bad)},
    }[what]
    _, state = update(X, optimizer.init(X), **good)
    for failures in (1, 2):
        before = helpers.find(state)
        updates, state = update(X, state, **spoiled)
        np.testing.assert_array_equal(updates, [0, 0])
        after = helpers.find(state)
        assert after.failures == failures
        assert not after.info.accepted
        assert np.isfinite(after.control.damping)
        if name == "trust_region":
            assert after.control.damping < before.control.damping
        else:
            assert after.control.damping > before.control.damping
        for leaf in jax.tree.leaves((after.previous, after.memory)):
            assert np.isfinite(leaf).all()
    failed = state
    updates, state = update(X, state, **good)
    after = helpers.find(state)
    assert after.failures == 0
    assert after.info.accepted
    assert loss(X + updates) < loss(X)
    with pytest.raises(RAISED, match=r"newton: 3 updates in a row met a loss, gradient or curvature"):
        jax.block_until_ready(update(X, failed, **spoiled))


def test_a_constant_damping_without_losses_refuses_them_too():
    optimizer = newton(damping=0.1, max_failures=2)
    update = jax.jit(lambda g, s, matrix: optimizer.update(g, s, curvature=Dense(matrix)))
    state = optimizer.init(X)
    for g, matrix in ((X * jnp.nan, H), (X, H * jnp.nan)):
        updates, after = update(g, state, matrix)
        np.testing.assert_array_equal(updates, [0, 0])
        assert optimizers.find_state(after).failures == 1
    with pytest.raises(RAISED, match="newton: 2 updates in a row"):
        jax.block_until_ready(update(X, after, H * jnp.nan))


def test_a_loss_of_minus_infinity_is_not_taken(helpers):
    def function(x):
        return jnp.where(jnp.sum(x**2) < 1, -jnp.inf, loss(x))

    optimizer, update = updating("newton", function)
    updates, state = update(X, optimizer.init(X), H @ X, H, loss(X))
    assert np.isfinite(function(X + updates))
    assert np.isfinite(helpers.find(state).info.loss)


def test_a_loss_that_is_not_finite_further_out_shortens_the_step(helpers):
    def function(x):
        return loss(x) + jnp.where(jnp.sum((x - X) ** 2) > 0.1, jnp.nan, 0.0)

    optimizer, update = updating("newton", function)
    updates, state = update(X, optimizer.init(X), H @ X, H, loss(X))
    found = helpers.find(state)
    assert found.info.accepted
    assert found.info.attempts > 1
    assert found.failures == 0
    assert 0 < np.linalg.norm(updates) <= np.sqrt(0.1)


def test_factors_whose_length_is_given_are_shortened_too(helpers):
    """At an update that does not choose the damping of the factors anew."""

    def function(x):
        return loss(x) + jnp.where(jnp.sum((x - X) ** 2) > 0.1, 100.0, 0.0)

    optimizer, update = updating("kronecker_newton", function, learning_rate=1.0, momentum=0.0, max_attempts=8)
    scaled, sign = optimizer.init(X)
    for count in (1, 2, 5):
        updates, (after, _) = update(X, (scaled._replace(count=jnp.asarray(count, jnp.int32)), sign), H @ X, H, loss(X))
        if count == 1:  # the factors of the first update
            scaled = scaled._replace(memory=after.memory)
        assert after.info.accepted
        assert 0 < np.linalg.norm(updates) <= np.sqrt(0.1)


def test_a_gain_that_rounding_hides_is_no_reason_for_damping(helpers):
    optimizer, update = updating("newton", lambda x: 1e9 + loss(1e-9 * x))
    g, state = 1e-18 * (H @ X), optimizer.init(X)
    _, state = update(X, state, g, 1e-18 * H, 1e9)
    found = helpers.find(state)
    assert found.info.accepted
    assert found.control.damping < 0.1


def test_a_diagonal_block_that_is_not_finite(helpers):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    optimizer = newton(**RULE)

    def function(p):
        return jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)

    for bad in (jnp.nan, jnp.inf):
        blocks = BlockDiagonal({"a": Diagonal(jnp.array([bad, 1.0])), "b": Dense(jnp.eye(2))})
        updates, state = optimizer.update(
            params, optimizer.init(params), params, curvature=blocks, value=4.0, value_fn=function
        )
        np.testing.assert_array_equal(helpers.flat(updates), np.zeros(4))
        assert helpers.find(state).failures == 1


def test_a_product_that_is_not_finite(helpers):
    optimizer = kronecker_newton(**RULE)
    updates, state = optimizer.update(
        H @ X, optimizer.init(X), X, curvature=BlockDiagonal(Dense(H)), value=loss(X), value_fn=loss,
        product=lambda v: v * jnp.nan,
    )  # fmt: skip
    np.testing.assert_array_equal(updates, [0, 0])
    assert helpers.find(state).failures == 1


def test_at_the_minimum_it_stays(helpers):
    for name in OPTIMIZERS:
        optimizer, update = updating(name)
        state, zero = optimizer.init(X), jnp.zeros(2)
        for _ in range(3):
            updates, state = update(zero, state, zero, H, 0.0)
            np.testing.assert_array_equal(updates, zero)
        # And leaves again where there is something to gain.
        for _ in range(12):
            updates, state = update(X, state, H @ X, H, loss(X))
        found = helpers.find(state)
        assert found.failures == 0
        assert found.info.accepted
        assert loss(X + updates) < 0.9 * loss(X)


def model(p, x):
    """Waves, a saddle, and a scale between them."""
    u, v = p["u"], p["v"][0]
    return x * jnp.stack([10 * jnp.sin(3 * u) + v**2, 3 * jnp.tanh(5 * u * v), v - 2 * jnp.cos(4 * u), jnp.exp(-u * v)])


def squares(z, t):
    return jnp.sum((z - t) ** 2) / 2


NASTY = {
    "absolute": lambda: newton(),
    "positive_part": lambda: newton("positive_part", "full", learning_rate="exact", momentum="exact"),
    "shift": lambda: newton("shift"),
    "constant": lambda: newton(damping=1e-3),
    "trust_region": lambda: newton("trust_region", "full"),
    "gauss_newton": lambda: gauss_newton(),
    "gauss_newton_momentum": lambda: gauss_newton("diagonal", learning_rate="exact", momentum=0.9),
    "kronecker_newton": lambda: kronecker_newton(every=3),
}


@pytest.mark.parametrize("name", NASTY)
def test_the_loss_never_rises(name):
    """Over 50 steps from starts of all sizes."""
    optimizer = NASTY[name]()
    batch = jnp.array([0.5, 1.0, -2.0]), jnp.array([[1.0, 0.0, -1.0, 2.0]] * 3)
    train = optimizers.step((model, squares), optimizer)
    if name in ("absolute", "positive_part", "shift", "constant", "trust_region"):
        train = optimizers.step(lambda p, x, t: squares(model(p, x), t), optimizer)

    @jax.jit
    @jax.vmap
    def run(params):
        def body(carry, _):
            params, state, metrics = train(*carry, *batch)
            return (params, state), metrics

        (params, _), metrics = jax.lax.scan(body, (params, optimizer.init(params)), length=50)
        return params, metrics

    rng = np.random.default_rng(0)
    scales = 10.0 ** np.linspace(-2, 1, 12)
    starts = {"u": jnp.asarray(scales * rng.normal(size=12)), "v": jnp.asarray((scales * rng.normal(size=12))[:, None])}
    params, metrics = run(starts)
    losses = np.asarray(metrics.loss)
    assert np.isfinite(losses).all()
    assert (np.diff(losses, axis=1) <= 1e-12 * losses[:, :-1]).all()
    accepted = np.asarray(metrics.accepted)[:, :-1]
    if name != "constant":  # whose steps may be too long at every length that is tried
        assert (losses[:, -1] < losses[:, 0]).all()
    assert (np.diff(losses, axis=1)[~accepted] == 0).all()
    assert np.isfinite(np.asarray(params["u"])).all()


def test_a_value_of_another_rounding_does_not_stop_it(net):
    """Two programs for the same mean differ in the last bits; a step that changes as little is not refused for that."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), net.params)
    batch = tuple(a.astype(jnp.float32) for a in net.batch)

    def mean(p):
        return jnp.mean(jax.vmap(net.error, (None, 0, 0))(p, *batch))

    value, grads = jax.value_and_grad(mean)(params)
    G = jaxhess.gauss_newton(net.model, net.loss, blocks="full")(params, *batch)
    optimizer = optimizers.gauss_newton(damping=1e12)
    for given in (value * (1 - 2 * jnp.finfo(jnp.float32).eps), value * (1 - 1e-4)):
        _, state = optimizer.update(grads, optimizer.init(params), params, curvature=G, value=given, value_fn=mean)
        info = state[0].info
        assert info.accepted
        assert info.attempts == 1
        assert info.new_loss <= mean(params) * (1 + 4 * jnp.finfo(jnp.float32).eps)


@functools.cache
def updating_small_steps(risen, damping):
    """Updates with gradients so large that rounding of the parameters changes the error by 2e-5, of which the first step,
    one unit in the last place, is to gain less; by `risen` the error is larger after any step. In float32."""
    x, g = jnp.full(2, 4.0, jnp.float32), jnp.full(2, 35.0, jnp.float32)
    curvature = BlockDiagonal(Dense(5e7 * jnp.eye(2, dtype=jnp.float32), tags=lx.positive_semidefinite_tag))
    optimizer = gauss_newton(damping=levenberg_marquardt(damping), max_attempts=1)

    def value_fn(moved):
        return jnp.where(jnp.all(moved == x), 0.01, 0.01 + risen).astype(jnp.float32)

    @jax.jit
    def update(state):
        return optimizer.update(g, state, x, curvature=curvature, value=jnp.float32(0.01), value_fn=value_fn)[1]

    return optimizer.init(x), update


@pytest.mark.parametrize(("risen", "accepted"), [(2e-5, True), (1e-4, False)])
def test_what_rounding_of_the_parameters_does_says_nothing_against_a_step(helpers, risen, accepted):
    """Else damping would rise for ever where every step, the smallest one too, changes the error by more than it gains."""
    start, update = updating_small_steps(risen, 5e7)
    state = helpers.find(update(start))
    assert 1e-5 < state.info.predicted < 2e-5
    np.testing.assert_allclose(state.info.new_loss, 0.01 + risen, rtol=1e-6)
    assert state.info.accepted == accepted
    assert (state.control.damping < 5e7) == accepted


def test_damping_falls_where_the_parameters_cannot_hold_the_step(helpers):
    """Steps that are lost in rounding are no evidence that damping is too small; up to about 1e8 all of them are."""
    state, update = updating_small_steps(0.0, 1e12)
    for _ in range(20):
        state = update(state)
    assert helpers.find(state).info.accepted
    assert helpers.find(state).control.damping < 1e9


def test_it_starts_again_where_it_was_stuck(helpers):
    """In a dent from which short steps, and only these, lead upwards, and with so much damping that steps do nothing."""
    x = jnp.full(2, 4.0, jnp.float32)
    curvature = BlockDiagonal(Dense(2e-3 * jnp.eye(2, dtype=jnp.float32), tags=lx.positive_semidefinite_tag))
    optimizer = gauss_newton(damping=levenberg_marquardt(1e-4))

    def dented(x):
        distance = jnp.max(jnp.abs(x - 4))
        return 1e-3 * jnp.sum(x**2) + jnp.where((distance > 0) & (distance < 3), 1e-2, 0.0)

    @jax.jit
    def update(x, state):
        return optimizer.update(2e-3 * x, state, x, curvature=curvature, value=dented(x), value_fn=dented)

    state = optimizer.init(x)
    state = (state[0]._replace(control=state[0].control._replace(damping=jnp.float32(1e10))), *state[1:])
    for number in range(11):
        updates, state = update(x, state)
        assert (number < 10) == (float(jnp.max(jnp.abs(updates))) < 1e-6)
    assert helpers.find(state).info.accepted
    assert dented(x + updates) < 1e-3


def test_a_plateau_is_no_reason_for_less_damping(helpers):
    """A step that was to gain much, and changes nothing: that, no rounding hides."""
    optimizer, update = updating("gauss_newton", lambda x: jnp.ones(()))
    state = optimizer.init(X)
    before = helpers.find(state).control.damping
    _, state = update(X, state, H @ X, H, 1.0)
    assert helpers.find(state).info.predicted > 0.1
    assert helpers.find(state).control.damping > before
