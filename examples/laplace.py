"""The exact Laplace posterior of all weights of a digits classifier: which prior, and what it is worth on rotated digits.

    python examples/laplace.py [--picture laplace.png] [--units 50] [--images 200] [--steps 1500]

A 64-50-10 tanh network of 3,760 parameters w learns 200 of scikit-learn's bundled 8 x 8 digits, with a normal prior of
precision tau, which is weight decay. About the trained w the posterior is normal, of precision n (G + tau / n I). G is the
exact Gauss-Newton matrix of the mean error over the whole network, of rank 2,000 at most, factored by its Gram matrix. Then

    evidence    log p(labels | tau) = - n error(w) + (N log tau - tau |w|^2 - log det(n G + tau I)) / 2       (MacKay 1992)
    forecast    mean of softmax(f(w, x) + J(x) d) over draws d of the posterior        (Immer, Korzepa and Bauer 2021)

The evidence chooses tau without images held out for that; the same with the diagonal of G, as is often done for the price of
the determinant, is beside it. The forecasts are held against those of the network itself, on test images as they are and
rotated, which it was never shown. The posterior is wide where training images are fitted with confidence: it knows
rotated digits for what they are, and doubts upright ones more than they deserve. The table shows both.
"""

import argparse

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxhess

jax.config.update("jax_enable_x64", True)

PRECISIONS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
ANGLES = (0, 10, 20, 30, 40, 50, 60, 75, 90)
DRAWS, BINS = 200, 10
PLAIN, DIAGONAL, EXACT = "network alone", "diagonal Laplace", "exact Laplace"
STYLES = {
    PLAIN: {"color": "#b2182b", "marker": "s", "ls": "--"},
    DIAGONAL: {"color": "#4d4d4d", "marker": "^", "ls": "-."},
    EXACT: {"color": "#2166ac", "marker": "o", "ls": "-"},
}


def load(count):
    """Training and test images (r, 64) in [0, 1] and their labels (r,)."""
    images, labels = load_digits(return_X_y=True)
    return train_test_split(
        jnp.asarray(images / 16.0), jnp.asarray(labels), train_size=count, random_state=0, stratify=labels
    )


def rotated(images, angle):
    """The images, turned by an angle in degrees."""
    turned = rotate(np.asarray(images).reshape(-1, 8, 8), angle, axes=(1, 2), reshape=False, order=1)
    return jnp.asarray(turned.reshape(-1, 64))


def logits(params, x):
    """The network's outputs for one image."""
    h = jaxhess.dense(params["hidden"]["w"], params["hidden"]["b"], x, jaxhess.tanh)
    return jaxhess.dense(params["out"]["w"], params["out"]["b"], h)


def outputs(params, images):
    return jax.vmap(logits, in_axes=(None, 0))(params, images)


def mean_error(params, images, labels):
    return jnp.mean(jax.vmap(jaxhess.losses.softmax_cross_entropy)(outputs(params, images), labels))


