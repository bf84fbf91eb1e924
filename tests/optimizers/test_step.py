"""The convenience: one compiled step, of a pair or a lone loss, with any optimizer and models of other libraries."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxhess
from jaxhess import optimizers
from jaxhess._typing import InputError
from jaxhess.optimizers import Metrics, find_state, gauss_newton, kronecker_newton, levenberg_marquardt, newton, step

DAMPING = 2.0


def first(net, optimizer, loss_or_model, **options):
    """The first step's parameters as a vector, state and metrics."""
    train = step(loss_or_model, optimizer, **options)
    params, state, metrics = train(net.params, optimizer.init(net.params), *net.batch)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)]), state, metrics


def moved(net, C, damping=DAMPING):
    return net.flat - np.linalg.solve(C + damping * np.eye(15), net.gradient)


def test_the_key_of_random_directions(net):
    pair = net.model, net.loss
    own, zero, other = (
        first(net, kronecker_newton(max_iterations=1), pair, **options)[0]
        for options in ({}, {"key": jax.random.key(0)}, {"key": jax.random.key(1)})
    )
    np.testing.assert_array_equal(own, zero)
    assert np.linalg.norm(own - other) > 1e-3 * np.linalg.norm(own - net.flat)


def test_which_curvature_it_takes(net, helpers):
    D, G, pair = net.dense_hessian(), net.dense_gauss_newton(), (net.model, net.loss)
    block, by = net.blocked, {"damping": DAMPING}
    chain = functools.partial(optax.chain, optax.identity())
    for optimizer, given, options, expected in (
        (newton(**by), net.error, {}, moved(net, net.absolute(block(D)))),
        (newton(**by), pair, {}, moved(net, net.absolute(block(D)))),
        (newton(**by), net.error, {"blocks": "full"}, moved(net, net.absolute(D))),
        (gauss_newton(**by), pair, {}, moved(net, G)),
        (gauss_newton(**by), pair, {"blocks": "diagonal"}, moved(net, block(G))),
        # What is within a chain is seen.
        (chain(newton(**by)), net.error, {}, moved(net, net.absolute(block(D)))),
        (chain(newton(**by)), pair, {}, moved(net, net.absolute(block(D)))),
        (chain(newton("absolute", "full", **by)), pair, {}, moved(net, net.absolute(D))),
        (chain(newton(**by)), pair, {"curvature": "gauss_newton"}, moved(net, G)),
        (chain(gauss_newton(**by)), pair, {"blocks": "diagonal"}, moved(net, block(G))),
    ):
        flat, state, metrics = first(net, optimizer, given, **options)
        helpers.close(flat, expected)
        helpers.close(metrics.loss, net.value_and_gradient[0])
        assert metrics.accepted
        helpers.same(helpers.find(state).info.loss, metrics.loss)


def test_kronecker_newton_is_seen_within_a_chain(net, helpers):
    for given in ((net.model, net.loss), net.error):
        expected, _, _ = first(net, kronecker_newton(), given)
        flat, _, metrics = first(net, optax.chain(optax.identity(), kronecker_newton(), optax.scale(1.0)), given)
        helpers.close(flat, expected)
        assert metrics.solver_name == "Kronecker factors"


def test_curvature_of_ones_own(net, helpers):
    def curvature(params, xs, ts):
        return jaxhess.fisher(net.error, blocks="full")(params, xs, ts)

    rows = jax.vmap(jax.grad(net.error), (None, 0, 0))(net.params, *net.batch)
    rows = np.concatenate([np.asarray(leaf).reshape(4, -1) for leaf in jax.tree.leaves(rows)], axis=1)
    for optimizer, given in ((gauss_newton(damping=DAMPING), net.error), (newton(damping=DAMPING), (net.model, net.loss))):
        flat, _, _ = first(net, optimizer, given, curvature=curvature)
        helpers.close(flat, moved(net, rows.T @ rows / 4))


def test_any_optimizer_of_optax(net, helpers):
    (value, grads), pair = net.value_and_gradient, (net.model, net.loss)
    for optimizer, given in ((optax.adam(0.01), pair), (optax.lbfgs(), net.error)):
        flat, _, metrics = first(net, optimizer, given)
        update = optax.with_extra_args_support(optimizer).update
        updates, _ = update(grads, optimizer.init(net.params), net.params, value=value, grad=grads, value_fn=net.mean)
        helpers.close(flat, net.flat + helpers.flat(updates), 1e-8)
        helpers.close(metrics.loss, value)
        assert metrics.solver_name == "none"
        assert np.isnan(metrics.damping)
        assert np.isnan(metrics.gain_ratio)
        assert (metrics.attempts, metrics.iterations) == (0, 0)


