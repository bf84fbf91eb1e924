"""Convolutions and lookups as contractions: against autodiff, in the structure that is claimed, at the value they had."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxprs import equations
from models import normal

import jaxhess
from jaxhess.engine.contractions import with_contractions
from jaxhess.engine.graph import evaluate, everything
from jaxhess.engine.plan import make_plan
from jaxhess.engine.trace import trace
from jaxhess.operators import ContractionOperator, Dense, KroneckerProductSum, LowRank, OperatorSum
from jaxhess.operators.cross import CrossBlock
from jaxhess.operators.implicit import ImplicitKroneckerSum
from jaxhess.operators.pullback import Pullback

TOLERANCE = 1e-10
EXAMPLES = 2


def assert_close(found, expected):
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * scale)


def check(error, params, batch, plain=None, **options):
    """Value, gradients, every block, its diagonal and its products against autodiff, of `plain` where that is the same
    function; returns the Hessian."""
    differentiated = error if plain is None else plain

    @jax.jit
    def ours(params, batch):
        value, gradient, H = jaxhess.value_grad_and_hessian(error, **options)(params, *batch)
        factors = jaxhess.factored_gradient(error, **options)(params, *batch)
        return value, gradient, factors, H, [b.as_matrix() for _, b in H.items()], H.diagonal(), H.mv(params)

    @jax.jit
    def reference(flat):
        def mean(flat):
            return jnp.mean(jax.vmap(lambda example: differentiated(unravel(flat), *example))(batch))

        return mean(flat), jax.grad(mean)(flat), jax.hessian(mean)(flat)

    flat, unravel = ravel_pytree(params)
    value, gradient, factors, H, matrices, diagonal, product = ours(params, batch)
    expected_value, expected_gradient, expected = jax.tree.map(np.asarray, reference(flat))
    dense = jax.tree.map(
        lambda g: g.as_matrix() if isinstance(g, LowRank) else g, factors, is_leaf=lambda g: isinstance(g, LowRank)
    )
    assert_close(value, expected_value)
    assert_close(ravel_pytree(gradient)[0], expected_gradient)
    assert_close(ravel_pytree(dense)[0], expected_gradient)
    blocks, offset = np.zeros_like(expected), 0
    for leaf, matrix in zip(jax.tree.leaves(params), matrices, strict=True):
        own = slice(offset, offset + leaf.size)
        assert_close(matrix, expected[own, own])
        blocks[own, own] = expected[own, own]
        offset += leaf.size
    assert np.abs(blocks).max() > 1e-3
    assert_close(ravel_pytree(diagonal)[0], np.diag(blocks))
    assert_close(ravel_pytree(product)[0], blocks @ np.asarray(flat))
    return H


def is_structured(block):
    parts = block.terms if isinstance(block, OperatorSum) else [block]
    known = (ContractionOperator, ImplicitKroneckerSum, KroneckerProductSum)
    return all(isinstance(part, known) for part in parts)


NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")
# Shapes of input and kernel, and options of the convolution.
CONVOLUTIONS = {
    "same": ((1, 4, 4, 2), (3, 3, 2, 3), {"dimension_numbers": NHWC, "padding": "SAME"}),
    "channels first": ((1, 2, 4, 5), (3, 2, 2, 3), {"dimension_numbers": NCHW, "padding": "VALID"}),
    "mixed layouts": ((1, 2, 4, 5), (2, 3, 2, 3), {"dimension_numbers": ("NCHW", "HWIO", "WHNC"), "padding": "VALID"}),
    "several images": ((2, 3, 3, 2), (2, 2, 2, 2), {"dimension_numbers": ("NHWC", "HWIO", "NCHW"), "padding": "SAME"}),
    "strides": ((1, 5, 6, 1), (3, 2, 1, 2), {"dimension_numbers": NHWC, "window_strides": (2, 3), "padding": "SAME"}),
    "explicit padding": ((1, 4, 4, 1), (2, 3, 1, 2), {"dimension_numbers": NHWC, "padding": [(2, 0), (0, 3)]}),
    "negative padding": ((1, 5, 6, 1), (2, 2, 1, 2), {"dimension_numbers": NHWC, "padding": [(-1, 1), (0, -2)]}),
    "dilated kernel": ((1, 6, 6, 1), (2, 3, 1, 2), {"dimension_numbers": NHWC, "rhs_dilation": (3, 2), "padding": "SAME"}),
    "dilated input": (
        (1, 3, 3, 2),
        (3, 2, 2, 1),
        {"dimension_numbers": NHWC, "lhs_dilation": (2, 3), "padding": [(1, -1), (2, 0)]},
    ),
    "everything at once": (
        (1, 4, 4, 2),
        (2, 3, 1, 4),
        {
            "dimension_numbers": NHWC, "lhs_dilation": (2, 1), "rhs_dilation": (1, 2), "window_strides": (2, 1),
            "padding": [(1, 2), (3, -1)], "feature_group_count": 2,
        },
    ),
    "depthwise": ((1, 4, 4, 3), (2, 2, 1, 3), {"dimension_numbers": NHWC, "padding": "SAME", "feature_group_count": 3}),
    "depthwise with multiplier": ((1, 2, 4, 4), (4, 1, 3, 3), {"padding": "VALID", "feature_group_count": 2}),
    "groups": ((1, 4, 3, 3), (6, 2, 2, 2), {"padding": "VALID", "feature_group_count": 2}),
    "groups of examples": ((4, 2, 3, 3), (6, 2, 2, 2), {"padding": "VALID", "batch_group_count": 2}),
    "patches side by side": ((1, 5, 4, 2), (2, 2, 2, 3), {"dimension_numbers": NHWC, "window_strides": (2, 2)}),
    "one by one": ((1, 3, 3, 2), (1, 1, 2, 3), {"dimension_numbers": NHWC}),
    "one by one, strided": ((1, 5, 4, 2), (1, 1, 2, 3), {"dimension_numbers": NHWC, "window_strides": (2, 2)}),
    "one place": ((1, 3, 3, 2), (3, 3, 2, 4), {"dimension_numbers": NHWC}),
    "one dimension": ((1, 7, 2), (3, 2, 3), {"dimension_numbers": ("NHC", "HIO", "NHC"), "padding": "SAME"}),
    "long kernel": ((1, 75, 1), (70, 1, 1), {"dimension_numbers": ("NHC", "HIO", "NHC"), "padding": [(3, 2)]}),
    "three dimensions": ((1, 3, 3, 2, 2), (2, 2, 2, 2, 2), {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}),
    "no dimension": ((2, 3), (4, 3), {}),
    "wider result": ((1, 4, 4, 2), (3, 3, 2, 3), {"dimension_numbers": NHWC, "preferred_element_type": jnp.float64}),
    "stated precision": ((1, 4, 4, 2), (3, 3, 2, 3), {"dimension_numbers": NHWC, "precision": lax.Precision.DEFAULT}),
}  # fmt: skip


def convolve(x, kernel, options):
    space = x.ndim - 2
    options = {"window_strides": (1,) * space, "padding": [(0, 0)] * space, **options}
    return lax.conv_general_dilated(x, kernel, **options)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_autodiff(name):
    shape, kernel, options = CONVOLUTIONS[name]

    def error(p, x):
        y = convolve(jnp.sin(p["before"] * x), p["kernel"], options)
        return jnp.sum(jnp.tanh(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    params = {"kernel": normal(0, *kernel), "before": 1 + normal(1, *shape)}
    H = check(error, params, (normal(2, EXAMPLES, *shape),))
    assert is_structured(H["kernel"])


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("on_itself", [False, True])
def test_the_value_stays_that_of_the_convolution(name, on_itself):
    """By the convolution itself, and by patches where these carry derivatives."""
    shape, kernel, options = CONVOLUTIONS[name]

    def error(p, x):
        return jnp.sum(convolve((1 + jnp.sum(p)) * x if on_itself else x, p, options) ** 2)

    p, x = normal(0, *kernel), normal(2, *shape)
    with jax.default_matmul_precision("highest"):
        graph = with_contractions(trace(error, p, (x,)), 1)
    names = [operation.name for operation in graph.operations]
    assert names.count("dot_general") == 1
    assert ("gather" in names) == on_itself
    assert "conv_general_dilated" not in names
    environment = {**graph.constants, **dict(zip(graph.inputs, (p, x), strict=True))}
    evaluate(graph.operations, environment)
    np.testing.assert_allclose(environment[graph.output], error(p, x), rtol=1e-12)
    for operation in graph.operations:
        for output in operation.outputs:
            assert graph.avals[output].shape == environment[output].shape
            assert graph.avals[output].dtype == environment[output].dtype


def bias(b):
    return b.reshape(1, 1, 1, -1)


def pooled(kind, x):
    window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return lax.reduce_window(x, -jnp.inf, lax.max, *window) if kind == "max" else lax.reduce_window(x, 0.0, lax.add, *window)


def same(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling_and_a_dense_layer_on_top(kind):
    def error(p, x, t):
        h = pooled(kind, jnp.tanh(same(x, p["c1"]) + bias(p["b1"])))
        h = jax.nn.silu(same(h, p["c2"]) + bias(p["b2"]))
        return jaxhess.losses.softmax_cross_entropy(p["w"] @ h.reshape(-1), t)

    params = {"c1": normal(0, 3, 3, 1, 2), "b1": normal(1, 2), "c2": normal(2, 2, 2, 2, 2), "b2": normal(3, 2)}
    params["w"] = normal(4, 3, 8)
    x, t = normal(5, 3, 1, 4, 4, 1), jax.nn.softmax(normal(6, 3, 3))
    H = check(error, params, (x, t))
    assert is_structured(H["c1"])
    assert is_structured(H["c2"])
    assert isinstance(H["w"], KroneckerProductSum)
    whole = jaxhess.value_grad_and_hessian(error)(params, x, t)
    parts = jaxhess.value_grad_and_hessian(error, batch_size=2)(params, x, t)
    chex.assert_trees_all_close(parts[:2], whole[:2], rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(parts[2].mv(params), whole[2].mv(params), rtol=1e-12, atol=1e-12)


def residual(p, x):
    h = same(x, p["stem"])
    h = h + same(jax.nn.softplus(same(h, p["a"])), p["b"])
    return jnp.sum(jnp.mean(jnp.tanh(h), axis=(0, 1, 2)) ** 2)


def shared(p, x):
    """The kernel's second use lies above its first."""
    return jnp.sum(jnp.tanh(same(jnp.tanh(same(x, p["k"])), p["k"]) * p["s"]))


