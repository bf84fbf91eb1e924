"""Take a Flax and an Equinox model as they are, with convolution and attention, and look at their exact Hessians.

    python examples/any_model.py [--picture any_model.png] [--steps 600]

Both read scikit-learn's bundled 8 x 8 digits: a convolution makes 16 tokens of an image, self-attention mixes them, their
mean goes to a classifier. Neither has a layer of jaxhess in it, and optax trains both. For every parameter the exact
Hessian block of the training error is held against `jax.hessian` in float64 and timed.

Then the whole Hessian of a smaller model, with all blocks between its parameters, beside its Gauss-Newton matrix. The two
differ by the second derivatives of the network, each weighted by how far the predicted probabilities are off.
"""

import argparse
import functools
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree
from matplotlib.colors import SymLogNorm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import jaxhess

jax.config.update("jax_enable_x64", True)

CURVATURE_EXAMPLES, SMALL_EXAMPLES = 32, 64
BLUE, RED, GREY = "#2166ac", "#b2182b", "#4d4d4d"
cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class FlaxModel(nnx.Module):
    """Convolution, attention with a residual and dropout, linear classifier: of one image (8, 8) or a batch of them."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.patches = nnx.Conv(1, width, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, use_bias=False, dropout_rate=0.1, decode=False, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, image):
        x = nnx.gelu(self.patches(image[..., None]))
        tokens = x.reshape(*x.shape[:-3], 16, x.shape[-1])
        tokens = tokens + self.attention(self.norm(tokens))
        return self.head(tokens.mean(-2))


class EquinoxModel(eqx.Module):
    """Convolution, attention with a residual, two linear layers: of one image (8, 8)."""

    patches: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key):
        keys = jax.random.split(key, 4)
        self.patches = eqx.nn.Conv2d(1, width, 4, stride=2, padding=1, key=keys[0])
        self.norm = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=keys[1])
        self.hidden = eqx.nn.Linear(width, width, key=keys[2])
        self.head = eqx.nn.Linear(width, 10, key=keys[3])

    def __call__(self, image):
        tokens = jax.nn.silu(self.patches(image[None])).reshape(-1, 16).T
        normal = jax.vmap(self.norm)(tokens)
        tokens = tokens + self.attention(normal, normal, normal)
        return self.head(jax.nn.silu(self.hidden(tokens.mean(0))))


def load():
    """Training and test images (r, 8, 8) in [0, 1] and their labels (r,)."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16.0).reshape(-1, 8, 8)
    return train_test_split(images, jnp.asarray(labels), test_size=360, random_state=0)


def batches(count, steps, size=128):
    """The images of each training step."""
    random = np.random.default_rng(0)
    return (random.choice(count, size, replace=False) for _ in range(steps))


def train_flax(model, images, labels, steps):
    """NNX's own training loop, with dropout."""
    optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(1e-2, steps)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, label):
        gradient = nnx.grad(lambda model: cross_entropy(model(x), label).mean())(model)
        optimizer.update(model, gradient)

    model.train()
    for _, chosen in zip(trange(steps, desc="training Flax"), batches(len(images), steps), strict=True):
        step(model, optimizer, images[chosen], labels[chosen])
    model.eval()


def train_equinox(model, images, labels, steps):
    """Equinox's own training loop."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @eqx.filter_jit
    def step(model, state, x, label):
        gradient = eqx.filter_grad(lambda model: cross_entropy(jax.vmap(model)(x), label).mean())(model)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state

    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for _, chosen in zip(trange(steps, desc="training Equinox"), batches(len(images), steps), strict=True):
        model, state = step(model, state, images[chosen], labels[chosen])
    return model


def flax_function(model):
    """The model as `logits(params, image)`, and its parameters in float64."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return lambda params, image: nnx.merge(graph, params, rest)(image), double(params)


