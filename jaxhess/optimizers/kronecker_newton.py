"""Newton's method with one Kronecker product for each parameter's block, for big layers and long runs.

    H ≈ A ⊗ B = (U ⊗ V) diag(a_i b_j) (U ⊗ V)^T         d = -U [ (U^T G V) / (|a_i b_j| + λ) ] V^T

A ⊗ B is the product nearest to the exact block (Van Loan and Pitsianis 1993), averaged over the run and computed anew every
some steps only. Damping is added to the product itself, not to its factors. Learning rate and momentum come from the exact
quadratic model, by products with the exact curvature.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.paths import naming, paths_of
from jaxhess.optimizers.core import Direction, Method, Settings, transformation
from jaxhess.optimizers.damping import TrustRadius, as_rule, levenberg_marquardt
from jaxhess.optimizers.kronecker_factors import factors_of, layout_of
from jaxhess.optimizers.state import Optimizer, Wanted

__all__ = ["Factors", "kronecker_newton", "scale_by_kronecker_newton"]

_LARGEST = 8192  # side of a factor


class Factors(NamedTuple):
    """A (m, m) and B (n, n) of a parameter read as (m, n), with their eigenvalues and eigenvectors."""

    left: Array
    right: Array
    left_values: Array
    left_vectors: Array
    right_values: Array
    right_vectors: Array


class Memory(NamedTuple):
    """The factors of each parameter, in the order of the leaves; how often they were computed and at which update last, ()
    int32."""

    factors: tuple[Factors, ...]
    refreshed: Array
    last: Array


class _Prepared(NamedTuple):
    """The factors, and what is added to their product's eigenvalues; NaN where new factors were not finite."""

    factors: tuple[Factors, ...]
    decay: Array


@dataclasses.dataclass(frozen=True)
class _KroneckerNewton(Method):
    every: Any
    decay: Any
    name: str = "kronecker_newton"

    def init(self, params: PyTree) -> PyTree:
        factors = []
        for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
            m, n = _sides(jnp.shape(leaf))
            if max(m, n) > _LARGEST:
                raise InputError(
                    f"kronecker_newton: {path!r} of shape {jnp.shape(leaf)} has factors of {m} and {n} rows, more than "
                    f"{_LARGEST}; leave it to another optimizer, by optax.partition"
                )
            dtype = jnp.promote_types(leaf.dtype, jnp.float32)
            factors.append(
                Factors(
                    jnp.zeros((m, m), dtype), jnp.zeros((n, n), dtype), jnp.zeros(m, dtype), jnp.eye(m, dtype=dtype),
                    jnp.zeros(n, dtype), jnp.eye(n, dtype=dtype),
                )
            )  # fmt: skip
        return Memory(tuple(factors), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        def refreshed(memory: Memory) -> tuple[Memory, Array]:
            operator = curvature if hasattr(curvature, "in_structure") else curvature()
            if not isinstance(operator, BlockDiagonal):
                raise InputError(
                    f"kronecker_newton: curvature must have a block for each parameter, got a {type(operator).__name__}; "
                    "use blocks='diagonal'"
                )
            weight = jnp.minimum(1 - 1 / (memory.refreshed + 1.0), self.decay)
            kept = []
            for (path, block), old in zip(operator.items(), memory.factors, strict=True):
                with naming(path):
                    kept.append(_averaged(old, *factors_of(block), weight))
            new = Memory(tuple(kept), memory.refreshed + 1, count)
            # What is not finite is not remembered, and asked for again at the next update.
            good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
            return jax.tree.map(lambda a, b: jnp.where(good, a, b).astype(b.dtype), new, memory), good

        due = (memory.refreshed == 0) | (count - memory.last >= self.every)
        memory, good = jax.lax.cond(due, refreshed, lambda memory: (memory, jnp.ones((), bool)), memory)
        return _Prepared(memory.factors, jnp.where(good, decay, jnp.nan)), memory

    def solver(self, prepared: Any) -> str:
        return "Kronecker factors"

    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        del start

        def solved(leaf: Array, factors: Factors) -> Array:
            shifted = _magnitudes(factors, prepared.decay + damping)
            return _in_eigenvectors(leaf, factors, lambda inner: -inner / jnp.where(shifted == 0, 1, shifted))

        step = _mapped(solved, gradient, prepared.factors)
        return Direction(step, damping, jnp.zeros((), jnp.int32), jnp.full_like(damping, jnp.nan))

    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        def times(leaf: Array, factors: Factors) -> Array:
            return _in_eigenvectors(leaf, factors, lambda inner: _magnitudes(factors, prepared.decay) * inner)

        return _mapped(times, vector, prepared.factors)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """(m, n) of a parameter: a vector is all rows; of more than two axes the last one is the rows."""
    layout = layout_of(shape)
    return layout.m, layout.n


def _averaged(old: Factors, A: Array, B: Array, weight: Array) -> Factors:
    """The running mean of factors of equal norm, decomposed."""
    a, b = jnp.linalg.norm(A), jnp.linalg.norm(B)
    share = jnp.sqrt(jnp.where((a > 0) & (b > 0), b / jnp.where(a > 0, a, 1), 1))
    A, B = share * A, B / share
    weight = weight.astype(A.dtype)
    left = symmetrise(weight * old.left + (1 - weight) * A)
    right = symmetrise(weight * old.right + (1 - weight) * B)
    (left_values, left_vectors), (right_values, right_vectors) = jnp.linalg.eigh(left), jnp.linalg.eigh(right)
    return Factors(left, right, left_values, left_vectors, right_values, right_vectors)


def _magnitudes(factors: Factors, added: Array) -> Array:
    """|a_i b_j| + λ, (m, n)."""
    magnitudes = jnp.abs(jnp.outer(factors.left_values, factors.right_values))
    return magnitudes + added.astype(magnitudes.dtype)


def _in_eigenvectors(leaf: Array, factors: Factors, function: Any) -> Array:
    layout, U, V = layout_of(leaf.shape), factors.left_vectors, factors.right_vectors
    inner = function(matmul(matmul(U.T, layout.to_matrix(leaf).astype(U.dtype)), V))
    return layout.from_matrix(matmul(matmul(U, inner), V.T)).astype(leaf.dtype)


def _mapped(function: Any, tree: PyTree, prepared: tuple[Factors, ...]) -> PyTree:
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [function(leaf, factors) for leaf, factors in zip(leaves, prepared, strict=True)])


