"""Models with loops that the tests try, by name: a function giving (error of one example, parameters, batch)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from models import normal, sine

import jaxhess
from jaxhess import activations, losses
from jaxhess.activations import tanh

EXAMPLES, STEPS, INPUTS, UNITS, OUTPUTS = 3, 4, 2, 3, 2
SEQUENCES: dict[str, Callable] = {}


def sequence(function):
    """Enter a model into every test that goes over `SEQUENCES`."""
    SEQUENCES[function.__name__] = functools.cache(function)
    return function


def batch_of(tau=STEPS, n=INPUTS, outputs=OUTPUTS):
    """Inputs and targets at every step."""
    return 2 * normal(100, EXAMPLES, tau, n), normal(101, EXAMPLES, tau, outputs)


def labelled(tau=STEPS, n=INPUTS, outputs=OUTPUTS):
    """Inputs, and a class at every step."""
    return 2 * normal(100, EXAMPLES, tau, n), jnp.arange(EXAMPLES * tau).reshape(EXAMPLES, tau) % outputs


def weights(**shapes):
    """A normal array for each name."""
    return {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}


def square(z, t):
    return 0.5 * jnp.sum((z - t) ** 2)


def steps(cell, state, x, **options):
    """The emitted outputs of a scan."""
    return jax.lax.scan(cell, state, x, **options)[1]


# --- the layer


def elman_params(depth=1, n=INPUTS, m=UNITS, out=None, bias=True):
    """Weights of stacked recurrent layers and, with `out`, of a head."""
    params = {}
    for k in range(depth):
        names = {"W": (m, n if k == 0 else m), "U": (m, m)} | ({"b": (m,)} if bias else {})
        params[f"layer{k}"] = {name: normal(10 * k + s, *shape) for s, (name, shape) in enumerate(names.items())}
    if out is not None:
        params["head"] = {"V": normal(50, out, m), "c": normal(51, out)}
    return params


def states(params, x, f: Callable = tanh, **options):
    """All states of the last one of stacked recurrent layers."""
    for name in sorted(name for name in params if name.startswith("layer")):
        layer = params[name]
        x = jaxhess.recurrent(layer["W"], layer["U"], layer.get("b"), x, f, **options)
    return x


def head(params, z):
    return jaxhess.dense(params["head"]["V"], params["head"]["c"], z)


def one_layer(f: Callable = tanh, tau: int = STEPS, loss: Callable = losses.squared_error):
    """A small net for what is tried with many activations and lengths."""

    def error(p, x, t):
        return loss(states(p, x, f) @ jnp.array([[1.0, -0.5], [0.3, 0.8]]), t)

    return error, elman_params(m=2), batch_of(tau)


@sequence
def loss_on_all_steps():
    return one_layer()


@sequence
def two_layers_and_a_head_on_the_last_step():
    def error(p, x, t):
        return losses.softmax_cross_entropy(head(p, states(p, x)[-1]), jax.nn.softmax(t[-1]))

    return error, elman_params(2, out=OUTPUTS), batch_of()


@sequence
def three_layers_from_a_step_on():
    def error(p, x, t):
        return square(states(p, x, activations.sigmoid)[1:], t[1:])

    return error, elman_params(3, m=2, bias=False), batch_of()


@sequence
def two_layers_and_a_head_on_all_steps():
    def error(p, x, t):
        z = head(p, states(p, x))
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(z, t))

    return error, elman_params(2, m=2, bias=False, out=3), labelled(outputs=3)


@sequence
def random_steps_in_the_loss():
    def error(p, x, t, counted):
        z = head(p, states(p, x, activations.softplus))
        return jnp.sum(jnp.where(counted, jnp.sum(jnp.exp(z) - t * z, axis=-1), 0))

    counted = jax.random.bernoulli(jax.random.key(3), 0.5, (EXAMPLES, STEPS))
    return error, elman_params(out=OUTPUTS), (*batch_of(), counted)


@sequence
def constant_initial_state():
    def error(p, x, t):
        return square(states(p, x, initial_state=jnp.array([0.5, -0.3])), t)

    return error, elman_params(m=2), batch_of()


@sequence
def initial_state_is_a_parameter():
    def error(p, x, t):
        layer = p["layer0"]
        z = jaxhess.recurrent(layer["W"], layer["U"], layer["b"], x, tanh, p["start"])
        return losses.poisson(head(p, z[-1]), jnp.abs(t[-1]))

    return error, elman_params(out=OUTPUTS) | {"start": normal(70, UNITS)}, batch_of()


@sequence
def masked_steps():
    def error(p, x, t, mask):
        return square(states(p, x, mask=mask)[-1], t[-1])

    lengths = jnp.array([4, 2, 0])
    return error, elman_params(2, m=2, bias=False), (*batch_of(), jnp.arange(STEPS)[None] < lengths[:, None])


@sequence
def no_bias_and_relu():
    def error(p, x, t):
        return square(head(p, states(p, x, activations.relu)), t)

    return error, elman_params(2, m=4, bias=False, out=OUTPUTS), batch_of()


@sequence
def one_layer_used_twice():
    def error(p, x, t):
        z = x
        for _ in range(2):
            z = jaxhess.recurrent(p["W"], p["U"], p["b"], z)
        return square(z, t)

    return error, weights(W=(2, 2), U=(2, 2), b=(2,)), batch_of()


@sequence
def one_matrix_for_inputs_and_states():
    def error(p, x, t):
        return square(jaxhess.recurrent(p["W"], p["W"], p["b"], x), t)

    return error, weights(W=(2, 2), b=(2,)), batch_of()


@sequence
def transposed_recurrent_weights():
    def error(p, x, t):
        return square(jaxhess.recurrent(p["W"].T, p["U"].T, None, x)[:, :2], t)

    return error, weights(W=(2, 3), U=(3, 3)), batch_of()


@sequence
def masked_recurrent_weights():
    def error(p, x, t):
        U = p["U"] * (1 - jnp.eye(3))
        return square(jaxhess.recurrent(p["W"], U, p["b"], x)[:, :2], t)

    return error, weights(W=(3, 2), U=(3, 3), b=(3,)), batch_of()


@sequence
def normalised_recurrent_weights():
    def error(p, x, t):
        U = p["g"][:, None] * p["v"] / jnp.linalg.norm(p["v"], axis=1, keepdims=True)
        return square(jaxhess.recurrent(p["W"], U, None, x), t)

    return error, weights(W=(2, 2), g=(2,), v=(2, 2)), batch_of()


@sequence
def low_rank_recurrent_weights():
    def error(p, x, t):
        return square(jaxhess.recurrent(p["W"], p["A"] @ p["B"], None, x)[:, :2], t) + 0.1 * jnp.sum(p["A"] ** 4)

    return error, weights(W=(3, 2), A=(3, 1), B=(1, 3)), batch_of()


@sequence
def scaled_recurrent_weights():
    def error(p, x, t):
        return square(jaxhess.recurrent(-p["W"] / 3, p["s"] * p["U"], p["s"] * p["b"], x), t)

    return error, weights(W=(2, 2), U=(2, 2), b=(2,)) | {"s": jnp.array(0.7)}, batch_of()


@sequence
def orthogonal_recurrent_weights():
    """The Cayley transform of a skew-symmetric matrix."""

    def error(p, x, t):
        skew = p["S"] - p["S"].T
        U = jnp.linalg.solve(jnp.eye(3) + skew, jnp.eye(3) - skew)
        return square(jaxhess.recurrent(p["W"], U, None, x)[:, :2], t)

    return error, weights(W=(3, 2), S=(3, 3)), batch_of()


@sequence
def spectrally_normalised_recurrent_weights():
    """Power iterations, a loop that depends on no data."""

    def error(p, x, t):
        def iterate(v, _):
            v = p["U"].T @ (p["U"] @ v)
            return v / jnp.linalg.norm(v), None

        v, _ = jax.lax.scan(iterate, jnp.array([1.0, 0.5]), None, length=3)
        return square(jaxhess.recurrent(p["W"], p["U"] / jnp.linalg.norm(p["U"] @ v), None, x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def dense_below_and_between():
    def error(p, x, t):
        z = jaxhess.dense(p["E"], None, x, tanh)
        z = states({"layer0": p["layer0"]}, z)
        z = jaxhess.dense(p["M"], p["c"], z, activations.gelu) + z
        return square(states({"layer1": p["layer1"]}, z)[-1], t[-1])

    return error, elman_params(2, m=2) | weights(E=(2, 2), M=(2, 2), c=(2,)), batch_of()


@sequence
def embedding_tied_to_the_head():
    def error(p, tokens):
        z = jaxhess.recurrent(p["W"], p["U"], p["b"], p["E"][tokens[:-1]])
        scores = jaxhess.dense(p["E"], None, z)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores, tokens[1:]))

    tokens = jax.random.randint(jax.random.key(0), (EXAMPLES, 5), 0, 4)
    return error, weights(W=(2, 2), U=(2, 2), b=(2,), E=(4, 2)), (tokens,)


@sequence
def weights_of_two_groups_by_vmap():
    def error(p, x, t):
        z = jax.vmap(lambda W, U, b: jaxhess.recurrent(W, U, b, x))(p["W"], p["U"], p["b"])
        return square(z[0] * z[1], t)

    return error, weights(W=(2, 2, 2), U=(2, 2, 2), b=(2, 2)), batch_of()


@sequence
def wide_inputs():
    def error(p, x, t):
        return square(states(p, x), t)

    return error, elman_params(n=9, m=2), batch_of(2, 9)


# --- cells under scan


@sequence
def elman():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h + p["b"])
            return h, p["V"] @ h

        return square(steps(cell, jnp.zeros(UNITS), x), t)

    return error, weights(W=(3, 2), U=(3, 3), b=(3,), V=(2, 3)), batch_of()


@sequence
def elman_with_inputs_first():
    def error(p, x, t):
        def cell(h, x):
            h = jax.nn.silu(x @ p["W"].T + h @ p["U"] + p["b"])
            return h, None

        h, _ = jax.lax.scan(cell, jnp.full(UNITS, 0.1), x)
        return square(h @ p["V"], t[-1])

    return error, weights(W=(3, 2), U=(3, 3), b=(3,), V=(3, 2)), batch_of()


@sequence
def one_matrix_for_both():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.sin(p["W"] @ jnp.concatenate([x, h]) + p["b"])
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(W=(2, 4), b=(2,)), batch_of()


@sequence
def lstm_of_one_matrix():
    def error(p, x, t):
        def cell(carry, x):
            h, c = carry
            i, f, g, o = jnp.split(p["W"] @ jnp.concatenate([x, h, jnp.ones(1)]), 4)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        h = steps(cell, (jnp.zeros(2), jnp.zeros(2)), x)
        return square(h @ p["V"], t)

    return error, weights(W=(8, 5), V=(2, 2)), batch_of()


@sequence
def lstm_with_peepholes_and_coupled_gates():
    def error(p, x, t):
        def gate(name, x, h):
            return p[f"W{name}"] @ x + p[f"U{name}"] @ h

        def cell(carry, x):
            h, c = carry
            i = jax.nn.sigmoid(gate("i", x, h) + p["pi"] * c)
            c = (1 - i) * c + i * jnp.tanh(gate("g", x, h))
            h = jax.nn.sigmoid(gate("o", x, h) + p["po"] * c) * jnp.tanh(c)
            return (h, c), h

        (h, c), _ = jax.lax.scan(cell, (jnp.zeros(2), jnp.zeros(2)), x)
        return square(h + 0.1 * c, t[-1])

    names = {f"{kind}{name}": (2, 2) for name in "igo" for kind in "WU"}
    return error, weights(**names, pi=(2,), po=(2,)), batch_of()


@sequence
def gru():
    def error(p, x, t):
        def cell(h, x):
            r = jax.nn.sigmoid(p["Wr"] @ x + p["Ur"] @ h)
            z = jax.nn.sigmoid(p["Wz"] @ x + p["Uz"] @ h)
            h = (1 - z) * h + z * jnp.tanh(p["Wn"] @ x + p["bn"] + r * (p["Un"] @ h))
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    names = {f"{kind}{name}": (2, 2) for name in "rzn" for kind in "WU"}
    return error, weights(**names, bn=(2,)), batch_of()


@sequence
def layer_norm_inside():
    def error(p, x, t):
        def cell(h, x):
            y = p["W"] @ x + p["U"] @ h
            y = (y - y.mean()) / jnp.sqrt(y.var() + 1e-2) * p["gamma"] + p["beta"]
            h = jnp.tanh(y)
            return h, h[:2]

        return square(steps(cell, jnp.zeros(3), x), t)

    return error, weights(W=(3, 2), U=(3, 3), gamma=(3,), beta=(3,)), batch_of()


@sequence
def gate_times_another_layer():
    def error(p, x, t):
        def cell(h, x):
            h = (p["W"] @ x) * jax.nn.sigmoid(p["G"] @ h + p["b"]) + p["s"] * h
            return h, None

        h, _ = jax.lax.scan(cell, jnp.ones(2), x)
        return jnp.sum((h - t[-1]) ** 4)

    return error, weights(W=(2, 2), G=(2, 2), b=(2,)) | {"s": jnp.array(0.8)}, batch_of()


@sequence
def residual_cell():
    def error(p, x, t):
        def cell(h, x):
            h = h + p["O"] @ jax.nn.gelu(p["I"] @ h + p["W"] @ x)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(I=(3, 2), O=(2, 3), W=(3, 2)), batch_of()


@sequence
def two_layers_in_one_body():
    def error(p, x, t):
        def cell(carry, x):
            a, b = carry
            a = jnp.tanh(p["W1"] @ x + p["U1"] @ a)
            b = jnp.tanh(p["W2"] @ a + p["U2"] @ b)
            return (a, b), b

        return square(steps(cell, (jnp.zeros(3), jnp.zeros(2)), x), t)

    return error, weights(W1=(3, 2), U1=(3, 3), W2=(2, 3), U2=(2, 2)), batch_of()


@sequence
def bidirectional():
    def error(p, x, t):
        def cell(name, h, x):
            h = jnp.tanh(p[name]["W"] @ x + p[name]["U"] @ h)
            return h, h

        there = steps(functools.partial(cell, "there"), jnp.zeros(2), x)
        back = steps(functools.partial(cell, "back"), jnp.zeros(2), x, reverse=True)
        return square(jnp.concatenate([there, back], axis=1) @ p["V"], t)

    params = {"there": weights(W=(2, 2), U=(2, 2)), "back": weights(U=(2, 2), W=(2, 2)), "V": normal(9, 4, 2)}
    return error, params, batch_of()


@sequence
def attention_over_the_outputs():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, h

        H = steps(cell, jnp.zeros(2), x)
        scores = jax.nn.softmax((H @ p["Q"]) @ (H @ p["K"]).T, axis=-1)
        return square(scores @ H, t)

    return error, weights(W=(2, 2), U=(2, 2), Q=(2, 2), K=(2, 2)), batch_of()


@sequence
def loss_that_couples_all_steps():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, jnp.sum(h)

        y = steps(cell, jnp.zeros(2), x)
        return jnp.prod(1 + y) * t[0, 0] + jax.nn.logsumexp(y) + jnp.sum(y[:, None] * jnp.sin(y[None, :])) + jnp.var(y)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def loop_over_a_parameter_alone():
    def error(p, x, t):
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(p["U"] @ h), None), p["start"], None, length=3)
        return square(p["U"] @ (h * x[0]), t[0])

    return error, weights(U=(2, 2), start=(2,)), batch_of()


@sequence
def loop_without_inputs():
    def error(p, x, t):
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(p["U"] @ h + p["b"]), None), x[0], None, length=4)
        return square(h, t[0])

    return error, weights(U=(2, 2), b=(2,)), batch_of()


@sequence
def layers_by_scan_over_depth():
    def error(p, x, t):
        def layer(h, p):
            return h + jnp.tanh(p["W"] @ h + p["b"]), None

        h, _ = jax.lax.scan(layer, x[0], p)
        return square(h, t[0])

    return error, weights(W=(3, 2, 2), b=(3, 2)), batch_of()


@sequence
def depth_inside_time():
    """Nested loops, the inner one over stacked parameters, each meeting a vector at every step of the outer one."""

    def error(p, x, t):
        def cell(h, x):
            def layer(h, layer):
                W, b = layer
                return jnp.tanh(W @ h + b), jnp.sum(h)

            h, sums = jax.lax.scan(layer, p["U"] @ h + x, (p["W"], p["b"]))
            return h, h + jnp.sum(sums)

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(W=(2, 2, 2), b=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def nested_loops_with_one_matrix():
    def error(p, x, t):
        def outer(h, x):
            def inner(h, scale):
                h = jnp.tanh(p["U"] @ h * scale + p["W"] @ x)
                return h, h

            h, inside = jax.lax.scan(inner, h, jnp.array([1.0, 0.5]), reverse=True)
            return h, jnp.sum(inside, axis=0)

        return square(steps(outer, jnp.zeros(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def scan_inside_vmap():
    def error(p, x, t):
        def run(row, start):
            def cell(h, x):
                h = jnp.tanh(p["w"] * x + p["U"] @ h)
                return h, None

            return jax.lax.scan(cell, start, row)[0]

        h = jax.vmap(run, in_axes=(1, None))(x, p["start"])
        return square(h, t[:2])

    return error, weights(w=(2,), U=(2, 2), start=(2,)), batch_of()


@sequence
def vmap_inside_scan():
    def error(p, x, t):
        def cell(H, x):
            H = jax.vmap(lambda h: jnp.tanh(p["U"] @ h + p["W"] @ x))(H) + H @ p["M"]
            return H, jnp.sum(H, axis=0)

        return square(steps(cell, jnp.eye(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2), M=(2, 2)), batch_of(3)


@sequence
def checkpointed_body():
    def error(p, x, t):
        @jax.checkpoint
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def checkpointed_scan():
    def error(p, x, t):
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
        def run(p, x):
            @functools.partial(jax.checkpoint, prevent_cse=False)
            def cell(h, x):
                h = jnp.tanh(p["W"] @ x + p["U"] @ h)
                return h, h

            return steps(cell, jnp.zeros(2), x)

        return square(run(p, x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def jit_inside_the_body():
    def error(p, x, t):
        @jax.jit
        def layer(W, z):
            return jnp.tanh(W @ z)

        def cell(h, x):
            h = layer(p["U"], h) + layer(p["W"], x)
            return h, jax.jit(jnp.flip)(h)

        return square(jax.jit(lambda x: steps(cell, jnp.zeros(2), x))(x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def branches_in_the_body():
    def error(p, x, t):
        def cell(h, x):
            y = p["U"] @ h + p["b"]
            h = jax.lax.cond(x[0] > 0, lambda y: jnp.tanh(y + p["W"] @ x), lambda y: jnp.sin(y) * p["s"], y)
            h = jax.lax.switch(jnp.int32(x[1] > 0), [lambda h: h, lambda h: h**2], h)
            return h, h

        return square(steps(cell, jnp.ones(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2), b=(2,), s=(2,)), batch_of()


@sequence
def fixed_random_masks():
    def error(p, x, t, seed):
        def cell(h, inputs):
            x, key = inputs
            h = jnp.tanh(p["W"] @ x + p["U"] @ (h * jax.random.bernoulli(key, 0.7, h.shape) / 0.7))
            return h, h

        return square(steps(cell, jnp.ones(2), (x, jax.random.split(jax.random.key(seed), len(x)))), t)

    return error, weights(W=(2, 2), U=(2, 2)), (*batch_of(), jnp.arange(EXAMPLES))


@sequence
def unrolled_by_two():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, h

        return square(steps(cell, jnp.zeros(2), x, unroll=2), t) + steps(cell, x[0], x, unroll=True)[-1, 0]

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(5)


@sequence
def fori_loop_writing_into_an_array():
    def error(p, x, t):
        def body(i, carry):
            h, H = carry
            h = jnp.tanh(p["W"] @ x[i] + p["U"] @ h)
            return h, H.at[i].set(h)

        _, H = jax.lax.fori_loop(0, len(x), body, (jnp.zeros(2), jnp.zeros((len(x), 2))))
        return square(H, t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def while_loop_counting_up():
    def error(p, x, t):
        def body(carry):
            i, h = carry
            return i + 1, jnp.tanh(p["W"] @ x[i] + p["U"] @ h)

        return square(jax.lax.while_loop(lambda carry: carry[0] < 4, body, (0, jnp.zeros(2)))[1], t[0])

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def while_loop_counting_down():
    def error(p, x, t):
        def body(carry):
            h, i = carry
            return jnp.tanh(p["W"] @ x[i] + p["U"] @ h), i - 1

        return square(jax.lax.while_loop(lambda carry: carry[1] >= 0, body, (jnp.zeros(2), 3))[0], t[0])

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def while_loop_in_steps_of_two():
    def error(p, x, t):
        last = len(x)

        def body(carry):
            i, h, sizes = carry
            h = jnp.tanh(p["W"] @ x[i] + p["U"] @ h)
            return i + 2, h, sizes + jnp.sum(h**2)

        _, h, sizes = jax.lax.while_loop(lambda carry: carry[0] < last, body, (jnp.int8(0), jnp.zeros(2), 0.0))
        return square(h, t[0]) + sizes

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(5)


@sequence
def while_loop_inside_scan():
    """The inner loop's length is a number that halves."""

    def error(p, x, t):
        def cell(h, x):
            def inner(carry):
                size, h = carry
                return size / 2, jnp.tanh(p["U"] @ h + x)

            return jax.lax.while_loop(lambda carry: carry[0] > 0.3, inner, (1.0, h))[1], h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(U=(2, 2)), batch_of(3)


