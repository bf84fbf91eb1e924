"""The transformations against autodiff: every block of every model, and what users of JAX expect of a transformation."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jaxprs import equations
from models import MODELS, inputs, normal, with_nan

import jaxhess
from jaxhess.operators import Dense, Diagonal, ImplicitKroneckerSum, KroneckerProductSum, LowRank

TOLERANCE = 1e-10


def mean_error(error, batch):
    if not batch:
        return error
    return lambda params: jnp.mean(jax.vmap(lambda example: error(params, *example))(batch))


def assert_close(found, expected, tolerance=TOLERANCE):
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def readings(error, params, batch, **options):
    """Everything that is compared, in one compiled program."""

    @jax.jit
    def read(params, batch):
        value, gradient, H = jaxhess.value_grad_and_hessian(error, **options)(params, *batch)
        vector = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
        matrices = [block.as_matrix() for _, block in H.items()]
        factors = jaxhess.factored_gradient(error, **options)(params, *batch)
        dense = jax.tree.map(
            lambda g: g.as_matrix() if isinstance(g, LowRank) else g, factors, is_leaf=lambda g: isinstance(g, LowRank)
        )
        return value, gradient, dense, matrices, H.diagonal(), H.trace(), vector, H.mv(vector), H.frobenius_norm()

    return read(params, batch)


def check_everything(error, params, batch, **options):
    value, gradient, factored, matrices, diagonal, trace, vector, product, norm = readings(error, params, batch, **options)
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def reference(flat):
        mean = mean_error(error, batch)
        return jax.value_and_grad(lambda flat: mean(unravel(flat)))(flat), jax.hessian(lambda flat: mean(unravel(flat)))(
            flat
        )

    (expected_value, expected_gradient), expected = jax.tree.map(np.asarray, reference(flat))
    assert_close(value, expected_value)
    assert_close(ravel_pytree(gradient)[0], expected_gradient)
    assert_close(ravel_pytree(factored)[0], expected_gradient)
    offset, blocks = 0, np.zeros_like(expected)
    for leaf, matrix in zip(jax.tree.leaves(params), matrices, strict=True):
        own = slice(offset, offset + leaf.size)
        assert_close(matrix, expected[own, own])
        blocks[own, own] = expected[own, own]
        offset += leaf.size
    assert_close(ravel_pytree(diagonal)[0], np.diag(blocks))
    assert_close(trace, np.trace(blocks))
    assert_close(ravel_pytree(product)[0], blocks @ ravel_pytree(vector)[0])
    assert_close(norm, np.linalg.norm(blocks))


@pytest.mark.parametrize("name", MODELS)
def test_every_block_equals_autodiff(name):
    check_everything(*MODELS[name]())


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("perceptron", (1, 3, 4, 7)),
        ("tied_weights", (1, 3)),
        ("several_positions", (1, 3)),
        ("gates_and_layer_norm", (1, 3)),
    ],
)
def test_chunks_change_nothing(name, sizes):
    """Chunks of one, with a rest, of all examples and of more than there are; the last two are one program for any model."""
    error, params, batch = MODELS[name]()
    whole = jaxhess.value_grad_and_hessian(error)(params, *batch)
    for size in sizes:
        parts = jaxhess.value_grad_and_hessian(error, batch_size=size)(params, *batch)
        chex.assert_trees_all_close(parts, whole, rtol=1e-12, atol=1e-12)


ACTIVATIONS = ("identity", "tanh", "sigmoid", "softplus", "relu", "leaky_relu", "elu", "gelu", "gelu_tanh", "silu", "sin")
FOREIGN = (jnp.tanh, jax.nn.mish, jax.nn.softmax, lambda y: y * jnp.exp(-(y**2)), jnp.arctan, jax.nn.celu)
LOSSES = ("squared_error", "softmax_cross_entropy", "sigmoid_cross_entropy", "poisson", "gaussian", "huber")


@settings(max_examples=20)
@given(
    widths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    outputs=st.integers(1, 3),
    examples=st.integers(1, 6),
    activation=st.one_of(st.sampled_from(ACTIVATIONS), st.sampled_from(FOREIGN)),
    loss=st.sampled_from(LOSSES),
    own_layers=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_perceptrons_equal_autodiff(widths, outputs, examples, activation, loss, own_layers, seed):
    f = getattr(jaxhess.activations, activation) if isinstance(activation, str) else activation
    loss_of = getattr(jaxhess.losses, loss)
    sizes = [*widths, 2 * outputs]
    rng = np.random.default_rng(seed)
    params = [
        {"w": jnp.asarray(rng.normal(size=(m, n)) / np.sqrt(n)), "b": jnp.asarray(rng.normal(size=m))}
        for n, m in itertools.pairwise(sizes)
    ]
    x, t = (jnp.asarray(rng.normal(size=(examples, n))) for n in (sizes[0], sizes[-1]))
    if loss in ("softmax_cross_entropy", "sigmoid_cross_entropy"):
        t = jax.nn.softmax(t)
    if loss == "gaussian":
        t = t[:, :outputs]

    def error(params, x, t):
        for layer in params[:-1]:
            x = jaxhess.dense(layer["w"], layer["b"], x, f) if own_layers else f(layer["w"] @ x + layer["b"])
        z = params[-1]["w"] @ x + params[-1]["b"]
        return loss_of(z.reshape(2, outputs) if loss == "gaussian" else z, t)

    check_everything(error, params, (x, t))
    H = jax.eval_shape(jaxhess.hessian(error), params, x, t)
    assert all(isinstance(H[k]["w"], KroneckerProductSum) for k in range(len(params)))


def test_the_users_own_check_passes_and_fails():
    error, params, batch = MODELS["perceptron"]()
    report = jaxhess.test_util.check_hessian(error, params, *batch)
    assert [check.path for check in report.checks] == ["hidden/b", "hidden/w", "out/b", "out/w"]
    assert report.passed
    assert "KroneckerProductSum" in str(report)
    by_products = jaxhess.test_util.check_hessian(error, params, *batch, largest_dense=10)
    assert by_products.checks[1].compared == "4 products"
    assert jaxhess.test_util.check_gradient(error, params, *batch).passed
    with pytest.raises(AssertionError, match=r"hidden/w .* FAILED"):
        jaxhess.test_util.check_hessian(error, params, *batch, tolerance=-1.0)

    def shifted(p, x):
        return jnp.sum(jax.nn.softmax(p["w"] * x + p["shift"]) ** 2)  # which no shift changes: rounding on both sides

    assert jaxhess.test_util.check_hessian(shifted, {"w": normal(1, 5), "shift": jnp.array(0.3)}, normal(2, 8, 5)).passed


def test_structure_follows_the_layout():
    error, params, batch = MODELS["input_major_and_scaled"]()
    H = jaxhess.hessian(error)(params, *batch)
    assert isinstance(H["w1"], KroneckerProductSum)
    assert H["w1"].Q.shape == (4, 6, 6)
    assert H["w1"].Z.shape == (4, 4)
    assert H["w1"].in_structure().shape == (4, 6)
    G = jaxhess.factored_gradient(error)(params, *batch)
    assert isinstance(G["b1"], jax.Array)


def test_curvature_keeps_its_kind():
    """Zero, diagonal, dense: the narrowest that holds it, from the error down."""

    def error(p, x, t):
        h = jnp.tanh(p["w"] @ x + p["b"]) * p["scale"]
        return jaxhess.losses.squared_error(p["v"] @ h + p["c"], t) + jnp.sum(p["w"] ** 2) + jnp.sum(p["line"])

    params = {"w": normal(0, 5, 4), "b": normal(1, 5), "scale": normal(2, 5), "v": normal(3, 3, 5), "c": normal(4, 3)}
    params["line"] = normal(5, 2)
    H = jaxhess.hessian(error)(params, *inputs())
    assert isinstance(H["line"], Diagonal)
    assert not H["line"].values.any()
    assert isinstance(H["c"], Diagonal)
    assert isinstance(H["b"], Dense)
    assert [type(term) for term in H["w"].terms] == [Diagonal, KroneckerProductSum]
    check_everything(error, params, inputs())


def test_parameters_that_depend_on_no_data_run_once_for_the_batch():
    """Their operations come before the batch: their results have no axis of examples."""

    def error(p, x):
        return jnp.sum((jnp.linalg.inv(p) @ x) ** 2)

    jaxpr = jax.make_jaxpr(lambda p, x: jaxhess.hessian(error)(p, x))(3 * jnp.eye(4), jnp.ones((7, 4))).jaxpr
    shapes = [e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "lu"]
    assert shapes
    assert all(7 not in shape for shape in shapes)


def test_unit_axes_keep_the_kronecker_structure():
    def error(p, x, t):
        return jnp.sum((jnp.tanh(x[None, :] @ p["w"]) @ p["v"][None, :, None] - t[0]) ** 2)

    params = {"w": jnp.ones((4, 5)), "v": jnp.ones(5)}
    H = jaxhess.hessian(error)(params, jnp.ones((3, 4)), jnp.ones((3, 2)))
    assert isinstance(H["w"], KroneckerProductSum)
    assert jaxhess.test_util.check_hessian(error, params, jnp.ones((3, 4)), jnp.ones((3, 2))).passed


def test_works_inside_jit_without_compiling_again():
    error, params, batch = MODELS["perceptron"]()
    traces = []

    def counted(p, x, t):
        traces.append(1)
        return error(p, x, t)

    hessian = jaxhess.hessian(counted)
    hessian(params, *batch)
    first = len(traces)
    hessian(jax.tree.map(lambda p: p + 1, params), *batch)
    jaxhess.hessian(counted)(params, *batch)
    assert len(traces) == first
    outer = jax.jit(chex.assert_max_traces(lambda p, x, t: jaxhess.hessian(error)(p, x, t).trace(), n=1))
    for _ in range(2):
        assert_close(outer(params, *batch), hessian(params, *batch).trace())


def test_vmap_over_an_ensemble():
    error, params, batch = MODELS["tied_weights"]()
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    H = jax.vmap(lambda p: jaxhess.hessian(error)(p, *batch))(ensemble)
    dense = jax.vmap(lambda H: H.as_matrix())(H)
    for k, factor in enumerate((1, 2, -1)):
        member = jax.tree.map(lambda p, factor=factor: factor * p, params)
        assert_close(dense[k], jaxhess.hessian(error)(member, *batch).as_matrix())
    repr(H)


@pytest.mark.parametrize("name", ["perceptron", "tied_weights", pytest.param("derived_weights", marks=pytest.mark.slow)])
def test_derivatives_through_the_trace(name):
    error, params, batch = MODELS[name]()
    flat, unravel = ravel_pytree(params)
    mean = mean_error(error, batch)
    ours = jax.jit(jax.grad(lambda p: jaxhess.hessian(error)(p, *batch).trace()))(params)
    expected = jax.jit(jax.grad(lambda flat: jnp.trace(jax.hessian(lambda f: mean(unravel(f)))(flat))))(flat)
    assert_close(ravel_pytree(ours)[0], expected, 1e-9)


def test_narrow_parameters_are_computed_in_float32():
    error, params, batch = MODELS["perceptron"]()
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (params, batch))
    value, gradient, H = jaxhess.value_grad_and_hessian(error)(narrow[0], *narrow[1])
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), narrow)
    exact = jaxhess.hessian(error)(wide[0], *wide[1])
    assert value.dtype == jnp.float32
    assert gradient["hidden"]["w"].dtype == jnp.bfloat16
    assert H["hidden"]["w"].Q.dtype == jnp.float32
    assert_close(H.as_matrix(), exact.as_matrix(), 1e-5)


def test_float32_is_close_to_float64():
    error, params, batch = MODELS["gates_and_layer_norm"]()
    single = jax.tree.map(lambda p: p.astype(jnp.float32) if p.dtype == jnp.float64 else p, (params, batch))
    dense = jax.jit(lambda params, batch: jaxhess.hessian(error)(params, *batch).as_matrix())
    assert_close(dense(*single), dense(params, batch), 1e-5)


def test_products_ask_for_full_precision():
    error, params, batch = MODELS["attention"]()
    products = [
        e
        for e in equations(jax.make_jaxpr(lambda p: jaxhess.hessian(error)(p, *batch))(params).jaxpr)
        if e.primitive.name == "dot_general"
    ]
    assert len(products) > 10
    for equation in products:
        precision = equation.params["precision"]
        chosen = precision if isinstance(precision, tuple) else (precision,)
        assert set(chosen) == {jax.lax.Precision.HIGHEST}, equation


def test_saturated_units_keep_their_curvature():
    """Where JAX's own second derivative of tanh is 0 and the true one is not."""

    def error(w, x):
        return jnp.sum(jnp.tanh(w @ x))

    H = jaxhess.hessian(error)(jnp.full((1, 1), 25.0), jnp.ones((1, 1)))
    a = np.exp(-50.0)
    assert_close(H.as_matrix()[0, 0] / (-8 * a), 1.0)


