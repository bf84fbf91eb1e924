"""Lanczos' tridiagonalisation of an operator known by its products (through matfree), and the quadratures that it gives.

    A Q = Q T + β_k q_{k+1} e_k^T         Q (N, k) orthonormal, q_1 = v / |v|, T tridiagonal with α_1..α_k and β_1..β_{k-1}
    T = S diag(θ) S^T                     Ritz values θ; an eigenvalue of A lies within β_k |S_ki| of θ_i
    v^T f(A) v ≈ |v|^2 sum_i S_1i^2 f(θ_i)                          Gauss: exact for polynomials of degree 2k - 1

For log the Gauss rule is never too small, and the Gauss-Radau rule with a node a below the spectrum, whose T has one row
more, with α_{k+1} = a + β_k^2 [(T - aI)^-1]_kk, never too large. Sources: Parlett, The Symmetric Eigenvalue Problem,
theorem 4.5.1; Golub and Meurant, Matrices, Moments and Quadrature (2010), chapter 6.

Where A has few distinct eigenvalues the Krylov space ends early: β_b = 0 to rounding, and what follows in T is noise. The
first b rows then hold all that can be had from v; the others are kept apart, far above the spectrum.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from matfree import decomp

from jaxhess._typing import Array, Float

__all__ = ["Rule", "Tridiagonal", "gauss", "gauss_radau", "rounding", "tridiagonal"]


class Tridiagonal(NamedTuple):
    """The `rows` = b rows of T that count, in a (k, k) matrix, and β_b, both in units of `scale`."""

    matrix: Float[Array, "k k"]
    rows: Array
    beyond: Float[Array, ""]
    scale: Float[Array, ""]

    def leading(self, steps: int) -> "Tridiagonal":
        """T of fewer steps; its β is not kept."""
        return Tridiagonal(self.matrix[:steps, :steps], jnp.minimum(self.rows, steps), self.beyond, self.scale)


class Rule(NamedTuple):
    """Ritz values in ascending order (k,), their weights S_1i^2, and bounds on their distance from an eigenvalue. Those that
    are missing, of weight 0, repeat the one of least magnitude."""

    nodes: Float[Array, " k"]
    weights: Float[Array, " k"]
    error: Float[Array, " k"]


def tridiagonal(product: Callable[[Array], Array], start: Float[Array, " N"], steps: int) -> Tridiagonal:
    """`steps` <= N steps from `start`, with full reorthogonalisation, in `steps` + 1 products."""
    with jax.default_matmul_precision("highest"):
        largest = jnp.max(jnp.abs(product(start / jnp.linalg.norm(start))))
        scale = jnp.where(largest > 0, largest, 1)  # the squares of tiny or huge numbers have no place in float32
        lanczos = decomp.hessenberg(steps, reortho="full", custom_vjp=False)
        found: Any = lanczos(lambda vector: product(vector) / scale, start)
    # The lower half only: `decomp.tridiag_sym` takes the mean with the upper one, which is NaN or noise past an early end.
    diagonal = jnp.diagonal(found.J_small)
    beside = jnp.append(jnp.diagonal(found.J_small, -1), jnp.linalg.norm(found.residual))
    # Above this, what two orthogonalisations leave is orthogonal to rounding; below, it is rounding.
    norms = jax.lax.cummax(jnp.maximum(jnp.abs(diagonal), jnp.append(jnp.zeros_like(scale), beside[:-1])))
    ended = ~(beside > 4 * (4 + steps**0.5) * jnp.finfo(start.dtype).eps * norms)
    count = jnp.where(jnp.any(ended), jnp.argmax(ended) + 1, steps)
    inside = jnp.arange(steps) < count
    joined = jnp.where(inside[1:], beside[:-1], 0)
    diagonal = jnp.where(inside, diagonal, 0)
    apart = 1 + 4 * jnp.maximum(jnp.max(jnp.abs(diagonal)), jnp.max(joined, initial=0))
    matrix = jnp.diag(jnp.where(inside, diagonal, apart)) + jnp.diag(joined, 1) + jnp.diag(joined, -1)
    return Tridiagonal(matrix, count, beside[count - 1], scale)


def rounding(T: Tridiagonal, size: int) -> Array:
    """How far the Ritz values of an operator of `size` rows may be off by rounding."""
    inside = jnp.arange(T.matrix.shape[0]) < T.rows
    norm = jnp.max(jnp.where(inside, jnp.sum(jnp.abs(T.matrix), axis=1), 0))
    return (4 + size**0.5) * jnp.finfo(T.matrix.dtype).eps * T.scale * norm


def gauss(T: Tridiagonal) -> Rule:
    """The rule of b nodes: all of an operator that v sees, where its Krylov space ended."""
    return _rule(T.matrix, T.rows, T.rows - 1, T.beyond, T.scale)


def gauss_radau(T: Tridiagonal, node: Array) -> Rule:
    """The rule of b + 1 nodes that has `node`, below the spectrum, for one of them; its `error` is meaningless."""
    k, dtype = T.matrix.shape[0], T.matrix.dtype
    last = jnp.zeros(k, dtype).at[T.rows - 1].set(1)
    node = node / T.scale
    below = jnp.linalg.solve(T.matrix - node * jnp.eye(k, dtype=dtype), T.beyond**2 * last)[T.rows - 1]
    side = (T.beyond * last)[:, None]
    bordered = jnp.block([[T.matrix, side], [side.T, (node + below)[None, None]]])
    return _rule(bordered, T.rows + 1, jnp.asarray(k), T.beyond, T.scale)


def _rule(matrix: Array, count: Array, last: Array, beyond: Array, scale: Array) -> Rule:
    values, vectors = jnp.linalg.eigh(matrix)
    there = jnp.arange(values.size) < count  # those kept apart are the largest
    values, errors = scale * values, scale * beyond * jnp.abs(vectors[last])
    least = jnp.argmin(jnp.where(there, jnp.abs(values), jnp.inf))
    chosen = jnp.where(there, jnp.arange(values.size), least)
    chosen = chosen[jnp.argsort(values[chosen], stable=True)]
    # Its copies come after the one of least magnitude, in a stable order.
    first = jnp.append(jnp.ones(1, bool), chosen[1:] != chosen[:-1])
    return Rule(values[chosen], jnp.where(first, vectors[0, chosen] ** 2, 0), errors[chosen])
