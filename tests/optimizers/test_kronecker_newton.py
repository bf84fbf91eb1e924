"""Steps by Kronecker factors against the dense Kronecker product of the factors, and the factors themselves."""

import functools
import itertools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import jaxhess
from jaxhess._typing import InputError
from jaxhess.operators import BlockDiagonal, Dense, KroneckerProduct
from jaxhess.optimizers import kronecker_newton, sampling, scale_by_kronecker_newton, step
from jaxhess.optimizers.kronecker_factors import factors_of, preconditioners_of

DAMPING = 0.5


def rows_first(array):
    """Parameter entries as vec of (m, n): the last of more than two axes is the rows."""
    return np.moveaxis(array, -1, 0).ravel() if array.ndim > 2 else array.ravel()


def back(flat, shape):
    return np.moveaxis(flat.reshape(shape[-1], *shape[:-1]), 0, -1) if len(shape) > 2 else flat.reshape(shape)


def dense_step(gradient, factors, damping):
    """`-(|A ⊗ B| + λ)^-1 g` for one parameter."""
    gradient = np.asarray(gradient)
    values, vectors = np.linalg.eigh(np.kron(factors.left, factors.right))
    g = vectors.T @ rows_first(gradient)
    return back(vectors @ (-g / (np.abs(values) + damping)), gradient.shape)


def dense_product(vector, factors):
    vector = np.asarray(vector)
    values, vectors = np.linalg.eigh(np.kron(factors.left, factors.right))
    return back(vectors @ (np.abs(values) * (vectors.T @ rows_first(vector))), vector.shape)


