"""What the library makes of an operation or a layer, read from the plan of its sweep and from what it raises."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxprs import equations
from support_cases import Case

import jaxhess
from jaxhess._typing import InputError, UnsupportedOperationError
from jaxhess.engine.graph import Operation, everything, nested
from jaxhess.engine.plan import Plan, make_plan
from jaxhess.engine.trace import body_of, trace


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the rules pass the primitive: the `kinds` of the steps that it is in, or why it is `refused`."""

    kinds: frozenset[str] = frozenset()
    refused: str = ""


@functools.cache
def outcome(case: Case) -> Outcome:
    """Read from the plan, or from what is raised; nothing is compiled for it but the check of custom rules."""
    params, batch = case.params, case.batch
    try:
        jax.eval_shape(jaxhess.hessian(case.error), params, *batch)
    except (UnsupportedOperationError, InputError) as error:
        return Outcome(refused=_reason(str(error)))
    graph = trace(case.error, params, tuple(a[0] for a in batch))
    return Outcome(_kinds(make_plan(graph, len(params), all_pairs=False), (*case.names, *case.instead)))


def _kinds(plan: Plan, names: tuple[str, ...]) -> frozenset[str]:
    steps = (*plan.before_steps, *plan.steps)
    found = {step.kind for step in steps for operation in step.operations if _is(operation, names, step.kind)}
    implicit = {leaf.variable for leaf in plan.leaves if leaf.implicit}
    for operation, loops in nested(plan.during):
        around = [operation, *loops] if operation.loop is not None else list(loops)
        if implicit and any(loop.equation.primitive.name in names for loop in around):
            found.discard("local")
            found.add("along time")
    if found:
        return frozenset(found)
    if any(caller.primitive.name in names for step in steps for op in step.operations for caller in op.callers):
        return frozenset({"looked into"})
    (*_, last) = (op for op in everything((*plan.before, *plan.during)) if op.name in names)
    assert not plan.live.intersection(last.outputs)
    return frozenset({"constant"})


def _is(operation: Operation, names: tuple[str, ...], kind: str) -> bool:
    """Whether it is the operation, the contraction that has taken its place, or a rule of JAX's own around it."""
    if operation.name in names or (kind == "contraction" and operation.equation.primitive.name in names):
        return True
    body = body_of(operation.equation)
    return body is not None and any(e.primitive.name in names for e in equations(body.jaxpr))


def _reason(message: str) -> str:
    """The first sentence, without what differs between operations, machines and releases: names, places, JAX's words."""
    message = re.sub(r" at \S+:\d+ \(\S+\)", "", message)
    message = re.sub(r" \((?:[^().]*axis name.*?|\d+,)\)(?=,| array)", "", message, flags=re.DOTALL)
    message = re.sub(r"twice \(.*\)\. ", "twice. ", message, flags=re.DOTALL)
    sentence = message.split(". ")[0]
    return re.sub(r"^(?:The exact curvature of .* could not be computed: |\S+: |\S+ (?=has|gives|mixes))", "", sentence)


def how(build: Callable[[], Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether loops carry the layer along time, and the names of what is passed by local autodiff.

    The layer's input depends on parameters too, as it does within a network. Raises what `jaxhess.hessian` does for it.
    """
    fun, params, (inputs,) = build()
    x = inputs[0]
    if jnp.issubdtype(x.dtype, jnp.floating):
        params, run = (params, jnp.full(x.shape, 0.7)), fun
        fun = lambda both, x: run(both[0], both[1] * x)  # noqa: E731
    jax.eval_shape(jaxhess.hessian(fun), params, inputs)
    plan = make_plan(trace(fun, params, (x,)), len(jax.tree.leaves(params)), all_pairs=False)
    steps = (*plan.before_steps, *plan.steps)
    local = {_name(step.operations[-1]) for step in steps if step.kind == "local"}
    along_time = any(operation.loop is not None for operation in plan.during)
    return along_time, tuple(sorted(local))


def _name(operation: Operation) -> str:
    body = body_of(operation.equation)
    return operation.name if body is None else body.jaxpr.debug_info.func_name
