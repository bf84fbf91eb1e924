"""Curvature in inputs and in named activations, against autodiff of the same function of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from models import EXAMPLES, MODELS, normal

import jaxhess
from jaxhess._typing import DenseTooLargeError, InputError, UnsupportedOperationError
from jaxhess.engine import targets

TOLERANCE = 1e-10


def assert_trees_close(found, expected, tolerance=TOLERANCE):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    scale = max(1.0, *(float(np.max(np.abs(e), initial=0)) for e in jax.tree.leaves(expected)))
    for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert f.shape == e.shape
        np.testing.assert_allclose(f, e, rtol=0, atol=tolerance * scale)


def by_autodiff(error, params, batch, argnums=1):
    return jax.jit(jax.vmap(jax.hessian(error, argnums=argnums), (None, *(0 for _ in batch))))(params, *batch)


def check_inputs(error, params, batch, argnums=1, **options):
    expected = by_autodiff(error, params, batch, argnums)
    assert_trees_close(jaxhess.hessian(error, argnums=argnums, **options)(params, *batch), expected)
    arguments = argnums if isinstance(argnums, tuple) else (argnums,)
    traces = 0
    for n in arguments:
        leaves, structure = jax.tree.flatten(batch[n - 1])
        rows = structure.flatten_up_to(by_autodiff(error, params, batch, n))
        for place, leaf in enumerate(leaves):
            own = structure.flatten_up_to(rows[place])[place]
            size = leaf[0].size
            traces += jnp.trace(own.reshape(len(leaf), size, size), axis1=1, axis2=2)
    assert_trees_close(jaxhess.laplacian(error, argnums=argnums, **options)(params, *batch), traces)


def mlp():
    def error(p, x, t):
        z = p["v"] @ jnp.tanh(p["w"] @ x + p["b"]) + p["c"]
        return jax.nn.logsumexp(z) - z @ t + 0.1 * jnp.sum(x**4)

    return error, {"w": normal(0, 6, 4), "b": normal(1, 6), "v": normal(2, 3, 6), "c": normal(3, 3)}


def batch(*shapes, examples=EXAMPLES):
    return tuple(normal(50 + n, examples, *shape) for n, shape in enumerate(shapes))


# ---- inputs

NOT_OF_FLOATING_INPUTS = {"no_data_at_all", "loops_inside_custom_rules", "several_outputs_and_a_list"}


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_OF_FLOATING_INPUTS])
def test_input_hessian_of_every_model_equals_autodiff(name, monkeypatch):
    """By the sweep, wherever there is no loop."""
    monkeypatch.setattr(targets, "_is_cheaper_by_component", lambda *_: False)
    check_inputs(*MODELS[name]())


@pytest.mark.parametrize("name", ["perceptron", "gates_and_layer_norm", "own_derivatives", "indexing"])
def test_input_hessian_component_by_component(name, monkeypatch):
    monkeypatch.setattr(targets, "_is_cheaper_by_component", lambda *_: True)
    check_inputs(*MODELS[name](), batch_size=3)


def test_the_cheaper_way_is_taken():
    def error(p, x):
        return p["v"] @ jnp.tanh(p["w"] @ x)

    def operations(function, m, n):
        params = {"w": jnp.ones((m, n)), "v": jnp.ones(m)}
        return jax.jit(function).lower(params, jnp.ones((8, n))).compile().cost_analysis()["flops"]

    theirs = jax.vmap(lambda p, x: jnp.trace(jax.hessian(error, argnums=1)(p, x)), (None, 0))
    for m, n in ((256, 2), (128, 64), (8, 200)):
        # Of two components JAX 0.11 takes a third less than before; ours has derivatives that saturation leaves exact.
        more = 1.3 if n == 2 and jax.__version_info__ >= (0, 11) else 1.0
        assert operations(jaxhess.laplacian(error), m, n) < more * operations(theirs, m, n)


def test_many_components_in_parts():
    def error(p, xs):
        return jnp.sum(jax.lax.scan(lambda h, x: (jnp.tanh(p @ h + x), h), jnp.zeros(3), xs)[1] ** 2)

    check_inputs(error, normal(0, 3, 3), batch((7, 3)))


def test_inputs_in_a_pytree():
    error, params, data = MODELS["several_outputs_and_a_list"]()
    check_inputs(error, params, data)

    def of_nested(p, example, t):
        left, (right, scale) = example["left"], example["right"]
        return jnp.sum(jnp.sin(p * left[None, :2]) * right**2) * scale + jnp.prod(left) * t

    example = {"left": normal(0, 5, 3), "right": (normal(1, 5, 2, 2), normal(2, 5))}
    check_inputs(of_nested, jnp.array(1.3), (example, normal(3, 5)), argnums=(2, 1), batch_size=2)


@pytest.mark.parametrize("argnums", [1, 2, -1, (1,), (1, 2), (2, 1), [1, -1]])
def test_several_arguments_with_their_cross_terms(argnums):
    error, params = mlp()
    data = batch((4,), (3,))
    found = jaxhess.hessian(error, argnums=argnums)(params, *data)
    expected = by_autodiff(error, params, data, tuple(argnums) if isinstance(argnums, list) else argnums)
    assert_trees_close(found, expected)
    if isinstance(argnums, tuple):
        check_inputs(error, params, data, argnums)


def test_images_through_a_convolutional_net():
    def error(p, image, t):
        y = jax.lax.conv_general_dilated(
            image[None], p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )  # fmt: skip
        h = jax.nn.gelu(y + p["b"][None, None, None])
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jnp.sum((p["o"] @ h.reshape(-1) - t) ** 2)

    params = {"k": normal(0, 3, 3, 2, 4), "b": normal(1, 4), "o": normal(2, 3, 16)}
    data = batch((4, 5, 2), (3,))
    assert jaxhess.hessian(error, argnums=1)(params, *data).shape == (EXAMPLES, 4, 5, 2, 4, 5, 2)
    check_inputs(error, params, data)


def rnn():
    def error(p, xs, t):
        def cell(h, x):
            z, c = jax.nn.sigmoid(p["z"] @ jnp.concatenate([x, h])), jnp.tanh(p["w"] @ x + p["u"] @ h)
            h = jaxhess.tap("state", z * h + (1 - z) * c) if p.get("tapped") else z * h + (1 - z) * c
            return h, h

        last, hs = jax.lax.scan(cell, jnp.zeros(3), xs)
        hs = jaxhess.tap("states", hs)
        return jnp.sum((p["o"] @ hs.sum(0) - t) ** 2) + jnp.sum(jnp.exp(jaxhess.tap("last", last)))

    return error, {"z": normal(0, 3, 5), "w": normal(1, 3, 2), "u": normal(2, 3, 3), "o": normal(3, 2, 3)}


@pytest.mark.parametrize("batch_size", [None, 3])
def test_sequences_through_a_loop(batch_size):
    error, params = rnn()
    check_inputs(error, params, batch((5, 2), (2,)), batch_size=batch_size)
    check_inputs(error, params, batch((5, 2), (2,)), argnums=(2, 1), batch_size=batch_size)


def test_own_layers():
    def error(p, xs, t):
        hs = jaxhess.recurrent(p["w"], p["u"], p["b"], xs, jaxhess.tanh)
        return jaxhess.losses.softmax_cross_entropy(jaxhess.dense(p["o"], p["c"], jaxhess.tap("h", hs[-1])), t)

    params = {"w": normal(0, 3, 2), "u": normal(1, 3, 3), "b": normal(2, 3), "o": normal(3, 2, 3), "c": normal(4, 2)}
    data = (normal(5, EXAMPLES, 4, 2), jax.nn.softmax(normal(6, EXAMPLES, 2)))
    check_inputs(error, params, data)
    logits = jaxhess.hessian(error, taps="h")(params, *data)
    assert logits.shape == (EXAMPLES, 3, 3)


def test_an_argument_without_influence_has_zeros():
    def error(p, x, t):
        return jnp.sum(p * x) ** 2 + jnp.sum(jax.lax.stop_gradient(t) ** 3)

    data = batch((3,), (2,))
    check_inputs(error, jnp.ones(3), data, argnums=(1, 2))
    assert not np.any(jaxhess.hessian(error, argnums=2)(jnp.ones(3), *data))


def test_the_error_may_be_the_input_itself():
    data = (normal(0, 3),)
    check_inputs(lambda p, x: x, jnp.ones(()), data)
    check_inputs(lambda p, x: p * x**3, jnp.ones(()), data)


def test_parameters_may_be_anything_that_is_an_array():
    def error(p, x):
        return jnp.sum(x**3) * (p["scale"] if p else 1)

    (x,) = batch((3,))
    expected = jax.vmap(lambda x: jnp.diag(6 * x))(x)
    assert_trees_close(jaxhess.hessian(error, argnums=1)((), x), expected)
    assert_trees_close(jaxhess.hessian(error, argnums=1)({"scale": 2, "key": jax.random.key(0)}, x), 2 * expected)


@pytest.mark.parametrize("batch_size", [1, 3, 5, 9])
def test_chunks_change_nothing(batch_size):
    error, params = mlp()
    check_inputs(error, params, batch((4,), (3,), examples=5), batch_size=batch_size)
    check_inputs(error, params, batch((4,), (3,), examples=5), argnums=(1, 2), batch_size=np.int64(batch_size))


def test_saturated_inputs_have_their_closed_form():
    def error(p, x):
        return jnp.sum(jnp.tanh(x)) + p * jnp.sum(jax.nn.sigmoid(x))

    for dtype, tolerance in ((jnp.float64, 1e-12), (jnp.float32, 1e-5)):
        x = jnp.array([[40.0, -40.0, 3.0]], dtype)
        y = np.array([40.0, -40.0, 3.0])
        a = np.abs(y)
        tanh2 = -np.sign(y) * 8 * np.exp(-2 * a) * (1 - np.exp(-2 * a)) / (1 + np.exp(-2 * a)) ** 3
        sigmoid2 = -np.sign(y) * np.exp(-a) * (1 - np.exp(-a)) / (1 + np.exp(-a)) ** 3
        found = jaxhess.hessian(error, argnums=1)(jnp.zeros((), dtype), x)
        np.testing.assert_allclose(np.diagonal(found[0]), tanh2, rtol=tolerance)
        both = jaxhess.hessian(error, argnums=1)(jnp.ones((), dtype), x)
        np.testing.assert_allclose(np.diagonal(both[0]), tanh2 + sigmoid2, rtol=tolerance)
        np.testing.assert_allclose(
            jaxhess.laplacian(error)(jnp.ones((), dtype), x[:, :1])[0], (tanh2 + sigmoid2)[0], rtol=tolerance
        )


def test_saturated_inputs_through_a_loop():
    def error(p, x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x, None, length=1)
        return jnp.sum(p * y)

    found = jaxhess.hessian(error, argnums=1)(jnp.ones(()), jnp.array([[20.0]]))
    e = np.exp(-40.0)
    np.testing.assert_allclose(found, np.full((1, 1, 1), -8 * e * (1 - e) / (1 + e) ** 3), rtol=1e-12)


# ---- activations


def check_taps(error, params, data, shapes, **options):
    """`error(params, *example, tap)` calls tap(name, y)."""

    def tapped(params, *example):
        return error(params, *example, jaxhess.tap)

    def probed(added, params, *example):
        return error(params, *example, lambda name, y: y + added[name] if name in added else y)

    expected = {}
    for name, shape in shapes.items():
        zero = {name: jnp.zeros(shape)}
        H = jax.jit(jax.vmap(jax.hessian(probed), (None, None, *(0 for _ in data))))(zero, params, *data)
        expected[name] = H[name][name]
    found = jaxhess.hessian(tapped, taps=tuple(shapes), **options)(params, *data)
    assert_trees_close(found, expected)
    traces = {
        name: jnp.trace(h.reshape(len(h), size, size), axis1=1, axis2=2)
        for name, h in expected.items()
        for size in [int(np.prod(shapes[name]))]
    }
    assert_trees_close(jaxhess.laplacian(tapped, taps=tuple(shapes), **options)(params, *data), traces)
    name = min(shapes)
    assert_trees_close(jaxhess.hessian(tapped, taps=name, **options)(params, *data), expected[name])
    assert_trees_close(jaxhess.laplacian(tapped, taps=name, **options)(params, *data), traces[name])
    return tapped


def deep(p, x, t, tap):
    y = tap("y", p["w"] @ x)
    h = tap("h", jnp.tanh(y))
    z = tap("z", p["v"] @ h + h[:3] * tap("gate", jax.nn.sigmoid(p["u"] @ x)))
    scalar = tap("scalar", jnp.sum(z**3))
    return jnp.sum((z - t) ** 2) * jnp.exp(scalar) + jnp.sum(y**2)


DEEP = {"w": normal(0, 6, 4), "v": normal(1, 3, 6), "u": normal(2, 3, 4)}


@pytest.mark.parametrize("batch_size", [None, 3])
def test_taps_of_preactivations_activations_and_scalars(batch_size):
    shapes = {"y": (6,), "h": (6,), "z": (3,), "gate": (3,), "scalar": ()}
    tapped = check_taps(deep, DEEP, batch((4,), (3,)), shapes, batch_size=batch_size)
    assert jaxhess.hessian(tapped, taps="scalar")(DEEP, *batch((4,), (3,))).shape == (EXAMPLES,)


def test_a_tap_is_the_paper_s_q():
    """At a pre-activation, the curvature is the factor Q that the weight's Hessian is stored as."""

    def error(p, x, t):
        return jnp.sum((p["v"] @ jnp.tanh(jaxhess.tap("y", p["w"] @ x)) - t) ** 2)

    params, data = {"w": normal(0, 6, 4), "v": normal(1, 3, 6)}, batch((4,), (3,))
    assert_trees_close(
        jaxhess.hessian(error, taps="y")(params, *data), jaxhess.hessian(error)(params, *data)["w"].Q, 1e-14
    )  # fmt: skip


