"""Names for activations: places in a function at which curvature can be asked for.

A tap is the identity, y = tap(name, y). `jaxhess.hessian(fun, taps=name)` adds a probe delta = 0 there, y + delta, and gives
d2E / d delta2: the total derivative of the error downstream of y, the matrix Q of math.md where y is a pre-activation and
C where it is an activation.
"""

from typing import TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxhess._typing import Array, InputError

__all__ = ["tap"]

T = TypeVar("T")


def tap(name: str, y: T) -> T:
    """The array `y` itself, under a name.

    Args:
        name: what `hessian(fun, taps=...)` and `laplacian(fun, taps=...)` call it.
        y: an array of any shape. A pytree of arrays has each of them named by its path: `tap("h", {"a": a})` names
            `"h['a']"`. Under `vmap` it is the whole array, the axis of the map first.

    It is `jax.ad_checkpoint.checkpoint_name` with checks: it works under all of JAX's transformations and costs nothing,
    names that were given by `checkpoint_name` are taps too (their axes under `vmap` are as JAX happens to place them), and
    a policy of `jax.checkpoint` may save what a tap names.

    Raises:
        InputError: if `name` is not a string with a character in it, or `y` holds anything but arrays.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum(jaxhess.tap("y", w @ x) ** 2)
    >>> jaxhess.hessian(error, taps="y")(jnp.ones((2, 3)), jnp.ones((5, 3))).shape
    (5, 2, 2)
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"The name of a tap must be a string that is not empty, but is {name!r:.60}.")
    leaves, structure = jax.tree_util.tree_flatten_with_path(y)
    if not leaves:
        raise InputError(f"The tap {name!r} is of {y!r:.60}, which holds no arrays.")
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype"):
            raise InputError(
                f"The tap {name + jax.tree_util.keystr(path)!r} is of a {type(leaf).__name__}, {leaf!r:.40}; only arrays, "
                "and pytrees of arrays, can be tapped."
            )
    named = [checkpoint_name(_axes_in_order(leaf), name + jax.tree_util.keystr(path)) for path, leaf in leaves]
    return jax.tree_util.tree_unflatten(structure, named)


def _axes_in_order(y: Array) -> Array:
    """The same array by an operation that makes `vmap` put its axis first, wherever it had it before: what is named under
    `vmap` has the shape that the user sees."""
    if y.ndim:
        return jax.lax.broadcast_in_dim(y, y.shape, tuple(range(y.ndim)))
    return jax.lax.squeeze(jax.lax.reshape(y, (1,)), (0,))