def test_scaled_weights_keep_their_dtype():
    w, x = jnp.ones((3, 4), jnp.float32), jnp.ones((2, 4), jnp.float32)
    H = jaxhess.hessian(lambda w, x: jnp.sum(jnp.sin((-w / 3) @ x)))(w, x)
    assert H.as_matrix().dtype == jnp.float32


def test_unused_parameters_have_zero_blocks():
    error, params, batch = MODELS["unused_and_constant"]()
    H = jaxhess.hessian(error)(params, *batch)
    assert isinstance(H["unused"], Diagonal)
    assert not H["unused"].as_matrix().any()


@pytest.mark.parametrize("name", ["perceptron", "attention", "gates_and_layer_norm", "derived_weights"])
def test_nan_in_nan_out(name):
    error, params, batch = MODELS[name]()
    read = jax.jit(lambda H: {path: (block.trace(), block.inertia()) for path, block in H.items()})
    for where in ("parameter", "input"):
        broken = with_nan(params, batch, where)
        value, _, H = jaxhess.value_grad_and_hessian(error)(*broken)
        assert jnp.isnan(value), where
        for path, (trace, inertia) in read(H).items():
            assert jnp.isnan(trace), (where, path)
            assert set(map(int, inertia)) == {-1}, (where, path)


def bad_calls():
    error, params, (x, t) = MODELS["perceptron"]()
    far = jax.tree.map(lambda p: p, params)
    far["hidden"]["b"] = jnp.arange(6)
    yield "length", error, params, (x, t[:3]), [r"\[0\] has 4", r"\[1\] has 3"]
    yield "empty", error, params, (x[:0], t[:0]), ["empty", "0 examples"]
    yield "no axis", error, params, (x, 1.0), ["scalar", "leading axis"]
    yield "vector", lambda p, x, t: x, params, (x, t), [r"float64\[4\]", "scalar"]
    yield "integer", lambda p, x, t: jnp.argmax(x), params, (x, t), ["int", "floating-point"]
    yield "pair", lambda p, x, t: (x[0], t[0]), params, (x, t), ["scalar"]
    yield "integer parameter", error, far, (x, t), [r"\['hidden'\]\['b'\]", "int", r"\[6\]"]
    yield "no array", error, {"w": "text"}, (x, t), [r"\['w'\]", "str"]
    yield "nothing", error, {}, (x, t), ["no arrays"]