def test_taps_in_vmapped_code_have_the_shape_of_all_of_it():
    def error(p, x, t, tap):
        rows = jax.vmap(lambda row: jax.nn.softplus(p["w"] @ row))(x)
        y = tap("rows", rows)
        return jnp.sum(jax.nn.softmax(y @ y.T) ** 2) * t[0]

    check_taps(error, {"w": normal(0, 3, 2)}, batch((4, 2), (1,)), {"rows": (4, 3)})

    def inside(p, x, t):
        y = jax.vmap(lambda row: jaxhess.tap("rows", jax.nn.softplus(p["w"] @ row)))(x)
        return jnp.sum(jax.nn.softmax(y @ y.T) ** 2) * t[0]

    data, params = batch((4, 2), (1,)), {"w": normal(0, 3, 2)}
    outside = functools.partial(error, tap=jaxhess.tap)
    assert_trees_close(
        jaxhess.hessian(inside, taps="rows")(params, *data),
        jaxhess.hessian(lambda *args: outside(*args), taps="rows")(params, *data),
        1e-14,
    )


@pytest.mark.parametrize("transformation", [jax.checkpoint, jax.jit, lambda f: jax.checkpoint(jax.jit(f))])
def test_taps_within_calls(transformation):
    def error(p, x, t, tap):
        h = transformation(lambda x: tap("h", jnp.sin(p["w"] @ x)))(x)
        return jnp.sum((h**2 - t) ** 2)

    check_taps(error, {"w": normal(0, 3, 4)}, batch((4,), (3,)), {"h": (3,)})


