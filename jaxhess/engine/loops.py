"""What is known of loops: what a `scan` takes, and how often a `while` loop runs where that depends on neither data nor
parameters.

The condition of a `while` reads some of the carried values; these are updated from some more. If all of them start from
known numbers and are updated by known ones, the loop's length is found by running those alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, jaxpr_as_fun

from jaxhess._typing import Array
from jaxhess.engine.through_time import depends_on

__all__ = ["scan_sizes", "static_length"]


def scan_sizes(equation: JaxprEqn) -> tuple[int, int]:
    """How many inputs of a `scan` equation are constants, and how many are carried.

    From shapes, since the names of its parameters change with the version of JAX: what is taken apart, or put together,
    step by step has one axis more outside than inside.
    """
    body = equation.params["jaxpr"]

    def stepwise(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True))

    carried = len(equation.outvars) - stepwise(equation.outvars, body.jaxpr.outvars)
    return len(equation.invars) - stepwise(equation.invars, body.jaxpr.invars) - carried, carried


def static_length(equation: JaxprEqn, known: Mapping[int, Array]) -> int | None:
    """The number of steps of a `while` equation whose inputs at the positions of `known` have these values; None where it
    depends on anything else."""
    params = equation.params
    condition, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, second = params["cond_nconsts"], params["body_nconsts"]
    carried = len(body.jaxpr.outvars)
    start = first + second

    read = depends_on(condition, [0])
    constants = {i for i in read if i < first}
    state = {i - first for i in read if i >= first}
    while True:
        below = depends_on(body, sorted(state))
        constants |= {first + i for i in below if i < second}
        grown = state | {i - second for i in below if i >= second}
        if grown == state:
            break
        state = grown
    if not {*constants, *(start + i for i in state)} <= known.keys():
        return None
    values = [known[i] if i in known else _zeros(atom) for i, atom in enumerate(equation.invars)]
    moving = sorted(state)

    def fill(part: Sequence[Array]) -> list[Array]:
        given = dict(zip(moving, part, strict=True))
        return [given[i] if i in given else values[start + i] for i in range(carried)]

    def go_on(counted: tuple[Array, list[Array]]) -> Array:
        return jaxpr_as_fun(condition)(*values[:first], *fill(counted[1]))[0]

    def step(counted: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        results = jaxpr_as_fun(body)(*values[first:start], *fill(counted[1]))
        return counted[0] + 1, [results[i] for i in moving]

    def count(part: list[Array]) -> Array:
        return jax.lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32), part))[0]

    part = [np.asarray(values[start + i]) for i in moving]
    # Compiled and run on its own: the values of an enclosing trace would only be known later.
    return int(jax.jit(count).lower(part).compile()(part))


def _zeros(atom: Any) -> np.ndarray:
    return np.zeros(atom.aval.shape, atom.aval.dtype)