@pytest.mark.parametrize(
    ("error", "params", "batch", "words"), [p[1:] for p in bad_calls()], ids=[p[0] for p in bad_calls()]
)
@pytest.mark.parametrize("transformation", [jaxhess.hessian, jaxhess.value_grad_and_hessian, jaxhess.factored_gradient])
def test_bad_input_is_refused(transformation, error, params, batch, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        transformation(error)(params, *batch)
    for word in words:
        caught.match(word)


def test_shapes_that_dense_cannot_take_are_refused_with_the_parameters():
    params = {"hidden": {"w": jnp.ones((6, 5)), "b": jnp.ones(6)}}
    with pytest.raises(ValueError, match=r"(?s)last axis of inputs must be 5.*\(4,\).*params\['hidden'\]\['w'\] \(6, 5\)"):
        jaxhess.hessian(lambda p, x: jnp.sum(jaxhess.dense(p["hidden"]["w"], p["hidden"]["b"], x)))(params, jnp.ones((3, 4)))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="'off-diagonal'"):
        jaxhess.hessian(jnp.sum, blocks="off-diagonal")
    with pytest.raises(ValueError, match="batch_size"):
        jaxhess.hessian(jnp.sum, batch_size=0)


def test_what_has_no_derivative_is_refused_with_its_place():
    def error(w, x):
        return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(w @ y) / 3, x).sum()

    with pytest.raises(NotImplementedError, match=r"while at .*test_transforms.py:\d+ .*error\)"):
        jaxhess.hessian(error)(jnp.ones((3, 3)), jnp.ones((2, 3)))