@sequence
def associative_scan():
    def error(p, x, t):
        a, b = jax.nn.sigmoid(x @ p["A"]), x @ p["B"]
        _, h = jax.lax.associative_scan(lambda l, r: (l[0] * r[0], l[1] * r[0] + r[1]), (a, b))
        return square(jnp.tanh(h), t)

    return error, weights(A=(2, 2), B=(2, 2)), batch_of()


@sequence
def cumulative_operations():
    def error(p, x, t):
        y = jnp.cumsum(jnp.tanh(x @ p["A"]), axis=0)
        z = jnp.cumprod(1 + 0.1 * y, axis=0) + jax.lax.cumlogsumexp(y) + jax.lax.cummax(y)

        def cell(h, z):
            h = jnp.tanh(p["U"] @ h + z)
            return h, jnp.cumsum(h)

        return square(steps(cell, jnp.zeros(2), z), t)

    return error, weights(A=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def integers_and_trees_in_the_carry():
    def error(p, x, t):
        def cell(carry, x):
            h = carry["state"]["h"]
            h = jnp.tanh(p["W"] @ x + p["U"] @ h) / (1.0 + carry["count"])
            passed = carry["passed"] | (h[0] > 0.1)
            new = {"state": {"h": h, "none": None}, "count": carry["count"] + 1, "passed": passed}
            return new, (jnp.where(passed, h, 2 * h), carry["count"])

        start = {"state": {"h": jnp.zeros(2), "none": None}, "count": 0, "passed": jnp.array(False)}
        last, (h, counts) = jax.lax.scan(cell, start, x)
        return square(h * (1.0 + counts)[:, None], t) + last["count"]

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def used_inside_and_outside():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h + p["b"])
            return h, h

        h = steps(cell, p["b"], x)
        return square(h @ p["U"], t) + jnp.sum(jnp.exp(p["U"])) + jnp.sum(jnp.sin(p["W"] @ h[-1]))

    return error, weights(W=(2, 2), U=(2, 2), b=(2,)), batch_of()


