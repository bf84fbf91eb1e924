"""Within optax: chains, schedules, masks, partitions, injected numbers; and within JAX: scan, vmap, donation, dtypes."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxhess
from jaxhess._typing import InputError
from jaxhess.operators import BlockDiagonal, Dense, Diagonal
from jaxhess.optimizers import (
    find_state,
    gauss_newton,
    kronecker_newton,
    levenberg_marquardt,
    newton,
    scale_by_gauss_newton,
    scale_by_kronecker_newton,
    scale_by_newton,
    step,
)

DAMPING = 2.0
ALL = {"newton": newton, "gauss_newton": gauss_newton, "kronecker_newton": kronecker_newton}
SCALE_BY = {
    "newton": scale_by_newton,
    "gauss_newton": scale_by_gauss_newton,
    "kronecker_newton": scale_by_kronecker_newton,
}
each = pytest.mark.parametrize("name", ALL)


@functools.cache
def hessian(net, blocks="diagonal"):
    return jax.jit(jaxhess.hessian(net.error, blocks=blocks))(net.params, *net.batch)


@functools.cache
def whole_gauss_newton(net):
    return jax.jit(jaxhess.gauss_newton(net.model, net.loss, blocks="full"))(net.params, *net.batch)


def dense_step(net, gradient, damping=DAMPING, blocks="diagonal"):
    """`-(|H| + λ)^-1 g`, of each parameter's block or of the whole."""
    D = net.dense_hessian()
    C = net.absolute(net.blocked(D) if blocks == "diagonal" else D)
    return -np.linalg.solve(C + damping * np.eye(len(D)), gradient)


def updates_of(optimizer, net, H, count=1, **given):
    """The updates of some calls with the same arguments."""
    update = jax.jit(lambda g, s, H: optimizer.update(g, s, net.params, curvature=H, **given))
    state, found = optimizer.init(net.params), []
    for _ in range(count):
        updates, state = update(net.value_and_gradient[1], state, H)
        found.append(updates)
    return found, state


def test_chains(net, helpers):
    H, g = hessian(net), net.gradient
    clipped = g * 0.5 / np.linalg.norm(g)
    scaled = scale_by_newton(damping=DAMPING)
    chains = (
        (optax.chain(optax.clip_by_global_norm(0.5), scaled, optax.scale(-0.3)), [0.3 * dense_step(net, clipped)] * 2),
        (optax.chain(optax.add_decayed_weights(0.1), newton(damping=DAMPING)), [dense_step(net, g + 0.1 * net.flat)] * 2),
        (
            optax.chain(scaled, optax.scale_by_schedule(lambda count: -(0.5**count))),
            [dense_step(net, g), dense_step(net, g) / 2],
        ),
        (optax.named_chain(("n", scaled), ("rate", optax.scale_by_learning_rate(0.1))), [0.1 * dense_step(net, g)] * 2),
    )
    for optimizer, expected in chains:
        assert np.linalg.norm(g) > 0.5
        found, state = updates_of(optimizer, net, H, 2)
        for updates, s in zip(found, expected, strict=True):
            helpers.close(helpers.flat(updates), s)
        assert helpers.find(state).count == 2
        assert optax.tree_utils.tree_get(helpers.find(state), "count") == 2


def test_arguments_that_others_take_are_let_pass(net, helpers):
    H = hessian(net)
    given = {"value": net.value_and_gradient[0], "value_fn": net.mean, "all_params": net.params}
    optimizer = newton(damping=DAMPING)
    (plain,), _ = updates_of(optimizer, net, H, **given)
    (more,), _ = updates_of(optimizer, net, H, grad=net.value_and_gradient[1], batch_stats={"mean": 0.0}, key=3, **given)
    helpers.same(plain, more)
    # And after a transformation that uses them itself.
    optimizer = optax.chain(newton(damping=DAMPING), optax.scale_by_backtracking_linesearch(5))
    given["value_fn"] = lambda params, curvature=None, all_params=None: net.mean(params)
    (_,), state = updates_of(optimizer, net, H, grad=net.value_and_gradient[1], **given)
    assert helpers.find(state).info.accepted


MASKS = {
    "leaves": {"hidden": {"b": False, "w": True}, "out": True},
    "a whole layer": {"hidden": True, "out": False},
    "all but one": {"hidden": {"b": True, "w": False}, "out": True},
    "function": lambda params: jax.tree.map(lambda leaf: leaf.ndim == 2, params),
}


