"""Gauss-Newton and Fisher operators against `J^T B J` built by autodiff, and what is expected of a transformation."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jaxprs import equations
from models import normal, sine, with_nan

import jaxhess
from jaxhess import losses
from jaxhess.operators import (
    Dense,
    Diagonal,
    GaussNewton,
    GaussNewtonBlock,
    GaussNewtonCrossBlock,
    KroneckerProductSum,
    StructuredOperator,
)

EXAMPLES = 4
CASES = {}


def case(function):
    """Enter a case into every test that goes over `CASES`: (model, loss, parameters, batch)."""
    CASES[function.__name__] = functools.cache(function)
    return function


def xs(n=4, seed=100):
    return normal(seed, EXAMPLES, n)


def labels(classes=3):
    return jnp.arange(EXAMPLES) % classes


def perceptron_parameters(m=6, outputs=3):
    return {
        "hidden": {"w": normal(0, m, 4), "b": normal(1, m)},
        "out": {"w": normal(2, outputs, m), "b": normal(3, outputs)},
    }


def perceptron(p, x, f=jnp.tanh):
    return p["out"]["w"] @ f(p["hidden"]["w"] @ x + p["hidden"]["b"]) + p["out"]["b"]


@case
def squared_error():
    return perceptron, losses.squared_error, perceptron_parameters(), (xs(), xs(3, 101))


@case
def relu_and_classes():
    model = functools.partial(perceptron, f=jax.nn.relu)
    return model, optax.softmax_cross_entropy_with_integer_labels, perceptron_parameters(), (xs(), labels())


@case
def more_outputs_than_units():
    return perceptron, losses.softmax_cross_entropy, perceptron_parameters(2, 9), (xs(), jax.nn.softmax(xs(9, 101)))


@case
def huber_of_optax():
    return perceptron, lambda z, t: jnp.sum(optax.huber_loss(z, t, delta=0.3)), perceptron_parameters(), (xs(), xs(3, 101))


@case
def several_softmaxes():
    def loss(output, t):
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(output.reshape(3, 3), t))

    t = jnp.arange(3 * EXAMPLES).reshape(EXAMPLES, 3) % 3
    return perceptron, loss, perceptron_parameters(5, 9), (xs(), t)


@case
def tree_of_outputs():
    def model(p, x):
        h = jnp.tanh(p["w"] @ x["x"])
        return {"mean": p["v"] @ h, "pair": (jnp.sin(h[:2]), jnp.argmax(h))}

    def loss(output, t, weight):
        first = 0.5 * weight * jnp.sum((output["mean"] - t) ** 2)
        return first + jnp.exp(jnp.sum(output["pair"][0])) + jnp.sum(output["pair"][0] * output["mean"][:2] ** 0) * t[0]

    batch = ({"x": xs()}, xs(3, 101), jnp.linspace(1.0, 2.0, EXAMPLES))
    return model, loss, {"w": normal(0, 5, 4), "v": normal(1, 3, 5)}, batch


@case
def coupled_outputs():
    def model(p, x):
        h = jnp.tanh(p["w"] @ x)
        return [p["v"] @ h, h[:2]]

    def loss(output, t):
        return jnp.log1p(jnp.sum(jnp.exp(jnp.concatenate(output))) + t[0] ** 2)

    return model, loss, {"w": normal(0, 5, 4), "v": normal(1, 3, 5)}, (xs(), xs(3, 101))


@case
def tied_weights():
    def model(p, x):
        h = jnp.tanh(p["w"] @ x + p["b"])
        h = jnp.tanh(p["u"] @ h) + h
        return p["w"].T @ jnp.tanh(p["u"] @ h) + p["c"]

    params = {"w": normal(0, 6, 4), "b": normal(1, 6), "u": normal(2, 6, 6), "c": normal(3, 4)}
    return model, losses.squared_error, params, (xs(), xs(4, 101))


@case
def shared_and_narrow():
    def model(p, x):
        h = jnp.tanh(p["w"] @ jnp.tanh(p["w"] @ x[:2] + p["b"]) + p["b"])
        return jnp.sin(p["v"] @ h) + p["s"]

    params = {"w": normal(0, 2, 2), "b": normal(1, 2), "v": normal(2, 9, 2), "s": jnp.array(0.3)}
    return model, losses.squared_error, params, (xs(), xs(9, 101))


@case
def weight_norm_mask_and_low_rank():
    def model(p, x):
        w = p["g"][:, None] * p["v"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True)
        masked = p["w2"] * (jnp.arange(18).reshape(3, 6) % 2)
        return (masked + p["a"] @ p["b"]) @ jnp.sin(w @ x) + p["line"][1:4]

    params = {"g": normal(0, 6), "v": normal(1, 6, 4), "w2": normal(2, 3, 6), "a": normal(3, 3, 2), "b": normal(4, 2, 6)}
    return model, losses.squared_error, params | {"line": normal(5, 5)}, (xs(), xs(3, 101))


@case
def custom_rule_on_a_weight():
    def model(p, x):
        return sine(p["v"]) @ sine(sine(p["w"]) @ x)

    return model, losses.squared_error, {"w": normal(0, 5, 4), "v": normal(1, 3, 5)}, (xs(), xs(3, 101))


@case
def input_major_and_scaled():
    def model(p, x):
        return jax.nn.gelu(x @ p["w1"] / jnp.sqrt(4.0) + p["b1"]) @ (-p["w2"]) + p["b2"]

    params = {"w1": normal(0, 4, 6), "b1": normal(1, 6), "w2": normal(2, 6, 3), "b2": normal(3, 3)}
    loss = lambda z, t: jnp.sum(optax.sigmoid_binary_cross_entropy(z, t))  # noqa: E731
    return model, loss, params, (xs(), jax.nn.sigmoid(xs(3, 101)))


@case
def heads_and_transposes():
    def model(p, x):
        h = jnp.einsum("hdn,n->hd", p["w"].reshape(2, 3, 4), x)
        return p["o"].reshape(4, 3).T @ jnp.sin(jnp.einsum("hd,hde->he", h, p["v"].transpose(1, 0, 2))).reshape(-1)

    params = {"w": normal(0, 6, 4), "v": normal(1, 3, 2, 2), "o": normal(2, 2, 6)}
    return model, losses.squared_error, params, (xs(), xs(3, 101))


@case
def convolution():
    def model(p, x):
        image = x.reshape(1, 1, 4, 4)
        y = jnp.tanh(jax.lax.conv_general_dilated(image, p["k"], (1, 1), "SAME") + p["b"][None, :, None, None])
        y = jax.lax.conv_general_dilated(y, p["l"], (2, 2), "VALID")
        return p["w"] @ y.reshape(-1)

    params = {"k": normal(0, 2, 1, 3, 3), "b": normal(1, 2), "l": normal(2, 2, 2, 2, 2), "w": normal(3, 3, 8)}
    return model, optax.softmax_cross_entropy_with_integer_labels, params, (xs(16), labels())


@case
def recurrent():
    def model(p, x):
        h = jaxhess.recurrent(p["w"], p["u"], p["b"], x.reshape(4, 3))
        return p["v"] @ h[-1]

    params = {"w": normal(0, 5, 3), "u": normal(1, 5, 5), "b": normal(2, 5), "v": normal(3, 3, 5)}
    return model, losses.squared_error, params, (xs(12), xs(3, 101))


@case
def gated_cell_and_loss_on_all_steps():
    def model(p, x):
        def step(h, x):
            gate = jax.nn.sigmoid(p["w"] @ x + p["u"] @ h + p["b"])
            h = gate * h + (1 - gate) * jnp.tanh(p["c"] @ jnp.concatenate([x, h]))
            return h, p["v"] @ h

        return jax.lax.scan(step, jnp.zeros(3), x.reshape(4, 2))[1]

    params = {"w": normal(0, 3, 2), "u": normal(1, 3, 3), "b": normal(2, 3), "c": normal(3, 3, 5), "v": normal(4, 2, 3)}
    return model, lambda z, t: 0.5 * jnp.sum((z - t.reshape(4, 2)) ** 2), params, (xs(8), xs(8, 101))


@case
def embedding():
    def model(p, x):
        return p["w"] @ jnp.tanh(p["table"][x].reshape(-1)) + p["line"][x[0] % 2]

    tokens = (jnp.arange(2 * EXAMPLES).reshape(EXAMPLES, 2) * 3) % 5
    params = {"table": normal(0, 5, 3), "w": normal(1, 3, 6), "line": normal(2, 2)}
    return model, optax.softmax_cross_entropy_with_integer_labels, params, (tokens, labels())


@case
def attention_and_layer_norm():
    def model(p, x):
        X = x.reshape(2, 2) @ p["e"]
        X = (X - X.mean(-1, keepdims=True)) / jnp.sqrt(X.var(-1, keepdims=True) + 1e-5) * p["gamma"] + p["beta"]
        q, k, v = (jnp.einsum("td,hdk->htk", X, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("htk,hsk->hts", q, k) / 1.4, axis=-1)
        return (X + jnp.einsum("hts,hsk,hkd->td", weights, v, p["o"])).mean(0)

    params = {name: normal(n, 2, 4, 2) for n, name in enumerate("qkv")} | {"e": normal(3, 2, 4), "o": normal(4, 2, 2, 4)}
    params |= {"gamma": 1 + normal(5, 4)[None], "beta": normal(6, 4)[None]}
    return model, optax.softmax_cross_entropy_with_integer_labels, params, (xs(), labels(4))


@case
def unused_stopped_and_free_of_data():
    def model(p, x):
        return {"a": p["used"][:3] * x[:3] + jax.lax.stop_gradient(p["stopped"]), "b": jnp.tanh(p["free"])}

    def loss(output, t):
        return jnp.sum((output["a"] - t) ** 2) + jnp.sum((output["b"] - t[:2]) ** 4)

    params = {"used": normal(0, 4), "stopped": normal(1, 3), "unused": normal(2, 2, 3), "free": normal(3, 2)}
    return model, loss, params, (xs(), xs(3, 101))


@case
def list_of_parameters():
    def model(p, x):
        return p[1][0] @ jnp.tanh(p[0] @ x) * p[1][1]

    return model, losses.poisson, [normal(0, 5, 4), (normal(1, 3, 5), jnp.array(0.7))], (xs(), jnp.abs(xs(3, 101)))


def flat_model(model, params, batch):
    """The outputs of one example as a function of flat parameters, and back to the model's structure."""
    _, unravel = ravel_pytree(params)
    example = jax.tree.map(lambda a: a[0], batch[0])
    shapes = jax.eval_shape(model, params, example)
    leaves, structure = jax.tree.flatten(shapes)
    floating = [jnp.issubdtype(s.dtype, jnp.floating) for s in leaves]

    def outputs(flat, x):
        found = jax.tree.leaves(model(unravel(flat), x))
        real = [jnp.ravel(a) for a, flag in zip(found, floating, strict=True) if flag]
        return jnp.concatenate(real), [a for a, flag in zip(found, floating, strict=True) if not flag]

    def restore(flat, others):
        parts, others = [], iter(others)
        for shape, flag in zip(leaves, floating, strict=True):
            parts.append(flat[: shape.size].reshape(shape.shape) if flag else next(others))
            flat = flat[shape.size :] if flag else flat
        return jax.tree.unflatten(structure, parts)

    return outputs, restore