def squared_norm(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def make_training(images, labels, units, steps):
    """The function from a prior precision to the trained parameters, compiled once: Adam on all images at once."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    keys = jax.random.split(jax.random.key(0))
    start = {
        "hidden": {"w": jax.random.normal(keys[0], (units, 64)) / 8, "b": jnp.zeros(units)},
        "out": {"w": jax.random.normal(keys[1], (10, units)) / np.sqrt(units), "b": jnp.zeros(10)},
    }

    @jax.jit
    def train(precision):
        def objective(params):
            return mean_error(params, images, labels) + precision * squared_norm(params) / (2 * len(images))

        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(objective)(params), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[0][0]

    return train


def log_evidence(params, precision, logdet, images, labels):
    """Of the prior precision, given `log det(n G + tau I)`."""
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    prior = count * jnp.log(precision) - precision * squared_norm(params)
    return -len(images) * mean_error(params, images, labels) + (prior - logdet) / 2


def study(params, precision, images, labels):
    """The evidence by the whole of G and by its diagonal, and draws of the two posteriors less their mean."""
    n, key = len(images), jax.random.key(1)
    loss = jaxhess.losses.softmax_cross_entropy
    G = jaxhess.gauss_newton(logits, loss, blocks="full")(params, images, labels)  # of the MEAN error
    G_factored = G.factorize()  # once, for the determinant and the draws
    exact = G_factored.logdet(precision / n) + G.in_size() * np.log(n)
    draws = jax.tree.map(lambda d: d / np.sqrt(n), G_factored.sample(key, precision / n, (DRAWS,)))
    entries, treedef = jax.tree.flatten(jax.tree.map(lambda d: n * d + precision, G.diagonal()))
    diagonal = sum(jnp.sum(jnp.log(d)) for d in entries)
    keys = jax.random.split(key, len(entries))
    normal = [jax.random.normal(k, (DRAWS, *d.shape)) / jnp.sqrt(d)[None] for k, d in zip(keys, entries, strict=True)]
    evidences = [log_evidence(params, precision, logdet, images, labels) for logdet in (exact, diagonal)]
    return {
        "params": params,
        "operator": G,
        "evidence": dict(zip((EXACT, DIAGONAL), map(float, evidences), strict=True)),
        "draws": {EXACT: draws, DIAGONAL: treedef.unflatten(normal)},
    }


@jax.jit
def forecast(params, draws, images):
    """Log probabilities (r, 10): those of the network linearised about its weights, averaged over the draws."""
    middle, linear = jax.linearize(lambda params: outputs(params, images), params)
    if draws is None:
        return jax.nn.log_softmax(middle)
    return jax.nn.logsumexp(jax.lax.map(lambda d: jax.nn.log_softmax(middle + linear(d)), draws), axis=0) - np.log(DRAWS)


def nll(log_probabilities, labels):
    """Mean negative log-likelihood of the labels."""
    return -float(jnp.mean(log_probabilities[jnp.arange(len(labels)), labels]))


def reliability(log_probabilities, labels):
    """Of each bin of confidence: mean confidence, accuracy and share of the images; those without images are left out."""
    confidence, right = np.exp(np.max(log_probabilities, axis=1)), np.argmax(log_probabilities, axis=1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    members = [place == b for b in range(BINS) if np.any(place == b)]
    return np.array([(confidence[m].mean(), right[m].mean(), m.mean()) for m in members])


def calibration_error(log_probabilities, labels):
    confidence, accuracy, share = reliability(log_probabilities, labels).T
    return float(np.sum(share * np.abs(confidence - accuracy)))


def entropy(log_probabilities):
    return -np.sum(np.exp(log_probabilities) * log_probabilities, axis=1)


def print_tables(grid, chosen, forecasts, labels):
    print(f"\n{'prior precision (weight decay)':43}", *(f"{tau:8g}" for tau in grid))
    for name, row in (
        ("log evidence, exact", [found["evidence"][EXACT] for found in grid.values()]),
        ("log evidence, diagonal", [found["evidence"][DIAGONAL] for found in grid.values()]),
        ("test NLL of the network alone", [found["test"] for found in grid.values()]),
    ):
        print(f"{name:43}", *(f"{value:8.3f}" if abs(value) < 10 else f"{value:8.0f}" for value in row))
    for kind in (EXACT, DIAGONAL):
        print(f"chosen by the {kind} evidence: {chosen[kind]:g}, test NLL {grid[chosen[kind]]['test']:.3f}")
    print(f"\n{f'at {chosen[EXACT]:g}; test images rotated by':43}", *(f"{angle:7d}°" for angle in ANGLES))
    for measure, name in ((nll, "NLL"), (calibration_error, "calibration error")):
        for kind, found in forecasts.items():
            print(f"{f'{name}, {kind}':43}", *(f"{measure(found[angle], labels):8.3f}" for angle in ANGLES))
    truth = np.repeat([0, 1], len(labels))
    for kind, found in forecasts.items():
        upright = entropy(found[0])
        areas = [roc_auc_score(truth, np.r_[upright, entropy(found[angle])]) for angle in ANGLES]
        print(f"{f'rotation told by entropy*, {kind}':43}", *(f"{area:8.3f}" for area in areas))
    print("* area under the ROC curve; 0.5 is chance")
    costs = [nll(forecasts[kind][0], labels) for kind in (PLAIN, EXACT)]
    print(f"what it costs: on upright images the posterior's doubt raises the NLL from {costs[0]:.3f} to {costs[1]:.3f}")


def draw(grid, chosen, forecasts, labels, path):
    """One picture: evidence and test error over the prior precision; error over rotation; reliability."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, ((prior, test), (turned, diagram)) = plt.subplots(2, 2, figsize=(11.5, 8.6), layout="constrained")
    precisions = np.array(list(grid))
    for kind in (EXACT, DIAGONAL):
        values = np.array([found["evidence"][kind] for found in grid.values()])
        prior.plot(precisions, values / 1000, label=kind.replace("Laplace", "determinant"), **STYLES[kind])
        test.axvline(
            chosen[kind], color=STYLES[kind]["color"], ls=STYLES[kind]["ls"], label=kind.replace("Laplace", "choice")
        )
    test.plot(precisions, [found["test"] for found in grid.values()], color="black", marker="o", label=PLAIN)
    prior.set(xscale="log", title="Evidence of the prior, from training images alone")
    prior.set(xlabel="prior precision", ylabel="log evidence, thousands (higher is better)")
    test.set(xscale="log", xlabel="prior precision", ylabel="test negative log-likelihood")
    test.set_title("The network alone on test images, and the choices")
    for kind, found in forecasts.items():
        turned.plot(ANGLES, [nll(found[angle], labels) for angle in ANGLES], label=kind, **STYLES[kind])
        for angle, face in ((0, "white"), (40, STYLES[kind]["color"])) if kind != DIAGONAL else ():
            confidence, accuracy, _ = reliability(found[angle], labels).T
            style = STYLES[kind] | {"mfc": face, "ls": ":" if angle == 0 else "-"}
            diagram.plot(confidence, accuracy, label=f"{kind}, {angle}°", **style)
    turned.axhline(np.log(10), color="black", lw=0.8, ls=":", label="knowing nothing, log 10")
    turned.set(xlabel="rotation of the test images, degrees", ylabel="negative log-likelihood", ylim=(0, None))
    turned.set_title("Test images that it has not seen the like of")
    diagram.plot([0, 1], [0, 1], color="black", lw=0.8)
    diagram.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    diagram.set_title("Reliability: below the line is overconfident")
    for axis in (prior, test, turned, diagram):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="lower right" if axis is prior else "upper left")
    diagram.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", "--out", default="laplace.png", help="where the picture goes")
    parser.add_argument("--units", type=int, default=50, help="hidden units")
    parser.add_argument("--images", type=int, default=200, help="training images")
    parser.add_argument("--steps", type=int, default=1500, help="training steps")
    options = parser.parse_args(argv)
    images, images_test, labels, labels_test = load(options.images)
    train = make_training(images, labels, options.units, options.steps)
    grid = {}
    for precision in tqdm(PRECISIONS, desc="prior precisions"):
        grid[precision] = study(train(precision), precision, images, labels)
        grid[precision]["test"] = nll(forecast(grid[precision]["params"], None, images_test), labels_test)
    chosen = {kind: max(grid, key=lambda tau, kind=kind: grid[tau]["evidence"][kind]) for kind in (EXACT, DIAGONAL)}
    best = grid[chosen[EXACT]]
    print(f"\n{best['operator']}")
    turned = {angle: rotated(images_test, angle) for angle in tqdm(ANGLES, desc="rotations")}
    forecasts = {
        kind: {angle: np.asarray(forecast(best["params"], best["draws"].get(kind), x)) for angle, x in turned.items()}
        for kind in STYLES
    }
    print_tables(grid, chosen, forecasts, np.asarray(labels_test))
    draw(grid, chosen, forecasts, np.asarray(labels_test), options.picture)
    print(f"\npicture: {options.picture}")
    return grid, chosen, forecasts, np.asarray(labels_test)


if __name__ == "__main__":
    main()
