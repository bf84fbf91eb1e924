"""`hessian(fun, blocks="full")` against autodiff, in the order of `ravel_pytree`: every block, whole, and how it is used."""

import functools
import itertools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from flax import nnx
from graphs import GRAPHS, OPERATIONS, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from models import MODELS, inputs, normal
from test_transforms import assert_close, mean_error

import jaxhess
from jaxhess._typing import InputError
from jaxhess.operators import CrossBlock, FullHessian, KroneckerCross, KroneckerProductSum

EVERY = MODELS | GRAPHS


def reference(error, params, batch):
    """Gradient and Hessian by autodiff."""
    flat, unravel = ravel_pytree(params)
    mean = mean_error(error, batch)

    @jax.jit
    def both(flat):
        return jax.grad(lambda f: mean(unravel(f)))(flat), jax.hessian(lambda f: mean(unravel(f)))(flat)

    return tuple(map(np.asarray, both(flat)))


def like(params, seed=0):
    """A vector for the parameters."""
    flat, unravel = ravel_pytree(params)
    return unravel(jnp.cos(seed + jnp.arange(flat.size, dtype=flat.dtype)))


def check_whole(error, params, batch, **options):
    """Dense form and products; the diagonal without its blocks too."""

    @jax.jit
    def read(params, vector, batch):
        value, gradient, H = jaxhess.value_grad_and_hessian(error, blocks="full", **options)(params, *batch)
        product = jaxhess.hvp(error, **options)(params, vector, *batch)
        diagonal = jaxhess.hessian_diagonal(error, **options)(params, *batch)
        return value, *(ravel_pytree(tree)[0] for tree in (gradient, H.mv(vector), product, diagonal)), H.as_matrix()

    vector = like(params)
    gradient, expected = reference(error, params, batch)
    assert np.isfinite(expected).all()
    value, found, mv, product, diagonal, matrix = read(params, vector, batch)
    assert_close(value, mean_error(error, batch)(params))
    assert_close(found, gradient)
    assert_close(matrix, expected)
    for array in (mv, product):
        assert_close(array, expected @ ravel_pytree(vector)[0])
    assert_close(diagonal, np.diag(expected))


SLOW = [
    "gated_cells_in_loops",
    "recurrent_stack",
    "transformer_block",
    "gates_and_layer_norm",
    "several_outputs_of_one_operation",
    "operations_without_a_rule",
    "reductions_and_decompositions",
    "branches_and_calls",
    "attention",
    "decompositions",
    "indexing",
    "slices_and_updates",
    "embedding_tied_to_the_output",
    "loops_over_empty_and_unequal_parts",
    "input_major_and_scaled",
    "derived_weights",
    "tied_weights",
    "weights_scaled_by_data",
    "reshaped_weights",
    "derivatives_inside",
    "normalised_adapted_and_masked_weights",
    "empty_parts",
]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in EVERY])
def test_whole_hessian_equals_autodiff(name):
    check_whole(*EVERY[name]())


# --- random graphs


CHOICES = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 3), st.integers(0, 4)), min_size=2, max_size=7)
PENALTIES = st.sampled_from(["none", "square", "joint"])


@settings(max_examples=6)
@given(choices=CHOICES, penalty=PENALTIES, seed=st.integers(0, 2**31 - 1))
def test_random_graphs_equal_autodiff(choices, penalty, seed):
    check_whole(*random_graph(choices, penalty, seed))


@pytest.mark.slow
@settings(max_examples=30)
@given(choices=CHOICES, penalty=PENALTIES, seed=st.integers(0, 2**31 - 1))
def test_more_random_graphs_equal_autodiff(choices, penalty, seed):
    check_whole(*random_graph(choices, penalty, seed + 2**31))


# --- blocks


@functools.partial(jax.jit, static_argnums=1)
def every_block(H, paths):
    return [H.block(row, column).as_matrix() for row, column in itertools.product(paths, repeat=2)]


BLOCKS = ["perceptron", "tied_in_one_row", "reshaped_weights", "several_positions", "weight_in_products_and_elsewhere"]
BLOCKS += ["heads_and_batched_weights", "penalties_of_several_parameters", "weights_scaled_by_data"]
BLOCKS += ["penalty_times_the_error", "loops_over_empty_and_unequal_parts", "padding_with_a_parameter"]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_its_slice(name):
    error, params, batch = EVERY[name]()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    expected = reference(error, params, batch)[1]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    places = [slice(end - leaf.size, end) for end, (_, leaf) in zip(ends, leaves, strict=True)]
    paths = tuple(path for path, _ in leaves)
    blocks = every_block(H, paths)
    for matrix, (rows, columns) in zip(blocks, itertools.product(places, repeat=2), strict=True):
        assert matrix.shape == expected[rows, columns].shape
        assert_close(matrix, expected[rows, columns])


