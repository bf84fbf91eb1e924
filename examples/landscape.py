"""Tell saddles from minima along a training run, and leave the saddles by a direction of negative curvature.

    python examples/landscape.py [--picture landscape.png] [--networks 5] [--units 8] [--steps 8000]

A 64-8-10 tanh network fits scikit-learn's bundled 8 x 8 digits by plain gradient descent, from hidden units that are all
but equal. What is equal stays equal, so it first learns what one unit could and halts at a saddle; more of them follow.
Plateaus are where the gradient is smallest between two falls of the error. The error holds weight decay, so at a minimum all
eigenvalues are positive: the exact spectrum of the whole Hessian (610 x 610) tells which of the two a plateau is. The blocks
of the parameters do not: at the later saddles each of them is positive definite, and the way down needs several at once.

At each saddle, three ways to go on until the error has fallen a tenth, or half, of the way to the next plateau: gradient
descent; one step along the eigenvector of the lowest eigenvalue, at the best of nine lengths either way, and then gradient
descent; and the same with random directions, ten of them. An eigenvector costs more than a gradient: see the last line.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxhess
from jaxhess import plotting, spectra

jax.config.update("jax_enable_x64", True)

IMAGES, DECAY, RATE = 600, 3e-3, 0.3
ASYMMETRY = 1e-10
LENGTHS = 2.0 ** np.arange(-6, 3)
RANDOM = 10
WINDOW, RISE = 50, 1.3
SHARES = (0.1, 0.5)
WAYS = "gradient descent", "random direction", "negative curvature"
RED, BLUE, GREY, ORANGE = "#b2182b", "#2166ac", "#4d4d4d", "#e69f00"


def load():
    """Images (r, 64), centred, and targets (r, 10)."""
    images, labels = load_digits(return_X_y=True)
    images = np.asarray(images)[:IMAGES]
    images = images - np.mean(images, axis=0)
    return jnp.asarray(images / np.std(images)), jax.nn.one_hot(labels[:IMAGES], 10, dtype=float)


def initialise(key, units):
    """Hidden units that differ from each other by `ASYMMETRY`."""
    keys = jax.random.split(key, 4)
    return {
        "hidden": {
            "w": jax.random.normal(keys[0], (1, 64)) / 16 + ASYMMETRY * jax.random.normal(keys[1], (units, 64)),
            "b": jnp.zeros(units),
        },
        "out": {
            "w": jax.random.normal(keys[2], (10, 1)) / 6 + ASYMMETRY * jax.random.normal(keys[3], (10, units)),
            "b": jnp.full(10, 0.1),
        },
    }


def error(params, x, target):
    """Half the squared error of one image, and the weight decay."""
    h = jaxhess.dense(params["hidden"]["w"], params["hidden"]["b"], x, jaxhess.tanh)
    y = jaxhess.dense(params["out"]["w"], params["out"]["b"], h)
    return jaxhess.losses.squared_error(y, target) + DECAY / 2 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


@jax.jit
def mean_error(params, x, targets):
    return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(params, x, targets))


def norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def at(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def moved(params, direction, length):
    return jax.tree.map(lambda p, d: p + length * d, params, direction)


@functools.partial(jax.jit, static_argnums=3)
def descend(params, x, targets, steps):
    """Gradient descent: errors and gradient norms (steps,), and the parameters before each step."""

    def step(params, _):
        value, gradient = jax.value_and_grad(mean_error)(params, x, targets)
        return moved(params, gradient, -RATE), (value, norm(gradient), params)

    return jax.lax.scan(step, params, None, length=steps)[1]


@jax.jit
def steps_until(params, level, limit, x, targets):
    """How many steps of gradient descent it takes until the error is below `level`, `limit` at most."""

    def go_on(state):
        return (state[1] < limit) & (mean_error(state[0], x, targets) > level)

    def step(state):
        return moved(state[0], jax.grad(mean_error)(state[0], x, targets), -RATE), state[1] + 1

    return jax.lax.while_loop(go_on, step, (params, 0))[1]


@jax.jit
def best_move(params, direction, x, targets):
    """The parameters after the best of the lengths along the direction, which may be none."""
    lengths = jnp.asarray(np.r_[0, LENGTHS, -LENGTHS])
    errors = jax.lax.map(lambda length: mean_error(moved(params, direction, length), x, targets), lengths)
    return moved(params, direction, lengths[jnp.argmin(errors)])


@jax.jit
def curvature(params, x, targets):
    """The exact Hessian over the whole network."""
    return jaxhess.hessian(error, blocks="full")(params, x, targets)


@jax.jit
def block_inertia(params, x, targets):
    """The inertia of each parameter's own block."""
    return spectra.inertia_by_block(jaxhess.hessian(error)(params, x, targets))