def test_complex_intermediates_are_refused():
    def error(w, x):
        return jnp.sum(jnp.abs(jnp.fft.fft(w @ x)) ** 2)

    with pytest.raises(NotImplementedError, match=r"at .*test_transforms.py:\d+ .*complex"):
        jaxhess.hessian(error)(jnp.ones((3, 3)), jnp.ones((2, 3)))


def test_what_would_not_fit_is_refused_before_it_is_computed():
    params, x = {"scale": jnp.ones((3000, 3000))}, jnp.ones((2, 3000, 3000))
    with pytest.raises(MemoryError, match=r"(?s)params\['scale'\].*9000000 .*PiB"):
        jaxhess.hessian(lambda p, x: jnp.sum(jnp.tanh(p["scale"] * x)) ** 2)(params, x)


def test_dense_form_that_would_not_fit_is_refused():
    def error(w, x):
        return jnp.sum(jnp.tanh(w @ x))

    H = jaxhess.hessian(error)(jnp.ones((1024, 784)), jnp.ones((1, 784)))
    with pytest.raises(MemoryError, match=r"802816 x 802816.*TiB.*mv"):
        H.as_matrix()
    H = jaxhess.hessian(lambda p, x: error(p["hidden"]["w"], x))(
        {"hidden": {"w": jnp.ones((1024, 784))}}, jnp.ones((1, 784))
    )
    with pytest.raises(MemoryError, match=r"'hidden/w'.*802816 x 802816"):
        H.as_matrix()


