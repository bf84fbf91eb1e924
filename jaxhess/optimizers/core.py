"""One update of a second-order optimizer: solve, look at what the step does, take it or try a shorter one.

What is solved with is a `Method`; the rest is the same for all of them. A step that raises the error, by more than rounding
of it or of the parameters does, is never taken where `value_fn` is given, nor one with numbers that are not finite.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxhess._linalg import widened
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.vectors import dot, dtype_of, like, norm, plus, where
from jaxhess.optimizers.attempts import Attempts, Problem, reach_of
from jaxhess.optimizers.damping import Control, LevenbergMarquardt, Rule
from jaxhess.optimizers.masking import completed, product_of_kept, restricted
from jaxhess.optimizers.method import Method, Settings
from jaxhess.optimizers.quadratic import Quadratic, inner_products
from jaxhess.optimizers.state import SOLVERS, SecondOrderState, StepInfo, failures_message

__all__ = ["transformation"]


def transformation(method: Method, settings: Settings) -> optax.GradientTransformationExtraArgs:
    """The transformation of gradients to minus the step."""
    name = method.name

    def init(params: PyTree) -> SecondOrderState:
        dtype = jnp.promote_types(dtype_of(params), jnp.float32)
        previous = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), params)
        nothing = jnp.full((), jnp.nan, dtype)
        zero = jnp.zeros((), jnp.int32)
        no = jnp.zeros((), bool)
        left = jnp.asarray(settings.failures, jnp.int32)
        info = StepInfo(
            nothing, nothing, nothing, nothing, no, zero, zero, nothing, nothing, nothing, nothing, zero, left,
        )  # fmt: skip
        state = SecondOrderState(
            zero, settings.rule.start(dtype), zero, nothing, previous if settings.keeps_steps else (), method.init(params),
            info,
        )  # fmt: skip
        return jax.tree.map(lambda x: jnp.array(x, copy=True), state)  # each a buffer of its own, to be donated

    def update(
        updates: PyTree,
        state: Any,  # a SecondOrderState; what optax calls a state is wider
        params: PyTree = None,
        *,
        curvature: Any = None,
        value: Any = None,
        value_fn: Callable[[PyTree], Array] | None = None,
        product: Any = None,
        all_params: PyTree = None,
        raise_failures: bool = True,
        **others: Any,
    ) -> tuple[PyTree, SecondOrderState]:
        del others
        if not jax.tree.leaves(updates):  # a group of `optax.partition` without parameters
            return updates, state._replace(count=state.count + 1)
        _check(name, settings, curvature, value, value_fn, params)
        dtype, count = state.control.damping.dtype, state.count
        params = jax.tree.map(jnp.asarray, params)
        gradient = jax.tree.map(lambda g: jnp.asarray(g, jnp.promote_types(g.dtype, jnp.float32)), updates)
        decays = settings.weight_decay is not None
        decay = jnp.asarray(settings.weight_decay if decays else 0, dtype)
        if decays:
            gradient = plus(gradient, decay, params)
        structure = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), gradient)
        if params is not None:
            leaves_like(f"{name}, params= against the gradients", structure, params)
        known = restricted(name, curvature, structure)
        prepared, memory = method.prepare(known, structure, state.memory, count, decay)
        if product is None:
            model = Quadratic(gradient, lambda v: like(structure, method.product(prepared, v)))
        else:
            model = _model_by_products(name, product, gradient, all_params, decay if decays else None)

        def evaluate(step: PyTree) -> Array:
            # As `optax.apply_updates` will add it.
            moved = jax.tree.map(
                lambda p, s, u: _rounded(widened(p) + widened(_rounded(s, u.dtype)), p.dtype), params, step, updates
            )
            return _value_at(name, value_fn, moved, all_params, decay if decays else None, dtype)

        hidden = jnp.zeros((), dtype)
        if value is not None:
            given, value = jnp.result_type(value), jnp.asarray(value, dtype)
            if jnp.issubdtype(given, jnp.floating) and jnp.finfo(given).bits < jnp.finfo(dtype).bits:
                hidden = jnp.abs(value) * jnp.finfo(given).eps  # what a loss of a narrow dtype cannot tell
            value = value + _penalty(decay, params, dtype) if decays else value
        elif value_fn is not None:
            value = evaluate(jax.tree.map(jnp.zeros_like, gradient))
        else:
            value = jnp.full((), jnp.nan, dtype)
        finite = jnp.all(jnp.isfinite(norm(gradient)))
        if not (value_fn is None and settings.rule.adaptive is False):
            finite = finite & jnp.isfinite(value)
        control = settings.rule.begin(state.control, count)
        if isinstance(settings.rule, LevenbergMarquardt) and settings.rule.relative:
            control = settings.rule.measured(control, method.size(prepared))
        if value_fn is None and settings.rule.adaptive:
            control = _by_last_value(settings.rule, control, state, value)
        by = evaluate if value_fn is not None else None
        noise = jnp.zeros_like(value) if by is None else hidden + _noise(gradient, params, dtype)
        tries = Problem(method, settings, prepared, model, state.previous, count, value, noise, by).solved(control, finite)
        failed = ~finite | ~jnp.isfinite(norm(tries.step)) | ~jnp.isfinite(tries.predicted)
        if by is not None:
            failed = failed | ~(tries.accepted | jnp.isfinite(tries.new_value))
        # However many dampings were tried, one rise: it was not for want of damping.
        ended = settings.rule.ended(tries.control, tries.gained) if by is not None else tries.control
        control = where(failed, settings.rule.refused(control, jnp.full_like(control.damping, jnp.nan)), ended)
        failures = jnp.where(failed, state.failures + 1, 0).astype(jnp.int32)
        left = jnp.asarray(settings.failures - failures, jnp.int32)
        if raise_failures:
            failures = eqx.error_if(failures, left <= 0, failures_message(name, _number(settings.failures)))
        step = jax.tree.map(lambda s: jnp.where(tries.accepted, s, 0), tries.step)
        info = like(state.info, _info(value, tries, method.solver(prepared), left))
        previous = step if settings.keeps_steps else ()
        new_state = SecondOrderState(count + 1, like(state.control, control), failures, value, previous, memory, info)
        return jax.tree.map(lambda s, u: -s.astype(u.dtype), step, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _model_by_products(name: str, product: Any, gradient: PyTree, all_params: PyTree, decay: Array | None) -> Quadratic:
    """The quadratic model of products with all parameters, given as a function or an operator, for those that are kept."""
    by = product.mv if hasattr(product, "mv") else product

    def multiply(vector: PyTree) -> PyTree:
        found = like(gradient, jax.tree.map(jnp.asarray, product_of_kept(name, by, vector, all_params)))
        return found if decay is None else plus(found, decay, vector)

    def forms(vectors: PyTree) -> Array:
        zeros = None if all_params is None else jax.tree.map(jnp.zeros_like, all_params)
        found = product.forms(jax.vmap(lambda vector: completed(name, vector, zeros))(vectors))
        return found if decay is None else found + decay * inner_products(vectors)

    return Quadratic(gradient, multiply, forms if hasattr(product, "forms") else None)


def _info(value: Array, tries: Attempts, solver: str, failures_left: Array) -> StepInfo:
    code = jnp.asarray(SOLVERS.index(solver), jnp.int32)
    return StepInfo(
        value, tries.new_value, tries.predicted, tries.ratio, tries.accepted, tries.tried, tries.iterations,
        tries.residual, tries.learning_rate, tries.momentum, tries.length, code, failures_left,
    )  # fmt: skip


def _by_last_value(rule: Rule, control: Control, state: SecondOrderState, value: Array) -> Control:
    """Without `value_fn` the last step is judged now, by what the error has become."""
    predicted = state.info.predicted
    known = (state.count > 0) & state.info.accepted & (predicted > 0) & jnp.isfinite(state.value) & jnp.isfinite(value)
    ratio = (state.value - value) / jnp.where(known, predicted, 1)
    length = reach_of(state.info.length, state.info.learning_rate)
    judged = where(ratio > 0, rule.taken(control, ratio, length, jnp.zeros_like(length)), rule.refused(control, length))
    return where(known, judged, control)


def _value_at(
    name: str, value_fn: Callable[[PyTree], Array] | None, moved: PyTree, all_params: PyTree, decay: Any, dtype: Any
) -> Array:
    assert value_fn is not None
    found = value_fn(completed(name, moved, all_params))
    if not hasattr(found, "dtype") and not isinstance(found, int | float):
        raise InputError(f"{name}: value_fn must return the mean loss, a scalar, but returned a {type(found).__name__}")
    if jnp.shape(found) != ():
        raise InputError(f"{name}: value_fn must return the mean loss, a scalar, but returned shape {jnp.shape(found)}")
    found = jnp.asarray(found, dtype)
    return found if decay is None else found + _penalty(decay, moved, dtype)


def _penalty(decay: Array, params: PyTree, dtype: Any) -> Array:
    """w ||params||^2 / 2, summed in float32 at least."""
    wide = jax.tree.map(widened, params)
    return decay / 2 * dot(wide, wide).astype(dtype)


def _check(name: str, settings: Settings, curvature: Any, value: Any, value_fn: Any, params: Any) -> None:
    if curvature is None:
        raise InputError(
            f"{name}: update needs curvature=, an operator such as jaxhess.hessian(fun)(params, *batch), or use "
            "jaxhess.optimizers.step, which computes it"
        )
    if settings.rule.adaptive and value is None and value_fn is None:
        raise InputError(
            f"{name}: this damping follows from what the error does, so update needs value_fn=, the error of other "
            "parameters, or value=, that of these; for neither, take damping=1e-3, a constant"
        )
    if value_fn is not None and not callable(value_fn):
        raise InputError(f"{name}: value_fn must be a function of the parameters, got {type(value_fn).__name__}")
    if value is not None and jnp.shape(value) != ():
        raise InputError(f"{name}: value must be the mean loss, a scalar, got shape {jnp.shape(value)}")
    if params is None and (value_fn is not None or settings.weight_decay is not None):
        raise InputError(f"{name}: update needs params= beside value_fn= or weight_decay")


def _noise(gradient: PyTree, params: PyTree, dtype: Any) -> Array:
    """By how much, about, rounding of the parameters changes the error."""
    return norm(jax.tree.map(lambda g, p: g * p.astype(g.dtype) * jnp.finfo(p.dtype).eps, gradient, params)).astype(dtype)


def _rounded(x: Array, dtype: Any) -> Array:
    """`x.astype(dtype)`, whose rounding XLA would leave out of a chain of narrow operations."""
    info = jnp.finfo(dtype)
    narrow = info.bits < 32 and x.dtype != dtype
    return (jax.lax.reduce_precision(x, info.nexp, info.nmant) if narrow else x).astype(dtype)


def _number(given: Any) -> str:
    return "too many" if isinstance(given, Tracer) else str(given)
