"""The joint block of a layer's weight and bias: `y = W z + b = [W b] (z, 1)`, so one sum of Kronecker products for both.

H = (1/r) sum_i kron(Q_i, (z_i, 1) (z_i, 1)^T)            (math: sections 2 and 3)
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array, InputError
from jaxhess.operators.base import StructuredOperator
from jaxhess.operators.kronecker import KroneckerProductSum
from jaxhess.operators.layout import Layout
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.reduction import Columns
from jaxhess.operators.solvable import Solvable
from jaxhess.operators.support import as_tags, check_operator_fits, describe, scaled_tags, sign_of

__all__ = ["LayerBlock"]


@dataclasses.dataclass(frozen=True)
class _Places:
    """How a tree of a weight and a bias is read as [W b]; hashable."""

    treedef: Any
    bias: tuple[int, ...]
    layout: Layout
    bias_first: bool

    def leaves(self, W: Any, b: Any) -> list[Any]:
        return [b, W] if self.bias_first else [W, b]

    def joined(self, leaves: Any) -> Array:
        b, W = leaves if self.bias_first else leaves[::-1]
        return jnp.concatenate([self.layout.to_matrix(W), jnp.reshape(b, (-1, 1))], axis=1)

    def split(self, matrix: Array) -> list[Array]:
        return self.leaves(self.layout.from_matrix(matrix[:, :-1]), matrix[:, -1].reshape(self.bias))

    def tree(self, matrix: Array) -> Any:
        return jax.tree.unflatten(self.treedef, self.split(matrix))


class LayerBlock(Solvable, StructuredOperator):
    """The block over a tree of two leaves, a weight read by `layout` as (m, n) and a bias of m entries.

    `terms` is the operator on [W b], of m x (n + 1); `LayerBlock.of` says how the tree is read as that. Everything exact in
    the reduced space costs what it does for the weight alone. `FullHessian.joint` makes it, where the error sees the two
    only as `W z + b`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(p, x):
    ...     return jnp.sum(jnp.sin(p["w"] @ x + p["b"]))
    >>> p = {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}
    >>> H = jaxhess.hessian(error, blocks="full")(p, jnp.ones((1, 3))).joint("w", "b")
    >>> type(H).__name__, H.factorize().eigenvalues.shape, H.as_matrix().shape
    ('LayerBlock', (2,), (8, 8))
    """

    terms: KroneckerProductSum
    places: _Places = dataclasses.field(metadata={"static": True})

    def __init__(self, terms: KroneckerProductSum, places: _Places, tags: Any = ()):
        self.terms, self.places = terms, places
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    @classmethod
    def of(cls, terms: KroneckerProductSum, layout: Layout, structure: Any, *, bias_first: bool) -> "LayerBlock":
        """The block of `terms`, for vectors like `structure`. Raises `InputError` if the shapes do not fit."""
        leaves, treedef = jax.tree.flatten(structure)
        shapes = [leaf.shape for leaf in leaves]
        if len(leaves) != 2 or (terms.layout.m, terms.layout.n) != (layout.m, layout.n + 1):
            raise InputError(f"LayerBlock: [W b] of {terms.layout.m} x {terms.layout.n} does not fit leaves of {shapes}")
        bias, weight = shapes if bias_first else shapes[::-1]
        if math.prod(bias) != layout.m or tuple(weight) != layout.shape:
            raise InputError(f"LayerBlock: a weight of {layout.shape} with {layout.m} rows does not fit leaves of {shapes}")
        return cls(terms, _Places(treedef, tuple(bias), layout, bias_first))

    def in_structure(self):
        dtype = self.terms.Q.dtype
        leaves = self.places.leaves(
            jax.ShapeDtypeStruct(self.places.layout.shape, dtype), jax.ShapeDtypeStruct(self.places.bias, dtype)
        )
        return jax.tree.unflatten(self.places.treedef, leaves)

    def out_structure(self):
        return self.in_structure()

    def mv(self, vector):
        leaves = leaves_like("LayerBlock.mv", self.in_structure(), vector)
        return self.places.tree(self.terms.mv(self.places.joined([jnp.asarray(v, self.terms.Q.dtype) for v in leaves])))

    def as_matrix(self):
        check_operator_fits(self)
        matrix, order = self.terms.as_matrix(), self._order()
        return matrix[order][:, order]

    def _order(self) -> Array:
        """Where each entry of the tree is in [W b]."""
        m, n = self.places.layout.m, self.places.layout.n + 1
        parts = self.places.split(jnp.arange(m * n).reshape(m, n))
        return jnp.concatenate([part.reshape(-1) for part in parts])

    def transpose(self):
        return self

    def diagonal(self):
        return self.places.tree(self.terms.diagonal())

    def trace(self):
        return self.terms.trace()

    def frobenius_norm(self):
        return self.terms.frobenius_norm()

    def scaled(self, factor):
        return dataclasses.replace(self, terms=self.terms.scaled(factor), tags=scaled_tags(self.tags, factor))

    def eigvalsh(self) -> Array:
        """All eigenvalues in ascending order."""
        return self.terms.eigvalsh()

    def inertia(self, tolerance: Any = None) -> Any:
        """How many eigenvalues are above `tolerance`, below `-tolerance`, and between; see `CurvatureOperator.inertia`."""
        return self.terms.inertia(tolerance)

    def _reduced_size(self):
        return self.terms._reduced_size()

    def _reduction(self):
        reduction = self.terms._reduction()
        return dataclasses.replace(reduction, columns=_LayerColumns(reduction.columns, self.places))

    def _absorb(self, dampings):
        if not all(sign_of(d) in (None, 1) for d in dampings):
            return super()._absorb(dampings)
        scales = [1 / jnp.sqrt(jnp.asarray(d, self.terms.Z.dtype)) for d in dampings]
        of_bias, of_weight = scales if self.places.bias_first else scales[::-1]
        Z = jnp.concatenate([of_weight * self.terms.Z[:, :-1], of_bias * self.terms.Z[:, -1:]], axis=1)
        return dataclasses.replace(self, terms=dataclasses.replace(self.terms, Z=Z)), 1.0, scales

    def _per_example(self, function, what):
        return dataclasses.replace(
            self, terms=self.terms._per_example(function, what), tags=self.tags | {lx.positive_semidefinite_tag}
        )

    def _plus(self, other):
        return None

    def __repr__(self):
        return describe(self, f"Q {self.terms.Q.shape}", f"[z 1] {self.terms.Z.shape}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _LayerColumns(Columns):
    """Columns of [W b] as trees."""

    inner: Columns
    places: _Places = dataclasses.field(metadata={"static": True})

    @property
    def structure(self):
        dtype = self.inner.structure.dtype
        leaves = self.places.leaves(
            jax.ShapeDtypeStruct(self.places.layout.shape, dtype), jax.ShapeDtypeStruct(self.places.bias, dtype)
        )
        return jax.tree.unflatten(self.places.treedef, leaves)

    @property
    def count(self):
        return self.inner.count

    def push(self, coefficients):
        return self.places.tree(self.inner.push(coefficients))

    def pull(self, vector):
        return self.inner.pull(self.places.joined(jax.tree.leaves(vector)))
