"""The mean error as a function of the parameters, on the graph: what products with the Hessian differentiate.

What depends on no data runs once, the rest once for each example. Activations and custom derivatives are those of the graph,
so products agree with the sweep where autodiff of the user's function does not (saturated activations).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxhess._typing import Array
from jaxhess.engine.compact import LinearMap, linearise_once
from jaxhess.engine.graph import LINEARISES_WITHIN_TRACES, evaluate
from jaxhess.engine.plan import Plan

__all__ = ["hessian_product", "linearised_gradient", "summed_error"]

Arrays = list[Array]


def summed_error(plan: Plan, batch: Sequence[Array], examples: int) -> Callable[[Arrays], Array]:
    """The sum of the examples' errors as a function of the parameters; NaN where an error is, all its derivatives too."""
    data = plan.graph.inputs[len(plan.parameters) :]

    def summed(values: Arrays) -> Array:
        environment = {**plan.graph.constants, **dict(zip(plan.parameters, values, strict=True))}
        evaluate(plan.before, environment)
        shared = {f: environment[f] for f in plan.frontier}

        def one(example: Sequence[Array]) -> Array:
            local = {**plan.graph.constants, **shared, **dict(zip(data, example, strict=True))}
            evaluate(plan.during, local)
            return local[plan.graph.output]

        errors = jax.vmap(one, axis_size=examples)(list(batch))
        known = jax.lax.stop_gradient(jnp.where(jnp.isnan(errors), jnp.nan, 1).astype(errors.dtype))
        return jnp.sum(known * errors)

    return summed


def hessian_product(plan: Plan, batch: Sequence[Array], examples: int, values: Arrays, vectors: Arrays) -> Arrays:
    """The product of the summed error's Hessian with a vector: one pass forward and one backward, both with tangents."""
    return jax.jvp(jax.grad(summed_error(plan, batch, examples)), (values,), (vectors,))[1]


def linearised_gradient(
    plan: Plan, batch: Sequence[Array], examples: int, values: Arrays, given: Sequence[Array]
) -> tuple[Array, Arrays, LinearMap]:
    """The mean error, its gradient, and the gradient's linear part: a pytree that holds its factors but for those `given`
    with the vectors. It maps arrays in float32 or wider to such, for narrower parameters too."""
    summed = summed_error(plan, batch, examples)
    wide = [value.astype(jnp.promote_types(value.dtype, jnp.float32)) for value in values]

    def mean(wide: Arrays) -> Array:
        return summed([w.astype(value.dtype) for w, value in zip(wide, values, strict=True)]) / examples

    def gradient(wide: Arrays) -> tuple[Arrays, Array]:
        value, grads = jax.value_and_grad(mean)(wide)
        if not LINEARISES_WITHIN_TRACES:  # every output is to have a tangent, if only zero
            grads = [g + 0 * jnp.where(jnp.isfinite(w), w, 0) for g, w in zip(grads, wide, strict=True)]
        return grads, value

    grads, value, linear = linearise_once(gradient, wide, given)
    return value, grads, linear
