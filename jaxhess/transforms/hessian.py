"""Transformations of the error of one example, `fun(params, *example) -> scalar`.

Each returns a function of `(params, *batch)`: the arrays of `batch` have one leading axis of r examples, and the result
is that of the mean error over them. All of it is compiled once for each function and shapes, works inside the user's own
`jit`, `vmap` and `grad`, and is exact: Theorem 1 of Naumov (2017) as corrected, on the graph of `fun` (docs of
`jaxhess.engine.sweep`).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax

from jaxhess._typing import Array, PyTree
from jaxhess.engine.assemble import block, factored, structured_gradients
from jaxhess.engine.batch import sweep_batch
from jaxhess.engine.custom import check_custom_derivatives
from jaxhess.engine.full import layers_of
from jaxhess.engine.parameters import own_curvature, parameter_gradients, shares_parameter
from jaxhess.operators import BlockDiagonal, FullHessian
from jaxhess.transforms.checks import Error, Shared, check_batch_size, check_option, hashable
from jaxhess.transforms.full import full_hessian
from jaxhess.transforms.targets import Argnums, Taps, hessian_of_targets, of_parameters
from jaxhess.transforms.traced import checked, traced, wrapping

__all__ = ["factored_gradient", "hessian", "value_grad_and_hessian"]


@overload
def hessian(
    fun: Error,
    blocks: Literal["diagonal"] = ...,
    batch_size: int | None = ...,
    *,
    argnums: Literal[0] = 0,
    taps: None = None,
) -> Callable[..., BlockDiagonal]: ...


@overload
def hessian(
    fun: Error, blocks: Literal["full"], batch_size: int | None = ..., *, argnums: Literal[0] = 0, taps: None = None
) -> Callable[..., FullHessian]: ...


@overload
def hessian(
    fun: Error, blocks: str = ..., batch_size: int | None = ..., *, argnums: Argnums = 0, taps: Taps | None = None
) -> Callable[..., Any]: ...


def hessian(
    fun: Error,
    blocks: str = "diagonal",
    batch_size: int | None = None,
    *,
    argnums: Argnums = 0,
    taps: Taps | None = None,
) -> Callable[..., Any]:
    """The exact Hessian of the mean error, as structured operators.

    Args:
        fun: the error of ONE example, `fun(params, *example) -> ()`. `params` is any pytree of real floating arrays.
        blocks: "diagonal", the block of each parameter with itself, or "full", all blocks between them as well.
        batch_size: process the batch in chunks of so many examples, which bounds the memory; the result is the same. What
            leads into loops is processed at once: it takes memory as the gradient does.
        argnums: the argument of `fun` to take curvature of, by default 0, the parameters; others of each example apart.
        taps: in the place of `argnums`, the name of an activation (`jaxhess.tap`), or a tuple of names.

    Returns:
        A function of `(params, *batch)`. With blocks="full" it gives a `FullHessian`: products with what the linearised
        gradient keeps, blocks (`H["a"]["b"]`) and the dense form when they are asked for. Otherwise a `BlockDiagonal` over
        the structure of `params`. A weight (m, n) that one input vector meets once has the block `KroneckerProductSum`
        (mn, mn), stored as Q (r, m, m) and Z (r, n); other uses give sums of labelled contractions, biases a dense (m, m)
        block. Parameters that lead into a loop (`scan`, any cell), or meet so many vectors of an example that the matrix
        between them costs more than a pass over the network, have an `ImplicitKroneckerSum`: two substitutions along time in
        the place of that matrix. A parameter that `fun` does not use has a `Diagonal` block of zeros. Arrays narrower than
        float32 are computed, and their blocks held, in float32.
    As with `jax.jit`, `fun` must be pure: what it reads from outside its arguments is read when it is first compiled.
    `custom_jvp` and `custom_vjp` functions keep the derivative that they were given; one that is not the derivative of
    their value, at sample points, is refused.

    Raises:
        InputError: if `fun` does not return a real floating scalar, a parameter is not a real floating array, or the
            batch is empty or its arrays differ in length; if an argument of `argnums` is not there, not of real floating
            arrays, or 0 among others; if a name of `taps` is not there, there twice, or inside of a loop or a branch.
        UnsupportedOperationError: if an operation of `fun` has no exact curvature; names it and where it was written.
        DenseTooLargeError: if a curvature matrix on the way, or an array (r, *S, *S), would not fit in memory.

    Source: Naumov (2017), Theorem 1, equations (28)-(35), corrected (the printed recursion is exact for piecewise-linear
    activations only), for any graph by edge pushing (Gower and Mello 2012); Theorem 2, (74)-(84), corrected, for loops.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(params, x, target):
    ...     return 0.5 * jnp.sum((jnp.tanh(params["w"] @ x) - target) ** 2)
    >>> params = {"w": jnp.ones((2, 3))}
    >>> H = jaxhess.hessian(error)(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> type(H["w"]).__name__, H["w"].Q.shape, H["w"].Z.shape, H["w"].as_matrix().shape
    ('KroneckerProductSum', (5, 2, 2), (5, 3), (6, 6))
    >>> jaxhess.hessian(error, argnums=1)(params, jnp.ones((5, 3)), jnp.zeros((5, 2))).shape
    (5, 3, 3)
    """
    check_option("blocks", blocks, ("diagonal", "full"))
    check_batch_size(batch_size)
    if taps is not None or not of_parameters(argnums):
        return hessian_of_targets(fun, argnums, taps, batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> BlockDiagonal | FullHessian:
        if blocks == "full":
            return full_hessian(fun, *checked(fun, params, batch), batch_size)[2]
        return _call(fun, params, batch, batch_size, "hessian").hessian

    return transformed


@overload
def value_grad_and_hessian(
    fun: Error, blocks: Literal["diagonal"] = ..., batch_size: int | None = ...
) -> Callable[..., tuple[Array, PyTree, BlockDiagonal]]: ...


@overload
def value_grad_and_hessian(
    fun: Error, blocks: Literal["full"], batch_size: int | None = ...
) -> Callable[..., tuple[Array, PyTree, FullHessian]]: ...


def value_grad_and_hessian(fun: Error, blocks: str = "diagonal", batch_size: int | None = None) -> Callable[..., Any]:
    """The mean error, its gradient and its exact Hessian, in one sweep.

    Arguments and errors are those of `hessian`; the gradient has the structure and dtypes of `params`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return 0.5 * jnp.sum((w @ x) ** 2)
    >>> value, gradient, H = jaxhess.value_grad_and_hessian(error)(jnp.ones((1, 2)), jnp.ones((4, 2)))
    >>> float(value), gradient.tolist(), float(H.trace())
    (2.0, [[2.0, 2.0]], 2.0)
    """
    check_option("blocks", blocks, ("diagonal", "full"))
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> tuple[Array, PyTree, BlockDiagonal | FullHessian]:
        if blocks == "full":
            return full_hessian(fun, *checked(fun, params, batch), batch_size)
        result = _call(fun, params, batch, batch_size, "hessian")
        return result.value, result.gradient, result.hessian

    return transformed


def factored_gradient(fun: Error, batch_size: int | None = None) -> Callable[..., PyTree]:
    """The gradient of the mean error, with each weight matrix's as a pair of thin factors.

    Returns a function of `(params, *batch)`. A matrix that meets vectors only in products has a `LowRank` of its shape:
    `left right^T`, one rank for each example and position (and use); any other parameter has its gradient as an array.
    Arguments and errors are those of `hessian`. Source: Naumov (2017), Corollary 1, equation (26).

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum(jnp.sin(w @ x))
    >>> G = jaxhess.factored_gradient(error)(jnp.zeros((2, 3)), jnp.ones((5, 3)))
    >>> G.left.shape, G.right.shape
    ((2, 5), (3, 5))
    """
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> PyTree:
        return _call(fun, params, batch, batch_size, "factored").gradient

    return transformed


class _Result(NamedTuple):
    value: Array
    gradient: PyTree
    hessian: Any


def _call(fun: Error, params: PyTree, batch: tuple[PyTree, ...], batch_size: int | None, what: str) -> _Result:
    params, batch, examples = checked(fun, params, batch)
    return _evaluate(fun, params, batch, examples, batch_size, what).tree


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _evaluate(
    fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None, what: str
) -> Shared:
    with jax.default_matmul_precision("highest"):
        given = traced(fun, params, batch, all_pairs=False)
        plan, environment = given.plan, given.environment
        if what == "hessian":
            check_custom_derivatives(plan)
        second_order = what == "hessian"
        result = sweep_batch(
            plan, environment, given.arrays, examples, batch_size, shares_parameter(plan.leaves), second_order=second_order
        )
        weights = structured_gradients(plan, result)
        gradients = parameter_gradients(plan, result, weights, environment)
        gradient = given.restored(gradients)
        if not second_order:
            pairs = [factored(plan, result, root) for root in plan.parameters]
            either = [g if pair is None else pair for g, pair in zip(jax.tree.leaves(gradient), pairs, strict=True)]
            return Shared(_Result(result.value, jax.tree.unflatten(given.structure, either), None))
        own = own_curvature(plan, result, environment)
        operators = [
            block(plan, result, environment, root, own.get((n, n)), weights) for n, root in enumerate(plan.parameters)
        ]
        hessian = BlockDiagonal(jax.tree.unflatten(given.structure, operators), layers=layers_of(plan))
        return Shared(_Result(result.value, gradient, hessian))
