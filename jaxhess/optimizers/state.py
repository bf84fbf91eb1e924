"""What a second-order optimizer remembers and reports."""

import contextvars
from typing import Any, NamedTuple

import jax
import optax

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.optimizers.damping import Control
from jaxhess.transforms.checks import check_parameters

__all__ = [
    "SOLVERS",
    "Optimizer",
    "SecondOrderState",
    "StepInfo",
    "Wanted",
    "failures_message",
    "find_state",
    "find_states",
    "wanted_within",
]

SOLVERS = (
    "none",
    "eigendecomposition of each block",
    "eigendecomposition of the whole",
    "trust region by eigendecomposition",
    "Cholesky of each block",
    "Cholesky of the Gram matrix",
    "Cholesky of the normal equations",
    "conjugate gradients",
    "Kronecker factors",
)


class StepInfo(NamedTuple):
    """How the last step went; each 0-d. NaN where it is not known.

    `solver` is a place in `SOLVERS`, whose name is `solver_name`.
    """

    loss: Array  # before the step
    new_loss: Array  # after it, as `value_fn` says
    predicted: Array  # what the quadratic model said it would fall by
    ratio: Array  # what it fell by, over that
    accepted: Array  # bool
    attempts: Array  # int32: how many dampings, or lengths, were tried
    iterations: Array  # int32: of the solver, all attempts together
    residual: Array  # relative, of the last linear system
    learning_rate: Array
    momentum: Array
    length: Array  # Euclidean norm of the step
    solver: Array  # int32
    failures_left: Array  # int32: how many more updates in a row may meet a number which is not finite; 0 is an error

    @property
    def solver_name(self) -> str:
        """Which solver it was."""
        return SOLVERS[int(self.solver)]


class SecondOrderState(NamedTuple):
    """The state of `scale_by_newton` and the others: arrays only, so it can be saved, restored, sharded and donated."""

    # Optax's name, by which `optax.tree_utils.tree_get(state, "count")` finds it, is that of a method of tuples too.
    count: Array  # () int32: updates so far  # pyright: ignore[reportIncompatibleMethodOverride]
    control: Control  # 7 x (): damping or radius, growth, scale of repeats, the inverse's damping, level, stalled, unit
    failures: Array  # () int32: updates in a row that met a number which is not finite
    value: Array  # (): the last `value`, for damping without `value_fn`
    previous: PyTree  # like the parameters: the last step, for momentum and warm starts; () where neither is in use
    memory: PyTree  # what the method itself keeps: Kronecker factors
    info: StepInfo


class Wanted(NamedTuple):
    """The curvature that an optimizer takes, for `jaxhess.optimizers.step`: "hessian", "gauss_newton" or "either", with
    `blocks` "diagonal" or "full" and, for the whole of them, a `solver`; `sampled` if factors of a random direction of the
    outputs will do."""

    curvature: str
    blocks: str
    sampled: bool = False
    solver: str = "auto"


class Optimizer(optax.GradientTransformationExtraArgs):
    """An `optax.GradientTransformationExtraArgs` that knows which curvature it wants, in `wanted`."""

    wanted: Wanted

    @classmethod
    def of(cls, transformation: optax.GradientTransformation, wanted: Wanted) -> "Optimizer":
        """The transformation, with what it wants beside it."""

        def init(params: PyTree) -> Any:
            if jax.tree.leaves(params):
                params = check_parameters(params)
            found = _WANTED.get()
            if found is not None:
                found.append(wanted)
            return transformation.init(params)

        made = cls(init, optax.with_extra_args_support(transformation).update)
        made.wanted = wanted
        return made


_WANTED: contextvars.ContextVar[list[Wanted] | None] = contextvars.ContextVar("wanted", default=None)


def wanted_within(optimizer: Any, params: PyTree) -> Wanted | None:
    """What the second-order optimizers within `optimizer` want, whatever is wrapped around them; None without one.

    Wrappers forget all but two functions; their `init` calls that of what they wrap. Raises `InputError` where two want
    different curvatures, of which one update can be given one only.
    """
    found: list[Wanted] = []
    token = _WANTED.set(found)
    try:
        jax.eval_shape(optimizer.init, params)
    finally:
        _WANTED.reset(token)
    for other in found[1:]:
        if other != found[0]:
            raise InputError(
                "step: the optimizer holds two second-order ones that want different curvatures, "
                f"{_described(found[0])} and {_described(other)}. Give them the same one, by step(.., curvature=function of "
                "(params, *batch)), or train with one method"
            )
    return found[0] if found else None


def _described(wanted: Wanted) -> str:
    factors = ", factors of sampled directions" if wanted.sampled else ""
    solver = "" if wanted.solver == "auto" else f", solver {wanted.solver!r}"
    return f"({wanted.curvature}, blocks {wanted.blocks!r}{factors}{solver})"


def find_state(state: Any) -> SecondOrderState | None:
    """The first `SecondOrderState` within an optimizer's state, that of a chain say; None where there is none.

    >>> import jax.numpy as jnp, optax
    >>> from jaxhess import optimizers
    >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizers.newton())
    >>> state = optimizers.find_state(optimizer.init({"w": jnp.ones(2)}))
    >>> state.count.item(), round(state.control.damping.item(), 6), state.info.solver_name
    (0, 0.01, 'none')
    """
    return next(iter(find_states(state)), None)


def find_states(state: Any) -> list[SecondOrderState]:
    """Every `SecondOrderState` within an optimizer's state."""
    return [node for node in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(node)]


def failures_message(name: str, count: Any) -> str:
    """What is said of too many failures."""
    return (
        f"{name}: {count} updates in a row met a loss, gradient or curvature that is not finite, and were not taken. Look "
        "at the data and at the loss at these parameters; damping mends only a singular curvature that has none."
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, SecondOrderState)
