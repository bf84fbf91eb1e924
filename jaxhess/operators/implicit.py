"""Curvature of a parameter that is used at many places, most of all at every step in time, without the array Q.

With `V = X z_j` for all places at once, the terms of `jaxhess.operators.uses` are

    H X = sum_j  [Q V]_j z_j^T + g_j [S V]_j^T,        and X^T g_j pulled back through S^T, which adds to Q V

so all that is asked of Q and S is their product with a vector: the map

    K: (dy_j, c_j) -> (dg_j, dz_j),        K = [[Q, S^T], [S, 0]]

is stored as a linear function. Along time it is `(I - L)^-T A (I - L)^-1`, two substitutions, each one scan over the
steps (Theorem 2 as corrected; math: section 5), in memory proportional to the number of steps; Q has its square.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import available_bytes
from jaxhess._typing import Array, InputError
from jaxhess.operators.base import CurvatureOperator, OperatorSum
from jaxhess.operators.contraction import ContractionOperator, contract
from jaxhess.operators.mapped import (
    count_signs,
    dense_eigvalsh,
    mapped_diagonal,
    mapped_frobenius_norm,
    mapped_matrix,
    mapped_trace,
)
from jaxhess.operators.support import as_scalar, as_tags, check_operator_fits, check_vector, describe, scaled_tags
from jaxhess.operators.uses import EXAMPLE, Use, pair_terms

__all__ = ["ImplicitKroneckerSum", "ImplicitTerm", "ImplicitUse"]

_CHUNK_BYTES = 2**26
_CHUNK_ROWS = 256
_EXPLICIT_BYTES = 2**31

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
        pushed: Tangents = {"probes": {}, "shifts": {}, "pulls": {}}
        for use, vector in zip(self.uses, vectors, strict=True):
            labels, weight = use.labels, (vector, use.labels.weight)
            if use.inputs is None or use.outputs is None:
                pushed["shifts"][use.key] = contract(*_zipped(weight), labels.output)
                continue
            pushed["probes"][use.key] = contract(*_zipped(use.z, weight), use.g[1])
            if use.sensitive:
                pushed["pulls"][use.key] = contract(*_zipped(use.g, weight), use.z[1])
        pulled = self.apply(pushed)
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


def _zipped(*labelled: tuple[Array, tuple[int, ...]]) -> tuple[list[Array], list[tuple[int, ...]]]:
    return [array for array, _ in labelled], [labels for _, labels in labelled]


class ImplicitKroneckerSum(CurvatureOperator):
    """The mean over examples of `sum_jk Q_jk x z_j z_k^T` (and the terms with S), over all uses of one parameter.

    `term` holds the uses, each taking its own view of the parameter, multiplied by its one of `scales`. A product costs
    about two gradients; matrix, diagonal, trace and norm go by products with the parameter's basis, or with units at
    places where there are fewer of those.
    """

    term: ImplicitTerm
    scales: tuple[Array, ...]
    factor: Array
    parameter_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def __init__(
        self, term: ImplicitTerm, scales: Sequence[Array], parameter_shape: Sequence[int], factor: Any = 1, *, tags: Any = ()
    ):
        if len(scales) != len(term.uses):
            raise InputError(f"ImplicitKroneckerSum: {len(term.uses)} uses have {len(scales)} scales")
        self.term, self.scales, self.parameter_shape = term, tuple(scales), tuple(parameter_shape)
        self.factor = as_scalar("ImplicitKroneckerSum", factor, jnp.result_type(*scales))
        self.tags = as_tags(tags) | {lx.symmetric_tag}

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.parameter_shape, self.factor.dtype)

    def mv(self, vector):
        check_vector("ImplicitKroneckerSum", vector, self.parameter_shape)
        vector = jnp.asarray(vector, self.factor.dtype)
        sizes = [use.labels.weight_sizes for use in self.term.uses]
        products = self.term.products([scale * vector.reshape(s) for s, scale in zip(sizes, self.scales, strict=True)])
        parts = [scale * product.reshape(self.parameter_shape) for product, scale in zip(products, self.scales, strict=True)]
        return self.factor * sum(parts[1:], parts[0])

    @property
    def places(self) -> int:
        """At how many places, over all uses, the parameter meets a vector."""
        return sum(math.prod(use.labels.output_sizes) for use in self.term.uses)

    def explicit(self) -> CurvatureOperator | None:
        """The same operator with the arrays Q and S, (places x units)^2 numbers an example; None where a variable itself is
        perturbed or the views differ."""
        uses = {n: use.labels for n, use in enumerate(self._numbered())}
        if any(use.inputs is None for use in self.term.uses) or len({use.weight_sizes for use in uses.values()}) > 1:
            return None
        outputs = {n: use.outputs for n, use in enumerate(self.term.uses) if use.outputs is not None}
        inputs = {n: use.inputs for n, use in enumerate(self.term.uses) if use.inputs is not None}
        Q, S = self._arrays()
        terms = []
        for j in uses:
            for k in range(j, len(uses)):
                factor = self.factor * self.scales[j] * self.scales[k] / self.term.examples
                for term in pair_terms(uses, outputs, inputs, Q, S, j, k):
                    tags = () if term.symmetrised else lx.symmetric_tag
                    terms.append(
                        ContractionOperator(
                            term.operands, term.labels, term.rows, term.columns, self.parameter_shape, factor,
                            symmetrised=term.symmetrised, tags=tags,
                        )
                    )  # fmt: skip
        return terms[0] if len(terms) == 1 else OperatorSum(terms, self.tags)

    def _numbered(self) -> list[ImplicitUse]:
        uses, label = [], EXAMPLE + 1
        for use in self.term.uses:
            smallest = min((*use.labels.weight, *use.labels.positions), default=label)
            uses.append(dataclasses.replace(use, labels=use.labels.relabelled(label - smallest)))
            label += use.labels.labels
        return uses

    def _arrays(self) -> tuple[dict[tuple[int, int], Array], dict[tuple[int, int], Array]]:
        """Q_jk for j <= k and S_jk, from the products of K with one unit at one place, for all examples at once."""
        Q: dict[tuple[int, int], Array] = {}
        S: dict[tuple[int, int], Array] = {}
        r = self.term.examples
        for k, use in enumerate(self.term.uses):
            size = math.prod(use.labels.output_sizes)

            def column(i: Array, use: ImplicitUse = use, size: int = size) -> tuple[list[Array], list[Array]]:
                unit = jnp.zeros((r, size), self.factor.dtype).at[:, i].set(1)
                pulled = self.term.apply({"probes": {use.key: unit}, "shifts": {}, "pulls": {}})
                return (
                    [pulled["probes"][other.key].reshape(r, -1) for other in self.term.uses],
                    [pulled["pulls"][other.key].reshape(r, -1) for other in self.term.uses if other.sensitive],
                )

            curvatures, states = jax.lax.map(column, jnp.arange(size), batch_size=min(size, self._chunk()))
            Q |= {(j, k): jnp.moveaxis(array, 0, 2) for j, array in enumerate(curvatures) if j <= k}
            sensitive = [j for j, other in enumerate(self.term.uses) if other.sensitive]
            S |= {(j, k): jnp.moveaxis(array, 0, 2) for j, array in zip(sensitive, states, strict=True)}
        return Q, S

    def _chunk(self) -> int:
        """How many products at once: few enough for the caches, enough for the matrix products at a step, within memory."""
        numbers = sum(math.prod(shape) for kind, _, shape, _ in self.term.shapes if kind != "shifts")
        needed = 8 * self.factor.dtype.itemsize * max(numbers, 1)
        enough = min(_CHUNK_ROWS // self.term.examples, available_bytes() // (16 * needed))
        return max(1, _CHUNK_BYTES // needed, enough)

    def _best(self) -> CurvatureOperator | None:
        """The explicit form, where it has fewer columns than the parameter and fits in memory."""
        fits = 4 * self.term.examples * self.places**2 * self.factor.dtype.itemsize < min(
            available_bytes() / 4, _EXPLICIT_BYTES
        )
        return self.explicit() if 2 * self.places < self.in_size() and fits else None

    def as_matrix(self):
        check_operator_fits(self)
        explicit = self._best()
        return mapped_matrix(self, self._chunk()) if explicit is None else explicit.as_matrix()

    def transpose(self):
        return self

    def diagonal(self):
        explicit = self._best()
        return mapped_diagonal(self, self._chunk()) if explicit is None else explicit.diagonal()

    def trace(self):
        explicit = self._best()
        return mapped_trace(self, self._chunk()) if explicit is None else explicit.trace()

    def frobenius_norm(self):
        return mapped_frobenius_norm(self, self._chunk())

    def scaled(self, factor):
        scaled = self.factor * as_scalar("ImplicitKroneckerSum", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return dense_eigvalsh(self)

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def __repr__(self):
        return describe(self, f"{len(self.term.uses)} uses at {self.places} units and places, {self.term.examples} examples")