@sequence
def only_the_initial_carry():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.sin(h * x)
            return h, h

        return square(steps(cell, p["start"], x), t)

    return error, weights(start=(2,)), batch_of()


@sequence
def loop_over_data_alone():
    def error(p, x, t):
        features = steps(lambda h, x: (jnp.tanh(h + x), h), jnp.zeros(2), x)
        total = jax.lax.while_loop(lambda s: s[1] < 10 * jnp.abs(x[0, 0]), lambda s: (s[0] + 1, 2 * s[1] + 1), (0, 0.1))[0]
        return square(jnp.tanh(features.reshape(4, 2) @ p["W"]) @ p["V"], t) * total

    return error, weights(W=(2, 3), V=(3, 2)), batch_of()


@sequence
def unused_outputs():
    def error(p, x, t):
        def cell(carry, x):
            h, unused = carry
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return (h, p["N"] @ unused), (h, p["M"] @ h, jnp.exp(h))

        (_, _), (h, _, _) = jax.lax.scan(cell, (jnp.zeros(2), jnp.ones(2)), x)
        return square(h, t)

    return error, weights(W=(2, 2), U=(2, 2), M=(2, 2), N=(2, 2)), batch_of()


@sequence
def own_derivatives_in_the_body():
    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def power(n, x):
        return x**n

    power.defjvp(lambda n, p, t: (p[0] ** n, n * p[0] ** (n - 1) * t[0]))

    def error(p, x, t):
        def cell(h, x):
            h = sine(p["U"] @ h + sine(p["W"]) @ x) + power(2, p["b"] * h)
            return jax.nn.relu(h) + jax.nn.softplus(h), h

        return square(steps(cell, jnp.ones(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2), b=(2,)), batch_of()


@sequence
def derivatives_in_the_body():
    """Gradient steps on data inside of the error."""

    def error(p, x, t):
        def inner(q, x, t):
            return jnp.sum((jnp.tanh(q @ x) - t) ** 2)

        def update(q, example):
            return q - jnp.exp(p["rate"]) * jax.grad(inner)(q, *example), None

        q, _ = jax.lax.scan(update, p["q"], (x, t))
        return inner(q, x[0], t[0])

    return error, weights(q=(2, 2)) | {"rate": jnp.array(-1.0)}, batch_of(3)


@sequence
def runge_kutta():
    def error(p, x, t):
        def field(y):
            return p["V"] @ jnp.tanh(p["W"] @ y + p["b"])

        def step(_, y):
            dt = jax.nn.softplus(p["dt"])
            k1 = field(y)
            k2 = field(y + dt / 2 * k1)
            k3 = field(y + dt / 2 * k2)
            return y + dt / 6 * (k1 + 2 * k2 + 2 * k3 + field(y + dt * k3))

        return square(jax.lax.fori_loop(0, 2, step, x[0]), t[0])

    return error, weights(W=(3, 2), b=(3,), V=(2, 3)) | {"dt": jnp.array(0.1)}, batch_of()


@sequence
def kalman_filter():
    def error(p, x):
        A, C, R = p["A"], p["C"], jnp.exp(p["r"]) * jnp.eye(2)

        def step(carry, x):
            mean, P = carry
            mean, P = A @ mean, A @ P @ A.T + jnp.eye(2)
            S = C @ P @ C.T + R
            gain = jnp.linalg.solve(S, C @ P).T
            wrong = x - C @ mean
            _, logdet = jnp.linalg.slogdet(S)
            loss = 0.5 * (wrong @ jnp.linalg.solve(S, wrong) + logdet)
            return (mean + gain @ wrong, P - gain @ C @ P), loss

        return jnp.sum(steps(step, (jnp.zeros(2), jnp.eye(2)), x))

    return error, weights(A=(2, 2), C=(2, 2)) | {"r": jnp.array(0.3)}, batch_of(3)[:1]


@sequence
def hidden_markov_model():
    def error(p, tokens):
        transition, emission = jax.nn.log_softmax(p["T"], axis=1), jax.nn.log_softmax(p["E"], axis=1)

        def step(alpha, token):
            return jax.nn.logsumexp(alpha[:, None] + transition, axis=0) + emission[:, token], None

        alpha, _ = jax.lax.scan(step, jax.nn.log_softmax(p["start"]), tokens)
        return -jax.nn.logsumexp(alpha)

    tokens = jax.random.randint(jax.random.key(0), (EXAMPLES, 4), 0, 3)
    return error, weights(T=(2, 2), E=(2, 3), start=(2,)), (tokens,)


@sequence
def connectionist_temporal_classification():
    def error(p, x, labels):
        scores = states(p, x) @ p["V"]
        zeros = jnp.zeros((1, len(x)))
        return optax.ctc_loss(scores[None], zeros, labels[None], jnp.zeros((1, labels.shape[0])))[0]

    labels = jnp.array([[1, 2], [2, 1], [1, 1]])
    return error, elman_params(m=2) | {"V": normal(60, 2, 3)}, (batch_of()[0], labels)


@sequence
def state_space():
    """A diagonal recurrence with a step size from the data."""

    def error(p, x, t):
        decay = -jnp.exp(p["a"])

        def cell(h, x):
            step = jax.nn.softplus(p["D"] @ x)
            h = jnp.exp(step * decay) * h + step * (p["B"] @ x)
            return h, jnp.dot(p["c"], h)

        return jnp.sum((steps(cell, jnp.zeros(3), x) - t[:, 0]) ** 2)

    return error, weights(a=(3,), D=(3, 2), B=(3, 2), c=(3,)), batch_of()


@sequence
def attention_with_a_cache():
    def error(p, x, t):
        def cell(carry, inputs):
            keys, h = carry
            i, x = inputs
            z = p["W"] @ x + h
            keys = jax.lax.dynamic_update_slice(keys, (p["K"] @ z)[None], (i, 0))
            scores = jnp.where(jnp.arange(len(keys)) <= i, keys @ (p["Q"] @ z), -jnp.inf)
            h = jnp.tanh(jax.nn.softmax(scores) @ keys)
            return (keys, h), h

        start = jnp.zeros((len(x), 2)), jnp.zeros(2)
        return square(steps(cell, start, (jnp.arange(len(x)), x)), t)

    return error, weights(W=(2, 2), K=(2, 2), Q=(2, 2)), batch_of(3)


@sequence
def context_that_stays():
    """`C @ context` is the same in every step: computed once, before the loop."""

    def error(p, x, t):
        context = jnp.sin(x[0])

        def cell(h, x):
            h = jnp.tanh(p["U"] @ h + p["C"] @ context + x * jnp.exp(p["s"]) + p["P"].sum(axis=0))
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(U=(2, 2), C=(2, 2), s=(2,), P=(3, 2)), batch_of()


@sequence
def several_uses_in_the_body():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["U"] @ jnp.tanh(p["U"].T @ h + x) + jnp.diag(p["U"]) * h + p["U"] @ p["U"] @ h)
            return h, p["U"][0] @ h

        return jnp.sum((steps(cell, jnp.ones(2), x) - t[:, 0]) ** 2)

    return error, weights(U=(2, 2)), batch_of(3)


