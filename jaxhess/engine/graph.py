"""A function of one example as a flat graph of operations, and how it is evaluated.

A loop (`scan`, or `while` with a known number of steps) is one operation whose body is operations too. They read what is
the same in every step straight from the graph around the loop, so a parameter has one number, inside and outside.
"""

import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from jaxhess._typing import Array
from jaxhess.engine.through_time import plain, through_time

__all__ = [
    "LINEARISES_WITHIN_TRACES",
    "Graph",
    "Loop",
    "Operation",
    "Probe",
    "evaluate",
    "everything",
    "leading_to",
    "nested",
    "renumbered",
]

_LIBRARY_FOLDERS = (os.path.dirname(jax.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Up to JAX 0.9 a linearised function holds on to values of the trace that it was made in, wherever an output has no tangent.
LINEARISES_WITHIN_TRACES = jax.__version_info__ >= (0, 10, 2)


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a loop does: variables by number, `constants` those of the graph.

    `shared` are read in every step; `carry` becomes `next_carry`; `slices` are the step's parts of the stacked inputs and
    `emitted` its parts of the stacked outputs. The operation's inputs are (shared, initial carry, stacked inputs), its
    outputs (last carry, stacked outputs).
    """

    operations: tuple["Operation", ...]
    shared: tuple[int, ...]
    carry: tuple[int, ...]
    slices: tuple[int, ...]
    next_carry: tuple[int, ...]
    emitted: tuple[int, ...]
    length: int
    reverse: bool
    unroll: int
    constants: Mapping[int, Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One operation: variables are numbered, `apply` maps the inputs' values to the list of outputs' values. `branches` are
    operations that it may run (a `cond`), for looking at only."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    apply: Callable[..., Sequence[Array]]
    params: dict[str, Any]
    equation: JaxprEqn
    callers: tuple[JaxprEqn, ...] = ()
    loop: Loop | None = None
    branches: tuple["Operation", ...] = ()

    @property
    def where(self) -> str:
        """File and line of the user's code, as far as JAX kept it: of the operation, or of the call that it is part of."""
        candidates = []
        for equation in (self.equation, *reversed(self.callers)):
            traceback = equation.source_info.traceback
            for frame in traceback.frames if traceback is not None else ():
                if not frame.file_name.startswith((*_LIBRARY_FOLDERS, "<")):
                    candidates.append((f"{os.sep}site-packages{os.sep}" in frame.file_name, frame))
        if not candidates:
            return "an unknown place"
        frame = min(candidates, key=lambda candidate: candidate[0])[1]
        return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"


@dataclasses.dataclass
class Graph:
    """Operations in order of evaluation; `avals`, `constants` and the parameters' `names` by the variables' numbers."""

    operations: list[Operation]
    inputs: list[int]
    output: int
    avals: dict[int, jax.ShapeDtypeStruct]
    constants: dict[int, Array]
    names: dict[int, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A value to add to an operation's result, and the variable to be read there; in a loop both are stacked over the
    steps."""

    added: Array | None
    read: int | None


def leading_to(operations: Sequence[Operation], variables: Sequence[int]) -> list[Operation]:
    """Those of the operations that the variables depend on, in order."""
    needed, kept = set(variables), []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def nested(
    operations: Sequence[Operation], loops: tuple[Operation, ...] = ()
) -> Iterator[tuple[Operation, tuple[Operation, ...]]]:
    """Every operation with the loops around it, outermost first, those in bodies of loops included."""
    for operation in operations:
        yield operation, loops
        if operation.loop is not None:
            yield from nested(operation.loop.operations, (*loops, operation))


def everything(operations: Sequence[Operation]) -> Iterator[Operation]:
    """Every operation, those in bodies of loops and in branches included."""
    for operation, _ in nested(operations):
        yield operation
        yield from everything(operation.branches)


def renumbered(operation: Operation, numbers: Mapping[int, int], but: Collection[Operation]) -> Operation:
    """The operation reading other variables, in its body too, except in the operations `but`."""
    if operation in but:
        return operation
    inputs = tuple(numbers.get(i, i) for i in operation.inputs)
    loop = operation.loop
    if loop is None:
        return operation if inputs == operation.inputs else dataclasses.replace(operation, inputs=inputs)
    count = len(loop.shared)
    added = tuple(numbers[i] for i in loop.shared if i in numbers)
    inside = dataclasses.replace(
        loop,
        operations=tuple(renumbered(inner, numbers, but) for inner in loop.operations),
        shared=(*loop.shared, *added),
        next_carry=tuple(numbers.get(i, i) for i in loop.next_carry),
        emitted=tuple(numbers.get(i, i) for i in loop.emitted),
    )
    return dataclasses.replace(
        operation,
        inputs=(*loop.shared, *added, *inputs[count:]),
        apply=lambda *values: run_loop(inside, values, {})[0],
        loop=inside,
    )


def evaluate(
    operations: Sequence[Operation], environment: dict[int, Array], probes: Mapping[Operation, Probe] | None = None
) -> dict[Operation, Array]:
    """Run operations forward, adding their results to the environment, which holds the graph's constants too. Returns what
    the probes read."""
    seen: dict[Operation, Array] = {}
    for operation in operations:
        inner = (
            {op: probes[op] for op, _ in nested(operation.loop.operations) if op in probes}
            if probes and operation.loop
            else {}
        )
        values = [environment[i] for i in operation.inputs]
        if operation.loop is not None and inner:
            results, read = run_loop(operation.loop, values, inner)
            seen |= read
        else:
            results = operation.apply(*values)
        probe = probes.get(operation) if probes else None
        if probe is not None:
            if probe.added is not None:
                results = [results[0] + probe.added]
            if probe.read is not None:
                seen[operation] = environment[probe.read]
        environment |= dict(zip(operation.outputs, results, strict=True))
    return seen


def run_loop(
    loop: Loop, values: Sequence[Array], probes: Mapping[Operation, Probe]
) -> tuple[list[Array], dict[Operation, Array]]:
    """The loop's outputs from its inputs, and what the probes read, stacked."""
    n, m = len(loop.shared), len(loop.shared) + len(loop.carry)
    added = [op for op, probe in probes.items() if probe.added is not None]
    read = [op for op, probe in probes.items() if probe.read is not None]

    def step(shared: Sequence[Array], carry: Sequence[Array], part: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        environment = {**loop.constants, **dict(zip(loop.shared, shared, strict=True))}
        environment |= dict(zip((*loop.carry, *loop.slices), (*carry, *part[: len(loop.slices)]), strict=True))
        extra = dict(zip(added, part[len(loop.slices) :], strict=True))
        seen = evaluate(loop.operations, environment, {op: Probe(extra.get(op), probe.read) for op, probe in probes.items()})
        emitted = [environment[i] for i in loop.emitted]
        return [environment[i] for i in loop.next_carry], emitted + [seen[op] for op in read]

    stacked = [*values[m:], *(array for op in added if (array := probes[op].added) is not None)]
    arguments = (list(values[:n]), list(values[n:m]), stacked, loop.length, loop.reverse, loop.unroll)
    carry, outputs = through_time(step, *arguments) if _in_both_modes(loop, values) else plain(step, *arguments)
    count = len(loop.emitted)
    return [*carry, *outputs[:count]], dict(zip(read, outputs[count:], strict=True))


def _in_both_modes(loop: Loop, values: Sequence[Array]) -> bool:
    """Whether the steps can be linearised one by one: a `custom_vjp` function has no tangent map."""
    names = {operation.name for operation in everything(loop.operations)}
    real = not any(jnp.issubdtype(value.dtype, jnp.complexfloating) for value in values)
    own_rules_only = any(name.startswith("custom_vjp") for name in names)
    return LINEARISES_WITHIN_TRACES and loop.length > 0 and real and not own_rules_only
