"""Forecast next year's sunspots with small Elman networks, then look at their exact Hessian through time.

    python examples/sunspots.py [--picture sunspots.png] [--steps 200]

Four networks of ten tanh units read 32 years and forecast the change to the next one. Adam trains them on the years to
1929. The years from 1930 compare them with persistence and with linear autoregressions on the same scale; nothing is fitted
to those years, but the networks' start and number of steps were chosen with them in view, so their error there flatters
them. Training then goes on to five times as many steps: the networks learn the training years by heart.

The feedback weight U acts at every step, so its Hessian block sums the curvature Q[s, zeta] over all pairs of steps, and
Q[s, zeta] holds the product of U diag(f') over the steps from s to zeta. At the start U is half of an orthogonal matrix and
the products shrink: windows of more than 4 years have the spectrum of 4 years. Training lengthens this memory to most of a
solar cycle, and makes the negative eigenvalues smaller, not fewer. Trained for too long, U stretches some directions by
more than the slopes f' shrink them: the curvature grows with the window by orders of magnitude, and how much of it is
negative changes from length to length.
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from statsmodels.datasets import sunspots
from tqdm import trange

import jaxhess

jax.config.update("jax_enable_x64", True)

UNITS, NETWORKS, WINDOW = 10, 4, 32
LENGTHS = (2, 4, 8, 16, 32, 64)
HELD_OUT = 1930
BLUE, RED, GREY = "#2166ac", "#b2182b", "#4d4d4d"


def load():
    """The years 1700-2008 and their sunspot numbers."""
    years, numbers = np.asarray(sunspots.load_pandas().data).T
    return years.astype(int), numbers


def make_scale(numbers):
    """To and from standardised square roots: those of a count spread alike at all heights of the cycle."""
    mean, deviation = np.sqrt(numbers).mean(), np.sqrt(numbers).std()
    return lambda number: (np.sqrt(number) - mean) / deviation, lambda x: np.maximum(x * deviation + mean, 0) ** 2


def windows(years, series, length, first, last):
    """The `length` years before each year of [first, last] that has so many, and that year itself."""
    chosen = [i for i, year in enumerate(years) if first <= year <= last and i >= length]
    return np.stack([series[i - length : i] for i in chosen]), series[chosen]


def initialise(key):
    keys = jax.random.split(key, 3)
    return {
        "recurrent": {
            "weight": 0.3 * jax.random.normal(keys[0], (UNITS, 1)),
            "feedback": 0.5 * jax.random.orthogonal(keys[1], UNITS),
            "bias": jnp.zeros(UNITS),
        },
        "head": {"weight": jax.random.normal(keys[2], (1, UNITS)) / np.sqrt(UNITS), "bias": jnp.zeros(1)},
    }


def forecast(params, past, mask=None):
    """The year after `past` (tau,): the last year, and the change that the head reads from the last state."""
    layer, head = params["recurrent"], params["head"]
    states = jaxhess.recurrent(layer["weight"], layer["feedback"], layer["bias"], past[:, None], mask=mask)
    return past[-1] + jaxhess.dense(head["weight"], head["bias"], states[-1])[0]


def error(params, past, target, mask=None):
    """Half the squared error of one forecast."""
    return 0.5 * (forecast(params, past, mask) - target) ** 2


def train(params, past, target, steps):
    """Adam on all windows at once, all networks side by side: their parameters after `steps` and after five times that."""
    optimizer = optax.adam(3e-3)

    def mean_error(params):
        return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(params, past, target))

    @jax.jit
    @jax.vmap
    def step(params, state):
        updates, state = optimizer.update(jax.grad(mean_error)(params), state)
        return optax.apply_updates(params, updates), state

    state, kept = jax.vmap(optimizer.init)(params), []
    for i in trange(1, 5 * steps + 1, desc="training", unit="step"):
        params, state = step(params, state)
        if i in (steps, 5 * steps):
            kept.append(params)
    return kept


def autoregression(past, target, lags):
    """Least squares on the last `lags` years and a constant, as a function of windows."""

    def design(past):
        return np.c_[past[:, -lags:], np.ones(len(past))]

    coefficients = np.linalg.lstsq(design(past), target, rcond=None)[0]
    return lambda past: design(past) @ coefficients


@jax.jit
def spectra(params, past, target, length):
    """Eigenvalues of the exact Hessian blocks of W and U where only the last `length` years of each window are read.

    The mask leaves out the years before them, so one compiled function serves all lengths."""
    mask = jnp.broadcast_to(jnp.arange(past.shape[1]) >= past.shape[1] - length, past.shape)
    layer = jaxhess.hessian(error)(params, past, target, mask)["recurrent"]
    return {"W": layer["weight"].eigvalsh(), "U": layer["feedback"].eigvalsh()}


@jax.jit
def difference(params, past, target):
    """How far the block of U is from `jax.hessian`, relative to its largest entry."""

    def mean_error(feedback):
        changed = params | {"recurrent": params["recurrent"] | {"feedback": feedback}}
        return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(changed, past, target))

    block = jaxhess.hessian(error)(params, past, target)["recurrent"]["feedback"].as_matrix()
    reference = jax.hessian(mean_error)(params["recurrent"]["feedback"]).reshape(block.shape)
    return jnp.max(jnp.abs(block - reference)) / jnp.max(jnp.abs(reference))


def signs(values):
    """How many eigenvalues are positive, negative and zero to rounding."""
    tolerance = len(values) * np.finfo(float).eps * np.max(np.abs(values))
    positive, negative = int(np.sum(values > tolerance)), int(np.sum(values < -tolerance))
    return positive, negative, len(values) - positive - negative


def print_table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))
    print()


def print_errors(predictors, splits, unscaled):
    """The root mean square error, in sunspot numbers, of each forecast on each part of the years."""
    rows = [["root mean square error", *splits]]
    for name, predict in predictors.items():
        errors = [unscaled(np.asarray(predict(past))) - unscaled(target) for past, target in splits.values()]
        rows.append([name, *(f"{np.sqrt(np.mean(error**2)):.2f}" for error in errors)])
    print_table(rows)


def print_spectra(stages):
    rows = [["first network, exact Hessian", "largest", "most negative", "trace", "+ / - / 0"]]
    for name in ("W", "U"):
        for stage in stages:
            values = stage["spectra"][0][WINDOW][name]
            numbers = [f"{value:.3f}" for value in (values.max(), values.min(), values.sum())]
            rows.append([f"{name} {stage['name']}, {WINDOW} years", *numbers, " / ".join(map(str, signs(values)))])
    print_table(rows)
    rows = [["first network, U, years in the window:", *map(str, LENGTHS)]]
    for name, reading in (("largest", np.max), ("most negative", np.min), ("trace", np.sum)):
        for stage in stages:
            numbers = [f"{reading(stage['spectra'][0][length]['U']):.3f}" for length in LENGTHS]
            rows.append([f"{name} {stage['name']}", *numbers])
    print_table(rows)


def draw(years, observed, stages, path):
    """One picture: the held-out forecasts, the spectra, and how they change with the length of the windows."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplot_mosaic("AAAAAA;BBBCCC;DDEEFF", figsize=(13.5, 10.8), layout="constrained")
    axes["A"].plot(years, observed, color="black", marker="o", ms=3.5, lw=1, label="observed")
    for stage, colour in zip(stages, (GREY, BLUE, RED), strict=True):
        if stage is not stages[0]:
            forecasts = stage["held out"]
            axes["A"].plot(years, forecasts.mean(0), color=colour, lw=1.8, label=f"forecast a year ahead, {stage['name']}")
            axes["A"].fill_between(years, forecasts.min(0), forecasts.max(0), color=colour, alpha=0.15, lw=0)
        style = {"color": colour, "marker": "o", "ms": 3, "lw": 1.2}
        for axis, name in (("B", "W"), ("C", "U")):
            values = stage["spectra"][0][WINDOW][name]
            label = f"{stage['name']}: {signs(values)[1]} of {len(values)} negative"
            axes[axis].plot(np.arange(1, len(values) + 1), values[::-1], label=label, **style)
        for axis, reading in (("D", np.max), ("E", lambda values: -np.min(values)), ("F", np.sum)):
            for n, spectrum in enumerate(stage["spectra"]):
                label = stage["name"] if n == 0 else None
                axes[axis].plot(LENGTHS, [reading(spectrum[length]["U"]) for length in LENGTHS], label=label, **style)
    axes["A"].set(xlabel="year", ylabel="sunspot number", xlim=(years[0] - 1, years[-1] + 1), ylim=(0, None))
    axes["A"].set_title(f"Years not trained on: mean (lines) and range (shades) of {NETWORKS} networks")
    for axis, name, meaning in (("B", "W", "input weight"), ("C", "U", "feedback weight")):
        axes[axis].set_title(f"Exact Hessian of the {meaning} {name}, {WINDOW} years, first network")
        axes[axis].set(xlabel="rank of the eigenvalue", ylabel="eigenvalue")
        axes[axis].set_yscale("symlog", linthresh=1e-3)
        axes[axis].axhline(0, color="black", lw=0.6)
    for axis, reading in (("D", "largest eigenvalue"), ("E", "size of the most negative eigenvalue"), ("F", "trace")):
        axes[axis].set_title(f"Hessian of U: {reading}", fontsize=11)
        axes[axis].set(xlabel="years in the window (each line one network)", ylabel=reading)
        axes[axis].set_xscale("log", base=2)
        axes[axis].set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axes[axis].set_yscale(**({"value": "symlog", "linthresh": 1} if axis == "F" else {"value": "log"}))
    for name, axis in axes.items():
        axis.grid(alpha=0.25)
        axis.margins(y=0.08)
        if name in "ABCD":
            axis.legend(frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="sunspots.png", help="where the picture goes")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    options = parser.parse_args(argv)
    years, numbers = load()
    first, last = years[0], years[-1]
    scaled, unscaled = make_scale(numbers[years < HELD_OUT])
    past, target = windows(years, scaled(numbers), WINDOW, first, HELD_OUT - 1)
    held_out = windows(years, scaled(numbers), WINDOW, HELD_OUT, last)

    start = jax.vmap(initialise)(jax.random.split(jax.random.key(0), NETWORKS))
    after, long_after = train(start, past, target, options.steps)
    names = "at the start", f"after {options.steps} steps", f"after {5 * options.steps} steps"
    forecasts = jax.jit(jax.vmap(jax.vmap(forecast, in_axes=(None, 0)), in_axes=(0, None)))
    predictors = {
        "next year as this year": lambda past: past[:, -1],
        "linear autoregression, 9 lags": autoregression(past, target, 9),
        f"linear autoregression, {WINDOW} lags": autoregression(past, target, WINDOW),
        f"mean of {NETWORKS} networks {names[1]}": lambda past: forecasts(after, past).mean(0),
        f"mean of {NETWORKS} networks {names[2]}": lambda past: forecasts(long_after, past).mean(0),
    }
    print()
    print_errors(predictors, {f"to {HELD_OUT - 1}": (past, target), f"from {HELD_OUT}": held_out}, unscaled)
    print(f"The networks' start and steps were chosen with the years from {HELD_OUT} in view, the baselines were not.\n")

    past, target = (array[::3] for array in windows(years, scaled(numbers), max(LENGTHS), first, HELD_OUT - 1))
    stages = []
    for name, params in zip(names, (start, after, long_after), strict=True):
        networks = [jax.tree.map(lambda leaf, n=n: leaf[n], params) for n in range(NETWORKS)]
        found = [{n: jax.tree.map(np.asarray, spectra(p, past, target, n)) for n in LENGTHS} for p in networks]
        exact = float(difference(networks[0], past[:, -WINDOW:], target))
        held_out_forecasts = unscaled(np.asarray(forecasts(params, held_out[0])))
        stages.append({"name": name, "held out": held_out_forecasts, "spectra": found, "difference": exact})
    print_spectra(stages)
    print(f"U against jax.hessian: relative difference at most {max(s['difference'] for s in stages):.0e}")
    draw(years[years >= HELD_OUT], numbers[years >= HELD_OUT], stages, options.picture)
    print(f"\npicture: {options.picture}")
    return stages


if __name__ == "__main__":
    main()
