"""Newton's method with the exact Hessian, block by block or whole, for networks whose curvature is indefinite.

    d = -(C + λI)^-1 g

    absolute         C = |H|                                (Dauphin et al. 2014, saddle-free Newton)
    positive_part    C = the positive semidefinite matrix nearest to H
    shift            C = H + max(0, -λ_min(H)) I
    trust_region     min g^T s + s^T H s / 2 over ||s|| <= Δ    (whole only; Moré and Sorensen 1983)

H is diagonalised once an update, in its reduced space; every damping that is tried costs two small products then.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxhess._linalg import symmetrise
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.block import BlockDiagonal
from jaxhess.operators.eigen import Eigen, eigen_of
from jaxhess.operators.functions import wide
from jaxhess.operators.paths import naming
from jaxhess.operators.reduction import Reduction, Whole
from jaxhess.operators.vectors import like
from jaxhess.optimizers.core import transformation
from jaxhess.optimizers.damping import TrustRadius, as_rule, refuse_relative
from jaxhess.optimizers.masking import kept_entries
from jaxhess.optimizers.method import Direction, Method, Settings
from jaxhess.optimizers.state import Optimizer, Wanted
from jaxhess.optimizers.trust_region import minimum_in_ball

__all__ = ["newton", "scale_by_newton"]

_CURVATURES = ("absolute", "positive_part", "shift", "trust_region")
_BLOCKS = ("diagonal", "full")
_LARGEST = 6144  # rows of a whole Hessian that are diagonalised


@dataclasses.dataclass(frozen=True)
class _Newton(Method):
    """The eigendecomposition of each block, or of the whole matrix."""

    curvature: str
    blocks: str
    name: str = "newton"

    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        del count
        operator = curvature if hasattr(curvature, "in_structure") else curvature()
        if isinstance(operator, BlockDiagonal):
            if self.curvature == "trust_region":
                raise InputError(
                    "newton: curvature='trust_region' needs the whole Hessian, jaxhess.hessian(fun, blocks='full'), not the "
                    "blocks of each parameter"
                )
            eigens = []
            for path, block in operator.items():
                with naming(path):
                    eigens.append(self._bent(_factorable(block)._eigen(), decay))
            return eigens, memory
        if isinstance(operator, CurvatureOperator):
            return self._bent(_factorable(operator)._eigen(), decay), memory
        if not hasattr(operator, "as_matrix"):
            raise InputError(f"newton: curvature must be a Hessian of jaxhess, got {type(operator).__name__}")
        entries = kept_entries(structure, operator.in_structure())
        _check_size(operator.in_size() if entries is None else len(entries))
        matrix = symmetrise(operator.as_matrix())
        matrix = matrix if entries is None else matrix[entries][:, entries]
        return self._bent(eigen_of(Reduction(Whole.of(structure), matrix)), decay), memory

    def _bent(self, eigen: Eigen, decay: Array) -> Eigen:
        """|H| or its positive part; H itself where that is what the step is made of."""
        eigen = eigen.mapped(lambda values: values + decay.astype(values.dtype))
        if self.curvature == "absolute":
            return eigen.mapped(jnp.abs)
        if self.curvature == "positive_part":
            return eigen.mapped(lambda values: jnp.maximum(values, 0))
        return eigen

    def solver(self, prepared: Any) -> str:
        if self.curvature == "trust_region":
            return "trust region by eigendecomposition"
        return "eigendecomposition of each block" if isinstance(prepared, list) else "eigendecomposition of the whole"

    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        del start
        zero, nothing = jnp.zeros((), jnp.int32), jnp.zeros_like(damping)
        if self.curvature == "trust_region":
            if prepared.missing:
                raise InputError("newton: a trust region needs the whole Hessian, jaxhess.hessian(fun, blocks='full')")
            found = minimum_in_ball(prepared.values, prepared.coefficients(gradient), damping)
            step = prepared.columns.push(prepared.rotated(found.coordinates))
            return Direction(like(gradient, step), nothing, zero, nothing)
        step = _by_block(prepared, gradient, lambda eigen, part: self._solved(eigen, part, damping))
        return Direction(like(gradient, step), damping, zero, nothing)

    def _solved(self, eigen: Eigen, gradient: PyTree, damping: Array) -> PyTree:
        shift = damping.astype(eigen.values.dtype)
        if self.curvature == "shift":
            shift = shift + _lift(eigen)
        gradient = jax.tree.map(lambda g, s: g.astype(s.dtype), gradient, eigen.columns.structure)

        def inverse(values: Array) -> Array:
            # Where there is neither curvature nor damping there is no step; what is not a number stays so.
            flat = values + shift <= 0
            return -jnp.where(flat, 0, 1 / jnp.where(flat, 1, values + shift))

        return eigen.mapped(inverse).product(gradient)

    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        def times(eigen: Eigen, part: PyTree) -> PyTree:
            part = jax.tree.map(lambda x, s: x.astype(s.dtype), part, eigen.columns.structure)
            if self.curvature != "shift":
                return eigen.product(part)
            lift = _lift(eigen)
            return eigen.mapped(lambda values: values + lift).product(part)

        return _by_block(prepared, vector, times)


def _lift(eigen: Eigen) -> Array:
    """What makes the lowest eigenvalue zero, where it is negative."""
    lowest = jnp.min(eigen.values, initial=0)
    return -jnp.minimum(lowest, eigen.beyond)


def _factorable(block: Any) -> Any:
    """The operator, in float32 or wider; raises `InputError` where its reduced space is too large to diagonalise."""
    chosen, reason = block._choose("auto")
    if chosen == "iterate":
        raise InputError(
            f"newton: {reason}. Use kronecker_newton for such layers, or gauss_newton, which can go by conjugate gradients"
        )
    return wide(block)


def _check_size(rows: int) -> None:
    if rows > _LARGEST:
        raise InputError(
            f"newton: the whole Hessian has {rows} rows, more than {_LARGEST}, too many to diagonalise in every update. Use "
            "blocks='diagonal', kronecker_newton, or gauss_newton, which can go by conjugate gradients"
        )


def _by_block(prepared: Any, vector: PyTree, function: Any) -> PyTree:
    if not isinstance(prepared, list):
        return function(prepared, vector)
    leaves, treedef = jax.tree.flatten(vector)
    return jax.tree.unflatten(treedef, [function(eigen, leaf) for eigen, leaf in zip(prepared, leaves, strict=True)])


def scale_by_newton(
    curvature: str = "absolute",
    blocks: str = "diagonal",
    *,
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = 1.0,
    momentum: Any = None,
    weight_decay: Any = None,
    max_attempts: int = 8,
    max_failures: int = 10,
) -> Optimizer:
    """Gradients scaled by the inverse of the exact Hessian, made definite.

    `update(grads, state, params, curvature=H, value=E, value_fn=f)` takes H from `jaxhess.hessian(fun, blocks=blocks)` at
    `params`; `f(params)` gives the mean error of other parameters on the same batch. Other extra arguments are let pass.
    The result is minus the step, as of every `scale_by_..`: `optax.scale(-1)` makes the step of it, which has been
    measured at full length; `newton` is both.

    Args:
        curvature: "absolute", "positive_part" or "shift", what is done about negative eigenvalues, block by block or in
            the whole matrix; "trust_region", for blocks="full": H as it is, the step kept within a radius.
        blocks: "diagonal" or "full", for `jaxhess.optimizers.step`; `update` takes what it is given.
        damping: λ >= 0 of `C + λI`, a number or a schedule; or "levenberg_marquardt", or
            `jaxhess.optimizers.levenberg_marquardt(initial, ..)`. A `TrustRadius` for the trust region.
        learning_rate: of the step, a number or a schedule; "exact" for the one that minimises the quadratic model. A radius
            limits the step at a learning rate of 1.
        momentum: what the last step counts for, a number or a schedule; "exact", with an exact learning rate, for the two
            that minimise the model together; None for none.
        weight_decay: w of the penalty `w ||params||^2 / 2`, which becomes part of the error, its gradient and curvature.
        max_attempts: how many dampings (or halved lengths, with a constant one) are tried in one update before it gives
            up and leaves the parameters as they are.
        max_failures: updates in a row with numbers that are not finite, before it is an error.

    `product=`, products with a matrix (a function of vectors, or an operator), is the curvature of the quadratic model where
    that is another than `curvature`; `all_params=` are what `value_fn` and `product` take where `optax.masked` or
    `optax.partition` leaves some parameters to others.

    With `value_fn`, a step that raises the error, by more than its rounding, is not taken. With `value` alone, the damping
    follows from how the error went since the last update. A constant damping needs neither.

    Raises:
        InputError: for options out of range; in `update`, if the curvature is missing, has other parameters than the
            gradients (named by path) or is too large to diagonalise (a whole Hessian of more than 6144 rows), or if the
            damping needs a value and there is none.
        RuntimeError: (equinox's; within `jax.jit` what JAX makes of it) when `max_failures` is reached; not with
            `raise_failures=False` in `update`, which leaves it to the caller to look at `info.failures_left` and compiles
            without a callback to the host.

    Source: Naumov (2017), Theorem 1, for the Hessian; Dauphin et al. (2014) for its absolute value.

    >>> import jax, jax.numpy as jnp, jaxhess, optax
    >>> def error(params, x):
    ...     return jnp.sum((jnp.tanh(params["w"] @ x) - 0.5) ** 2)
    >>> params, xs = {"w": jnp.ones((1, 2))}, jnp.eye(2)
    >>> def mean(params):
    ...     return jnp.mean(jax.vmap(error, (None, 0))(params, xs))
    >>> optimizer = optax.chain(scale_by_newton(), optax.scale(-1.0))
    >>> state = optimizer.init(params)
    >>> for _ in range(8):
    ...     E, grads, H = jaxhess.value_grad_and_hessian(error)(params, xs)
    ...     updates, state = optimizer.update(grads, state, params, curvature=H, value=E, value_fn=mean)
    ...     params = optax.apply_updates(params, updates)
    >>> bool(mean(params) < 1e-10)
    True
    """
    if curvature not in _CURVATURES:
        raise InputError(f"newton: curvature must be one of {', '.join(_CURVATURES)}, got {curvature!r}")
    if blocks not in _BLOCKS:
        raise InputError(f"newton: blocks must be 'diagonal' or 'full', got {blocks!r}")
    if curvature == "trust_region":
        if blocks != "full":
            raise InputError("newton: curvature='trust_region' is for blocks='full'")
        rule = TrustRadius() if isinstance(damping, str) and damping == "levenberg_marquardt" else damping
        if not isinstance(rule, TrustRadius):
            raise InputError("newton: a trust region has a radius in the place of a damping; pass damping=TrustRadius(..)")
    else:
        rule = as_rule("newton", damping)
        if isinstance(rule, TrustRadius):
            raise InputError("newton: a TrustRadius is for curvature='trust_region'")
        refuse_relative("newton", rule)
    settings = Settings(rule, learning_rate, momentum, weight_decay, max_attempts, max_failures).checked("newton")
    made = transformation(_Newton(curvature, blocks), settings)
    return Optimizer.of(made, Wanted("hessian", blocks))


def newton(
    curvature: str = "absolute",
    blocks: str = "diagonal",
    *,
    damping: Any = "levenberg_marquardt",
    learning_rate: Any = 1.0,
    momentum: Any = None,
    weight_decay: Any = None,
    max_attempts: int = 8,
    max_failures: int = 10,
) -> Optimizer:
    """Newton's method with the exact Hessian: `scale_by_newton`, whose options it takes, and the sign of a descent.

    For `jaxhess.optimizers.step(fun, newton())`, or as any optax optimizer, with `curvature=` given to `update`.

    >>> import jax.numpy as jnp, jaxhess
    >>> from jaxhess import optimizers
    >>> def error(params, x):
    ...     return jnp.sum((jnp.tanh(params["w"] @ x) - 0.5) ** 2)
    >>> params, xs = {"w": jnp.ones((1, 2))}, jnp.eye(2)
    >>> optimizer = optimizers.newton("positive_part")
    >>> train, state = optimizers.step(error, optimizer), optimizer.init(params)
    >>> for _ in range(8):
    ...     params, state, metrics = train(params, state, xs)
    >>> bool(metrics.loss < 1e-10)
    True
    """
    scaled = scale_by_newton(
        curvature, blocks, damping=damping, learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay,
        max_attempts=max_attempts, max_failures=max_failures,
    )  # fmt: skip
    return Optimizer.of(optax.chain(scaled, optax.scale(-1.0)), scaled.wanted)
