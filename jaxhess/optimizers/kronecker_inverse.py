"""The inverse of one Kronecker product for each layer, in its eigenvectors, with the exact diagonal of the curvature there.

    H ≈ (U ⊗ V) diag(s) (U ⊗ V)^T,      A = U diag(a) U^T,  B = V diag(b) V^T,      s_kl = (u_k ⊗ v_l)^T H (u_k ⊗ v_l)

A ⊗ B is the product nearest to H; in place of its eigenvalues a_k b_l stand the diagonal entries of H itself, the best there
are for these vectors (George et al. 2018), where they cost no more than the factors. A weight and a bias that the error sees
as `W z + b` only have one product for both, of z with a 1 at its end: the matrix of the weight has a border for it, a
further column, or a further row where weights are stored (in, out).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.paths import naming
from jaxhess.operators.preconditioner import register_semidefinite
from jaxhess.operators.support import check_operator_fits
from jaxhess.optimizers.kronecker_factors import bias_side, factors_of, layout_of
from jaxhess.optimizers.kronecker_places import Nearest

__all__ = ["Factors", "KroneckerInverse", "Unit", "averaged", "in_eigenvectors", "magnitudes", "no_factors", "units_of"]


class Factors(NamedTuple):
    """A (m, m) and B (n, n) of a parameter's matrix, border included, their eigenvectors, and the curvature along each pair
    of these, `values` (m, n)."""

    left: Array
    right: Array
    values: Array
    left_vectors: Array
    right_vectors: Array


class Unit(NamedTuple):
    """What has factors of its own: the parameter at the place `weight`, with the one at `bias` in the border that is a
    further column (`side` 1) or row (0); None for no bias."""

    weight: int
    bias: int | None
    side: int


class KroneckerInverse(lx.AbstractLinearOperator):
    """`(H + damping I)^-1` of the factors, positive definite, on trees of `structure`: a preconditioner."""

    factors: tuple[Factors, ...]
    damping: Array
    units: tuple[Unit, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    def mv(self, vector: PyTree) -> PyTree:
        def solved(inner: Array, factors: Factors) -> Array:
            shifted, largest = magnitudes(factors, self.damping), jnp.max(jnp.abs(factors.values), initial=0)
            floor = jnp.where(largest > 0, jnp.finfo(shifted.dtype).eps * largest, 1)
            return inner / jnp.maximum(shifted, floor)

        return in_eigenvectors(vector, self.units, self.factors, solved)

    def as_matrix(self) -> Array:
        check_operator_fits(self, instead="mv")
        zeros, unravel = ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.structure))
        return jax.vmap(lambda unit: ravel_pytree(self.mv(unravel(unit)))[0])(jnp.eye(zeros.size, dtype=zeros.dtype))

    def transpose(self) -> "KroneckerInverse":
        return self

    def in_structure(self) -> PyTree:
        return self.structure

    def out_structure(self) -> PyTree:
        return self.structure

    def with_damping(self, damping: Array) -> "KroneckerInverse":
        """The same factors with another damping."""
        return dataclasses.replace(self, damping=damping.astype(self.damping.dtype))


def no_factors(shape: tuple[int, ...], dtype: Any) -> Factors:
    """Zeros for a parameter of this shape."""
    m, n = _sides(shape)
    return Factors(
        jnp.zeros((m, m), dtype), jnp.zeros((n, n), dtype), jnp.zeros((m, n), dtype), jnp.eye(m, dtype=dtype),
        jnp.eye(n, dtype=dtype),
    )  # fmt: skip


def units_of(blocks: BlockDiagonal) -> tuple[Unit, ...]:
    """The weights, each with its bias where the two are of one layer, and all others alone."""
    operators = [block for _, block in blocks.items()]
    pairs = {}
    for weight, bias in blocks.layers:
        side = bias_side(operators[weight])
        if side is not None and len(operators[weight].in_structure().shape) > 1:
            pairs[weight] = (bias, side)
    joined = {bias for bias, _ in pairs.values()}
    places = [place for place in range(len(operators)) if place not in joined]
    return tuple(Unit(place, *pairs.get(place, (None, 1))) for place in places)


def averaged(blocks: BlockDiagonal, units: Sequence[Unit], old: Sequence[Factors], weight: Array) -> tuple[Factors, ...]:
    """The running mean of factors of equal norm, decomposed: `weight` of the old ones. Those of a bias that is in its
    weight's border stay as they are."""
    kept, items = list(old), list(blocks.items())
    for unit in units:
        path, block = items[unit.weight]
        with naming(path):
            own = old[unit.weight]
            kept[unit.weight] = _averaged(own, factors_of(block, unit.bias is not None, (own.left, own.right)), weight)
    return tuple(kept)


