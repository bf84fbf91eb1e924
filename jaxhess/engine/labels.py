"""The plan's uses of parameters in labels, one for each index (`jaxhess.operators.uses`).

A contraction's axes are told by its dimension numbers, the parameter's own by its `View`.
"""

from collections.abc import Sequence

from jaxhess._typing import Array
from jaxhess.engine.plan import Leaf, Plan
from jaxhess.engine.views import View
from jaxhess.operators.layout import Layout
from jaxhess.operators.uses import EXAMPLE, Use

__all__ = ["layout_of", "number_uses", "own_views", "scale_of", "use_of", "view_of"]


def use_of(plan: Plan, leaf: Leaf, view: View, first_label: int) -> Use:
    """The use, with labels from `first_label` on; the loops around it are its first positions."""
    weight = tuple(range(first_label, first_label + len(view.sizes)))
    size = dict(zip(weight, view.sizes, strict=True))
    axes = [tuple(weight[atom] for atom in axis) for axis in view.axes]
    if leaf.operation is None:
        output = tuple(label for axis in axes for label in axis)
        return Use(weight, view.sizes, output, tuple(size[i] for i in output), None, (), ())
    contracting, batching = leaf.operation.params["dimension_numbers"]
    mine, other = leaf.operand, 1 - leaf.operand
    shape = plan.graph.avals[leaf.input].shape
    label_of: dict[int, tuple[int, ...]] = {}
    for pairs in (contracting, batching):
        label_of |= {theirs: axes[ours] for ours, theirs in zip(pairs[mine], pairs[other], strict=True)}
    looped = tuple(range(first_label + len(weight), first_label + len(weight) + len(leaf.places)))
    size |= dict(zip(looped, leaf.places, strict=True))
    positions = []
    for axis, length in enumerate(shape):
        if axis not in label_of and length == 1:
            label_of[axis] = ()
        elif axis not in label_of:
            label = first_label + len(weight) + len(looped) + len(positions)
            label_of[axis], size[label] = (label,), length
            positions.append(label)
    inputs = [*looped, *(label for axis in range(len(shape)) for label in label_of[axis])]
    bound = {*contracting[mine], *batching[mine]}
    free = [label for axis, labels in enumerate(axes) if axis not in bound for label in labels]
    moving = list(positions)
    outputs = [*looped, *(label for ours in batching[mine] for label in axes[ours])]
    outputs += free + moving if mine == 0 else moving + free
    return Use(
        weight, view.sizes, tuple(outputs), tuple(size[i] for i in outputs), tuple(inputs), tuple(size[i] for i in inputs),
        (*looped, *positions),
    )  # fmt: skip


def number_uses(plan: Plan, views: dict[int, View]) -> dict[int, Use]:
    """The uses of the leaves, seen as `views`, with different labels."""
    uses: dict[int, Use] = {}
    label = EXAMPLE + 1
    for n, view in views.items():
        uses[n] = use_of(plan, plan.leaves[n], view, label)
        label += uses[n].labels
    return uses


def own_views(plan: Plan, leaves: Sequence[int]) -> dict[int, View]:
    """The leaves' variables seen as themselves."""
    variables = {n: plan.leaves[n].variable for n in leaves}
    return {n: View.of(variable, plan.graph.avals[variable].shape) for n, variable in variables.items()}


def view_of(plan: Plan, leaf: int, root: int) -> View | None:
    """The leaf's variable as a view of a parameter, or None where it is more than that."""
    view = plan.views.get(plan.leaves[leaf].variable)
    return view if view is not None and view.root == root else None


def scale_of(view: View, environment: dict[int, Array]) -> Array | float | None:
    """The constant factor of a view, None for 1."""
    scale = None
    for variable, power in view.factors:
        factor = -1.0 if variable is None else environment[variable] ** power
        scale = factor if scale is None else scale * factor
    return scale


def layout_of(plan: Plan, leaf: int) -> Layout | None:
    """How the parameter of a structured use is read as the matrix of `y = W z`, or None where an example has more than one
    vector z, or y and z share an axis."""
    view = plan.views.get(plan.leaves[leaf].variable)
    if view is None:
        return None
    use = use_of(plan, plan.leaves[leaf], view, EXAMPLE + 1)
    if use.input is None or use.positions or set(use.output) & set(use.input):
        return None
    first = EXAMPLE + 1
    rows, columns = (tuple(label - first for label in labels) for labels in (use.output, use.input))
    return Layout(plan.graph.avals[view.root].shape, use.weight_sizes, rows, columns)
