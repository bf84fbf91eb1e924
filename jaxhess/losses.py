"""Losses `E(output, target)` of one example, with the gradient and Hessian with respect to the output.

A loss enters the recursions through two quantities only (Theorem 1 corrected):

    g^(l) = dE/dz^(l)            C^(l) = d2E/dz^(l)2

For the paper's squared error `E = ||z* - z||^2 / 2` (equation 12) they are `z - z*` (equation 23) and the identity
(equation 39). Every loss here computes both in forms that stay right under saturation, also when they come out of
`jax.grad` and `jax.hessian` of the loss or of a network under it. Separable losses are sums of a component-wise
function with its own first and second derivative, as activations are; softmax cross entropy is in `_softmax.py`, the
sum over a sequence in `_sequence.py`.

Outputs of half precision are promoted to float32 first, so their loss and its curvature are float32.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxhess import _componentwise as forms
from jaxhess import _softmax
from jaxhess._sequence import over_time
from jaxhess._typing import Array, InputError, Shaped

__all__ = [
    "Loss",
    "as_loss",
    "gaussian",
    "huber",
    "make_huber",
    "over_time",
    "poisson",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
]

Binary = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Loss:
    """A twice differentiable loss of one example; call it as `loss(output, target)` to get the scalar E.

    Compared and hashed by identity, so a loss is a static argument of jitted functions. For a batch use `jax.vmap`.

    Attributes:
        value: maps output (shape of the network's output) and target to the scalar E.
        gradient: dE/d(output), of the output's shape.
        hessian: d2E/d(output)2, of shape `output.shape + output.shape`.
        name: for messages.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.losses import squared_error
        >>> z, t = jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0])
        >>> float(squared_error(z, t)), squared_error.gradient(z, t).tolist(), squared_error.hessian(z, t).tolist()
        (2.5, [1.0, 2.0], [[1.0, 0.0], [0.0, 1.0]])
    """

    value: Binary
    gradient: Binary
    hessian: Binary
    name: str = "loss"

    def __call__(self, output: Shaped[Array, "*shape"], target: Shaped[Array, "..."]) -> Shaped[Array, ""]:
        """The scalar E; raises `InputError`, naming both shapes, where output and target do not fit together."""
        return self.value(output, target)

    def __repr__(self) -> str:
        return f"Loss({self.name!r})"


def as_loss(loss: Callable[[Array, Array], Array]) -> Loss:
    """The `Loss` of any callable `loss(output, target) -> scalar`, differentiated by `jax.grad` and `jax.hessian`.

    A `Loss` is returned as it is. The same callable gives the same object again.

    Args:
        loss: for one example. Losses that return one value for each element (`optax.l2_loss`, say) need a sum or mean.

    Raises:
        InputError: if it is not callable; when called, if its result is not a scalar.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from jaxhess.losses import as_loss
        >>> loss = as_loss(lambda output, target: optax.l2_loss(output, target).sum())
        >>> loss.gradient(jnp.array([1.0, 3.0]), jnp.array([0.0, 1.0])).tolist()
        [1.0, 2.0]
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise InputError(f"a loss must be callable, got {type(loss).__name__}")
    try:
        return _as_loss_cached(loss)
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return _as_loss(loss)


def _as_loss(loss: Callable[[Array, Array], Array]) -> Loss:
    name = getattr(loss, "__name__", None) or type(loss).__name__

    def value(output: Array, target: Array) -> Array:
        result = jnp.asarray(loss(output, target))
        if result.shape != ():
            raise InputError(
                f"{name} must return a scalar for one example, got shape {result.shape} for an output of shape "
                f"{jnp.shape(output)} and a target of shape {jnp.shape(target)}; take its sum or mean"
            )
        return result

    return Loss(value, jax.grad(value), jax.hessian(value), name)


_as_loss_cached = functools.lru_cache(maxsize=1024)(_as_loss)


def _floating(name: str, output: Array) -> Array:
    output = jnp.asarray(output)
    if not jnp.issubdtype(output.dtype, jnp.floating):
        raise InputError(f"{name}: output must be floating-point, got {output.dtype} of shape {output.shape}")
    return output.astype(jnp.float32) if jnp.finfo(output.dtype).bits < 32 else output


def _target_like(name: str, output: Array, target: Array, shape: tuple[int, ...]) -> Array:
    target = jnp.asarray(target)
    if target.shape != shape:
        raise InputError(f"{name}: output of shape {output.shape} needs a target of shape {shape}, got {target.shape}")
    return target.astype(output.dtype)


# --- separable losses


def _with_output_derivative(function: Binary, slope: Binary) -> Binary:
    """`function(z, t)`, whose derivative in z is `slope(z, t)` and in t that of its own operations."""
    result = jax.custom_jvp(function)

    def jvp(primals, tangents):
        (z, t), (z_dot, t_dot) = primals, tangents
        terms = []
        if not isinstance(z_dot, SymbolicZero):
            terms.append(slope(z, t) * z_dot)
        if not isinstance(t_dot, SymbolicZero):
            terms.append(jax.jvp(lambda t: function(z, t), (t,), (t_dot,))[1])
        return result(z, t), sum(terms[1:], terms[0])

    result.defjvp(jvp, symbolic_zeros=True)
    return result


