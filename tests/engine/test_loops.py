"""Loops in the engine: how they are traced, and what their linearisation is made of."""

import functools

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from jaxprs import equations
from models import normal

import jaxhess
from jaxhess.engine.graph import nested
from jaxhess.engine.loops import scan_sizes
from jaxhess.engine.plan import make_plan
from jaxhess.engine.trace import trace

R, T, N, M = 3, 5, 2, 4
CELL = {"w": normal(0, M, N), "u": normal(1, M, M), "b": normal(2, M)}
BATCH = normal(3, R, T, N), normal(4, R, M)


def layer(p, x, t):
    return jnp.sum((jaxhess.recurrent(p["w"], p["u"], p["b"], x)[-1] - t) ** 2)


def by_hand(p, x, t, cell=jnp.tanh):
    def step(h, x):
        mask = jnp.where(p["u"] > -10, p["u"], 0) * jnp.sin(jnp.ones((M, M)))
        return cell(p["w"] @ x + mask @ h / jnp.sin(1.0) + p["b"]), None

    return jnp.sum((jax.lax.scan(step, jnp.zeros(M), x)[0] - t) ** 2)


def graph_of(error, params, batch):
    return trace(error, params, tuple(jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in batch))


def test_what_is_the_same_in_every_step_goes_before_the_loop():
    graph = graph_of(by_hand, CELL, BATCH)
    (loop,) = [operation.loop for operation in graph.operations if operation.loop is not None]
    assert loop.length == T
    assert not {"sin", "gt", "select_n"} & {operation.name for operation in loop.operations}
    plan = make_plan(graph, 3)
    assert {"sin", "gt", "select_n"} <= {operation.name for operation in plan.before}
    blocks = jaxhess.hessian(by_hand)(CELL, *BATCH)
    assert type(blocks["u"]).__name__ == "Pullback"
    exact = jax.hessian(lambda p: jnp.mean(jax.vmap(by_hand, (None, 0, 0))(p, *BATCH)))(CELL)
    np.testing.assert_allclose(blocks["u"].as_matrix(), exact["u"]["u"].reshape(M * M, -1), atol=1e-12)


def counting(start, stop, by):
    def error(p, x, t):
        def more(state):
            return state[0] < stop if by > 0 else state[0] > stop

        def step(state):
            return state[0] + by, jnp.tanh(p["u"] @ state[1] + p["b"])

        return jnp.sum(jax.lax.while_loop(more, step, (jnp.int32(start) + 0, t))[1] * jnp.sum(p["w"] @ x.T))

    return error


@pytest.mark.parametrize(("start", "stop", "by", "length"), [(0, 4, 1, 4), (7, 0, -2, 4), (2, 9, 3, 3), (5, 5, 1, 0)])
def test_a_while_loop_that_counts_has_a_length(start, stop, by, length):
    error = counting(start, stop, by)
    found = [op.loop.length for op, _ in nested(graph_of(error, CELL, BATCH).operations) if op.loop is not None]
    assert found == [length]
    first = jax.jacfwd(lambda u: jnp.mean(jax.vmap(error, (None, 0, 0))(CELL | {"u": u}, *BATCH)))
    _, gradient, blocks = jaxhess.value_grad_and_hessian(error)(CELL, *BATCH)
    np.testing.assert_allclose(gradient["u"], first(CELL["u"]), atol=1e-12)
    exact = jax.jit(jax.jacfwd(first))(CELL["u"]).reshape(M * M, M * M)
    np.testing.assert_allclose(blocks["u"].as_matrix(), exact, atol=1e-12)


def test_a_loop_without_steps_has_an_explicit_form():
    def error(p, x, t):
        return jnp.sum((jax.lax.scan(lambda h, x: (jnp.tanh(p["u"] @ h + x[0]), None), t, x[:0])[0] + p["b"]) ** 2)

    block = jaxhess.hessian(error)(CELL, *BATCH)["u"]
    assert not block.as_matrix().any()
    assert not block.explicit().as_matrix().any()


def test_a_loop_that_depends_on_data_has_none():
    def error(p, x, t):
        return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(p["u"] @ y) / 3, t).sum()

    with pytest.raises(NotImplementedError, match=r"while at .*test_loops.py:\d+ .*fori_loop with a fixed number of steps"):
        jaxhess.hessian(error)(CELL, *BATCH)


