"""The exact diagonal and trace of the Hessian, in gradients, beside BackPACK's.

    python benchmarks/diagonal.py                                     # ours
    python benchmarks/diagonal.py --backpack PATH/TO/bin/python       # and BackPACK's, in an environment of its own
                                                                      # (pip install torch backpack-for-pytorch)

Networks of tanh layers with squared error, float32. Each library's figures are ratios to its own gradient, measured in the
same run; a large network is run in a process of its own for its memory.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import pathlib
import subprocess
import sys
import time

import jax
from hessian import error, network, plain_error
from measure import MIB, measure, peak_rss_bytes, report, verdict

import jaxhess

SMALL = {(16, 32, 32, 10): (256, 10), (64, 64, 64, 10): (256, 15), (784, 100, 10): (128, 5)}
LARGE = ((784, 1024, 512, 256, 128, 64, 10), 512)


def named(widths) -> str:
    """`64-64-10`."""
    return "-".join(map(str, widths))


def small(widths, examples, bound) -> None:
    """One network's diagonal and trace against its gradient."""
    params, x, t = network(widths, examples)
    print(f"\n{named(widths)}, r = {examples}, {jax.default_backend()}, jax {jax.__version__}")
    m = measure(
        {
            "gradient": (jax.grad(plain_error), (params, x, t)),
            "exact diagonal of the Hessian": (jaxhess.hessian_diagonal(error), (params, x, t)),
            "exact trace of the Hessian": (jaxhess.hessian_trace(error), (params, x, t)),
        },
        rounds=500,
        budget=15,
    )
    report(m)
    for what in ("diagonal", "trace"):
        ratio = m[f"exact {what} of the Hessian"].seconds / m["gradient"].seconds
        print(verdict(f"{what} / gradient", ratio, bound, at_least=False))


def large() -> None:
    """The large network: time of a run after the first, and the memory of this process."""
    widths, examples = LARGE
    params, x, t = network(widths, examples)
    diagonal = jaxhess.hessian_diagonal(error)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(diagonal(params, x, t))
        times.append(time.perf_counter() - start)
    print(f"\n{named(widths)}, r = {examples}: first call, with compiling, {times[0]:.2f} s")
    print(verdict("diagonal, seconds", sorted(times[1:])[1], 5, at_least=False))
    print(verdict("peak memory of the process, GiB", peak_rss_bytes() / (1024 * MIB), 2, at_least=False))


def backpack(python: str) -> None:
    """BackPACK on the same networks, in its own environment."""
    script = pathlib.Path(__file__).with_name("backpack_diagonal.py")
    cases = [*((widths, examples) for widths, (examples, _) in SMALL.items()), LARGE]
    print("\nBackPACK, DiagHessian (seconds of its own gradient and diagonal)")
    for widths, examples in cases:
        command = [python, str(script), f"{named(widths)}:{examples}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            print(f"{named(widths):<36} failed: {result.stderr.strip().splitlines()[-1:]}")
            continue
        found = json.loads(result.stdout.splitlines()[-1])
        ratio, memory = found["diagonal"] / found["gradient"], found["peak_bytes"] / (1024 * MIB)
        print(
            f"{named(widths):<36} gradient {found['gradient'] * 1e3:9.3f} ms   diagonal {found['diagonal'] * 1e3:10.3f} ms"
            f"   = {ratio:7.1f} gradients   process {memory:5.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backpack", metavar="PYTHON", help="the Python of an environment with BackPACK")
    parser.add_argument("--large", action="store_true", help="the large network only, in this process")
    arguments = parser.parse_args()
    if arguments.large:
        large()
    else:
        for widths, (examples, bound) in SMALL.items():
            small(widths, examples, bound)
        subprocess.run([sys.executable, __file__, "--large"], check=True)
        if arguments.backpack:
            backpack(arguments.backpack)
