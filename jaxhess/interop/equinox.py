"""The paper's layers as Equinox modules, in the place of `eqx.nn.Linear` and of a cell under `jax.lax.scan`.

    Dense           z = f(W x + b)                      W (out_size, in_size)
    Recurrent       z_s = f(W x_s + U z_{s-1} + b)      U (out_size, out_size)

As everywhere in Equinox a module is written for one example, and `jax.vmap` maps it over a batch; leading axes are taken as
well, and cost less. Names, shapes and initialisation of `weight` and `bias` are those of `eqx.nn.Linear`. The layers are
`jaxhess.dense` and `jaxhess.recurrent`: derivatives in both modes, activations that stay right when they saturate, and a
gradient that is one matrix product over all leading axes and time.

`jaxhess.hessian` needs neither of them: it takes unmodified models.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, Shaped
from jaxhess.activations import Activation, identity, tanh
from jaxhess.interop._common import missing
from jaxhess.layers import dense, recurrent

try:
    import equinox as eqx
except ImportError as error:
    raise missing("equinox", "equinox", "equinox") from error

__all__ = ["Dense", "Recurrent"]

Function = Activation | Callable[[Array], Array]


class Dense(eqx.Module):
    """`activation(weight @ x + bias)` by `jaxhess.dense`.

    Args:
        in_size, out_size: the sizes n and m; `weight` is (m, n), `bias` (m,), uniform on ±1/sqrt(n).
        activation: an `Activation` or any callable that keeps the shape, one object for all calls; a static field.
        use_bias: without it `bias` is None.
        dtype: of the parameters, by default JAX's default floating dtype.
        key: a `jax.random` key.

    Source: Naumov (2017), equations (10)-(11) and Lemma 1.

    >>> import jax, jax.numpy as jnp, jaxhess
    >>> from jaxhess.interop.equinox import Dense
    >>> layer = Dense(3, 2, jaxhess.tanh, key=jax.random.key(0))
    >>> layer(jnp.ones(3)).shape, layer(jnp.ones((5, 3))).shape, layer.weight.shape
    ((2,), (5, 2), (2, 3))
    >>> H = jaxhess.hessian(lambda layer, x: jnp.sum(layer(x) ** 2))(layer, jnp.ones((5, 3)))
    >>> type(H["weight"]).__name__
    'KroneckerProductSum'
    """

    weight: Array
    bias: Array | None
    in_size: int = eqx.field(static=True)
    out_size: int = eqx.field(static=True)
    activation: Function = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        activation: Function = identity,
        use_bias: bool = True,
        dtype: Any = None,
        *,
        key: Array,
    ):
        keys = jax.random.split(key)
        self.weight = _uniform(keys[0], (out_size, in_size), in_size, dtype)
        self.bias = _uniform(keys[1], (out_size,), in_size, dtype) if use_bias else None
        self.in_size = in_size
        self.out_size = out_size
        self.activation = activation
        self.use_bias = use_bias

    def __call__(self, x: Shaped[Array, "*batch n"], *, key: Array | None = None) -> Shaped[Array, "*batch m"]:
        """The outputs (..., m) of inputs (..., n); `key` is ignored, for `eqx.nn.Sequential`.

        Raises `InputError` if the last axis is not n or x is not floating-point.
        """
        return dense(self.weight, self.bias, x, self.activation)


class Recurrent(eqx.Module):
    """All states `z_s = activation(weight @ x_s + feedback @ z_{s-1} + bias)` by `jaxhess.recurrent`.

    Args:
        in_size, out_size: the sizes n and m; `weight` is (m, n), `feedback` (m, m), `bias` (m,), uniform on ±1/sqrt(m).
        activation: an `Activation` or any callable that keeps the shape, one object for all calls; a static field.
        use_bias: without it `bias` is None.
        dtype: of the parameters, by default JAX's default floating dtype.
        key: a `jax.random` key.

    Source: Naumov (2017), equations (47)-(48) and Lemma 2, corrected for stacked layers.

    >>> import jax, jax.numpy as jnp
    >>> from jaxhess.interop.equinox import Recurrent
    >>> layer = Recurrent(3, 4, key=jax.random.key(0))
    >>> layer(jnp.ones((7, 3))).shape, layer(jnp.ones((7, 3)), jnp.zeros(4), mask=jnp.arange(7) < 2).shape
    ((7, 4), (7, 4))
    """

    weight: Array
    feedback: Array
    bias: Array | None
    in_size: int = eqx.field(static=True)
    out_size: int = eqx.field(static=True)
    activation: Function = eqx.field(static=True)
    use_bias: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        activation: Function = tanh,
        use_bias: bool = True,
        dtype: Any = None,
        *,
        key: Array,
    ):
        keys = jax.random.split(key, 3)
        self.weight = _uniform(keys[0], (out_size, in_size), out_size, dtype)
        self.feedback = _uniform(keys[1], (out_size, out_size), out_size, dtype)
        self.bias = _uniform(keys[2], (out_size,), out_size, dtype) if use_bias else None
        self.in_size = in_size
        self.out_size = out_size
        self.activation = activation
        self.use_bias = use_bias

    def __call__(
        self,
        x: Shaped[Array, "*batch tau n"],
        initial_state: Shaped[Array, "*#batch m"] | None = None,
        *,
        mask: Shaped[Array, "*#batch #tau"] | None = None,
        key: Array | None = None,
    ) -> Shaped[Array, "*batch tau m"]:
        """All states (..., tau, m) of a sequence (..., tau, n); `key` is ignored, for `eqx.nn.Sequential`.

        `initial_state` is z_0, zero by default; where the boolean `mask` is False the step is left out and the state held.
        Raises `InputError` if the shapes do not fit together or an array is not floating-point.
        """
        return recurrent(self.weight, self.feedback, self.bias, x, self.activation, initial_state, mask=mask)


def _uniform(key: Array, shape: tuple[int, ...], fan: int, dtype: Any) -> Array:
    limit = 1 / math.sqrt(max(fan, 1))
    return jax.random.uniform(key, shape, jnp.result_type(float if dtype is None else dtype), -limit, limit)
