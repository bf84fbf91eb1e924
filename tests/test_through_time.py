"""Models with loops against autodiff: every block of every model, what users of JAX expect, and what it must not cost."""

import itertools
import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jaxprs import equations
from models import normal, with_nan
from sequences import EXAMPLES, INPUTS, SEQUENCES, STEPS, batch_of, one_layer, square, steps, weights

import jaxhess
from jaxhess import activations, losses
from jaxhess._typing import UnsupportedOperationError
from jaxhess.activations import Activation
from jaxhess.operators import ContractionOperator, Dense, Diagonal, KroneckerProductSum, LowRank
from jaxhess.operators.implicit import ImplicitKroneckerSum
from jaxhess.operators.pullback import Pullback

TOLERANCE = 1e-10


def mean_error(error, batch):
    if not batch:
        return error
    return lambda params: jnp.mean(jax.vmap(lambda example: error(params, *example))(batch))


def assert_close(found, expected, tolerance=TOLERANCE, what=""):
    found, expected = np.asarray(found), np.asarray(expected)
    scale = max(1.0, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale, err_msg=what)


def autodiff(error, params, batch):
    """Value, gradient and Hessian over the flat parameters; forwards alone where JAX has no reverse mode (`while`)."""
    flat, unravel = ravel_pytree(params)
    mean = mean_error(error, batch)

    def of_flat(flat):
        return mean(unravel(flat))

    try:
        return (*jax.value_and_grad(of_flat)(flat), jax.hessian(of_flat)(flat))
    except ValueError as error:
        if "Reverse-mode differentiation does not work for lax.while_loop" not in str(error):
            raise
        return of_flat(flat), jax.jacfwd(of_flat)(flat), jax.jacfwd(jax.jacfwd(of_flat))(flat)


def waves(params):
    """A vector of the parameters' structure."""
    return jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)


def flattened(factors):
    is_low_rank = lambda g: isinstance(g, LowRank)  # noqa: E731
    dense = jax.tree.map(lambda g: g.as_matrix() if isinstance(g, LowRank) else g, factors, is_leaf=is_low_rank)
    return ravel_pytree(dense)[0]


def check_everything(error, params, batch, **options):
    """Every block's matrix, and of the first block of each type every reading, in one compiled program with autodiff."""

    @jax.jit
    def read(params, batch):
        value, gradient, H = jaxhess.value_grad_and_hessian(error, **options)(params, *batch)
        factors = jaxhess.factored_gradient(error, **options)(params, *batch)
        readings, seen = {}, set()
        for (path, block), vector in zip(H.items(), jax.tree.leaves(waves(params)), strict=True):
            readings[path] = {"matrix": block.as_matrix()}
            if type(block) not in seen:
                readings[path] |= {
                    "product": block.mv(vector),
                    "diagonal": block.diagonal(),
                    "trace": block.trace(),
                    "norm": block.frobenius_norm(),
                    "eigenvalues": block.eigvalsh(),
                }
            seen.add(type(block))
        return value, ravel_pytree(gradient)[0], flattened(factors), readings, autodiff(error, params, batch), H

    value, gradient, factored, readings, (expected_value, expected_gradient, expected), H = read(params, batch)
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)
    assert_close(factored, expected_gradient)
    offset = 0
    for (path, reading), leaf, vector in zip(
        readings.items(), jax.tree.leaves(params), jax.tree.leaves(waves(params)), strict=True
    ):
        block = np.asarray(expected)[offset : offset + leaf.size, offset : offset + leaf.size]
        offset += leaf.size
        known = {
            "matrix": lambda block=block: block,
            "product": lambda block=block, vector=vector: (block @ np.ravel(vector)).reshape(vector.shape),
            "diagonal": lambda block=block, leaf=leaf: np.diag(block).reshape(leaf.shape),
            "trace": lambda block=block: np.trace(block),
            "norm": lambda block=block: np.linalg.norm(block),
            "eigenvalues": lambda block=block: np.linalg.eigvalsh(block) if block.size else np.zeros(0),
        }
        for name, array in reading.items():
            assert_close(array, known[name](), what=f"{name} of {path}")
    return H


# --- against autodiff

SLOW = {"gru", "kalman_filter", "lstm_with_peepholes_and_coupled_gates", "three_layers_from_a_step_on"}


