"""One update of a second-order optimizer: solve, look at what the step does, take it or try a shorter one.

    d = -(C + λ)^-1 g        s = α d + μ v        E(x + s) <= E(x): taken;  else λ rises (or s shrinks) and it is tried again

What C is and how it is solved with is a `Method`; the rest is the same for all of them. A step that raises the error is
never taken where `value_fn` is given, nor one with numbers that are not finite.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from jaxhess._linalg import widened
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.vectors import dot, dtype_of, like, norm, plus, times, where
from jaxhess.optimizers.damping import Control, Rule, TrustRadius
from jaxhess.optimizers.masking import completed, product_of_kept, restricted
from jaxhess.optimizers.quadratic import Combination, best_combination, best_length
from jaxhess.optimizers.state import SOLVERS, SecondOrderState, StepInfo

__all__ = ["Direction", "Method", "Settings", "transformation"]


_RATIO = 2.0  # between the dampings of an approximate inverse that are compared


class Direction(NamedTuple):
    """`step` d and how the solver went; `damping` is λ in the quadratic model, 0 where a radius takes its place."""

    step: PyTree
    damping: Array
    iterations: Array
    residual: Array


class Method(abc.ABC):
    """What a second-order optimizer solves with. Hashable, without arrays."""

    name: str

    def init(self, params: PyTree) -> PyTree:
        """What is kept from step to step; nothing by default."""
        del params
        return ()

    @abc.abstractmethod
    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        """What all attempts of one update share (an eigendecomposition, say), and the new memory. `decay` times the identity
        belongs to the curvature."""

    @abc.abstractmethod
    def solver(self, prepared: Any) -> str:
        """One of `SOLVERS`."""

    @abc.abstractmethod
    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        """The step for one damping; `start` is the last one, or ()."""

    @abc.abstractmethod
    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        """C times a vector: the matrix of the quadratic model, definite where the method makes it so."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all methods have in common; see `scale_by_newton` for each."""

    rule: Rule
    learning_rate: Any = 1.0
    momentum: Any = None
    weight_decay: Any = None
    attempts: Any = 8
    failures: Any = 10
    warm_start: bool = False
    tuned_every: int = 0  # how often the damping of an approximate inverse is chosen by the quadratic model; 0: never

    @property
    def keeps_steps(self) -> bool:
        """Whether the last step is needed again."""
        return self.momentum is not None or self.warm_start

    def checked(self, name: str) -> "Settings":
        """Itself; raises `InputError` for what is out of range."""
        for what, given in (("learning_rate", self.learning_rate), ("momentum", self.momentum)):
            wrong = isinstance(given, int | float) and not math.isfinite(given)
            if wrong or (isinstance(given, str) and given != "exact"):
                raise InputError(f"{name}: {what} must be a number, a schedule or 'exact', got {given!r}")
        if self.learning_rate is None:
            raise InputError(f"{name}: learning_rate must be a number, a schedule or 'exact', got None")
        if isinstance(self.weight_decay, int | float) and not 0 <= self.weight_decay < math.inf:
            raise InputError(f"{name}: weight_decay must not be negative, got {self.weight_decay}")
        for what, given in (("max_attempts", self.attempts), ("max_failures", self.failures)):
            if isinstance(given, int | float) and not (given >= 1 and given == int(given)):
                raise InputError(f"{name}: {what} must be a whole number of at least 1, got {given}")
        if self.momentum == "exact" and self.learning_rate != "exact":
            raise InputError(f"{name}: momentum='exact' needs learning_rate='exact': one quadratic model gives both")
        if isinstance(self.rule, TrustRadius) and (self.learning_rate == "exact" or self.keeps_steps):
            raise InputError(f"{name}: a trust region sets the whole step; it takes no learning_rate='exact' or momentum")
        return self


class _Attempts(NamedTuple):
    """The loop over dampings."""

    control: Control
    step: PyTree
    new_value: Array
    predicted: Array
    ratio: Array
    accepted: Array
    tried: Array
    iterations: Array
    residual: Array
    learning_rate: Array
    momentum: Array


