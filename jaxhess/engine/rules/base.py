"""How curvature passes one operation `u = h(a, b, ..)` (math.md, section 6).

    g[a]    += J_a^T g[u]
    C[w, a] += C[w, u] J_a                                          for every other live variable w
    C[a, b] += J_a^T C[u, u] J_b + sum_i g[u]_i d2h_i / da db

A rule holds the operation at the values of one example, as a function of its live inputs alone. The rule here pulls back
by the operation's own vector-Jacobian product; each kind of operation refines what it knows better.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, Shaped
from jaxhess.engine.kinds import Dense, Diagonal, Factored, Kind, as_dense, dtype_of, middle_times, quadratic, transpose

__all__ = ["Pairs", "Rule"]

Pairs = dict[tuple[int, int], Kind]


def _flat(rows: Shaped[Array, "k *a"]) -> Shaped[Array, "k size"]:
    return rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))


class Rule:
    """The first order of an operation, and no second order: a linear operation."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        function: Callable[..., Sequence[Array]],
        values: Sequence[Array],
    ) -> None:
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self.function, self.values = function, tuple(values)
        self.results, self._vjp = jax.vjp(lambda *x: tuple(function(*x)), *self.values)

    def pull(self, u: int, rows: Shaped[Array, "k *u"]) -> dict[int, Array]:
        """`J_a^T` applied to each row, for every live input a: (k, *a.shape)."""
        k, dtype = rows.shape[0], rows.dtype
        cotangents = tuple(
            rows.astype(result.dtype) if output == u else jnp.zeros((k, *result.shape), result.dtype)
            for output, result in zip(self.outputs, self.results, strict=True)
        )
        pulled = jax.vmap(self._vjp)(cotangents)
        return {a: p.astype(jnp.promote_types(p.dtype, dtype)) for a, p in zip(self.inputs, pulled, strict=True)}

    def gradient(self, g: dict[int, Array]) -> dict[int, Array]:
        """`sum_u J_a^T g[u]` for every live input a."""
        return dict(zip(self.inputs, self._vjp(self.cotangents(g)), strict=True))

    def cotangents(self, g: dict[int, Array]) -> tuple[Array, ...]:
        """g[u] for every output, zero where there is none, in the outputs' own dtypes."""
        return tuple(
            g[output].astype(result.dtype) if output in g else jnp.zeros(result.shape, result.dtype)
            for output, result in zip(self.outputs, self.results, strict=True)
        )

    def second_order_pairs(self) -> list[tuple[int, int]]:
        """The pairs of inputs for which `second` makes dense matrices."""
        return []

    def jacobians(self, u: int, dtype: Any) -> dict[int, Array]:
        """`J_a`, (size u, size a), for every live input a."""
        shape = self.results[self.outputs.index(u)].shape
        size = math.prod(shape)
        pulled = self.pull(u, jnp.eye(size, dtype=dtype).reshape(size, *shape))
        return {a: _flat(rows) for a, rows in pulled.items()}

    def pull_matrix(self, u: int, matrix: Shaped[Array, "k size"]) -> dict[int, Array]:
        """`matrix J_a`, (k, size a), for every live input a."""
        shape = self.results[self.outputs.index(u)].shape
        pulled = self.pull(u, matrix.reshape(matrix.shape[0], *shape))
        return {a: _flat(rows) for a, rows in pulled.items()}

    def through(self, kind: Kind, u: int) -> dict[int, Kind]:
        """`C[w, u] J_a` for every live input a."""
        match kind:
            case Diagonal():
                jacobians = self.jacobians(u, kind.values.dtype)
                return {a: Dense(kind.values[:, None] * j) for a, j in jacobians.items()}
            case _:
                return {a: Dense(pulled) for a, pulled in self.pull_matrix(u, as_dense(kind)).items()}

    def between(self, kind: Kind, u: int, keep: Callable[[int, int], bool]) -> Pairs:
        """`J_a^T C[u, u] J_b` for the pairs a <= b of live inputs that `keep` asks for."""
        if isinstance(kind, Factored) and kind.values is None:
            return self._between_factored(kind, u, keep)
        if len(self.inputs) == 1 and self.results[self.outputs.index(u)].size < self.values[0].size:
            (a,) = self.inputs
            return {(a, a): Factored(self.jacobians(u, dtype_of(kind))[a], kind)} if keep(a, a) else {}
        halves = self.through(kind, u)
        pairs: Pairs = {}
        for a, half in halves.items():
            wanted = [b for b in halves if a <= b and keep(a, b)]
            if wanted:
                whole = self.through(transpose(half), u)
                pairs |= {(a, b): whole[b] for b in wanted}
        return pairs

    def _between_factored(self, kind: Factored, u: int, keep: Callable[[int, int], bool]) -> Pairs:
        pulled = self.pull_matrix(u, kind.scaled_rows)
        pairs: Pairs = {}
        for a, left in pulled.items():
            for b, right in pulled.items():
                if a == b and keep(a, a) and left.shape[0] < left.shape[1]:
                    pairs[a, a] = Factored(left, kind.middle)
                elif a <= b and keep(a, b):
                    pairs[a, b] = Dense(left.T @ middle_times(kind.middle, right))
        return pairs

    def own_diagonals(self, kind: Kind, u: int, wanted: Collection[int]) -> dict[int, Diagonal]:
        """The diagonal of `J_a^T C[u, u] J_a` for the wanted inputs."""
        if isinstance(kind, Factored):
            pulled = self.pull_matrix(u, kind.scaled_rows)
            totals = {a: quadratic(kind.middle, pulled[a]) for a in wanted}
            if kind.values is not None:
                jacobians = self.jacobians(u, kind.values.dtype)
                totals = {a: total + kind.values @ jacobians[a] ** 2 for a, total in totals.items()}
            return {a: Diagonal(total) for a, total in totals.items()}
        jacobians = self.jacobians(u, dtype_of(kind))
        if isinstance(kind, Diagonal):
            return {a: Diagonal(kind.values @ jacobians[a] ** 2) for a in wanted}
        halves = self.pull_matrix(u, kind.matrix)
        return {a: Diagonal(jnp.sum(jacobians[a] * halves[a], axis=0)) for a in wanted}

    def second(self, g: dict[int, Array], keep: Callable[[int, int], bool]) -> Pairs:
        """`sum_i g[u]_i d2h_i / da db` for the pairs a <= b that `keep` asks for; nothing for a linear operation."""
        del g, keep
        return {}