def two_layers():
    def error(p, x, t):
        return jnp.sum((p["v"] @ jnp.tanh(p["w"] @ x + p["b"]) - t) ** 2)

    return error, {"b": normal(1, 5), "v": normal(2, 3, 5), "w": normal(0, 5, 4)}, inputs()


def test_blocks_have_the_structure_of_their_uses():
    """Between two weights Q (r, m, m') and S, with a bias a contraction; never more than the small matrices."""
    error, params, batch = two_layers()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    assert isinstance(H["w"]["w"], KroneckerProductSum)
    assert isinstance(H["v"]["w"], KroneckerCross)
    assert (H["v"]["w"].Q.shape, H["v"]["w"].S.shape, H["v"]["w"].flipped) == ((4, 3, 5), (4, 5), False)
    assert H["w"]["v"].flipped
    assert isinstance(H["b"]["v"], CrossBlock)
    expected = np.asarray(H.as_matrix())
    for row, column, rows, columns in [("v", "w", slice(5, 20), slice(20, 40)), ("b", "v", slice(0, 5), slice(5, 20))]:
        block, exact = H[row][column], expected[rows, columns]
        vector, covector = like(params[column]), like(params[row], 1)
        assert_close(block.mv(vector).reshape(-1), exact @ vector.reshape(-1))
        assert_close(block.transpose().mv(covector).reshape(-1), exact.T @ covector.reshape(-1))
        assert_close(H[column][row].as_matrix(), exact.T)
        assert_close(block.frobenius_norm(), np.linalg.norm(exact))
        assert_close((-3.0 * block).as_matrix(), -3 * exact)
        assert block.out_structure().shape == params[row].shape


def test_a_block_without_small_matrices_goes_by_products():
    def error(p, x):
        states = jax.lax.scan(lambda h, u: ((h := jnp.tanh(p["u"] @ h + u)), h), jnp.zeros(2), (p["w"] @ x).reshape(3, 2))[1]
        return jnp.sum(p["v"] @ states.reshape(-1)) ** 2

    params, x = {"u": normal(0, 2, 2), "v": normal(1, 1, 6), "w": normal(2, 6, 3)}, normal(3, 4, 3)
    H = jaxhess.hessian(error, blocks="full")(params, x)
    expected = reference(error, params, (x,))[1]
    for row, column, rows, columns in [("u", "w", slice(0, 4), slice(10, 28)), ("w", "v", slice(10, 28), slice(4, 10))]:
        block, exact = H.block(row, column), expected[rows, columns]
        assert_close(block.as_matrix(), exact)
        assert_close(block.transpose().as_matrix(), exact.T)
        assert_close(block.mv(like(params[column])).reshape(-1), exact @ like(params[column]).reshape(-1))
        assert_close(block.frobenius_norm(), np.linalg.norm(exact))
        assert_close((2 * block).as_matrix(), 2 * exact)
        assert f"{exact.shape[0]} x {exact.shape[1]}" in repr(block)
    with pytest.raises(ValueError, match=r"one shape.*\(6, 3\) to \(2, 2\)"):
        H.block("u", "w").trace()


def test_keys_lead_to_blocks_in_any_container():
    error, params, batch = GRAPHS["nested_containers"]()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(params)])
    expected = np.asarray(H.as_matrix())[: ends[0], ends[3] : ends[4]]
    block = H["stack"][0]["w"]["stack"][1]["last"]
    assert block.in_structure().shape == (2, 4)
    assert_close(block.as_matrix(), expected)
    assert_close(H["stack"][-2]["w"]["stack"][-1]["last"].as_matrix(), expected)
    assert_close(H.block("stack/0/w", ("stack", 1, "last")).as_matrix(), expected)
    rows, columns = (jax.tree_util.tree_leaves_with_path(params)[k][0] for k in (0, 4))
    assert_close(H.block(rows, columns).as_matrix(), expected)
    listed = [{"w": [normal(0, 3, 3), {"b": normal(1, 3)}]}]

    def quartic(p, x):
        return jnp.sum((p[0]["w"][0] @ x + p[0]["w"][1]["b"]) ** 4)

    H = jaxhess.hessian(quartic, blocks="full")(listed, normal(2, 4, 3))
    assert_close(H[0]["w"][-1]["b"][0]["w"][0].as_matrix(), np.asarray(H.as_matrix())[9:, :9])
    assert "rows '0/w/0', columns at '0': w" in repr(H[0]["w"][0][0])


