"""What the doors share: the error for a library that is not installed, and Flax's promotion of dtypes."""

from typing import Any

import jax.numpy as jnp

from jaxhess._typing import Array

__all__ = ["missing", "promoted"]


def missing(module: str, library: str, extra: str) -> ImportError:
    """The error that says which extra installs a library."""
    return ImportError(f"jaxhess.interop.{module} needs {library}, which is not installed: pip install 'jaxhess[{extra}]'")


def promoted(dtype: Any, *arrays: Any) -> list[Array | None]:
    """The arrays in `dtype`, by default their common floating one; integers are welcome as inputs, None stays None."""
    given = [None if array is None else jnp.asarray(array) for array in arrays]
    if dtype is None:
        dtype = jnp.result_type(*(array for array in given if array is not None))
    return [None if array is None else array.astype(dtype) for array in given]
