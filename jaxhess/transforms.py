"""Transformations of the error of one example, `fun(params, *example) -> scalar`.

Each returns a function of `(params, *batch)`: the arrays of `batch` have one leading axis of r examples, and the result
is that of the mean error over them. All of it is compiled once for each function and shapes, works inside the user's own
`jit`, `vmap` and `grad`, and is exact: Theorem 1 of Naumov (2017) as corrected, on the graph of `fun` (docs of
`jaxhess.engine.sweep`).
"""

import functools
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._backend import warn_of_wrong_sums
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.engine import kinds
from jaxhess.engine.assemble import block, factored, structured_gradients
from jaxhess.engine.batch import BatchResult, sweep_batch
from jaxhess.engine.custom import check_custom_derivatives
from jaxhess.engine.graph import evaluate
from jaxhess.engine.plan import Leaf, Plan, make_plan
from jaxhess.engine.sweep import sweep
from jaxhess.engine.trace import trace
from jaxhess.operators import BlockDiagonal

__all__ = ["factored_gradient", "hessian", "value_grad_and_hessian"]

Error = Callable[..., Array]


def hessian(fun: Error, blocks: str = "diagonal", batch_size: int | None = None) -> Callable[..., BlockDiagonal]:
    """The exact Hessian of the mean error, as structured operators.

    Args:
        fun: the error of ONE example, `fun(params, *example) -> ()`. `params` is any pytree of real floating arrays.
        blocks: "diagonal", the block of each parameter with itself.
        batch_size: process the batch in chunks of so many examples, which bounds the memory; the result is the same. What
            leads into loops is processed at once: it takes memory as the gradient does.

    Returns:
        A function of `(params, *batch)` giving a `BlockDiagonal` over the structure of `params`. A weight (m, n) that one
        input vector meets once has the block `KroneckerProductSum` (mn, mn), stored as Q (r, m, m) and Z (r, n); other
        uses give sums of labelled contractions, biases a dense (m, m) block. Parameters that lead into a loop (`scan`, any
        cell), or meet so many vectors of an example that the matrix between them costs more than a pass over the network,
        have an `ImplicitKroneckerSum`: two substitutions along time in the place of that matrix. A parameter that `fun`
        does not use has a `Diagonal` block of zeros. Arrays narrower than float32 are computed, and their blocks held, in
        float32.

    As with `jax.jit`, `fun` must be pure: what it reads from outside its arguments is read when it is first compiled.
    `custom_jvp` and `custom_vjp` functions keep the derivative that they were given; one that is not the derivative of
    their value, at sample points, is refused.

    Raises:
        InputError: if `fun` does not return a real floating scalar, a parameter is not a real floating array, or the
            batch is empty or its arrays differ in length.
        UnsupportedOperationError: if an operation of `fun` has no exact curvature; names it and where it was written.
        DenseTooLargeError: if a curvature matrix on the way would not fit in memory.

    Source: Naumov (2017), Theorem 1, equations (28)-(35), corrected (the printed recursion is exact for piecewise-linear
    activations only), for any graph by edge pushing (Gower and Mello 2012); Theorem 2, (74)-(84), corrected, for loops.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(params, x, target):
    ...     return 0.5 * jnp.sum((jnp.tanh(params["w"] @ x) - target) ** 2)
    >>> params = {"w": jnp.ones((2, 3))}
    >>> H = jaxhess.hessian(error)(params, jnp.ones((5, 3)), jnp.zeros((5, 2)))
    >>> type(H["w"]).__name__, H["w"].Q.shape, H["w"].Z.shape, H["w"].as_matrix().shape
    ('KroneckerProductSum', (5, 2, 2), (5, 3), (6, 6))
    """
    _check_options(blocks, batch_size)
    fun = _hashable(fun)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__"), updated=())
    def transformed(params: PyTree, *batch: PyTree) -> BlockDiagonal:
        return _call(fun, params, batch, batch_size, "hessian").hessian

    return transformed


