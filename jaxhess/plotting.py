"""Pictures of Hessians by matplotlib: spectra of layers, densities, heat maps with layer boundaries, inertia over training.

Every function draws into `ax`, or into axes of a new figure, and returns the axes: titles, sizes and saving are the
caller's. Colours are those of Okabe and Ito (2008) and a blue-red map, which colour-blind readers can tell apart; signs are
told by place too. matplotlib is imported when a picture is drawn: `pip install 'jaxhess[plot]'` brings it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import lineax as lx
import numpy as np

from jaxhess._linalg import format_bytes
from jaxhess._typing import DenseTooLargeError, InputError
from jaxhess.operators import CurvatureOperator
from jaxhess.operators.paths import paths_of
from jaxhess.spectra import Density, InertiaHistory, Spectrum, spectra_by_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_density", "plot_inertia", "plot_matrix", "plot_spectrum"]

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BLUE, VERMILION, GREY = OKABE_ITO[0], OKABE_ITO[1], "#666666"
_HATCHES = ("", "//", "..", "xx")
_LINES = ("-", "--", "-.", ":")
_DRAWN = 4000
_DECADES = 6
_NAME_POINTS = 18


def plot_spectrum(spectra: Any, ax: "Axes | None" = None) -> "Axes":
    """The eigenvalues of every layer on a row of its own, a tick each; the axis is logarithmic on both sides of zero.

    `spectra` maps names to `Spectrum`s or arrays of eigenvalues (as `spectra_by_block` makes it), or is one of those, or a
    Hessian. Beside each row: how many are positive, negative, and zero to rounding; of a spectrum that is not exact, which
    has some of the values only, bars show their error. The axis is linear around zero, below 1e-6 of the largest magnitude
    or the least that is not zero, whichever is more.

    Raises `InputError` if there is nothing to draw, `ImportError` without matplotlib.
    """
    if isinstance(spectra, lx.AbstractLinearOperator):
        spectra = spectra_by_block(spectra)
    named = dict(spectra) if isinstance(spectra, Mapping) else {"": spectra}
    rows = [(str(name), *_values(name, found)) for name, found in named.items()]
    if not rows:
        raise InputError("plot_spectrum: there is no spectrum to draw")
    ax = _axes(ax, height=1.2 + 0.42 * len(rows))
    largest = max((np.abs(values).max(initial=0) for _, values, *_ in rows), default=0.0) or 1.0
    sizes = [np.abs(values[np.abs(values) > zero]) for _, values, _, zero, _ in rows]
    smallest = min((s.min() for s in sizes if s.size), default=largest)
    linear = 10.0 ** np.floor(np.log10(max(smallest, largest * 10.0**-_DECADES)))
    for place, (_, values, error, zero, exact) in enumerate(rows):
        signs = np.where(values > zero, 1, np.where(values < -zero, -1, 0))
        for sign, colour, height in ((0, GREY, 0.22), (1, BLUE, 0.32), (-1, VERMILION, 0.32)):
            drawn = np.unique(values[signs == sign])
            ax.vlines(drawn, place - height, place + height, colors=colour, lw=1.1, alpha=0.75)
            if not exact:
                low, high = (values - error)[signs == sign], (values + error)[signs == sign]
                ax.hlines(np.full(low.size, place), low, high, colors=colour, lw=2, alpha=0.3)
        positive, negative, null = (int(np.sum(signs == sign)) for sign in (1, -1, 0))
        text = f"{positive} pos, {negative} neg, {null} zero" if exact else f"{len(values)} Ritz values"
        where = ax.get_yaxis_transform()
        ax.annotate(text, (1.01, place), xycoords=where, va="center", fontsize="small", annotation_clip=False)
    ends = np.concatenate([values for _, values, *_ in rows])
    _signed_axis(ax, linear, min(ends.min(), 0.0), max(ends.max(), 0.0))
    ax.axvline(0, color="black", lw=0.6, zorder=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlabel(f"eigenvalue (linear within ±{linear:g})")
    if any(name for name, *_ in rows):
        ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
        ax.set_ylabel("layer")
    else:
        ax.set_yticks([])
    ax.grid(axis="x", alpha=0.25)
    return ax


def plot_density(densities: Any, ax: "Axes | None" = None, *, log: bool = True, decades: float = 6) -> "Axes":
    """Densities of eigenvalues, each with a band of one standard error on either side, if it has one.

    `densities` is a `Density`, or maps labels to several. The vertical axis is logarithmic over the largest `decades`, so
    that a few outliers are seen beside the bulk, or linear with `log=False`.

    Raises `InputError` if there is nothing to draw, `ImportError` without matplotlib.
    """
    named = dict(densities) if isinstance(densities, Mapping) else {"": densities}
    if not named or not all(isinstance(density, Density) for density in named.values()):
        raise InputError("plot_density: needs a Density, or a mapping from labels to some")
    ax = _axes(ax)
    top = max(float(np.max(density.density)) for density in named.values())
    floor = top * 10.0**-decades if log else 0.0
    for index, (label, density) in enumerate(named.items()):
        colour, line = OKABE_ITO[index % len(OKABE_ITO)], _LINES[index % len(_LINES)]
        grid, middle, spread = (np.asarray(a, float) for a in (density.grid, density.density, density.standard_error))
        ax.plot(grid, np.maximum(middle, floor / 10), color=colour, ls=line, lw=1.5, label=label or None)
        if np.any(spread > 0):
            low, high = np.maximum(middle - spread, floor / 10), np.maximum(middle + spread, floor / 10)
            ax.fill_between(grid, low, high, color=colour, alpha=0.25, lw=0)
    if log:
        ax.set_yscale("log")
        ax.set_ylim(floor, top * 3)
    else:
        ax.set_ylim(bottom=0)
    ax.set(xlabel="eigenvalue", ylabel="density of eigenvalues")
    ax.grid(alpha=0.25)
    if any(named):
        ax.legend(frameon=False)
    return ax


def plot_matrix(
    operator: Any,
    ax: "Axes | None" = None,
    *,
    names: bool = True,
    colorbar: bool = True,
    scale: float | None = None,
    decades: int = 3,
) -> "Axes":
    """The dense matrix of a Hessian or Gauss-Newton matrix as a heat map, with lines between its parameters and their names.

    Red is positive, blue negative, white zero; colours are logarithmic over the largest `decades` below `scale`, by default
    the largest magnitude, and linear below. Lines between layers (the first key of a path) are stronger than those between
    the parameters of one. Entries of a parameter are in row-major order.

    Raises `DenseTooLargeError` for more than 4000 rows, of which a picture would show nothing: draw blocks of it, such as
    `operator.block("layer/w")`, or its spectrum. `InputError` for anything but a square operator or matrix, `ImportError`
    without matplotlib.
    """
    sizes = {}
    if isinstance(operator, lx.AbstractLinearOperator):
        structure = operator.in_structure()
        if operator.out_size() != operator.in_size():
            raise InputError(f"plot_matrix: needs a square operator, got {operator.out_size()} x {operator.in_size()}")
        leaves = jax.tree.leaves(structure)
        if not isinstance(operator, CurvatureOperator):
            sizes = dict(zip(paths_of(structure), (leaf.size for leaf in leaves), strict=True))
        _check_size(operator.in_size(), sizes)
        operator = operator.as_matrix()
    matrix = np.asarray(operator, float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise InputError(f"plot_matrix: needs a square matrix, got shape {matrix.shape}")
    _check_size(len(matrix), sizes)
    ax = _axes(ax, width=6.4, height=5.2)
    from matplotlib.colors import SymLogNorm

    finite = np.abs(matrix[np.isfinite(matrix)])
    largest = float(scale or finite.max(initial=0) or 1)
    norm = SymLogNorm(linthresh=largest * 10.0**-decades, vmin=-largest, vmax=largest)
    N = len(matrix)
    image = ax.imshow(matrix, cmap="RdBu_r", norm=norm, interpolation="nearest", extent=(0, N, N, 0))
    ends = np.cumsum(list(sizes.values()))
    layers = [name.split("/")[0] for name in sizes]
    for end, layer, following in zip(ends[:-1], layers[:-1], layers[1:], strict=True):
        style = {"color": "black", "lw": 1.0 if layer != following else 0.35}
        ax.axhline(end, **style)
        ax.axvline(end, **style)
    if sizes and names:
        _name_rows(ax, sizes, N)
        ax.set(xlabel="parameters, in the same order")
    else:
        ax.set(xlabel="entry (row-major)", ylabel="entry (row-major)")
    if colorbar:
        top = np.floor(np.log10(largest))
        powers = 10.0 ** (top - np.arange(decades)[:: 1 + decades // 5])
        ticks = [*-powers, 0, *powers[::-1]]
        ax.figure.colorbar(image, ax=ax, shrink=0.85, pad=0.03, label="second derivative", ticks=ticks)
    return ax


def plot_inertia(history: InertiaHistory, ax: "Axes | None" = None) -> "Axes":
    """The share of positive eigenvalues over training, stacked by layer above zero, and that of negative ones below.

    Shares are of the eigenvalues of all layers: what neither half covers is zero to rounding. Steps whose Hessian was not
    finite are left blank.

    Raises `InputError` for a history of less than two steps, `ImportError` without matplotlib.
    """
    if len(history) < 2:
        raise InputError(f"plot_inertia: needs a history of two steps or more, got {len(history)}")
    ax = _axes(ax)
    total = np.sum(np.maximum(history.sizes, 0)) or 1
    known = np.all(history.positive >= 0, axis=1)
    for sign, counts in ((1, history.positive), (-1, history.negative)):
        heights = sign * np.cumsum(100 * counts / total, axis=1)
        heights = np.concatenate([np.zeros((len(history), 1)), heights], axis=1)
        for index, path in enumerate(history.paths):
            ax.fill_between(
                history.steps,
                heights[:, index],
                heights[:, index + 1],
                where=known.tolist(),
                facecolor=OKABE_ITO[index % len(OKABE_ITO)],
                edgecolor="white",
                hatch=_HATCHES[index // len(OKABE_ITO) % len(_HATCHES)],
                lw=0.4,
                label=path if sign > 0 else None,
            )
    ax.axhline(0, color="black", lw=0.8)
    ax.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}%")
    ax.set(xlabel="training step", ylabel="share of all eigenvalues\nnegative below, positive above")
    ax.margins(x=0)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    ax.grid(alpha=0.25)
    return ax


def _axes(ax: "Axes | None", width: float = 6.4, height: float = 4.2) -> "Axes":
    """The axes given, or those of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "jaxhess.plotting needs matplotlib, which is not installed: pip install 'jaxhess[plot]'"
        ) from error
    if ax is None:
        ax = plt.figure(figsize=(width, height), layout="constrained").add_subplot()
    return ax