def chosen(net, mask):
    mask = mask(net.params) if callable(mask) else mask
    spread = jax.tree.map(lambda m, part: jax.tree.map(lambda leaf: np.full(leaf.shape, m), part), mask, net.params)
    return np.flatnonzero(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(spread)]))


KINDS = [*((which, "blocks") for which in MASKS), ("leaves", "gauss_newton"), ("leaves", "whole")]


@pytest.mark.parametrize(("which", "kind"), KINDS)
def test_masks(net, helpers, which, kind):
    places, g = chosen(net, MASKS[which]), net.gradient
    if kind == "gauss_newton":
        inner, H, D = gauss_newton(damping=DAMPING), whole_gauss_newton(net), net.dense_gauss_newton()
    else:
        blocks = {"blocks": "diagonal", "whole": "full"}[kind]
        inner, H, D = newton(blocks=blocks, damping=DAMPING), hessian(net, blocks), net.dense_hessian()
        D = net.blocked(D) if kind == "blocks" else D
    part = D[np.ix_(places, places)]
    C = part if kind == "gauss_newton" else net.absolute(part)
    s = -np.linalg.solve(C + DAMPING * np.eye(len(places)), g[places])
    given = {"value": net.value_and_gradient[0], "value_fn": net.mean, "all_params": net.params}
    (updates,), state = updates_of(optax.masked(inner, MASKS[which]), net, H, **given)
    helpers.close(helpers.flat(updates)[places], s)
    moved = net.flat.copy()
    moved[places] += s
    info = helpers.find(state).info
    helpers.close(info.new_loss, net.mean(net.tree(moved)))
    helpers.close(info.predicted, -(g[places] @ s + s @ C @ s / 2))
    # The others are let pass, as `optax.masked` does.
    others = np.setdiff1d(np.arange(15), places)
    helpers.close(helpers.flat(updates)[others], g[others])


def test_masked_products_and_factors(net, helpers):
    G = whole_gauss_newton(net)
    optimizer = optax.masked(kronecker_newton(damping=DAMPING), {"hidden": True, "out": False})
    blocks = jaxhess.gauss_newton(net.model, net.loss, blocks="diagonal")(net.params, *net.batch)
    given = {"value": 1.0, "product": G.mv, "all_params": net.params}
    (updates,), state = updates_of(optimizer, net, blocks, **given)
    assert len(helpers.find(state).memory.factors) == 2
    s, D, g = helpers.flat(updates)[:9], net.dense_gauss_newton()[:9, :9], net.gradient[:9]
    # The length of the step is that of the true curvature of those that are kept.
    helpers.close(s @ D @ s + DAMPING * s @ s, -g @ s)
    with pytest.raises(InputError, match="all_params"):
        updates_of(optimizer, net, blocks, value=1.0, product=G.mv)


