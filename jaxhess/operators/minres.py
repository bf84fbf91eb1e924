"""MINRES as one of lineax's solvers: for symmetric operators, definite or not, singular or not.

    x = A^+ b        the least residual ||b - A x||, and of such x that of least norm

The iterations, and their equations, are in `jaxhess.operators.krylov`.
"""

from collections.abc import Callable
from typing import Any

import lineax as lx

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.krylov import minres, refine, step_limit
from jaxhess.operators.vectors import measured, norm

__all__ = ["MINRES"]

# The class has a field of this name.
_norm = norm


class MINRES(lx.AbstractLinearSolver):
    """Paige and Saunders' minimum residual method for symmetric operators, definite or not, singular or not.

    A lineax solver: `lineax.linear_solve(operator, vector, MINRES(rtol=1e-6, atol=0.0))`. The operator must be known to be
    symmetric; on a singular one the result is `A^+ b`, as far as the tolerance and rounding tell. Done when
    `norm(b - A x) <= atol + rtol * norm(b)`, with the residual computed truly. `max_steps` is by default 10 N, at most
    10,000. `well_posed` promises that the operator is not singular, which saves two of three solves in its derivatives.

    Options (`lineax.linear_solve(..., options=...)`): `preconditioner`, a positive definite lineax operator like the inverse
    (of a singular operator's solutions, it chooses which is found); `y0`, a first guess (whose part in the null space
    stays).

    Raises `InputError`, when the solve is called, for operators that are not symmetric, and for tolerances that are
    negative; the results are lineax's: `max_steps_reached`, `breakdown` (the preconditioner is not positive definite), and
    `stagnation` (rounding keeps the residual above the tolerance).

    >>> import jax.numpy as jnp, lineax as lx
    >>> A = lx.MatrixLinearOperator(jnp.array([[0.0, 2.0], [2.0, 0.0]]), lx.symmetric_tag)
    >>> lx.linear_solve(A, jnp.array([4.0, 2.0]), MINRES(rtol=1e-6, atol=0.0)).value.round(4).tolist()
    [1.0, 2.0]
    """

    rtol: Any
    atol: Any
    norm: Callable[[PyTree], Array]
    max_steps: int | None
    well_posed: bool

    def __init__(
        self,
        rtol: Any,
        atol: Any,
        norm: Callable[[PyTree], Array] | None = None,
        max_steps: int | None = None,
        well_posed: bool = False,
    ):
        for name, tolerance in (("rtol", rtol), ("atol", atol)):
            if isinstance(tolerance, int | float) and not tolerance >= 0:
                raise InputError(f"MINRES: {name} must not be negative, got {tolerance}")
        self.rtol, self.atol, self.max_steps, self.well_posed = rtol, atol, max_steps, well_posed
        self.norm = _norm if norm is None else norm

    def init(self, operator, options):
        del options
        if not lx.is_symmetric(operator):
            raise InputError(
                f"MINRES: needs a symmetric operator, and this {type(operator).__name__} is not known to be one; if it is, "
                "say so with lineax.symmetric_tag"
            )
        return lx.linearise(operator)

    def compute(self, state, vector, options):
        precondition, start = None, options.get("y0")
        if "preconditioner" in options:
            preconditioner = lx.linearise(options["preconditioner"])
            if not lx.is_positive_semidefinite(preconditioner):
                raise InputError("MINRES: the preconditioner must be tagged as positive semidefinite")
            precondition = preconditioner.mv
        limit = step_limit(self.max_steps, vector)
        target = self.atol + self.rtol * measured(vector, self.norm)[1]
        found = refine(minres, state.mv, precondition, vector, start, target, limit, self.norm)
        failure = lx.RESULTS.where(found.steps >= limit, lx.RESULTS.max_steps_reached, lx.RESULTS.stagnation)
        failure = lx.RESULTS.where(found.broken, lx.RESULTS.breakdown, failure)
        # NaN goes on as a success, for lineax to name: it looks for what is not finite.
        done = ~(found.residual > target) | found.least_squares
        result = lx.RESULTS.where(done, lx.RESULTS.successful, failure)
        return found.solution, result, {"num_steps": found.steps, "max_steps": self.max_steps}

    def transpose(self, state, options):
        kept = {}
        if "preconditioner" in options:
            kept["preconditioner"] = options["preconditioner"].transpose()
        return state.transpose(), kept

    def conj(self, state, options):
        kept = {}
        if "preconditioner" in options:
            kept["preconditioner"] = lx.conj(options["preconditioner"])
        return lx.conj(state), kept

    def assume_full_rank(self):
        return self.well_posed

    # The same question as lineax before 0.1 asks it.
    def allow_dependent_columns(self, operator):
        del operator
        return not self.well_posed

    def allow_dependent_rows(self, operator):
        del operator
        return not self.well_posed
