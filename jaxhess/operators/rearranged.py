"""The Kronecker product nearest to a sum of them or to a dense matrix, and the exact errors of approximations by one.

    H = (1/r) sum_i kron(Q_i, z_i z_i^T)            R(H) = (1/r) sum_i vec(Q_i) vec(z_i z_i^T)^T         (m^2, n^2)

R, the rearrangement of Van Loan and Pitsianis, has the entries of H and makes `kron(A, B)` the matrix `vec(A) vec(B)^T`. So
with `||A||_F = 1` the nearest Kronecker product is the leading singular pair of R, `B = R^T A`, found without forming H:

    A -> B:  (1/r) sum_i <Q_i, A> z_i z_i^T         B -> A:  (1/r) sum_i (z_i^T B z_i) Q_i               r (m^2 + n^2) each

started from an eigenvector of the smallest of `G_Z^(1/2) G_Q G_Z^(1/2)` (r, r), with `G_Q[i,j] = <Q_i, Q_j>` and
`G_Z[i,j] = (z_i . z_j)^2`, `R R^T` and `R^T R` (on symmetric matrices: m(m+1)/2 and n(n+1)/2 rows), or from a random one
where all three are large, and iterated (restarted Lanczos) until `||R R^T A - s^2 A|| <= 100 eps s^2` or rounding stops it.
The errors are norms of sums of the same kind, with no difference of nearly equal numbers:

    H - kron(A, R^T A) = (1/r) sum_i kron(Q_i - <Q_i, A> A, z_i z_i^T),          orthogonal to kron(A, R^T A)
    H - kron(mean Q, mean z z^T) = (1/r) sum_i kron(Q_i - mean Q, z_i z_i^T)

Source: C. F. Van Loan, N. Pitsianis, Approximation with Kronecker products, in Linear Algebra for Large Scale and Real-Time
Applications, 1993; the mean of factors: J. Martens, R. Grosse, Optimizing neural networks with Kronecker-factored
approximate curvature, ICML 2015.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import matmul, symmetrise, widened
from jaxhess._typing import Array, Float
from jaxhess.operators.layout import Layout

__all__ = ["mean_of_sum", "nearest_to_dense", "nearest_to_sum", "norm_of_sum"]

# An eigenvector of a matrix of this size is still found about as fast as by products.
_LARGEST_GRAM = 512
_LANCZOS_STEPS = 16
_MOST_RESTARTS = 300
_CHUNK_NUMBERS = 2**21


@functools.partial(jax.jit, static_argnames=("definite", "start", "direct"))
def nearest_to_sum(
    Q: Array, Z: Array, definite: bool, start: str | None = None, direct: bool | None = None
) -> tuple[Array, Array, Array]:
    """A, B and the relative error; `start` and `direct` choose the way that is taken to them, if not the cheapest."""
    Q, q = _normalised(widened(Q))
    Z, z = _normalised(widened(Z))
    (r, m, _), n = Q.shape, Z.shape[1]
    flat = Q.reshape(r, m * m)

    def to_B(a: Array) -> Array:
        return (matmul(Z.T, matmul(flat, a)[:, None] * Z) / r).reshape(-1)

    def to_A(b: Array) -> Array:
        return matmul(jnp.sum(matmul(Z, b.reshape(n, n)) * Z, axis=1), flat) / r

    if min(r, m, n) <= 1:
        a = Q[0].reshape(-1) if r == 1 else to_A(jnp.ones(1, Z.dtype)) if n == 1 else jnp.ones(m * m, Q.dtype)
        a, residual = _unit(a), jnp.zeros((), Q.dtype)
    else:
        a = _leading(to_B, to_A, _start(start or _cheapest_start(r, m, n), Q, Z), m * m, n * n)
        a = _unit(_absolute(a, m)) if definite else a
        residual = norm_of_sum(Q - matmul(flat, a)[:, None, None] * a.reshape(1, m, m), Z, direct)
    return _shared(a, to_B(a), residual, m, n, jnp.sqrt(q) * z)


@functools.partial(jax.jit, static_argnames=("layout", "definite", "start"))
def nearest_to_dense(H: Array, layout: Layout, definite: bool, start: str | None = None) -> tuple[Array, Array, Array]:
    m, n = layout.m, layout.n
    H, h = _normalised(widened(H))
    position = layout.to_matrix(jnp.arange(m * n).reshape(layout.shape)).reshape(-1)
    H = H if layout.is_plain else H[position][:, position]
    H = H.reshape(m, n, m, n).transpose(0, 2, 1, 3)
    even = symmetrise((H + jnp.swapaxes(H, 0, 1)) / 2)
    odd = jnp.linalg.norm((H - even).reshape(-1))
    (rows_of, row_weights), (columns_of, column_weights) = _packing(m), _packing(n)
    R = even.reshape(m * m, n * n)[rows_of][:, columns_of] * jnp.asarray(np.outer(row_weights, column_weights), H.dtype)

    def to_B(a: Array) -> Array:
        return matmul(a, R)

    def to_A(b: Array) -> Array:
        return matmul(R, b)

    if min(m, n) <= 1:
        a, residual = _unit(R[:, 0] if n == 1 else jnp.ones(R.shape[0], R.dtype)), jnp.zeros((), R.dtype)
    else:
        smaller = "rows" if m <= n else "columns"
        start = start or (smaller if min(R.shape) <= _LARGEST_GRAM else "random")
        a = _leading(to_B, to_A, _start_of_matrix(start, R), *R.shape)
        a = _unit(_packed(_absolute(_unpacked(a, m), m).reshape(1, m, m))[0]) if definite else a
        residual = jnp.hypot(jnp.linalg.norm(R - jnp.outer(a, to_B(a))), odd)
    return _shared(_unpacked(a, m), _unpacked(to_B(a), n), residual, m, n, jnp.sqrt(h))


@jax.jit
def mean_of_sum(Q: Array, Z: Array) -> tuple[Array, Array, Array]:
    A, B = jnp.mean(widened(Q), axis=0), matmul(widened(Z).T, widened(Z)) / Z.shape[0]
    (Q, q), (Z, _) = _normalised(widened(Q)), _normalised(widened(Z))
    error, norm = norm_of_sum(Q - A[None] / q, Z), norm_of_sum(Q, Z)
    return A, B, jnp.where(error == 0, 0, error / norm)


def _shared(a: Array, b: Array, residual: Array, m: int, n: int, scale: Array) -> tuple[Array, Array, Array]:
    # a has norm 1, so ||b|| is the singular value, and H = kron(a, b) + what is orthogonal to it.
    s = jnp.linalg.norm(b)
    whole = jnp.hypot(s, residual)
    A, B = a.reshape(m, m) * jnp.sqrt(s), b.reshape(n, n) / jnp.where(s == 0, 1, jnp.sqrt(s))
    scale = jnp.where(jnp.trace(B) < 0, -scale, scale)
    return scale * symmetrise(A), scale * symmetrise(B), residual / jnp.where(whole == 0, 1, whole)


def _leading(to_B: Callable, to_A: Callable, a: Array, rows: int, columns: int) -> Array:
    """The left singular vector of the largest singular value, by iterations on the side that has the smaller vectors."""
    if rows <= columns:
        return _leading_eigenvector(lambda x: to_A(to_B(x)), a)
    return _unit(to_A(_leading_eigenvector(lambda x: to_B(to_A(x)), to_B(a))))


def _leading_eigenvector(product: Callable[[Array], Array], start: Array) -> Array:
    """A unit vector x with `K x = θ x` for the largest θ of a positive semidefinite K, by restarted Lanczos iterations.

    They end when `||K x - θ x|| <= 100 eps θ`, or when neither θ nor that residual gets better: by rounding.
    """
    eps = float(jnp.finfo(start.dtype).eps)
    steps = min(_LANCZOS_STEPS, start.size)

    def extended(j, basis):
        V, KV = basis
        V = V.at[j].set(KV[j])
        w = product(KV[j])
        new = w
        for _ in range(2):
            new = new - matmul(matmul(V, new), V)
        # Where the space is exhausted what is left is rounding, and zero will do.
        size = jnp.linalg.norm(new)
        new = jnp.where(size > 10 * eps * jnp.linalg.norm(w), new / jnp.where(size == 0, 1, size), 0)
        return V, KV.at[j].set(w).at[j + 1].set(new)

    def restarted(state):
        x, theta, residual, _, count = state
        V = jnp.zeros((steps, x.size), x.dtype)
        # The last row of the products holds the next vector until its own product replaces it.
        V, KV = jax.lax.fori_loop(0, steps, extended, (V, jnp.zeros((steps + 1, x.size), x.dtype).at[0].set(x)))
        y = jnp.linalg.eigh(symmetrise(matmul(V, KV[:steps].T)))[1][:, -1]
        x, new_theta, new_residual = measured(matmul(y, V))
        better = (new_residual < residual / 2) | (new_theta > theta * (1 + 4 * eps))
        return x, new_theta, new_residual, better, count + 1

    def measured(x):
        x = _unit(x)
        Kx = product(x)
        theta = jnp.vdot(x, Kx)
        return x, theta, jnp.linalg.norm(Kx - theta * x)

    def unfinished(state):
        _, theta, residual, better, count = state
        return better & (residual > 100 * eps * theta) & (count < _MOST_RESTARTS)

    return jax.lax.while_loop(unfinished, restarted, (*measured(start), jnp.array(True), 0))[0]


def _cheapest_start(r: int, m: int, n: int) -> str:
    sizes = {"examples": r, "rows": m * (m + 1) // 2, "columns": n * (n + 1) // 2}
    smallest = min(sizes, key=lambda name: sizes[name])
    return smallest if sizes[smallest] <= _LARGEST_GRAM else "random"


def _start(kind: str, Q: Array, Z: Array) -> Array:
    (r, m, _), n = Q.shape, Z.shape[1]
    flat = Q.reshape(r, m * m)
    if kind == "random":
        return _random(m * m, Q.dtype, m)
    if kind == "examples":
        values, vectors = jnp.linalg.eigh(matmul(Z, Z.T) ** 2)
        half = vectors * jnp.sqrt(jnp.maximum(values, 0))[None]
        e = jnp.linalg.eigh(symmetrise(matmul(half.T, matmul(matmul(flat, flat.T), half))))[1][:, -1]
        return matmul(matmul(half, e), flat)
    if kind == "columns":
        return _start_of_matrix(kind, matmul(flat.T, _packed_squares(Z)))
    L = _packed(Q)
    if r * (n + L.shape[1]) <= L.shape[1] * n * n:
        GL = jax.lax.map(lambda z: matmul(matmul(Z, z) ** 2, L), Z, batch_size=min(r, max(1, _CHUNK_NUMBERS // r)))
        return _unpacked(jnp.linalg.eigh(symmetrise(matmul(L.T, GL)))[1][:, -1], m)
    # A row of R, an (n, n) matrix, at a time: the products z z^T may be more than all the rest.
    R = jax.lax.map(lambda q: _packed(matmul(Z.T, q[:, None] * Z)[None])[0], L.T)
    return _unpacked(_start_of_matrix(kind, R), m)


def _start_of_matrix(kind: str, R: Array) -> Array:
    if kind == "rows":
        return jnp.linalg.eigh(matmul(R, R.T))[1][:, -1]
    return matmul(R, jnp.linalg.eigh(matmul(R.T, R))[1][:, -1] if kind == "columns" else _random(R.shape[1], R.dtype))


def _random(size: int, dtype: Any, m: int | None = None) -> Array:
    # A fixed one: the same numbers every time. Of an unpacked side, a symmetric matrix.
    x = jax.random.normal(jax.random.key(0), (size,), dtype)
    return x if m is None else symmetrise(x.reshape(m, m)).reshape(-1)


def norm_of_sum(Q: Array, Z: Array, direct: bool | None = None) -> Array:
    """`||(1/r) sum_i kron(Q_i, z_i z_i^T)||_F`, right where the terms cancel too.

    By `sum_ij <Q_i, Q_j> (z_i . z_j)^2`, unless that is all rounding; then, or where it is no dearer (`direct`), by the
    squares of all entries of R, with either side reduced to r vectors by a QR factorisation where it has more.
    """
    (r, m, _), n = Q.shape, Z.shape[1]
    flat = Q.reshape(r, m * m)
    a, rank = m * (m + 1) // 2, min(r, n)
    # In multiplications for each example.
    entries, reduced_entries, pairs = a * rank**2, r * rank**2 + 2 * a * r, r * (m * m + n)
    reduce_rows = r < a and reduced_entries < entries
    if direct is None:
        direct = min(entries, reduced_entries) <= 4 * pairs

    def by_entries(Q: Array, Z: Array) -> Array:
        Z = jnp.linalg.qr(Z.T, mode="r").T if r < n else Z
        few_columns = rank * (rank + 1) // 2 <= min(a, r)
        rows = jnp.linalg.qr(_packed(Q).T, mode="r") if reduce_rows else flat.T if few_columns else _packed(Q).T
        if few_columns:
            return jnp.sum(matmul(rows, _packed_squares(Z)) ** 2)
        chunk = min(rows.shape[0], max(1, _CHUNK_NUMBERS // (r * rank)))
        return jnp.sum(jax.lax.map(lambda q: jnp.sum(matmul(Z.T, q[:, None] * Z) ** 2), rows, batch_size=chunk))

    def by_pairs(i: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q_i, z_i, size = i
        squared = matmul(Z, z_i) ** 2
        return jnp.sum(matmul(flat, q_i) * squared), size * jnp.sum(sizes * squared)

    if direct:
        return jnp.sqrt(by_entries(Q, Z)) / r
    sizes = jnp.linalg.norm(flat, axis=1)
    chunk = min(r, max(1, _CHUNK_NUMBERS // r))
    squared, magnitude = (jnp.sum(x) for x in jax.lax.map(by_pairs, (flat, Z, sizes), batch_size=chunk))
    clear = squared > 1000 * jnp.finfo(Q.dtype).eps * magnitude
    return jnp.sqrt(jax.lax.cond(clear, lambda Q, Z: squared, by_entries, Q, Z)) / r


def _packing(m: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the upper triangle of a symmetric (m, m) matrix is in its vec, and weights that keep its Frobenius norm."""
    i, j = np.triu_indices(m)
    return i * m + j, np.where(i == j, 1.0, np.sqrt(2))


