"""The reverse sweep of math.md, section 6: curvature for each pair of live variables, from the error down to the leaves.

Leaves are the uses of parameters. A structured use `y_j = W z_j + delta_j` has the probe delta_j as its variable: its
gradient is g_j, its curvature with itself Q_jj and with other probes Q_jk. Where one parameter is used again upstream,
`S_jk = dz_j / d delta_k` is needed too; it travels as one more row, which has no second order of its own. On a plain
stack of dense layers all this is the recursion of Theorem 1, one live variable at a time.
"""

import collections
import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax.numpy as jnp

from jaxhess._linalg import available_bytes, check_dense_fits
from jaxhess._typing import Array, DenseTooLargeError, UnsupportedOperationError
from jaxhess.engine.graph import Graph, evaluate
from jaxhess.engine.kinds import Diagonal, Kind, add, diagonal_of, dtype_of, transpose
from jaxhess.engine.plan import Leaf, Step
from jaxhess.engine.rules.base import Rule
from jaxhess.engine.rules.elementwise import ComponentwiseRule
from jaxhess.engine.rules.linear import IndexingRule
from jaxhess.engine.rules.local import BilinearRule, LocalRule

__all__ = ["SweepResult", "sweep"]

_RULES = {"contraction": Rule, "linear": Rule, "indexing": IndexingRule, "bilinear": BilinearRule, "local": LocalRule}


@dataclasses.dataclass
class SweepResult:
    """By the leaves' numbers: `gradients[j]` is g_j, `curvatures[j, k]` with j <= k is Q_jk, `sensitivities[j, k]` is
    S_jk, a matrix (size of z_j, size of y_k)."""

    gradients: dict[int, Array]
    curvatures: dict[tuple[int, int], Kind]
    sensitivities: dict[tuple[int, int], Kind]


def _make_rule(step: Step, environment: dict[int, Array]) -> Rule:
    def function(*values: Array) -> list[Array]:
        local = {**environment, **dict(zip(step.inputs, values, strict=True))}
        evaluate(step.operations, local)
        return [local[o] for o in step.outputs]

    values = [environment[i] for i in step.inputs]
    if step.kind == "componentwise":
        return ComponentwiseRule(step.inputs, step.outputs, function, values, linear=step.linear)
    return _RULES[step.kind](step.inputs, step.outputs, function, values)


class _State:
    def __init__(
        self,
        graph: Graph,
        steps: Sequence[Step],
        leaves: Sequence[Leaf],
        relevant: Callable[[int, int], bool],
        diagonal: Collection[int],
        copies: int,
    ) -> None:
        self.graph, self.steps, self.leaves, self.relevant, self.copies = graph, steps, leaves, relevant, copies
        self.outputs = {n: leaf.output for n, leaf in enumerate(leaves) if leaf.structured}
        self.inputs = {n: leaf.input for n, leaf in enumerate(leaves) if leaf.structured}
        self.gradient: dict[int, Array] = {}
        self.curvature: dict[tuple[int, int], Kind] = {}
        self.variable = {n: -1 - 2 * n if leaf.structured else leaf.variable for n, leaf in enumerate(leaves)}
        self.number = {variable: n for n, variable in self.variable.items()}
        self.input_row = {-2 - 2 * n: n for n, leaf in enumerate(leaves) if leaf.structured}
        self.diagonal = self.diagonal_only(diagonal)

    def wanted(self, a: int, b: int, index: int) -> bool:
        """Whether C[a, b] is of use once the steps from `index` on are done."""
        rows = [self.number.get(v, self.input_row.get(v)) for v in (a, b)]
        leaf, other = rows
        if leaf is None and other is None:
            return True
        if leaf is not None and other is not None:
            return self.relevant(leaf, other) and not (a in self.input_row and b in self.input_row)
        row = leaf if leaf is not None else other
        assert row is not None
        return any((later.step or 0) < index and self.relevant(row, n) for n, later in enumerate(self.leaves))

    def diagonal_only(self, leaves: Collection[int]) -> set[int]:
        """The variables of whose own curvature no more than the diagonal is needed, if that is so of these leaves."""
        alone = {n for n in leaves if not any(self.relevant(n, k) for k in range(len(self.leaves)) if k != n)}
        need = {variable: n in alone for n, variable in self.variable.items()}
        produced = {o for step in self.steps for o in step.outputs}
        uses = collections.Counter(a for step in self.steps for a in step.inputs)
        for step in self.steps:
            inputs = [a for a in step.inputs if a in need]
            # Where two inputs have a common origin, a leaf with more uses say, its diagonal takes all of C[a, b].
            between = [a for a in inputs if a in produced or uses[a] > 1]
            probe = [] if step.leaf is None else [self.variable[step.leaf]]
            apart = step.kind == "componentwise" or (step.kind == "indexing" and not _repeats(step, self.graph))
            enough = not inputs or (apart and len(between) <= 1)
            if inputs or probe:
                need |= dict.fromkeys(step.outputs, enough and all(need[a] for a in (*inputs, *probe)))
        return {variable for variable, only_diagonal in need.items() if only_diagonal}

    def accumulate(self, a: int, b: int, kind: Kind) -> None:
        if a == b and a in self.diagonal:
            kind = diagonal_of(kind)
        key, kind = ((a, b), kind) if a <= b else ((b, a), transpose(kind))
        self.curvature[key] = add(self.curvature[key], kind) if key in self.curvature else kind

    def take(self, variable: int) -> dict[int, Kind]:
        """Remove and return C[w, variable] for all w."""
        keys = [key for key in self.curvature if variable in key]
        taken = {}
        for a, b in keys:
            kind = self.curvature.pop((a, b))
            taken[a if b == variable else b] = kind if b == variable else transpose(kind)
        return taken

    def roots(self, variable: int) -> frozenset[int]:
        """The parameters that a variable depends on."""
        reached: dict[int, frozenset[int]] = {v: self.leaves[n].roots for v, n in self.number.items()}
        for step in self.steps:
            sources = [reached.get(i, frozenset()) for i in step.inputs]
            sources += [self.leaves[step.leaf].roots] if step.leaf is not None else []
            reached |= dict.fromkeys(step.outputs, frozenset().union(*sources))
        return reached.get(variable, frozenset())

    def size(self, variable: int) -> int:
        """Number of components of a variable, a probe or an input row."""
        if variable in self.number and self.leaves[self.number[variable]].structured:
            variable = self.outputs[self.number[variable]]
        elif variable in self.input_row:
            variable = self.inputs[self.input_row[variable]]
        return self.graph.avals[variable].size


