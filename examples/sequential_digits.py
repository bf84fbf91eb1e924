"""Read digits row by row, then look at the exact Hessian between the rows.

    python examples/sequential_digits.py [--picture sequential_digits.png] [--steps 600]

A recurrent layer of 32 tanh units takes scikit-learn's bundled 8 x 8 digits one row of pixels at a time, and a dense head
names the digit after the last row. Adam trains both.

The Hessian of the input weight W is the sum over all pairs of rows s, zeta of kron(Q[s, zeta], x_s x_zeta^T), so its trace
is the sum of tr(Q[s, zeta]) x_s . x_zeta: a table of where in time the curvature comes from. At the start it comes from the
last rows, as what U diag(f') carries on from the others fades. After training the error feels every row, the first ones
most: what they leave in the state passes through U up to seven times, and the layer has learned to keep it. (The zeros of
W are a column of pixels that is always blank; those of the head, that equal changes of all its outputs change nothing.)

Last, one Newton step of all parameters from a network that has just begun to learn. The damping is twice the size of the
most negative of the exact eigenvalues, so the matrix that conjugate gradients solve with is known to be positive definite.
"""

import argparse

import jax
import jax.numpy as jnp
import lineax as lx
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import jaxhess

jax.config.update("jax_enable_x64", True)

ROWS, PIXELS, UNITS, CLASSES = 8, 8, 32, 10
CURVATURE_EXAMPLES = 128
BLUE, RED, GREY = "#2166ac", "#b2182b", "#4d4d4d"


def load():
    """Training and test images (r, 8, 8) in [0, 1] and their labels (r,)."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images / 16.0).reshape(-1, ROWS, PIXELS)
    return train_test_split(images, jnp.asarray(labels), test_size=360, random_state=0)


def initialise(key):
    keys = jax.random.split(key, 3)
    return {
        "recurrent": {
            "weight": jax.random.normal(keys[0], (UNITS, PIXELS)) / np.sqrt(PIXELS),
            "feedback": jax.random.orthogonal(keys[1], UNITS),
            "bias": jnp.zeros(UNITS),
        },
        "head": {"weight": jax.random.normal(keys[2], (CLASSES, UNITS)) / np.sqrt(UNITS), "bias": jnp.zeros(CLASSES)},
    }


def logits(params, image):
    """What the head says of one image after its last row."""
    layer, head = params["recurrent"], params["head"]
    states = jaxhess.recurrent(layer["weight"], layer["feedback"], layer["bias"], image, jaxhess.tanh)
    return jaxhess.dense(head["weight"], head["bias"], states[-1])


def error(params, image, label):
    """Cross entropy of one image."""
    return jaxhess.losses.softmax_cross_entropy(logits(params, image), label)


@jax.jit
def mean_error(params, images, labels):
    return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(params, images, labels))


@jax.jit
def accuracy(params, images, labels):
    return jnp.mean(jnp.argmax(jax.vmap(logits, in_axes=(None, 0))(params, images), axis=1) == labels)


def train(params, images, labels, steps, batch=128):
    """Adam with cosine decay; the parameters at the start, after a twelfth of the steps and at the end."""
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, steps))

    @jax.jit
    def step(params, state, key):
        chosen = jax.random.choice(key, len(images), (batch,), replace=False)
        gradient = jax.grad(mean_error)(params, images[chosen], labels[chosen])
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state, kept = optimizer.init(params), {"at the start": params}
    for i in trange(1, steps + 1, desc="training", unit="step"):
        params, state = step(params, state, jax.random.key(i))
        if i in (max(steps // 12, 1), steps):
            kept[f"after {i} steps"] = params
    return kept


@jax.jit
def curvature(params, images, labels):
    """The exact Hessian, the eigenvalues of its blocks, and what each pair of rows (s, zeta) adds to the trace of W's."""
    H = jaxhess.hessian(error)(params, images, labels)
    spectra = {path: block.eigvalsh() for path, block in H.items()}
    Q, x = H["recurrent"]["weight"].kronecker_terms()  # Q (r, rows, units, rows, units), x (r, rows, pixels)
    pairs = jnp.einsum("rsizi,rsq,rzq->sz", Q, x, x) / len(images)
    return H, spectra, pairs


@jax.jit
def directions(params, images, labels, damping):
    """The Newton direction, damped and with the Hessian of the first images; steepest descent; the iterations needed."""
    gradient = jax.grad(mean_error)(params, images, labels)
    H = jaxhess.hessian(error)(params, images[:CURVATURE_EXAMPLES], labels[:CURVATURE_EXAMPLES])
    damped = H + damping * lx.IdentityLinearOperator(H.in_structure())
    damped = lx.TaggedLinearOperator(damped, lx.positive_semidefinite_tag)
    solution = lx.linear_solve(damped, gradient, solver=lx.CG(rtol=1e-6, atol=1e-6))
    return jax.tree.map(jnp.negative, solution.value), jax.tree.map(jnp.negative, gradient), solution.stats["num_steps"]


@jax.jit
def along(params, direction, lengths, images, labels):
    """The mean error at each length along a direction."""
    return jax.lax.map(
        lambda length: mean_error(jax.tree.map(lambda p, d: p + length * d, params, direction), images, labels), lengths
    )


