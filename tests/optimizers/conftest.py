"""A small network and all about it as dense numpy arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxhess
from jaxhess import optimizers


class Net:
    """2 inputs, 3 tanh units, 2 outputs, 4 examples: 15 parameters, 8 outputs."""

    loss = staticmethod(jaxhess.losses.squared_error)
    sizes = (3, 6, 6)  # of hidden/b, hidden/w, out
    decay = 0.3

    def __init__(self, examples=4):
        rng = np.random.default_rng(3)
        self.params = {
            "hidden": {"b": jnp.asarray(0.5 * rng.normal(size=3)), "w": jnp.asarray(rng.normal(size=(3, 2)))},
            "out": jnp.asarray(rng.normal(size=(2, 3))),
        }
        self.batch = jnp.asarray(rng.normal(size=(examples, 2))), jnp.asarray(2 * rng.normal(size=(examples, 2)))

    @staticmethod
    def model(p, x):
        return p["out"] @ jnp.tanh(p["hidden"]["w"] @ x + p["hidden"]["b"])

    @classmethod
    def error(cls, p, x, t):
        return cls.loss(cls.model(p, x), t)

    @classmethod
    def penalised(cls, p, x, t):
        """The error with the penalty of a weight decay of 0.3."""
        return cls.error(p, x, t) + cls.decay / 2 * jnp.sum(ravel_pytree(p)[0] ** 2)

    def mean(self, p, error=None):
        return jnp.mean(jax.vmap(error or self.error, (None, 0, 0))(p, *self.batch))

    @functools.cached_property
    def flat(self):
        return np.asarray(ravel_pytree(self.params)[0])

    def tree(self, flat):
        return ravel_pytree(self.params)[1](jnp.asarray(flat))

    @functools.cached_property
    def value_and_gradient(self):
        return jax.jit(jax.value_and_grad(self.mean))(self.params)

    @property
    def gradient(self):
        return np.asarray(ravel_pytree(self.value_and_gradient[1])[0])

    def dense_hessian(self, error=None):
        return np.asarray(jax.jit(jax.hessian(lambda flat: self.mean(self.tree(flat), error)))(jnp.asarray(self.flat)))

    def dense_gauss_newton(self):
        xs, ts = self.batch

        def outputs(flat):
            return jax.vmap(self.model, (None, 0))(self.tree(flat), xs)

        J = np.asarray(jax.jit(jax.jacobian(outputs))(jnp.asarray(self.flat)))
        B = np.asarray(jax.vmap(jax.hessian(self.loss))(outputs(jnp.asarray(self.flat)), ts))
        return np.einsum("rip,rij,rjq->pq", J, B, J) / len(xs)

    @staticmethod
    def absolute(matrix):
        """|H|: every eigenvalue by its size."""
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.abs(values)) @ vectors.T

    def blocked(self, matrix):
        """The blocks of each parameter, zeros between them."""
        place = np.repeat(np.arange(3), self.sizes)
        return np.where(place[:, None] == place, matrix, 0)


class HELPERS:
    @staticmethod
    def close(actual, expected, tolerance=1e-9):
        actual, expected = np.asarray(actual, float), np.asarray(expected, float)
        assert actual.shape == expected.shape
        assert np.max(np.abs(actual - expected), initial=0) <= tolerance * max(np.max(np.abs(expected), initial=0), 1e-300)

    @staticmethod
    def flat(tree):
        return np.asarray(ravel_pytree(tree)[0])

    @staticmethod
    def same(a, b):
        """Whether two trees are equal, bit by bit."""
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)

    @staticmethod
    def find(state):
        found = optimizers.find_state(state)
        assert found is not None
        return found


@pytest.fixture(scope="session")
def net():
    return Net()


@pytest.fixture(scope="session")
def long_net():
    """20 outputs of all examples, more than there are parameters."""
    return Net(10)


@pytest.fixture
def helpers():
    return HELPERS
