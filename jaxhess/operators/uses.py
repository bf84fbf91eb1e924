"""A parameter's uses `y_j = W z_j`, and the terms that each pair of them gives to its Hessian (math: section 6).

    d2E/dW_j dW_k [(i,q),(p,s)] = Q_jk[i,p] z_j[q] z_k[s] + g_j[i] S_jk[q,p] z_k[s] + g_k[p] S_kj[s,i] z_j[q]

Every index has a label, so that weights in any layout, and uses at many places in time or space, are one formula.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.operators.contraction import contract

__all__ = ["EXAMPLE", "PairTerm", "Use", "pair_terms"]

EXAMPLE = 0

Labels = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Use:
    """The labels of one use; none of them is EXAMPLE.

    `weight` labels the axes of the parameter, of `weight_sizes`; `output` and `input` those of y and z after their reshape
    to `output_sizes` and `input_sizes`. `input` is None where the use is no contraction (z = 1). `positions` are the labels
    of y and z that are not the parameter's: the places where it meets a vector. Axes of length 1 of z that are not summed
    over have no label.
    """

    weight: Labels
    weight_sizes: tuple[int, ...]
    output: Labels
    output_sizes: tuple[int, ...]
    input: Labels | None
    input_sizes: tuple[int, ...]
    positions: Labels

    @property
    def labels(self) -> int:
        """How many labels the use has."""
        return len(self.weight) + len(self.positions)

    def relabelled(self, offset: int) -> "Use":
        """The use with every label moved by an offset."""

        def shift(labels: Labels) -> Labels:
            return tuple(label + offset for label in labels)

        return dataclasses.replace(
            self,
            weight=shift(self.weight),
            output=shift(self.output),
            input=None if self.input is None else shift(self.input),
            positions=shift(self.positions),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairTerm:
    """`H_jk` as a contraction of `operands` (see `ContractionOperator`), from w_k (`columns`) to w_j (`rows`); with
    `symmetrised`, its transpose too. `pair` is (j, k)."""

    operands: tuple[Array, ...]
    labels: tuple[Labels, ...] = dataclasses.field(metadata={"static": True})
    rows: Labels = dataclasses.field(metadata={"static": True})
    columns: Labels = dataclasses.field(metadata={"static": True})
    pair: tuple[int, int] = dataclasses.field(metadata={"static": True})
    symmetrised: bool = dataclasses.field(metadata={"static": True})

    def sizes_of(self, labels: Labels) -> Labels:
        """The sizes of these labels."""
        sizes: dict[int, int] = {}
        for operand, names in zip(self.operands, self.labels, strict=True):
            sizes.update(zip(names, operand.shape, strict=True))
        return tuple(sizes[label] for label in labels)

    def add_product(self, results: list[Array], vectors: Sequence[Array]) -> None:
        """Add this term's products with `vectors[k]` to `results[j]`."""
        j, k = self.pair
        results[j] = results[j] + self._contract(self.rows, vectors[k], self.columns)
        if self.symmetrised:
            results[k] = results[k] + self._contract(self.columns, vectors[j], self.rows)

    def _contract(self, result: Labels, vector: Array, names: Labels) -> Array:
        return contract((*self.operands, vector), (*self.labels, names), result)


def pair_terms(
    uses: Mapping[int, Use],
    outputs: Mapping[int, Array],
    inputs: Mapping[int, Array],
    curvatures: Mapping[tuple[int, int], Array],
    sensitivities: Mapping[tuple[int, int], Array],
    j: int,
    k: int,
) -> Iterator[PairTerm]:
    """The terms of uses j and k, for arrays with a leading axis of examples: `outputs[j]` g_j, `inputs[j]` z_j,
    `curvatures[j, k]` Q_jk, `sensitivities[j, k]` S_jk, or its diagonal."""
    mine, other = uses[j], uses[k]
    if j == k:
        other = mine.relabelled(1 + max((0, *mine.weight, *mine.positions)))
    if (j, k) in curvatures:
        Q = curvatures[j, k]
        operands = [Q.reshape(Q.shape[0], *mine.output_sizes, *other.output_sizes)]
        labels = [(EXAMPLE, *mine.output, *other.output)]
        for n, use in ((j, mine), (k, other)):
            if use.input is not None:
                operands.append(inputs[n].reshape(Q.shape[0], *use.input_sizes))
                labels.append((EXAMPLE, *use.input))
        yield PairTerm(tuple(operands), tuple(labels), mine.weight, other.weight, (j, k), j != k)
    ordered = [((j, mine), (k, other)), ((k, other), (j, mine))]
    for (a, left), (b, right) in ordered[:1] if j == k else ordered:
        if (a, b) not in sensitivities or left.input is None:
            continue
        S = sensitivities[a, b]
        if S.ndim == 2:
            S = S[:, :, None] * jnp.eye(S.shape[1], dtype=S.dtype)[None]
        operands = [
            outputs[a].reshape(S.shape[0], *left.output_sizes),
            S.reshape(S.shape[0], *left.input_sizes, *right.output_sizes),
        ]
        labels = [(EXAMPLE, *left.output), (EXAMPLE, *left.input, *right.output)]
        if right.input is not None:
            operands.append(inputs[b].reshape(S.shape[0], *right.input_sizes))
            labels.append((EXAMPLE, *right.input))
        yield PairTerm(tuple(operands), tuple(labels), left.weight, right.weight, (a, b), True)
