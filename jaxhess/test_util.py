"""Checks of a user's own model against autodiff, reported by parameter path."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.operators import StructuredOperator
from jaxhess.transforms import factored_gradient, value_grad_and_hessian

__all__ = ["BlockCheck", "Report", "check_gradient", "check_hessian"]

_TOLERANCE = {8: 1e-10, 4: 2e-4, 2: 2e-2}
_PRODUCTS = 4


@dataclasses.dataclass(frozen=True)
class BlockCheck:
    """One parameter: `error` is the largest deviation from autodiff divided by the largest entry of autodiff's array (where
    that is zero but for rounding, of all parameters' arrays); `compared` says what was held against each other."""

    path: str
    shape: tuple[int, ...]
    found: str
    compared: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN on one side only is not."""
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True)
class Report:
    """The checks of all parameters; `str(report)` is a table."""

    title: str
    checks: tuple[BlockCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether every parameter passed."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "found", "compared", "relative error", "")]
        for check in self.checks:
            verdict = "ok" if check.passed else f"FAILED, tolerance {check.tolerance:.0e}"
            rows.append((check.path, str(list(check.shape)), check.found, check.compared, f"{check.error:.1e}", verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, *lines])


def check_hessian(
    fun: Callable[..., Array],
    params: PyTree,
    *batch: PyTree,
    tolerance: float | None = None,
    batch_size: int | None = None,
    largest_dense: int = 2048,
) -> Report:
    """Hold every block of `jaxhess.hessian(fun)(params, *batch)` against `jax.hessian` of the mean error.

    Args:
        fun, params, batch, batch_size: as for `jaxhess.hessian`.
        tolerance: relative to the largest entry of the block; by default 1e-10 in float64 (enable it with
            `jax.config.update("jax_enable_x64", True)`), 2e-4 in float32.
        largest_dense: a parameter with more entries is checked by products with random vectors instead of densely.

    Returns:
        A `Report`. Its text names each parameter's path, shape, kind of operator and relative error.

    Raises:
        AssertionError: with that text, if a block deviates by more than the tolerance.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(params, x):
    ...     return jnp.sum(jnp.tanh(params["w"] @ x))
    >>> report = jaxhess.test_util.check_hessian(error, {"w": jnp.ones((2, 3))}, jnp.linspace(0, 1, 12).reshape(4, 3))
    >>> report.passed
    True
    """
    _, _, hessian = value_grad_and_hessian(fun, batch_size=batch_size)(params, *batch)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
    pairs = []
    for n, ((path, block), leaf) in enumerate(zip(hessian.items(), leaves, strict=True)):

        def of_leaf(value: Array, n: int = n) -> Array:
            return _mean_error(fun, jax.tree.unflatten(structure, [*leaves[:n], value, *leaves[n + 1 :]]), batch)

        if leaf.size <= largest_dense:
            expected = jax.jit(jax.hessian(of_leaf))(leaf).reshape(leaf.size, leaf.size)
            found, compared = block.as_matrix(), "dense block"
        else:
            vectors = jax.random.normal(jax.random.key(n), (_PRODUCTS, *leaf.shape), leaf.dtype)
            gradient = jax.grad(of_leaf)
            product = jax.jit(lambda v, leaf=leaf, gradient=gradient: jax.jvp(gradient, (leaf,), (v,))[1])
            expected = jax.lax.map(product, vectors)
            found, compared = jax.vmap(block.mv)(vectors), f"{_PRODUCTS} products"
        pairs.append((path, leaf, type(block).__name__, compared, found, expected))
    largest = max((_largest(expected) for *_, expected in pairs), default=0.0)
    checks = [_compare(*pair, tolerance=tolerance, largest=largest) for pair in pairs]
    return _finish(f"Hessian of {_name(fun)} against jax.hessian", checks)


def check_gradient(
    fun: Callable[..., Array],
    params: PyTree,
    *batch: PyTree,
    tolerance: float | None = None,
    batch_size: int | None = None,
) -> Report:
    """Hold the gradients of `jaxhess.value_grad_and_hessian` and of `jaxhess.factored_gradient` against `jax.grad`.

    Arguments, result and errors are those of `check_hessian`.

    >>> import jax.numpy as jnp, jaxhess
    >>> def error(w, x):
    ...     return jnp.sum(jnp.sin(w @ x))
    >>> print(jaxhess.test_util.check_gradient(error, jnp.ones((2, 3)), jnp.ones((4, 3))).checks[1].found)
    LowRank
    """
    _, gradient, _ = value_grad_and_hessian(fun, batch_size=batch_size)(params, *batch)
    factors = factored_gradient(fun, batch_size=batch_size)(params, *batch)
    expected = jax.grad(lambda p: _mean_error(fun, p, batch))(jax.tree.map(jnp.asarray, params))
    checks = []
    for found in (gradient, factors):
        pairs = zip(_leaves(found), _leaves(expected), strict=True)
        for (path, leaf), (_, reference) in pairs:
            dense = leaf.as_matrix() if isinstance(leaf, StructuredOperator) else leaf
            checks.append(_compare(path, reference, type(leaf).__name__, "gradient", dense, reference, tolerance))
    checks = [dataclasses.replace(c, found="array" if "Array" in c.found else c.found) for c in checks]
    return _finish(f"Gradient of {_name(fun)} against jax.grad", checks)


def _mean_error(fun: Callable[..., Array], params: PyTree, batch: tuple[PyTree, ...]) -> Array:
    if not jax.tree.leaves(batch):
        return fun(params, *batch)
    return jnp.mean(jax.vmap(lambda example: fun(params, *example))(batch))


def _leaves(tree: PyTree) -> Iterator[tuple[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, StructuredOperator))
    for path, leaf in paths:
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf


def _largest(array: Array) -> float:
    return float(jnp.max(jnp.where(jnp.isnan(array), 0, jnp.abs(array)), initial=0))


def _compare(
    path: str,
    leaf: Array,
    kind: str,
    compared: str,
    found: Array,
    expected: Array,
    tolerance: float | None,
    largest: float = 0.0,
) -> BlockCheck:
    """`largest` is the largest entry of all parameters' arrays: some roundings of it are no deviation of a block that is
    zero but for them."""
    expected = expected.astype(found.dtype)
    both_nan = jnp.isnan(found) & jnp.isnan(expected)
    difference = jnp.max(jnp.where(both_nan, 0, jnp.abs(found - expected)), initial=0)
    limit = _TOLERANCE.get(leaf.dtype.itemsize, 0.2) if tolerance is None else tolerance
    roundings = 100 * float(jnp.finfo(expected.dtype).eps) * largest
    scale = max(_largest(expected), roundings / limit if limit else 0.0) or 1.0
    return BlockCheck(path, leaf.shape, kind, compared, float(difference) / scale, limit)


def _finish(title: str, checks: list[BlockCheck]) -> Report:
    report = Report(title, tuple(checks))
    if not report.passed:
        raise AssertionError(str(report))
    return report


def _name(fun: Callable[..., Array]) -> str:
    return getattr(fun, "__name__", type(fun).__name__)