def magnitudes(factors: Factors, added: Array) -> Array:
    """|s| + λ, (m, n)."""
    sizes = jnp.abs(factors.values)
    return sizes + added.astype(sizes.dtype)


def in_eigenvectors(
    tree: PyTree, units: Sequence[Unit], factors: Sequence[Factors], function: Callable[[Array, Factors], Array]
) -> PyTree:
    """A tree like the parameters, with `function` applied to each unit's matrix in its eigenvectors."""
    leaves, treedef = jax.tree.flatten(tree)
    results = list(leaves)
    for unit in units:
        own = factors[unit.weight]
        U, V = own.left_vectors, own.right_vectors
        bias = None if unit.bias is None else leaves[unit.bias]
        inner = matmul(matmul(U.T, _matrix(leaves[unit.weight], bias, unit.side).astype(U.dtype)), V)
        X = matmul(matmul(U, function(inner, own)), V.T)
        results[unit.weight], changed = _parts(X, leaves[unit.weight], bias, unit.side)
        if unit.bias is not None:
            results[unit.bias] = changed
    return jax.tree.unflatten(treedef, results)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(m, n) of a parameter's matrix: a vector is all rows; others have a border of one row and one column."""
    layout, border = layout_of(shape), int(len(shape) > 1)
    return layout.m + border, layout.n + border


def _matrix(weight: Array, bias: Array | None, side: int) -> Array:
    X = layout_of(weight.shape).to_matrix(weight)
    if weight.ndim < 2:
        return X
    X = jnp.pad(X, ((0, 1), (0, 1)))
    if bias is None:
        return X
    bias = bias.reshape(-1).astype(X.dtype)
    return X.at[:-1, -1].set(bias) if side else X.at[-1, :-1].set(bias)


def _parts(X: Array, weight: Array, bias: Array | None, side: int) -> tuple[Array, Array | None]:
    layout = layout_of(weight.shape)
    if weight.ndim < 2:
        return layout.from_matrix(X).astype(weight.dtype), None
    changed = None
    if bias is not None:
        changed = (X[:-1, -1] if side else X[-1, :-1]).reshape(bias.shape).astype(bias.dtype)
    return layout.from_matrix(X[:-1, :-1]).astype(weight.dtype), changed


def _averaged(old: Factors, found: Nearest, weight: Array) -> Factors:
    a, b = jnp.linalg.norm(found.A), jnp.linalg.norm(found.B)
    share = jnp.sqrt(jnp.where((a > 0) & (b > 0), b / jnp.where(a > 0, a, 1), 1))
    sides = len(found.A), len(found.B)
    weight = weight.astype(found.A.dtype)
    A, B = _bordered(share * found.A, old.left), _bordered(found.B / share, old.right)
    left = symmetrise(weight * old.left + (1 - weight) * A)
    right = symmetrise(weight * old.right + (1 - weight) * B)
    (left_values, U), (right_values, V) = jnp.linalg.eigh(left), jnp.linalg.eigh(right)
    exact = found.exact
    values = jnp.outer(left_values, right_values) if exact is None else exact(U[: sides[0]], V[: sides[1]])
    return Factors(left, right, values, U, V)


def _bordered(factor: Array, like: Array) -> Array:
    missing = len(like) - len(factor)
    return jnp.pad(factor, ((0, missing), (0, missing)))


register_semidefinite(KroneckerInverse)
