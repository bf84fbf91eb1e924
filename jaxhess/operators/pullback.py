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
from jaxhess.operators.linearised import ImplicitTerm
from jaxhess.operators.mapped import (
    count_signs,
    dense_eigvalsh,
    mapped_diagonal,
    mapped_frobenius_norm,
    mapped_matrix,
    mapped_trace,
)
from jaxhess.operators.support import as_scalar, as_tags, check_operator_fits, check_vector, describe, scaled_tags
from jaxhess.operators.uses import PairTerm

__all__ = ["Pullback"]


class Pullback(CurvatureOperator):
    """The operator on p. `function(p, others)` gives the tuple of w and `gradients` are the error's with
    respect to them. `reverse_only` says that f has no forward mode (a `custom_vjp` function): its tangent map is then the
    transpose of its reverse pass. Products cost one forward and one reverse pass through f."""

    terms: tuple[PairTerm | ImplicitTerm, ...]
    point: Array
    others: Any
    gradients: tuple[Array, ...]
    factor: Array
    function: Callable[[Array, Any], tuple[Array, ...]] = dataclasses.field(metadata={"static": True})
    reverse_only: bool = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        terms: Sequence[PairTerm | ImplicitTerm],
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
        return _product(self, jnp.asarray(vector, self.point.dtype))

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


@jax.jit
def _product(operator: Pullback, vector: Array) -> Array:
    def weights(p: Array) -> tuple[Array, ...]:
        return operator.function(p, operator.others)

    def pull(p: Array) -> Array:
        values, vjp = jax.vjp(weights, p)
        return vjp(tuple(g.astype(w.dtype) for g, w in zip(operator.gradients, values, strict=True)))[0]

    values, vjp = jax.vjp(weights, operator.point)
    if operator.reverse_only:
        (tangents,) = jax.linear_transpose(lambda cotangents: vjp(cotangents)[0], values)(vector)
    else:
        tangents = jax.jvp(weights, (operator.point,), (vector,))[1]
    products = [jnp.zeros(w.shape, w.dtype) for w in values]
    for term in operator.terms:
        term.add_product(products, tangents)
    first = vjp(tuple(p.astype(w.dtype) for p, w in zip(products, values, strict=True)))[0]
    return operator.factor * (first + jax.jvp(pull, (operator.point,), (vector,))[1])