@sequence
def tensor_contractions():
    """Bilinear cells and several heads: weights with three axes."""

    def error(p, x, t):
        def cell(h, x):
            heads = jnp.einsum("hij,j->hi", p["H"], h)
            h = jnp.tanh(jnp.einsum("ijk,j,k->i", p["T"], h, x) + jnp.einsum("hi,hij->j", heads, p["O"]))
            return h, h

        return square(steps(cell, jnp.ones(2), x), t)

    return error, weights(T=(2, 2, 2), H=(2, 1, 2), O=(2, 1, 2)), batch_of(3)


@sequence
def convolution_in_the_body():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(jnp.convolve(h, p["k"], mode="same") + x)
            return h, h

        return square(steps(cell, jnp.ones(4), x)[:, :2], t)

    return error, weights(k=(3,)), batch_of(3, 4)


@sequence
def one_flat_vector():
    def error(p, x, t):
        W, U, b = p[:4].reshape(2, 2), p[4:8].reshape(2, 2), p[8:]

        def cell(h, x):
            h = jnp.tanh(W @ x + U @ h + b)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, normal(0, 10), batch_of()


@sequence
def slices_of_a_stack():
    def error(p, x, t):
        for k in range(2):

            def cell(h, x, k=k):
                h = jnp.tanh(p["W"][k] @ x + p["U"][k] @ h + p["b"][k])
                return h, h

            x = steps(cell, jnp.zeros(2), x)
        return square(x, t)

    return error, weights(W=(2, 2, 2), U=(2, 2, 2), b=(2, 2)), batch_of(3)


