"""One jitted training step: loss, gradient, curvature, update."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.vectors import like, where
from jaxhess.optimizers.gauss_newton import choose_solver
from jaxhess.optimizers.products import value_grad_and_linearised
from jaxhess.optimizers.sampling import sampled_curvature
from jaxhess.optimizers.state import (
    SOLVERS,
    SecondOrderState,
    Wanted,
    failures_message,
    find_state,
    find_states,
    wanted_within,
)
from jaxhess.transforms import gauss_newton, gauss_newton_vp, hessian, hvp, linearized_hvp, value_grad_and_hessian
from jaxhess.transforms.checks import check_batch, check_option, check_parameters, hashable

__all__ = ["Metrics", "step"]


class Metrics(NamedTuple):
    """What one training step tells; each 0-d, NaN where it is not known.

    `loss` is the mean before the step, `damping` the next step's (a trust region's radius; of a schedule, this step's),
    `gain_ratio` what the loss fell by over what the quadratic model said; `accepted` whether the parameters moved,
    `attempts` how many dampings were tried, `iterations` those of the solver, `residual` that of its last system; `solver`
    a place in `SOLVERS`.
    """

    loss: Array
    damping: Array
    gain_ratio: Array
    accepted: Array
    attempts: Array
    iterations: Array
    residual: Array
    learning_rate: Array
    momentum: Array
    solver: Array

    @property
    def solver_name(self) -> str:
        """Which solver it was."""
        return SOLVERS[int(self.solver)]


def step(
    loss_or_model: Any,
    optimizer: optax.GradientTransformation,
    *,
    curvature: str | Callable[..., Any] | None = None,
    blocks: str | None = None,
    batch_size: int | None = None,
    key: Array | None = None,
) -> Callable[..., tuple[PyTree, Any, Metrics]]:
    """One training step as a compiled function, `(params, state, *batch)` -> `(params, state, metrics)`.

    Args:
        loss_or_model: the error of ONE example, `fun(params, *example) -> ()`; or the pair `(model, loss)` of
            `model(params, x)` and `loss(output, *targets)`, which Gauss-Newton needs. Any pytree of arrays will do for
            `params`: those of Flax (`nnx.State`) or Equinox (a filtered module) too.
        optimizer: of `jaxhess.optimizers`, alone or within `optax.chain`, `optax.masked` and the like; or any of optax.
        curvature: "hessian" or "gauss_newton", or a function of `(params, *batch)` that gives an operator. By default what
            the optimizer wants, whatever is wrapped around it.
        blocks: "diagonal" or "full", of the curvature; by default what the optimizer wants, or "diagonal" for a Hessian and
            "full" for Gauss-Newton.
        batch_size: compute the curvature in chunks of so many examples.
        key: of the random directions of the outputs that `kronecker_newton` and conjugate gradients make their factors of,
            and the count of the update; by default `jax.random.key(0)`.

    Returns:
        The function; the batch has a leading axis of r examples, of which the mean loss counts. The first call compiles.

    Raises:
        InputError: if Gauss-Newton is wanted of a loss alone, or for options that are not known; by the function, if the
            optimizer holds two methods that want different curvatures.
        RuntimeError: by the function, when `max_failures` updates in a row met a number that is not finite.

    >>> import jax.numpy as jnp, jaxhess
    >>> from jaxhess import optimizers
    >>> def error(params, x, target):
    ...     return jnp.sum((params["w"] @ x - target) ** 2) / 2
    >>> params, xs, targets = {"w": jnp.zeros((1, 2))}, jnp.eye(2), jnp.array([[1.0], [3.0]])
    >>> optimizer = optimizers.newton(damping=1e-6)
    >>> train, state = optimizers.step(error, optimizer), optimizer.init(params)
    >>> params, state, metrics = train(params, state, xs, targets)
    >>> metrics.loss.item(), jnp.round(params["w"], 1).tolist(), metrics.solver_name
    (2.5, [[1.0, 3.0]], 'eigendecomposition of each block')
    """
    pair = isinstance(loss_or_model, tuple)
    if pair and len(loss_or_model) != 2:
        raise InputError(f"step: a model comes with its loss, (model, loss); got {len(loss_or_model)} functions")
    model, loss = map(hashable, loss_or_model if pair else (loss_or_model, loss_or_model))
    error = _Error(model, loss) if pair else model
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise InputError(f"step: optimizer must be one of optax's kind, with init and update, got {optimizer!r:.60}")
    if isinstance(curvature, str):
        check_option("curvature", curvature, ("hessian", "gauss_newton"))
    if blocks is not None:
        check_option("blocks", blocks, ("diagonal", "full"))
    known, options = getattr(optimizer, "wanted", None), (pair, curvature, blocks)
    if known is not None:
        _wanted(known, *options, second_order=True)  # wrong ones are refused at once
    update = _with_extra_arguments(optimizer)

    def mean(params: PyTree, *batch: PyTree) -> Array:
        return jnp.mean(jax.vmap(error, in_axes=(None, *(0 for _ in batch)))(params, *batch))

    def arguments(wanted: Wanted | None, count: Any, params: PyTree, *batch: PyTree) -> tuple[Array, PyTree, dict[str, Any]]:
        """The loss, the gradient, and what curvature there is."""
        if wanted is None:
            return *jax.value_and_grad(mean)(params, *batch), {}
        if callable(curvature):
            return *jax.value_and_grad(mean)(params, *batch), {"curvature": curvature(params, *batch)}
        if wanted.curvature == "hessian":
            if wanted.sampled:
                made = functools.partial(hessian(error, batch_size=batch_size), params, *batch)
                chunked = hvp(error, batch_size=batch_size)
                by_chunks = batch_size is not None
                product = (lambda v: chunked(params, v, *batch)) if by_chunks else linearized_hvp(error)(params, *batch)
                products = {"product": product}
                return *jax.value_and_grad(mean)(params, *batch), {"curvature": made, **products}
            evaluate: Any = value_grad_and_hessian
            value, gradient, H = evaluate(error, blocks=wanted.blocks, batch_size=batch_size)(params, *batch)
            return value, gradient, {"curvature": H}

        def made() -> BlockDiagonal:
            start = jax.random.key(0) if key is None else key
            return sampled_curvature(model, loss, params, *batch, key=jax.random.fold_in(start, count))

        if wanted.sampled:
            if batch_size is None:
                value, gradient, operator = value_grad_and_linearised(model, loss, params, *batch)
                return value, gradient, {"curvature": made, "product": operator}
            product = gauss_newton_vp(model, loss, batch_size=batch_size)
            value, gradient = jax.value_and_grad(mean)(params, *batch)
            return value, gradient, {"curvature": made, "product": lambda v: product(params, v, *batch)}
        evaluate = gauss_newton(model, loss, blocks=wanted.blocks, batch_size=batch_size)
        if wanted.blocks == "full" and _by_products(wanted, evaluate, params, *batch):
            value, gradient, operator = value_grad_and_linearised(model, loss, params, *batch, blocks=made())
            return value, gradient, {"curvature": operator}
        value, gradient = jax.value_and_grad(mean)(params, *batch)
        return value, gradient, {"curvature": evaluate(params, *batch)}

    def body(params: PyTree, state: Any, *batch: PyTree, raise_failures: bool) -> tuple[PyTree, Any, Metrics]:
        own = find_state(state)
        within = known
        if own is not None:
            check_parameters(params)
            check_batch(error, batch)
            within = known if known is not None or callable(curvature) else wanted_within(optimizer, params)
        wanted = _wanted(within, *options, second_order=own is not None)
        value, gradient, extra = arguments(wanted, 0 if own is None else own.count, params, *batch)
        if own is not None:
            extra |= {"all_params": params, "raise_failures": raise_failures}
        updates, state = update(
            gradient, state, params, value=value, grad=gradient, value_fn=lambda p: mean(p, *batch), **extra
        )
        return optax.apply_updates(params, updates), state, _metrics(value, own, find_state(state))

    compiled = jax.jit(body, static_argnames="raise_failures")

    def train(params: PyTree, state: Any, *batch: PyTree) -> tuple[PyTree, Any, Metrics]:
        """`(params, state, *batch)` -> `(params, state, metrics)`."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, state, batch))):
            return compiled(params, state, *batch, raise_failures=True)
        # Without callbacks within: such programs are slower to call, and their errors say "INTERNAL" before anything else.
        found = compiled(params, state, *batch, raise_failures=False)
        if isinstance(found[2].loss, Tracer):  # all arguments are constants of a function that is traced
            return compiled(params, state, *batch, raise_failures=True)
        _raise_failures(state, found[1])
        return found

    return train


