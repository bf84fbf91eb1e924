"""The quadratic model of the error, over few vectors: learning rate and momentum are its minimum.

    m(s) = g^T s + s^T (C + λ) s / 2

For a direction d and the last step v, the minimum over s = α d + μ v:

    [d^T C d   d^T C v] [α]      [d^T g]
    [d^T C v   v^T C v] [μ]  = - [v^T g]           C + λ in the place of C

(Martens and Grosse 2015, section 7). Where v is zero, or along d, α alone is chosen. Of C the numbers s_i^T C s_j are all
that is needed: for a Gauss-Newton matrix (J s_i)^T B (J s_j), a pass forward and none backward.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._linalg import matmul
from jaxhess._typing import Array, PyTree
from jaxhess.operators.vectors import dtype_of, plus, times

__all__ = [
    "Combination",
    "Quadratic",
    "Restricted",
    "best_combination",
    "best_length",
    "combination_of",
    "inner_products",
]


class Restricted(NamedTuple):
    """The model over the combinations of k vectors: `forms` s_i^T C s_j and `inner` s_i^T s_j (k, k), `slopes` g^T s_i."""

    forms: Array
    inner: Array
    slopes: Array

    def part(self, places: Any) -> "Restricted":
        """Over some of the vectors."""
        places = jnp.asarray(places)
        rows, columns = places[:, None], places[None, :]
        return Restricted(self.forms[rows, columns], self.inner[rows, columns], self.slopes[places])

    def gain(self, coefficients: Array, damping: Array) -> Array:
        """What the model falls by, damping included."""
        damped = self.forms + damping * self.inner
        return -(self.slopes @ coefficients + coefficients @ damped @ coefficients / 2)


class Quadratic(NamedTuple):
    """The model: the gradient, `multiply` for C, and `forms` for all s_i^T C s_j of k vectors, stacked, where there is a
    shorter way to them than products."""

    gradient: PyTree
    multiply: Callable[[PyTree], PyTree]
    forms: Callable[[PyTree], Array] | None = None

    def restricted(self, vectors: PyTree) -> Restricted:
        """To the combinations of k vectors: leaves (k, ..)."""
        rows = _rows(vectors)
        if self.forms is None:
            forms = _pairs(rows, _rows(jax.vmap(self.multiply)(vectors)))
            forms = (forms + forms.T) / 2
        else:
            forms = self.forms(vectors).astype(rows[0].dtype)
        (slopes,) = _pairs(_rows(jax.tree.map(lambda leaf: leaf[None], self.gradient)), rows)
        return Restricted(forms, _pairs(rows, rows), slopes)


class Combination(NamedTuple):
    """`step` s = `learning_rate` d + `momentum` v, and s^T C s."""

    step: PyTree
    curved: Array
    learning_rate: Array
    momentum: Array


def best_length(model: Restricted, damping: Array, momentum: Any = 0.0) -> Array:
    """(α, μ) with the α that minimises the model over α d + μ v, for a given μ; (α,) without v."""
    damped = model.forms + damping * model.inner
    given = jnp.asarray(momentum, damped.dtype)
    slope = model.slopes[0] if len(model.slopes) == 1 else model.slopes[0] + given * damped[0, 1]
    curved = damped[0, 0]
    length = jnp.where(curved > 0, -slope / jnp.where(curved > 0, curved, 1), 1)
    return jnp.stack([length, given][: len(model.slopes)])


def best_combination(model: Restricted, damping: Array) -> Array:
    """(α, μ) that minimise the model over α d + μ v."""
    damped = model.forms + damping * model.inner
    a, b, c = damped[0, 0], damped[0, 1], damped[1, 1]
    p, q = -model.slopes[0], -model.slopes[1]
    # Up to rounding, d and v lie apart where the determinant is a part of what it is made of.
    determinant = a * c - b * b
    apart = (a > 0) & (c > 0) & (determinant > 1e3 * jnp.finfo(a.dtype).eps * a * c)
    safe = jnp.where(apart, determinant, 1)
    alone = jnp.where(a > 0, p / jnp.where(a > 0, a, 1), 1)
    return jnp.stack([jnp.where(apart, (c * p - b * q) / safe, alone), jnp.where(apart, (a * q - b * p) / safe, 0)])


def combination_of(vectors: Sequence[PyTree], model: Restricted, coefficients: Array) -> Combination:
    """The combination of d and, if there are two vectors, v; `model` is restricted to these."""
    step = times(coefficients[0], vectors[0])
    for vector, coefficient in zip(vectors[1:], coefficients[1:], strict=True):
        step = plus(step, coefficient, vector)
    momentum = coefficients[1] if len(vectors) > 1 else jnp.zeros_like(coefficients[0])
    return Combination(step, coefficients @ model.forms @ coefficients, coefficients[0], momentum)


def inner_products(vectors: PyTree) -> Array:
    """s_i^T s_j of k vectors, leaves (k, ..): (k, k)."""
    rows = _rows(vectors)
    return _pairs(rows, rows)


def _rows(vectors: PyTree) -> list[Array]:
    """The leaves, each vector's a row, in the widest dtype."""
    dtype = dtype_of(vectors)
    return [leaf.reshape(len(leaf), -1).astype(dtype) for leaf in jax.tree.leaves(vectors)]


def _pairs(a: list[Array], b: list[Array]) -> Array:
    total = [matmul(x, y.T) for x, y in zip(a, b, strict=True)]
    return sum(total, start=jnp.zeros((len(a[0]), len(b[0])), a[0].dtype))
