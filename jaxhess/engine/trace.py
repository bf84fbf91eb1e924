"""Tracing a function of one example to its graph.

Call-like operations (`jit`, `remat`, jaxhess's own layers) are looked into, and so are the bodies of loops; what is the same
in every step of a loop is computed once, before it. `custom_jvp` and `custom_vjp` functions stay one operation, because the
derivative that their author gave is the one to use.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.engine.accurate import accurate_form
from jaxhess.engine.graph import Graph, Loop, Operation, leading_to, run_loop
from jaxhess.engine.loops import scan_sizes, static_length

__all__ = ["bind", "body_of", "trace"]

_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "xla_call"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_OWN_LAYERS = "jaxhess_"
_BROADCASTING = {"add", "atan2", "div", "max", "min", "mul", "pow", "sub"}


def body_of(equation: JaxprEqn) -> ClosedJaxpr | None:
    """The function that a call-like operation or one with a custom derivative calls; None for loops and all others."""
    if equation.primitive.name not in _CALLS | _CUSTOM:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        body = equation.params.get(key)
        if isinstance(body, Jaxpr):
            return ClosedJaxpr(body, ())
        if body is not None:
            return body
    return None


def bind(equation: JaxprEqn, values: Sequence[Any]) -> Sequence[Array]:
    """The results of an equation's operation on other values."""
    bound = equation.primitive.get_bind_params(equation.params)
    # Releases of JAX differ: functions to bind come beside the parameters, or among them.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = equation.primitive.bind(*functions, *values, **params)
    return results if equation.primitive.multiple_results else [results]


def _is_own_layer(body: ClosedJaxpr) -> bool:
    """Whether a custom derivative is that of a layer of jaxhess, whose inside has the same derivatives."""
    equations = body.jaxpr.eqns
    return len(equations) == 1 and str(equations[0].params.get("name", "")).startswith(_OWN_LAYERS)


