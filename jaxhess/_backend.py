"""A guard against a CPU compiler that sums wrongly.

In jaxlib 0.10.2 the CPU backend hands sums over an axis to a library, and those of a product with an array that is repeated
along the first axis come out wrong in float32, without an error (https://github.com/jax-ml/jax/issues/39103):
`v - jnp.sum(p * v, -1, keepdims=True)` for p (32, 20, 10) and v (8, 32, 20, 10), say, as in the curvature of a softmax over
time. An exact library cannot work on top of it, so importing jaxhess turns that one optimisation off where it is known to
be wrong, and the first Hessian tells by a warning where the sums are wrong still.
"""

import functools
import os
import warnings
from collections.abc import MutableMapping

import jax
import jaxlib.version
import numpy as np

__all__ = ["avoid_wrong_sums", "warn_of_wrong_sums"]

_OPTION = "--xla_cpu_experimental_ynn_fusion_type"
_AFFECTED = {"0.10.2", "0.11.0"}
_TOLERANCE = 1e-3


def avoid_wrong_sums(environment: MutableMapping[str, str], version: str = jaxlib.version.__version__) -> None:
    """Add the option to XLA_FLAGS, for the versions that need and know it; a user's own setting stays.

    >>> settings = {}
    >>> avoid_wrong_sums(settings, "0.10.2")
    >>> settings
    {'XLA_FLAGS': '--xla_cpu_experimental_ynn_fusion_type=-reduce'}
    """
    flags = environment.get("XLA_FLAGS", "")
    if version in _AFFECTED and _OPTION not in flags:
        environment["XLA_FLAGS"] = f"{flags} {_OPTION}=-reduce".strip()


@functools.cache
def warn_of_wrong_sums() -> None:
    """Compile one such sum, once in a process, and warn if it is wrong."""
    if jax.default_backend() != "cpu":
        return
    p, v = np.random.default_rng(0).normal(size=(32, 20, 10)), np.random.default_rng(1).normal(size=(8, 32, 20, 10))
    p, v = p[None].astype(np.float32), v.astype(np.float32)
    # Compiled on its own: the caller may be within a trace.
    found = jax.jit(lambda p, v: v - (p * v).sum(-1, keepdims=True)).lower(p, v).compile()(p, v)
    if np.max(np.abs(np.asarray(found) - (v - (p * v).sum(-1, keepdims=True)))) > _TOLERANCE:
        warnings.warn(
            f"The CPU backend of jaxlib {jaxlib.version.__version__} computes some float32 sums wrongly "
            "(https://github.com/jax-ml/jax/issues/39103), so gradients and Hessians may be wrong, JAX's own too. Import "
            f"jaxhess before the first JAX computation, set XLA_FLAGS={_OPTION}=-reduce, or use another release of jaxlib.",
            RuntimeWarning,
            stacklevel=2,
        )


avoid_wrong_sums(os.environ)