def equinox_function(model):
    """The model as `logits(params, image)`, and its parameters in float64."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, image: eqx.combine(params, static)(image), double(params)


def double(params):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


def make_error(logits):
    """Cross entropy of one image, as a function of the parameters."""

    def error(params, image, label):
        return cross_entropy(logits(params, image), label)

    return error


def accuracy(logits, params, images, labels):
    predicted = jnp.argmax(jax.jit(jax.vmap(logits, in_axes=(None, 0)))(params, images), axis=1)
    return float(jnp.mean(predicted == labels))


def timed(function, *args):
    """The result, the seconds of the first call with compilation, and the median of up to thirty more within a second."""
    start = time.perf_counter()
    result: Any = jax.block_until_ready(function(*args))
    first = time.perf_counter() - start
    seconds = []
    while len(seconds) < 3 or (len(seconds) < 30 and sum(seconds) < 1):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return result, first, float(np.median(seconds))


@jax.jit
def dense_blocks(H):
    return {path: block.as_matrix() for path, block in H.items()}


@jax.jit
def product(H, vector):
    return H.mv(vector)


def study(name, logits, params, images, labels, accuracies):
    """Exact Hessian blocks, diagonal and times of one model, and how far they are from `jax.hessian`."""
    error = make_error(logits)
    leaves, structure = jax.tree.flatten(params)

    def mean_error(leaves):
        tree = jax.tree.unflatten(structure, leaves)
        return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(tree, images, labels))

    @jax.jit
    def autodiff(leaves):
        blocks = []
        for n, leaf in enumerate(leaves):
            found = jax.hessian(lambda leaf, n=n: mean_error([*leaves[:n], leaf, *leaves[n + 1 :]]))(leaf)
            blocks.append(found.reshape(leaf.size, leaf.size))
        return blocks

    times = {}
    _, *times["gradient"] = timed(jax.jit(jax.grad(mean_error)), leaves)
    H, *times["structured blocks"] = timed(jaxhess.hessian(error), params, images, labels)
    _, *times["product with all blocks"] = timed(product, H, params)
    diagonal, *times["diagonal"] = timed(jaxhess.hessian_diagonal(error), params, images, labels)
    dense, *times["blocks as dense arrays"] = timed(dense_blocks, H)
    references, *times["the same by jax.hessian"] = timed(autodiff, leaves)
    parameters = {}
    pairs = zip(H.items(), references, jax.tree.leaves(diagonal), strict=True)
    for (path, block), reference, entries in pairs:
        difference = float(jnp.max(jnp.abs(dense[path] - reference)) / jnp.max(jnp.abs(reference)))
        parameters[path.removesuffix("/value")] = {
            "kind": type(block).__name__,
            "matrix": np.asarray(dense[path]),
            "diagonal": np.asarray(entries).reshape(-1),
            "difference": difference,
        }
    return {"name": name, "accuracies": accuracies, "parameters": parameters, "times": times}


def whole(logits, params, images, labels):
    """The full Hessian and Gauss-Newton matrix of a small model, and how far the first is from `jax.hessian`."""
    error = make_error(logits)
    H = np.asarray(jaxhess.hessian(error, blocks="full")(params, images, labels).as_matrix())
    G = np.asarray(jaxhess.gauss_newton(logits, cross_entropy, blocks="full")(params, images, labels).as_matrix())
    flat, unravel = ravel_pytree(params)
    mean_error = jax.jit(lambda flat: jnp.mean(jax.vmap(functools.partial(error, unravel(flat)))(images, labels)))
    reference = np.asarray(jax.jit(jax.hessian(mean_error))(flat))
    paths = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return {
        "hessian": H,
        "gauss_newton": G,
        "difference": np.abs(H - reference).max() / np.abs(reference).max(),
        "share": np.linalg.norm(H - G) / np.linalg.norm(H),
        "sizes": dict(zip(names, (leaf.size for _, leaf in paths), strict=True)),
        "eigenvalues": {"hessian": np.linalg.eigvalsh(H), "gauss_newton": np.linalg.eigvalsh(G)},
    }


def print_study(s):
    count = sum(len(p["diagonal"]) for p in s["parameters"].values())
    trained, held_out = s["accuracies"]
    print(f"\n{s['name']}: {count} parameters, accuracy {trained:.1%} in training and {held_out:.1%} held out")
    print(f"Exact Hessian of the mean error of {CURVATURE_EXAMPLES} training images, a block for each parameter:\n")
    rows = [["parameter", "entries", "block", "trace", "diagonal < 0", "error against jax.hessian"]]
    for path, p in s["parameters"].items():
        entries = p["diagonal"]
        numbers = [f"{entries.sum():.3f}", f"{np.mean(entries < 0):.0%}", f"{p['difference']:.0e}"]
        rows.append([path, str(len(entries)), p["kind"], *numbers])
    print_table(rows)
    rows = [["time (median)", "first call, with compilation", "then"]]
    rows += [[name, f"{first:.1f} s", f"{later * 1e3:.1f} ms"] for name, (first, later) in s["times"].items()]
    print_table(rows)


def print_table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))
    print()


def print_whole(w, accuracies):
    print(f"Small Equinox model: {len(w['hessian'])} parameters, accuracy {accuracies[0]:.1%}, {accuracies[1]:.1%} held out")
    print(f"The whole Hessian over {SMALL_EXAMPLES} training images is within {w['difference']:.0e} of jax.hessian.")
    for name, values in w["eigenvalues"].items():
        positive, negative = signs(values)
        print(f"  {name.replace('_', '-')}: eigenvalues {values[0]:.3g} to {values[-1]:.3g}, {positive} > 0, {negative} < 0")
    print(f"Their difference, which Gauss-Newton leaves out, has {w['share']:.1%} of the Hessian's norm at this point.")


def signs(values):
    """How many eigenvalues are positive and negative beyond rounding."""
    tolerance = len(values) * np.finfo(float).eps * np.abs(values).max()
    return int(np.sum(values > tolerance)), int(np.sum(values < -tolerance))


def log_colours(largest, decades=3):
    """Symmetric about zero; logarithmic over the largest decades, linear below."""
    return SymLogNorm(linthresh=largest * 10.0**-decades, vmin=-largest, vmax=largest)


def add_colours(figure, image, axes, label, decades=3):
    """A colour bar with a tick at each of the largest decades and at zero."""
    top = np.floor(np.log10(image.norm.vmax))
    powers = 10.0 ** (top - np.arange(decades))
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.02, label=label, ticks=[*-powers, 0, *powers[::-1]])


def draw_study(figure, axes, s, path):
    """The block of one weight, the trace of every parameter's block, and the times."""
    matrix = s["parameters"][path]["matrix"]
    image = axes[0].imshow(matrix, cmap="RdBu_r", norm=log_colours(np.abs(matrix).max()), interpolation="nearest")
    axes[0].set_title(f"{s['name']}: exact Hessian block of\n{path} ({len(matrix)} x {len(matrix)})", fontsize=12)
    axes[0].set(xlabel="entry of the weight (row by row)", ylabel="entry of the weight")
    add_colours(figure, image, axes[0], "second derivative")

    traces = [p["diagonal"].sum() for p in s["parameters"].values()]
    places = np.arange(len(traces))
    axes[1].barh(places, traces, color=[BLUE if trace > 0 else RED for trace in traces], height=0.7)
    axes[1].set_yticks(places, list(s["parameters"]), fontsize=10)
    axes[1].set_xscale("symlog", linthresh=0.1)
    axes[1].axvline(0, color="black", lw=0.6)
    beside = {"transform": axes[1].get_yaxis_transform(), "ha": "right", "va": "center", "fontsize": 10}
    axes[1].text(1.14, -0.95, "negative", **beside)
    for place, p in zip(places, s["parameters"].values(), strict=True):
        axes[1].text(1.14, place, f"{np.mean(p['diagonal'] < 0):.0%}", **beside)
    axes[1].set_ylim(len(traces) - 0.4, -1.3)
    axes[1].set_title("exact trace of each block, and how much\nof its diagonal is negative", fontsize=12)
    axes[1].set_xlabel("trace (logarithmic beyond 0.1)")

    names, seconds = list(s["times"]), [later for _, later in s["times"].values()]
    colours = [RED if "jax.hessian" in name else GREY if name == "gradient" else BLUE for name in names]
    axes[2].barh(names, seconds, color=colours, height=0.6)
    for place, value in enumerate(seconds):
        text = f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s"
        axes[2].text(value * 1.15, place, text, va="center", fontsize=10)
    axes[2].set_xscale("log")
    axes[2].set_xlim(min(seconds) / 2, max(seconds) * 15)
    axes[2].invert_yaxis()
    axes[2].set_title(f"median time once compiled,\n{CURVATURE_EXAMPLES} images", fontsize=12)
    axes[2].set_xlabel("seconds (logarithmic)")
    for axis in axes[1:]:
        axis.grid(axis="x", alpha=0.25)


