"""`hessian_diagonal` and `hessian_trace` against autodiff, for every model of the registry."""

import jax
import jax.numpy as jnp
import pytest
from jax.flatten_util import ravel_pytree
from models import MODELS
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
@pytest.mark.parametrize("size", [1, 3, 7])
def test_chunks_change_nothing(name, size):
    error, params, batch = MODELS[name]()
    whole = jaxhess.hessian_diagonal(error)(params, *batch)
    chunked = jaxhess.hessian_diagonal(error, batch_size=size)(params, *batch)
    assert_close(ravel_pytree(chunked)[0], ravel_pytree(whole)[0], 1e-12)
    trace = jaxhess.hessian_trace(error, batch_size=size)(params, *batch)
    assert_close(trace, jnp.sum(ravel_pytree(whole)[0]), 1e-12)