def reference(model, loss, params, batch):
    """J^T B J by autodiff, (N, N)."""
    outputs, restore = flat_model(model, params, batch)
    flat, _ = ravel_pytree(params)

    def one(x, *targets):
        J, others = jax.jacrev(outputs, has_aux=True)(flat, x)
        B = jax.hessian(lambda z: loss(restore(z, others), *targets))(outputs(flat, x)[0])
        return J.T @ B @ J

    return np.asarray(jax.jit(lambda batch: jnp.mean(jax.vmap(one)(*batch), axis=0))(batch))


def reference_fisher(model, loss, params, batch):
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda flat, x, *targets: loss(model(unravel(flat), x), *targets))
    g = jax.jit(jax.vmap(gradient, in_axes=(None, *(0 for _ in batch))))(flat, *batch)
    return np.asarray(g.T @ g / len(g))


@functools.cache
def references(name):
    """Both matrices of a case."""
    return reference(*CASES[name]()), reference_fisher(*CASES[name]())


@functools.cache
def error_of(model, loss):
    return lambda params, x, *targets: loss(model(params, x), *targets)


def assert_close(found, expected, tolerance=1e-10, scale=0.0):
    scale = max(scale, float(np.max(np.abs(expected), initial=0)))
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=tolerance * scale)


