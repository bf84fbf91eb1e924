"""Inertia of each layer's block, and its record along a training run."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from jaxhess._typing import InputError
from jaxhess.operators import Inertia
from jaxhess.operators.mapped import count_signs
from jaxhess.spectra._common import blocks_of, checked, eigenvalues_of

__all__ = ["InertiaHistory", "inertia_by_block"]


def inertia_by_block(operator: Any, tolerance: Any = None) -> dict[str, Inertia]:
    """How many eigenvalues of each parameter's diagonal block are positive, negative and zero, by the parameter's path.

    `operator` is a Hessian or Gauss-Newton matrix of any kind (of one block, the path is ""); `tolerance` as for
    `CurvatureOperator.inertia`. Works under `jit`, so a training step can return it; see `InertiaHistory`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.operators import BlockDiagonal, Diagonal
        >>> H = BlockDiagonal({"w": Diagonal(jnp.array([2.0, -1.0])), "b": Diagonal(jnp.zeros(1))})
        >>> {path: [int(count) for count in counts] for path, counts in inertia_by_block(H).items()}
        {'b': [0, 0, 1], 'w': [1, 1, 0]}
    """
    blocks = blocks_of("inertia_by_block", operator)
    for block in blocks.values():
        checked("inertia_by_block", block)
    return _inertias(blocks, None if tolerance is None else jnp.asarray(tolerance))


class InertiaHistory:
    """The inertia of every block at some steps of a training run, as numpy arrays.

    `paths` names the blocks and `sizes` (blocks,) counts their rows; `steps` (T,) are as given; `positive`, `negative` and
    `zero` (T, blocks) are the counts, -1 where a Hessian was not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.operators import BlockDiagonal, Diagonal
        >>> history = InertiaHistory()
        >>> for step in (0, 10):
        ...     history.append(step, BlockDiagonal({"w": Diagonal(jnp.array([2.0, step - 1.0]))}))
        >>> history.paths, history.steps.tolist(), history.negative.tolist()
        (('w',), [0, 10], [[1], [0]])
    """

    def __init__(self) -> None:
        self.paths: tuple[str, ...] = ()
        self._steps: list[float] = []
        self._counts: list[np.ndarray] = []

    def append(self, step: float, inertia: Any) -> None:
        """Add a step: a Hessian, or the `inertia_by_block` of one, which a compiled training step may have returned.

        Raises `InputError` if its blocks are not those of the steps before.
        """
        found = inertia if isinstance(inertia, Mapping) else inertia_by_block(inertia)
        paths = tuple(found)
        if self._steps and paths != self.paths:
            raise InputError(f"InertiaHistory.append: the blocks are {paths}, those of the steps before are {self.paths}")
        self._counts.append(np.array([[int(count) for count in found[path]] for path in paths]))
        self._steps.append(step)
        self.paths = paths

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def steps(self) -> np.ndarray:
        """The steps, (T,)."""
        return np.asarray(self._steps)

    @property
    def positive(self) -> np.ndarray:
        """How many eigenvalues are positive, (T, blocks)."""
        return self._all[..., 0]

    @property
    def negative(self) -> np.ndarray:
        """How many eigenvalues are negative, (T, blocks)."""
        return self._all[..., 1]

    @property
    def zero(self) -> np.ndarray:
        """How many eigenvalues are neither, (T, blocks)."""
        return self._all[..., 2]

    @property
    def sizes(self) -> np.ndarray:
        """The rows of each block, (blocks,); -3 where it was never finite."""
        return self._all.sum(axis=2).max(axis=0, initial=-3)

    @property
    def _all(self) -> np.ndarray:
        return np.stack(self._counts) if self._counts else np.zeros((0, len(self.paths), 3), int)

    def __repr__(self) -> str:
        return f"InertiaHistory({len(self)} steps, {len(self.paths)} blocks)"


# Compiled here once for each structure: called outside of a user's `jit`, their loops would be compiled every time.


@eqx.filter_jit
def _inertias(blocks: dict[str, Any], tolerance: Any) -> dict[str, Inertia]:
    def counted(block: Any) -> Inertia:
        if hasattr(block, "inertia"):
            return block.inertia(tolerance)
        return count_signs(eigenvalues_of(block), block.in_size(), tolerance)

    return {path: counted(block) for path, block in blocks.items()}
