"""What a second-order optimizer is made of: what it solves with, and the settings that all of them have in common."""

import abc
import dataclasses
from typing import Any, NamedTuple

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.optimizers.damping import Rule, TrustRadius
from jaxhess.transforms.checks import check_number

__all__ = ["Direction", "Method", "Refinement", "Settings"]


class Direction(NamedTuple):
    """`step` d and how the solver went; `damping` is λ in the quadratic model, 0 where a radius takes its place."""

    step: PyTree
    damping: Array
    iterations: Array
    residual: Array


class Method(abc.ABC):
    """What a second-order optimizer solves with. Hashable, without arrays."""

    name: str

    def init(self, params: PyTree) -> PyTree:
        """What is kept from step to step; nothing by default."""
        del params
        return ()

    @abc.abstractmethod
    def prepare(self, curvature: Any, structure: PyTree, memory: PyTree, count: Array, decay: Array) -> tuple[Any, PyTree]:
        """What all attempts of one update share (an eigendecomposition, say), and the new memory. `decay` times the identity
        belongs to the curvature."""

    @abc.abstractmethod
    def solver(self, prepared: Any) -> str:
        """One of `SOLVERS`."""

    @abc.abstractmethod
    def direction(self, prepared: Any, gradient: PyTree, damping: Array, start: PyTree) -> Direction:
        """The step for one damping; `start` is the last one, or ()."""

    def size(self, prepared: Any) -> Array:
        """The mean eigenvalue of the curvature, by size, without weight decay: what a relative damping is a multiple of."""
        raise NotImplementedError(f"{self.name} has no relative damping")

    @abc.abstractmethod
    def product(self, prepared: Any, vector: PyTree) -> PyTree:
        """C times a vector: the matrix of the quadratic model, definite where the method makes it so."""


@dataclasses.dataclass(frozen=True)
class Refinement:
    """At most `iterations` of conjugate gradients, until one gains less than the share `progress` of all."""

    iterations: int
    progress: Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all methods have in common; see `scale_by_newton` for each."""

    rule: Rule
    learning_rate: Any = 1.0
    momentum: Any = None
    weight_decay: Any = None
    attempts: Any = 8
    failures: Any = 10
    warm_start: bool = False
    tuned_every: int = 0  # how often the damping of an approximate inverse is chosen by the quadratic model; 0: never
    refinement: Refinement | None = None  # conjugate gradients that the method is the preconditioner of
    interpolates: bool = False  # a poor step is shortened to the minimum of a parabola before damping rises

    @property
    def keeps_steps(self) -> bool:
        """Whether the last step is needed again."""
        return self.momentum is not None or self.warm_start

    def checked(self, name: str) -> "Settings":
        """Itself; raises `InputError` for what is out of range."""
        for what, given in (("learning_rate", self.learning_rate), ("momentum", self.momentum)):
            none = given is None and what == "momentum"
            if (isinstance(given, str) and given != "exact") or (given is None and not none):
                raise InputError(f"{name}: {what} must be a number, a schedule or 'exact', got {given!r}")
            if not (none or isinstance(given, str) or callable(given)):
                check_number(f"{name}: {what}", given)
        if callable(self.weight_decay):
            raise InputError(f"{name}: weight_decay takes no schedule; optax.inject_hyperparams makes one of it")
        if self.weight_decay is not None:
            check_number(f"{name}: weight_decay", self.weight_decay, least=0)
        for what, given in (("max_attempts", self.attempts), ("max_failures", self.failures)):
            check_number(f"{name}: {what}", given, least=1, whole=True)
        if self.momentum == "exact" and self.learning_rate != "exact":
            raise InputError(f"{name}: momentum='exact' needs learning_rate='exact': one quadratic model gives both")
        if isinstance(self.rule, TrustRadius) and (self.learning_rate == "exact" or self.keeps_steps):
            raise InputError(f"{name}: a trust region sets the whole step; it takes no learning_rate='exact' or momentum")
        return self
