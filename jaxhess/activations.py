"""Activations `f` with first and second derivatives `f'`, `f''` that stay right where f saturates.

A layer computes `z = f(y)` component-wise (equation 10). Its gradient needs `f'` (equation 19) and its curvature `f''`
as well (`Q = C * f'(y) f'(y)^T + diag(g * f''(y))`, Theorem 1 corrected). Differentiating the usual formula for f loses
both in the tails: jax's tanh'' is 0 in float32 from |y| = 9 on. An `Activation` carries the three functions, and
`jax.grad`, `jax.jvp`, `jax.hessian` and so on of a call to it use the second and the third.

Relative error of every instance's f' and f'' for |y| <= 80, wherever the result is a normal number: below 1e-6 in
float32 and 1e-14 in float64, the zeros of f' and f'' included. Half-precision arguments are computed in float32 and
rounded once. All derivatives of NaN are NaN. At their kinks the piecewise functions take JAX's values: `relu'(0) = 0`,
`leaky_relu'(0) = 1`, `elu'(0) = elu''(0) = 1`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess import _componentwise as forms
from jaxhess._typing import Array, InputError, Shaped

__all__ = [
    "Activation",
    "NotComponentWiseError",
    "as_activation",
    "elu",
    "gelu",
    "gelu_tanh",
    "identity",
    "leaky_relu",
    "relu",
    "sigmoid",
    "silu",
    "sin",
    "softplus",
    "tanh",
]


class NotComponentWiseError(InputError):
    """A callable that was to be an activation changes the shape or mixes components."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Activation:
    """A component-wise function with its first and second derivatives; call it as a function.

    Calling it computes `f`; differentiating the call uses `df`, differentiating again `d2f`, and from the third
    derivative on the operations of `d2f`. Compared and hashed by identity, so an activation is a static argument of
    jitted functions.

    Attributes:
        f: the function, from an array of any shape to one of the same shape.
        df: its first derivative, likewise.
        d2f: its second derivative, likewise.
        name: for messages.
        kind: `"smooth"`; `"piecewise linear"`, which promises that `d2f` is zero; or `"linear"`, which promises that
            `f` returns its argument or a multiple of it, and is then differentiated as it stands.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess.activations import Activation, tanh
        >>> square = Activation(lambda y: y * y, lambda y: 2 * y, lambda y: 2 + 0 * y, "square")
        >>> float(square(3.0)), float(jax.grad(square)(3.0)), float(square.second_derivative(3.0))
        (9.0, 6.0, 2.0)
        >>> bool(jax.grad(jax.grad(tanh))(20.0) < 0)
        True
    """

    f: Callable[[Array], Array]
    df: Callable[[Array], Array]
    d2f: Callable[[Array], Array]
    name: str = "activation"
    kind: Literal["smooth", "piecewise linear", "linear"] = "smooth"
    _derivative: Callable[[Array], Array] = dataclasses.field(init=False)
    _value: Callable[[Array], Array] = dataclasses.field(init=False)

    def __post_init__(self):
        derivative = forms.with_derivative(self.df, self.d2f)
        object.__setattr__(self, "_derivative", derivative)
        value = self.f if self.kind == "linear" else forms.with_derivative(self.f, derivative)
        object.__setattr__(self, "_value", value)

    def __call__(self, y: Shaped[Array, "..."] | float) -> Shaped[Array, "..."]:
        """`f(y)`, y an array of any shape and floating dtype (`InputError` otherwise)."""
        return self._value(self._checked(y))

    def value(self, y: Shaped[Array, "..."] | float) -> Shaped[Array, "..."]:
        """`f(y)`, the same as calling the activation."""
        return self(y)

    def derivative(self, y: Shaped[Array, "..."] | float) -> Shaped[Array, "..."]:
        """`f'(y)`, of y's shape and dtype; differentiable in turn."""
        return self._derivative(self._checked(y))

    def second_derivative(self, y: Shaped[Array, "..."] | float) -> Shaped[Array, "..."]:
        """`f''(y)`, of y's shape and dtype; differentiable in turn."""
        return self.d2f(self._checked(y))

    def _checked(self, y: Any) -> Array:
        y = jnp.asarray(y)
        if not jnp.issubdtype(y.dtype, jnp.floating):
            raise InputError(f"{self.name}: expects a floating-point array, got {y.dtype} of shape {y.shape}")
        return y

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"


def _instance(name, f, df, d2f, kind: Literal["smooth", "piecewise linear", "linear"] = "smooth") -> Activation:
    f, df, d2f = forms.in_float32(f, name), forms.in_float32(df, f"{name}_d1"), forms.in_float32(d2f, f"{name}_d2")
    return Activation(f, df, d2f, name, kind)


identity = Activation(lambda y: y, forms.one, forms.zero, "identity", "linear")
relu = _instance("relu", forms.relu, forms.relu_d1, forms.zero, "piecewise linear")
leaky_relu = _instance("leaky_relu", forms.leaky_relu, forms.leaky_relu_d1, forms.zero, "piecewise linear")
elu = _instance("elu", forms.elu, forms.elu_d1, forms.elu_d2)
tanh = _instance("tanh", jnp.tanh, forms.tanh_d1, forms.tanh_d2)
sigmoid = _instance("sigmoid", forms.sigmoid, forms.sigmoid_d1, forms.sigmoid_d2)
softplus = _instance("softplus", forms.softplus, forms.sigmoid, forms.sigmoid_d1)
silu = _instance("silu", forms.silu, forms.silu_d1, forms.silu_d2)
gelu = _instance("gelu", forms.gelu, forms.gelu_d1, forms.gelu_d2)
gelu_tanh = _instance("gelu_tanh", forms.gelu_tanh, forms.gelu_tanh_d1, forms.gelu_tanh_d2)
sin = _instance("sin", jnp.sin, jnp.cos, lambda y: -jnp.sin(y))

