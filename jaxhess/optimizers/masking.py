"""Parameters that are left out: `optax.masked` and `optax.partition` put a node without leaves in the place of each, or of a
whole part of the tree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhess._typing import InputError, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.full import FullHessian
from jaxhess.operators.gauss_newton_full import GaussNewton
from jaxhess.operators.paths import leaves_like, paths_of
from jaxhess.optimizers.products import LinearisedGaussNewton

__all__ = ["completed", "kept_entries", "product_of_kept", "restricted"]


def restricted(name: str, curvature: Any, structure: PyTree) -> Any:
    """The curvature of the parameters in `structure`; itself, checked, where none is left out. Of a function that makes the
    curvature, one that makes the restricted one; a `FullHessian` stays whole (`kept_entries` says what of it is asked for).

    Raises `InputError`, naming the path, where its parameters are not those of the gradients.
    """
    if not hasattr(curvature, "in_structure"):
        if not callable(curvature):
            raise InputError(f"{name}: curvature must be an operator, got {type(curvature).__name__}")
        return lambda: restricted(name, curvature(), structure)
    own, what = curvature.in_structure(), f"{name}, curvature= against the gradients"
    if not any(map(_is_masked, jax.tree.leaves(structure, is_leaf=_is_masked))):
        leaves_like(what, structure, own)
        return curvature
    if jax.tree.structure(own) == jax.tree.structure(structure):
        leaves_like(what, structure, own)
        return curvature
    shapes = _mapped(name, lambda _, s: s, structure, own)
    leaves_like(what, structure, shapes)
    if isinstance(curvature, BlockDiagonal):
        blocks = _mapped(name, lambda _, block: block, structure, curvature.blocks)
        return BlockDiagonal(blocks, curvature.tags, _layers_of_kept(curvature, structure))
    if isinstance(curvature, GaussNewton):
        return dataclasses.replace(curvature, jacobians=_mapped(name, lambda _, J: J, structure, curvature.jacobians))
    if isinstance(curvature, FullHessian):
        return curvature
    if isinstance(curvature, LinearisedGaussNewton):
        blocks = None if curvature.blocks is None else restricted(name, curvature.blocks, structure)
        push = jax.tree_util.Partial(_push_kept, curvature.push, curvature.structure)
        kept = _mapped(name, lambda _, w: w, structure, curvature.structure)
        return dataclasses.replace(curvature, push=push, structure=kept, blocks=blocks)
    raise InputError(f"{name}: of a {type(curvature).__name__} the part of some parameters cannot be taken; give blocks")


def _layers_of_kept(curvature: BlockDiagonal, structure: PyTree) -> list[tuple[int, int]]:
    """The weights and biases of one layer of which both are kept, by their places among what is."""
    kept = _are_kept(structure, curvature.in_structure())
    place = np.cumsum(kept) - 1
    return [(int(place[w]), int(place[b])) for w, b in curvature.layers if kept[w] and kept[b]]


def _are_kept(structure: PyTree, whole: PyTree) -> list[bool]:
    """Of each leaf of `whole`, whether `structure` has it."""

    def of(node: Any, part: PyTree) -> list[bool]:
        return [not _is_masked(node) for _ in jax.tree.leaves(part)]

    return jax.tree.leaves(jax.tree.map(of, structure, whole, is_leaf=_is_masked))


def _push_kept(push: Any, whole: PyTree, vector: PyTree) -> PyTree:
    return push(completed("push", vector, jax.tree.map(jnp.zeros_like, whole)))


def kept_entries(structure: PyTree, whole: PyTree) -> np.ndarray | None:
    """The places, among all entries of `whole` in the order of `ravel_pytree`, of what `structure` has; None for all."""
    if jax.tree.structure(structure) == jax.tree.structure(whole):
        return None
    return np.flatnonzero(np.repeat(_are_kept(structure, whole), [leaf.size for leaf in jax.tree.leaves(whole)]))


def completed(name: str, params: PyTree, all_params: PyTree) -> PyTree:
    """The parameters with those that are left out put back from `all_params`."""
    if not any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        return params
    if all_params is None:
        raise InputError(
            f"{name}: value_fn takes all parameters, of which some are masked: there are {paths_of(params)}. Pass "
            "all_params=params to update as well"
        )
    return _mapped(name, lambda node, whole: whole if _is_masked(node) else node, params, all_params, keep_masked=False)


def product_of_kept(name: str, product: Callable[[PyTree], PyTree], vector: PyTree, all_params: PyTree) -> PyTree:
    """What a product with a matrix of all parameters gives for those of `vector`, the others being zero."""
    if not any(map(_is_masked, jax.tree.leaves(vector, is_leaf=_is_masked))):
        return product(vector)
    zeros = None if all_params is None else jax.tree.map(jnp.zeros_like, all_params)
    return _mapped(name, lambda _, part: part, vector, product(completed(name, vector, zeros)))


def _mapped(name: str, function: Any, structure: PyTree, whole: PyTree, keep_masked: bool = True) -> PyTree:
    """`function(leaf, part)` for each leaf of `structure` and what `whole` has there, masked nodes kept as they are."""

    def at(node: Any, part: Any) -> Any:
        return node if keep_masked and _is_masked(node) else function(node, part)

    try:
        return jax.tree.map(at, structure, whole, is_leaf=_is_masked)
    except ValueError as error:
        raise InputError(
            f"{name}: the parameters, some of them masked, do not match: {jax.tree.structure(structure)} against "
            f"{paths_of(whole)}"
        ) from error


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)