def test_keys_lead_to_blocks_in_an_nnx_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    state = jax.tree.map(lambda p: p.astype(jnp.float64), state)

    def error(state, x):
        model = nnx.merge(graphdef, state)
        return jnp.sum(model.layers[1](jnp.tanh(model.layers[0](x))) ** 3)

    x = normal(0, 4, 3)
    H = jaxhess.hessian(error, blocks="full")(state, x)
    expected = reference(error, state, (x,))[1]
    assert_close(H.as_matrix(), expected)
    names = [path[:-1] if "value" in str(path[-1]) else path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert len(names) == 4
    assert_close(H["layers"][0]["kernel"]["layers"][1]["bias"].as_matrix(), expected[4:16, 16:18])
    assert jax.tree.structure(H.mv(state)) == jax.tree.structure(state)


def test_unknown_keys_are_refused_with_what_there_is():
    error, params, batch = MODELS["perceptron"]()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    for choose, words in [
        (lambda: H["nothing"], "'nothing'.*hidden, out"),
        (lambda: H["hidden"]["c"], "'c' at 'hidden'.*b, w"),
        (lambda: H["hidden"]["w"]["hiden"], "'hiden'.*hidden, out"),
        (lambda: H.block("hidden"), "'hidden'.*'hidden/b', 'hidden/w'"),
        (lambda: H.block("out/b", ("out", "z")), "'out/z'.*'out/w'"),
    ]:
        with pytest.raises(KeyError, match=words):
            choose()


# --- the operator


def test_readings_of_the_operator():
    error, params, batch = MODELS["gates_and_layer_norm"]()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    expected = reference(error, params, batch)[1]
    vector = like(params)
    assert lx.is_symmetric(H)
    assert H.transpose() is H
    assert H.T.in_structure() == H.in_structure()
    assert_close(ravel_pytree(H.diagonal())[0], np.diag(expected))
    assert_close(lx.diagonal(H), np.diag(expected))
    assert_close(H.trace(), np.trace(expected))
    assert_close(H.frobenius_norm(), np.linalg.norm(expected))
    eigenvalues = np.linalg.eigvalsh(expected)
    assert_close(H.eigvalsh(), eigenvalues)
    signs = [int(np.sum(eigenvalues > 1e-9)), int(np.sum(eigenvalues < -1e-9))]
    assert [int(n) for n in H.inertia(1e-9)] == [*signs, len(expected) - sum(signs)]
    positive, negative, zero = map(int, H.inertia())
    assert positive + negative + zero == len(expected)
    assert repr(H).startswith(f"FullHessian({len(expected)} x {len(expected)}, 7 parameters")
    for other, factor in [(2 * H, 2.0), (H / 4, 0.25), (-H, -1.0), (H.scaled(jnp.array(3.0)), 3.0)]:
        assert isinstance(other, FullHessian)
        assert_close(other.as_matrix(), factor * expected)
        assert_close(ravel_pytree(other.mv(vector))[0], factor * expected @ ravel_pytree(vector)[0])
        assert_close(other.trace(), factor * np.trace(expected))
        assert_close(other["w"]["o"].as_matrix(), factor * np.asarray(H["w"]["o"].as_matrix()))
    tagged = H.with_tags(lx.positive_semidefinite_tag)
    assert lx.is_positive_semidefinite(tagged)
    assert lx.is_negative_semidefinite(-tagged)
    assert_close(tagged.as_matrix(), expected)
    total = H + lx.IdentityLinearOperator(H.in_structure())
    assert_close(ravel_pytree(total.mv(vector))[0], (expected + np.eye(len(expected))) @ ravel_pytree(vector)[0])


@pytest.mark.parametrize("name", ["perceptron", "penalty_times_the_error"])
def test_chunks_change_nothing(name):
    error, params, batch = EVERY[name]()
    path = jax.tree_util.tree_leaves_with_path(params)[-1][0]

    @jax.jit
    def read(params, batch):
        Hs = [jaxhess.hessian(error, blocks="full", batch_size=size)(params, *batch) for size in (None, 1, 3, 7)]
        return [(H.as_matrix(), H.trace(), H.block(path).as_matrix()) for H in Hs]

    whole, *parts = read(params, batch)
    for part in parts:
        for found, expected in zip(part, whole, strict=True):
            assert_close(found, expected, 1e-12)


def test_vectors_that_do_not_fit_are_refused():
    error, params, batch = MODELS["perceptron"]()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    product = jaxhess.linearized_hvp(error)(params, *batch)
    wrong = [
        ({"hidden": params["hidden"]}, r"missing \['out/b', 'out/w'\]"),
        (params | {"more": 1.0}, r"unexpected \['more'\]"),
        (
            params | {"out": params["out"] | {"w": params["out"]["w"].T}},
            r"'out/w' needs shape \(3, 6\), got .*\(6, 3\)",
        ),
        (jax.tree.map(lambda p: p + 0j, params), "complex"),
        (ravel_pytree(params)[0], "structure"),
    ]
    for vector, words in wrong:
        for apply in (H.mv, product, lambda v: jaxhess.hvp(error)(params, v, *batch)):
            with pytest.raises(InputError, match=words):
                apply(vector)
    with pytest.raises(InputError, match=r"\(6,\).*got shape \(3,\)"):
        H.block("out/w", "hidden/b").mv(jnp.ones(3))


def test_conjugate_gradients_with_damping():
    error, params, batch = two_layers()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    expected = reference(error, params, batch)[1]
    damping = 1.0 - min(0.0, float(np.linalg.eigvalsh(expected)[0]))
    damped = H + damping * lx.IdentityLinearOperator(H.in_structure())
    right = jax.tree.map(jnp.cos, params)
    solver = lx.CG(rtol=1e-12, atol=1e-12)
    step = lx.linear_solve(lx.TaggedLinearOperator(damped, lx.positive_semidefinite_tag), right, solver).value
    exact = np.linalg.solve(expected + damping * np.eye(len(expected)), ravel_pytree(right)[0])
    assert_close(ravel_pytree(step)[0], exact, 1e-8)


# --- transformations of JAX


def test_into_and_out_of_jit_without_compiling_again():
    error, params, batch = two_layers()
    traces = []

    def counted(p, x, t):
        traces.append(1)
        return error(p, x, t)

    make = jax.jit(lambda p, x, t: jaxhess.hessian(counted, blocks="full")(p, x, t))

    @jax.jit
    def use(H, vector):
        traces.append(1)
        return H.mv(vector), H.as_matrix(), H["v"]["w"].as_matrix(), H.trace(), H.eigvalsh()

    vector, counts = like(params), []
    for factor in (1.0, 2.0, 3.0):
        moved = jax.tree.map(lambda p, factor=factor: factor * p, params)
        inside = make(moved, *batch)
        outside = jaxhess.hessian(counted, blocks="full")(moved, *batch)
        expected = reference(error, moved, batch)[1]
        for H in (inside, outside):
            product, matrix, block, trace, eigenvalues = use(H, vector)
            assert_close(ravel_pytree(product)[0], expected @ ravel_pytree(vector)[0])
            assert_close(matrix, expected)
            assert_close(block, expected[5:20, 20:])
            assert_close(trace, np.trace(expected))
            assert_close(eigenvalues, np.linalg.eigvalsh(expected))
        outside.as_matrix(), outside["v"]["w"], outside.diagonal(), outside.mv(vector)
        counts.append(len(traces))
    assert counts[2] == counts[1] == counts[0]


def test_vmap_over_vectors_and_parameters():
    error, params, batch = two_layers()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    vectors = jax.tree.map(lambda p: jnp.stack([p, jnp.cos(p), -p]), params)
    products = jax.vmap(H.mv)(vectors)
    flat = jax.vmap(lambda v: ravel_pytree(v)[0])
    assert_close(flat(products), flat(vectors) @ H.as_matrix())
    many = jax.vmap(lambda p: jaxhess.hessian(error, blocks="full")(p, *batch))(vectors)
    matrices = jax.vmap(lambda H: H.as_matrix())(many)
    crosses = jax.vmap(lambda H: H["v"]["b"].as_matrix())(many)
    traces = jax.vmap(lambda H: H.trace())(many)
    for k in range(3):
        member = jax.tree.map(lambda v, k=k: v[k], vectors)
        expected = reference(error, member, batch)[1]
        assert_close(matrices[k], expected)
        assert_close(crosses[k], expected[5:20, :5])
        assert_close(traces[k], np.trace(expected))
    repr(many)


def test_tree_map_over_the_operator():
    error, params, batch = two_layers()
    H = jaxhess.hessian(error, blocks="full")(params, *batch)
    same = jax.tree.map(jnp.asarray, H)
    assert isinstance(same, FullHessian)
    assert jax.tree.structure(same) == jax.tree.structure(H)
    assert_close(same.as_matrix(), H.as_matrix(), 1e-15)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), H)
    assert "40 x 40" in repr(shapes)


