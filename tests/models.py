"""Models that the tests try, by name: a function giving (error of one example, parameters, batch)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

EXAMPLES = 4
MODELS: dict[str, Callable] = {}


def model(function):
    """Enter a model into every test that goes over `MODELS`. Made once: what is compiled for its error serves again."""
    MODELS[function.__name__] = functools.cache(function)
    return function


def normal(seed, *shape):
    return jnp.asarray(0.5 * np.random.default_rng(seed).normal(size=shape))


def inputs(n=4, m=3):
    return normal(100, EXAMPLES, n), normal(101, EXAMPLES, m)


def labels(n=4):
    return normal(100, EXAMPLES, n), jnp.arange(EXAMPLES) % 3


def with_nan(params, batch, where):
    """(parameters, *batch) with the first entry of the first parameter, "input" or "target" NaN."""
    trees = [params, *batch]
    place = ["parameter", "input", "target"].index(where)
    (first, *others), structure = jax.tree.flatten(trees[place])
    trees[place] = jax.tree.unflatten(structure, [first.at[(0,) * first.ndim].set(jnp.nan), *others])
    return trees


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


@model
def perceptron():
    def error(p, x, t):
        z = p["out"]["w"] @ jnp.tanh(p["hidden"]["w"] @ x + p["hidden"]["b"]) + p["out"]["b"]
        return 0.5 * jnp.sum((z - t) ** 2)

    params = {"hidden": {"w": normal(0, 6, 4), "b": normal(1, 6)}, "out": {"w": normal(2, 3, 6), "b": normal(3, 3)}}
    return error, params, inputs()


@model
def transposed_weights():
    def error(p, x, t):
        z = jnp.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T + p["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(z, t)

    return error, {"w1": normal(0, 6, 4), "b1": normal(1, 6), "w2": normal(2, 3, 6), "b2": normal(3, 3)}, labels()


@model
def input_major_and_scaled():
    def error(p, x, t):
        z = jax.nn.gelu(x @ p["w1"] / jnp.sqrt(4.0) + p["b1"]) @ (-p["w2"]) + p["b2"]
        return jnp.sum(optax.sigmoid_binary_cross_entropy(z, jax.nn.sigmoid(t)))

    return error, {"w1": normal(0, 4, 6), "b1": normal(1, 6), "w2": normal(2, 6, 3), "b2": normal(3, 3)}, inputs()


@model
def reshaped_weights():
    def error(p, x, t):
        heads = jnp.einsum("hdn,n->hd", p["w"].reshape(2, 3, 4), x)
        h = jnp.sin(jnp.einsum("hd,hde->he", heads, p["v"].transpose(1, 0, 2)))
        z = p["o"].reshape(4, 3).T @ h.reshape(-1)
        return jnp.sum(jnp.logaddexp(z, t))

    return error, {"w": normal(0, 6, 4), "v": normal(1, 3, 2, 2), "o": normal(2, 2, 6)}, inputs()


@model
def tied_weights():
    def error(p, x, t):
        h = jnp.tanh(p["w"] @ x + p["b"])
        h = jnp.tanh(p["u"] @ h) + h
        h = jnp.tanh(p["u"] @ h)
        return jnp.sum((p["w"].T @ h + p["c"] - x) ** 2) + jnp.sum(t * h[:3])

    return error, {"w": normal(0, 6, 4), "b": normal(1, 6), "u": normal(2, 6, 6), "c": normal(3, 4)}, inputs()


@model
def tied_in_one_row():
    def error(p, x, t):
        h = x
        for _ in range(3):
            h = jax.nn.silu(p["w"] @ h + p["b"])
        return jnp.sum(p["w"] @ h * x) + jnp.sum(p["b"] ** 3) * jnp.sum(t)

    return error, {"w": normal(0, 4, 4), "b": normal(1, 4)}, inputs()


@model
def gates_and_layer_norm():
    def error(p, x, t):
        y = (p["w"] @ x) * jax.nn.sigmoid(p["v"] @ x + p["b"])
        y = (y - y.mean()) / jnp.sqrt(y.var() + 1e-5) * p["gamma"] + p["beta"]
        y = y + jax.nn.silu(p["r"] @ y)
        return -jax.nn.log_softmax(p["o"] @ y)[t]

    params = {"w": normal(0, 5, 4), "v": normal(1, 5, 4), "b": normal(2, 5), "gamma": 1 + normal(3, 5)}
    params |= {"beta": normal(4, 5), "r": normal(5, 5, 5), "o": normal(6, 3, 5)}
    return error, params, labels()


@model
def derived_weights():
    def error(p, x, t):
        w = p["g"][:, None] * p["v"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True)
        masked = p["w2"] * (jnp.arange(18).reshape(3, 6) % 2)
        z = (masked + p["a"] @ p["b"]) @ jnp.sin(w @ x)
        penalty = 0.01 * jnp.sum(p["w2"] ** 2) + 0.1 * jnp.sum(p["v"] ** 4)
        return 0.5 * jnp.sum((z - t) ** 2) + penalty

    params = {"g": normal(0, 6), "v": normal(1, 6, 4), "w2": normal(2, 3, 6), "a": normal(3, 3, 2), "b": normal(4, 2, 6)}
    return error, params, inputs()


@model
def one_flat_vector():
    def error(p, x, t):
        return 0.5 * jnp.sum((p[24:42].reshape(3, 6) @ jnp.tanh(p[:24].reshape(6, 4) @ x) - t) ** 2)

    return error, normal(0, 42), inputs()


@model
def stacked_layers():
    def error(p, x, t):
        for k in range(2):
            x = x + jnp.tanh(p["w"][k] @ x + p["b"][k])
        return jnp.sum(jnp.abs(x[:3] - t) ** 3)

    return error, {"w": normal(0, 2, 4, 4), "b": normal(1, 2, 4)}, inputs()


@model
def attention():
    def error(p, x, t):
        X = x.reshape(2, 2) @ p["e"]
        q, k, v = (jnp.einsum("td,hdk->htk", X, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("htk,hsk->hts", q, k) / 1.4, axis=-1)
        X = X + jnp.einsum("hts,hsk,hkd->td", weights, v, p["o"])
        return jnp.sum(X**2) * t[0] + jnp.prod(X[0])

    params = {name: normal(n, 2, 4, 2) for n, name in enumerate("qkv")} | {"e": normal(3, 2, 4), "o": normal(4, 2, 2, 4)}
    return error, params, inputs()


@model
def several_positions():
    def error(p, x, t):
        X = x.reshape(2, 2)
        y = jax.vmap(lambda row: jax.nn.softplus(p["w"].T @ row + p["b"]))(X)
        return jnp.sum(y**2) + jnp.sum(jnp.maximum(X @ p["w"], 0.0) * t[0])

    return error, {"w": normal(0, 2, 3), "b": normal(1, 3)}, inputs()


@model
def two_layouts_of_one_parameter():
    def error(p, x, t):
        h = jnp.cos(p["w"].reshape(6, 2) @ x[:2])
        return jnp.sum(jnp.exp(p["w"].reshape(3, 4) @ x - t)) + jnp.sum(p["w"].reshape(2, 6) @ h)

    return error, {"w": normal(0, 12)}, inputs()


@model
def weight_in_products_and_elsewhere():
    def error(p, x, t):
        h = jnp.tanh(p["w"] @ x)
        h = jnp.tanh(jnp.sum(p["w"][:, 0] * h * x[0]) + p["w"] @ x * h)
        return jnp.sum(h**2) + jnp.sum(jnp.sin(p["w"] * x[1])) + p["s"] * h[0] * p["s"] + t[0]

    return error, {"w": normal(0, 5, 4), "s": jnp.array(0.7)}, inputs()


@model
def own_derivatives():
    @jax.custom_jvp
    def squares(x):
        return jnp.sum(x**2)

    squares.defjvp(lambda p, t: (squares(p[0]), jnp.sum(2 * p[0] * t[0])))

    @jax.custom_vjp
    def product_and_sum(a, b):
        return a * b, jnp.sum(a) + b

    product_and_sum.defvjp(
        lambda a, b: ((a * b, jnp.sum(a) + b), (a, b)), lambda ab, g: (g[0] * ab[1] + jnp.sum(g[1]), g[0] * ab[0] + g[1])
    )

    def error(p, x, t):
        y = sine(p["w"]) @ x + p["b"]
        a, b = product_and_sum(jnp.tanh(y), p["b"])
        return jnp.sum(sine(y) ** 3) + squares(y) + jnp.max(y) * t[0] + jnp.sum(a * b**2)

    return error, {"w": normal(0, 6, 4), "b": normal(1, 6)}, inputs()


@model
def operations_without_a_rule():
    def error(p, x, t):
        y = jax.checkpoint(lambda p, x: jnp.linalg.inv(3 * jnp.eye(4) + jnp.outer(p["b"], x)) @ p["b"])(p, x)
        y = jax.lax.cond(t[0] > 0, jnp.sin, lambda y: y**2, y)
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(p["w"] @ c), None), y, None, length=3)
        return jnp.cumprod(1 + y)[-1] + jnp.sort(y)[1] ** 2 + jnp.sum(jnp.cumsum(y) ** 2) + jax.nn.logsumexp(y)

    return error, {"b": normal(0, 4), "w": normal(1, 4, 4)}, inputs()


@model
def indexing():
    def error(p, x, t):
        y = jnp.tanh(p["w"] @ p["embedding"][t]) * x
        y = jnp.concatenate([y, y[::-1] ** 2])[1:6].at[2].add(y[0]).at[0].set(1.0)
        y = jnp.where(y > 0, y, 0.1 * y**2)
        return jnp.sum(jnp.pad(y, (1, 1)).reshape(1, 7)) + p["line"][t % 2] ** 2 * y[1]

    return error, {"embedding": normal(0, 3, 4), "w": normal(1, 4, 4), "line": normal(2, 2)}, labels()


@model
def several_outputs_and_a_list():
    def error(p, example):
        left, right = jnp.split(p[0] @ example["x"], 2)
        return jnp.linalg.norm(left * right + p[1]) + jnp.dot(left, right) * p[2] + jnp.arctan2(left[0], 2 + right[0] ** 2)

    return error, [normal(0, 6, 4), normal(1, 3), jnp.array(1.5)], ({"x": inputs()[0]},)


@model
def unused_and_constant():
    def error(p, x, t):
        return jnp.sum(p["used"] ** 4) + 0.0 * jnp.sum(x) + jnp.sum(jax.lax.stop_gradient(p["stopped"]) * p["used"][:3] * t)

    return error, {"used": normal(0, 4), "stopped": normal(1, 3), "unused": normal(2, 2, 3)}, inputs()


@model
def no_data_at_all():
    def error(p):
        return jnp.sum(jnp.tanh(p["w"] @ p["x"]) ** 2)

    return error, {"w": normal(0, 3, 4), "x": normal(1, 4)}, ()


@model
def decompositions():
    """JAX's derivatives of these are for symmetric tangents only."""

    def error(p, x, t):
        K = jnp.exp(-((p["l"][:, None] - p["l"][None, :]) ** 2)) + jnp.outer(x, x) + jnp.exp(p["s"]) * jnp.eye(4)
        L = jnp.linalg.cholesky(K)
        vectors = jnp.linalg.eigh(K)[1]
        alpha = jax.scipy.linalg.cho_solve((L, True), x)
        return x @ alpha + jnp.sum(jnp.log(jnp.diag(L))) + jnp.sum((vectors[:, 0] @ x) ** 4) + t[0]

    return error, {"l": jnp.array([0.1, 0.9, 2.0, 3.3]), "s": jnp.array(0.3)}, inputs()


