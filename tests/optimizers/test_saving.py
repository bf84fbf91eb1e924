"""A run that is saved by orbax and resumed is the run that was never stopped, to the last bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from jaxhess.optimizers import (
    SecondOrderState,
    TrustRadius,
    gauss_newton,
    kronecker_newton,
    newton,
    step,
)

OPTIMIZERS = {
    "newton": lambda: newton("shift", learning_rate="exact", momentum="exact"),
    "trust_region": lambda: newton("trust_region", "full", damping=TrustRadius(0.3)),
    "gauss_newton": lambda: gauss_newton(solver="cg", weight_decay=1e-3),
    "kronecker_newton": lambda: kronecker_newton(every=2),
    "chain": lambda: optax.chain(optax.add_decayed_weights(1e-3), gauss_newton("diagonal", momentum=0.5), optax.ema(0.5)),
}


@functools.cache
def prepared(name, net):
    optimizer = OPTIMIZERS[name]()
    pair = name not in ("newton", "trust_region")
    return optimizer, step((net.model, net.loss) if pair else net.error, optimizer)


def run(train, params, state, batch, count):
    for _ in range(count):
        params, state, _ = train(params, state, *batch)
    return params, state


def zeros(tree):
    """What is known of a state before it is read: its structure, shapes and dtypes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_same(net, helpers, tmp_path, name):
    optimizer, train = prepared(name, net)
    params, state = run(train, net.params, optimizer.init(net.params), net.batch, 3)
    expected = run(train, params, state, net.batch, 4)
    known = zeros((params, jax.eval_shape(optimizer.init, params)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params, state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "run", known)
    helpers.same(restored, (params, state))
    assert isinstance(helpers.find(restored[1]), SecondOrderState)
    helpers.same(run(train, *restored, net.batch, 4), expected)


def test_the_tree_checkpointer_too(net, helpers, tmp_path):
    optimizer, train = prepared("kronecker_newton", net)
    params, state = run(train, net.params, optimizer.init(net.params), net.batch, 3)
    saved = {"params": params, "state": state}
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(tmp_path / "run", saved)
    restored = checkpointer.restore(tmp_path / "run", item=zeros(saved))
    helpers.same(jax.tree.map(jnp.asarray, restored), saved)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_has_arrays_only(net, name):
    optimizer, train = prepared(name, net)
    first = optimizer.init(net.params)
    _, state = run(train, net.params, first, net.batch, 1)
    for leaf in jax.tree.leaves((first, state)):
        assert isinstance(leaf, jax.Array)
        assert not leaf.weak_type
    assert jax.tree.structure(first) == jax.tree.structure(state)
    shapes = jax.eval_shape(optimizer.init, net.params)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda s: (s.shape, s.dtype), state)
    flat, treedef = jax.tree.flatten(state)
    again = jax.tree.unflatten(treedef, [np.asarray(leaf) for leaf in flat])
    assert jax.tree.structure(again) == treedef
