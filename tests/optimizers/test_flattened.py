"""Small problems over one long vector: the same steps as over trees, and which vectors stay trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhess import optimizers
from jaxhess.optimizers import flattened
from jaxhess.optimizers.flattened import flattening

OPTIMIZERS = {
    "newton": lambda: optimizers.newton("absolute"),
    "newton, exact length": lambda: optimizers.newton("absolute", learning_rate="exact", momentum="exact"),
    "trust region": lambda: optimizers.newton("trust_region", "full"),
    "gauss_newton": optimizers.gauss_newton,
    "gauss_newton by cg": lambda: optimizers.gauss_newton(solver="cg", tolerance=1e-12),
    "kronecker_newton": optimizers.kronecker_newton,
    "kronecker_newton, one iteration": lambda: optimizers.kronecker_newton(max_iterations=1, weight_decay=1e-3),
    "kronecker_newton, given length": lambda: optimizers.kronecker_newton(learning_rate=0.5, momentum=0.1),
    "masked": lambda: optax.masked(optimizers.kronecker_newton(), {"hidden": {"w": True, "b": False}, "out": True}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_steps_as_of_trees(net, helpers, name, monkeypatch):
    def trained():
        optimizer = OPTIMIZERS[name]()
        train, params, state = optimizers.step((net.model, net.loss), optimizer), net.params, optimizer.init(net.params)
        losses = []
        for _ in range(4):
            params, state, metrics = train(params, state, *net.batch)
            losses.append(metrics.loss)
        return params, state, losses

    params, state, losses = trained()
    monkeypatch.setattr(flattened, "_MOST", 0)
    expected, expected_state, expected_losses = trained()
    assert jax.tree.structure(state) == jax.tree.structure(expected_state)
    helpers.close(jnp.stack(losses), jnp.stack(expected_losses), 1e-9)
    helpers.close(helpers.flat(params), helpers.flat(expected), 1e-7)
    assert losses[-1] < losses[0]


def test_there_and_back():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.array(7.0), jnp.array([8.0, 9.0])), "c": optax.MaskedNode()}
    ravel, unravel = flattening(tree)
    np.testing.assert_array_equal(ravel(tree), [0, 1, 2, 3, 4, 5, 7, 8, 9])
    again = unravel(ravel(tree))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"a": jnp.ones(3)},
        {},
        {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)},
        {"a": jnp.ones(2**17), "b": jnp.ones(2**17 + 1)},
    ],
    ids=["one leaf", "none", "two dtypes", "large"],
)
def test_vectors_that_stay_trees(tree):
    assert flattening(tree) is None
