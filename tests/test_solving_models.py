"""Solves with the curvature of whole models: joint blocks of layers, recurrent weights, Gauss-Newton matrices."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxhess
from jaxhess._typing import InputError, SingularError
from jaxhess.engine.full import is_layer
from jaxhess.operators import JointHessian, LayerBlock
from jaxhess.operators.reduction import ravel, unravel
from jaxhess.transforms.traced import traced

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray(RNG.standard_normal(shape))


LAYERS, OTHERS = {}, {}
PARAMS = {"w": array(2, 3), "b": array(2)}


def layer(output, params=PARAMS):
    """`output(p, x)` adds the bias to `W z` and does nothing else with either."""
    LAYERS[f"{len(LAYERS)}"] = (output, params)


def other(output, params=PARAMS):
    OTHERS[f"{len(OTHERS)}"] = (output, params)


layer(lambda p, x: p["w"] @ x + p["b"])
layer(lambda p, x: p["b"] + x @ p["w"], {"w": array(3, 2), "b": array(2)})
layer(lambda p, x: (lambda y: 2 * y * jnp.tanh(y))(p["w"] @ x + p["b"]))
layer(lambda p, x: p["w"] @ x + p["b"] + x, {"w": array(3, 3), "b": array(3)})
layer(lambda p, x: p["w"] @ x + p["b"].reshape(-1), {"w": array(6, 3), "b": array(2, 3)})
layer(lambda p, x: jnp.einsum("i,ihd->hd", x, p["w"]) + p["b"], {"w": array(3, 2, 3), "b": array(2, 3)})
layer(lambda p, x: p["w"] @ x + p["b"], {"w": array(3), "b": array()})
layer(lambda p, x: jax.checkpoint(lambda p, x: jnp.tanh(p["w"] @ x + p["b"]))(p, x))
layer(
    lambda p, x: p["v"] @ jnp.tanh(p["w"] @ jnp.sin(p["u"] @ x) + p["b"]),
    {"w": array(2, 3), "b": array(2), "u": array(3, 3), "v": array(2, 2)},
)

other(lambda p, x: p["w"] @ x + p["b"] + jnp.sin(p["b"]))
other(lambda p, x: (lambda y: (y + p["b"]) * jnp.tanh(y))(p["w"] @ x))
other(lambda p, x: 2 * (p["w"] @ x) + p["b"])
other(lambda p, x: (p["w"] * 3) @ x + p["b"])
other(lambda p, x: p["w"] @ x + 3 * p["b"])
other(lambda p, x: p["w"] @ x - p["b"])
other(lambda p, x: p["w"] @ x + x[0] * p["b"])
other(lambda p, x: p["w"] @ x + p["b"][::-1])
other(lambda p, x: p["w"] @ x + jnp.tanh(p["b"]))
other(lambda p, x: p["w"] @ x + p["b"].T.reshape(-1), {"w": array(6, 3), "b": array(2, 3)})
other(lambda p, x: jnp.einsum("i,ihd->hd", x, p["w"]) + p["b"].T, {"w": array(3, 2, 3), "b": array(3, 2)})
other(lambda p, x: (p["w"] @ x + x) + p["b"], {"w": array(3, 3), "b": array(3)})
other(lambda p, x: p["w"] @ x + p["b"], {"w": array(2, 3), "b": array()})
other(lambda p, x: jnp.outer(x, x) @ p["w"] + p["b"], {"w": array(3, 2), "b": array(2)})
other(lambda p, x: p["w"] @ jnp.tanh(p["w"] @ x + p["b"]), {"w": array(3, 3), "b": array(3)})
other(lambda p, x: p["w"] @ x + p["b"][:2], {"w": array(2, 3), "b": array(3)})
other(lambda p, x: (p["w"] * np.array([[1.0, 0, 1], [0, 1, 1]])) @ x + p["b"])
other(lambda p, x: jnp.concatenate([p["w"] @ x + p["b"], p["w"].reshape(-1) ** 2]))
other(lambda p, x: p["w"] @ (x * p["b"]) + p["b"], {"w": array(3, 3), "b": array(3)})
other(lambda p, x: jnp.where(x[0] > 0, p["w"] @ x + p["b"], p["w"] @ x))
other(lambda p, x: (p["w"] @ x)[::-1] + p["b"])
other(lambda p, x: p["w"] @ x + p["b"], {"w": array(2, 3).astype(jnp.float32), "b": array(2)})
other(lambda p, x: jax.lax.scan(lambda h, s: (jnp.tanh(p["w"] @ h + p["b"] + s), None), jnp.zeros(2), x)[0], {
    "w": array(2, 2), "b": array(2),
})  # fmt: skip


def error_of(output):
    def error(p, x):
        y = output(p, x).reshape(-1)
        return jnp.sum(jnp.sin(y) * (1.0 + jnp.arange(y.size)))

    return error


def close(actual, expected, tolerance=1e-9):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * max(np.max(np.abs(expected)), 1e-300)


def joined(H, names, params):
    """The rows and columns of a dense matrix that belong to some parameters, in their order."""
    starts, start = {}, 0
    for name in sorted(params):
        starts[name] = np.arange(start, start + params[name].size)
        start += params[name].size
    places = np.concatenate([starts[name] for name in names])
    return np.asarray(H)[np.ix_(places, places)]


@jax.numpy_rank_promotion("allow")
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_layer_is_not_taken_for_one(name):
    output, params = OTHERS[name]
    plan = traced(error_of(output), params, (array(4, 3),)).plan
    assert not is_layer(plan, 1, 0)  # the bias is the first leaf
    assert not is_layer(plan, 0, 1)


def test_a_layer_has_one_block_of_its_weight_and_bias():
    xs, params = array(4, 3), {name: given for name, (_, given) in LAYERS.items()}

    def whole(params, x):
        return sum(error_of(output)(params[name], x) for name, (output, _) in LAYERS.items())

    H = jaxhess.hessian(whole, blocks="full")(params, xs)
    flat, unflatten = ravel_pytree(params)
    D = np.asarray(jax.hessian(lambda v: jnp.mean(jax.vmap(lambda x: whole(unflatten(v), x))(xs)))(flat))
    numbers = unflatten(jnp.arange(float(flat.size)))
    for name in LAYERS:
        for pair in (("w", "b"), ("b", "w"))[: 1 + (name == "0")]:
            J = H.joint(*(f"{name}/{each}" for each in pair))
            assert isinstance(J, LayerBlock)
            places = np.concatenate([np.asarray(numbers[name][each], int).reshape(-1) for each in pair])
            close(J.as_matrix(), D[np.ix_(places, places)], 1e-10)
    doubled = (H * -2).joint("0/w", "0/b").with_tags(lx.negative_semidefinite_tag)
    close(doubled.as_matrix(), -2 * H.joint("0/w", "0/b").as_matrix())


def check(H, dampings=(0.37,), tolerance=1e-9, size=None):
    """Direct and held solves, determinants and |H|, against the dense form; `dampings` numbers or trees."""
    D, structure = np.asarray(H.as_matrix()), H.in_structure()
    assert size is None or H._reduced_size() == size
    N, b = len(D), np.random.default_rng(5).standard_normal(len(D))
    w, V = np.linalg.eigh((D + D.T) / 2)
    vector = unravel(structure, jnp.asarray(b))
    for damping in dampings:
        tree = jax.tree.map(lambda d, s: jnp.full(s.shape, d), jax.tree.broadcast(damping, structure), structure)
        A = D + np.diag(np.asarray(ravel(tree)))
        x, info = H.solve(vector, damping, return_info=True)
        close(ravel(x), np.linalg.solve(A, b), tolerance)
        assert info.converged
        close(info.residual, np.linalg.norm(b - A @ np.asarray(ravel(x))) / np.linalg.norm(b), np.inf)
        assert info.residual < tolerance
        sign, value = H.slogdet(damping)
        assert float(sign) == np.linalg.slogdet(A)[0]
        assert abs(float(value) - np.linalg.slogdet(A)[1]) < tolerance * N
    close(ravel(H.factorize(0.37).solve(vector)), np.linalg.solve(D + 0.37 * np.eye(N), b), tolerance)
    E = H.factorize()
    close(ravel(E.solve(vector, 1.9)), np.linalg.solve(D + 1.9 * np.eye(N), b), tolerance)
    close(E.eigvalsh(), w, tolerance)
    close(E.absolute().as_matrix(), (V * np.abs(w)) @ V.T, tolerance)
    safe = 0.37 + max(0.0, -w[0])
    root = np.asarray(H.inverse_sqrt(safe).as_matrix())
    close(root @ root, np.linalg.inv(D + safe * np.eye(N)), tolerance)
    with pytest.raises(SingularError):
        H.solve(vector, -w[-1])
    return E


def network(p, x):
    return jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


NET = {"w": array(5, 3), "b": array(3), "v": array(3, 2)}
XS, TARGETS = array(2, 5), jax.nn.softmax(array(2, 2))


def test_blocks_of_a_network():
    def error(p, x, t):
        return jnp.sum((network(p, x) - t) ** 2)

    H = jaxhess.hessian(error, blocks="full")(NET, XS, TARGETS)
    D = H.as_matrix()
    damping = {"w": 0.9, "b": 0.4, "v": 1.3}
    check(H, (0.37, damping), size=24)
    layer = H.joint("w", "b")
    check(layer, (0.37, (0.9, jnp.asarray(0.4)), (0.9, -0.4)), size=6)
    close(layer.as_matrix(), joined(D, ("w", "b"), NET))
    assert layer._absorb([0.9, 0.4])[0]._reduced_size() == 6
    with pytest.raises(InputError, match="a number or a tree of numbers"):
        layer.solve((NET["w"], NET["b"]), (0.9, None))
    Q, Z = layer.terms.Q, layer.terms.Z
    values, vectors = np.linalg.eigh(Q)
    absolute = np.einsum("rij,rj,rkj->rik", vectors, np.abs(values), vectors)
    close(Z[:, -1], np.ones(2))
    kept = layer.absolute(per_example=True)
    assert isinstance(kept, LayerBlock)
    assert lx.is_positive_semidefinite(kept)
    expected = sum(np.kron(q, np.outer(z, z)) for q, z in zip(absolute, np.asarray(Z), strict=True)) / 2
    close(kept.terms.as_matrix(), expected)
    pair = H.joint("b", "v")
    assert isinstance(pair, JointHessian)
    check(pair, (0.37, (0.9, 0.4)), size=9)
    close(pair.as_matrix(), joined(D, ("b", "v"), NET))


@pytest.mark.parametrize("what", ["absolute", "positive_part"])
def test_per_example_forms_of_a_whole_network_are_means_of_each_examples_own(what):
    params = {"in": {"w": array(5, 3), "b": array(3)}, "out": [array(2, 3), array(2)]}
    xs, ts = array(4, 5), array(4, 2)

    def error(p, x, t):
        return jnp.sum(jnp.sin(p["out"][0] @ jnp.tanh(x @ p["in"]["w"] + p["in"]["b"]) + p["out"][1] - t))

    def expected(path):
        function = {"absolute": np.abs, "positive_part": lambda v: np.maximum(v, 0)}[what]
        total = 0
        for x, t in zip(xs, ts, strict=True):
            w, V = np.linalg.eigh(jaxhess.hessian(error)(params, x[None], t[None]).block(path).as_matrix())
            total = total + (V * function(w)) @ V.T / len(xs)
        return total

    H = jax.jit(jaxhess.hessian(error))(params, xs, ts)
    K = getattr(H, what)(per_example=True)
    assert lx.is_positive_semidefinite(K)
    assert K.layers == H.layers == ((1, 0), (2, 3))
    for path, operator in K.items():
        close(operator.as_matrix(), expected(path))
    close((2 * H["out"]).absolute(per_example=True)[1].as_matrix(), 2 * H.absolute(per_example=True)["out"][1].as_matrix())
    twice = H.block("in/w") + H.block("in/w")
    close(getattr(twice, what)(per_example=True).as_matrix(), 2 * expected("in/w"))


def test_per_example_forms_are_refused_where_no_matrix_of_an_example_is_kept():
    def error(p, x):
        return jnp.sum(jnp.sin(p["v"] * jnp.tanh(p["w"] @ x)))

    H = jaxhess.hessian(error)({"w": array(3, 5), "v": array(3)}, array(2, 5))
    with pytest.raises(InputError, match=r"block 'v': Diagonal.absolute: there is no matrix of each example"):
        H.absolute(per_example=True)


def test_gauss_newton_in_its_plans():
    make = jaxhess.gauss_newton(network, jaxhess.losses.softmax_cross_entropy)
    G = make(NET, XS, TARGETS)
    assert [G[name]._plan() if hasattr(G[name], "_plan") else "sum" for name in ("b", "w")] == ["dense", "gram"]
    check(G["w"], size=4)
    check(G["b"], size=3)
    check(G["w"] * -1.5, size=4)
    whole = jaxhess.gauss_newton(network, jaxhess.losses.softmax_cross_entropy, blocks="full")(NET, XS, TARGETS)
    E = check(whole, (0.37, {"w": 0.9, "b": 0.4, "v": 1.3}), size=4)
    assert E.eigenvalues.shape == (4,)
    vectors = whole.eigh()[1]
    rows = np.asarray(jax.vmap(ravel)(vectors))
    assert np.max(np.abs(rows @ rows.T - np.eye(24))) < 1e-9
    one = jaxhess.gauss_newton(network, jaxhess.losses.squared_error)(NET, XS[:1], TARGETS[:1])
    assert one["v"]._reduced_size() <= 2


def test_small_eigenvalues_of_large_parameters_count():
    # In float32 with many parameters: what is lost to rounding depends on the Gram matrix's size, not on theirs.
    r, m, n = 3, 50, 4000
    rng = np.random.default_rng(2)
    xs = rng.standard_normal((r, n)).astype(np.float32) * np.array([[1.0], [0.2], [0.05]], np.float32) / np.sqrt(n)
    w = jnp.asarray(rng.standard_normal((m, n)), jnp.float32)
    u = rng.standard_normal(m).astype(np.float32)
    G = jaxhess.gauss_newton(lambda w, x: u @ (w @ x), jaxhess.losses.squared_error)(w, xs, np.zeros(r, np.float32)).blocks
    assert G._reduced_size() == r
    F = (u[None, :, None].astype(float) * xs[:, None, :]).reshape(r, m * n)
    scale = float(G.trace()) / np.sum(F**2)
    b, damping = (F[2] / np.linalg.norm(F[2])).reshape(m, n), 0.05 * scale * np.sum(F**2) / r
    flat = b.reshape(-1)
    expected = (flat - F.T @ np.linalg.solve(np.eye(r) * damping / scale + F @ F.T, F @ flat)) / damping
    for method in ("eigh", "cholesky"):
        close(G.solve(b, damping, method=method), expected.reshape(m, n), 2e-5)
    close(G.factorize().mv(jnp.asarray(b, jnp.float32)), (scale * F.T @ (F @ flat)).reshape(m, n), 2e-5)


def test_recurrent_weights_and_others_without_small_matrices():
    def cell(p, xs, t):
        def step(h, x):
            h = jnp.tanh(p["w"] @ x + p["u"] @ h + p["b"])
            return h, h

        return jnp.sum((jax.lax.scan(step, jnp.zeros(2), xs)[0] - t) ** 2)

    p = {"w": array(2, 9), "u": array(2, 2), "b": array(2)}
    batch = array(2, 3, 9), array(2, 2)
    H = jaxhess.hessian(cell)(p, *batch)
    check(H["w"], size=12)
    check(H["u"], size=4)
    dense = jax.hessian(lambda u: jnp.mean(jax.vmap(lambda x, t: cell({**p, "u": u}, x, t))(*batch)))(p["u"])
    close(H["u"].as_matrix(), np.asarray(dense).reshape(4, 4), 1e-10)
    whole = jaxhess.hessian(cell, blocks="full")(p, *batch)
    check(whole["u"]["u"])
    with pytest.raises(InputError, match="not known to be symmetric"):
        whole["u"]["b"].solve(jnp.ones(2), 1.0)

    def masked(p, x):
        y = jax.lax.conv_general_dilated(x[None, None], p["kernel"], (1,), "VALID")[0]
        return jnp.sum(jnp.sin(jnp.tanh(p["scale"]) @ y) + jnp.cos(y[0]))

    p = {"kernel": array(2, 1, 3), "scale": array(2)}
    K = jaxhess.hessian(masked)(p, array(3, 6))
    assert [type(K[name]).__name__ for name in ("kernel", "scale")] == ["ContractionOperator", "Pullback"]
    check(K["kernel"])
    check(K["scale"])


def test_derivatives_through_a_solve_with_the_hessian():
    def error(p, x):
        return jnp.sum(jnp.sin(p["w"] @ x + p["b"]))

    p, xs = {"w": array(2, 3), "b": array(2)}, array(4, 3)
    flat, unflatten = ravel_pytree(p)

    def dense(v):
        A = jax.hessian(lambda u: jnp.mean(jax.vmap(lambda x: error(unflatten(u), x))(xs)))(v)
        return jnp.sum(jnp.linalg.solve(A + 2.0 * jnp.eye(8), jnp.ones(8)) * jnp.arange(8.0))

    def structured(v):
        H = jaxhess.hessian(error, blocks="full")(unflatten(v), xs)
        x = H.solve(unflatten(jnp.ones(8)), 2.0)
        return jnp.sum(ravel_pytree(x)[0] * jnp.arange(8.0))

    close(structured(flat), dense(flat))
    close(jax.jit(jax.grad(structured))(flat), jax.grad(dense)(flat), 1e-8)