def sweep(
    graph: Graph,
    steps: Sequence[Step],
    leaves: Sequence[Leaf],
    environment: dict[int, Array],
    gradients: dict[int, Array],
    curvatures: dict[tuple[int, int], Kind],
    relevant: Callable[[int, int], bool],
    *,
    second_order: bool = True,
    diagonal: Collection[int] = (),
    copies: int = 1,
) -> SweepResult:
    """Sweep over `steps` from the given gradients and curvatures (of the last variables) down to the leaves.

    `relevant(j, k)` tells which pairs of leaves are asked for; of the leaves numbered in `diagonal`, which must be relevant
    to no other leaf, only the diagonal of Q_jj is, and comes as a `Diagonal`, at less cost. `copies` is the number of sweeps
    held in memory at once.

    Raises:
        DenseTooLargeError: if a curvature matrix on the way would not fit in memory.
        UnsupportedOperationError: if an operation cannot be differentiated twice.
    """
    state = _State(graph, steps, leaves, relevant, diagonal, copies)
    state.gradient |= gradients
    for (a, b), kind in curvatures.items():
        state.accumulate(a, b, kind)
    for index in reversed(range(len(steps))):
        try:
            _advance(state, steps[index], index, environment, second_order)
        except (DenseTooLargeError, UnsupportedOperationError):
            raise
        except (NotImplementedError, TypeError, ValueError, ArithmeticError) as error:
            operation = steps[index].operations[-1]
            raise UnsupportedOperationError(
                f"The exact curvature of {operation.name} at {operation.where} could not be computed: JAX cannot "
                f"differentiate it twice ({error}). Replace it by an operation with a derivative, or exclude it with "
                "jax.lax.stop_gradient."
            ) from error
    return _collect(state)


def _advance(state: _State, step: Step, index: int, environment: dict[int, Array], second_order: bool) -> None:
    outputs = {u: state.gradient.pop(u) for u in step.outputs if u in state.gradient}
    if not outputs:
        return
    rule = _make_rule(step, environment) if step.inputs else None
    probe = state.variable[step.leaf] if step.leaf is not None else None

    def keep(a: int, b: int) -> bool:
        return state.wanted(a, b, index)

    if probe is not None:
        (u,) = step.outputs
        state.gradient[probe] = outputs[u]
    if rule is not None:
        for a, g in rule.gradient(outputs).items():
            state.gradient[a] = state.gradient[a] + g if a in state.gradient else g
    if not second_order:
        return
    rows = {u: state.take(u) for u in step.outputs}
    for u in step.outputs:
        own = rows[u].pop(u, None)
        if own is not None:
            _pass_own(state, step, rule, probe, u, own, keep)
        for w, kind in rows[u].items():
            if w in step.outputs:
                _pass_mixed(state, step, rule, w, u, kind, keep)
            else:
                _pass_row(state, step, rule, probe, u, w, kind, keep)
    if rule is not None:
        for a, b in rule.second_order_pairs():
            if keep(a, b):
                _guard(state, step, a, b, rule.values[0].dtype.itemsize)
        for (a, b), kind in rule.second(outputs, keep).items():
            state.accumulate(a, b, kind)
    if probe is not None and rule is not None:
        input_row, z = probe - 1, step.inputs[0]
        if keep(input_row, z):
            state.accumulate(input_row, z, Diagonal(jnp.ones(state.size(z), outputs[step.outputs[0]].dtype)))