def _values(name: Any, found: Any) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """Eigenvalues, their errors, what counts as zero, and whether they are all there and exact."""
    if isinstance(found, Spectrum):
        values, error = np.asarray(found.eigenvalues), np.asarray(found.error)
        size, exact = found.size, found.exact and found.eigenvalues.size == found.size
    else:
        values = np.asarray(found)
        error, size, exact = np.zeros_like(values), values.size, True
    if values.ndim != 1 or values.size == 0 or not np.issubdtype(values.dtype, np.floating):
        raise InputError(f"plot_spectrum: {name!r} must be a Spectrum or eigenvalues (N,), got shape {values.shape}")
    if not np.all(np.isfinite(values)):
        raise InputError(f"plot_spectrum: {name!r} has eigenvalues that are not finite")
    zero = size * float(np.finfo(values.dtype).eps) * float(np.abs(values).max())
    return values.astype(float), error.astype(float), zero, exact


def _signed_axis(ax: "Axes", linear: float, lowest: float, highest: float) -> None:
    """A horizontal axis, logarithmic on both sides of zero, with a tick at some powers of ten and at zero."""
    ax.set_xscale("symlog", linthresh=linear, linscale=0.6)
    first, last = np.log10(linear), np.floor(np.log10(max(-lowest, highest, linear)))
    powers = 10.0 ** np.arange(last, first - 0.5, -max(1, int(np.ceil((last - first + 1) / 4))))
    powers = powers[powers > 5 * linear] if np.any(powers > 5 * linear) else powers
    ax.set_xticks([*-powers[powers <= -lowest], 0, *powers[powers <= highest][::-1]])
    ax.set_xlim(min(2 * lowest, -linear), max(2 * highest, linear))