def linear_map(error, params, batch):
    """The jaxpr of a product with U's block."""
    blocks = jaxhess.hessian(error)(params, *batch)
    return jax.make_jaxpr(lambda H, v: H.mv(v))(blocks["u"], params["u"])


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="JAX differentiates within the loop there")
@pytest.mark.parametrize("error", [layer, functools.partial(by_hand, cell=jaxhess.gelu), by_hand])
def test_a_product_is_two_substitutions(error):
    scans = [e for e in equations(linear_map(error, CELL, BATCH)) if e.primitive.name == "scan"]
    bodies = [[e.primitive.name for e in equations(scan.params["jaxpr"])] for scan in scans]
    # The map itself and, from its derivative, a copy that the compiler drops: each forward and backward.
    assert [scan.params["reverse"] for scan in scans].count(True) == len(scans) // 2
    for scan, body in zip(scans, bodies, strict=True):
        carried = [v.aval.shape for v in scan.outvars[: scan_sizes(scan)[1]]]
        assert all(np.prod(shape) <= R * M for shape in carried)
        linear = {"add", "add_any", "broadcast_in_dim", "div", "dot_general", "mul", "reduce_sum", "reshape", "transpose"}
        assert set(body) <= linear


def test_nothing_has_the_square_of_the_steps():
    params = {"w": normal(0, M, N), "u": normal(1, M, M), "b": normal(2, M), "v": normal(5, 3, M)}

    def error(p, x, t):
        states = jaxhess.recurrent(p["w"], p["u"], p["b"], x)
        return jaxhess.losses.over_time(jaxhess.losses.softmax_cross_entropy, states @ p["v"].T, t)

    x, t = jnp.ones((R, 200, N)), jnp.zeros((R, 200), jnp.int32)
    for function in (jaxhess.hessian(error), lambda *a: jaxhess.hessian(error)(*a).mv(params)):
        sizes = [v.aval.size for e in equations(jax.make_jaxpr(function)(params, x, t)) for v in e.outvars]
        assert max(sizes) < 200 * 200


def test_blocks_hold_the_same_arrays_once():
    blocks = jaxhess.hessian(layer)(CELL, *BATCH)
    for a, b in zip(jax.tree.leaves(blocks["u"].term.linear), jax.tree.leaves(blocks["w"].term.linear), strict=True):
        assert a is b


@pytest.mark.parametrize("written", ["layer", "scan"])
@pytest.mark.parametrize(("name", "f"), [("tanh", mpmath.tanh), ("sigmoid", lambda y: 1 / (1 + mpmath.exp(-y)))])
def test_saturated_units_keep_their_curvature_through_time(written, name, f):
    """One unit over three steps, all of them saturated, where autodiff of the plain functions gives 0."""
    w, u, b, x = 0.5, 0.75, 18.0, np.array([1.0, -2.0, 3.0])
    activation = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}[name]

    def error(p, x):
        if written == "layer":
            z = jaxhess.recurrent(p["w"], p["u"], p["b"], x[:, None], getattr(jaxhess, name))[-1]
        else:
            z = jax.lax.scan(lambda h, x: (activation(p["w"] @ x[None] + p["u"] @ h + p["b"]), None), jnp.zeros(1), x)[0]
        return jnp.sum(z)

    def states(w, u, b):
        z = mpmath.mpf(0)
        for value in x:
            z = f(w * float(value) + u * z + b)
        return z

    params = {"w": jnp.full((1, 1), w), "u": jnp.full((1, 1), u), "b": jnp.full(1, b)}
    blocks = jaxhess.hessian(error)(params, x[None])
    with mpmath.workdps(60):
        for place, key in enumerate("wub"):
            order = tuple(2 if i == place else 0 for i in range(3))
            exact = mpmath.diff(states, (mpmath.mpf(w), mpmath.mpf(u), mpmath.mpf(b)), order)
            found = float(blocks[key].as_matrix()[0, 0])
            assert abs(found / float(exact) - 1) < 1e-10, (key, found, float(exact))


def test_bounds_contain_the_spectrum_of_a_recurrent_weight():
    blocks = jaxhess.hessian(layer)(CELL, *BATCH)
    for key in ("w", "u"):
        if key == "u":
            with pytest.raises(ValueError, match="input depends on it"):
                jaxhess.bounds.weyl_bounds(blocks[key])
            continue
        bounds, eigenvalues = jaxhess.bounds.weyl_bounds(blocks[key]), blocks[key].eigvalsh()
        assert np.all(bounds.lower <= eigenvalues + 1e-12)
        assert np.all(eigenvalues <= bounds.upper + 1e-12)
    Q, Z = blocks["w"].kronecker_terms()
    dense = jnp.einsum("rsitj,rsp,rtq->ipjq", Q, Z, Z) / R
    np.testing.assert_allclose(dense.reshape(M * N, M * N), blocks["w"].as_matrix(), atol=1e-12)
