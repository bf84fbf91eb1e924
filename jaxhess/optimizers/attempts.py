"""The attempts of one update: a step for one damping, what it does, and another damping where it raises the error.

d = -(C + λ)^-1 g        s = α d + μ v        E(x + s) <= E(x): taken;  else λ rises (or s shrinks) and it is tried again

Where a method asks for it, a step whose gain ratio ρ is below 1/2, or that raises the error, is shortened first, to t s:

    E(x + t s) ≈ E - t S + t^2 (E(x + s) - E + S),   S = -g^T s > 0         t = S / (2 (E(x + s) - E + S)) >= 1/10

the minimum of the parabola, by one more evaluation of the error; it is kept if it is lower there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, PyTree
from jaxhess.operators.vectors import dot, like, norm, times, where
from jaxhess.optimizers.conjugate import minimise
from jaxhess.optimizers.damping import Control
from jaxhess.optimizers.flattened import flattened, flattening
from jaxhess.optimizers.method import Method, Settings
from jaxhess.optimizers.quadratic import (
    Combination,
    Quadratic,
    Restricted,
    best_combination,
    best_length,
    combination_of,
)

__all__ = ["Attempts", "Problem", "reach_of"]

_RATIO = 2.0  # between the dampings of an approximate inverse that are compared
_BOUNDS = 1e-12, 1e12  # of them, in the unit of the damping
_POOR = 0.5  # gain ratio below which a step is shortened
_LEAST_PART, _MOST_PART = 0.1, 0.9  # of it, to be worth an evaluation


class Attempts(NamedTuple):
    """Where the attempts are: `control` for the next one, the `value` to compare with, and how the last one went."""

    control: Control
    value: Array
    step: PyTree
    new_value: Array
    predicted: Array
    ratio: Array
    accepted: Array
    gained: Array  # was it taken, and for more than rounding hides?
    tried: Array
    iterations: Array
    residual: Array
    learning_rate: Array
    momentum: Array
    length: Array


class _Proposal(NamedTuple):
    combination: Combination
    iterations: Array
    residual: Array
    control: Control


@dataclasses.dataclass(frozen=True)
class Problem:
    """One update: the quadratic `model` of the error, what the method `prepared`, the last step `previous` or (), the error
    `value` at the parameters, the `noise` that their rounding makes in it, and `evaluate`, the error after a step, None
    where it is not known."""

    method: Method
    settings: Settings
    prepared: Any
    model: Quadratic
    previous: PyTree
    count: Array
    value: Array
    noise: Array
    evaluate: Callable[[PyTree], Array] | None

    def solved(self, control: Control, proceed: Array) -> Attempts:
        """Attempts until a step is taken; none where `proceed` does not hold."""
        both = flattening(self.model.gradient)
        if both is not None:
            ravel, unravel = both
            found = self._flattened(ravel, unravel).solved(control, proceed)
            return found._replace(step=unravel(found.step))
        nothing, zero = jnp.full((), jnp.nan, self.value.dtype), jnp.zeros((), jnp.int32)
        start = Attempts(
            control, self.value, jax.tree.map(jnp.zeros_like, self.model.gradient), nothing, nothing, nothing,
            jnp.zeros((), bool), jnp.zeros((), bool), zero, zero, nothing, nothing, nothing, nothing,
        )  # fmt: skip
        most = self.settings.attempts if self.evaluate is not None else 1

        def unfinished(a: Attempts) -> Array:
            return proceed & ~a.accepted & (a.tried < most)

        return jax.lax.while_loop(unfinished, lambda a: like(a, self._attempt(a)), start)

    def _flattened(self, ravel: Callable[[PyTree], Array], unravel: Callable[[Array], PyTree]) -> "Problem":
        method, model = flattened(self.method, self.model, ravel, unravel)
        evaluate = self.evaluate
        by = None if evaluate is None else lambda step: evaluate(unravel(step))
        previous = ravel(self.previous) if jax.tree.leaves(self.previous) else ()
        return dataclasses.replace(self, method=method, model=model, previous=previous, evaluate=by)

    def _attempt(self, before: Attempts) -> Attempts:
        found = self._proposed(before.control, before.tried == 0)
        control, dtype = found.control, self.value.dtype
        scale = control.scale
        step, predicted = self._scaled(found.combination, scale)
        known = jnp.isfinite(norm(step).astype(dtype)) & jnp.isfinite(predicted)
        value, new_value, accepted = before.value, jnp.full((), jnp.nan, dtype), known
        if self.evaluate is not None:
            value, new_value = self._measured(before, step, predicted)
            if self.settings.interpolates:
                part, new_value = self._interpolated(step, predicted, value, new_value)
                scale = scale * part
                step, predicted = self._scaled(found.combination, scale)
            accepted = known & (new_value <= self._limit(value, predicted)) & jnp.isfinite(new_value)
        length = norm(step).astype(dtype)
        learning_rate, momentum = scale * found.combination.learning_rate, scale * found.combination.momentum
        reach = reach_of(length, learning_rate.astype(dtype))
        # What rounding hides says nothing against the model.
        hidden = jnp.abs(predicted) <= self._rounding(value)
        ratio = (value - new_value) / jnp.where(predicted > 0, predicted, 1)
        ratio = jnp.where(predicted > 0, ratio, jnp.where(value > new_value, 1, 0) + 0 * ratio)
        rule = self.settings.rule
        if self.evaluate is not None:
            damped = control.damping * length * length
            curved = damped + scale * scale * found.combination.curved.astype(dtype)
            share = jnp.where(curved > 0, damped / jnp.where(curved > 0, curved, 1), 0)
            taken = rule.taken(control, jnp.where(hidden, 1, ratio), reach, share)
            control = where(accepted, taken, rule.refused(control, reach))
        elif rule.adaptive:
            control = where(accepted, control, rule.refused(control, reach))
        return Attempts(
            control, value, step, new_value, predicted, ratio, accepted, accepted & ~hidden, before.tried + 1,
            before.iterations + found.iterations, found.residual, learning_rate, momentum, length,
        )  # fmt: skip

    def _scaled(self, combination: Combination, scale: Array) -> tuple[PyTree, Array]:
        """A step that is this much of the combination, and by how much the model says that it lowers the error."""
        step = times(scale, combination.step)
        predicted = -(dot(self.model.gradient, step) + scale * scale * combination.curved / 2)
        return step, predicted.astype(self.value.dtype)

    def _interpolated(self, step: PyTree, predicted: Array, value: Array, new_value: Array) -> tuple[Array, Array]:
        """How much of a step is taken whose gain is poor, and the error after that; 1 where less of it is no better."""
        assert self.evaluate is not None
        evaluate = self.evaluate
        slope = -dot(self.model.gradient, step).astype(value.dtype)
        bend = new_value - value + slope
        part = jnp.maximum(slope / (2 * jnp.where(bend > 0, bend, 1)), _LEAST_PART)
        poor = (value - new_value < _POOR * predicted) & (predicted > self._rounding(value)) & jnp.isfinite(bend)
        tried = poor & (bend > 0) & (part < _MOST_PART)
        shortened = jax.lax.cond(tried, lambda: evaluate(times(part, step)), lambda: jnp.full_like(new_value, jnp.nan))
        better = (shortened < new_value) & (shortened <= value)
        return jnp.where(better, part, 1), jnp.where(better, shortened, new_value)

    def _rounding(self, value: Array) -> Array:
        """A change of the error that rounding, of itself or of the parameters, may hide."""
        return 4 * jnp.finfo(value.dtype).eps * jnp.abs(value) + self.noise

    def _limit(self, value: Array, predicted: Array) -> Array:
        """What the error may be after a step: no more than before; up to rounding, if no more than that is predicted."""
        rounding = self._rounding(value)
        return value + jnp.where(jnp.abs(predicted) <= rounding, rounding, 0)

    def _measured(self, before: Attempts, step: PyTree, predicted: Array) -> tuple[Array, Array]:
        """The errors at the parameters and after the step.

        The error that came with the gradient is rounded otherwise than that after a step: by more than steps gain where the
        error is very sensitive, as that of a long recurrence can be. So before the first step is refused, it is computed
        again by the very same program, a loop of one or two rounds.
        """
        assert self.evaluate is not None
        evaluate, first = self.evaluate, before.tried == 0

        def unfinished(rounds: tuple[Array, Array, Array]) -> Array:
            done, value, new_value = rounds
            return (done == 0) | ((done == 1) & first & ~(new_value <= self._limit(value, predicted)))

        def measure(rounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            done, value, new_value = rounds
            found = evaluate(jax.tree.map(lambda s: jnp.where(done == 0, s, 0), step))
            here = jnp.where((done == 1) & jnp.isfinite(found), found, value)
            return done + 1, here, jnp.where(done == 0, found, new_value)

        start = jnp.zeros((), jnp.int32), before.value, jnp.full_like(before.value, jnp.nan)
        _, value, new_value = jax.lax.while_loop(unfinished, measure, start)
        return value, new_value

    def _proposed(self, control: Control, first: Array) -> _Proposal:
        """The step for these dampings, and the dampings with that of an approximate inverse as it was chosen. A given
        momentum is of the `first` attempt only: damping does not shorten it."""
        every, refinement = self.settings.tuned_every, self.settings.refinement
        if not every:
            found = self.method.direction(self.prepared, self.model.gradient, control.damping, self.previous)
            combination, _ = self._combined(_stacked(found.step), found.damping, first)
            return _Proposal(combination, found.iterations, found.residual, control)

        def chosen(control: Control) -> tuple[Array, Combination]:
            # The same first: of equal ones it is kept, as far from where it matters all of them are equal.
            strengths = control.strength * jnp.asarray([1, 1 / _RATIO, _RATIO], control.strength.dtype)
            unit = jnp.where(control.unit > 0, control.unit, 1)
            strengths = jnp.clip(strengths, *(bound * unit for bound in _BOUNDS))
            combination, best = self._combined(self._directions(strengths), control.damping, first)
            return strengths[best], combination

        def same(control: Control) -> tuple[Array, Combination]:
            return control.strength, self._combined(self._directions(control.strength[None]), control.damping, first)[0]

        due = self.count % every == 0
        if refinement is None:
            strength, combination = jax.lax.cond(due, chosen, same, control)
            nothing = jnp.full_like(control.damping, jnp.nan)
            return _Proposal(combination, jnp.zeros((), jnp.int32), nothing, control._replace(strength=strength))
        strength = jax.lax.cond(due, lambda control: chosen(control)[0], lambda control: control.strength, control)

        def precondition(residual: PyTree) -> PyTree:
            return times(-1, self.method.direction(self.prepared, residual, strength, ()).step)

        found = minimise(
            self.model, precondition, self.previous, control.damping, refinement.iterations, refinement.progress
        )
        residual = found.residual.astype(control.damping.dtype)
        return _Proposal(found.combination, found.iterations, residual, control._replace(strength=strength))

    def _directions(self, strengths: Array) -> PyTree:
        """For each damping of the approximate inverse the direction, stacked."""

        def direction(strength: Array) -> PyTree:
            return self.method.direction(self.prepared, self.model.gradient, strength, self.previous).step

        return jax.vmap(direction)(strengths) if len(strengths) > 1 else _stacked(direction(strengths[0]))

    def _combined(self, directions: PyTree, damping: Array, first: Array) -> tuple[Combination, Array]:
        """Of k directions, stacked, the one that the model likes best, with its learning rate and momentum, given or from
        the model; and which one it is."""
        settings = self.settings
        exact = isinstance(settings.learning_rate, str)
        both = exact and isinstance(settings.momentum, str)
        moving = settings.momentum is not None
        k = len(jax.tree.leaves(directions)[0])
        last = [_stacked(self.previous)] if moving else []
        model = self.model.restricted(jax.tree.map(lambda *parts: jnp.concatenate(parts), directions, *last))
        momentum = None if both or not moving else jnp.where(first, _scheduled(settings.momentum, self.count), 0)

        def plane(n: Array) -> Restricted:
            return model.part(jnp.stack([n, jnp.full_like(n, k)]) if moving else n[None])

        def coefficients(plane: Restricted) -> Array:
            if both:
                return best_combination(plane, damping)
            if exact:
                return best_length(plane, damping, momentum if moving else 0.0)
            rate = _scheduled(settings.learning_rate, self.count)
            given = [rate, momentum] if moving else [rate]
            return jnp.stack([jnp.asarray(each, model.forms.dtype) for each in given])

        best = jnp.zeros((), jnp.int32)
        if k > 1:
            gains = jax.vmap(lambda p: p.gain(coefficients(p), damping))(jax.vmap(plane)(jnp.arange(k)))
            best = jnp.argmax(jnp.where(jnp.isfinite(gains), gains, -jnp.inf))
        direction = jax.tree.map(lambda leaf: leaf[best], directions)
        own = plane(best)
        return combination_of([direction, self.previous] if moving else [direction], own, coefficients(own)), best


def reach_of(length: Array, learning_rate: Array) -> Array:
    """The length of a direction, which a radius limits, from that of the step along it."""
    return length / jnp.where(learning_rate == 0, 1, jnp.abs(learning_rate))


def _stacked(vector: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[None], vector)


def _scheduled(given: Any, count: Array) -> Any:
    return given(count) if callable(given) else given
