"""BackPACK's exact diagonal of the Hessian; run by `diagonal.py` with the Python of an environment that has it.

    pip install torch backpack-for-pytorch
    python backpack_diagonal.py 64-64-64-10:256 ...

Prints a line of JSON for each network: medians of the gradient and of the diagonal in seconds, and the peak memory.
"""

import itertools
import json
import resource
import statistics
import sys
import time

import torch
from backpack import backpack, extend
from backpack.extensions import DiagHessian


def seconds(run, rounds, budget):
    """The median of up to `rounds` runs within about `budget` seconds."""
    run()
    times = []
    start = time.perf_counter()
    while not times or (len(times) < rounds and time.perf_counter() - start < budget):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def measure(widths, examples):
    """A tanh network with squared error, of these widths."""
    torch.manual_seed(0)
    layers = []
    for n, m in itertools.pairwise(widths):
        layers += [torch.nn.Linear(n, m), torch.nn.Tanh()]
    plain = torch.nn.Sequential(*layers[:-1])
    x, t = torch.randn(examples, widths[0]), torch.randn(examples, widths[-1])

    def gradient():
        plain.zero_grad()
        torch.nn.functional.mse_loss(plain(x), t).backward()

    baseline = seconds(gradient, 200, 5)
    model, loss = extend(plain), extend(torch.nn.MSELoss())

    def diagonal():
        model.zero_grad()
        with backpack(DiagHessian()):
            loss(model(x), t).backward()

    return {"gradient": baseline, "diagonal": seconds(diagonal, 50, 10)}


if __name__ == "__main__":
    torch.set_num_threads(2)
    for argument in sys.argv[1:]:
        layers, _, count = argument.partition(":")
        found = measure([int(width) for width in layers.split("-")], int(count))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"network": layers, "examples": int(count), **found, "peak_bytes": peak}), flush=True)
