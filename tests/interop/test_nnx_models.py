"""Unmodified Flax NNX models, their state as the parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from foreign import Models, check, cross_entropy, cubes, data, generic, labels, squares, tokens

import jaxhess
from jaxhess.operators import KroneckerProductSum

MODELS = Models()
LOSSES = {
    "cross_entropies": (
        lambda z, c: optax.softmax_cross_entropy_with_integer_labels(z, c),
        lambda z, c: optax.softmax_cross_entropy(z, jax.nn.one_hot(c, 3)),
        lambda z, c: optax.softmax_cross_entropy(z, optax.smooth_labels(jax.nn.one_hot(c, 3), 0.1)),
        lambda z, c: optax.losses.poly_loss_cross_entropy(z, jax.nn.one_hot(c, 3)),
        lambda z, c: optax.kl_divergence(jax.nn.log_softmax(z), jnp.array([0.5, 0.2, 0.3])),
    ),
    "binary": (
        lambda z, c: optax.sigmoid_binary_cross_entropy(z, jax.nn.one_hot(c, 3)),
        lambda z, c: optax.losses.sigmoid_focal_loss(z, jax.nn.one_hot(c, 3)),
    ),
    "regression": (
        lambda z, c: optax.l2_loss(z, jnp.arange(3.0)),
        lambda z, c: optax.huber_loss(z, c * jnp.arange(3.0)),
        lambda z, c: optax.log_cosh(z, jnp.arange(3.0)),
        lambda z, c: optax.cosine_distance(z, jnp.arange(3.0)),
    ),
    "margins": (
        lambda z, c: optax.hinge_loss(z, 2.0 * jax.nn.one_hot(c, 3) - 1),
        lambda z, c: optax.losses.perceptron_loss(z, 2.0 * jax.nn.one_hot(c, 3) - 1),
        lambda z, c: optax.losses.multiclass_hinge_loss(z, c),
    ),
}


def case(build, loss, x, *batch, filters=(), initialise=nnx.eval_shape):
    """The state (or the part of it that the filter takes) as the parameters, everything else in the closure."""
    graphdef, state = nnx.split(initialise(lambda: build(nnx.Rngs(0))))
    model = nnx.merge(graphdef, generic(state))
    nnx.update(model, jax.tree.map(lambda stat: jnp.abs(stat) + 0.5, nnx.state(model, nnx.BatchStat)))
    graphdef, state, *rest = nnx.split(model, *filters)

    def fun(state, x, *target):
        return loss(nnx.merge(graphdef, state, *rest, copy=True)(x), *target)

    return fun, state, (x, *batch)


class Chain(nnx.Module):
    """Layers one after the other."""

    def __init__(self, *layers):
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@MODELS
def perceptron():
    def build(rngs):
        return nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.tanh, nnx.Linear(5, 3, rngs=rngs))

    return case(build, cross_entropy, data(4), labels(3))


@MODELS
def every_layout_of_a_linear_layer():
    def build(rngs):
        return nnx.Sequential(
            nnx.Linear(4, 6, use_bias=False, rngs=rngs),
            nnx.gelu,
            lambda h: h.reshape(2, 3),
            nnx.LinearGeneral((2, 3), (2, 2), axis=(-2, -1), rngs=rngs),
            nnx.silu,
            nnx.Einsum("hd,hde->he", (2, 2, 3), (2, 3), rngs=rngs),
            nnx.LinearGeneral(3, 2, batch_axis={0: 2}, rngs=rngs),
        )

    return case(build, squares, data(4), data(2, 2, seed=101))


@MODELS
def the_model_itself():
    """NNX modules are pytrees: a model of nothing but parameters is its own container."""

    rngs = nnx.Rngs(0)
    model = generic(Chain(nnx.Linear(3, 4, rngs=rngs), nnx.softplus, nnx.Linear(4, 2, rngs=rngs)))
    return lambda model, x, t: squares(model(x), t), model, (data(3), data(2, seed=101))


@MODELS
def images():
    def build(rngs):
        return nnx.Sequential(
            nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs),
            nnx.swish,
            nnx.Conv(4, 4, (2, 2), feature_group_count=2, padding="VALID", rngs=rngs),
            lambda h: nnx.max_pool(h, (2, 2), (1, 1)),
            jnp.ravel,
            nnx.Linear(4, 2, rngs=rngs),
        )

    return case(build, cross_entropy, data(5, 5, 2), labels(2))


@MODELS
def depthwise_transposed_and_average():
    def build(rngs):
        return nnx.Sequential(
            nnx.Conv(2, 2, (2, 2), feature_group_count=2, rngs=rngs),
            nnx.tanh,
            nnx.ConvTranspose(2, 2, (2, 2), strides=(2, 2), rngs=rngs),
            lambda h: nnx.avg_pool(nnx.elu(h), (2, 2), (2, 2)),
        )

    return case(build, cubes, data(3, 3, 2))


@MODELS
def sequences_of_convolutions():
    def build(rngs):
        return nnx.Sequential(
            nnx.Conv(2, 3, (3,), kernel_dilation=2, padding="CIRCULAR", rngs=rngs),
            nnx.gelu,
            nnx.Conv(3, 2, (2,), padding="CAUSAL", rngs=rngs),
        )

    return case(build, cubes, data(5, 2))


@MODELS
def embedding_and_tied_head():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, 3, param_dtype=jnp.float64, rngs=rngs)
            self.mix = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, ids):
            return self.embed.attend(nnx.gelu(self.mix(self.embed(ids).mean(0))))

    return case(Model, cross_entropy, tokens(4, 5), labels(5))


@MODELS
def normalisations():
    def build(rngs):
        return nnx.Sequential(
            nnx.LayerNorm(4, rngs=rngs),
            nnx.Linear(4, 6, rngs=rngs),
            nnx.RMSNorm(6, rngs=rngs),
            nnx.tanh,
            lambda h: h[None],
            nnx.GroupNorm(6, num_groups=2, rngs=rngs),
            nnx.BatchNorm(6, use_running_average=True, rngs=rngs),
            nnx.PReLU(),
        )

    return case(build, cubes, data(4), filters=(nnx.Param, ...))


@MODELS
def residual_net_with_frozen_layers():
    class Residual(nnx.Module):
        def __init__(self, rngs):
            self.inner, self.gate = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return x + nnx.sigmoid(self.gate(x)) * nnx.tanh(self.inner(x))

    def build(rngs):
        return Chain(
            Residual(rngs), nnx.Dropout(0.5, deterministic=True, rngs=rngs), Residual(rngs), nnx.Linear(4, 3, rngs=rngs)
        )

    trained = nnx.All(nnx.Param, nnx.Not(nnx.PathContains("gate")))
    return case(build, cross_entropy, data(4), labels(3), filters=(trained, nnx.Param, ...))


@MODELS
def low_rank_adaptation():
    def build(rngs):
        return nnx.Sequential(
            nnx.LoRA(4, 2, 4, base_module=nnx.Linear(4, 4, rngs=rngs), rngs=rngs),
            nnx.silu,
            nnx.LoRALinear(4, 3, lora_rank=1, rngs=rngs),
        )

    return case(build, cross_entropy, data(4), labels(3), filters=(nnx.LoRAParam, ...))


@MODELS
def attention():
    def build(rngs):
        return nnx.MultiHeadAttention(
            2, 4, 6, normalize_qk=True, decode=False, deterministic=True, dropout_rate=0.3, rngs=rngs
        )

    return case(build, cubes, data(3, 4), filters=(nnx.Param, ...))


@MODELS.slow
def causal_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.before, self.after = nnx.LayerNorm(4, rngs=rngs), nnx.RMSNorm(4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.1, deterministic=True, rngs=rngs)
            self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(3, 4, rngs=rngs)

        def __call__(self, x):
            h = self.before(x)
            x = x + self.attention(h, mask=nnx.make_causal_mask(h[:, 0]))
            return x + self.down(nnx.glu(self.up(self.after(x))))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.position = nnx.Embed(5, 4, param_dtype=jnp.float64, rngs=rngs), nnx.Param(jnp.zeros((3, 4)))
            self.block = Block(rngs)

        def __call__(self, ids):
            return self.embed.attend(self.block(self.embed(ids) + self.position[...]))

    def loss(logits, ids):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(ids, -1)).mean()

    ids = tokens(3, 5)
    return case(Transformer, loss, ids, ids, filters=(nnx.Param, ...))


@MODELS
def rematerialised():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        @nnx.remat
        def inner(self, x):
            return nnx.tanh(self.a(x))

        def __call__(self, x):
            return self.b(self.inner(x))

    return case(Model, squares, data(3), data(2, seed=101))


@MODELS
def vmapped_ensemble():
    class Member(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.tanh(self.a(x)))

    class Ensemble(nnx.Module):
        def __init__(self, rngs):
            self.members = nnx.vmap(Member)(rngs.split(2))

        def __call__(self, x):
            return nnx.vmap(lambda member, x: member(x), in_axes=(0, None))(self.members, x)

    return case(Ensemble, cubes, data(3), filters=(nnx.Param, ...))


@MODELS
def scanned_layers():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return x + nnx.tanh(self.linear(x))

    class Deep(nnx.Module):
        def __init__(self, rngs):
            self.layers, self.head = nnx.vmap(Layer)(rngs.split(3)), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))

    return case(Deep, cross_entropy, data(3), labels(2), filters=(nnx.Param, ...))


@MODELS.slow
def lstm():
    class Model(nnx.Module):
        def __init__(self, rngs):
            cell = nnx.LSTMCell(2, 3, param_dtype=jnp.float64, rngs=rngs)
            self.rnn, self.head = nnx.RNN(cell), nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.rnn(x)[-1])

    return case(Model, squares, data(3, 2), data(2, seed=101), filters=(nnx.Param, ...))


@MODELS
def weight_normalisation():
    def build(rngs):
        return Chain(nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs), nnx.tanh, nnx.Linear(4, 2, rngs=rngs))

    return case(build, squares, data(3), data(2, seed=101), initialise=lambda build: build())


@MODELS
def activations_of_all_kinds():
    names = "celu", "hard_swish", "leaky_relu", "log_sigmoid", "selu", "soft_sign"

    def branches(h):
        return jnp.stack([getattr(nnx, name)(h[k]) for k, name in enumerate(names)])

    def build(rngs):
        return nnx.Sequential(nnx.Linear(3, 6, rngs=rngs), branches, nnx.glu, nnx.log_softmax)

    return case(build, cubes, data(3))


@pytest.mark.parametrize("model", MODELS.cases())
def test_every_block_equals_autodiff(model):
    check(*model())


def test_attention_that_computes_in_float32_inside():
    """What `jax.nn.dot_product_attention`, the default without dropout, does whatever it is given."""

    def build(rngs):
        return nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)

    check(*case(build, cubes, data(3, 4)), tolerance=1e-5, smallest=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_optax(name):
    def build(rngs):
        return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), nnx.tanh, nnx.Linear(3, 3, rngs=rngs), nnx.tanh)

    def loss(z, label):
        return sum((k + 1) * jnp.sum(term(z, label)) for k, term in enumerate(LOSSES[name]))

    check(*case(build, loss, data(3), labels(3)))


def test_layouts_keep_the_structure_of_theorem_1():
    fun, params, batch = every_layout_of_a_linear_layer()
    H = jaxhess.hessian(fun)(params, *batch)
    for layer in (0, 3):
        assert isinstance(H.block(f"layers/{layer}/kernel/value"), KroneckerProductSum)


def test_a_key_below_the_variable_is_not_needed_to_find_a_block():
    fun, params, batch = perceptron()
    H = jaxhess.hessian(fun)(params, *batch)
    block = H["layers"][0]["kernel"]
    assert jnp.array_equal(block.as_matrix(), H.block("layers/0/kernel/value").as_matrix())


def test_counters_and_keys_are_refused_with_what_to_do():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"(?s)params.*(uint32|key).*closure"):
        jaxhess.hessian(lambda model, x: jnp.sum(x))(model, data(3))
