"""Where a parameter is in a tree, and how the keys of two of them lead to a block between them."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import DenseTooLargeError, InputError, NotConvergedError, PyTree, SingularError

__all__ = [
    "Selection",
    "below",
    "children_of",
    "find",
    "key_of",
    "leaves_like",
    "naming",
    "paths_of",
    "spread",
    "unwrapped",
    "within",
]

_WITHIN: contextvars.ContextVar[str] = contextvars.ContextVar("within", default="")

IsLeaf = Callable[[Any], bool] | None


def key_of(entry: Any) -> Any:
    """The bare key of an entry of a JAX key path; anything else is a key already."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def joined(path: Sequence[Any]) -> str:
    """Keys as one text, `"layer/w"`."""
    return "/".join(str(key_of(entry)) for entry in path)


def paths_of(tree: PyTree, is_leaf: IsLeaf = None) -> list[str]:
    """The paths of a tree's leaves, in their order: `["layer/b", "layer/w"]`."""
    return [joined(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def find(paths: Sequence[str], path: Any) -> int:
    """The place of a path, given as text, as a tuple of keys or as a JAX key path. Raises `KeyError` with what there is."""
    text = path if isinstance(path, str) else joined(path if isinstance(path, tuple | list) else (path,))
    if text not in paths:
        raise KeyError(f"no parameter {text!r}; there is {', '.join(map(repr, paths))}")
    return paths.index(text)


def below(tree: PyTree, paths: Sequence[Any]) -> tuple[tuple[int, ...], PyTree]:
    """The places of the leaves at or below some paths, and the subtree there, or the tuple of them for several paths. Raises
    `KeyError` with what there is."""
    names = paths_of(tree)
    numbered = jax.tree.unflatten(jax.tree.structure(tree), list(range(len(names))))
    subtrees = []
    for path in paths:
        text = path if isinstance(path, str) else joined(path if isinstance(path, tuple | list) else (path,))
        node = numbered
        for key in () if text in names else text.split("/"):
            children = children_of(node)
            if key not in children:
                raise KeyError(f"nothing at {text!r}; there is {', '.join(map(repr, names))}")
            node = children[key]
        subtrees.append(names.index(text) if text in names else node)
    chosen = subtrees[0] if len(subtrees) == 1 else tuple(subtrees)
    leaves = jax.tree.leaves(tree)
    return tuple(jax.tree.leaves(chosen)), jax.tree.map(lambda n: leaves[n], chosen)


def leaves_like(what: str, structure: PyTree, vector: PyTree) -> list[Any]:
    """The leaves of a vector, which must be a tree like `structure` (a tree of shapes), in their shapes.

    Raises `InputError` naming what is missing, has another shape, or is complex.
    """
    shapes, expected = jax.tree.flatten(structure)
    leaves, given = jax.tree.flatten(vector)
    if expected == given and all(
        jnp.shape(leaf) == s.shape and not jnp.iscomplexobj(leaf) for leaf, s in zip(leaves, shapes, strict=True)
    ):
        return leaves
    paths = paths_of(structure)
    if expected != given:
        found = paths_of(vector)
        missing = [path for path in paths if path not in found]
        unexpected = [path for path in found if path not in paths]
        raise InputError(
            f"{what}: the structures differ: missing {missing or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'}, got {given}"
        )
    for path, leaf, shape in zip(paths, leaves, shapes, strict=True):
        if jnp.shape(leaf) != shape.shape:
            raise InputError(f"{what}: {path!r} needs shape {shape.shape}, got shape {jnp.shape(leaf)}")
        if jnp.iscomplexobj(leaf):
            raise InputError(f"{what}: {path!r} is complex; apply the product to the real and imaginary parts")
    return leaves


def spread(what: str, damping: Any, structure: PyTree) -> list[Any]:
    """One number for each leaf of `structure`, from a number for all or from a tree that leads it. Raises `InputError` for
    other trees and for arrays that are no scalars."""
    leaves, treedef = jax.tree.flatten(structure)
    if damping is None or (jax.tree.structure(damping) == jax.tree.structure(0) and treedef.num_leaves):
        dampings = [damping] * len(leaves)
    else:
        try:
            tree = jax.tree.map(lambda d, below: jax.tree.map(lambda _: d, below), damping, structure)
        except ValueError as error:
            raise InputError(
                f"{what}: the damping must be a number or a tree of numbers that leads the parameters'; it has the "
                f"structure {jax.tree.structure(damping)}, the parameters {paths_of(structure)}"
            ) from error
        dampings = jax.tree.leaves(tree)
    for path, each in zip(paths_of(structure), dampings, strict=True):
        if each is not None and jnp.ndim(each) != 0:
            raise InputError(f"{what}: the damping of {path!r} must be a number, got an array of shape {jnp.shape(each)}")
    return dampings


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors from within say which block they are about, those of compiled code too."""
    token = _WITHIN.set(f"{within()}block {path!r}: ")
    try:
        yield
    except (InputError, DenseTooLargeError, SingularError, NotConvergedError) as error:
        raise type(error)(f"block {path!r}: {error}") from error
    finally:
        _WITHIN.reset(token)


def within() -> str:
    """How messages begin that are made now and raised later."""
    return _WITHIN.get()


def children_of(node: Any, is_leaf: IsLeaf = None) -> dict[str, Any]:
    """The children of one node of a tree, by key: dicts, sequences, named tuples and dataclasses alike."""
    if is_leaf is not None and is_leaf(node):
        return {}
    pairs = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    return {str(key_of(path[0])): child for path, child in pairs if path and child is not None}


def unwrapped(node: Any, is_leaf: IsLeaf = None) -> Any:
    """The leaf in a box of a framework, `nnx.Param` say: a node that is no container and has nothing but a `value`."""
    children = children_of(node, is_leaf)
    boxed = list(children) == ["value"] and not isinstance(node, dict | list | tuple)
    return children["value"] if boxed and not children_of(children["value"], is_leaf) else node


class Selection:
    """Some of the keys that lead to the block `choose(row, column)`: first those of the rows' parameter, then those of the
    columns'; `H["layer"]["w"]["out"]["b"]` is the block from out/b to layer/w.

    `tree` is a tree of the parameters' structure.
    """

    def __init__(
        self,
        choose: Callable[[str, str], Any],
        tree: PyTree,
        is_leaf: IsLeaf = None,
        row: str | None = None,
        taken: tuple[str, ...] = (),
        node: Any = None,
    ) -> None:
        self._choose, self._tree, self._is_leaf, self._row, self._taken = choose, tree, is_leaf, row, taken
        self._node = node if taken else tree

    def __getitem__(self, key: Any) -> Any:
        children = children_of(self._node, self._is_leaf)
        name = str(key_of(key))
        if isinstance(self._node, tuple | list) and isinstance(key, int) and -len(self._node) <= key < 0:
            name = str(key + len(self._node))
        if name == "value" and not self._taken and self._row is not None and self._row.endswith("/value"):
            return self
        if name not in children:
            raise KeyError(f"no parameter {name!r} at {'/'.join(self._taken)!r}; there is {', '.join(children)}")
        node, taken = children[name], (*self._taken, name)
        if unwrapped(node, self._is_leaf) is not node:
            node, taken = unwrapped(node, self._is_leaf), (*taken, "value")
        if children_of(node, self._is_leaf):
            return Selection(self._choose, self._tree, self._is_leaf, self._row, taken, node)
        if self._row is None:
            return Selection(self._choose, self._tree, self._is_leaf, "/".join(taken))
        return self._choose(self._row, "/".join(taken))

    def __repr__(self) -> str:
        here = "/".join(self._taken)
        below = ", ".join(children_of(self._node, self._is_leaf))
        rows = "" if self._row is None else f"rows {self._row!r}, "
        return f"Selection({rows}{'rows' if self._row is None else 'columns'} at {here!r}: {below})"