@sequence
def time_reversed_and_chunked():
    def error(p, x, t):
        def chunk(h, x):
            z = jaxhess.recurrent(p["W"], p["U"], None, x, tanh, h)
            return z[-1], z

        z = steps(chunk, jnp.zeros(2), x[::-1].reshape(2, 2, 2)).reshape(4, 2)
        return square(z[::-1], t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def units_of_one():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["w"] @ x + p["u"] @ h)
            return h, h * p["s"]

        return square(steps(cell, jnp.zeros(1), x), t[:, :1])

    return error, weights(w=(1, 2), u=(1, 1)) | {"s": jnp.array(0.4)}, batch_of()


@sequence
def scalar_recurrence():
    def error(p, x, t):
        h = steps(lambda h, x: ((n := jnp.tanh(p["w"] * x + p["u"] * h)), n), jnp.zeros(()), x[:, 0])
        return jnp.sum((h - t[:, 0]) ** 2)

    return error, {"w": jnp.array(0.6), "u": jnp.array(-0.9)}, batch_of()


@sequence
def matrix_valued_state():
    """A fast-weight cell, with outer products of the inputs in the state."""

    def error(p, x, t):
        def cell(M, x):
            k, v = p["K"] @ x, p["V"] @ x
            M = 0.9 * M + jnp.outer(v - M @ k, k)
            return M, M @ (p["Q"] @ x)

        return square(steps(cell, jnp.zeros((2, 2)), x), t)

    return error, weights(K=(2, 2), V=(2, 2), Q=(2, 2)), batch_of(3)


