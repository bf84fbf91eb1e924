"""Linearising so that every number is kept once.

`jax.linearize` keeps what each of its linear operations reads: a derivative twice, where it is needed on the way forward and
on the way back, arrays that the caller holds anyway, and both factors of f'' g apart. Products with many vectors read all of
it again each time. Here equal operations run once, products of factors are kept in place of the factors, and what is given
again is not kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from jaxhess._typing import Array
from jaxhess.engine.trace import bind, body_of

__all__ = ["LinearMap", "linearise_once"]

Arrays = list[Array]
Environment = dict[Any, Any]
Done = dict[Any, tuple[Sequence[Array], Sequence[Any]]]

_CALLS = {"jit", "pjit", "closed_call", "core_call"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map of a list of arrays, from the arrays that it `kept` and those that it is given again."""

    kept: Arrays
    program: "_Program" = dataclasses.field(metadata={"static": True})

    def __call__(self, given: Sequence[Array], vectors: Sequence[Array]) -> Arrays:
        program, held = self.program, [*self.kept, *given]
        environment = {variable: held[place] for variable, place in program.places.items()}
        environment |= dict(zip(program.vectors, vectors, strict=True))
        for equation in program.equations:
            results = bind(equation, [_read(environment, atom) for atom in equation.invars])
            environment |= dict(zip(equation.outvars, results, strict=True))
        return [_read(environment, atom) for atom in program.results]

    def closed(self, given: Sequence[Array]) -> "LinearMap":
        """The same map, which keeps what it reads of the given arrays and is given none."""
        held, program = [*self.kept, *given], self.program
        used = sorted(set(program.places.values()))
        places = {variable: used.index(place) for variable, place in program.places.items()}
        return LinearMap([held[place] for place in used], dataclasses.replace(program, places=places))


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The operations that depend on the vectors; `places` says which of (kept, given) the other variables are."""

    equations: tuple[JaxprEqn, ...]
    places: dict[Any, int]
    vectors: tuple[Any, ...]
    results: tuple[Any, ...]


def linearise_once(
    function: Callable[[Arrays], tuple[Arrays, Any]], primals: Arrays, given: Sequence[Array]
) -> tuple[Arrays, Any, LinearMap]:
    """`jax.linearize(function, primals, has_aux=True)`, for a list of arrays: the results, what else it returns, and the
    linear map, to which the arrays `given` (or equal ones) are to be given with each list of vectors."""
    structure: dict[str, Any] = {}

    def everything(primals: Arrays) -> tuple[Arrays, Any, Arrays]:
        results, linear, extra = jax.linearize(function, primals, has_aux=True)
        leaves, structure["linear"] = jax.tree.flatten(linear)
        return results, extra, leaves

    closed, shapes = jax.make_jaxpr(everything, return_shape=True)(primals)
    done: Done = {}
    outputs = _run(closed, primals, lambda equation, values: _once(equation, values, done))
    results, extra, leaves = jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    def linear(leaves: Arrays, vectors: Arrays) -> Arrays:
        return jax.tree.unflatten(structure["linear"], leaves)(vectors)

    return results, extra, _split(_factored(linear, leaves, primals), leaves, given, done)


def _split(closed: ClosedJaxpr, leaves: Arrays, given: Sequence[Array], done: Done) -> LinearMap:
    """A linear map's operations, those that depend on no vector done now."""
    jaxpr = closed.jaxpr
    known: Environment = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, leaves, strict=False))
    equations = []
    for equation in jaxpr.eqns:
        if all(isinstance(atom, Literal) or atom in known for atom in equation.invars):
            values = [_read(known, atom) for atom in equation.invars]
            known |= dict(zip(equation.outvars, _once(equation, values, done), strict=True))
        else:
            equations.append(equation)
    read = [atom for equation in equations for atom in equation.invars] + list(jaxpr.outvars)
    used = dict.fromkeys(atom for atom in read if not isinstance(atom, Literal) and atom in known)
    held = {id(array): place for place, array in reversed(list(enumerate(given)))}
    kept = list({id(known[v]): known[v] for v in used if id(known[v]) not in held}.values())
    order = {id(array): place for place, array in enumerate(kept)} | {n: len(kept) + place for n, place in held.items()}
    places = {variable: order[id(known[variable])] for variable in used}
    return LinearMap(kept, _Program(tuple(equations), places, tuple(jaxpr.invars[len(leaves) :]), tuple(jaxpr.outvars)))


