"""A matrix of low rank, kept as its two factors.

    A = L R^T,   L (m, r),  R (n, r)        A x = L (R^T x)        ||A||_F^2 = <L^T L, R^T R>

This is how a batch's gradient, `V Z^T / r`, and the blocks between a weight and a bias come.
"""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import matmul
from jaxhess._typing import Array, Float, InputError
from jaxhess.operators.base import StructuredOperator
from jaxhess.operators.support import (
    as_real_arrays,
    as_scalar,
    as_tags,
    check_operator_fits,
    check_vector,
    common_tags,
    describe,
    scaled_tags,
    shape_text,
    transposed_tags,
)


class LowRank(StructuredOperator):
    """The (m, n) matrix `left @ right.T`, `left` (m, r) and `right` (n, r): maps (n,) to (m,).

    Symmetric only if its `tags` say so. Two of the same shape add up to one of rank at most r + r'. `diagonal` and
    `trace` raise `InputError` unless m = n; the constructor, unless the factors are 2-d with the same r.

    >>> import jax.numpy as jnp
    >>> A = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [0.0], [1.0]]))
    >>> A.as_matrix().tolist()
    [[3.0, 0.0, 1.0], [6.0, 0.0, 2.0]]
    >>> (A + A).left.shape
    (2, 2)
    """

    left: Float[Array, "m r"]
    right: Float[Array, "n r"]

    def __init__(self, left: Array, right: Array, tags: Any = ()):
        left, right = as_real_arrays("LowRank", ["left", "right"], [left, right])
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
            raise InputError(f"LowRank: needs left (m, r) and right (n, r), got {left.shape} and {right.shape}")
        self.left, self.right = left, right
        self.tags = as_tags(tags)

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.right.shape[:1], self.right.dtype)

    def out_structure(self):
        return jax.ShapeDtypeStruct(self.left.shape[:1], self.left.dtype)

    def mv(self, vector):
        check_vector("LowRank", vector, self.right.shape[:1])
        return matmul(self.left, matmul(self.right.T, vector))

    def as_matrix(self):
        check_operator_fits(self, "mv or frobenius_norm()")
        return matmul(self.left, self.right.T)

    def transpose(self):
        return self if lx.is_symmetric(self) else LowRank(self.right, self.left, transposed_tags(self.tags))

    def diagonal(self):
        self._require_square("diagonal")
        return jnp.sum(self.left * self.right, axis=1)

    def trace(self):
        self._require_square("trace")
        return jnp.sum(self.left * self.right)

    def frobenius_norm(self):
        squared = jnp.sum(matmul(self.left.T, self.left) * matmul(self.right.T, self.right))
        return jnp.sqrt(jnp.maximum(squared, 0))

    def scaled(self, factor):
        left = self.left * as_scalar("LowRank", factor, self.left.dtype)
        return LowRank(left, self.right, scaled_tags(self.tags, factor))

    def _plus(self, other):
        if not isinstance(other, LowRank):
            return None
        left, right = jnp.hstack([self.left, other.left]), jnp.hstack([self.right, other.right])
        return LowRank(left, right, common_tags([self, other]))

    def _require_square(self, what: str) -> None:
        m, n = self.left.shape[0], self.right.shape[0]
        if m != n:
            raise InputError(f"LowRank.{what}: needs a square operator, this one is {m} x {n}")

    def __repr__(self):
        return describe(self, f"left {shape_text(self.left)}", f"right {shape_text(self.right)}")