def signs(values):
    """How many eigenvalues are positive, negative and zero to rounding."""
    tolerance = len(values) * np.finfo(float).eps * np.max(np.abs(values))
    positive, negative = int(np.sum(values > tolerance)), int(np.sum(values < -tolerance))
    return positive, negative, len(values) - positive - negative


def print_spectra(stages):
    rows = [["exact Hessian block", "trace", "largest", "most negative", "+ / - / 0"]]
    for path in stages[0]["spectra"]:
        for stage in stages:
            values = stage["spectra"][path]
            numbers = [f"{np.round(value, 4) + 0.0:.4f}" for value in (values.sum(), values.max(), values.min())]
            rows.append([f"{path} {stage['name']}", *numbers, " / ".join(map(str, signs(values)))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]))


def draw(stages, before, lengths, errors, path):
    """One picture: the curvature between rows at each stage; the spectra of W and U, and the Newton step."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(13.5, 8.6), layout="constrained")
    ticks = np.arange(1, ROWS + 1)
    for axis, stage in zip(axes[0], stages, strict=True):
        largest = np.abs(stage["pairs"]).max()
        edges = (0.5, ROWS + 0.5, ROWS + 0.5, 0.5)
        image = axis.imshow(stage["pairs"], cmap="RdBu_r", vmin=-largest, vmax=largest, extent=edges)
        axis.set_title(
            f"{stage['name']}: test accuracy {stage['accuracy']:.1%}\ntrace {stage['pairs'].sum():.2f}", fontsize=11
        )
        axis.set(xlabel="row of the image", ylabel="row of the image", xticks=ticks, yticks=ticks)
        figure.colorbar(image, ax=axis, shrink=0.85, pad=0.02).set_label("part of the trace of W's Hessian")
    for axis, block, name in zip(axes[1], ("weight", "feedback"), ("input weight W", "feedback weight U"), strict=False):
        for stage, colour in zip(stages, (GREY, BLUE, RED), strict=True):
            values = stage["spectra"][f"recurrent/{block}"]
            label = f"{stage['name']}: {signs(values)[1]} negative"
            axis.plot(np.arange(1, len(values) + 1), values[::-1], color=colour, lw=1.8, label=label)
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.axhline(0, color="black", lw=0.6)
        axis.margins(y=0.12)
        axis.set_title(f"Exact Hessian of the {name}", fontsize=11)
        axis.set(xlabel="rank of the eigenvalue", ylabel="eigenvalue")
    for (name, values), colour in zip(errors.items(), (BLUE, RED), strict=True):
        axes[1, 2].plot(lengths, values, color=colour, marker="o", ms=3, lw=1.8, label=name)
    axes[1, 2].axhline(before, color=GREY, ls="--", lw=1, label="no step")
    axes[1, 2].set_xscale("log", base=2)
    lowest = min(map(np.min, errors.values()))
    axes[1, 2].set_ylim(before - 1.2 * (before - lowest), before + (before - lowest))
    axes[1, 2].set(xlabel="step length", ylabel="mean error of all training images")
    axes[1, 2].set_title(f"One step {stages[1]['name']}", fontsize=11)
    for axis, place in zip(axes[1], ("upper right", "upper right", "lower left"), strict=True):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc=place)
    figure.savefig(path, dpi=85)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", default="sequential_digits.png", help="where the picture goes")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    options = parser.parse_args(argv)
    images, images_test, labels, labels_test = load()
    few = images[:CURVATURE_EXAMPLES], labels[:CURVATURE_EXAMPLES]
    kept = train(initialise(jax.random.key(0)), images, labels, options.steps)
    stages = []
    for name, params in kept.items():
        hessian, *found = curvature(params, *few)
        spectra, pairs = jax.tree.map(np.asarray, found)
        test_accuracy = float(accuracy(params, images_test, labels_test))
        stages.append({"name": name, "hessian": hessian, "spectra": spectra, "pairs": pairs, "accuracy": test_accuracy})
        print(f"{name}: error {mean_error(params, images, labels):.4f}, test accuracy {test_accuracy:.1%}")
    print(f"\ncurvature of the mean error over {CURVATURE_EXAMPLES} training images\n")
    print_spectra(stages)
    print(f"\n{stages[-1]['hessian']}\n")

    name, params = list(kept.items())[1]
    damping = -2 * min(values.min() for values in stages[1]["spectra"].values())
    newton, steepest, iterations = directions(params, images, labels, damping)
    lengths = 2.0 ** np.arange(-6, 3.5, 0.5)
    errors = {
        "damped Newton": np.asarray(along(params, newton, lengths, images, labels)),
        "steepest descent": np.asarray(along(params, steepest, lengths, images, labels)),
    }
    before = float(mean_error(params, images, labels))
    print(f"one step {name}, damping {damping:.2f}, {iterations} CG iterations: training error {before:.4f}")
    print(f"  damped Newton to {errors['damped Newton'][lengths == 1].item():.4f} at length 1")
    for kind, values in errors.items():
        print(f"  {kind} to {values.min():.4f} at its best length, {lengths[values.argmin()]:.2g}")
    draw(stages, before, lengths, errors, options.picture)
    print(f"\npicture: {options.picture}")
    return stages


if __name__ == "__main__":
    main()
