"""The tasks of the training benchmark by name.

    from tasks import make
    task = make("franke", seed=0)
    params = task.init(jax.random.key(0))
    train_step = optimizers.step((task.model, task.loss), optimizer)

`make` switches JAX to float64 or back, as the task wants it: call it before arrays are made.
"""

import jax
import numpy as np
from dense_tasks import (
    FASHION,
    diabetes,
    digits_autoencoder,
    digits_classifier,
    fashion_autoencoder,
    franke,
    pinn,
    spirals,
)
from recurrent_tasks import adding, digits_rows, memorization
from task import Task, mean_loss

__all__ = ["FASHION", "LONG", "TASKS", "Task", "make", "mean_loss"]

TASKS = {
    task.__name__: task
    for task in (
        franke,
        pinn,
        diabetes,
        digits_autoencoder,
        adding,
        memorization,
        digits_rows,
        spirals,
        digits_classifier,
        fashion_autoencoder,
    )
}
LONG = ("fashion_autoencoder",)


def make(name: str, seed: int = 0, fashion: str = FASHION) -> Task:
    """The task of this name with the data of this seed; `fashion` is the folder of Fashion-MNIST.

    The functions of a task are the same objects for every seed, so that what is compiled for one serves all.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}, but {', '.join(TASKS)}")
    task = fashion_autoencoder(seed, fashion) if name == fashion_autoencoder.__name__ else TASKS[name](seed)
    jax.config.update("jax_enable_x64", task.dtype == np.dtype(np.float64))
    return task
