"""Training on tasks: the optimizers of jaxhess against Adam, NAG, L-BFGS (optax) and, where it can, kfac-jax.

    python benchmarks/training.py franke                                  # one task
    python benchmarks/training.py all                                     # all but the long one
    python benchmarks/training.py pinn --seeds 1 --budget 10 --methods adam,gauss_newton
    python benchmarks/training.py franke --kfac PATH/TO/bin/python --out franke.json --plot franke.png
    python benchmarks/training.py diabetes --seeds 40 --grid-seeds 1      # many minima: many starts
    python benchmarks/training.py fashion_autoencoder --seeds 1 --budget 1200 --fashion DIRECTORY

It prints a table and draws the curves, to TASK.png.

kfac-jax 0.0.8 wants an environment of its own: pip install jax==0.7.2 jaxlib==0.7.2 kfac-jax==0.0.8. Fashion-MNIST is
Debian's package dataset-fashion-mnist: apt-get install dataset-fashion-mnist; or, without being root, apt-get download
dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIRECTORY, and give
--fashion DIRECTORY/usr/share/datasets/fashion-mnist.

Rules. All methods of a seed start from the same parameters, run one after the other on the same machine, and have the same
time on the clock. The clock stands while things compile and while loss and test error are evaluated. Adam and NAG
(momentum 0.9) are tried with learning rates 1e-3, 3e-3 and 1e-2, each decaying by a cosine over the budget, and with all
examples or minibatches where that is usual; the setting with the least final training loss, in the median over seeds, is
reported. The methods of jaxhess and kfac-jax have no setting. The target is the best first-order method's final training
loss, but not below a task's floor, which softmax passes on its way to zero. A task that is solved or not counts the time
until it is, and a run of it ends there. Where there is such a goal, the best setting is the fastest to it.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import summary
from curves import Curve, evaluator
from first_order import FIRST_ORDER, FirstOrder, settings
from second_order import SECOND_ORDER, SecondOrder, run_kfac
from tasks import FASHION, LONG, TASKS, Task, make

KFAC = "kfac_jax"
METHODS = (*FIRST_ORDER, *SECOND_ORDER, KFAC)
Run = Callable[..., Curve]


def runs_of(task: Task, methods: list[str], kfac: str | None) -> dict[tuple[str, int], Run]:
    """For each method and number of its setting a function `(seed, task, params, data, evaluate, budget)` -> a curve."""
    found: dict[tuple[str, int], Run] = {}
    for method in methods:
        if method in FIRST_ORDER:
            tried = settings(task, method)
            compiled = {batch: FirstOrder(task, method, batch) for batch in dict.fromkeys(batch for _, batch in tried)}
            for number, (rate, batch) in enumerate(tried):
                found[method, number] = _first_order_run(compiled[batch], rate)
        elif method in SECOND_ORDER:
            found[method, 0] = _second_order_run(SecondOrder(task, method))
        elif kfac is not None and task.kfac is not None:
            found[method, 0] = _kfac_run(kfac)
    return found


def _first_order_run(method: FirstOrder, rate: float) -> Run:
    return lambda seed, task, params, data, evaluate, budget: method.run(rate, seed, params, data, evaluate, budget)


def _second_order_run(method: SecondOrder) -> Run:
    return lambda seed, task, params, data, evaluate, budget: method.run(seed, params, data, evaluate, budget)


def _kfac_run(python: str) -> Run:
    return lambda seed, task, params, data, evaluate, budget: run_kfac(python, task, seed, params, evaluate, budget)


def curves_of(name: str, options: argparse.Namespace, methods: list[str]) -> Iterator[Curve]:
    """Every method with every setting for one seed, then for the next; later seeds may skip settings that lost."""
    first = make(name, 0, options.fashion)
    runs = runs_of(first, methods, options.kfac)
    evaluate = evaluator(first)
    budget = options.budget or first.budget
    done: dict[tuple[str, int], list[Curve]] = {}
    failed: set[str] = set()
    for seed in range(options.seeds):
        task = make(name, seed, options.fashion)
        data, test = (tuple(map(jnp.asarray, arrays)) for arrays in (task.train, task.test))
        params = task.init(jax.random.key(seed))
        if seed == options.grid_seeds:
            runs = {key: run for key, run in runs.items() if key in _best_keys(task, done)}
        for (method, number), run in runs.items():
            if method in failed:
                continue
            try:
                curve = run(seed, task, params, data, partial(evaluate, train=data, test=test), budget)
            except (ValueError, RuntimeError, ArithmeticError) as error:
                print(f"seed {seed}  {method}: not run. {type(error).__name__}: {error}", flush=True)
                failed.add(method)
                continue
            done.setdefault((method, number), []).append(curve)
            print(
                f"seed {seed}  {method:16} {curve.setting:24}  {curve.iterations[-1]:8} steps in {curve.seconds[-1]:6.1f} s"
                f"  loss {curve.final_loss:.3e}  test {curve.final_error:.3e}  {curve.message[:120]}",
                flush=True,
            )
            yield curve


def _best_keys(task: Task, done: dict[tuple[str, int], list[Curve]]) -> set[tuple[str, int]]:
    best = summary.best_settings(task, [curve for curves in done.values() for curve in curves])
    return {key for key, curves in done.items() if curves[0].setting == best[key[0]][0].setting}


def run_task(name: str, options: argparse.Namespace) -> None:
    """One task: progress, table, comparison, and the files that were asked for."""
    task = make(name, 0, options.fashion)
    methods = [method for method in METHODS if options.methods is None or method in options.methods]
    budget = options.budget or task.budget
    print(f"{name}: {task.what}\n{budget:g} s each, {options.seeds} seeds, {task.dtype}, {_machine()}", flush=True)
    if KFAC in methods and (options.kfac is None or task.kfac is None):
        print(f"{KFAC}: not run, {'--kfac names no Python' if task.kfac else 'its restrictions exclude the task'}")
    curves = list(curves_of(name, options, methods))
    if not curves:
        return
    best = summary.best_settings(task, curves)
    print(f"\n{summary.table(task, best)}\n")
    print("\n".join(summary.verdicts(task, best)), flush=True)
    if options.out:
        results: dict[str, Any] = {"task": name, "what": task.what, "budget": budget, "machine": _machine()}
        results["curves"] = [curve.as_dict() for curve in curves]
        pathlib.Path(options.out).write_text(json.dumps(results))
    picture = options.plot or f"{name}.png"
    summary.draw(task, best, picture)
    print(f"curves: {picture}")


def _machine() -> str:
    return f"{jax.default_backend()} ({platform.machine()}, {os.cpu_count()} cores), jax {jax.__version__}"


def run_all(options: argparse.Namespace, arguments: list[str]) -> int:
    """Each task in a process of its own; the name of the task goes before the ending of the files."""
    worst = 0
    for name in TASKS:
        if name in LONG:
            continue
        given = [name, *arguments]
        for option in ("out", "plot"):
            if path := getattr(options, option):
                path = pathlib.Path(path)
                given += [f"--{option}", str(path.with_name(f"{path.stem}_{name}{path.suffix}"))]
        worst = max(worst, subprocess.run([sys.executable, __file__, *given]).returncode)
        print(flush=True)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "all"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--grid-seeds", type=int, default=None, help="seeds with all settings; later ones with the best only"
    )
    parser.add_argument("--budget", type=float, default=None, help="seconds for each method; the task's own by default")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=None, help=",".join(METHODS))
    parser.add_argument("--kfac", default=None, help="a Python that has kfac-jax")
    parser.add_argument("--fashion", default=FASHION, help="the folder of Fashion-MNIST")
    parser.add_argument("--out", default=None, help="a JSON file for all curves")
    parser.add_argument("--plot", default=None, help="the picture of the curves; TASK.png by default")
    options = parser.parse_args()
    if unknown := set(options.methods or ()) - set(METHODS):
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if options.task != "all":
        try:
            run_task(options.task, options)
        except FileNotFoundError as missing:
            print(missing, file=sys.stderr)
            return 1
        return 0
    passed = {"seeds": options.seeds, "grid-seeds": options.grid_seeds, "budget": options.budget, "kfac": options.kfac}
    passed |= {"methods": ",".join(options.methods) if options.methods else None}
    return run_all(options, [text for key, value in passed.items() if value for text in (f"--{key}", str(value))])


if __name__ == "__main__":
    sys.exit(main())