def side_by_side(p, x):
    """Two uses of one kernel, neither above the other."""
    a, b = same(jnp.sin(p["s"] * x), p["k"]), same(jnp.cos(p["s"] * x), p["k"])
    return jnp.sum(jnp.tanh(a) * b)


def transposed(p, x):
    y = lax.conv_transpose(jnp.tanh(p["s"] * x), p["k"], (2, 1), "SAME", dimension_numbers=NHWC)
    return jnp.sum(jnp.tanh(y) ** 2)


def gradient_of_a_convolution(p, x):
    """The operation that autodiff makes of one: a transposed kernel."""
    y, pull = jax.vjp(lambda x: same(x, p["k"]), p["s"] * x)
    return jnp.sum(jnp.tanh(pull(jnp.sin(y))[0]))


NETS = {
    "residual": (residual, {"stem": (2, 2, 1, 2), "a": (2, 2, 2, 2), "b": (1, 2, 2, 2)}, (1, 3, 3, 1)),
    "shared": (shared, {"k": (2, 2, 2, 2), "s": ()}, (1, 3, 3, 2)),
    "side by side": (side_by_side, {"k": (2, 2, 2, 2), "s": ()}, (1, 3, 3, 2)),
    "transposed": (transposed, {"k": (2, 3, 2, 2), "s": ()}, (1, 3, 3, 2)),
    "gradient": (gradient_of_a_convolution, {"k": (2, 2, 2, 2), "s": ()}, (1, 3, 3, 2)),
}


