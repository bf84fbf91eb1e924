"""What every transformation checks before it compiles anything, and how compiled code takes and returns trees."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxhess._linalg import widened
from jaxhess._typing import Array, InputError, PyTree

__all__ = [
    "Error",
    "Shared",
    "as_static_integer",
    "check_batch",
    "check_batch_size",
    "check_number",
    "check_option",
    "check_parameters",
    "hashable",
    "widened",
]

Error = Callable[..., Array]


class _ByIdentity:
    """A function without a hash (a module that holds arrays, say), told apart by identity."""

    def __init__(self, fun: Error) -> None:
        self.fun, self.__name__ = fun, getattr(fun, "__name__", type(fun).__name__)

    def __call__(self, *args: Any) -> Array:
        return self.fun(*args)


def hashable(fun: Error) -> Error:
    """The function, or one with a hash in its place; raises `InputError` if it is no function."""
    if not callable(fun):
        raise InputError(f"fun must be a function of (params, *example), but is a {type(fun).__name__}.")
    try:
        hash(fun)
    except TypeError:
        return _ByIdentity(fun)
    return fun


def check_parameters(params: PyTree) -> PyTree:
    """The parameters as arrays; raises `InputError` unless they are real floating ones."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise InputError("params holds no arrays: there is nothing to differentiate with respect to.")
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") and not isinstance(leaf, float):
            raise InputError(
                f"{name} is {type(leaf).__name__} {leaf!r:.40}, not a floating-point array. Keep what is not trained "
                "outside of params, in a closure (functools.partial) say, or partition the model (equinox.partition, "
                "nnx.split)."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"{name} has dtype {jnp.result_type(leaf)} and shape {list(jnp.shape(leaf))}; parameters must be real "
                "floating-point arrays. Pass other arrays by a closure or as part of the batch."
            )
    return jax.tree.map(_as_array, params)


def check_batch(fun: Error, batch: tuple[PyTree, ...]) -> tuple[tuple[PyTree, ...], int]:
    """The batch as arrays, and its number of examples; raises `InputError` if they are none or differ."""
    lengths: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = f"batch argument {jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") or jnp.ndim(leaf) == 0:
            kind = "scalar" if hasattr(leaf, "dtype") or jnp.isscalar(leaf) else type(leaf).__name__
            raise InputError(
                f"{name} is a {kind}; the batch consists of arrays with a leading axis of examples. "
                "Pass what all examples share by a closure (functools.partial)."
            )
        lengths[name] = jnp.shape(leaf)[0]
    if not lengths:
        return batch, 1
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"The arrays of the batch differ in their number of examples (leading axis): {found}.")
    (examples,) = set(lengths.values())
    if examples == 0:
        raise InputError(
            f"The batch is empty: {', '.join(lengths)} of {getattr(fun, '__name__', 'fun')} have 0 examples; "
            "the mean over no examples is undefined."
        )
    return jax.tree.map(_as_array, batch), examples


def _as_array(leaf: Any) -> Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


@jax.tree_util.register_pytree_node_class
class Shared:
    """A tree whose leaves may be the same array; compiled code returns it once."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def tree_flatten(self) -> tuple[list[Any], Any]:
        leaves, structure = jax.tree.flatten(self.tree)
        unique = {id(leaf): leaf for leaf in leaves}
        order = {key: index for index, key in enumerate(unique)}
        return list(unique.values()), (structure, tuple(order[id(leaf)] for leaf in leaves))

    @classmethod
    def tree_unflatten(cls, structure: Any, unique: Any) -> "Shared":
        unique = list(unique)
        return cls(jax.tree.unflatten(structure[0], [unique[index] for index in structure[1]]))


def check_batch_size(batch_size: int | None) -> None:
    """Raise `InputError` unless it is a positive integer or None."""
    integral = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if batch_size is not None and (not integral or batch_size < 1):
        raise InputError(f"batch_size must be a positive integer or None, but is {batch_size!r}.")


def check_number(
    what: str,
    given: Any,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    whole: bool = False,
) -> None:
    """Raise `InputError` unless it is one real number, finite and within bounds as far as it is known; `what` says whose."""
    known = isinstance(given, int | float | complex | np.generic | np.ndarray | jax.Array) and not isinstance(given, bool)
    if known and jnp.ndim(given) != 0:
        raise InputError(f"{what} must be one number, got an array of shape {jnp.shape(given)}")
    if not known or not jnp.issubdtype(jnp.result_type(given), jnp.number) or jnp.iscomplexobj(given):
        raise InputError(f"{what} must be a real number, got {type(given).__name__} {given!r:.60}")
    if isinstance(given, Tracer):
        return
    value = float(np.real(given))
    if not math.isfinite(value):
        raise InputError(f"{what} must be finite, got {given}")
    if whole and value != int(value):
        raise InputError(f"{what} must be a whole number, got {given}")
    if value < least or value <= above or value >= below:
        bounds = [f"at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
        bounds += [f"below {below:g}"] * (below < math.inf)
        raise InputError(f"{what} must be {' and '.join(bounds)}, got {given}")


def as_static_integer(what: str, given: Any) -> int:
    """A whole number of at least 1 that compiled code is made for; raises `InputError` for others."""
    integral = isinstance(given, numbers.Integral) and not isinstance(given, bool)
    if not integral:
        array = isinstance(given, jax.Array)
        raise InputError(
            f"{what} must be a Python integer of at least 1, since compiled code depends on it, got {type(given).__name__} "
            f"{given!r:.60}" + ("; optax.inject_hyperparams takes it as one of its static_args" if array else "")
        )
    if given < 1:
        raise InputError(f"{what} must be a whole number of at least 1, got {given}")
    return int(given)


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `InputError` unless an option has one of the known values."""
    if value not in known:
        raise InputError(f"{name}={value!r} is not known; there is {' and '.join(map(repr, known))}.")