def _raise_failures(before: Any, after: Any) -> None:
    """An error for too many failures in a row; waits for the step before, and for this one where it may be one too many."""
    for old, new in zip(find_states(before), find_states(after), strict=True):
        if int(old.info.failures_left) <= 1 and int(new.info.failures_left) <= 0:
            raise RuntimeError(failures_message("optimizers.step", int(new.failures)))


def _with_extra_arguments(optimizer: Any) -> Callable[..., tuple[PyTree, Any]]:
    """Its `update`, which is given extra arguments if it takes any: `optax.MultiSteps` does, and is no type that says so."""
    takes = any(each.kind is each.VAR_KEYWORD for each in inspect.signature(optimizer.update).parameters.values())
    return optimizer.update if takes else optax.with_extra_args_support(optimizer).update


class _Error:
    """The error of one example, of a model and its loss; equal where these are."""

    def __init__(self, model: Callable[..., Any], loss: Callable[..., Any]) -> None:
        self.model, self.loss = model, loss
        self.__name__ = " of ".join(getattr(each, "__name__", type(each).__name__) for each in (loss, model))

    def __call__(self, params: PyTree, x: PyTree, *targets: PyTree) -> Array:
        return self.loss(self.model(params, x), *targets)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Error) and (self.model, self.loss) == (other.model, other.loss)

    def __hash__(self) -> int:
        return hash((self.model, self.loss))


