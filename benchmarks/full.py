"""The whole Hessian, all cross blocks included, against `jax.hessian` and autodiff's products, as ratios within one run.

    python benchmarks/full.py            # all of it, about a minute
    python benchmarks/full.py --no-dense # without jax.hessian, which takes most of the time

Network 16-32-32-10, tanh, squared error, r = 256, and 784-256-128-10, r = 256, float32. "first product" is linearising and
one product in one compiled program, "later product" one with the factors that were kept.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import argparse
import sys

import jax
import jax.numpy as jnp
from hessian import error, network, plain_error
from jax.flatten_util import ravel_pytree
from measure import measure, report, verdict

import jaxhess

full = jaxhess.hessian(error, blocks="full")
# Touching memory that the system has just given costs more than the computation here: have malloc keep what was freed.
KEEP = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_ARENA_MAX": "1"}


def autodiff_product(params, vector, x, t):
    """Forward over reverse on the network as one would write it for a batch without jaxhess."""
    return jax.jvp(lambda p: jax.grad(plain_error)(p, x, t), (params,), (vector,))[1]


def autodiff_matrix(params, x, t):
    """`jax.hessian` in the order of `ravel_pytree`."""
    flat, unravel = ravel_pytree(params)
    return jax.hessian(lambda flat: plain_error(unravel(flat), x, t))(flat)


def products(widths, examples):
    """Products of the whole Hessian with a vector."""
    params, x, t = network(widths, examples)
    vector = jax.tree.map(lambda p: jax.random.normal(jax.random.key(7), p.shape), params)
    print(f"\n{'-'.join(map(str, widths))}, r = {examples}, {jax.default_backend()}, jax {jax.__version__}")
    m = measure(
        {
            "gradient": (jax.grad(plain_error), (params, x, t)),
            "product by autodiff": (autodiff_product, (params, vector, x, t)),
            "jaxhess.hvp": (jaxhess.hvp(error), (params, vector, x, t)),
            "first product": (lambda p, v, x, t: full(p, x, t).mv(v), (params, vector, x, t)),
            "later product": (lambda H, v: H.mv(v), (full(params, x, t), vector)),
        },
        rounds=1000,
        budget=20,
    )
    report(m)
    autodiff = m["product by autodiff"].seconds
    print(verdict("first product / product by autodiff", m["first product"].seconds / autodiff, 2, at_least=False))
    print(verdict("later product / product by autodiff", m["later product"].seconds / autodiff, 1, at_least=False))


def matrices(dense: bool) -> None:
    """The dense matrix, and one cross block."""
    params, x, t = network((16, 32, 32, 10), 256)
    size = ravel_pytree(params)[0].size
    print(f"\ndense {size} x {size}")
    cases = {
        "gradient": (jax.grad(plain_error), (params, x, t)),
        "structured cross block of the hidden weights": (lambda *a: full(*a).block("1/w", "0/w"), (params, x, t)),
        "whole Hessian as a matrix": (lambda *a: full(*a).as_matrix(), (params, x, t)),
    }
    m = measure(cases, rounds=100, budget=20)
    if dense:  # on its own: it takes 500 MiB, and what runs after it starts with none of its memory
        m |= measure({"jax.hessian": (autodiff_matrix, (params, x, t))}, rounds=30, budget=20)
    report(m)
    ours = m["whole Hessian as a matrix"]
    print(verdict("peak memory / result", ours.peak_bytes / ours.result_bytes, 2, at_least=False))
    if dense:
        print(verdict("jax.hessian / whole Hessian", m["jax.hessian"].seconds / ours.seconds, 10, at_least=True))
        found, expected = full(params, x, t).as_matrix(), jax.jit(autodiff_matrix)(params, x, t)
        deviation = jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected))
        print(verdict("largest deviation from jax.hessian, float32, relative", float(deviation), 1e-5, at_least=False))


if __name__ == "__main__":
    if not KEEP.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-dense", action="store_true", help="leave out jax.hessian")
    arguments = parser.parse_args()
    for widths in ((16, 32, 32, 10), (64, 64, 64, 10), (784, 256, 128, 10)):
        products(widths, 256)
    matrices(dense=not arguments.no_dense)