def test_taps_of_attention_and_of_parameters():
    def error(p, x, t, tap):
        q, k, v = (jnp.einsum("tn,hnk->htk", x, tap(name, p[name])) for name in "qkv")
        scores = tap("scores", jnp.einsum("htk,hsk->hts", q, k))
        weights = tap("weights", jax.nn.softmax(scores))
        return jnp.sum((tap("out", jnp.einsum("hts,hsk->thk", weights, v)) - t) ** 4)

    params = {name: normal(n, 2, 3, 2) for n, name in enumerate("qkv")}
    shapes = {"scores": (2, 4, 4), "weights": (2, 4, 4), "out": (4, 2, 2), "k": (2, 3, 2)}
    check_taps(error, params, batch((4, 3), (4, 2, 2)), shapes)


def test_taps_before_and_after_a_loop():
    def error(p, x, t, tap):
        start = tap("start", p["w"] @ x)
        last, states = jax.lax.scan(lambda h, _: (jnp.tanh(p["u"] @ h), h), start, None, length=4)
        return jnp.sum(tap("states", states) ** 3) + jnp.sum(tap("last", last) * t) ** 2

    params = {"w": normal(0, 3, 4), "u": normal(1, 3, 3)}
    check_taps(error, params, batch((4,), (3,)), {"states": (4, 3), "start": (3,), "last": (3,)}, batch_size=3)


