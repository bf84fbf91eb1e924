"""Array aliases and error types shared by all modules.

The dimension letters in annotations are those of the mathematics: `r` examples in a batch, `m` outputs and `n` inputs
of a layer, `M` outputs of the network.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, Shaped

__all__ = ["Array", "DenseTooLargeError", "Float", "InputError", "PyTree", "Shaped", "UnsupportedOperationError"]

PyTree: TypeAlias = Any


class InputError(ValueError, TypeError):
    """An argument has the wrong shape, dtype or structure; the message names it, with its sizes.

    Both a `ValueError` and a `TypeError`: JAX's own transformations raise the one for shapes and the other for dtypes.
    """


class DenseTooLargeError(ValueError, MemoryError):
    """A dense array was asked for that would not fit in memory; the message says how large, and what to call instead."""


class UnsupportedOperationError(NotImplementedError):
    """The exact curvature of an operation cannot be computed; the message names it and where the user wrote it."""