def named(names):
    for name in names:
        marks = [pytest.mark.slow] if name in SLOW else []
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(named(SEQUENCES)))
def test_every_block_equals_autodiff(name):
    check_everything(*SEQUENCES[name]())


def nets():
    """Activations, losses and lengths, each at least once."""
    own = [f for f in (getattr(activations, name) for name in activations.__all__) if isinstance(f, Activation)]
    functions = [*own, jax.nn.mish, jax.nn.softmax, jnp.arctan]
    names = ("squared_error", "softmax_cross_entropy", "sigmoid_cross_entropy", "poisson", "huber", "mean_square")
    for f, loss, tau in zip(functions, itertools.cycle(names), itertools.cycle((1, 2, 3, 8)), strict=False):
        name = getattr(f, "name", None) or f.__name__
        yield pytest.param(f, loss, tau, id=f"{name}-{loss}-{tau}")


@pytest.mark.parametrize(("f", "loss", "tau"), list(nets()))
def test_activations_losses_and_lengths(f, loss, tau):
    function = getattr(losses, loss) if loss in losses.__all__ else lambda z, t: jnp.mean((z - t) ** 2)
    error, params, (x, t) = one_layer(f, tau, lambda z, t: jnp.sum(jax.vmap(function)(z, t)))
    if "entropy" in loss:
        t = jax.nn.softmax(t)
    H = check_everything(error, params, (x, jnp.abs(t) if loss == "poisson" else t))
    assert all(type(block) in (ImplicitKroneckerSum, Diagonal) for _, block in H.items())


