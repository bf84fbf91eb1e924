"""Arithmetic of vectors that are trees of arrays, leaf by leaf: nothing is copied into one long array, so leaves keep their
shapes and how they are sharded.

    a . b = sum over leaves        ||a|| = sqrt(a . a)        measured(a) = c ||a / c||,  c = max |a|
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import PRECISION
from jaxhess._typing import Array, PyTree

__all__ = ["dot", "dot_abs", "dtype_of", "largest_of", "like", "measured", "norm", "plus", "times", "where"]


def dot(a: PyTree, b: PyTree) -> Array:
    """The inner product of two trees of arrays, in the widest of their dtypes."""
    dtype = dtype_of(a)
    products = [
        jnp.vdot(x, y, precision=PRECISION).astype(dtype)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return sum(products, start=jnp.zeros((), dtype))


def norm(a: PyTree) -> Array:
    """The Euclidean norm of a tree of arrays."""
    return jnp.sqrt(dot(a, a))


def measured(a: PyTree, size_of: Callable[[PyTree], Array] = norm) -> tuple[Array, Array]:
    """The largest entry, 1 where all are zero, and the norm, taken of entries that are divided by that."""
    largest = largest_of(a)
    scale = jnp.where(largest > 0, largest, 1)
    return scale, scale * size_of(times(1 / scale, a))


def plus(a: PyTree, factor: Any, b: PyTree) -> PyTree:
    """`a + factor b`, in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(factor).astype(x.dtype) * y.astype(x.dtype), a, b)


def dot_abs(a: PyTree, b: PyTree) -> Array:
    """The inner product of absolute values: what rounding errors of `dot` are measured by."""
    return dot(jax.tree.map(jnp.abs, a), jax.tree.map(jnp.abs, b))


def times(factor: Any, a: PyTree) -> PyTree:
    """`factor a`, in the dtypes of `a`."""
    return jax.tree.map(lambda x: jnp.asarray(factor).astype(x.dtype) * x, a)


def where(condition: Array, a: PyTree, b: PyTree) -> PyTree:
    """`a` where the 0-d `condition` holds, else `b`."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def largest_of(a: PyTree) -> Array:
    """The largest absolute value."""
    dtype = dtype_of(a)
    largest = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(a)]
    return jnp.max(jnp.stack(largest)) if largest else jnp.zeros((), dtype)


def dtype_of(a: PyTree) -> Any:
    """The widest dtype of the leaves."""
    return jnp.result_type(*jax.tree.leaves(a)) if jax.tree.leaves(a) else jnp.result_type(float)


def like(a: PyTree, b: PyTree) -> PyTree:
    """`b` in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: y.astype(x.dtype), a, b)
