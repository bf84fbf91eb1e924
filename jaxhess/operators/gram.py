"""The Gram matrix of a Jacobian's rows, in which Gauss-Newton matrices are small (math: section 7).

    G = (1/r) sum_i A_i^T B_i A_i = F F^T,      F = r^(-1/2) [A_1^T S_1, A_2^T S_2, ..],  B_i = S_i S_i^T
    F^T F = (1/r) S^T K S,                      K[(i,c),(j,d)] = A_i[c] . A_j[d]                 (rM, rM)

The eigenvalues of G other than zero are those of `F^T F`. For one vector of an example, `K` is `(V_ic . V_jd)(z_i . z_j)`,
a product entry by entry of two small matrix products.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import check_dense_fits, matmul, symmetrise
from jaxhess._typing import Array
from jaxhess.operators.contraction import contract
from jaxhess.operators.jacobian import OutputJacobian, times_curvature
from jaxhess.operators.reduction import Columns, Reduction

__all__ = ["GramColumns", "gram", "gram_eigenvalues", "gram_is_smaller", "gram_norm", "gram_reduction", "with_zeros"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GramColumns(Columns):
    """F times a `scale`: `root` is S (r, M, M), its diagonals (r, M), or None for the identity. Of one parameter where
    `treedef` is None, else of a tree of them."""

    jacobians: tuple[OutputJacobian, ...]
    root: Array | None
    scale: Array
    treedef: Any = dataclasses.field(metadata={"static": True})

    @property
    def structure(self):
        if self.treedef is None:
            return self.jacobians[0].structure
        return jax.tree.unflatten(self.treedef, [J.structure for J in self.jacobians])

    @property
    def count(self):
        return self.jacobians[0].examples * self.jacobians[0].outputs

    def push(self, coefficients):
        c = self.scale * coefficients.reshape(self.jacobians[0].examples, self.jacobians[0].outputs)
        c = _times_root(self.root, c)
        parts = [J.pull(c.astype(J.dtype)) for J in self.jacobians]
        return parts[0] if self.treedef is None else jax.tree.unflatten(self.treedef, parts)

    def pull(self, vector):
        parts = [J.push(v) for J, v in zip(self.jacobians, jax.tree.leaves(vector), strict=True)]
        total = sum(parts[1:], parts[0])
        if self.root is not None and self.root.ndim == 3:
            total = contract((self.root, total), ((0, 1, 2), (0, 1)), (0, 2))
        elif self.root is not None:
            total = self.root * total
        return (self.scale * total).reshape(-1)


def _times_root(root: Array | None, c: Array) -> Array:
    return c if root is None else times_curvature(root, c)


def gram_reduction(jacobians: tuple[OutputJacobian, ...], curvature: Array | None, factor: Array, treedef: Any) -> Reduction:
    """`factor` times the matrix, by its Gram matrix."""
    return _gram_reduction(jacobians, curvature, factor, treedef)


def gram_is_smaller(jacobians: Sequence[OutputJacobian], size: int) -> bool:
    """Whether all rows of A are fewer than `size`."""
    return jacobians[0].examples * jacobians[0].outputs < size


def with_zeros(eigenvalues: Array, size: int) -> Array:
    """All `size` eigenvalues in ascending order, those left out being zero."""
    return jnp.sort(jnp.concatenate([eigenvalues, jnp.zeros(size - eigenvalues.size, eigenvalues.dtype)]))


def gram(jacobians: Sequence[OutputJacobian]) -> Array:
    r, M = jacobians[0].examples, jacobians[0].outputs
    itemsize = jnp.dtype(jacobians[0].dtype).itemsize
    check_dense_fits("the Gram matrix of the Jacobian's rows", r * M, r * M, itemsize, "Use fewer examples, or mv.")
    return sum((J.gram() for J in jacobians), jnp.zeros((r, M, r, M), jacobians[0].dtype))


def _root(curvature: Array | None) -> Array | None:
    """S with `B = S S^T`; what rounding has made negative of B's eigenvalues is zero."""
    if curvature is None or curvature.ndim == 2:
        return None if curvature is None else jnp.sqrt(jnp.maximum(curvature, 0))
    values, vectors = jnp.linalg.eigh(curvature)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]


def _between_roots(jacobians: Sequence[OutputJacobian], S: Array | None) -> Array:
    """`S^T K S`, (rM, rM)."""
    K, r = gram(jacobians), jacobians[0].examples
    size = K.shape[0] * K.shape[1]
    if S is not None and S.ndim == 2:
        K = S[:, :, None, None] * K * S[None, None]
    elif S is not None:
        half = matmul(jnp.swapaxes(S, 1, 2), K.reshape(r, K.shape[1], size))
        K = matmul(jnp.swapaxes(S, 1, 2), jnp.swapaxes(half.reshape(size, size), 0, 1).reshape(r, K.shape[1], size))
    return symmetrise(K.reshape(size, size))


@functools.partial(jax.jit, static_argnums=3)
def _gram_reduction(
    jacobians: tuple[OutputJacobian, ...], curvature: Array | None, factor: Array, treedef: Any
) -> Reduction:
    root, r = _root(curvature), jacobians[0].examples
    columns = GramColumns(jacobians, root, jnp.sqrt(jnp.abs(factor) / r), treedef)
    return Reduction(columns, (factor / r) * _between_roots(jacobians, root), jnp.sign(factor))


@jax.jit
def gram_eigenvalues(jacobians: tuple[OutputJacobian, ...], curvature: Array | None, factor: Array) -> Array:
    """The eigenvalues (rM,) of `(factor/r) S^T K S` with `B = S S^T`."""
    matrix = _between_roots(jacobians, _root(curvature))
    return jnp.sort((factor / jacobians[0].examples) * jnp.linalg.eigvalsh(matrix))


@jax.jit
def gram_norm(jacobians: tuple[OutputJacobian, ...], curvature: Array | None, factor: Array) -> Array:
    """`||H||_F`, from `tr(B K B K)`."""
    K, r = gram(jacobians), jacobians[0].examples
    BK = times_curvature(curvature, K).reshape(K.shape[0] * K.shape[1], -1)
    return jnp.abs(factor) / r * jnp.sqrt(jnp.maximum(jnp.sum(BK * BK.T), 0))
