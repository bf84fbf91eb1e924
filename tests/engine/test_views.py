"""Views of a parameter against what the operations do to an array of its indices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxhess.engine.views import View


def apply(view, array):
    """The view of an array, from its definition."""
    order = [atom for axis in view.axes for atom in axis]
    lengths = [int(np.prod([view.sizes[atom] for atom in axis])) for axis in view.axes]
    return array.reshape(view.sizes).transpose(order).reshape(lengths)


@st.composite
def rearrangements(draw):
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=3)))
    steps = []
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            permutation = tuple(draw(st.permutations(range(array.ndim))))
            array = array.transpose(permutation)
            steps.append(("transpose", permutation))
        else:
            rest, new = array.size, []
            while rest > 1:
                new.append(draw(st.sampled_from([d for d in range(2, rest + 1) if rest % d == 0])))
                rest //= new[-1]
            for _ in range(draw(st.integers(0, 2))):
                new.insert(draw(st.integers(0, len(new))), 1)
            array = array.reshape(new)
            steps.append(("reshape", tuple(new)))
    return shape, steps, array


@given(rearrangements())
def test_views_follow_transposes_and_reshapes(case):
    shape, steps, expected = case
    view = View.of(0, shape)
    for kind, argument in steps:
        view = view.transposed(argument) if kind == "transpose" else view.reshaped(argument)
        if view is None:  # axes that cut across the parameter's: no view, and the parameter is pulled back instead
            return
    np.testing.assert_array_equal(apply(view, np.arange(expected.size)), expected)
    assert sorted(atom for axis in view.axes for atom in axis) == list(range(len(view.sizes)))


def test_reshapes_that_cut_across_are_no_views():
    assert View.of(0, (2, 3)).transposed((1, 0)).reshaped((2, 3)) is None
    assert View.of(0, (4, 6)).transposed((1, 0)).reshaped((4, 6)) is None


def test_a_reshape_splits_and_merges_axes():
    view = View.of(0, (6, 4)).reshaped((2, 3, 2, 2))
    assert view.sizes == (2, 3, 2, 2)
    assert view.transposed((1, 0, 2, 3)).reshaped((6, 4)).axes == ((1, 0), (2, 3))