def _factored(linear: Callable[[Arrays, Arrays], Arrays], leaves: Arrays, vectors: Arrays) -> ClosedJaxpr:
    """The operations of a linear map where what a vector is multiplied with, one array after the other, is one array."""

    def factored(leaves: Arrays, vectors: Arrays) -> Arrays:
        closed = jax.make_jaxpr(linear)(leaves, vectors)
        values = _run(closed, [*leaves, *(_Scaled(v, ()) for v in vectors)], _keeping_factors)
        return [_multiplied(value) for value in values]

    return jax.make_jaxpr(factored)(leaves, vectors)


@dataclasses.dataclass(frozen=True, eq=False)
class _Scaled:
    """What depends on a vector, and the arrays that it is yet to be multiplied with."""

    base: Array
    factors: tuple[Array, ...]

    @functools.cached_property
    def product(self) -> Array:
        return self.base * functools.reduce(jnp.multiply, self.factors) if self.factors else self.base


def _multiplied(value: Any) -> Array:
    return value.product if isinstance(value, _Scaled) else value


def _keeping_factors(equation: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    moving = [value for value in values if isinstance(value, _Scaled)]
    if equation.primitive.name == "mul" and len(moving) == 1:
        aval: Any = equation.outvars[0].aval
        (factor,) = (value for value in values if not isinstance(value, _Scaled))
        shapes = moving[0].base.shape, factor.shape
        if shapes[0] == aval.shape and shapes[1] in (aval.shape, ()):
            return [_Scaled(moving[0].base, (*moving[0].factors, factor))]
    results = bind(equation, [_multiplied(value) for value in values])
    return [_Scaled(result, ()) for result in results] if moving else results


def _run(closed: ClosedJaxpr, values: Sequence[Any], apply: Callable[[JaxprEqn, Sequence[Any]], Sequence[Any]]) -> list[Any]:
    """Run a function's operations, those of the functions that it calls included, each by `apply`."""
    environment: Environment = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    environment |= dict(zip(closed.jaxpr.invars, values, strict=True))
    for equation in closed.jaxpr.eqns:
        operands = [_read(environment, atom) for atom in equation.invars]
        body = body_of(equation) if equation.primitive.name in _CALLS else None
        results = apply(equation, operands) if body is None else _run(body, operands, apply)
        environment |= dict(zip(equation.outvars, results, strict=True))
    return [_read(environment, atom) for atom in closed.jaxpr.outvars]


def _read(environment: Environment, atom: Any) -> Any:
    if not isinstance(atom, Literal):
        return environment[atom]
    aval: Any = atom.aval
    return np.asarray(atom.val, aval.dtype)


def _once(equation: JaxprEqn, values: Sequence[Any], done: Done) -> Sequence[Array]:
    """An equation's results, those of an equal one where there was one."""
    key = equation.primitive, _described(equation), tuple(map(_identity, values))
    try:
        if key not in done:
            done[key] = bind(equation, values), values  # with the operands, or an id could come to mean another array
    except TypeError:  # parameters without a hash
        return bind(equation, values)
    return done[key][0]


def _identity(value: Any) -> Any:
    return (value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else id(value)


def _described(equation: JaxprEqn) -> Any:
    """What tells an operation from others of its kind; a function with derivatives of its own by name and text, since JAX
    traces it anew for each use."""
    if equation.primitive.name == "custom_jvp_call":
        body = equation.params["call_jaxpr"]
        return equation.params.get("name"), str(body), tuple(map(id, body.consts)), equation.params["num_consts"]
    return tuple(sorted(equation.params.items()))