def wave(tree):
    return jax.tree.map(lambda s: jnp.cos(jnp.arange(s.size, dtype=s.dtype)).reshape(s.shape), tree)


def readings(operator):
    """What is compared of an operator."""
    vector = wave(operator.in_structure())
    found = {"matrix": operator.as_matrix(), "product": ravel_pytree(operator.mv(vector))[0]}
    found |= {"norm": operator.frobenius_norm(), "transposed": operator.T.as_matrix()}
    if not isinstance(operator, GaussNewtonCrossBlock):
        found |= {"diagonal": ravel_pytree(operator.diagonal())[0], "trace": operator.trace()}
        found |= {"eigenvalues": operator.eigvalsh(), "inertia": jnp.stack(operator.inertia(1e-8))}
    return found


def check_readings(found, matrix, vector, scale):
    close = functools.partial(assert_close, scale=scale)
    close(found["matrix"], matrix)
    close(found["product"], matrix @ vector)
    close(found["norm"], np.linalg.norm(matrix))
    close(found["transposed"], matrix.T)
    if "trace" in found:
        expected = np.linalg.eigvalsh(matrix)
        close(found["diagonal"], np.diag(matrix))
        close(found["trace"], np.trace(matrix))
        close(found["eigenvalues"], expected)
        assert found["eigenvalues"][0] >= -1e-12 * scale
        signs = [np.sum(expected > 1e-8), np.sum(expected < -1e-8), np.sum(abs(expected) <= 1e-8)]
        assert [int(n) for n in found["inertia"]] == signs


def check_everything(make, params, batch, matrix):
    """Both kinds of `blocks`, every method of every block, in one compiled program."""

    @jax.jit
    def read(params, batch):
        diagonal, full = make(blocks="diagonal")(params, *batch), make(blocks="full")(params, *batch)
        paths = [path for path, _ in diagonal.items()]
        blocks = [readings(block) for _, block in diagonal.items()]
        cross = [readings(full.block(paths[0], path)) for path in paths[1:]]
        return blocks, cross, readings(full.block(paths[0])), readings(full)

    blocks, cross, first, full = read(params, batch)
    ends = np.cumsum([0, *(leaf.size for leaf in jax.tree.leaves(params))])
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    vectors = [np.cos(np.arange(part.stop - part.start)) for part in parts]
    scale = np.max(np.abs(matrix))
    for found, part, vector in zip(blocks, parts, vectors, strict=True):
        check_readings(found, matrix[part, part], vector, scale)
    for found, part, vector in zip(cross, parts[1:], vectors[1:], strict=True):
        check_readings(found, matrix[parts[0], part], vector, scale)
    check_readings(first, matrix[parts[0], parts[0]], vectors[0], scale)
    check_readings(full, matrix, np.concatenate(vectors), scale)


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton_equals_autodiff(name):
    model, loss, params, batch = CASES[name]()
    make = functools.partial(jaxhess.gauss_newton, model, loss)
    check_everything(make, params, batch, references(name)[0])


