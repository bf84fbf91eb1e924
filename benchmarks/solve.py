"""What a structured Hessian block is for: exact solves, spectra and log-determinants, as ratios within one run.

    python benchmarks/solve.py          # all of it, a few minutes
    python benchmarks/solve.py --small  # without the block of 100,352 unknowns

All in float32. A block of m x n = 128 x 784, r = 32, whose dense form would take 40 GB; one of 64 x 512, r = 16, against
conjugate gradients with autodiff's products; the 20 extreme eigenvalues of one of 64 x 64 at r = 256, where no space is
smaller than the block's, in gradients of the network.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from hessian import error, network, plain_error
from measure import MIB, peak_rss_bytes, verdict

import jaxhess

DAMPING = 1e-3  # of the largest eigenvalue


def seconds(function, *args, rounds=20, budget=20.0):
    """The median time of a call, after a first one."""
    jax.block_until_ready(function(*args))
    times, start = [], time.perf_counter()
    while len(times) < rounds and (not times or time.perf_counter() - start < budget):
        begin = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def once(function, *args):
    """The result of a call, and its time with compilation."""
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - begin


def large() -> None:
    """Eigenvalues, log-determinant and 10 solves of a block that could never be dense."""
    params, x, t = network((784, 128, 10), 32)
    H = jaxhess.hessian(error)(params, x, t)[0]["w"]
    print(f"\n128 x 784, r = 32: {H!r}")
    vectors = jax.random.normal(jax.random.key(1), (10, 128, 784))
    begin = time.perf_counter()
    F = jax.block_until_ready(H.factorize())
    factored = time.perf_counter() - begin
    largest = jnp.max(jnp.abs(F.eigenvalues))
    determinant = F.logdet(DAMPING * largest)
    solutions = [F.solve(v, DAMPING * largest) for v in vectors]
    jax.block_until_ready((F.eigvalsh(), determinant, solutions))
    total = time.perf_counter() - begin
    left = [v - H.mv(s) - DAMPING * largest * s for v, s in zip(vectors, solutions, strict=True)]
    residual = max(float(jnp.linalg.norm(a) / jnp.linalg.norm(v)) for a, v in zip(left, vectors, strict=True))
    print(f"eigendecomposition of {F.eigenvalues.size}^2: {factored:.1f} s, compilation included")
    print(
        f"inertia {[int(count) for count in F.inertia()]}, log|det| {float(determinant):.2f}, worst residual {residual:.1e}"
    )
    print(verdict("eigenvalues, log-determinant and 10 solves, seconds", total, 60, at_least=False))
    print(verdict("peak memory of the process, GiB", peak_rss_bytes() / 2**30, 4, at_least=False))


def solves() -> None:
    """A held factorisation against conjugate gradients with autodiff's products: the Hessian's block, which is indefinite,
    and Gauss-Newton's, which is not."""
    params, x, t = network((512, 64, 10), 16)
    vector = jax.random.normal(jax.random.key(1), (64, 512))

    def of_weight(w):
        return plain_error([params[0] | {"w": w}, *params[1:]], x, t)

    def outputs(w):
        return jnp.tanh(x @ w.T + params[0]["b"]) @ params[1]["w"].T + params[1]["b"]

    def gauss_newton(v):
        pushed, pull = jax.jvp(outputs, (params[0]["w"],), (v,))[1], jax.vjp(outputs, params[0]["w"])[1]
        return pull(pushed / x.shape[0])[0]

    model, loss = lambda p, x: network_output(p, x), jaxhess.losses.squared_error
    hessian = jaxhess.hessian(error)(params, x, t)[0]["w"]
    compared(hessian, lambda v: jax.jvp(jax.grad(of_weight), (params[0]["w"],), (v,))[1], vector)
    compared(jaxhess.gauss_newton(model, loss)(params, x, t)[0]["w"], gauss_newton, vector)


