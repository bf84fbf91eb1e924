"""Unmodified Equinox models, their arrays as the parameters (None where the model has something else)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from foreign import Models, check, cross_entropy, cubes, data, generic, labels, squares, tokens

import jaxhess
from jaxhess.operators import BlockDiagonal, KroneckerProductSum

MODELS = Models()
KEYS = jax.random.split(jax.random.key(0), 6)


def case(model, loss, x, *batch, trained=eqx.is_inexact_array):
    """What `trained` takes of the model as the parameters, everything else in the closure."""
    params, static = eqx.partition(model, trained)

    def fun(params, x, *target):
        return loss(eqx.combine(params, static)(x), *target)

    return fun, generic(params), (x, *batch)


@MODELS
def perceptron():
    return case(eqx.nn.MLP(4, 3, 5, 2, jax.nn.silu, key=KEYS[0]), cross_entropy, data(4), labels(3))


@MODELS
def frozen_first_layer():
    model = eqx.nn.MLP(3, 2, 4, 1, jax.nn.gelu, key=KEYS[0])
    trained = eqx.tree_at(
        lambda m: (m.layers[1].weight, m.layers[1].bias), jax.tree.map(lambda _: False, model), (True, True)
    )
    return case(model, squares, data(3), data(2, seed=101), trained=trained)


@MODELS
def images():
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=KEYS[0]),
            eqx.nn.Lambda(jax.nn.swish),
            eqx.nn.Conv2d(4, 4, 2, groups=2, key=KEYS[1]),
            eqx.nn.MaxPool2d(2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(4, 2, key=KEYS[2]),
        ]
    )
    return case(model, cross_entropy, data(2, 5, 5), labels(2))


@MODELS
def transposed_and_average():
    model = eqx.nn.Sequential(
        [
            eqx.nn.ConvTranspose1d(2, 2, 2, stride=2, key=KEYS[0]),
            eqx.nn.Lambda(jax.nn.softplus),
            eqx.nn.AvgPool1d(2, 2),
            eqx.nn.Conv1d(2, 2, 2, dilation=2, padding="SAME", key=KEYS[1]),
            eqx.nn.AdaptiveAvgPool1d(2),
        ]
    )
    return case(model, cubes, data(2, 4))


@MODELS
def normalisations():
    batch_norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(6, "batch", mode="ema", dtype=jnp.float64)
    batch_norm = eqx.nn.inference_mode(batch_norm)
    state = jax.tree.map(lambda a: jnp.linspace(0.5, 2, 6) if a.shape == (6,) else a, state)
    model = eqx.nn.Sequential(
        [
            eqx.nn.LayerNorm(4),
            eqx.nn.Linear(4, 6, key=KEYS[0]),
            eqx.nn.RMSNorm(6),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.GroupNorm(2, 6),
            eqx.nn.Lambda(eqx.nn.PReLU()),
            batch_norm,
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, x: cubes(eqx.combine(params, static)(x, state)[0]), generic(params), (data(4),)


@MODELS
def embedding_and_tied_head():
    class Model(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self):
            layers = (eqx.nn.Embedding(5, 3, key=KEYS[0]), eqx.nn.Linear(3, 5, key=KEYS[1]))
            self.shared = eqx.nn.Shared(layers, lambda pair: pair[1].weight, lambda pair: pair[0].weight)

        def __call__(self, ids):
            embed, head = self.shared()
            return head(jnp.tanh(jax.vmap(embed)(ids).mean(0)))

    return case(Model(), cross_entropy, tokens(4, 5), labels(5))


@MODELS
def attention():
    class Model(eqx.Module):
        attend: eqx.nn.MultiheadAttention

        def __call__(self, x):
            return self.attend(x, x, x)

    model = Model(eqx.nn.MultiheadAttention(2, 4, use_query_bias=True, use_output_bias=True, dropout_p=0.3, key=KEYS[0]))
    return case(eqx.nn.inference_mode(model), cubes, data(3, 4))


@MODELS.slow
def rematerialised_transformer():
    class Block(eqx.Module):
        before: eqx.nn.LayerNorm
        after: eqx.nn.RMSNorm
        rotate: eqx.nn.RotaryPositionalEmbedding
        attend: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear
        drop: eqx.nn.Dropout

        @eqx.filter_checkpoint
        def __call__(self, x):
            def heads(q, k, v):
                return jax.vmap(self.rotate, 1, 1)(q), jax.vmap(self.rotate, 1, 1)(k), v

            h = jax.vmap(self.before)(x)
            x = x + self.attend(h, h, h, mask=jnp.tril(jnp.ones((3, 3), bool)), process_heads=heads)
            return x + self.drop(jax.vmap(lambda h: self.down(jax.nn.glu(self.up(self.after(h)))))(x))

    class Transformer(eqx.Module):
        embed: eqx.nn.Embedding
        block: Block

        def __call__(self, ids):
            return self.block(jax.vmap(self.embed)(ids)) @ self.embed.weight.T

    def loss(logits, ids):
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(ids, -1)).mean()

    block = Block(
        eqx.nn.LayerNorm(4),
        eqx.nn.RMSNorm(4),
        eqx.nn.RotaryPositionalEmbedding(2, dtype=jnp.float64),
        eqx.nn.MultiheadAttention(2, 4, key=KEYS[0]),
        eqx.nn.Linear(4, 6, key=KEYS[1]),
        eqx.nn.Linear(3, 4, key=KEYS[2]),
        eqx.nn.Dropout(0.2, inference=True),
    )
    ids = tokens(3, 5)
    return case(Transformer(eqx.nn.Embedding(5, 4, key=KEYS[3]), block), loss, ids, ids)


@MODELS
def vmapped_ensemble():
    class Ensemble(eqx.Module):
        members: eqx.nn.MLP

        def __call__(self, x):
            return eqx.filter_vmap(lambda member, x: member(x), in_axes=(eqx.if_array(0), None))(self.members, x)

    members = eqx.filter_vmap(lambda key: eqx.nn.MLP(3, 2, 3, 1, jnp.tanh, key=key))(KEYS[:2])
    return case(Ensemble(members), cubes, data(3))


@MODELS
def scanned_layers():
    class Deep(eqx.Module):
        layers: eqx.nn.Linear
        head: eqx.nn.Linear

        def __call__(self, x):
            arrays, static = eqx.partition(self.layers, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(eqx.combine(layer, static)(x)), None), x, arrays)
            return self.head(x)

    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 3, key=key))(KEYS[:3])
    return case(Deep(layers, eqx.nn.Linear(3, 2, key=KEYS[3])), cross_entropy, data(3), labels(2))


@MODELS
def gated_recurrent_unit():
    class Model(eqx.Module):
        cell: eqx.nn.GRUCell
        head: eqx.nn.Linear

        def __call__(self, x):
            h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(3), x)
            return self.head(h)

    model = Model(eqx.nn.GRUCell(2, 3, key=KEYS[0]), eqx.nn.Linear(3, 2, key=KEYS[1]))
    return case(model, squares, data(3, 2), data(2, seed=101))


@MODELS
def weight_and_spectral_normalisation():
    spectral, state = eqx.nn.make_with_state(eqx.nn.SpectralNorm)(eqx.nn.Linear(4, 2, key=KEYS[0]), "weight", key=KEYS[1])
    model = (eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEYS[2])), eqx.nn.inference_mode(spectral))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fun(params, x, t):
        first, second = eqx.combine(params, static)
        return squares(second(jnp.tanh(first(x)), state)[0], t)

    return fun, generic(params), (data(3), data(2, seed=101))


@pytest.mark.parametrize("model", MODELS.cases())
def test_every_block_equals_autodiff(model):
    check(*model())


def test_blocks_and_parts_are_found_by_attribute_names():
    fun, params, batch = perceptron()
    H = jaxhess.hessian(fun)(params, *batch)
    assert isinstance(H["layers"][1]["weight"], KroneckerProductSum)
    assert isinstance(H["layers"], BlockDiagonal)
    moved = eqx.apply_updates(params, H.mv(params))
    assert jnp.isfinite(fun(moved, *(a[0] for a in batch)))


def test_a_whole_model_is_refused_with_what_to_do():
    model = eqx.nn.MLP(3, 2, 4, 1, key=KEYS[0])
    with pytest.raises(TypeError, match=r"(?s)activation.*equinox.partition"):
        jaxhess.hessian(lambda model, x: jnp.sum(model(x)))(model, data(3))