@pytest.mark.parametrize("name", CASES)
def test_fisher_equals_autodiff(name):
    model, loss, params, batch = CASES[name]()
    make = functools.partial(jaxhess.fisher, error_of(model, loss))
    check_everything(make, params, batch, references(name)[1])


@pytest.mark.parametrize("name", CASES)
def test_products_and_diagonals_equal_autodiff(name):
    model, loss, params, batch = CASES[name]()
    matrix, fisher = references(name)
    vector = wave(params)

    @jax.jit
    def read(params, batch):
        product = jaxhess.gauss_newton_vp(model, loss, 3)(params, vector, *batch)
        entries = jaxhess.gauss_newton_diagonal(model, loss, 3)(params, *batch)
        return product, entries, jaxhess.fisher_diagonal(error_of(model, loss), 3)(params, *batch)

    found = read(params, batch)
    for tree in found:
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, params)
    product, entries, fisher_entries = (ravel_pytree(tree)[0] for tree in found)
    assert_close(product, matrix @ ravel_pytree(vector)[0])
    assert_close(entries, np.diag(matrix))
    assert_close(fisher_entries, np.diag(fisher))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("squared_error", (1, 3, 4, 7)),
        ("more_outputs_than_units", (1, 3)),
        ("tied_weights", (1, 3)),
        ("recurrent", (1, 3)),
        ("embedding", (1, 3)),
    ],
)
def test_chunks_change_nothing(name, sizes):
    """Chunks of one, with a rest, of all examples and of more than there are; the last two are one program for any model."""
    model, loss, params, batch = CASES[name]()

    @jax.jit
    def read(params, batch):
        made = {}
        for size, blocks in itertools.product((None, *sizes), ("diagonal", "full")):
            made[size, blocks, "gauss_newton"] = jaxhess.gauss_newton(model, loss, blocks, size)(params, *batch)
            made[size, blocks, "fisher"] = jaxhess.fisher(error_of(model, loss), blocks, size)(params, *batch)
        return {str(key): jax.tree.leaves(operator) for key, operator in made.items()}

    read = read(params, batch)
    for size, blocks, kind in itertools.product(sizes, ("diagonal", "full"), ("gauss_newton", "fisher")):
        whole, parts = read[str((None, blocks, kind))], read[str((size, blocks, kind))]
        chex.assert_trees_all_close(parts, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", [jax.nn.relu, jaxhess.leaky_relu])
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_piecewise_linear_networks_have_the_hessians_blocks(f, loss):
    model, loss = functools.partial(perceptron, f=f), getattr(losses, loss)
    params, batch = perceptron_parameters(), (xs(), jax.nn.softmax(xs(3, 101)))
    G = jaxhess.gauss_newton(model, loss)(params, *batch)
    H = jaxhess.hessian(error_of(model, loss))(params, *batch)
    for (path, block), (_, expected) in zip(G.items(), H.items(), strict=True):
        assert expected.frobenius_norm() > 0, path
        assert_close(block.as_matrix(), expected.as_matrix())


def test_the_narrower_of_factor_and_matrix_is_kept():
    model, loss, params, batch = CASES["squared_error"]()
    G = jaxhess.gauss_newton(model, loss)(params, *batch)
    assert isinstance(G["hidden"]["w"], GaussNewtonBlock)
    (use,) = G["hidden"]["w"].jacobian.uses
    assert use.rows.shape == (EXAMPLES, 3, 6)
    assert use.inputs.shape == (EXAMPLES, 4)
    assert G["hidden"]["w"].curvature.shape == (EXAMPLES, 3)
    assert isinstance(G["out"]["w"], KroneckerProductSum)
    assert G["out"]["w"].Q.shape == (EXAMPLES, 3, 3)
    assert isinstance(G["out"]["b"], Dense)
    wide, loss, params, batch = CASES["more_outputs_than_units"]()
    G = jaxhess.gauss_newton(wide, loss)(params, *batch)
    assert G["hidden"]["w"].Q.shape == (EXAMPLES, 2, 2)
    assert G["out"]["w"].Q.shape == (EXAMPLES, 9, 9)
    model, loss, params, batch = CASES["unused_stopped_and_free_of_data"]()
    assert isinstance(jaxhess.gauss_newton(model, loss)(params, *batch)["unused"], Diagonal)


def test_a_curvature_that_is_dense_stays_so():
    model, loss, params, batch = CASES["relu_and_classes"]()
    G = jaxhess.gauss_newton(model, loss)(params, *batch)
    assert G["hidden"]["w"].curvature.shape == (EXAMPLES, 3, 3)
    assert jaxhess.fisher(error_of(model, loss))(params, *batch)["hidden"]["w"].curvature is None


def test_diagonals_form_no_gradient_of_an_example():
    """A weight that meets one vector of each example: no array has the axes of both."""
    r, m, n = 5, 7, 11

    def error(w, x, t):
        return jnp.sum((jnp.tanh(w @ x) - t) ** 2)

    arguments = jnp.ones((m, n)), jnp.ones((r, n)), jnp.ones((r, m))
    programs = [
        jaxhess.fisher_diagonal(error),
        lambda *a: jaxhess.fisher(error)(*a).trace(),
        lambda *a: jaxhess.gauss_newton(lambda w, x: jnp.sin(w @ x)[:3], lambda z, t: jnp.sum((z - t[:3]) ** 2))(
            *a
        ).diagonal(),
    ]
    for program in programs:
        sizes = [v.aval.size for e in equations(jax.make_jaxpr(program)(*arguments).jaxpr) for v in e.outvars]
        assert max(sizes) < r * m * n


def test_a_matrix_of_some_hundred_rows():
    """Formed in strips from the diagonal on."""

    def model(w, x):
        return jnp.sin(w @ x)

    w, xs = normal(1, 20, 21), normal(2, 9, 21)
    found = jax.jit(
        lambda w: jaxhess.gauss_newton(model, losses.squared_error, blocks="full")(w, xs, xs[:, :20]).as_matrix()
    )(w)
    J = jax.vmap(jax.jacfwd(model), (None, 0))(w, xs).reshape(-1, 420)
    np.testing.assert_allclose(found, J.T @ J / 9, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found, found.T)


def test_indexing_follows_the_rows_first():
    model, loss, params, batch = CASES["squared_error"]()
    G = jaxhess.gauss_newton(model, loss, blocks="full")(params, *batch)
    assert isinstance(G, GaussNewton)
    cross = G["hidden"]["w"]["out"]["b"]
    assert isinstance(cross, GaussNewtonCrossBlock)
    assert (cross.out_size(), cross.in_size()) == (24, 3)
    assert_close(cross.as_matrix(), G.block("hidden/w", "out/b").as_matrix())
    assert_close(cross.as_matrix(), G.block(("hidden", "w"), ("out", "b")).as_matrix())
    assert isinstance(G["hidden"]["w"]["hidden"]["w"], GaussNewtonBlock)
    assert isinstance(G.block("out/b"), GaussNewtonBlock)
    assert "rows 'hidden/w', columns at 'out'" in repr(G["hidden"]["w"]["out"])
    with pytest.raises(KeyError, match=r"nowhere.*hidden, out"):
        G["hidden"]["w"]["nowhere"]
    with pytest.raises(KeyError, match=r"'nowhere'.*'hidden/b'"):
        G.block("nowhere")
    with pytest.raises(ValueError, match="has none"):
        cross.trace()
    with pytest.raises(ValueError, match="has none"):
        cross.diagonal()
    model, loss, params, batch = CASES["list_of_parameters"]()
    G = jaxhess.gauss_newton(model, loss, blocks="full")(params, *batch)
    assert G[1][0][0].as_matrix().shape == (15, 20)
    single = jaxhess.fisher(lambda w, x: jnp.sum(w @ x) ** 2, blocks="full")(jnp.ones((2, 3)), jnp.ones((4, 3)))
    assert_close(single.block().as_matrix(), single.as_matrix())


def test_sums_with_other_operators():
    model, loss, params, batch = CASES["squared_error"]()
    G = jaxhess.gauss_newton(model, loss)(params, *batch)
    H = jaxhess.hessian(error_of(model, loss))(params, *batch)
    difference = H - G
    assert isinstance(difference, StructuredOperator)
    assert_close(difference.as_matrix(), H.as_matrix() - G.as_matrix())
    full = jaxhess.gauss_newton(model, loss, blocks="full")(params, *batch)
    vector = wave(params)
    assert_close(ravel_pytree((full + G).mv(vector))[0], (full.as_matrix() + G.as_matrix()) @ ravel_pytree(vector)[0])


def programs(model, loss, batch):
    """All five transformations, each as a function of the parameters that gives arrays."""
    error = error_of(model, loss)
    return {
        "gauss_newton": lambda p: jaxhess.gauss_newton(model, loss)(p, *batch).as_matrix(),
        "full": lambda p: jaxhess.gauss_newton(model, loss, blocks="full")(p, *batch).as_matrix(),
        "fisher": lambda p: jaxhess.fisher(error, blocks="full")(p, *batch).as_matrix(),
        "product": lambda p: ravel_pytree(jaxhess.gauss_newton_vp(model, loss)(p, wave(p), *batch))[0],
        "entries": lambda p: ravel_pytree(jaxhess.gauss_newton_diagonal(model, loss)(p, *batch))[0],
        "fisher entries": lambda p: ravel_pytree(jaxhess.fisher_diagonal(error)(p, *batch))[0],
    }


@pytest.mark.parametrize("name", ["squared_error", "weight_norm_mask_and_low_rank", "recurrent"])
def test_vmap_over_an_ensemble(name):
    model, loss, params, batch = CASES[name]()
    ensemble = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    run = jax.jit(lambda p: {what: program(p) for what, program in programs(model, loss, batch).items()})
    found = jax.jit(jax.vmap(run))(ensemble)
    for k, factor in enumerate((1, 2, -1)):
        for what, alone in run(jax.tree.map(lambda p, f=factor: f * p, params)).items():
            assert_close(found[what][k], alone)
    operators = jax.vmap(lambda p: jaxhess.gauss_newton(model, loss, blocks="full")(p, *batch))(ensemble)
    assert_close(jax.vmap(lambda G: G.as_matrix())(operators)[0], references(name)[0])
    repr(operators)


def test_derivatives_pass():
    model, loss, params, batch = CASES["squared_error"]()
    flat, _ = ravel_pytree(params)
    ours = jax.grad(lambda p: jaxhess.gauss_newton(model, loss)(p, *batch).trace())(params)

    def trace(flat):
        outputs, _ = flat_model(model, params, batch)
        return sum(jnp.sum(jax.jacrev(outputs, has_aux=True)(flat, x)[0] ** 2) for x in batch[0]) / EXAMPLES

    assert_close(ravel_pytree(ours)[0], jax.grad(trace)(flat))


def test_compiles_once():
    model, loss, params, batch = CASES["squared_error"]()
    traces = []

    def counted(p, x):
        traces.append(1)
        return model(p, x)

    for program in programs(counted, loss, batch).values():
        program(params)
        first = len(traces)
        program(jax.tree.map(lambda p: p + 1, params))
        assert len(traces) == first
    outer = jax.jit(chex.assert_max_traces(lambda p: jaxhess.gauss_newton(model, loss)(p, *batch).trace(), n=1))
    for _ in range(2):
        assert_close(outer(params), jaxhess.gauss_newton(model, loss)(params, *batch).trace())


def narrowed(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-5)])
@pytest.mark.parametrize("name", ["squared_error", "relu_and_classes", "recurrent", "weight_norm_mask_and_low_rank"])
def test_narrow_types_are_computed_in_float32(name, dtype, tolerance):
    model, loss, params, batch = CASES[name]()
    params, batch = narrowed((params, batch), dtype)
    exact = reference(model, loss, *narrowed((params, batch), jnp.float64))
    G = jaxhess.gauss_newton(model, loss, blocks="full")(params, *batch)
    assert G.as_matrix().dtype == jnp.float32
    assert_close(G.as_matrix(), exact, tolerance)
    assert_close(G.eigvalsh(), np.linalg.eigvalsh(exact), 10 * tolerance)
    blocks = jaxhess.gauss_newton(model, loss)(params, *batch)
    assert blocks.as_matrix().dtype == jnp.float32
    product = jaxhess.gauss_newton_vp(model, loss)(params, wave(params), *batch)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product))
    expected = exact @ np.asarray(ravel_pytree(narrowed(wave(params), jnp.float64))[0])
    assert_close(ravel_pytree(narrowed(product, jnp.float64))[0], expected, 1e-2 if dtype == jnp.bfloat16 else tolerance)


