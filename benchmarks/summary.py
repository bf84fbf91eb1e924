"""What the curves of a task say: best settings, times to the target, a table, a picture."""

import pathlib
import statistics
from collections.abc import Callable, Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from curves import Curve
from task import Task

__all__ = ["best_settings", "draw", "goals", "reached", "same_loss", "table", "verdicts"]

STYLES = {
    "adam": ("#0072B2", "-"),
    "nag": ("#56B4E9", "--"),
    "lbfgs": ("#009E73", "-."),
    "gauss_newton": ("#D55E00", "-"),
    "newton": ("#E69F00", "--"),
    "kronecker_newton": ("#CC79A7", "-."),
    "kfac_jax": ("#000000", ":"),
}  # colours of Okabe and Ito (2008), told apart by the colour-blind
RATED = ("adam", "nag")
FIRST = (*RATED, "lbfgs")
OURS, PEER = ("gauss_newton", "newton", "kronecker_newton"), "kfac_jax"
CLOSE = 1.001  # losses that count as the same: methods that converge to the same minimum differ by rounding


def best_settings(task: Task, curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """For each method the curves, by seed, of its best setting.

    The best has the least final training loss in the median over seeds. Of a task that is solved or not, or has a floor, it
    has the most seeds that get there, then the least median time to it, then the least loss.
    """
    by_method: dict[str, dict[str, list[Curve]]] = {}
    for curve in curves:
        by_method.setdefault(curve.method, {}).setdefault(curve.setting, []).append(curve)

    def merit(runs: list[Curve]) -> tuple[float, ...]:
        loss = statistics.median(run.final_loss for run in runs)
        if task.success is None and not task.floor:
            return (loss,)
        solved = [run.reaches("losses", task.floor) if task.success is None else _solved(run, task.success) for run in runs]
        times = [seconds for seconds, _ in solved]
        return -sum(map(np.isfinite, times)), statistics.median(times), loss

    best = {}
    for method, settings in by_method.items():
        most = max(map(len, settings.values()))
        best[method] = min((runs for runs in settings.values() if len(runs) == most), key=merit)
    return best


def goals(task: Task, best: dict[str, list[Curve]]) -> dict[int, float]:
    """For each seed the training loss to reach: the least final one of the first-order methods, or the task's floor.

    A thousandth more counts as reached.
    """
    found: dict[int, float] = {}
    for method in FIRST:
        for run in best.get(method, []):
            found[run.seed] = min(found.get(run.seed, float("inf")), run.final_loss)
    return {seed: max(CLOSE * goal, task.floor) for seed, goal in found.items()}


def reached(task: Task, best: dict[str, list[Curve]]) -> dict[str, list[tuple[float, float]]]:
    """For each method and seed, seconds and iterations to success or to the goal of that seed; infinite if never."""
    if task.success is not None:
        return {method: [_solved(run, task.success) for run in runs] for method, runs in best.items()}
    goal = goals(task, best)
    return {
        method: [run.reaches("losses", goal.get(run.seed, float("-inf"))) for run in runs] for method, runs in best.items()
    }


def _solved(run: Curve, success: float) -> tuple[float, float]:
    return run.reaches("errors", np.nextafter(success, 0))


def _spread(values: Sequence[float], form: str) -> str:
    """Median and, in brackets, the least and the most."""
    shown = [format(value, form) if np.isfinite(value) else "-" for value in (_median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} .. {shown[2]})" if len(values) > 1 else shown[0]


def _median(values: Sequence[float]) -> float:
    return statistics.median_high(values) if not all(map(np.isfinite, values)) else statistics.median(values)


def table(task: Task, best: dict[str, list[Curve]]) -> str:
    """A line for each method: medians over seeds, and in brackets the least and the most."""
    goal = "success" if task.success is not None else "target"
    header = ["method", "best setting", "reached", f"seconds to {goal}", f"iterations to {goal}"]
    header += ["steps / s", "final training loss", task.metric_name, "compile s"]
    rows = [header]
    times = reached(task, best)
    for method, runs in best.items():
        seconds, iterations = ([pair[k] for pair in times[method]] for k in (0, 1))
        rows.append(
            [
                method,
                runs[0].setting,
                f"{sum(map(np.isfinite, seconds))} of {len(runs)}",
                _spread(seconds, ".3g"),
                _spread(iterations, ".0f"),
                f"{statistics.median(run.iterations[-1] / max(run.seconds[-1], 1e-9) for run in runs):.0f}",
                _spread([run.final_loss for run in runs], ".3g"),
                _spread([run.final_error for run in runs], ".3g"),
                f"{statistics.median(run.compile_seconds for run in runs):.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if task.success is None and (losses := list(goals(task, best).values())):
        floor = f" or {task.floor:g} if that is more," if task.floor else ""
        lines.append(f"target: training loss {_spread(losses, '.3g')}, the best first-order final one,{floor} seed by seed")
    for method, runs in best.items():
        if ended := [run for run in runs if run.diverged is not None]:
            first, least = min(run.diverged or 0.0 for run in ended), _spread([min(run.losses) for run in ended], ".3g")
            lines.append(f"{method}: loss not finite in {len(ended)} of {len(runs)} after {first:.3g} s; least {least}")
    return "\n".join(lines)


def verdicts(task: Task, best: dict[str, list[Curve]]) -> list[str]:
    """How each other method compares with the best of Adam and NAG, and of those and L-BFGS; medians of ratios by seed."""
    lines = []
    times = reached(task, best)
    for name, group in (("Adam and NAG", RATED), ("Adam, NAG and L-BFGS", FIRST)):
        present = [method for method in group if method in best]
        if not present or (group == FIRST and "lbfgs" not in best):
            continue
        fastest = min(present, key=lambda method: _median([pair[0] for pair in times[method]]))
        lowest = min(present, key=lambda method: statistics.median(run.final_error for run in best[method]))
        for method, runs in best.items():
            if method in FIRST:
                continue
            ratios = [_ratios(times[method], times[fastest], k) for k in (0, 1)]
            errors = _ratio(runs, best[lowest], lambda run: run.final_error)
            line = f"{method} / best of {name}: time {ratios[0]}, iterations {ratios[1]} ({fastest})"
            lines.append(line if task.success is not None else f"{line}, final test error {errors:.3g} ({lowest})")
    return lines + [same_loss(method, best[method], best[PEER]) for method in OURS if {method, PEER} <= set(best)]


def same_loss(name: str, ours: list[Curve], theirs: list[Curve]) -> str:
    """How the times to a loss that both reach compare, seed by seed: the higher one of the two least losses."""
    other = {run.seed: run for run in theirs}
    ratios, ends = [], []
    for run in ours:
        if run.seed in other:
            least = [min(each.losses) for each in (run, other[run.seed])]
            times = [each.reaches("losses", CLOSE * max(least))[0] for each in (run, other[run.seed])]
            ratios.append(times[0] / times[1] if times[1] else float("nan"))
            ends.append((least[0] > CLOSE * least[1]) - (least[1] > CLOSE * least[0]))
    lower, higher = ends.count(-1), ends.count(1)
    return (
        f"{name} / {PEER}: time to a loss that both reach {np.nanmedian(ratios):.3g}, slower in "
        f"{sum(ratio > 1 for ratio in ratios)} of {len(ratios)} seeds; least loss lower in {lower}, higher in {higher}"
    )


def _ratios(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], place: int) -> str:
    """The ratio of medians, in words where one of them is infinite."""
    a, b = (_median([pair[place] for pair in pairs]) for pairs in (ours, theirs))
    if not np.isfinite(a):
        return "not reached"
    return f"{a / b:.3g}" if np.isfinite(b) and b > 0 else "reached by it alone"


def _ratio(ours: list[Curve], theirs: list[Curve], value: Callable[[Curve], float]) -> float:
    other = {run.seed: value(run) for run in theirs}
    pairs = [(value(run), other[run.seed]) for run in ours if run.seed in other]
    return statistics.median(a / b if b > 0 else float("inf") if a > 0 else 1.0 for a, b in pairs) if pairs else float("nan")


def draw(task: Task, best: dict[str, list[Curve]], path: str | pathlib.Path) -> None:
    """Training loss and test error against time on the clock: the median over seeds, and a band from least to most."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    longest = max(run.seconds[-1] for runs in best.values() for run in runs)
    first = min((s for runs in best.values() for run in runs for s in run.seconds[1:2]), default=longest / 1000)
    grid = np.geomspace(min(first, longest / 2), longest, 300)
    for axis, values, label in zip(axes, ("losses", "errors"), ("training loss", task.metric_name), strict=True):
        for method, runs in best.items():
            sampled = np.array([_at(grid, run.seconds, getattr(run, values)) for run in runs])
            colour, line = STYLES[method]
            axis.plot(grid, np.median(sampled, axis=0), line, color=colour, label=method)
            axis.fill_between(grid, sampled.min(axis=0), sampled.max(axis=0), color=colour, alpha=0.15, linewidth=0)
        if task.success is not None and values == "errors":
            axis.axhline(task.success, color="#666666", linewidth=0.8)
            axis.annotate("solved below", (grid[0], task.success), xytext=(2, 3), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="seconds, without compiling", ylabel=label)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False)
    seeds = max(map(len, best.values()))
    figure.suptitle(f"{task.what}\nmedian and range over {seeds} seed{'s' if seeds > 1 else ''}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _at(grid: np.ndarray, seconds: Sequence[float], values: Sequence[float]) -> np.ndarray:
    """The last value known at each time of the grid."""
    places = np.searchsorted(seconds, grid, side="right") - 1
    return np.array(values)[np.maximum(places, 0)]
