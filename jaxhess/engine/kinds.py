"""Kinds of curvature between two live variables a and b: `C[a, b] = d2E / da db` (math.md, section 6).

Zero is the absence of an entry. `Diagonal` holds the entries where both variables have one shape and only equal
components interact; `Dense` holds the (size a, size b) matrix, both variables raveled row-major. A variable's curvature with
itself may be `Factored`: behind a narrow place of the network, ten outputs say, it has the rank of that place,

    C = S J^T M J S + D,        J (k, size), M (k, k), S and D diagonal

and neither a linear operation (J W) nor a component-wise one (S f', D f'^2 + g f'') needs more than that. M may be factored
in turn, where the network narrows again and again towards its outputs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import add_diagonal
from jaxhess._typing import Array, Shaped

__all__ = [
    "Dense",
    "Diagonal",
    "Factored",
    "Kind",
    "add",
    "as_dense",
    "diagonal_of",
    "dtype_of",
    "middle_times",
    "quadratic",
    "scale_columns",
    "transpose",
]


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """`diag(scale) rows^T M rows diag(scale) + diag(values)`: `rows` (k, size), `middle` of M (k, k), `scale` and `values`
    (size,), or None for ones and zeros. The scale is apart so that rows which all examples share stay shared."""

    rows: Shaped[Array, "k size"]
    middle: "Diagonal | Dense | Factored"
    scale: Shaped[Array, " size"] | None = None
    values: Shaped[Array, " size"] | None = None

    @property
    def scaled_rows(self) -> Shaped[Array, "k size"]:
        """`rows diag(scale)`."""
        return self.rows if self.scale is None else self.rows * self.scale[None, :]


Kind = Diagonal | Dense | Factored


def dtype_of(kind: Kind) -> Any:
    """The dtype of its entries."""
    match kind:
        case Diagonal():
            return kind.values.dtype
        case Dense():
            return kind.matrix.dtype
        case Factored():
            return kind.rows.dtype


def middle_times(middle: Kind, rows: Shaped[Array, "k size"]) -> Shaped[Array, "k size"]:
    """`M rows`."""
    return middle.values[:, None] * rows if isinstance(middle, Diagonal) else as_dense(middle) @ rows


def as_dense(kind: Kind) -> Array:
    """The matrix of a curvature of any kind."""
    match kind:
        case Dense():
            return kind.matrix
        case Diagonal():
            size = kind.values.shape[0]
            return add_diagonal(jnp.zeros((size, size), kind.values.dtype), kind.values)
        case Factored():
            matrix = middle_times(kind.middle, kind.rows).T @ kind.rows
            if kind.scale is not None:
                matrix = matrix * (kind.scale[:, None] * kind.scale[None, :])
            return matrix if kind.values is None else add_diagonal(matrix, kind.values)


def quadratic(kind: Kind, columns: Shaped[Array, "size n"]) -> Shaped[Array, " n"]:
    """`p^T C p` for each column p."""
    match kind:
        case Diagonal():
            return kind.values @ columns**2
        case Dense():
            return jnp.sum(columns * (kind.matrix @ columns), axis=0)
        case Factored():
            scaled = columns if kind.scale is None else kind.scale[:, None] * columns
            inner = quadratic(kind.middle, kind.rows @ scaled)
            return inner if kind.values is None else inner + kind.values @ columns**2


def diagonal_of(kind: Kind) -> Diagonal:
    """The diagonal alone."""
    match kind:
        case Diagonal():
            return kind
        case Dense():
            return Diagonal(jnp.diagonal(kind.matrix))
        case Factored():
            values = quadratic(kind.middle, kind.scaled_rows)
            return Diagonal(values if kind.values is None else values + kind.values)


def add(a: Kind, b: Kind) -> Kind:
    """The sum, of the narrowest kind that holds it."""
    match a, b:
        case Diagonal(), Diagonal():
            return Diagonal(a.values + b.values)
        case Dense(), Dense():
            return Dense(a.matrix + b.matrix)
        case Dense(), Diagonal():
            return Dense(add_diagonal(a.matrix, b.values))
        case Factored(), Diagonal():
            values = b.values if a.values is None else a.values + b.values
            return dataclasses.replace(a, values=values)
        case Factored(), _:
            return add(Dense(as_dense(a)), b)
        case _:
            return add(b, a)


def transpose(kind: Kind) -> Kind:
    """`C[b, a]` from `C[a, b]`."""
    return Dense(kind.matrix.T) if isinstance(kind, Dense) else kind


def scale_columns(kind: Kind, d: Shaped[Array, " size"]) -> Kind:
    """`C diag(d)`."""
    if isinstance(kind, Diagonal):
        return Diagonal(kind.values * d)
    return Dense(as_dense(kind) * d[None, :])