def transformation(method: Method, settings: Settings) -> optax.GradientTransformationExtraArgs:
    """The transformation of gradients to minus the step."""
    name = method.name

    def init(params: PyTree) -> SecondOrderState:
        dtype = jnp.promote_types(dtype_of(params), jnp.float32)
        previous = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.promote_types(p.dtype, jnp.float32)), params)
        nothing = jnp.full((), jnp.nan, dtype)
        zero = jnp.zeros((), jnp.int32)
        info = StepInfo(nothing, nothing, nothing, nothing, jnp.zeros((), bool), zero, zero, nothing, nothing, nothing, zero)
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
        product: Callable[[PyTree], PyTree] | None = None,
        all_params: PyTree = None,
        **others: Any,
    ) -> tuple[PyTree, SecondOrderState]:
        del others
        _check(name, settings, curvature, value, value_fn, params)
        dtype = state.control.damping.dtype
        gradient = jax.tree.map(lambda g: jnp.asarray(g, jnp.promote_types(g.dtype, jnp.float32)), updates)
        decays = settings.weight_decay is not None
        decay = jnp.asarray(settings.weight_decay if decays else 0, dtype)
        if decays:
            gradient = plus(gradient, decay, params)
        memory, count = state.memory, state.count
        structure = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), gradient)
        prepared, memory = method.prepare(restricted(name, curvature, structure), structure, memory, count, decay)

        def multiply(vector: PyTree) -> PyTree:
            if product is None:
                return jax.tree.map(lambda x, s: x.astype(s.dtype), method.product(prepared, vector), structure)
            found = product_of_kept(name, product, vector, all_params)
            found = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), found, structure)
            return plus(found, decay, vector) if decays else found

        def evaluate(step: PyTree) -> Array:
            # As `optax.apply_updates` will add it.
            moved = jax.tree.map(
                lambda p, s, u: _rounded(widened(p) + widened(_rounded(s, u.dtype)), p.dtype), params, step, updates
            )
            return _value_at(name, value_fn, moved, all_params, decay if decays else None, dtype)

        if value is not None:
            value = jnp.asarray(value, dtype)
            value = value + decay / 2 * dot(params, params).astype(dtype) if decays else value
        elif value_fn is not None:
            value = evaluate(jax.tree.map(jnp.zeros_like, gradient))
        else:
            value = jnp.full((), jnp.nan, dtype)
        finite = jnp.all(jnp.isfinite(norm(gradient)))
        if not (value_fn is None and settings.rule.adaptive is False):
            finite = finite & jnp.isfinite(value)
        control = settings.rule.begin(state.control, count)
        if value_fn is None and settings.rule.adaptive:
            control = _by_last_value(settings.rule, control, state, value)

        def at(strength: Array, damping: Array) -> tuple[Direction, Combination]:
            found = method.direction(prepared, gradient, strength, state.previous)
            if settings.tuned_every:
                found = found._replace(damping=damping)
            return found, _combined(settings, found, gradient, state.previous, multiply, count)

        def propose(control: Control) -> tuple[Direction, Combination, Control]:
            if not settings.tuned_every:
                return *at(control.damping, control.damping), control

            def chosen(control: Control) -> tuple[Direction, Combination, Control]:
                strengths = control.strength * jnp.asarray([1 / _RATIO, 1, _RATIO], dtype)
                found, combined = jax.vmap(lambda strength: at(strength, control.damping))(strengths)
                gains = jax.vmap(lambda c: _model_gain(gradient, c, control.damping))(combined)
                best = jnp.argmax(jnp.where(jnp.isfinite(gains), gains, -jnp.inf))
                found, combined = jax.tree.map(lambda x: x[best], (found, combined))
                return found, combined, control._replace(strength=strengths[best])

            def same(control: Control) -> tuple[Direction, Combination, Control]:
                return *at(control.strength, control.damping), control

            return jax.lax.cond(count % settings.tuned_every == 0, chosen, same, control)

        def attempt(before: _Attempts) -> _Attempts:
            control = before.control
            found, combined, control = propose(control)
            step = times(control.scale, combined.step)
            curved = times(control.scale, combined.product)
            predicted = -(dot(gradient, step) + dot(step, curved) / 2).astype(dtype)
            length = norm(step).astype(dtype)
            new_value = evaluate(step) if value_fn is not None else jnp.full((), jnp.nan, dtype)
            known = jnp.isfinite(length) & jnp.isfinite(predicted)
            falls = (new_value <= value) & jnp.isfinite(new_value) if value_fn is not None else jnp.asarray(True)
            accepted = falls & known
            ratio = (value - new_value) / jnp.where(predicted > 0, predicted, 1)
            ratio = jnp.where(predicted > 0, ratio, jnp.where(value > new_value, 1, 0) + 0 * ratio)
            if value_fn is not None:
                # What rounding hides says nothing against the model.
                hidden = predicted <= 4 * jnp.finfo(dtype).eps * jnp.abs(value)
                judged = jnp.where(hidden, 1, ratio)
                taken, refused = settings.rule.taken(control, judged, length), settings.rule.refused(control, length)
                control = where(accepted, taken, refused)
            elif settings.rule.adaptive:
                control = where(accepted, control, settings.rule.refused(control, length))
            return _Attempts(
                control, step, new_value, predicted, ratio, accepted, before.tried + 1,
                before.iterations + found.iterations, found.residual, combined.learning_rate, combined.momentum,
            )  # fmt: skip

        nothing, zero = jnp.full((), jnp.nan, dtype), jnp.zeros((), jnp.int32)
        start = _Attempts(
            control, jax.tree.map(jnp.zeros_like, gradient), nothing, nothing, nothing, jnp.zeros((), bool), zero, zero,
            nothing, nothing, nothing,
        )  # fmt: skip
        most = settings.attempts if value_fn is not None else 1
        tries = jax.lax.while_loop(lambda a: finite & ~a.accepted & (a.tried < most), lambda a: like(a, attempt(a)), start)
        control = where(finite, tries.control, settings.rule.refused(control, nothing))
        failed = ~finite | ~jnp.isfinite(norm(tries.step)) | ~jnp.isfinite(tries.predicted)
        failures = jnp.where(failed, state.failures + 1, 0).astype(jnp.int32)
        failures = eqx.error_if(
            failures,
            failures >= settings.failures,
            f"{name}: {_number(settings.failures)} updates in a row met a loss, gradient or curvature that is not finite, "
            "and were not taken. Look at the data and at the loss at these parameters; more damping does not mend it.",
        )
        step = jax.tree.map(lambda s: jnp.where(tries.accepted, s, 0), tries.step)
        code = jnp.asarray(SOLVERS.index(method.solver(prepared)), jnp.int32)
        info = StepInfo(
            value, tries.new_value, tries.predicted, tries.ratio, tries.accepted, tries.tried, tries.iterations,
            tries.residual, tries.learning_rate, tries.momentum, code,
        )  # fmt: skip
        info = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), info, state.info)
        previous = step if settings.keeps_steps else ()
        new_state = SecondOrderState(count + 1, like(state.control, control), failures, value, previous, memory, info)
        return jax.tree.map(lambda s, u: -s.astype(u.dtype), step, updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _combined(
    settings: Settings, found: Direction, gradient: PyTree, previous: PyTree, multiply: Callable, count: Array
) -> Combination:
    """The step of a direction: its learning rate and momentum, given or from the quadratic model."""
    dtype = found.damping.dtype
    product = multiply(found.step)
    exact = isinstance(settings.learning_rate, str)
    if exact and isinstance(settings.momentum, str):
        return best_combination(gradient, found.step, product, previous, multiply(previous), found.damping)
    momentum = jnp.zeros((), dtype)
    moving = settings.momentum is not None and not isinstance(settings.momentum, str)
    if moving:
        momentum = jnp.asarray(_scheduled(settings.momentum, count), dtype)
    last = previous if moving else None
    if exact:
        combined = best_length(gradient, found.step, product, found.damping, last, momentum)
    else:
        rate = jnp.asarray(_scheduled(settings.learning_rate, count), dtype)
        step = times(rate, found.step)
        step = plus(step, momentum, previous) if moving else step
        combined = Combination(step, times(rate, product), rate, momentum)
    return combined._replace(product=plus(combined.product, momentum, multiply(previous))) if moving else combined


def _model_gain(gradient: PyTree, combined: Combination, damping: Array) -> Array:
    """What the quadratic model, damping included, falls by."""
    step = combined.step
    return -(dot(gradient, step) + (dot(step, combined.product) + damping * dot(step, step)) / 2)


def _by_last_value(rule: Rule, control: Control, state: SecondOrderState, value: Array) -> Control:
    """Without `value_fn` the last step is judged now, by what the error has become."""
    predicted = state.info.predicted
    known = (state.count > 0) & state.info.accepted & (predicted > 0) & jnp.isfinite(state.value)
    ratio = (state.value - value) / jnp.where(known, predicted, 1)
    length = control.damping
    judged = where(ratio > 0, rule.taken(control, ratio, length), rule.refused(control, length))
    return where(known, judged, control)


def _value_at(
    name: str, value_fn: Callable[[PyTree], Array] | None, moved: PyTree, all_params: PyTree, decay: Any, dtype: Any
) -> Array:
    assert value_fn is not None
    found = value_fn(completed(name, moved, all_params))
    if jnp.shape(found) != ():
        raise InputError(f"{name}: value_fn must return the mean loss, a scalar, but returned shape {jnp.shape(found)}")
    found = jnp.asarray(found, dtype)
    return found if decay is None else found + decay / 2 * dot(moved, moved).astype(dtype)


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
    if params is None and (value_fn is not None or settings.weight_decay is not None):
        raise InputError(f"{name}: update needs params= beside value_fn= or weight_decay")


def _rounded(x: Array, dtype: Any) -> Array:
    """`x.astype(dtype)`, whose rounding XLA would leave out of a chain of narrow operations."""
    info = jnp.finfo(dtype)
    narrow = info.bits < 32 and x.dtype != dtype
    return (jax.lax.reduce_precision(x, info.nexp, info.nmant) if narrow else x).astype(dtype)


def _scheduled(given: Any, count: Array) -> Any:
    return given(count) if callable(given) else given


def _number(given: Any) -> str:
    return "too many" if isinstance(given, Tracer) else str(given)
