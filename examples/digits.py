"""Train a digits classifier, then look at the exact Hessian of each of its weights.

    python examples/digits.py [--picture digits.png] [--steps 600]

The network is 64-64-32-10 with tanh, trained by Adam on scikit-learn's bundled 8 x 8 digits. For each weight the table
shows what the exact Hessian block of the training error takes in memory as a dense array and as jaxhess keeps it, its
trace, extreme eigenvalues and inertia, how far it is from `jax.hessian` in float64, and the time that each took.
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import SymLogNorm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import jaxhess

jax.config.update("jax_enable_x64", True)

WIDTHS = (64, 64, 32, 10)
CURVATURE_EXAMPLES = 128
BLUE, RED, GREY = "#2166ac", "#b2182b", "#4d4d4d"


def logits(params, x):
    """The network's outputs for one image."""
    for layer in params[:-1]:
        x = jaxhess.dense(layer["w"], layer["b"], x, jaxhess.tanh)
    return jaxhess.dense(params[-1]["w"], params[-1]["b"], x)


def error(params, x, label):
    """Cross entropy of one image."""
    return jaxhess.losses.softmax_cross_entropy(logits(params, x), label)


def mean_error(params, x, labels):
    return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(params, x, labels))


def load():
    """Training and test images (r, 64) in [0, 1] and their labels (r,)."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(jnp.asarray(images / 16.0), jnp.asarray(labels), test_size=360, random_state=0)


def train(x, labels, steps, batch=128):
    """Adam with cosine decay from random weights."""
    keys = jax.random.split(jax.random.key(0), len(WIDTHS))
    params = [
        {"w": jax.random.normal(k, (m, n)) / np.sqrt(n), "b": jnp.zeros(m)}
        for k, n, m in zip(keys, WIDTHS, WIDTHS[1:], strict=False)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params, state, key):
        chosen = jax.random.choice(key, len(x), (batch,), replace=False)
        value, gradient = jax.value_and_grad(mean_error)(params, x[chosen], labels[chosen])
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    with trange(steps, desc="training", unit="step") as bar:
        for i in bar:
            params, state, value = step(params, state, jax.random.key(i))
            if i % 50 == 0:
                bar.set_postfix(error=f"{value:.4f}")
    return params


def timed(function, *args):
    """The result of a compiled function and the median of its runs in seconds: up to thirty within two seconds."""
    compiled = jax.jit(function).lower(*args).compile()
    result: Any = None
    seconds = []
    while len(seconds) < 3 or (len(seconds) < 30 and sum(seconds) < 2):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return result, float(np.median(seconds))


def study(params, layer, x, labels):
    """The exact Hessian block of one weight, and how it compares with `jax.hessian`."""
    w = params[layer]["w"]

    def of_weight(w, x, label):
        return error([*params[:layer], params[layer] | {"w": w}, *params[layer + 1 :]], x, label)

    def mean_of_weight(w):
        return jnp.mean(jax.vmap(functools.partial(of_weight, w))(x, labels))

    hessian, ours = timed(jaxhess.hessian(of_weight), w, x, labels)
    reference, theirs = timed(jax.hessian(mean_of_weight), w)
    block = hessian.block(())
    matrix = np.asarray(block.as_matrix())
    difference = np.max(np.abs(matrix - np.reshape(reference, matrix.shape))) / np.max(np.abs(matrix))
    eigenvalues = np.asarray(jnp.linalg.eigvalsh(matrix))
    tolerance = len(matrix) * np.finfo(float).eps * np.max(np.abs(eigenvalues))
    counts = [int(np.sum(c)) for c in (eigenvalues > tolerance, eigenvalues < -tolerance)]
    return {
        "name": f"{WIDTHS[layer]} -> {WIDTHS[layer + 1]}",
        "block": block,
        "matrix": matrix,
        "eigenvalues": eigenvalues,
        "inertia": (*counts, len(matrix) - sum(counts)),
        "difference": difference,
        "seconds": (ours, theirs),
    }


def size(count):
    """Bytes as MiB."""
    return f"{count / 2**20:.2f} MiB"


def print_table(studies):
    head = [
        "layer",
        "parameters",
        "dense",
        "ours",
        "trace",
        "largest",
        "smallest",
        "+ / - / 0",
        "error",
        "ours",
        "jax.hessian",
    ]
    rows = [head]
    for s in studies:
        ours, theirs = s["seconds"]
        rows.append(
            [
                s["name"],
                f"{len(s['matrix'])}",
                size(s["block"].dense_bytes),
                size(s["block"].storage_bytes),
                f"{s['block'].trace():.4f}",
                f"{s['eigenvalues'][-1]:.4f}",
                f"{s['eigenvalues'][0]:.4f}",
                " / ".join(map(str, s["inertia"])),
                f"{s['difference']:.0e}",
                f"{ours * 1e3:.1f} ms",
                f"{theirs * 1e3:.0f} ms",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))


def pooled(matrix, pixels=512):
    """The matrix at most `pixels` wide: of each tile its entry of largest magnitude."""
    tile = -(-len(matrix) // pixels)
    padded = np.pad(matrix, (0, -len(matrix) % tile))
    tiles = padded.reshape(len(padded) // tile, tile, -1, tile).transpose(0, 2, 1, 3).reshape(-1, tile * tile)
    chosen = np.take_along_axis(tiles, np.argmax(np.abs(tiles), axis=1)[:, None], axis=1)
    return chosen.reshape(len(padded) // tile, -1)


def draw(studies, accuracy, path):
    """One picture: each weight's Hessian block above its spectrum."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(studies), figsize=(13.5, 8.4), height_ratios=(1.25, 1), layout="constrained")
    for (above, below), s, layer in zip(axes.T, studies, range(1, 1 + len(studies)), strict=True):
        size, (positive, negative, zero) = len(s["matrix"]), s["inertia"]
        largest = np.abs(s["matrix"]).max()
        image = above.imshow(
            pooled(s["matrix"]),
            cmap="RdBu_r",
            norm=SymLogNorm(linthresh=10.0 ** np.ceil(np.log10(largest) - 2), vmin=-largest, vmax=largest),
            extent=(0, size, size, 0),
            interpolation="nearest",
        )
        above.set_title(f"layer {layer}: weight {s['name']}\n{size:,} x {size:,}, exact", fontsize=11)
        above.set_xlabel("entry of the weight (row by row)")
        if layer == 1:
            above.set_ylabel("entry of the weight")
        bar = figure.colorbar(image, ax=above, shrink=0.85, pad=0.02)
        bar.set_label("second derivative")
        values = s["eigenvalues"]
        for part, colour, count, name in (
            (values[values > 0][::-1], BLUE, positive, "positive"),
            (-values[values < 0], RED, negative, "negative"),
        ):
            below.semilogy(np.arange(1, count + 1), part[:count], color=colour, lw=2, label=f"{name}: {count}")
        below.plot([], [], color=GREY, lw=0, marker="o", ms=4, label=f"zero: {zero}")
        below.set_xscale("log")
        below.set_ylim(values[-1] * 1e-10, values[-1] * 3)
        below.grid(alpha=0.25)
        below.set_xlabel("rank of the eigenvalue by magnitude")
        if layer == 1:
            below.set_ylabel("|eigenvalue|")
        below.legend(title="eigenvalues", frameon=False, loc="lower left")
        ours, theirs = s["seconds"]
        below.set_title(f"{ours * 1e3:.1f} ms instead of {theirs * 1e3:,.0f} ms, error {s['difference']:.0e}", fontsize=10)
    figure.suptitle(
        f"Exact Hessian of a 64-64-32-10 digits classifier after training (test accuracy {accuracy:.1%})", fontsize=14
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="digits.png", help="where the picture goes")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    options = parser.parse_args(argv)
    x, x_test, labels, labels_test = load()
    params = train(x, labels, options.steps)
    predictions = jnp.argmax(jax.vmap(logits, in_axes=(None, 0))(params, x_test), axis=1)
    accuracy = float(jnp.mean(predictions == labels_test))
    print(f"test accuracy {accuracy:.1%}; exact Hessian of the mean error over {CURVATURE_EXAMPLES} training images\n")
    x, labels = x[:CURVATURE_EXAMPLES], labels[:CURVATURE_EXAMPLES]
    studies = [study(params, layer, x, labels) for layer in range(len(params))]
    print_table(studies)
    print(f"\n{jaxhess.hessian(error)(params, x, labels)}")
    draw(studies, accuracy, options.picture)
    print(f"\npicture: {options.picture}")
    return studies


if __name__ == "__main__":
    main()
