"""`hessian_diagonal` and `hessian_trace` against autodiff, for every model of the registry."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from models import MODELS, inputs, normal
from test_transforms import assert_close, mean_error

import jaxhess


def reference(error, params, batch):
    flat, unravel = ravel_pytree(params)
    mean = mean_error(error, batch)
    return jnp.diagonal(jax.jit(jax.hessian(lambda flat: mean(unravel(flat))))(flat))


@pytest.mark.parametrize("name", MODELS)
def test_diagonal_and_trace_equal_autodiff(name):
    error, params, batch = MODELS[name]()
    expected = reference(error, params, batch)
    found = jaxhess.hessian_diagonal(error)(params, *batch)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert_close(ravel_pytree(found)[0], expected)
    assert_close(jaxhess.hessian_trace(error)(params, *batch), jnp.sum(expected), 1e-9)


@pytest.mark.parametrize("name", ["perceptron", "gates_and_layer_norm", "derived_weights"])
def test_chunks_change_nothing(name):
    error, params, batch = MODELS[name]()
    whole = jaxhess.hessian_diagonal(error)(params, *batch)
    for size in (1, 3, 7) if name == "perceptron" else (1, 3):  # more than all is one program for any model
        chunked = jaxhess.hessian_diagonal(error, batch_size=size)(params, *batch)
        assert_close(ravel_pytree(chunked)[0], ravel_pytree(whole)[0], 1e-12)
        trace = jaxhess.hessian_trace(error, batch_size=size)(params, *batch)
        assert_close(trace, jnp.sum(ravel_pytree(whole)[0]), 1e-12)


def of_random_perceptron(widths, activation, bias):
    def error(p, x, t):
        for layer in p[:-1]:
            x = activation(layer["w"] @ x + layer.get("b", 0.0))
        return jaxhess.losses.squared_error(p[-1]["w"] @ x, t) + 0.1 * jnp.sum((p[-1]["w"] @ x) ** 4)

    sizes = itertools.pairwise(widths)
    params = [{"w": normal(2 * k, m, n)} | ({"b": normal(2 * k + 1, m)} if bias else {}) for k, (n, m) in enumerate(sizes)]
    return error, params, (normal(100, 3, widths[0]), normal(101, 3, widths[-1]))


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu, jax.nn.softmax])
@pytest.mark.parametrize("widths", [(3, 17, 2, 19, 4), (5, 1, 8, 1, 3), (2, 12, 12, 1), (4, 2, 9)], ids=str)
def test_narrow_places(widths, activation):
    """Below each, the curvature is factored: its rank is that of the narrowest place above."""
    error, params, batch = of_random_perceptron(widths, activation, bias=widths[1] != 12)
    diagonal = jax.jit(lambda p: jaxhess.hessian_diagonal(error)(p, *batch))(params)
    assert_close(ravel_pytree(diagonal)[0], reference(error, params, batch))


def test_two_paths_from_a_leaf_that_meet_at_other_components():
    """There an entry of the diagonal takes entries off the diagonal of what is in between."""
    A, B = normal(7, 3, 4), normal(8, 3, 16)
    cases = [
        (lambda p, x, t: jnp.sum((A @ (p * jnp.sum(t) + (p * x)[::-1])) ** 3), normal(0, 4)),
        (lambda p, x, t: jnp.sum((A @ (p + (p * x)[::-1])) ** 3), normal(0, 4)),
        (lambda p, x, t: jnp.sum((A @ (x * p)) ** 3) + jnp.sum((A @ (p - p[::-1])) ** 3), normal(0, 4)),
        (lambda p, x, t: jnp.sum((p @ x) ** 2) + jnp.sum((B @ (p + p.T).reshape(-1)) ** 3), normal(0, 4, 4)),
        (lambda p, x, t: jnp.sum((A @ jnp.roll(p * x, 1) * (A @ (p * x))) ** 2), normal(0, 4)),
        (lambda p, x, t: jnp.sum((normal(9, 3, 7) @ jax.lax.pad(p[0] * x, p[1], [(1, 2, 0)])) ** 3), normal(0, 2)),
    ]
    for error, params in cases:
        diagonal = jaxhess.hessian_diagonal(error)(params, *inputs())
        assert_close(diagonal.reshape(-1), reference(error, params, inputs()))


def test_dtypes_and_structure_are_those_of_the_parameters():
    error, params, batch = MODELS["perceptron"]()
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, batch))
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), narrow)
    found, expected = jaxhess.hessian_diagonal(error)(narrow[0], *narrow[1]), reference(error, *wide)
    assert jax.tree.map(lambda d: d.dtype, found) == jax.tree.map(lambda p: p.dtype, narrow[0])
    assert_close(ravel_pytree(found)[0].astype(jnp.float64), expected, 1e-2)
    trace = jaxhess.hessian_trace(error)(narrow[0], *narrow[1])
    assert trace.dtype == jnp.float32
    assert_close(trace, jnp.sum(expected), 1e-5)


def test_vmap_and_jit():
    error, params, batch = MODELS["gates_and_layer_norm"]()
    many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    diagonals, traces = jax.jit(
        jax.vmap(lambda p: (jaxhess.hessian_diagonal(error)(p, *batch), jaxhess.hessian_trace(error)(p, *batch)))
    )(many)
    for k in range(2):
        expected = reference(error, jax.tree.map(lambda p, k=k: p[k], many), batch)
        assert_close(ravel_pytree(jax.tree.map(lambda d, k=k: d[k], diagonals))[0], expected)
        assert_close(traces[k], jnp.sum(expected))


@pytest.mark.parametrize("name", ["perceptron", "gates_and_layer_norm", "derived_weights"])
def test_nan_in_one_example(name):
    error, params, (x, t) = MODELS[name]()
    found = jaxhess.hessian_diagonal(error)(params, x.at[1, 2].set(jnp.nan), t)
    assert np.isnan(ravel_pytree(found)[0]).all()