def test_a_tap_without_influence_has_zeros():
    def error(p, x):
        jaxhess.tap("unused", jnp.outer(x, x))
        stopped = jax.lax.stop_gradient(jaxhess.tap("stopped", x[0]))
        return jnp.sum(jaxhess.tap("linear", p * x)) * stopped

    found = jaxhess.hessian(error, taps=("unused", "stopped", "linear"))(jnp.ones(3), *batch((3,)))
    assert {name: h.shape for name, h in found.items()} == {
        "unused": (EXAMPLES, 3, 3, 3, 3), "stopped": (EXAMPLES,), "linear": (EXAMPLES, 3, 3)
    }  # fmt: skip
    assert not any(np.any(h) for h in found.values())
    assert_trees_close(jaxhess.laplacian(error, taps="unused")(jnp.ones(3), *batch((3,))), jnp.zeros(EXAMPLES))


def test_without_a_batch_there_is_one_example():
    def error(p):
        return jnp.sum(jaxhess.tap("y", p["w"] @ p["x"]) ** 2)

    found = jaxhess.hessian(error, taps="y")({"w": normal(0, 3, 4), "x": normal(1, 4)})
    assert_trees_close(found, 2 * jnp.eye(3)[None])


def test_names_given_by_jax_and_pytrees_are_taps():
    def error(p, x):
        pair = jaxhess.tap("pair", {"a": p * x, "b": (x**2,)})
        return jnp.sum(checkpoint_name(pair["a"], "theirs") ** 2 * pair["b"][0])

    (x,) = batch((3,))
    found = jaxhess.hessian(error, taps=("theirs", "pair['a']", "pair['b'][0]"))(jnp.ones(3), x)
    expected = jax.vmap(lambda x: jnp.diag(2 * x**2))(x)
    assert_trees_close(found, {"theirs": expected, "pair['a']": expected, "pair['b'][0]": jnp.zeros_like(expected)})