def _separable(name: str, value: Binary, slope: Binary, curvature: Binary) -> Loss:
    """The loss `sum_i e(z_i, t_i)` from e and its first two derivatives in z."""
    for function, suffix in ((value, ""), (slope, "_d1"), (curvature, "_d2")):
        function.__name__ = name + suffix
    slope_with_curvature = _with_output_derivative(slope, curvature)
    component = _with_output_derivative(value, slope_with_curvature)

    def check(output: Array, target: Array) -> tuple[Array, Array]:
        output = _floating(name, output)
        return output, _target_like(name, output, target, output.shape)

    def hessian(output: Array, target: Array) -> Array:
        entries = curvature(*check(output, target))
        return jnp.diag(entries.reshape(-1)).reshape(entries.shape + entries.shape)

    return Loss(
        lambda output, target: jnp.sum(component(*check(output, target))),
        lambda output, target: slope_with_curvature(*check(output, target)),
        hessian,
        name,
    )


squared_error = _separable(
    "squared_error",
    lambda z, t: (t - z) * (t - z) / 2,
    lambda z, t: z - t,
    lambda z, t: forms.one(z - t),
)
"""`E = ||t - z||^2 / 2` (equation 12), target of the output's shape."""

sigmoid_cross_entropy = _separable(
    "sigmoid_cross_entropy",
    lambda z, t: (1 - t) * forms.softplus(z) + t * forms.softplus(-z),
    lambda z, t: (1 - t) * forms.sigmoid(z) - t * forms.sigmoid(-z),
    lambda z, t: forms.sigmoid_d1(z),
)
"""`E = -sum_i t_i log s(z_i) + (1 - t_i) log s(-z_i)`, s the sigmoid: logits z, targets in [0, 1] of the same shape."""

poisson = _separable(
    "poisson",
    lambda z, t: jnp.exp(z) - t * z,
    lambda z, t: jnp.exp(z) - t,
    lambda z, t: jnp.exp(z),
)
"""`E = sum_i exp(z_i) - t_i z_i`: log rates z, counts t of the same shape (the constant `log(t!)` is left out)."""


def make_huber(delta: float) -> Loss:
    """The Huber loss: `r^2 / 2` where `|r| <= delta`, `delta (|r| - delta / 2)` beyond, summed over `r = z - t`.

    Its second derivative is 1 for `|r| < delta` and 0 from `|r| = delta` on.

    Args:
        delta: a positive number.

    Raises:
        InputError: if delta is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.losses import make_huber
        >>> make_huber(2.0).gradient(jnp.array([1.0, -5.0]), jnp.zeros(2)).tolist()
        [1.0, -2.0]
    """
    if not delta > 0:
        raise InputError(f"make_huber: delta must be positive, got {delta}")

    def value(z: Array, t: Array) -> Array:
        distance = jnp.abs(z - t)
        inner = jnp.minimum(distance, delta)
        return inner * (distance - inner / 2)

    return _separable(
        "huber",
        value,
        lambda z, t: jnp.maximum(jnp.minimum(z - t, delta), -delta),
        lambda z, t: jnp.maximum(jnp.sign(delta - jnp.abs(z - t)), 0),
    )


huber = make_huber(1.0)
"""`make_huber(1.0)`."""


# --- Gaussian with predicted variance: nothing in it saturates, so autodiff of the formula is as good as a closed form


def _gaussian_check(output: Array, target: Array) -> tuple[Array, Array, Array]:
    output = _floating("gaussian", output)
    if output.ndim == 0 or output.shape[0] != 2:
        raise InputError(
            f"gaussian: output must have shape (2, ...), the mean and the log variance, got {output.shape} with a "
            f"target of shape {jnp.shape(target)}"
        )
    return output[0], output[1], _target_like("gaussian", output, target, output.shape[1:])


def _gaussian_value(output: Array, target: Array) -> Array:
    mean, log_variance, target = _gaussian_check(output, target)
    residual = mean - target
    return jnp.sum(log_variance + residual * residual * jnp.exp(-log_variance)) / 2


gaussian = Loss(_gaussian_value, jax.grad(_gaussian_value), jax.hessian(_gaussian_value), "gaussian")
"""`E = sum(log v + (t - mean)^2 / v) / 2`: output of shape (2, ...), its rows the mean and `log v`; target (...)."""


# --- softmax cross entropy


def _softmax_check(output: Array, target: Array) -> tuple[Array, Array]:
    """The logits, and the target as a probability vector; a class label outside [0, M) becomes NaN."""
    name, output, target = "softmax_cross_entropy", _floating("softmax_cross_entropy", output), jnp.asarray(target)
    if output.ndim != 1:
        raise InputError(
            f"{name}: output must have shape (M,), got {output.shape} with a target of shape {target.shape}; use "
            "jax.vmap for more axes"
        )
    if target.shape == () and jnp.issubdtype(target.dtype, jnp.integer):
        valid = (target >= 0) & (target < output.size)
        classes = jax.lax.iota(target.dtype, output.size)
        label = (classes == jnp.broadcast_to(target, output.shape)).astype(output.dtype)
        return output, jnp.where(valid, label, jnp.nan)
    if target.shape != output.shape:
        raise InputError(
            f"{name}: output of shape {output.shape} needs an integer class label or a target of shape {output.shape}, "
            f"got {target.dtype} of shape {target.shape}"
        )
    return output, target.astype(output.dtype)


softmax_cross_entropy = Loss(
    lambda output, target: _softmax.value(*_softmax_check(output, target)),
    lambda output, target: _softmax.gradient(*_softmax_check(output, target)),
    lambda output, target: _softmax.hessian(*_softmax_check(output, target)),
    "softmax_cross_entropy",
)
"""`E = -sum_i t_i log softmax(z)_i`: logits z (M,); target a class label in [0, M) or a probability vector (M,)."""
