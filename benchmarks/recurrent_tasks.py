"""Tasks of recurrent networks: one Elman layer of tanh units and a dense head, after the last step or after every one."""

import itertools
from functools import partial

import jax.numpy as jnp
import numpy as np
from dense_tasks import digits_classifier
from task import Array, PyTree, Task, initial_elman, misclassified

import jaxhess
from jaxhess.losses import over_time, softmax_cross_entropy, squared_error

__all__ = ["adding", "digits_rows", "memorization"]

_FLOAT = np.dtype(np.float32)


def _states(params: PyTree, xs: Array) -> Array:
    layer = params["recurrent"]
    return jaxhess.recurrent(layer["weight"], layer["feedback"], layer["bias"], xs, jaxhess.tanh)


def _every_output(params: PyTree, xs: Array) -> Array:
    """Outputs (..., tau, o) after every step."""
    return jaxhess.dense(params["head"]["weight"], params["head"]["bias"], _states(params, xs))


def _last_output(params: PyTree, xs: Array) -> Array:
    """Outputs (..., o) after the last step."""
    return jaxhess.dense(params["head"]["weight"], params["head"]["bias"], _states(params, xs)[..., -1, :])


def _plain_states(params: PyTree, xs: Array) -> Array:
    """States (tau, units, r) of a batch (r, tau, n): examples last and without a loop, the fastest of six ways on a CPU."""
    layer = params["recurrent"]
    h, states = jnp.zeros((layer["bias"].size, 1), xs.dtype), []
    for x in jnp.moveaxis(xs, 0, 2):
        h = jnp.tanh(layer["weight"] @ x + layer["feedback"] @ h + layer["bias"][:, None])
        states.append(h)
    return jnp.stack(states)


def _plain_every_output(params: PyTree, xs: Array) -> Array:
    outputs = jnp.einsum("om,tmr->rto", params["head"]["weight"], _plain_states(params, xs))
    return outputs + params["head"]["bias"]


def _plain_last_output(params: PyTree, xs: Array) -> Array:
    return (params["head"]["weight"] @ _plain_states(params, xs)[-1]).T + params["head"]["bias"]


def _share_wrong(params: PyTree, xs: Array, ts: Array) -> Array:
    return jnp.mean(jnp.abs(_plain_last_output(params, xs) - ts) > 0.04)


def _adding_sequences(rng: np.random.Generator, count: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    values = rng.random((count, steps))
    marked = rng.integers(0, steps // 2, count), rng.integers(steps // 2, steps, count)
    marks, rows = np.zeros((count, steps)), np.arange(count)
    marks[rows, marked[0]] = marks[rows, marked[1]] = 1
    target = np.sum(values * marks, axis=1, keepdims=True)
    return np.stack([values, marks], axis=-1).astype(np.float32), target.astype(np.float32)


def adding(seed: int, steps: int = 30, count: int = 5000) -> Task:
    """Two of the values, which lie in [0, 1], are marked, one in each half; the target is their sum.

    Source: Hochreiter and Schmidhuber (1997), experiment 4, for the task and the tolerance of 0.04; Le, Jaitly and Hinton
    (2015) for values and target. (The former's target is a quarter of the sum of values in [-1, 1]: with the same
    tolerance a task of half the precision.)
    """
    rng = np.random.default_rng(seed)
    return Task(
        name="adding",
        what=f"adding problem, {steps} steps, Elman network of 20 tanh units, {count} sequences, squared error",
        init=partial(initial_elman, inputs=2, hidden=20, outputs=1, dtype=_FLOAT),
        model=_last_output,
        plain=_plain_last_output,
        loss=squared_error,
        train=_adding_sequences(rng, count, steps),
        test=_adding_sequences(rng, 10_000, steps),
        metric=_share_wrong,
        metric_name="share off by more than 0.04",
        dtype=_FLOAT,
        batches=(None, 100),
        curvature_batch=1000,
        budget=20.0,
        success=0.01,
    )


_BITS, _BLANK, _CUE = 5, 2, 3


def _mean_over_time(outputs: Array, labels: Array) -> Array:
    """Cross entropy of one step in the mean, so that its size does not depend on the length."""
    return over_time(softmax_cross_entropy, outputs, labels) / labels.shape[0]


def _share_forgotten(params: PyTree, xs: Array, labels: Array) -> Array:
    said = jnp.argmax(_plain_every_output(params, xs)[..., -_BITS:, :], axis=-1)
    return jnp.mean(jnp.any(said != labels[..., -_BITS:], axis=-1))


def memorization(seed: int, delay: int = 20) -> Task:
    """Five bits are shown, then blanks, a cue, and the bits are to be repeated; before that the answer is 'blank'.

    All 32 sequences are both training and test set. Source: Hochreiter and Schmidhuber (1997); Martens and Sutskever
    (2011), 5-bit memorization, noiseless.
    """
    del seed
    bits = np.array(list(itertools.product((0, 1), repeat=_BITS)))
    blanks = np.full((len(bits), delay), _BLANK)
    cued = np.where(np.arange(delay) < delay - 1, _BLANK, _CUE) * np.ones((len(bits), 1), int)
    shown = np.concatenate([bits, cued, np.full(bits.shape, _BLANK)], axis=1)
    asked = np.concatenate([np.full(bits.shape, _BLANK), blanks, bits], axis=1)
    data = np.eye(4, dtype=np.float32)[shown], asked.astype(np.int32)
    return Task(
        name="memorization",
        what=f"5-bit memorization, {delay} steps between, Elman network of 30 tanh units, 32 sequences, softmax",
        init=partial(initial_elman, inputs=4, hidden=30, outputs=3, dtype=_FLOAT),
        model=_every_output,
        plain=_plain_every_output,
        loss=_mean_over_time,
        train=data,
        test=data,
        metric=_share_forgotten,
        metric_name="share of sequences not repeated",
        dtype=_FLOAT,
        batches=(None,),
        budget=60.0,
        success=0.5 / 32,
    )


_misnamed = misclassified(_plain_last_output)


def digits_rows(seed: int) -> Task:
    """Names of digits read row by row: 8 steps of 8 pixels."""
    whole = digits_classifier(seed)

    def rows(data: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return data[0].reshape(-1, 8, 8), data[1]

    return Task(
        name="digits_rows",
        what="digits row by row, Elman network of 32 tanh units, 1437 images, softmax after the last row",
        init=partial(initial_elman, inputs=8, hidden=32, outputs=10, dtype=_FLOAT),
        model=_last_output,
        plain=_plain_last_output,
        loss=softmax_cross_entropy,
        train=rows(whole.train),
        test=rows(whole.test),
        metric=_misnamed,
        metric_name="share misclassified",
        dtype=_FLOAT,
        batches=(None, 100),
        budget=5.0,
        floor=1e-4,
    )
