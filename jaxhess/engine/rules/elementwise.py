"""Component-wise operations, fused into clusters: `J` and the second derivative are diagonal.

    g[a] = j_a * g[u]       C[w, a] = C[w, u] diag(j_a)       C[a, b] = C[u, u] * j_a j_b^T + diag(g[u] * h_ab)

which on `z = f(y)` is `Q = C * f'f'^T + diag(g * f'')` of Theorem 1 as corrected (math.md, section 2).
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal

from jaxhess._typing import Array
from jaxhess.engine.graph import Operation
from jaxhess.engine.kinds import Dense, Diagonal, Factored, Kind, as_dense, diagonal_of, scale_columns
from jaxhess.engine.rules.base import Pairs, Rule
from jaxhess.engine.trace import body_of

__all__ = ["COMPONENTWISE", "ComponentwiseRule", "has_no_second_derivative", "is_componentwise"]

_PIECEWISE_LINEAR = {
    "abs", "add", "add_any", "clamp", "convert_element_type", "copy", "copy_p", "max", "min", "name", "neg",
    "reduce_precision", "select_n", "sub",
}  # fmt: skip

COMPONENTWISE = _PIECEWISE_LINEAR | {
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "cos", "cosh",
    "digamma", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "igamma", "igammac", "integer_pow", "lgamma",
    "log", "log1p", "logistic", "mul", "polygamma", "pow", "rsqrt", "sin", "sinh", "sqrt", "square", "tan", "tanh", "zeta",
}  # fmt: skip


def is_componentwise(
    operation: Operation, live: Sequence[bool], shapes: Sequence[tuple[int, ...]], out: Sequence[tuple[int, ...]]
) -> bool:
    """Whether each component of the one output depends on the same component of each live input."""
    if len(out) != 1 or any(shape != out[0] for shape, is_live in zip(shapes, live, strict=True) if is_live):
        return False
    body = body_of(operation.equation)
    if operation.name.startswith("custom_") and body is not None:
        return _body_is_componentwise(body, live, out[0])
    return operation.name in COMPONENTWISE


def _body_is_componentwise(closed: ClosedJaxpr, live: Sequence[bool], shape: tuple[int, ...]) -> bool:
    depends = dict(zip(closed.jaxpr.invars, live, strict=True))

    def is_live(atom: Any) -> bool:
        return not isinstance(atom, Literal) and depends.get(atom, False)

    for equation in closed.jaxpr.eqns:
        inputs = [is_live(atom) for atom in equation.invars]
        depends |= dict.fromkeys(equation.outvars, any(inputs))
        if not any(inputs):
            continue
        shapes = [atom.aval.shape for atom, flag in zip(equation.invars, inputs, strict=True) if flag]
        shapes += [variable.aval.shape for variable in equation.outvars]
        if any(s != shape for s in shapes):
            return False
        body = body_of(equation)
        if body is not None:
            if not _body_is_componentwise(body, inputs, shape):
                return False
        elif equation.primitive.name not in COMPONENTWISE | _FLAGS_AND_STEPS:
            return False
    return all(atom.aval.shape == shape for atom in closed.jaxpr.outvars)


_FLAGS_AND_STEPS = {
    "and", "ceil", "eq", "floor", "ge", "gt", "is_finite", "le", "lt", "ne", "not", "or", "round", "sign", "stop_gradient",
}  # fmt: skip


def has_no_second_derivative(operation: Operation, live: Sequence[bool]) -> bool:
    """Whether a component-wise operation is linear, piece by piece, in its live inputs together."""
    if operation.name == "mul":
        return sum(live) == 1
    if operation.name == "div":
        return live == [True, False]
    return operation.name in _PIECEWISE_LINEAR


class ComponentwiseRule(Rule):
    """A cluster of component-wise operations with one output; `linear` if none has a second derivative."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        function: Callable[..., Sequence[Array]],
        values: Sequence[Array],
        *,
        linear: bool,
    ) -> None:
        super().__init__(inputs, outputs, function, values)
        self.linear = linear
        self._derivatives = dict(zip(self.inputs, self._partials(*self.values), strict=True))

    def _partials(self, *values: Array) -> tuple[Array, ...]:
        (result,), vjp = jax.vjp(lambda *x: tuple(self.function(*x)), *values)
        return vjp((jnp.ones(result.shape, result.dtype),))

    def through(self, kind: Kind, u: int) -> dict[int, Kind]:
        return {a: scale_columns(kind, j.reshape(-1)) for a, j in self._derivatives.items()}

    def between(self, kind: Kind, u: int, keep: Callable[[int, int], bool]) -> Pairs:
        pairs: Pairs = {}
        for a, j in self._derivatives.items():
            for b, k in self._derivatives.items():
                if a <= b and keep(a, b):
                    pairs[a, b] = self._product(kind, j.reshape(-1), k.reshape(-1), same=a == b)
        return pairs

    @staticmethod
    def _product(kind: Kind, j_a: Array, j_b: Array, *, same: bool) -> Kind:
        """`diag(j_a) C diag(j_b)`."""
        match kind:
            case Diagonal():
                return Diagonal(kind.values * j_a * j_b)
            case Factored() if same:
                values = None if kind.values is None else kind.values * j_a**2
                return Factored(kind.rows, kind.middle, j_a if kind.scale is None else kind.scale * j_a, values)
            case _:
                return Dense(as_dense(kind) * (j_a[:, None] * j_b[None, :]))

    def own_diagonals(self, kind: Kind, u: int, wanted: Collection[int]) -> dict[int, Diagonal]:
        own = diagonal_of(kind)
        return {a: Diagonal(own.values * self._derivatives[a].reshape(-1) ** 2) for a in wanted}

    def second(self, g: dict[int, Array], keep: Callable[[int, int], bool]) -> Pairs:
        (u,) = self.outputs
        if self.linear or u not in g:
            return {}
        pairs: Pairs = {}
        for position, b in enumerate(self.inputs):
            tangents = tuple(
                jnp.ones(v.shape, v.dtype) if i == position else jnp.zeros(v.shape, v.dtype)
                for i, v in enumerate(self.values)
            )
            _, column = jax.jvp(self._partials, self.values, tangents)
            for a, h in zip(self.inputs, column, strict=True):
                if a <= b and keep(a, b):
                    pairs[a, b] = Diagonal((g[u] * h).reshape(-1))
        return pairs
