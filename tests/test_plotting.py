"""Pictures: what they show, where, and how it is named."""

import sys

import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import jaxhess
from jaxhess._typing import DenseTooLargeError, InputError
from jaxhess.operators import BlockDiagonal, Diagonal, Inertia
from jaxhess.plotting import BLUE, OKABE_ITO, VERMILION, plot_density, plot_inertia, plot_matrix, plot_spectrum
from jaxhess.spectra import InertiaHistory, exact_density, spectral_density, spectrum


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def hessian(blocks="full"):
    def error(p, x):
        return jnp.sum(jnp.tanh(p["out"] @ jnp.tanh(p["hidden"]["w"] @ x + p["hidden"]["b"])) ** 2)

    random = np.random.default_rng(0)
    p = {"hidden": {"w": random.normal(size=(3, 4)), "b": random.normal(size=3)}, "out": random.normal(size=(2, 3))}
    return jaxhess.hessian(error, blocks=blocks)(jax.tree.map(jnp.asarray, p), jnp.asarray(random.normal(size=(2, 4))))


def history():
    found = InertiaHistory()
    for step, negative in ((0, 2), (5, 1), (10, 0)):
        found.append(step, {"w": Inertia(*map(jnp.asarray, (4, negative, 2 - negative))), "b": Inertia(2, 0, 0)})
    return found


def texts(ax):
    return [text.get_text() for text in ax.texts]


def in_colour(ax, colour):
    """The places of the ticks of eigenvalues in a colour."""
    lines = [c for c in ax.collections if np.allclose(c.get_color()[:, :3], to_rgb(colour)) and len(c.get_segments())]
    return np.sort(np.concatenate([[segment[0, 0] for segment in c.get_segments()] for c in lines]))


def every_plot(**options):
    density = exact_density(jnp.array([0.0, 1.0, 2.0]), points=50)
    yield plot_spectrum(jnp.array([-1.0, 0.0, 2.0]), **options)
    yield plot_density(density, **options)
    yield plot_matrix(np.eye(3), **options)
    yield plot_inertia(history(), **options)


def test_axes_are_taken_labelled_and_drawn():
    for ax in every_plot():
        assert ax.get_xlabel()
        ax.figure.canvas.draw()
    figure, given = plt.subplots()
    count = len(plt.get_fignums())
    for ax in every_plot(ax=given):
        assert ax is given
    assert len(plt.get_fignums()) == count
    figure.canvas.draw()


def test_matrix_of_a_whole_hessian():
    H = hessian()
    ax = plot_matrix(H)
    ax.figure.canvas.draw()
    np.testing.assert_array_equal(ax.images[0].get_array(), H.as_matrix())
    assert tuple(ax.images[0].get_extent()) == (0, 21, 21, 0)
    lines = [(line.get_xdata(), line.get_ydata(), line.get_linewidth()) for line in ax.lines]
    horizontal = [(y[0], width) for _, y, width in lines if len(set(y)) == 1]
    vertical = [(x[0], width) for x, _, width in lines if len(set(x)) == 1]
    assert horizontal == vertical
    assert [end for end, _ in horizontal] == [3, 15]  # hidden/b (3), hidden/w (12), out (6)
    assert horizontal[0][1] < horizontal[1][1]  # the layers' boundary is the stronger one
    assert texts(ax) == ["hidden/b", "hidden/w", "out"]
    assert [text.xy[1] for text in ax.texts] == [1.5, 9, 18]
    assert ax.get_xlabel()
    assert ax.get_ylabel() == "parameter"
    norm = ax.images[0].norm
    assert norm.vmin == -norm.vmax == -np.abs(H.as_matrix()).max()
    np.testing.assert_allclose(norm(0.0), 0.5)
    # No name lies upon another, nor on the axis label.
    boxes = [text.get_window_extent() for text in (*ax.texts, ax.yaxis.label)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_matrices_of_other_kinds():
    H = hessian("diagonal")
    ax = plot_matrix(H, names=False, colorbar=False, scale=7.0)
    assert ax.images[0].norm.vmax == 7
    assert len(ax.lines) == 4
    assert not ax.texts
    assert len(ax.figure.axes) == 1
    ax = plot_matrix(H["out"])
    assert not ax.lines
    np.testing.assert_array_equal(ax.images[0].get_array(), H["out"].as_matrix())
    assert len(ax.figure.axes) == 2
    plot_matrix(np.zeros((2, 2))).figure.canvas.draw()


def test_matrices_that_are_not_drawn():
    large = BlockDiagonal({"w": Diagonal(jnp.ones((100, 50))), "b": Diagonal(jnp.ones(3))})
    with pytest.raises(DenseTooLargeError, match=r"4000 rows, not 5003 x 5003 .* block\(path\) \(b, w\)"):
        plot_matrix(large)
    with pytest.raises(DenseTooLargeError, match="4000 rows"):
        plot_matrix(np.zeros((4001, 4001), np.int8))
    with pytest.raises(InputError, match=r"square operator, got 2 x 3"):
        plot_matrix(lx.MatrixLinearOperator(jnp.ones((2, 3))))
    with pytest.raises(InputError, match=r"got shape \(2, 3\)"):
        plot_matrix(np.ones((2, 3)))


def test_spectrum_of_layers():
    H = BlockDiagonal({"w": Diagonal(jnp.array([-2.0, 0.0, 0.0, 1e-3, 4.0])), "b": Diagonal(jnp.array([1.0, 3.0]))})
    ax = plot_spectrum(H)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "w"]
    assert (ax.get_xscale(), ax.get_ylabel()) == ("symlog", "layer")
    assert ax.get_xlabel().startswith("eigenvalue (linear within ±0.001)")
    np.testing.assert_array_equal(in_colour(ax, BLUE), [1e-3, 1, 3, 4])
    np.testing.assert_array_equal(in_colour(ax, VERMILION), [-2])
    assert texts(ax) == ["2 pos, 0 neg, 0 zero", "2 pos, 1 neg, 2 zero"]
    low, high = ax.get_xlim()
    assert low < -2
    assert high > 4


