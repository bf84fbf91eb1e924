"""The printed recurrent recursions against autodiff: where they are exact, where not, and the corrected forms."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess import naumov2017
from jaxhess._typing import InputError
from jaxhess.activations import elu, gelu, identity, leaky_relu, relu, sigmoid, sin, softplus, tanh

W, U, B = range(3)  # places in Gradients and Hessians


def _network(sizes, steps=4, seed=0):
    """Arguments of the recursions up to the activation, and those after it. Positive biases keep ReLU units alive."""
    random = np.random.default_rng(seed)
    pairs = list(itertools.pairwise(sizes))
    weights = [jnp.asarray(random.normal(size=(m, n)) / np.sqrt(n)) for n, m in pairs]
    feedbacks = [jnp.asarray(random.normal(size=(m, m)) / np.sqrt(m)) for _, m in pairs]
    biases = [jnp.asarray(random.uniform(0, 0.5, size=m)) for _, m in pairs]
    inputs, targets = random.normal(size=(steps, sizes[0])), random.normal(size=(steps, sizes[-1]))
    return (weights, feedbacks, biases), (jnp.asarray(inputs), jnp.asarray(targets))


def _scanned(parameters, f, inputs):
    """The stack written with `scan`, independently of the module."""
    f = f if isinstance(f, tuple) else (f,) * len(parameters[0])
    z = inputs
    for *layer, f_k in zip(*parameters, f, strict=True):
        W_k, U_k, b_k = layer

        def step(state, below, W_k=W_k, U_k=U_k, b_k=b_k, f_k=f_k):
            state = f_k(W_k @ below + U_k @ state + b_k)
            return state, state

        _, z = jax.lax.scan(step, jnp.zeros_like(b_k), z)
    return z


def _error(parameters, f, inputs, targets, counted):
    return 0.5 * jnp.sum(counted * (_scanned(parameters, f, inputs) - targets) ** 2)


_autodiff_gradient = partial(jax.jit, static_argnums=1)(jax.grad(_error))
_autodiff_hessian = partial(jax.jit, static_argnums=1)(jax.hessian(_error))


def _counted(targets, start):
    return jnp.ones_like(targets).at[: start - 1].set(0)


def _relative(actual, expected):
    return float(jnp.linalg.norm(actual - expected)) / (float(jnp.linalg.norm(expected)) or 1.0)


def _gradient_errors(recursion, f, network, start=1):
    """Relative errors (layers, 3), the columns being W, U and b."""
    parameters, (inputs, targets) = network
    ours = recursion(*parameters, f, inputs, targets, start)
    theirs = _autodiff_gradient(parameters, f, inputs, targets, _counted(targets, start))
    layers = range(len(parameters[W]))
    return np.array([[_relative(ours[kind][k], theirs[kind][k]) for kind in (W, U, B)] for k in layers])


def _hessian_errors(recursion, f, network, start=1):
    """Relative errors of the diagonal blocks, (layers, 3)."""
    parameters, (inputs, targets) = network
    ours = recursion(*parameters, f, inputs, targets, start)
    theirs = _autodiff_hessian(parameters, f, inputs, targets, _counted(targets, start))

    def error(kind, k):
        size = parameters[kind][k].size
        return _relative(ours[kind][k], theirs[kind][k][kind][k].reshape(size, size))

    return np.array([[error(kind, k) for kind in (W, U, B)] for k in range(len(parameters[W]))])


def _as_read(recursion):
    """What the module takes the print to say: one recursion over all of t = τ..a."""
    return recursion


def _step_by_step(recursion):
    """The other reading of the print: E^(t) of one t at a time, for which everything after step t is zero."""

    def recursion_of_steps(weights, feedbacks, biases, f, inputs, targets, start):
        steps = range(start, len(inputs) + 1)
        parts = [recursion(weights, feedbacks, biases, f, inputs[:t], targets[:t], t)[:3] for t in steps]
        return jax.tree.map(lambda *leaves: sum(leaves), *parts)

    return recursion_of_steps


def _without_feedback_above(network):
    (weights, feedbacks, biases), data = network
    return (weights, [feedbacks[0], *(jnp.zeros_like(u) for u in feedbacks[1:])], biases), data


def _linear_response(feedback, steps):
    """dy^(t)/dy^(s) = U^(t-s) (steps, m, steps, m) of a linear layer."""
    powers = [jnp.linalg.matrix_power(feedback, p) for p in range(steps)]
    rows = [[powers[t - s] if s <= t else jnp.zeros_like(feedback) for s in range(steps)] for t in range(steps)]
    return jnp.stack([jnp.stack(row, axis=1) for row in rows])


def _average(errors, recursion, f, sizes, start, steps=4):
    return np.mean([errors(recursion, f, _network(sizes, steps, seed), start) for seed in range(5)], axis=0)


@pytest.mark.parametrize("f", [tanh, relu, (sin, elu)], ids=str)
def test_forward(f):
    parameters, (inputs, _) = _network((3, 4, 2))
    y, z = naumov2017.recurrent_forward(*parameters, f, inputs)
    np.testing.assert_allclose(z[-1], _scanned(parameters, f, inputs), rtol=1e-13)
    assert [a.shape for a in y] == [(4, 4), (4, 2)]
    assert [a.shape for a in z] == [(4, 3), (4, 4), (4, 2)]


@pytest.mark.parametrize(
    ("sizes", "f"),
    [
        *(((3, 4), f) for f in (relu, tanh)),
        *(((3, 4, 2), f) for f in (relu, gelu, (elu, softplus), (sin, leaky_relu))),
        ((3, 4, 3, 2), (tanh, sigmoid, identity)),
    ],
    ids=str,
)
def test_corrected_forms_are_exact(sizes, f):
    for seed, start in enumerate([1, 3, 4]):
        network = _network(sizes, seed=seed)
        assert _gradient_errors(naumov2017.corrected_recurrent_gradient, f, network, start).max() < 1e-12
        assert _hessian_errors(naumov2017.corrected_recurrent_hessian, f, network, start).max() < 1e-12


@pytest.mark.parametrize("start", [1, 3])
def test_corrected_Q_is_the_curvature_of_the_preactivations(start):
    parameters, (inputs, targets) = _network((3, 4, 2))
    Q = naumov2017.corrected_recurrent_hessian(*parameters, tanh, inputs, targets, start).Q[0]

    def error(probes):
        (weights, feedbacks, biases), states = parameters, [jnp.zeros(4), jnp.zeros(2)]
        total = 0.0
        for s, x in enumerate(inputs):
            y = weights[0] @ x + feedbacks[0] @ states[0] + biases[0] + probes[s]
            states[0] = jnp.tanh(y)
            states[1] = jnp.tanh(weights[1] @ states[0] + feedbacks[1] @ states[1] + biases[1])
            total += jnp.sum((states[1] - targets[s]) ** 2) / 2 if s + 1 >= start else 0.0
        return total

    np.testing.assert_allclose(Q, jax.jit(jax.hessian(error))(jnp.zeros((4, 4))), atol=1e-13)


@pytest.mark.parametrize("f", [tanh, relu, sigmoid], ids=str)
@pytest.mark.parametrize("start", [1, 3])
def test_58_is_exact_in_the_last_layer_only(f, start):
    errors = _average(_gradient_errors, naumov2017.printed_recurrent_gradient, f, (3, 4, 2), start)
    assert errors[1].max() < 1e-12
    assert errors[0].min() > 1e-2


@pytest.mark.parametrize("reading", [_as_read, _step_by_step])
@pytest.mark.parametrize("start", [1, 4])
def test_58_is_wrong_by_tens_of_percent_in_the_layer_below(reading, start):
    errors = _average(_gradient_errors, reading(naumov2017.printed_recurrent_gradient), tanh, (3, 4, 2), start)
    assert errors[0].min() > 0.1
    assert errors[0].max() < 2


def test_58_and_82_miss_the_feedback_of_the_layer_above():
    network = _network((3, 4, 2))
    for recursion, errors in (
        (naumov2017.printed_recurrent_gradient, _gradient_errors),
        (naumov2017.printed_recurrent_relu_hessian, _hessian_errors),
    ):
        assert errors(recursion, relu, network, 4)[0, [W, B]].min() > 1e-2
        assert errors(recursion, relu, _without_feedback_above(network), 4)[0, [W, B]].max() < 1e-12


def test_60_and_82_count_the_errors_of_later_steps_twice():
    network = _without_feedback_above(_network((3, 4, 2)))
    for recursion, errors in (
        (naumov2017.printed_recurrent_gradient, _gradient_errors),
        (naumov2017.printed_recurrent_relu_hessian, _hessian_errors),
    ):
        assert errors(recursion, relu, network, 1)[0, [W, B]].min() > 1e-2
        assert errors(_step_by_step(recursion), relu, network, 1)[0, [W, B]].max() < 1e-12


def test_one_step_is_the_feedforward_network():
    """So that (81) has the error of (32), and (83)-(84) that of (34)-(35)."""
    (weights, feedbacks, biases), (inputs, targets) = _network((3, 4, 2), steps=1)
    recurrent = naumov2017.printed_recurrent_hessian(weights, feedbacks, biases, tanh, inputs, targets)
    feedforward = naumov2017.printed_hessian(weights, biases, tanh, inputs[0], targets[0])
    for Q, H_b, expected in zip(recurrent.Q, recurrent.biases, feedforward.Q, strict=True):
        np.testing.assert_allclose(Q[0, :, 0, :], expected, rtol=1e-13)
        np.testing.assert_allclose(H_b, expected, rtol=1e-13)


@pytest.mark.parametrize("f", [relu, identity], ids=str)
@pytest.mark.parametrize("recursion", [naumov2017.printed_recurrent_hessian, naumov2017.printed_recurrent_relu_hessian])
def test_77_is_exact_for_piecewise_linear_activations(recursion, f):
    for seed, start in enumerate([1, 3, 4]):
        assert _hessian_errors(recursion, f, _network((3, 4), seed=seed), start)[0, [W, B]].max() < 1e-12


def test_corollary_4_is_exact_for_a_leaky_slope_where_81_is_not():
    network = _network((3, 4))
    recursions = naumov2017.printed_recurrent_relu_hessian, naumov2017.printed_recurrent_hessian
    exact, wrong = (_hessian_errors(recursion, leaky_relu, network)[0, [W, B]] for recursion in recursions)
    assert exact.max() < 1e-12
    assert wrong.min() > 1e-7


@pytest.mark.parametrize("start", [1, 4])
def test_77_is_wrong_by_tens_of_percent_for_tanh(start):
    errors = _average(_hessian_errors, naumov2017.printed_recurrent_hessian, tanh, (3, 4), start)
    assert errors.min() > 0.1
    assert errors.max() < 2


def test_77_loses_the_second_derivative_at_earlier_steps():
    """elu is linear for y > 0: with the last step there, (81) and (83) are right and the error is all (77)'s."""
    (weights, feedbacks, biases), (inputs, targets) = _network((3, 4))
    parameters = [jnp.abs(weights[0])], [jnp.abs(feedbacks[0])], [biases[0] - 1]
    inputs = inputs.at[-1].set(8.0)
    y = naumov2017.recurrent_forward(*parameters, elu, inputs).preactivations[0]
    assert bool(jnp.all(y[-1] > 0))
    assert bool(jnp.any(y[:-1] < 0))
    curved = _hessian_errors(naumov2017.printed_recurrent_hessian, elu, (parameters, (inputs, targets)), start=4)
    assert curved[0, [W, B]].min() > 1e-2
    positive = parameters, (jnp.full_like(inputs, 8.0), targets)
    assert _hessian_errors(naumov2017.printed_recurrent_hessian, elu, positive, start=4)[0, [W, B]].max() < 1e-12


