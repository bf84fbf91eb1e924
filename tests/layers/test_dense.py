"""The dense layer: Lemma 1 against autodiff of the plain formula, in every transformation, and its cost."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhess import activations
from jaxhess._typing import InputError
from jaxhess.activations import Activation, identity, tanh
from jaxhess.layers.dense import dense


def _prefix_sums(y):
    return jnp.cumsum(jnp.sin(y), axis=-1)


ACTIVATIONS = [identity, tanh, activations.gelu, jax.nn.softplus, jax.nn.mish, jax.nn.softmax, _prefix_sums]
every_activation = pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: getattr(f, "name", None) or f.__name__)


def _plain(W, b, z, f):
    y = jnp.einsum("mn,...n->...m", W, z)
    return f(y if b is None else y + jnp.broadcast_to(b, y.shape))


def _arrays(m=3, n=4, batch=(5,), bias=True, seed=0, dtype=np.float64):
    random = np.random.default_rng(seed)
    W, b, z = (random.normal(size=shape).astype(dtype) for shape in ((m, n), (m,), (*batch, n)))
    return jnp.asarray(W), jnp.asarray(b) if bias else None, jnp.asarray(z)


def _close(actual, expected, tolerance=1e-12):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(e), initial=0))))


def _scalar(layer, f):
    """A scalar of the layer's output whose gradient and curvature with respect to it are not constant."""

    def error(W, b, z):
        output = layer(W, b, z, f)
        return jnp.sum(jnp.sin(output) * jnp.arange(1.0, output.size + 1).reshape(output.shape))

    return error


@every_activation
@settings(max_examples=3)
@given(m=st.integers(1, 4), n=st.integers(1, 4), batch=st.sampled_from([(), (3,), (2, 3)]), bias=st.booleans())
def test_value_gradient_and_tangent(f, m, n, batch, bias):
    arrays = _arrays(m, n, batch, bias)
    tangents = _arrays(m, n, batch, bias, seed=2)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=(*batch, m)))

    @jax.jit
    def first_order(arrays, tangents, cotangent):
        results = []
        for layer in (dense, _plain):
            function = lambda W, b, z, layer=layer: layer(W, b, z, f)  # noqa: E731
            output, pullback = jax.vjp(function, *arrays)
            tangent = jax.linearize(function, *arrays)[1](*tangents)
            results.append((output, pullback(cotangent), jax.jvp(function, arrays, tangents)[1], tangent))
        return results

    ours, theirs = first_order(arrays, tangents, cotangent)
    assert ours[0].shape == (*batch, m)
    _close(ours, theirs)


@every_activation
@pytest.mark.parametrize("bias", [True, False])
def test_hessian_and_jacobians(f, bias):
    arrays = _arrays(bias=bias, batch=(2,))
    error, plain = _scalar(dense, f), _scalar(_plain, f)
    argnums = (0, 1, 2) if bias else (0, 2)
    hessian, gradient = jax.jit(lambda *a: (jax.hessian(plain, argnums)(*a), jax.grad(plain, argnums)(*a)))(*arrays)
    _close(jax.jit(jax.hessian(error, argnums))(*arrays), hessian)
    _close(jax.jit(jax.jacfwd(error, argnums))(*arrays), gradient)
    _close(jax.jit(jax.jacrev(jax.jacrev(error)))(*arrays), hessian[0][0])
    _close(jax.jit(jax.jacfwd(jax.jacfwd(error)))(*arrays), hessian[0][0])


@every_activation
def test_jit_vmap_remat(f):
    arrays = _arrays()
    error, plain = _scalar(dense, f), _scalar(_plain, f)
    expected = jax.jit(jax.grad(plain, (0, 1, 2)))(*arrays)
    _close(jax.grad(error, (0, 1, 2))(*arrays), expected)
    _close(jax.jit(jax.grad(error, (0, 1, 2)))(*arrays), expected)
    _close(jax.jit(jax.grad(jax.checkpoint(error), (0, 1, 2)))(*arrays), expected)
    W, b, z = arrays
    mapped = jax.jit(jax.vmap(jax.grad(_scalar(dense, f)), (None, None, 0)))(W, b, z)
    _close(mapped, jax.jit(jax.vmap(jax.grad(plain), (None, None, 0)))(W, b, z))
    stacked = jax.jit(jax.vmap(lambda W: dense(W, b, z, f)))(jnp.stack([W, 2 * W]))
    _close(stacked[1], _plain(2 * W, b, z, f))


@pytest.mark.parametrize("remat", [False, True])
def test_scan(remat):
    W, b, z = _arrays(m=4, n=4)

    def rollout(layer):
        def error(W, b, z):
            step = lambda carry, _: (layer(W, b, carry, tanh), None)  # noqa: E731
            last, _ = jax.lax.scan(jax.checkpoint(step) if remat else step, z, length=3)
            return jnp.sum(last**2)

        return error

    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        ours, theirs = (jax.jit(transform(rollout(layer)))(W, b, z) for layer in (dense, _plain))
        _close(ours, theirs)


