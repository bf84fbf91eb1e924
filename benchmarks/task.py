"""What the training benchmark needs to know of a task, and the networks and errors that tasks share.

All networks take one example or a batch of them (leading axes), so that the same function is `model` of a second-order
method, which wants one example, and part of the mean loss of a first-order method, which wants the batch. Weights are
(outputs, inputs), drawn from a normal distribution of variance 1 / inputs; biases start at zero.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhess

Array = jax.Array
PyTree = Any

__all__ = ["Task", "initial_dense", "initial_elman", "mean_loss", "misclassified", "perceptron", "plain_perceptron"]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A network, an error, training and test data, and how to judge the result.

    Attributes:
        name: as on the command line.
        what: one line: network, data and error.
        init: maps a PRNG key to the initial parameters.
        model: `model(params, x) -> output` for one example or a batch, by the layers of jaxhess where there are some.
        plain: the same for a batch, as fast as plain JAX has it: what first-order methods differentiate.
        loss: `loss(output, target) -> ()` for one example.
        train: inputs (r, ...) and targets (r, ...).
        test: inputs (s, ...) and targets (s, ...).
        metric: `metric(params, *test) -> ()`, the test error: the smaller, the better.
        metric_name: its name, for tables.
        dtype: of parameters and data.
        batches: examples in a step of a first-order method, None for all; each is tried.
        curvature_batch: examples in a step of a second-order method, None for all.
        budget: seconds for each method.
        success: the task counts as solved where the metric is below; None if there is only more or less of it.
        kfac: the output layer for kfac-jax, "squared" or "softmax"; None where its restrictions exclude the task.
        linear: numbers of the layers without tanh, besides the last, for kfac-jax.
        kfac_train: the training data for it, where that is not `train`.
        decay: what multiplies half the squared norm of the parameters in the objective, where `train` has it as examples.
        floor: a training loss below counts as none: softmax of separable data goes to zero for ever.
        evaluated: training examples that the reported training loss is the mean over, None for all.
    """

    name: str
    what: str
    init: Callable[[Array], PyTree]
    model: Callable[[PyTree, Array], Array]
    plain: Callable[[PyTree, Array], Array]
    loss: Callable[[Array, Array], Array]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    metric: Callable[..., Array]
    metric_name: str
    dtype: Any
    batches: tuple[int | None, ...] = (None,)
    curvature_batch: int | None = None
    budget: float = 30.0
    success: float | None = None
    kfac: str | None = None
    linear: tuple[int, ...] = ()
    kfac_train: tuple[np.ndarray, np.ndarray] | None = None
    decay: float = 0.0
    floor: float = 0.0
    evaluated: int | None = None


def mean_loss(task: Task) -> Callable[..., Array]:
    """The objective `(params, xs, ts) -> ()` of a batch, by the plain network."""

    def objective(params: PyTree, xs: Array, ts: Array) -> Array:
        return jnp.mean(jax.vmap(task.loss)(task.plain(params, xs), ts))

    return objective


def initial_dense(key: Array, widths: Sequence[int], dtype: Any) -> list[dict[str, Array]]:
    """Parameters of a perceptron with these widths, input first: a list of {"w": (m, n), "b": (m,)}."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {"w": jax.random.normal(k, (m, n), dtype) / np.sqrt(n).astype(dtype), "b": jnp.zeros(m, dtype)}
        for k, (n, m) in zip(keys, itertools.pairwise(widths), strict=True)
    ]


def perceptron(params: list[dict[str, Array]], x: Array, linear: tuple[int, ...] = ()) -> Array:
    """A perceptron of tanh layers by `jaxhess.dense`; the last layer is linear, and so are those numbered in `linear`."""
    for place, layer in enumerate(params):
        linear_here = place == len(params) - 1 or place in linear
        x = jaxhess.dense(layer["w"], layer["b"], x, jaxhess.identity if linear_here else jaxhess.tanh)
    return x


def plain_perceptron(params: list[dict[str, Array]], x: Array, linear: tuple[int, ...] = ()) -> Array:
    """`perceptron` of a batch without jaxhess."""
    for place, layer in enumerate(params):
        x = x @ layer["w"].T + layer["b"]
        if place < len(params) - 1 and place not in linear:
            x = jnp.tanh(x)
    return x


def initial_elman(key: Array, inputs: int, hidden: int, outputs: int, dtype: Any) -> dict[str, dict[str, Array]]:
    """Parameters of one recurrent layer and a dense head."""
    keys = jax.random.split(key, 3)

    def normal(key: Array, m: int, n: int) -> Array:
        return jax.random.normal(key, (m, n), dtype) / np.sqrt(n).astype(dtype)

    return {
        "recurrent": {
            "weight": normal(keys[0], hidden, inputs),
            "feedback": normal(keys[1], hidden, hidden),
            "bias": jnp.zeros(hidden, dtype),
        },
        "head": {"weight": normal(keys[2], outputs, hidden), "bias": jnp.zeros(outputs, dtype)},
    }


def misclassified(task_model: Callable[[PyTree, Array], Array]) -> Callable[..., Array]:
    """The metric of classifiers: the share of examples whose largest output is not their label's."""

    def metric(params: PyTree, xs: Array, labels: Array) -> Array:
        return jnp.mean(jnp.argmax(task_model(params, xs), axis=-1) != labels)

    return metric
