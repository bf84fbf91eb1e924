"""A function of one example, traced and planned for a batch, inside of a compiled transformation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._backend import warn_of_wrong_sums
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.engine.graph import evaluate
from jaxhess.engine.plan import Plan, make_plan
from jaxhess.engine.trace import trace
from jaxhess.transforms.checks import Error, check_batch, check_parameters, widened

__all__ = ["Traced", "checked", "summed_over_chunks", "traced", "wrapping"]


@dataclasses.dataclass
class Traced:
    """The plan, `environment` with the values of all that depends on no data, the batch's `arrays` (r, ...) in graph order;
    `leaves` and `structure` are the parameters' as they were given, `values` what they are computed as."""

    plan: Plan
    environment: dict[int, Array]
    arrays: list[Array]
    leaves: list[Array]
    structure: Any

    @property
    def values(self) -> list[Array]:
        """The parameters in the precision that they are computed in: float32 or wider."""
        return [self.environment[root] for root in self.plan.parameters]

    def restored(self, values: list[Array]) -> PyTree:
        """Arrays for the parameters, in their structure and dtypes."""
        cast = [value.astype(leaf.dtype) for value, leaf in zip(values, self.leaves, strict=True)]
        return jax.tree.unflatten(self.structure, cast)


def traced(fun: Error, params: PyTree, batch: tuple[PyTree, ...], **options: Any) -> Traced:
    """Trace and plan `fun`, and run what depends on no data; `options` are those of `make_plan`. To be called under
    `jax.default_matmul_precision("highest")`."""
    leaves, structure = jax.tree.flatten(params)
    values = [widened(leaf) for leaf in leaves]
    arrays = [widened(a) for a in jax.tree.leaves(batch)]
    example = jax.tree.unflatten(jax.tree.structure(batch), [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in arrays])
    try:
        graph = trace(fun, jax.tree.unflatten(structure, values), example)
    except InputError:
        raise
    except TypeError:  # a function that names a narrow type itself may not take a wide one
        values, arrays = leaves, jax.tree.leaves(batch)
        graph = trace(fun, params, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch))
    plan = make_plan(graph, len(leaves), **options)
    environment = {**plan.graph.constants, **dict(zip(plan.parameters, values, strict=True))}
    evaluate(plan.before, environment)
    return Traced(plan, environment, arrays, leaves, structure)


def checked(fun: Error, params: PyTree, batch: tuple[PyTree, ...]) -> tuple[PyTree, tuple[PyTree, ...], int]:
    """The parameters and the batch as arrays, and the number of examples.

    Raises:
        InputError: if a parameter is not a real floating array, or the batch is empty or its arrays differ in length.
    """
    warn_of_wrong_sums()
    params = check_parameters(params)
    batch, examples = check_batch(fun, batch)
    return params, batch, examples


def wrapping(fun: Error) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: the transformed function has the name of `fun`."""
    return functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__"), updated=())


def summed_over_chunks(of_chunk: Callable[[list[Array], int], Any], arrays: list[Array], examples: int, size: int) -> Any:
    """The sum of `of_chunk(arrays, count)`, a tree of arrays, over chunks of `size` examples and one of the rest."""
    whole, rest = divmod(examples, size)
    if whole <= 1 and not rest:
        return of_chunk(arrays, examples)
    parts = [a[: whole * size].reshape(whole, size, *a.shape[1:]) for a in arrays]
    first = jax.eval_shape(lambda: of_chunk([part[0] for part in parts], size))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)

    def step(total: Any, part: list[Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_chunk(part, size)), None

    total, _ = jax.lax.scan(step, zero, parts)
    if rest:
        total = jax.tree.map(jnp.add, total, of_chunk([a[whole * size :] for a in arrays], rest))
    return total
