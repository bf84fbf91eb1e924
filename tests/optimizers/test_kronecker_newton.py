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
from jaxhess.optimizers.gauss_newton import _inverse as gauss_newton_inverse
from jaxhess.optimizers.kronecker_factors import factors_of
from jaxhess.optimizers.kronecker_inverse import Unit, averaged, no_factors, units_of
from jaxhess.optimizers.state import find_state

DAMPING = 0.5


def matrix_of(weight, bias, side):
    """The matrix of a unit: of more than two axes the last is the rows; a border of zeros or the bias, but for vectors."""
    weight = np.asarray(weight)
    if weight.ndim < 2:
        return weight.reshape(-1, 1)
    flat = np.moveaxis(weight, -1, 0).reshape(weight.shape[-1], -1) if weight.ndim > 2 else weight
    M = np.pad(flat, ((0, 1), (0, 1)))
    if bias is not None:
        where = (slice(-1), -1) if side else (-1, slice(-1))
        M[where] = np.ravel(bias)
    return M


def dense(factors):
    """The values and the vectors of a unit's approximation, in the order of its matrix's entries."""
    return np.ravel(factors.values), np.kron(factors.left_vectors, factors.right_vectors)


def applied(tree, units, factors, function):
    """A tree with `function` of |values| applied to each unit by dense matrices."""
    leaves, treedef = jax.tree.flatten(tree)
    results = list(leaves)
    for unit in units:
        weight, bias = leaves[unit.weight], None if unit.bias is None else leaves[unit.bias]
        M = matrix_of(weight, bias, unit.side)
        values, vectors = dense(factors[unit.weight])
        X = (vectors @ (function(np.abs(values)) * (vectors.T @ M.ravel()))).reshape(M.shape)
        inner = X if np.ndim(weight) < 2 else X[:-1, :-1]
        shape = np.shape(weight)
        back = np.moveaxis(inner.reshape(shape[-1], *shape[:-1]), 0, -1) if len(shape) > 2 else inner.reshape(shape)
        results[unit.weight] = back
        if unit.bias is not None:
            results[unit.bias] = (X[:-1, -1] if unit.side else X[-1, :-1]).reshape(np.shape(bias))
    return jax.tree.unflatten(treedef, results)


def alone(count):
    return [Unit(n, None, 1) for n in range(count)]


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
    factors, units = state.memory.factors, alone(4)
    assert [f.left.shape[0] for f in factors] == [1, 3, 3, 4]
    assert [f.right.shape[0] for f in factors] == [1, 1, 4, 5]

    def step(strength):
        return applied(grads, units, factors, lambda values: -1 / (values + strength))

    def curved(d):
        return applied(d, units, factors, lambda values: values)

    # The damping of the inverse is that of three whose step the model likes best.
    steps = {strength: step(strength) for strength in (0.25, 0.5, 1.0)}

    def gain(d):
        return -(total(grads, d) + (total(d, curved(d)) + DAMPING * total(d, d)) / 2)

    best = max(steps, key=lambda strength: gain(steps[strength]))
    np.testing.assert_allclose(state.control.strength, best)
    for name, leaf in steps[best].items():
        helpers.close(-updates[name], leaf)
    helpers.close(state.info.predicted, -total(grads, steps[best]) - total(steps[best], curved(steps[best])) / 2)
    # A scalar's and a vector's block is exact.
    for n, name in enumerate("ab"):
        X = symmetric[name]
        helpers.close(np.kron(factors[n].left, factors[n].right), X + X.T)


def exact_update(net, previous=None, product=None, **options):
    """One update with exact Gauss-Newton products: the state after it, and the step."""
    G = jaxhess.gauss_newton(net.model, net.loss, blocks="full")(net.params, *net.batch)
    optimizer, grads = scale_by_kronecker_newton(damping=DAMPING, **options), net.value_and_gradient[1]

    @jax.jit
    def update(state, blocks, G):
        by = G if product is None else product(G)
        return optimizer.update(grads, state, net.params, curvature=lambda: blocks, product=by, value=1.0)

    state = optimizer.init(net.params)
    if previous is not None:
        state = state._replace(previous=net.tree(previous))
    updates, state = update(state, curvature(net), G)
    return state, updates


