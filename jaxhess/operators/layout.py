"""How the array of a parameter is read as the (m, n) matrix W of `y = W z`.

Jaxhess's own layers store W as (out, in) = (m, n); other libraries store (in, out), or split either side into heads,
windows and channels. A `Layout` names which axes make up the rows i of W and which its columns j:

    array  --reshape-->  sizes  --transpose-->  (rows..., columns...)  --reshape-->  (m, n)
"""

import dataclasses
import math

import jax.numpy as jnp

from jaxhess._typing import Array, Float, InputError


@dataclasses.dataclass(frozen=True)
class Layout:
    """A parameter of `shape`, read row-major as `sizes`, whose axes `rows` are W's rows and `columns` its columns.

    `rows` and `columns` are indices into `sizes`; together they name every axis once. Hashable and static. Raises
    `InputError` if `sizes` has not the number of entries of `shape`, or if an axis is named twice or not at all.

    >>> import jax.numpy as jnp
    >>> heads = Layout(shape=(3, 8), sizes=(3, 2, 4), rows=(1, 2), columns=(0,))    # x @ w, two heads of four
    >>> heads.m, heads.n
    (8, 3)
    >>> heads.to_matrix(jnp.zeros((3, 8))).shape
    (8, 3)
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    def __post_init__(self):
        if math.prod(self.sizes) != math.prod(self.shape):
            raise InputError(f"Layout: sizes {self.sizes} do not refine the parameter's shape {self.shape}")
        if sorted(self.rows + self.columns) != list(range(len(self.sizes))):
            raise InputError(
                f"Layout: rows {self.rows} and columns {self.columns} must name each axis of sizes {self.sizes} once"
            )

    @classmethod
    def of_matrix(cls, m: int, n: int) -> "Layout":
        """A parameter stored as (m, n) = (out, in), as in `w @ x`."""
        return cls((m, n), (m, n), (0,), (1,))

    @classmethod
    def transposed(cls, m: int, n: int) -> "Layout":
        """A parameter stored as (n, m) = (in, out), as in `x @ w`."""
        return cls((n, m), (n, m), (1,), (0,))

    @property
    def m(self) -> int:
        """Rows of W: outputs."""
        return math.prod(self.sizes[axis] for axis in self.rows)

    @property
    def n(self) -> int:
        """Columns of W: inputs."""
        return math.prod(self.sizes[axis] for axis in self.columns)

    @property
    def is_plain(self) -> bool:
        """Whether W's entries are in the order of the parameter's."""
        return self.rows + self.columns == tuple(range(len(self.sizes)))

    def to_matrix(self, array: Array) -> Float[Array, "m n"]:
        """The parameter-shaped `array` as the matrix W, (m, n)."""
        array = jnp.asarray(array).reshape(self.sizes)
        return jnp.transpose(array, self.rows + self.columns).reshape(self.m, self.n)

    def from_matrix(self, matrix: Float[Array, "m n"]) -> Array:
        """The inverse of `to_matrix`: an array of `shape`."""
        order = self.rows + self.columns
        array = jnp.asarray(matrix).reshape(tuple(self.sizes[axis] for axis in order))
        return jnp.transpose(array, _inverse(order)).reshape(self.shape)

    def reorder(self, matrix: Float[Array, "N N"]) -> Float[Array, "N N"]:
        """A matrix over the entries of vec(W) as one over those of the parameter, `reshape(-1)` on both sides."""
        if self.is_plain:
            return matrix
        order = self.rows + self.columns
        inverse = _inverse(order)
        sizes = tuple(self.sizes[axis] for axis in order)
        both = inverse + tuple(axis + len(order) for axis in inverse)
        return jnp.transpose(matrix.reshape(sizes * 2), both).reshape(matrix.shape)


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))
