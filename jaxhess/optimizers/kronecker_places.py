"""The Kronecker product nearest to the block of a matrix that meets one vector of each example, or several of them.

    H = (1/r) sum_ic b_ic vec(G_ic) vec(G_ic)^T,      G_ic = V_ic^T Z_i,      V_ic (T, m), Z_i (T, n)

over T places, in time or space, or uses of the matrix. Neither G nor anything of its size is formed but for the diagonal:

    A = sum_ic b_ic V_ic^T (Z_i B Z_i^T) V_ic         B = sum_i Z_i^T (sum_c b_ic V_ic A V_ic^T) Z_i
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array
from jaxhess.operators.gauss_newton import GaussNewtonBlock
from jaxhess.operators.jacobian import JacobianUse, OutputJacobian
from jaxhess.operators.layout import Layout

__all__ = ["MOST_NUMBERS", "Nearest", "Places", "alternated", "has_rows", "places_of"]

MOST_NUMBERS = 2**27  # of the gradients of outputs


class Nearest(NamedTuple):
    """A (m, m) and B (n, n) of the product nearest to a block, and `exact`: of U (m, k) and V (n, l) the diagonal
    `(u_k ⊗ v_l)^T H (u_k ⊗ v_l)` (k, l) of H itself, or None where that costs more than the factors do."""

    A: Array
    B: Array
    exact: Callable[[Array, Array], Array] | None = None

    def swapped(self) -> "Nearest":
        """Of the transposed parameter."""
        exact = self.exact
        return Nearest(self.B, self.A, None if exact is None else lambda U, V: exact(V, U).T)


class Places(NamedTuple):
    """`V` (r, M, T, m), `Z` (r, T, n) and the `weights` b_ic / r (r, M)."""

    V: Array
    Z: Array
    weights: Array

    @property
    def one(self) -> bool:
        """Whether an example has one place."""
        return self.Z.shape[1] == 1

    @property
    def cheaper(self) -> bool:
        """Whether this way takes less than the gradients themselves do, (m, n) of each output of each example."""
        T, m, n = self.Z.shape[1], self.V.shape[3], self.Z.shape[2]
        return T * (m * m + n * n) + T * T * (m + n) <= m * n * (T + m + n)

    def with_ones(self) -> "Places":
        """With a bias that is added at every place, as a further column."""
        return self._replace(Z=jnp.concatenate([self.Z, jnp.ones_like(self.Z[:, :, :1])], axis=2))

    def nearest(self, known: Array | None) -> Nearest:
        """The factors, beginning with the B that is `known`."""
        few = self.one or self.weights.size * self.V.shape[3] * self.Z.shape[2] <= MOST_NUMBERS

        def first() -> Array:
            return matmul(self._z.T, self._z) if self.one else jnp.eye(self.Z.shape[2], dtype=self.Z.dtype)

        return Nearest(*alternated(self.left, self.right, first, known), self.diagonal if few else None)

    @property
    def _z(self) -> Array:
        """Z, all places of all examples in one axis."""
        return self.Z.reshape(-1, self.Z.shape[2])

    def left(self, B: Array) -> Array:
        """A of B."""
        m, ZB = self.V.shape[3], matmul(self._z, B).reshape(self.Z.shape)
        if self.one:
            lengths = jnp.sum(ZB * self.Z, axis=2)[:, None, :, None]
            product = lengths * self.V
        else:
            product = matmul(matmul(ZB, jnp.swapaxes(self.Z, 1, 2))[:, None], self.V)
        weighted = self.weights[:, :, None, None] * product
        return symmetrise(matmul(weighted.reshape(-1, m).T, self.V.reshape(-1, m)))

    def right(self, A: Array) -> Array:
        """B of A."""
        r, M, T, m = self.V.shape
        VA = self.weights[:, :, None, None] * matmul(self.V.reshape(-1, m), A).reshape(self.V.shape)
        if self.one:
            product = jnp.sum(VA * self.V, axis=(1, 3))[:, :, None] * self.Z
        else:
            across, down = (jnp.swapaxes(X, 1, 2).reshape(r, T, M * m) for X in (VA, self.V))
            product = matmul(matmul(across, jnp.swapaxes(down, 1, 2)), self.Z)
        return symmetrise(matmul(product.reshape(self._z.shape).T, self._z))

    def diagonal(self, U: Array, W: Array) -> Array:
        """`(u_k ⊗ w_l)^T H (u_k ⊗ w_l)`."""
        r, M, T, m = self.V.shape
        VU = matmul(self.V.reshape(-1, m), U).reshape(r, M, T, -1)
        ZW = matmul(self._z, W).reshape(r, T, -1)
        if self.one:
            along = jnp.sum(self.weights[:, :, None] * VU[:, :, 0] ** 2, axis=1)
            return matmul(along.T, ZW[:, 0] ** 2)
        G = matmul(jnp.swapaxes(VU, 2, 3), ZW[:, None])
        return jnp.sum(self.weights[:, :, None, None] * G**2, axis=(0, 1))


def places_of(block: GaussNewtonBlock) -> tuple[Places, Layout] | None:
    """V, Z and how they read the parameter; None where it is not one matrix that meets vectors and nothing else."""
    J = block.jacobian
    if not has_rows(block) or J.through is not None or not J.uses:
        return None
    layouts = [_layout_of_use(use, J) for use in J.uses]
    layout = layouts[0]
    if layout is None or any(other != layout for other in layouts):
        return None
    V, Z = (jnp.concatenate(parts, axis=-2) for parts in zip(*map(_rows_and_inputs, J.uses), strict=True))
    weights = jnp.ones((J.examples, J.outputs), V.dtype) if block.curvature is None else block.curvature
    return Places(V, Z, block.factor * weights / J.examples), layout


def has_rows(block: GaussNewtonBlock) -> bool:
    """Whether the outputs' curvature is diagonal, so that the rows of the Jacobian have a weight each."""
    return block.curvature is None or block.curvature.ndim == 2


