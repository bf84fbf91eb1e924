"""Blocks between two parameters against the arrays that they stand for."""

import functools
import itertools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhess.operators import CrossBlock, KroneckerCross, Layout
from jaxhess.operators.assembly import put_symmetric
from jaxhess.operators.uses import PairTerm

ROW = {"plain": Layout.of_matrix(2, 3), "transposed": Layout((3, 2), (3, 2), (1,), (0,))}
COLUMN = {"plain": Layout.of_matrix(4, 2), "heads": Layout((2, 4), (2, 2, 2), (0, 2), (1,))}


def near(found, expected, tolerance=1e-13):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max(initial=0)))


def order_of(layout):
    """Where each entry of the parameter is in vec(W)."""
    return np.asarray(layout.to_matrix(np.arange(layout.m * layout.n).reshape(layout.shape))).reshape(-1).argsort()


def exact(Q, Z_row, Z_column, G, S, row, column):
    """`(1/r) sum_r z_k[s] (Q[i,p] z_j[q] + g[i] S[q,p])`, over the parameters' own entries."""
    r, (m_j, n_j), (m_k, n_k) = len(Q), (row.m, row.n), (column.m, column.n)
    H = np.einsum("rip,rq,rs->iqps", Q, Z_row, Z_column)
    if S is not None:
        S = S[:, :, None] * np.eye(n_j) if S.ndim == 2 else S
        H += np.einsum("ri,rqp,rs->iqps", G, S, Z_column)
    return H.reshape(m_j * n_j, m_k * n_k)[np.ix_(order_of(row), order_of(column))] / r


def made(row, column, kind, r=3, seed=0, flipped=False, factor=1):
    rng = np.random.default_rng(seed)
    Q, Z_row, Z_column = (rng.normal(size=s) for s in ((r, row.m, column.m), (r, row.n), (r, column.n)))
    G = None if kind is None else rng.normal(size=(r, row.m))
    S = None if kind is None else rng.normal(size=(r, row.n) if kind == "diagonal" else (r, row.n, column.m))
    arrays = [None if a is None else jnp.asarray(a) for a in (Q, Z_row, Z_column, G, S)]
    block = KroneckerCross(*arrays[:3], row, column, *arrays[3:], factor, flipped=flipped)
    dense = factor * exact(Q, Z_row, Z_column, G, S, row, column)
    return block, dense.T if flipped else dense


def check(block, dense):
    rng = np.random.default_rng(5)
    rows, columns = block.out_structure().shape, block.in_structure().shape
    vector, covector = rng.normal(size=columns), rng.normal(size=rows)
    near(block.as_matrix(), dense)
    near(block.mv(vector).reshape(-1), dense @ vector.reshape(-1))
    assert block.mv(vector).shape == rows
    near(block.transpose().as_matrix(), dense.T)
    near(block.T.mv(covector).reshape(-1), dense.T @ covector.reshape(-1))
    near(block.T.T.as_matrix(), dense)
    near(block.frobenius_norm(), np.linalg.norm(dense))
    for other, factor in [(-2 * block, -2), (block / 4, 0.25), (block.scaled(jnp.array(3.0)).T.T, 3)]:
        assert type(other) is type(block)
        near(other.as_matrix(), factor * dense)
    near((block + block).mv(vector).reshape(-1), 2 * dense @ vector.reshape(-1))
    assert not lx.is_symmetric(block)
    assert f"{dense.shape[0]} x {dense.shape[1]}" in repr(block)
    near(jax.jit(lambda b, v: b.mv(v))(block, vector).reshape(-1), dense @ vector.reshape(-1))
    near(jax.vmap(block.mv)(np.stack([vector, 2 * vector]))[1].reshape(-1), 2 * dense @ vector.reshape(-1))
    same = jax.tree.map(jnp.asarray, block)
    near(same.as_matrix(), dense)


@pytest.mark.parametrize("kind", [None, "full", "diagonal"])
@pytest.mark.parametrize("flipped", [False, True])
def test_kronecker_cross(kind, flipped):
    """S in all its forms (the diagonal of one where n_j = m_k), both ways, in every layout."""
    column = (
        COLUMN if kind != "diagonal" else {"three": Layout.of_matrix(3, 2), "turned": Layout((2, 3), (2, 3), (1,), (0,))}
    )
    for one, other in itertools.product(ROW.values(), column.values()):
        check(*made(one, other, kind, flipped=flipped, factor=-0.5))