def _packed(Q: Float[Array, "r m m"]) -> Float[Array, "r a"]:
    r, m, _ = Q.shape
    position, weights = _packing(m)
    return Q.reshape(r, m * m)[:, position] * jnp.asarray(weights, Q.dtype)[None]


def _packed_squares(Z: Float[Array, "r n"]) -> Float[Array, "r b"]:
    """`z_i z_i^T`, packed."""
    n = Z.shape[1]
    i, j = np.triu_indices(n)
    return Z[:, i] * Z[:, j] * jnp.asarray(_packing(n)[1], Z.dtype)[None]


def _unpacked(a: Float[Array, "a"], m: int) -> Float[Array, "mm"]:
    position, weights = _packing(m)
    upper = jnp.zeros(m * m, a.dtype).at[position].set(a / jnp.asarray(weights, a.dtype)).reshape(m, m)
    return (upper + jnp.triu(upper, 1).T).reshape(-1)


def _absolute(a: Float[Array, "mm"], m: int) -> Float[Array, "mm"]:
    # H >= 0: <H, kron(|A|, |B|)> >= |<H, kron(A, B)>|, so |A| is as near as A, which is not semidefinite by itself where
    # the largest singular value is a multiple one. R^T |A| then is semidefinite too.
    values, vectors = jnp.linalg.eigh(symmetrise(a.reshape(m, m)))
    return matmul(vectors * jnp.abs(values)[None], vectors.T).reshape(-1)


def _normalised(x: Array) -> tuple[Array, Array]:
    """The array with entries of size 1 at most, whose fourth powers are well within range, and its scale."""
    largest = jnp.max(jnp.abs(x), initial=0)
    scale = jnp.where(largest == 0, 1, largest)
    return x / scale, scale


def _unit(x: Array) -> Array:
    size = jnp.linalg.norm(x)
    return x / jnp.where(size == 0, 1, size)