@pytest.mark.parametrize("recursion", [naumov2017.printed_recurrent_hessian, naumov2017.printed_recurrent_relu_hessian])
@pytest.mark.parametrize("reading", [_as_read, _step_by_step])
@pytest.mark.parametrize("start", [1, 4])
def test_82_is_exact_in_the_last_layer_only(recursion, reading, start):
    errors = _average(_hessian_errors, reading(recursion), relu, (3, 4, 2), start)
    assert errors[1, [W, B]].max() < 1e-12
    assert errors[0].min() > 0.1
    assert errors[0].max() < 2


def test_82_lacks_the_pairs_of_unequal_steps():
    """With linear activations C of the layer below is W^T Q W, of which (82) has the last step alone if a = τ."""
    network = _network((3, 4, 2))
    weights, feedbacks, _ = network[0]
    C = naumov2017.corrected_recurrent_hessian(*network[0], identity, *network[1], 4).Q[1]
    C = jnp.einsum("ih,sitj,jg->shtg", weights[1], C, weights[1])
    printed, corrected = (
        recursion(*network[0], identity, *network[1], 4).Q[0]
        for recursion in (naumov2017.printed_recurrent_relu_hessian, naumov2017.corrected_recurrent_hessian)
    )
    only_last = jnp.zeros_like(C).at[-1, :, -1].set(C[-1, :, -1])
    N = _linear_response(feedbacks[0], 4)
    np.testing.assert_allclose(corrected, jnp.einsum("aisj,aibk,bktl->sjtl", N, C, N), atol=1e-12)
    np.testing.assert_allclose(printed, jnp.einsum("aisj,aibk,bktl->sjtl", N, only_last, N), atol=1e-12)


