"""Gauss-Newton steps, by every solver, against `J^T B J` of automatic differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhess
from jaxhess import optimizers
from jaxhess._typing import InputError
from jaxhess.operators import Dense
from jaxhess.optimizers import choose_solver, scale_by_gauss_newton
from jaxhess.optimizers import gauss_newton as alias
from jaxhess.optimizers.products import value_grad_and_linearised

DAMPING = 0.2
NAMES = {
    "gram": "Cholesky of the Gram matrix",
    "normal": "Cholesky of the normal equations",
    "cg": "conjugate gradients",
}


@functools.cache
def whole(net):
    return jax.jit(jaxhess.gauss_newton(net.model, net.loss, blocks="full"))(net.params, *net.batch)


def run(optimizer, net, G, previous=None, **given):
    grads, state = net.value_and_gradient[1], optimizer.init(net.params)
    if previous is not None:
        state = state._replace(previous=net.tree(previous))
    return jax.jit(lambda g, s, G: optimizer.update(g, s, net.params, curvature=G, **given))(grads, state, G)


CASES = [("net", "auto"), ("long_net", "auto"), ("long_net", "gram"), ("net", "normal"), ("net", "cg")]


@pytest.mark.parametrize(("which", "solver"), CASES)
def test_the_step_is_that_of_the_dense_matrix(request, helpers, which, solver):
    net = request.getfixturevalue(which)
    D, g, G = net.dense_gauss_newton(), net.gradient, whole(net)
    helpers.close(G.as_matrix(), D)
    expected = "gram" if which == "net" else "normal"
    assert choose_solver(G).solver == expected
    s = -np.linalg.solve(D + DAMPING * np.eye(len(g)), g)
    optimizer = scale_by_gauss_newton(solver=solver, damping=DAMPING, tolerance=1e-12)
    updates, state = run(optimizer, net, G, value=net.value_and_gradient[0], value_fn=net.mean)
    helpers.close(-helpers.flat(updates), s)
    info = state.info
    helpers.close(info.predicted, -(g @ s + s @ D @ s / 2))
    helpers.close(info.new_loss, net.mean(net.tree(net.flat + s)))
    assert info.solver_name == NAMES[expected if solver == "auto" else solver]
    assert (info.iterations > 0) == (solver == "cg")
    assert 0 <= info.residual < 1e-11


def test_small_dampings(net, helpers):
    # Of the Gram form the result is the difference of two vectors, over λ.
    D, g, G = net.dense_gauss_newton(), net.gradient, whole(net)
    damping = 1e-8
    s = -np.linalg.solve(D + damping * np.eye(len(g)), g)
    for solver in ("gram", "normal"):
        updates, state = run(scale_by_gauss_newton(solver=solver, damping=damping), net, G)
        helpers.close(-helpers.flat(updates), s, 1e-5)
        assert state.info.residual < 1e-9


def test_blocks(net, helpers):
    D, g = net.blocked(net.dense_gauss_newton()), net.gradient
    G = jaxhess.gauss_newton(net.model, net.loss, blocks="diagonal")(net.params, *net.batch)
    s = -np.linalg.solve(D + DAMPING * np.eye(len(g)), g)
    for solver, name in (("auto", "Cholesky of each block"), ("cg", NAMES["cg"])):
        updates, state = run(scale_by_gauss_newton("diagonal", solver=solver, damping=DAMPING, tolerance=1e-12), net, G)
        helpers.close(-helpers.flat(updates), s)
        assert state.info.solver_name == name
        helpers.close(state.info.predicted, -(g @ s + s @ D @ s / 2))


def test_fisher(net, helpers):
    xs, ts = net.batch
    per_example = jax.vmap(jax.grad(net.error), (None, 0, 0))(net.params, xs, ts)
    rows = np.stack([helpers.flat(jax.tree.map(lambda leaf, i=i: leaf[i], per_example)) for i in range(len(xs))])
    F = jaxhess.fisher(net.error, blocks="full")(net.params, xs, ts)
    updates, _ = run(scale_by_gauss_newton(damping=DAMPING), net, F)
    s = -np.linalg.solve(rows.T @ rows / len(xs) + DAMPING * np.eye(15), net.gradient)
    helpers.close(-helpers.flat(updates), s)


@pytest.mark.parametrize("solver", ["gram", "cg"])
def test_weight_decay_is_the_penalty(net, helpers, solver):
    D, w = net.dense_gauss_newton(), net.decay
    g = net.gradient + w * net.flat
    s = -np.linalg.solve(D + (w + 0.05) * np.eye(15), g)
    optimizer = scale_by_gauss_newton(solver=solver, damping=0.05, weight_decay=w, tolerance=1e-12)
    updates, state = run(optimizer, net, whole(net), value=net.value_and_gradient[0], value_fn=net.mean)
    helpers.close(-helpers.flat(updates), s)
    helpers.close(state.info.predicted, -(g @ s + s @ D @ s / 2 + w * s @ s / 2))
    penalised = functools.partial(net.mean, error=net.penalised)
    helpers.close(state.info.loss, penalised(net.params))
    helpers.close(state.info.new_loss, penalised(net.tree(net.flat + s)))


def test_learning_rate_and_momentum_are_the_minimum_in_the_plane(net, helpers):
    """A step that conjugate gradients leave unfinished, so that its length is not 1."""
    decay = net.decay
    D, g = net.dense_gauss_newton() + decay * np.eye(15), net.gradient + decay * net.flat
    last = np.random.default_rng(2).normal(size=15)
    options = {"solver": "cg", "damping": DAMPING, "weight_decay": decay, "tolerance": 1e-9, "max_iterations": 2}
    alone, state = run(scale_by_gauss_newton(**options), net, whole(net), previous=last)
    d = -helpers.flat(alone)
    assert state.info.iterations <= 2
    assert state.info.residual > 1e-3
    updates, state = run(
        scale_by_gauss_newton(learning_rate="exact", momentum="exact", **options), net, whole(net), previous=last
    )
    A, plane = D + DAMPING * np.eye(15), np.stack([d, last], axis=1)
    best = -np.linalg.solve(plane.T @ A @ plane, plane.T @ g)
    np.testing.assert_allclose([state.info.learning_rate, state.info.momentum], best, rtol=1e-7)
    s = plane @ best
    helpers.close(-helpers.flat(updates), s, 1e-8)
    helpers.close(state.info.predicted, -(g @ s + s @ D @ s / 2), 1e-8)

    def model(a, b):
        step = plane @ [a, b]
        return g @ step + step @ A @ step / 2

    grid = [model(a, b) for a in best[0] + np.linspace(-0.1, 0.1, 9) for b in best[1] + np.linspace(-0.1, 0.1, 9)]
    assert model(*best) <= min(grid) + 1e-12


def test_warm_start(net, helpers):
    D, g = net.dense_gauss_newton(), net.gradient
    s = -np.linalg.solve(D + DAMPING * np.eye(15), g)
    optimizer = scale_by_gauss_newton(solver="cg", damping=DAMPING, tolerance=1e-6)
    _, cold = run(optimizer, net, whole(net))
    _, warm = run(optimizer, net, whole(net), previous=s * (1 + 1e-8))
    assert warm.info.iterations < cold.info.iterations
    helpers.close(helpers.flat(warm.previous), s, 1e-6)


@functools.cache
def linearised(net):
    return jax.jit(functools.partial(value_grad_and_linearised, net.model, net.loss))(net.params, *net.batch)


def test_linearised_products(net, helpers):
    made = type(net)(3)  # whose 1/r is no power of two
    (value, gradient, L), D = linearised(made), made.dense_gauss_newton()
    helpers.close(value, made.value_and_gradient[0], 1e-12)
    helpers.close(helpers.flat(gradient), made.gradient, 1e-12)
    vectors = np.random.default_rng(1).normal(size=(3, 15))
    for v in vectors:
        helpers.close(helpers.flat(L.mv(made.tree(v))), D @ v, 1e-12)
    helpers.close(L.forms(jax.vmap(made.tree)(vectors)), vectors @ D @ vectors.T, 1e-12)
    assert jax.tree.structure(L.in_structure()) == jax.tree.structure(made.params)
    s = -np.linalg.solve(D + DAMPING * np.eye(15), made.gradient)
    updates, state = run(scale_by_gauss_newton(damping=DAMPING, tolerance=1e-12), made, L)
    helpers.close(-helpers.flat(updates), s)
    assert state.info.solver_name == NAMES["cg"]


def test_products_of_a_model_with_a_reverse_pass_of_its_own(net, helpers):
    """`custom_vjp` functions have no tangents: theirs are the transpose of the reverse pass."""

    @jax.custom_vjp
    def own_tanh(x):
        return jnp.tanh(x)

    own_tanh.defvjp(lambda x: (jnp.tanh(x), jnp.tanh(x)), lambda y, g: (g * (1 - y * y),))

    def model(p, x):
        return p["out"] @ own_tanh(p["hidden"]["w"] @ x + p["hidden"]["b"])

    value, gradient, L = jax.jit(functools.partial(value_grad_and_linearised, model, net.loss))(net.params, *net.batch)
    helpers.close(value, net.value_and_gradient[0], 1e-12)
    helpers.close(helpers.flat(gradient), net.gradient, 1e-12)
    vectors, D = np.random.default_rng(1).normal(size=(2, 15)), net.dense_gauss_newton()
    helpers.close(helpers.flat(L.mv(net.tree(vectors[0]))), D @ vectors[0], 1e-12)
    helpers.close(L.forms(jax.vmap(net.tree)(vectors)), vectors @ D @ vectors.T, 1e-12)
    optimizer = optimizers.kronecker_newton()
    train, state, params, losses = optimizers.step((model, net.loss), optimizer), optimizer.init(net.params), net.params, []
    for _ in range(5):
        params, state, metrics = train(params, state, *net.batch)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_which_solver(net, long_net, monkeypatch):
    G, long = whole(net), whole(long_net)
    assert choose_solver(G) == ("gram", "8 outputs of all examples, 15 parameters")
    assert choose_solver(long) == ("normal", "20 outputs of all examples, 15 parameters")
    limits = choose_solver.__globals__
    for name, value, reason in (
        ("_LARGEST", 7, "more than 7 on both sides"),
        ("available_bytes", lambda: 100, "does not fit in memory"),
        ("_PRODUCTS", 0.01, "takes the work of"),
    ):
        with monkeypatch.context() as changed:
            changed.setitem(limits, name, value)
            choice = choose_solver(G)
            assert choice.solver == "cg"
            assert reason in choice.reason
    assert choose_solver(G).solver == "gram"


def test_a_training_step_goes_by_the_same_rule(net, helpers, monkeypatch):
    monkeypatch.setitem(choose_solver.__globals__, "_LARGEST", 7)
    optimizer = alias(damping=DAMPING, tolerance=1e-12)
    train = optimizers.step((net.model, net.loss), optimizer)
    params, state, metrics = train(net.params, optimizer.init(net.params), *net.batch)
    assert metrics.solver_name == NAMES["cg"]
    s = -np.linalg.solve(net.dense_gauss_newton() + DAMPING * np.eye(15), net.gradient)
    helpers.close(helpers.flat(params), net.flat + s)
    helpers.close(helpers.flat(helpers.find(state).previous), s)


@pytest.mark.parametrize("shape", [(2, 2, 3), (6, 2)])
def test_layers_along_other_axes_by_cg(net, helpers, monkeypatch, shape):
    """The heads of attention, or a weight that is reshaped: the preconditioner is along the layer's axes."""
    monkeypatch.setitem(choose_solver.__globals__, "_LARGEST", 2)
    rng = np.random.default_rng(7)
    params = {"w": jnp.asarray(rng.normal(size=shape)), "out": jnp.asarray(rng.normal(size=(2, 6)))}

    def model(p, x):
        if len(shape) == 3:
            return p["out"] @ jnp.tanh(jnp.einsum("hdk,d->hk", p["w"], x)).reshape(-1)
        return p["out"] @ jnp.tanh(jnp.tile(p["w"].reshape(3, 4) @ jnp.tile(x, 2), 2))

    optimizer = alias(damping=DAMPING, tolerance=1e-11)
    train = optimizers.step((model, net.loss), optimizer)
    after, _, metrics = train(params, optimizer.init(params), *net.batch)
    assert metrics.solver_name == NAMES["cg"]
    G = jaxhess.gauss_newton(model, net.loss, blocks="full")(params, *net.batch).as_matrix()
    g = helpers.flat(jax.grad(lambda p: jnp.mean(jax.vmap(lambda x, t: net.loss(model(p, x), t))(*net.batch)))(params))
    helpers.close(helpers.flat(after), helpers.flat(params) - np.linalg.solve(G + DAMPING * np.eye(len(g)), g), 1e-8)