@pytest.mark.parametrize("name", NETS)
def test_nets_equal_autodiff(name):
    error, shapes, x = NETS[name]
    params = {key: 0.8 + normal(n, *shape) for n, (key, shape) in enumerate(shapes.items())}
    H = check(error, params, (normal(9, EXAMPLES, *x),))
    for key, shape in shapes.items():
        flipped = name == "gradient" and key == "k"  # no rearrangement that keeps the axes apart
        assert isinstance(H[key], Pullback) if flipped else not shape or is_structured(H[key]), key


def test_a_normalised_kernel_is_pulled_back():
    def error(p, x):
        return jnp.sum(jnp.tanh(same(x, bias(p["g"]) * p["v"] / jnp.linalg.norm(p["v"].ravel()))))

    H = check(error, {"v": normal(0, 2, 2, 1, 2), "g": 1 + normal(1, 2)}, (normal(2, EXAMPLES, 1, 3, 3, 1),))
    assert isinstance(H["v"], Pullback)
    assert isinstance(H["g"], Pullback)


def test_a_scaled_and_transposed_kernel_keeps_its_structure():
    def error(p, x):
        return jnp.sum(jnp.tanh(same(x, p["k"].transpose(2, 3, 1, 0) / 2)))

    H = check(error, {"k": normal(0, 2, 1, 2, 2)}, (normal(2, EXAMPLES, 1, 3, 3, 1),))
    assert is_structured(H["k"])


