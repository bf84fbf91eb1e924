"""What a search for extreme eigenpairs is made of: orthonormal rows, error bounds, and which Ritz values to look at.

A basis V (p, N) is held as rows. Orthonormal ones come from rounds of

    D <- D - (D V^T) V        D D^T = L L^T        D <- L^-1 D

since products of tall matrices are fast where Householder's reflections are not (Stathopoulos & Wu 2002).

The error of an eigenvalue is bounded by its residual and, for each group a..b of neighbouring Ritz values θ that holds it
and lies apart from the others, by a quadratic of the group's residuals (Mathias 1998, Kato 1949):

    |λ_i - θ_i| <= ||r_i||        |λ_i - θ_i| <= sum_{l=a..b} ||r_l||^2 / δ
    δ = min(θ_a - θ_{a-1} - ||r_{a-1}||,  θ_{b+1} - θ_b - ||r_{b+1}||)

so repeated and clustered eigenvalues converge as the well separated ones do.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, PyTree

Which = Literal["magnitude", "largest", "smallest", "both"]

_ENOUGH = 0.1  # of the squares of directions left by projections: else rounding shows


class RowSpace(NamedTuple):
    """Shapes of the operator's vectors, to and from rows (b, N) of one array."""

    leaves: list[Any]
    structure: Any
    dtype: Any

    @classmethod
    def of(cls, operator: Any) -> "RowSpace":
        leaves, structure = jax.tree.flatten(operator.in_structure())
        return cls(leaves, structure, jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves)))

    def rows(self, vectors: PyTree) -> Array:
        flat = [leaf.reshape(leaf.shape[0], -1).astype(self.dtype) for leaf in jax.tree.leaves(vectors)]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)

    def vectors(self, rows: Array) -> PyTree:
        ends = np.cumsum([math.prod(leaf.shape) for leaf in self.leaves])[:-1].tolist()
        parts = jnp.split(rows, ends, axis=1) if ends else [rows]
        shaped = [part.reshape(-1, *leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, self.leaves, strict=True)]
        return jax.tree.unflatten(self.structure, shaped)


def orthonormal(D: Array, project: Callable[[Array], Array], seed: Any) -> Array:
    """Rows that span those of D, unit ones, orthonormal and orthogonal to what `project` takes away.

    A round is a projection, a Gram matrix and its Cholesky factor. One does where D is far enough from the space projected
    out and from dependence, else there is another. Where D has no independent rows left, noise is put in: it keeps the
    smallest eigenvalue of the Gram matrix above the shift of the diagonal.
    """
    b, shift = D.shape[0], jnp.finfo(D.dtype).eps ** 0.8

    def one_round(D: Array) -> tuple[Array, Array]:
        D = project(D)
        gram = symmetrise(matmul(D, D.T))
        left = jnp.diagonal(gram)
        scale = jax.lax.rsqrt(jnp.where(left > 0, left, 1))
        identity = jnp.eye(b, dtype=D.dtype)
        factor = gram * scale[:, None] * scale[None, :]
        L = jnp.linalg.cholesky(factor)
        L = jnp.where(jnp.all(jnp.isfinite(L)), L, jnp.linalg.cholesky(factor + shift * identity))
        quality = jnp.nan_to_num(jnp.min(left) * jnp.min(jnp.diagonal(L)) ** 2)
        return matmul(jax.lax.linalg.triangular_solve(L, identity, left_side=True, lower=True) * scale[None, :], D), quality

    def another(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        cleaned, quality, rounds = state

        def with_noise() -> Array:
            return unit_rows(D + shift**0.5 * 10.0 ** (rounds - 1) * noise(b, D.shape[1], seed, D.dtype))

        return *one_round(jax.lax.cond(quality > shift / 100, lambda: cleaned, with_noise)), rounds + 1

    def doubtful(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] < _ENOUGH) & (state[2] < 6)

    # The first round has D as it is; it stands within the loop to be compiled once.
    first = (D, jnp.asarray(_ENOUGH / 2, D.dtype), jnp.zeros((), D.dtype))
    return jax.lax.while_loop(doubtful, another, first)[0]


def unit_rows(rows: Array) -> Array:
    norms = jnp.sqrt(jnp.sum(rows**2, axis=1, keepdims=True))
    return rows / jnp.where(norms > 0, norms, 1)


def noise(rows: int, N: int, seed: Any, dtype: Any) -> Array:
    """Rows of norm about one from a hash of their position: drawing normal numbers would take longer than a step."""

    def mixed(h: Array) -> Array:
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    row = mixed(
        jnp.arange(rows, dtype=jnp.uint32) + jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(1)
    )
    h = mixed(mixed(jnp.arange(N, dtype=jnp.uint32))[None, :] ^ row[:, None])
    return (h.astype(dtype) * 2.0**-31 - 1) * math.sqrt(3 / N)


def bounds(values: Array, norms: Array, hole: Array) -> Array:
    """The bound on each error: its residual's norm, or the least quadratic one of the groups a..b it belongs to.

    `values` are ascending; between those before and those from `hole` on, there may be others, unknown.
    """
    K = values.size
    infinite = jnp.full(1, jnp.inf, values.dtype)
    outer = jnp.arange(K) == hole
    below = jnp.concatenate([infinite, values[1:] - values[:-1] - norms[:-1]])
    above = jnp.concatenate([values[1:] - values[:-1] - norms[1:], infinite])
    below, above = jnp.where(outer, 0, below), jnp.where(jnp.arange(K) == hole - 1, 0, above)
    a, b = jnp.arange(K)[:, None], jnp.arange(K)[None, :]
    apart = jnp.minimum(below[:, None], above[None, :])
    sums = jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(norms**2)])
    group = jnp.maximum(sums[None, 1:] - sums[:-1, None], jnp.maximum(norms[:, None], norms[None, :]) ** 2)
    allowed = (a <= b) & (apart > 0) & ((a >= hole) | (b < hole))
    quadratic = jnp.where(allowed, group / jnp.where(allowed, apart, 1), jnp.inf)
    least = jax.lax.cummin(jax.lax.cummin(quadratic, axis=0), axis=1, reverse=True)
    return jnp.minimum(norms, jnp.diagonal(least))


def count_smallest(theta: Array, k: int, which: Which) -> Any:
    """How many of the k extreme ones of the ascending `theta` are at its lower end."""
    if which != "magnitude":
        return {"largest": 0, "smallest": k, "both": k // 2}[which]
    # The i-th smallest is taken if it is larger in magnitude than what would be taken in its place at the other end.
    return jnp.sum(-theta[:k] > theta[theta.size - k :])


def extreme_of_sorted(theta: Array, k: int, which: Which) -> Array:
    """The positions, ascending, of the k extreme ones of the ascending `theta`."""
    i = jnp.arange(k)
    return jnp.where(i < count_smallest(theta, k, which), i, i + theta.size - k)


def extreme_positions(values: Array, k: int, which: Which) -> Array:
    """The positions of the k extreme ones of unsorted values, in no particular order."""
    if which == "both":
        ends = extreme_positions(values, k // 2, "smallest"), extreme_positions(values, k - k // 2, "largest")
        return jnp.concatenate(ends)
    return jax.lax.top_k({"magnitude": jnp.abs(values), "largest": values, "smallest": -values}[which], k)[1]