@jax.jit
def lowest(params, x, targets):
    return curvature(params, x, targets).negative_curvature_direction()


def plateaus(norms):
    """The steps at which the gradient is smallest nearby and rises again by `RISE`, and the last step."""
    nearby = [norms[max(0, i - WINDOW) : i + WINDOW + 1].min() for i in range(len(norms))]
    found = [i for i in range(1, len(norms) - WINDOW) if norms[i] == nearby[i] and norms[i + 1 :].max() > RISE * norms[i]]
    return [*found, len(norms) - 1]


def random_direction(key, params):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    tree = treedef.unflatten([jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])
    return jax.tree.map(lambda leaf: leaf / norm(tree), tree)


def leave(params, levels, limit, x, targets):
    """Steps until each level, by each way; the first step of the last two is the move."""
    random = [random_direction(key, params) for key in jax.random.split(jax.random.key(0), RANDOM)]
    random = [best_move(params, direction, x, targets) for direction in random]
    negative = best_move(params, lowest(params, x, targets).direction, x, targets)
    counts = {WAYS[0]: [], WAYS[1]: [], WAYS[2]: []}
    for level in levels:
        counts[WAYS[0]].append(int(steps_until(params, level, limit, x, targets)))
        counts[WAYS[1]].append(1 + float(np.median([steps_until(p, level, limit, x, targets) for p in random])))
        counts[WAYS[2]].append(1 + int(steps_until(negative, level, limit, x, targets)))
    return counts


def study(start, x, targets, steps):
    """One network's run, with the spectrum at its plateaus and the ways to leave those that are saddles."""
    errors, norms, path = descend(start, x, targets, steps)
    errors, norms = np.asarray(errors), np.asarray(norms)
    places = plateaus(norms)
    points = []
    for place, following in zip(places, [*places[1:], None], strict=True):
        H = curvature(at(path, place), x, targets)
        values = np.asarray(H.eigvalsh())
        point = {"step": place, "error": errors[place], "gradient": norms[place], "eigenvalues": values}
        point["inertia"] = block_inertia(at(path, place), x, targets)
        point["negative"] = int(H.inertia().negative)
        if following is not None and point["negative"]:
            levels = [errors[place] + share * (errors[following] - errors[place]) for share in SHARES]
            point["leave"] = leave(at(path, place), levels, steps, x, targets)
        points.append(point)
    return {"errors": errors, "norms": norms, "path": path, "points": points}


def history(run, x, targets):
    """The inertia of each layer's block along the run."""
    record = spectra.InertiaHistory()
    last = len(run["errors"]) - 1
    for step in np.unique(np.geomspace(1, last, 80).astype(int)):
        record.append(int(step), block_inertia(at(run["path"], int(step)), x, targets))
    return record