def test_kernels_and_inputs_change_places():
    """Data as the kernel, the parameter as what it slides over."""

    def error(p, x):
        return jnp.sum(jnp.tanh(jnp.convolve(p["long"], x)) ** 2) + jnp.sum(jnp.sin(jnp.convolve(x, p["short"])))

    H = check(error, {"long": normal(0, 7), "short": normal(1, 2)}, (normal(2, EXAMPLES, 4),))
    assert isinstance(H["long"], Pullback)


def test_what_depends_on_no_data_or_only_on_data_stays():
    """A filtered parameter, and a kernel that a network makes of the data."""

    def error(p, x):
        y = same(p["image"], p["k"])
        made = jnp.tanh(p["w"] @ x).reshape(2, 2, 2, 1)
        return jnp.sum(jnp.sin(same(y * x[0], made)))

    params = {"image": normal(0, 1, 3, 3, 1), "k": normal(1, 2, 2, 1, 2), "w": normal(3, 8, 3)}
    H = check(error, params, (normal(2, EXAMPLES, 3),))
    assert isinstance(H["w"], KroneckerProductSum)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_kernel_in_a_scan(groups):
    def error(p, x):
        def step(h, part):
            y = lax.conv_general_dilated(h, p["k"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups)
            h = jnp.tanh(y + lax.conv_general_dilated(part, p["u"], (1,), "SAME", dimension_numbers=numbers))
            return h, jnp.sum(h**2)

        last, sums = lax.scan(step, jnp.zeros((1, 4, 2)), x)
        return jnp.sum(jnp.sin(last)) + jnp.sum(sums**2)

    numbers = ("NHC", "HIO", "NHC")
    params = {"k": normal(0, 3, 2 // groups, 2), "u": normal(1, 2, 1, 2)}
    x = normal(2, EXAMPLES, 3, 1, 4, 1)
    H = check(error, params, (x,))
    assert isinstance(H["k"], ImplicitKroneckerSum)
    plan = make_plan(trace(error, params, (x[0],)), 2)
    structured = [plan.graph.names[leaf.variable] for leaf in plan.leaves if leaf.structured]
    assert structured == (["params['k']", "params['u']"] if groups == 1 else ["params['u']"])


LOOKUPS = {
    "clipped": lambda e, i: jnp.take(e, i + 2, axis=0, mode="clip"),
    "wrapped": lambda e, i: jnp.take(e, i + 2, axis=0, mode="wrap"),
    "filled within bounds": lambda e, i: jnp.take(e, i, axis=0),
    "filled with a number": lambda e, i: e.at[i + 2].get(mode="fill", fill_value=0.7),
    "promised": lambda e, i: e.at[i].get(mode="promise_in_bounds"),
    "indexed": lambda e, i: e[i],
    "negative": lambda e, i: e[-1 - i],
    "clipped below": lambda e, i: e.at[i - 2].get(mode="clip", wrap_negative_indices=False),
    "small integers": lambda e, i: jnp.take(e, i.astype(jnp.int8), axis=0),
    "unsigned": lambda e, i: jnp.take(e, i.astype(jnp.uint8), axis=0, mode="clip"),
    "one": lambda e, i: e[i[1]],
    "one as a slice": lambda e, i: lax.dynamic_index_in_dim(e, i[0], keepdims=True) * 2,
    "one that is clamped": lambda e, i: lax.dynamic_slice(e, (i[0] + 9, i[1]), (1, 3)),
    "two axes of indices": lambda e, i: e[jnp.stack([i, i[::-1]])],
    "mapped": lambda e, i: jax.vmap(lambda k: e[k])(i),
    "columns": lambda e, i: e.T[:, i],
    "last axis": lambda e, i: jnp.take(e.reshape(2, 9, 2).transpose(0, 2, 1)[:, :, :6], i, axis=2),
    "both axes": lambda e, i: e[i, i[::-1] % 3],
    "an entry": lambda e, i: e[i[0], i[1] % 3],
    "a middle axis": lambda e, i: e.reshape(3, 4, 3)[:, i % 4],
    "reshaped": lambda e, i: e.reshape(6, 2, 3)[i],
    "filled partly": lambda e, i: jnp.nan_to_num(e.at[i, :].get(mode="fill", fill_value=0)),
}

# The same rows by indices that need no clamping, of which JAX 0.7.2 has the gradient wrong (zero).
WITHIN_BOUNDS = {"one that is clamped": lambda e, i: lax.dynamic_slice(e, (jnp.minimum(i[0] + 9, 5), 0), (1, 3))}


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_equal_autodiff(name):
    def error(p, i, x, lookup=LOOKUPS[name]):
        rows = lookup(p["e"], i)
        y = jnp.tanh(rows * p["s"]).reshape(-1)
        return jnp.sum(y) ** 2 + jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=y.dtype))) * x

    i = jnp.array([[0, 3, 3, 5], [4, 5, 1, 0], [2, 2, 2, 2]])
    params = {"e": normal(0, 6, 3) if name not in ("last axis", "a middle axis", "reshaped") else normal(0, 12, 3)}
    plain = functools.partial(error, lookup=WITHIN_BOUNDS[name]) if name in WITHIN_BOUNDS else None
    H = check(error, params | {"s": jnp.array(1.3)}, (i, normal(2, 3)), plain)
    if name == "last axis":  # sliced before: not a whole parameter
        assert isinstance(H["e"], Pullback)
    elif name in ("one", "one as a slice", "one that is clamped", "an entry"):
        assert isinstance(H["e"], KroneckerProductSum)
    else:
        assert is_structured(H["e"])


