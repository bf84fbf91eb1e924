"""What every operator claims, against its dense matrix."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxhess import operators as ops
from jaxhess._typing import InputError

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), **TOLERANCE)


def is_square(operator):
    return operator.in_size() == operator.out_size()


def test_matrix(pair):
    operator, matrix = pair
    close(operator.as_matrix(), matrix)
    assert (operator.out_size(), operator.in_size()) == matrix.shape
    assert operator.dense_bytes == matrix.nbytes
    assert operator.storage_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(operator))


def test_product(pair, rng, helpers):
    operator, matrix = pair
    x = helpers.like(operator, rng)
    y = operator.mv(x)
    close(ravel_pytree(y)[0], matrix @ ravel_pytree(x)[0])
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), y) == operator.out_structure()


def test_transpose(pair, rng, helpers):
    operator, matrix = pair
    close(operator.T.as_matrix(), matrix.T)
    x = helpers.like(operator.T, rng)
    close(ravel_pytree(operator.T.mv(x))[0], matrix.T @ ravel_pytree(x)[0])
    assert lx.is_symmetric(operator.T) == lx.is_symmetric(operator)


def test_diagonal_and_trace(pair):
    operator, matrix = pair
    if not is_square(operator):
        with pytest.raises(InputError, match=r"LowRank\.diagonal: needs a square operator, this one is 4 x 3"):
            operator.diagonal()
        with pytest.raises(InputError, match=r"LowRank\.trace"):
            operator.trace()
        return
    diagonal = operator.diagonal()
    assert jax.tree.map(jnp.shape, diagonal) == jax.tree.map(lambda s: s.shape, operator.in_structure())
    close(ravel_pytree(diagonal)[0], np.diag(matrix))
    close(lx.diagonal(operator), np.diag(matrix))
    close(operator.trace(), np.trace(matrix))


def test_norm(pair):
    operator, matrix = pair
    close(operator.frobenius_norm(), np.linalg.norm(matrix))


def test_scaling_keeps_the_class(pair):
    operator, matrix = pair
    for scaled, factor in (
        (operator * 2, 2),
        (3.0 * operator, 3),
        (operator / 4, 1 / 4),
        (-operator, -1),
        (np.float64(2) * operator, 2),
        (jnp.asarray(0.5) * operator, 0.5),
        (jax.jit(lambda h, c: h.scaled(c))(operator, 1.5), 1.5),
    ):
        assert type(scaled) is type(operator)
        close(scaled.as_matrix(), factor * matrix)
    with pytest.raises(InputError, match="can be multiplied by scalars only"):
        operator * np.ones(3)


def test_sums(pair):
    operator, matrix = pair
    close((operator + operator).as_matrix(), 2 * matrix)
    close((operator - operator * 3).as_matrix(), -2 * matrix)
    assert isinstance(operator + operator, ops.StructuredOperator)


def test_eigenvalues_and_inertia(pair):
    operator, matrix = pair
    if isinstance(operator, ops.LowRank):
        return
    if not lx.is_symmetric(operator):
        with pytest.raises(InputError, match="not known to be symmetric"):
            operator.eigvalsh()
        with pytest.raises(InputError, match="not known to be symmetric"):
            operator.inertia()
        return
    eigenvalues = np.linalg.eigvalsh(matrix)
    close(operator.eigvalsh(), eigenvalues)
    expected = [np.sum(eigenvalues > 1e-10), np.sum(eigenvalues < -1e-10), np.sum(abs(eigenvalues) <= 1e-10)]
    for inertia in (operator.inertia(), operator.inertia(1e-10), jax.jit(lambda h: h.inertia())(operator)):
        assert isinstance(inertia, ops.Inertia)
        assert [int(count) for count in inertia] == expected


def test_passes_through_jit(pair, rng, helpers):
    operator, matrix = pair
    x = helpers.like(operator, rng)
    traces = []

    @jax.jit
    def product(h, x):
        traces.append(repr(h))
        return h, h.mv(x)

    for _ in range(2):
        same, y = product(operator, x)
    assert len(traces) == 1
    close(ravel_pytree(y)[0], matrix @ ravel_pytree(x)[0])
    close(same.as_matrix(), matrix)
    close(jax.jit(lambda h: h.as_matrix())(operator), matrix)


def test_passes_through_vmap(pair, rng, helpers):
    operator, matrix = pair
    xs = helpers.like(operator, rng, (3,))
    flat = jax.vmap(lambda x: ravel_pytree(x)[0])
    close(flat(jax.vmap(operator.mv)(xs)), flat(xs) @ matrix.T)
    factors = jnp.array([1.0, -2.0, 3.0])
    batch = jax.vmap(operator.scaled)(factors)
    close(jax.vmap(lambda h: h.as_matrix())(batch), factors[:, None, None] * matrix[None])
    repr(batch)


def test_passes_through_tree_map(pair):
    operator, matrix = pair
    close(jax.tree.map(lambda a: a, operator).as_matrix(), matrix)
    leaves, structure = jax.tree.flatten(operator)
    close(jax.tree.unflatten(structure, leaves).as_matrix(), matrix)


def test_repr_tells_sizes_and_never_fails(pair):
    operator, matrix = pair
    assert f"{matrix.shape[0]} x {matrix.shape[1]}" in repr(operator) or isinstance(operator, ops.BlockDiagonal)
    assert type(operator).__name__ in repr(operator)
    for stripped in (
        jax.tree.map(lambda a: None, operator),
        jax.tree.map(lambda a: True, operator),
        jax.tree.map(lambda a: "leaf", operator),
        jax.eval_shape(lambda h: h, operator),
        jax.tree.map(lambda a: a.shape, operator),
    ):
        assert type(operator).__name__ in repr(stripped)


def test_gradients_flow(pair, rng, helpers):
    operator, _ = pair
    x = helpers.like(operator, rng)

    def value(scale):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(operator.scaled(scale).mv(x)))

    close(jax.grad(value)(1.0), 2 * value(1.0))


def test_mapped_fallbacks(pair):
    operator, matrix = pair
    if not isinstance(operator, ops.Dense | ops.KroneckerProduct | ops.LowRank):
        return
    for batch_size in (None, 4):
        matrix_form = jax.jit(lambda h, b=batch_size: (ops.mapped_matrix(h, b), ops.mapped_frobenius_norm(h, b)))
        close(matrix_form(operator)[0], matrix)
        close(matrix_form(operator)[1], np.linalg.norm(matrix))
        if is_square(operator):
            diagonal_form = jax.jit(lambda h, b=batch_size: (ops.mapped_trace(h, b), ops.mapped_diagonal(h, b)))
            close(diagonal_form(operator)[0], np.trace(matrix))
            close(diagonal_form(operator)[1].reshape(-1), np.diag(matrix))


def test_wrong_vector_is_refused(pair):
    operator, _ = pair
    if isinstance(operator, ops.OperatorSum | ops.BlockDiagonal):
        return
    with pytest.raises(InputError, match=rf"{type(operator).__name__}\.mv: needs an array of shape"):
        operator.mv(jnp.zeros((7, 7)))
