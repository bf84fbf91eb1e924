"""Products at full precision, symmetrisation, widening, and the memory guard of dense forms."""

import os

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, DenseTooLargeError, Float, Shaped

PRECISION = jax.lax.Precision.HIGHEST


def einsum(formula: str, *operands: Array, **options) -> Array:
    """`jnp.einsum` at full float32 precision: accelerators default to fewer bits."""
    return jnp.einsum(formula, *operands, precision=PRECISION, **options)


def matmul(a: Array, b: Array) -> Array:
    """`a @ b` at full float32 precision."""
    return jnp.matmul(a, b, precision=PRECISION)


def symmetrise(a: Float[Array, "*batch m m"]) -> Float[Array, "*batch m m"]:
    """The symmetric part of a matrix that is symmetric up to rounding."""
    return (a + jnp.swapaxes(a, -1, -2)) / 2


def add_diagonal(a: Shaped[Array, "*batch m m"], d: Shaped[Array, "*batch m"]) -> Shaped[Array, "*batch m m"]:
    """`a + diag(d)` as a select, which fuses into whatever computes `a` (a scatter would not)."""
    m = d.shape[-1]
    return a + jnp.where(jnp.eye(m, dtype=bool), d[..., None, :], jnp.zeros((), d.dtype))


def widened(array: Array) -> Array:
    """The array in float32, if it is a narrower floating one."""
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if narrow else array


def available_bytes() -> int:
    """Bytes of memory on the default device, or of the host where the device does not tell."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def format_bytes(count: float) -> str:
    """A number of bytes for a person, for example `'3.1 MiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB" if count < 1024 else f"{count / 1024:.1f} PiB"


def check_dense_fits(what: str, rows: int, columns: int, itemsize: int, instead: str) -> None:
    """Raise `DenseTooLargeError` if a dense `rows` x `columns` array would exceed the memory there is."""
    needed, available = rows * columns * itemsize, available_bytes()
    if needed > available:
        raise DenseTooLargeError(
            f"{what}: the dense {rows} x {columns} form takes {format_bytes(needed)}, and the memory here is "
            f"{format_bytes(available)}. {instead}"
        )
