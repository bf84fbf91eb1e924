"""Linearising with every number kept once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhess
from jaxhess.engine.compact import linearise_once


def layers(x):
    def error(params):
        value = x
        for W in params:
            value = jnp.tanh(value @ W)
        return jnp.sum(value**3)

    def gradient(params):
        value, grads = jax.value_and_grad(error)(params)
        return grads, value

    return gradient


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(3), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@jax.jit
def linearised(params, x):
    return linearise_once(layers(x), params, [*params, x])


def test_results_and_products_are_those_of_linearize():
    *params, x = arrays((3, 4), (4, 5), (6, 3))
    vectors = arrays((3, 4), (4, 5))
    results, value, linear = linearised(params, x)
    expected, reference, extra = jax.linearize(layers(x), params, has_aux=True)
    assert jnp.allclose(value, extra, rtol=1e-12)
    products = linear([*params, x], vectors)
    for found, wanted in zip([*results, *products], [*expected, *reference(vectors)], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    alone = linear.closed([*params, x])
    for found, wanted in zip(jax.jit(lambda alone, vectors: alone([], vectors))(alone, vectors), products, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


def test_nothing_given_is_kept_and_nothing_twice():
    *params, x = arrays((3, 4), (4, 5), (6, 3))
    linear = linearised(params, x)[2]
    kept = [np.asarray(array) for array in linear.kept]
    for n, array in enumerate(kept):
        others = [*kept[:n], *params, x]
        assert not any(array.shape == other.shape and np.array_equal(array, other) for other in others)
    plain = jax.tree.leaves(jax.linearize(layers(x), params, has_aux=True)[1])
    assert len(kept) <= len(plain) - 5  # both weights, x, f' and a factor of f''
    assert len(linear.closed([*params, x]).kept) <= len(kept) + 3


def test_products_are_linear_maps_to_transformations():
    *params, x = arrays((3, 4), (4, 5), (6, 3))
    linear = linearised(params, x)[2].closed([*params, x])
    many = [jnp.stack([v, 2 * v]) for v in arrays((3, 4), (4, 5))]
    once = linear([], [v[0] for v in many])
    for batched, single in zip(jax.vmap(lambda v: linear([], v))(many), once, strict=True):
        np.testing.assert_allclose(batched, jnp.stack([single, 2 * single]), rtol=1e-10, atol=1e-10)
    transposed = jax.linear_transpose(lambda v: linear([], v), [v[0] for v in many])(once)[0]
    twice = linear([], once)  # symmetric
    for found, wanted in zip(transposed, twice, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("blocks", ["full"])
def test_a_hessian_holds_its_parameters_and_batch_once(blocks):
    def error(params, x):
        return jnp.sum(jnp.tanh(params["v"] @ jnp.tanh(params["w"] @ x)) ** 2)

    params = dict(zip("wv", arrays((4, 3), (2, 4)), strict=True))
    (x,) = arrays((5, 3))
    H = jaxhess.hessian(error, blocks=blocks)(params, x)
    given = [*jax.tree.leaves(params), x]
    assert not any(k.shape == g.shape and np.array_equal(k, g) for k in H.product.kept for g in given)


def test_loops_and_literals():
    def gradient(params):
        def error(params):
            def step(h, _):
                return jnp.tanh(2.0 * h @ params[0]), h.sum()

            last, sums = jax.lax.scan(step, params[1], None, length=4)
            return jnp.sum(last**2) + 3.0 * jnp.sum(jnp.sin(sums))

        value, grads = jax.value_and_grad(error)(params)
        return grads, value

    params, vectors = arrays((3, 3), (3,)), arrays((3, 3), (3,))
    results, _, linear = jax.jit(lambda p: linearise_once(gradient, p, p))(params)
    wanted = jax.jvp(lambda p: gradient(p)[0], (params,), (vectors,))
    for found, expected in zip([*results, *linear(params, vectors)], [*wanted[0], *wanted[1]], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
