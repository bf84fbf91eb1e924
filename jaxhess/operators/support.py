"""What the operators share: lineax tags and how they change, checks of arguments, and words for `repr`.

Nothing here knows the classes; operators are spoken to through lineax's interface only.
"""

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.core import Tracer

from jaxhess._linalg import check_dense_fits, format_bytes
from jaxhess._typing import Array, InputError

_IMPLY_SYMMETRY = {lx.diagonal_tag, lx.positive_semidefinite_tag, lx.negative_semidefinite_tag}
_SWAPPED_BY_TRANSPOSE: dict[object, object] = {
    lx.lower_triangular_tag: lx.upper_triangular_tag,
    lx.upper_triangular_tag: lx.lower_triangular_tag,
}
_SWAPPED_BY_SIGN: dict[object, object] = {
    lx.positive_semidefinite_tag: lx.negative_semidefinite_tag,
    lx.negative_semidefinite_tag: lx.positive_semidefinite_tag,
}
_SIGNED = set(_SWAPPED_BY_SIGN)


def as_tags(tags: Any) -> frozenset[object]:
    """One tag, or several, as a set, with symmetry added where it follows (everything here is real)."""
    collected = frozenset(tags) if isinstance(tags, Iterable) else frozenset([tags])
    return collected | {lx.symmetric_tag} if collected & _IMPLY_SYMMETRY else collected


def common_tags(operators: Iterable[Any]) -> frozenset[object]:
    """The tags of a sum or of a block diagonal: what all the operators have, a unit diagonal excepted."""
    sets = [operator.tags for operator in operators]
    return frozenset.intersection(*sets) - {lx.unit_diagonal_tag} if sets else frozenset()


def transposed_tags(tags: frozenset[object]) -> frozenset[object]:
    """The tags of the transposed operator."""
    return frozenset(_SWAPPED_BY_TRANSPOSE.get(tag, tag) for tag in tags)


def scaled_tags(tags: frozenset[object], factor: Any) -> frozenset[object]:
    """The tags of the scaled operator: definiteness stays only if the sign of `factor` is known while tracing."""
    tags = tags - {lx.unit_diagonal_tag}
    sign = float(np.sign(factor)) if isinstance(factor, int | float | np.generic) else 0.0
    if sign > 0:
        return tags
    if sign < 0:
        return frozenset(_SWAPPED_BY_SIGN.get(tag, tag) for tag in tags)
    return tags - _SIGNED


def as_scalar(what: str, factor: Any, dtype: Any) -> Array:
    """`factor` as a 0-d array of the operator's dtype, so that scaling changes no structure."""
    scalar: Any = factor
    if not isinstance(factor, numbers.Number | np.ndarray | np.generic | jax.Array):
        raise InputError(f"{what}: can be multiplied by scalars only, got a {type(factor).__name__}")
    if jnp.iscomplexobj(scalar):
        raise InputError(f"{what}: is real and can be multiplied by real scalars only, got a complex one")
    if jnp.ndim(scalar) != 0:
        raise InputError(f"{what}: can be multiplied by scalars only, got an array of shape {jnp.shape(scalar)}")
    return as_array(scalar, dtype)


def as_array(value: Any, dtype: Any) -> Array:
    """`value` as an array of this dtype; itself, without JAX's own checks, where it is one."""
    if isinstance(value, jax.Array) and value.dtype == dtype and not value.weak_type:
        return value
    return jnp.asarray(value).astype(dtype)


def sign_of(number: Any) -> float | None:
    """The sign of a number or 0-d array that is known, inside of a trace too (NaN has NaN); None for a traced one."""
    return None if isinstance(number, Tracer) else float(np.sign(np.asarray(number, float)))


def as_real_arrays(what: str, names: Sequence[str], arrays: Sequence[Any]) -> list[Array]:
    """The arguments as real floating arrays of one dtype, the widest of theirs."""
    converted = [jnp.asarray(a) for a in arrays]
    for name, a in zip(names, converted, strict=True):
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise InputError(f"{what}: {name} must be a real floating-point array, got dtype {a.dtype}")
    dtype = jnp.result_type(*converted)
    return [a.astype(dtype) for a in converted]


def check_vector(what: str, vector: Any, shape: tuple[int, ...]) -> None:
    """Raise `InputError` unless `vector` has the shape that the operator acts on."""
    if jnp.shape(vector) != shape:
        raise InputError(f"{what}.mv: needs an array of shape {shape}, got shape {jnp.shape(vector)}")
    if jnp.iscomplexobj(vector):
        raise InputError(f"{what}.mv: needs a real array, got a complex one; apply it to the real and imaginary parts")


def check_square(operator: Any, what: str) -> None:
    """Raise `InputError` unless the operator maps arrays of one shape to arrays of that shape."""
    rows, columns = operator.out_structure().shape, operator.in_structure().shape
    if rows != columns:
        raise InputError(
            f"{type(operator).__name__}.{what}: needs a block between arrays of one shape, this one maps {columns} to {rows}"
        )


def check_same_structure(first: Any, second: Any) -> None:
    """Raise `InputError` unless both operators map between the same shapes."""
    for side in ("in_structure", "out_structure"):
        a, b = (_shapes(getattr(operator, side)()) for operator in (first, second))
        if a != b:
            raise InputError(
                f"{type(first).__name__} + {type(second).__name__}: the operators act on different structures: {a} and {b}"
            )


def check_operator_fits(operator: Any, name: str = "", instead: str = "mv, diagonal(), trace() or frobenius_norm()") -> None:
    """Raise `DenseTooLargeError` unless the dense form fits in memory."""
    check_dense_fits(
        f"{type(operator).__name__}{name}",
        operator.out_size(),
        operator.in_size(),
        itemsize(operator),
        f"Call {instead}, which never form it.",
    )


def itemsize(operator: Any) -> int:
    """Bytes of one entry of the dense form."""
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(operator.out_structure()))).itemsize


def leaf_bytes(leaf: Any) -> int:
    """Bytes of an array, a tracer or a `ShapeDtypeStruct`; 0 for anything else."""
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return 0
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 0)


def describe(operator: Any, *contents: str) -> str:
    """The text of `repr`: kind, size, what is stored, and how much memory that takes and saves.

    Sizes only, so it holds for tracers, shapes without values, and the leaves that `tree.map` may leave behind.
    """
    stored = format_bytes(sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(operator)))
    try:
        rows, columns = operator.out_size(), operator.in_size()
        size, dense = f"{rows} x {columns}", format_bytes(rows * columns * itemsize(operator))
    except (AttributeError, TypeError, ValueError, IndexError):  # leaves that are no arrays
        size, dense = "? x ?", "?"
    text = ", ".join((size, *contents, f"{stored} instead of {dense}"))
    return f"{type(operator).__name__}({text})"


def shape_text(array: Any) -> str:
    """The shape of an array as text, `?` for anything else."""
    return str(tuple(array.shape)) if hasattr(array, "shape") else "?"


def _shapes(structure: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.shape, structure)