def test_a_tap_is_the_identity_under_every_transformation():
    def f(x):
        return jnp.sum(jnp.sin(jaxhess.tap("y", x)) ** 2)

    def plain(x):
        return jnp.sum(jnp.sin(x) ** 2)

    x = normal(0, 3)
    for transform in (jax.grad, jax.jacfwd, jax.hessian, jax.jit, jax.checkpoint, lambda f: jax.grad(jax.checkpoint(f))):
        assert_trees_close(transform(f)(x), transform(plain)(x), 0)
    assert_trees_close(jax.vmap(f)(x[:, None]), jax.vmap(plain)(x[:, None]), 0)
    assert jaxhess.tap("y", np.ones(2)).shape == (2,)


@pytest.mark.parametrize("loop", [False, True])
def test_the_parameters_hessian_does_not_see_taps(loop):
    def error(tap, p, x, t):
        w = tap("weight", p["w"].T)
        h = tap("h", jnp.tanh(tap("y", x @ w) + tap("bias", p["b"])))
        if loop:
            h, _ = jax.lax.scan(lambda h, _: (tap("state", jnp.tanh(p["u"] @ h)), None), h, None, length=3)
        return jnp.sum((tap("z", tap("u", p["u"]) @ h) - t) ** 2)

    params, data = {"w": normal(0, 3, 4), "b": normal(1, 3), "u": normal(2, 3, 3)}, batch((4,), (3,))
    plain = jaxhess.value_grad_and_hessian(functools.partial(error, lambda name, y: y))(params, *data)
    tapped = jaxhess.value_grad_and_hessian(functools.partial(error, jaxhess.tap))(params, *data)
    for path in "wbu":
        assert type(tapped[2][path]) is type(plain[2][path])
    assert_trees_close(
        (tapped[0], tapped[1], tapped[2].diagonal(), tapped[2].as_matrix()),
        (plain[0], plain[1], plain[2].diagonal(), plain[2].as_matrix()),
        1e-14,
    )


# ---- what users of JAX expect of a transformation


def potential(p, x):
    return p["v"] @ jnp.tanh(p["w"] @ x + p["b"])


FIELD = {"w": normal(0, 5, 3), "b": normal(1, 5), "v": normal(2, 5)}


def residual(laplacian):
    return lambda p, xs: jnp.mean((laplacian(p, xs) - jnp.sum(xs**2, axis=1)) ** 2)


