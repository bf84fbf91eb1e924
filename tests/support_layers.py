"""Layers of Flax, Equinox and Haiku, activations and losses: the rows of the second part of docs/support.md.

As with the operations, nothing here says how the library passes them (`support_plan` reads that).
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from foreign import cubes, data, generic, tokens

import jaxhess

KEY = jax.random.key(0)
LIBRARIES = ("Flax NNX", "Flax Linen", "Equinox", "Haiku")
Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]
LAYERS: dict[str, dict[str, tuple[Callable[[], Model], str]]] = {}


def layer(title: str, library: int, name: str, build: Callable[[], Model]) -> None:
    """Enter a library's layer in the row `title`."""
    LAYERS.setdefault(title, {})[LIBRARIES[library]] = build, name


def _nnx(title: str, name: str, build: Callable[[nnx.Rngs], Any], x: Any, filters: Any = nnx.Param) -> None:
    def model() -> Model:
        graphdef, params, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), filters, ...)
        params, rest = generic(params), generic(rest)
        return lambda params, x: cubes(nnx.merge(graphdef, params, rest, copy=True)(x)), params, (x,)

    layer(title, 0, name, model)


def _linen(title: str, name: str, build: Callable[[], nn.Module], x: Any, **options: Any) -> None:
    def model() -> Model:
        module = build()
        variables = generic(jax.eval_shape(functools.partial(module.init, **options), KEY, x[0]))
        params, rest = variables.get("params", {}), {name: part for name, part in variables.items() if name != "params"}
        return lambda params, x: cubes(module.apply({"params": params, **rest}, x, **options)), params, (x,)

    layer(title, 1, name, model)


def _equinox(title: str, name: str, build: Callable[[], Any], x: Any, apply: Callable[..., Any] | None = None) -> None:
    def model() -> Model:
        params, static = eqx.partition(generic(eqx.filter_eval_shape(build)), eqx.is_inexact_array)
        run = apply or (lambda module, x: module(x))
        return lambda params, x: cubes(run(eqx.combine(params, static), x)), params, (x,)

    layer(title, 2, name, model)


def _haiku(title: str, name: str, forward: Callable[[Any], Any], x: Any) -> None:
    def model() -> Model:
        transformed = hk.without_apply_rng(hk.transform_with_state(forward))
        params, state = generic(jax.eval_shape(transformed.init, KEY, x[0]))
        return lambda params, x: cubes(transformed.apply(params, state, x)[0]), params, (x,)

    layer(title, 3, name, model)


VECTOR, ROWS, IMAGE, IDS = data(4), data(3, 4), data(4, 4, 2), tokens(3, 5)
FIRST = data(2, 4, 4)  # an image with its channels first
F64 = {"param_dtype": jnp.float64}

_nnx("Dense", "Linear", lambda r: nnx.Linear(4, 3, rngs=r), VECTOR)
_linen("Dense", "Dense", lambda: nn.Dense(3), VECTOR)
_equinox("Dense", "Linear", lambda: eqx.nn.Linear(4, 3, key=KEY), VECTOR)
_haiku("Dense", "Linear", lambda x: hk.Linear(3)(x), VECTOR)

GENERAL = "Dense over several axes"
_nnx(GENERAL, "LinearGeneral", lambda r: nnx.LinearGeneral((4,), (2, 3), rngs=r), VECTOR)
_linen(GENERAL, "DenseGeneral", lambda: nn.DenseGeneral((2, 3)), VECTOR)
_nnx("Einsum", "Einsum", lambda r: nnx.Einsum("tn,nm->tm", (4, 3), (3,), rngs=r), ROWS)
_linen("Einsum", "Einsum", lambda: nn.Einsum((4, 3), "tn,nm->tm"), ROWS)
_nnx("Low-rank adaptation", "LoRA", lambda r: nnx.LoRA(4, 2, 3, rngs=r), VECTOR, nnx.LoRAParam)