def network_output(params, x):
    """The outputs of `network` for one example."""
    for layer in params[:-1]:
        x = jaxhess.dense(layer["w"], layer["b"], x, jaxhess.tanh)
    return jaxhess.dense(params[-1]["w"], params[-1]["b"], x)


def compared(block, product, vector) -> None:
    """Times of a block's solves and of conjugate gradients to 1e-6."""
    print(f"\n64 x 512, r = 16: {block!r}")
    held = block.factorize()
    damping = DAMPING * jnp.max(jnp.abs(held.eigenvalues))
    for_damping = block.factorize(damping)

    @jax.jit
    def by_cg(b):
        return jax.scipy.sparse.linalg.cg(lambda v: product(v) + damping * v, b, tol=1e-6, maxiter=2000)[0]

    found, solution = by_cg(vector), held.solve(vector, damping)
    left = jnp.linalg.norm(vector - product(found) - damping * found) / jnp.linalg.norm(vector)
    apart = jnp.linalg.norm(found - solution) / jnp.linalg.norm(solution)
    note = "" if left < 1e-5 else ": short of 1e-6 in 2000 steps or by rounding, its time counts as it is"
    print(f"CG with autodiff: residual {float(left):.0e}, {float(apart):.0e} from the exact solution{note}")
    solve = jax.jit(lambda held, b: held.solve(b, damping))
    cases = {
        "CG with autodiff's products": (by_cg, (vector,)),
        "eigendecomposition, for any damping": (block.factorize, ()),
        "factorisation for this damping": (lambda: block.factorize(damping), ()),
        "a solve with the eigendecomposition held": (held.solve, (vector, damping)),
        "the same inside of jit": (solve, (held, vector)),
        "a solve with the factorisation for this damping held": (for_damping.solve, (vector,)),
    }
    times = {name: seconds(function, *args) for name, (function, args) in cases.items()}
    for name, each in times.items():
        print(f"{name:<64} {each * 1e3:10.2f} ms")
    cg, eager = times["CG with autodiff's products"], times["a solve with the eigendecomposition held"]
    print(verdict("CG / solve with the eigendecomposition held", cg / eager, 10, at_least=True))
    for name, first, each in (
        ("eigendecomposition", "eigendecomposition, for any damping", eager),
        ("factorisation", "factorisation for this damping", times["a solve with the factorisation for this damping held"]),
    ):
        print(verdict(f"solves until the {name} has paid for itself", times[first] / (cg - each), 10, at_least=False))


def extremes() -> None:
    """The 20 largest eigenvalues of a block without a reduced space."""
    params, x, t = network((64, 64, 64, 10), 256)
    H = jaxhess.hessian(error)(params, x, t)
    gradient = jax.jit(jax.grad(plain_error))
    print("\n20 extreme eigenvalues of 64 x 64, r = 256")
    for layer in (0, 1):
        block = H[layer]["w"]

        def top(block=block):
            return block.eigh(20, method="iterative", tolerance=1e-5, return_info=True)

        (values, _, info), compiling = once(top)
        exact = jnp.linalg.eigvalsh(block.as_matrix())
        exact = jnp.sort(exact[jnp.argsort(-jnp.abs(exact))[:20]])
        wrong = float(jnp.max(jnp.abs(values - exact) / jnp.abs(exact)))
        print(
            f"layer {layer}: {int(info.products)} products, largest relative error {wrong:.0e}, first call {compiling:.1f} s"
        )
        ratios = []
        for _ in range(7):
            unit = seconds(gradient, params, x, t, rounds=200, budget=2)
            ratios.append(seconds(top, rounds=20, budget=3) / unit)
        print(verdict("time of 20 eigenpairs / gradient", statistics.median(ratios), 40, at_least=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="leave out the large block")
    arguments = parser.parse_args()
    print(f"{jax.default_backend()}, jax {jax.__version__}, start at {peak_rss_bytes() / MIB:.0f} MiB")
    if not arguments.small:
        large()
    solves()
    extremes()
