"""A small problem over one long vector in the place of a tree: one operation for each of a tree's many.

The arithmetic of vectors is most of what an update of a small network compiles and calls. Large vectors stay trees, whose
leaves keep how they are sharded and are not copied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxhess._typing import Array, PyTree
from jaxhess.optimizers.method import Direction, Method
from jaxhess.optimizers.quadratic import Quadratic

__all__ = ["flattened", "flattening"]

_MOST = 2**18


def flattening(vector: PyTree) -> tuple[Callable[[PyTree], Array], Callable[[Array], PyTree]] | None:
    """How trees like `vector` become one array and back; None where they had better stay what they are: a single leaf, many
    entries, or different dtypes."""
    leaves = jax.tree.leaves(vector)
    uniform = len({leaf.dtype for leaf in leaves}) == 1
    if len(leaves) < 2 or not uniform or sum(leaf.size for leaf in leaves) > _MOST:
        return None
    unravel = ravel_pytree(vector)[1]
    return lambda tree: jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]), unravel


def flattened(
    method: Method, model: Quadratic, ravel: Callable[[PyTree], Array], unravel: Callable[[Array], PyTree]
) -> tuple[Method, Quadratic]:
    """The method and the quadratic model, of arrays in the place of trees."""
    forms = model.forms
    flat = Quadratic(
        ravel(model.gradient),
        lambda vector: ravel(model.multiply(unravel(vector))),
        None if forms is None else lambda vectors: forms(jax.vmap(unravel)(vectors)),
    )
    return _Flattened(method, ravel, unravel), flat


@dataclasses.dataclass(frozen=True)
class _Flattened(Method):
    """A method whose gradients and steps are arrays."""

    inner: Method
    ravel: Callable[[PyTree], Array]
    unravel: Callable[[Array], PyTree]

    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        return self.inner.prepare(curvature, structure, memory, count, decay)

    def solver(self, prepared: Any) -> str:
        return self.inner.solver(prepared)

    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        begun = self.unravel(start) if isinstance(start, jax.Array) else start
        found = self.inner.direction(prepared, self.unravel(gradient), damping, begun)
        return found._replace(step=self.ravel(found.step))

    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        return self.ravel(self.inner.product(prepared, self.unravel(vector)))
