"""The density of an operator's eigenvalues, smoothed by a Gaussian g: by stochastic Lanczos quadrature, or exactly.

    φ(t) = (1/N) sum_j g(t - λ_j)  ≈  (1/p) sum_l sum_i (S^l_1i)^2 g(t - θ^l_i)

T^l = S^l diag(θ^l) S^lT being the tridiagonal matrix of Lanczos' method from the probe z_l, l = 1..p, of independent signs.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from matfree import stochtrace

from jaxhess._typing import Array, Float, InputError
from jaxhess.spectra._common import checked, flat_product, mean_of, probes_at_once, scalar_of
from jaxhess.spectra.eigenvalues import Spectrum, spectrum
from jaxhess.spectra.lanczos import gauss, tridiagonal

__all__ = ["Density", "exact_density", "spectral_density"]


class Density(NamedTuple):
    """A density of eigenvalues, whose integral over the line is 1, at the points of a grid.

    `grid`, `density` (points,); `standard_error` (points,) of the density over the probes, NaN for a single one;
    `truncation` (points,), by how much the density changed from half of the Lanczos steps to all: an indication, no bound;
    `nodes`, `weights` (probes, steps), the quadrature; `width` 0-d, the standard deviation of the Gaussian at each node. The
    error terms are zero for a density of exact eigenvalues.
    """

    grid: Float[Array, " points"]
    density: Float[Array, " points"]
    standard_error: Float[Array, " points"]
    truncation: Float[Array, " points"]
    nodes: Float[Array, "probes steps"]
    weights: Float[Array, "probes steps"]
    width: Float[Array, ""]


def spectral_density(
    operator: Any,
    key: Array,
    *,
    steps: int = 100,
    probes: int = 10,
    points: int = 1024,
    grid: Array | None = None,
    width: Any = None,
) -> Density:
    """The density of an operator's eigenvalues, by stochastic Lanczos quadrature, in `probes * (steps + 1)` products.

    Args:
        operator: as for `spectrum`; only its products are used.
        key: draws the probes.
        steps: Lanczos steps for a probe, at most N of them are made: each probe has its density exact then.
        probes: number of random vectors; the standard error falls with its root.
        grid: where the density is wanted, by default `points` points that cover all of it.
        width: standard deviation of the Gaussians, by default 1% of the range of the Ritz values. What is narrower cannot be
            seen; less than about `range / steps` shows single Ritz values where there is a continuum.

    Raises:
        InputError: if the operator is not known to be symmetric, or for numbers out of range.

    Source: Lin, Saad and Yang (2016); Ubaru, Chen and Saad (2017); Ghorbani, Krishnan and Xiao (2019) for networks.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess.operators import Diagonal
        >>> found = spectral_density(Diagonal(jnp.arange(8.0)), jax.random.key(0), steps=8)
        >>> round(jnp.trapezoid(found.density, found.grid).item(), 3)
        1.0
    """
    size = checked("spectral_density", operator, steps=steps, probes=probes, points=points)
    steps = min(steps, size)
    rules, halves = _quadratures(operator, key, steps, probes)
    grid, width = _grid("spectral_density", rules[0], points, grid, width)
    each, coarse = _smoothed(grid, *rules, width), _smoothed(grid, *halves, width)
    density, standard_error = mean_of(each)
    return Density(grid, density, standard_error, jnp.abs(density - jnp.mean(coarse, axis=0)), *rules, width)


def exact_density(eigenvalues: Any, *, points: int = 1024, grid: Array | None = None, width: Any = None) -> Density:
    """The same density of eigenvalues that are known: all N of them (N,), an exact `Spectrum`, or an operator that has one.

    With the `grid` and `width` of another density, the two can be compared point by point.

    Raises:
        InputError: for a `Spectrum` that is not exact or has some of the eigenvalues only.

    Example:
        >>> import jax.numpy as jnp
        >>> found = exact_density(jnp.array([0.0, 0.0, 1.0]), grid=jnp.array([0.0, 1.0]), width=0.1)
        >>> (found.density[0] / found.density[1]).round(3).item()
        2.0
    """
    if isinstance(eigenvalues, lx.AbstractLinearOperator):
        eigenvalues = spectrum(eigenvalues, method="exact")
    if isinstance(eigenvalues, Spectrum):
        if not eigenvalues.exact or eigenvalues.eigenvalues.size != eigenvalues.size:
            raise InputError(
                f"exact_density: the spectrum has {eigenvalues.eigenvalues.size} values of {eigenvalues.size}, "
                f"exact={eigenvalues.exact}; take spectral_density of the operator"
            )
        eigenvalues = eigenvalues.eigenvalues
    nodes = jnp.asarray(eigenvalues)
    if nodes.ndim != 1 or nodes.size == 0 or not jnp.issubdtype(nodes.dtype, jnp.floating):
        raise InputError(f"exact_density: needs eigenvalues (N,), got shape {nodes.shape}, dtype {nodes.dtype}")
    nodes = nodes[None]
    weights = jnp.full_like(nodes, 1 / nodes.size)
    grid, width = _grid("exact_density", nodes, points, grid, width)
    density = _smoothed(grid, nodes, weights, width)[0]
    zeros = jnp.zeros_like(density)
    return Density(grid, density, zeros, zeros, nodes, weights, width)


def _grid(what: str, nodes: Array, points: int, grid: Array | None, width: Any) -> tuple[Array, Array]:
    """The grid and the width asked for, or those that suit the nodes."""
    if grid is not None and jnp.ndim(grid) != 1:
        raise InputError(f"{what}: the grid must be one-dimensional, got shape {jnp.shape(grid)}")
    return _covering(
        nodes,
        points,
        None if grid is None else jnp.asarray(grid, nodes.dtype),
        None if width is None else scalar_of(f"{what}: the width", width, nodes.dtype),
    )


# Compiled here once for each structure: called outside of a user's `jit`, their loops would be compiled every time.


@eqx.filter_jit
def _quadratures(operator: Any, key: Array, steps: int, probes: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    product, size, dtype = flat_product(operator)
    keys = jax.random.split(key, probes)
    sample = stochtrace.sampler_signs(jnp.zeros(size, dtype), num=1)

    def rules(key: Array) -> Any:
        T = tridiagonal(product, sample(key)[0], steps)
        # With N steps each probe's density is exact, and so are not those of fewer steps.
        half = steps if steps == size else (steps + 1) // 2
        return gauss(T)[:2], gauss(T.leading(half))[:2]

    return jax.lax.map(rules, keys, batch_size=probes_at_once(probes, size * steps * dtype.itemsize))


@eqx.filter_jit
def _covering(nodes: Array, points: int, grid: Array | None, width: Any) -> tuple[Array, Array]:
    lowest, highest = jnp.min(nodes), jnp.max(nodes)
    if width is None:
        extent = jnp.maximum(highest - lowest, 1e-3 * jnp.maximum(jnp.abs(lowest), jnp.abs(highest)))
        width = 0.01 * jnp.where(extent > 0, extent, 1)
    if grid is None:
        grid = jnp.linspace(lowest - 6 * width, highest + 6 * width, points)
    return grid, width


@jax.jit
def _smoothed(grid: Array, nodes: Array, weights: Array, width: Array) -> Array:
    """sum_i w_i g(t - θ_i) for each row of nodes, (rows, points)."""

    def at(point: Array) -> Array:
        return jnp.sum(weights * jax.scipy.stats.norm.pdf(point, nodes, width), axis=1)

    return jax.lax.map(at, grid, batch_size=probes_at_once(grid.size, nodes.size * nodes.dtype.itemsize)).T
