"""The paper's layers as Flax NNX modules, in the place of `nnx.Linear` and of `nnx.RNN(nnx.SimpleCell(..))`.

    Dense           y = f(x K + b)                      K = W^T (in_features, out_features)
    Recurrent       z_s = f(x_s K + z_{s-1} R + b)      K = W^T, R = U^T (out_features, out_features)

Names, shapes and initialisers of the parameters are Flax's: a checkpoint of `nnx.Linear` is one of `Dense`, and an
initialiser sees the fan-in that it expects. The layers are `jaxhess.dense` and `jaxhess.recurrent`: derivatives in
both modes, activations that stay right when they saturate, and a gradient that is one matrix product over all leading axes
and time.

`jaxhess.hessian` needs neither of them: it takes unmodified models.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, Shaped
from jaxhess.activations import Activation, identity, tanh
from jaxhess.interop._common import missing, promoted
from jaxhess.layers import dense, recurrent

try:
    from flax import nnx
except ImportError as error:
    raise missing("flax", "flax", "flax") from error

__all__ = ["Dense", "Recurrent"]

Function = Activation | Callable[[Array], Array]
Initializer = Callable[..., Any]

_kernel_init = jax.nn.initializers.lecun_normal()
_recurrent_init = jax.nn.initializers.orthogonal()
_zeros = jax.nn.initializers.zeros


class Dense(nnx.Module):
    """`activation(inputs @ kernel + bias)` by `jaxhess.dense`.

    Args:
        in_features, out_features: the sizes n and m; `kernel` is (n, m), `bias` (m,), both `nnx.Param`.
        use_bias: without it `bias` is None.
        activation: an `Activation` or any callable that keeps the shape, one object for all calls.
        kernel_init, bias_init: initialisers `(key, shape, dtype) -> array`; `nnx.with_partitioning(..)` is one.
        dtype: what is computed in; by default the common dtype of inputs and parameters.
        param_dtype: the dtype of the parameters.
        rngs: a key is drawn from its `params` stream for each parameter.

    Source: Naumov (2017), equations (10)-(11) and Lemma 1.

    >>> import jax.numpy as jnp, jaxhess
    >>> from flax import nnx
    >>> from jaxhess.interop.flax import Dense
    >>> layer = Dense(3, 2, activation=jaxhess.tanh, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 3))).shape, layer.kernel.shape
    ((5, 2), (3, 2))
    >>> graphdef, params = nnx.split(layer)
    >>> H = jaxhess.hessian(lambda params, x: jnp.sum(nnx.merge(graphdef, params)(x) ** 2))(params, jnp.ones((5, 3)))
    >>> type(H.block("kernel/value")).__name__
    'KroneckerProductSum'
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        activation: Function = identity,
        kernel_init: Initializer = _kernel_init,
        bias_init: Initializer = _zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.activation = activation
        self.dtype = dtype
        self.param_dtype = param_dtype

    def __call__(self, inputs: Shaped[Array, "*batch n"]) -> Shaped[Array, "*batch m"]:
        """The outputs (..., m) of inputs (..., n); raises `InputError` if the last axis is not n."""
        kernel, bias, inputs_ = promoted(self.dtype, self.kernel[...], _value(self.bias), inputs)
        return dense(cast(Array, kernel).T, bias, cast(Array, inputs_), self.activation)


class Recurrent(nnx.Module):
    """All states `z_s = activation(x_s @ kernel + z_{s-1} @ recurrent_kernel + bias)` by `jaxhess.recurrent`.

    Args:
        in_features, out_features: the sizes n and m; `kernel` is (n, m), `recurrent_kernel` (m, m), `bias` (m,).
        use_bias: without it `bias` is None.
        activation: an `Activation` or any callable that keeps the shape, one object for all calls.
        kernel_init, recurrent_kernel_init, bias_init: initialisers `(key, shape, dtype) -> array`.
        dtype: what is computed in; by default the common dtype of inputs, initial state and parameters.
        param_dtype: the dtype of the parameters.
        rngs: a key is drawn from its `params` stream for each parameter.

    Source: Naumov (2017), equations (47)-(48) and Lemma 2, corrected for stacked layers.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxhess.interop.flax import Recurrent
    >>> layer = Recurrent(3, 4, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((5, 7, 3))).shape
    (5, 7, 4)
    >>> layer(jnp.ones((5, 7, 3)), mask=jnp.arange(7) < 2)[..., -1, :].shape
    (5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        activation: Function = tanh,
        kernel_init: Initializer = _kernel_init,
        recurrent_kernel_init: Initializer = _recurrent_init,
        bias_init: Initializer = _zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, out_features), param_dtype))
        self.recurrent_kernel = nnx.Param(recurrent_kernel_init(rngs.params(), (out_features, out_features), param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else nnx.data(None)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.activation = activation
        self.dtype = dtype
        self.param_dtype = param_dtype

    def __call__(
        self,
        inputs: Shaped[Array, "*batch tau n"],
        initial_state: Shaped[Array, "*#batch m"] | None = None,
        *,
        mask: Shaped[Array, "*#batch #tau"] | None = None,
    ) -> Shaped[Array, "*batch tau m"]:
        """All states (..., tau, m) of sequences (..., tau, n).

        `initial_state` is z_0, zero by default; where the boolean `mask` is False the step is left out and the state held.
        Raises `InputError` if the shapes do not fit together.
        """
        arrays = (self.kernel[...], self.recurrent_kernel[...], _value(self.bias), inputs, initial_state)
        K, R, b, x, z0 = promoted(self.dtype, *arrays)
        return recurrent(cast(Array, K).T, cast(Array, R).T, b, cast(Array, x), self.activation, z0, mask=mask)


def _value(variable: Any) -> Array | None:
    return None if variable is None else variable[...]
