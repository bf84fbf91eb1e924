"""How much is added to the diagonal of the curvature, and how that changes from step to step.

The gain ratio of a step s is that of what the error fell by and what its quadratic model said:

    ρ = (E(x) - E(x + s)) / (m(0) - m(s)),        m(s) = E + g^T s + s^T C s / 2

Levenberg-Marquardt, in the form of Nielsen (1999), with ν = 2 after every step that was taken:

    taken       λ <- λ max(1/decrease, 1 - (2 (ρ - ρ0))^3)       refused     λ <- λ ν,  ν <- min(2 ν, 16)

with ρ0 = 1/2. A lower ρ0 lets λ fall where the ratio is low whatever λ is, as with a quartic term in the error.

The damping γ of an approximate inverse, which is chosen for itself, rises with λ and comes back down with it. After ten
updates in a row that gained nothing, of which rounding would not hide as much, both start again where they first did.

A trust region has a radius Δ in the place of λ (Moré 1983): a quarter of it where ρ < 1/4 or the step is refused, twice as
much where ρ > 3/4 and the step went all the way to Δ.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.core import Tracer

from jaxhess._typing import Array, InputError
from jaxhess.operators.vectors import where
from jaxhess.transforms.checks import check_number

__all__ = [
    "Constant",
    "Control",
    "LevenbergMarquardt",
    "TrustRadius",
    "as_rule",
    "constant",
    "levenberg_marquardt",
    "refuse_relative",
]

_GROWTH, _MOST_GROWTH = 2.0, 16.0
_MOST_SHARE = 0.8  # of the curvature along a step that may be damping
_MOST_SHARE_OF_RIGHT = 0.5  # where the model was right about the step
_RIGHT = 0.05  # how far from 1 a gain ratio may be for that
_PATIENCE = 10  # updates in a row that gain nothing


class Control(NamedTuple):
    """What limits a step; each 0-d."""

    damping: Array  # λ; the radius Δ of a trust region
    growth: Array  # ν
    scale: Array  # what a refused step with constant damping is multiplied by when it is tried again
    strength: Array  # γ, the damping of an approximate inverse, where that is chosen apart from λ
    level: Array  # twice the λ that an update began with whose first attempt was refused; infinite before any was
    stalled: Array  # how many updates in a row have gained nothing that rounding does not hide
    unit: Array  # what λ's first value and bounds are multiples of; 0 until that is known


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same damping at every step, or that of a schedule; a refused step is tried again at half its length."""

    damping: float | Array | Callable[[Array], Any]
    adaptive = False

    def start(self, dtype: Any) -> Control:
        given = self.damping(jnp.zeros((), jnp.int32)) if callable(self.damping) else self.damping
        return _begun(given, dtype)

    def begin(self, control: Control, count: Array) -> Control:
        given = self.damping(count) if callable(self.damping) else self.damping
        return control._replace(damping=jnp.asarray(given, control.damping.dtype), scale=jnp.ones_like(control.scale))

    def taken(self, control: Control, ratio: Array, length: Array, share: Array) -> Control:
        del ratio, length, share
        return control

    def refused(self, control: Control, length: Array) -> Control:
        del length
        return control._replace(scale=control.scale / 2)

    def ended(self, control: Control, gained: Array) -> Control:
        del gained
        return control


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping by the gain ratio; see `levenberg_marquardt`."""

    initial: float | Array = 1e-2
    decrease: float = 3.0
    least: float = 1e-12
    most: float = 1e12
    release: float | None = None
    relative: bool = False  # the first value and the bounds are multiples of the mean eigenvalue of the first curvature
    neutral: float = 0.5  # the gain ratio ρ0 that leaves λ as it is
    adaptive = True

    def start(self, dtype: Any) -> Control:
        begun = _begun(self.initial, dtype)
        return begun._replace(unit=jnp.zeros_like(begun.unit)) if self.relative else begun

    def measured(self, control: Control, size: Array) -> Control:
        """With the unit that this is, if none is known."""
        new = (control.unit == 0) & jnp.isfinite(size) & (size > 0)
        return where(new, self._first(jnp.where(new, size, 1).astype(control.unit.dtype)), control)

    def begin(self, control: Control, count: Array) -> Control:
        del count
        return control

    def taken(self, control: Control, ratio: Array, length: Array, share: Array) -> Control:
        del length
        # The cube of a ratio far from 1 would overflow in float32; its factor is the same from -1 on.
        bounded = jnp.clip(ratio, -1, 2)
        raised = control.damping > control.level
        limits = (share > _MOST_SHARE) | ((share > _MOST_SHARE_OF_RIGHT) & (jnp.abs(ratio - 1) < _RIGHT))
        least = jnp.where(limits | raised, 1 / (self.release or self.decrease), 1 / self.decrease)
        factor = jnp.clip(1 - (2 * (bounded - self.neutral)) ** 3, least, 2.0)
        after = self._limited(control, control.damping * factor, jnp.full_like(control.growth, _GROWTH))
        return after._replace(strength=jnp.where(raised, _as_damping(control, after), control.strength))

    def refused(self, control: Control, length: Array) -> Control:
        del length
        growth = jnp.minimum(control.growth * 2, _MOST_GROWTH)
        refused = self._limited(control, control.damping * control.growth, growth)
        level = jnp.where(control.growth == _GROWTH, _GROWTH * control.damping, control.level)
        return refused._replace(strength=_as_damping(control, refused), level=level)

    def ended(self, control: Control, gained: Array) -> Control:
        stalled = jnp.where(gained, 0, control.stalled + 1)
        patient = stalled < _PATIENCE
        begun = self._first(control.unit)
        # Steps that damping has made too short for any gain; where it is small, there is nothing more to gain.
        again = begun._replace(strength=jnp.minimum(control.strength, begun.strength))
        control = where(patient | (control.damping <= begun.damping), control, again)
        return control._replace(stalled=jnp.where(patient, stalled, 0).astype(stalled.dtype))

    def _limited(self, control: Control, damping: Array, growth: Array) -> Control:
        unit = jnp.where(control.unit > 0, control.unit, 1)
        return control._replace(damping=jnp.clip(damping, self.least * unit, self.most * unit), growth=growth)

    def _first(self, unit: Array) -> Control:
        return _begun(self.initial * jnp.where(unit > 0, unit, 1), unit.dtype)._replace(unit=unit)


@dataclasses.dataclass(frozen=True)
class TrustRadius:
    """The radius of a trust region, from the gain ratio: `initial`, and the bounds `least` and `most`, all above 0 and in
    units of the parameters. A smaller radius starts again at `initial` after ten updates that gained nothing.

    Raises `InputError` for numbers that are out of order. Source: Moré (1983).

    >>> TrustRadius(2.0).most
    1000000.0
    """

    initial: float | Array = 1.0
    most: float = 1e6
    least: float = 1e-12
    adaptive = True

    def __post_init__(self) -> None:
        _check_order("TrustRadius", self.initial, self.least, self.most)

    def start(self, dtype: Any) -> Control:
        return _begun(self.initial, dtype)

    def begin(self, control: Control, count: Array) -> Control:
        del count
        return control

    def taken(self, control: Control, ratio: Array, length: Array, share: Array) -> Control:
        del share
        radius = control.damping
        smaller = jnp.where(length > 0, jnp.minimum(radius, length) / 4, radius)
        larger = jnp.where(length > 0.9 * radius, jnp.minimum(2 * radius, self.most), radius)
        return self._limited(control, jnp.where(ratio < 0.25, smaller, jnp.where(ratio > 0.75, larger, radius)))

    def refused(self, control: Control, length: Array) -> Control:
        known = jnp.isfinite(length) & (length > 0)
        return self._limited(control, jnp.minimum(control.damping, jnp.where(known, length, control.damping)) / 4)

    def ended(self, control: Control, gained: Array) -> Control:
        stalled = jnp.where(gained, 0, control.stalled + 1)
        patient = stalled < _PATIENCE
        radius = jnp.where(patient, control.damping, jnp.maximum(control.damping, self.initial))
        return self._limited(control, radius)._replace(stalled=jnp.where(patient, stalled, 0).astype(stalled.dtype))

    def _limited(self, control: Control, radius: Array) -> Control:
        return control._replace(damping=jnp.maximum(radius, self.least).astype(control.damping.dtype))


def _as_damping(before: Control, after: Control) -> Array:
    """γ changed by as much as λ."""
    return before.strength * jnp.where(before.damping > 0, after.damping / before.damping, 1)


def _begun(damping: Any, dtype: Any) -> Control:
    damping = jnp.asarray(damping, dtype)
    one = jnp.ones((), dtype)
    return Control(damping, _GROWTH * one, one, damping, jnp.inf * one, 0 * one, one)


Rule = Constant | LevenbergMarquardt | TrustRadius


def constant(damping: float | Array | Callable[[Array], Any]) -> Constant:
    """The same damping λ >= 0 at every step, or `damping(count)` of a schedule. Raises `InputError` if it is negative.

    >>> constant(1e-3).damping
    0.001
    """
    if not callable(damping):
        check_number("constant: the damping", damping, least=0)
    return Constant(damping)


def levenberg_marquardt(
    initial: float | Array = 1e-2,
    *,
    decrease: float = 3.0,
    least: float = 1e-12,
    most: float = 1e12,
    release: float | None = None,
    relative: bool = False,
    neutral: float = 0.5,
) -> LevenbergMarquardt:
    """Damping that falls where the quadratic model predicts well and rises where it does not.

    Args:
        initial: λ of the first step, > 0, in units of the curvature. Any will do within some powers of ten: a step that is
            refused is tried again at once. A larger λ starts again here after ten updates that gained nothing.
        decrease: what λ is divided by, at most, after a step: > 1.
        least, most: bounds of λ, 0 < least <= initial <= most.
        release: what λ is divided by, at most, after a step along which it is more than 4/5 of the curvature, or more than
            half where the gain ratio is within 0.05 of 1: one that it alone has limited; and while it is above twice what it
            was when a step was last refused: one refused update can raise it a thousandfold. At least `decrease`, its
            default.
        relative: whether `initial`, `least` and `most` are multiples of the mean eigenvalue of the first curvature, so that
            a loss in other units takes the same steps; of `kronecker_newton` only.
        neutral: the gain ratio that leaves λ as it is, in [0, 1).

    Raises `InputError` for numbers out of range. Source: Levenberg (1944), Marquardt (1963); the update is that of Nielsen,
    "Damping parameter in Marquardt's method" (1999).

    >>> levenberg_marquardt(1.0).initial
    1.0
    """
    check_number("levenberg_marquardt: decrease", decrease, above=1)
    check_number("levenberg_marquardt: neutral", neutral, least=0, below=1)
    if release is not None:
        check_number("levenberg_marquardt: release", release)
        if release < decrease:
            raise InputError(f"levenberg_marquardt: release must be at least decrease={decrease}, got {release}")
    _check_order("levenberg_marquardt", initial, least, most)
    return LevenbergMarquardt(initial, decrease, least, most, release, relative, neutral)


def refuse_relative(name: str, rule: Rule) -> None:
    """Raises `InputError` for a damping in the unit of Kronecker factors, which this method has none of."""
    if isinstance(rule, LevenbergMarquardt) and rule.relative:
        raise InputError(f"{name}: levenberg_marquardt(.., relative=True) is for kronecker_newton; give initial as a number")


def _check_order(name: str, initial: Any, least: Any, most: Any) -> None:
    """Raises `InputError` unless 0 < least <= initial <= most, as far as they are known."""
    for what, given in (("initial", initial), ("least", least), ("most", most)):
        check_number(f"{name}: {what}", given, above=0)
    known = [each for each in (least, initial, most) if not isinstance(each, Tracer)]
    if known != sorted(known):
        raise InputError(f"{name}: need 0 < least <= initial <= most, got {least}, {initial} and {most}")


def as_rule(what: str, damping: Any) -> Rule:
    """A rule as it is; a number or a schedule as a constant one; the name "levenberg_marquardt"."""
    if isinstance(damping, Constant | LevenbergMarquardt | TrustRadius):
        return damping
    if isinstance(damping, str):
        if damping != "levenberg_marquardt":
            raise InputError(f"{what}: damping must be a number, a schedule, a rule or its name, got {damping!r}")
        return levenberg_marquardt()
    if damping is None:
        raise InputError(f"{what}: damping must be a number, a schedule or a rule, got None")
    if not callable(damping):
        check_number(f"{what}: damping", damping, least=0)
    return constant(damping)
