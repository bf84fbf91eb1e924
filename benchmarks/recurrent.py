"""The exact Hessian of recurrent networks against `jax.hessian`, and the layer's gradient against autodiff of a scan.

    python benchmarks/recurrent.py            # all of it, some minutes
    python benchmarks/recurrent.py --no-dense # without the dense blocks

Elman net 16-32-10, r = 32, 20 steps, softmax cross entropy after the last or after every step; the gradient of a layer with
128 units over 100 steps; time and memory against the number of steps; an LSTM under `jax.lax.scan`. All in float32.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
from measure import MIB, measure, peak_rss_bytes, prepare, report, verdict

import jaxhess

cross_entropy = jaxhess.losses.softmax_cross_entropy


def elman(inputs, hidden, outputs, examples, steps, every_step):
    """Parameters, the head (which stays fixed) and a batch."""
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "w": jax.random.normal(keys[0], (hidden, inputs)) / jnp.sqrt(inputs),
        "u": jax.random.normal(keys[1], (hidden, hidden)) / jnp.sqrt(hidden),
        "b": jnp.zeros(hidden),
    }
    head = jax.random.normal(keys[2], (outputs, hidden)) / jnp.sqrt(hidden)
    x = jax.random.normal(keys[3], (examples, steps, inputs))
    labels = jax.random.randint(keys[4], (examples, steps) if every_step else (examples,), 0, outputs)
    return params, head, x, labels


def read_out(head, states, label):
    """The error of one example's states."""
    if label.ndim == 0:
        return cross_entropy(head @ states[-1], label)
    return jnp.sum(jax.vmap(cross_entropy)(states @ head.T, label))


def error(params, x, label, head):
    """One example, by the layer of jaxhess."""
    return read_out(head, jaxhess.recurrent(params["w"], params["u"], params["b"], x), label)


def plain_states(params, x):
    """The states of one example as one would write them without jaxhess."""

    def step(h, x):
        h = jnp.tanh(params["w"] @ x + params["u"] @ h + params["b"])
        return h, h

    return jax.lax.scan(step, jnp.zeros(params["b"].shape), x)[1]


def plain_error(params, x, labels, head):
    """The mean error of a batch, to compare with."""
    return jnp.mean(jax.vmap(lambda x, label: read_out(head, plain_states(params, x), label))(x, labels))


def autodiff_block(name, params, x, labels, head):
    """`jax.hessian` with respect to one parameter."""
    return jax.hessian(lambda p: plain_error(params | {name: p}, x, labels, head))(params[name])


def structured(params, x, labels, head):
    """All blocks by jaxhess."""
    return jaxhess.hessian(partial(_error_of_batch, head))(params, x, labels)


def _error_of_batch(head, params, x, label):
    return error(params, x, label, head)


def small_network(every_step: bool, dense: bool) -> None:
    params, head, x, labels = elman(16, 32, 10, 32, 20, every_step)
    fixed = (params, x, labels, head)
    where = "every step" if every_step else "the last step"
    print(f"Elman 16-32-10, r = 32, 20 steps, error at {where}; {jax.devices()[0].device_kind}, jax {jax.__version__}")
    H = structured(*fixed)
    cases = {"gradient": (jax.grad(plain_error), fixed), "structured W, U and b": (partial(structured), fixed)}
    cases |= {f"product with {k.upper()}'s block": (lambda b, v: b.mv(v), (H[k], params[k])) for k in params}
    m = measure(cases, rounds=300)
    report(m)
    if not dense:
        return
    cases = {f"jax.hessian of {k.upper()}": (partial(autodiff_block, k), fixed) for k in params}
    cases |= {f"dense {k.upper()} from the structured block": (lambda b: b.as_matrix(), (H[k],)) for k in params}
    d = measure(cases, rounds=10)
    report(d | {"gradient": m["gradient"]})
    total = sum(d[f"jax.hessian of {k.upper()}"].seconds for k in params)
    ours = sum(d[f"dense {k.upper()} from the structured block"].seconds for k in params)
    blocks = m["structured W, U and b"].seconds
    print(verdict("jax.hessian of the blocks / structured blocks", total / blocks, 50, True))
    print(f"jax.hessian of the blocks / dense blocks: {total / (blocks + ours):.1f}\n", flush=True)


