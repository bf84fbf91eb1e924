"""Rows of a table as a product with unit vectors.

    y[b, :] = sum_v z[b, v] E[v, :],      z[b, v] = [v = i_b]

The index i_b is first brought into the table, or z[b] is zero where y[b] is a fill value, as the lookup's mode has it. Where
i_b has several components, v runs over as many axes of the table.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.lax import GatherScatterMode

from jaxhess._typing import Array
from jaxhess.engine.graph import Operation

__all__ = ["Lookup"]

_CLIPPED = {GatherScatterMode.CLIP, GatherScatterMode.PROMISE_IN_BOUNDS}


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A `gather` or `dynamic_slice` of whole rows: one index along each of the table's `axes`, all of the others. `columns`
    are the axes that the components of the index belong to, b has the shape `places`, and z the type `dtype`."""

    operation: Operation
    table_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[int, ...]
    columns: tuple[int, ...]
    places: tuple[int, ...]
    collapsed: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()
    filled: bool = False

    @staticmethod
    def of(operation: Operation, inputs: Sequence[jax.ShapeDtypeStruct], output: tuple[int, ...]) -> "Lookup | None":
        """The lookup that an operation is; None for one of another kind."""
        shape, sizes = inputs[0].shape, tuple(operation.params["slice_sizes"])
        axes = tuple(axis for axis, size in enumerate(sizes) if size != shape[axis])
        if not axes or any(sizes[axis] != 1 for axis in axes):
            return None
        every = tuple(range(len(shape)))
        if operation.name == "dynamic_slice":
            return Lookup(operation, shape, output, inputs[0].dtype, axes, every, (), (), every)
        numbers, mode = operation.params["dimension_numbers"], operation.params["mode"]
        columns = tuple(numbers.start_index_map)
        filled = mode == GatherScatterMode.FILL_OR_DROP
        if numbers.operand_batching_dims or not set(axes) <= set(columns) or not (filled or mode in _CLIPPED):
            return None
        places, collapsed = inputs[1].shape[:-1], tuple(numbers.collapsed_slice_dims)
        return Lookup(
            operation, shape, output, inputs[0].dtype, axes, columns, places, collapsed, tuple(numbers.offset_dims), filled
        )  # fmt: skip

    @property
    def numbers(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]:
        """The dimension numbers of the product of z and the table."""
        first = len(self.places)
        return (tuple(range(first, first + len(self.axes))), self.axes), ((), ())

    @property
    def moves(self) -> list[tuple[str, tuple[int, ...]]]:
        """The shape and the permutation that make the lookup's result of y."""
        window = [axis for axis in range(len(self.table_shape)) if axis not in self.collapsed]
        shape = (*self.places, *(1 if axis in self.axes else self.table_shape[axis] for axis in window))
        moved = iter(range(len(self.places)))
        of_window = {offset: len(self.places) + n for n, offset in enumerate(self.offsets)}
        permutation = tuple(of_window[axis] if axis in of_window else next(moved) for axis in range(len(self.output_shape)))
        return [("reshape", shape), ("transpose", permutation)]

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of y."""
        return (*self.places, *(size for axis, size in enumerate(self.table_shape) if axis not in self.axes))

    def units(self, *indices: Array) -> Array:
        """z (places, axes)."""
        if self.operation.name == "gather":
            components = [indices[0][..., n] for n in range(len(self.columns))]
        else:
            components = list(indices)
        z = jnp.ones((*self.places, *(1 for _ in self.axes)), self.dtype)
        for axis, index in zip(self.columns, components, strict=True):
            last = self.table_shape[axis] - 1 if axis in self.axes else 0
            inside = jnp.clip(index, 0, min(last, jnp.iinfo(index.dtype).max))
            one = jnp.ones(self.places, bool)[(..., *(None for _ in self.axes))]
            if axis in self.axes:
                rows = jnp.arange(last + 1, dtype=jnp.int32)
                one = inside.astype(jnp.int32)[..., None] == rows[(*(None for _ in self.places), ...)]
                where = self.axes.index(axis)
                one = one.reshape(*self.places, *(last + 1 if n == where else 1 for n in range(len(self.axes))))
            if self.filled:
                one = one & (inside == index)[(..., *(None for _ in self.axes))]
            z = z * one
        return z

    def rows(self, table: Array, *indices: Array) -> Array:
        """y, by the lookup itself."""
        (result,) = self.operation.apply(table, *indices)
        _, (_, permutation) = self.moves
        return jnp.transpose(result, [permutation.index(n) for n in range(len(permutation))]).reshape(self.rows_shape)
