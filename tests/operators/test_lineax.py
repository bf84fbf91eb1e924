"""The operators as lineax sees them: tags, sums with its own operators, and its solvers."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxhess._typing import InputError
from jaxhess.operators import (
    BlockDiagonal,
    ContractionOperator,
    Dense,
    Diagonal,
    KroneckerProduct,
    KroneckerProductSum,
    LowRank,
    OperatorSum,
)

PSD, NSD = lx.positive_semidefinite_tag, lx.negative_semidefinite_tag
ITERATIVE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture
def semidefinite(rng):
    M = rng.standard_normal((3, 2, 2))
    Q = M @ np.swapaxes(M, 1, 2)
    return KroneckerProductSum(Q, rng.standard_normal((3, 4)), tags=PSD)


def damping(H, value):
    return Diagonal(jnp.full(H.in_structure().shape, value), tags=PSD)


def solution(H, damping, g):
    return np.linalg.solve(H.as_matrix() + damping * np.eye(H.in_size()), ravel_pytree(g)[0])


def test_lineax_identity_as_damping(semidefinite, rng):
    H, g = semidefinite, rng.standard_normal((2, 4))
    damped = H + lx.IdentityLinearOperator(H.in_structure()) * 1e-1
    assert lx.is_symmetric(damped)
    solvers = [lx.GMRES(**ITERATIVE), lx.AutoLinearSolver(well_posed=True), lx.LU()]
    for solver in solvers:
        x = lx.linear_solve(damped, g, solver=solver).value
        np.testing.assert_allclose(x.reshape(-1), solution(H, 1e-1, g), rtol=1e-8, atol=1e-8)
    x = lx.linear_solve(lx.TaggedLinearOperator(damped, PSD), g, solver=lx.CG(**ITERATIVE)).value
    np.testing.assert_allclose(x.reshape(-1), solution(H, 1e-1, g), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [lx.CG(**ITERATIVE), lx.Cholesky(), lx.AutoLinearSolver(well_posed=True)])
def test_semidefinite_solvers(semidefinite, rng, solver):
    H, g = semidefinite, rng.standard_normal((2, 4))
    damped = H + damping(H, 1e-1)
    assert isinstance(damped, OperatorSum)
    assert lx.is_positive_semidefinite(damped)

    @jax.jit
    def solve(operator, g):
        return lx.linear_solve(operator, g, solver=solver).value

    np.testing.assert_allclose(solve(damped, g).reshape(-1), solution(H, 1e-1, g), rtol=1e-8, atol=1e-8)
    x = solve(-damped, g)
    np.testing.assert_allclose(x.reshape(-1), -solution(H, 1e-1, g), rtol=1e-8, atol=1e-8)


def test_untagged_operator(rng, helpers):
    H = KroneckerProductSum(helpers.symmetric(rng, 3, 2, 2), rng.standard_normal((3, 2)))
    g = rng.standard_normal((2, 2))
    with pytest.raises(ValueError, match="definite"):
        lx.linear_solve(H, g, solver=lx.CG(**ITERATIVE))
    for solver in (lx.GMRES(**ITERATIVE), lx.AutoLinearSolver(well_posed=True)):
        x = lx.linear_solve(H, g, solver=solver).value
        np.testing.assert_allclose(H.mv(x), g, rtol=1e-8, atol=1e-8)


def test_tree_of_parameters(semidefinite, rng, helpers):
    blocks = {"w": semidefinite + damping(semidefinite, 0.5), "b": Diagonal(np.array([1.0, 2.0]), tags=PSD)}
    H = BlockDiagonal(blocks)
    g = helpers.like(H, rng)
    for solver in (lx.CG(**ITERATIVE), lx.AutoLinearSolver(well_posed=True)):
        x = lx.linear_solve(H, g, solver=solver).value
        assert jax.tree.structure(x) == jax.tree.structure(g)
        np.testing.assert_allclose(ravel_pytree(x)[0], solution(H, 0.0, g), rtol=1e-8, atol=1e-8)
    shifted = H + lx.IdentityLinearOperator(H.in_structure())
    assert isinstance(shifted, lx.AddLinearOperator)
    x = lx.linear_solve(shifted, g, solver=lx.GMRES(**ITERATIVE)).value
    np.testing.assert_allclose(ravel_pytree(x)[0], solution(H, 1.0, g), rtol=1e-8, atol=1e-8)


def test_general_and_rectangular(rng):
    A, B = rng.standard_normal((2, 2)), rng.standard_normal((3, 3))
    H, g = KroneckerProduct(A, B), rng.standard_normal((2, 3))
    x = lx.linear_solve(H, g, solver=lx.AutoLinearSolver(well_posed=True)).value
    np.testing.assert_allclose(H.mv(x), g, rtol=1e-8, atol=1e-8)
    L = LowRank(rng.standard_normal((5, 3)), rng.standard_normal((3, 3)))
    b = rng.standard_normal(5)
    x = lx.linear_solve(L, b, solver=lx.AutoLinearSolver(well_posed=False)).value
    np.testing.assert_allclose(x, np.linalg.lstsq(L.as_matrix(), b)[0], rtol=1e-8, atol=1e-8)


def test_diagonal_is_solved_as_such(rng):
    D = Diagonal(rng.standard_normal((2, 3)))
    g = rng.standard_normal((2, 3))
    assert lx.is_diagonal(D)
    assert lx.is_diagonal(D + D)
    np.testing.assert_allclose(lx.linear_solve(D, g).value, g / D.values, rtol=1e-12)
    np.testing.assert_allclose(lx.linear_solve(D, g, solver=lx.Diagonal()).value, g / D.values, rtol=1e-12)


def test_derivative_of_a_solve(semidefinite, rng):
    H, g = semidefinite, rng.standard_normal((2, 4))

    def value(scale):
        damped = H.scaled(scale) + damping(H, 1.0)
        return jnp.sum(lx.linear_solve(damped, g, solver=lx.LU()).value)

    step = 1e-6
    numeric = (value(1.0 + step) - value(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(1.0), numeric, rtol=1e-6)


def test_signs_of_definiteness(semidefinite):
    H = semidefinite
    assert lx.is_positive_semidefinite(H * 2)
    assert lx.is_positive_semidefinite(H / np.float32(2))
    assert lx.is_negative_semidefinite(-H)
    assert lx.is_positive_semidefinite(-1 * -H)
    for unknown in (H * jnp.asarray(2.0), H * 0, H + (-H), H - H):
        assert not lx.is_positive_semidefinite(unknown)
        assert lx.is_symmetric(unknown)
    jax.jit(lambda h, c: h * c)(H, 2.0)


def test_tags():
    K = KroneckerProduct(np.eye(2), np.eye(2))
    assert not lx.is_symmetric(K)
    assert lx.is_symmetric(K.with_tags(PSD))
    assert K.with_tags(PSD).T.tags == K.with_tags(PSD).tags
    assert K.with_tags([lx.lower_triangular_tag]).T.tags == {lx.upper_triangular_tag}
    assert lx.has_unit_diagonal(K.with_tags(lx.unit_diagonal_tag))
    assert not lx.has_unit_diagonal(K.with_tags(lx.unit_diagonal_tag) * 2)
    assert not lx.is_tridiagonal(K)
    assert lx.is_tridiagonal(Diagonal(np.ones(2)))
    assert lx.is_lower_triangular(Diagonal(np.ones(2)))
    assert lx.is_upper_triangular(Diagonal(np.ones(2)))
    assert lx.is_diagonal(Dense(np.ones((1, 1))))
    assert lx.is_symmetric(ContractionOperator((np.ones(2), np.ones(2)), "ij", "i", "j", (2,), symmetrised=True))


def test_singledispatch_forms(pair):
    operator, matrix = pair
    assert lx.linearise(operator) is operator
    assert lx.conj(operator) is operator
    materialised = lx.materialise(operator)
    np.testing.assert_allclose(materialised.as_matrix(), matrix, rtol=1e-12, atol=1e-12)
    for part, expected in zip(lx.tridiagonal(operator), (0, -1, 1), strict=True):
        np.testing.assert_allclose(part, np.diagonal(matrix, expected), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose((operator @ operator.T).as_matrix(), matrix @ matrix.T, rtol=1e-12, atol=1e-11)


def test_sum_refusals(semidefinite):
    with pytest.raises(InputError, match="is a LowRank, not a CurvatureOperator"):
        OperatorSum([LowRank(np.ones((2, 1)), np.ones((2, 1)))])
    with pytest.raises(InputError, match="there is no term"):
        OperatorSum([])
    with pytest.raises(InputError, match=r"different structures: \(2, 4\) and \(8,\)"):
        semidefinite + Diagonal(np.ones(8))
    with pytest.raises(ValueError, match="Can only add"):
        semidefinite + 1.0
    with pytest.raises(InputError, match=r"Dense: a parameter of shape \(2, 2\) needs its square matrix, got \(3, 3\)"):
        Dense(np.eye(3), (2, 2))
    with pytest.raises(InputError, match=r"LowRank: needs left \(m, r\) and right \(n, r\), got \(2, 1\) and \(2, 2\)"):
        LowRank(np.ones((2, 1)), np.ones((2, 2)))
