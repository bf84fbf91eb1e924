"""The whole Hessian over a tree of parameters, all cross blocks included.

Products go through the linearised gradient, whose factors (every z_j, f', f'' and g_j of the batch) are kept: a pass forward
and a pass backward without any of the work that does not depend on the vector. Whatever needs the matrices between the uses

    H_jk = Q_jk z_j z_k + g_j S_jk z_k + g_k S_kj z_j                                       (math.md, section 6)

(blocks, the dense form, the diagonal) computes them when it is asked for, by `readings`.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.base import StructuredOperator, sum_of
from jaxhess.operators.mapped import Inertia, count_signs
from jaxhess.operators.paths import Selection, below, find, leaves_like, paths_of
from jaxhess.operators.restricted import JointHessian, RestrictedHessian
from jaxhess.operators.solvable import Solvable
from jaxhess.operators.support import (
    as_array,
    as_scalar,
    as_tags,
    check_operator_fits,
    describe,
    scaled_tags,
)

__all__ = ["FullHessian", "Readings"]


class Readings(abc.ABC):
    """What can be read of a Hessian at a point (its parameters and batch) beyond products; hashable, without arrays."""

    @abc.abstractmethod
    def matrix(self, point: Any, product: Any, factor: Array | np.ndarray) -> Array:
        """`factor` times the dense matrix, in the order of `jax.flatten_util.ravel_pytree`."""

    @abc.abstractmethod
    def diagonal(self, point: Any) -> PyTree:
        """The diagonal, a tree like the parameters."""

    @abc.abstractmethod
    def layer(self, point: Any, places: tuple[int, ...], structure: PyTree) -> StructuredOperator | None:
        """The joint block of a weight and a bias, in a tree of `structure`; None where they are not of one layer."""

    @abc.abstractmethod
    def block(self, point: Any, row: int, column: int) -> StructuredOperator | None:
        """The block from one parameter to another, by their places among the leaves; None where it has no small matrices."""


class _Structure(NamedTuple):
    """A tree of shapes and dtypes, with a hash."""

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]


class FullHessian(Solvable, StructuredOperator):
    """The symmetric operator on a tree of parameters; `jaxhess.hessian(fun, blocks="full")` makes it.

    `point` is what `readings` read from, `product` maps its leaves and those of a tree like `structure` to the leaves of
    another, `factor` multiplies all of it, None for 1.
    `H["layer"]["w"]["out"]["b"]`, or `H.block("layer/w", "out/b")`, is the block from out/b to layer/w: the keys lead to the
    parameter of the rows first, then to that of the columns. `H.block("layer/w")` is a diagonal block.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(p, x):
    ...     return jnp.sum((p["w"] @ x + p["b"]) ** 2)
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}
    >>> H = jaxhess.hessian(error, blocks="full")(params, jnp.eye(3))
    >>> H.as_matrix().shape, H["w"]["b"].as_matrix().shape, type(H.block("w")).__name__
    ((8, 8), (6, 2), 'KroneckerProductSum')
    """

    product: Any
    point: Any
    factor: Array | None
    structure: Any = dataclasses.field(metadata={"static": True})
    readings: Readings = dataclasses.field(metadata={"static": True})

    def __init__(self, product: Any, point: Any, structure: PyTree, readings: Readings, factor: Any = None, tags: Any = ()):
        if not isinstance(structure, _Structure):
            leaves, treedef = jax.tree.flatten(structure)
            structure = _Structure(treedef, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves))
        self.product, self.point, self.readings, self.structure = product, point, readings, structure
        dtype = jnp.result_type(*(dtype for _, dtype in structure.leaves))
        self.factor = None if factor is None else as_scalar("FullHessian", factor, dtype)
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        treedef, leaves = self.structure
        return jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in leaves])

    def out_structure(self):
        return self.in_structure()

    def mv(self, vector):
        treedef, shapes = self.structure
        leaves, given = jax.tree.flatten(vector)
        if given != treedef or any(
            jnp.shape(leaf) != shape or jnp.iscomplexobj(leaf) for leaf, (shape, _) in zip(leaves, shapes, strict=True)
        ):
            leaves_like("FullHessian.mv", self.in_structure(), vector)
        cast = [as_array(leaf, dtype) for leaf, (_, dtype) in zip(leaves, shapes, strict=True)]
        return jax.tree.unflatten(treedef, _product(self.product, self.point, self.factor, cast))

    def as_matrix(self):
        check_operator_fits(self, instead="mv, diagonal(), trace() or block()")
        return self.readings.matrix(self.point, self.product, self._scale)

    def transpose(self):
        return self

    def diagonal(self):
        return jax.tree.map(lambda d: self._scale.astype(d.dtype) * d, self.readings.diagonal(self.point))

    def trace(self):
        return sum_of(jnp.sum(d) for d in jax.tree.leaves(self.diagonal()))

    def frobenius_norm(self):
        return _frobenius_norm(self)

    def scaled(self, factor):
        scaled = self._scale * as_scalar("FullHessian", factor, self._scale.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self) -> Array:
        """All N eigenvalues in ascending order, (N,), by way of the dense matrix."""
        return jnp.linalg.eigvalsh(self.as_matrix())

    def inertia(self, tolerance: Any = None) -> Inertia:
        """How many eigenvalues are above `tolerance`, below `-tolerance`, and between; see `CurvatureOperator.inertia`."""
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def block(self, row: Any = (), column: Any = None) -> Any:
        """The block from the parameter at `column` to that at `row`: paths such as `"layer/w"`, tuples of keys, or JAX key
        paths. Without `column`, the diagonal block at `row`.

        Raises `KeyError`, with what is there, if there is no parameter at a path.
        """
        paths = paths_of(self.in_structure())
        i = find(paths, row)
        j = i if column is None else find(paths, column)
        block = self.readings.block(self.point, i, j)
        return RestrictedHessian(self, i, j) if block is None else block.scaled(self._scale)

    def _diagonal_block(self, place: int) -> Any:
        block = self.readings.block(self.point, place, place)
        return RestrictedHessian(self, place, place) if block is None else block.scaled(self._scale)

    def joint(self, *paths: Any) -> Any:
        """The square block over all parameters at or below the given paths, those between them included.

        Its structure is the tree at the path for one path, a tuple of them for several. A weight and the bias of its layer
        have a `LayerBlock`, z extended by 1; others a `JointHessian`, by products. Raises `KeyError` if there is nothing at
        a path, `InputError` if a parameter is asked for twice.

        >>> import jax.numpy as jnp, jaxhess
        >>> params = {"a": {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}, "c": jnp.ones(2)}
        >>> def error(p, x):
        ...     return p["c"] @ jnp.tanh(p["a"]["w"] @ x + p["a"]["b"])
        >>> H = jaxhess.hessian(error, blocks="full")(params, jnp.eye(3))
        >>> type(H.joint("a")).__name__, H.joint("a").as_matrix().shape, H.joint("a/w", "c").as_matrix().shape
        ('LayerBlock', (8, 8), (8, 8))
        """
        places, structure = below(self.in_structure(), paths)
        if not places:
            raise InputError("FullHessian.joint: no parameter was named")
        if len(set(places)) < len(places):
            raise InputError(f"FullHessian.joint: {', '.join(map(str, paths))} name a parameter twice")
        layer = self.readings.layer(self.point, places, structure)
        if layer is not None:
            return layer if self.factor is None else layer.scaled(self.factor)
        return JointHessian(self, places, jax.tree.structure(structure))

    def __getitem__(self, key: Any) -> Any:
        return Selection(self.block, self.in_structure())[key]

    @property
    def _scale(self) -> Array | np.ndarray:
        """The factor, 1 where there is none."""
        _, leaves = self.structure
        return np.ones((), jnp.result_type(*(dtype for _, dtype in leaves))) if self.factor is None else self.factor

    def _plus(self, other):
        return None

    def __repr__(self):
        return describe(self, f"{len(self.structure[1])} parameters", "factors of the linearised gradient")


@jax.jit
def _product(product: Any, point: Any, factor: Array | None, vectors: list[Array]) -> list[Array]:
    products = product(jax.tree.leaves(point), vectors)
    return products if factor is None else [factor.astype(p.dtype) * p for p in products]


@jax.jit
def _frobenius_norm(operator: FullHessian) -> Array:
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), operator.in_structure())
    flat, unravel = ravel_pytree(zeros)

    def column(i: Array) -> Array:
        return jnp.sum(ravel_pytree(operator.mv(unravel(flat.at[i].set(1))))[0] ** 2)

    return jnp.sqrt(jnp.sum(jax.lax.map(column, jnp.arange(flat.size))))
