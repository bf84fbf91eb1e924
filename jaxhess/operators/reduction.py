"""A symmetric operator in a space of fewer dimensions, in which it can be factored.

With k columns V of the operator's structure, `H = V M V^T` where they are orthonormal, or `H = ± V V^T`:

    orthonormal     nonzero eigenvalues of H: those of M          h(H) = h(0) I + V [h(M) - h(0) I] V^T
    Gram            ... those of ± K,  K = V^T V                  h(H) = h(0) I + V [(h(±K) - h(0) I) K^-1] V^T

for any function h of the spectrum (math: sections 3 and 7), so that solving, logarithms of determinants, roots and absolute
values take an eigendecomposition of k x k numbers; solves alone a triangular factorisation of `M + λI`, or of `λI ± K`:

    (H + λI)^-1 = V (M + λI)^-1 V^T + (I - V V^T) / λ             (H + λI)^-1 = (I ∓ V (λI ± K)^-1 V^T) / λ
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, PyTree
from jaxhess.operators.layout import Layout

__all__ = ["Columns", "KroneckerColumns", "OuterColumns", "Reduction", "Whole", "flat_dtype", "ravel", "unravel"]


class Columns(abc.ABC):
    """k vectors of an operator's structure; a pytree."""

    @property
    @abc.abstractmethod
    def structure(self) -> PyTree:
        """The operator's structure."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """k."""

    @abc.abstractmethod
    def push(self, coefficients: Array) -> PyTree:
        """V c, for c (k,)."""

    @abc.abstractmethod
    def pull(self, vector: PyTree) -> Array:
        """V^T x, (k,)."""

    @property
    def size(self) -> int:
        """N, the number of entries of a vector."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.structure))

    @property
    def missing(self) -> int:
        """N - k."""
        return self.size - self.count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Whole(Columns):
    """The unit vectors: no reduction."""

    shapes: tuple[tuple[tuple[int, ...], Any], ...] = dataclasses.field(metadata={"static": True})
    treedef: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, structure: PyTree) -> "Whole":
        """The unit vectors of a structure of shapes and dtypes."""
        leaves, treedef = jax.tree.flatten(structure)
        return cls(tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves), treedef)

    @property
    def structure(self):
        return jax.tree.unflatten(self.treedef, [jax.ShapeDtypeStruct(*shape) for shape in self.shapes])

    @property
    def count(self):
        return self.size

    def push(self, coefficients):
        return unravel(self.structure, coefficients)

    def pull(self, vector):
        return ravel(vector)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerColumns(Columns):
    """`I ⊗ P` on a parameter read as (m, n): P (n, ρ) with orthonormal columns."""

    P: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def structure(self):
        return jax.ShapeDtypeStruct(self.layout.shape, self.P.dtype)

    @property
    def count(self):
        return self.layout.m * self.P.shape[1]

    def push(self, coefficients):
        return self.layout.from_matrix(matmul(coefficients.reshape(self.layout.m, -1), self.P.T))

    def pull(self, vector):
        return matmul(self.layout.to_matrix(vector), self.P).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OuterColumns(Columns):
    """`U_A ⊗ U_B`, the eigenvectors of `kron(A, B)`."""

    left: Array
    right: Array
    layout: Layout = dataclasses.field(metadata={"static": True})

    @property
    def structure(self):
        return jax.ShapeDtypeStruct(self.layout.shape, self.left.dtype)

    @property
    def count(self):
        return self.layout.m * self.layout.n

    def push(self, coefficients):
        X = coefficients.reshape(self.layout.m, self.layout.n)
        return self.layout.from_matrix(matmul(matmul(self.left, X), self.right.T))

    def pull(self, vector):
        return matmul(matmul(self.left.T, self.layout.to_matrix(vector)), self.right).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reduction:
    """`H = V M V^T` with orthonormal columns V and `matrix` M (k, k), or `H = sign V V^T` with `matrix` sign V^T V."""

    columns: Columns
    matrix: Array
    sign: Array | None = None

    def damped(self, damping: Array) -> Array:
        """M + λI, (k, k)."""
        return self.matrix + damping * jnp.eye(self.matrix.shape[0], dtype=self.matrix.dtype)

    def solution(self, vector: PyTree, inner: Any, damping: Array) -> PyTree:
        """(H + λI)^-1 x, by `inner`, which solves with `damped(damping)`."""
        c = self.columns.pull(vector)
        y = inner(c)
        if self.sign is None and self.columns.missing == 0:
            return self.columns.push(y)
        if self.sign is None:
            return jax.tree.map(lambda x, p: x / damping + p, vector, self.columns.push(y - c / damping))
        return jax.tree.map(lambda x, p: (x - p) / damping, vector, self.columns.push(self.sign * y))


def ravel(tree: PyTree) -> Array:
    """All entries of the leaves as one vector, in the order of `jax.flatten_util.ravel_pytree`."""
    leaves = jax.tree.leaves(tree)
    if len(leaves) == 1:
        return jnp.reshape(leaves[0], -1)
    return jnp.concatenate([jnp.reshape(leaf, -1) for leaf in leaves])


def unravel(structure: PyTree, flat: Array) -> PyTree:
    """The inverse of `ravel`, in the structure's shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(structure)
    parts, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        parts.append(flat[start : start + size].reshape(leaf.shape).astype(leaf.dtype))
        start += size
    return jax.tree.unflatten(treedef, parts)


def flat_dtype(structure: PyTree) -> Any:
    """The dtype of `ravel`'s result, float32 at least."""
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(structure)))


def dense_reduction(operator: Any) -> Reduction:
    """The operator's dense form as its own reduction."""
    return Reduction(Whole.of(operator.in_structure()), symmetrise(operator.as_matrix()))
