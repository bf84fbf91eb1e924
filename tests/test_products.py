"""`hvp` and `linearized_hvp`: closed forms where autodiff is wrong, and what users of JAX expect of a transformation.

That they equal autodiff for every model of the registries is in test_full.py.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from graphs import GRAPHS
from jax.flatten_util import ravel_pytree
from models import MODELS, inputs, normal
from test_full import like, reference
from test_transforms import assert_close, bad_calls

import jaxhess
from jaxhess._typing import UnsupportedOperationError


def flat(tree):
    return ravel_pytree(tree)[0]


def every_way(error, params, vector, *batch):
    """The product by everything that gives one."""
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    return {
        "hvp": jaxhess.hvp(error)(params, vector, *batch),
        "chunks": jaxhess.hvp(error, batch_size=2)(params, vector, *batch),
        "linearised": jaxhess.linearized_hvp(error)(params, *batch)(vector),
        "full": H.mv(vector),
    }


@pytest.mark.parametrize("name", ["own_derivatives", "several_outputs_and_a_list", "unused_and_constant", "no_data_at_all"])
def test_all_ways_give_the_same_product(name):
    error, params, batch = MODELS[name]()
    vector, expected = like(params, 3), reference(error, params, batch)[1]
    for way, product in every_way(error, params, vector, *batch).items():
        assert jax.tree.structure(product) == jax.tree.structure(params), way
        assert_close(flat(product), expected @ flat(vector))


def sigmoid(y):
    return 1 / (1 + mpmath.exp(-y))


SATURATED = {
    "tanh": (jnp.tanh, mpmath.tanh),
    "sigmoid": (jax.nn.sigmoid, sigmoid),
    "silu": (jax.nn.silu, lambda y: y * sigmoid(y)),
    "own softplus": (jaxhess.activations.softplus, lambda y: mpmath.log1p(mpmath.exp(y))),
    "own silu": (jaxhess.activations.silu, lambda y: y * sigmoid(y)),
}


@pytest.mark.parametrize("name", SATURATED)
def test_saturated_units_keep_their_curvature(name):
    """f''(y) x^2 at |y| = 40, where autodiff of tanh gives 0; alone, and next to a unit that is not saturated."""
    f, exact = SATURATED[name]

    def error(w, x):
        return jnp.sum(f(w @ x))

    w, x = jnp.array([[20.0], [-20.0], [0.25]]), jnp.full((1, 1), 2.0)
    with mpmath.workdps(60):
        expected = np.array([[4 * float(mpmath.diff(exact, 2 * float(y), 2))] for y in w[:, 0]])
    found = every_way(error, w, jnp.ones_like(w), x)
    H = jaxhess.hessian(error, blocks="full")(w, x)
    found |= {"diagonal": jaxhess.hessian_diagonal(error)(w, x), "full diagonal": H.diagonal()}
    found |= {"matrix": jnp.diagonal(H.as_matrix())[:, None], "block": H.block(()).diagonal()}
    assert (expected != 0).all()
    for way, product in found.items():
        np.testing.assert_allclose(product, expected, rtol=1e-13, err_msg=way)


def test_saturated_units_below_others():
    """`d2E/dw2 = (v f''(y)) x^2` for `E = v f(w x)`: nothing is lost on the way down, in a loop neither."""

    def error(p, x):
        states = jax.lax.scan(lambda h, u: (jnp.tanh(p["w"] * u), jnp.tanh(p["w"] * u)), x, jnp.ones(3))[1]
        return jnp.sum(p["v"] * jnp.tanh(p["w"] * x)) + jnp.sum(states)

    params, x = {"w": jnp.array(40.0), "v": jnp.array(3.0)}, jnp.ones(1)
    curvature = float(-8 * mpmath.exp(-80) * (3 + 3))
    vector = {"w": jnp.array(1.0), "v": jnp.array(0.0)}
    for way, product in every_way(error, params, vector, x).items():
        np.testing.assert_allclose(product["w"], curvature, rtol=1e-12, err_msg=way)
        np.testing.assert_allclose(product["v"], float(4 * mpmath.exp(-80)), rtol=1e-12, err_msg=way)
    np.testing.assert_allclose(jaxhess.hessian_diagonal(error)(params, x)["w"], curvature, rtol=1e-12)


# --- transformations of JAX


def test_a_second_call_does_not_compile_again():
    error, params, batch = MODELS["perceptron"]()
    traces = []

    def counted(p, x, t):
        traces.append(1)
        return error(p, x, t)

    vector, counts = like(params), []
    for factor in (1.0, 2.0):
        moved = jax.tree.map(lambda p, factor=factor: factor * p, params)
        every_way(counted, moved, vector, *batch)
        jaxhess.hessian_diagonal(counted)(moved, *batch)
        jaxhess.hessian_trace(counted)(moved, *batch)
        counts.append(len(traces))
    assert counts[0] == counts[1]
    outer = jax.jit(chex.assert_max_traces(lambda p, v: jaxhess.hvp(error)(p, v, *batch), n=1))
    for _ in range(2):
        assert_close(flat(outer(params, vector)), flat(jaxhess.hvp(error)(params, vector, *batch)))


def test_a_linearised_product_goes_into_and_out_of_jit():
    error, params, batch = MODELS["perceptron"]()
    make = jax.jit(lambda p: jaxhess.linearized_hvp(error)(p, *batch))
    apply = jax.jit(chex.assert_max_traces(lambda product, vector: product(vector), n=1))
    vector = like(params)
    for factor in (1.0, -0.5):
        moved = jax.tree.map(lambda p, factor=factor: factor * p, params)
        expected = flat(jaxhess.hvp(error)(moved, vector, *batch))
        assert_close(flat(apply(make(moved), vector)), expected)
        assert_close(flat(make(moved)(vector)), expected)


def test_vmap_over_vectors_and_parameters():
    error, params, batch = MODELS["tied_weights"]()
    expected = reference(error, params, batch)[1]
    vectors = jax.tree.map(lambda p: jnp.stack([p, jnp.cos(p)]), params)
    rows = jax.vmap(flat)(vectors)
    product = jaxhess.linearized_hvp(error)(params, *batch)
    assert_close(jax.vmap(flat)(jax.vmap(product)(vectors)), rows @ expected)
    of_vector = functools.partial(jaxhess.hvp(error), params)
    assert_close(jax.vmap(flat)(jax.vmap(lambda v: of_vector(v, *batch))(vectors)), rows @ expected)
    single = jax.vmap(lambda p: flat(jaxhess.hvp(error)(p, params, *batch)))(vectors)
    member = jax.tree.map(lambda v: v[1], vectors)
    assert_close(single[1], flat(jaxhess.hvp(error)(member, params, *batch)))


def test_the_product_is_linear_and_its_transpose_itself():
    error, params, batch = GRAPHS["gated_cells_in_loops"]()
    product = jaxhess.linearized_hvp(error)(params, *batch)
    transposed = jax.linear_transpose(product, params)
    vector = like(params)
    assert_close(flat(transposed(vector)[0]), flat(product(vector)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_products_have_the_dtypes_of_the_parameters(dtype):
    error, params, batch = MODELS["perceptron"]()
    narrow = jax.tree.map(lambda p: p.astype(dtype), (params, batch))
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), narrow)
    expected = reference(error, *wide)[1]
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, int), params)
    vectors = [ones, *(jax.tree.map(lambda v, d=d: v.astype(d), ones) for d in (jnp.bfloat16, jnp.float32, jnp.float64))]
    product = jaxhess.linearized_hvp(error)(narrow[0], *narrow[1])
    tolerance = {2: 2e-2, 4: 1e-5, 8: 1e-10}[jnp.dtype(dtype).itemsize]
    for vector in vectors:
        for found in (product(vector), jaxhess.hvp(error)(narrow[0], vector, *narrow[1])):
            assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
            assert_close(flat(found).astype(jnp.float64), expected @ np.ones(len(expected)), tolerance)


@pytest.mark.parametrize("name", ["perceptron", "tied_weights"])
def test_nan_in_one_example(name):
    error, params, (x, t) = MODELS[name]()
    x = x.at[1, 2].set(jnp.nan)
    for way, product in every_way(error, params, like(params), x, t).items():
        assert np.isnan(flat(product)).all(), way
    assert np.isnan(jaxhess.hessian_trace(error)(params, x, t))


# --- what is refused


def transformations():
    """Each as a function of (error, params, batch)."""
    return {
        "hvp": lambda error, params, batch: jaxhess.hvp(error)(params, params, *batch),
        "linearised": lambda error, params, batch: jaxhess.linearized_hvp(error)(params, *batch)(params),
        "full": lambda error, params, batch: jaxhess.hessian(error, blocks="full")(params, *batch).as_matrix(),
        "diagonal": lambda error, params, batch: jaxhess.hessian_diagonal(error)(params, *batch),
        "trace": lambda error, params, batch: jaxhess.hessian_trace(error)(params, *batch),
    }


@pytest.mark.parametrize(
    ("error", "params", "batch", "words"), [p[1:] for p in bad_calls()], ids=[p[0] for p in bad_calls()]
)
@pytest.mark.parametrize("way", transformations())
def test_bad_input_is_refused(way, error, params, batch, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        transformations()[way](error, params, batch)
    for word in words:
        caught.match(word)


@pytest.mark.parametrize("way", [jaxhess.hvp, jaxhess.hessian_diagonal, jaxhess.hessian_trace])
@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_bad_sizes_of_chunks_are_refused(way, size):
    with pytest.raises(ValueError, match="batch_size"):
        way(jnp.sum, batch_size=size)


def unknown_length(w, x):
    return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(w @ y) / 3, x).sum()


def complex_parts(w, x):
    return jnp.sum(jnp.abs(jnp.fft.fft(w @ x)) ** 2)


def without_a_derivative(w, x):
    return jnp.sum(jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), x.dtype), w @ x, vmap_method="expand_dims"))


@jax.custom_vjp
def clipped(y):
    return y


clipped.defvjp(lambda y: (y, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def wrong_rule(w, x):
    return jnp.sum(clipped(w @ x) ** 3)


REFUSED = {
    unknown_length: "^while at {}.* cannot differentiate such a loop",
    complex_parts: "^convert_element_type at {} gives a complex",
    without_a_derivative: "exact curvature of pure_callback at {} could not be computed",
    wrong_rule: "^custom_vjp_call at {} has a derivative rule that is not the derivative",
}


@pytest.mark.parametrize("error", REFUSED, ids=lambda error: error.__name__)
@pytest.mark.parametrize("way", [*transformations(), "hessian"])
def test_what_has_no_curvature_is_refused_with_its_place(way, error):
    """The operation, and the file and line where it was written, as `hessian` says them."""
    apply = (transformations() | {"hessian": lambda error, params, batch: jaxhess.hessian(error)(params, *batch)})[way]
    place = rf".*test_products.py:\d+ \({error.__name__}\)"
    with pytest.raises(UnsupportedOperationError, match=REFUSED[error].format(place)):
        apply(error, jnp.ones((3, 3)), (jnp.ones((2, 3)),))


def test_functions_without_a_hash():
    class Model:
        __hash__ = None

        def __call__(self, w, x):
            return jnp.sum(jnp.tanh(w @ x) ** 2)

    w, (x, _) = normal(0, 2, 4), inputs()
    expected = reference(Model(), w, (x,))[1]
    for product in every_way(Model(), w, w, x).values():
        assert_close(flat(product), expected @ flat(w))
