"""A Hessian block as a labelled contraction of small arrays.

    H[rows, columns] = factor * sum over all other labels of  operand_1[labels_1] operand_2[labels_2] ...

Each label stands for one index. `rows` are the indices of the parameter on the left of H, `columns` on its right. A
parameter W used at several places j, k (section 6 of the mathematics) has terms

    Q_jk[i, p] z_j[q] z_k[s]:      operands (Q_jk, z_j, z_k), labels ("ip", "q", "s"), rows "iq", columns "ps"

with one more label on each operand for the examples of a batch, or for places in time or space, to be summed over. The
pairs (j, k) and (k, j) are each other's transpose: `symmetrised` stands for A + A^T.
"""

import dataclasses
import math
import string
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import einsum
from jaxhess._typing import Array, InputError
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.mapped import count_signs, dense_eigvalsh, mapped_frobenius_norm
from jaxhess.operators.support import (
    as_real_arrays,
    as_scalar,
    as_tags,
    check_operator_fits,
    check_vector,
    describe,
    scaled_tags,
    shape_text,
    transposed_tags,
)

Labels = tuple[Hashable, ...]


class ContractionOperator(CurvatureOperator):
    """H[rows, columns] = factor * the contraction of `operands` over every label but those.

    `operands` are arrays, `labels` a tuple of hashable labels for each of them, `rows` and `columns` disjoint tuples of
    labels with the same sizes: the axes of the parameter, where they are finer than `parameter_shape` after a row-major
    reshape. `factor` is a scalar. With `symmetrised` the operator is A + A^T, which is symmetric; otherwise it is only
    if `tags` say so. Raises `InputError` if labels and shapes do not fit.

    The mean over two examples of kron(Q_i, z_i z_i^T):

    >>> import jax.numpy as jnp
    >>> Q, z = jnp.array([[[2.0]], [[4.0]]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
    >>> H = ContractionOperator((Q, z, z), ("rip", "rq", "rs"), "iq", "ps", (1, 2), 0.5)
    >>> H.as_matrix().tolist()
    [[3.0, 2.0], [2.0, 2.0]]
    """

    operands: tuple[Array, ...]
    factor: Array
    labels: tuple[Labels, ...] = dataclasses.field(metadata={"static": True})
    rows: Labels = dataclasses.field(metadata={"static": True})
    columns: Labels = dataclasses.field(metadata={"static": True})
    parameter_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    symmetrised: bool = dataclasses.field(metadata={"static": True})

    def __init__(
        self,
        operands: Sequence[Array],
        labels: Iterable[Iterable[Hashable]],
        rows: Iterable[Hashable],
        columns: Iterable[Hashable],
        parameter_shape: Sequence[int],
        factor: Any = 1,
        *,
        symmetrised: bool = False,
        tags: Any = (),
    ):
        what = "ContractionOperator"
        operands = tuple(as_real_arrays(what, [f"operand {k}" for k in range(len(operands))], operands))
        self.operands = operands
        self.labels = tuple(tuple(of_one) for of_one in labels)
        self.rows, self.columns = tuple(rows), tuple(columns)
        self.parameter_shape = tuple(parameter_shape)
        self.symmetrised = symmetrised
        self.factor = as_scalar(what, factor, operands[0].dtype)
        self.tags = as_tags(tags) | ({lx.symmetric_tag} if symmetrised else set())
        sizes = _checked_sizes(operands, self.labels)
        _check_sides(sizes, self.rows, self.columns, self.parameter_shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The parameter's axes as `rows` and `columns` index them: `parameter_shape`, or finer."""
        of_label: dict[Hashable, int] = {}
        for operand, names in zip(self.operands, self.labels, strict=True):
            of_label.update(zip(names, operand.shape, strict=True))
        return tuple(of_label[label] for label in self.rows)

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.parameter_shape, self.factor.dtype)

    def mv(self, vector):
        check_vector("ContractionOperator", vector, self.parameter_shape)
        X = jnp.reshape(vector, self.sizes)
        result = self._contract(self.rows, (X, self.columns))
        if self.symmetrised:
            result = result + self._contract(self.columns, (X, self.rows))
        return result.reshape(self.parameter_shape)

    def as_matrix(self):
        check_operator_fits(self)
        size = self.in_size()
        matrix = self._contract(self.rows + self.columns).reshape(size, size)
        return matrix + matrix.T if self.symmetrised else matrix

    def transpose(self):
        if lx.is_symmetric(self):
            return self
        return dataclasses.replace(self, rows=self.columns, columns=self.rows, tags=transposed_tags(self.tags))

    def diagonal(self):
        return self._twice(self._contract(self.rows, diagonal=True).reshape(self.parameter_shape))

    def trace(self):
        return self._twice(self._contract((), diagonal=True))

    def frobenius_norm(self):
        return mapped_frobenius_norm(self)

    def scaled(self, factor):
        scaled = self.factor * as_scalar("ContractionOperator", factor, self.factor.dtype)
        return dataclasses.replace(self, factor=scaled, tags=scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return dense_eigvalsh(self)

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def _contract(self, result: Labels, *others: tuple[Array, Labels], diagonal: bool = False) -> Array:
        merged = dict(zip(self.columns, self.rows, strict=True)) if diagonal else {}
        arrays, names = list(self.operands), list(self.labels)
        for array, of_array in others:
            arrays.append(array)
            names.append(of_array)
        merged_names = [tuple(merged.get(label, label) for label in of_array) for of_array in names]
        return self.factor * contract(arrays, merged_names, tuple(merged.get(label, label) for label in result))

    def _twice(self, array: Array) -> Array:
        return 2 * array if self.symmetrised else array

    def __repr__(self):
        shapes = ", ".join(shape_text(a) for a in self.operands)
        return describe(self, f"operands {shapes}", *(["symmetrised"] if self.symmetrised else []))


def contract(operands: Sequence[Array], labels: Sequence[Labels], result: Labels) -> Array:
    """The sum over every label but those of `result` of the product of the operands, at full precision.

    Raises `InputError` if there are more labels than letters to spell them, 52.
    """
    distinct = dict.fromkeys(label for of_one in labels for label in of_one)
    if len(distinct) > len(string.ascii_letters):
        raise InputError(
            f"A contraction of {len(operands)} arrays has {len(distinct)} axes, at most {len(string.ascii_letters)} are "
            "possible. Merge axes of the parameter (reshape) that are used together."
        )
    letters = dict(zip(distinct, string.ascii_letters, strict=False))

    def spell(of_array: Labels) -> str:
        return "".join(letters[label] for label in of_array)

    formula = ",".join(spell(of_array) for of_array in labels) + "->" + spell(result)
    return einsum(formula, *operands, optimize="optimal")


def _checked_sizes(operands: Sequence[Array], labels: tuple[Labels, ...]) -> dict[Hashable, int]:
    if len(labels) != len(operands):
        raise InputError(f"ContractionOperator: {len(operands)} operands have {len(labels)} tuples of labels")
    sizes: dict[Hashable, int] = {}
    for k, (operand, names) in enumerate(zip(operands, labels, strict=True)):
        if len(names) != operand.ndim:
            raise InputError(f"ContractionOperator: operand {k} of shape {operand.shape} has the labels {names}")
        for label, size in zip(names, operand.shape, strict=True):
            if sizes.setdefault(label, size) != size:
                raise InputError(f"ContractionOperator: label {label!r} has the sizes {sizes[label]} and {size}")
    return sizes


def _check_sides(sizes: dict[Hashable, int], rows: Labels, columns: Labels, shape: tuple[int, ...]) -> None:
    sides = rows + columns
    if len(set(sides)) != len(sides):
        raise InputError(f"ContractionOperator: rows {rows} and columns {columns} must not share a label")
    unknown = [label for label in sides if label not in sizes]
    if unknown:
        raise InputError(f"ContractionOperator: no operand has the labels {unknown} of rows and columns")
    of_rows, of_columns = tuple(sizes[i] for i in rows), tuple(sizes[i] for i in columns)
    if of_rows != of_columns or math.prod(of_rows) != math.prod(shape):
        raise InputError(
            f"ContractionOperator: rows of sizes {of_rows} and columns of sizes {of_columns} must both refine the "
            f"parameter's shape {shape}"
        )