BY_JAX = jax.vmap(lambda p, x: jnp.trace(jax.hessian(potential, argnums=1)(p, x)), (None, 0))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_laplacian_in_a_loss_can_be_differentiated(batch_size):
    (xs,) = batch((3,))
    ours, theirs = residual(jaxhess.laplacian(potential, batch_size=batch_size)), residual(BY_JAX)
    for argnum in (0, 1):
        expected = jax.jit(jax.value_and_grad(theirs, argnum))(FIELD, xs)
        assert_trees_close(jax.jit(jax.value_and_grad(ours, argnum))(FIELD, xs), expected)
        assert_trees_close(jax.value_and_grad(ours, argnum)(FIELD, xs), expected)
    assert_trees_close(jax.jit(jax.hessian(ours))(FIELD, xs), jax.jit(jax.hessian(theirs))(FIELD, xs))


def test_the_laplacian_through_a_loop_can_be_differentiated():
    def deep(p, x):
        y, _ = jax.lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, p["layers"])
        return jnp.sum(y**3)

    params, (xs,) = {"layers": normal(0, 4, 3, 3)}, batch((3,))
    theirs = residual(jax.vmap(lambda p, x: jnp.trace(jax.hessian(deep, argnums=1)(p, x)), (None, 0)))
    expected = jax.jit(jax.value_and_grad(theirs))(params, xs)
    assert_trees_close(jax.jit(jax.value_and_grad(residual(jaxhess.laplacian(deep))))(params, xs), expected)


def test_the_hessian_of_a_loss_that_contains_the_laplacian():
    def error(p, x):
        return (jaxhess.laplacian(potential)(p, x[None])[0] - jnp.sum(x)) ** 2

    def plain(p, x):
        return (jnp.trace(jax.hessian(potential, argnums=1)(p, x)) - jnp.sum(x)) ** 2

    (xs,) = batch((3,))
    found = jaxhess.hessian(error)(FIELD, xs)
    expected = jaxhess.hessian(plain)(FIELD, xs)
    for name in FIELD:
        assert_trees_close(found[name].as_matrix(), expected[name].as_matrix())


def test_under_jit_and_vmap():
    (xs,) = batch((3,))
    H = jaxhess.hessian(potential, argnums=1)
    expected = by_autodiff(potential, FIELD, (xs,))
    assert_trees_close(jax.jit(H)(FIELD, xs), expected)
    assert_trees_close(jax.vmap(H, (None, 0))(FIELD, xs[:, None])[:, 0], expected)
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), FIELD)
    found = jax.vmap(jaxhess.laplacian(potential), (0, None))(stacked, xs)
    assert_trees_close(found[1], jax.vmap(BY_JAX, (0, None))(stacked, xs)[1])


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-6)])
def test_narrow_arrays_are_computed_in_float32(dtype, tolerance):
    error, params = mlp()
    params, data = jax.tree.map(lambda a: a.astype(dtype), (params, batch((4,), (3,))))
    wide = jax.tree.map(lambda a: a.astype(jnp.float64), (params, data))
    found = jaxhess.hessian(error, argnums=(1, 2))(params, *data)
    assert all(h.dtype == jnp.float32 for h in jax.tree.leaves(found))
    assert_trees_close(found, by_autodiff(error, *wide, argnums=(1, 2)), tolerance)
    trace = jaxhess.laplacian(error)(params, *data)
    assert trace.dtype == jnp.float32
    expected = jnp.trace(by_autodiff(error, *wide), axis1=1, axis2=2)
    assert_trees_close(trace, expected, 5 * tolerance)


def test_no_second_compilation():
    traces = []

    def error(p, x):
        traces.append(None)
        return jnp.sum(jnp.sin(jaxhess.tap("y", p @ x)))

    calls = (
        jaxhess.hessian(error, argnums=1),
        jaxhess.hessian(error, taps="y"),
        jaxhess.laplacian(error),
        jaxhess.laplacian(error, taps=("y",), batch_size=3),
    )
    for call in calls:
        outer = jax.jit(call)
        for seed in range(2):
            assert_trees_close(outer(normal(seed, 2, 3), normal(2, 5, 3)), call(normal(seed, 2, 3), normal(2, 5, 3)))
        assert outer._cache_size() == 1
    first = len(traces)
    for call in (*calls, jaxhess.hessian(error, taps="y")):
        call(normal(3, 2, 3), normal(4, 5, 3))
    assert len(traces) == first


def test_an_error_that_is_not_a_number_has_no_curvature():
    found = jaxhess.hessian(lambda p, x: jnp.sum((p * x) ** 2), argnums=1)(1.0, jnp.array([[jnp.nan, 1.0], [1.0, 2.0]]))
    assert np.all(np.isnan(found[0]))
    assert_trees_close(found[1], 2 * jnp.eye(2))


