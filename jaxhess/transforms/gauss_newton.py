"""Gauss-Newton and Fisher curvature: of `model(params, x)` and a convex `loss(output, target)`, or of an error's gradients.

    G = (1/r) sum_i J_i^T B_i J_i           J_i = d(output)/d(params),  B_i = d2(loss)/d(output)2        section 7
    F = (1/r) sum_i g_i g_i^T               g_i = d(error)/d(params), example by example

Both are positive semidefinite. G is the Hessian less the second derivatives of the model: the two are the same, block by
block, where the model is piecewise linear, and near a perfect fit. F is the empirical Fisher matrix, of the targets seen.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.engine.convex import check_convex
from jaxhess.engine.custom import check_custom_derivatives
from jaxhess.engine.full import layers_of
from jaxhess.engine.gauss_newton import Case, blocks_of, diagonals_of, jacobians_of, product_of
from jaxhess.engine.jacobian import head_of
from jaxhess.operators import BlockDiagonal
from jaxhess.operators.gauss_newton_full import GaussNewton
from jaxhess.transforms.checks import Error, Shared, check_batch_size, check_option, hashable, widened
from jaxhess.transforms.traced import Traced, checked, traced, wrapping

__all__ = ["fisher", "fisher_diagonal", "gauss_newton", "gauss_newton_diagonal", "gauss_newton_vp"]

_MARK = "jaxhess_output_"
_BLOCKS = ("diagonal", "full")


def gauss_newton(
    model: Callable[..., PyTree], loss: Callable[..., Array], blocks: str = "diagonal", batch_size: int | None = None
) -> Callable[..., Any]:
    """The Gauss-Newton matrix of the mean loss, `(1/r) sum_i J_i^T B_i J_i`, as structured operators.

    Args:
        model: the outputs for ONE example, `model(params, x)` -> an array or a pytree of arrays, M floating numbers in all.
        loss: `loss(output, *targets) -> ()` for one example, convex in the output and twice differentiable: those of
            `jaxhess.losses`, of optax, any function.
        blocks: "diagonal", the block of each parameter with itself, or "full", all of them.
        batch_size: process the batch in chunks of so many examples, which bounds the memory of everything but the result;
            the result is the same.

    Returns:
        A function of `(params, xs, *targets)`, pytrees with a leading axis of r examples, giving a `BlockDiagonal` over the
        structure of `params` or, with blocks="full", one `GaussNewton` operator. A weight (m, n) that one input vector
        meets once has a `KroneckerProductSum` of Q (r, m, m) and Z (r, n) where m <= M, and otherwise a `GaussNewtonBlock`
        of V = d(output)/dy (r, M, m), Z and B. Other uses (several places, indexing, convolutions) have a
        `GaussNewtonBlock` too; a bias with m <= M a `Dense` block; a parameter without effect a `Diagonal` of zeros.
        Arrays narrower than float32 are computed in float32.

    Raises:
        InputError: as `jaxhess.hessian` does; also if the model returns no real floating output, the loss does not depend
            on it, or has a negative curvature at a sample of outputs (of both signs and two sizes, with targets 0 if
            they are integers and from 0.2 to 0.8 otherwise). It is a sample: a loss that is not convex elsewhere passes.
        UnsupportedOperationError: if an operation has no derivative; names it and where it was written.

    Source: Schraudolph (2002), "Fast curvature matrix-vector products"; section 7 of the mathematics.

    >>> import jax.numpy as jnp, jaxhess
    >>> def model(params, x):
    ...     return params["out"] @ jnp.tanh(params["hidden"] @ x)
    >>> params = {"hidden": jnp.ones((5, 3)), "out": jnp.ones((2, 5))}
    >>> G = jaxhess.gauss_newton(model, jaxhess.losses.squared_error)(params, jnp.ones((7, 3)), jnp.zeros((7, 2)))
    >>> type(G["out"]).__name__, G["out"].Q.shape, type(G["hidden"]).__name__, G["hidden"].as_matrix().shape
    ('KroneckerProductSum', (7, 2, 2), 'GaussNewtonBlock', (15, 15))
    """
    check_option("blocks", blocks, _BLOCKS)
    check_batch_size(batch_size)
    model, loss = hashable(model), hashable(loss)

    @wrapping(model)
    def transformed(params: PyTree, xs: PyTree, *targets: PyTree) -> Any:
        params, batch, examples = checked(model, params, (xs, *targets))
        return _evaluate(model, loss, params, batch, None, examples, batch_size, blocks).tree

    return transformed


def fisher(fun: Error, blocks: str = "diagonal", batch_size: int | None = None) -> Callable[..., Any]:
    """The empirical Fisher matrix `(1/r) sum_i g_i g_i^T` of the gradients of `fun(params, *example)`, example by example.

    Returns a function of `(params, *batch)`. Arguments, results and errors are those of `gauss_newton` with the error itself
    for the output and B = 1: a weight has a `GaussNewtonBlock` of V (r, 1, m) and Z (r, n).

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(params, x, target):
    ...     return 0.5 * jnp.sum((params["w"] @ x - target) ** 2)
    >>> F = jaxhess.fisher(error)({"w": jnp.ones((2, 3))}, jnp.ones((7, 3)), jnp.zeros((7, 2)))
    >>> F["w"].jacobian.uses[0].rows.shape, F.trace().item()
    ((7, 1, 2), 54.0)
    """
    check_option("blocks", blocks, _BLOCKS)
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> Any:
        params, batch, examples = checked(fun, params, batch)
        return _evaluate(fun, None, params, batch, None, examples, batch_size, blocks).tree

    return transformed


def gauss_newton_vp(
    model: Callable[..., PyTree], loss: Callable[..., Array], batch_size: int | None = None
) -> Callable[..., PyTree]:
    """The Gauss-Newton matrix times a vector, by one pass forward and one backward: nothing of the matrix is held.

    Returns a function of `(params, vector, xs, *targets)`; `vector` has the structure and shapes of `params`, and the
    product has those of `vector`, and its dtypes. Arguments and errors are those of `gauss_newton`.

    >>> import jax.numpy as jnp, jaxhess
    >>> product = jaxhess.gauss_newton_vp(lambda w, x: w @ x, jaxhess.losses.squared_error)
    >>> product(jnp.ones((1, 2)), jnp.array([[1.0, 0.0]]), jnp.array([[1.0, 2.0]]), jnp.zeros((1, 1))).tolist()
    [[1.0, 2.0]]
    """
    check_batch_size(batch_size)
    model, loss = hashable(model), hashable(loss)

    @wrapping(model)
    def transformed(params: PyTree, vector: PyTree, xs: PyTree, *targets: PyTree) -> PyTree:
        params, batch, examples = checked(model, params, (xs, *targets))
        _check_vector(params, vector)
        return _evaluate(model, loss, params, batch, vector, examples, batch_size, "product").tree

    return transformed


def gauss_newton_diagonal(
    model: Callable[..., PyTree], loss: Callable[..., Array], batch_size: int | None = None
) -> Callable[..., PyTree]:
    """The diagonal of the Gauss-Newton matrix, in the structure of `params`, in the memory of one chunk of examples.

    Returns a function of `(params, xs, *targets)`. Arguments and errors are those of `gauss_newton`. A weight that meets one
    vector of each example takes two matrix products over the batch, `(sum_cd V_c * B_cd V_d)^T (Z * Z) / r`.

    >>> import jax.numpy as jnp, jaxhess
    >>> diagonal = jaxhess.gauss_newton_diagonal(lambda w, x: w @ x, jaxhess.losses.squared_error)
    >>> diagonal(jnp.ones((1, 2)), jnp.array([[1.0, 2.0]]), jnp.zeros((1, 1))).tolist()
    [[1.0, 4.0]]
    """
    check_batch_size(batch_size)
    model, loss = hashable(model), hashable(loss)

    @wrapping(model)
    def transformed(params: PyTree, xs: PyTree, *targets: PyTree) -> PyTree:
        params, batch, examples = checked(model, params, (xs, *targets))
        return _evaluate(model, loss, params, batch, None, examples, batch_size, "entries").tree

    return transformed


def fisher_diagonal(fun: Error, batch_size: int | None = None) -> Callable[..., PyTree]:
    """The mean over the examples of the squared gradient of `fun(params, *example)`, in the structure of `params`.

    Returns a function of `(params, *batch)`, in the memory of one chunk of examples. A weight that meets one vector of each
    example takes one matrix product, `(G * G)^T (Z * Z) / r`: its gradients are not formed. Arguments and errors are those
    of `fisher`.

    >>> import jax.numpy as jnp, jaxhess
    >>> jaxhess.fisher_diagonal(lambda w, x: jnp.sum(w @ x))(jnp.ones((1, 2)), jnp.array([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [[5.0, 2.0]]
    """
    check_batch_size(batch_size)
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> PyTree:
        params, batch, examples = checked(fun, params, batch)
        return _evaluate(fun, None, params, batch, None, examples, batch_size, "entries").tree

    return transformed


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7))
def _evaluate(
    model: Callable[..., PyTree],
    loss: Callable[..., Array] | None,
    params: PyTree,
    batch: tuple[PyTree, ...],
    vector: PyTree,
    examples: int,
    batch_size: int | None,
    what: str,
) -> Shared:
    with jax.default_matmul_precision("highest"):
        given = traced(_composite(model, loss), params, batch, marked=_MARK)
        case = _case(given, loss, examples, batch_size)
        if what == "full":
            jacobians, curvature = jacobians_of(case)
            return Shared(GaussNewton(jax.tree.unflatten(given.structure, jacobians), curvature))
        if what == "diagonal":
            blocks = jax.tree.unflatten(given.structure, blocks_of(case))
            return Shared(BlockDiagonal(blocks, layers=layers_of(given.plan)))
        if what == "entries":
            return Shared(jax.tree.unflatten(given.structure, diagonals_of(case)))
        vectors = [jnp.asarray(v) for v in jax.tree.leaves(vector)]
        wide = [v.astype(value.dtype) for v, value in zip(vectors, given.values, strict=True)]
        products = [p.astype(v.dtype) for p, v in zip(product_of(case, wide), vectors, strict=True)]
        return Shared(jax.tree.unflatten(given.structure, products))


def _case(given: Traced, loss: Callable[..., Array] | None, examples: int, batch_size: int | None) -> Case:
    plan, head = given.plan, None
    if loss is not None:
        head = head_of(plan)
        check_custom_derivatives(dataclasses.replace(plan, before=(), during=head.operations, live=head.live))
        check_convex(plan, head, _name(loss))
    return Case(plan, head, given.environment, given.arrays, examples, batch_size)


def _composite(model: Callable[..., PyTree], loss: Callable[..., Array] | None) -> Error:
    """The error of one example, its outputs marked by name so that they are found in the graph."""

    def composite(params: PyTree, *example: PyTree) -> Array:
        if loss is None:
            error = model(params, *example)
            return _marked(error, 0) if all(leaf is error for leaf in jax.tree.leaves(error)) else error
        x, *targets = example
        leaves, structure = jax.tree.flatten(model(params, x))
        found = [jnp.result_type(leaf) for leaf in leaves]
        if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in found):
            raise InputError(f"{_name(model)} has a complex output; give the loss its real and imaginary parts.")
        if not any(jnp.issubdtype(dtype, jnp.floating) for dtype in found):
            kinds = ", ".join(map(str, found)) or "nothing"
            raise InputError(f"{_name(model)} must return real floating-point outputs, but returned {kinds}.")
        return loss(jax.tree.unflatten(structure, [_marked(leaf, k) for k, leaf in enumerate(leaves)]), *targets)

    composite.__name__ = composite.__qualname__ = _name(model) if loss is None else f"{_name(loss)} of {_name(model)}"
    return composite


def _marked(leaf: Any, number: int) -> Any:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return leaf
    return checkpoint_name(jnp.asarray(widened(jnp.asarray(leaf))), f"{_MARK}{number}")


def _check_vector(params: PyTree, vector: PyTree) -> None:
    if jax.tree.structure(params) != jax.tree.structure(vector):
        raise InputError(
            f"gauss_newton_vp: the vector's structure {jax.tree.structure(vector)} is not the parameters' "
            f"{jax.tree.structure(params)}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(vector), strict=True)
    for (path, leaf), part in pairs:
        if jnp.shape(part) != leaf.shape:
            name = f"vector{jax.tree_util.keystr(path)}"
            raise InputError(f"gauss_newton_vp: {name} must have the shape {leaf.shape}, but has {jnp.shape(part)}")
        if not jnp.issubdtype(jnp.result_type(part), jnp.floating):
            name = f"vector{jax.tree_util.keystr(path)}"
            raise InputError(f"gauss_newton_vp: {name} must be a real floating array, but is {jnp.result_type(part)}")


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or getattr(function, "name", None) or type(function).__name__