@sequence
def no_steps_at_all():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, h

        last, all_of_them = jax.lax.scan(cell, p["start"], x[:0])
        return square(last, t[0]) + jnp.sum(all_of_them**2) + jnp.sum((p["W"] @ x[0]) ** 3)

    return error, weights(W=(2, 2), U=(2, 2), start=(2,)), batch_of()


@sequence
def one_step():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, h

        return square(steps(cell, p["start"], x), t)

    return error, weights(W=(2, 2), U=(2, 2), start=(2,)), batch_of(1)


@sequence
def empty_parameters():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["U"] @ h + x + jnp.sum(p["none"] @ h) + p["narrow"] @ jnp.zeros(0))
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(U=(2, 2), none=(0, 2), narrow=(2, 0)), batch_of()


@sequence
def closed_over_arrays():
    fixed = {"W": normal(20, 2, 2), "U": normal(21, 2, 2)}

    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(fixed["W"] @ x + fixed["U"] @ h + p["b"])
            return h, h

        z = jaxhess.recurrent(fixed["W"], fixed["U"], p["c"], x)
        return square(steps(cell, jnp.zeros(2), z), t)

    return error, weights(b=(2,), c=(2,)), batch_of()


@sequence
def stopped_gradients():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + jax.lax.stop_gradient(p["U"]) @ h + p["U"] @ jax.lax.stop_gradient(h))
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def no_data():
    def error(p):
        h = steps(lambda h, _: ((n := jnp.tanh(p["U"] @ h)), n), p["start"], None, length=3)
        return jnp.sum(h**2) + jnp.sum(h[:, 0] * jnp.sin(h[:, 1]))

    return error, weights(U=(2, 2), start=(2,)), ()


