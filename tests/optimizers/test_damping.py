"""The rules of damping: Nielsen's formulas and bounds, constants and their halving, trust radii, the last step's loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess._typing import InputError
from jaxhess.operators import Dense
from jaxhess.optimizers import (
    TrustRadius,
    constant,
    gauss_newton,
    kronecker_newton,
    levenberg_marquardt,
    newton,
    scale_by_gauss_newton,
    scale_by_newton,
)
from jaxhess.optimizers.damping import LevenbergMarquardt, as_rule

RATIOS = [-3.0, 0.0, 0.1, 0.25, 0.5, 0.8, 1.0, 1.3, 40.0, np.inf]
HALF = jnp.asarray(0.5)
LENGTH = jnp.asarray(1.0)


def test_levenberg_marquardt_is_nielsens_rule():
    rule = levenberg_marquardt(0.5, decrease=3.0)
    control = rule.start(jnp.float64)
    assert (control.damping, control.growth) == (0.5, 2.0)
    for ratio in RATIOS:
        factor = np.clip(1 - (2 * np.clip(ratio, -1, 2) - 1) ** 3, 1 / 3, 2)
        taken = rule.taken(control._replace(growth=jnp.asarray(16.0)), jnp.asarray(ratio), LENGTH, HALF)
        np.testing.assert_allclose(taken.damping, 0.5 * factor, rtol=1e-12)
        assert taken.growth == 2
    np.testing.assert_allclose(rule.taken(control, jnp.asarray(0.8), LENGTH, HALF).damping, 0.5 * (1 - 0.6**3), rtol=1e-12)
    # Refused: by 2, 4, 8, 16 and no more; after a step that is taken from 2 again.
    expected = 0.5
    for growth in (2, 4, 8, 16, 16):
        assert control.growth == growth
        control, expected = rule.refused(control, LENGTH), expected * growth
        assert control.damping == expected
    control = rule.taken(control, jnp.asarray(0.5), LENGTH, HALF)
    assert rule.refused(control, LENGTH).damping == 2 * control.damping


def test_a_lower_neutral_ratio_lets_damping_fall_where_the_model_says_too_much_at_any_damping():
    rule = LevenbergMarquardt(0.5, decrease=1.2, neutral=0.3)
    control = rule.start(jnp.float64)
    for ratio, factor in ((-0.3, 2), (0.0, 1 + 0.6**3), (0.3, 1), (0.4, 1 - 0.2**3), (0.5, 1 - 0.4**3), (0.9, 1 / 1.2)):
        found = rule.taken(control, jnp.asarray(ratio), LENGTH, HALF).damping
        np.testing.assert_allclose(found, 0.5 * factor, rtol=1e-12)


def test_damping_that_is_most_of_the_curvature_falls_faster():
    rule = levenberg_marquardt(0.5, decrease=1.2, release=2.0)
    control = rule.start(jnp.float64)
    for ratio, share, factor in (
        (1.0, 0.49, 1 / 1.2), (1.0, 0.51, 1 / 2), (1.04, 0.51, 1 / 2), (1.06, 0.51, 1 / 1.2), (0.94, 0.79, 1 / 1.2),
        (0.94, 0.81, 1 / 2), (0.9, 0.9, 1 / 2), (0.9, 0.1, 1 / 1.2),
        (0.8, 0.9, 1 - 0.6**3), (0.2, 0.9, 1 + 0.6**3),
    ):  # fmt: skip
        found = rule.taken(control, jnp.asarray(ratio), LENGTH, jnp.asarray(share)).damping
        np.testing.assert_allclose(found, 0.5 * factor, rtol=1e-12)
    same = levenberg_marquardt(0.5, decrease=1.2).taken(control, jnp.asarray(1.0), LENGTH, jnp.asarray(0.9))
    np.testing.assert_allclose(same.damping, 0.5 / 1.2, rtol=1e-12)
    with pytest.raises(InputError, match="release must be at least decrease=3"):
        levenberg_marquardt(release=2.0)


def test_a_relative_damping_and_its_bounds_are_multiples_of_what_is_measured_first():
    rule = LevenbergMarquardt(0.5, least=1e-3, most=10.0, relative=True)
    control = rule.start(jnp.float64)
    for nothing in (0.0, jnp.nan, jnp.inf):  # of which no unit can be made
        assert rule.measured(control, jnp.asarray(nothing)) == control
    control = rule.measured(control, jnp.asarray(100.0))
    assert (control.damping, control.strength, control.unit) == (50.0, 50.0, 100.0)
    assert rule.measured(control, jnp.asarray(7.0)) == control

    low = high = control
    for _ in range(20):
        low, high = rule.taken(low, jnp.asarray(1.0), LENGTH, HALF), rule.refused(high, LENGTH)
    np.testing.assert_allclose((low.damping, high.damping), (0.1, 1000.0), rtol=1e-12)
    for _ in range(10):
        high = rule.ended(high, jnp.asarray(False))
    assert (high.damping, high.unit) == (50.0, 100.0)


def test_damping_that_a_refused_update_raised_falls_faster_until_it_is_near_where_it_was():
    rule = levenberg_marquardt(0.5, decrease=1.25, release=2.0)
    control = rule.start(jnp.float64)

    def taken(control):
        return rule.taken(control, jnp.asarray(1.0), LENGTH, HALF)

    for _ in range(3):
        control = rule.refused(control, LENGTH)
    assert (control.damping, control.level) == (32.0, 1.0)
    for expected in (16, 8, 4, 2, 1, 0.8, 0.64):
        control = taken(control)
        np.testing.assert_allclose(control.damping, expected, rtol=1e-12)
    control = rule.refused(control, LENGTH)
    np.testing.assert_allclose([control.damping, control.level], 1.28, rtol=1e-12)
    without = levenberg_marquardt(0.5, decrease=1.25)
    control = without.refused(without.refused(control, LENGTH), LENGTH)
    np.testing.assert_allclose(
        without.taken(control, jnp.asarray(1.0), LENGTH, HALF).damping, control.damping / 1.25, rtol=1e-12
    )


def test_the_damping_of_an_approximate_inverse_rises_with_damping_and_comes_back_with_it():
    rule = levenberg_marquardt(1.0, decrease=1.5, release=2.0, most=1e6)
    control = rule.start(jnp.float32)._replace(strength=jnp.asarray(0.01, jnp.float32))
    ratio = jnp.asarray(1.0, jnp.float32)
    for _ in range(40):
        control = rule.refused(control, LENGTH)
    np.testing.assert_allclose([control.damping, control.strength], [1e6, 1e4], rtol=1e-5)
    while control.damping > control.level:
        control = rule.taken(control, ratio, LENGTH, HALF)
        np.testing.assert_allclose(control.strength, 0.01 * control.damping, rtol=1e-5)
    # Near where it was, λ goes on falling by what the model says, γ is chosen for itself.
    after = rule.taken(control, ratio, LENGTH, HALF)
    assert after.damping < control.damping
    assert after.strength == control.strength


@pytest.mark.parametrize(("damping", "expected"), [(1e9, 0.5), (0.01, 0.01)])
def test_damping_starts_again_after_ten_updates_without_gain(damping, expected):
    """Where it has risen; where it is small, there is nothing more to gain."""
    rule = levenberg_marquardt(0.5)
    control = rule.start(jnp.float32)._replace(damping=jnp.float32(damping), strength=jnp.float32(1e7))
    control = rule.refused(control, LENGTH)._replace(damping=jnp.float32(damping))
    for gained in [False] * 9 + [True] + [False] * 9:
        control = rule.ended(control, jnp.asarray(gained))
        assert control.damping == np.float32(damping)
        assert control.growth == 4
    assert control.stalled == 9
    control = rule.ended(control, jnp.asarray(False))
    assert control.damping == np.float32(expected)
    assert control.stalled == 0
    if damping > expected:
        assert (control.strength, control.growth, control.level) == (0.5, 2, np.inf)
    assert {leaf.dtype for leaf in control} == {jnp.dtype("float32")}


def test_levenberg_marquardt_stays_in_its_bounds():
    rule = levenberg_marquardt(1.0, decrease=10.0, least=0.05, most=100.0)
    control = rule.start(jnp.float32)
    for _ in range(5):
        control = rule.taken(control, jnp.asarray(1.0, jnp.float32), LENGTH, HALF)
    np.testing.assert_allclose(control.damping, 0.05, rtol=1e-6)
    for _ in range(60):
        control = rule.refused(control, LENGTH)
    assert control.damping == 100
    assert np.isfinite(control.growth)
    assert {leaf.dtype for leaf in control} == {jnp.dtype("float32")}


def test_trust_radius():
    rule = TrustRadius(2.0, most=3.0)
    control = rule.start(jnp.float64)

    def after(ratio, length):
        return float(rule.taken(control, jnp.asarray(ratio), jnp.asarray(length), HALF).damping)

    assert after(0.9, 2.0) == 3.0  # twice as much, at most 3
    assert after(0.9, 1.0) == 2.0  # within the ball
    assert after(0.5, 2.0) == 2.0
    assert after(0.1, 2.0) == 0.5
    assert after(0.1, 1.0) == 0.25
    assert rule.refused(control, jnp.asarray(2.0)).damping == 0.5
    assert rule.refused(control, jnp.asarray(1.0)).damping == 0.25
    for unknown in (0.0, jnp.nan, jnp.inf):
        assert rule.refused(control, jnp.asarray(unknown)).damping == 0.5


def test_a_radius_has_a_floor_and_starts_again():
    rule = TrustRadius(2.0, least=1e-3)
    control = rule.start(jnp.float32)
    for count in range(1, 11):
        for _ in range(8):
            control = rule.refused(control, jnp.asarray(jnp.nan, jnp.float32))
        control = rule.ended(control, jnp.zeros((), bool))
        np.testing.assert_allclose(control.damping, 2.0 if count == 10 else 1e-3, rtol=1e-6)
    assert {leaf.dtype for leaf in control} == {jnp.dtype("float32")}
    large = rule.start(jnp.float32)._replace(damping=jnp.asarray(5.0, jnp.float32))
    for _ in range(10):  # one that has grown is not taken back
        large = rule.ended(large, jnp.zeros((), bool))
    assert large.damping == 5
    small = large._replace(damping=jnp.asarray(1e-3, jnp.float32))
    for count in range(20):
        small = rule.ended(small, jnp.asarray(count % 10 == 5))
    np.testing.assert_allclose(small.damping, 1e-3, rtol=1e-6)


def test_options_that_are_refused():
    for attempt, what in (
        (lambda: constant(-1.0), "damping must be at least 0, got -1"),
        (lambda: constant(np.float32(-1)), "damping must be at least 0, got -1"),
        (lambda: constant(jnp.asarray(-1.0)), "damping must be at least 0, got -1"),
        (lambda: constant(float("nan")), "must be finite, got nan"),
        (lambda: constant(float("inf")), "must be finite, got inf"),
        (lambda: constant(1j), "must be a real number, got complex 1j"),
        (lambda: constant(None), "must be a real number, got NoneType"),
        (lambda: constant("a"), "must be a real number, got str 'a'"),
        (lambda: levenberg_marquardt(0.0), "initial must be above 0"),
        (lambda: levenberg_marquardt(float("nan")), "initial must be finite"),
        (lambda: levenberg_marquardt(np.asarray(-1.0)), "initial must be above 0"),
        (lambda: levenberg_marquardt(decrease="a"), "decrease must be a real number"),
        (lambda: TrustRadius(np.float32(-1)), "initial must be above 0"),
        (lambda: gauss_newton(damping=np.float32(-1)), "gauss_newton: damping must be at least 0"),
        (lambda: levenberg_marquardt(decrease=1.0), "decrease must be above 1"),
        (lambda: levenberg_marquardt(1.5, least=2.0, most=1.0), "<= most, got 2.0, 1.5 and 1.0"),
        (lambda: levenberg_marquardt(least=-1.0), "least must be above 0"),
        (lambda: levenberg_marquardt(least=0.0), "least must be above 0"),
        (lambda: levenberg_marquardt(10.0, most=1.0), "least <= initial <= most, got 1e-12, 10.0 and 1.0"),
        (lambda: levenberg_marquardt(neutral=1.0), "neutral must be at least 0 and below 1"),
        (lambda: TrustRadius(2.0, most=1.0), "TrustRadius: need 0 < least <= initial <= most"),
        (lambda: newton(damping=levenberg_marquardt(relative=True)), "newton: .*relative=True.* is for kronecker_newton"),
        (lambda: gauss_newton(damping=levenberg_marquardt(relative=True)), "gauss_newton: .*relative=True"),
        (lambda: gauss_newton("diagonal", solver="gram"), "solver='gram' is for the whole matrix"),
        (lambda: as_rule("newton", "lm"), "newton: damping must be .*'lm'"),
        (lambda: as_rule("newton", jnp.ones(2)), r"newton: damping must be one number.*\(2,\)"),
        (lambda: newton(damping=TrustRadius()), "is for curvature='trust_region'"),
        (lambda: newton("trust_region", "full", damping=1e-3), "radius in the place of a damping"),
        (lambda: newton("trust_region"), "blocks='full'"),
        (lambda: scale_by_gauss_newton(damping=TrustRadius()), "TrustRadius"),
        (lambda: newton(learning_rate="fast"), "learning_rate must be .*'fast'"),
        (lambda: newton(momentum="nesterov"), "momentum must be .*'nesterov'"),
        (lambda: newton(momentum="exact"), "needs learning_rate='exact'"),
        (lambda: newton("trust_region", "full", learning_rate="exact"), "sets the whole step"),
        (lambda: newton("trust_region", "full", momentum=0.9), "sets the whole step"),
        (lambda: newton(max_attempts=0), "max_attempts must be .*at least 1"),
        (lambda: newton(max_failures=0), "max_failures must be .*at least 1"),
        (lambda: newton(max_failures=None), "max_failures must be a real number"),
        (lambda: newton(max_failures=float("inf")), "max_failures must be finite"),
        (lambda: newton(max_attempts=2.5), "max_attempts must be a whole number"),
        (lambda: newton(max_attempts="8"), "max_attempts must be a real number"),
        (lambda: newton(learning_rate=np.float32("nan")), "learning_rate must be finite"),
        (lambda: newton(learning_rate=[1.0]), "learning_rate must be a real number"),
        (lambda: newton(weight_decay=-0.1), "weight_decay must be at least 0"),
        (lambda: newton(weight_decay=lambda count: 0.1), "weight_decay takes no schedule"),
        (lambda: kronecker_newton(every=None), "every must be a real number"),
        (lambda: kronecker_newton(max_iterations=jnp.asarray(3)), "max_iterations must be a Python integer.*static_args"),
        (lambda: newton("abs"), "curvature must be one of absolute"),
        (lambda: newton(blocks="layer"), "blocks must be"),
        (lambda: scale_by_gauss_newton(solver="lu"), "solver must be"),
        (lambda: scale_by_gauss_newton(tolerance=0.0), "tolerance"),
        (lambda: scale_by_gauss_newton(max_iterations=0), "max_iterations"),
    ):
        with pytest.raises(InputError, match=what):
            attempt()


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan")])
def test_a_radius_must_be_positive(radius):
    with pytest.raises(InputError, match=r"TrustRadius: initial must be (above 0|finite)"):
        newton("trust_region", "full", damping=TrustRadius(radius))


def test_no_damping_is_not_a_damping():
    with pytest.raises(InputError, match="damping"):
        newton(damping=None)


H = np.array([[2.0, 0.5], [0.5, 1.0]])
X = np.array([1.0, -2.0])


def objective(bump):
    """A quadratic with H, and what makes it differ from that."""
    return lambda x: x @ jnp.asarray(H) @ x / 2 + bump(x)


@functools.cache
def update_of(optimizer, function=None, valued=True):
    def update(grads, state, params, value):
        given = {"value": value} if valued else {}
        return optimizer.update(grads, state, params, curvature=Dense(jnp.asarray(H)), value_fn=function, **given)

    return jax.jit(update)


def test_a_constant_follows_its_schedule_and_needs_no_loss():
    optimizer = scale_by_newton(
        damping=lambda count: 0.8 * 0.5**count, learning_rate=lambda count: 1.0 + count, momentum=0.25
    )
    x, state, last = jnp.asarray(X), optimizer.init(jnp.asarray(X)), np.zeros(2)
    for k in range(3):
        g = H @ np.asarray(x)
        updates, state = update_of(optimizer, valued=False)(jnp.asarray(g), state, x, None)
        last = -(1 + k) * np.linalg.solve(H + 0.8 * 0.5**k * np.eye(2), g) + 0.25 * last
        np.testing.assert_allclose(-updates, last, rtol=1e-10)
        np.testing.assert_allclose(state.info.predicted, -(g @ last + last @ H @ last / 2), rtol=1e-9)
        np.testing.assert_allclose([state.control.damping, state.info.momentum], [0.8 * 0.5**k, 0.25], rtol=1e-12)
        assert state.info.accepted
        x = x - updates
    assert state.count == 3


def test_refused_steps_of_a_constant_are_halved():
    # The bump lets through what is an eighth of the step, no more.
    function = objective(lambda x: jnp.where(jnp.linalg.norm(x - jnp.asarray(X)) > 0.3, 100.0, 0.0))
    optimizer, g = scale_by_newton(damping=0.1), H @ X
    d = -np.linalg.solve(H + 0.1 * np.eye(2), g)
    halvings = int(np.ceil(np.log2(np.linalg.norm(d) / 0.3)))
    assert halvings == 3
    state = optimizer.init(jnp.asarray(X))
    for _ in range(2):  # each update begins with the full step
        updates, state = update_of(optimizer, function)(jnp.asarray(g), state, jnp.asarray(X), function(jnp.asarray(X)))
        s = d / 2**halvings
        np.testing.assert_allclose(-updates, s, rtol=1e-10)
        info = state.info
        assert info.attempts == halvings + 1
        np.testing.assert_allclose(info.predicted, -(g @ s + s @ H @ s / 2), rtol=1e-10)
        np.testing.assert_allclose(info.ratio, 1.0, rtol=1e-9)
        np.testing.assert_allclose(state.control.damping, 0.1)


def test_levenberg_marquardt_with_value_fn():
    def quartic(x):
        return 30 * jnp.sum(x) ** 4

    function = objective(quartic)
    optimizer = scale_by_newton(damping=levenberg_marquardt(0.01))
    x, state = jnp.asarray(X), optimizer.init(jnp.asarray(X))
    g = np.asarray(jax.grad(function)(x))
    updates, state = update_of(optimizer, function)(jnp.asarray(g), state, x, function(x))
    damping, growth, attempts = 0.01, 2, 1
    while True:
        s = -np.linalg.solve(H + damping * np.eye(2), g)
        fell = float(function(x) - function(x + s))
        if fell >= 0:
            break
        damping, growth, attempts = damping * growth, min(2 * growth, 16), attempts + 1
    assert attempts > 2
    np.testing.assert_allclose(-updates, s, rtol=1e-9)
    assert state.info.attempts == attempts
    ratio = fell / -(g @ s + s @ H @ s / 2)
    np.testing.assert_allclose(state.info.ratio, ratio, rtol=1e-8)
    factor = np.clip(1 - (2 * ratio - 1) ** 3, 1 / 3, 2)
    np.testing.assert_allclose(state.control.damping, damping * factor, rtol=1e-8)
    assert state.control.growth == 2
    np.testing.assert_allclose(state.info.loss, function(x))
    np.testing.assert_allclose(state.info.new_loss, function(x + s))
    # The loss is computed where it is not given.
    again, same = update_of(optimizer, function, valued=False)(jnp.asarray(g), optimizer.init(x), x, None)
    np.testing.assert_allclose(again, updates, rtol=1e-12)
    np.testing.assert_allclose(same.info.loss, function(x))


@pytest.mark.parametrize("ratio", [1.0, 0.3, -0.5])
def test_the_value_alone_judges_the_last_step(ratio):
    optimizer = scale_by_newton(damping=levenberg_marquardt(0.4))
    update, g = update_of(optimizer), H @ X
    x = jnp.asarray(X)
    updates, state = update(jnp.asarray(g), optimizer.init(x), x, 5.0)
    assert state.control.damping == 0.4  # nothing to judge yet
    assert np.isnan(state.info.ratio)
    np.testing.assert_allclose(-updates, -np.linalg.solve(H + 0.4 * np.eye(2), g), rtol=1e-10)
    value = 5.0 - ratio * float(state.info.predicted)
    updates, state = update(jnp.asarray(g), state, x, value)
    factor = np.clip(1 - (2 * ratio - 1) ** 3, 1 / 3, 2) if ratio > 0 else 2
    np.testing.assert_allclose(state.control.damping, 0.4 * factor, rtol=1e-9)
    np.testing.assert_allclose(-updates, -np.linalg.solve(H + 0.4 * factor * np.eye(2), g), rtol=1e-9)
    # A loss that is not finite: nothing is taken, the damping rises, and the next loss judges no step.
    before = float(state.control.damping)
    updates, state = update(jnp.asarray(g), state, x, jnp.nan)
    np.testing.assert_array_equal(updates, [0, 0])
    risen = float(state.control.damping)
    np.testing.assert_allclose(risen, before * (2 if ratio > 0 else 4))  # once
    updates, state = update(jnp.asarray(g), state, x, 1.0)
    np.testing.assert_allclose(state.control.damping, risen)
    assert state.failures == 0
    assert np.linalg.norm(updates) > 0