_nnx("Convolution", "Conv", lambda r: nnx.Conv(2, 3, (2, 2), strides=2, rngs=r), IMAGE)
_linen("Convolution", "Conv", lambda: nn.Conv(3, (2, 2), strides=2), IMAGE)
_equinox("Convolution", "Conv2d", lambda: eqx.nn.Conv2d(2, 3, 2, 2, key=KEY), FIRST)
_haiku("Convolution", "Conv2D", lambda x: hk.Conv2D(3, 2, 2)(x), IMAGE)
GROUPED = "Convolution in groups, depthwise"
_nnx(GROUPED, "Conv", lambda r: nnx.Conv(2, 4, (2, 2), feature_group_count=2, rngs=r), IMAGE)
_linen(GROUPED, "Conv", lambda: nn.Conv(4, (2, 2), feature_group_count=2), IMAGE)
_equinox(GROUPED, "Conv2d", lambda: eqx.nn.Conv2d(2, 4, 2, groups=2, key=KEY), FIRST)
_haiku(GROUPED, "DepthwiseConv2D", lambda x: hk.DepthwiseConv2D(1, 2)(x[None]), IMAGE)
TRANSPOSED = "Transposed convolution"
_nnx(TRANSPOSED, "ConvTranspose", lambda r: nnx.ConvTranspose(2, 2, (2, 2), (2, 2), rngs=r), IMAGE)
_linen(TRANSPOSED, "ConvTranspose", lambda: nn.ConvTranspose(2, (2, 2), (2, 2)), IMAGE)
_equinox(TRANSPOSED, "ConvTranspose2d", lambda: eqx.nn.ConvTranspose2d(2, 2, 2, 2, key=KEY), FIRST)
_haiku(TRANSPOSED, "Conv2DTranspose", lambda x: hk.Conv2DTranspose(2, 2, 2)(x), IMAGE)
_linen("Convolution with a kernel for each place", "ConvLocal", lambda: nn.ConvLocal(2, (2, 2)), IMAGE)

_nnx("Embedding", "Embed", lambda r: nnx.Embed(5, 3, **F64, rngs=r), IDS)
_linen("Embedding", "Embed", lambda: nn.Embed(5, 3, **F64), IDS)
_equinox("Embedding", "Embedding", lambda: eqx.nn.Embedding(5, 3, key=KEY), IDS, lambda m, ids: jax.vmap(m)(ids))
_haiku("Embedding", "Embed", lambda ids: hk.Embed(5, 3)(ids), IDS)

