"""Traces and determinants of operators known by their products, from p probes z_1..z_p of independent signs.

    tr A ≈ (1/p) sum_l z_l^T A z_l                                                     (Hutchinson 1990)
    tr A ≈ tr Q^T A Q + (1/p) sum_l z_l^T (I - Q Q^T) A (I - Q Q^T) z_l                (Hutch++, Meyer et al. 2021)
    log det (A + λI) ≈ (N/p) sum_l sum_i (S^l_1i)^2 log(θ^l_i + λ)                     (Ubaru, Chen and Saad 2017)

Every estimate is unbiased but for the finite number of Lanczos steps in the last, which is told apart.
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from matfree import stochtrace

from jaxhess._linalg import matmul
from jaxhess._typing import Array, Float, InputError
from jaxhess.operators.reduction import flat_dtype
from jaxhess.spectra._common import checked, flat_product, mean_of, probes_at_once, scalar_of
from jaxhess.spectra.lanczos import gauss, gauss_radau, rounding, tridiagonal

__all__ = ["Estimate", "stochastic_logdet", "stochastic_trace"]


class Estimate(NamedTuple):
    """A mean over random probes, 0-d, its standard error (NaN for a single probe, and itself uncertain for a few),
    and what the truncation is worth: with endless Lanczos steps the mean over the same probes would be between
    `value - truncation` and `value`."""

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    truncation: Float[Array, ""]


def stochastic_trace(
    operator: Any, key: Array, *, products: int = 30, method: Literal["hutchinson", "hutch++"] = "hutch++"
) -> Estimate:
    """An unbiased estimate of the trace in `products` products; most operators of this library have it exact, `trace()`.

    "hutchinson" spends them on probes. "hutch++" spends a third each on a sketch `Q = qr(A S)`, on the trace on its span,
    and on probes of the rest: far better where eigenvalues decay, as those of Hessians do, and exact for a rank up to a
    third of `products`. Its memory is `products / 3 * N` numbers. The standard error is over the probes, NaN for one.

    Raises:
        InputError: if the operator is not known to be symmetric, for less than 1 product (3 for "hutch++"), another method.

    Source: Hutchinson (1990); Meyer, Musco, Musco and Woodruff (2021), algorithm 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess.operators import Diagonal
        >>> found = stochastic_trace(Diagonal(jnp.arange(8.0)), jax.random.key(0), products=8, method="hutchinson")
        >>> found.value.item(), found.standard_error.item()
        (28.0, 0.0)
    """
    if method not in ("hutchinson", "hutch++"):
        raise InputError(f"stochastic_trace: method must be 'hutchinson' or 'hutch++', got {method!r}")
    size = checked("stochastic_trace", operator, products=products)
    if method == "hutch++" and products < 3:
        raise InputError(f"stochastic_trace: 'hutch++' needs at least 3 products, got {products}")
    sketch = min(products // 3, size) if method == "hutch++" else 0
    return _trace(operator, key, sketch, products - 2 * sketch)


def stochastic_logdet(operator: Any, key: Array, damping: Any = 0.0, *, steps: int = 50, probes: int = 30) -> Estimate:
    """An estimate of `log det(A + damping I)` for positive semidefinite A, by Lanczos quadrature, in `probes * (steps + 1)`
    products.

    `value` is by the Gauss rule, which is never too small; the Gauss-Radau rule, never too large, gives `truncation`.
    Without damping nothing bounds the spectrum away from zero: `truncation` is infinite. All three are NaN where a Ritz
    value of `A + damping I` is not positive.

    Args:
        operator: as for `spectrum`, tagged as positive semidefinite.
        key: draws the probes.
        damping: a number or 0-d array, >= 0.
        steps: Lanczos steps for a probe, at most N of them are made; `truncation` tells whether they suffice.
        probes: number of random vectors; the standard error falls with its root.

    Raises:
        InputError: if the operator is not tagged as positive semidefinite: Lanczos' method may miss a negative eigenvalue.
            `operator.with_tags(lineax.positive_semidefinite_tag)` vouches that there is none; `logdet` of most operators of
            this library is exact and needs no such promise.

    Source: Ubaru, Chen and Saad (2017); the bounds are Golub and Meurant (2010), chapter 6.

    Example:
        >>> import jax, jax.numpy as jnp, lineax as lx
        >>> from jaxhess.operators import Diagonal
        >>> A = Diagonal(jnp.array([0.0, 1.0, 2.0]), lx.positive_semidefinite_tag)
        >>> round(stochastic_logdet(A, jax.random.key(0), 1.0).value.item(), 4)    # log(1 * 2 * 3)
        1.7918
    """
    size = checked("stochastic_logdet", operator, steps=steps, probes=probes)
    if not lx.is_positive_semidefinite(operator):
        raise InputError(
            f"stochastic_logdet: the {type(operator).__name__} is not tagged as positive semidefinite, and Lanczos' method "
            "may miss a negative eigenvalue. Take logdet(damping) of the operator, or vouch that there is none by "
            "with_tags(lineax.positive_semidefinite_tag)"
        )
    dtype = flat_dtype(operator.in_structure())
    return _logdet(operator, key, scalar_of("stochastic_logdet: the damping", damping, dtype), min(steps, size), probes)


# Compiled here once for each structure: called outside of a user's `jit`, their loops would be compiled every time.


@eqx.filter_jit
def _trace(operator: Any, key: Array, sketch: int, probes: int) -> Estimate:
    product, size, dtype = flat_product(operator)
    first, second = jax.random.split(key)
    sample = stochtrace.sampler_signs(jnp.zeros(size, dtype), num=1)
    integrand = stochtrace.monte_carlo_trace()
    at_once = probes_at_once(max(probes, sketch), 2 * size * dtype.itemsize)
    on_span, Q = jnp.zeros((), dtype), jnp.zeros((size, 0), dtype)
    with jax.default_matmul_precision("highest"):
        if sketch:
            images = jax.lax.map(lambda key: product(sample(key)[0]), jax.random.split(first, sketch), batch_size=at_once)
            Q = jnp.linalg.qr(images.T)[0]
            on_span = jnp.sum(jax.lax.map(lambda q: jnp.dot(q, product(q)), Q.T, batch_size=at_once))

        def outside(vector: Array) -> Array:
            return vector - matmul(Q, matmul(Q.T, vector)) if sketch else vector

        def sampled(key: Array) -> Array:
            return integrand(lambda vector: outside(product(outside(vector))), sample(key)[0])

        samples = jax.lax.map(sampled, jax.random.split(second, probes), batch_size=at_once)
    rest, standard_error = mean_of(samples)
    return Estimate(on_span + rest, standard_error, jnp.zeros((), dtype))


@eqx.filter_jit
def _logdet(operator: Any, key: Array, damping: Array, steps: int, probes: int) -> Estimate:
    product, size, dtype = flat_product(operator)
    keys = jax.random.split(key, probes)
    sample = stochtrace.sampler_signs(jnp.zeros(size, dtype), num=1)

    def logarithms(key: Array) -> tuple[Array, Array]:
        T = tridiagonal(product, sample(key)[0], steps)
        nodes, weights, _ = gauss(T)
        upper = jnp.sum(weights * jnp.log(nodes + damping))
        # Below a spectrum that is not negative but for rounding, and above what damping makes of it.
        below = -jnp.minimum(jnp.maximum(damping, 0) / 2, rounding(T, size))
        nodes, weights, _ = gauss_radau(T, below)
        lower = jnp.sum(weights * jnp.log(jnp.maximum(nodes, below) + damping))
        return size * upper, size * jnp.maximum(upper - lower, 0)

    at_once = probes_at_once(probes, size * steps * dtype.itemsize)
    values, gaps = jax.lax.map(logarithms, keys, batch_size=at_once)
    value, standard_error = mean_of(values)
    return Estimate(value, standard_error, jnp.where(damping > 0, jnp.mean(gaps), jnp.inf) + 0 * value)
