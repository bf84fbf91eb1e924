"""Activations: derivatives against mpmath, JAX's transformations over them, singular points, and `as_activation`."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jaxprs import equations

from jaxhess import activations
from jaxhess._typing import InputError
from jaxhess.activations import Activation, NotComponentWiseError, as_activation

ALL = {name: getattr(activations, name) for name in activations.__all__}
ALL = {name: f for name, f in ALL.items() if isinstance(f, Activation)}
PIECEWISE_LINEAR = ("identity", "relu", "leaky_relu")
TOLERANCE = {np.float32: 1e-6, np.float64: 1e-12}

every_activation = pytest.mark.parametrize("f", ALL.values(), ids=ALL.keys())
both_precisions = pytest.mark.parametrize("dtype", [np.float32, np.float64])


# --- the true derivatives, in 40 digits


def _logistic_d1(x):
    e = mpmath.exp(-abs(x))
    return e / (1 + e) ** 2


def _logistic(x):
    return 1 / (1 + mpmath.exp(-x))


def _logistic_d2(x):
    return -_logistic_d1(x) * mpmath.tanh(x / 2)


def _normal(x):
    return mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mpmath.pi)


def _cubic(x, order):
    α = 2 * mpmath.sqrt(2 / mpmath.pi)
    β = α * mpmath.mpf("0.044715")
    return (α * x + β * x**3, α + 3 * β * x**2, 6 * β * x)[order]


def _gelu_tanh_d1(y):
    p = _cubic(y, 0)
    return _logistic(p) + y * _cubic(y, 1) * _logistic_d1(p)


def _gelu_tanh_d2(y):
    p, p1, p2 = (_cubic(y, order) for order in range(3))
    return (2 * p1 + y * p2) * _logistic_d1(p) + y * p1**2 * _logistic_d2(p)


TRUE = {
    "identity": (lambda y: 1, lambda y: 0),
    "relu": (lambda y: int(y > 0), lambda y: 0),
    "leaky_relu": (lambda y: 1 if y >= 0 else mpmath.mpf("0.01"), lambda y: 0),
    "elu": (lambda y: mpmath.exp(min(y, 0)), lambda y: mpmath.exp(y) if y <= 0 else 0),
    "tanh": (lambda y: 4 * _logistic_d1(2 * y), lambda y: -8 * mpmath.tanh(y) * _logistic_d1(2 * y)),
    "sigmoid": (_logistic_d1, _logistic_d2),
    "softplus": (_logistic, _logistic_d1),
    "silu": (lambda y: _logistic(y) + y * _logistic_d1(y), lambda y: 2 * _logistic_d1(y) + y * _logistic_d2(y)),
    "gelu": (lambda y: mpmath.erfc(-y / mpmath.sqrt(2)) / 2 + y * _normal(y), lambda y: (2 - y * y) * _normal(y)),
    "gelu_tanh": (_gelu_tanh_d1, _gelu_tanh_d2),
    "sin": (mpmath.cos, lambda y: -mpmath.sin(y)),
}
ZEROS = (0.75179152469, 0.75246142207, 1.27846454276, 1.41421356237, 1.41850400879, 2.39935728052)


def _points(dtype):
    random = np.random.default_rng(0)
    near_zeros = [s * x * (1 + d) for s in (-1, 1) for x in ZEROS for d in (0, 1e-7, -1e-5, 1e-4, -1e-2)]
    pieces = np.linspace(-80, 80, 321), random.uniform(-80, 80, 200), random.uniform(-15, 15, 200), random.normal(size=99)
    return np.concatenate([*pieces, near_zeros]).astype(dtype)


@every_activation
@both_precisions
def test_derivatives_against_mpmath(f, dtype):
    y = _points(dtype)
    smallest = float(np.finfo(dtype).tiny)
    with mpmath.workdps(40):
        for order, derivative in enumerate((f.derivative, f.second_derivative)):
            true = [mpmath.mpf(TRUE[f.name][order](mpmath.mpf(float(v)))) for v in y]
            for computed in (derivative(y), jax.jit(derivative)(y)):
                assert computed.dtype == dtype
                for v, t, c in zip(y, true, np.asarray(computed), strict=True):
                    if abs(t) < smallest:
                        assert abs(c) <= 2 * smallest
                    else:
                        assert abs(float(c) - t) <= TOLERANCE[dtype] * abs(t), (order, v)


@every_activation
@both_precisions
def test_transformations_use_the_closed_forms(f, dtype):
    y = np.linspace(-30, 30, 41).astype(dtype) + dtype(0.01)
    first, second = f.derivative(y), f.second_derivative(y)
    ones = jnp.ones_like(y)

    @jax.jit
    def every_way(y):
        scalar_first, scalar_second = jax.vmap(jax.grad(f))(y), jax.vmap(jax.grad(jax.grad(f)))(y)
        diagonal = jnp.diag(jax.jacfwd(f)(y))
        pushed, linear = jax.jvp(f, (y,), (ones,))[1], jax.linearize(f, y)[1](ones)
        return (scalar_first, diagonal, pushed, linear), (scalar_second, jax.vmap(jax.hessian(f))(y))

    firsts, seconds = every_way(y)
    for computed in firsts:
        np.testing.assert_allclose(computed, first, rtol=1e-6)
    for computed in seconds:
        np.testing.assert_allclose(computed, second, rtol=3e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(f))(y[:3]), first[:3], rtol=1e-6)
    np.testing.assert_array_equal(f.value(y), f(y))


@every_activation
def test_third_derivative(f):
    y = np.linspace(-12, 12, 25) + 0.03
    step = 1e-5
    difference = (f.second_derivative(y + step) - f.second_derivative(y - step)) / (2 * step)
    third = jax.jit(jax.vmap(jax.grad(jax.grad(jax.grad(f)))))(y)
    np.testing.assert_allclose(third, difference, rtol=1e-6, atol=1e-10)


@every_activation
def test_value_against_jax(f):
    y = np.linspace(-10, 10, 101)
    plain = {
        "identity": lambda y: y,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "sin": jnp.sin,
    }
    np.testing.assert_allclose(f(y), plain.get(f.name, getattr(jax.nn, f.name, None))(y), rtol=1e-12, atol=1e-14)


@every_activation
@both_precisions
def test_singular_points(f, dtype):
    nan = jnp.asarray(np.nan, dtype)
    assert np.isnan(f(nan))
    assert np.isnan(f.derivative(nan))
    assert np.isnan(f.second_derivative(nan))
    if f.name != "identity":
        assert np.isnan(jax.grad(f)(nan))
    if f.name != "sin":
        infinite = jnp.asarray([-np.inf, np.inf], dtype)
        assert np.isfinite(f.derivative(infinite)).all()
        assert np.isfinite(f.second_derivative(infinite)).all()


def test_kinks_are_those_of_jax():
    for name in ("relu", "leaky_relu", "elu"):
        assert jax.grad(ALL[name])(0.0) == jax.grad(getattr(jax.nn, name))(0.0)
    assert ALL["relu"].derivative(0.0) == 0


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_piecewise_linear_second_derivative_is_zero(name):
    y = np.linspace(-3, 3, 7).reshape(7, 1)
    second = ALL[name].second_derivative(y)
    assert second.shape == y.shape
    assert not np.any(second)
    assert ALL[name].kind != "smooth"


@every_activation
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_float32_rounded_once(f, dtype):
    y = jnp.linspace(-5, 5, 41).astype(dtype)
    for function in (f, f.derivative, f.second_derivative):
        assert function(y).dtype == dtype
        np.testing.assert_array_equal(function(y), function(y.astype(jnp.float32)).astype(dtype))


@every_activation
@pytest.mark.parametrize("method", ["__call__", "derivative", "second_derivative"])
def test_integers_are_refused(f, method):
    with pytest.raises(InputError, match=r"int32 of shape \(3,\)"):
        getattr(f, method)(jnp.arange(3, dtype=jnp.int32))


@every_activation
def test_operations_are_component_wise(f):
    """Every operation of value, derivatives and tangent maps has one shape throughout, and scalars only as literals."""
    y = jnp.ones(3)
    for function in (f, f.derivative, f.second_derivative, lambda y: jax.jvp(f, (y,), (y,))):
        for equation in equations(jax.make_jaxpr(function)(y).jaxpr):
            shapes = {v.aval.shape for v in equation.invars if not hasattr(v, "val")}
            assert shapes == {(3,)}, equation
            assert all(v.aval.shape == () for v in equation.invars if hasattr(v, "val"))


# --- as_activation


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (jnp.tanh, "tanh"),
        (jax.nn.sigmoid, "sigmoid"),
        (jax.nn.softplus, "softplus"),
        (jax.nn.relu, "relu"),
        (jax.nn.leaky_relu, "leaky_relu"),
        (jax.nn.elu, "elu"),
        (jax.nn.silu, "silu"),
        (jax.nn.swish, "silu"),
        (jax.nn.gelu, "gelu_tanh"),
        (functools.partial(jax.nn.gelu, approximate=False), "gelu"),
        (functools.partial(jax.nn.gelu, approximate=True), "gelu_tanh"),
        (jnp.sin, "sin"),
        (jax.nn.identity, "identity"),
        (activations.tanh, "tanh"),
    ],
)
def test_known_functions_are_recognised(function, name):
    assert as_activation(function) is ALL[name]


@pytest.mark.parametrize("function", [jax.nn.mish, jnp.cos, lambda y: y**3 - y, jax.nn.selu, jax.nn.relu6])
def test_any_component_wise_callable(function):
    f = as_activation(function)
    assert as_activation(function) is f
    y = np.linspace(-2.05, 2, 17)
    np.testing.assert_allclose(f(y), function(y))
    first, second = jax.vmap(jax.grad(function)), jax.jit(jax.vmap(jax.grad(jax.grad(function))))(y)
    np.testing.assert_allclose(jax.jit(f.derivative)(y), jax.jit(first)(y), rtol=1e-12)
    for computed in (f.second_derivative, jax.vmap(jax.grad(jax.grad(f)))):
        np.testing.assert_allclose(jax.jit(computed)(y), second, rtol=1e-12, atol=1e-14)


def test_as_activation_under_jit():
    @jax.jit
    def apply(y):
        return as_activation(jax.nn.mish)(y), as_activation(lambda y: y * y)(y)

    np.testing.assert_allclose(apply(jnp.ones(2))[1], 1)


@pytest.mark.parametrize(
    "function",
    [
        jax.nn.softmax,
        functools.partial(jax.nn.softmax, axis=0),
        lambda y: y - jnp.mean(y),
        lambda y: y / jnp.linalg.norm(y),
        jnp.cumsum,
        jnp.sum,
        jax.nn.glu,
        lambda y: y > 0,
        lambda y: y @ jnp.ones((4, 4)),
        lambda y: y[::-1],
    ],
)
def test_other_callables_are_refused(function):
    for _ in range(2):
        with pytest.raises(NotComponentWiseError):
            as_activation(function)


def test_not_callable_and_closed_over_tracers_are_refused():
    with pytest.raises(InputError, match="must be callable, got int"):
        as_activation(3)
    with pytest.raises(InputError, match="depends on traced values"):
        jax.jit(lambda a: as_activation(lambda y: a * y)(a))(1.0)
