"""The paper's layers as Flax Linen modules, in the place of `nn.Dense` and of `nn.RNN(nn.SimpleCell(..))`.

    Dense           y = f(x K + b)                      K = W^T (in, features)
    Recurrent       z_s = f(x_s K + z_{s-1} R + b)      K = W^T, R = U^T (features, features)

Names, shapes and initialisers of the parameters are Flax's: the params of `nn.Dense` are those of `Dense`. The layers are
`jaxhess.dense` and `jaxhess.recurrent`: derivatives in both modes, activations that stay right when they saturate, and a
gradient that is one matrix product over all leading axes and time.

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
    from flax import linen as nn
except ImportError as error:
    raise missing("linen", "flax", "flax") from error

__all__ = ["Dense", "Recurrent"]

Function = Activation | Callable[[Array], Array]
Initializer = Callable[..., Any]


class Dense(nn.Module):
    """`activation(inputs @ kernel + bias)` by `jaxhess.dense`.

    Attributes:
        features: the size m; `kernel` is (n, m), with n of the inputs' last axis, `bias` (m,).
        activation: an `Activation` or any callable that keeps the shape, one object for all calls.
        use_bias: without it there is no parameter `bias`.
        dtype: what is computed in; by default the common dtype of inputs and parameters.
        param_dtype: the dtype of the parameters.
        kernel_init, bias_init: initialisers `(key, shape, dtype) -> array`; `nn.with_partitioning(..)` is one.

    Source: Naumov (2017), equations (10)-(11) and Lemma 1.

    >>> import jax, jax.numpy as jnp, jaxhess
    >>> from jaxhess.interop.linen import Dense
    >>> layer = Dense(2, jaxhess.tanh)
    >>> variables = layer.init(jax.random.key(0), jnp.ones(3))
    >>> jax.tree.map(jnp.shape, variables)
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    >>> H = jaxhess.hessian(lambda variables, x: jnp.sum(layer.apply(variables, x) ** 2))(variables, jnp.ones((5, 3)))
    >>> type(H["params"]["kernel"]).__name__
    'KroneckerProductSum'
    """

    features: int
    activation: Function = identity
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = jax.nn.initializers.lecun_normal()
    bias_init: Initializer = jax.nn.initializers.zeros

    @nn.compact
    def __call__(self, inputs: Shaped[Array, "*batch n"]) -> Shaped[Array, "*batch m"]:
        """The outputs (..., m) of inputs (..., n); raises `InputError` if inputs is no array with a last axis."""
        kernel = self.param("kernel", self.kernel_init, (*jnp.shape(inputs)[-1:], self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        K, b, x = promoted(self.dtype, kernel, bias, inputs)
        return dense(cast(Array, K).T, b, cast(Array, x), self.activation)


class Recurrent(nn.Module):
    """All states `z_s = activation(x_s @ kernel + z_{s-1} @ recurrent_kernel + bias)` by `jaxhess.recurrent`.

    Attributes:
        features: the size m; `kernel` is (n, m), with n of the inputs' last axis, `recurrent_kernel` (m, m), `bias` (m,).
        activation: an `Activation` or any callable that keeps the shape, one object for all calls.
        use_bias: without it there is no parameter `bias`.
        dtype: what is computed in; by default the common dtype of inputs, initial state and parameters.
        param_dtype: the dtype of the parameters.
        kernel_init, recurrent_kernel_init, bias_init: initialisers `(key, shape, dtype) -> array`.

    Source: Naumov (2017), equations (47)-(48) and Lemma 2, corrected for stacked layers.

    >>> import jax, jax.numpy as jnp
    >>> from jaxhess.interop.linen import Recurrent
    >>> layer, x = Recurrent(4), jnp.ones((5, 7, 3))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x, mask=jnp.arange(7) < 2).shape
    (5, 7, 4)
    """

    features: int
    activation: Function = tanh
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = jax.nn.initializers.lecun_normal()
    recurrent_kernel_init: Initializer = jax.nn.initializers.orthogonal()
    bias_init: Initializer = jax.nn.initializers.zeros

    @nn.compact
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
        m, dtype = self.features, self.param_dtype
        kernel = self.param("kernel", self.kernel_init, (*jnp.shape(inputs)[-1:], m), dtype)
        feedback = self.param("recurrent_kernel", self.recurrent_kernel_init, (m, m), dtype)
        bias = self.param("bias", self.bias_init, (m,), dtype) if self.use_bias else None
        K, R, b, x, z0 = promoted(self.dtype, kernel, feedback, bias, inputs, initial_state)
        return recurrent(cast(Array, K).T, cast(Array, R).T, b, cast(Array, x), self.activation, z0, mask=mask)