class _Builder:
    def __init__(self, outer: "_Builder | None" = None) -> None:
        self.operations: list[Operation] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {} if outer is None else outer.avals
        self.constants: dict[int, Array] = {} if outer is None else outer.constants

    def variable(self, aval: Any) -> int:
        number = len(self.avals)
        self.avals[number] = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
        return number

    def constant(self, value: Any) -> int:
        number = self.variable(value)
        self.constants[number] = value
        return number

    def broadcast(self, number: int, shape: tuple[int, ...], equation: JaxprEqn, callers: tuple[JaxprEqn, ...]) -> int:
        """The operand in the result's shape: recent releases of JAX leave the stretching of axes to the operation."""
        own = self.avals[number]
        if own.shape == shape or number in self.constants:
            return number
        axes = tuple(range(len(shape) - len(own.shape), len(shape)))
        output = self.variable(jax.ShapeDtypeStruct(shape, own.dtype))
        self.operations.append(
            Operation(
                "broadcast_in_dim",
                (number,),
                (output,),
                lambda x: [jax.lax.broadcast_in_dim(x, shape, axes)],
                {"broadcast_dimensions": axes, "shape": shape},
                equation,
                callers,
            )
        )
        return output

    def inline(self, closed: ClosedJaxpr, inputs: Sequence[int], callers: tuple[JaxprEqn, ...] = ()) -> list[int]:
        environment = dict(zip(closed.jaxpr.invars, inputs, strict=True))
        environment |= {v: self.constant(c) for v, c in zip(closed.jaxpr.constvars, closed.consts, strict=True)}

        def read(atom: Any) -> int:
            if isinstance(atom, Literal):
                aval: Any = atom.aval
                return self.constant(np.asarray(atom.val, aval.dtype))
            return environment[atom]

        for equation in closed.jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            name, body = equation.primitive.name, body_of(equation)
            if body is not None and (name in _CALLS or _is_own_layer(body)):
                results = self.inline(body, operands, (*callers, equation))
            elif (spec := self.loop_spec(equation, operands)) is not None:
                results = self.loop(equation, spec, operands, callers)
            else:
                results = [self.variable(v.aval) for v in equation.outvars]
                if name in _BROADCASTING:
                    operands = [self.broadcast(i, self.avals[results[0]].shape, equation, callers) for i in operands]
                operation = _operation(equation, operands, results, callers)
                if name == "cond":
                    operation = dataclasses.replace(operation, branches=self.branches(equation, callers))
                if self.is_known_count(equation, operands):
                    with jax.ensure_compile_time_eval():
                        (self.constants[results[0]],) = operation.apply(*(self.constants[i] for i in operands))
                else:
                    self.operations.append(operation)
            environment |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    def branches(self, equation: JaxprEqn, callers: tuple[JaxprEqn, ...]) -> tuple[Operation, ...]:
        """The operations of all branches of a `cond`, on variables of their own."""
        inner = _Builder(self)
        for branch in equation.params["branches"]:
            inner.inline(branch, [self.variable(v.aval) for v in branch.jaxpr.invars], (*callers, equation))
        return tuple(inner.operations)

    def is_known_count(self, equation: JaxprEqn, operands: Sequence[int]) -> bool:
        """Whether an operation gives an integer that is known before anything runs: what the length of a loop may be."""
        avals: list[Any] = [v.aval for v in (*equation.invars, *equation.outvars)]
        counts = len(equation.outvars) == 1 and all(
            aval.shape == () and isinstance(aval.dtype, np.dtype) and aval.dtype.kind in "iub" for aval in avals
        )
        return counts and all(i in self.constants and not isinstance(self.constants[i], jax.core.Tracer) for i in operands)

    def loop_spec(self, equation: JaxprEqn, operands: Sequence[int]) -> "_LoopSpec | None":
        """What a `scan`, or a `while` of known length, repeats; None for every other operation."""
        params = equation.params
        if equation.primitive.name == "scan":
            sizes = scan_sizes(equation)
            return _LoopSpec(params["jaxpr"], *sizes, params["length"], params["reverse"], params["unroll"])
        if equation.primitive.name != "while":
            return None
        known = {place: self.constants[i] for place, i in enumerate(operands) if i in self.constants}
        length = static_length(equation, {i: v for i, v in known.items() if not isinstance(v, jax.core.Tracer)})
        if length is None:
            return None
        body, conditional = params["body_jaxpr"], params["cond_nconsts"]
        return _LoopSpec(body, params["body_nconsts"], len(body.jaxpr.outvars), length, skipped=conditional)

    def loop(
        self, equation: JaxprEqn, spec: "_LoopSpec", operands: Sequence[int], callers: tuple[JaxprEqn, ...]
    ) -> list[int]:
        """A loop as one operation; the part of its body that is the same in every step goes before it."""
        operands = operands[spec.skipped :]
        constant, stepping = operands[: spec.constants], operands[spec.constants :]
        moving = [self.variable(v.aval) for v in spec.body.jaxpr.invars[spec.constants :]]
        inner = _Builder(self)
        ends = inner.inline(spec.body, [*constant, *moving], (*callers, equation))
        changing, body = set(moving), []
        for operation in leading_to(inner.operations, ends):
            if changing.intersection(operation.inputs):
                changing.update(operation.outputs)
                body.append(operation)
            else:
                self.operations.append(operation)
        reads = [*(i for operation in body for i in operation.inputs), *ends]
        known = {i for i, value in self.constants.items() if not isinstance(value, jax.core.Tracer)}
        shared = tuple(i for i in dict.fromkeys(reads) if i not in changing and i not in known)
        loop = Loop(
            tuple(body), shared, tuple(moving[: spec.carried]), tuple(moving[spec.carried :]),
            tuple(ends[: spec.carried]), tuple(ends[spec.carried :]), spec.length, spec.reverse, spec.unroll, self.constants,
        )  # fmt: skip
        results = [self.variable(v.aval) for v in equation.outvars]
        self.operations.append(
            Operation(
                "scan", (*shared, *stepping), tuple(results), lambda *values: run_loop(loop, values, {})[0], {}, equation,
                callers, loop,
            )
        )  # fmt: skip
        return results