@pytest.mark.parametrize("kind", ["reversed", "clipped", "straight through", "hard", "leaky", "mixing"])
@pytest.mark.parametrize("on_weight", [False, True])
def test_rules_that_are_not_derivatives_are_refused(kind, on_weight):
    """There `jax.hessian` is not symmetric: the error has no Hessian."""
    if kind == "mixing":

        @jax.custom_jvp
        def rule(x):
            return jnp.sin(x)

        rule.defjvp(lambda p, t: (jnp.sin(p[0]), jnp.cos(p[0]) * t[0] + 0.1 * jnp.sum(t[0])))
    else:

        @jax.custom_vjp
        def rule(x):
            return forward[kind](x)

        forward = {"straight through": jnp.round, "hard": lambda x: jnp.clip(x, -1, 1), "leaky": lambda x: jnp.maximum(x, 0)}
        forward |= dict.fromkeys(("reversed", "clipped"), lambda x: x)
        backward = dict.fromkeys(("straight through", "hard"), lambda x, g: g)
        backward |= {"reversed": lambda x, g: -g, "clipped": lambda x, g: jnp.clip(g, -0.1, 0.1)}
        backward |= {"leaky": lambda x, g: jnp.where(x > 0, g, 0.2 * g)}
        rule.defvjp(lambda x: (forward[kind](x), x), lambda x, g: (backward[kind](x, g),))

    def error(w, x):
        return jnp.sum((rule(w) @ x if on_weight else rule(w @ x)) ** 3)

    params, x = jnp.ones((3, 4)), jnp.ones((2, 4))
    with pytest.raises(NotImplementedError, match=r"at .*test_transforms.py:\d+ .*not the derivative of its value"):
        jaxhess.hessian(error)(params, x)
    if kind == "clipped":  # not linear: the mean of clipped gradients is not the clipped gradient of the mean
        return
    mean = mean_error(error, (x,))
    factors = jaxhess.factored_gradient(error)(params, x)
    assert_close(factors.as_matrix() if isinstance(factors, LowRank) else factors, jax.grad(mean)(params))


def test_a_batch_statistic_is_refused():
    with pytest.raises(ValueError, match=r"mixes the examples.*ONE example"):
        jaxhess.hessian(lambda w, x: jnp.sum(jax.lax.pmean(w @ x, "batch")))(jnp.ones((3, 4)), jnp.ones((2, 4)))


