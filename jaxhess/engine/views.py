"""How a parameter looks after operations that only rearrange it: transposes, reshapes, unit axes, a constant factor.

A contraction with a view of W is a contraction with W under other names of its axes, so transposed, reshaped and scaled
weights keep the structure of Theorem 1.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

__all__ = ["View"]


@dataclasses.dataclass(frozen=True)
class View:
    """A rearranged parameter.

    The parameter `root`, read in row-major order with axes `sizes`, has each of them in exactly one axis of the view:
    `axes` lists, for each axis of the view, which ones it merges. `factors` are the constants that multiply it, as pairs
    (variable, power); a variable of None stands for -1.
    """

    root: int
    sizes: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    factors: tuple[tuple[int | None, int], ...] = ()

    @staticmethod
    def of(root: int, shape: Sequence[int]) -> "View":
        """The parameter itself."""
        return View(root, tuple(shape), tuple((axis,) for axis in range(len(shape))))

    def scaled(self, variable: int | None, power: int) -> "View":
        """The view times a constant to a power."""
        return dataclasses.replace(self, factors=(*self.factors, (variable, power)))

    def transposed(self, permutation: Sequence[int]) -> "View":
        """The view with its axes in another order."""
        return dataclasses.replace(self, axes=tuple(self.axes[axis] for axis in permutation))

    def reshaped(self, shape: Sequence[int]) -> "View | None":
        """The view in another shape, or None where the new axes cut across the parameter's."""
        sizes, order = list(self.sizes), [list(axis) for axis in self.axes]
        queue = [atom for axis in order for atom in axis]
        axes: list[list[int]] = []
        for length in shape:
            axis: list[int] = []
            remaining = length
            while remaining > 1:
                while queue and sizes[queue[0]] == 1:
                    axis.append(queue.pop(0))
                if not queue:
                    return None
                atom = queue[0]
                if remaining % sizes[atom] == 0:
                    remaining //= sizes[atom]
                    axis.append(queue.pop(0))
                elif sizes[atom] % remaining == 0:
                    sizes[atom : atom + 1] = [remaining, sizes[atom] // remaining]
                    shift = [[a + (a > atom) for a in group] for group in axes]
                    axes, axis = shift, [a + (a > atom) for a in axis]
                    queue = [atom, atom + 1] + [a + (a > atom) for a in queue[1:]]
                    remaining = 1
                    axis.append(queue.pop(0))
                else:
                    return None
            axes.append(axis)
        if any(sizes[atom] != 1 for atom in queue):
            return None
        if queue:
            if not axes:
                return dataclasses.replace(self, sizes=(), axes=()) if math.prod(sizes) == 1 else None
            axes[-1].extend(queue)
        return dataclasses.replace(self, sizes=tuple(sizes), axes=tuple(tuple(axis) for axis in axes))

    def after(self, name: str, params: dict[str, Any], shape: Sequence[int]) -> "View | None":
        """The view after an operation with this name, parameters and result shape; None if it is no rearrangement."""
        if name == "transpose":
            return self.transposed(params["permutation"])
        if name in ("convert_element_type", "name"):
            return self
        if name in ("reshape", "squeeze", "expand_dims", "copy", "copy_p"):
            return self.reshaped(shape) if params.get("dimensions") is None or name != "reshape" else None
        if name == "broadcast_in_dim":
            lengths = [math.prod(self.sizes[atom] for atom in axis) for axis in self.axes]
            kept = params["broadcast_dimensions"]
            grown = [length for axis, length in enumerate(shape) if axis not in kept and length != 1]
            if grown or [shape[axis] for axis in kept] != lengths:
                return None
            return self.reshaped(shape)
        return None
