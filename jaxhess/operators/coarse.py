"""kron(A, B) near an operator, by its eigenvectors: where a search for extreme eigenpairs starts, and where it goes on to.

With `A = U diag(a) U^T` (m, m), `B = V diag(b) V^T` (n, n) and W (m, n) a parameter, row-major as everywhere:

    X = V^T W^T                                      the coordinates of W, (n, m): B is diagonal in them
    kron(A, B)  takes  X  to  diag(b) X A            its eigenvectors are e_j u_i^T, with eigenvalues a_i b_j
    (kron(A, B) - θ)^-1 R = ((R U) / (b a^T - θ)) U^T

Held as (n, m), a block of vectors is multiplied by U as one matrix, and by Z of a batch with only whole rows moved.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import matmul
from jaxhess._typing import Array, Float, InputError
from jaxhess.operators.layout import Layout
from jaxhess.operators.ritz import Which, extreme_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerGuess:
    """kron(A, B) by its eigenvectors, as something near an operator: where to start from, and where to go on to.

    Made by `kronecker_guess`. `rows` (m,) and `row_vectors` (m, m) are eigenvalues and eigenvectors of A, `columns` (n,)
    and `column_vectors` (n, n) those of B. With `turned`, the operator as it acts on the coordinates `V^T W^T` (n, m) of
    each parameter W, V the eigenvectors of B, `extreme_eigenpairs` searches there and turns only what it returns.
    """

    rows: Float[Array, "m"]
    row_vectors: Float[Array, "m m"]
    columns: Float[Array, "n"]
    column_vectors: Float[Array, "n n"]
    layout: Layout = dataclasses.field(metadata={"static": True})
    turned: Any = None

    def start(self, count: int, which: Which = "magnitude") -> Float[Array, "count ..."]:
        """The `count` extreme eigenvectors, outer products of those of A and B, (count, *shape of the parameter)."""
        return self.from_coordinates(self.start_coordinates(count, which))

    def directions(self, residuals: Float[Array, "b ..."], eigenvalues: Float[Array, "b"]) -> Float[Array, "b ..."]:
        """`(kron(A, B) - θ)^-1 r` for each residual, but for denominators kept away from zero."""
        R = matmul(self.column_vectors.T, jnp.swapaxes(jax.vmap(self.layout.to_matrix)(residuals), 1, 2))
        return self.from_coordinates(self.direction_coordinates(R, eigenvalues))

    def from_coordinates(self, X: Float[Array, "b n m"]) -> Float[Array, "b ..."]:
        """The parameters W that have the coordinates `V^T W^T` in X."""
        return jax.vmap(self.layout.from_matrix)(jnp.swapaxes(matmul(self.column_vectors, X), 1, 2))

    def start_coordinates(self, count: int, which: Which) -> Float[Array, "count n m"]:
        """`start` in coordinates."""
        products = jnp.outer(self.rows, self.columns).reshape(-1)
        if count > products.size:
            raise InputError(
                f"KroneckerGuess.start: asked for {count} eigenvectors of a {products.size} x {products.size} matrix"
            )
        chosen = extreme_positions(products, count, which)
        i, j = chosen // self.columns.size, chosen % self.columns.size
        X = jnp.zeros((count, self.columns.size, self.rows.size), self.row_vectors.dtype)
        return X.at[jnp.arange(count), j].set(self.row_vectors.T[i])

    def direction_coordinates(self, R: Float[Array, "b n m"], eigenvalues: Float[Array, "b"]) -> Float[Array, "b n m"]:
        """`directions` of residuals in coordinates: B is diagonal there, and A stands on the side that is contiguous."""
        # Nearer to θ than a tenth of it, the spectrum of kron(A, B) does not tell where the operator's is.
        largest = jnp.max(jnp.abs(eigenvalues))
        least = jnp.where(largest > 0, 0.1 * largest, 1)
        difference = jnp.outer(self.columns, self.rows)[None] - eigenvalues[:, None, None]
        bounded = jnp.where(difference < 0, jnp.minimum(difference, -least), jnp.maximum(difference, least))
        return matmul(matmul(R, self.row_vectors) / bounded, self.row_vectors.T)


def kronecker_guess(A: Float[Array, "m m"], B: Float[Array, "n n"], layout: Layout | None = None) -> KroneckerGuess:
    """A start for `extreme_eigenpairs` of an operator near kron(A, B), both symmetric: two small eigendecompositions.

    For the Hessian of a batch, `(1/r) sum_i kron(Q_i, z_i z_i^T)`, take the means of Q and of z z^T. `layout` says how the
    parameter is read as (m, n), by default as it is. Raises `InputError` if A or B is not square or does not fit.

    >>> import jax.numpy as jnp
    >>> guess = kronecker_guess(jnp.diag(jnp.array([1.0, 3.0])), jnp.diag(jnp.array([2.0, -1.0])))
    >>> abs(guess.start(1, "largest")).tolist()
    [[[0.0, 0.0], [1.0, 0.0]]]
    """
    for name, factor in (("A", A), ("B", B)):
        if jnp.ndim(factor) != 2 or factor.shape[0] != factor.shape[1]:
            raise InputError(f"kronecker_guess: {name} must be a square matrix, got shape {jnp.shape(factor)}")
    m, n = A.shape[0], B.shape[0]
    if layout is None:
        layout = Layout.of_matrix(m, n)
    if (layout.m, layout.n) != (m, n):
        raise InputError(
            f"kronecker_guess: A and B belong to a {m} x {n} matrix, the layout describes {layout.m} x {layout.n}"
        )
    (rows, row_vectors), (columns, column_vectors) = jnp.linalg.eigh(A), jnp.linalg.eigh(B)
    return KroneckerGuess(rows, row_vectors, columns, column_vectors, layout)
