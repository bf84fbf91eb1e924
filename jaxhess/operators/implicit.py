"""Curvature of a parameter that is used at many places, most of all at every step in time, without the array Q.

    H X = sum_j  [Q V]_j z_j^T + g_j [S V]_j^T + ...,        V = X z_j at all places

with Q and S as a linear function (`jaxhess.operators.linearised`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import available_bytes, einsum, symmetrise
from jaxhess._typing import Array, InputError
from jaxhess.operators.base import CurvatureOperator, OperatorSum
from jaxhess.operators.contraction import ContractionOperator
from jaxhess.operators.layout import Layout
from jaxhess.operators.linearised import ImplicitTerm, ImplicitUse, Tangents
from jaxhess.operators.mapped import count_signs, dense_eigvalsh
from jaxhess.operators.reduction import KroneckerColumns, Reduction, dense_reduction
from jaxhess.operators.support import as_scalar, as_tags, check_operator_fits, check_vector, describe, scaled_tags
from jaxhess.operators.uses import EXAMPLE, pair_terms

__all__ = ["ImplicitKroneckerSum"]

_CHUNK_BYTES = 2**26
_CHUNK_ROWS = 256
_EXPLICIT_BYTES = 2**31


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
        return _product(self, jnp.asarray(vector, self.factor.dtype))

    def _read(self, pulled: Tangents) -> Array:
        products = self.term.read(pulled)
        parts = [scale * product.reshape(self.parameter_shape) for product, scale in zip(products, self.scales, strict=True)]
        return (self.factor * sum(parts[1:], parts[0])).astype(self.factor.dtype)

    @property
    def places(self) -> int:
        """At how many places, over all uses, the parameter meets a vector."""
        return sum(math.prod(use.labels.output_sizes) for use in self.term.uses)

    def kronecker_terms(self) -> tuple[Array, Array]:
        """Q (r, places, m, places, m) and Z (r, places, n) of `(1/r) sum_i sum_st kron(Q_i[s, t], z_i^s z_i^t T)`.

        Raises `InputError` where that is not the whole block: more than one use, a use that is no product with vectors, or
        one whose input depends on the parameter itself, as that of a recurrent feedback does (the terms with S).
        """
        use = self.term.uses[0]
        sides = set(use.labels.output) & set(use.labels.input or ()) & set(use.labels.weight)
        if len(self.term.uses) > 1 or use.inputs is None or use.sensitive or sides:
            raise InputError(
                f"{self!r} is not a sum of Kronecker products alone: its parameter is used more than once, or not in "
                "products with vectors, or its input depends on it. Use as_matrix() or mv."
            )
        (Q,), positions = _arrays(self)[0].values(), use.labels.positions
        y, z = use.labels.output, use.labels.input or ()
        first, second = [("y", label) for label in y], [("x", label) for label in y]

        def order(labels: tuple[int, ...]) -> list[int]:
            return [*positions, *(label for label in labels if label not in positions)]

        names = ["r", *first, *second]
        wanted = ["r", *(("y", label) for label in order(y)), *(("x", label) for label in order(y))]
        Q = Q.reshape(self.term.examples, *use.labels.output_sizes, *use.labels.output_sizes)
        Q = jnp.transpose(Q, [names.index(name) for name in wanted])
        Z = jnp.transpose(use.z[0], [use.z[1].index(label) for label in (EXAMPLE, *order(z))])
        sizes = dict(zip(y, use.labels.output_sizes, strict=True))
        places = math.prod(size for label, size in sizes.items() if label in positions)
        m = math.prod(size for label, size in sizes.items() if label not in positions)
        Q = Q.reshape(self.term.examples, places, m, places, m)
        n = math.prod(size for label, size in zip(z, use.labels.input_sizes, strict=True) if label not in positions)
        return self.factor * self.scales[0] ** 2 * Q, Z.reshape(self.term.examples, places, n)

    def explicit(self) -> CurvatureOperator | None:
        """The same operator with the arrays Q and S, (places x units)^2 numbers an example; None where a variable itself is
        perturbed or the views differ."""
        uses = {n: use.labels for n, use in enumerate(self._numbered())}
        if any(use.inputs is None for use in self.term.uses) or len({use.weight_sizes for use in uses.values()}) > 1:
            return None
        outputs = {n: use.outputs for n, use in enumerate(self.term.uses) if use.outputs is not None}
        inputs = {n: use.inputs for n, use in enumerate(self.term.uses) if use.inputs is not None}
        Q, S = _arrays(self)
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

    def _matrix_layout(self) -> Layout | None:
        """How the parameter is a matrix (m, n), where `kronecker_terms` are the whole block; else None."""
        use = self.term.uses[0]
        sides = set(use.labels.output) & set(use.labels.input or ()) & set(use.labels.weight)
        if len(self.term.uses) > 1 or use.inputs is None or use.sensitive or sides:
            return None
        places = {label: n for n, label in enumerate(use.labels.weight)}
        rows, columns = (
            tuple(places[label] for label in side if label in places) for side in (use.labels.output, use.labels.input or ())
        )
        if sorted(rows + columns) != list(range(len(places))):
            return None
        return Layout(self.parameter_shape, use.labels.weight_sizes, rows, columns)

    def _reduced_size(self):
        layout, steps = self._matrix_layout(), self.term.examples * self._vectors()
        if layout is None or steps >= layout.n:
            return self.in_size()
        return layout.m * steps

    def _vectors(self) -> int:
        """How many vectors of an example the parameter meets."""
        labels = self.term.uses[0].labels
        sizes = dict(zip(labels.output, labels.output_sizes, strict=True))
        return math.prod(sizes.get(label, 1) for label in labels.positions)

    def _reduction(self):
        layout = self._matrix_layout()
        if layout is None or self._reduced_size() >= self.in_size():
            return dense_reduction(self)
        Q, Z = self.kronecker_terms()
        return _reduced(Q, Z, layout)

    def _numbered(self) -> list[ImplicitUse]:
        uses, label = [], EXAMPLE + 1
        for use in self.term.uses:
            smallest = min((*use.labels.weight, *use.labels.positions), default=label)
            uses.append(dataclasses.replace(use, labels=use.labels.relabelled(label - smallest)))
            label += use.labels.labels
        return uses

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
        return self.explicit() if 0 < 2 * self.places < self.in_size() and fits else None

    def as_matrix(self):
        check_operator_fits(self)
        explicit = self._best()
        return _matrix(self) if explicit is None else explicit.as_matrix().astype(self.factor.dtype)

    def transpose(self):
        return self

    def diagonal(self):
        explicit = self._best()
        entries = _entries(self) if explicit is None else explicit.diagonal().astype(self.factor.dtype)
        return entries.reshape(self.parameter_shape)

    def trace(self):
        explicit = self._best()
        return jnp.sum(_entries(self)) if explicit is None else explicit.trace().astype(self.factor.dtype)

    def frobenius_norm(self):
        return _norm(self)

    def _map(self, reading: Callable[[Array, Tangents], Array]) -> Array:
        """`reading(i, K e_i)` for each component of the parameter."""

        def one(index: Array) -> Array:
            return reading(index, self.term.apply(self.term.unit(index, self.scales)))

        if self.in_size() == 0:
            return jnp.zeros((0, 0), self.factor.dtype)
        return jax.lax.map(one, jnp.arange(self.in_size()), batch_size=min(self._chunk(), self.in_size()))

    def scaled(self, factor):
        scaled = self.factor * as_scalar("ImplicitKroneckerSum", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return dense_eigvalsh(self)

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def __repr__(self):
        return describe(self, f"{len(self.term.uses)} uses at {self.places} units and places, {self.term.examples} examples")


# Compiled here once for each structure: called outside of a user's `jit`, their loops would be compiled every time.


@jax.jit
def _product(operator: ImplicitKroneckerSum, vector: Array) -> Array:
    sizes = [use.labels.weight_sizes for use in operator.term.uses]
    vectors = [scale * vector.reshape(s) for s, scale in zip(sizes, operator.scales, strict=True)]
    return operator._read(operator.term.apply(operator.term.push(vectors)))


@functools.partial(jax.jit, static_argnums=2)
def _reduced(Q: Array, Z: Array, layout: Layout) -> Reduction:
    r, steps, n = Z.shape
    P, R = jnp.linalg.qr(Z.reshape(r * steps, n).T)
    R = R.T.reshape(r, steps, -1)
    matrix = einsum("esitj,esp,etq->ipjq", Q, R, R) / r
    size = matrix.shape[0] * matrix.shape[1]
    return Reduction(KroneckerColumns(P, layout), symmetrise(matrix.reshape(size, size)))


@jax.jit
def _matrix(operator: ImplicitKroneckerSum) -> Array:
    return operator._map(lambda index, pulled: operator._read(pulled).reshape(-1)).T


@jax.jit
def _entries(operator: ImplicitKroneckerSum) -> Array:
    entries = operator._map(lambda index, pulled: operator.term.entry(index, pulled, operator.scales))
    return (operator.factor * entries).astype(operator.factor.dtype)


@jax.jit
def _norm(operator: ImplicitKroneckerSum) -> Array:
    return jnp.sqrt(jnp.sum(operator._map(lambda index, pulled: jnp.sum(operator._read(pulled) ** 2))))


@jax.jit
def _arrays(operator: ImplicitKroneckerSum) -> tuple[dict[tuple[int, int], Array], dict[tuple[int, int], Array]]:
    """Q_jk for j <= k and S_jk, from the products of K with one unit at one place, for all examples at once."""
    Q: dict[tuple[int, int], Array] = {}
    S: dict[tuple[int, int], Array] = {}
    r = operator.term.examples
    for k, use in enumerate(operator.term.uses):
        size = math.prod(use.labels.output_sizes)

        if size == 0:
            sizes = [math.prod(other.labels.output_sizes) for other in operator.term.uses]
            Q |= {(j, k): jnp.zeros((r, sizes[j], 0), operator.factor.dtype) for j in range(k + 1)}
            continue

        def column(i: Array, use: ImplicitUse = use, size: int = size) -> tuple[list[Array], list[Array]]:
            unit = jnp.zeros((r, size), operator.factor.dtype).at[:, i].set(1)
            pulled = operator.term.apply({"probes": {use.key: unit}, "shifts": {}, "pulls": {}})
            return (
                [pulled["probes"][other.key].reshape(r, -1) for other in operator.term.uses],
                [pulled["pulls"][other.key].reshape(r, -1) for other in operator.term.uses if other.sensitive],
            )

        curvatures, states = jax.lax.map(column, jnp.arange(size), batch_size=min(size, operator._chunk()))
        Q |= {(j, k): jnp.moveaxis(array, 0, 2) for j, array in enumerate(curvatures) if j <= k}
        sensitive = [j for j, other in enumerate(operator.term.uses) if other.sensitive]
        S |= {(j, k): jnp.moveaxis(array, 0, 2) for j, array in zip(sensitive, states, strict=True)}
    return Q, S