def _count(jaxpr, counter):
    for equation in jaxpr.eqns:
        counter[equation.primitive.name] += 1
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                _count(inner, counter)
    return counter


def _products(function, *arguments):
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, Counter())["dot_general"]


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_one_matrix_product_each(batch):
    """Forward one, dW one over all leading axes, dz one; nothing for an input that is not differentiated."""
    W, b, z = _arrays(batch=batch)
    error = lambda W, b, z: jnp.sum(dense(W, b, z, tanh))  # noqa: E731
    assert _products(error, W, b, z) == 1
    assert _products(jax.grad(error, (0, 1, 2)), W, b, z) == 3
    assert _products(jax.grad(error, (0, 1)), W, b, z) == 2
    assert _products(jax.grad(error, 2), W, b, z) == 2
    assert _products(jax.grad(error, 1), W, b, z) == 1
    pullback = jax.vjp(lambda *arrays: dense(*arrays, tanh), W, b, z)[1]
    cotangent = jnp.ones((*batch, 3))
    counts = _count(jax.make_jaxpr(pullback)(cotangent).jaxpr, Counter())
    assert counts["dot_general"] == 2
    assert counts["mul"] == 1


@pytest.mark.parametrize(("f", "kept"), [(tanh, [(3, 4), (5, 3), (5, 4)]), (identity, [(3, 4), (5, 4)])])
def test_reverse_mode_keeps_only_weight_input_and_slope(f, kept):
    pullback = jax.vjp(lambda *arrays: dense(*arrays, f), *_arrays())[1]
    assert sorted(leaf.shape for leaf in jax.tree.leaves(pullback)) == kept


def test_graph_shows_one_named_call():
    W, b, z = _arrays()
    (call,) = jax.make_jaxpr(lambda *arrays: dense(*arrays, tanh))(W, b, z).jaxpr.eqns
    assert call.primitive.name == "custom_jvp_call"
    (inner,) = call.params["call_jaxpr"].jaxpr.eqns
    assert inner.params["name"] == "jaxhess_dense"
    names = [e.primitive.name for e in inner.params["jaxpr"].jaxpr.eqns]
    assert names == ["dot_general", "broadcast_in_dim", "add", "custom_jvp_call"]


def test_saturated_tanh_keeps_its_gradient_in_float32():
    W, b, z = jnp.eye(1, dtype=jnp.float32), jnp.zeros(1, jnp.float32), jnp.full(1, 20, jnp.float32)
    slope = jax.grad(lambda b: dense(W, b, z, tanh)[0])(b)
    np.testing.assert_allclose(slope, 4 * np.exp(-40.0), rtol=1e-6)


def test_same_activation_is_traced_once():
    traces = []

    def f(y):
        traces.append(y)
        return y * y

    layer = jax.jit(lambda *arrays: dense(*arrays, square))
    square = Activation(f, lambda y: 2 * y, lambda y: 2 + 0 * y, "square")
    arrays = _arrays()
    layer(*arrays)
    dense(*arrays, square)
    first = len(traces)
    for _ in range(3):
        layer(*arrays)
        dense(*arrays, square)
    assert len(traces) == first > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    W, b, z = (a.astype(dtype) for a in _arrays())
    assert dense(W, b, z, tanh).dtype == dtype
    assert jax.grad(lambda W: dense(W, b, z, tanh).sum())(W).dtype == dtype
    assert dense(W, b, z.astype(jnp.float64), tanh).dtype == jnp.float64


@pytest.mark.parametrize(
    ("weight", "bias", "inputs", "message"),
    [
        ((3,), (3,), (3,), r"weight must have shape \(m, n\), got \(3,\)"),
        ((3, 4), (4,), (5, 4), r"bias must have shape \(3,\), got \(4,\)"),
        ((3, 4), (), (5, 4), r"bias must have shape \(3,\), got \(\)"),
        ((3, 4), (3,), (4, 5), r"last axis of inputs must be 4, got \(4, 5\)"),
        ((3, 4), None, (), r"last axis of inputs must be 4, got \(\)"),
    ],
)
def test_wrong_shapes_are_named(weight, bias, inputs, message):
    arrays = [None if shape is None else jnp.zeros(shape) for shape in (weight, bias, inputs)]
    with pytest.raises(InputError, match=message) as caught:
        dense(*arrays)
    for name, shape in zip(("weight", "bias", "inputs"), (weight, bias, inputs), strict=True):
        assert f"{name} {shape}" in str(caught.value)


def test_other_refusals():
    W, b, z = _arrays()
    with pytest.raises(InputError, match="inputs must be floating-point, got int"):
        dense(W, b, jnp.ones((5, 4), int))
    with pytest.raises(InputError, match="keep the shape"):
        dense(W, b, z, jnp.sum)
    with pytest.raises(InputError, match="traced values"):
        jax.grad(lambda a: dense(W, b, z, lambda y: a * y).sum())(1.0)

    class Unhashable:
        __hash__ = None

        def __call__(self, y):
            return y

    with pytest.raises(InputError, match="hashable"):
        dense(W, b, z, Unhashable())
