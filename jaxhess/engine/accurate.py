"""Forms of JAX's own functions whose second derivatives stay right where JAX's are rounded to 0: in the tails of tanh, of
the logistic function, and of `log(exp a + exp b)`, of which softplus and log_sigmoid are made.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from jaxhess import activations
from jaxhess._typing import Array

__all__ = ["accurate_form"]


def accurate_form(equation: JaxprEqn) -> Callable[..., Sequence[Array]] | None:
    """The accurate form of an operation, from its inputs to the list of its outputs; None where JAX's own is accurate, or
    its inputs are not real."""
    avals: list[Any] = [atom.aval for atom in equation.invars]
    if not avals or not all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals):
        return None
    match equation.primitive.name:
        case "tanh":
            return lambda y: [activations.tanh(y)]
        case "logistic":
            return lambda y: [activations.sigmoid(y)]
        case "custom_jvp_call" if _is_logaddexp(equation.params.get("call_jaxpr")):
            return _logaddexp
    return None


def _is_logaddexp(body: Any) -> bool:
    jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    if not isinstance(jaxpr, Jaxpr) or "logaddexp" not in str(getattr(jaxpr, "debug_info", "logaddexp")):
        return False
    return _names(jaxpr) == _names_of_logaddexp()


@functools.cache
def _names_of_logaddexp() -> list[str]:
    with jax.ensure_compile_time_eval():
        return _names(jax.make_jaxpr(jnp.logaddexp)(0.0, 0.0).jaxpr)


def _names(jaxpr: Jaxpr) -> list[str]:
    """The names of the operations, in place of calls those of what is called."""
    names: list[str] = []
    for equation in jaxpr.eqns:
        inner = [value for value in equation.params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
        names += [] if inner else [equation.primitive.name]
        for body in inner:
            names += _names(body.jaxpr if isinstance(body, ClosedJaxpr) else body)
    return names


def _logaddexp(a: Array, b: Array) -> list[Array]:
    """The larger one plus the softplus of what is negative: for neither operand a difference of near-equal numbers."""
    larger, smaller = jnp.where(a >= b, a, b), jnp.where(a >= b, b, a)
    known = jnp.isfinite(a) & jnp.isfinite(b)
    otherwise = jnp.where(jnp.isnan(a) | jnp.isnan(b), jnp.nan, larger)
    return [jnp.where(known, larger + activations.softplus(jnp.where(known, smaller - larger, 0)), otherwise)]
