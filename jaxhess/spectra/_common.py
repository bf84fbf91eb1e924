"""What the readings of an operator share: checks, its blocks, its product on flat vectors, and means over probes."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array, InputError
from jaxhess.operators import BlockDiagonal, CurvatureOperator, FullHessian, GaussNewton
from jaxhess.operators.paths import paths_of
from jaxhess.operators.reduction import flat_dtype, ravel, unravel

__all__ = ["blocks_of", "checked", "eigenvalues_of", "flat_product", "mean_of", "probes_at_once", "scalar_of"]

_CHUNK_BYTES = 2**28


def checked(what: str, operator: Any, **numbers: Any) -> int:
    """N, of a symmetric operator; `numbers` are to be positive integers."""
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise InputError(f"{what}: needs a linear operator, got a {type(operator).__name__}")
    if not lx.is_symmetric(operator):
        raise InputError(
            f"{what}: the {type(operator).__name__} is not known to be symmetric; if it is, say so with "
            "with_tags(lineax.symmetric_tag)"
        )
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise InputError(f"{what}: {name} must be a positive integer, got {number!r}")
    if operator.in_size() == 0:
        raise InputError(f"{what}: the {type(operator).__name__} has no entries")
    return operator.in_size()


def blocks_of(what: str, operator: Any) -> dict[str, Any]:
    """The diagonal blocks of the parameters, by their paths."""
    if isinstance(operator, BlockDiagonal):
        return dict(operator.items())
    if isinstance(operator, FullHessian | GaussNewton):
        return {path: operator.block(path) for path in paths_of(operator.in_structure())}
    if isinstance(operator, CurvatureOperator):
        return {"": operator}
    raise InputError(f"{what}: needs a Hessian with blocks for its parameters, got a {type(operator).__name__}")


def scalar_of(what: str, number: Any, dtype: Any) -> Array:
    """A real number as a 0-d array of the operator's dtype."""
    if jnp.ndim(number) != 0 or jnp.iscomplexobj(number):
        raise InputError(f"{what} must be one real number, got shape {jnp.shape(number)}, dtype {jnp.result_type(number)}")
    return jnp.asarray(number).astype(dtype)


def mean_of(samples: Array) -> tuple[Array, Array]:
    """The mean over the leading axis and its standard error."""
    deviation = jnp.std(samples, axis=0, ddof=1) if samples.shape[0] > 1 else jnp.full_like(samples[0], jnp.nan)
    return jnp.mean(samples, axis=0), deviation / samples.shape[0] ** 0.5


@eqx.filter_jit
def eigenvalues_of(operator: Any) -> Array:
    """All eigenvalues in ascending order, (N,), compiled once for each structure."""
    return operator.eigvalsh() if hasattr(operator, "eigvalsh") else jnp.linalg.eigvalsh(operator.as_matrix())


def flat_product(operator: Any) -> tuple[Callable[[Array], Array], int, Any]:
    """The operator's product on vectors (N,), in the order of `jax.flatten_util.ravel_pytree`; N; and their dtype."""
    structure = operator.in_structure()
    dtype = flat_dtype(structure)
    return lambda vector: ravel(operator.mv(unravel(structure, vector))).astype(dtype), operator.in_size(), dtype


def probes_at_once(probes: int, needed: int) -> int:
    """How many of `probes` vectors run side by side, each needing `needed` bytes."""
    return max(1, min(probes, _CHUNK_BYTES // max(1, needed)))
