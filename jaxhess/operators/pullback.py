"""Curvature with respect to p where the network uses other arrays `w_1, w_2, .. = f(p)`: masked, normalised, sliced,
low-rank weights.

    H_p = sum_jk J_j^T H_jk J_k + sum_j <g_j, d2 w_j / dp2>,     J_j = dw_j / dp

The first term is a product with f's linearisation on both sides, the second a Hessian-vector product of `<g, f(p)>`. No
array of the size of H_p is formed; f is the part of the user's function that depends on no data.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.contraction import contract
from jaxhess.operators.mapped import (
    count_signs,
    dense_eigvalsh,
    mapped_diagonal,
    mapped_frobenius_norm,
    mapped_matrix,
    mapped_trace,
)
from jaxhess.operators.support import as_scalar, as_tags, check_operator_fits, check_vector, describe, scaled_tags

__all__ = ["PairTerm", "Pullback"]

Labels = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairTerm:
    """`H_jk` as a contraction of `operands` (see `ContractionOperator`), from w_k (`columns`) to w_j (`rows`); with
    `symmetrised`, its transpose too."""

    operands: tuple[Array, ...]
    labels: tuple[Labels, ...] = dataclasses.field(metadata={"static": True})
    rows: Labels = dataclasses.field(metadata={"static": True})
    columns: Labels = dataclasses.field(metadata={"static": True})
    pair: tuple[int, int] = dataclasses.field(metadata={"static": True})
    symmetrised: bool = dataclasses.field(metadata={"static": True})

    def add_product(self, results: list[Array], vectors: Sequence[Array]) -> None:
        """Add this term's products with `vectors[k]` to `results[j]`."""
        j, k = self.pair
        results[j] = results[j] + self._contract(self.rows, vectors[k], self.columns)
        if self.symmetrised:
            results[k] = results[k] + self._contract(self.columns, vectors[j], self.rows)

    def _contract(self, result: Labels, vector: Array, names: Labels) -> Array:
        return contract((*self.operands, vector), (*self.labels, names), result)


class Pullback(CurvatureOperator):
    """The operator on p. `function(p, others)` gives the tuple of w and `gradients` are the error's with
    respect to them. `reverse_only` says that f has no forward mode (a `custom_vjp` function): its tangent map is then the
    transpose of its reverse pass. Products cost one forward and one reverse pass through f."""

    terms: tuple[PairTerm, ...]
    point: Array
    others: Any
    gradients: tuple[Array, ...]
    factor: Array
    function: Callable[[Array, Any], tuple[Array, ...]] = dataclasses.field(metadata={"static": True})
    reverse_only: bool = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        terms: Sequence[PairTerm],
        point: Array,
        others: Any,
        gradients: Sequence[Array],
        function: Callable[[Array, Any], tuple[Array, ...]],
        *,
        reverse_only: bool = False,
        factor: Any = 1,
        tags: Any = (),
    ):
        self.reverse_only = reverse_only
        self.terms, self.point, self.others = tuple(terms), point, others
        self.gradients, self.function = tuple(gradients), function
        self.factor = as_scalar("Pullback", factor, point.dtype)
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.point.shape, self.point.dtype)

    def mv(self, vector):
        check_vector("Pullback", vector, self.point.shape)
        vector = jnp.asarray(vector, self.point.dtype)

        def weights(p: Array) -> tuple[Array, ...]:
            return self.function(p, self.others)

        def pull(p: Array) -> Array:
            values, vjp = jax.vjp(weights, p)
            return vjp(tuple(g.astype(w.dtype) for g, w in zip(self.gradients, values, strict=True)))[0]

        values, vjp = jax.vjp(weights, self.point)
        if self.reverse_only:
            (tangents,) = jax.linear_transpose(lambda cotangents: vjp(cotangents)[0], values)(vector)
        else:
            tangents = jax.jvp(weights, (self.point,), (vector,))[1]
        products = [jnp.zeros(w.shape, w.dtype) for w in values]
        for term in self.terms:
            term.add_product(products, tangents)
        first = vjp(tuple(p.astype(w.dtype) for p, w in zip(products, values, strict=True)))[0]
        return self.factor * (first + jax.jvp(pull, (self.point,), (vector,))[1])

    def as_matrix(self):
        check_operator_fits(self)
        return mapped_matrix(self)

    def transpose(self):
        return self

    def diagonal(self):
        return mapped_diagonal(self)

    def trace(self):
        return mapped_trace(self)

    def frobenius_norm(self):
        return mapped_frobenius_norm(self)

    def scaled(self, factor):
        scaled = self.factor * as_scalar("Pullback", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return dense_eigvalsh(self)

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def __repr__(self):
        return describe(self, f"{len(self.terms)} terms through the weights' own computation")