def test_metrics(net, helpers):
    optimizer = gauss_newton(solver="cg", damping=levenberg_marquardt(0.5), learning_rate="exact", momentum="exact")
    flat, state, metrics = first(net, optimizer, (net.model, net.loss))
    info = helpers.find(state).info
    assert Metrics._fields == (
        "loss", "damping", "gain_ratio", "accepted", "attempts", "iterations", "residual", "learning_rate", "momentum",
        "solver",
    )  # fmt: skip
    assert all(jnp.shape(field) == () for field in metrics)
    helpers.close(metrics.damping, helpers.find(state).control.damping)
    helpers.close(metrics.gain_ratio, (net.value_and_gradient[0] - net.mean(net.tree(flat))) / info.predicted, 1e-7)
    assert metrics.solver_name == "conjugate gradients"
    assert metrics.iterations > 0
    assert 0 < metrics.residual <= 1e-2
    assert metrics.learning_rate > 0.5
    assert metrics.momentum == 0


def test_it_is_compiled_once(net):
    traces = []

    def error(p, x, t):
        traces.append(1)
        return net.error(p, x, t)

    optimizer = newton(learning_rate="exact", momentum="exact")
    train, state, params = step(error, optimizer), optimizer.init(net.params), net.params
    params, state, _ = train(params, state, *net.batch)
    count = len(traces)
    for k in range(3):
        params, state, metrics = train(params, state, *(leaf + k for leaf in net.batch))
        jax.block_until_ready(metrics)
    assert len(traces) == count


@pytest.mark.parametrize("name", ["newton", "gauss_newton", "kronecker_newton"])
def test_batch_size_is_no_matter(net, helpers, name):
    optimizer, given = {
        "newton": (newton("trust_region", "full"), net.error),
        "gauss_newton": (gauss_newton(), (net.model, net.loss)),
        "kronecker_newton": (kronecker_newton(), (net.model, net.loss)),
    }[name]
    flat, _, metrics = first(net, optimizer, given)
    chunked, _, same = first(net, optimizer, given, batch_size=2)
    helpers.close(chunked, flat, 1e-8)
    helpers.close(same.gain_ratio, metrics.gain_ratio, 1e-7)


MASK = {"hidden": True, "out": False}


def test_masks_and_partitions(net, helpers):
    s = moved(net, net.absolute(net.blocked(net.dense_hessian()))) - net.flat
    labels = {"hidden": "newton", "out": "adam"}
    parts = optax.partition({"newton": newton(damping=DAMPING), "adam": optax.adam(1e-3)}, labels)
    flat, state, metrics = first(net, parts, net.error)
    helpers.close((flat - net.flat)[:9], s[:9])
    assert metrics.solver_name == "eigendecomposition of each block"
    assert metrics.accepted
    frozen = optax.chain(
        optax.masked(newton(damping=DAMPING), MASK), optax.masked(optax.set_to_zero(), {"hidden": False, "out": True})
    )
    flat, state, metrics = first(net, frozen, net.error)
    helpers.close(flat, net.flat + np.where(np.arange(15) < 9, s, 0))
    # Nothing else moved, so what was predicted to be the loss is.
    helpers.close(helpers.find(state).info.new_loss, net.mean(net.tree(flat)))
    both = optax.partition({"newton": gauss_newton(), "adam": optax.adam(1e-3)}, labels)
    _, _, metrics = first(net, both, (net.model, net.loss))
    assert metrics.solver_name.startswith("Cholesky")


def trained(params, optimizer, given, batch, count=12):
    train, state, losses = step(given, optimizer), optimizer.init(params), []
    for _ in range(count):
        params, state, metrics = train(params, state, *batch)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)
    return params, state, losses


def test_flax_models_train(net):
    xs, ts = net.batch
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(3, 2, rngs=nnx.Rngs(1)))
    graphdef, state = nnx.split(model)
    batch = xs.astype(jnp.float32), ts.astype(jnp.float32)

    def apply(state, x):
        return nnx.merge(graphdef, state)(x)

    with jax.numpy_rank_promotion("allow"):
        for optimizer in (kronecker_newton(every=2), optax.chain(newton())):
            params, _, losses = trained(state, optimizer, (apply, net.loss), batch)
            assert losses[-1] < 0.2 * losses[0]
            assert isinstance(params, nnx.State)
        nnx.update(model, params)
        predicted = jnp.mean(jax.vmap(net.loss)(model(batch[0]), batch[1]))
    assert predicted <= losses[-1]


