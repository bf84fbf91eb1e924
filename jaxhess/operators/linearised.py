"""The uses of a parameter at many places of an example, most of all at every step in time, and what couples them: K.

With `V = X z_j` for all places at once, the terms of `jaxhess.operators.uses` are

    H X = sum_j  [Q V]_j z_j^T + g_j [S V]_j^T,        and X^T g_j pulled back through S^T, which adds to Q V

so all that is asked of Q and S is their product with a vector: the map

    K: (dy_j, c_j) -> (dg_j, dz_j),        K = [[Q, S^T], [S, 0]]

is stored as a linear function. Along time it is `(I - L)^-T A (I - L)^-1`, two substitutions, each one scan over the
steps (Theorem 2 as corrected; math: section 5), in memory proportional to the number of steps; Q has its square.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.operators.contraction import contract
from jaxhess.operators.uses import EXAMPLE, Use

__all__ = ["ImplicitTerm", "ImplicitUse", "Tangents"]

Tangents = dict[str, dict[int, Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImplicitUse:
    """One use, number `key` of K: `outputs` g (r, places.., y) and `inputs` z (r, places.., z); both None where the
    variable itself is perturbed. `sensitive` if z depends on the parameter. `place` is the vector that it takes."""

    outputs: Array | None
    inputs: Array | None
    labels: Use = dataclasses.field(metadata={"static": True})
    key: int = dataclasses.field(metadata={"static": True})
    place: int = dataclasses.field(metadata={"static": True})
    sensitive: bool = dataclasses.field(metadata={"static": True})

    @property
    def g(self) -> tuple[Array, tuple[int, ...]]:
        """g and its labels."""
        assert self.outputs is not None
        return self.outputs, (EXAMPLE, *self.labels.output)

    @property
    def z(self) -> tuple[Array, tuple[int, ...]]:
        """z and its labels."""
        assert self.inputs is not None
        return self.inputs, (EXAMPLE, *(self.labels.input or ()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImplicitTerm:
    """The mean over `examples` of all pairs of the `uses`. `linear` is K on a dictionary of dictionaries by `key`:
    "probes" dy, "shifts" of variables themselves, "pulls" c, giving "probes" dg, "shifts" and "pulls" dz; `shapes` are those
    of its whole argument."""

    linear: Callable[[Tangents], Tangents]
    uses: tuple[ImplicitUse, ...]
    shapes: tuple[tuple[str, int, tuple[int, ...], Any], ...] = dataclasses.field(metadata={"static": True})
    examples: int = dataclasses.field(metadata={"static": True})

    def add_product(self, results: list[Array], vectors: Sequence[Array]) -> None:
        """Add the products with `vectors`, by place, to `results`."""
        for use, product in zip(self.uses, self.products([vectors[use.place] for use in self.uses]), strict=True):
            results[use.place] = results[use.place] + product

    def products(self, vectors: Sequence[Array]) -> list[Array]:
        """For each use, the part of the product that belongs to it; the vectors have the labels `use.labels.weight`."""
        return self.read(self.apply(self.push(vectors)))

    def push(self, vectors: Sequence[Array]) -> Tangents:
        """The argument of K for the vectors."""
        pushed: Tangents = {"probes": {}, "shifts": {}, "pulls": {}}
        for use, vector in zip(self.uses, vectors, strict=True):
            labels, weight = use.labels, (vector, use.labels.weight)
            if use.inputs is None or use.outputs is None:
                pushed["shifts"][use.key] = contract(*_zipped(weight), labels.output)
                continue
            pushed["probes"][use.key] = contract(*_zipped(use.z, weight), use.g[1])
            if use.sensitive:
                pushed["pulls"][use.key] = contract(*_zipped(use.g, weight), use.z[1])
        return pushed

    def read(self, pulled: Tangents) -> list[Array]:
        """For each use, its part of the product, from what K gave."""
        results = []
        for use in self.uses:
            labels = use.labels
            if use.inputs is None or use.outputs is None:
                shift = pulled["shifts"][use.key].reshape(labels.output_sizes)
                results.append(contract(*_zipped((shift, labels.output)), labels.weight) / self.examples)
                continue
            probe = pulled["probes"][use.key].reshape(use.outputs.shape), use.g[1]
            product = contract(*_zipped(probe, use.z), labels.weight)
            if use.sensitive:
                pull = pulled["pulls"][use.key].reshape(use.inputs.shape), use.z[1]
                product = product + contract(*_zipped(use.g, pull), labels.weight)
            results.append(product / self.examples)
        return results

    def unit(self, index: Array, scales: Sequence[Array]) -> Tangents:
        """What `products` gives to K for a parameter that is 1 at one (flat) index and 0 elsewhere, without products."""
        pushed: Tangents = {"probes": {}, "shifts": {}, "pulls": {}}
        for use, scale in zip(self.uses, scales, strict=True):
            labels, at = use.labels, _positions(use.labels, index)
            if use.inputs is None:
                pushed["shifts"][use.key] = scale * _spread((jnp.ones(()), ()), labels.output, labels.output_sizes, at)
                continue
            pushed["probes"][use.key] = scale * _spread(_select(use.z, at), *_sized(use.g), at)
            if use.sensitive:
                pushed["pulls"][use.key] = scale * _spread(_select(use.g, at), *_sized(use.z), at)
        return pushed

    def entry(self, index: Array, pulled: Tangents, scales: Sequence[Array]) -> Array:
        """The component at one (flat) index of the product that K gave."""
        total = jnp.zeros(())
        for use, scale in zip(self.uses, scales, strict=True):
            labels, at = use.labels, _positions(use.labels, index)
            if use.inputs is None or use.outputs is None:
                shift = pulled["shifts"][use.key].reshape(labels.output_sizes), labels.output
                total = total + scale * _select(shift, at)[0]
                continue
            probe = pulled["probes"][use.key].reshape(use.outputs.shape), use.g[1]
            total = total + scale * contract(*_zipped(_select(probe, at), _select(use.z, at)), ())
            if use.sensitive:
                pull = pulled["pulls"][use.key].reshape(use.inputs.shape), use.z[1]
                total = total + scale * contract(*_zipped(_select(use.g, at), _select(pull, at)), ())
        return total / self.examples

    def apply(self, pushed: Mapping[str, Mapping[int, Array]]) -> Tangents:
        """K on the given parts of its argument, all others being zero."""
        shapes = {(kind, key): (shape, dtype) for kind, key, shape, dtype in self.shapes}
        given = {
            kind: {key: array.reshape(shapes[kind, key][0]).astype(shapes[kind, key][1]) for key, array in part.items()}
            for kind, part in pushed.items()
        }
        rest: Tangents = {"probes": {}, "shifts": {}, "pulls": {}}
        for (kind, key), (shape, dtype) in shapes.items():
            if key not in given[kind]:
                rest[kind][key] = jnp.zeros(shape, dtype)

        def restricted(given: Tangents) -> Tangents:
            return self.linear({kind: {**rest[kind], **given[kind]} for kind in rest})

        # The derivative of a linear map is the map itself, less what the parts that stay zero would cost.
        return jax.jvp(restricted, (jax.tree.map(jnp.zeros_like, given),), (given,))[1]


Labelled = tuple[Array, tuple[int, ...]]


def _sized(labelled: Labelled) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return labelled[1], labelled[0].shape


def _positions(use: Use, index: Array) -> dict[int, Array]:
    """Where a flat index of the parameter lies along each of its labels."""
    return dict(zip(use.weight, jnp.unravel_index(index, use.weight_sizes), strict=True))


def _select(labelled: Labelled, at: Mapping[int, Array]) -> Labelled:
    """The slice of an array at the positions `at` of those labels that it has."""
    array, labels = labelled
    for axis in reversed(range(len(labels))):
        if labels[axis] in at:
            array = jax.lax.dynamic_index_in_dim(array, at[labels[axis]], axis, keepdims=False)
    return array, tuple(label for label in labels if label not in at)


def _spread(labelled: Labelled, labels: tuple[int, ...], sizes: tuple[int, ...], at: Mapping[int, Array]) -> Array:
    """An array of these labels that is the given one at the positions `at`, and 0 elsewhere."""
    array, own = labelled
    ordered = [label for label in labels if label not in at]
    array = jnp.transpose(array, [own.index(label) for label in ordered])
    array = array.reshape([1 if label in at else size for label, size in zip(labels, sizes, strict=True)])
    for axis, (label, size) in enumerate(zip(labels, sizes, strict=True)):
        if label in at:
            here = jnp.arange(size) == at[label]
            array = jnp.where(here.reshape([size if a == axis else 1 for a in range(len(labels))]), array, 0)
    return jnp.broadcast_to(array, sizes)


def _zipped(*labelled: tuple[Array, tuple[int, ...]]) -> tuple[list[Array], list[tuple[int, ...]]]:
    return [array for array, _ in labelled], [labels for _, labels in labelled]