def test_computing_in_bfloat16_inside():
    def error(p, x, t, dtype):
        h = jnp.tanh((p["w"].astype(dtype) @ x.astype(dtype)).reshape(2, 2)[::-1].reshape(4))
        return jnp.sum(((p["v"].astype(dtype) @ h).astype(x.dtype) - t) ** 2)

    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in {"w": (4, 3), "v": (2, 4)}.items()}
    x, t = (jnp.asarray(rng.normal(size=(5, n)), jnp.float32) for n in (3, 2))
    found = jaxhess.hessian(functools.partial(error, dtype=jnp.bfloat16))(params, x, t)
    exact = jaxhess.hessian(functools.partial(error, dtype=jnp.float32))(params, x, t)
    assert found["w"].Q.dtype == jnp.float32
    assert_close(found.as_matrix(), exact.as_matrix(), 2e-2)


def test_curvature_that_would_not_fit_is_refused():
    def error(w, x):
        return jnp.sum(jnp.tanh(w @ x)) ** 2

    shapes = jax.ShapeDtypeStruct((200000, 2), jnp.float32), jax.ShapeDtypeStruct((3, 2), jnp.float32)
    with pytest.raises(MemoryError, match=r"reduce_sum at .*600000 x 200000"):
        jax.eval_shape(jaxhess.hessian(error), *shapes)


def test_large_parameters_of_other_operations_stay_implicit():
    def error(w, x):
        return jnp.sum(jax.lax.cond(x[0] > 0, lambda: jnp.tanh(w @ x), lambda: jnp.sin(w @ x)))

    w, x = normal(0, 130, 64), normal(1, 2, 64)
    H = jaxhess.hessian(error)(w, x)
    assert isinstance(H.block(()), ImplicitKroneckerSum)
    vector = normal(2, 130, 64)
    expected = jax.jvp(jax.grad(mean_error(error, (x,))), (w,), (vector,))[1]
    assert_close(H.mv(vector), expected)


@pytest.mark.parametrize("y", [-700.0, -40.0, -15.0, 0.0, 15.0, 40.0, 700.0])
@pytest.mark.parametrize(("function", "sign"), [(jax.nn.softplus, 1), (jax.nn.log_sigmoid, -1), (jnp.logaddexp, 1)])
def test_jaxs_own_softplus_where_it_saturates(function, sign, y):
    def error(w, x):
        return function(w * x, jnp.zeros(())) if function is jnp.logaddexp else function(w * x)

    exact = mpmath.exp(-abs(y)) / (1 + mpmath.exp(-abs(y))) ** 2
    found = jaxhess.hessian(error)(jnp.asarray(y), jnp.ones(1)).trace()
    np.testing.assert_allclose(float(found), sign * float(exact), rtol=1e-12)
    value, gradient, _ = jaxhess.value_grad_and_hessian(error)(jnp.asarray(y), jnp.ones(1))
    np.testing.assert_allclose(value, error(jnp.asarray(y), 1.0), rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(gradient, jax.grad(error)(jnp.asarray(y), 1.0), rtol=1e-12)


def test_logaddexp_of_two_parameters_and_of_infinities():
    def error(w, x):
        return jnp.sum(jnp.logaddexp(w[0] * x, w[1] * x**2))

    w, x = jnp.array([0.3, -0.4]), jnp.array([[1.0, -2.0, 3.0]])
    mean = mean_error(error, (x,))
    assert_close(jaxhess.hessian(error)(w, x).block(()).as_matrix(), jax.hessian(mean)(w))
    for pair in ((jnp.inf, 1.0), (-jnp.inf, 1.0), (-jnp.inf, -jnp.inf), (jnp.inf, -jnp.inf), (1.0, jnp.inf)):
        value, *_ = jaxhess.value_grad_and_hessian(lambda w, x: w * jnp.logaddexp(x[0], x[1]))(1.0, jnp.array([pair]))
        assert value == jnp.logaddexp(*pair)


def test_functions_without_a_hash():
    class Model:
        __hash__ = None

        def __call__(self, w, x):
            return jnp.sum(jnp.tanh(w @ x))

    assert jaxhess.hessian(Model())(jnp.ones((2, 3)), jnp.ones((4, 3))).in_structure().shape == (2, 3)