@settings(max_examples=15)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    r=st.integers(1, 20),
    kind=st.sampled_from([None, "full", "diagonal"]),
    flipped=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_sizes(sizes, r, kind, flipped, seed):
    """Fewer examples than entries of Q, and more: the dense form goes by the cheaper order of products."""
    m_j, n_j, m_k, n_k = sizes
    row, column = Layout.of_matrix(m_j, n_j), Layout.of_matrix(n_j if kind == "diagonal" else m_k, n_k)
    block, dense = made(row, column, kind, r, seed, flipped)
    near(block.as_matrix(), dense)
    vector = np.cos(np.arange(dense.shape[1])).reshape(block.in_structure().shape)
    near(block.mv(vector).reshape(-1), dense @ vector.reshape(-1))


def contraction(factor=1):
    """Two terms, of an example's Q, z and of a bias, with labels in no order."""
    rng = np.random.default_rng(1)
    Q, z, M = rng.normal(size=(3, 2, 4)), rng.normal(size=(3, 5)), rng.normal(size=(2, 20))
    first = PairTerm((jnp.asarray(Q), jnp.asarray(z)), ((0, 7, 2), (0, 4)), (7,), (4, 2), (0, 1), False)
    second = PairTerm((jnp.asarray(M),), ((1, 2),), (1,), (2,), (0, 1), False)
    dense = np.einsum("rip,rs->isp", Q, z).reshape(2, 20) + M
    return CrossBlock((first, second), (2, 1), (5, 4), factor), factor * dense


@pytest.mark.parametrize("factor", [1, -0.5])
def test_cross_block(factor):
    block, dense = contraction(factor)
    check(block, dense)


def test_square_blocks_have_a_diagonal():
    block, dense = made(Layout.of_matrix(2, 3), Layout.of_matrix(2, 3), "full")
    near(block.diagonal(), np.diag(dense).reshape(2, 3))
    near(block.trace(), np.trace(dense))
    for other in (contraction()[0], made(ROW["plain"], COLUMN["plain"], None)[0]):
        for reading in (other.diagonal, other.trace):
            with pytest.raises(ValueError, match=r"one shape.*\(.*\) to \("):
                reading()


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", ["plain", "transposed"])
def test_a_block_in_its_place_and_mirrored(name, flipped, below):
    block, dense = made(ROW[name], COLUMN["plain"], "full", flipped=flipped)
    rows, columns = dense.shape
    row, column = (columns, 0) if below else (0, rows)
    expected = np.zeros((rows + columns, rows + columns))
    expected[row : row + rows, column : column + columns] = dense
    expected[column : column + columns, row : row + rows] = dense.T
    near(put_symmetric(jnp.zeros_like(expected), block, row, column), expected)


def test_float32_stays():
    block, dense = made(ROW["plain"], COLUMN["plain"], "full")
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32), block)
    assert narrow.as_matrix().dtype == narrow.mv(np.ones((4, 2))).dtype == jnp.float32
    near(narrow.as_matrix(), dense, 1e-6)
    assert (2.5 * narrow).as_matrix().dtype == jnp.float32


def test_what_does_not_fit_is_refused():
    row, column = ROW["plain"], COLUMN["plain"]
    Q, Z, X = jnp.ones((3, 2, 4)), jnp.ones((3, 3)), jnp.ones((3, 2))
    cross = functools.partial(KroneckerCross, row_layout=row, column_layout=column)
    for arrays in [
        {"Q": Q, "Z_row": Z, "Z_column": Z},
        {"Q": Q[:2], "Z_row": Z, "Z_column": X},
        {"Q": Q, "Z_row": Z, "Z_column": X, "G_row": jnp.ones((3, 2))},
        {"Q": Q, "Z_row": Z, "Z_column": X, "G_row": jnp.ones((3, 2)), "S": jnp.ones((3, 4, 3))},
        {"Q": Q, "Z_row": Z, "Z_column": X, "G_row": jnp.ones((3, 3)), "S": jnp.ones((3, 3, 4))},
    ]:
        with pytest.raises(ValueError, match=r"do not fit: \[\(\d, 2, 4\)"):
            cross(**arrays)
    with pytest.raises(ValueError, match="no term"):
        CrossBlock((), (2,), (3,))
    for block, _ in (made(row, column, None), contraction()):
        with pytest.raises(ValueError, match=r"needs an array of shape \(\d, \d\), got shape \(7,\)"):
            block.mv(jnp.ones(7))
        with pytest.raises(ValueError, match="complex"):
            block.mv(1j * jnp.ones(block.in_structure().shape))
        with pytest.raises(ValueError, match="scalars only"):
            block * jnp.ones(3)


def test_a_dense_form_that_would_not_fit_is_refused():
    row, column = Layout.of_matrix(1024, 784), Layout.of_matrix(1024, 1024)
    block = KroneckerCross(jnp.ones((1, 1024, 1024)), jnp.ones((1, 784)), jnp.ones((1, 1024)), row, column)
    with pytest.raises(MemoryError, match=r"802816 x 1048576.*mv"):
        block.as_matrix()
    near(block.mv(jnp.ones((1024, 1024)))[0, 0], 2.0**20)
