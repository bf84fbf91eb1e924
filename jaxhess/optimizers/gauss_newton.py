"""Gauss-Newton: the part of the Hessian that is never indefinite, block by block or of the whole network at once.

    d = -(G + λI)^-1 g,      G = (1/r) sum_i J_i^T B_i J_i

for squared errors this is the method of Levenberg and Marquardt. Of the whole network's N parameters and rM outputs,

    the Gram form            (G + λ)^-1 g = (g - F (F^T F + λ)^-1 F^T g) / λ       a Cholesky factor of (rM, rM)
    the normal equations     a Cholesky factor of G + λI, (N, N)
    conjugate gradients      products with J and J^T, preconditioned by the Kronecker factors of each block

whichever side is smaller, as long as that can be formed and factored in reasonable time (`choose_solver`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
import optax

from jaxhess._linalg import available_bytes
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.functions import wide
from jaxhess.operators.gauss_newton_full import GaussNewton
from jaxhess.operators.iterative import iterative_solve
from jaxhess.operators.jacobian import OutputJacobian
from jaxhess.operators.preconditioning import preconditioner_of
from jaxhess.operators.reduction import Reduction
from jaxhess.operators.vectors import dtype_of, like, norm, plus
from jaxhess.optimizers.core import transformation
from jaxhess.optimizers.damping import Constant, TrustRadius, as_rule, levenberg_marquardt, refuse_relative
from jaxhess.optimizers.kronecker_inverse import KroneckerInverse, averaged, no_factors, units_of
from jaxhess.optimizers.method import Direction, Method, Settings
from jaxhess.optimizers.products import LinearisedGaussNewton
from jaxhess.optimizers.state import Optimizer, Wanted
from jaxhess.transforms.checks import as_static_integer, check_number

__all__ = ["Choice", "choose_solver", "gauss_newton", "scale_by_gauss_newton"]

_LARGEST = 6144  # rows that are factored
_ITERATIONS = 100
_DECREASE = 6.0  # of damping: along valleys of recurrent networks it has to come down again quickly
_PRODUCTS = 300  # forming may take the work of so many products


class Choice(NamedTuple):
    """`solver` is "gram", "normal" or "cg"; `reason` says why."""

    solver: str
    reason: str


def choose_solver(curvature: GaussNewton) -> Choice:
    """How `gauss_newton` solves with a whole Gauss-Newton matrix, and why, from its sizes alone.

    The smaller of the sides rM and N is factored if it has at most 6144 rows, fits in memory, and is formed by the work of
    at most 300 products with G (a pass forward and one backward, with tangents); else conjugate gradients, with a
    Kronecker preconditioner, do with products.

    >>> import jax.numpy as jnp, jaxhess
    >>> def model(p, x):
    ...     return p["w"] @ x + p["b"]
    >>> params = {"w": jnp.ones((2, 3)), "b": jnp.zeros(2)}
    >>> G = jaxhess.gauss_newton(model, jaxhess.losses.squared_error, blocks="full")(params, jnp.eye(3), jnp.ones((3, 2)))
    >>> choose_solver(G)
    Choice(solver='gram', reason='6 outputs of all examples, 8 parameters')
    """
    leaves = curvature._leaves()
    rows, size = leaves[0].examples * leaves[0].outputs, curvature.in_size()
    smaller = min(rows, size)
    sides = f"{rows} outputs of all examples, {size} parameters"
    if smaller > _LARGEST:
        return Choice("cg", f"{sides}: more than {_LARGEST} on both sides")
    if 4 * smaller * smaller * 8 > available_bytes() / 2:
        return Choice("cg", f"{sides}: the smaller side does not fit in memory as a matrix")
    forming, product = 2 * rows * size * smaller + smaller**3 / 3, sum(map(_work, leaves))
    if forming > _PRODUCTS * product:
        return Choice("cg", f"{sides}: forming the matrix takes the work of {forming / product:.0f} products")
    return Choice("gram" if rows < size else "normal", sides)


def _work(J: OutputJacobian) -> float:
    """Of a product, what one parameter takes: four products of a matrix with the vectors of all examples and places."""
    if J.through is not None or not J.uses:
        return 8 * J.examples * J.size
    # y and z at p places have p y and p z numbers for y z of the parameter: p y z is the root of (p y) (p z) (y z).
    work = 0.0
    for use in J.uses:
        outputs = use.rows.size / max(1, J.examples * J.outputs)
        inputs = outputs if use.inputs is None else math.sqrt(outputs * J.size * use.inputs.size / max(1, J.examples))
        work += 8 * J.examples * inputs
    return work


class _Factored(NamedTuple):
    """The reductions of G or of its blocks, with the operator to multiply with."""

    operator: Any
    decay: Array
    reductions: list[Reduction]


class _Iterated(NamedTuple):
    operator: Any
    decay: Array
    preconditioner: KroneckerInverse | None = None


@dataclasses.dataclass(frozen=True)
class _GaussNewton(Method):
    solver_asked: str
    tolerance: Any
    iterations: int
    undamped: bool
    name: str = "gauss_newton"

    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        del structure, count
        operator = curvature if hasattr(curvature, "in_structure") else curvature()
        if isinstance(operator, LinearisedGaussNewton):
            return _Iterated(operator, decay, None if operator.blocks is None else _inverse(operator.blocks)), memory
        if not lx.is_positive_semidefinite(operator):
            raise InputError(
                "gauss_newton: curvature must be positive semidefinite, as jaxhess.gauss_newton and jaxhess.fisher give it; "
                f"this {type(operator).__name__} has no such tag. newton takes a Hessian; step((model, loss), optimizer) "
                "computes the Gauss-Newton matrix, within optax.chain and the like too"
            )
        operator = wide(operator)
        asked = self.solver_asked
        if not isinstance(operator, GaussNewton):
            if asked in ("gram", "normal"):
                raise InputError(
                    f"gauss_newton: solver={asked!r} is for the whole matrix, jaxhess.gauss_newton(.., blocks='full'), "
                    f"got a {type(operator).__name__}"
                )
            blocks = operator._operators() if isinstance(operator, BlockDiagonal) else [operator]
            if not all(isinstance(block, CurvatureOperator) for block in blocks):
                raise InputError(f"gauss_newton: curvature must be an operator of jaxhess, got {type(operator).__name__}")
            if asked == "cg" or any(block._choose("auto")[0] == "iterate" for block in blocks):
                return _Iterated(operator, decay), memory
            return self._checked(_Factored(operator, decay, [block._reduction() for block in blocks])), memory
        chosen = choose_solver(operator).solver if asked == "auto" else asked
        if chosen == "cg":
            return _Iterated(operator, decay), memory
        return self._checked(_Factored(operator, decay, [operator.reduction_of(chosen)])), memory

    def _checked(self, prepared: "_Factored") -> "_Factored":
        if self.undamped and any(reduction.columns.missing for reduction in prepared.reductions):
            raise InputError(
                "gauss_newton: a matrix of fewer outputs of all examples than parameters is singular; damping=0 does not "
                "solve with it, any positive one does"
            )
        return prepared

    def solver(self, prepared: Any) -> str:
        if isinstance(prepared, _Iterated):
            return "conjugate gradients"
        if not isinstance(prepared.operator, GaussNewton):
            return "Cholesky of each block"
        gram = prepared.reductions[0].sign is not None
        return "Cholesky of the Gram matrix" if gram else "Cholesky of the normal equations"

    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        shift = damping + prepared.decay
        right = jax.tree.map(lambda g, s: -g.astype(s.dtype), gradient, prepared.operator.in_structure())
        if isinstance(prepared, _Iterated):
            preconditioner = None
            if prepared.preconditioner is not None:
                preconditioner = prepared.preconditioner.with_damping(shift)
            elif not isinstance(prepared.operator, LinearisedGaussNewton):
                preconditioner = preconditioner_of(prepared.operator, shift, asked=True)
            start = like(right, start) if jax.tree.leaves(start) else None
            step, info = iterative_solve(
                prepared.operator, right, shift, method="cg", preconditioner=preconditioner, tolerance=self.tolerance,
                max_steps=self.iterations, start=start,
            )  # fmt: skip
            iterations, residual = info.iterations.astype(jnp.int32), info.residual.astype(damping.dtype)
            return Direction(like(gradient, step), damping, iterations, residual)
        treedef = jax.tree.structure(right)
        solve = _solver_at(prepared.reductions, shift)
        one = len(prepared.reductions) == 1 and isinstance(prepared.operator, GaussNewton)

        def solved(vector: PyTree) -> PyTree:
            if one:
                return solve[0](vector)
            parts = jax.tree.leaves(vector)
            return jax.tree.unflatten(treedef, [by(part) for by, part in zip(solve, parts, strict=True)])

        step = solved(right)
        left = plus(plus(right, -1, prepared.operator.mv(step)), -shift, step)
        if any(reduction.sign is not None for reduction in prepared.reductions):
            # The difference of the Gram form leaves what rounding did, over λ: one correction takes that out.
            step = plus(step, 1, solved(left))
            left = plus(plus(right, -1, prepared.operator.mv(step)), -shift, step)
        size = norm(right)
        residual = norm(left) / jnp.where(size > 0, size, 1)
        return Direction(like(gradient, step), damping, jnp.zeros((), jnp.int32), residual.astype(damping.dtype))

    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        structure = prepared.operator.in_structure()
        vector = jax.tree.map(lambda x, s: x.astype(s.dtype), vector, structure)
        return plus(prepared.operator.mv(vector), prepared.decay, vector)


def _inverse(blocks: BlockDiagonal) -> KroneckerInverse:
    """The inverse of the factors of these blocks alone."""
    structure, units = blocks.in_structure(), units_of(blocks)
    fresh = [no_factors(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(structure)]
    factors = averaged(blocks, units, fresh, jnp.zeros(()))
    return KroneckerInverse(factors, jnp.zeros((), dtype_of(structure)), units, structure)


def _solver_at(reductions: list[Reduction], damping: Array) -> list[Any]:
    """For each reduction, what solves with it plus the damping."""

    def of(reduction: Reduction) -> Any:
        shift = damping.astype(reduction.matrix.dtype)
        factor = jnp.linalg.cholesky(reduction.damped(shift))
        return lambda vector: reduction.solution(vector, lambda c: jax.scipy.linalg.cho_solve((factor, True), c), shift)

    return [of(reduction) for reduction in reductions]


def scale_by_gauss_newton(
    blocks: str = "full",
    *,
    solver: str = "auto",
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = 1.0,
    momentum: Any = None,
    weight_decay: Any = None,
    tolerance: float = 1e-2,
    max_iterations: int | None = None,
    max_attempts: int = 8,
    max_failures: int = 10,
) -> Optimizer:
    """Gradients scaled by the inverse of the damped Gauss-Newton matrix.

    `update(grads, state, params, curvature=G, value=E, value_fn=f)` takes G from `jaxhess.gauss_newton(model, loss,
    blocks=blocks)`, or from `jaxhess.fisher`, at `params`.

    Args:
        blocks: "full" (all parameters together) or "diagonal", for `jaxhess.optimizers.step`; `update` takes what it is
            given.
        solver: "auto" picks by size (`choose_solver`); "gram", "normal" or "cg" asks for one.
        tolerance, max_iterations: of conjugate gradients, which start from the last step: the relative residual at which
            they stop, and the number of products if not (100). Where they stop early the step is used as it is; the state's
            `info.residual` tells.
        damping, learning_rate, momentum, weight_decay, max_attempts, max_failures: as in `scale_by_newton`; the name
            "levenberg_marquardt" is `levenberg_marquardt(decrease=6.0)` here.

    Raises as `scale_by_newton` does. Source: Levenberg (1944), Marquardt (1963), Schraudolph (2002).

    >>> import jax, jax.numpy as jnp, jaxhess, optax
    >>> def model(params, x):
    ...     return jnp.tanh(params["w"] @ x)
    >>> params, xs, targets = {"w": jnp.ones((1, 2))}, jnp.eye(2), jnp.full((2, 1), 0.5)
    >>> def mean(params):
    ...     return jnp.mean((jax.vmap(model, (None, 0))(params, xs) - targets) ** 2) / 2
    >>> optimizer = optax.chain(scale_by_gauss_newton(), optax.scale(-1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     E, grads = jax.value_and_grad(mean)(params)
    ...     G = jaxhess.gauss_newton(model, jaxhess.losses.squared_error, blocks="full")(params, xs, targets)
    ...     updates, state = optimizer.update(grads, state, params, curvature=G, value=E, value_fn=mean)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(mean(params) < 1e-10), state[0].info.solver_name
    (True, 'Cholesky of the normal equations')
    """
    if blocks not in ("diagonal", "full"):
        raise InputError(f"gauss_newton: blocks must be 'diagonal' or 'full', got {blocks!r}")
    if solver not in ("auto", "gram", "normal", "cg"):
        raise InputError(f"gauss_newton: solver must be 'auto', 'gram', 'normal' or 'cg', got {solver!r}")
    if blocks == "diagonal" and solver in ("gram", "normal"):
        raise InputError(f"gauss_newton: solver={solver!r} is for the whole matrix, blocks='full', got blocks='diagonal'")
    check_number("gauss_newton: tolerance", tolerance, above=0)
    most = _ITERATIONS if max_iterations is None else as_static_integer("gauss_newton: max_iterations", max_iterations)
    named = isinstance(damping, str) and damping == "levenberg_marquardt"
    rule = levenberg_marquardt(decrease=_DECREASE) if named else as_rule("gauss_newton", damping)
    if isinstance(rule, TrustRadius):
        raise InputError("gauss_newton: a TrustRadius is for newton with curvature='trust_region'")
    refuse_relative("gauss_newton", rule)
    settings = Settings(
        rule, learning_rate, momentum, weight_decay, max_attempts, max_failures, warm_start=solver in ("auto", "cg")
    ).checked("gauss_newton")
    zero = isinstance(rule, Constant) and isinstance(rule.damping, int | float) and rule.damping == 0
    method = _GaussNewton(solver, tolerance, most, zero and weight_decay is None)
    made = transformation(method, settings)
    return Optimizer.of(made, Wanted("gauss_newton", blocks, solver=solver))


def gauss_newton(
    blocks: str = "full",
    *,
    solver: str = "auto",
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = 1.0,
    momentum: Any = None,
    weight_decay: Any = None,
    tolerance: float = 1e-2,
    max_iterations: int | None = None,
    max_attempts: int = 8,
    max_failures: int = 10,
) -> Optimizer:
    """Gauss-Newton, for squared errors the method of Levenberg and Marquardt: `scale_by_gauss_newton`, whose options it
    takes, and the sign of a descent.

    For `jaxhess.optimizers.step((model, loss), gauss_newton())`, or as any optax optimizer, with `curvature=` among the
    arguments of `update`.

    >>> import jax.numpy as jnp, jaxhess
    >>> from jaxhess import optimizers
    >>> def model(params, x):
    ...     return jnp.tanh(params["w"] @ x)
    >>> params, xs, targets = {"w": jnp.ones((1, 2))}, jnp.eye(2), jnp.full((2, 1), 0.5)
    >>> optimizer = optimizers.gauss_newton()
    >>> train = optimizers.step((model, jaxhess.losses.squared_error), optimizer)
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     params, state, metrics = train(params, state, xs, targets)
    >>> bool(metrics.loss < 1e-10)
    True
    """
    scaled = scale_by_gauss_newton(
        blocks, solver=solver, damping=damping, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay,
        tolerance=tolerance, max_iterations=max_iterations, max_attempts=max_attempts, max_failures=max_failures,
    )  # fmt: skip
    return Optimizer.of(optax.chain(scaled, optax.scale(-1.0)), scaled.wanted)