def test_a_layer_that_is_kept_is_a_layer_still(net, helpers):
    """Its bias shares the factors of its weight, whatever is left to others."""
    blocks = jaxhess.gauss_newton(net.model, net.loss, blocks="diagonal")(net.params, *net.batch)
    assert blocks.layers == ((1, 0),)
    masked = optax.masked(kronecker_newton(damping=DAMPING), {"hidden": True, "out": False})
    _, state = updates_of(masked, net, blocks, value=1.0)
    _, alone = updates_of(kronecker_newton(damping=DAMPING), net, blocks, value=1.0)
    kept, whole = helpers.find(state).memory.factors, helpers.find(alone).memory.factors
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(whole[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    shifted = {"hidden": {"b": False, "w": True}, "out": True}  # half of a layer is none
    _, state = updates_of(optax.masked(kronecker_newton(damping=DAMPING), shifted), net, blocks, value=1.0)
    assert len(helpers.find(state).memory.factors) == 2


@each
def test_a_group_without_parameters(net, name):
    optimizer = optax.partition({"none": ALL[name](), "all": optax.sgd(0.1)}, jax.tree.map(lambda _: "all", net.params))
    params, state, metrics = step((net.model, net.loss), optimizer)(net.params, optimizer.init(net.params), *net.batch)
    expected = net.flat - 0.1 * net.gradient
    np.testing.assert_allclose(ravel_pytree(params)[0], expected, rtol=1e-9)
    assert find_state(state).count == 1
    np.testing.assert_allclose(metrics.loss, net.value_and_gradient[0], rtol=1e-12)


def test_two_that_want_different_curvatures(net):
    first, second = gauss_newton(damping=DAMPING), newton(damping=DAMPING)
    labels = {"hidden": "a", "out": "b"}
    for a, b in ((first, second), (second, first), (kronecker_newton(damping=DAMPING), second)):
        optimizer = optax.partition({"a": a, "b": b}, labels)
        with pytest.raises(InputError, match=r"two second-order ones that want different curvatures.*'diagonal'"):
            step((net.model, net.loss), optimizer)(net.params, optimizer.init(net.params), *net.batch)
    optimizer = optax.partition({"a": first, "b": second}, labels)
    given = jaxhess.gauss_newton(net.model, net.loss, blocks="full")
    train = step((net.model, net.loss), optimizer, curvature=given)
    _, _, metrics = train(net.params, optimizer.init(net.params), *net.batch)
    assert metrics.accepted


@each
def test_parameters_that_are_numbers(name):
    def model(p, x):
        return p["w"] * x + p["b"]

    optimizer = ALL[name]()
    params, xs = {"w": 0.5, "b": 0.0}, jnp.arange(4.0)
    state = optimizer.init(params)
    train = step((model, jaxhess.losses.squared_error), optimizer)
    for _ in range(40):
        params, state, _ = train(params, state, xs, 2 * xs + 1)
    np.testing.assert_allclose([params["w"], params["b"]], [2, 1], atol=1e-2)


def test_masks_that_cannot_be(net):
    optimizer = optax.masked(newton(damping=DAMPING), {"hidden": True, "out": False})
    with pytest.raises(InputError, match=r"all_params=params"):
        updates_of(optimizer, net, hessian(net), value=1.0, value_fn=net.mean)
    wrong = BlockDiagonal({"hidden": {"b": Dense(jnp.eye(3)), "v": Dense(jnp.eye(6), (3, 2))}, "out": Dense(jnp.eye(6))})
    with pytest.raises(InputError, match="hidden/v"):
        updates_of(optimizer, net, wrong)
    wrong = BlockDiagonal({"hidden": {"b": Dense(jnp.eye(3)), "w": Dense(jnp.eye(6))}, "out": Dense(jnp.eye(6), (2, 3))})
    with pytest.raises(InputError, match="hidden/w"):
        updates_of(optimizer, net, wrong)


@pytest.mark.parametrize(
    "labels", [{"hidden": "second", "out": "first"}, {"hidden": {"b": "first", "w": "second"}, "out": "first"}]
)
def test_partition_with_adam(net, helpers, labels):
    adam = optax.adam(0.01)
    optimizer = optax.partition({"second": newton(damping=DAMPING), "first": adam}, labels)
    given = {"value": net.value_and_gradient[0], "value_fn": net.mean, "all_params": net.params}
    (updates,), state = updates_of(optimizer, net, hessian(net), **given)
    places = chosen(net, jax.tree.map(lambda label: label == "second", labels))
    others = np.setdiff1d(np.arange(15), places)
    helpers.close(helpers.flat(updates)[places], dense_step(net, net.gradient)[places])
    by_adam, _ = adam.update(net.value_and_gradient[1], adam.init(net.params))
    helpers.close(helpers.flat(updates)[others], helpers.flat(by_adam)[others])
    assert helpers.find(state).info.accepted


def test_two_of_ours_side_by_side(net, helpers):
    parts = {"n": newton(damping=DAMPING), "g": newton("positive_part", damping=1.0)}
    optimizer = optax.partition(parts, {"hidden": "n", "out": "g"})
    (updates,), _ = updates_of(optimizer, net, hessian(net))
    helpers.close(helpers.flat(updates)[:9], dense_step(net, net.gradient)[:9])
    D = net.dense_hessian()[9:, 9:]  # of the output layer it is Gauss-Newton's, and definite
    helpers.close(helpers.flat(updates)[9:], -np.linalg.solve(D + np.eye(6), net.gradient[9:]))


@pytest.mark.parametrize(("name", "scaled"), [(name, True) for name in ALL] + [("newton", False), ("gauss_newton", False)])
def test_inject_hyperparams(net, helpers, name, scaled):
    make = (SCALE_BY if scaled else ALL)[name]
    fixed = {"momentum": 0.0} if name == "kronecker_newton" else {}
    optimizer = optax.inject_hyperparams(make)(damping=DAMPING, learning_rate=0.5, **fixed)
    tags = lx.positive_semidefinite_tag
    curvature = BlockDiagonal(jax.tree.map(lambda leaf: Dense(2 * jnp.eye(leaf.size), leaf.shape, tags), net.params))
    sign = 1 if scaled else -1

    @jax.jit
    def update(state):
        return optimizer.update(net.value_and_gradient[1], state, net.params, curvature=curvature)

    def expected(rate, damping, state):
        if name == "kronecker_newton":
            damping = float(find_state(state).control.strength)
        return sign * rate * net.gradient / (2 + damping)

    updates, state = update(optimizer.init(net.params))
    helpers.close(helpers.flat(updates), expected(0.5, DAMPING, state))
    assert find_state(state).info.learning_rate == 0.5
    state.hyperparams["learning_rate"] = jnp.asarray(2.0, state.hyperparams["learning_rate"].dtype)
    updates, state = update(state)
    helpers.close(helpers.flat(updates), expected(2.0, DAMPING, state))
    state.hyperparams["damping"] = jnp.asarray(6.0, state.hyperparams["damping"].dtype)
    updates, state = update(state)
    np.testing.assert_allclose(find_state(state).control.damping, 6.0)
    helpers.close(helpers.flat(updates), expected(2.0, 6.0, state))


def test_injected_schedules(net, helpers):
    make = optax.inject_hyperparams(newton)
    optimizer = make("shift", damping=DAMPING, learning_rate=lambda count: 0.5**count, weight_decay=0.0)
    tags = lx.positive_semidefinite_tag
    curvature = BlockDiagonal(jax.tree.map(lambda leaf: Dense(2 * jnp.eye(leaf.size), leaf.shape, tags), net.params))
    found, _ = updates_of(optimizer, net, curvature, 3)
    for k, updates in enumerate(found):
        helpers.close(helpers.flat(updates), -(0.5**k) * net.gradient / (2 + DAMPING), 1e-6)


@functools.cache
def training(name, net, **options):
    optimizer = ALL[name](**options)
    return optimizer, step(net.error if name == "newton" else (net.model, net.loss), optimizer)


def test_apply_if_finite(net, helpers):
    optimizer = optax.apply_if_finite(newton(), 3)
    train = step(net.error, optimizer)
    params, state = net.params, optimizer.init(net.params)
    for _ in range(3):
        params, state, metrics = train(params, state, *net.batch)
    assert metrics.loss < net.value_and_gradient[0]
    assert state.total_notfinite == 0
    before = params
    x, t = net.batch
    params, state, _ = train(params, state, x, t.at[0, 0].set(jnp.nan))
    helpers.same(params, before)
    assert state.total_notfinite == 1


def test_multi_steps(net, helpers):
    """Gradients of two batches, and the curvature of the second."""
    steps = optax.MultiSteps(newton(damping=DAMPING), 2)
    H = hessian(net)
    update = jax.jit(lambda g, s, H: steps.update(g, s, net.params, curvature=H))
    state = steps.init(net.params)
    g = net.value_and_gradient[1]
    updates, state = update(jax.tree.map(lambda leaf: 2 * leaf, g), state, H)
    np.testing.assert_array_equal(helpers.flat(updates), np.zeros(15))
    updates, state = update(jax.tree.map(jnp.zeros_like, g), state, H)
    helpers.close(helpers.flat(updates), dense_step(net, net.gradient), 1e-6)
    assert helpers.find(state).count == 1


@each
def test_scan_is_the_loop(net, helpers, name):
    optimizer, train = training(name, net)
    state = optimizer.init(net.params)

    @jax.jit
    def scanned(params, state):
        def body(carry, _):
            params, state, metrics = train(*carry, *net.batch)
            return (params, state), metrics

        return jax.lax.scan(body, (params, state), length=3)

    (params, end), metrics = scanned(net.params, state)
    assert metrics.loss.shape == (3,)
    looped, looped_state = net.params, state
    for k in range(3):
        looped, looped_state, one = train(looped, looped_state, *net.batch)
        helpers.close(one.loss, metrics.loss[k])
        shapes = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, looped_state)
        assert all(jax.tree.leaves(shapes))
        assert jax.tree.structure(looped_state) == jax.tree.structure(state)
    helpers.close(helpers.flat(params), helpers.flat(looped), 1e-7)
    assert find_state(end).count == 3


@pytest.mark.parametrize("name", ["newton", "kronecker_newton"])
def test_an_ensemble(net, helpers, name):
    optimizer, train = training(name, net)
    rng = np.random.default_rng(5)
    starts = [net.tree(rng.normal(size=15)) for _ in range(3)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    run = jax.jit(jax.vmap(train, in_axes=(0, 0, None, None)))
    states = jax.vmap(optimizer.init)(together)
    for _ in range(2):
        together, states, metrics = run(together, states, *net.batch)
    for k, params in enumerate(starts):
        state = optimizer.init(params)
        for _ in range(2):
            params, state, one = train(params, state, *net.batch)
        helpers.close(helpers.flat(jax.tree.map(lambda leaf, k=k: leaf[k], together)), helpers.flat(params), 1e-6)
        helpers.close(metrics.loss[k], one.loss, 1e-7)
        assert metrics.attempts[k] == one.attempts
    # One that is lost does not hold the others back.
    spoiled = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), together)
    after, states, metrics = run(spoiled, states, *net.batch)
    assert metrics.accepted.tolist() == [False, True, True]
    assert find_state(states).failures.tolist() == [1, 0, 0]
    assert all(np.isfinite(leaf[1:]).all() for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize("name", ["newton", "kronecker_newton"])
def test_donation(net, name):
    optimizer, train = training(name, net)
    donated = jax.jit(lambda params, state: train(params, state, *net.batch)[:2], donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, net.params), optimizer.init(net.params)
    for _ in range(2):
        given = params
        params, state = donated(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert find_state(state).count == 2
    assert net.mean(params) < net.value_and_gradient[0]


NARROW = [("newton", jnp.float32), ("gauss_newton", jnp.bfloat16), ("kronecker_newton", jnp.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), NARROW)
def test_parameters_of_fewer_bits(net, name, dtype):
    optimizer, train = training(name, net, weight_decay=1e-3)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), net.params)
    batch = tuple(leaf.astype(dtype) for leaf in net.batch)
    state = optimizer.init(params)
    structure, losses = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state), []
    for _ in range(3):
        params, state, metrics = train(params, state, *batch)
        losses.append(float(metrics.loss))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == structure
    floats = {leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)}
    assert floats == {jnp.dtype("float32")}
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_penalty_of_many_narrow_parameters(helpers, dtype):
    """The sum of 70000 squares is more than float16 can be."""
    params = jnp.ones(70_000, dtype)
    curvature = BlockDiagonal(Diagonal(jnp.full(70_000, 0.25)))
    optimizer = newton(weight_decay=0.25, damping=1e-6)

    def value_of(p):
        return 0.125 * jnp.sum(p.astype(jnp.float32) ** 2)

    updates, state = optimizer.update(
        params * jnp.asarray(0.25, dtype), optimizer.init(params), params, curvature=curvature, value=value_of(params),
        value_fn=value_of,
    )  # fmt: skip
    info = helpers.find(state).info
    np.testing.assert_allclose(info.loss, 0.25 * 70_000, rtol=1e-6)
    assert info.accepted
    np.testing.assert_allclose(np.asarray(updates, np.float32), -1, rtol=1e-2)