def gradient_of_the_layer() -> None:
    print("gradient of the layer with respect to W, U and b, sum of squares of all states, r = 32")
    for inputs, hidden, steps in ((64, 128, 100), (16, 128, 100), (16, 32, 20), (64, 256, 100)):
        params, _, x, _ = elman(inputs, hidden, 10, 32, steps, every_step=False)

        def plain(params, x):
            def step(h, x):
                h = jnp.tanh(x @ params["w"].T + h @ params["u"].T + params["b"])
                return h, h

            h0 = jnp.zeros((x.shape[0], params["b"].size))
            return jnp.sum(jax.lax.scan(step, h0, jnp.moveaxis(x, 1, 0))[1] ** 2)

        def ours(params, x):
            return jnp.sum(jaxhess.recurrent(params["w"], params["u"], params["b"], x) ** 2)

        cases = {"autodiff of lax.scan": (jax.grad(plain), (params, x)), "jaxhess.recurrent": (jax.grad(ours), (params, x))}
        m = measure(cases, rounds=200, budget=20)
        ratio = m["jaxhess.recurrent"].seconds / m["autodiff of lax.scan"].seconds
        name = f"  n = {inputs}, m = {hidden}, {steps} steps: jaxhess.recurrent / autodiff"
        print(verdict(name, ratio, 0.8, False) if hidden == 128 else f"{name:<74} {ratio:10.2f}", flush=True)


def against_time() -> None:
    print("\nElman 16-32-10, r = 32, error at every step, against the number of steps (bytes held at the peak)")
    print(
        f"{'steps':>6} {'gradient':>12} {'blocks':>12} {'peak':>11} {'product U':>12} {'peak':>11}   jax.hessian of U, peak"
    )
    for steps in (5, 10, 20, 50, 100, 200, 500, 1000):
        fixed = elman(16, 32, 10, 32, steps, every_step=True)
        params, head, x, labels = fixed
        fixed = (params, x, labels, head)
        H = structured(*fixed)
        m = measure(
            {
                "gradient": (jax.grad(plain_error), fixed),
                "blocks": (partial(structured), fixed),
                "product": (lambda b, v: b.mv(v), (H["u"], params["u"])),
            },
            rounds=30,
            budget=4,
        )
        *_, theirs = prepare(partial(autodiff_block, "u"), *fixed)
        g, b, p = (m[name] for name in ("gradient", "blocks", "product"))
        print(
            f"{steps:6d} {g.seconds * 1e3:9.2f} ms {b.seconds * 1e3:9.2f} ms {b.peak_bytes / MIB:7.1f} MiB "
            f"{p.seconds * 1e3:9.2f} ms {p.peak_bytes / MIB:7.1f} MiB   {theirs / MIB:10.1f} MiB",
            flush=True,
        )


def lstm() -> None:
    n, m = 8, 16
    keys = jax.random.split(jax.random.key(1), 4)
    params = {"cell": jax.random.normal(keys[0], (4 * m, n + m)) / 5, "bias": jnp.zeros(4 * m), "out": jnp.ones((3, m)) / 4}

    def one(params, x, label):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(params["cell"] @ jnp.concatenate([x, h]) + params["bias"], 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        (h, _), _ = jax.lax.scan(step, (jnp.zeros(m), jnp.zeros(m)), x)
        return cross_entropy(params["out"] @ h, label)

    seconds = {}
    for steps in (20, 200, 20, 200):
        x, labels = jnp.ones((32, steps, n)), jnp.zeros(32, jnp.int32)
        start = time.perf_counter()
        jax.jit(partial(jaxhess.hessian(lambda *a: one(*a)))).lower(params, x, labels).compile()
        seconds[steps] = min(time.perf_counter() - start, seconds.get(steps, 1e9))
    print(f"\nLSTM under lax.scan: tracing and compiling the blocks takes {seconds[20]:.2f} s for 20 steps")
    print(verdict("the same for 200 steps / for 20 steps", seconds[200] / seconds[20], 2, False), flush=True)


def long_sequence() -> None:
    params, head, x, labels = elman(64, 64, 10, 8, 1000, every_step=True)
    H = structured(params, x, labels, head)
    for name in ("w", "u"):
        for what in ("product", "diagonal", "trace"):
            start = time.perf_counter()
            jax.block_until_ready(H[name].mv(params[name]) if what == "product" else getattr(H[name], what)())
            print(f"{name.upper()} {what:<10} {time.perf_counter() - start:8.2f} s (compilation included)", flush=True)
    print(verdict("memory of the whole process, GiB", peak_rss_bytes() / 2**30, 4, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense blocks")
    parser.add_argument("--long-only", action="store_true", help="the long sequence only (its memory is the process's)")
    options = parser.parse_args()
    if options.long_only:
        long_sequence()
        return
    for every_step in (False, True):
        small_network(every_step, not options.no_dense)
    gradient_of_the_layer()
    against_time()
    lstm()
    print("\nElman 64-64-10, r = 8, 1000 steps", flush=True)
    subprocess.run([sys.executable, __file__, "--long-only"], check=True)


if __name__ == "__main__":
    main()
