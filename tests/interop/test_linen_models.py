"""Unmodified Flax Linen models, their variables or params as the parameters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze
from foreign import Models, check, cross_entropy, cubes, data, generic, labels, squares, tokens

import jaxhess
from jaxhess.operators import KroneckerProductSum

MODELS = Models()


def case(model, loss, x, *batch, others=lambda variables: {}):
    """`params` as the parameters, the other collections in the closure."""
    variables = generic(jax.eval_shape(model.init, jax.random.key(0), x[0]))
    rest = others(variables)

    def fun(params, x, *target):
        return loss(model.apply({"params": params, **rest}, x), *target)

    return fun, variables["params"], (x, *batch)


def running_averages(variables):
    return {"batch_stats": jax.tree.map(lambda stat: jnp.abs(stat) + 0.5, variables["batch_stats"])}


@MODELS
def perceptron_in_a_frozen_dict():
    model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
    fun, params, batch = case(model, cross_entropy, data(4), labels(3))
    return fun, freeze(params), batch


@MODELS
def all_variables():
    model = nn.Sequential([nn.Dense(4), nn.softplus, nn.Dense(2, use_bias=False)])
    variables = generic(jax.eval_shape(model.init, jax.random.key(0), jnp.ones(3)))
    return lambda variables, x, t: squares(model.apply(variables, x), t), variables, (data(3), data(2, seed=101))


@MODELS
def every_layout_of_a_dense_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.gelu(nn.DenseGeneral((2, 3), name="split")(x))
            h = nn.silu(nn.DenseGeneral((2, 2), axis=(-2, -1), name="merged")(h))
            h = nn.sigmoid(nn.Einsum((2, 2, 3), "hd,hde->he", name="einsum")(h))
            return nn.DenseGeneral(2, batch_dims=(0,), name="batched")(h)

    return case(Model(), squares, data(4), data(2, 2, seed=101))


@MODELS
def images():
    model = nn.Sequential(
        [
            nn.Conv(4, (3, 3), strides=2),
            nn.swish,
            nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID"),
            lambda h: nn.max_pool(h, (2, 2)),
            jnp.ravel,
            nn.Dense(2),
        ]
    )
    return case(model, cross_entropy, data(5, 5, 2), labels(2))


@MODELS
def depthwise_transposed_and_local():
    model = nn.Sequential(
        [
            nn.Conv(2, (2,), feature_group_count=2),
            nn.tanh,
            nn.ConvTranspose(2, (2,), strides=(2,)),
            lambda h: nn.avg_pool(nn.elu(h), (2,), (2,)),
            nn.ConvLocal(2, (2,)),
        ]
    )
    return case(model, cubes, data(3, 2))


@MODELS
def embedding_and_tied_head():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(5, 3)
            return embed.attend(nn.gelu(nn.Dense(3)(embed(ids).mean(0))))

    return case(Model(), cross_entropy, tokens(4, 5), labels(5))


@MODELS
def normalisations():
    model = nn.Sequential(
        [
            nn.LayerNorm(),
            nn.Dense(6),
            nn.RMSNorm(),
            nn.tanh,
            nn.GroupNorm(num_groups=2),
            nn.BatchNorm(use_running_average=True),
            nn.PReLU(),
        ]
    )
    return case(model, cubes, data(1, 4), others=running_averages)


@MODELS
def attention():
    model = nn.MultiHeadDotProductAttention(2, dropout_rate=0.3, deterministic=True)
    return case(model, cubes, data(3, 4))


@MODELS.slow
def rematerialised_transformer():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(h, mask=nn.make_causal_mask(h[:, 0]))
            h = nn.Dropout(0.1, deterministic=True)(nn.gelu(nn.Dense(5)(nn.RMSNorm()(x))))
            return x + nn.Dense(4)(h)

    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, ids):
            embed = nn.Embed(5, 4)
            position = self.param("position", nn.initializers.zeros, (3, 4))
            return embed.attend(nn.remat(Block)()(embed(ids) + position))

    def loss(logits, ids):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(ids, -1)).mean()

    ids = tokens(3, 5)
    return case(Transformer(), loss, ids, ids)


@MODELS
def vmapped_experts():
    class Expert(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.tanh(nn.Dense(3)(x)))

    class Mixture(nn.Module):
        @nn.compact
        def __call__(self, x):
            experts = nn.vmap(Expert, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2)
            return nn.softmax(nn.Dense(2)(x)) @ experts()(x)

    return case(Mixture(), squares, data(3), data(2, seed=101))


@MODELS
def scanned_layers():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(3)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return nn.Dense(2)(layers()(x, None)[0])

    return case(Deep(), cross_entropy, data(3), labels(2))


@MODELS
def gated_recurrent_unit():
    model = nn.Sequential([nn.RNN(nn.GRUCell(3, param_dtype=jnp.float64)), lambda h: h[-1], nn.Dense(2)])
    return case(model, squares, data(3, 2), data(2, seed=101))


@MODELS
def weight_and_spectral_normalisation():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.WeightNorm(nn.Dense(4))(x))
            return nn.SpectralNorm(nn.Dense(2))(h, update_stats=False)

    return case(Model(), squares, data(3), data(2, seed=101), others=running_averages)


@MODELS
def boxes_with_names_of_mesh_axes():
    model = nn.Sequential(
        [nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.normal(), (None, "model"))), nn.tanh]
    )
    return case(model, cubes, data(3))


@pytest.mark.parametrize("model", MODELS.cases())
def test_every_block_equals_autodiff(model):
    check(*model())


def test_layouts_keep_the_structure_of_theorem_1():
    fun, params, batch = every_layout_of_a_dense_layer()
    H = jaxhess.hessian(fun)(params, *batch)
    assert isinstance(H["split"]["kernel"], KroneckerProductSum)
    assert isinstance(H.block("merged/kernel"), KroneckerProductSum)


def test_a_frozen_dict_stays_one():
    fun, params, batch = perceptron_in_a_frozen_dict()
    H = jaxhess.hessian(fun)(params, *batch)
    assert isinstance(H.blocks, FrozenDict)