MAX, AVERAGE, DROPOUT = "Maximum pooling", "Average pooling", "Dropout, switched off"
_nnx(MAX, "max_pool", lambda r: nnx.Sequential(lambda x: nnx.max_pool(x, (2, 2), (2, 2))), IMAGE)
_linen(MAX, "max_pool", lambda: nn.Sequential([lambda x: nn.max_pool(x, (2, 2), (2, 2))]), IMAGE)
_equinox(MAX, "MaxPool2d", lambda: eqx.nn.MaxPool2d(2, 2), FIRST)
_haiku(MAX, "max_pool", lambda x: hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID", channel_axis=-1), IMAGE)
_nnx(AVERAGE, "avg_pool", lambda r: nnx.Sequential(lambda x: nnx.avg_pool(x, (2, 2), (2, 2))), IMAGE)
_linen(AVERAGE, "avg_pool", lambda: nn.Sequential([lambda x: nn.avg_pool(x, (2, 2), (2, 2))]), IMAGE)
_equinox(AVERAGE, "AvgPool2d", lambda: eqx.nn.AvgPool2d(2, 2), FIRST)
_haiku(AVERAGE, "avg_pool", lambda x: hk.avg_pool(x, (2, 2, 1), (2, 2, 1), "VALID", channel_axis=-1), IMAGE)
_nnx(DROPOUT, "Dropout", lambda r: nnx.Dropout(0.5, deterministic=True, rngs=r), VECTOR)
_linen(DROPOUT, "Dropout", lambda: nn.Dropout(0.5, deterministic=True), VECTOR)
_equinox(DROPOUT, "Dropout", lambda: eqx.nn.Dropout(0.5, inference=True), VECTOR)

_nnx("Layer norm", "LayerNorm", lambda r: nnx.LayerNorm(4, rngs=r), VECTOR)
_linen("Layer norm", "LayerNorm", lambda: nn.LayerNorm(), VECTOR)
_equinox("Layer norm", "LayerNorm", lambda: eqx.nn.LayerNorm(4), VECTOR)
_haiku("Layer norm", "LayerNorm", lambda x: hk.LayerNorm(-1, True, True)(x), VECTOR)
_nnx("RMS norm", "RMSNorm", lambda r: nnx.RMSNorm(4, rngs=r), VECTOR)
_linen("RMS norm", "RMSNorm", lambda: nn.RMSNorm(), VECTOR)
_equinox("RMS norm", "RMSNorm", lambda: eqx.nn.RMSNorm(4), VECTOR)
_haiku("RMS norm", "RMSNorm", lambda x: hk.RMSNorm(-1)(x), VECTOR)
_nnx("Group norm", "GroupNorm", lambda r: nnx.GroupNorm(4, 2, rngs=r), ROWS)
_linen("Group norm", "GroupNorm", lambda: nn.GroupNorm(2), ROWS)
_equinox("Group norm", "GroupNorm", lambda: eqx.nn.GroupNorm(2, 4), VECTOR)
_haiku("Group norm", "GroupNorm", lambda x: hk.GroupNorm(2)(x), ROWS)
BATCH = "Batch norm by running averages"
_nnx(BATCH, "BatchNorm", lambda r: nnx.BatchNorm(4, use_running_average=True, rngs=r), VECTOR)
_linen(BATCH, "BatchNorm", lambda: nn.BatchNorm(use_running_average=True), VECTOR)
_haiku(BATCH, "BatchNorm", lambda x: hk.BatchNorm(True, True, 0.9)(x[None], is_training=hk.running_init()), VECTOR)
WEIGHT, SPECTRAL = "Weight norm", "Spectral norm"
_linen(WEIGHT, "WeightNorm", lambda: nn.WeightNorm(nn.Dense(3)), VECTOR)
_equinox(WEIGHT, "WeightNorm", lambda: eqx.nn.WeightNorm(eqx.nn.Linear(4, 3, key=KEY)), VECTOR)
_linen(SPECTRAL, "SpectralNorm", lambda: nn.SpectralNorm(nn.Dense(3)), VECTOR, update_stats=False)

ATTENTION = "Multi-head attention"
_nnx(
    ATTENTION,
    "MultiHeadAttention",
    lambda r: nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.1, deterministic=True, rngs=r),
    ROWS,
)
_linen(ATTENTION, "MultiHeadDotProductAttention", lambda: nn.MultiHeadDotProductAttention(2), ROWS)
_equinox(ATTENTION, "MultiheadAttention", lambda: eqx.nn.MultiheadAttention(2, 4, key=KEY), ROWS, lambda m, x: m(x, x, x))
_haiku(
    ATTENTION,
    "MultiHeadAttention",
    lambda x: hk.MultiHeadAttention(2, 2, w_init=hk.initializers.VarianceScaling(), model_size=4)(x, x, x),
    ROWS,
)


def _scanned(state: Any) -> Callable[..., Any]:
    return lambda cell, x: jax.lax.scan(lambda h, x: (cell(x, h), None), state, x)[0]


def _unrolled(core: Callable[[], Any]) -> Callable[[Any], Any]:
    def forward(x: Any) -> Any:
        cell = core()
        return hk.dynamic_unroll(cell, x, cell.initial_state(None))[0]

    return forward


