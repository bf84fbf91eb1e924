"""Timing, compile time and memory of compiled JAX functions, for the benchmarks here."""

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Measured:
    """Median and fastest run and compile time in seconds; bytes of the results and of everything held at the peak."""

    seconds: float
    fastest: float
    compile_seconds: float
    result_bytes: int
    peak_bytes: int

    def __str__(self) -> str:
        memory = f"results {self.result_bytes / MIB:8.1f} MiB, peak {self.peak_bytes / MIB:8.1f} MiB"
        return f"{self.seconds * 1e3:10.3f} ms  (compile {self.compile_seconds:5.2f} s, {memory})"


def prepare(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float, int, int]:
    """The compiled function, its compile time, and the bytes of its results and at its peak (without arguments)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    results = getattr(analysis, "output_size_in_bytes", 0)
    return compiled, seconds, results, results + getattr(analysis, "temp_size_in_bytes", 0)


def measure(
    cases: dict[str, tuple[Callable[..., Any], tuple]], rounds: int = 50, budget: float = 30.0
) -> dict[str, Measured]:
    """Time functions on their arguments, taking turns so that all of them see the same machine.

    Medians of up to `rounds` rounds within about `budget` seconds, after a first run of each.
    """
    prepared = {name: (*prepare(function, *args), args) for name, (function, args) in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}

    def one_round() -> None:
        for name, (compiled, *_, args) in prepared.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*args))
            times[name].append(time.perf_counter() - start)

    start = time.perf_counter()
    one_round()
    first = time.perf_counter() - start
    for name in cases:
        times[name].clear()
    for _ in range(max(1, min(rounds, int(budget / max(first, 1e-6))))):
        one_round()
    return {
        name: Measured(statistics.median(times[name]), min(times[name]), compile_seconds, results, peak)
        for name, (_, compile_seconds, results, peak, _) in prepared.items()
    }


def report(measured: dict[str, Measured]) -> None:
    """A line for each case, with its time in those of the case `gradient`."""
    gradient = measured["gradient"]
    for name, m in measured.items():
        print(f"{name:<46} {m}  = {m.seconds / gradient.seconds:9.1f} gradients", flush=True)


def peak_rss_bytes() -> int:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def verdict(name: str, value: float, bound: float, at_least: bool) -> str:
    """One line: a figure, the bound that the project holds itself to, and whether it is met."""
    met = value >= bound if at_least else value <= bound
    return f"{name:<74} {value:10.2f}   {'>=' if at_least else '<='} {bound:<6g} {'ok' if met else 'NOT MET'}"
