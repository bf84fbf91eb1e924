"""Gauss-Newton matrices by products alone, for networks with more outputs and parameters than can be factored.

    G v = (1/r) sum_i J_i^T B_i J_i v           linearised once: a pass forward and a pass backward for each product
    u^T G v = (1/r) sum_i (J_i u)^T B_i J_i v   a pass forward

What `jaxhess.gauss_newton` holds, V = d(output)/dy of every layer, is M times as much as the pass itself reads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.extend.core import Jaxpr

from jaxhess._linalg import matmul, widened
from jaxhess._typing import Array, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.preconditioner import register_semidefinite
from jaxhess.operators.vectors import dtype_of

__all__ = ["LinearisedGaussNewton", "value_grad_and_linearised"]


class LinearisedGaussNewton(lx.AbstractLinearOperator):
    """G as the composition of linear maps: `push` J, `curve` B, and J's transpose. `blocks`, where they are known, are
    estimates of its diagonal blocks, to make a preconditioner of."""

    push: Any
    curve: Any
    scale: Array
    structure: Any
    blocks: BlockDiagonal | None

    def mv(self, vector: PyTree) -> PyTree:
        return self.pulled(self.curve(self.push(vector)))

    def pulled(self, cotangents: PyTree) -> PyTree:
        """(1/r) J^T u."""
        structure = self.in_structure()
        (product,) = jax.linear_transpose(self.push, structure)(cotangents)
        return jax.tree.map(lambda x, s: (self.scale * x).astype(s.dtype), product, structure)

    def forms(self, vectors: PyTree) -> Array:
        """u_i^T G u_j for all pairs of k vectors, leaves (k, ..): (k, k)."""
        pushed = jax.vmap(self.push)(vectors)
        rows = [(x.reshape(len(x), -1), y.reshape(len(y), -1)) for x, y in _pairs(pushed, jax.vmap(self.curve)(pushed))]
        parts = [matmul(x, y.T).astype(self.scale.dtype) for x, y in rows]
        total = sum(parts, start=jnp.zeros_like(parts[0]))
        return self.scale * (total + total.T) / 2

    def as_matrix(self) -> Array:
        """Not formed; `jaxhess.gauss_newton` gives an operator that can be."""
        raise NotImplementedError("a LinearisedGaussNewton has products only; jaxhess.gauss_newton gives the matrix")

    def transpose(self) -> "LinearisedGaussNewton":
        return self

    def in_structure(self) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.structure)

    def out_structure(self) -> PyTree:
        return self.in_structure()


def value_grad_and_linearised(
    model: Callable[..., Any], loss: Callable[..., Array], params: PyTree, xs: PyTree, *targets: PyTree,
    blocks: BlockDiagonal | None = None,
) -> tuple[Array, PyTree, LinearisedGaussNewton]:  # fmt: skip
    """The mean loss at `params`, its gradient, and the Gauss-Newton matrix for products, by one pass through the network."""
    wide = jax.tree.map(widened, params)

    def outputs(wide: PyTree) -> PyTree:
        return jax.vmap(model, (None, 0))(jax.tree.map(lambda w, p: w.astype(p.dtype), wide, params), xs)

    def slope(outputs: PyTree) -> tuple[PyTree, Array]:
        def total(outputs: PyTree) -> tuple[Array, Array]:
            losses = jax.vmap(loss)(outputs, *targets)
            return jnp.sum(losses), jnp.mean(losses)

        return jax.grad(total, has_aux=True)(outputs)

    at, push = _tangent_map(outputs, wide)
    slopes, curve, value = jax.linearize(slope, at, has_aux=True)
    examples = jax.tree.leaves(xs)[0].shape[0]
    scale = jnp.asarray(1 / examples, dtype_of(wide))
    operator = LinearisedGaussNewton(push, curve, scale, wide, blocks)
    gradient = jax.tree.map(lambda g, p: g.astype(p.dtype), operator.pulled(slopes), params)
    return value, gradient, operator


def _tangent_map(function: Callable[[PyTree], PyTree], point: PyTree) -> tuple[PyTree, Any]:
    """The value and the tangent map; a `custom_vjp` function has none but the transpose of its own reverse pass."""
    if not _reverse_only(jax.make_jaxpr(function)(point).jaxpr):
        return jax.linearize(function, point)
    value, pull = jax.vjp(function, point)
    return value, jax.tree_util.Partial(_transposed, pull, value)


def _transposed(pull: Any, value: PyTree, tangents: PyTree) -> PyTree:
    return jax.linear_transpose(lambda cotangents: pull(cotangents)[0], value)(tangents)[0]


def _reverse_only(jaxpr: Jaxpr) -> bool:
    """Whether a `custom_vjp` function is called anywhere but within a `custom_jvp` one, whose own rule is taken."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith("custom_vjp"):
            return True
        for parameter in () if name.startswith("custom_jvp") else equation.params.values():
            for each in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(each, "jaxpr", each)
                if isinstance(inner, Jaxpr) and _reverse_only(inner):
                    return True
    return False


def _pairs(a: PyTree, b: PyTree) -> list[tuple[Array, Array]]:
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


register_semidefinite(LinearisedGaussNewton)
