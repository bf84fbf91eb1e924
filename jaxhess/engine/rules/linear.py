"""Operations without a second derivative: linear ones, and those that are linear piece by piece.

At a kink (a tie of a maximum, say) the first derivative is the one that JAX takes and the second is zero.
"""

from collections.abc import Callable, Collection

from jaxhess.engine.kinds import Dense, Diagonal, Factored, Kind, add, diagonal_of
from jaxhess.engine.rules.base import Pairs, Rule

__all__ = ["INDEXING", "LINEAR", "IndexingRule"]

INDEXING = {
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "device_put", "dynamic_slice", "dynamic_update_slice",
    "expand_dims", "gather", "optimization_barrier", "pad", "reshape", "rev", "scatter", "sharding_constraint", "slice",
    "split", "squeeze", "stack", "tile", "transpose", "unstack",
}  # fmt: skip

LINEAR = INDEXING | {
    "cummax", "cummin", "cumsum", "reduce_max", "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "scatter-add", "scatter_add", "select_and_gather_add", "select_and_scatter_add", "sort", "top_k",
}  # fmt: skip


class IndexingRule(Rule):
    """Each component of an output is at most one component of one input, so diagonal curvature stays diagonal."""

    def between(self, kind: Kind, u: int, keep: Callable[[int, int], bool]) -> Pairs:
        if isinstance(kind, Factored):
            pairs = self._between_factored(kind, u, keep)
            if kind.values is not None:
                for pair, values in self.between(Diagonal(kind.values), u, keep).items():
                    pairs[pair] = add(pairs[pair], values)
            return pairs
        if isinstance(kind, Dense):
            halves = self.pull_matrix(u, kind.matrix)
            wanted = {a: [b for b in halves if a <= b and keep(a, b)] for a in halves}
            wholes = {a: self.pull_matrix(u, halves[a].T) for a, others in wanted.items() if others}
            return {(a, b): Dense(wholes[a][b]) for a, others in wanted.items() for b in others}
        shape = self.results[self.outputs.index(u)].shape
        pulled = self.pull(u, kind.values.reshape(1, *shape))
        return {(a, a): Diagonal(d.reshape(-1)) for a, d in pulled.items() if keep(a, a)}

    def own_diagonals(self, kind: Kind, u: int, wanted: Collection[int]) -> dict[int, Diagonal]:
        if not isinstance(kind, Diagonal):
            return super().own_diagonals(kind, u, wanted)
        pairs = self.between(kind, u, lambda a, b: a == b and a in wanted)
        return {a: diagonal_of(pair) for (a, _), pair in pairs.items()}
