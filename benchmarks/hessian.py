"""The exact Hessian of a feedforward network against `jax.hessian`, as ratios within one run.

    python benchmarks/hessian.py            # all of it, some minutes
    python benchmarks/hessian.py --no-dense # without the dense blocks of jax.hessian, which take most of the time

Network 64-64-64-10, tanh, squared error, r = 256, float32; then 784-1024-512-256-128-64-10, r = 32.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import subprocess
import sys

import jax
import jax.numpy as jnp
from measure import MIB, measure, peak_rss_bytes, prepare, report, verdict

import jaxhess


def network(widths, examples, key=0):
    """Parameters of a perceptron and a batch for it, in float32."""
    keys = jax.random.split(jax.random.key(key), len(widths) + 1)
    params = [
        {"w": jax.random.normal(k, (m, n)) / jnp.sqrt(n), "b": jnp.zeros(m)}
        for k, n, m in zip(keys, widths, widths[1:], strict=False)
    ]
    return params, jax.random.normal(keys[-2], (examples, widths[0])), jax.random.normal(keys[-1], (examples, widths[-1]))


def error(params, x, target):
    """Squared error of one example."""
    for layer in params[:-1]:
        x = jaxhess.dense(layer["w"], layer["b"], x, jaxhess.tanh)
    return jaxhess.losses.squared_error(jaxhess.dense(params[-1]["w"], params[-1]["b"], x), target)


def mean_error(params, x, t):
    """Mean over the batch, for autodiff."""
    return jnp.mean(jax.vmap(error, in_axes=(None, 0, 0))(params, x, t))


def plain_error(params, x, t):
    """The same network as one would write it for a batch without jaxhess: the gradient to compare with."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"].T + layer["b"])
    return 0.5 * jnp.mean(jnp.sum((x @ params[-1]["w"].T + params[-1]["b"] - t) ** 2, axis=1))


def autodiff_block(layer, params, x, t):
    """`jax.hessian` with respect to one weight."""

    def of_weight(w):
        return plain_error([*params[:layer], params[layer] | {"w": w}, *params[layer + 1 :]], x, t)

    return jax.hessian(of_weight)(params[layer]["w"])


def small_network(dense: bool) -> None:
    params, x, t = network((64, 64, 64, 10), 256)
    print(f"64-64-64-10, r = 256, {jax.default_backend()}, jax {jax.__version__}")
    H = jaxhess.hessian(error)(params, x, t)
    vectors = jax.random.normal(jax.random.key(9), (50, 64, 64))
    m = measure(
        {
            "gradient": (jax.grad(plain_error), (params, x, t)),
            "gradient of jaxhess.dense": (jax.grad(mean_error), (params, x, t)),
            "structured blocks of all parameters": (jaxhess.hessian(error), (params, x, t)),
            "products of the second block with 50 vectors": (lambda b, v: jax.vmap(b.mv)(v), (H[1]["w"], vectors)),
        },
        rounds=500,
    )
    report(m)
    gradient = min(m["gradient"], m["gradient of jaxhess.dense"], key=lambda m: m.seconds)
    blocks = m["structured blocks of all parameters"]
    products = m["products of the second block with 50 vectors"].seconds / 50
    cases = {"gradient": (jax.grad(plain_error), (params, x, t))}
    cases |= {f"dense block {k} from the structured one": (lambda b: b.as_matrix(), (H[k]["w"],)) for k in range(3)}
    ours = measure(cases, rounds=20)
    report(ours)
    print(verdict("structured blocks, in gradients", blocks.seconds / gradient.seconds, 30, False))
    print(verdict("products with 50 vectors, in gradients for each vector", products / gradient.seconds, 0.2, False))
    dense_ours = [m for name, m in ours.items() if name != "gradient"]
    memory = max(m.peak_bytes / m.result_bytes for m in dense_ours)
    print(verdict("peak memory of a dense block, in results", memory, 2, False))
    if not dense:
        return
    cases = {"gradient": (jax.grad(plain_error), (params, x, t))}
    cases |= {f"dense block {k} by jax.hessian": (lambda *a, k=k: autodiff_block(k, *a), (params, x, t)) for k in range(3)}
    theirs = measure(cases, rounds=5)
    report(theirs)
    total = sum(m.seconds for name, m in theirs.items() if name != "gradient")
    dense_total = blocks.seconds + sum(m.seconds for m in dense_ours)
    print(verdict("jax.hessian of the blocks / structured blocks", total / blocks.seconds, 150, True))
    print(verdict("jax.hessian of the blocks / dense blocks", total / dense_total, 8, True))


def large_network() -> None:
    params, x, t = network((784, 1024, 512, 256, 128, 64, 10), 32)
    H = jaxhess.hessian(error)(params, x, t)
    vector = jax.tree.map(jnp.ones_like, params)
    report(
        measure(
            {
                "gradient": (jax.grad(plain_error), (params, x, t)),
                "structured blocks of all parameters": (jaxhess.hessian(error), (params, x, t)),
                "product of all blocks with one vector": (lambda H, v: H.mv(v), (H, vector)),
            },
            rounds=15,
        )
    )
    print(f"dense blocks would take {H.dense_bytes / 2**40:.1f} TiB, ours {H.storage_bytes / MIB:.0f} MiB")
    print(verdict("memory of the whole process, GiB", peak_rss_bytes() / 2**30, 4, False))


def autodiff_memory() -> None:
    print("memory that jax.hessian of one h x h block asks for (r = 256, compiled, not run):")
    for h in (32, 64, 96, 128, 160):
        params, x, t = network((h, h, h, 10), 256)
        *_, peak = prepare(lambda *a: autodiff_block(1, *a), params, x, t)
        print(f"  h = {h:4d}: {peak / 2**30:8.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense blocks of jax.hessian")
    parser.add_argument("--large-only", action="store_true", help="the large network only (its memory is the process's)")
    options = parser.parse_args()
    if options.large_only:
        large_network()
        return
    small_network(not options.no_dense)
    if not options.no_dense:
        autodiff_memory()
    print("\n784-1024-512-256-128-64-10, r = 32", flush=True)
    subprocess.run([sys.executable, __file__, "--large-only"], check=True)


if __name__ == "__main__":
    main()
