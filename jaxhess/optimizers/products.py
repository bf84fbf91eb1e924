"""Gauss-Newton matrices by products alone, for networks with more outputs and parameters than can be factored.

    G v = (1/r) sum_i J_i^T B_i J_i v           linearised once: a pass forward and a pass backward for each product

What `jaxhess.gauss_newton` holds, V = d(output)/dy of every layer, is M times as much as the pass itself reads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import widened
from jaxhess._typing import Array, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.preconditioner import register_semidefinite
from jaxhess.operators.vectors import dtype_of

__all__ = ["LinearisedGaussNewton", "linearised_gauss_newton"]


class LinearisedGaussNewton(lx.AbstractLinearOperator):
    """G as the composition of linear maps: `push` J, `curve` B, and J's transpose. `blocks`, where they are known, are
    estimates of its diagonal blocks, to make a preconditioner of."""

    push: Any
    curve: Any
    scale: Array
    structure: Any
    blocks: BlockDiagonal | None

    def mv(self, vector: PyTree) -> PyTree:
        structure = self.in_structure()
        pull = jax.linear_transpose(self.push, structure)
        (product,) = pull(self.curve(self.push(vector)))
        return jax.tree.map(lambda x, s: (self.scale * x).astype(s.dtype), product, structure)

    def as_matrix(self) -> Array:
        """Not formed; `jaxhess.gauss_newton` gives an operator that can be."""
        raise NotImplementedError("a LinearisedGaussNewton has products only; jaxhess.gauss_newton gives the matrix")

    def transpose(self) -> "LinearisedGaussNewton":
        return self

    def in_structure(self) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.structure)

    def out_structure(self) -> PyTree:
        return self.in_structure()


def linearised_gauss_newton(
    model: Callable[..., Any], loss: Callable[..., Array], params: PyTree, xs: PyTree, *targets: PyTree,
    blocks: BlockDiagonal | None = None,
) -> LinearisedGaussNewton:  # fmt: skip
    """The Gauss-Newton matrix of the mean loss at `params`, for products."""
    wide = jax.tree.map(widened, params)

    def outputs(wide: PyTree) -> PyTree:
        return jax.vmap(model, (None, 0))(jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params), xs)

    def slope(outputs: PyTree) -> PyTree:
        return jax.grad(lambda outputs: jnp.sum(jax.vmap(loss)(outputs, *targets)))(outputs)

    at, push = jax.linearize(outputs, wide)
    _, curve = jax.linearize(slope, at)
    examples = jax.tree.leaves(xs)[0].shape[0]
    scale = jnp.asarray(1 / examples, dtype_of(wide))
    return LinearisedGaussNewton(push, curve, scale, wide, blocks)


register_semidefinite(LinearisedGaussNewton)
