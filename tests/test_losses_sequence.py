"""The loss of a sequence: a sum over its steps, padding that leaves no trace, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess import losses
from jaxhess._typing import InputError
from jaxhess.layers.recurrent import recurrent
from jaxhess.losses import over_time, softmax_cross_entropy, squared_error

RANDOM = np.random.default_rng(0)
TAU = 5
MASK = np.array([True, False, True, True, False])
CASES = {
    "squared_error": (RANDOM.normal(size=(TAU, 3)), RANDOM.normal(size=(TAU, 3))),
    "sigmoid_cross_entropy": (RANDOM.normal(size=(TAU, 3)), RANDOM.uniform(size=(TAU, 3))),
    "poisson": (RANDOM.normal(size=(TAU, 2, 2)), RANDOM.poisson(size=(TAU, 2, 2)).astype(float)),
    "huber": (3 * RANDOM.normal(size=TAU), RANDOM.normal(size=TAU)),
    "gaussian": (RANDOM.normal(size=(TAU, 2, 3)), RANDOM.normal(size=(TAU, 3))),
    "softmax_cross_entropy": (RANDOM.normal(size=(TAU, 4)), RANDOM.integers(0, 4, size=TAU)),
}
DERIVATIVES = [
    jax.value_and_grad,
    jax.jacfwd,
    jax.hessian,
    lambda f: jax.jacrev(jax.jacrev(f)),
    lambda f: jax.jacrev(jax.jacfwd(f)),
]


def _close(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


def _evaluate(error, outputs):
    return jax.jit(lambda z: [d(error)(z) for d in DERIVATIVES])(jnp.asarray(outputs))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_sum_of_the_steps(name, masked):
    loss, (outputs, targets) = getattr(losses, name), CASES[name]
    steps = np.flatnonzero(MASK) if masked else range(TAU)
    ours = _evaluate(lambda z: over_time(loss, z, targets, MASK if masked else None), outputs)
    _close(ours, _evaluate(lambda z: sum(loss(z[t], targets[t]) for t in steps), outputs))


@pytest.mark.parametrize("padding", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", CASES)
def test_padding_leaves_no_trace(name, padding):
    loss, (outputs, targets) = getattr(losses, name), CASES[name]
    expected = _evaluate(lambda z: over_time(loss, z, targets, MASK), outputs)
    padded, padded_targets = outputs.copy(), targets.copy()
    padded[~MASK] = padding
    padded_targets[~MASK] = padding if targets.dtype == float else -7
    results = _evaluate(lambda z: over_time(loss, z, padded_targets, MASK), padded)
    _close(results, expected)
    assert not np.any(results[0][1][~MASK])
    if targets.dtype == float:
        by_target = jax.grad(lambda t: over_time(loss, padded, t, MASK))(jnp.asarray(padded_targets))
        assert np.all(np.isfinite(by_target))
        assert not np.any(by_target[~MASK])


def test_any_callable_even_where_it_is_singular_at_zero():
    outputs = jnp.asarray(np.random.default_rng(1).uniform(0.2, 0.8, size=(TAU, 3))).at[1].set(jnp.nan)
    targets = jnp.ones((TAU, 3))
    log_loss = lambda p, t: -jnp.sum(t * jnp.log(p))  # noqa: E731
    value, gradient = jax.value_and_grad(lambda z: over_time(log_loss, z, targets, MASK))(outputs)
    _close(value, -np.sum(np.log(outputs[MASK])))
    _close(gradient, np.where(MASK[:, None], -1 / outputs, 0))


@pytest.mark.parametrize("mask", [False, [False], [False] * TAU])
def test_nothing_counted_is_zero(mask):
    outputs = jnp.full((TAU, 3), jnp.nan)
    value, gradient = jax.value_and_grad(lambda z: over_time(squared_error, z, outputs, np.asarray(mask)))(outputs)
    assert value == 0
    assert not np.any(gradient)


@pytest.mark.parametrize("shape", [(), (1,), (TAU,)])
def test_mask_broadcasts(shape):
    outputs, targets = CASES["squared_error"]
    _close(over_time(squared_error, outputs, targets, np.ones(shape, bool)), over_time(squared_error, outputs, targets))


def test_padded_batch_of_a_recurrent_net():
    """A batch padded to one length has the gradient of its sequences one by one."""
    random = np.random.default_rng(1)
    W, U, x = (jnp.asarray(random.normal(size=shape)) for shape in ((4, 2), (4, 4), (3, TAU, 2)))
    labels, lengths = jnp.asarray(random.integers(0, 4, size=(3, TAU))), (2, 5, 1)
    mask = jnp.asarray(np.arange(TAU) < np.array(lengths)[:, None])
    padded = jnp.where(mask[..., None], x, jnp.nan)

    def batched(W, U):
        states = recurrent(W, U, None, padded, mask=mask)
        return jnp.sum(jax.vmap(over_time, (None, 0, 0, 0))(softmax_cross_entropy, states, labels, mask))

    def one_by_one(W, U):
        states = [recurrent(W, U, None, x[i, :n]) for i, n in enumerate(lengths)]
        return sum(over_time(softmax_cross_entropy, s, labels[i, : len(s)]) for i, s in enumerate(states))

    derivatives = lambda f: jax.jit(lambda *a: (f(*a), jax.grad(f, (0, 1))(*a), jax.hessian(f, 1)(*a)))(W, U)  # noqa: E731
    _close(derivatives(batched), derivatives(one_by_one))


def test_half_precision_is_summed_in_float32():
    assert over_time(squared_error, jnp.ones((TAU, 2), jnp.bfloat16), jnp.ones((TAU, 2))).dtype == jnp.float32


@pytest.mark.parametrize(
    ("outputs", "targets", "mask", "message"),
    [
        ((5, 3), (4, 3), None, "the same number of time steps"),
        ((), (5,), None, "the same number of time steps"),
        ((5,), (), (5,), "the same number of time steps"),
        ((0, 3), (0, 3), None, "at least one time step"),
        ((5, 3), (5, 3), (4,), r"mask must broadcast to \(5,\)"),
        ((5, 3), (5, 3), (5, 1), r"mask must broadcast to \(5,\)"),
    ],
)
def test_wrong_shapes_are_named(outputs, targets, mask, message):
    given = None if mask is None else np.ones(mask, bool)
    with pytest.raises(InputError, match=message) as caught:
        over_time(squared_error, jnp.zeros(outputs), jnp.zeros(targets), given)
    for name, shape in (("outputs", outputs), ("targets", targets), ("mask", mask)):
        assert f"{name} {shape}" in str(caught.value)


def test_other_refusals():
    z = jnp.zeros((5, 3))
    with pytest.raises(InputError, match=r"outputs must be floating-point, got int.*outputs \(5, 3\)"):
        over_time(squared_error, z.astype(int), z)
    with pytest.raises(InputError, match=r"mask must be boolean, got float64.*mask \(5,\)"):
        over_time(squared_error, z, z, jnp.ones(5))
    with pytest.raises(InputError, match=r"one step must be a scalar, got shape \(3,\).*outputs \(5, 3\)"):
        over_time(lambda z, t: (z - t) ** 2, z, z)
    with pytest.raises(InputError, match="loss must be callable, got str"):
        over_time("squared", z, z)
    with pytest.raises(InputError, match=r"output of shape \(3,\) needs a target of shape \(3,\), got \(2,\)"):
        over_time(squared_error, z, jnp.zeros((5, 2)))