def test_computing_in_bfloat16_inside():
    def model(p, x, dtype):
        return p["out"].astype(dtype) @ jnp.tanh(p["w"].astype(dtype) @ x.astype(dtype))

    params = narrowed({"w": normal(0, 6, 4), "out": normal(1, 3, 6)}, jnp.float32)
    batch = narrowed((xs(), xs(3, 101)), jnp.float32)
    found = jaxhess.gauss_newton(functools.partial(model, dtype=jnp.bfloat16), losses.squared_error)(params, *batch)
    exact = jaxhess.gauss_newton(functools.partial(model, dtype=jnp.float32), losses.squared_error)(params, *batch)
    assert found.as_matrix().dtype == jnp.float32
    assert_close(found.as_matrix(), exact.as_matrix(), 2e-2)


def test_products_ask_for_full_precision():
    model, loss, params, batch = CASES["attention_and_layer_norm"]()
    for what, program in programs(model, loss, batch).items():
        products = [e for e in equations(jax.make_jaxpr(program)(params).jaxpr) if e.primitive.name == "dot_general"]
        assert products, what
        for equation in products:
            precision = equation.params["precision"]
            chosen = precision if isinstance(precision, tuple) else (precision,)
            assert set(chosen) == {jax.lax.Precision.HIGHEST}, (what, equation)


