"""kfac-jax on a task of the training benchmark; run by `training.py` with the Python of an environment that has it.

    pip install jax==0.7.2 jaxlib==0.7.2 kfac-jax==0.0.8
    python kfac_peer.py given.npz found.npz

given.npz: the initial parameters w0, b0, w1, ... (weights outputs by inputs), inputs xs, targets ts, `linear` (numbers of
layers without tanh, besides the last), `softmax` (0: squared error), `decay`, `batch` (0: all examples), `budget` in
seconds, `evaluations` and `growth` (when parameters are kept), `seed`. found.npz: `seconds`, `iterations`,
`compile_seconds`, and the parameters at those times, stacked.

Learning rate, momentum and damping are kfac-jax's adaptive ones and all else its defaults. A step of squared error, half
of the squared distance, is registered with weight 1/2.
"""

import sys
import time

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np

given = dict(np.load(sys.argv[1]))
jax.config.update("jax_enable_x64", given["xs"].dtype == np.float64)

LAYERS = sum(name.startswith("w") for name in given)
LINEAR = {LAYERS - 1, *given["linear"].tolist()}
BATCH, DECAY = int(given["batch"]), float(given["decay"])


def loss(params, batch):
    """Mean loss of a batch, with the decay; the layers are written as kfac-jax recognises them, x @ w + b."""
    x, t = batch
    for place, (w, b) in enumerate(params):
        x = x @ w + b
        if place not in LINEAR:
            x = jnp.tanh(x)
    if given["softmax"]:
        kfac_jax.register_softmax_cross_entropy_loss(x, t)
        mean = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x), t[:, None], axis=1))
    else:
        kfac_jax.register_squared_error_loss(x, t, weight=0.5)
        mean = 0.5 * jnp.mean(jnp.sum((x - t) ** 2, axis=1))
    return mean + 0.5 * DECAY * sum(jnp.sum(a**2) for a in jax.tree.leaves(params))


def batches(data, seed):
    """All examples each time, or minibatches of shuffled ones."""
    rng = np.random.default_rng(seed)
    while True:
        if not BATCH:
            yield data
            continue
        order = rng.permutation(len(data[0]))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            yield tuple(a[chosen] for a in data)


def main():
    data = tuple(jnp.asarray(given[name]) for name in ("xs", "ts"))
    seed, budget = int(given["seed"]), float(given["budget"])
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=DECAY,
        use_adaptive_learning_rate=True,
        use_adaptive_momentum=True,
        use_adaptive_damping=True,
        initial_damping=1.0,
    )

    def start():
        """New arrays each time: the optimizer takes those that it is given."""
        params = [(jnp.array(given[f"w{k}"].T, copy=True), jnp.array(given[f"b{k}"], copy=True)) for k in range(LAYERS)]
        stream = batches(data, seed)
        return params, optimizer.init(params, jax.random.key(seed), next(stream)), stream

    def step(params, state, stream, number):
        params, state, _ = optimizer.step(
            params, state, jax.random.key(seed + 1 + number), data_iterator=stream, global_step_int=number
        )
        return params, state

    before = time.perf_counter()
    params, state, stream = start()
    for number in range(12):  # with and without new inverses, with and without a new damping
        params, state = step(params, state, stream, number)
    jax.block_until_ready(params)
    params, state, stream = start()
    compile_seconds = time.perf_counter() - before

    kept, seconds, iterations = [jax.device_get(params)], [0.0], [0]
    elapsed, due, number = 0.0, 0.0, 0
    while elapsed < budget:
        before = time.perf_counter()
        params, state = step(params, state, stream, number)
        jax.block_until_ready(params)
        elapsed += time.perf_counter() - before
        number += 1
        if elapsed >= due or elapsed >= budget:
            kept.append(jax.device_get(params))
            seconds.append(elapsed)
            iterations.append(number)
            due = elapsed + max(budget / float(given["evaluations"]), float(given["growth"]) * elapsed)
    found = {}
    for k in range(LAYERS):
        found[f"w{k}"] = np.stack([params[k][0].T for params in kept])
        found[f"b{k}"] = np.stack([params[k][1] for params in kept])
    np.savez(sys.argv[2], seconds=seconds, iterations=iterations, compile_seconds=compile_seconds, **found)


if __name__ == "__main__":
    main()