def test_equinox_models_train(net):
    params, static = eqx.partition(eqx.nn.MLP(2, 2, 3, 1, jnp.tanh, key=jax.random.key(0)), eqx.is_inexact_array)

    def apply(params, x):
        return eqx.combine(params, static)(x)

    def error(params, x, t):
        return net.loss(apply(params, x), t)

    for optimizer, given in ((gauss_newton(), (apply, net.loss)), (newton("trust_region", "full"), error)):
        found, _, losses = trained(params, optimizer, given, net.batch)
        assert losses[-1] < 0.2 * losses[0]
        assert jax.tree.structure(found) == jax.tree.structure(params)


def test_batches_that_are_trees(net, helpers):
    xs, ts = net.batch

    def model(p, x):
        return net.model(p, x["left"] + x["right"])

    def loss(z, target, weight):
        return weight * net.loss(z, target)

    optimizer = gauss_newton(damping=DAMPING)
    train = step((model, loss), optimizer)
    batch = {"left": xs / 4, "right": 3 * xs / 4}, ts, jnp.ones(4)
    params, _, _ = train(net.params, optimizer.init(net.params), *batch)
    helpers.close(helpers.flat(params), moved(net, net.dense_gauss_newton()))


def test_refusals(net):
    for attempt, what in (
        (lambda: step(net.error, gauss_newton()), r"Gauss-Newton needs the model and its loss apart.*step\(\(model, loss\)"),
        (lambda: step(net.error, newton(), curvature="gauss_newton"), "needs the model and its loss apart"),
        (lambda: step((net.model, net.loss, net.loss), newton()), "got 3 functions"),
        (lambda: step(net.error, newton(), curvature="fisher"), "curvature.*fisher"),
        (lambda: step(net.error, newton(), blocks="layer"), "blocks.*layer"),
    ):
        with pytest.raises(InputError, match=what):
            attempt()
    optimizer = newton("trust_region", "full")
    train = step(net.error, optimizer, blocks="diagonal")
    with pytest.raises(InputError, match="needs the whole Hessian"):
        train(net.params, optimizer.init(net.params), *net.batch)


def test_failures_are_raised_with_a_clear_message(net):
    optimizer = newton(max_failures=2)
    train, state = step(net.error, optimizer), optimizer.init(net.params)
    xs, ts = net.batch
    spoiled = xs, ts.at[0, 0].set(jnp.nan)
    params, state, metrics = train(net.params, state, *spoiled)
    assert not metrics.accepted
    assert np.isnan(metrics.loss)
    jax.tree.map(np.testing.assert_array_equal, params, net.params)
    with pytest.raises(RuntimeError, match=r"optimizers\.step: 2 updates in a row") as raised:
        jax.block_until_ready(train(params, state, *spoiled))
    assert "INTERNAL" not in str(raised.value)
    # The state before it is good for more.
    params, state, metrics = train(params, state, *net.batch)
    assert metrics.accepted
    assert optimizers.find_state(state).failures == 0


def test_failures_of_any_part_and_of_restored_states_are_raised(net):
    optimizer = optax.partition(
        {"a": newton(max_failures=3), "b": newton(max_failures=2)},
        lambda params: {key: "ab"[n % 2] for n, key in enumerate(params)},
    )
    train, state = step(net.error, optimizer), optimizer.init(net.params)
    xs, ts = net.batch
    spoiled = xs, ts.at[0, 0].set(jnp.nan)
    params, state, _ = train(net.params, state, *spoiled)
    restored = jax.tree.map(np.asarray, state)
    with pytest.raises(RuntimeError, match=r"optimizers\.step: 2 updates in a row"):
        train(params, restored, *spoiled)


