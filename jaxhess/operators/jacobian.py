"""The Jacobian of the network's outputs with respect to one parameter, example by example, as its factors.

For the uses `y_j = W z_j` of a parameter and `V_j = d(output)/dy_j` (math: section 7), A_i of example i is

    A X = sum_j V_j (X z_j)             A^T u = sum_j (V_j^T u) z_j^T             entries  V_j[c, i] z_j[q]

X of W's shape, u of the M outputs; where a use has several places, in time or space, they are summed over. A itself, (M, N)
numbers an example, is formed by `dense` only. Where the network uses other arrays `w_1, w_2, .. = f(p)`, A is multiplied by
f's Jacobian.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.operators.contraction import contract
from jaxhess.operators.uses import EXAMPLE, Use

__all__ = ["JacobianUse", "OutputJacobian", "Through", "in_chunks", "times_curvature"]

_OUTPUT = -1
_CHUNK_BYTES = 2**26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JacobianUse:
    """One use: `rows` V (r, M, places.., y) and `inputs` z (r, places.., z), None where the use is no contraction (z = 1).
    `scale` multiplies the parameter's view; `place` is the array that the use takes, 0 unless they are computed from the
    parameter."""

    rows: Array
    inputs: Array | None
    scale: Array
    labels: Use = dataclasses.field(metadata={"static": True})
    place: int = dataclasses.field(metadata={"static": True})

    def contracted(self, result: Sequence[int], *others: tuple[Array, tuple[int, ...]]) -> Array:
        """`scale` times the sum over all labels but those of `result` of V, z and the other labelled arrays."""
        operands: list[tuple[Array, tuple[int, ...]]] = [(self.rows, (EXAMPLE, _OUTPUT, *self.labels.output)), *others]
        if self.inputs is not None:
            operands.append((self.inputs, (EXAMPLE, *(self.labels.input or ()))))
        return self.scale * contract([a for a, _ in operands], [names for _, names in operands], tuple(result))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Through:
    """What the network computes from the parameter alone, `function(point, others)` -> tuple of arrays. `reverse_only` says
    that it has no forward mode (a `custom_vjp` function): its tangent map is then the transpose of its reverse pass."""

    point: Array
    others: Any
    function: Callable[[Array, Any], tuple[Array, ...]] = dataclasses.field(metadata={"static": True})
    reverse_only: bool = dataclasses.field(metadata={"static": True})

    def _computed(self, point: Array) -> tuple[Array, ...]:
        return self.function(point, self.others)

    def push(self, vector: Array) -> tuple[Array, ...]:
        """J_f X."""
        if not self.reverse_only:
            return jax.jvp(self._computed, (self.point,), (vector,))[1]
        values, vjp = jax.vjp(self._computed, self.point)
        return jax.linear_transpose(lambda cotangents: vjp(cotangents)[0], values)(vector)[0]

    def puller(self) -> Callable[[Sequence[Array]], Array]:
        """The map by J_f^T."""
        values, vjp = jax.vjp(self._computed, self.point)
        return lambda arrays: vjp(tuple(a.astype(v.dtype) for a, v in zip(arrays, values, strict=True)))[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputJacobian:
    """A, of `examples` r and `outputs` M, with respect to a parameter of `shape`. Without uses it is zero; `sizes` are the
    shapes of the arrays that the uses take."""

    uses: tuple[JacobianUse, ...]
    through: Through | None
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    examples: int = dataclasses.field(metadata={"static": True})
    outputs: int = dataclasses.field(metadata={"static": True})
    sizes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def size(self) -> int:
        """N, the number of entries of the parameter."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype).size

    @property
    def structure(self) -> jax.ShapeDtypeStruct:
        """The parameter's shape and dtype."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype)

    @property
    def plain(self) -> bool:
        """Whether every entry of A is a product of one entry of V and one of z: a single use with one vector an example."""
        return self.through is None and len(self.uses) == 1 and not self.uses[0].labels.positions

    @property
    def matrix_sizes(self) -> tuple[int, int] | None:
        """(m, n) where the parameter is one matrix that meets one vector of each example, else None."""
        if not self.plain or self.uses[0].inputs is None:
            return None
        labels = self.uses[0].labels
        if set(labels.output) & set(labels.input or ()):
            return None
        return math.prod(labels.output_sizes), math.prod(labels.input_sizes)

    def push(self, vector: Array) -> Array:
        """A X for every example, (r, M)."""
        vector = jnp.asarray(vector, self.dtype)
        arrays = (vector,) if self.through is None else self.through.push(vector)
        total = jnp.zeros((self.examples, self.outputs), self.dtype)
        for use in self.uses:
            given = arrays[use.place].reshape(use.labels.weight_sizes), use.labels.weight
            total = total + use.contracted((EXAMPLE, _OUTPUT), given)
        return total

    def pull(self, cotangents: Array) -> Array:
        """The sum over the examples of A^T u, u (r, M)."""
        arrays = [jnp.zeros(size, self.dtype) for size in self.sizes]
        for use in self.uses:
            part = use.contracted(use.labels.weight, (cotangents, (EXAMPLE, _OUTPUT)))
            arrays[use.place] = arrays[use.place] + part.reshape(self.sizes[use.place])
        return arrays[0] if self.through is None else self.through.puller()(arrays).astype(self.dtype)

    def some(self, start: Any, count: int) -> "OutputJacobian":
        """The same for `count` examples from `start` on, which may be traced."""
        uses = [
            dataclasses.replace(
                use,
                rows=_slice(use.rows, start, count),
                inputs=None if use.inputs is None else _slice(use.inputs, start, count),
            )
            for use in self.uses
        ]
        return dataclasses.replace(self, uses=tuple(uses), examples=count)

    def dense(self) -> Array:
        """A as an array (r, M, N)."""
        lead = (self.examples, self.outputs)
        arrays = [jnp.zeros((*lead, *size), self.dtype) for size in self.sizes]
        for use in self.uses:
            part = use.contracted((EXAMPLE, _OUTPUT, *use.labels.weight))
            arrays[use.place] = arrays[use.place] + part.reshape(*lead, *self.sizes[use.place])
        if self.through is None:
            return arrays[0].reshape(*lead, self.size)
        pulled = jax.vmap(jax.vmap(self.through.puller()))(tuple(arrays))
        return pulled.reshape(*lead, self.size).astype(self.dtype)

    def diagonal(self, curvature: Array | None) -> Array:
        """The diagonal of the sum over the examples of A^T B A, in the parameter's shape."""
        if self.plain:
            (use,) = self.uses
            V = use.rows.reshape(self.examples, self.outputs, -1)
            weights = jnp.sum(V * times_curvature(curvature, V), axis=1).reshape(self.examples, *use.labels.output_sizes)
            operands, labels = [weights], [(EXAMPLE, *use.labels.output)]
            if use.inputs is not None:
                operands.append(use.inputs**2)
                labels.append((EXAMPLE, *(use.labels.input or ())))
            return (use.scale**2 * contract(operands, labels, use.labels.weight)).reshape(self.shape)

        def some(start: Any, count: int) -> Array:
            A = self.some(start, count).dense()
            return jnp.sum(A * times_curvature(_slice(curvature, start, count), A), axis=(0, 1))

        return in_chunks(some, self.examples, self.chunk()).reshape(self.shape)

    def gram(self) -> Array:
        """The products of the rows of A with each other, (r, M, r, M)."""
        sizes = {use.labels.weight_sizes for use in self.uses}
        if self.through is None and len(sizes) == 1 and not any(use.labels.positions for use in self.uses):
            return sum((_products(j, k) for j in self.uses for k in self.uses), jnp.zeros((), self.dtype))

        def some(start: Any, count: int) -> Array:
            rows = self.some(start, count).dense().reshape(count * self.outputs, *self.shape)
            return jax.vmap(self.push)(rows).reshape(count, self.outputs, self.examples, self.outputs)

        return in_chunks(some, self.examples, self.chunk(), stacked=True)

    def chunk(self) -> int:
        """How many examples' A are formed at once."""
        needed = self.outputs * max(1, self.size) * jnp.dtype(self.dtype).itemsize
        return max(1, min(self.examples, _CHUNK_BYTES // max(1, needed)))


def _products(j: JacobianUse, k: JacobianUse) -> Array:
    """(V_ic . V_jd)(z_i . z_j), and its like where the two uses have different layouts: the parameter's labels are shared,
    all others are each use's own."""
    offset = 2 + max((0, *j.labels.weight, *j.labels.positions, *k.labels.weight, *k.labels.positions))
    names = dict(zip(k.labels.weight, j.labels.weight, strict=True))

    def spell(labels: Sequence[int]) -> tuple[int, ...]:
        return tuple(names.get(label, label) for label in labels)

    others: list[tuple[Array, tuple[int, ...]]] = [(k.rows, (offset, offset + 1, *spell(k.labels.output)))]
    if k.inputs is not None:
        others.append((k.inputs, (offset, *spell(k.labels.input or ()))))
    return k.scale * j.contracted((EXAMPLE, _OUTPUT, offset, offset + 1), *others)


def times_curvature(curvature: Array | None, rows: Array) -> Array:
    """`B_i` times `rows` (r, M, ..) of every example; B is (r, M, M), its diagonals (r, M), or None for the identity."""
    if curvature is None:
        return rows
    if curvature.ndim == 2:
        return curvature.reshape(*curvature.shape, *(1 for _ in rows.shape[2:])) * rows
    labels = (EXAMPLE, 1, *range(3, 1 + rows.ndim))
    return contract((curvature, rows), ((EXAMPLE, 1, 2), (EXAMPLE, 2, *labels[2:])), labels)


def in_chunks(function: Callable[[Any, int], Array], examples: int, chunk: int, *, stacked: bool = False) -> Array:
    """The sum of `function(start, count)` over chunks of the examples or, `stacked`, its results one after the other."""
    whole, rest = divmod(examples, chunk)
    if whole == 1 and not rest:
        return function(0, examples)
    starts = chunk * jnp.arange(whole)
    if stacked:
        result = jax.lax.map(lambda start: function(start, chunk), starts)
        result = result.reshape(whole * chunk, *result.shape[2:])
        return jnp.concatenate([result, function(whole * chunk, rest)]) if rest else result
    zero = jax.eval_shape(lambda: function(0, chunk))
    total = jnp.zeros(zero.shape, zero.dtype)
    total, _ = jax.lax.scan(lambda total, start: (total + function(start, chunk), None), total, starts)
    return total + function(whole * chunk, rest) if rest else total


def _slice(array: Any, start: Any, count: int) -> Any:
    return None if array is None else jax.lax.dynamic_slice_in_dim(array, start, count)