def test_rows_outside_of_the_table_give_nan_as_the_lookup_does():
    def error(e, i):
        return jnp.sum(jnp.tanh(jnp.take(e, i, axis=0)) ** 2)

    e = normal(0, 5, 2)
    value, gradient, H = jaxhess.value_grad_and_hessian(error)(e, jnp.array([[1, 5]]))
    assert jnp.isnan(value)
    assert jnp.isnan(gradient).any()
    assert jnp.isnan(H.as_matrix()).any()
    # What was not looked up does not matter, whatever it is.
    broken = e.at[3].set(jnp.nan)
    found = jaxhess.value_grad_and_hessian(error)(broken, jnp.array([[1, 2]]))
    expected = jaxhess.value_grad_and_hessian(error)(e, jnp.array([[1, 2]]))
    assert_close(found[0], expected[0])
    assert_close(found[2].as_matrix(), expected[2].as_matrix())


def test_a_tied_embedding_with_positions():
    """A masked language model: one table for the lookup and for the output, one for the places."""

    def error(p, ids, targets):
        h = p["e"][ids] + p["places"]
        scores = jax.nn.softmax((h @ p["q"]) @ h.T)
        h = h + jnp.tanh(scores @ h)
        return jnp.mean(jax.vmap(jaxhess.losses.softmax_cross_entropy)(h @ p["e"].T, jax.nn.one_hot(targets, 5)))

    params = {"e": normal(0, 5, 2), "places": normal(1, 3, 2), "q": normal(2, 2, 2)}
    ids = jnp.array([[0, 3, 3], [4, 4, 1]])
    H = check(error, params, (ids, (ids + 1) % 5))
    assert is_structured(H["e"])
    assert isinstance(H["places"], Dense)


def test_lookups_in_a_scan():
    """A decoder: the rows of its inputs, and of what it has chosen itself; a counter's rows stay as they were."""

    def error(p, ids):
        def step(carry, i):
            h, chosen, n = carry
            h = jnp.tanh(p["w"] @ h + p["e"][i] + p["e"][chosen] + p["layers"][n])
            scores = p["e"] @ h
            return (h, jnp.argmax(scores), n + 1), jax.nn.logsumexp(scores)

        return jnp.sum(lax.scan(step, (jnp.zeros(2), 0, 0), ids)[1] ** 2)

    params = {"e": normal(0, 4, 2), "w": normal(1, 2, 2), "layers": normal(2, 3, 2)}
    ids = jnp.array([[0, 3, 3], [1, 1, 2]])
    H = check(error, params, (ids,))
    assert isinstance(H["e"], ImplicitKroneckerSum)
    plan = make_plan(trace(error, params, (ids[0],)), 3)
    uses = [(plan.graph.names[leaf.variable], leaf.structured) for leaf in plan.leaves]
    assert sorted(uses) == [("params['e']", True)] * 3 + [("params['layers']", False), ("params['w']", True)]


