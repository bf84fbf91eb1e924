"""What users train with today: Adam, Nesterov's momentum and L-BFGS, by optax, as fast as they can be made to run.

Many steps are one compiled loop, so that calling from Python does not count against them, and the indices of minibatches
are drawn off the clock. Adam and NAG decay their learning rate by a cosine over the budget of time: the rate of a step
follows the time that has passed, not an estimate of how many steps there will be.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from curves import EVALUATIONS, Curve, record
from task import Array, PyTree, Task, mean_loss

__all__ = ["FIRST_ORDER", "RATES", "FirstOrder", "settings"]

RATES = (1e-3, 3e-3, 1e-2)
TABLE = 1000  # minibatches that are drawn at once, and the most steps in one compiled loop

# As optax.adam and optax.sgd(momentum=0.9, nesterov=True) before they multiply by the rate.
DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "nag": lambda: optax.trace(decay=0.9, nesterov=True),
}
FIRST_ORDER = ("adam", "nag", "lbfgs")


def settings(task: Task, method: str) -> list[tuple[float, int | None]]:
    """The pairs of learning rate and batch size that are tried; L-BFGS chooses its rate and takes all examples."""
    if method == "lbfgs":
        return [(1.0, None)]
    return [(rate, batch) for batch in task.batches for rate in RATES]


class FirstOrder:
    """A method with a batch size, compiled once for all rates and seeds."""

    def __init__(self, task: Task, method: str, batch: int | None) -> None:
        self.task, self.method, self.batch = task, method, batch
        objective = mean_loss(task)
        if method == "lbfgs":
            optimizer = optax.lbfgs()
            step = _line_search_step(objective, optimizer)
        else:
            optimizer = DIRECTIONS[method]()
            step = _step(objective, optimizer)
        self._init = optimizer.init

        @jax.jit
        def steps(carry: Any, data: tuple[Array, Array], table: Array, count: int, rate: float, progress: Array) -> Any:
            def one(i: Array, carry: Any) -> Any:
                xs, ts = data if batch is None else tuple(a[table[i]] for a in data)
                share = jnp.minimum(progress[0] + i * progress[1], 1.0)
                return step(carry, xs, ts, rate * 0.5 * (1 + jnp.cos(jnp.pi * share)))

            return jax.lax.fori_loop(0, count, one, carry)

        self._steps = steps

    def run(
        self, rate: float, seed: int, params: PyTree, data: tuple[Array, Array], evaluate: Callable[..., Any], budget: float
    ) -> Curve:
        """Train from these parameters for `budget` seconds; `evaluate(params)` gives training loss and test error."""
        tables = _minibatches(len(data[0]), self.batch, seed)
        start = time.perf_counter()
        carry = jax.jit(lambda params: (params, self._init(params)))(params)
        step_seconds = self._step_seconds(carry, data, next(tables), rate)
        compile_seconds = time.perf_counter() - start
        count = int(np.clip(budget / EVALUATIONS / step_seconds, 1, TABLE))
        drawn = [next(tables)]

        def advance(state: Any, share: float) -> tuple[Any, int]:
            progress = np.array([share, step_seconds / budget], np.float32)
            return self._steps(state, data, drawn[0], count, rate, progress), count

        def evaluated(params: PyTree) -> Any:
            drawn[0] = next(tables)
            return evaluate(params)

        batch = "all examples" if self.batch is None else f"batch {self.batch}"
        name = (self.method, batch if self.method == "lbfgs" else f"rate {rate:g}, {batch}", seed)
        return record(advance, lambda state: state[0], carry, evaluated, budget, self.task.success, name, compile_seconds)

    def _step_seconds(self, carry: Any, data: tuple[Array, Array], table: Array, rate: float) -> float:
        """The time of a step, after compiling; the state that was given is left alone."""
        still = np.zeros(2, np.float32)
        for _ in range(2):  # the state that comes out may have other (weak) types than the first
            carry = jax.block_until_ready(self._steps(carry, data, table, 1, rate, still))
        count, seconds = 1, 0.0
        while seconds < 0.05 and count < TABLE:
            count = min(4 * count, TABLE)
            start = time.perf_counter()
            jax.block_until_ready(self._steps(carry, data, table, count, rate, still))
            seconds = time.perf_counter() - start
        return seconds / count


def _step(objective: Callable[..., Array], optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def step(carry: Any, xs: Array, ts: Array, rate: Array) -> Any:
        params, state = carry
        direction, state = optimizer.update(jax.grad(objective)(params, xs, ts), state, params)
        return jax.tree.map(lambda p, d: (p - rate * d).astype(p.dtype), params, direction), state

    return step


def _line_search_step(
    objective: Callable[..., Array], optimizer: optax.GradientTransformationExtraArgs
) -> Callable[..., Any]:
    def step(carry: Any, xs: Array, ts: Array, rate: Array) -> Any:
        del rate
        params, state = carry

        def value_fn(params: PyTree) -> Array:
            return objective(params, xs, ts)

        value, gradient = optax.value_and_grad_from_state(value_fn)(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return step


def _minibatches(examples: int, batch: int | None, seed: int) -> Iterator[Array]:
    """Tables (TABLE, batch) of indices: every example once before one comes again."""
    rng = np.random.default_rng(seed)
    size = 1 if batch is None else batch
    left = np.zeros(0, np.int32)
    while True:
        if batch is not None:
            while left.size < TABLE * size:
                left = np.concatenate([left, rng.permutation(examples).astype(np.int32)])
            table, left = left[: TABLE * size], left[TABLE * size :]
        else:
            table = np.zeros(TABLE, np.int32)
        yield jnp.asarray(table.reshape(TABLE, size))