def test_learning_rate_and_momentum_are_the_minimum_in_the_plane(net, helpers):
    decay, last = 0.2, np.random.default_rng(2).normal(size=15)
    g, C = net.gradient + decay * net.flat, net.dense_gauss_newton() + decay * np.eye(15)
    state, updates = exact_update(net, last, max_iterations=1, weight_decay=decay)
    strength = float(state.control.strength) + decay
    units = units_of(curvature(net))
    d = helpers.flat(applied(net.tree(g), units, state.memory.factors, lambda values: -1 / (values + strength)))
    plane, A = np.stack([d, last], axis=1), C + DAMPING * np.eye(15)
    best = -np.linalg.solve(plane.T @ A @ plane, plane.T @ g)
    np.testing.assert_allclose([state.info.learning_rate, state.info.momentum], best, rtol=1e-8)
    s = plane @ best
    helpers.close(-helpers.flat(updates), s, 1e-8)
    helpers.close(state.info.predicted, -(g @ s + s @ C @ s / 2), 1e-8)
    assert abs(best[0] - 1) > 1e-3
    assert state.info.iterations == 0


@pytest.mark.parametrize("product", [None, lambda G: G.mv])
def test_conjugate_gradients_with_the_exact_curvature(net, helpers, product):
    decay, last = 0.2, np.random.default_rng(3).normal(size=15)
    g, C = net.gradient + decay * net.flat, net.dense_gauss_newton() + decay * np.eye(15)
    options = {"weight_decay": decay, "product": product}
    exact = -np.linalg.solve(C + DAMPING * np.eye(15), g)
    state, updates = exact_update(net, last, max_iterations=40, progress=0.0, **options)
    helpers.close(-helpers.flat(updates), exact, 1e-6)
    helpers.close(state.info.predicted, -(g @ exact + exact @ C @ exact / 2), 1e-9)

    def model(updates):
        s = -helpers.flat(updates)
        return g @ s + s @ C @ s / 2 + DAMPING * s @ s / 2

    # A few of them are already better than the plane of learning rate and momentum.
    few, by_few = exact_update(net, last, max_iterations=4, progress=0.0, **options)
    _, by_plane = exact_update(net, last, max_iterations=1, **options)
    assert few.info.iterations == 4
    assert model(by_few) < model(by_plane)
    assert np.isfinite(float(few.info.residual))
    early, _ = exact_update(net, last, max_iterations=40, progress=0.5, **options)
    assert 1 <= early.info.iterations < state.info.iterations


def test_units_are_the_layers(helpers):
    """Weights stored either way, with and without a bias, shared ones, and one that is used twice."""
    rng = np.random.default_rng(0)
    shapes = {
        "a": (4, 3),
        "a_bias": (4,),
        "b": (4, 5),
        "b_bias": (5,),
        "c": (5, 5),
        "d": (2, 5),
        "d_bias": (2,),
        "free": (2,),
    }
    params = {name: jnp.asarray(rng.normal(size=shape)) / 2 for name, shape in shapes.items()}

    def model(p, x):
        h = jnp.tanh(p["a"] @ x + p["a_bias"])
        h = jnp.tanh(h @ p["b"] + p["b_bias"])
        h = jnp.tanh(p["c"] @ jnp.tanh(p["c"] @ h))
        y = p["d"] @ h + p["d_bias"]
        return y * p["free"] + p["d_bias"]

    def error(p, x, t):
        return jnp.sum((model(p, x) - t) ** 2)

    xs, ts = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 2)))
    names = list(shapes)
    expected = [
        ("a", "a_bias", 1),
        ("b", "b_bias", 0),
        ("c", None, 1),
        ("d", None, 1),
        ("d_bias", None, 1),
        ("free", None, 1),
    ]
    loss = jaxhess.losses.squared_error
    for H in (
        jaxhess.hessian(error)(params, xs, ts), jaxhess.fisher(error)(params, xs, ts),
        sampling.sampled_curvature(model, loss, params, xs, ts, key=jax.random.key(0)),
    ):  # fmt: skip
        assert H.layers == ((0, 1), (2, 3))
        assert H.scaled(2.0).layers == H.layers
        found = [(names[u.weight], None if u.bias is None else names[u.bias], u.side) for u in units_of(H)]
        assert found == expected
    assert jax.jit(jaxhess.hessian(error))(params, xs, ts).layers == ((0, 1), (2, 3))


