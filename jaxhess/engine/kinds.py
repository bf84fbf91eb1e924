"""Kinds of curvature between two live variables a and b: `C[a, b] = d2E / da db` (math.md, section 6).

Zero is the absence of an entry. `Diagonal` holds the entries where both variables have one shape and only equal
components interact; `Dense` holds the (size a, size b) matrix, both variables raveled row-major.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxhess._linalg import add_diagonal
from jaxhess._typing import Array, Shaped

__all__ = ["Dense", "Diagonal", "Kind", "add", "as_dense", "scale_columns", "transpose"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """`diag(values)`, values (size,)."""

    values: Shaped[Array, " size"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """A matrix (size a, size b)."""

    matrix: Shaped[Array, "a b"]


Kind = Diagonal | Dense


def as_dense(kind: Kind) -> Array:
    """The matrix of a curvature of any kind."""
    if isinstance(kind, Dense):
        return kind.matrix
    size = kind.values.shape[0]
    return add_diagonal(jnp.zeros((size, size), kind.values.dtype), kind.values)


def add(a: Kind, b: Kind) -> Kind:
    """The sum, of the narrowest kind that holds it."""
    match a, b:
        case Diagonal(), Diagonal():
            return Diagonal(a.values + b.values)
        case Dense(), Dense():
            return Dense(a.matrix + b.matrix)
        case Dense(), Diagonal():
            return Dense(add_diagonal(a.matrix, b.values))
        case _:
            return add(b, a)


def transpose(kind: Kind) -> Kind:
    """`C[b, a]` from `C[a, b]`."""
    return kind if isinstance(kind, Diagonal) else Dense(kind.matrix.T)


def scale_columns(kind: Kind, d: Shaped[Array, " size"]) -> Kind:
    """`C diag(d)`."""
    if isinstance(kind, Diagonal):
        return Diagonal(kind.values * d)
    return Dense(kind.matrix * d[None, :])
