"""Convolutions and table lookups as contractions `y = W z`: what a parameter meets there is a vector, as in a product.

Both become an operation "dot_general" of patches or unit vectors z with the kernel or the table W, followed by operations
that only move components, and so are structured uses to everything that comes after. Their values, and the derivatives with
respect to a convolution's input, stay those of the operation that the user wrote: z is what the curvature is made of, and
carries derivatives only where they are asked for, as S_jk = dz_j / d delta_k of math.md, section 6.

Patches take prod(k) times the memory of the convolution's input. The unit vectors of a lookup have as many components as the
table has rows: with a vocabulary of 50,000, 200 kB in float32 for each token of the batch.

What stays as it was, exact but not structured: kernels and tables that depend on the data themselves; inside loops, grouped
kernels and rows that a counter alone selects; slices of more than one row.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._linalg import PRECISION
from jaxhess._typing import Array
from jaxhess.engine.convolution import Convolution
from jaxhess.engine.graph import Graph, Operation, everything, run_loop
from jaxhess.engine.lookup import Lookup
from jaxhess.engine.reach import Reached, reach

__all__ = ["with_contractions"]

_CANDIDATES = {"conv_general_dilated", "dynamic_slice", "gather"}
_NONE: frozenset[int] = frozenset()


def with_contractions(graph: Graph, parameters: int, *, all_pairs: bool = False) -> Graph:
    """The graph, with contractions in the place of convolutions and lookups whose kernel or table depends on the parameters,
    the first `parameters` inputs, and on no data.

    With `all_pairs` every z that depends on parameters carries derivatives, for blocks of the Hessian between them; without
    it, only where it depends on those of its own W.
    """
    if not any(operation.name in _CANDIDATES for operation in everything(graph.operations)):
        return graph
    data = set(graph.inputs[parameters:])
    _spread(graph.operations, data)
    reached = reach(graph, graph.operations, {root: frozenset([root]) for root in graph.inputs[:parameters]})
    rewriter = _Rewriter(graph, reached, data, all_pairs)
    return dataclasses.replace(graph, operations=rewriter.rewritten(graph.operations, _NONE))


def _spread(operations: Sequence[Operation], data: set[int]) -> None:
    """Add to `data` every variable that depends on it, in the bodies of loops too."""
    for operation in operations:
        loop = operation.loop
        if loop is not None:
            starts = zip((*loop.carry, *loop.slices), operation.inputs[len(loop.shared) :], strict=True)
            grown = {variable for variable, start in starts if start in data}
            while True:
                data |= grown
                _spread(loop.operations, data)
                grown = {c for c, following in zip(loop.carry, loop.next_carry, strict=True) if following in data} - data
                if not grown:
                    break
        if data.intersection(operation.inputs):
            data.update(operation.outputs)


@dataclasses.dataclass
class _Rewriter:
    graph: Graph
    reached: Reached
    data: set[int]
    all_pairs: bool

    def rewritten(self, operations: Sequence[Operation], inside: frozenset[int]) -> list[Operation]:
        """The operations of the graph, or those of a loop whose variables `inside` change from step to step."""
        results: list[Operation] = []
        for operation in operations:
            if operation.loop is not None and self.data.intersection(operation.inputs):
                results.append(self.loop(operation, inside))
            else:
                results += self.alternative(operation, inside) or [operation]
        return results

    def loop(self, operation: Operation, inside: frozenset[int]) -> Operation:
        loop = operation.loop
        assert loop is not None
        made = {o for inner in loop.operations for o in inner.outputs}
        body = self.rewritten(loop.operations, inside | made | {*loop.carry, *loop.slices})
        if body == list(loop.operations):
            return operation
        changed = dataclasses.replace(loop, operations=tuple(body))
        return dataclasses.replace(operation, apply=lambda *values: run_loop(changed, values, {})[0], loop=changed)

    def alternative(self, operation: Operation, inside: frozenset[int]) -> list[Operation] | None:
        """The operations to take the place of one; None where it stays."""
        (output, *others) = operation.outputs
        if operation.name not in _CANDIDATES or others or output not in self.reached or self.graph.avals[output].size == 0:
            return None
        weights = [i for i in operation.inputs if i in self.reached and i not in self.data and i not in inside]
        if operation.name == "conv_general_dilated":
            varying = [i for i in operation.inputs if i in self.data or i in inside]
            return self.convolution(operation, weights[0], bool(inside)) if len(weights) == len(varying) == 1 else None
        selected = bool(self.data.intersection(operation.inputs[1:]))
        return self.lookup(operation) if weights == [operation.inputs[0]] and selected else None

    def convolution(self, operation: Operation, weight: int, in_loop: bool) -> list[Operation] | None:
        (x, kernel), avals = operation.inputs, self.graph.avals
        form = Convolution(operation, avals[x].shape, avals[kernel].shape, avals[operation.outputs[0]].shape)
        if in_loop and (form.groups > 1 or weight == x):  # what depends on the parameter alone belongs before the loop
            return None
        results = []
        if form.groups > 1:
            results.append(self.moving(operation, "reshape", kernel, form.kernel_shape))
            kernel = results[-1].outputs[0]
        own, others = (self.reached.get(i, _NONE) for i in operation.inputs)
        if weight == x or own & others or (self.all_pairs and own):
            patches = self.made(operation, "gather", [x], form.patches)
            inputs, apply = [patches.outputs[0], kernel], form.product
        else:
            patches = self.made(operation, "stop_gradient", [x], lambda x: form.patches(jax.lax.stop_gradient(x)))
            inputs, apply = [patches.outputs[0], kernel, x], lambda _, kernel, x: form.convolved(x, kernel)
        return [*results, patches, *self.contracted(operation, inputs, apply, form.numbers, form.moves)]

    def lookup(self, operation: Operation) -> list[Operation] | None:
        avals = self.graph.avals
        form = Lookup.of(operation, [avals[i] for i in operation.inputs], avals[operation.outputs[0]].shape)
        if form is None:
            return None
        units = self.made(operation, "one_hot", operation.inputs[1:], form.units)
        inputs = [units.outputs[0], *operation.inputs]
        return [units, *self.contracted(operation, inputs, lambda _, *given: form.rows(*given), form.numbers, form.moves)]

    def contracted(
        self,
        source: Operation,
        inputs: Sequence[int],
        apply: Callable[..., Array],
        numbers: Any,
        moves: Sequence[tuple[str, tuple[int, ...]]],
    ) -> list[Operation]:
        """The product, and what makes the result of `source` of it."""
        params = {
            "dimension_numbers": numbers,
            "precision": (PRECISION, PRECISION),
            "preferred_element_type": source.params.get("preferred_element_type"),
        }
        results = [self.made(source, "dot_general", inputs, apply, params)]
        for name, argument in moves:
            variable = results[-1].outputs[0]
            shape = self.graph.avals[variable].shape
            if argument != (tuple(range(len(shape))) if name == "transpose" else shape):
                results.append(self.moving(source, name, variable, argument))
        results[-1] = dataclasses.replace(results[-1], outputs=source.outputs)
        return results

    def moving(self, source: Operation, name: str, variable: int, argument: tuple[int, ...]) -> Operation:
        """A transpose or a reshape of a variable."""
        if name == "transpose":
            return self.made(source, name, [variable], lambda y: jnp.transpose(y, argument), {"permutation": argument})
        params = {"new_sizes": argument, "dimensions": None}
        return self.made(source, name, [variable], lambda y: jnp.reshape(y, argument), params)

    def made(
        self,
        source: Operation,
        name: str,
        inputs: Sequence[int],
        apply: Callable[..., Array],
        params: dict[str, Any] | None = None,
    ) -> Operation:
        """An operation on behalf of `source`, with a new variable."""
        output, avals = len(self.graph.avals), self.graph.avals
        shape = jax.eval_shape(apply, *(avals[i] for i in inputs))
        avals[output] = jax.ShapeDtypeStruct(shape.shape, shape.dtype)
        run = lambda *values: [apply(*values)]  # noqa: E731
        return Operation(name, tuple(inputs), (output,), run, params or {}, source.equation, source.callers)
