"""What every symmetric operator can do beyond products: solves, factorisations, logarithms of determinants.

All of it is exact where the operator, in its reduced space of k dimensions (`jaxhess.operators.reduction`), can be factored;
beyond that, solves go by iterations (`method` says which, and why), whose tolerance is checked: one that was
not reached raises `NotConvergedError`, or is told by `info` on request.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jax.core import Tracer

from jaxhess._typing import Array, InputError, NotConvergedError, PyTree
from jaxhess.operators import direct
from jaxhess.operators.eigen import refuse
from jaxhess.operators.functions import (
    SpectralFunctions,
    as_damping,
    check_method,
    dampings_of,
    is_scalar,
    late,
    times,
    wide,
)
from jaxhess.operators.iterative import SolveInfo, iterative_solve
from jaxhess.operators.mapped import require_symmetric
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.support import as_array, sign_of
from jaxhess.operators.vectors import measured

__all__ = ["Solvable"]


class Solvable(SpectralFunctions):
    """Mixin of the symmetric operators. `damping` is λ in `H + λI`, a number; `solve`, `logdet` and `sample` of an operator
    on a tree also take one for each parameter, as a tree of numbers that leads the parameters'."""

    def factorize(self, damping: Any = None, *, method: str = "auto") -> Any:
        """Factor once, to solve many times.

        Without `damping`: an eigendecomposition in the reduced space, as a `SpectralOperator` that equals this one; any
        damping and any function of the operator then costs two small matrix products. With it: a `Factorization` for
        that damping alone, Cholesky where the operator is tagged positive semidefinite and LU otherwise, in a tenth of
        the time. `method` is "auto", "eigh", "cholesky" or "lu".

        Raises `SingularError` if `H + damping I` is singular to rounding, `DenseTooLargeError` if the reduced matrix does
        not fit in memory.
        """
        check_method("factorize", method, ("auto", "eigh", "cholesky", "lu"))
        require_symmetric(self, "factorize")
        if damping is None and method in ("auto", "eigh"):
            return late["spectral"](self._eigen(), self.tags)
        if damping is None:
            raise InputError(f"{type(self).__name__}.factorize: method={method!r} needs a damping; without one, take 'eigh'")
        return self._factored(damping, method).checked(f"{type(self).__name__}.factorize")

    def _factored(self, damping: Any, method: str) -> direct.Factorization:
        damping, given = as_damping(self, damping), damping
        negative = sign_of(given) == -1
        if self._takes_eigen(method):
            return direct.diagonalised(self._eigen(), damping)
        positive = lx.is_positive_semidefinite(self) and not negative
        kind = method if method in ("cholesky", "lu") else "cholesky" if positive else "lu"
        return direct.factored(wide(self)._reduction(), damping, kind)

    def _takes_eigen(self, method: str) -> bool:
        return method == "eigh" or (method == "auto" and bool(self._held()))

    def _factored_and_solved(self, damping: Any, method: str, vector: PyTree) -> tuple[direct.Factorization, PyTree]:
        """The factorisation, and the solution, which is not checked."""
        if self._takes_eigen(method):
            return direct.diagonalised_solution(self._eigen(), as_damping(self, damping), vector)
        factors = self._factored(damping, method)
        return factors, direct.solution(factors, vector)

    def solve(
        self,
        vector: PyTree,
        damping: Any = 0.0,
        *,
        method: str = "auto",
        preconditioner: Any = "auto",
        tolerance: float | None = None,
        max_steps: int | None = None,
        start: PyTree | None = None,
        return_info: bool = False,
    ) -> Any:
        """`(H + damping I)^-1` times a vector of the operator's structure.

        `method` is "eigh", "cholesky" or "lu" (exact, in the reduced space), "cg" or "minres" (iterations by products), or
        "auto": exact where the reduced matrix is small enough in size and memory. The others matter to iterations only:
        `preconditioner`, an operator like the inverse, "auto" (of Kronecker form where there is one) or None; `tolerance`,
        the relative residual; `max_steps`; `start`, a first guess. With `return_info`, the pair of the solution and its
        `SolveInfo`: method, why, iterations, true residual, whether converged; nothing is raised then.

        Raises `SingularError` where `H + damping I` is singular to rounding, naming the eigenvalue near `-damping`;
        `NotConvergedError` where iterations stop before the tolerance; `InputError` for a vector of other shapes.
        """
        name = f"{type(self).__name__}.solve"
        check_method(name, method, ("auto", "eigh", "cholesky", "lu", "cg", "minres"))
        require_symmetric(self, "solve")
        structure = self.in_structure()
        leaves = leaves_like(name, structure, vector)
        shapes, treedef = jax.tree.flatten(structure)
        dtypes = [jnp.promote_types(s.dtype, jnp.float32) for s in shapes]
        vector = jax.tree.unflatten(treedef, [as_array(x, dtype) for x, dtype in zip(leaves, dtypes, strict=True)])
        if not is_scalar(damping):
            options = {"method": method, "tolerance": tolerance, "max_steps": max_steps, "start": start}
            return self._solve_weighted(vector, damping, preconditioner=preconditioner, return_info=return_info, **options)
        chosen, reason = self._choose(method)
        if chosen in ("cg", "minres", "iterate"):
            if isinstance(preconditioner, str):
                preconditioner = self._preconditioner(preconditioner, damping)
            solution, info = iterative_solve(
                self, vector, damping, method="auto" if chosen == "iterate" else chosen, preconditioner=preconditioner,
                tolerance=tolerance, max_steps=max_steps, start=start, reason=reason,
            )  # fmt: skip
            return (solution, info) if return_info else _converged(name, solution, info)
        factors, solution = self._factored_and_solved(damping, chosen, vector)
        if not return_info:
            return factors.checked(name, solution)
        residual = _residual(self, vector, solution, [factors.damping] * len(leaves))
        zero = jnp.zeros((), int)
        return solution, SolveInfo(factors.kind, reason, zero, residual, ~factors.singular, factors.eigenvalue)

    def _solve_weighted(
        self, vector: PyTree, damping: PyTree, *, preconditioner: Any, return_info: bool, method: str, **options: Any
    ) -> Any:
        """`solve` with a damping for each parameter."""
        name, structure = f"{type(self).__name__}.solve", self.in_structure()
        dampings = dampings_of(name, damping, structure)
        operator, rest, scales = self._absorb(dampings)
        chosen, reason = operator._choose(method)
        if chosen in ("cg", "minres", "iterate"):
            if isinstance(preconditioner, str):
                preconditioner = self._preconditioner(preconditioner, damping)
            kind, tree = (
                "auto" if chosen == "iterate" else chosen,
                jax.tree.unflatten(jax.tree.structure(structure), dampings),
            )
            solution, info = iterative_solve(
                self, vector, tree, method=kind, preconditioner=preconditioner, reason=reason, **options
            )
            return (solution, info) if return_info else _converged(name, solution, info)
        result = operator.solve(times(scales, vector), rest, method=method, return_info=return_info)
        if not return_info:
            return times(scales, result)
        solution, info = times(scales, result[0]), result[1]
        # The eigenvalues are those of another operator.
        return solution, dataclasses.replace(info, residual=_residual(self, vector, solution, dampings), eigenvalue=None)

    def _preconditioner(self, which: str, damping: Any) -> Any:
        """An approximate inverse by its name, or None where there is none."""
        check_method(f"{type(self).__name__}.solve", which, ("auto", "kronecker"), "preconditioner")
        found = late["preconditioner"](self, damping, asked=which == "kronecker")
        if found is None and which == "kronecker":
            raise InputError(
                f"{type(self).__name__}.solve: there are no factors for a Kronecker preconditioner; pass an operator"
            )
        return found

    def logdet(self, damping: Any = 0.0) -> Array:
        """`log |det(H + damping I)|`, 0-d, exact in the reduced space; -inf where singular to rounding.

        Raises `DenseTooLargeError` where that does not fit; `jaxhess.spectra.stochastic_logdet` estimates it.
        """
        return self.slogdet(damping)[1]

    def slogdet(self, damping: Any = 0.0) -> tuple[Array, Array]:
        """The sign of `det(H + damping I)` and the logarithm of its absolute value, 0-d both, as `jnp.linalg.slogdet`."""
        require_symmetric(self, "slogdet")
        if not is_scalar(damping):
            operator, rest, scales = self._absorb(
                dampings_of(f"{type(self).__name__}.slogdet", damping, self.in_structure())
            )
            sign, value = operator.slogdet(rest)
            sizes = [leaf.size for leaf in jax.tree.leaves(self.in_structure())]
            return sign, value - 2 * sum(n * jnp.log(s) for n, s in zip(sizes, scales or (), strict=False))
        return direct.slogdet(self._factored(damping, "eigh"))


def _converged(name: str, solution: PyTree, info: SolveInfo) -> PyTree:
    def message() -> str:
        if isinstance(info.residual, Tracer):
            reached = "?"
        else:
            reached = f"{float(info.residual):.3g} after {int(info.iterations)} steps"
        return (
            f"{name}: {info.method} stopped at a relative residual of {reached}, above the tolerance. Give more max_steps "
            "or damping, a preconditioner, or a wider tolerance; return_info=True returns what there is."
        )

    return refuse(~info.converged, NotConvergedError, message, solution)[0]


@jax.jit
def _residual(operator: Any, vector: PyTree, solution: PyTree, dampings: list[Array]) -> Array:
    damped = [jnp.asarray(d, x.dtype) * x for d, x in zip(dampings, jax.tree.leaves(solution), strict=True)]
    tree = jax.tree.unflatten(jax.tree.structure(vector), damped)
    left = jax.tree.map(lambda b, h, d: b - h - d, vector, operator.mv(solution), tree)
    norm = measured(vector)[1]
    return measured(left)[1] / jnp.where(norm > 0, norm, 1)
