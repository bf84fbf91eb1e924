"""The printed feedforward recursions against `jax.hessian`: where they are exact, where not, and the corrected form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess import naumov2017
from jaxhess._typing import InputError
from jaxhess.activations import elu, gelu, identity, leaky_relu, relu, sigmoid, silu, sin, softplus, tanh
from jaxhess.losses import squared_error

SMOOTH = [tanh, sigmoid, softplus, silu, gelu, elu, sin]


def _network(sizes=(4, 5, 3, 2), seed=0):
    random = np.random.default_rng(seed)
    pairs = list(itertools.pairwise(sizes))
    weights = [jnp.asarray(random.normal(size=(m, n)) / np.sqrt(n)) for n, m in pairs]
    biases = [jnp.asarray(0.3 * random.normal(size=m)) for _, m in pairs]
    return weights, biases, jnp.asarray(random.normal(size=sizes[0])), jnp.asarray(random.normal(size=sizes[-1]))


def _error(weights, biases, f, x, target):
    return squared_error(naumov2017.forward(weights, biases, f, x).outputs[-1], target)


_hessian = partial(jax.jit, static_argnums=2)(jax.hessian(_error, (0, 1)))


def _relative_errors(recursion, f, network):
    """Relative Frobenius errors of the weight and bias blocks, layer by layer from the first."""
    weights, biases, x, target = network
    curvatures = recursion(weights, biases, f, x, target)
    by_weight, by_bias = _hessian(weights, biases, f, x, target)
    errors = []
    for k, W in enumerate(weights):
        block = naumov2017.kronecker_block(curvatures.Q[k], curvatures.inputs[k])
        errors.append(_relative(block, by_weight[k][0][k].reshape(W.size, W.size)))
        bias_error = _relative(curvatures.Q[k], by_bias[k][1][k])
        np.testing.assert_allclose(bias_error, errors[-1], rtol=1e-3, atol=1e-14)
    return errors


def _relative(actual, expected):
    return float(jnp.linalg.norm(actual - expected)) / (float(jnp.linalg.norm(expected)) or 1.0)


def _per_layer(f, last):
    return (f, f, last)


@pytest.mark.parametrize("f", [identity, relu, leaky_relu, *SMOOTH], ids=lambda f: f.name)
@pytest.mark.parametrize("seed", range(3))
def test_corrected_recursion_is_exact(f, seed):
    assert max(_relative_errors(naumov2017.corrected_hessian, f, _network(seed=seed))) < 1e-12
    last_linear = _per_layer(f, identity)
    assert max(_relative_errors(naumov2017.corrected_hessian, last_linear, _network(seed=seed))) < 1e-12


@pytest.mark.parametrize("f", [relu, identity], ids=lambda f: f.name)
@pytest.mark.parametrize("recursion", [naumov2017.printed_hessian, naumov2017.printed_relu_hessian])
def test_printed_recursions_are_exact_for_slopes_0_and_1(f, recursion):
    assert max(_relative_errors(recursion, f, _network())) < 1e-10


@pytest.mark.parametrize(("f", "floor"), [(tanh, 1e-1), (sigmoid, 5e-1), (softplus, 3e-1)], ids=lambda v: str(v))
def test_printed_recursion_is_wrong_for_smooth_activations(f, floor):
    assert min(_relative_errors(naumov2017.printed_hessian, f, _network())) > floor


@pytest.mark.parametrize("f", SMOOTH, ids=lambda f: f.name)
def test_32_has_the_slopes_twice(f):
    """With one layer (34) is all of D and right, so the error is (32)'s: f'^4 in the place of f'^2."""
    network = _network(sizes=(4, 3))
    weights, biases, x, target = network
    (error,) = _relative_errors(naumov2017.printed_hessian, f, network)
    assert error > 1e-3
    slope = f.derivative(naumov2017.forward(weights, biases, f, x).preactivations[0])
    printed = naumov2017.printed_hessian(weights, biases, f, x, target).Q[0]
    corrected = naumov2017.corrected_hessian(weights, biases, f, x, target).Q[0]
    np.testing.assert_allclose(printed - corrected, jnp.diag(slope**4 - slope**2), atol=1e-14)


def test_32_is_wrong_for_a_leaky_slope():
    """Piecewise linear is not enough for (32): the slope must be 0 or 1."""
    W, b, x, target = jnp.eye(1), jnp.zeros(1), -jnp.ones(1), jnp.zeros(1)
    printed = naumov2017.printed_hessian([W], [b], leaky_relu, x, target).Q[0]
    corrected = naumov2017.corrected_hessian([W], [b], leaky_relu, x, target).Q[0]
    np.testing.assert_allclose(printed, 1e-8)
    np.testing.assert_allclose(corrected, 1e-4)
    np.testing.assert_allclose(corrected, jax.hessian(lambda b: _error([W], [b], leaky_relu, x, target))(b))


@pytest.mark.parametrize("f", SMOOTH, ids=lambda f: f.name)
def test_35_has_the_second_derivative_where_the_first_belongs(f):
    """With a linear last layer (32) is right and (34) gives v = 0, so that (35) loses D in every layer below."""
    first, second, last = _relative_errors(naumov2017.printed_hessian, _per_layer(f, identity), _network())
    assert last < 1e-12
    assert first > 1e-2
    assert second > 1e-2


@pytest.mark.parametrize("f", [tanh, relu, sigmoid], ids=lambda f: f.name)
def test_lemma_1_is_right_as_printed(f):
    weights, biases, x, target = _network()
    printed = naumov2017.gradient(weights, biases, f, x, target)
    expected = jax.grad(_error, (0, 1))(weights, biases, f, x, target)
    for ours, theirs in zip(printed, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-14)


def test_number_of_activations():
    weights, biases, x, _ = _network()
    with pytest.raises(InputError, match="list of 3, got 2"):
        naumov2017.forward(weights, biases, [tanh, tanh], x)
