"""Operations with a dense second derivative, by autodiff of that one operation.

    C[a, b] += sum_i g[u]_i d2h_i / da db

The product of two live arrays is bilinear: only its mixed second derivative is not zero. Everything else without a rule
of its own gets all pairs. JAX differentiates some operations (`cholesky`, `eigh`) for symmetric tangents only, and its
second derivative is symmetric on those alone; the symmetric part is the same there, and what the sweep relies on.
"""

from collections.abc import Callable

import jax

from jaxhess._linalg import symmetrise
from jaxhess._typing import Array
from jaxhess.engine.kinds import Dense
from jaxhess.engine.rules.base import Pairs, Rule

__all__ = ["BILINEAR", "BilinearRule", "LocalRule"]

BILINEAR = {"conv_general_dilated", "dot_general"}


class LocalRule(Rule):
    """Any differentiable operation."""

    _same_input = True

    def second_order_pairs(self) -> list[tuple[int, int]]:
        return [(a, b) for a in self.inputs for b in self.inputs if a <= b and (a != b or self._same_input)]

    def second(self, g: dict[int, Array], keep: Callable[[int, int], bool]) -> Pairs:
        cotangents = self.cotangents(g)

        def gradient(*values: Array) -> tuple[Array, ...]:
            return jax.vjp(lambda *x: tuple(self.function(*x)), *values)[1](cotangents)

        pairs: Pairs = {}
        for position, b in enumerate(self.inputs):
            wanted = [a for a, other in self.second_order_pairs() if other == b and keep(a, b)]
            if wanted:
                columns = dict(zip(self.inputs, jax.jacfwd(gradient, argnums=position)(*self.values), strict=True))
                sizes = dict(zip(self.inputs, (value.size for value in self.values), strict=True))
                for a in wanted:
                    matrix = columns[a].reshape(sizes[a], sizes[b])
                    pairs[a, b] = Dense(symmetrise(matrix) if a == b else matrix)
        return pairs


class BilinearRule(LocalRule):
    """The product of two live arrays."""

    _same_input = False