@model
def empty_parts():
    def error(p, x, t):
        y = jnp.tanh(p["w"] @ x)
        y = jax.lax.associative_scan(jnp.multiply, jnp.concatenate([y[:0], y]))
        return jnp.sum(y**2) + jnp.sum(y[5:]) + jnp.sum(p["none"] @ x)

    return error, {"w": normal(0, 5, 4), "none": jnp.zeros((0, 4))}, inputs()


@model
def custom_rule_on_a_weight():
    def error(p, x, t):
        return jnp.sum((sine(p["v"]) @ jnp.tanh(sine(p["w"]) @ x) - t) ** 2)

    return error, {"w": normal(0, 5, 4), "v": normal(1, 3, 5)}, inputs()


@model
def derivatives_inside():
    """A physics-informed error: the Laplacian of the network with respect to its input."""

    def error(p, x, t):
        def u(x):
            return p["v"] @ jnp.tanh(p["w"] @ x + p["b"])

        return (jnp.trace(jax.hessian(u)(x)) - t[0]) ** 2

    return error, {"w": normal(0, 5, 4), "b": normal(1, 5), "v": normal(2, 5)}, inputs()


@model
def loops_inside_custom_rules():
    """A scan whose carry mixes components only from its second step on."""

    def flipping(x):
        def body(carry, _):
            a, y = carry
            return (y, jnp.sin(y) + jnp.flip(a)), None

        return jax.lax.scan(body, (jnp.zeros_like(x), x), None, length=3)[0][1]

    g = jax.custom_jvp(flipping)
    g.defjvp(lambda p, t: jax.jvp(flipping, p, t))

    def error(p, x, t):
        return jnp.sum(g(p["w"] @ x) ** 2) + jnp.sum(jnp.abs(jnp.tanh(x + 1j)) * p["v"] ** 2)

    return error, {"w": normal(0, 3, 4), "v": normal(1, 4)}, inputs()


@model
def heads_of_one_output():
    def error(p, x, t):
        X = x.reshape(2, 2)
        y = jnp.sin(p["column"][:, 0] @ x) + jnp.sin(p["row"][0] @ x) + jnp.cos(jnp.einsum("ij,ij->", p["full"], X))
        return y**2 + jnp.sum(jnp.sin(p["square"][:, :, None, None] * X[None, None])) + jnp.sum((-p["row"]) @ x * t[0])

    return (
        error,
        {"column": normal(0, 4, 1), "row": normal(1, 1, 4), "full": normal(2, 2, 2), "square": normal(3, 2, 2)},
        inputs(),
    )
