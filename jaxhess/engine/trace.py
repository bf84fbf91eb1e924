"""A function of one example, as a flat graph of operations.

Call-like operations (`jit`, `remat`, jaxhess's own layers) are looked into. `custom_jvp` and `custom_vjp` functions stay
one operation, because the derivative that their author gave is the one to use.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from jaxhess import activations
from jaxhess._typing import Array, InputError, PyTree

__all__ = ["Graph", "Operation", "body_of", "leading_to", "trace"]

_CALLS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "xla_call"}
_CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
_OWN_LAYERS = "jaxhess_"
_BROADCASTING = {"add", "atan2", "div", "max", "min", "mul", "pow", "sub"}
_ACCURATE = {"tanh": activations.tanh, "logistic": activations.sigmoid}
_LIBRARY_FOLDERS = (os.path.dirname(jax.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
    """One operation: variables are numbered, `apply` maps the inputs' values to the list of outputs' values."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    apply: Callable[..., Sequence[Array]]
    params: dict[str, Any]
    equation: JaxprEqn
    callers: tuple[JaxprEqn, ...] = ()

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


def leading_to(operations: Sequence[Operation], variables: Sequence[int]) -> list[Operation]:
    """Those of the operations that the variables depend on, in order."""
    needed, kept = set(variables), []
    for operation in reversed(operations):
        if needed.intersection(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


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


def _is_own_layer(body: ClosedJaxpr) -> bool:
    """Whether a custom derivative is that of a layer of jaxhess, whose inside has the same derivatives."""
    equations = body.jaxpr.eqns
    return len(equations) == 1 and str(equations[0].params.get("name", "")).startswith(_OWN_LAYERS)


class _Builder:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.avals: dict[int, jax.ShapeDtypeStruct] = {}
        self.constants: dict[int, Array] = {}

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
            else:
                results = [self.variable(v.aval) for v in equation.outvars]
                if name in _BROADCASTING:
                    operands = [self.broadcast(i, self.avals[results[0]].shape, equation, callers) for i in operands]
                self.operations.append(_operation(equation, operands, results, callers))
            environment |= dict(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]


def _operation(
    equation: JaxprEqn, inputs: Sequence[int], outputs: Sequence[int], callers: tuple[JaxprEqn, ...]
) -> Operation:
    primitive, name = equation.primitive, equation.primitive.name
    aval: Any = equation.invars[0].aval if equation.invars else None

    def apply(*values: Array) -> Sequence[Array]:
        bound = primitive.get_bind_params(equation.params)
        # Releases of JAX differ: functions to bind come beside the parameters, or among them.
        functions, params = bound if isinstance(bound, tuple) else ((), bound)
        result = primitive.bind(*functions, *values, **params)
        return result if primitive.multiple_results else [result]

    if name == "dot_general" and _fully_contracted(equation):
        return Operation(name, tuple(inputs), tuple(outputs), _swapped(equation), equation.params, equation, callers)
    if name in _ACCURATE and jnp.issubdtype(aval.dtype, jnp.floating):
        accurate = _ACCURATE[name]
        return Operation(name, tuple(inputs), tuple(outputs), lambda y: [accurate(y)], {}, equation, callers)
    return Operation(name, tuple(inputs), tuple(outputs), apply, equation.params, equation, callers)


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