# ---- errors


def refused(message, function, error=InputError):
    with pytest.raises(error, match=message):
        function()


def test_what_is_no_argument_is_refused():
    error, params = mlp()
    data = batch((4,), (3,))
    for argnums in (True, "1", 1.5, (), (1, True), None):
        refused("argnums must be", lambda argnums=argnums: jaxhess.hessian(error, argnums=argnums))
    for argnums in (3, -4, (1, 7)):
        refused(
            "called with 3 arguments", lambda argnums=argnums: jaxhess.hessian(error, argnums=argnums)(params, *data)
        )  # fmt: skip
    for argnums in ((0, 1), (0,), -3):
        refused("has params", lambda argnums=argnums: jaxhess.hessian(error, argnums=argnums)(params, *data))
    refused("has params", lambda: jaxhess.laplacian(error, argnums=0)(params, *data))
    refused("names an argument twice", lambda: jaxhess.hessian(error, argnums=(1, -2))(params, *data))
    refused("exclude each other", lambda: jaxhess.hessian(error, argnums=1, taps="y"))
    refused("exclude each other", lambda: jaxhess.laplacian(error, argnums=1, taps="y"))
    refused("batch_size", lambda: jaxhess.hessian(error, argnums=1, batch_size=0))
    refused("batch_size", lambda: jaxhess.laplacian(error, batch_size=True))
    refused("fun must be a function", lambda: jaxhess.laplacian(3))


def test_arguments_without_curvature_are_refused_by_name():
    def error(p, x, example):
        return jnp.sum(p * x) * example["scale"] + example["label"]

    data = (normal(0, 5, 3), {"scale": normal(1, 5), "label": jnp.arange(5)})
    refused(r"Argument 2 of error, \['label'\], has dtype int", lambda: jaxhess.hessian(error, argnums=2)(1.0, *data))
    refused(r"Argument 1 of error has dtype complex", lambda: jaxhess.hessian(error, argnums=1)(1.0, data[0] + 0j, data[1]))
    refused(
        "Argument 2 of <lambda> holds no arrays", lambda: jaxhess.hessian(lambda p, x, t: p, argnums=2)(1.0, data[0], ())
    )
    refused("leading axis", lambda: jaxhess.laplacian(error)(1.0, data[0], {"scale": normal(1, 4), "label": jnp.arange(5)}))
    refused("not an array", lambda: jaxhess.laplacian(error)({"f": jnp.tanh}, *data))
    refused("a scalar", lambda: jaxhess.laplacian(lambda p, x: x)(1.0, data[0]))


def test_taps_that_are_not_there_are_refused():
    error = functools.partial(deep, tap=jaxhess.tap)
    data = batch((4,), (3,))
    refused(
        "no tap 'q'; there is 'gate', 'h', 'scalar', 'y', 'z'",
        lambda: jaxhess.hessian(lambda *a: error(*a), taps=("y", "q"))(DEEP, *data),
    )
    refused("nothing is tapped", lambda: jaxhess.laplacian(mlp()[0], taps="q")(mlp()[1], *data))
    for taps in ((), 3, ("y", 3)):
        refused("taps must be", lambda taps=taps: jaxhess.hessian(lambda *a: error(*a), taps=taps))


def test_names_that_are_not_unique_are_refused():
    def twice(p, x):
        return jnp.sum(jaxhess.tap("h", jnp.sin(jaxhess.tap("h", p * x))))

    refused("tapped 2 times, at .*test_targets.py", lambda: jaxhess.hessian(twice, taps="h")(1.0, *batch((3,))))

    def unused(p, x):
        jaxhess.tap("h", x), jaxhess.tap("h", p)
        return jnp.sum(x)

    refused("tapped 2 times", lambda: jaxhess.hessian(unused, taps="h")(1.0, *batch((3,))))


@jax.custom_jvp
def square(x):
    return jaxhess.tap("inside", x**2)


square.defjvp(lambda p, t: (square(*p), 2 * p[0] * t[0]))


