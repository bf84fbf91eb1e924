"""The second-order methods on a task: those of `jaxhess.optimizers`, and kfac-jax in an environment of its own."""

import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from curves import EVALUATIONS, GROWTH, Curve, record
from task import Array, PyTree, Task

from jaxhess import optimizers

__all__ = ["SECOND_ORDER", "SecondOrder", "run_kfac"]

SECOND_ORDER: dict[str, Callable[[], Any]] = {
    "gauss_newton": optimizers.gauss_newton,
    "newton": optimizers.newton,
    "kronecker_newton": optimizers.kronecker_newton,
}
CALL_SECONDS = 0.01  # as first-order methods do, small networks take several steps in one call
LARGE = 10**6  # parameters; of larger networks kfac-jax keeps fewer states on the way


class SecondOrder:
    """A method of `jaxhess.optimizers` with its defaults, compiled once for all seeds."""

    def __init__(self, task: Task, method: str) -> None:
        self.task, self.method = task, method
        self._optimizer = SECOND_ORDER[method]()
        step = optimizers.step((task.model, task.loss), self._optimizer)

        @jax.jit
        def steps(carry: Any, batches: tuple[Array, ...], count: Array) -> Any:
            def one(number: Array, carry: Any) -> Any:
                params, state, _ = step(*carry, *(a[number % len(a)] for a in batches))
                return params, state

            return jax.lax.fori_loop(0, count, one, carry)

        self._steps = steps

    def run(
        self, seed: int, params: PyTree, data: tuple[Array, Array], evaluate: Callable[..., Any], budget: float
    ) -> Curve:
        """Train from these parameters for `budget` seconds; `evaluate(params)` gives training loss and test error."""
        batch = self.task.curvature_batch
        stream = _batches(data, batch, seed)
        start = time.perf_counter()
        carry = jax.tree.map(jnp.copy, params), self._optimizer.init(params)
        seconds = self._step_seconds(carry, next(stream))  # which compiles as well
        count = int(np.clip(CALL_SECONDS / seconds, 1, 1000)) if batch is None else 1
        compile_seconds = time.perf_counter() - start

        def advance(carry: Any, share: float) -> tuple[Any, int]:
            del share
            return self._steps(carry, next(stream), count), count

        name = self.method, "all examples" if batch is None else f"batch {batch}", seed
        return record(advance, lambda carry: carry[0], carry, evaluate, budget, self.task.success, name, compile_seconds)

    def _step_seconds(self, carry: Any, batches: tuple[Array, ...]) -> float:
        """The time of a step, after compiling; the state that was given is left alone."""
        jax.block_until_ready(self._steps(carry, batches, 1))
        start = time.perf_counter()
        jax.block_until_ready(self._steps(carry, batches, 2))
        return (time.perf_counter() - start) / 2


def _batches(data: tuple[Array, Array], batch: int | None, seed: int) -> Iterator[tuple[Array, ...]]:
    rng = np.random.default_rng(seed)
    while True:
        if batch is None:
            yield tuple(a[None] for a in data)
            continue
        order = rng.permutation(len(data[0]))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = jnp.asarray(order[start : start + batch])
            yield tuple(a[chosen][None] for a in data)


def run_kfac(python: str, task: Task, seed: int, params: PyTree, evaluate: Callable[..., Any], budget: float) -> Curve:
    """kfac-jax by `kfac_peer.py`, with the Python at this path, from these parameters (of `initial_dense`).

    Its states on the way are evaluated here. Raises `RuntimeError` with its last words if it fails.
    """
    xs, ts = task.train if task.kfac_train is None else task.kfac_train
    large = sum(np.size(leaf) for leaf in jax.tree.leaves(params)) > LARGE
    given = {f"{name}{k}": np.asarray(layer[name]) for k, layer in enumerate(params) for name in ("w", "b")}
    settings = {
        "linear": np.array(task.linear, int),
        "softmax": task.kfac == "softmax",
        "decay": task.decay,
        "batch": task.curvature_batch or 0,
        "budget": budget,
        "evaluations": EVALUATIONS // 10 if large else EVALUATIONS,
        "growth": 10 * GROWTH if large else GROWTH,
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as folder:
        files = [str(pathlib.Path(folder) / name) for name in ("given.npz", "found.npz")]
        np.savez(files[0], xs=xs, ts=ts, **given, **settings)
        script = pathlib.Path(__file__).with_name("kfac_peer.py")
        # Importing jaxhess may have added an option that other versions of jaxlib refuse.
        flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "ynn_fusion_type" not in flag]
        environment = os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": ""}
        done = subprocess.run([python, str(script), *files], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(f"kfac-jax failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
        found = dict(np.load(files[1]))
    states = [
        [{name: jnp.asarray(found[f"{name}{k}"][i]) for name in ("w", "b")} for k in range(len(params))]
        for i in range(len(found["seconds"]))
    ]
    values = np.array([evaluate(state) for state in states], float)
    values = np.where(np.isfinite(values), values, np.inf)
    batch = "all examples" if task.curvature_batch is None else f"batch {task.curvature_batch}"
    return Curve(
        "kfac_jax",
        batch,
        seed,
        float(found["compile_seconds"]),
        found["seconds"].tolist(),
        found["iterations"].tolist(),
        *values.T.tolist(),
    )
