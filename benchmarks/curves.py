"""One run of a training method against the clock: what is recorded, and when a goal was reached.

The clock runs while a method takes steps, and stands while the loss and the test error are evaluated. What a method needs
before its first step (compiling, a first run on a copy) is not on it, and is reported apart.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from task import Array, PyTree, Task, mean_loss

__all__ = ["Curve", "evaluator", "record"]

EVALUATIONS = 400  # the first are a share of 1/400 of the budget apart
GROWTH = 0.02  # later ones 2 % of the time that has passed


@dataclasses.dataclass(frozen=True)
class Curve:
    """Loss and test error over a run.

    Attributes:
        method: as on the command line.
        setting: what was chosen for it, such as rate and batch; methods with several settings are judged by the best.
        seed: of data and initial parameters.
        compile_seconds: spent before the clock began.
        seconds: on the clock, increasing; the first entry is 0.
        iterations: steps taken, for each entry of `seconds`.
        losses: mean training loss; infinite where it is not a number.
        errors: the task's metric.
        message: why the run ended early, if it failed.
    """

    method: str
    setting: str
    seed: int
    compile_seconds: float
    seconds: list[float]
    iterations: list[int]
    losses: list[float]
    errors: list[float]
    message: str = ""

    @property
    def final_loss(self) -> float:
        return self.losses[-1]

    @property
    def final_error(self) -> float:
        return self.errors[-1]

    @property
    def diverged(self) -> float | None:
        """Seconds after which the loss was not finite to the end, or None."""
        if np.isfinite(self.final_loss):
            return None
        finite = [seconds for seconds, loss in zip(self.seconds, self.losses, strict=True) if np.isfinite(loss)]
        return max(finite, default=0.0)

    def reaches(self, values: str, goal: float) -> tuple[float, float]:
        """Seconds and iterations until "losses" or "errors" are at or below the goal; infinite if they never are."""
        for seconds, iterations, value in zip(self.seconds, self.iterations, getattr(self, values), strict=True):
            if value <= goal:
                return seconds, float(iterations)
        return float("inf"), float("inf")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def evaluator(task: Task) -> Callable[..., tuple[Array, Array]]:
    """A compiled function of `(params, train, test)`: mean training loss and test error."""
    objective = mean_loss(task)

    @jax.jit
    def evaluate(params: PyTree, train: tuple[Array, Array], test: tuple[Array, Array]) -> tuple[Array, Array]:
        xs, ts = (a[: task.evaluated] for a in train)
        return objective(params, xs, ts), task.metric(params, *test)

    return evaluate


def record(
    advance: Callable[[Any, float], tuple[Any, int]],
    params_of: Callable[[Any], PyTree],
    state: Any,
    evaluate: Callable[[PyTree], tuple[Array, Array]],
    budget: float,
    success: float | None,
    name: tuple[str, str, int],
    compile_seconds: float,
) -> Curve:
    """Take steps until the budget is spent, the test error is below `success`, or the loss is not finite.

    Args:
        advance: maps a state and the share of the budget that is spent to the next state and the steps that it took.
        params_of: the parameters in a state.
        state: before the first step.
        evaluate: maps parameters to training loss and test error.
        budget: seconds on the clock.
        success: a test error, or None.
        name: method, setting and seed.
        compile_seconds: for the record.
    """
    elapsed, steps, due, message = 0.0, 0, 0.0, ""
    points: list[tuple[float, int, float, float]] = []

    def look() -> bool:
        loss, error = (float(value) for value in evaluate(params_of(state)))
        finite = np.isfinite(loss)
        points.append((elapsed, steps, loss if finite else float("inf"), error if finite else float("inf")))
        return success is not None and points[-1][3] < success

    done = look()
    while not done and elapsed < budget:
        start = time.perf_counter()
        try:
            state, taken = advance(state, elapsed / budget)
            jax.block_until_ready(params_of(state))
        except (RuntimeError, ArithmeticError) as error:
            message = f"{type(error).__name__}: {error}"
            break
        elapsed += time.perf_counter() - start
        steps += taken
        if elapsed >= due:
            done = look()
            if np.isinf(points[-1][2]):
                message = "the loss is not finite"
                break
            due = elapsed + max(budget / EVALUATIONS, GROWTH * elapsed)
    if points[-1][1] < steps:
        look()
    seconds, iterations, losses, errors = (list(column) for column in zip(*points, strict=True))
    return Curve(*name, compile_seconds, seconds, iterations, losses, errors, message)
