"""Losses: closed forms against autodiff and mpmath, saturation, transformations, targets and refusals."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhess import losses
from jaxhess._typing import InputError
from jaxhess.losses import Loss, as_loss

SEPARABLE = ["squared_error", "sigmoid_cross_entropy", "poisson", "huber"]
ALL = [*SEPARABLE, "softmax_cross_entropy", "gaussian"]
every_loss = pytest.mark.parametrize("name", ALL)


def _plain(name):
    """The same losses as formulas, for autodiff."""
    return {
        "squared_error": lambda z, t: jnp.sum((t - z) ** 2) / 2,
        "sigmoid_cross_entropy": lambda z, t: jnp.sum(optax.sigmoid_binary_cross_entropy(z, t)),
        "poisson": lambda z, t: jnp.sum(jnp.exp(z) - t * z),
        "huber": lambda z, t: jnp.sum(optax.huber_loss(z, t)),
        "softmax_cross_entropy": lambda z, t: -jnp.sum(t * jax.nn.log_softmax(z)),
        "gaussian": lambda z, t: jnp.sum(z[1] + (t - z[0]) ** 2 * jnp.exp(-z[1])) / 2,
    }[name]


def _case(name, size=4, seed=0):
    random = np.random.default_rng(seed)
    if name == "gaussian":
        return random.normal(size=(2, size)), random.normal(size=size)
    return random.normal(size=size), random.uniform(size=size)


def _assert_close(actual, expected):
    scale = max(float(np.max(np.abs(expected))), 1e-30)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13 * scale)


@functools.cache
def _both(name):
    loss, plain = getattr(losses, name), _plain(name)

    def evaluate(z, t):
        theirs = plain(z, t), jax.grad(plain)(z, t), jax.hessian(plain)(z, t)
        return (loss(z, t), loss.gradient(z, t), loss.hessian(z, t)), theirs

    return jax.jit(evaluate)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=10)
@given(size=st.sampled_from([1, 2, 5]), seed=st.integers(0, 1000))
def test_against_autodiff_of_the_formula(name, size, seed):
    z, t = _case(name, size, seed)
    ours, theirs = _both(name)(z, t)
    for actual, expected in zip(ours, theirs, strict=True):
        _assert_close(actual, expected)
    assert ours[-1].shape == z.shape + z.shape


@every_loss
def test_transformations(name):
    loss = getattr(losses, name)
    z, t = _case(name)
    gradient, hessian = loss.gradient(z, t), loss.hessian(z, t)
    v = np.random.default_rng(1).normal(size=z.shape)

    @jax.jit
    def every_way(z, t, v):
        second = [jax.hessian(loss), jax.jacrev(jax.jacrev(loss)), jax.jacfwd(jax.grad(loss)), jax.jacfwd(jax.jacfwd(loss))]
        pushed = jax.jvp(loss, (z, t), (v, jnp.zeros_like(t)))[1]
        linear = jax.linearize(lambda z: loss(z, t), z)[1](v)
        mapped = jax.vmap(jax.hessian(loss))(jnp.stack([z, z + 1]), jnp.stack([t, t]))
        return jax.grad(loss)(z, t), [twice(z, t) for twice in second], (pushed, linear), mapped

    first, seconds, directional, mapped = every_way(z, t, v)
    _assert_close(first, gradient)
    for second in [*seconds, mapped[0]]:
        _assert_close(second, hessian)
    for along_v in directional:
        _assert_close(along_v, jnp.vdot(gradient, v))
    _assert_close(mapped[1], loss.hessian(z + 1, t))
    _assert_close(jax.grad(loss)(z, t), gradient)


@every_loss
def test_derivatives_in_the_target(name):
    loss, plain = getattr(losses, name), _plain(name)
    z, t = _case(name)
    _assert_close(jax.grad(loss, 1)(z, t), jax.grad(plain, 1)(z, t))
    both, expected = (jax.jit(jax.hessian(f, (0, 1)))(z, t) for f in (loss, plain))
    for row, expected_row in zip(both, expected, strict=True):
        for block, expected_block in zip(row, expected_row, strict=True):
            np.testing.assert_allclose(block, expected_block, atol=1e-13)


@every_loss
def test_third_derivative(name):
    loss, plain = getattr(losses, name), _plain(name)
    z, t = _case(name)
    third, expected = (jax.jit(jax.jacfwd(jax.hessian(f)))(z, t) for f in (loss, plain))
    np.testing.assert_allclose(third, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("label", [0, 1])
def test_sigmoid_saturation(dtype, label):
    z = np.linspace(-80, 80, 161).astype(dtype)
    t = np.full_like(z, label)
    loss, rtol = losses.sigmoid_cross_entropy, 1e-6 if dtype is np.float32 else 1e-14
    with mpmath.workdps(60):
        s = [1 / (1 + mpmath.exp(-mpmath.mpf(float(v)))) for v in z]
        gradient = np.array([float(p - label) for p in s])
        curvature = np.array([float(p * (1 - p)) for p in s])
        value = np.array([float(-mpmath.log(p if label else 1 - p)) for p in s])
    np.testing.assert_allclose(jax.vmap(loss)(z, t), value, rtol=rtol)
    np.testing.assert_allclose(jax.grad(loss)(z, t), gradient, rtol=rtol)
    np.testing.assert_allclose(np.diag(jax.hessian(loss)(z, t)), curvature, rtol=rtol)
    np.testing.assert_allclose(np.diag(loss.hessian(z, t)), curvature, rtol=rtol)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("label", [0, 1, 3])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0, 60.0])
def test_softmax_saturation(dtype, label, spread):
    z = (spread * np.array([1.0, 0.1, -0.2, 0.0])).astype(dtype)
    rtol = 2e-6 if dtype is np.float32 else 1e-14
    with mpmath.workdps(80):
        u = [mpmath.exp(mpmath.mpf(float(v))) for v in z]
        p = [v / sum(u) for v in u]
        gradient = np.array([float(q - (i == label)) for i, q in enumerate(p)])
        hessian = np.array([[float((q if i == j else 0) - q * r) for j, r in enumerate(p)] for i, q in enumerate(p)])
        value = float(-mpmath.log(p[label]))
    values, gradients, hessians = _softmax_every_way(z, label)
    np.testing.assert_allclose(values, value, rtol=rtol)
    for computed in gradients:
        assert computed.dtype == dtype
        np.testing.assert_allclose(computed, gradient, rtol=rtol)
    for computed in hessians:
        np.testing.assert_allclose(computed, hessian, rtol=2 * rtol, atol=np.finfo(dtype).tiny)


@jax.jit
def _softmax_every_way(z, label):
    loss = losses.softmax_cross_entropy
    gradients = loss.gradient(z, label), jax.grad(loss)(z, label)
    return (
        loss(z, label),
        gradients,
        (loss.hessian(z, label), jax.hessian(loss)(z, label), jax.jacrev(jax.jacrev(loss))(z, label)),
    )


def test_softmax_labels_and_probability_vectors_agree():
    z = np.random.default_rng(0).normal(size=5)
    loss = losses.softmax_cross_entropy
    for label in range(5):
        one_hot = np.eye(5)[label]
        assert loss(z, label) == loss(z, one_hot)
        np.testing.assert_array_equal(loss.gradient(z, jnp.int32(label)), loss.gradient(z, one_hot))
    np.testing.assert_allclose(jax.vmap(loss)(np.stack([z, z]), np.array([1, 2])), [loss(z, 1), loss(z, 2)])
    grad = jax.grad(loss, argnums=(0, 1), allow_int=True)(z, jnp.int32(1))
    assert grad[1].dtype == jax.dtypes.float0


def test_softmax_masked_logits_and_wrong_labels():
    loss = losses.softmax_cross_entropy
    z = jnp.array([0.5, -jnp.inf, 1.0])
    short = z[jnp.array([0, 2])]
    np.testing.assert_allclose(loss(z, 0), loss(short, 0))
    np.testing.assert_allclose(jax.grad(loss)(z, 0)[jnp.array([0, 2])], loss.gradient(short, 0))
    assert np.isfinite(jax.hessian(loss)(z, 0)).all()
    assert np.isnan(loss(short, 2))
    assert np.isnan(loss(short, -1))


@pytest.mark.parametrize("name", ["squared_error", "sigmoid_cross_entropy", "poisson", "huber"])
def test_integer_targets_and_any_shape(name):
    loss = getattr(losses, name)
    z, t = np.random.default_rng(0).normal(size=(2, 3)), np.array([[0, 1, 1], [1, 0, 0]])
    _assert_close(jax.grad(loss)(z, t), loss.gradient(z, t.astype(float)))
    assert jax.grad(loss, (0, 1), allow_int=True)(z, t)[1].dtype == jax.dtypes.float0
    _assert_close(jax.hessian(loss)(z, t), loss.hessian(z, t))
    assert loss.hessian(z, t).shape == (2, 3, 2, 3)


def test_huber_delta():
    z, t = jnp.array([0.2, -3.0, 0.5, jnp.nan]), jnp.zeros(4)
    loss = losses.make_huber(0.5)
    np.testing.assert_allclose(loss(z[:2], t[:2]), 0.02 + 0.5 * 2.75)
    np.testing.assert_array_equal(loss.gradient(z, t), [0.2, -0.5, 0.5, np.nan])
    np.testing.assert_array_equal(jnp.diag(loss.hessian(z, t)), [1, 0, 0, np.nan])
    for delta in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="delta must be positive"):
            losses.make_huber(delta)


@every_loss
def test_half_precision_is_promoted(name):
    loss = getattr(losses, name)
    z, t = (a.astype(jnp.bfloat16) for a in map(jnp.asarray, _case(name)))
    assert loss(z, t).dtype == jnp.float32
    assert jax.grad(loss)(z, t).dtype == jnp.bfloat16
    np.testing.assert_allclose(loss(z, t), loss(z.astype(jnp.float32), t.astype(jnp.float32)))


@pytest.mark.parametrize("name", SEPARABLE)
def test_separable_losses_are_a_sum_of_a_component_wise_operation(name):
    z, t = _case(name)
    equations = jax.make_jaxpr(getattr(losses, name))(z, t).jaxpr.eqns
    assert [e.primitive.name for e in equations] == ["custom_jvp_call", "reduce_sum"]


@every_loss
def test_shape_mismatch_names_both_shapes(name):
    output = jnp.zeros((2, 7)) if name == "gaussian" else jnp.zeros(7)
    for method in (getattr(losses, name), getattr(losses, name).gradient, getattr(losses, name).hessian):
        with pytest.raises(InputError, match=r"7.*\(3,\)"):
            method(output, jnp.zeros(3))
    with pytest.raises(InputError, match="floating-point, got int"):
        getattr(losses, name)(jnp.zeros((2, 7), int), jnp.zeros(7))


def test_other_refusals():
    with pytest.raises(InputError, match=r"shape \(2, \.\.\.\).*\(3, 4\)"):
        losses.gaussian(jnp.zeros((3, 4)), jnp.zeros(4))
    with pytest.raises(InputError, match=r"jax\.vmap"):
        losses.softmax_cross_entropy(jnp.zeros((3, 4)), jnp.zeros(3, int))
    with pytest.raises(InputError, match="integer class label"):
        losses.softmax_cross_entropy(jnp.zeros(3), 1.0)


def test_as_loss():
    z, t = _case("softmax_cross_entropy")
    loss = as_loss(optax.softmax_cross_entropy)
    assert isinstance(loss, Loss)
    assert as_loss(loss) is loss
    assert as_loss(optax.softmax_cross_entropy) is loss
    np.testing.assert_allclose(loss(z, t), losses.softmax_cross_entropy(z, t))
    np.testing.assert_allclose(loss.gradient(z, t), losses.softmax_cross_entropy.gradient(z, t), atol=1e-14)
    np.testing.assert_allclose(loss.hessian(z, t), losses.softmax_cross_entropy.hessian(z, t), atol=1e-14)
    labelled = as_loss(optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_allclose(labelled.hessian(z, 1), losses.softmax_cross_entropy.hessian(z, 1), atol=1e-14)


def test_as_loss_refuses_losses_of_each_element():
    loss = as_loss(optax.l2_loss)
    for method in (loss, loss.gradient, loss.hessian):
        with pytest.raises(InputError, match=r"scalar.*shape \(4,\).*sum or mean"):
            method(jnp.zeros(4), jnp.zeros(4))
    with pytest.raises(InputError, match="callable"):
        as_loss(1.0)