# --- precision


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-5)])
def test_narrow_parameters(dtype, tolerance):
    """float32 all the way, from bfloat16 too; the reference is exact for the rounded parameters."""
    error, params, batch = two_layers()
    narrow = jax.tree.map(lambda p: p.astype(dtype), (params, batch))
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), narrow)
    expected = reference(error, *wide)[1]
    value, gradient, H = jaxhess.value_grad_and_hessian(error, blocks="full")(narrow[0], *narrow[1])
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}
    vector = like(wide[0])
    for argument in (vector, jax.tree.map(lambda v: v.astype(jnp.float32), vector)):
        product = H.mv(argument)
        assert {leaf.dtype for leaf in jax.tree.leaves(product)} == {jnp.dtype("float32")}
        assert_close(ravel_pytree(product)[0], expected @ ravel_pytree(vector)[0], tolerance)
    for array, exact in [
        (H.as_matrix(), expected),
        (ravel_pytree(H.diagonal())[0], np.diag(expected)),
        (H.trace(), np.trace(expected)),
        (H["v"]["w"].as_matrix(), expected[5:20, 20:]),
        (H["b"]["w"].as_matrix(), expected[:5, 20:]),
        (H.frobenius_norm(), np.linalg.norm(expected)),
        (jaxhess.hessian_trace(error)(narrow[0], *narrow[1]), np.trace(expected)),
    ]:
        assert array.dtype == jnp.float32
        assert_close(array, exact, tolerance)