def _wanted(own: Wanted | None, pair: bool, curvature: Any, blocks: str | None, *, second_order: bool) -> Wanted | None:
    """The curvature to compute; None for an optimizer that takes none."""
    if not second_order and curvature is None:
        return None
    named = curvature if isinstance(curvature, str) else None
    kind = named or (own.curvature if own else "gauss_newton" if pair else "hessian")
    if kind == "either":
        kind = "gauss_newton" if pair else "hessian"
    usual = "full" if kind == "gauss_newton" else "diagonal"
    if kind == "gauss_newton" and not pair and not callable(curvature):
        raise InputError(
            "step: Gauss-Newton needs the model and its loss apart; pass step((model, loss), optimizer) with model(params, "
            "x) and loss(output, target), or curvature='hessian' with newton or kronecker_newton"
        )
    chosen = own.blocks if own and own.curvature in (kind, "either") else usual
    return Wanted(kind, blocks or chosen, own.sampled, own.solver) if own else Wanted(kind, blocks or chosen)


def _by_products(wanted: Wanted, evaluate: Callable[..., Any], params: PyTree, *batch: PyTree) -> bool:
    """Whether the whole matrix is solved with by conjugate gradients, which need its products only."""
    if wanted.solver != "auto":
        return wanted.solver == "cg"
    return choose_solver(jax.eval_shape(evaluate, params, *batch)).solver == "cg"


def _metrics(value: Array, before: SecondOrderState | None, after: SecondOrderState | None) -> Metrics:
    unknown, zero = jnp.full_like(value, jnp.nan), jnp.zeros((), jnp.int32)
    if before is None or after is None:
        return Metrics(value, unknown, unknown, jnp.ones((), bool), zero, zero, unknown, unknown, unknown, zero)
    info = after.info
    found = Metrics(
        value, after.control.damping, info.ratio, info.accepted, info.attempts, info.iterations, info.residual,
        info.learning_rate, info.momentum, info.solver,
    )  # fmt: skip
    # What wraps the optimizer, `optax.apply_if_finite` say, may not have called it.
    nothing = Metrics(value, found.damping, unknown, jnp.zeros((), bool), zero, zero, unknown, unknown, unknown, zero)
    return where(after.count != before.count, found, like(found, nothing))