def test_spectrum_by_lanczos_shows_its_errors():
    H = Diagonal(jnp.linspace(-1, 1, 40))
    found = spectrum(H, method="lanczos", steps=6)
    ax = plot_spectrum({"all": found})
    assert texts(ax) == ["6 Ritz values"]
    bars = np.array([s[:, 0] for c in ax.collections for s in c.get_segments() if s[0, 1] == s[1, 1]])
    bars = bars[np.argsort(bars.mean(axis=1))]
    np.testing.assert_allclose(bars.mean(axis=1), found.eigenvalues, atol=1e-12)
    np.testing.assert_allclose(np.diff(bars, axis=1)[:, 0] / 2, found.error, atol=1e-12)


@pytest.mark.parametrize("values", [[0.0, 0.0], [-1.0, -1.0], [1e-300, 1.0], [1e30, -1e-30], [-1e-5, 1e3]])
def test_spectra_of_any_size(values):
    eigenvalues = np.array(values)
    ax = plot_spectrum(eigenvalues)
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    assert low < eigenvalues.min()
    assert high > eigenvalues.max()
    assert low < 0 < high
    assert 1 <= len(ax.get_xticks()) <= 11


def test_density_with_its_band():
    H = BlockDiagonal({"w": Diagonal(jnp.array([-2.0, 0.0, 0.0, 1e-3, 4.0]))})
    estimate = spectral_density(hessian(), jax.random.key(0), steps=21, probes=5, points=100)
    exact = exact_density(hessian(), grid=estimate.grid, width=estimate.width)
    ax = plot_density({"estimate": estimate, "exact": exact}, log=False)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), estimate.density)
    np.testing.assert_allclose(ax.lines[1].get_ydata(), exact.density)
    assert len(ax.collections) == 1  # exact densities have no band
    corners = ax.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(corners[:, 1].max(), np.max(estimate.density + estimate.standard_error))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["estimate", "exact"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("eigenvalue", "density of eigenvalues")
    assert {line.get_linestyle() for line in ax.lines} == {"-", "--"}
    ax = plot_density(exact_density(H))
    assert ax.get_yscale() == "log"
    assert ax.get_legend() is None


def test_inertia_over_training():
    ax = plot_inertia(history())
    # Stacked from zero: w 4/8, then b 2/8 above; w 2/8, 1/8, 0 below.
    tops = {}
    for area in ax.collections:
        heights = area.get_paths()[0].vertices[:, 1]
        tops.setdefault(tuple(np.round(area.get_facecolor()[0][:3], 3)), []).append((heights.min(), heights.max()))
    w, b = (tuple(np.round(to_rgb(colour), 3)) for colour in OKABE_ITO[:2])
    assert tops[w] == [(0, 50), (-25, 0)]
    assert tops[b] == [(50, 75), (-25, 0)]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "w"]
    assert ax.get_xlabel() == "training step"
    assert ax.get_xlim() == (0, 10)
    assert ax.yaxis.get_major_formatter()(-25, None) == "25%"


def test_what_cannot_be_drawn():
    for wrong, message in (
        (lambda: plot_spectrum({}), "no spectrum to draw"),
        (lambda: plot_spectrum(np.ones((2, 2))), r"eigenvalues \(N,\), got shape"),
        (lambda: plot_spectrum(np.array([np.nan])), "not finite"),
        (lambda: plot_density(np.ones(3)), "needs a Density"),
        (lambda: plot_density({}), "needs a Density"),
        (lambda: plot_inertia(InertiaHistory()), "two steps or more, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            wrong()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib, .* pip install 'jaxhess\[plot\]'"):
        plot_matrix(np.eye(2))
