"""Newton steps against dense eigendecompositions of `jax.hessian`, and what is said of them."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhess
from jaxhess import optimizers
from jaxhess._typing import InputError
from jaxhess.operators import BlockDiagonal, Dense, functions
from jaxhess.optimizers import newton, scale_by_newton

DAMPING = 2.0
MODES = ("absolute", "positive_part", "shift")
BLOCKS = ("diagonal", "full")


def bent(matrix, mode):
    values, vectors = np.linalg.eigh(matrix)
    changed = {
        "absolute": np.abs(values),
        "positive_part": np.maximum(values, 0),
        "shift": values + max(0, -values[0]),
    }[mode]
    return (vectors * changed) @ vectors.T


def dense_curvature(net, matrix, mode, blocks):
    """C of the module's docstring, for all parameters."""
    if blocks == "full":
        return bent(matrix, mode)
    ends = np.cumsum((0, *net.sizes))
    made = np.zeros_like(matrix)
    for a, b in itertools.pairwise(ends):
        made[a:b, a:b] = bent(matrix[a:b, a:b], mode)
    return made


@functools.cache
def run(optimizer, net, error=None):
    """One update at the net's parameters, with everything given."""
    error = error or net.error
    (value, gradient) = jax.jit(jax.value_and_grad(functools.partial(net.mean, error=error)))(net.params)
    H = jaxhess.hessian(error, blocks=optimizer.wanted.blocks)(net.params, *net.batch)

    @jax.jit
    def update(state, H):
        value_fn = functools.partial(net.mean, error=error)
        return optimizer.update(gradient, state, net.params, curvature=H, value=value, value_fn=value_fn)

    return update(optimizer.init(net.params), H)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("mode", MODES)
def test_the_step_is_that_of_the_dense_matrix(net, helpers, mode, blocks):
    D, g = net.dense_hessian(), net.gradient
    assert np.linalg.eigvalsh(D)[0] < -1e-3
    C = dense_curvature(net, D, mode, blocks)
    s = -np.linalg.solve(C + DAMPING * np.eye(len(g)), g)
    updates, state = run(scale_by_newton(mode, blocks, damping=DAMPING), net)
    assert state.info.accepted
    helpers.close(-helpers.flat(updates), s)
    predicted = -(g @ s + s @ C @ s / 2)
    helpers.close(state.info.predicted, predicted)
    value = net.value_and_gradient[0]
    helpers.close(state.info.loss, value)
    helpers.close(state.info.new_loss, net.mean(net.tree(net.flat + s)))
    helpers.close(state.info.ratio, (value - net.mean(net.tree(net.flat + s))) / predicted, 1e-8)
    assert state.info.attempts == 1
    whole = {"diagonal": "eigendecomposition of each block", "full": "eigendecomposition of the whole"}
    assert state.info.solver_name == whole[blocks]
    assert (state.previous, state.memory) == ((), ())


@pytest.mark.parametrize("mode", MODES)
def test_weight_decay_is_the_penalty(net, helpers, mode):
    kept, added = (
        run(scale_by_newton(mode, "diagonal", damping=0.05, weight_decay=net.decay), net),
        run(scale_by_newton(mode, "diagonal", damping=0.05), net, net.penalised),
    )
    helpers.close(helpers.flat(kept[0]), helpers.flat(added[0]))
    for name in ("loss", "new_loss", "predicted", "ratio"):
        helpers.close(getattr(kept[1].info, name), getattr(added[1].info, name), 1e-8)


def test_of_a_definite_model_the_step_has_its_own_length(net, helpers):
    g, C = net.gradient, dense_curvature(net, net.dense_hessian(), "absolute", "diagonal")
    optimizer = scale_by_newton(damping=DAMPING, learning_rate="exact", momentum="exact")
    H = jaxhess.hessian(net.error)(net.params, *net.batch)
    last = np.random.default_rng(0).normal(size=len(g))
    state = optimizer.init(net.params)._replace(previous=net.tree(last))
    updates, state = jax.jit(lambda g, s, H: optimizer.update(g, s, net.params, curvature=H))(net.tree(g), state, H)
    d = -np.linalg.solve(C + DAMPING * np.eye(len(g)), g)
    helpers.close(-helpers.flat(updates), d, 1e-8)
    np.testing.assert_allclose([state.info.learning_rate, state.info.momentum], [1, 0], atol=1e-9)
    helpers.close(helpers.flat(state.previous), d, 1e-8)


def test_weight_decay_counts_once_in_the_exact_length(net, helpers):
    options = {"damping": DAMPING, "weight_decay": net.decay}
    exact, given = (run(scale_by_newton(learning_rate=rate, **options), net) for rate in ("exact", 1.0))
    np.testing.assert_allclose(exact[1].info.learning_rate, 1.0, rtol=1e-9)
    helpers.close(helpers.flat(exact[0]), helpers.flat(given[0]))


def test_the_alias_goes_downhill(net, helpers):
    scaled, alone = run(scale_by_newton(damping=DAMPING), net), run(newton(damping=DAMPING), net)
    helpers.close(helpers.flat(alone[0]), -helpers.flat(scaled[0]))
    helpers.same(helpers.find(alone[1]), scaled[1])
    assert newton("shift", "full").wanted == scale_by_newton("shift", "full").wanted
    after = optax.apply_updates(net.params, alone[0])
    helpers.close(net.mean(after), scaled[1].info.new_loss)
    assert net.mean(after) < net.value_and_gradient[0]