_PERMUTING = {"copy", "copy_p", "expand_dims", "pad", "reshape", "rev", "slice", "squeeze", "transpose"}


def _repeats(step: Step, graph: Graph) -> bool:
    """Whether an indexing operation may use a component of its input more than once."""
    (operation,) = step.operations
    if operation.name in _PERMUTING:
        return operation.name == "pad" and operation.inputs[1] in step.inputs
    sizes = [graph.avals[i].size for i in (*operation.inputs, *operation.outputs)]
    return not (len(sizes) == 2 and sizes[0] == sizes[1])


def _guard(state: _State, step: Step, a: int, b: int, itemsize: int) -> None:
    rows, columns = state.copies * state.size(a), state.size(b)
    if rows * columns * itemsize <= available_bytes():
        return
    operation = step.operations[-1]
    names = ", ".join(sorted(state.graph.names[root] for root in state.roots(a) | state.roots(b)))
    check_dense_fits(
        f"curvature with respect to {names}, of {operation.name} at {operation.where}, for {state.copies} examples at once",
        rows,
        columns,
        itemsize,
        "Use fewer examples at once (batch_size=), or write the parameter's use as a product with its input.",
    )


def _pass_own(
    state: _State,
    step: Step,
    rule: Rule | None,
    probe: int | None,
    u: int,
    kind: Kind,
    keep: Callable[[int, int], bool],
) -> None:
    if probe is not None:
        _guard(state, step, probe, probe, dtype_of(kind).itemsize)
        state.accumulate(probe, probe, kind)
    if rule is None:
        return
    only = {a for a in step.inputs if a in state.diagonal and keep(a, a)}

    def in_full(a: int, b: int) -> bool:
        return keep(a, b) and (a != b or a not in only)

    if not isinstance(kind, Diagonal) or step.kind not in ("componentwise", "indexing"):
        for a in step.inputs:
            if a not in only:
                _guard(state, step, a, a, dtype_of(kind).itemsize)
    if len(only) < len(step.inputs) or len(only) > 1:
        for (a, b), pulled in rule.between(kind, u, in_full).items():
            state.accumulate(a, b, pulled)
    if only:
        for a, pulled in rule.own_diagonals(kind, u, only).items():
            state.accumulate(a, a, pulled)
    if probe is not None and keep(probe, step.inputs[0]):
        state.accumulate(probe, step.inputs[0], rule.through(kind, u)[step.inputs[0]])


def _pass_row(
    state: _State,
    step: Step,
    rule: Rule | None,
    probe: int | None,
    u: int,
    w: int,
    kind: Kind,
    keep: Callable[[int, int], bool],
) -> None:
    if probe is not None and keep(w, probe):
        state.accumulate(w, probe, kind)
    inputs = [a for a in step.inputs if keep(w, a)]
    if rule is None or not inputs:
        return
    if not isinstance(kind, Diagonal) or step.kind != "componentwise":
        for a in inputs:
            _guard(state, step, w, a, dtype_of(kind).itemsize)
    pulled = rule.through(kind, u)
    for a in inputs:
        state.accumulate(w, a, add(pulled[a], transpose(pulled[a])) if a == w else pulled[a])


def _pass_mixed(
    state: _State, step: Step, rule: Rule | None, w: int, u: int, kind: Kind, keep: Callable[[int, int], bool]
) -> None:
    """Two outputs of one operation: `J_wa^T C[w, u] J_ub` for all a and b, and its transpose."""
    if rule is None:
        return
    for a in step.inputs:
        _guard(state, step, a, a, dtype_of(kind).itemsize)
    for b, half in rule.through(kind, u).items():
        for a, whole in rule.through(transpose(half), w).items():
            if keep(a, b):
                state.accumulate(b, a, add(whole, transpose(whole)) if a == b else whole)


def _collect(state: _State) -> SweepResult:
    gradients = {n: state.gradient[v] for n, v in state.variable.items() if v in state.gradient}
    curvatures: dict[tuple[int, int], Kind] = {}
    sensitivities: dict[tuple[int, int], Kind] = {}
    for (a, b), kind in state.curvature.items():
        if a in state.number and b in state.number:
            j, k = state.number[a], state.number[b]
            if state.relevant(j, k):
                curvatures[min(j, k), max(j, k)] = kind if j <= k else transpose(kind)
        elif a in state.input_row and b in state.number:
            sensitivities[state.input_row[a], state.number[b]] = kind
        elif b in state.input_row and a in state.number:
            sensitivities[state.input_row[b], state.number[a]] = transpose(kind)
    return SweepResult(gradients, curvatures, sensitivities)