def test_taps_inside_of_loops_and_branches_are_refused():
    error, params = rnn()
    data = batch((5, 2), (2,))
    assert jaxhess.hessian(error, taps="states")(params, *data).shape == (EXAMPLES, 5, 3, 5, 3)

    def tapped(p, *example):
        return error({**p, "tapped": True}, *example)

    refused("inside of a scan", lambda: jaxhess.hessian(tapped, taps="state")(params, *data))

    def invariant(p, x):
        step = lambda h, _: (h * jaxhess.tap("same", jnp.sin(p)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(step, x, None, length=3)[0])

    refused("inside of a scan", lambda: jaxhess.hessian(invariant, taps="same")(1.0, *batch((3,))))

    def branching(p, x):
        return jnp.sum(jax.lax.cond(x[0] > 0, lambda x: jaxhess.tap("branch", p * x), jnp.sin, x))

    refused("inside of a cond", lambda: jaxhess.hessian(branching, taps="branch")(1.0, *batch((3,))))
    refused(
        "inside of a custom_jvp_call",
        lambda: jaxhess.hessian(lambda p, x: jnp.sum(square(p * x)), taps="inside")(1.0, *batch((3,))),
    )

    def unused(p, x):
        jax.lax.scan(lambda c, v: (jaxhess.tap("dead", c + v), None), 0.0, x)
        return jnp.sum(p * x)

    refused("inside of a scan", lambda: jaxhess.hessian(unused, taps="dead")(1.0, *batch((3,))))


def test_taps_of_integers_are_refused():
    def error(p, x):
        return jnp.sum(p * x)[None][jaxhess.tap("index", jnp.argmin(x) * 0)]

    refused("'index' is of an array int", lambda: jaxhess.hessian(error, taps="index")(1.0, *batch((3,))))


def test_what_is_no_array_cannot_be_tapped():
    refused("only arrays", lambda: jaxhess.tap("y", 3.0))
    refused(r"'y\[0\]'", lambda: jaxhess.tap("y", ["text"]))
    refused("holds no arrays", lambda: jaxhess.tap("y", None))
    refused("name of a tap", lambda: jaxhess.tap("", jnp.ones(2)))
    refused("name of a tap", lambda: jaxhess.tap(jnp.ones(2), "y"))


def test_what_cannot_be_differentiated_is_refused():
    @jax.custom_vjp
    def straight_through(x):
        return jnp.round(x)

    straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))

    def quantised(p, x):
        return jnp.sum((p * jaxhess.tap("after", straight_through(jaxhess.tap("before", x)))) ** 2)

    refused(
        "not the derivative of its value", lambda: jaxhess.hessian(quantised, argnums=1)(1.0, *batch((3,))),
        UnsupportedOperationError,
    )  # fmt: skip
    refused(
        "not the derivative of its value", lambda: jaxhess.laplacian(quantised, taps="before")(1.0, *batch((3,))),
        UnsupportedOperationError,
    )  # fmt: skip
    # Nothing is differentiated upstream of a tap.
    assert_trees_close(
        jaxhess.hessian(quantised, taps="after")(2.0, *batch((3,))), jnp.tile(8 * jnp.eye(3), (EXAMPLES, 1, 1))
    )

    def unknown_length(p, x):
        return jax.lax.while_loop(lambda c: c < 10.0, lambda c: c * 2 * p, jnp.sum(x**2))

    refused(
        "while at .*test_targets.py", lambda: jaxhess.laplacian(unknown_length)(2.0, *batch((3,))), UnsupportedOperationError
    )

    @jax.custom_jvp
    def once(x):
        return jnp.sin(x)

    @once.defjvp
    def rule(primals, tangents):
        (x,) = primals
        return once(x), tangents[0] * jax.pure_callback(np.cos, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def in_a_loop(p, x):
        return jnp.sum(jax.lax.scan(lambda h, _: (jnp.tanh(h), None), p * x, None, length=2)[0]) + jnp.sum(once(x))

    for function in (lambda p, x: jnp.sum(once(p * x)), in_a_loop):
        for call in (jaxhess.hessian(function, argnums=1), jaxhess.laplacian(function)):
            refused(
                "custom_jvp_call at .*test_targets.py", lambda call=call: call(1.0, *batch((3,))), UnsupportedOperationError
            )


def test_curvature_that_does_not_fit_is_refused():
    x = jax.ShapeDtypeStruct((100, 10**6), jnp.float32)

    def error(p, x):
        return jnp.sum(jnp.sin(p * x)) ** 2

    call = jaxhess.hessian(error, argnums=1)
    refused("argument 1 of fun.*jaxhess.laplacian", lambda: jax.eval_shape(call, 1.0, x), DenseTooLargeError)