def test_functions_that_name_a_narrow_type_themselves():
    def error(p, x, one):
        h = jnp.tanh(jax.lax.add(p["w"] @ x, jnp.ones(3, one)))
        return jnp.sum(jax.lax.mul(h, p["s"]) ** 2)

    params = {"w": normal(0, 3, 4).astype(jnp.bfloat16), "s": jnp.arange(1.0, 4).astype(jnp.bfloat16)}
    x = normal(1, 5, 4).astype(jnp.bfloat16)
    narrow = functools.partial(error, one=jnp.bfloat16)
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    expected = reference(functools.partial(error, one=jnp.float64), wide, (x.astype(jnp.float64),))[1]
    H = jaxhess.hessian(narrow, blocks="full")(params, x)
    vector = like(wide)
    for array, exact in [
        (H.as_matrix(), expected),
        (ravel_pytree(H.diagonal())[0], np.diag(expected)),
        (ravel_pytree(H.mv(vector))[0], expected @ ravel_pytree(vector)[0]),
        (H["w"]["s"].as_matrix(), expected[3:, :3]),
    ]:
        assert array.dtype == jnp.float32
        assert_close(array, exact, 5e-2)
    product = jaxhess.linearized_hvp(narrow)(params, x)(vector)
    assert product["w"].dtype == jnp.bfloat16
    assert_close(ravel_pytree(product)[0].astype(jnp.float64), expected @ ravel_pytree(vector)[0], 5e-2)


def test_parameters_of_two_precisions():
    def error(p, x):
        return jnp.sum(jnp.tanh(p["w"].astype(p["s"].dtype) @ x) * p["s"])

    params, x = {"w": normal(0, 3, 4).astype(jnp.float32), "s": normal(1, 3)}, normal(2, 5, 4)
    expected = reference(error, jax.tree.map(lambda p: p.astype(jnp.float64), params), (x,))[1]
    H = jaxhess.hessian(error, blocks="full")(params, x)
    assert_close(H.as_matrix(), expected, 1e-6)
    assert H["s"]["w"].mv(params["w"]).dtype == jnp.float64
    assert H.mv(params)["w"].dtype == jnp.float32
    assert_close(H["s"]["w"].as_matrix(), expected[:3, 3:], 1e-6)


def test_nan_in_one_example():
    error, params, (x, t) = two_layers()
    H = jaxhess.hessian(error, blocks="full")(params, x.at[1, 2].set(jnp.nan), t)
    for array in (H.as_matrix(), ravel_pytree(H.mv(params))[0], ravel_pytree(H.diagonal())[0], H.trace()):
        assert np.isnan(array).all()
    assert set(map(int, H.inertia())) == {-1}
    assert np.isnan(H["v"]["w"].as_matrix()).all()
