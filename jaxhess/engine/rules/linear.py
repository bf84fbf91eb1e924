"""Operations without a second derivative: linear ones, and those that are linear piece by piece.

At a kink (a tie of a maximum, say) the first derivative is the one that JAX takes and the second is zero.
"""

from collections.abc import Callable

from jaxhess.engine.kinds import Diagonal, Kind
from jaxhess.engine.rules.base import Pairs, Rule

__all__ = ["INDEXING", "LINEAR", "IndexingRule"]

INDEXING = {
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather",
    "optimization_barrier", "pad", "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze", "transpose",
}  # fmt: skip

LINEAR = INDEXING | {
    "cummax", "cummin", "cumsum", "reduce_max", "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum", "scatter-add", "scatter_add", "select_and_gather_add", "select_and_scatter_add", "sort", "top_k",
}  # fmt: skip


class IndexingRule(Rule):
    """Each component of an output is at most one component of one input, so diagonal curvature stays diagonal."""

    def between(self, kind: Kind, u: int, keep: Callable[[int, int], bool]) -> Pairs:
        if not isinstance(kind, Diagonal):
            return super().between(kind, u, keep)
        shape = self.results[self.outputs.index(u)].shape
        pulled = self.pull(u, kind.values.reshape(1, *shape))
        return {(a, a): Diagonal(d.reshape(-1)) for a, d in pulled.items() if keep(a, a)}