_SAME_FUNCTION: dict[Callable, Activation] = {
    **dict.fromkeys((jnp.tanh, jax.nn.tanh, jax.lax.tanh), tanh),
    **dict.fromkeys((jax.nn.sigmoid, jax.lax.logistic, jax.scipy.special.expit), sigmoid),
    **dict.fromkeys((jnp.sin, jax.lax.sin), sin),
    **dict.fromkeys((jax.nn.silu, jax.nn.swish), silu),
    jax.nn.softplus: softplus,
    jax.nn.relu: relu,
    jax.nn.leaky_relu: leaky_relu,
    jax.nn.elu: elu,
    jax.nn.gelu: gelu_tanh,
    jax.nn.identity: identity,
}
# Distinct numbers of both signs and several sizes, in two rows: a softmax or a mean over either axis shows as well.
_PROBES = np.array([[-0.7, 1.3, 0.2], [2.9, -1.9, -0.1]])


def as_activation(function: Callable[[Array], Array]) -> Activation:
    """The `Activation` of a component-wise callable.

    An `Activation` is returned as it is. Functions of `jax.nn`, `jax.numpy` and `jax.lax` that are mathematically one
    of this module's are replaced by it (`jax.nn.gelu` is `gelu_tanh` unless given by `functools.partial(jax.nn.gelu,
    approximate=False)`); anything else is differentiated by `jax.jvp`. The same callable gives the same object again.

    Args:
        function: maps a floating-point array of any shape to one of the same shape, each component by itself.

    Raises:
        NotComponentWiseError: (an `InputError`) if it changes the shape or lets components depend on each other: its
            Jacobian at fixed points is not exactly diagonal.
        InputError: if it is not callable, or depends on traced values of an enclosing transformation.

    Example:
        >>> import jax
        >>> from jaxhess.activations import as_activation, tanh
        >>> as_activation(jax.numpy.tanh) is tanh
        True
        >>> bool(abs(as_activation(lambda y: y**3).second_derivative(2.0) - 12) < 1e-5)
        True
        >>> as_activation(jax.nn.softmax)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        jaxhess.activations.NotComponentWiseError: softmax is not component-wise
    """
    if isinstance(function, Activation):
        return function
    if not callable(function):
        raise InputError(f"an activation must be callable, got {type(function).__name__}")
    try:
        hash(function)
    except TypeError:
        result = _activation_or_reason(function)
    else:
        result = _cached_activation_or_reason(function)
    if isinstance(result, str):
        raise NotComponentWiseError(result)
    return result


def _activation_or_reason(function: Callable) -> Activation | str:
    """The activation, or the words why the function is not component-wise (an exception would not be cached)."""
    known = _recognise(function)
    if known is not None:
        return known
    name = getattr(function, "__name__", None) or type(function).__name__
    reason = _why_not_component_wise(function, name)
    if reason is not None:
        return reason

    def df(y: Array) -> Array:
        return jax.jvp(function, (y,), (jnp.ones_like(y),))[1]

    def d2f(y: Array) -> Array:
        return jax.jvp(df, (y,), (jnp.ones_like(y),))[1]

    return Activation(function, df, d2f, name)


_cached_activation_or_reason = functools.lru_cache(maxsize=1024)(_activation_or_reason)


def _recognise(function: Callable) -> Activation | None:
    if isinstance(function, functools.partial):
        if function.func is jax.nn.gelu and not function.args and set(function.keywords) == {"approximate"}:
            return gelu_tanh if function.keywords["approximate"] else gelu
        return None
    try:
        return _SAME_FUNCTION.get(function)
    except TypeError:
        return None


def _why_not_component_wise(function: Callable, name: str) -> str | None:
    with jax.ensure_compile_time_eval():
        probes = jnp.asarray(_PROBES)
        try:
            image = jnp.asarray(function(probes))
            if image.shape != probes.shape or not jnp.issubdtype(image.dtype, jnp.floating):
                given, got = (f"{a.dtype}{list(a.shape)}" for a in (probes, image))
                return f"{name} is not an activation: it maps {given} to {got}"
            for scale in (1.0, 0.1, 5.0):
                jacobian = np.asarray(jax.jacfwd(function)(scale * probes)).reshape(probes.size, probes.size)
                if np.any(jacobian[~np.eye(probes.size, dtype=bool)]):
                    return f"{name} is not component-wise: an output depends on another component's input"
        except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError) as error:
            raise InputError(
                f"{name} depends on traced values besides its argument (a parameter it closes over?), so its "
                "derivatives cannot be taken apart from them; apply it outside of the layer instead"
            ) from error
        except Exception as error:  # whatever a foreign function does with a shape that it does not expect
            return f"{name} cannot be applied to an array of shape {probes.shape}: {error}"
    return None