def _check_size(rows: int, sizes: Mapping[str, int]) -> None:
    """Raise `DenseTooLargeError` where a picture has too few points for a matrix."""
    if rows > _DRAWN:
        some = f" ({', '.join(list(sizes)[:3])}{', ..' if len(sizes) > 3 else ''})" if sizes else ""
        raise DenseTooLargeError(
            f"plot_matrix: a picture shows {_DRAWN} rows, not {rows} x {rows} entries ({format_bytes(8 * rows**2)}). Draw "
            f"block(path){some} of the operator, or plot_spectrum or plot_density of it"
        )


def _name_rows(ax: "Axes", sizes: Mapping[str, int], N: int) -> None:
    """The parameters' names left of their rows, moved apart where rows are few, with a line to where they belong."""
    from matplotlib.text import Text
    from matplotlib.transforms import offset_copy

    middles = np.cumsum(list(sizes.values())) - np.array(list(sizes.values())) / 2
    places = _spread(middles, N / max(17, len(sizes)))
    ax.set(xticks=[], yticks=[])
    figure: Any = ax.figure
    beside = offset_copy(ax.get_yaxis_transform(), figure, x=-_NAME_POINTS, units="points")
    texts = [
        ax.annotate(
            name,
            (0, middle),
            (0, place),
            textcoords=beside,
            ha="right",
            va="center",
            fontsize="small" if len(sizes) <= 17 else "xx-small",
            arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 1, "shrinkB": 0},
            annotation_clip=False,
        )
        for name, middle, place in zip(sizes, middles, places, strict=True)
    ]
    widest = 72 / figure.dpi * max(Text.get_window_extent(text).width for text in texts)  # without the line
    ax.set_ylabel("parameter", labelpad=_NAME_POINTS + widest + 2)


def _spread(places: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:
    """The places moved apart, in order, until no two are nearer than `gap`."""
    moved = np.array(places, float)
    for _ in range(500):
        overlap = np.maximum(gap - np.diff(moved), 0) / 2
        moved[:-1] -= overlap
        moved[1:] += overlap
    return moved