def total(a, b):
    return sum(float(np.vdot(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@functools.cache
def curvature(net):
    return jax.jit(jaxhess.gauss_newton(net.model, net.loss, blocks="diagonal"))(net.params, *net.batch)


def test_the_step_is_that_of_the_dense_product(helpers):
    """Of a scalar, a vector, a matrix and an array of three axes, indefinite."""
    rng = np.random.default_rng(4)
    shapes = {"a": (), "b": (3,), "c": (2, 3), "d": (2, 2, 3)}
    symmetric = {name: rng.normal(size=(int(np.prod(s)),) * 2) for name, s in shapes.items()}
    H = BlockDiagonal({name: Dense(jnp.asarray(X + X.T), shapes[name]) for name, X in symmetric.items()})
    grads = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    optimizer = scale_by_kronecker_newton(damping=DAMPING, learning_rate=1.0, momentum=0.0)
    updates, state = jax.jit(lambda g, s, H: optimizer.update(g, s, curvature=H))(grads, optimizer.init(grads), H)
    assert state.info.solver_name == "Kronecker factors"
    factors = dict(zip(shapes, state.memory.factors, strict=True))
    assert [f.left.shape[0] for f in factors.values()] == [1, 3, 2, 3]
    assert [f.right.shape[0] for f in factors.values()] == [1, 1, 3, 4]
    # The damping of the inverse is that of three whose step the model likes best.
    steps = {s: jax.tree.map(lambda g, f, s=s: dense_step(g, f, s), grads, factors) for s in (0.25, 0.5, 1.0)}

    def gain(d):
        curved = total(d, jax.tree.map(dense_product, d, factors)) + DAMPING * total(d, d)
        return -(total(grads, d) + curved / 2)

    best = max(steps, key=lambda s: gain(steps[s]))
    np.testing.assert_allclose(state.control.strength, best)
    for name, leaf in steps[best].items():
        helpers.close(-updates[name], leaf)
    predicted = -total(grads, steps[best]) - total(steps[best], jax.tree.map(dense_product, steps[best], factors)) / 2
    helpers.close(state.info.predicted, predicted)
    # A scalar's and a vector's block is exact.
    for name in "ab":
        X = symmetric[name]
        helpers.close(np.kron(factors[name].left, factors[name].right), X + X.T)


def test_learning_rate_and_momentum_are_the_minimum_in_the_plane(net, helpers):
    decay, last = 0.2, np.random.default_rng(2).normal(size=15)
    g, C = net.gradient + decay * net.flat, net.dense_gauss_newton() + decay * np.eye(15)
    G = jaxhess.gauss_newton(net.model, net.loss, blocks="full")(net.params, *net.batch)
    optimizer, grads = scale_by_kronecker_newton(damping=DAMPING, weight_decay=decay), net.value_and_gradient[1]

    @jax.jit
    def update(state, blocks, G):
        return optimizer.update(grads, state, net.params, curvature=lambda: blocks, product=G.mv, value=1.0)

    state = optimizer.init(net.params)._replace(previous=net.tree(last))
    updates, state = update(state, curvature(net), G)
    strength = float(state.control.strength) + decay
    leaves = zip(jax.tree.leaves(net.tree(g)), state.memory.factors, strict=True)
    d = np.concatenate([np.ravel(dense_step(leaf, factors, strength)) for leaf, factors in leaves])
    plane, A = np.stack([d, last], axis=1), C + DAMPING * np.eye(15)
    best = -np.linalg.solve(plane.T @ A @ plane, plane.T @ g)
    np.testing.assert_allclose([state.info.learning_rate, state.info.momentum], best, rtol=1e-8)
    s = plane @ best
    helpers.close(-helpers.flat(updates), s, 1e-8)
    helpers.close(state.info.predicted, -(g @ s + s @ C @ s / 2), 1e-8)
    assert abs(best[0] - 1) > 1e-3


def relative(A, B, dense):
    return np.linalg.norm(np.kron(A, B) - dense) / np.linalg.norm(dense)


def test_factors_are_nearly_the_nearest(long_net):
    for _, block in curvature(long_net).items():
        if len(block.in_structure().shape) == 1:
            continue
        A, B = factors_of(block)
        nearest = jaxhess.operators.nearest_kronecker(block)
        assert relative(A, B, block.as_matrix()) <= 1.01 * float(nearest.relative_error) + 1e-9
        for factor in (A, B):
            assert np.linalg.eigvalsh(factor)[0] > -1e-12


def test_the_mean_over_the_run(helpers):
    rng = np.random.default_rng(6)
    optimizer = scale_by_kronecker_newton(every=2, decay=0.6, damping=1.0, learning_rate=1.0, momentum=0.0)
    grads = {"w": jnp.ones((2, 3))}
    update = jax.jit(lambda s, H: optimizer.update(grads, s, curvature=lambda: H))
    state, means = optimizer.init(grads), None
    for k in range(6):
        A, B = (X @ X.T for X in (rng.normal(size=(2, 2)), rng.normal(size=(3, 3))))
        before = state.memory
        _, state = update(
            state, BlockDiagonal({"w": KroneckerProduct(jnp.asarray(A), jnp.asarray(B), tags=lx.symmetric_tag)})
        )
        if k % 2:
            helpers.same(state.memory, before)
            continue
        share = np.sqrt(np.linalg.norm(B) / np.linalg.norm(A))
        weight = min(1 - 1 / (k / 2 + 1), 0.6)
        new = share * A, B / share
        means = new if means is None else [weight * m + (1 - weight) * n for m, n in zip(means, new, strict=True)]
        (found,) = state.memory.factors
        helpers.close(found.left, means[0])
        helpers.close(found.right, means[1])
        for side, mean in zip(("left", "right"), means, strict=True):
            values, vectors = (np.asarray(getattr(found, f"{side}_{what}")) for what in ("values", "vectors"))
            helpers.close((vectors * values) @ vectors.T, mean)
    assert state.memory.refreshed == 3


def test_the_preconditioner_is_the_dense_inverse(net, helpers):
    v = np.random.default_rng(1).normal(size=15)
    made = preconditioners_of(curvature(net))
    for leaf, inverse, (_, block) in zip(jax.tree.leaves(net.tree(v)), made, curvature(net).items(), strict=True):
        K = np.kron(*factors_of(block))
        for damping in (DAMPING, 1e-3):
            found = inverse.with_damping(jnp.asarray(damping)).mv(leaf)
            helpers.close(np.ravel(found), np.linalg.solve(K + damping * np.eye(len(K)), np.ravel(leaf)))


def softmax_loss(z, label):
    return -jax.nn.log_softmax(z)[label]


@pytest.mark.parametrize("kind", ["squared_error", "softmax"])
def test_the_mean_over_all_signs_is_gauss_newton(net, helpers, monkeypatch, kind):
    """Two examples of two outputs have 16 patterns of signs."""
    xs, ts = net.batch
    loss, targets = (net.loss, ts[:2]) if kind == "squared_error" else (softmax_loss, jnp.array([0, 1]))
    exact = jaxhess.gauss_newton(net.model, loss, blocks="diagonal")(net.params, xs[:2], targets).as_matrix()
    patterns = jnp.array(list(itertools.product((-1.0, 1.0), repeat=4))).reshape(16, 2, 2)
    signs = []
    monkeypatch.setattr(jax.random, "rademacher", lambda key, shape, dtype: signs[0].astype(dtype).reshape(shape))

    @jax.jit
    def dense(pattern):
        signs[:] = [pattern]
        made = sampling.sampled_curvature(net.model, loss, net.params, xs[:2], targets, key=jax.random.key(0))
        return made.as_matrix()

    helpers.close(sum(dense(pattern) for pattern in patterns) / 16, exact)


LAYERS = {
    "heads": (lambda p, x: jnp.tanh(jnp.einsum("hdk,d->hk", p["w"], x)).reshape(-1), (2, 2, 3)),
    "heads_inside": (lambda p, x: jnp.tanh(jnp.einsum("dhk,d->hk", p["w"], x)).reshape(-1), (2, 3, 2)),
    "reshaped": (lambda p, x: jnp.tanh(jnp.tile(p["w"].reshape(3, 4) @ jnp.tile(x, 2), 2)), (6, 2)),
    "stacked": (lambda p, x: jnp.tanh(p["w"][1] @ jnp.tanh(p["w"][0] @ jnp.tile(x, 3))), (2, 6, 6)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_along_other_axes(net, layer):
    apply, shape = LAYERS[layer]
    rng = np.random.default_rng(7)
    params = {"w": jnp.asarray(rng.normal(size=shape)) / 2, "out": jnp.asarray(rng.normal(size=(2, 6))) / 2}

    def model(p, x):
        return p["out"] @ apply(p, x)

    optimizer = kronecker_newton(every=2)
    train, state, losses = step((model, net.loss), optimizer), optimizer.init(params), []
    for _ in range(8):
        params, state, metrics = train(params, state, *net.batch)
        losses.append(float(metrics.loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]


def test_refusals(net):
    for options, what in (
        ({"every": 0}, "every must be a whole number"),
        ({"every": 2.5}, "every must be a whole number"),
        ({"decay": 1.0}, "decay must be in"),
        ({"decay": -0.1}, "decay must be in"),
        ({"learning_rate": 1.0}, "momentum='exact' needs learning_rate='exact'"),
    ):
        with pytest.raises(InputError, match=what):
            kronecker_newton(**options)
    with pytest.raises(InputError, match=r"'big/w' of shape \(9000,\).*optax\.partition"):
        kronecker_newton().init({"big": {"w": jnp.ones(9000)}})
    optimizer = kronecker_newton()
    whole = jaxhess.gauss_newton(net.model, net.loss, blocks="full")(net.params, *net.batch)
    for curved, what in ((whole, "must have a block for each parameter"), (lambda: whole, "must have a block")):
        with pytest.raises(InputError, match=what):
            optimizer.update(net.params, optimizer.init(net.params), net.params, curvature=curved, value=1.0)
    wrong = BlockDiagonal({"hidden": curvature(net).blocks["hidden"], "out": Dense(jnp.eye(6), (3, 2))})
    with pytest.raises(InputError, match="out"):
        optimizer.update(net.params, optimizer.init(net.params), net.params, curvature=lambda: wrong, value=1.0)