def scale_by_kronecker_newton(
    *,
    every: int = 10,
    decay: float = 0.95,
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = "exact",
    momentum: Any = "exact",
    weight_decay: Any = None,
    max_attempts: int = 4,
    max_failures: int = 10,
) -> Optimizer:
    """Gradients scaled by the inverse of the nearest Kronecker product of each parameter's exact block.

    `update(grads, state, params, curvature=C, product=P, value=E, value_fn=f)`: C is an operator with a block for each
    parameter, a `BlockDiagonal` of `jaxhess.hessian`, `jaxhess.gauss_newton` or `jaxhess.fisher`; or, since it is asked for
    every some steps only, a function without arguments that gives one. P multiplies vectors with the curvature whose
    quadratic model gives learning rate and momentum, by default with the Kronecker product itself.

    Args:
        every: how many updates the factors are kept for, >= 1.
        decay: of the running mean of factors, in [0, 1); the first ones count equally.
        damping, learning_rate, momentum, weight_decay, max_attempts, max_failures: as in `scale_by_newton`.

    Matrices (m, n) have factors of m and n rows, vectors one of all their rows, arrays of more axes one for the last axis
    and one for all others together.

    Raises as `scale_by_newton` does, and `InputError`, by path, for a parameter of more than 8192 rows on a side.

    >>> import jax, jax.numpy as jnp, jaxhess, optax
    >>> def error(params, x):
    ...     return jnp.sum((jnp.tanh(params["w"] @ x) - 0.5) ** 2)
    >>> params, xs = {"w": jnp.ones((1, 2))}, jnp.eye(2)
    >>> def mean(params):
    ...     return jnp.mean(jax.vmap(error, (None, 0))(params, xs))
    >>> optimizer = optax.chain(scale_by_kronecker_newton(every=2), optax.scale(-1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(12):
    ...     E, grads, H = jaxhess.value_grad_and_hessian(error)(params, xs)
    ...     updates, state = optimizer.update(grads, state, params, curvature=H, value=E, value_fn=mean)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(mean(params) < 1e-6)
    True
    """
    if isinstance(every, int | float) and not (every >= 1 and every == int(every)):
        raise InputError(f"kronecker_newton: every must be a whole number >= 1, got {every}")
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise InputError(f"kronecker_newton: decay must be in [0, 1), got {decay}")
    # With an exact learning rate the model is always right about how far to go, so damping falls slowly only.
    slow = isinstance(damping, str) and damping == "levenberg_marquardt"
    rule = levenberg_marquardt(0.1, decrease=1.1) if slow else as_rule("kronecker_newton", damping)
    if isinstance(rule, TrustRadius):
        raise InputError("kronecker_newton: a TrustRadius is for newton with curvature='trust_region'")
    settings = Settings(rule, learning_rate, momentum, weight_decay, max_attempts, max_failures, tuned_every=5)
    settings = settings.checked("kronecker_newton")
    made = transformation(_KroneckerNewton(every, decay), settings)
    return Optimizer.of(made, Wanted("either", "diagonal", sampled=True))


def kronecker_newton(
    *,
    every: int = 10,
    decay: float = 0.95,
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = "exact",
    momentum: Any = "exact",
    weight_decay: Any = None,
    max_attempts: int = 4,
    max_failures: int = 10,
) -> Optimizer:
    """Newton's method with amortised Kronecker factors: `scale_by_kronecker_newton`, whose options it takes, and the sign of
    a descent.

    For `jaxhess.optimizers.step((model, loss), kronecker_newton())`, which makes the factors of one random direction of each
    example's outputs, for the price of a gradient; or `step(fun, kronecker_newton())`, of the exact Hessian's blocks.

    >>> import jax.numpy as jnp, jaxhess
    >>> from jaxhess import optimizers
    >>> def model(params, x):
    ...     return jnp.tanh(params["w"] @ x)
    >>> params, xs, targets = {"w": jnp.ones((1, 2))}, jnp.eye(2), jnp.full((2, 1), 0.5)
    >>> optimizer = optimizers.kronecker_newton(every=2)
    >>> train = optimizers.step((model, jaxhess.losses.squared_error), optimizer)
    >>> state = optimizer.init(params)
    >>> for _ in range(12):
    ...     params, state, metrics = train(params, state, xs, targets)
    >>> bool(metrics.loss < 1e-6)
    True
    """
    scaled = scale_by_kronecker_newton(
        every=every, decay=decay, damping=damping, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay,
        max_attempts=max_attempts, max_failures=max_failures,
    )  # fmt: skip
    return Optimizer.of(optax.chain(scaled, optax.scale(-1.0)), scaled.wanted)
