"""Operations with a dense second derivative, by autodiff of that one operation.

    C[a, b] += sum_i g[u]_i d2h_i / da db

The product of two live arrays is bilinear: only its mixed second derivative is not zero. Everything else without a rule
of its own gets all pairs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.engine.kinds import Dense
from jaxhess.engine.rules.base import Pairs, Rule

__all__ = ["BILINEAR", "BilinearRule", "LocalRule"]

BILINEAR = {"conv_general_dilated", "dot_general"}


class LocalRule(Rule):
    """Any differentiable operation."""

    _same_input = True

    def second(self, g: dict[int, Array], keep: Callable[[int, int], bool]) -> Pairs:
        cotangents = tuple(
            g.get(output, jnp.zeros(result.shape, result.dtype))
            for output, result in zip(self.outputs, self.results, strict=True)
        )

        def gradient(*values: Array) -> tuple[Array, ...]:
            return jax.vjp(lambda *x: tuple(self.function(*x)), *values)[1](cotangents)

        pairs: Pairs = {}
        for position, b in enumerate(self.inputs):
            wanted = [a for a in self.inputs if a <= b and (a != b or self._same_input) and keep(a, b)]
            if wanted:
                columns = dict(zip(self.inputs, jax.jacfwd(gradient, argnums=position)(*self.values), strict=True))
                size = self.values[position].size
                pairs |= {(a, b): Dense(columns[a].reshape(-1, size)) for a in wanted}
        return pairs


class BilinearRule(LocalRule):
    """The product of two live arrays."""

    _same_input = False
