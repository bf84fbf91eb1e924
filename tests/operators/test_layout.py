"""How parameters of any shape are read as matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhess._typing import InputError
from jaxhess.operators import KroneckerProductSum, Layout


@st.composite
def layouts(draw):
    sizes = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    order = draw(st.permutations(range(len(sizes))))
    cut = draw(st.integers(0, len(sizes)))
    shape = draw(st.sampled_from([sizes, (int(np.prod(sizes)),), (*sizes, 1)]))
    return Layout(shape, sizes, tuple(order[:cut]), tuple(order[cut:]))


@settings(max_examples=12)
@given(layouts())
def test_round_trip_and_reorder(layout):
    rng = np.random.default_rng(0)
    array = jnp.asarray(rng.standard_normal(layout.shape))
    matrix = layout.to_matrix(array)
    assert matrix.shape == (layout.m, layout.n)
    np.testing.assert_array_equal(layout.from_matrix(matrix), array)
    # A bilinear form does not depend on how its two sides are ordered.
    N = array.size
    H = jnp.asarray(rng.standard_normal((N, N)))
    x, w, G = np.asarray(array).reshape(-1), np.asarray(matrix).reshape(-1), np.asarray(layout.reorder(H))
    np.testing.assert_allclose(w @ np.asarray(H) @ w, x @ G @ x, rtol=1e-12, atol=1e-12)


def test_weight_stored_as_input_by_output(rng):
    w, x, M = rng.standard_normal((3, 2)), rng.standard_normal(3), rng.standard_normal((2, 2))
    Q = M @ M.T

    def error(w):
        y = x @ w
        return y @ Q @ y / 2

    expected = jax.hessian(error)(w)
    H = KroneckerProductSum(Q[None], x[None], Layout.transposed(2, 3))
    np.testing.assert_allclose(H.as_matrix(), expected.reshape(6, 6), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(H.mv(w), np.einsum("abcd,cd->ab", expected, w), rtol=1e-12, atol=1e-12)


def test_three_dimensional_weight(rng):
    w, x, M = rng.standard_normal((2, 3, 4)), rng.standard_normal(3), rng.standard_normal((8, 8))
    Q = M @ M.T

    def error(w):
        y = jnp.einsum("hdk,d->hk", w, x).reshape(-1)
        return y @ Q @ y / 2

    expected = jax.hessian(error)(w).reshape(24, 24)
    H = KroneckerProductSum(Q[None], x[None], Layout((2, 3, 4), (2, 3, 4), (0, 2), (1,)))
    np.testing.assert_allclose(H.as_matrix(), expected, rtol=1e-12, atol=1e-12)


def test_hashable_and_equal():
    assert hash(Layout.of_matrix(2, 3)) == hash(Layout((2, 3), (2, 3), (0,), (1,)))
    assert Layout.of_matrix(2, 2) != Layout.transposed(2, 2)


def test_refusals():
    with pytest.raises(InputError, match=r"sizes \(2, 2\) do not refine the parameter's shape \(3,\)"):
        Layout((3,), (2, 2), (0,), (1,))
    with pytest.raises(InputError, match=r"rows \(0,\) and columns \(0,\) must name each axis of sizes \(2, 2\) once"):
        Layout((4,), (2, 2), (0,), (0,))
