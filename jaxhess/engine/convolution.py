"""A convolution as one product at each place p of its output (Theorem 1 over positions), with the patch of its input there:

    y[g, n, p, o] = sum_{k, c} z[g, n, p, k, c] K[g, k, c, o]
    z[g, n, p, k, c] = x[n, stride p + dilation k - padding, c]

p and k have as many axes as space has; g is the group, of features or of examples, and no axis where there is one group.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import PRECISION
from jaxhess._typing import Array
from jaxhess.engine.graph import Operation

__all__ = ["Convolution"]

_MOST_SLICES = 64


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The operation `conv_general_dilated` of arrays of these shapes; x and K keep the axes that they have there, but for
    the axis of K that `kernel_shape` splits into groups."""

    operation: Operation
    input_shape: tuple[int, ...]
    original_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    @property
    def params(self) -> dict[str, Any]:
        """Those of the operation."""
        return self.operation.params

    @property
    def space(self) -> int:
        """How many axes space has."""
        return len(self.input_shape) - 2

    @property
    def groups(self) -> int:
        """How many groups, of features or of examples, there are."""
        return max(self.params["feature_group_count"], self.params["batch_group_count"])

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """K's shape, its axis of output features split into (g, o)."""
        axis, shape = self.params["dimension_numbers"].rhs_spec[0], self.original_shape
        split = (shape[axis],) if self.groups == 1 else (self.groups, shape[axis] // self.groups)
        return (*shape[:axis], *split, *shape[axis + 1 :])

    @property
    def numbers(self) -> Any:
        """The dimension numbers of the product of z and K."""
        features, channels, *offsets = self.params["dimension_numbers"].rhs_spec
        grouped = self.groups > 1
        theirs = [axis + (grouped and axis > features) for axis in (*offsets, channels)]
        first = grouped + 1 + self.space
        mine = range(first, first + self.space + 1)
        return (tuple(mine), tuple(theirs)), (((0,), (features,)) if grouped else ((), ()))

    @property
    def moves(self) -> list[tuple[str, tuple[int, ...]]]:
        """The permutation and the shape that make the convolution's result of y (g, n, p, o)."""
        examples, features, *places = self.params["dimension_numbers"].out_spec
        grouped = self.groups > 1
        axes: dict[int, list[int]] = {examples: [grouped + 0]}
        axes |= {place: [grouped + 1 + d] for d, place in enumerate(places)}
        axes[features] = [0, self.space + 2] if grouped else [self.space + 1]
        permutation = tuple(axis for place in sorted(axes) for axis in axes[place])
        return [("transpose", permutation), ("reshape", self.output_shape)]

    def patches(self, x: Array) -> Array:
        """z (g, n, p, k, c)."""
        params = self.params
        numbers = params["dimension_numbers"]
        x = jnp.transpose(x, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
        edges = [(low, high, step - 1) for (low, high), step in zip(params["padding"], params["lhs_dilation"], strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        for d, (kernel, place) in enumerate(zip(numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
            windows = self.original_shape[kernel], self.output_shape[place]
            x = _windows(x, d + 1, *windows, params["window_strides"][d], params["rhs_dilation"][d])
        if params["feature_group_count"] > 1:
            x = x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
            return jnp.moveaxis(x, -2, 0)
        return x if self.groups == 1 else x.reshape(self.groups, x.shape[0] // self.groups, *x.shape[1:])

    def product(self, z: Array, kernel: Array) -> Array:
        """y from z and K."""
        wide = self.params["preferred_element_type"]
        return jax.lax.dot_general(z, kernel, self.numbers, precision=PRECISION, preferred_element_type=wide)

    def convolved(self, x: Array, kernel: Array) -> Array:
        """y from x and K, by the convolution itself."""
        params = dict(self.params, precision=(PRECISION, PRECISION))
        result = self.operation.equation.primitive.bind(x, kernel.reshape(self.original_shape), **params)
        (_, permutation), _ = self.moves
        shape = list(result.shape)
        features = self.params["dimension_numbers"].out_spec[1]
        if self.groups > 1:
            shape[features : features + 1] = [self.groups, shape[features] // self.groups]
        return jnp.transpose(result.reshape(shape), [permutation.index(axis) for axis in range(len(permutation))])


def _windows(x: Array, axis: int, kernel: int, places: int, stride: int, dilation: int) -> Array:
    """Axis (length,) as the axes (places,), where it was, and (kernel,), before the last one."""
    reach = (kernel - 1) * dilation + 1
    if stride == kernel == reach or kernel == 1:
        x = jax.lax.slice_in_dim(x, 0, (places - 1) * stride + reach, stride if kernel == 1 else 1, axis)
        x = x.reshape(*x.shape[:axis], places, kernel, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 1, -2)
    if kernel > _MOST_SLICES:
        indices = stride * np.arange(places)[:, None] + dilation * np.arange(kernel)
        return jnp.moveaxis(jnp.take(x, indices, axis, mode="clip"), axis + 1, -2)
    last = (places - 1) * stride + 1
    starts = [offset * dilation for offset in range(kernel)]
    return jnp.stack([jax.lax.slice_in_dim(x, start, start + last, stride, axis) for start in starts], -2)