PAIR = (np.zeros(2), np.zeros(2))
SIMPLE = "Simple recurrent net"
_nnx(SIMPLE, "RNN(SimpleCell)", lambda r: nnx.RNN(nnx.SimpleCell(4, 2, dtype=jnp.float64, **F64, rngs=r)), ROWS)
_linen(SIMPLE, "RNN(SimpleCell)", lambda: nn.RNN(nn.SimpleCell(2, **F64)), ROWS)
_haiku(SIMPLE, "VanillaRNN", _unrolled(lambda: hk.VanillaRNN(2)), ROWS)
_nnx("LSTM", "RNN(LSTMCell)", lambda r: nnx.RNN(nnx.LSTMCell(4, 2, **F64, rngs=r)), ROWS)
_linen("LSTM", "RNN(LSTMCell)", lambda: nn.RNN(nn.LSTMCell(2, **F64)), ROWS)
_equinox("LSTM", "LSTMCell", lambda: eqx.nn.LSTMCell(4, 2, key=KEY), ROWS, lambda m, x: _scanned(PAIR)(m, x)[0])
_haiku("LSTM", "LSTM", _unrolled(lambda: hk.LSTM(2)), ROWS)
_nnx("GRU", "RNN(GRUCell)", lambda r: nnx.RNN(nnx.GRUCell(4, 2, **F64, rngs=r)), ROWS)
_linen("GRU", "RNN(GRUCell)", lambda: nn.RNN(nn.GRUCell(2, **F64)), ROWS)
_equinox("GRU", "GRUCell", lambda: eqx.nn.GRUCell(4, 2, key=KEY), ROWS, _scanned(jnp.zeros(2)))
_haiku("GRU", "GRU", _unrolled(lambda: hk.GRU(2)), ROWS)

PRELU = "Rectifier with a slope to learn"
_nnx(PRELU, "PReLU", lambda r: nnx.PReLU(), VECTOR)
_linen(PRELU, "PReLU", lambda: nn.PReLU(), VECTOR)
_equinox(PRELU, "PReLU", lambda: eqx.nn.PReLU(), VECTOR)

CTC = (np.zeros((1, 2)), np.ones((1, 1), int), np.zeros((1, 1)))
# Functions of a vector of activations.
FUNCTIONS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "Activations of `jax.nn`": {
        name: getattr(jax.nn, name)
        for name in [
            "celu",
            "elu",
            "gelu",
            "glu",
            "hard_sigmoid",
            "hard_silu",
            "hard_tanh",
            "leaky_relu",
            "log_sigmoid",
            "log_softmax",
            "logsumexp",
            "mish",
            "relu",
            "relu6",
            "selu",
            "sigmoid",
            "silu",
            "soft_sign",
            "softmax",
            "softplus",
            "sparse_plus",
            "sparse_sigmoid",
            "squareplus",
            "standardize",
            "tanh",
        ]
    },
    "Losses of `optax`": {
        "cosine_distance": lambda z: optax.cosine_distance(z, jnp.arange(4.0)),
        "ctc_loss": lambda z: optax.ctc_loss(z.reshape(1, 2, 2), *CTC),
        "hinge_loss": lambda z: optax.hinge_loss(z, 2.0 * (jnp.arange(4) % 2) - 1),
        "huber_loss": lambda z: optax.huber_loss(z, jnp.arange(4.0)),
        "kl_divergence": lambda z: optax.kl_divergence(jax.nn.log_softmax(z), jnp.full(4, 0.25)),
        "l2_loss": lambda z: optax.l2_loss(z, jnp.arange(4.0)),
        "log_cosh": lambda z: optax.log_cosh(z, jnp.arange(4.0)),
        "sigmoid_binary_cross_entropy": lambda z: optax.sigmoid_binary_cross_entropy(z, jnp.arange(4) / 4),
        "sigmoid_focal_loss": lambda z: optax.losses.sigmoid_focal_loss(z, jnp.arange(4) % 2),
        "softmax_cross_entropy": lambda z: optax.softmax_cross_entropy(z, jnp.full(4, 0.25)),
        "softmax_cross_entropy_with_integer_labels": lambda z: optax.softmax_cross_entropy_with_integer_labels(z, 1),
        "squared_error": lambda z: optax.squared_error(z, jnp.arange(4.0)),
    },
    "Layers of this library": {
        "dense": lambda z: jaxhess.dense(jnp.ones((3, 4)), jnp.ones(3), z, jaxhess.tanh),
        "recurrent": lambda z: jaxhess.recurrent(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones(2), z.reshape(2, 2)),
    },
}


def as_model(function: Callable[[Any], Any]) -> Callable[[], Model]:
    """The function alone as a layer."""
    return lambda: (lambda params, x: cubes(function(x)), (), (VECTOR,))