def joint_matrix(H, unit, params):
    """The dense block over a unit's own matrix, border included, from a dense matrix over all parameters."""
    leaves = jax.tree.leaves(params)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    places = [np.arange(starts[n], starts[n + 1]).reshape(leaf.shape) + 1 for n, leaf in enumerate(leaves)]
    order = matrix_of(places[unit.weight], None if unit.bias is None else places[unit.bias], unit.side).ravel()
    padded = np.pad(H, ((1, 0), (1, 0)))  # what is no parameter is at place 0
    return padded[np.ix_(order, order)]


@pytest.mark.parametrize("kind", ["fisher", "gauss_newton", "hessian"])
def test_values_are_the_exact_diagonal_in_the_eigenvectors(helpers, kind):
    """Of a weight and its bias together, of either order of axes; over time, of the weights alone."""
    rng = np.random.default_rng(5)
    shapes = {"a": (4, 3), "a_bias": (4,), "b": (4, 1), "b_bias": (1,), "t": (1, 1), "c": (2, 3), "heads": (1, 2, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def model(p, x):
        h = jnp.tanh(p["a"] @ x + p["a_bias"])
        along = jnp.sum(jnp.tanh(jnp.outer(x, p["c"] @ x) @ p["c"]), axis=0)
        return jnp.tanh(h @ p["b"] + p["b_bias"]) * p["t"][0] + jnp.einsum("hdk,k->h", p["heads"], along)

    loss = jaxhess.losses.squared_error

    def error(p, x, t):
        return loss(model(p, x), t)

    batch = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.normal(size=(6, 1)))
    if kind == "hessian":
        blocks, whole = jaxhess.hessian(error)(params, *batch), jaxhess.hessian(error, blocks="full")(params, *batch)
    elif kind == "fisher":
        blocks, whole = (jaxhess.fisher(error, blocks=which)(params, *batch) for which in ("diagonal", "full"))
    else:
        blocks, whole = (jaxhess.gauss_newton(model, loss, blocks=which)(params, *batch) for which in ("diagonal", "full"))
    units, H = units_of(blocks), np.asarray(whole.as_matrix())
    names = sorted(shapes)
    assert {(names[u.weight], u.side) for u in units if u.bias is not None} == {("a", 1), ("b", 0)}
    fresh = [no_factors(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params)]
    factors = averaged(blocks, units, fresh, jnp.zeros(()))
    for unit in units:
        own = factors[unit.weight]
        block = joint_matrix(H, unit, params)
        values, vectors = dense(own)
        exact = np.diag(vectors.T @ block @ vectors)
        approximate = np.outer(*(np.diag(np.asarray(V).T @ np.asarray(X) @ np.asarray(V)) for X, V in (
            (own.left, own.left_vectors), (own.right, own.right_vectors))))  # fmt: skip
        if np.allclose(values, approximate.ravel(), atol=1e-12) and unit.bias is None:
            continue  # blocks for which the exact diagonal costs too much, or a product that is exact
        helpers.close(values, exact, 1e-9)
        error_of = {name: np.linalg.norm(block - (vectors * v) @ vectors.T) for name, v in (
            ("exact", values), ("product", approximate.ravel()))}  # fmt: skip
        assert error_of["exact"] <= error_of["product"] * (1 + 1e-9) + 1e-12


def test_big_networks_take_single_iterations_and_new_factors_soon():
    """More than 2^18 parameters: 1, 2, 4 and 8 updates after the first factors, then every ten; each choice can be given."""
    rng = np.random.default_rng(8)
    shapes = {"a": (512, 2), "b": (512, 512), "c": (1, 512)}
    params = {name: jnp.asarray(rng.normal(size=shape) / shape[1] ** 0.5, jnp.float32) for name, shape in shapes.items()}
    batch = jnp.asarray(rng.normal(size=(4, 2)), jnp.float32), jnp.asarray(rng.normal(size=(4, 1)), jnp.float32)

    def model(p, x):
        return p["c"] @ jnp.tanh(p["b"] @ jnp.tanh(p["a"] @ x))

    smaller = {"a": params["a"][:8], "b": params["b"][:8, :8], "c": params["c"][:, :8]}

    def run(optimizer, params, steps):
        train = step((model, jaxhess.losses.squared_error), optimizer)
        state, refreshed, iterations = optimizer.init(params), [], []
        for _ in range(steps):
            params, state, metrics = train(params, state, *batch)
            refreshed.append(int(find_state(state).memory.refreshed))
            iterations.append(int(metrics.iterations))
        assert metrics.loss < 1e-3
        return refreshed, iterations

    refreshed, iterations = run(kronecker_newton(), params, 27)
    assert [n for n in range(27) if n == 0 or refreshed[n] > refreshed[n - 1]] == [0, 1, 3, 7, 15, 25]
    assert set(iterations) == {0}
    # Of the damping that follows, in mean eigenvalues of the first factors.
    for parameters, options, first in ((params, {}, 0.15), (smaller, {"max_iterations": 1}, 0.15), (smaller, {}, 0.5)):
        np.testing.assert_allclose(
            find_state(kronecker_newton(**options).init(parameters)).control.damping, first, rtol=1e-6
        )
    assert 0 not in run(kronecker_newton(max_iterations=2), params, 12)[1]
    refreshed, iterations = run(kronecker_newton(), smaller, 30)
    assert refreshed == [1] * 10 + [2] * 10 + [3] * 10
    assert max(iterations) > 1


def test_a_classifier_is_fitted_within_twenty_steps():
    """A first damping of 1 takes twice as many."""
    keys = jax.random.split(jax.random.key(5), 4)
    params = [
        {"w": jax.random.normal(keys[0], (16, 8)) / 8**0.5, "b": jnp.zeros(16)},
        {"w": jax.random.normal(keys[1], (4, 16)) / 16**0.5, "b": jnp.zeros(4)},
    ]
    xs = jax.random.normal(keys[2], (60, 8))
    labels = jnp.argmax(xs @ jax.random.normal(keys[3], (8, 4)), axis=1)

    def model(p, x):
        return p[1]["w"] @ jax.nn.relu(p[0]["w"] @ x + p[0]["b"]) + p[1]["b"]

    optimizer = kronecker_newton()
    train, state = step((model, jaxhess.losses.softmax_cross_entropy), optimizer), optimizer.init(params)
    for _ in range(20):
        params, state, metrics = train(params, state, xs, labels)
    assert metrics.loss < 2e-3


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**-30, 2.0**30, 2.0**80])
def test_a_loss_in_other_units_takes_the_same_steps(scale):
    keys = jax.random.split(jax.random.key(5), 3)
    params = {"w": jax.random.normal(keys[0], (3, 4)), "b": jnp.zeros(3)}
    xs, targets = jax.random.normal(keys[1], (20, 4)), jax.random.normal(keys[2], (20, 3))

    def model(p, x):
        return jnp.tanh(p["w"] @ x + p["b"])

    def trained(factor):
        optimizer = kronecker_newton()
        train = step((model, lambda y, t: factor * jaxhess.losses.squared_error(y, t)), optimizer)
        found, state = params, optimizer.init(params)
        for _ in range(12):
            found, state, metrics = train(found, state, xs, targets)
        return found, metrics.damping / factor

    for a, b in zip(jax.tree.leaves(trained(scale)), jax.tree.leaves(trained(1.0)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def relative(A, B, dense):
    return np.linalg.norm(np.kron(A, B) - dense) / np.linalg.norm(dense)


def test_factors_are_nearly_the_nearest(long_net):
    for _, block in curvature(long_net).items():
        if len(block.in_structure().shape) == 1:
            continue
        nearest = jaxhess.operators.nearest_kronecker(block)
        A, B, _ = factors_of(block)
        none = jnp.zeros_like(A), jnp.zeros_like(B)
        for known in (None, none, (A, B), (jnp.pad(A, (0, 1)), jnp.pad(B, (0, 1)))):
            A, B, _ = factors_of(block, known=known)
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
        helpers.close(found.left, np.pad(means[0], ((0, 1), (0, 1))))
        helpers.close(found.right, np.pad(means[1], ((0, 1), (0, 1))))
        values, vectors = dense(found)
        helpers.close((vectors * values) @ vectors.T, np.kron(found.left, found.right))
    assert state.memory.refreshed == 3


def test_the_preconditioner_is_the_dense_inverse(net, helpers):
    v = net.tree(np.random.default_rng(1).normal(size=15))
    inverse = gauss_newton_inverse(curvature(net))
    assert lx.is_positive_semidefinite(inverse)
    for damping in (DAMPING, 1e-3):
        found = inverse.with_damping(jnp.asarray(damping))
        expected = applied(v, inverse.units, inverse.factors, lambda values, damping=damping: 1 / (values + damping))
        helpers.close(helpers.flat(found.mv(v)), helpers.flat(expected))
        matrix = np.asarray(found.as_matrix())
        helpers.close(matrix, matrix.T)
        assert np.linalg.eigvalsh(matrix)[0] > 0


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
        ({"every": 0}, "every must be at least 1"),
        ({"every": 2.5}, "every must be a whole number"),
        ({"decay": 1.0}, "decay must be at least 0 and below 1"),
        ({"decay": -0.1}, "decay must be at least 0 and below 1"),
        ({"learning_rate": 1.0}, "momentum='exact' needs learning_rate='exact'"),
        ({"max_iterations": 0}, "max_iterations must be a whole number of at least 1"),
        ({"max_iterations": 2.0}, "max_iterations must be a Python integer of at least 1"),
        ({"progress": 1.0}, "progress must be at least 0 and below 1"),
        ({"progress": -0.1}, "progress must be at least 0 and below 1"),
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


@pytest.mark.parametrize("steps", [2, 14])
def test_roots_of_curvatures_of_few_and_of_many_outputs(helpers, steps):
    """Softmax at each of some steps: a singular matrix of three rows for each; and an example that counts for nothing."""
    rng = np.random.default_rng(9)
    p = jax.nn.softmax(jnp.asarray(rng.normal(size=(4, steps, 3))))
    blocks = p[..., None] * (jnp.eye(3)[None, None] - p[..., None, :])
    B = jnp.stack([jax.scipy.linalg.block_diag(*each) for each in blocks]).at[2].set(0)
    units = jnp.eye(3 * steps)
    columns = jax.vmap(lambda unit: sampling._times_root(B, jnp.tile(unit, (4, 1))), out_axes=2)
    L = np.asarray(columns(units))
    helpers.close(L @ L.transpose(0, 2, 1), B, 1e-13)
    indefinite = B.at[1].add(-0.1 * jnp.eye(3 * steps))
    found = sampling._times_root(indefinite, jnp.ones((4, 3 * steps)))
    assert np.all(np.isfinite(found))
    helpers.close(found[0], L[0] @ np.ones(3 * steps), 1e-6)
    assert np.all(np.isnan(sampling._times_root(B.at[1].set(jnp.nan), jnp.ones((4, 3 * steps)))[1]))