def spread(places, gap):
    """The places moved apart, in order, until no two are nearer than `gap`."""
    places = np.array(places, float)
    for _ in range(200):
        overlap = np.maximum(gap - np.diff(places), 0) / 2
        places[:-1] -= overlap
        places[1:] += overlap
    return places


def draw_matrix(axis, matrix, sizes, norm, named):
    """A heat map with a line at every parameter, a stronger one at every layer, and their names."""
    image = axis.imshow(matrix, cmap="RdBu_r", norm=norm, interpolation="nearest", extent=(0, len(matrix), len(matrix), 0))
    ends = np.cumsum(list(sizes.values()))
    layers = [name.split("/")[0] for name in sizes]
    for end, layer, following in zip(ends[:-1], layers[:-1], layers[1:], strict=True):
        style = {"color": "black", "lw": 0.9 if layer != following else 0.3}
        axis.axhline(end, **style)
        axis.axvline(end, **style)
    axis.set(xticks=[], yticks=[])
    axis.spines[["top", "right"]].set_visible(True)
    if named:
        middles = ends - np.array(list(sizes.values())) / 2
        for name, middle, place in zip(sizes, middles, spread(middles, len(matrix) / 17), strict=True):
            axis.annotate(
                name,
                (0, middle),
                (-0.07 * len(matrix), place),
                ha="right",
                va="center",
                fontsize=10,
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 1, "shrinkB": 0},
                annotation_clip=False,
            )
    return image


