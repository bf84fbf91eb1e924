"""`H + D` with a damping for each parameter: D has the number d_k times the identity at parameter k."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array
from jaxhess.operators.base import StructuredOperator, sum_of
from jaxhess.operators.functions import provides
from jaxhess.operators.reduction import ravel
from jaxhess.operators.solvable import Solvable
from jaxhess.operators.support import as_tags, check_operator_fits, describe

__all__ = ["Damped"]


@provides("damped")
class Damped(Solvable, StructuredOperator):
    """`operator + D`: the symmetric operator on a tree, `dampings` a number for each of its leaves, in their order.

    >>> import jax.numpy as jnp, jaxhess
    >>> params = {"b": jnp.ones(2), "w": jnp.ones((2, 3))}
    >>> H = jaxhess.hessian(lambda p, x: p["b"] @ (p["w"] @ x), blocks="full")(params, jnp.eye(3))
    >>> Damped(H, [1.0, 2.0]).trace().item(), H.solve(params, {"b": 1.0, "w": 2.0})["w"].shape
    (14.0, (2, 3))
    """

    operator: Any
    dampings: list[Array]

    def __init__(self, operator: Any, dampings: Any, tags: Any = ()):
        self.operator = operator
        leaves = jax.tree.leaves(operator.in_structure())
        self.dampings = [jnp.asarray(d, leaf.dtype) for d, leaf in zip(dampings, leaves, strict=True)]
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        return self.operator.in_structure()

    def out_structure(self):
        return self.in_structure()

    def _damped(self, vector: Any) -> Any:
        leaves, treedef = jax.tree.flatten(vector)
        return jax.tree.unflatten(treedef, [d * jnp.asarray(v) for d, v in zip(self.dampings, leaves, strict=True)])

    def mv(self, vector):
        return jax.tree.map(jnp.add, self.operator.mv(vector), self._damped(vector))

    def as_matrix(self):
        check_operator_fits(self)
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), self.in_structure())
        return self.operator.as_matrix() + jnp.diag(ravel(self._damped(ones)))

    def transpose(self):
        return self

    def diagonal(self):
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), self.in_structure())
        return jax.tree.map(jnp.add, self.operator.diagonal(), self._damped(ones))

    def trace(self):
        return sum_of(jnp.sum(d) for d in jax.tree.leaves(self.diagonal()))

    def frobenius_norm(self):
        return jnp.linalg.norm(self.as_matrix())

    def scaled(self, factor):
        return Damped(self.operator.scaled(factor), [d * factor for d in self.dampings])

    def _plus(self, other):
        return None

    def __repr__(self):
        return describe(self, f"dampings {len(self.dampings)}", f"of {self.operator!r}")
