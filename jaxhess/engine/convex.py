"""Is a loss convex in the outputs? Its curvature B at sample points, held against zero before anything is computed.

With a B that has a negative eigenvalue, `J^T B J` is not the Gauss-Newton matrix that anyone wants: it is not positive
semidefinite, and its Gram form has no square root of B. A sample: outputs of both signs and two sizes, labels 0 for integer
targets, numbers from 0.2 to 0.8 for floating ones. A loss may pass it and still not be convex elsewhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxhess._typing import Array, InputError
from jaxhess.engine.graph import evaluate
from jaxhess.engine.jacobian import Head
from jaxhess.engine.plan import Plan

__all__ = ["check_convex"]

_SIZES = (1, -1, 5, -5)
_LARGEST_DENSE = 256
_DIRECTIONS = 16


def check_convex(plan: Plan, head: Head, name: str) -> None:
    """Raise `InputError` with the name of the loss if its curvature has a negative eigenvalue at a sample point.

    With more than 256 outputs, 16 random directions are looked at instead of the eigenvalues. Points where the curvature
    is not finite, and losses that cannot be run at a fixed point, are passed over.
    """
    found = _eigenvalues(plan, head)
    if found is None:
        return
    largest = np.max(np.abs(found), initial=0.0)
    tolerance = 1e-6 if all(plan.graph.avals[o].dtype == np.float64 for o in plan.outputs) else 1e-4
    if found.size and found.min() < -tolerance * largest:
        raise InputError(
            f"The loss {name} is not convex in the output of the model: its curvature there has the eigenvalue "
            f"{found.min():.2g} (the largest in absolute value is {largest:.2g}) at a sample point, so the Gauss-Newton "
            "matrix is not positive semidefinite. Let the model end before the convex part of the loss (logits, not "
            "probabilities), or use jaxhess.hessian or jaxhess.fisher."
        )


def _eigenvalues(plan: Plan, head: Head) -> np.ndarray | None:
    """The eigenvalues of B, or its quadratic forms, at all finite sample points."""
    avals, outputs = plan.graph.avals, plan.outputs
    made = {o for operation in head.operations for o in operation.outputs}
    read = [*dict.fromkeys(i for operation in head.operations for i in operation.inputs)]
    others = [i for i in read if i not in made and i not in plan.graph.constants and i not in outputs]
    if any(not isinstance(avals[i].dtype, np.dtype) for i in others):
        return None
    rng = np.random.default_rng(0)

    def sample(i: int) -> np.ndarray:
        floating = jnp.issubdtype(avals[i].dtype, jnp.floating)
        numbers = rng.uniform(0.2, 0.8, avals[i].shape) if floating else np.zeros(avals[i].shape)
        return numbers.astype(avals[i].dtype)

    total = sum(avals[o].size for o in outputs)
    fixed = {i: sample(i) for i in others}
    points = [np.stack([(size * part).astype(part.dtype) for size in _SIZES]) for part in (sample(o) for o in outputs)]
    directions = rng.standard_normal((_DIRECTIONS, total))

    def error(fixed: dict[int, Array], values: list[Array]) -> Array:
        local = {**plan.graph.constants, **fixed, **dict(zip(outputs, values, strict=True))}
        evaluate(head.operations, local)
        return local[plan.graph.output]

    def at(fixed: dict[int, Array], directions: Array, values: list[Array]) -> Array:
        return _reading(lambda v: error(fixed, v), values, directions, dense=total <= _LARGEST_DENSE)

    def everywhere(fixed: dict[int, Array], points: list[Array], directions: Array) -> Array:
        return jax.lax.map(lambda values: at(fixed, directions, values), points)

    try:
        # Compiled and run on its own: the values of an enclosing trace would only be known later.
        found = jax.jit(everywhere).lower(fixed, points, directions).compile()(fixed, points, directions)
        found = np.asarray(found, np.float64)
    except Exception:  # whatever keeps a loss from being run here leaves nothing to look at
        return None
    return found[np.isfinite(found).all(axis=1)].reshape(-1)


def _reading(error: Callable[[list[Array]], Array], values: list[Array], directions: Array, *, dense: bool) -> Any:
    flat, unravel = ravel_pytree(values)
    gradient = jax.grad(lambda flat: error(unravel(flat)))
    if dense:
        B = jax.jacfwd(gradient)(flat)
        return jnp.linalg.eigvalsh((B + B.T) / 2)
    directions = directions.astype(flat.dtype)
    return jax.lax.map(lambda v: jnp.vdot(v, jax.jvp(gradient, (flat,), (v,))[1]) / jnp.vdot(v, v), directions)
