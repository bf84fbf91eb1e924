"""Fit Franke's function with Gauss-Newton, and with Adam in the same time.

    python examples/train_regression.py [--picture train_regression.png] [--seconds 8] [--points 1000]

A 2-20-20-1 tanh network (501 parameters) from the same initial weights: `jaxhess.optimizers.gauss_newton()` as it comes, and
Adam with cosine decay on 100 points at a time, at the best of three learning rates; each for the same seconds, compilation
not counted. The error is the root of the mean square on a grid of points that neither has seen.
"""

import os

# SciPy's LAPACK factors; where other programs run too, its threads wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import time

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optax
from tqdm import tqdm

import jaxhess
from jaxhess import optimizers

jax.config.update("jax_enable_x64", True)

WIDTHS = (2, 20, 20, 1)
RATES = (1e-3, 3e-3, 1e-2)
CHUNK, BATCH = 1000, 100  # steps of Adam in one compiled loop, and the points that each is made with
BLUE, ORANGE = "#2166ac", "#e69f00"


def franke(x):
    """Franke's function on the unit square, of points (.., 2)."""
    a, b = 9 * x[..., 0], 9 * x[..., 1]
    return (
        0.75 * jnp.exp(-((a - 2) ** 2 + (b - 2) ** 2) / 4)
        + 0.75 * jnp.exp(-((a + 1) ** 2) / 49 - (b + 1) / 10)
        + 0.5 * jnp.exp(-((a - 7) ** 2 + (b - 3) ** 2) / 4)
        - 0.2 * jnp.exp(-((a - 4) ** 2) - (b - 7) ** 2)
    )


def initialise(key):
    keys = jax.random.split(key, len(WIDTHS) - 1)
    sizes = zip(keys, WIDTHS[1:], WIDTHS[:-1], strict=True)
    return [{"w": jax.random.normal(key, (m, n)) / n**0.5, "b": jnp.zeros(m)} for key, m, n in sizes]


def model(params, x):
    for layer in params[:-1]:
        x = jaxhess.dense(layer["w"], layer["b"], x, jaxhess.tanh)
    return jaxhess.dense(params[-1]["w"], params[-1]["b"], x)


loss = jaxhess.losses.squared_error


@jax.jit
def rms(params, x, targets):
    return jnp.sqrt(jnp.mean((jax.vmap(model, (None, 0))(params, x) - targets) ** 2))


def run(step, params, state, seconds, name, test):
    """Calls `step(params, state)` for so many seconds: times and test errors, evaluation not counted."""
    jax.block_until_ready(step(params, state))
    times, errors, spent = [0.0], [float(rms(params, *test))], 0.0
    with tqdm(
        total=round(seconds, 1), desc=name, unit="s", bar_format="{l_bar}{bar}| {n:.1f}/{total} s{postfix}", mininterval=0.5
    ) as bar:
        while spent < seconds:
            start = time.perf_counter()
            params, state = step(params, state)
            jax.block_until_ready(params)
            taken = time.perf_counter() - start
            spent += taken
            times.append(spent)
            errors.append(float(rms(params, *test)))
            bar.set_postfix_str(f"test rms {errors[-1]:.1e}", refresh=False)
            bar.update(min(taken, bar.total - bar.n))
    return times, errors


def second_order(params, train, test, seconds):
    optimizer = optimizers.gauss_newton()
    train_step = optimizers.step((model, loss), optimizer)

    def step(params, state):
        params, state, _ = train_step(params, state, *train)
        return params, state

    return run(step, params, optimizer.init(params), seconds, "Gauss-Newton", test)


def first_order(params, train, test, seconds, rate):
    def mean(params, x, targets):
        return jnp.mean(jax.vmap(lambda x, target: loss(model(params, x), target))(x, targets))

    def steps_of(optimizer):
        @jax.jit
        def chunk(params, state):
            def one(carry, key):
                params, state = carry
                chosen = jax.random.randint(key, (BATCH,), 0, len(train[0]))
                updates, state = optimizer.update(jax.grad(mean)(params, *(a[chosen] for a in train)), state, params)
                return (optax.apply_updates(params, updates), state), None

            keys = jax.random.split(jax.random.key(optax.tree_utils.tree_get(state, "ScaleByAdamState").count), CHUNK)
            return jax.lax.scan(one, (params, state), keys)[0]

        return chunk

    constant = optax.adam(rate)
    chunk, state = steps_of(constant), constant.init(params)
    jax.block_until_ready(chunk(params, state))
    start = time.perf_counter()
    jax.block_until_ready(chunk(params, state))
    count = max(1, int(seconds / (time.perf_counter() - start))) * CHUNK
    decaying = optax.adam(optax.cosine_decay_schedule(rate, count))
    return run(steps_of(decaying), params, decaying.init(params), seconds, f"Adam, {rate:g}", test)


def draw(curves, path):
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for (name, (times, errors)), colour, line in zip(curves.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
        axis.semilogy(times, errors, color=colour, ls=line, lw=2, label=f"{name}: {errors[-1]:.1e} at the end")
    axis.set(xlabel="time in seconds, compilation not counted", ylabel="root mean square error on unseen points")
    axis.set_title("Franke's function, 2-20-20-1 tanh network")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", "--out", default="train_regression.png", help="where the picture goes")
    parser.add_argument("--seconds", type=float, default=8, help="time for each run")
    parser.add_argument("--points", type=int, default=1000, help="training points")
    options = parser.parse_args(argv)
    x = jax.random.uniform(jax.random.key(0), (options.points, 2))
    grid = jnp.stack(jnp.meshgrid(*[jnp.linspace(0, 1, 41)] * 2), axis=-1).reshape(-1, 2)
    train, test = (x, franke(x)[:, None]), (grid, franke(grid)[:, None])
    params = initialise(jax.random.key(1))
    ours = second_order(params, train, test, options.seconds)
    theirs = {rate: first_order(params, train, test, options.seconds, rate) for rate in RATES}
    best = min(theirs, key=lambda rate: theirs[rate][1][-1])
    curves = {"Gauss-Newton": ours, f"Adam, learning rate {best:g}": theirs[best]}
    print(f"\n{'':32}  {'updates':>8}  test error after {options.seconds:g} s")
    for (name, (times, errors)), each in zip(curves.items(), (1, CHUNK), strict=True):
        print(f"{name:32}  {(len(times) - 1) * each:8d}  {errors[-1]:.2e}")
    print(f"Gauss-Newton's error is {theirs[best][1][-1] / ours[1][-1]:.0f} times smaller.")
    draw(curves, options.picture)
    print(f"picture: {options.picture}")
    return curves


if __name__ == "__main__":
    main()
