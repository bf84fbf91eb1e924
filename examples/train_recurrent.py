"""Learn to add two numbers that are far apart in a sequence, with Gauss-Newton, and with Adam in the same time.

    python examples/train_recurrent.py [--picture train_recurrent.png] [--seconds 10] [--steps 30] [--sequences 1000]

The adding problem: every step shows a number between 0 and 1 and a mark; at the end the network is to name the sum of the
two marked numbers. An Elman network of 20 tanh units (481 parameters), new sequences for every update; solved where fewer
than 1% of 5000 other sequences are off by more than 0.04. Gauss-Newton as it comes against Adam at the best of three
learning rates with cosine decay, on sequences in batches of 100; compilation is not counted.
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

UNITS, SMALL_BATCH, CHUNK = 20, 100, 100
RATES = (1e-3, 3e-3, 1e-2)
SOLVED, OFF = 0.01, 0.04
BLUE, ORANGE, GREY = "#2166ac", "#e69f00", "#4d4d4d"


def sequences(key, count, steps):
    """Inputs (count, steps, 2), numbers and marks, and the sums (count, 1)."""
    numbers_key, first_key, second_key = jax.random.split(key, 3)
    numbers = jax.random.uniform(numbers_key, (count, steps))
    half = steps // 2
    marked = jnp.stack(
        [jax.random.randint(first_key, (count,), 0, half), jax.random.randint(second_key, (count,), half, steps)]
    )
    marks = jax.nn.one_hot(marked, steps).sum(axis=0)
    return jnp.stack([numbers, marks], axis=-1), jnp.sum(numbers * marks, axis=1, keepdims=True)


def initialise(key):
    input_key, state_key, output_key = jax.random.split(key, 3)
    return {
        "w": jax.random.normal(input_key, (UNITS, 2)) / 2**0.5,
        "u": jax.random.normal(state_key, (UNITS, UNITS)) / UNITS**0.5,
        "b": jnp.zeros(UNITS),
        "out": jax.random.normal(output_key, (1, UNITS)) / UNITS**0.5,
        "shift": jnp.zeros(1),
    }


def model(params, x):
    h = jaxhess.recurrent(params["w"], params["u"], params["b"], x, jaxhess.tanh)
    return jaxhess.dense(params["out"], params["shift"], h[-1])


loss = jaxhess.losses.squared_error


@jax.jit
def share_off(params, x, sums):
    """How many are off by more than `OFF`."""
    return jnp.mean(jnp.abs(jax.vmap(model, (None, 0))(params, x) - sums) > OFF)


def run(step, params, state, seconds, name, test):
    """Calls `step(params, state, number)` for so many seconds: times and shares of wrong answers."""
    jax.block_until_ready(step(params, state, 0))
    times, shares, spent = [0.0], [float(share_off(params, *test))], 0.0
    with tqdm(
        total=round(seconds, 1), desc=name, unit="s", bar_format="{l_bar}{bar}| {n:.1f}/{total} s{postfix}", mininterval=0.5
    ) as bar:
        while spent < seconds:
            start = time.perf_counter()
            params, state = step(params, state, len(times))
            jax.block_until_ready(params)
            taken = time.perf_counter() - start
            spent += taken
            times.append(spent)
            shares.append(float(share_off(params, *test)))
            bar.set_postfix_str(f"{shares[-1]:.1%} wrong", refresh=False)
            bar.update(min(taken, bar.total - bar.n))
    return times, shares


def second_order(params, options, test):
    optimizer = optimizers.gauss_newton()
    train_step = optimizers.step((model, loss), optimizer)
    fresh = jax.jit(lambda number: sequences(jax.random.key(number), options.sequences, options.steps))

    def step(params, state, number):
        params, state, _ = train_step(params, state, *fresh(number))
        return params, state

    return run(step, params, optimizer.init(params), options.seconds, "Gauss-Newton", test)


def first_order(params, options, test, rate):
    def mean(params, x, sums):
        return jnp.mean(jax.vmap(lambda x, s: loss(model(params, x), s))(x, sums))

    def steps_of(optimizer):
        @jax.jit
        def chunk(params, state, number):
            def one(carry, key):
                params, state = carry
                gradient = jax.grad(mean)(params, *sequences(key, SMALL_BATCH, options.steps))
                updates, state = optimizer.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(one, (params, state), jax.random.split(jax.random.key(number), CHUNK))[0]

        return chunk

    constant = optax.adam(rate)
    chunk, state = steps_of(constant), constant.init(params)
    jax.block_until_ready(chunk(params, state, 0))
    start = time.perf_counter()
    jax.block_until_ready(chunk(params, state, 0))
    count = max(1, int(options.seconds / (time.perf_counter() - start))) * CHUNK
    decaying = optax.adam(optax.cosine_decay_schedule(rate, count))
    return run(steps_of(decaying), params, decaying.init(params), options.seconds, f"Adam, {rate:g}", test)


def solved_at(times, shares):
    """The first time at which the task was solved, or None."""
    return next((t for t, share in zip(times, shares, strict=True) if share < SOLVED), None)


def draw(curves, steps, path):
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for (name, (times, shares)), colour, line in zip(curves.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
        axis.plot(times, [100 * max(share, 1e-4) for share in shares], color=colour, ls=line, lw=2, label=name)
    axis.axhline(100 * SOLVED, color=GREY, lw=1, ls=":")
    axis.text(0.99, 1.08 * 100 * SOLVED, "solved below", color=GREY, ha="right", transform=axis.get_yaxis_transform())
    axis.set_yscale("log")
    axis.set(xlabel="time in seconds, compilation not counted", ylabel=f"sums off by more than {OFF} (%)")
    axis.set_title(f"Adding problem, {steps} steps, Elman network of {UNITS} units")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", "--out", default="train_recurrent.png", help="where the picture goes")
    parser.add_argument("--seconds", type=float, default=10, help="time for each run")
    parser.add_argument("--steps", type=int, default=30, help="length of the sequences")
    parser.add_argument("--sequences", type=int, default=1000, help="sequences for each update of Gauss-Newton")
    options = parser.parse_args(argv)
    test = sequences(jax.random.key(2**20), 5000, options.steps)
    params = initialise(jax.random.key(1))
    ours = second_order(params, options, test)
    theirs = {rate: first_order(params, options, test, rate) for rate in RATES}
    best = min(theirs, key=lambda rate: (solved_at(*theirs[rate]) or float("inf"), theirs[rate][1][-1]))
    curves = {"Gauss-Newton": ours, f"Adam, learning rate {best:g}": theirs[best]}
    print(f"\n{'':28}  {'updates':>8}  {'wrong at the end':>16}  solved after")
    for (name, (times, shares)), each in zip(curves.items(), (1, CHUNK), strict=True):
        when = solved_at(times, shares)
        after = "not solved" if when is None else f"{when:.2f} s"
        print(f"{name:28}  {(len(times) - 1) * each:8d}  {shares[-1]:16.2%}  {after}")
    draw(curves, options.steps, options.picture)
    print(f"picture: {options.picture}")
    return curves


if __name__ == "__main__":
    main()