def draw(studies, w, path):
    """One picture: a row for each model, and a row of whole matrices of the small one."""
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(13.5, 13.2), layout="constrained")
    rows = figure.subfigures(3, 1, height_ratios=(1, 1, 1.1), hspace=0.03, squeeze=False)[:, 0]
    for row, s, weight in zip(rows, studies, ("attention/query/kernel", "attention/query_proj/weight"), strict=False):
        draw_study(row, row.subplots(1, 3, width_ratios=(1.15, 1, 1), squeeze=False)[0], s, weight)
    axes = rows[2].subplots(1, 3, squeeze=False)[0]
    H, G = w["hessian"], w["gauss_newton"]
    norm = log_colours(np.abs(H).max(), decades=4)
    titles = "exact Hessian", "Gauss-Newton matrix", f"difference ({w['share']:.0%} of the Hessian's norm)"
    images = []
    for axis, matrix, title in zip(axes, (H, G, H - G), titles, strict=True):
        images.append(draw_matrix(axis, matrix, w["sizes"], norm, axis is axes[0]))
        axis.set_title(title, fontsize=12)
    add_colours(rows[2], images[0], axes, "second derivative, one scale for all", decades=4)
    rows[2].suptitle(f"A smaller Equinox model, whole: {len(H)} x {len(H)}, rows and columns in the same order", fontsize=13)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="any_model.png", help="where the picture goes")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    options = parser.parse_args(argv)
    images, images_test, labels, labels_test = load()

    def accuracies(logits, params):
        return accuracy(logits, params, images, labels), accuracy(logits, params, images_test, labels_test)

    flax_model = FlaxModel(16, 4, rngs=nnx.Rngs(0))
    train_flax(flax_model, images, labels, options.steps)
    equinox_model = EquinoxModel(16, 4, key=jax.random.key(0))
    equinox_model = train_equinox(equinox_model, images, labels, options.steps)
    small_model = train_equinox(EquinoxModel(8, 2, key=jax.random.key(1)), images, labels, options.steps)

    studies = []
    for name, (logits, params) in {"Flax": flax_function(flax_model), "Equinox": equinox_function(equinox_model)}.items():
        first = images[:CURVATURE_EXAMPLES], labels[:CURVATURE_EXAMPLES]
        s = study(name, logits, params, *first, accuracies(logits, params))
        print_study(s)
        studies.append(s)
    logits, params = equinox_function(small_model)
    w = whole(logits, params, images[:SMALL_EXAMPLES], labels[:SMALL_EXAMPLES])
    print_whole(w, accuracies(logits, params))
    draw(studies, w, options.picture)
    print(f"\npicture: {options.picture}")
    return studies, w


if __name__ == "__main__":
    main()
