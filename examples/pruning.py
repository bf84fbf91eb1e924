"""Prune a digits classifier without retraining, with exact inverses of its Hessian blocks: optimal brain surgeon.

    python examples/pruning.py [--picture pruning.png] [--seeds 3] [--units 16] [--steps 1500] [--rounds 10]

A 64-16-10 tanh network learns scikit-learn's bundled 8 x 8 digits. Then its weights (not its biases) are removed in rounds,
first those that a quadratic model of the training error calls the cheapest:

    magnitude              w_q^2
    optimal brain damage   w_q^2 H_qq / 2              the exact diagonal        (LeCun, Denker and Solla 1990)
    optimal brain surgeon  w_q^2 / (2 [H^-1]_qq)       the exact inverse         (Hassibi and Stork 1993)

The last also moves the weights that stay, by `-H^-1[:, P] (H^-1[P, P])^-1 w_P` for the removed ones P: to the minimum of the
quadratic model with those at zero. No gradient step is taken by any of them. H is the Hessian block of each weight, its
negative eigenvalues set to zero, plus a small damping; it is computed again in every round, where the mask of what is left
is a part of the model. A fourth line keeps the surgeon's choice and leaves out its move of the others.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxhess

jax.config.update("jax_enable_x64", True)

DAMPING = 1e-4
LARGEST = 0.95
MAGNITUDE, DAMAGE, SURGEON, CHOICE = (
    "magnitude",
    "optimal brain damage",
    "optimal brain surgeon",
    "surgeon's choice, no move",
)
STYLES = {
    MAGNITUDE: {"color": "#4d4d4d", "marker": "s", "ls": "--"},
    DAMAGE: {"color": "#b2182b", "marker": "^", "ls": "-."},
    SURGEON: {"color": "#2166ac", "marker": "o", "ls": "-"},
    CHOICE: {"color": "#92c5de", "marker": "x", "ls": ":"},
}


def load():
    """Training and test images (r, 64) in [0, 1] and their labels (r,)."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(jnp.asarray(images / 16.0), jnp.asarray(labels), test_size=600, random_state=0)


def logits(weights, biases, x):
    """The network's outputs for one image."""
    h = jaxhess.dense(weights["hidden"], biases["hidden"], x, jaxhess.tanh)
    return jaxhess.dense(weights["out"], biases["out"], h)


def error(weights, biases, mask, x, label):
    """Cross entropy of one image; where the mask is zero, so is the weight."""
    return jaxhess.losses.softmax_cross_entropy(logits(jax.tree.map(jnp.multiply, weights, mask), biases, x), label)


@jax.jit
def mean_error(weights, biases, mask, images, labels):
    return jnp.mean(jax.vmap(error, in_axes=(None, None, None, 0, 0))(weights, biases, mask, images, labels))


@jax.jit
def accuracy(weights, biases, images, labels):
    predicted = jnp.argmax(jax.vmap(logits, in_axes=(None, None, 0))(weights, biases, images), axis=1)
    return jnp.mean(predicted == labels)


def train(key, images, labels, units, steps, batch=128):
    """Adam with cosine decay, from random weights: weights and biases."""
    keys = jax.random.split(key)
    weights = {
        "hidden": jax.random.normal(keys[0], (units, 64)) / 8,
        "out": jax.random.normal(keys[1], (10, units)) / np.sqrt(units),
    }
    biases = {"hidden": jnp.zeros(units), "out": jnp.zeros(10)}
    mask = jax.tree.map(jnp.ones_like, weights)
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-2, steps), weight_decay=1e-4)

    @jax.jit
    def run(params):
        def step(carry, key):
            params, state = carry
            chosen = jax.random.choice(key, len(images), (batch,), replace=False)
            gradient = jax.grad(lambda params: mean_error(*params, mask, images[chosen], labels[chosen]))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

    return run((weights, biases))


@jax.jit
def exact_diagonal(weights, biases, mask, images, labels):
    """Each weight's second derivative of the mean error."""

    def of_weights(weights, x, label):
        return error(weights, biases, mask, x, label)

    return jaxhess.hessian_diagonal(of_weights)(weights, images, labels)


@jax.jit
def exact_inverse(weights, biases, mask, images, labels):
    """`(H + damping I)^-1` of each weight's block: its diagonal, and the dense matrix for its columns."""

    def of_weights(weights, x, label):
        return error(weights, biases, mask, x, label)

    H = jaxhess.hessian(of_weights)(weights, images, labels)
    inverse = {name: H[name].positive_part().inverse(DAMPING) for name in weights}
    return {name: (inverse[name].diagonal(), inverse[name].as_matrix()) for name in weights}


