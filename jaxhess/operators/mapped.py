"""Matrix, diagonal, trace and norm of an operator that only has a product, by mapping `mv` over basis vectors.

    A[:, i] = mv(e_i)      diag(A)_i = e_i . mv(e_i)      ||A||_F^2 = sum_i ||mv(e_i)||^2

N products each. They run in chunks, so beyond the result the memory is that of some columns, never that of the matrix.
Also here, since they need nothing but the matrix or the eigenvalues: `dense_eigvalsh` and `count_signs`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

from jaxhess._typing import Array, Float, InputError

_CHUNK_BYTES = 2**24


class Inertia(NamedTuple):
    """Number of positive, negative and zero eigenvalues of a symmetric operator, each a 0-d integer array; -1 for all
    three where the eigenvalues are NaN."""

    positive: Array
    negative: Array
    zero: Array


def mapped_matrix(operator: lx.AbstractLinearOperator, batch_size: int | None = None) -> Float[Array, "M N"]:
    """The dense matrix, a chunk of `batch_size` columns at a time (by default about 16 MiB of them).

    >>> import lineax as lx, jax
    >>> square = lx.FunctionLinearOperator(lambda x: 2 * x, jax.ShapeDtypeStruct((2,), "float32"))
    >>> mapped_matrix(square).tolist()
    [[2.0, 0.0], [0.0, 2.0]]
    """
    return _map_columns(operator, _whole, batch_size).T


def mapped_diagonal(operator: lx.AbstractLinearOperator, batch_size: int | None = None) -> Array:
    """The diagonal of a square operator, in the shape of its input."""
    diagonal = _map_columns(operator, _own_entry, batch_size)
    return diagonal.reshape(operator.in_structure().shape)


def mapped_trace(operator: lx.AbstractLinearOperator, batch_size: int | None = None) -> Float[Array, ""]:
    """The trace of a square operator."""
    return jnp.sum(_map_columns(operator, _own_entry, batch_size))


def mapped_frobenius_norm(operator: lx.AbstractLinearOperator, batch_size: int | None = None) -> Float[Array, ""]:
    """The root of the sum of all squared entries."""
    return jnp.sqrt(jnp.sum(_map_columns(operator, _sum_of_squares, batch_size)))


def _whole(i: Array, column: Array) -> Array:
    del i
    return column


def _own_entry(i: Array, column: Array) -> Array:
    return column[i]


def _sum_of_squares(i: Array, column: Array) -> Array:
    del i
    return jnp.sum(column**2)


def _map_columns(operator: Any, reading: Callable[[Array, Array], Array], batch_size: int | None) -> Array:
    structure, size = operator.in_structure(), operator.in_size()
    if batch_size is None:
        batch_size = _CHUNK_BYTES // (structure.dtype.itemsize * max(operator.out_size(), size, 1))
    batch_size = max(1, min(batch_size, size))
    arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(operator))
    return (_compiled_readings if arrays else _readings)(operator, reading, batch_size)


def _readings(operator: Any, reading: Callable[[Array, Array], Array], batch_size: int) -> Array:
    structure, size = operator.in_structure(), operator.in_size()
    if size == 0:
        return jnp.zeros((0, operator.out_size()), structure.dtype)

    def column(i: Array) -> Array:
        unit = jnp.zeros(size, structure.dtype).at[i].set(1)
        return reading(i, operator.mv(unit.reshape(structure.shape)).reshape(-1))

    return jax.lax.map(column, jnp.arange(size), batch_size=batch_size)


# Called outside of a user's `jit`, the loop would be compiled every time.
_compiled_readings = jax.jit(_readings, static_argnums=(1, 2))


def dense_eigvalsh(operator: Any) -> Float[Array, "N"]:
    """All eigenvalues, ascending, by way of the dense matrix."""
    require_symmetric(operator, "eigvalsh")
    return jnp.linalg.eigvalsh(operator.as_matrix())


def require_symmetric(operator: Any, what: str) -> None:
    """Raise `InputError` unless the operator is known to be symmetric."""
    if not lx.is_symmetric(operator):
        raise InputError(
            f"{type(operator).__name__}.{what}: the operator is not known to be symmetric; if it is, say so with "
            "with_tags(lineax.symmetric_tag)"
        )


def count_signs(eigenvalues: Float[Array, "k"], size: int, tolerance: Any = None) -> Inertia:
    """The inertia of an operator of `size` rows, given its eigenvalues; those left out are exact zeros.

    Parameters are the `eigenvalues` (k,), k <= `size`, and the `tolerance` below which one counts as zero, by default
    `k * eps * max|eigenvalue|`.

    >>> import jax.numpy as jnp
    >>> [int(count) for count in count_signs(jnp.array([-2.0, 1e-18, 3.0]), 5)]
    [1, 1, 3]
    """
    if tolerance is None:
        tolerance = eigenvalues.size * jnp.finfo(eigenvalues.dtype).eps * jnp.max(jnp.abs(eigenvalues), initial=0)
    positive, negative = jnp.sum(eigenvalues > tolerance), jnp.sum(eigenvalues < -tolerance)
    known = ~jnp.any(jnp.isnan(eigenvalues))
    return Inertia(*(jnp.where(known, count, -1) for count in (positive, negative, size - positive - negative)))
