"""Which operation is to blame where autodiff of the whole graph fails."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxhess._typing import Array, DenseTooLargeError, InputError, UnsupportedOperationError
from jaxhess.engine.graph import Operation, nested
from jaxhess.engine.plan import Plan

__all__ = ["naming_the_culprit"]


@contextlib.contextmanager
def naming_the_culprit(plan: Plan) -> Iterator[None]:
    """Turn what JAX raises within into an `UnsupportedOperationError` that names the operation and its place."""
    try:
        yield
    except (DenseTooLargeError, InputError, UnsupportedOperationError):
        raise
    except (NotImplementedError, TypeError, ValueError, ArithmeticError) as error:
        culprit = next((operation for operation in _live(plan) if not _twice_differentiable(plan, operation)), None)
        where = "this model" if culprit is None else f"{culprit.name} at {culprit.where}"
        raise UnsupportedOperationError(
            f"The exact curvature of {where} could not be computed: JAX cannot differentiate it twice ({error}). Replace it "
            "by an operation with a derivative, or exclude it with jax.lax.stop_gradient."
        ) from error


def _live(plan: Plan) -> list[Operation]:
    operations = [operation for operation, _ in nested(plan.during) if operation.loop is None]
    return [operation for operation in operations if plan.live.intersection(operation.inputs)]


def _twice_differentiable(plan: Plan, operation: Operation) -> bool:
    avals = [plan.graph.avals[i] for i in operation.inputs]
    moving = [place for place, aval in enumerate(avals) if jnp.issubdtype(aval.dtype, jnp.floating)]

    def second(*values: Array) -> Any:
        def total(*active: Array) -> Array:
            given = dict(zip(moving, active, strict=True))
            results = operation.apply(*(given.get(place, value) for place, value in enumerate(values)))
            return sum((jnp.sum(o) for o in results if jnp.issubdtype(o.dtype, jnp.floating)), jnp.zeros(()))

        active = [values[place] for place in moving]
        return jax.jvp(jax.grad(total, argnums=tuple(range(len(moving)))), active, active)[1]

    try:
        jax.eval_shape(second, *avals)
    except Exception:  # the same, whatever it is, that stopped the whole
        return False
    return True