def test_without_damping_what_has_no_curvature_stays(helpers):
    D = np.diag([4.0, 0.0, -2.0])
    optimizer = scale_by_newton(damping=0.0)
    updates, state = optimizer.update(jnp.ones(3), optimizer.init(jnp.ones(3)), curvature=Dense(jnp.asarray(D)))
    np.testing.assert_allclose(updates, [0.25, 0, 0.5])
    assert state.failures == 0


def test_scalars_and_empty_parameters(helpers):
    params = {"e": jnp.zeros((0, 2)), "s": jnp.asarray(0.5), "w": jnp.ones((2, 1, 2))}

    def error(p, x):
        return p["s"] ** 4 * x + jnp.sum(jnp.cos(p["w"])) + jnp.sum(p["e"])

    for blocks in BLOCKS:
        optimizer = scale_by_newton(blocks=blocks, damping=0.0)
        _, grads, H = jaxhess.value_grad_and_hessian(error, blocks=blocks)(params, jnp.ones(2))
        updates, _ = optimizer.update(grads, optimizer.init(params), params, curvature=H)
        helpers.close(updates["s"], 0.5**3 * 4 / (12 * 0.25))
        helpers.close(updates["w"], np.full((2, 1, 2), -np.tan(1.0)))
        assert updates["e"].shape == (0, 2)


def test_curvature_that_does_not_fit(net):
    optimizer = newton()
    state, grads = optimizer.init(net.params), net.params

    def update(curvature, **options):
        given = {"params": net.params, "value": 1.0} | options
        return optimizer.update(grads, state, given.pop("params"), curvature=curvature, **given)

    good = {"hidden": {"b": Dense(jnp.eye(3)), "w": Dense(jnp.eye(6), (3, 2))}, "out": Dense(jnp.eye(6), (2, 3))}
    for curvature, what in (
        (None, r"needs curvature=.*jaxhess\.optimizers\.step"),
        (3.0, "must be an operator, got float"),
        (np.eye(15), "must be an operator, got ndarray"),
        (good, "must be an operator, got dict"),
        (BlockDiagonal({"hidden": good["hidden"], "in": good["out"]}), "in"),
        (BlockDiagonal({"hidden": good["hidden"]}), "out"),
        (BlockDiagonal(good | {"out": Dense(jnp.eye(6), (3, 2))}), r"out.*\(2, 3\)"),
        (BlockDiagonal(good | {"hidden": good["hidden"] | {"b": Dense(jnp.eye(2))}}), "hidden/b"),
        (Dense(jnp.eye(15)), "hidden/b"),
    ):
        with pytest.raises(InputError, match=what):
            update(curvature)
    H = BlockDiagonal(good)
    with pytest.raises(InputError, match=r"needs value_fn=.*constant"):
        update(H, value=None)
    with pytest.raises(InputError, match="needs params= beside value_fn="):
        update(H, params=None, value_fn=net.mean)
    with pytest.raises(InputError, match=r"value_fn must return .* scalar, but returned shape \(2,\)"):
        update(H, value_fn=lambda p: jnp.ones(2))
    decayed = newton(damping=1.0, weight_decay=0.1)
    with pytest.raises(InputError, match="params="):
        decayed.update(grads, decayed.init(grads), curvature=H)
    whole = newton("trust_region", "full")
    with pytest.raises(InputError, match="needs the whole Hessian"):
        whole.update(grads, whole.init(grads), net.params, curvature=H, value=1.0)
    updates, _ = update(H, unknown="ignored", grad=grads)
    assert jax.tree.structure(updates) == jax.tree.structure(net.params)


def test_too_large_to_diagonalise(net, monkeypatch):
    H = jaxhess.hessian(net.error)(net.params, *net.batch)
    monkeypatch.setattr(functions, "_DIRECT", 5)
    optimizer = newton(damping=1.0)
    with pytest.raises(InputError, match=r"hidden/w.*newton: .*kronecker_newton for such layers, or gauss_newton"):
        optimizer.update(net.params, optimizer.init(net.params), net.params, curvature=H)


def test_a_whole_hessian_too_large_to_diagonalise(net, monkeypatch):
    H = jaxhess.hessian(net.error, blocks="full")(net.params, *net.batch)
    module = importlib.import_module("jaxhess.optimizers.newton")
    monkeypatch.setattr(module, "_LARGEST", 9)
    optimizer = newton("absolute", "full", damping=1.0)
    with pytest.raises(InputError, match=r"the whole Hessian has 15 rows, more than 9.*blocks='diagonal'"):
        optimizer.update(net.params, optimizer.init(net.params), net.params, curvature=H)
    masked = optax.masked(optimizer, {"hidden": True, "out": False})  # whose rows are nine
    updates, _ = masked.update(net.params, masked.init(net.params), net.params, curvature=H)
    assert np.all(np.isfinite(updates["hidden"]["w"]))


def test_it_solves_what_plain_descent_does_not():
    # Rosenbrock's valley.
    def error(p, x):
        return x * (100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2)

    optimizer = newton("trust_region", "full")
    params = jnp.array([-1.2, 1.0])
    train, state = optimizers.step(error, optimizer), optimizer.init(params)
    for _ in range(30):
        params, state, _ = train(params, state, jnp.ones(1))
    np.testing.assert_allclose(params, [1, 1], rtol=1e-6)
