"""Products with the exact Hessian of the mean error."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.engine.compact import LinearMap
from jaxhess.engine.custom import check_custom_derivatives
from jaxhess.engine.failure import naming_the_culprit
from jaxhess.engine.products import hessian_product, linearised_gradient
from jaxhess.operators.paths import leaves_like
from jaxhess.transforms.checks import Error, check_batch_size, hashable, widened
from jaxhess.transforms.traced import checked, summed_over_chunks, traced, wrapping

__all__ = ["Linearised", "hvp", "linearise", "linearized_hvp"]


def hvp(fun: Error, batch_size: int | None = None) -> Callable[..., PyTree]:
    """The product of the Hessian of the mean error with a vector.

    Args:
        fun: the error of ONE example, `fun(params, *example) -> ()`.
        batch_size: process the batch in chunks of so many examples, which bounds the memory; the result is the same.

    Returns:
        A function of `(params, vector, *batch)`, the vector a tree like `params`, giving another. For many products with
        the same parameters and batch, `linearized_hvp` or `hessian(fun, blocks="full")` cost less.

    Raises:
        InputError: as `hessian` does, or if the vector is not like `params`.
        UnsupportedOperationError: if an operation of `fun` cannot be differentiated twice; names it and where it is.

    Source: Pearlmutter (1994), forward over reverse, on the graph of `fun` (its activations stay right where they
    saturate).

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum((w @ x) ** 2)
    >>> jaxhess.hvp(error)(jnp.ones((1, 2)), jnp.array([[1.0, -1.0]]), jnp.array([[1.0, 0.0], [1.0, 2.0]])).tolist()
    [[0.0, -2.0]]
    """
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, vector: PyTree, *batch: PyTree) -> PyTree:
        params, batch, examples = checked(fun, params, batch)
        vectors = [jnp.asarray(v) for v in leaves_like("hvp", params, vector)]
        return _product(fun, params, vectors, batch, examples, batch_size)

    return transformed


def linearized_hvp(fun: Error) -> Callable[..., Callable[[PyTree], PyTree]]:
    """The Hessian of the mean error as a function of a vector, for many products: what does not depend on the vector (the
    layers' inputs, derivatives of activations, gradients) is computed once and kept.

    Returns a function of `(params, *batch)` giving a function of a tree like `params`; that is a pytree too, and may be
    returned from `jit` or passed to it. Arguments and errors are those of `hvp`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum((w @ x) ** 2)
    >>> product = jaxhess.linearized_hvp(error)(jnp.ones((1, 2)), jnp.array([[1.0, 0.0], [1.0, 2.0]]))
    >>> product(jnp.array([[1.0, -1.0]])).tolist(), product(jnp.array([[1.0, 0.0]])).tolist()
    ([[0.0, -2.0]], [[2.0, 2.0]])
    """
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> Callable[[PyTree], PyTree]:
        params, batch, examples = checked(fun, params, batch)
        linear = linearise(fun, params, batch, examples).linear.closed(jax.tree.leaves((params, batch)))
        structure = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        treedef, shapes = jax.tree.structure(params), tuple((s.shape, s.dtype) for s in jax.tree.leaves(structure))
        return jax.tree_util.Partial(_Apply(treedef, shapes), linear)

    return transformed


class Linearised(NamedTuple):
    """The mean error, its gradient (a tree like the parameters), and the product with its Hessian, given the leaves of the
    parameters and the batch, on lists of leaves."""

    value: Array
    gradient: PyTree
    linear: LinearMap


@functools.partial(jax.jit, static_argnums=(0, 3))
def linearise(fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int) -> Linearised:
    """Evaluate the mean error and linearise its gradient."""
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch, all_pairs=False)
        check_custom_derivatives(given.plan)
        with naming_the_culprit(given.plan):
            value, gradient, linear = linearised_gradient(
                given.plan, given.arrays, examples, given.values, jax.tree.leaves((params, batch))
            )
        return Linearised(value, given.restored(gradient), linear)


class _Apply(NamedTuple):
    """What a linearised product needs to know of its argument; hashable."""

    treedef: Any
    shapes: tuple[tuple[tuple[int, ...], Any], ...]

    def __call__(self, linear: Any, vector: PyTree) -> PyTree:
        structure = jax.tree.unflatten(self.treedef, [jax.ShapeDtypeStruct(*shape) for shape in self.shapes])
        vectors = [jnp.asarray(v) for v in leaves_like("linearized_hvp", structure, vector)]
        return jax.tree.unflatten(self.treedef, _apply(linear, vectors, tuple(dtype for _, dtype in self.shapes)))


@functools.partial(jax.jit, static_argnums=2)
def _apply(linear: Any, vectors: list[Array], dtypes: tuple[Any, ...]) -> list[Array]:
    products = linear([], [widened(v.astype(dtype)) for v, dtype in zip(vectors, dtypes, strict=True)])
    return [p.astype(dtype) for p, dtype in zip(products, dtypes, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _product(
    fun: Error, params: PyTree, vectors: list[Array], batch: tuple[PyTree, ...], examples: int, batch_size: int | None
) -> PyTree:
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch, all_pairs=False)
        check_custom_derivatives(given.plan)
        cast = [v.astype(value.dtype) for v, value in zip(vectors, given.values, strict=True)]

        def of_chunk(arrays: list[Array], count: int) -> list[Array]:
            return hessian_product(given.plan, arrays, count, given.values, cast)

        with naming_the_culprit(given.plan):
            totals = summed_over_chunks(of_chunk, given.arrays, examples, min(batch_size or examples, examples))
        return given.restored([total / examples for total in totals])