@pytest.mark.parametrize(
    "name", ["squared_error", "tied_weights", "weight_norm_mask_and_low_rank", "more_outputs_than_units"]
)
def test_nan_in_nan_out(name):
    """From a parameter, an input and a target."""
    model, loss, params, batch = CASES[name]()
    error = error_of(model, loss)

    @jax.jit
    def read(blocks, wholes, trees):
        sums = jax.tree.map(jnp.sum, trees), [(G.trace(), G.frobenius_norm()) for G in wholes]
        traces = [{path: block.trace() for path, block in G.items()} for G in blocks]
        inertias = [G.inertia() for G in wholes], [[block.inertia() for _, block in G.items()] for G in blocks]
        return sums, traces, inertias

    for where in ("parameter", "input", "target"):
        broken = with_nan(params, batch, where)
        sums, traces, inertias = read(
            (jaxhess.gauss_newton(model, loss)(*broken), jaxhess.fisher(error)(*broken)),
            [make(*broken) for make in (jaxhess.gauss_newton(model, loss, "full"), jaxhess.fisher(error, "full"))],
            (
                jaxhess.gauss_newton_vp(model, loss)(broken[0], wave(params), *broken[1:]),
                jaxhess.gauss_newton_diagonal(model, loss)(*broken),
                jaxhess.fisher_diagonal(error)(*broken),
            ),
        )
        for path, value in jax.tree_util.tree_leaves_with_path((sums, traces)):
            assert np.isnan(value), (where, path)
        for path, count in jax.tree_util.tree_leaves_with_path(inertias):
            assert count == -1, (where, path)


