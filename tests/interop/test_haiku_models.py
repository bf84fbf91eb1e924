"""Unmodified Haiku models, their nested dicts as the parameters."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from foreign import Models, check, cross_entropy, cubes, data, generic, labels, squares, tokens

import jaxhess
from jaxhess.operators import KroneckerProductSum

MODELS = Models()


def case(forward, loss, x, *batch):
    model = hk.without_apply_rng(hk.transform(forward))
    params = generic(jax.eval_shape(model.init, jax.random.key(0), x[0]))
    return lambda params, x, *target: loss(model.apply(params, x), *target), params, (x, *batch)


@MODELS
def perceptron():
    return case(lambda x: hk.nets.MLP([5, 3], activation=jnp.tanh)(x), cross_entropy, data(4), labels(3))


@MODELS
def images():
    def forward(x):
        h = jax.nn.swish(hk.Conv2D(4, 3, stride=2)(x))
        h = hk.Conv2D(4, 2, feature_group_count=2, padding="VALID")(h)
        return hk.Linear(2)(jnp.ravel(hk.max_pool(h, (2, 2, 1), (1, 1, 1), "VALID", channel_axis=-1)))

    return case(forward, cross_entropy, data(5, 5, 2), labels(2))


@MODELS
def depthwise_and_transposed():
    def forward(x):
        h = hk.Conv1DTranspose(2, 2, stride=2)(jnp.tanh(hk.DepthwiseConv1D(1, 2)(x[None])[0]))
        return hk.avg_pool(jax.nn.elu(h), (2, 1), (2, 1), "VALID", channel_axis=-1)

    return case(forward, cubes, data(3, 2))


@MODELS
def embedding_and_normalisations():
    def forward(ids):
        h = hk.Embed(5, 4)(ids)
        h = hk.RMSNorm(-1)(hk.Linear(6)(hk.LayerNorm(-1, True, True)(h)))
        return hk.Linear(5)(jax.nn.gelu(hk.GroupNorm(2)(h[None])[0]).mean(0))

    return case(forward, cross_entropy, tokens(3, 5), labels(5))


@MODELS
def batch_norm_with_running_averages():
    def forward(x, is_training):
        h = hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x[None]), is_training=is_training)
        return hk.Linear(2)(jnp.tanh(h[0]))

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = generic(jax.eval_shape(lambda key: model.init(key, jnp.ones(3), True), jax.random.key(0)))
    state = jax.tree.map(lambda a: jnp.abs(a) + 0.5, state)
    return lambda params, x: cubes(model.apply(params, state, x, False)[0]), params, (data(3),)


@MODELS
def attention():
    def forward(x):
        return hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling(), model_size=4)(x, x, x)

    return case(forward, cubes, data(3, 4))


@MODELS
def rematerialised_stack_of_layers():
    def forward(x):
        def layer(h):
            return h + jnp.tanh(hk.Linear(3)(hk.LayerNorm(-1, True, True)(h)))

        return hk.Linear(2)(hk.layer_stack(3)(hk.remat(layer))(x))

    return case(forward, cross_entropy, data(3), labels(2))


@MODELS
def lstm():
    def forward(x):
        core = hk.LSTM(3)
        outputs, _ = hk.dynamic_unroll(core, x, core.initial_state(None))
        return hk.Linear(2)(outputs[-1])

    return case(forward, squares, data(3, 2), data(2, seed=101))


@MODELS
def vmapped_positions():
    def forward(x):
        return hk.vmap(lambda row: hk.Linear(2)(jax.nn.softplus(hk.Linear(4)(row))), split_rng=False)(x)

    return case(forward, cubes, data(3, 4))


@pytest.mark.parametrize("model", MODELS.cases())
def test_every_block_equals_autodiff(model):
    check(*model())


def test_names_with_slashes_find_their_blocks():
    fun, params, batch = perceptron()
    H = jaxhess.hessian(fun)(params, *batch)
    assert isinstance(H["mlp/~/linear_0"]["w"], KroneckerProductSum)
    assert H.block("mlp/~/linear_0/w") is H["mlp/~/linear_0"]["w"]
