"""Unmodified models of other libraries: how one enters the tests, and what is checked of each.

A model is a function giving `(fun, params, batch)`: `fun(params, *example)` calls the library's own layers, `params` is the
library's own container.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxhess
from jaxhess.operators import StructuredOperator

EXAMPLES = 3


class Models:
    """A registry: `@MODELS` or `@MODELS.slow` enters a function; `MODELS.cases()` are the parameters of a test."""

    def __init__(self) -> None:
        self.entered: list = []

    def __call__(self, function: Callable) -> Callable:
        self.entered.append(pytest.param(function, id=function.__name__))
        return function

    def slow(self, function: Callable) -> Callable:
        self.entered.append(pytest.param(function, id=function.__name__, marks=pytest.mark.slow))
        return function

    def cases(self) -> list:
        return self.entered


def generic(shapes):
    """Values for the arrays or `ShapeDtypeStruct`s of a tree, float64 where they are floating; all other leaves stay.

    Nothing is at its usual zero or one, and no initialiser need be run (half of a test's time).
    """
    rng = np.random.default_rng(0)

    def value(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct | jax.Array):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(0.2 + 0.5 * rng.normal(size=leaf.shape))
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(value, shapes)


def data(*shape, seed=100):
    return jnp.asarray(0.7 * np.random.default_rng(seed).normal(size=(EXAMPLES, *shape)))


def labels(classes):
    return jnp.arange(EXAMPLES) % classes


def tokens(length, vocabulary):
    return (jnp.arange(EXAMPLES * length) * 5 % 7 % vocabulary).reshape(EXAMPLES, length)


def cross_entropy(outputs, label):
    return optax.softmax_cross_entropy_with_integer_labels(outputs.reshape(-1), label)


def squares(outputs, target):
    return jnp.sum((outputs - target) ** 2)


def cubes(outputs):
    """An error without labels that is neither quadratic nor the same for all components."""
    flat = outputs.reshape(-1)
    return jnp.sum(jnp.cos(jnp.arange(flat.size)) * flat**3) + jnp.sum(flat) ** 2


def check(fun, params, batch, tolerance=1e-10, smallest=1e-4):
    """Every block equals autodiff's, and all that comes out is in the parameters' own container.

    `tolerance` is relative to the block's largest entry, or to `smallest` times the Hessian's where the block is smaller
    (the bias of an attention's keys has no curvature but rounding).
    """
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def found(params, batch):
        value, gradient, H = jaxhess.value_grad_and_hessian(fun)(params, *batch)
        vector = unravel(jnp.cos(jnp.arange(flat.size, dtype=flat.dtype)))
        matrices = [block.as_matrix() for _, block in H.items()]
        return value, gradient, H, matrices, vector, H.mv(vector)

    @jax.jit
    def reference(flat):
        def mean(flat):
            return jnp.mean(jax.vmap(lambda example: fun(unravel(flat), *example))(batch))

        return *jax.value_and_grad(mean)(flat), jax.hessian(mean)(flat)

    value, gradient, H, matrices, vector, product = found(params, batch)
    expected_value, expected_gradient, expected = map(np.asarray, reference(flat))
    largest = np.abs(expected).max()
    assert np.isfinite(largest)
    assert largest > 1e-6
    compare = functools.partial(_assert_within, tolerance)
    compare(value, expected_value, 1)
    compare(ravel_pytree(gradient)[0], expected_gradient, np.abs(expected_gradient).max())
    offset, blocks = 0, np.zeros_like(expected)
    for (path, operator), leaf, matrix in zip(H.items(), jax.tree.leaves(params), matrices, strict=True):
        own = slice(offset, offset + leaf.size)
        blocks[own, own] = expected[own, own]
        compare(matrix, expected[own, own], max(np.abs(expected[own, own]).max(initial=0), smallest * largest), path)
        assert operator.in_structure().shape == leaf.shape, path
        offset += leaf.size
    compare(ravel_pytree(product)[0], blocks @ ravel_pytree(vector)[0], largest)
    _check_containers(params, gradient, H, product)


def _assert_within(tolerance, found, expected, scale, name=""):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(scale), err_msg=name)


def _check_containers(params, gradient, H, product):
    structure = jax.tree.structure(params)
    for tree in (gradient, product):
        assert type(tree) is type(params)
        assert jax.tree.structure(tree) == structure
    assert type(H.blocks) is type(params)
    assert jax.tree.structure(H.blocks, is_leaf=lambda node: isinstance(node, StructuredOperator)) == structure
    for (path, operator), (key_path, _) in zip(H.items(), jax.tree_util.tree_leaves_with_path(params), strict=True):
        assert H.block(path) is operator
        assert H.block(key_path) is operator
    moved = jax.tree.map(lambda p, v: p - 0.1 * v, params, product)
    assert type(moved) is type(params)
    assert jax.tree.structure(moved) == structure
