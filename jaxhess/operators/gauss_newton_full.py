"""The whole Gauss-Newton (or Fisher) matrix over a tree of parameters, all cross blocks included (math: section 7).

    G = (1/r) sum_i A_i^T B_i A_i           A_i = [A_i^(1) A_i^(2) ..] over the parameters, in the order of their leaves

One Jacobian for each parameter and one B for all of them: the storage is that of the diagonal blocks, not its square.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.base import StructuredOperator
from jaxhess.operators.gauss_newton import GaussNewtonBlock, GaussNewtonCrossBlock, cross_matrix
from jaxhess.operators.gram import gram_eigenvalues, gram_is_smaller, gram_norm, gram_reduction, with_zeros
from jaxhess.operators.jacobian import OutputJacobian, times_curvature
from jaxhess.operators.mapped import Inertia, count_signs
from jaxhess.operators.paths import Selection, find, leaves_like, paths_of
from jaxhess.operators.reduction import Reduction, dense_reduction
from jaxhess.operators.solvable import Solvable
from jaxhess.operators.support import (
    as_scalar,
    as_tags,
    check_operator_fits,
    describe,
    scaled_tags,
    shape_text,
    sign_of,
)

__all__ = ["GaussNewton"]

_CHUNK_BYTES = 2**26


class GaussNewton(Solvable, StructuredOperator):
    """G over a tree of parameters: `jacobians` has an `OutputJacobian` at each leaf, `curvature` is B as in
    `GaussNewtonBlock`; `factor` multiplies it.

    Vectors are trees of the parameters' structure; `as_matrix` has the order of `jax.flatten_util.ravel_pytree`.
    `G["layer"]["w"]["out"]["b"]`, or `G.block("layer/w", "out/b")`, is the block from b to w: the keys lead to the rows'
    parameter first, then to the columns'. `G.block("layer/w")` is a diagonal block.

    >>> import jax.numpy as jnp, jaxhess
    >>> def model(p, x):
    ...     return p["w"] @ x + p["b"]
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}
    >>> G = jaxhess.gauss_newton(model, jaxhess.losses.squared_error, blocks="full")(params, jnp.eye(3), jnp.ones((3, 2)))
    >>> G.as_matrix().shape, G["w"]["b"].as_matrix().shape, type(G.block("w")).__name__
    ((8, 8), (6, 2), 'GaussNewtonBlock')
    """

    jacobians: PyTree
    curvature: Array | None
    factor: Array

    def __init__(self, jacobians: PyTree, curvature: Array | None, factor: Any = 1, tags: Any = None):
        self.jacobians, self.curvature = jacobians, curvature
        leaves = self._leaves()
        if not leaves:
            raise InputError("GaussNewton: there is no parameter")
        self.factor = as_scalar("GaussNewton", factor, jnp.result_type(*(J.dtype for J in leaves)))
        self.tags = as_tags(lx.positive_semidefinite_tag if tags is None else tags) | {lx.symmetric_tag}

    def in_structure(self):
        return jax.tree.map(lambda J: J.structure, self.jacobians, is_leaf=_is_jacobian)

    def out_structure(self):
        return self.in_structure()

    def mv(self, vector):
        parts = leaves_like("GaussNewton.mv", self.in_structure(), vector)
        products = _product(tuple(self._leaves()), self.curvature, self.factor, tuple(parts))
        return jax.tree.unflatten(jax.tree.structure(self.jacobians, is_leaf=_is_jacobian), products)

    def as_matrix(self):
        check_operator_fits(self)
        return cross_matrix(tuple(self._leaves()), None, self.curvature, self.factor)

    def transpose(self):
        return self

    def diagonal(self):
        return self._map(lambda J: self._block(J, J).diagonal())

    def trace(self):
        return sum((jnp.sum(d) for d in jax.tree.leaves(self.diagonal())), jnp.zeros((), self.factor.dtype))

    def frobenius_norm(self):
        if gram_is_smaller(self._leaves(), self.in_size()):
            return gram_norm(tuple(self._leaves()), self.curvature, self.factor)
        return _mapped_norm(self)

    def scaled(self, factor):
        scaled = self.factor * as_scalar("GaussNewton", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self) -> Array:
        """All N eigenvalues in ascending order; where there are fewer outputs of all examples than parameters, by way of
        the Gram matrix (rM, rM)."""
        if not gram_is_smaller(self._leaves(), self.in_size()):
            return jnp.linalg.eigvalsh(self.as_matrix())
        return with_zeros(gram_eigenvalues(tuple(self._leaves()), self.curvature, self.factor), self.in_size())

    def inertia(self, tolerance: Any = None) -> Inertia:
        """How many eigenvalues are above `tolerance`, below `-tolerance`, and between; see `CurvatureOperator.inertia`."""
        if not gram_is_smaller(self._leaves(), self.in_size()):
            return count_signs(self.eigvalsh(), self.in_size(), tolerance)
        return count_signs(gram_eigenvalues(tuple(self._leaves()), self.curvature, self.factor), self.in_size(), tolerance)

    def block(self, row: Any = (), column: Any = None) -> Any:
        """The block of two parameters, from that at `column` to that at `row`: paths such as `"layer/w"`, tuples of keys, or
        JAX key paths. Without `column`, the diagonal block at `row`.

        Raises `KeyError`, with what is there, if there is no parameter at a path.
        """
        paths, leaves = paths_of(self.jacobians, _is_jacobian), self._leaves()
        i = find(paths, row)
        return self._block(leaves[i], leaves[i if column is None else find(paths, column)])

    def __getitem__(self, key: Any) -> Any:
        return Selection(self.block, self.jacobians, _is_jacobian)[key]

    def _reduced_size(self):
        J = self._leaves()[0]
        return min(J.examples * J.outputs, self.in_size())

    def _reduction(self):
        return self.reduction_of("gram" if gram_is_smaller(self._leaves(), self.in_size()) else "normal")

    def reduction_of(self, form: str) -> Reduction:
        """The matrix that solving factors: that of the outputs of all examples ("gram", (rM, rM)), or that of the parameters
        ("normal", (N, N))."""
        leaves = self._leaves()
        if form == "normal":
            return dense_reduction(self)
        treedef = jax.tree.structure(self.jacobians, is_leaf=_is_jacobian)
        return gram_reduction(tuple(leaves), self.curvature, self.factor, treedef)

    def _absorb(self, dampings):
        positive = all(sign_of(d) in (None, 1) for d in dampings)
        if not positive or not gram_is_smaller(self._leaves(), self.in_size()):
            return super()._absorb(dampings)
        scales = [1 / jnp.sqrt(jnp.asarray(d, J.dtype)) for d, J in zip(dampings, self._leaves(), strict=True)]
        scaled = [
            dataclasses.replace(J, uses=tuple(dataclasses.replace(use, scale=use.scale * s) for use in J.uses))
            for J, s in zip(self._leaves(), scales, strict=True)
        ]
        treedef = jax.tree.structure(self.jacobians, is_leaf=_is_jacobian)
        jacobians = jax.tree.unflatten(treedef, scaled)
        return dataclasses.replace(self, jacobians=jacobians), 1.0, scales

    def _block(self, row: OutputJacobian, column: OutputJacobian) -> Any:
        if row is column:
            return GaussNewtonBlock(row, self.curvature, self.factor, self.tags)
        return GaussNewtonCrossBlock(row, column, self.curvature, self.factor)

    def _leaves(self) -> list[OutputJacobian]:
        return jax.tree.leaves(self.jacobians, is_leaf=_is_jacobian)

    def _map(self, function: Any) -> PyTree:
        return jax.tree.map(function, self.jacobians, is_leaf=_is_jacobian)

    def _plus(self, other):
        return None

    def __repr__(self):
        leaves = self._leaves()
        contents = [f"{len(leaves)} parameters", f"r={leaves[0].examples}", f"M={leaves[0].outputs}"]
        return describe(self, *contents, f"B {shape_text(self.curvature)}")


@jax.jit
def _product(
    jacobians: tuple[OutputJacobian, ...], curvature: Array | None, factor: Array, vectors: tuple[Array, ...]
) -> list[Array]:
    pushed = sum(
        (J.push(v) for J, v in zip(jacobians, vectors, strict=True)),
        jnp.zeros((jacobians[0].examples, jacobians[0].outputs), factor.dtype),
    )
    curved = (factor / jacobians[0].examples) * times_curvature(curvature, pushed)
    return [J.pull(curved.astype(J.dtype)) for J in jacobians]


@jax.jit
def _mapped_norm(operator: GaussNewton) -> Array:
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), operator.in_structure())
    flat, unravel = ravel_pytree(zeros)

    def column(i: Array) -> Array:
        return jnp.sum(ravel_pytree(operator.mv(unravel(flat.at[i].set(1))))[0] ** 2)

    needed = flat.dtype.itemsize * (flat.size + operator._leaves()[0].examples * operator._leaves()[0].outputs)
    batch = max(1, min(flat.size, _CHUNK_BYTES // needed))
    return jnp.sqrt(jnp.sum(jax.lax.map(column, jnp.arange(flat.size), batch_size=batch)))


def _is_jacobian(node: Any) -> bool:
    return isinstance(node, OutputJacobian)