def value_grad_and_hessian(
    fun: Error, blocks: str = "diagonal", batch_size: int | None = None
) -> Callable[..., tuple[Array, PyTree, BlockDiagonal]]:
    """The mean error, its gradient and its exact Hessian, in one sweep.

    Arguments and errors are those of `hessian`; the gradient has the structure and dtypes of `params`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return 0.5 * jnp.sum((w @ x) ** 2)
    >>> value, gradient, H = jaxhess.value_grad_and_hessian(error)(jnp.ones((1, 2)), jnp.ones((4, 2)))
    >>> float(value), gradient.tolist(), float(H.trace())
    (2.0, [[2.0, 2.0]], 2.0)
    """
    _check_options(blocks, batch_size)
    fun = _hashable(fun)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__"), updated=())
    def transformed(params: PyTree, *batch: PyTree) -> tuple[Array, PyTree, BlockDiagonal]:
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
    _check_options("diagonal", batch_size)
    fun = _hashable(fun)

    @functools.wraps(fun, assigned=("__module__", "__name__", "__qualname__"), updated=())
    def transformed(params: PyTree, *batch: PyTree) -> PyTree:
        return _call(fun, params, batch, batch_size, "factored").gradient

    return transformed


@jax.tree_util.register_pytree_node_class
class _Shared:
    """A tree whose leaves may be the same array; compiled code returns it once."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def tree_flatten(self) -> tuple[list[Any], Any]:
        leaves, structure = jax.tree.flatten(self.tree)
        unique = {id(leaf): leaf for leaf in leaves}
        order = {key: index for index, key in enumerate(unique)}
        return list(unique.values()), (structure, tuple(order[id(leaf)] for leaf in leaves))

    @classmethod
    def tree_unflatten(cls, structure: Any, unique: Any) -> "_Shared":
        unique = list(unique)
        return cls(jax.tree.unflatten(structure[0], [unique[index] for index in structure[1]]))


class _Result(NamedTuple):
    value: Array
    gradient: PyTree
    hessian: Any


def _call(fun: Error, params: PyTree, batch: tuple[PyTree, ...], batch_size: int | None, what: str) -> _Result:
    warn_of_wrong_sums()
    params = _check_parameters(params)
    batch, examples = _check_batch(fun, batch)
    return _evaluate(fun, params, batch, examples, batch_size, what).tree


class _ByIdentity:
    """A function without a hash (a module that holds arrays, say), told apart by identity."""

    def __init__(self, fun: Error) -> None:
        self.fun, self.__name__ = fun, getattr(fun, "__name__", type(fun).__name__)

    def __call__(self, *args: Any) -> Array:
        return self.fun(*args)


def _hashable(fun: Error) -> Error:
    if not callable(fun):
        raise InputError(f"fun must be a function of (params, *example), but is a {type(fun).__name__}.")
    try:
        hash(fun)
    except TypeError:
        return _ByIdentity(fun)
    return fun


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _evaluate(
    fun: Error, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None, what: str
) -> _Shared:
    leaves, structure = jax.tree.flatten(params)
    arrays = jax.tree.leaves(batch)
    wide = [_widened(leaf) for leaf in leaves]
    arrays = [_widened(a) for a in arrays]
    example = jax.tree.unflatten(jax.tree.structure(batch), [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in arrays])
    with jax.default_matmul_precision("highest"):
        try:
            graph = trace(fun, jax.tree.unflatten(structure, wide), example)
        except InputError:
            raise
        except TypeError:  # a function that names a narrow type itself may not take a wide one
            wide = leaves
            graph = trace(fun, params, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch))
            arrays = jax.tree.leaves(batch)
        plan = make_plan(graph, len(leaves))
        if what == "hessian":
            check_custom_derivatives(plan)
        environment = {**plan.graph.constants, **dict(zip(plan.parameters, wide, strict=True))}
        evaluate(plan.before, environment)
        second_order = what == "hessian"
        result = sweep_batch(
            plan, environment, arrays, examples, batch_size, _shares_parameter(plan.leaves), second_order=second_order
        )
        weights = structured_gradients(plan, result)
        gradients = _parameter_gradients(plan, result, weights, environment)
        grads = [g.astype(leaf.dtype) for g, leaf in zip(gradients, leaves, strict=True)]
        if not second_order:
            pairs = [factored(plan, result, root) for root in plan.parameters]
            grads = [g if pair is None else pair for g, pair in zip(grads, pairs, strict=True)]
            return _Shared(_Result(result.value, jax.tree.unflatten(structure, grads), None))
        own = _own_curvature(plan, result, environment)
        operators = [block(plan, result, environment, root, own.get(n), weights) for n, root in enumerate(plan.parameters)]
        hessian = BlockDiagonal(jax.tree.unflatten(structure, operators))
        return _Shared(_Result(result.value, jax.tree.unflatten(structure, grads), hessian))


def _shares_parameter(leaves: tuple[Leaf, ...]) -> Callable[[int, int], bool]:
    return lambda j, k: bool(leaves[j].roots & leaves[k].roots)


def _root_leaves(plan: Plan) -> tuple[Leaf, ...]:
    """The parameters themselves, as the leaves of the sweep over what depends on no data."""
    first = {
        root: min((index for index, step in enumerate(plan.before_steps) if root in step.inputs), default=len(plan.steps))
        for root in plan.parameters
    }
    return tuple(Leaf(root, first[root], frozenset([root])) for root in plan.parameters)


def _parameter_gradients(
    plan: Plan, result: BatchResult, weights: dict[int, Array], environment: dict[int, Array]
) -> list[Array]:
    seeds = dict(weights)
    for n, g in result.gradients.items():
        variable = plan.leaves[n].variable
        seeds[variable] = seeds[variable] + g if variable in seeds else g
    leaves = _root_leaves(plan)
    swept = sweep(
        plan.graph, plan.before_steps, leaves, environment, seeds, {}, _shares_parameter(leaves), second_order=False
    )
    shapes = [plan.graph.avals[root] for root in plan.parameters]
    return [swept.gradients.get(n, jnp.zeros(s.shape, s.dtype)) for n, s in enumerate(shapes)]


def _own_curvature(plan: Plan, result: BatchResult, environment: dict[int, Array]) -> dict[int, kinds.Kind]:
    """The parameters' curvature outside structured uses, carried from the frontier to the parameters."""
    leaves = _root_leaves(plan)
    seeds = {plan.leaves[n].variable: g for n, g in result.gradients.items() if not plan.leaves[n].implicit}
    curvatures = {(plan.leaves[j].variable, plan.leaves[k].variable): kind for (j, k), kind in result.means.items()}
    swept = sweep(plan.graph, plan.before_steps, leaves, environment, seeds, curvatures, _shares_parameter(leaves))
    return {j: kind for (j, k), kind in swept.curvatures.items() if j == k}