def timed(function, *args):
    """Median seconds of a compiled function."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


@jax.jit
def iterated(params, x, targets):
    """The lowest eigenvector to a thousandth of the largest eigenvalue, by products alone."""
    return curvature(params, x, targets).eigh(1, which="smallest", method="iterative", tolerance=1e-3)


def print_table(runs, seconds):
    blocks = list(runs[0]["points"][0]["inertia"])
    head = ["network", "step", "error", "gradient", "lowest", "negative", *blocks, *WAYS]
    rows = [head]
    for number, run in enumerate(runs):
        for point in run["points"]:
            left = [" / ".join(f"{count:.0f}" for count in point["leave"][way]) for way in WAYS] if "leave" in point else []
            left = left or ["a saddle, at the end" if point["negative"] else "a minimum"]
            numbers = [f"{point['error']:.5f}", f"{point['gradient']:.1e}", f"{point['eigenvalues'][0]:.4f}"]
            counts = [str(point["negative"]), *(str(int(point["inertia"][name].negative)) for name in blocks)]
            rows.append([str(number), str(point["step"]), *numbers, *counts, *left])
    print(
        "\nplateaus: the lowest eigenvalue of the whole Hessian, how many are negative, how many of each parameter's block;"
    )
    print("steps until the error has fallen a tenth / half of the way to the next plateau\n")
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)))
    saddles = [point["leave"] for run in runs for point in run["points"] if "leave" in point]
    print()
    for place, share in enumerate(SHARES):
        text = ", ".join(f"{way} {np.median([leave[way][place] for leave in saddles]):.0f}" for way in WAYS)
        print(f"steps until {share:.0%} of the fall, median of {len(saddles)} saddles: {text}")
    step, exact, products = seconds
    exact, products = exact / step, products / step
    print(
        f"A step of gradient descent takes {1e3 * step:.2f} ms. The lowest direction costs {exact:.0f} of them by the exact"
    )
    print(f"spectrum, {products:.0f} by products alone: in time, on a network this small, it pays where it saves more.")


def draw(run, record, ways, path):
    """One picture: error and gradient with the plateaus marked, inertia, spectra, and the ways to leave the last saddle."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, ((errors, inertia), (leaving, values)) = plt.subplots(2, 2, figsize=(14, 8.6), layout="constrained")
    points, steps = run["points"], np.arange(len(run["errors"]))
    errors.loglog(steps[1:], run["errors"][1:], color="black", lw=1.5, label="error")
    errors.loglog(steps[1:], run["norms"][1:], color=GREY, lw=1, ls="--", label="length of its gradient")
    named = {}
    for point in points:
        saddle = point["negative"] > 0
        style = {"color": RED, "marker": "v"} if saddle else {"color": BLUE, "marker": "o"}
        errors.plot([point["step"]] * 2, [point["error"], point["gradient"]], ls="", ms=8, zorder=3, **style)
        inertia.axvline(point["step"], color=style["color"], lw=1.5, ls="--")
        named[f"{'saddle' if saddle else 'minimum'}, step {point['step']}"] = point["eigenvalues"]
    errors.plot([], [], ls="", ms=8, color=RED, marker="v", label="saddle")
    errors.plot([], [], ls="", ms=8, color=BLUE, marker="o", label="minimum")
    errors.set(xlabel="step of gradient descent", title="Where the gradient is small")
    plotting.plot_inertia(record, inertia)
    inertia.set(xscale="log", title="Inertia of each parameter's own block")
    plotting.plot_spectrum(named, values)
    values.set(title="Exact spectrum of the whole Hessian there", ylabel="")
    for way, (colour, line) in zip(WAYS, ((GREY, "--"), (ORANGE, ":"), (BLUE, "-")), strict=True):
        label = way if way == WAYS[0] else f"{way}, then gradient descent"
        leaving.plot(ways[way], color=colour, ls=line, lw=2, label=label)
    leaving.set(xlabel="steps from the saddle", ylabel="error", title="Three ways to leave the last saddle")
    for axis in (errors, leaving):
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", "--out", default="landscape.png", help="where the picture goes")
    parser.add_argument("--networks", type=int, default=5, help="number of networks")
    parser.add_argument("--units", type=int, default=8, help="hidden units")
    parser.add_argument("--steps", type=int, default=8000, help="steps of gradient descent")
    options = parser.parse_args(argv)
    x, targets = load()
    starts = [initialise(jax.random.key(n), options.units) for n in range(options.networks)]
    runs = [study(start, x, targets, options.steps) for start in tqdm(starts, desc="networks")]
    first = runs[0]
    saddle = [point for point in first["points"] if "leave" in point][-1]
    params = at(first["path"], saddle["step"])
    one_step = timed(lambda: descend(params, x, targets, 100)) / 100
    print_table(runs, (one_step, timed(lowest, params, x, targets), timed(iterated, params, x, targets)))
    count = 2 * int(saddle["leave"][WAYS[0]][-1])
    ways = {WAYS[0]: np.asarray(descend(params, x, targets, count)[0])}
    directions = random_direction(jax.random.key(0), params), lowest(params, x, targets).direction
    for way, direction in zip(WAYS[1:], directions, strict=True):
        after = descend(best_move(params, direction, x, targets), x, targets, count)[0]
        ways[way] = np.r_[saddle["error"], after]
    draw(first, history(first, x, targets), ways, options.picture)
    print(f"\npicture: {options.picture}")
    return runs


if __name__ == "__main__":
    main()
