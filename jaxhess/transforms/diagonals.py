"""The diagonal and the trace of the exact Hessian, without its blocks."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.engine.custom import check_custom_derivatives
from jaxhess.engine.diagonal import examples_at_once, hessian_diagonals
from jaxhess.transforms.checks import Error, Shared, check_batch_size, hashable, widened
from jaxhess.transforms.traced import checked, summed_over_chunks, traced, wrapping

__all__ = ["hessian_diagonal", "hessian_trace", "wide_diagonal"]


def hessian_diagonal(fun: Error, batch_size: int | None = None) -> Callable[..., PyTree]:
    """The exact diagonal of the Hessian of the mean error.

    Args:
        fun: the error of ONE example, `fun(params, *example) -> ()`.
        batch_size: process the batch in chunks of so many examples, with the same result; by default as many as take
            about 256 MiB.

    Returns:
        A function of `(params, *batch)` giving a tree like `params`: d2E / dp_i^2 for every entry p_i. For weights that meet
        one vector of each example it costs a few gradients; for others as much as `hessian(fun)(...).diagonal()`.

    Raises:
        InputError, UnsupportedOperationError, DenseTooLargeError: as `hessian` does.

    Source: Naumov (2017), Theorem 1, corrected; only diagonals below the last matrix that is needed in full.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum((w @ x) ** 2)
    >>> jaxhess.hessian_diagonal(error)(jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [1.0, 2.0]])).tolist()
    [[2.0, 4.0]]
    """
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> PyTree:
        params, batch, examples = checked(fun, params, batch)
        diagonal = wide_diagonal(fun, params, batch, examples, batch_size)
        return jax.tree.map(lambda d, p: d.astype(p.dtype), diagonal, params)

    return transformed


def hessian_trace(fun: Error, batch_size: int | None = None) -> Callable[..., Array]:
    """The exact trace of the Hessian of the mean error, at the cost of `hessian_diagonal`; arguments and errors are its.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum((w @ x) ** 2)
    >>> float(jaxhess.hessian_trace(error)(jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [1.0, 2.0]])))
    6.0
    """
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> Array:
        params, batch, examples = checked(fun, params, batch)
        return _evaluate_trace(fun, params, batch, examples, batch_size)

    return transformed


def wide_diagonal(fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None) -> PyTree:
    """The diagonal for checked arguments, in float32 or wider."""
    return _evaluate(fun, params, batch, examples, batch_size).tree


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _evaluate(fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None) -> Shared:
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch, all_pairs=False)
        check_custom_derivatives(given.plan)
        size = min(batch_size or examples_at_once(given.plan, examples), examples)

        def of_chunk(arrays: list[Array], count: int) -> list[Array]:
            diagonals = hessian_diagonals(given.plan, given.environment, arrays, count)
            return [count * diagonal for diagonal in diagonals]

        totals = summed_over_chunks(of_chunk, given.arrays, examples, size)
        return Shared(jax.tree.unflatten(given.structure, [widened(total / examples) for total in totals]))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _evaluate_trace(fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None) -> Array:
    diagonal = jax.tree.leaves(_evaluate(fun, params, batch, examples, batch_size).tree)
    return functools.reduce(jnp.add, map(jnp.sum, diagonal))
