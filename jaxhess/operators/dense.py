"""Curvature without structure to exploit: a dense symmetric matrix, and a diagonal one.

`Diagonal` of zeros is the zero block, as of a parameter that the error does not depend on or is linear in.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import matmul
from jaxhess._typing import Array, Float, InputError
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.eigen import Eigen
from jaxhess.operators.mapped import count_signs
from jaxhess.operators.reduction import Whole
from jaxhess.operators.support import (
    as_real_arrays,
    as_scalar,
    as_tags,
    check_operator_fits,
    check_vector,
    describe,
    scaled_tags,
    shape_text,
)


class Dense(CurvatureOperator):
    """A symmetric matrix on the entries of one parameter, in the order of its `reshape(-1)`.

    `array` is (N, N) and trusted to be symmetric; `parameter_shape` has N entries, (N,) by default. Raises `InputError`
    if they do not fit each other.

    >>> import jax.numpy as jnp
    >>> H = Dense(jnp.array([[0.0, 1.0], [1.0, 0.0]]), (2, 1))
    >>> H.mv(jnp.array([[1.0], [2.0]])).tolist()
    [[2.0], [1.0]]
    """

    array: Float[Array, "N N"]
    parameter_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __init__(self, array: Array, parameter_shape: tuple[int, ...] | None = None, tags: Any = ()):
        (array,) = as_real_arrays("Dense", ["array"], [array])
        shape = array.shape[:1] if parameter_shape is None else tuple(parameter_shape)
        if array.shape != (math.prod(shape),) * 2:
            raise InputError(f"Dense: a parameter of shape {shape} needs its square matrix, got {array.shape}")
        self.array = array
        self.parameter_shape = shape
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.parameter_shape, self.array.dtype)

    def mv(self, vector):
        check_vector("Dense", vector, self.parameter_shape)
        return matmul(self.array, jnp.reshape(vector, -1)).reshape(self.parameter_shape)

    def as_matrix(self):
        return self.array

    def transpose(self):
        return self

    def diagonal(self):
        return jnp.diagonal(self.array).reshape(self.parameter_shape)

    def trace(self):
        return jnp.trace(self.array)

    def frobenius_norm(self):
        return jnp.sqrt(jnp.sum(self.array**2))

    def scaled(self, factor):
        array = self.array * as_scalar("Dense", factor, self.array.dtype)
        return Dense(array, self.parameter_shape, scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return jnp.linalg.eigvalsh(self.array)

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def __repr__(self):
        return describe(self, f"array {shape_text(self.array)}")


class Diagonal(CurvatureOperator):
    """The diagonal matrix with the entries of `values`, an array of the parameter's shape.

    >>> import jax.numpy as jnp
    >>> H = Diagonal(jnp.array([3.0, -1.0, 0.0]))
    >>> H.eigvalsh().tolist()
    [-1.0, 0.0, 3.0]
    >>> [int(count) for count in H.inertia()]
    [1, 1, 1]
    """

    values: Array

    def __init__(self, values: Array, tags: Any = ()):
        (self.values,) = as_real_arrays("Diagonal", ["values"], [values])
        self.tags = as_tags(tags) | {lx.symmetric_tag, lx.diagonal_tag}

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.values.shape, self.values.dtype)

    def mv(self, vector):
        check_vector("Diagonal", vector, self.values.shape)
        return self.values * vector

    def as_matrix(self):
        check_operator_fits(self)
        return jnp.diag(self.values.reshape(-1))

    def transpose(self):
        return self

    def diagonal(self):
        return self.values

    def trace(self):
        return jnp.sum(self.values)

    def frobenius_norm(self):
        return jnp.sqrt(jnp.sum(self.values**2))

    def scaled(self, factor):
        return Diagonal(self.values * as_scalar("Diagonal", factor, self.values.dtype), scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return jnp.sort(self.values.reshape(-1))

    def inertia(self, tolerance=None):
        return count_signs(self.values.reshape(-1), self.in_size(), tolerance)

    def _eigen(self):
        return Eigen(Whole.of(self.in_structure()), None, self.values.reshape(-1), None, jnp.zeros((), self.values.dtype))

    def _held(self):
        return "it is diagonal"

    def __repr__(self):
        return describe(self, f"values {shape_text(self.values)}")
