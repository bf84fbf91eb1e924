"""Curvature of each example's error with respect to its inputs and to named activations.

    d2E / dx2 of every example, an array (r, *S, *S) for x of shape S,        and its trace, the Laplacian (r,)

by the same sweep that gives the parameters' Hessian, with other leaves (`jaxhess.engine.targets`). Unlike there, nothing is
averaged over the batch: an example's inputs and activations are its own.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from jaxhess._backend import warn_of_wrong_sums
from jaxhess._linalg import check_dense_fits
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.engine.custom import check_derivatives_of
from jaxhess.engine.graph import Graph, evaluate
from jaxhess.engine.targets import Targets, at_taps, make_targets, second_derivatives
from jaxhess.engine.trace import trace
from jaxhess.transforms.checks import Error, check_batch, check_batch_size, hashable, widened
from jaxhess.transforms.traced import wrapping

__all__ = ["Argnums", "Taps", "hessian_of_targets", "laplacian", "of_parameters"]

Argnums = int | Sequence[int]
Taps = str | Sequence[str]
_Spec = tuple[str, Any]  # ("argnums", int or tuple of them) or ("taps", string or tuple of them)


def laplacian(
    fun: Error, argnums: Argnums | None = None, taps: Taps | None = None, batch_size: int | None = None
) -> Callable[..., Any]:
    """The Laplacian of each example's error with respect to its inputs: the trace of the Hessian, without forming it.

    Args:
        fun: a function of ONE example, `fun(params, *example) -> ()`; the solution u(params, x) of a differential
            equation, say. `params` is any pytree of arrays.
        argnums: which argument of `fun`, params being 0; 1 if not given. Of several, the traces are summed, as they are
            over all entries of an argument.
        taps: in the place of `argnums`, the name of an activation (`jaxhess.tap`), or a tuple of names.
        batch_size: process the batch in chunks of so many examples, which bounds the memory; the result is the same.

    Returns:
        A function of `(params, *batch)` giving an array (r,), or for a tuple of names a dictionary of them.

    It can be differentiated in turn (`jax.grad` of a loss that contains it), in the parameters and in the inputs. What has
    few entries before wide layers, or leads into a loop (`scan`), takes a product with the Hessian for each entry;
    everything else one reverse sweep.

    Raises:
        InputError: as `hessian` with `argnums` or `taps` does.
        UnsupportedOperationError: if an operation has no exact curvature; names it and where it was written.

    Source: Naumov (2017), Theorem 1, corrected, continued to the layer's input; see `hessian`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def u(params, x):
    ...     return params * jnp.sum(x**3)
    >>> jaxhess.laplacian(u)(2.0, jnp.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [36.0, 12.0]
    """
    spec = _checked_spec(1 if argnums is None and taps is None else argnums, taps)
    check_batch_size(batch_size)
    return _transformed(fun, spec, batch_size, "laplacian")


def hessian_of_targets(fun: Error, argnums: Argnums, taps: Taps | None, batch_size: int | None) -> Callable[..., Any]:
    """What `hessian` returns for `argnums` other than 0, or for `taps`: a function of `(params, *batch)` giving arrays."""
    spec = _checked_spec(None if taps is not None and of_parameters(argnums) else argnums, taps)
    check_batch_size(batch_size)
    return _transformed(fun, spec, batch_size, "hessian")


def _transformed(fun: Error, spec: _Spec, batch_size: int | None, what: str) -> Callable[..., Any]:
    fun = hashable(fun)

    @wrapping(fun)
    def transformed(params: PyTree, *batch: PyTree) -> Any:
        warn_of_wrong_sums()
        params = _check_arrays(params)
        arrays, examples = check_batch(fun, batch)
        chosen = ("argnums", _check_arguments(fun, spec[1], arrays)) if spec[0] == "argnums" else spec
        return _evaluate(fun, chosen, params, arrays, examples, batch_size, what)

    return transformed


def of_parameters(argnums: Argnums) -> bool:
    """Whether `argnums` is that of the parameters alone."""
    return isinstance(argnums, numbers.Integral) and not isinstance(argnums, bool) and argnums == 0


def _checked_spec(argnums: Argnums | None, taps: Taps | None) -> _Spec:
    if taps is not None:
        if argnums is not None:
            raise InputError(f"argnums={argnums!r} and taps={taps!r} exclude each other: ask for them in two calls.")
        names = (taps,) if isinstance(taps, str) else tuple(taps) if isinstance(taps, Sequence) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"taps must be the name of a tap or a tuple of names, but is {taps!r}.")
        return "taps", taps if isinstance(taps, str) else names
    given = tuple(argnums) if isinstance(argnums, Sequence) and not isinstance(argnums, str) else (argnums,)
    if not given or not all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in given):
        raise InputError(f"argnums must be the number of an argument of fun or a tuple of them, but is {argnums!r}.")
    numbered = tuple(int(n) for n in given if n is not None)
    return "argnums", numbered if isinstance(argnums, Sequence) else numbered[0]


def _check_arrays(params: PyTree) -> PyTree:
    for path, leaf in tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, numbers.Number):
            raise InputError(
                f"params{keystr(path)} is {type(leaf).__name__} {leaf!r:.40}, not an array. Keep it in a "
                "closure (functools.partial), or partition the model (equinox.partition, nnx.split)."
            )
    return jax.tree.map(jnp.asarray, params)


def _check_arguments(fun: Error, argnums: Any, batch: tuple[PyTree, ...]) -> Any:
    """The arguments' numbers, counted from the front; raises `InputError` for what is no example's real floating input."""
    name, count = getattr(fun, "__name__", "fun"), 1 + len(batch)
    given = argnums if isinstance(argnums, tuple) else (argnums,)
    for n in given:
        if not -count <= n < count:
            raise InputError(f"argnums={argnums!r}: {name} was called with {count} arguments, 0 (params) to {count - 1}.")
    chosen = tuple(n % count for n in given)
    if 0 in chosen:
        raise InputError(
            f"argnums={argnums!r} has params (0) among the arguments. Its curvature is a mean over the batch, that of "
            "inputs one array for each example: ask for argnums=0 (hessian, hessian_trace) and for the others apart."
        )
    if len(set(chosen)) < len(chosen):
        raise InputError(f"argnums={argnums!r} names an argument twice.")
    for n in chosen:
        leaves = tree_leaves_with_path(batch[n - 1])
        if not leaves:
            raise InputError(f"Argument {n} of {name} holds no arrays: there is nothing to differentiate with respect to.")
        for path, leaf in leaves:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise InputError(
                    f"Argument {n} of {name}{f', {keystr(path)},' if path else ''} has dtype {leaf.dtype} and "
                    f"shape {list(leaf.shape)}; there is curvature with respect to real floating-point arrays only."
                )
    return chosen if isinstance(argnums, tuple) else chosen[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5, 6))
def _evaluate(
    fun: Error, spec: _Spec, params: PyTree, batch: tuple[PyTree, ...], examples: int, batch_size: int | None, what: str
) -> Any:
    with jax.default_matmul_precision("highest"):
        graph, values, arrays, jaxpr = _graph_of(fun, params, batch)
        inputs = graph.inputs[len(values) :]
        variables = jax.tree.unflatten(jax.tree.structure(batch), inputs)
        chosen = _chosen(spec, variables)
        mixed = spec[0] == "argnums"
        if mixed:
            names = [f"argument {path[0].idx + 1} of fun{keystr(path[1:])}" for path, _ in tree_leaves_with_path(variables)]
            labels = {v: names[inputs.index(v)] for v in jax.tree.leaves(chosen)}
            targets = make_targets(graph, len(values), labels, together=what == "hessian")
        else:
            graph, labels = at_taps(graph, jax.tree.leaves(chosen), jaxpr)
            targets = make_targets(graph, len(values), labels, tuple(labels), together=False)
        check_derivatives_of(targets.graph, targets.during, frozenset(targets.reached))
        if what == "hessian":
            _check_fits(targets, examples, mixed=mixed)
        environment = {**graph.constants, **dict(zip(graph.inputs, values, strict=False))}
        evaluate(targets.before, environment)
        found = second_derivatives(
            targets, environment, dict(zip(inputs, arrays, strict=True)), examples, batch_size,
            mixed=mixed, trace=what == "laplacian",
        )  # fmt: skip
    structure, count = jax.tree.structure(chosen), range(len(targets.variables))
    if what == "laplacian":
        traces = [found[j, j] for j in count]
        return functools.reduce(jnp.add, traces) if mixed else jax.tree.unflatten(structure, traces)
    if not mixed:
        return jax.tree.unflatten(structure, [_shaped(targets, found, j, j) for j in count])
    rows = [jax.tree.unflatten(structure, [_shaped(targets, found, j, k) for k in count]) for j in count]
    return jax.tree.unflatten(structure, rows)


def _chosen(spec: _Spec, variables: tuple[PyTree, ...]) -> PyTree:
    """The tree that the result is in the form of, its leaves the inputs' variables or the names of taps."""
    kind, given = spec
    if kind == "taps":
        return given if isinstance(given, str) else {name: name for name in given}
    return tuple(variables[n - 1] for n in given) if isinstance(given, tuple) else variables[given - 1]


def _shaped(targets: Targets, found: dict[tuple[int, int], Array], j: int, k: int) -> Array:
    """`C[j, k]` (r, *S_j, *S_k); those with j > k are transposes."""
    shapes = [targets.graph.avals[targets.variables[n]].shape for n in (j, k)]
    matrices = found[j, k] if j <= k else jnp.swapaxes(found[k, j], 1, 2)
    return matrices.reshape(matrices.shape[0], *shapes[0], *shapes[1])


def _check_fits(targets: Targets, examples: int, *, mixed: bool) -> None:
    avals = [targets.graph.avals[v] for v in targets.variables]
    groups = [avals] if mixed else [[aval] for aval in avals]
    for group, label in zip(groups, targets.variables, strict=False):
        size = sum(aval.size for aval in group)
        check_dense_fits(
            f"curvature with respect to {targets.graph.names[label]} for {examples} examples",
            examples * size,
            size,
            max(4, *(aval.dtype.itemsize for aval in group)),
            "Use fewer examples in a call, or jaxhess.laplacian where the trace is enough.",
        )


def _graph_of(
    fun: Error, params: PyTree, batch: tuple[PyTree, ...]
) -> tuple[Graph, list[Array], list[Array], Callable[[], Any]]:
    """The graph, the parameters' and the batch's arrays in the precision that they are computed in, and the jaxpr, made
    when it is asked for."""
    leaves, structure = jax.tree.flatten(params)
    values, arrays = [widened(leaf) for leaf in leaves], [widened(a) for a in jax.tree.leaves(batch)]
    wide = jax.tree.unflatten(structure, values)
    example = jax.tree.unflatten(jax.tree.structure(batch), [jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in arrays])
    try:
        return trace(fun, wide, example), values, arrays, lambda: jax.make_jaxpr(fun)(wide, *example)
    except InputError:
        raise
    except TypeError:  # a function that names a narrow type itself may not take a wide one
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), batch)
        return trace(fun, params, example), leaves, jax.tree.leaves(batch), lambda: jax.make_jaxpr(fun)(params, *example)