@dataclasses.dataclass(frozen=True)
class _LoopSpec:
    """The body takes `constants` inputs that stay, `carried` ones, then slices; the first `skipped` of the equation's inputs
    are not the body's."""

    body: ClosedJaxpr
    constants: int
    carried: int
    length: int
    reverse: bool = False
    unroll: int = 1
    skipped: int = 0


def _operation(
    equation: JaxprEqn, inputs: Sequence[int], outputs: Sequence[int], callers: tuple[JaxprEqn, ...]
) -> Operation:
    name = equation.primitive.name

    def apply(*values: Array) -> Sequence[Array]:
        return bind(equation, values)

    if name == "dot_general" and _fully_contracted(equation):
        return Operation(name, tuple(inputs), tuple(outputs), _swapped(equation), equation.params, equation, callers)
    accurate = accurate_form(equation)
    if accurate is not None and body_of(equation) is None:
        return Operation(name, tuple(inputs), tuple(outputs), accurate, {}, equation, callers)
    return Operation(name, tuple(inputs), tuple(outputs), accurate or apply, equation.params, equation, callers)


def _fully_contracted(equation: JaxprEqn) -> bool:
    """Whether the right operand of a product has no axis of its own in the result, as z in `W z`."""
    (_, contracting), (_, batching) = equation.params["dimension_numbers"]
    right: Any = equation.invars[1].aval
    return len(contracting) + len(batching) == right.ndim


def _swapped(equation: JaxprEqn) -> Callable[..., Sequence[Array]]:
    """`W z` computed as `z W^T`, the same array; under `vmap` its result is example by example, not unit by unit, and so
    is everything that the curvature matrices of each example are then multiplied with."""
    (left, right), (left_batch, right_batch) = equation.params["dimension_numbers"]
    params = dict(equation.params, dimension_numbers=((right, left), (right_batch, left_batch)))
    precision = params.get("precision")
    if isinstance(precision, tuple):
        params["precision"] = precision[::-1]
    return lambda w, z: [equation.primitive.bind(z, w, **params)]


def trace(fun: Callable[..., Array], params: PyTree, example: tuple[PyTree, ...]) -> Graph:
    """The graph of `fun(params, *example)`, with the leaves of `params` and then of `example` as inputs.

    Raises:
        InputError: if the result is not one real floating-point scalar.
    """
    name = getattr(fun, "__name__", repr(fun))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [f"params{jax.tree_util.keystr(path)}" for path, _ in leaves]
    try:
        with jax.default_matmul_precision("highest"):
            closed, shape = jax.make_jaxpr(fun, return_shape=True)(params, *example)
    except InputError as error:
        found = ", ".join(f"{path} {leaf.shape}" for path, (_, leaf) in zip(names, leaves, strict=True))
        raise InputError(f"{error}. In {name}, with the parameters {found}") from error
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise InputError(
            f"{name} mixes the examples of a batch ({error}), but takes ONE example: its error must not depend on the "
            "others. Use the running statistics of a batch normalisation, for example."
        ) from error
    results = jax.tree.leaves(shape)
    if len(results) != 1 or results[0].shape != ():
        found = ", ".join(f"{s.dtype}{list(s.shape)}" for s in results) or "nothing"
        raise InputError(
            f"{name} must return the error of ONE example, a scalar, but returned {found}. "
            "Sum over the outputs; the mean over the batch is taken by jaxhess."
        )
    if not jnp.issubdtype(results[0].dtype, jnp.floating):
        raise InputError(f"{name} must return a real floating-point scalar, but returned {results[0].dtype}.")
    builder = _Builder()
    inputs = [builder.variable(v.aval) for v in closed.jaxpr.invars]
    (output,) = builder.inline(closed, inputs)
    operations = leading_to(builder.operations, [output])
    return Graph(operations, inputs, output, builder.avals, builder.constants, dict(zip(inputs, names, strict=False)))