@pytest.mark.parametrize("most", [1, 2, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_error_comes_at_the_stated_number_though_nothing_is_read(net, most, wrapped):
    optimizer = gauss_newton(max_failures=most)
    if wrapped:
        optimizer = optax.chain(optax.clip_by_global_norm(1e9), optimizer)
    train, params, state = step((net.model, net.loss), optimizer), net.params, optimizer.init(net.params)
    xs, ts = net.batch
    for _ in range(most - 1):
        params, state, _ = train(params, state, xs, ts * jnp.nan)
    with pytest.raises(RuntimeError, match=rf"optimizers\.step: {most} updates in a row"):
        train(params, state, xs, ts * jnp.nan)


def test_a_step_of_constants_within_a_traced_function(net, helpers):
    optimizer = newton()
    train, state = step(net.error, optimizer), optimizer.init(net.params)
    expected = train(net.params, state, *net.batch)
    found = jax.jit(lambda: train(net.params, state, *net.batch))()
    helpers.close(helpers.flat(found[0]), helpers.flat(expected[0]))


def test_one_curvature_that_is_not_finite_raises_the_damping_once(net):
    for optimizer, curvature in (
        (newton(), jaxhess.hessian(net.error)),
        (gauss_newton(), jaxhess.gauss_newton(net.model, net.loss, blocks="full")),
        (kronecker_newton(), jaxhess.gauss_newton(net.model, net.loss)),
    ):
        state = optimizer.init(net.params)
        before = find_state(state).control.damping
        spoiled = jax.tree.map(lambda x: x * jnp.nan if x.dtype.kind == "f" else x, curvature(net.params, *net.batch))
        value, gradient = net.value_and_gradient
        _, state = optimizer.update(gradient, state, net.params, curvature=spoiled, value=value, value_fn=net.mean)
        assert find_state(state).failures == 1
        np.testing.assert_allclose(find_state(state).control.damping, 2 * before)


def test_a_loss_that_is_not_finite_anywhere_else_is_an_error():
    def error(p, x):
        return jnp.where(jnp.all(p["a"] == 1.0), 1.0, jnp.nan) + 0.5 * jnp.sum((p["a"] - x) ** 2)

    optimizer, params = newton(max_failures=3), {"a": jnp.ones(2)}
    train, state = step(error, optimizer), optimizer.init(params)
    for _ in range(2):
        params, state, metrics = train(params, state, jnp.zeros((4, 2)))
        assert not metrics.accepted
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        train(params, state, jnp.zeros((4, 2)))


@pytest.mark.parametrize("optimizer", [newton, gauss_newton])
def test_a_given_momentum_does_not_stop_what_damping_shortens(net, optimizer):
    made = optimizer(momentum=0.9)
    train, params, state = step((net.model, net.loss), made), net.params, made.init(net.params)
    losses, dampings = [], []
    for _ in range(40):
        params, state, metrics = train(params, state, *net.batch)
        losses.append(float(metrics.loss))
        dampings.append(float(metrics.damping))
    assert losses[-1] < 0.5 * losses[0]
    assert max(damping for damping, value in zip(dampings, losses, strict=True) if value > 1e-12) < 1e3


def test_what_is_asked_for_is_seen_through_any_wrapper(net):
    for solver, name in (("gram", "Gram matrix"), ("normal", "normal equations"), ("cg", "conjugate gradients")):
        for wrap in (
            lambda made: optax.chain(optax.clip(1.0), made),
            lambda made: optax.masked(made, {"hidden": {"w": True, "b": False}, "out": True}),
            lambda made: optax.MultiSteps(made, 1),
            lambda made: optax.MultiSteps(made, 1).gradient_transformation(),
            lambda made: optax.apply_if_finite(made, 3),
        ):
            optimizer = wrap(gauss_newton(solver=solver))
            train = step((net.model, net.loss), optimizer)
            _, _, metrics = train(net.params, optimizer.init(net.params), *net.batch)
            assert name in metrics.solver_name
            assert metrics.accepted


def test_multi_steps_of_a_step(net, helpers):
    """The mean gradient of two batches, and the curvature of the second."""
    optimizer = optax.MultiSteps(newton(damping=DAMPING), 2)
    train, params, state = step(net.error, optimizer), net.params, optimizer.init(net.params)
    params, state, metrics = train(params, state, *net.batch)
    assert not metrics.accepted
    helpers.same(params, net.params)
    params, state, metrics = train(params, state, *net.batch)
    assert metrics.accepted
    D = net.blocked(net.dense_hessian())
    helpers.close(helpers.flat(params), moved(net, net.absolute(D)), 1e-6)


def test_bad_data_and_options_are_refused_with_words(net):
    xs, ts = net.batch
    pair = (net.model, net.loss)

    def called(optimizer, given, *batch):
        return step(given, optimizer)(net.params, optimizer.init(net.params), *batch)

    for optimizer in (kronecker_newton(), gauss_newton(solver="cg"), gauss_newton(), newton()):
        with pytest.raises(InputError, match="The batch is empty"):
            called(optimizer, pair, xs[:0], ts[:0])
        with pytest.raises(InputError, match="differ in their number of examples"):
            called(optimizer, pair, xs, ts[:2])
        with pytest.raises(InputError, match=r"'n'.*int32.*parameters must be real"):
            optimizer.init({"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)})
        with pytest.raises(InputError, match="partition"):
            optimizer.init(eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0)))
        state, (value, gradient) = optimizer.init(net.params), net.value_and_gradient
        H = jaxhess.gauss_newton(*pair, blocks="diagonal" if "Kron" in repr(optimizer) else "full")
        for options, what in (
            ({"value": jnp.ones(3)}, r"value must be the mean loss, a scalar, got shape \(3,\)"),
            ({"value": value, "value_fn": 3.0}, "value_fn must be a function of the parameters, got float"),
        ):
            with pytest.raises(InputError, match=what):
                optimizer.update(gradient, state, net.params, curvature=H(net.params, xs, ts), **options)
        wrong = net.params | {"out": jnp.ones(3)}
        with pytest.raises(InputError, match=r"params= against the gradients: 'out' needs shape \(2, 3\)"):
            optimizer.update(gradient, state, wrong, curvature=H(net.params, xs, ts), value=value)
    with pytest.raises(InputError, match="value_fn must return the mean loss, a scalar, but returned a tuple"):
        newton().update(
            gradient, newton().init(net.params), net.params, curvature=jaxhess.hessian(net.error)(net.params, xs, ts),
            value=value, value_fn=lambda p: (value, value),
        )  # fmt: skip

    def elementwise(y, t):
        return y - t

    with pytest.raises(InputError, match="elementwise of model"):
        called(newton(), (net.model, elementwise), xs, ts)
    for wrong in (None, newton):
        with pytest.raises(InputError, match="optimizer must be one of optax's kind"):
            step(net.error, wrong)
    with pytest.raises(InputError, match="curvature='bad'"):
        step(net.error, optax.adam(1e-3), curvature="bad")
    with pytest.raises(InputError, match="blocks='bad'"):
        step(net.error, optax.adam(1e-3), blocks="bad")


def test_failures_within_a_loop_are_raised_by_it(net):
    optimizer = newton(max_failures=3)
    train, state = step(net.error, optimizer), optimizer.init(net.params)
    xs, ts = net.batch
    spoiled = xs, ts.at[0, 0].set(jnp.nan)

    @functools.partial(jax.jit, static_argnums=2)
    def several(params, state, count):
        return jax.lax.fori_loop(0, count, lambda _, at: train(*at, *spoiled)[:2], (params, state))

    _, after = several(net.params, state, 2)
    assert find_state(after).failures == 2
    assert find_state(after).info.failures_left == 1
    with pytest.raises((RuntimeError, ValueError), match="newton: 3 updates in a row"):
        jax.block_until_ready(several(net.params, state, 3))


def test_failures_that_are_not_raised_are_reported(net):
    optimizer = newton(max_failures=2)
    state = optimizer.init(net.params)

    @jax.jit
    def update(state):
        value, grads, H = jaxhess.value_grad_and_hessian(net.error)(net.params, *net.batch)
        spoiled = jax.tree.map(lambda g: g * jnp.nan, grads)
        return optimizer.update(spoiled, state, net.params, curvature=H, value=value, value_fn=None, raise_failures=False)

    assert "callback" not in update.lower(state).as_text()
    for number in range(1, 4):
        _, state = update(state)
        assert find_state(state).failures == number
        assert find_state(state).info.failures_left == 2 - number


def test_metrics_of_updates_that_are_left_out(net):
    """`optax.apply_if_finite` does not call the optimizer where gradients are not finite."""
    xs, ts = net.batch
    spoiled = xs, ts.at[0, 0].set(jnp.nan)
    optimizer = optax.apply_if_finite(kronecker_newton(), 3)
    train, params, state = step((net.model, net.loss), optimizer), net.params, optimizer.init(net.params)
    for batch, ran in ((net.batch, True), (spoiled, False), (net.batch, True)):
        before = params
        params, state, metrics = train(params, state, *batch)
        assert metrics.accepted == ran
        assert np.isnan(metrics.gain_ratio) == (not ran)
        assert (metrics.attempts > 0) == ran
        assert metrics.solver_name == ("Kronecker factors" if ran else "none")
        assert np.isfinite(metrics.damping)
        assert jax.tree.all(jax.tree.map(np.array_equal, before, params)) == (not ran)


def test_find_state(net):
    assert find_state(optax.adam(0.1).init(net.params)) is None
    nested = optax.chain(optax.clip(1.0), optax.masked(optax.chain(newton()), MASK))
    found = find_state(nested.init(net.params))
    assert found is not None
    assert found.count == 0
    assert found.info.solver_name == "none"
