"""Array aliases and error types shared by all modules.

The dimension letters in annotations are those of the mathematics: `r` examples in a batch, `m` outputs and `n` inputs
of a layer, `M` outputs of the network.
"""

from typing import Any, TypeAlias

from jaxtyping import Array, Float, Shaped

__all__ = [
    "Array",
    "DenseTooLargeError",
    "Float",
    "InputError",
    "NotConvergedError",
    "PyTree",
    "Shaped",
    "SingularError",
    "UnsupportedOperationError",
]

PyTree: TypeAlias = Any


class InputError(ValueError, TypeError):
    """An argument has the wrong shape, dtype or structure; the message names it, with its sizes.

    Both a `ValueError` and a `TypeError`: JAX's own transformations raise the one for shapes and the other for dtypes.
    """


class DenseTooLargeError(ValueError, MemoryError):
    """A dense array was asked for that would not fit in memory; the message says how large, and what to call instead."""


class UnsupportedOperationError(NotImplementedError):
    """The exact curvature of an operation cannot be computed; the message names it and where the user wrote it."""


class SingularError(ValueError, ArithmeticError):
    """A solve, root or logarithm was asked for where `H + damping I` has no such thing: it is singular to rounding, or not
    positive definite where it must be. The message names the eigenvalue of H that is in the way."""


class NotConvergedError(RuntimeError):
    """An iterative method stopped before its tolerance; the message says how near it came and what to do."""
