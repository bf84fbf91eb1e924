"""The block-diagonal Hessian of a whole network: one curvature operator for each parameter.

    H = diag(H_1, H_2, ...)       blocks in the order of the parameters' leaves, as in `jax.flatten_util.ravel_pytree`

The blocks sit in a tree of the parameters' own structure, so `H["layer"]["w"]` is where `params["layer"]["w"]` is.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import format_bytes
from jaxhess._typing import InputError, PyTree
from jaxhess.operators.base import CurvatureOperator, StructuredOperator, sum_of
from jaxhess.operators.mapped import Inertia
from jaxhess.operators.paths import children_of, key_of, leaves_like, unwrapped
from jaxhess.operators.support import (
    as_tags,
    check_operator_fits,
    common_tags,
    leaf_bytes,
    scaled_tags,
    transposed_tags,
)


class BlockDiagonal(StructuredOperator):
    """A block-diagonal operator on a tree of parameters: `blocks` has a `CurvatureOperator` at each leaf.

    Vectors are trees of the parameters' structure. `H[key]` descends one level, `H.block("layer/w")` several; a leaf
    gives its operator, a subtree a `BlockDiagonal`. Symmetric or positive semidefinite if every block is. Raises
    `InputError` if a leaf is no `CurvatureOperator` or if there is none.

    >>> import jax.numpy as jnp
    >>> from jaxhess.operators import Diagonal
    >>> H = BlockDiagonal({"w": Diagonal(jnp.ones((2, 3))), "b": Diagonal(jnp.array([2.0, -1.0]))})
    >>> H.mv({"w": jnp.ones((2, 3)), "b": jnp.ones(2)})["b"].tolist()
    [2.0, -1.0]
    >>> H["w"].trace().item(), H.trace().item()
    (6.0, 7.0)
    """

    blocks: PyTree

    def __init__(self, blocks: PyTree, tags: Any = ()):
        self.blocks = blocks
        operators = []
        for path, operator in self.items():
            if not isinstance(operator, CurvatureOperator):
                raise InputError(f"BlockDiagonal: the block {path!r} is a {type(operator).__name__}, not an operator")
            operators.append(operator)
        if not operators:
            raise InputError("BlockDiagonal: there is no block")
        self.tags = as_tags(tags) | common_tags(operators)

    def in_structure(self):
        return self._map(lambda operator: operator.in_structure())

    def out_structure(self):
        return self._map(lambda operator: operator.out_structure())

    def mv(self, vector):
        parts = leaves_like("BlockDiagonal.mv", self.in_structure(), vector)
        results = [operator.mv(part) for operator, part in zip(self._operators(), parts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self.blocks, is_leaf=_is_operator), results)

    def as_matrix(self):
        for path, operator in self.items():
            check_operator_fits(operator, f" of {path!r}")
        check_operator_fits(self)
        return jax.scipy.linalg.block_diag(*(operator.as_matrix() for operator in self._operators()))

    def transpose(self):
        if lx.is_symmetric(self):
            return self
        return BlockDiagonal(self._map(lambda operator: operator.transpose()), transposed_tags(self.tags))

    def diagonal(self):
        return self._map(lambda operator: operator.diagonal())

    def trace(self):
        return sum_of(operator.trace() for operator in self._operators())

    def frobenius_norm(self):
        return jnp.sqrt(sum_of(operator.frobenius_norm() ** 2 for operator in self._operators()))

    def scaled(self, factor):
        return BlockDiagonal(self._map(lambda operator: operator.scaled(factor)), scaled_tags(self.tags, factor))

    def eigvalsh(self):
        """All eigenvalues of all blocks in ascending order, (N,)."""
        return jnp.sort(jnp.concatenate([operator.eigvalsh() for operator in self._operators()]))

    def inertia(self, tolerance: Any = None) -> Inertia:
        """The inertia, summed over the blocks; the default tolerance is each block's own."""
        counts = [operator.inertia(tolerance) for operator in self._operators()]
        return Inertia(*(sum_of(count) for count in zip(*counts, strict=True)))

    def items(self) -> Iterator[tuple[str, CurvatureOperator]]:
        """The blocks with their paths, such as `"layer/w"`, in the order of the parameters' leaves."""
        for path, operator in jax.tree_util.tree_leaves_with_path(self.blocks, is_leaf=_is_operator):
            yield "/".join(str(key_of(entry)) for entry in path), operator

    def block(self, path: Any) -> Any:
        """The block, or the part of the tree, at `path`: `"layer/w"`, a tuple of keys, or a JAX key path.

        Raises `KeyError`, with what is there, if there is nothing at `path`.
        """
        if isinstance(path, str):
            exact = dict(self.items())
            if path in exact:
                return exact[path]
            path = path.split("/")
        node = self.blocks
        for depth, entry in enumerate(path):
            key, children = key_of(entry), children_of(node, _is_operator)
            if isinstance(node, tuple | list) and isinstance(key, int) and -len(node) <= key < len(node):
                node = node[key]
            elif str(key) in children:
                node = children[str(key)]
            else:
                here = "/".join(str(key_of(entry)) for entry in path[:depth])
                raise KeyError(f"no block {str(key)!r} at {here!r}; there is {', '.join(children) or 'nothing below'}")
        node = unwrapped(node, _is_operator)
        return node if _is_operator(node) else BlockDiagonal(node)

    def __getitem__(self, key: Any) -> Any:
        return self.block((key,))

    def _operators(self) -> list[CurvatureOperator]:
        return jax.tree.leaves(self.blocks, is_leaf=_is_operator)

    def _map(self, function: Callable[[CurvatureOperator], Any]) -> PyTree:
        return jax.tree.map(function, self.blocks, is_leaf=_is_operator)

    def _plus(self, other):
        if not isinstance(other, BlockDiagonal):
            return None
        return BlockDiagonal(jax.tree.map(lambda a, b: a + b, self.blocks, other.blocks, is_leaf=_is_operator))

    def __repr__(self):
        lines = [f"  {path}: {operator!r}" for path, operator in self.items()]
        total = format_bytes(sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(self.blocks)))
        return "\n".join([f"BlockDiagonal({len(lines)} blocks, {total}", *lines]) + ")"


def _is_operator(node: Any) -> bool:
    return isinstance(node, StructuredOperator)