@pytest.mark.parametrize("name", ["elman", "lstm_of_one_matrix", "masked_steps", "masked_recurrent_weights"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_chunks_change_nothing(name, batch_size):
    error, params, batch = SEQUENCES[name]()

    @jax.jit
    def both(params, batch):
        results = []
        for size in (None, batch_size):
            value, gradient, H = jaxhess.value_grad_and_hessian(error, batch_size=size)(params, *batch)
            results.append((value, gradient, H.mv(waves(params)), jaxhess.factored_gradient(error, size)(params, *batch)))
        return results

    whole, parts = both(params, batch)
    chex.assert_trees_all_close(parts, whole, rtol=1e-12, atol=1e-12)


def flax_nnx(cell):
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.RNN(getattr(nnx, cell)(INPUTS, 2, rngs=nnx.Rngs(0), dtype=jnp.float64, param_dtype=jnp.float64))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def error(params, x, t):
        return square(nnx.merge(graph, params, rest, copy=True)(x), t)

    return error, params


def flax_linen(cell):
    linen = pytest.importorskip("flax.linen")
    model = linen.RNN(getattr(linen, cell)(2, dtype=jnp.float64, param_dtype=jnp.float64))
    params = model.init(jax.random.key(0), jnp.ones((STEPS, INPUTS)))
    return lambda params, x, t: square(model.apply(params, x), t), params


def equinox(cell):
    eqx = pytest.importorskip("equinox")
    module = getattr(eqx.nn, cell)(INPUTS, 2, key=jax.random.key(0), dtype=jnp.float64)
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def error(params, x, t):
        cell = eqx.combine(params, static)
        start = (jnp.zeros(2), jnp.zeros(2)) if hasattr(cell, "weight_hh") and cell.weight_hh.shape[0] == 8 else jnp.zeros(2)

        def step(state, x):
            state = cell(x, state)
            return state, jax.tree.leaves(state)[0]

        return square(steps(step, start, x), t)

    return error, params


@pytest.mark.parametrize(
    ("library", "cell"),
    [
        (flax_nnx, "SimpleCell"),
        pytest.param(flax_nnx, "LSTMCell", marks=pytest.mark.slow),
        pytest.param(flax_linen, "OptimizedLSTMCell", marks=pytest.mark.slow),
        (flax_linen, "GRUCell"),
        (equinox, "LSTMCell"),
        (equinox, "GRUCell"),
    ],
)
def test_cells_of_other_libraries(library, cell):
    error, params = library(cell)
    batch = batch_of()
    vector = waves(params)

    @jax.jit
    def both(params, batch):
        value, gradient, H = jaxhess.value_grad_and_hessian(error)(params, *batch)
        return value, ravel_pytree(gradient)[0], ravel_pytree(H.mv(vector))[0], autodiff(error, params, batch)

    value, gradient, product, (expected_value, expected_gradient, expected) = both(params, batch)
    assert_close(value, expected_value)
    assert_close(gradient, expected_gradient)
    blocks, offset = np.zeros_like(expected), 0
    for leaf in jax.tree.leaves(params):
        own = slice(offset, offset + leaf.size)
        blocks[own, own] = np.asarray(expected)[own, own]
        offset += leaf.size
    assert_close(product, blocks @ ravel_pytree(vector)[0])


# --- what users of JAX expect


def elman_error(params, x, t):
    def cell(h, x):
        h = jnp.tanh(params["W"] @ x + params["U"] @ h)
        return h, h

    return square(steps(cell, jnp.zeros(len(params["U"]), x.dtype), x), t)


def elman_model():
    return elman_error, weights(W=(2, 2), U=(2, 2)), batch_of()


def test_works_inside_jit_without_compiling_again():
    _, params, batch = elman_model()
    traces = []

    def counted(params, x, t):
        traces.append(1)
        return elman_error(params, x, t)

    outer = jax.jit(chex.assert_max_traces(lambda p, x, t: jaxhess.hessian(counted)(p, x, t).mv(p), n=1))
    for factor in (1, 2):
        moved = jax.tree.map(lambda p, factor=factor: factor * p, params)
        chex.assert_trees_all_close(outer(moved, *batch), jaxhess.hessian(elman_error)(moved, *batch).mv(moved), rtol=1e-12)
    first = len(traces)
    for _ in range(2):
        outer(params, *batch)
        jaxhess.hessian(counted)(params, *batch)
        jaxhess.hessian(counted)(jax.tree.map(lambda p: -p, params), *batch)
    assert len(traces) <= first + 1


def test_operators_pass_through_jit():
    _, params, batch = elman_model()
    traces = []

    @jax.jit
    def read(H, vector):
        traces.append(1)
        return H.mv(vector), H["U"].trace()

    for factor in (1, 2):
        moved = jax.tree.map(lambda p, factor=factor: factor * p, params)
        H = jaxhess.hessian(elman_error)(moved, *batch)
        product, trace = read(H, params)
        chex.assert_trees_all_close(product, H.mv(params), rtol=1e-12)
        assert_close(trace, np.trace(H["U"].as_matrix()))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["elman", "masked_recurrent_weights", "lstm_of_one_matrix"])
def test_vmap_over_an_ensemble(name):
    error, params, batch = SEQUENCES[name]()
    members = [jax.tree.map(lambda p, factor=factor: factor * p, params) for factor in (1, 2, -1)]
    vector = waves(params)

    @jax.jit
    def read(members, batch):
        ensemble = jax.tree.map(lambda *p: jnp.stack(p), *members)
        H = jax.vmap(lambda p: jaxhess.hessian(error)(p, *batch))(ensemble)
        alone = [autodiff(error, p, batch)[2] for p in members]
        return H, jax.vmap(lambda H: H.mv(vector))(H), jax.vmap(lambda H: [b.trace() for _, b in H.items()])(H), alone

    H, products, traces, alone = read(members, batch)
    repr(H)
    offset = 0
    for leaf, product, direction, trace in zip(*map(jax.tree.leaves, (params, products, vector, traces)), strict=True):
        blocks = [np.asarray(matrix)[offset : offset + leaf.size, offset : offset + leaf.size] for matrix in alone]
        offset += leaf.size
        assert_close(product, np.stack([(block @ np.ravel(direction)).reshape(leaf.shape) for block in blocks]))
        assert_close(trace, np.stack([np.trace(block) for block in blocks]))


@pytest.mark.parametrize(
    "name",
    [
        "loss_on_all_steps",
        "low_rank_recurrent_weights",
        "elman",
        "initial_state_is_a_parameter",
    ],
)
def test_derivatives_through_traces_and_products(name):
    error, params, batch = SEQUENCES[name]()
    flat, unravel = ravel_pytree(params)
    mean = mean_error(error, batch)
    paths = [
        jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    path, leaf = next((path, leaf) for path, leaf in zip(paths, jax.tree.leaves(params), strict=True) if leaf.ndim == 2)
    direction = waves({"w": leaf})["w"]

    @jax.jit
    def both(params, flat):
        def ours(params):
            H = jaxhess.hessian(error)(params, *batch)
            return H.trace() + jnp.vdot(direction, H.block(path).mv(direction))

        def autodiff(flat):
            vector = ravel_pytree(_placed(params, path, direction))[0]
            H = jax.hessian(lambda flat: mean(unravel(flat)))(flat)
            return jnp.trace(H) + vector @ H @ vector

        return jax.value_and_grad(ours)(params), jax.value_and_grad(autodiff)(flat)

    (value, gradient), (expected_value, expected) = both(params, flat)
    assert_close(value, expected_value)
    assert_close(ravel_pytree(gradient)[0], expected, 1e-9)


def _placed(params, path, value):
    """The parameters' structure with zeros but at one path."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in leaves]
    return jax.tree.unflatten(
        structure, [value if name == path else jnp.zeros_like(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)]
    )


@pytest.mark.parametrize("name", ["elman", "two_layers_and_a_head_on_the_last_step", "masked_recurrent_weights"])
def test_nan_in_nan_out(name):
    error, params, batch = SEQUENCES[name]()

    @jax.jit
    def read(params, *batch):
        value, _, H = jaxhess.value_grad_and_hessian(error)(params, *batch)
        return value, {path: block.trace() for path, block in H.items()}, [block.inertia() for _, block in H.items()][-1]

    for where in ("parameter", "input"):
        value, traces, inertia = read(*with_nan(params, batch, where))
        assert jnp.isnan(value), where
        for path, trace in traces.items():
            assert jnp.isnan(trace), (where, path)
        assert set(map(int, inertia)) == {-1}, where


@pytest.mark.parametrize("name", ["random_steps_in_the_loss", "normalised_recurrent_weights", "lstm"])
def test_float32_is_close_to_float64(name):
    error, params, batch = (lstm_error, lstm_params(3), batch_of(outputs=3)) if name == "lstm" else SEQUENCES[name]()
    single = jax.tree.map(lambda p: p.astype(jnp.float32) if p.dtype == jnp.float64 else p, (params, batch))
    read = jax.jit(lambda params, batch: [b.as_matrix() for _, b in jaxhess.hessian(error)(params, *batch).items()])
    for found, expected in zip(read(*single), read(params, batch), strict=True):
        assert found.dtype == jnp.float32
        assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layer", [True, False])
def test_narrow_parameters_have_blocks_in_float32(dtype, layer):
    def error(params, x, t):
        if layer:
            return square(jaxhess.recurrent(params["W"], params["U"], None, x), t)
        return elman_error(params, x, t)

    _, params, batch = elman_model()
    narrow = jax.tree.map(lambda p: p.astype(dtype), (params, batch))
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), narrow)
    value, gradient, H = jax.jit(jaxhess.value_grad_and_hessian(error))(narrow[0], *narrow[1])
    exact = jax.jit(jaxhess.hessian(error))(wide[0], *wide[1])
    assert value.dtype == jnp.float32
    for name in ("U", "W"):
        assert gradient[name].dtype == dtype
        assert H[name].in_structure().dtype == H[name].mv(params[name]).dtype == jnp.float32
        assert_close(H[name].as_matrix(), exact[name].as_matrix(), 1e-5 if layer else 0.05)


def test_computing_in_bfloat16_inside():
    def error(params, x, t):
        def cell(h, x):
            h = jnp.tanh(params["W"].astype(h.dtype) @ x.astype(h.dtype) + params["U"].astype(h.dtype) @ h)
            return h, h

        return square(steps(cell, jnp.zeros(2, jnp.bfloat16), x).astype(x.dtype), t)

    _, params, batch = jax.tree.map(lambda a: a if callable(a) else a.astype(jnp.float32), elman_model())
    value, gradient, H = jaxhess.value_grad_and_hessian(error)(params, *batch)
    exact = jaxhess.hessian(elman_error)(params, *batch)
    assert value.dtype == gradient["U"].dtype == H["U"].in_structure().dtype == jnp.float32
    for name in ("U", "W"):
        assert_close(H[name].as_matrix(), exact[name].as_matrix(), 0.05)


def test_readings_have_the_dtype_of_the_parameter():
    model = elman_error, weights(W=(2, 2), U=(2, 2)), batch_of()
    error, params, batch = jax.tree.map(lambda a: a if callable(a) else a.astype(jnp.float32), model)

    def read(params, batch):
        block = jaxhess.hessian(error)(params, *batch)["U"]
        readings = block.as_matrix(), block.frobenius_norm(), block.eigvalsh(), block.diagonal(), block.trace()
        return readings, block.mv(params["U"])

    for array in jax.tree.leaves(jax.eval_shape(read, params, batch)):
        assert array.dtype == jnp.float32


def test_blocks_of_mixed_parameters_keep_their_dtype():
    _, params, batch = elman_model()
    mixed = params | {"W": params["W"].astype(jnp.float32)}
    H = jaxhess.hessian(elman_error)(mixed, *batch)
    for name, dtype in (("U", jnp.float64), ("W", jnp.float32)):
        assert H[name].in_structure().dtype == dtype
        assert H[name].mv(mixed[name]).dtype == dtype
        assert H[name].as_matrix().dtype == dtype


# --- algebra


def test_algebra_of_operators():
    error, params, batch = SEQUENCES["masked_recurrent_weights"]()

    @jax.jit
    def read(block, vector):
        product = block.mv(vector)
        pairs = [
            ((-2 * block).mv(vector), -2 * product),
            ((block / 2 + block).mv(vector), 1.5 * product),
            ((block - block).mv(vector), 0 * product),
            ((block + Diagonal(jnp.ones(vector.shape))).mv(vector), product + vector),
            ((3 * block).trace(), 3 * block.trace()),
        ]
        return pairs, 3 * block, lx.materialise(block), block.as_matrix()

    H = jaxhess.hessian(error)(params, *batch)
    for name, kind in (("W", ImplicitKroneckerSum), ("U", Pullback)):
        block, vector = H[name], waves(params)[name]
        pairs, tripled, materialised, matrix = read(block, vector)
        assert type(block) is type(tripled) is kind
        for found, expected in pairs:
            assert_close(found, expected)
        assert_close(materialised.as_matrix(), matrix)
        assert lx.is_symmetric(block)
        assert lx.is_symmetric(tripled)
        assert block.T is block
        assert not lx.is_diagonal(block)
        assert not lx.is_positive_semidefinite(block)
        assert lx.is_positive_semidefinite(block.with_tags(lx.positive_semidefinite_tag))
        assert block.storage_bytes > 0
        assert f"{block.in_size()} x {block.in_size()}" in repr(block)
        with pytest.raises(ValueError, match="shape"):
            block.mv(jnp.ones(17))


def test_hyperparameters_from_outside():
    """What the error closes over may be traced, differentiated and mapped over."""
    _, params, batch = elman_model()

    def weighted(scale) -> Callable:
        def error(p, x, t):
            def cell(h, x):
                h = jnp.tanh(p["W"] @ x + scale * (p["U"] @ h))
                return h, h

            return square(steps(cell, jnp.zeros(2), x), t)

        return error

    def ours(scale):
        return jaxhess.hessian(weighted(scale))(params, *batch)["U"].trace()

    def expected(scale):
        mean = mean_error(weighted(scale), batch)
        return jnp.trace(jax.hessian(lambda u: mean(params | {"U": u}))(params["U"]).reshape(4, 4))

    scales = jnp.array([0.5, 2.0])
    found, reference = jax.jit(lambda s: [jax.vmap(jax.value_and_grad(f))(s) for f in (ours, expected)])(scales)
    assert_close(found[0], reference[0])
    assert_close(found[1], reference[1])


def test_inside_a_loop_over_updates():
    _, params, batch = elman_model()

    def update(params, _):
        value, gradient, H = jaxhess.value_grad_and_hessian(elman_error)(params, *batch)
        return jax.tree.map(lambda p, d: p - 0.1 * d, params, H.mv(gradient)), value

    last, values = jax.jit(lambda params: jax.lax.scan(update, params, None, length=2))(params)
    for value in values:
        params, expected = update(params, None)
        assert_close(value, expected)
    chex.assert_trees_all_close(last, params, rtol=1e-12)


def test_conjugate_gradients_with_damping():
    error, params, batch = SEQUENCES["elman"]()

    @jax.jit
    def solve(params, batch):
        _, gradient, H = jaxhess.value_grad_and_hessian(error)(params, *batch)
        block = H["U"]
        damped = block + Diagonal(jnp.full(params["U"].shape, 5.0))
        damped = damped.with_tags(lx.positive_semidefinite_tag)
        solution = lx.linear_solve(damped, gradient["U"], lx.CG(rtol=1e-12, atol=1e-12)).value
        return solution, gradient["U"], block.as_matrix()

    solution, gradient, matrix = solve(params, batch)
    expected = np.linalg.solve(matrix + 5 * np.eye(len(matrix)), np.ravel(gradient))
    assert_close(np.ravel(solution), expected, 1e-9)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("two_sequences_through_one_wide_layer", "W"),
        ("more_units_than_steps", "U"),
        ("one_matrix_for_inputs_and_states", "W"),
        ("transposed_recurrent_weights", "U"),
    ],
)
def test_explicit_form(name, path):
    """The arrays Q and S, which serve where there are fewer places than entries of the parameter, give the same operator."""
    error, params, batch = SEQUENCES[name]()

    @jax.jit
    def read(params, batch):
        block = jaxhess.hessian(error)(params, *batch).block(path)
        explicit = block.explicit()
        one_by_one = jax.vmap(lambda unit: block.mv(unit).reshape(-1))(
            jnp.eye(block.in_size()).reshape(-1, *block.in_structure().shape)
        )
        readings = [(b.as_matrix(), b.diagonal(), b.trace()) for b in (block, explicit, 2 * explicit)]
        return one_by_one, readings, block, (3 * block).explicit().as_matrix()

    matrix, readings, block, tripled = read(params, batch)
    assert type(block) is ImplicitKroneckerSum
    for factor, (found, diagonal, trace) in zip((1, 1, 2), readings, strict=True):
        assert_close(found, factor * matrix)
        assert_close(np.ravel(diagonal), factor * np.diag(matrix))
        assert_close(trace, factor * np.trace(matrix))
    assert_close(tripled, 3 * matrix)


# --- structure


def test_the_kinds_of_blocks():
    def blocks(name):
        error, params, batch = SEQUENCES[name]()
        return jax.eval_shape(jaxhess.hessian(error), params, *batch)

    H = blocks("two_layers_and_a_head_on_the_last_step")
    assert isinstance(H.block("head/V"), KroneckerProductSum)
    assert isinstance(H.block("head/c"), Dense)
    for name, sensitive in (("W", [False]), ("U", [True]), ("b", [False])):
        for layer in ("layer0", "layer1"):
            block = H.block(f"{layer}/{name}")
            assert type(block) is ImplicitKroneckerSum
            assert [use.sensitive for use in block.term.uses] == sensitive
    assert [use.inputs.shape for use in H.block("layer0/W").term.uses] == [(EXAMPLES, STEPS, INPUTS)]
    H = blocks("two_layers_and_a_head_on_all_steps")
    assert isinstance(H.block("head/V"), ContractionOperator)
    assert type(H.block("layer1/U")) is ImplicitKroneckerSum
    H = blocks("low_rank_recurrent_weights")
    assert [type(H[name]) for name in ("A", "B", "W")] == [Pullback, Pullback, ImplicitKroneckerSum]


@pytest.mark.parametrize("name", ["elman", "loss_on_all_steps", "transposed_recurrent_weights", "lstm_of_one_matrix"])
def test_gradients_have_one_rank_for_each_example_and_step(name):
    error, params, batch = SEQUENCES[name]()
    factors = jaxhess.factored_gradient(error)(params, *batch)
    gradient = jax.grad(mean_error(error, batch))(params)
    for G, expected in zip(
        jax.tree.leaves(factors, is_leaf=lambda g: isinstance(g, LowRank)), jax.tree.leaves(gradient), strict=True
    ):
        if expected.ndim != 2:
            assert isinstance(G, jax.Array)
            continue
        assert isinstance(G, LowRank)
        assert G.left.shape == (expected.shape[0], EXAMPLES * STEPS)
        assert G.right.shape == (expected.shape[1], EXAMPLES * STEPS)
        assert_close(G.as_matrix(), expected)


def lstm_error(params, x, t):
    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(params["W"] @ x + params["U"] @ h + params["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    m = params["U"].shape[1]
    return square(steps(cell, (jnp.zeros(m, x.dtype), jnp.zeros(m, x.dtype)), x), t)


def lstm_params(m):
    return weights(W=(4 * m, INPUTS), U=(4 * m, m), b=(4 * m,))


def test_size_of_the_program_and_of_its_arrays():
    """Neither the number of operations depends on the number of steps, nor is any array as large as its square."""
    params = lstm_params(3)
    counts = []
    for tau in (20, 200):
        x, t = (jax.ShapeDtypeStruct((2, tau, n), jnp.float64) for n in (2, 3))
        closed = jax.make_jaxpr(lambda p, x, t: jaxhess.hessian(lstm_error)(p, x, t).mv(p))(params, x, t)
        found = list(equations(closed.jaxpr))
        counts.append(len(found))
        largest = max(math.prod(v.aval.shape) for equation in found for v in equation.outvars)
        assert largest < 2 * tau * 100
        assert largest < (tau * 3) ** 2
    assert counts[0] == counts[1]


def test_long_sequences_with_products_alone():
    params = lstm_params(3)
    x, t = normal(1, 2, 500, 2), normal(2, 2, 500, 3)
    vector = waves(params)

    @jax.jit
    def both(params, vector):
        mean = mean_error(lstm_error, (x, t))
        H = jaxhess.hessian(lstm_error)(params, x, t)
        expected = {
            name: jax.jvp(lambda w, name=name: jax.grad(mean)(params | {name: w})[name], (params[name],), (vector[name],))[1]
            for name in params
        }
        return H.mv(vector), expected

    found, expected = both(params, vector)
    chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-9)


# --- refusals


@pytest.mark.parametrize("on_weight", [False, True])
@pytest.mark.parametrize("kind", ["straight through", "reversed"])
def test_rules_that_are_not_derivatives_are_refused(kind, on_weight):
    @jax.custom_vjp
    def rule(x):
        return jnp.round(x) if kind == "straight through" else x

    rule.defvjp(lambda x: (rule(x), None), lambda _, g: (g if kind == "straight through" else -g,))

    def error(params, x, t):
        def cell(h, x):
            h = jnp.tanh(rule(params["U"]) @ h + x) if on_weight else jnp.tanh(rule(params["U"] @ h) + x)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    with pytest.raises(UnsupportedOperationError, match=r"at .*test_through_time.py:\d+ .*not the derivative"):
        jaxhess.hessian(error)({"U": normal(0, 2, 2)}, *batch_of())


def test_rules_in_branches_that_are_not_derivatives_are_refused():
    @jax.custom_jvp
    def rule(x):
        return jnp.round(x)

    rule.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))

    def error(params, x, t):
        def cell(h, x):
            h = jax.lax.cond(x[0] > 0, rule, lambda y: y**2, params["U"] @ h + x)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    with pytest.raises(UnsupportedOperationError, match="not the derivative"):
        jaxhess.hessian(error)({"U": normal(0, 2, 2)}, *batch_of())


@pytest.mark.parametrize("tau", [3, 40])
def test_what_cannot_be_differentiated_twice_is_named_without_loops_too(tau):
    @jax.custom_vjp
    def rule(y):
        return jnp.sin(y)

    def pull(y, g):
        return (g * jax.pure_callback(np.cos, y, y, vmap_method="expand_dims"),)

    rule.defvjp(lambda y: (jnp.sin(y), y), pull)

    def error(params, x, t):
        return jnp.sum(rule(jax.vmap(lambda x: params["W"] @ x)(x)))

    with pytest.raises(UnsupportedOperationError, match=r"custom_vjp_call at .*test_through_time.py:\d+"):
        jaxhess.hessian(error)({"W": normal(0, 2, 2)}, *batch_of(tau))


@pytest.mark.parametrize("inside", [False, True])
def test_loops_of_unknown_length_are_refused_with_their_place(inside):
    def error(params, x, t):
        def grow(h):
            return jax.lax.while_loop(lambda h: jnp.sum(h) < 1, lambda h: params["U"] @ h + 1, h)

        if inside:
            return square(steps(lambda h, x: (grow(h + x), h), jnp.zeros(2), x), t)
        return square(grow(x[0]), t[0])

    with pytest.raises(UnsupportedOperationError, match=r"while at .*test_through_time.py:\d+ .*how often"):
        jaxhess.hessian(error)({"U": normal(0, 2, 2)}, *batch_of())


def test_complex_states_are_refused_with_their_place():
    def error(params, x, t):
        last, _ = jax.lax.scan(lambda h, x: (params["u"] * 1j * h + x, None), jnp.zeros(2, complex), x)
        return jnp.sum(jnp.abs(last) ** 2)

    with pytest.raises(UnsupportedOperationError, match=r"at .*test_through_time.py:\d+ .*complex"):
        jaxhess.hessian(error)({"u": normal(0, 2)}, *batch_of())
