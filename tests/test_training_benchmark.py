"""What benchmarks/training.py says of curves: best settings, goals, times to them; and that it runs from end to end."""

import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
INF = float("inf")


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("task", "curves", "summary")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = {name: importlib.import_module(name) for name in names}
    yield types.SimpleNamespace(**found)
    for name in names:
        sys.modules.pop(name, None)


def task(success=None, floor=0.0):
    return types.SimpleNamespace(success=success, floor=floor, metric_name="error", what="made up")


@pytest.fixture
def curve(modules):
    def made(method, setting, seed, losses, errors=None, step=1.0):
        seconds = [step * k for k in range(len(losses))]
        iterations = [10 * k for k in range(len(losses))]
        return modules.curves.Curve(method, setting, seed, 0.5, seconds, iterations, losses, errors or losses)

    return made


def test_the_goal_is_the_best_first_order_loss_of_each_seed(modules, curve):
    curves = [
        curve("adam", "rate 0.01", 0, [1.0, 0.5, 0.2]),
        curve("adam", "rate 0.01", 1, [1.0, 0.6, 0.4]),
        curve("adam", "rate 0.001", 0, [1.0, 0.9, 0.1]),  # better for one seed, worse in the median
        curve("adam", "rate 0.001", 1, [1.0, 0.9, 0.8]),
        curve("lbfgs", "all examples", 0, [1.0, 0.5, 0.3]),
        curve("lbfgs", "all examples", 1, [1.0, 0.5, 0.3]),
        curve("gauss_newton", "all examples", 0, [1.0, 0.2, 0.1, 0.01], step=0.25),
        curve("gauss_newton", "all examples", 1, [1.0, 0.9, 0.9, 0.9], step=0.25),
    ]
    best = modules.summary.best_settings(task(), curves)
    assert [run.setting for run in best["adam"]] == ["rate 0.01"] * 2
    assert modules.summary.goals(task(), best) == pytest.approx({0: 0.2002, 1: 0.3003})
    times = modules.summary.reached(task(), best)
    assert times["adam"] == [(2.0, 20.0), (INF, INF)]
    assert times["gauss_newton"] == [(0.25, 10.0), (INF, INF)]
    table = modules.summary.table(task(), best)
    assert "1 of 2" in table
    assert "- (0.25 .. -)" in table
    against = {line.split(":")[0]: line for line in modules.summary.verdicts(task(), best)}
    assert "not reached" in against["gauss_newton / best of Adam and NAG"]


def test_a_setting_of_the_first_seed_only_is_left_out(modules, curve):
    curves = [curve("adam", "a", 0, [1.0, 0.1]), curve("adam", "b", 0, [1.0, 0.2]), curve("adam", "b", 1, [1.0, 0.2])]
    assert {run.setting for run in modules.summary.best_settings(task(), curves)["adam"]} == {"b"}


def test_the_best_setting_of_a_task_with_a_floor_is_the_first_to_be_there(modules, curve):
    curves = [curve("adam", "fast", 0, [1.0, 0.09, 0.08]), curve("adam", "slow", 0, [1.0, 0.5, 0.001])]
    assert modules.summary.best_settings(task(floor=0.1), curves)["adam"][0].setting == "fast"
    assert modules.summary.best_settings(task(), curves)["adam"][0].setting == "slow"
    assert modules.summary.goals(task(floor=0.1), {"adam": curves[1:]}) == {0: 0.1}


def test_a_task_that_is_solved_counts_the_time_until_it_is(modules, curve):
    curves = [curve("adam", "a", k, [1.0, 1.0, 1.0], errors=[0.5, 0.1, 0.009]) for k in range(2)]
    curves += [curve("gauss_newton", "a", k, [1.0, 1.0], errors=[0.5, 0.009], step=0.5) for k in range(2)]
    solved = task(success=0.01)
    best = modules.summary.best_settings(solved, curves)
    assert modules.summary.reached(solved, best)["gauss_newton"] == [(0.5, 10.0)] * 2
    (line,) = modules.summary.verdicts(solved, best)
    assert line == "gauss_newton / best of Adam and NAG: time 0.25, iterations 0.5 (adam)"
    exactly = curve("adam", "a", 0, [1.0], errors=[0.01])  # solved is below
    assert modules.summary.reached(solved, {"adam": [exactly]})["adam"] == [(INF, INF)]


def test_kfac_jax_is_compared_at_a_loss_that_both_reach(modules, curve):
    ours = [curve("kronecker_newton", "a", 0, [1.0, 0.4, 0.1]), curve("kronecker_newton", "a", 1, [1.0, 0.5, 0.5])]
    theirs = [curve("kfac_jax", "a", 0, [1.0, 0.9, 0.3, INF]), curve("kfac_jax", "a", 1, [1.0, 0.4, 0.2])]
    adam = [curve("adam", "a", k, [1.0, 0.9]) for k in range(2)]
    line = modules.summary.verdicts(task(), {"adam": adam, "kronecker_newton": ours, "kfac_jax": theirs})[-1]
    # to 0.3 after 2 s each, to 0.5 after 1 s each
    assert "both reach 1, slower in 0 of 2 seeds; least loss lower in 1, higher in 1" in line


def test_the_record_of_a_run(modules, monkeypatch):
    seconds = itertools.count()
    monkeypatch.setattr(modules.curves.time, "perf_counter", lambda: float(next(seconds)))

    def evaluate(x):
        return (np.nan if x > 6 else 1 / (1 + x)), 2.0**-x

    def run(budget, success):
        name = ("adam", "a", 0)
        return modules.curves.record(lambda x, share: (x + 1, 3), lambda x: x, 0, evaluate, budget, success, name, 0.0)

    solved = run(100.0, 0.2)
    assert (solved.seconds, solved.iterations) == ([0, 1, 2, 3], [0, 3, 6, 9])
    assert (solved.errors[-1], solved.losses[-1], solved.message) == (0.125, 0.25, "")
    assert run(2.0, 0.2).seconds == [0, 1, 2]  # the budget is spent
    lost = run(100.0, 1e-9)
    assert (lost.losses[-1], lost.message) == (INF, "the loss is not finite")
    assert lost.diverged == 6


@pytest.mark.slow
def test_a_task_from_end_to_end(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training.py"), "diabetes", "--seeds", "1", "--budget", "0.2"]
    command += ["--methods", "adam,gauss_newton", "--out", "found.json"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_ENABLE_X64"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert "gauss_newton / best of Adam and NAG: time" in done.stdout
    assert (tmp_path / "diabetes.png").read_bytes().startswith(b"\x89PNG")
    curves = json.loads((tmp_path / "found.json").read_text())["curves"]
    assert {curve["method"] for curve in curves} == {"adam", "gauss_newton"}
    for curve in curves:
        assert curve["losses"][-1] < 0.7 * curve["losses"][0]


@pytest.mark.slow
def test_missing_data_says_how_to_get_it(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "training.py"), "fashion_autoencoder", "--fashion", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "dataset-fashion-mnist" in done.stderr
    assert "--fashion" in done.stderr
