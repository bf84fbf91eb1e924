"""Newton's method with one Kronecker product for each layer's block, for big layers and long runs.

    H ≈ (U ⊗ V) diag(s) (U ⊗ V)^T       P g = U [ (U^T G V) / (|s| + γ) ] V^T       d ≈ -(C + λ)^-1 g

U and V are the eigenvectors of the product nearest to the exact block (Van Loan and Pitsianis 1993), averaged over the run
and computed anew every some steps only, s the exact block's diagonal in them. P is the preconditioner of a few conjugate
gradient iterations with the exact curvature C, in a space that has the last step too; with `max_iterations=1` learning rate
and momentum are the minimum of the exact quadratic model (Martens and Grosse 2015, section 7).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.paths import paths_of
from jaxhess.optimizers.core import transformation
from jaxhess.optimizers.damping import LevenbergMarquardt, TrustRadius, as_rule
from jaxhess.optimizers.kronecker_factors import layout_of
from jaxhess.optimizers.kronecker_inverse import (
    Factors,
    Unit,
    averaged,
    in_eigenvectors,
    magnitudes,
    no_factors,
    units_of,
)
from jaxhess.optimizers.method import Direction, Method, Refinement, Settings
from jaxhess.optimizers.state import Optimizer, Wanted
from jaxhess.transforms.checks import as_static_integer, check_number

__all__ = ["kronecker_newton", "scale_by_kronecker_newton"]

_LARGEST = 8192  # side of a factor
_ITERATIONS = 20
_FIRST_DAMPING, _OF_SINGLE = 0.5, 0.15  # in mean eigenvalues of the first factors; with single iterations
_BIG = 2**18  # parameters from which an iteration costs as much as the rest of a step


class Memory(NamedTuple):
    """The factors of each parameter, in the order of the leaves; how often they were computed and at which update last, ()
    int32."""

    factors: tuple[Factors, ...]
    refreshed: Array
    last: Array


class _Prepared(NamedTuple):
    """The factors, and what is added to the eigenvalues; NaN where new factors were not finite."""

    factors: tuple[Factors, ...]
    units: tuple[Unit, ...]
    decay: Array


@dataclasses.dataclass(frozen=True)
class _KroneckerNewton(Method):
    every: Any
    decay: Any
    soon: bool  # the first factors are never kept for longer than the run has taken
    name: str = "kronecker_newton"

    def init(self, params: PyTree) -> PyTree:
        factors = []
        for path, leaf in zip(paths_of(params), jax.tree.leaves(params), strict=True):
            layout = layout_of(jnp.shape(leaf))
            if max(layout.m, layout.n) > _LARGEST:
                raise InputError(
                    f"kronecker_newton: {path!r} of shape {jnp.shape(leaf)} has factors of {layout.m} and {layout.n} rows, "
                    f"more than {_LARGEST}; leave it to another optimizer, by optax.partition"
                )
            factors.append(no_factors(jnp.shape(leaf), jnp.promote_types(leaf.dtype, jnp.float32)))
        return Memory(tuple(factors), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        # Compiled, so that it is traced once for its structure and for its numbers.
        made = curvature if hasattr(curvature, "in_structure") else jax.jit(curvature)
        units = _units(made)

        def refreshed(memory: Memory) -> tuple[Memory, Array]:
            weight = jnp.minimum(1 - 1 / (memory.refreshed + 1.0), self.decay)
            new = Memory(averaged(_blocks(made), units, memory.factors, weight), memory.refreshed + 1, count)
            # What is not finite is not remembered, and asked for again at the next update.
            good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]))
            return jax.tree.map(lambda a, b: jnp.where(good, a, b).astype(b.dtype), new, memory), good

        age = jnp.minimum(self.every, memory.last + 1) if self.soon else self.every
        due = (memory.refreshed == 0) | (count - memory.last >= age)
        memory, good = jax.lax.cond(due, refreshed, lambda memory: (memory, jnp.ones((), bool)), memory)
        return _Prepared(memory.factors, units, jnp.where(good, decay, jnp.nan)), memory

    def solver(self, prepared: Any) -> str:
        return "Kronecker factors"

    def size(self, prepared: Any) -> Array:
        values = [jnp.abs(prepared.factors[unit.weight].values) for unit in prepared.units]
        return sum(map(jnp.sum, values), jnp.zeros(())) / max(1, sum(map(jnp.size, values)))

    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        del start

        def solved(inner: Array, factors: Factors) -> Array:
            shifted = magnitudes(factors, prepared.decay + damping)
            return -inner / jnp.where(shifted == 0, 1, shifted)

        step = in_eigenvectors(gradient, prepared.units, prepared.factors, solved)
        return Direction(step, damping, jnp.zeros((), jnp.int32), jnp.full_like(damping, jnp.nan))

    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        def times(inner: Array, factors: Factors) -> Array:
            return magnitudes(factors, prepared.decay) * inner

        return in_eigenvectors(vector, prepared.units, prepared.factors, times)


def _blocks(curvature: Any) -> BlockDiagonal:
    operator = curvature if hasattr(curvature, "in_structure") else curvature()
    if not isinstance(operator, BlockDiagonal):
        raise InputError(
            f"kronecker_newton: curvature must have a block for each parameter, got a {type(operator).__name__}; "
            "use blocks='diagonal'"
        )
    return operator


def _units(curvature: Any) -> tuple[Unit, ...]:
    """Which weights and biases are of one layer, without computing the curvature."""
    found: list[tuple[Unit, ...]] = []

    def trace() -> None:
        found.append(units_of(_blocks(curvature)))

    jax.eval_shape(trace)
    return found[0]


def scale_by_kronecker_newton(
    *,
    every: int = 10,
    decay: float = 0.8,
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = "exact",
    momentum: Any = "exact",
    weight_decay: Any = None,
    max_iterations: int | None = None,
    progress: float = 0.1,
    max_attempts: int = 4,
    max_failures: int = 10,
) -> Optimizer:
    """Gradients scaled by the inverse of the nearest Kronecker product of each layer's exact block, and conjugate gradients
    with the exact curvature that it is the preconditioner of.

    `update(grads, state, params, curvature=C, product=P, value=E, value_fn=f)`: C is an operator with a block for each
    parameter, a `BlockDiagonal` of `jaxhess.hessian`, `jaxhess.gauss_newton` or `jaxhess.fisher`; or, since it is asked for
    every some steps only, a function without arguments that gives one. P, a function or an operator, multiplies vectors with
    the curvature of the quadratic model, by default with the Kronecker product itself.

    Args:
        every: how many updates the factors are kept for, >= 1.
        decay: of the running mean of factors, in [0, 1); the first ones count equally.
        max_iterations, progress: conjugate gradient iterations, a product with P each, stop at that number, or after one
            that lowers the quadratic model by less than the share `progress` of all. They start beside the last step, so
            that momentum is a part of them; 1 is the minimum over learning rate and momentum alone, with no product but
            two passes forward. By default 20, and 1 for more than 2^18 parameters. They want learning_rate="exact" and
            momentum="exact"; with others there are none.
        damping, learning_rate, momentum, weight_decay, max_attempts, max_failures: as in `scale_by_newton`; the name
            "levenberg_marquardt" is `levenberg_marquardt(0.5, decrease=1.07, release=2.0, relative=True, neutral=0.3)` here,
            with 0.15 in the place of 0.5 for single iterations.

    Matrices (m, n) have factors of m and n rows, vectors one of all their rows, arrays of more axes one for the last axis
    and one for all others together. A bias that is added to the product with a weight, and used nowhere else, shares the
    factors of the weight (`BlockDiagonal.layers`).

    The first λ is 0.5 mean eigenvalues of the first factors, 0.15 with single iterations, so that a loss in other units
    takes the same steps; gain ratios above 0.3 lower it. With more than 2^18 parameters the first factors are soon computed
    anew, after 1, 3, 7 and 15 updates.

    A step that gains less than half of what the quadratic model says, or raises the error, is shortened to the minimum of
    the parabola that has the error at both of its ends and the slope at the first, by one more call of value_fn, before any
    other damping is tried; not one whose learning_rate or momentum is given.

    Of several iterations `info.learning_rate` is the length of the first one's step, `info.momentum` the factor of the last
    step that they begin with; both are times the part of the step that is taken.

    Source: Martens and Grosse (2015) for the factors and the exact learning rate and momentum; the factors here are those
    nearest to the blocks (Van Loan and Pitsianis 1993).

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
    check_number("kronecker_newton: every", every, least=1, whole=True)
    check_number("kronecker_newton: decay", decay, least=0, below=1)
    check_number("kronecker_newton: progress", progress, least=0, below=1)
    if max_iterations is not None:
        max_iterations = as_static_integer("kronecker_newton: max_iterations", max_iterations)
    # With an exact learning rate the model is always right about how far to go, so damping falls slowly, but where nothing
    # else limits the step.
    rule = as_rule("kronecker_newton", damping)
    follows = LevenbergMarquardt(decrease=1.07, release=2.0, relative=True, neutral=0.3)
    if isinstance(rule, TrustRadius):
        raise InputError("kronecker_newton: a TrustRadius is for newton with curvature='trust_region'")
    settings = Settings(rule, learning_rate, momentum, weight_decay, max_attempts, max_failures, tuned_every=5)
    settings = settings.checked("kronecker_newton")
    exact = isinstance(learning_rate, str) and isinstance(momentum, str)
    given = not isinstance(learning_rate, str) or not (momentum is None or isinstance(momentum, str))
    settings = dataclasses.replace(settings, interpolates=not given)

    def made(big: bool) -> optax.GradientTransformationExtraArgs:
        most = max_iterations or (1 if big else _ITERATIONS)
        refinement = Refinement(most, progress) if exact and most > 1 else None
        own = dataclasses.replace(settings, refinement=refinement)
        if isinstance(damping, str):
            initial = _OF_SINGLE if refinement is None else _FIRST_DAMPING
            own = dataclasses.replace(own, rule=dataclasses.replace(follows, initial=initial))
        return transformation(_KroneckerNewton(every, decay, big), own)

    small, big = made(False), made(True)

    def of(tree: PyTree) -> optax.GradientTransformationExtraArgs:
        return big if sum(leaf.size for leaf in jax.tree.leaves(tree)) > _BIG else small

    def init(params: PyTree) -> Any:
        return of(params).init(params)

    def update(updates: PyTree, state: Any, params: PyTree = None, **others: Any) -> Any:
        return of(updates).update(updates, state, params, **others)

    chosen = optax.GradientTransformationExtraArgs(init, update)
    return Optimizer.of(chosen, Wanted("either", "diagonal", sampled=True))


def kronecker_newton(
    *,
    every: int = 10,
    decay: float = 0.8,
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = "exact",
    momentum: Any = "exact",
    weight_decay: Any = None,
    max_iterations: int | None = None,
    progress: float = 0.1,
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
    >>> for _ in range(30):
    ...     params, state, metrics = train(params, state, xs, targets)
    >>> bool(metrics.loss < 1e-6)
    True
    """
    scaled = scale_by_kronecker_newton(
        every=every, decay=decay, damping=damping, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay,
        max_iterations=max_iterations, progress=progress, max_attempts=max_attempts, max_failures=max_failures,
    )  # fmt: skip
    return Optimizer.of(optax.chain(scaled, optax.scale(-1.0)), scaled.wanted)