def _layout_of_use(use: JacobianUse, J: OutputJacobian) -> Layout | None:
    labels = use.labels
    if use.inputs is None or labels.input is None:
        return None
    rows, columns = _without(labels.output, labels.positions), _without(labels.input, labels.positions)
    placed = all(label in labels.output and label in labels.input for label in labels.positions)
    if not placed or sorted(rows + columns) != sorted(labels.weight):
        return None
    axes = [tuple(labels.weight.index(label) for label in side) for side in (rows, columns)]
    return Layout(J.shape, labels.weight_sizes, *axes)


def _rows_and_inputs(use: JacobianUse) -> tuple[Array, Array]:
    """V (r, M, T, m) and Z (r, T, n) of one use."""
    labels = use.labels
    assert use.inputs is not None
    assert labels.input is not None
    V = _with_places_first(use.rows, 2, labels.output, labels.positions)
    return use.scale * V, _with_places_first(use.inputs, 1, labels.input, labels.positions)


def _with_places_first(X: Array, before: int, labels: tuple[int, ...], positions: tuple[int, ...]) -> Array:
    """The axes after the first `before` ones in two: all places, then the rest."""
    order = [before + labels.index(label) for label in positions + _without(labels, positions)]
    turned = jnp.transpose(X, (*range(before), *order))
    places = 1
    for size in turned.shape[before : before + len(positions)]:
        places *= size
    return turned.reshape(*turned.shape[:before], places, -1)


def _without(labels: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label in labels if label not in others)


def alternated(
    left: Callable[[Array], Array], right: Callable[[Array], Array], first: Callable[[], Array], known: Array | None
) -> tuple[Array, Array]:
    """A and B by alternating least squares: half a round from the `known` B, more from the `first` one."""

    def begun() -> Array:
        return right(_unit(left(_unit(first()))))

    if known is None:
        B = begun()
    else:
        size = jax.eval_shape(begun).shape[0]
        known = known[:size, :size]
        B = jax.lax.cond(jnp.any(known != 0), lambda: known, begun)
    A = _unit(left(_unit(B)))
    return A, right(A)


def _unit(X: Array) -> Array:
    size = jnp.linalg.norm(X)
    return X / jnp.where(size > 0, size, 1)