@sequence
def penalty_beside_the_loop():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ x + p["U"] @ h)
            return h, h

        penalty = 0.1 * jnp.sum(p["U"] ** 4) + jnp.linalg.norm(p["W"]) + jnp.sum(jnp.sin(p["other"]))
        return square(steps(cell, jnp.zeros(2), x), t) + penalty + jnp.sum((p["M"] @ x[0]) ** 2)

    return error, weights(W=(2, 2), U=(2, 2), other=(2,), M=(2, 2)), batch_of()


@sequence
def loop_inside_a_custom_rule():
    def run(U, x):
        return steps(lambda h, x: ((n := jnp.tanh(U @ h + x)), n), jnp.zeros(2), x)

    @jax.custom_jvp
    def states_of(U, x):
        return run(U, x)

    states_of.defjvp(lambda p, t: jax.jvp(run, p, t))

    @jax.custom_vjp
    def last_of(U, x):
        return run(U, x)[-1]

    last_of.defvjp(lambda U, x: jax.vjp(lambda U, x: run(U, x)[-1], U, x), lambda pull, g: pull(g))

    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["W"] @ h + x)
            return h, h

        z = steps(cell, jnp.zeros(2), states_of(p["U"], x))
        return square(z, t) + jnp.sum(last_of(p["W"], x) ** 3)

    return error, weights(U=(2, 2), W=(2, 2)), batch_of(3)


@sequence
def loops_in_branches():
    def error(p, x, t):
        def up(h):
            return jax.lax.scan(lambda h, x: (jnp.tanh(p["U"] @ h + x), None), h, x)[0]

        def down(h):
            return jax.lax.scan(lambda h, x: (jnp.sin(p["U"] @ h - x), None), h, x, reverse=True)[0]

        return square(jax.lax.cond(x[0, 0] > 0, up, down, p["start"]), t[0])

    return error, weights(U=(2, 2), start=(2,)), batch_of(3)


@sequence
def mapped_positions():
    def error(p, x, t):
        y = jax.lax.map(lambda x: jnp.tanh(p["W"] @ x + p["b"]), x)
        z = jax.lax.map(lambda x: jnp.tanh(p["V"] @ x), y, batch_size=2)
        return square(z, t)

    return error, weights(W=(3, 2), b=(3,), V=(2, 3)), batch_of(3)


@sequence
def passed_on_as_they_are():
    """Inputs, parameters and constants among the outputs, and a carry that swaps its parts."""

    def error(p, x, t):
        def cell(carry, x):
            h, a, b, k = carry
            h = jnp.tanh(p["W"] @ x + p["U"] @ h * k + a)
            return (h, b, h * 0.5, jnp.array(0.5)), (h, jnp.ones(()), p["b"], x, a)

        (_, a, b, k), (h, ones, repeated, x, before) = jax.lax.scan(cell, (jnp.zeros(2), x[0], x[1], jnp.ones(())), x)
        return square(h * repeated * ones[:, None], t) + jnp.sum(before * x) + k + jnp.sum(a * b)

    return error, weights(W=(2, 2), U=(2, 2), b=(2,)), batch_of(3)


@sequence
def product_and_element_wise():
    """One array that meets vectors in products, and others component by component."""

    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(jnp.dot(p["w"], x) + jnp.dot(p["u"], h) * p["u"])
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(w=(2,), u=(2,)), batch_of(3)


@sequence
def product_in_the_loop_and_element_wise_outside():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(p["U"] @ h + x)
            return h, h

        return square(steps(cell, x[0], x), t) + jnp.sum(jnp.sin(p["U"] * x[:2]))

    return error, weights(U=(2, 2)), batch_of(3)


