"""Parts of a whole Hessian by its product alone, where no small matrices make them up."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array
from jaxhess.operators.base import StructuredOperator, sum_of
from jaxhess.operators.mapped import (
    Inertia,
    count_signs,
    mapped_diagonal,
    mapped_frobenius_norm,
    mapped_matrix,
    mapped_trace,
)
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.reduction import ravel, unravel
from jaxhess.operators.solvable import Solvable
from jaxhess.operators.support import as_tags, check_operator_fits, check_square, check_vector, describe, scaled_tags

__all__ = ["JointHessian", "RestrictedHessian"]

_CHUNK_BYTES = 2**24


class RestrictedHessian(Solvable, StructuredOperator):
    """A block of a `FullHessian`, from the parameter at place `column` to that at `row`, by its product alone: where uses in
    loops, or weights computed from parameters, leave no small matrices. What the zeros of the vector's other parts would
    cost is not computed."""

    whole: Any
    row: int = dataclasses.field(metadata={"static": True})
    column: int = dataclasses.field(metadata={"static": True})

    def __init__(self, whole: Any, row: int, column: int, tags: Any = ()):
        self.whole, self.row, self.column = whole, row, column
        self.tags = as_tags(tags) | ({lx.symmetric_tag} if row == column else set())

    def in_structure(self):
        return jax.tree.leaves(self.whole.in_structure())[self.column]

    def out_structure(self):
        return jax.tree.leaves(self.whole.in_structure())[self.row]

    def mv(self, vector):
        structure = self.in_structure()
        check_vector("RestrictedHessian", vector, structure.shape)
        (product,) = _product(self.whole, (self.row,), (self.column,), [jnp.asarray(vector, structure.dtype)])
        return product

    def as_matrix(self):
        check_operator_fits(self)
        if self.out_size() < self.in_size():
            return mapped_matrix(self.transpose()).T
        return mapped_matrix(self)

    def transpose(self):
        return self if self.row == self.column else RestrictedHessian(self.whole, self.column, self.row, self.tags)

    def diagonal(self):
        check_square(self, "diagonal")
        return mapped_diagonal(self)

    def trace(self):
        check_square(self, "trace")
        return mapped_trace(self)

    def frobenius_norm(self):
        return mapped_frobenius_norm(self if self.in_size() <= self.out_size() else self.transpose())

    def scaled(self, factor):
        return dataclasses.replace(self, whole=self.whole.scaled(factor), tags=scaled_tags(self.tags, factor))

    def _plus(self, other):
        return None

    def __repr__(self):
        return describe(self, f"of {self.whole!r}")


class JointHessian(Solvable, StructuredOperator):
    """The square block of a `FullHessian` over the parameters at `places`, as a tree of `treedef`; `FullHessian.joint` makes
    it."""

    whole: Any
    places: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    treedef: Any = dataclasses.field(metadata={"static": True})

    def __init__(self, whole: Any, places: tuple[int, ...], treedef: Any, tags: Any = ()):
        self.whole, self.places, self.treedef = whole, places, treedef
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        leaves = jax.tree.leaves(self.whole.in_structure())
        return jax.tree.unflatten(self.treedef, [leaves[place] for place in self.places])

    def out_structure(self):
        return self.in_structure()

    def mv(self, vector):
        structure = self.in_structure()
        leaves = leaves_like("JointHessian.mv", structure, vector)
        cast = [jnp.asarray(v, s.dtype) for v, s in zip(leaves, jax.tree.leaves(structure), strict=True)]
        return jax.tree.unflatten(self.treedef, _product(self.whole, self.places, self.places, cast))

    def as_matrix(self):
        check_operator_fits(self)
        return _rows(self)

    def transpose(self):
        return self

    def diagonal(self):
        leaves = jax.tree.leaves(self.whole.diagonal())
        return jax.tree.unflatten(self.treedef, [leaves[place] for place in self.places])

    def trace(self):
        return sum_of(jnp.sum(d) for d in jax.tree.leaves(self.diagonal()))

    def frobenius_norm(self):
        return jnp.sqrt(jnp.sum(_column_norms(self)))

    def scaled(self, factor):
        return dataclasses.replace(self, whole=self.whole.scaled(factor), tags=scaled_tags(self.tags, factor))

    def eigvalsh(self) -> Array:
        """All eigenvalues in ascending order, by way of the dense matrix."""
        return jnp.linalg.eigvalsh(self.as_matrix())

    def inertia(self, tolerance: Any = None) -> Inertia:
        """How many eigenvalues are above `tolerance`, below `-tolerance`, and between; see `CurvatureOperator.inertia`."""
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def _plus(self, other):
        return None

    def __repr__(self):
        return describe(self, f"{len(self.places)} parameters of {self.whole!r}")


@functools.partial(jax.jit, static_argnums=(1, 2))
def _product(whole: Any, rows: tuple[int, ...], columns: tuple[int, ...], vectors: list[Array]) -> list[Array]:
    zeros = [jnp.zeros(s.shape, s.dtype) for s in jax.tree.leaves(whole.in_structure())]

    def restricted(parts: list[Array]) -> list[Array]:
        given = list(zeros)
        for place, part in zip(columns, parts, strict=True):
            given[place] = part
        products = whole.product(jax.tree.leaves(whole.point), given)
        return [products[place] for place in rows]

    # The derivative of a linear map is the map itself, less what the parts that stay zero would cost.
    results = jax.jvp(restricted, ([jnp.zeros_like(v) for v in vectors],), (vectors,))[1]
    return [whole._scale.astype(result.dtype) * result for result in results]


def _mapped(operator: JointHessian, reading: Any) -> Array:
    structure, size = operator.in_structure(), operator.in_size()
    dtype = jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(structure)))

    def row(i: Array) -> Array:
        return reading(ravel(operator.mv(unravel(structure, jnp.zeros(size, dtype).at[i].set(1)))))

    batch = max(1, min(size, _CHUNK_BYTES // (dtype.itemsize * max(size, 1))))
    return jax.lax.map(row, jnp.arange(size), batch_size=batch)


@jax.jit
def _rows(operator: JointHessian) -> Array:
    return _mapped(operator, lambda row: row)


@jax.jit
def _column_norms(operator: JointHessian) -> Array:
    return _mapped(operator, lambda row: jnp.sum(row**2))