def test_an_error_of_nan_alone_shows():
    """The error is NaN, its derivatives are not."""

    def loss(z, t):
        return 0.5 * jnp.sum(z**2) + t

    x, t = xs(), jnp.zeros(EXAMPLES).at[1].set(jnp.nan)
    model = lambda w, x: w @ x  # noqa: E731
    w = normal(0, 3, 4)
    assert jnp.isnan(jaxhess.gauss_newton(model, loss)(w, x, t).as_matrix()).all()
    assert jnp.isnan(jaxhess.fisher(error_of(model, loss))(w, x, t).as_matrix()).all()
    assert jnp.isnan(jaxhess.gauss_newton_vp(model, loss)(w, w, x, t)).all()
    assert jnp.isnan(jaxhess.gauss_newton_diagonal(model, loss)(w, x, t)).all()


NOT_CONVEX = {
    "squares_of_probabilities": lambda z, t: jnp.sum((jax.nn.sigmoid(z) - t) ** 2),
    "cosines": lambda z, t: jnp.sum(jnp.cos(z - t)),
    "cauchy": lambda z, t: jnp.sum(jnp.log1p((z - t) ** 2)),
    "one_direction": lambda z, t: jnp.sum((z - t) ** 2) - 0.3 * z[0] * z[1] * jnp.sum(t * 0 + 10),
    "gaussian_with_its_width": lambda z, t: losses.gaussian(jnp.stack([z, z[::-1]]), t),
}


@pytest.mark.parametrize("name", NOT_CONVEX)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
@pytest.mark.parametrize("transformation", ["gauss_newton", "gauss_newton_vp", "gauss_newton_diagonal"])
def test_losses_that_are_not_convex_are_refused(name, dtype, transformation):
    loss = NOT_CONVEX[name]
    params, batch = narrowed((perceptron_parameters(), (xs(), xs(3, 101))), dtype)
    vector = (params,) if transformation == "gauss_newton_vp" else ()
    with pytest.raises(ValueError, match=r"loss <lambda> is not convex.*eigenvalue -\d"):
        getattr(jaxhess, transformation)(perceptron, loss)(params, *vector, *batch)
    with pytest.raises(ValueError, match="is not convex"):
        jax.jit(lambda p: getattr(jaxhess, transformation)(perceptron, loss)(p, *vector, *batch))(params)


CONVEX = {
    "squared_error": losses.squared_error,
    "softmax_cross_entropy": losses.softmax_cross_entropy,
    "sigmoid_cross_entropy": losses.sigmoid_cross_entropy,
    "poisson": losses.poisson,
    "huber": losses.huber,
    "optax_l2": lambda z, t: jnp.sum(optax.l2_loss(z, t)),
    "optax_huber": lambda z, t: jnp.sum(optax.huber_loss(z, t)),
    "optax_log_cosh": lambda z, t: jnp.sum(optax.log_cosh(z, t)),
    "optax_softmax": optax.softmax_cross_entropy,
    "optax_sigmoid": lambda z, t: jnp.sum(optax.sigmoid_binary_cross_entropy(z, t)),
    "optax_kl": lambda z, t: optax.kl_divergence(jax.nn.log_softmax(z), t),
    "optax_squared": lambda z, t: jnp.mean(optax.squared_error(z, t)),
    "absolute": lambda z, t: jnp.sum(jnp.abs(z - t)),
    "hinge": lambda z, t: jnp.sum(optax.hinge_loss(z, jnp.sign(t))),
    "squared_hinge": lambda z, t: jnp.sum(jnp.maximum(1 - z * jnp.sign(t), 0) ** 2),
}


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_convex_losses_are_not(name, dtype):
    params, batch = narrowed((perceptron_parameters(), (xs(), jax.nn.softmax(xs(3, 101)))), dtype)
    G = jaxhess.gauss_newton(perceptron, CONVEX[name], blocks="full")(params, *batch)
    exact = reference(perceptron, CONVEX[name], *narrowed((params, batch), jnp.float64))
    assert_close(G.as_matrix(), exact, 1e-10 if dtype == jnp.float64 else 1e-5)