def test_a_partition_by_cg(net, helpers, monkeypatch):
    monkeypatch.setitem(choose_solver.__globals__, "_LARGEST", 2)
    parts = {"second": alias(damping=DAMPING, tolerance=1e-11), "frozen": optax.set_to_zero()}
    optimizer = optax.partition(parts, {"hidden": "second", "out": "frozen"})
    train = optimizers.step((net.model, net.loss), optimizer)
    params, _, metrics = train(net.params, optimizer.init(net.params), *net.batch)
    assert metrics.solver_name == NAMES["cg"]
    s = np.zeros(15)
    s[:9] = -np.linalg.solve(net.dense_gauss_newton()[:9, :9] + DAMPING * np.eye(9), net.gradient[:9])
    helpers.close(helpers.flat(params), net.flat + s, 1e-8)


def test_refusals(net):
    optimizer = alias(solver="gram", damping=1.0)
    state = optimizer.init(net.params)
    blocks = jaxhess.gauss_newton(net.model, net.loss, blocks="diagonal")(net.params, *net.batch)
    with pytest.raises(InputError, match="solver='gram' is for the whole matrix"):
        optimizer.update(net.params, state, net.params, curvature=blocks)
    undamped = alias(damping=0.0)
    with pytest.raises(InputError, match="singular; damping=0 does not"):
        undamped.update(net.params, undamped.init(net.params), net.params, curvature=whole(net))
    single = alias(damping=1.0)
    with pytest.raises(InputError, match="hidden"):
        single.update(net.params, single.init(net.params), net.params, curvature=Dense(jnp.eye(15)))
    whole_hessian = jaxhess.hessian(net.error, blocks="full")(net.params, *net.batch)
    with pytest.raises(InputError, match="must be positive semidefinite"):
        single.update(net.params, single.init(net.params), net.params, curvature=whole_hessian)