def test_all_pairs_carry_derivatives():
    """For blocks between parameters, z of the one use may depend on the other's."""

    def error(p, x):
        return jnp.sum(same(jnp.tanh(same(x, p["a"])), p["b"]) ** 2)

    params = {"a": normal(0, 2, 2, 1, 2), "b": normal(1, 2, 2, 2, 1)}
    graph = trace(error, params, (normal(2, 1, 3, 3, 1),))
    for all_pairs, expected in ((False, []), (True, ["gather"])):
        names = [o.name for o in with_contractions(graph, 2, all_pairs=all_pairs).operations]
        assert [name for name in names if name == "gather"] == expected


def test_blocks_between_kernels_equal_autodiff():
    """S_jk of two convolutions, where their patches are explicit."""

    def error(p, x):
        h = lax.conv_general_dilated(x, p["a"], (1, 1), "VALID")
        h = lax.conv_general_dilated(jnp.tanh(h), p["one by one"], (1, 1), "VALID")
        return jnp.sum(jnp.tanh(lax.conv_general_dilated(jnp.sin(h), p["b"], (1, 1), "VALID")) ** 2)

    params = {"a": normal(0, 2, 2, 2, 2), "b": normal(1, 4, 2, 2, 2), "one by one": normal(2, 2, 2, 1, 1)}
    x = normal(3, EXAMPLES, 1, 2, 3, 3)
    flat, unravel = ravel_pytree(params)
    expected = jax.jit(jax.hessian(lambda flat: jnp.mean(jax.vmap(lambda x: error(unravel(flat), x))(x))))(flat)
    H = jaxhess.hessian(error, blocks="full")(params, x)
    ends = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(params))])
    assert isinstance(H["b"]["a"], CrossBlock)
    for n, row in enumerate(sorted(params)):
        for m, column in enumerate(sorted(params)):
            block = expected[ends[n] : ends[n + 1], ends[m] : ends[m + 1]]
            assert_close(H[row][column].as_matrix(), block)


def test_images_of_a_size_are_neither_refused_nor_slow_to_plan():
    """28 x 28 pixels and 16 channels: Q would have 12,544^2 entries for each example."""

    def error(p, x, t):
        h = pooled("max", jax.nn.relu(same(x, p["conv"]["kernel"]) + bias(p["conv"]["bias"])))
        h = pooled("max", jax.nn.relu(same(h, p["next"])))
        return jaxhess.losses.softmax_cross_entropy(p["w"] @ h.reshape(-1), t)

    params = {"conv": {"kernel": normal(0, 3, 3, 1, 16), "bias": normal(1, 16)}, "next": normal(2, 3, 3, 16, 8)}
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params | {"w": normal(3, 10, 392)})
    x, t = jnp.ones((32, 1, 28, 28, 1), jnp.float32), jnp.full((32, 10), 0.1, jnp.float32)

    def product(params, x, t):
        return jaxhess.hessian(error)(params, x, t)["conv"]["kernel"].mv(params["conv"]["kernel"])

    jaxpr = jax.make_jaxpr(product)(params, x, t)
    largest = max(v.aval.size for e in equations(jaxpr.jaxpr) for v in e.outvars)
    assert largest <= 9 * x.size * 16
    assert isinstance(jax.eval_shape(jaxhess.hessian(error), params, x, t)["w"], KroneckerProductSum)


def test_float32_asks_for_full_precision():
    def error(p, x):
        return jnp.sum(jnp.tanh(same(jnp.tanh(same(x, p)), p)))

    p, x = normal(0, 2, 2, 2, 2).astype(jnp.float32), normal(1, 3, 1, 3, 3, 2).astype(jnp.float32)
    jaxpr = jax.make_jaxpr(lambda p, x: jaxhess.hessian(error)(p, x).as_matrix())(p, x).jaxpr
    for equation in equations(jaxpr):
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            precision = equation.params["precision"]
            chosen = precision if isinstance(precision, tuple) else (precision,)
            assert set(chosen) == {lax.Precision.HIGHEST}, equation
    single = jaxhess.hessian(error)(p, x).as_matrix()
    double = jaxhess.hessian(error)(p.astype(jnp.float64), x.astype(jnp.float64)).as_matrix()
    np.testing.assert_allclose(single, double, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(double))))


def test_the_operations_tell_where_they_come_from():
    def error(p, x):
        return jnp.sum(same(x, p) ** 2)

    graph = with_contractions(trace(error, normal(0, 2, 2, 1, 2), (normal(1, 1, 3, 3, 1),)), 1)
    for operation in everything(graph.operations):
        assert "test_contractions.py" in operation.where