def test_many_outputs_are_looked_at_in_some_directions():
    w, x = normal(0, 300, 4), xs()
    with pytest.raises(ValueError, match="is not convex"):
        jaxhess.gauss_newton_vp(lambda w, x: w @ x, lambda z, t: -jnp.sum(z**2) * t**2)(w, w, x, jnp.ones(EXAMPLES))
    product = jaxhess.gauss_newton_vp(lambda w, x: w @ x, lambda z, t: jnp.sum(z**2) * t**2)(w, w, x, jnp.ones(EXAMPLES))
    assert_close(product, 2 * w @ (x.T @ x) / EXAMPLES)


def bad_calls():
    model, loss, params, (x, t) = CASES["squared_error"]()
    yield "length", model, loss, params, (x, t[:3]), [r"has 4", r"has 3"]
    yield "empty", model, loss, params, (x[:0], t[:0]), ["empty"]
    yield "vector", model, lambda z, t: z - t, params, (x, t), ["scalar", "perceptron"]
    yield (
        "integers only",
        lambda p, x: jnp.argmax(p["hidden"]["w"] @ x),
        loss,
        params,
        (x, t),
        ["real floating-point outputs"],
    )
    yield "complex", lambda p, x: 1j * (p["hidden"]["w"] @ x), lambda z, t: jnp.abs(z).sum(), params, (x, t), ["complex"]
    yield "no output", model, lambda z, t: jnp.sum(t**2), params, (x, t), ["does not depend on"]
    yield "no parameters", model, loss, {}, (x, t), ["no arrays"]
    yield "no function", 3, loss, params, (x, t), ["must be a function"]


@pytest.mark.parametrize(
    ("model", "loss", "params", "batch", "words"), [c[1:] for c in bad_calls()], ids=[c[0] for c in bad_calls()]
)
@pytest.mark.parametrize("transformation", ["gauss_newton", "gauss_newton_diagonal"])
def test_bad_input_is_refused(transformation, model, loss, params, batch, words):
    if not params:
        model = lambda p, x: x  # noqa: E731
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(jaxhess, transformation)(model, loss)(params, *batch)
    for word in words:
        caught.match(word)


def test_bad_vectors_and_options_are_refused():
    model, loss, params, batch = CASES["squared_error"]()
    product = jaxhess.gauss_newton_vp(model, loss)
    with pytest.raises(ValueError, match="structure"):
        product(params, params["out"], *batch)
    with pytest.raises(ValueError, match=r"vector\['hidden'\]\['b'\] must have the shape \(6,\)"):
        product(params, jax.tree.map(lambda p: p[:1], params), *batch)
    with pytest.raises(ValueError, match="real floating"):
        product(params, jax.tree.map(lambda p: jnp.ones(p.shape, int), params), *batch)
    with pytest.raises(ValueError, match="'both'"):
        jaxhess.gauss_newton(model, loss, blocks="both")
    with pytest.raises(ValueError, match="batch_size"):
        jaxhess.fisher(error_of(model, loss), batch_size=0)
    with pytest.raises(ValueError, match="scalar"):
        jaxhess.fisher(lambda w, x: w @ x)(jnp.ones((2, 3)), jnp.ones((4, 3)))
    G = jaxhess.gauss_newton(model, loss, blocks="full")(params, *batch)
    with pytest.raises(ValueError, match=r"GaussNewton.mv: .*missing .*hidden/b.*unexpected .*b.*w"):
        G.mv(params["out"])
    with pytest.raises(ValueError, match=r"'hidden/b' needs shape \(6,\)"):
        G.mv(jax.tree.map(lambda p: p[:1], params))
    with pytest.raises(ValueError, match=r"GaussNewtonBlock.mv: needs an array of shape \(6, 4\)"):
        G.block("hidden/w").mv(jnp.ones(3))


def test_a_loss_with_a_rule_that_is_no_derivative_is_refused():
    @jax.custom_vjp
    def clipped(z):
        return jnp.sum(z**2)

    clipped.defvjp(lambda z: (jnp.sum(z**2), z), lambda z, g: (g * jnp.clip(2 * z, -0.1, 0.1),))
    model, _, params, batch = CASES["squared_error"]()
    with pytest.raises(NotImplementedError, match="not the derivative of its value"):
        jaxhess.gauss_newton(model, lambda z, t: clipped(z - t))(params, *batch)


def test_loops_of_unknown_length_are_refused_with_their_place():
    def model(w, x):
        return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: jnp.tanh(w @ y) / 3, x)

    with pytest.raises(NotImplementedError, match=r"while at .*test_gauss_newton.py"):
        jaxhess.gauss_newton(model, losses.squared_error)(jnp.ones((3, 3)), jnp.ones((2, 3)), jnp.ones((2, 3)))