def saliencies(method, weights, inverse, *point):
    """What the method says that the removal of each weight costs."""
    if method == MAGNITUDE:
        return jax.tree.map(jnp.square, weights)
    if method == DAMAGE:
        return jax.tree.map(lambda w, d: w**2 * d / 2, weights, exact_diagonal(weights, *point))
    return {name: w**2 / (2 * inverse[name][0]) for name, w in weights.items()}


def moved(w, removed, matrix):
    """The weight after the surgeon's move, all of `removed` at zero."""
    P = np.flatnonzero(np.asarray(removed))
    A = np.asarray(matrix)
    step = A[:, P] @ np.linalg.solve(A[np.ix_(P, P)], np.asarray(w).reshape(-1)[P])
    return w - step.reshape(w.shape)


def prune(method, network, levels, train_set, test_set, bar):
    """Test accuracy and mean training error at each level of sparsity, (levels, 2)."""
    weights, biases = network
    mask = jax.tree.map(jnp.ones_like, weights)
    left, unravel = ravel_pytree(mask)
    found = []
    for level in levels:
        count = round(level * left.size) - int(left.size - left.sum())
        if count:
            point = biases, mask, *train_set
            inverse = exact_inverse(weights, *point) if method in (SURGEON, CHOICE) else None
            costs = ravel_pytree(saliencies(method, weights, inverse, *point))[0]
            chosen = jnp.argsort(jnp.where(left > 0, costs, jnp.inf))[:count]
            removed = unravel(jnp.zeros_like(left).at[chosen].set(1))
            if method == SURGEON and inverse is not None:
                weights = {name: moved(w, removed[name], inverse[name][1]) for name, w in weights.items()}
            left = left.at[chosen].set(0)
            mask = unravel(left)
            weights = jax.tree.map(jnp.multiply, weights, mask)
        found.append((accuracy(weights, biases, *test_set), mean_error(weights, biases, mask, *train_set)))
        bar.update()
    return np.array(found)


def reached(accuracies, levels, loss):
    """The largest sparsity up to which the mean accuracy stays within `loss` of the whole network's."""
    kept = accuracies.mean(0) >= accuracies[:, 0].mean() - loss
    return levels[np.argmin(kept) - 1 if not kept.all() else -1]


def print_table(results, levels, seconds):
    print(f"\ntest accuracy without retraining, mean of {len(results[SURGEON])} networks")
    print("weights removed".ljust(27), *(f"{level:6.0%}" for level in levels), " 2 points lost after   seconds")
    for method, found in results.items():
        means = (f"{value:6.1%}" for value in found[..., 0].mean(0))
        within = reached(found[..., 0], levels, 0.02)
        print(method.ljust(27), *means, f"{within:20.0%}", f"{seconds[method]:10.1f}")


def draw(results, levels, path):
    """One picture: test accuracy and training error over sparsity, mean and range over the networks."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained")
    for method, found in results.items():
        style = STYLES[method]
        for axis, values in ((left, 100 * found[..., 0]), (right, found[..., 1])):
            axis.plot(100 * levels, values.mean(0), label=method, ms=4.5, lw=1.8, **style)
            axis.fill_between(100 * levels, values.min(0), values.max(0), color=style["color"], alpha=0.15, lw=0)
    left.set(ylabel="test accuracy, %", ylim=(0, 100), title="Test accuracy, no retraining")
    right.set(ylabel="mean training error", yscale="log", title="What it does to the training error")
    left.legend(frameon=False, loc="lower left")
    for axis in (left, right):
        axis.set(xlabel="weights removed, %", xlim=(0, 100 * LARGEST + 1))
        axis.grid(alpha=0.25)
    count = len(results[SURGEON])
    figure.suptitle(
        f"Pruning a 64-16-10 digits classifier: mean (lines) and range (shades) of {count} networks", fontsize=12
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", "--out", default="pruning.png", help="where the picture goes")
    parser.add_argument("--seeds", type=int, default=3, help="number of networks")
    parser.add_argument("--units", type=int, default=16, help="hidden units")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of removal")
    options = parser.parse_args(argv)
    images, images_test, labels, labels_test = load()
    levels = 1 - np.geomspace(1, 1 - LARGEST, options.rounds + 1)
    networks = [train(jax.random.key(seed), images, labels, options.units, options.steps) for seed in range(options.seeds)]
    results, seconds = {}, {}
    with tqdm(total=len(STYLES) * options.seeds * len(levels), desc="pruning", unit="round") as bar:
        for method in STYLES:
            start = time.perf_counter()
            found = [prune(method, n, levels, (images, labels), (images_test, labels_test), bar) for n in networks]
            results[method], seconds[method] = np.stack(found), time.perf_counter() - start
    print_table(results, levels, seconds)
    draw(results, levels, options.picture)
    print(f"\npicture: {options.picture}")
    return levels, results


if __name__ == "__main__":
    main()