def test_a_loss_of_few_bits_cannot_refuse_what_its_rounding_hides(helpers):
    """The step lowers the loss by less than one unit of bfloat16, which comes out one unit higher."""
    optimizer = newton(damping=1e-6, max_attempts=1)
    x, curvature = jnp.ones(2), BlockDiagonal(Dense(jnp.eye(2)))

    def value_fn(p):
        return jnp.where(jnp.all(p == x), 1.0, 1.0078125).astype(jnp.bfloat16)

    for gradient, accepted in ((1e-3, True), (1.0, False)):
        g = jnp.full(2, gradient)
        _, state = optimizer.update(
            g, optimizer.init(x), x, curvature=curvature, value=jnp.asarray(1.0, jnp.bfloat16), value_fn=value_fn
        )
        assert helpers.find(state).info.accepted == accepted


def test_the_loss_that_counts_is_that_of_rounded_parameters():
    """Between two numbers of bfloat16 the step is one to either side: what is judged is what comes out."""

    def function(p):
        return jnp.sum((p.astype(jnp.float32) - jnp.array([0.333, 0.111])) ** 2)

    optimizer = newton(damping=levenberg_marquardt(1e-2))
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p, curvature=Dense(2 * jnp.eye(2)), value_fn=function))
    for start in ([1.0, 0.37], [0.3, 0.2], [5.0, -7.0], [0.34, 0.1105]):
        params = jnp.array(start, jnp.bfloat16)
        for _ in range(3):
            updates, state = update(jax.grad(function)(params), optimizer.init(params), params)
            assert updates.dtype == jnp.bfloat16
            before, params = function(params), optax.apply_updates(params, updates)
            info = find_state(state).info
            if info.accepted:
                np.testing.assert_allclose(info.new_loss, function(params), rtol=1e-6)
            assert function(params) <= before