@pytest.mark.parametrize("recursion", [naumov2017.printed_recurrent_hessian, naumov2017.printed_recurrent_relu_hessian])
@pytest.mark.parametrize("start_at_the_end", [False, True])
def test_75_is_exact_for_two_steps_and_wrong_from_three_on(recursion, start_at_the_end):
    for steps in (1, 2, 3, 4):
        errors = _average(_hessian_errors, recursion, relu, (3, 4), steps if start_at_the_end else 1, steps)
        if steps <= 2:
            assert errors[0, U] < 1e-12
        else:
            assert 0.1 < errors[0, U] < 1.5
        assert errors[0, [W, B]].max() < 1e-12


def test_75_lacks_that_the_state_depends_on_the_feedback():
    """Its Q is right: held fixed, the states give the printed block, and both places of U the exact one."""
    parameters, (inputs, targets) = _network((3, 4))
    weights, feedbacks, biases = parameters
    printed, corrected = (
        recursion(*parameters, relu, inputs, targets)
        for recursion in (naumov2017.printed_recurrent_hessian, naumov2017.corrected_recurrent_hessian)
    )
    np.testing.assert_allclose(printed.Q[0], corrected.Q[0], atol=1e-13)
    states = _scanned(parameters, relu, inputs)

    def with_input_held(change):
        """y^(s) = W x^(s) + U z^(s-1) + change z̄^(s-1) + b, z̄ being the constant that z is for change = 0."""
        state, total = jnp.zeros(4), 0.0
        for s, x in enumerate(inputs):
            held = states[s - 1] if s else jnp.zeros(4)
            state = relu(weights[0] @ x + feedbacks[0] @ state + change @ held + biases[0])
            total += jnp.sum((state - targets[s]) ** 2) / 2
        return total

    held = jax.jit(jax.hessian(with_input_held))(jnp.zeros((4, 4))).reshape(16, 16)
    np.testing.assert_allclose(printed.feedbacks[0], held, atol=1e-12)
    assert _relative(printed.feedbacks[0], corrected.feedbacks[0]) > 0.1


@pytest.mark.parametrize("start", [0, 5])
def test_start_must_be_a_step(start):
    parameters, data = _network((3, 4))
    for recursion in (
        naumov2017.printed_recurrent_gradient,
        naumov2017.corrected_recurrent_gradient,
        naumov2017.printed_recurrent_hessian,
        naumov2017.printed_recurrent_relu_hessian,
        naumov2017.corrected_recurrent_hessian,
    ):
        with pytest.raises(InputError, match=rf"steps 1\.\.4, got {start}"):
            recursion(*parameters, tanh, *data, start)


def test_number_of_activations():
    parameters, (inputs, _) = _network((3, 4))
    with pytest.raises(InputError, match="list of 1, got 2"):
        naumov2017.recurrent_forward(*parameters, (tanh, tanh), inputs)