@sequence
def jacobian_of_a_loop():
    def error(p, x, t):
        def run(x):
            def cell(h, x):
                h = jnp.tanh(p["W"] @ x + p["U"] @ h)
                return h, h

            return steps(cell, jnp.zeros(2), x)

        return square(run(x), t) + jnp.sum(jax.jacrev(lambda x: run(x)[-1])(x) ** 2)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def tangent_of_a_layer():
    def error(p, x, t):
        y, dy = jax.jvp(lambda x: jaxhess.recurrent(p["W"], p["U"], None, x), (x,), (t,))
        return square(y, t) + jnp.sum(dy**2)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def gradient_of_a_layer():
    def error(p, x, t):
        g = jax.grad(lambda x: jnp.sum(jaxhess.recurrent(p["W"], p["U"], None, x) ** 3))(x)
        return square(g, t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def two_sequences_through_one_wide_layer():
    def error(p, x, t):
        a = jaxhess.recurrent(p["W"], -2 * p["U"], None, x)
        b = jaxhess.recurrent(p["W"] / 3, p["U"], p["b"], jnp.sin(x))
        return square(a, b) + jnp.sum(a[-1]) * t[0, 0]

    return error, weights(W=(3, 9), U=(3, 3), b=(3,)), batch_of(2, 9)


@sequence
def more_units_than_steps():
    def error(p, x, t):
        return square(jaxhess.recurrent(p["W"], p["U"], p["b"], x)[:, :2], t)

    return error, weights(W=(5, 2), U=(5, 5), b=(5,)), batch_of(2)


@sequence
def tokens():
    def error(p, tokens):
        def cell(h, token):
            h = jnp.tanh(p["W"] @ jax.nn.one_hot(token, 3, dtype=h.dtype) + p["U"] @ h)
            return h, p["W"].T @ h

        scores = steps(cell, jnp.zeros(2), tokens[:-1])
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores, tokens[1:]))

    return error, weights(W=(2, 3), U=(2, 2)), (jax.random.randint(jax.random.key(0), (EXAMPLES, 4), 0, 3),)


@sequence
def axis_of_positions_in_the_state():
    def error(p, x, t):
        def cell(H, x):
            H = jnp.tanh(jnp.einsum("ij,bj->bi", p[0], x) + H @ p[1])
            return H, H

        return jnp.sum(jnp.sin(steps(cell, jnp.zeros((2, 2)), jnp.stack([x, t], axis=1))))

    return error, (normal(0, 2, 2), normal(1, 2, 2)), batch_of(3)


@sequence
def outer_product_inside():
    def error(p, x, t):
        def cell(h, x):
            h = jnp.tanh(jnp.outer(p["w"], x) @ p["v"] + p["w"] * h)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(w=(2,), v=(2,)), batch_of(3)


@sequence
def bounds_of_fori_loops():
    def error(p, x, t):
        h = jax.lax.fori_loop(2, 5, lambda i, h: jnp.tanh(p["U"] @ h + i / 4), x[0])
        h = jax.lax.fori_loop(-3, 0, lambda i, h: jnp.sin(p["W"] @ h + x[i]), h, unroll=2)
        return square(jax.lax.fori_loop(3, 1, lambda i, h: jnp.sin(p["U"] @ h + x[i]), h), t[0])

    return error, weights(W=(2, 2), U=(2, 2)), batch_of()


@sequence
def while_loop_with_two_counters():
    def error(p, x, t):
        def body(carry):
            (i, size), h = carry
            return (i + 1, 2 * size), jnp.tanh(p["U"] @ h)

        def go_on(carry):
            (i, size), _ = carry
            return (i < 10) & (size < jnp.uint32(9))

        return square(jax.lax.while_loop(go_on, body, ((0, jnp.uint32(1)), x[0]))[1], t[0])

    return error, weights(U=(2, 2)), batch_of()


@sequence
def while_loop_with_computed_bounds():
    """From numbers that neither data nor parameters change."""

    def error(p, x, t):
        last = jnp.minimum(jnp.asarray(len(x)) - 1, 7)
        return square(jax.lax.fori_loop(0, last, lambda i, h: jnp.tanh(p["U"] @ h + x[i]), jnp.zeros(2)), t[0])

    return error, weights(U=(2, 2)), batch_of()


@sequence
def mapped_while_loops():
    def error(p, x, t):
        def run(x):
            return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(p["U"] @ s[1] + x)), (0, x))[1]

        return square(jax.vmap(run)(x), t)

    return error, weights(U=(2, 2)), batch_of(3)


@sequence
def only_in_a_loop_of_no_steps():
    def error(p, x, t):
        h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(p["U"] @ h + x), None), x[0], x[:0])
        return square(h + p["b"], t[0])

    return error, weights(U=(2, 2), b=(2,)), batch_of()


@sequence
def no_units_at_all():
    def error(p, x, t):
        def cell(h, x):
            return jnp.tanh(p["W"] @ x + p["U"] @ h), jnp.sum(h) + jnp.sum(x)

        return jnp.sum(steps(cell, jnp.zeros(0), x)) + jnp.sum(p["V"] ** 3) * t[0, 0]

    return error, weights(W=(0, 2), U=(0, 0), V=(2,)), batch_of(3)


@sequence
def own_reverse_rule_in_a_branch():
    def error(p, x, t):
        def cell(h, x):
            h = jax.lax.cond(x[0] > 0, sine, lambda y: y**2, p["W"] @ x + p["U"] @ h)
            return h, h

        return square(steps(cell, jnp.zeros(2), x), t)

    return error, weights(W=(2, 2), U=(2, 2)), batch_of(3)


@sequence
def tied_embedding_without_a_loop():
    """So many tokens that the curvature is kept as a linear function all the same."""

    def error(p, tokens):
        h = jnp.tanh(p["E"][tokens[:-1]])
        scores = jax.vmap(lambda h: p["E"] @ h)(h)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, tokens[1:]))

    return error, weights(E=(4, 2)), (jax.random.randint(jax.random.key(0), (EXAMPLES, 30), 0, 4),)