def _widened(array: Array) -> Array:
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if narrow else array


def _check_options(blocks: str, batch_size: int | None) -> None:
    if blocks != "diagonal":
        raise InputError(f"blocks={blocks!r} is not known; there is 'diagonal'.")
    integral = isinstance(batch_size, numbers.Integral) and not isinstance(batch_size, bool)
    if batch_size is not None and (not integral or batch_size < 1):
        raise InputError(f"batch_size must be a positive integer or None, but is {batch_size!r}.")


def _check_parameters(params: PyTree) -> PyTree:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise InputError("params holds no arrays: there is nothing to differentiate with respect to.")
    for path, leaf in leaves:
        name = f"params{jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") and not isinstance(leaf, float):
            raise InputError(
                f"{name} is {type(leaf).__name__} {leaf!r:.40}, not a floating-point array. Keep what is not trained "
                "outside of params, in a closure (functools.partial) say, or partition the model (equinox.partition, "
                "nnx.split)."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise InputError(
                f"{name} has dtype {jnp.result_type(leaf)} and shape {list(jnp.shape(leaf))}; parameters must be real "
                "floating-point arrays. Pass other arrays by a closure or as part of the batch."
            )
    return jax.tree.map(jnp.asarray, params)


def _check_batch(fun: Error, batch: tuple[PyTree, ...]) -> tuple[tuple[PyTree, ...], int]:
    lengths: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        name = f"batch argument {jax.tree_util.keystr(path)}"
        if not hasattr(leaf, "dtype") or jnp.ndim(leaf) == 0:
            kind = "scalar" if hasattr(leaf, "dtype") or jnp.isscalar(leaf) else type(leaf).__name__
            raise InputError(
                f"{name} is a {kind}; the batch consists of arrays with a leading axis of examples. "
                "Pass what all examples share by a closure (functools.partial)."
            )
        lengths[name] = jnp.shape(leaf)[0]
    if not lengths:
        return batch, 1
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"The arrays of the batch differ in their number of examples (leading axis): {found}.")
    (examples,) = set(lengths.values())
    if examples == 0:
        raise InputError(
            f"The batch is empty: {', '.join(lengths)} of {getattr(fun, '__name__', 'fun')} have 0 examples; "
            "the mean over no examples is undefined."
        )
    return jax.tree.map(jnp.asarray, batch), examples
