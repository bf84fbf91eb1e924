"""A loop whose derivatives are two substitutions, and nothing else in the loop (math.md, section 5 and "A scan").

    h_s, o_s = c(h_{s-1}, u_s)              dh_s, do_s = J_s (dh_{s-1}, du_s)

Once all states are known, the Jacobians J_s of the steps are independent of each other: what they are made of (f'(y_s) of an
Elman cell) is computed for all s together, by the cell's own derivative rules, and so are their derivatives (f''(y_s))
in the second order. The tangent map that is stated here is then a scan of linear steps, `(I - L)^-1`; its transpose,
which JAX derives, runs backwards in time with the cotangent alone, `(I - L)^-T`. Autodiff of a scan would differentiate
within the loop instead, and take the derivatives of the cell's own rules apart.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from jaxhess._typing import Array

__all__ = ["depends_on", "plain", "through_time"]

Arrays = list[Array]
Step = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]


def through_time(
    step: Step, shared: Arrays, carry: Arrays, stacked: Arrays, length: int, reverse: bool, unroll: int
) -> tuple[Arrays, Arrays]:
    """The last carry and the stacked outputs of `carry, outputs = step(shared, carry, slices)` over all steps; `step` reads
    no other arrays that derivatives are taken through."""

    def primal(shared: Arrays, carry: Arrays, stacked: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        def body(state: Arrays, part: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            following, outputs = step(shared, state, part)
            return following, (outputs, state)

        last, (outputs, states) = jax.lax.scan(body, carry, stacked, length, reverse, unroll)
        return last, outputs, states

    run = jax.custom_jvp(primal)

    def rule(primals: tuple[Arrays, Arrays, Arrays], tangents: tuple[list, list, list]) -> tuple[Any, Any]:
        last, outputs, states = run(*primals)
        linear, fixed, varying = _linear_step(step, primals[0], states, primals[2], tangents)
        moving = [t for t in tangents[0] if not isinstance(t, SymbolicZero)]
        parts = [t for t in tangents[2] if not isinstance(t, SymbolicZero)]
        start = [
            jnp.zeros(h.shape, h.dtype) if isinstance(t, SymbolicZero) else t
            for h, t in zip(primals[1], tangents[1], strict=True)
            if _is_float(h)
        ]

        def push(start: Arrays, parts: Arrays, moving: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            def body(dh: Arrays, at_step: tuple[Arrays, Arrays]) -> tuple[Arrays, tuple[Arrays, Arrays]]:
                part, here = at_step
                following, d_outputs = linear(fixed, here, moving, dh, part)
                return following, (d_outputs, dh)

            return jax.lax.scan(body, start, (parts, varying), length, reverse, unroll)

        # Linear already, but JAX before 0.9 transposes only scans that it has linearised itself.
        given = (start, parts, moving)
        d_last, (d_outputs, d_states) = jax.linearize(push, *jax.tree.map(jnp.zeros_like, given))[1](*given)
        filled = [_fill(a, d) for a, d in ((last, d_last), (outputs, d_outputs), (states, d_states))]
        return (last, outputs, states), tuple(filled)

    run.defjvp(rule, symbolic_zeros=True)
    last, outputs, _ = run(shared, carry, stacked)
    return last, outputs


def plain(
    step: Step, shared: Arrays, carry: Arrays, stacked: Arrays, length: int, reverse: bool, unroll: int
) -> tuple[Arrays, Arrays]:
    """The same with JAX's own derivatives."""
    return jax.lax.scan(lambda state, part: step(shared, state, part), carry, stacked, length, reverse, unroll)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


def _fill(arrays: Arrays, tangents: Arrays) -> list[Any]:
    """The tangents of all arrays, given those of the floating ones."""
    given = iter(tangents)
    return [next(given) if _is_float(a) else np.zeros(a.shape, jax.dtypes.float0) for a in arrays]


def _linear_step(
    step: Step, shared: Arrays, states: Arrays, stacked: Arrays, tangents: tuple[list, list, list]
) -> tuple[Callable[..., tuple[Arrays, Arrays]], Arrays, Arrays]:
    """The tangent map of a step, as a function of what is the same in all steps, what is not (stacked), and the tangents of
    the moving shared arrays, the state's floating parts and the moving slices."""
    structure = []
    moves = [[not isinstance(t, SymbolicZero) for t in part] for part in (tangents[0], tangents[2])]

    def linearise(shared: Arrays, state: Arrays, part: Arrays) -> Arrays:
        flags = [moves[0], [_is_float(h) for h in state], moves[1]]
        groups = (shared, state, part)

        def floating(*active: Arrays) -> tuple[Arrays, Arrays]:
            merged = []
            for group, chosen, values in zip(groups, flags, active, strict=True):
                given = iter(values)
                merged.append([next(given) if flag else a for a, flag in zip(group, chosen, strict=True)])
            following, outputs = step(*merged)
            return [h for h in following if _is_float(h)], [o for o in outputs if _is_float(o)]

        active = [[a for a, flag in zip(g, f, strict=True) if flag] for g, f in zip(groups, flags, strict=True)]
        residuals, tree = jax.tree.flatten(jax.linearize(floating, *active)[1])
        structure[:] = [tree]
        return residuals

    def first(arrays: Arrays) -> Arrays:
        return [a[0] for a in arrays]

    arguments = (shared, first(states), first(stacked))
    closed = jax.make_jaxpr(linearise)(*arguments)
    varies = [bool(depends_on(closed, [i], range(len(shared)))) for i in range(len(closed.jaxpr.outvars))]
    run = jaxpr_as_fun(closed)
    (tree,) = structure

    def flat(shared: Arrays, state: Arrays, part: Arrays) -> Arrays:
        return run(*shared, *state, *part)

    fixed = [a for a, flag in zip(flat(*arguments), varies, strict=True) if not flag]

    def here(state: Arrays, part: Arrays) -> Arrays:
        return [a for a, flag in zip(flat(shared, state, part), varies, strict=True) if flag]

    varying = jax.vmap(here)(states, stacked)

    def linear(fixed: Arrays, varying: Arrays, *tangents: Arrays) -> tuple[Arrays, Arrays]:
        same, other = iter(fixed), iter(varying)
        residuals = [next(other) if flag else next(same) for flag in varies]
        return jax.tree.unflatten(tree, residuals)(*tangents)

    return linear, fixed, varying


def depends_on(closed: ClosedJaxpr, outputs: Sequence[int], but: Sequence[int] = ()) -> set[int]:
    """The positions of the inputs that some outputs depend on, other than those of `but`."""
    needed = {v for i in outputs if not isinstance(v := closed.jaxpr.outvars[i], Literal)}
    for equation in reversed(closed.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(v for v in equation.invars if not isinstance(v, Literal))
    return {i for i, variable in enumerate(closed.jaxpr.invars) if variable in needed} - set(but)
