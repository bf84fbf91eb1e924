"""Iterative solves against dense ones, and what they say of themselves when they fail."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxhess._typing import InputError
from jaxhess.operators import BlockDiagonal, Diagonal, KroneckerProductSum, Layout
from jaxhess.operators.iterative import MINRES, SolveInfo, block_preconditioner, iterative_solve, kronecker_preconditioner

PSD, SYMMETRIC = lx.positive_semidefinite_tag, lx.symmetric_tag
TIGHT = {"tolerance": 1e-12}


def with_eigenvalues(rng, values):
    q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return (q * np.asarray(values)) @ q.T


def operator(matrix, tags=SYMMETRIC):
    return lx.MatrixLinearOperator(jnp.asarray(matrix), tags)


def kronecker_sum(rng, r=5, m=3, n=4, semidefinite=False):
    Q = rng.standard_normal((r, m, m))
    Q = Q @ np.swapaxes(Q, 1, 2) if semidefinite else Q + np.swapaxes(Q, 1, 2)
    return KroneckerProductSum(Q, rng.standard_normal((r, n)), tags=PSD if semidefinite else ())


def blocks(rng, semidefinite=False):
    values = np.array([0.5, 2.0, 1.0]) if semidefinite else np.array([0.5, -2.0, 1.0])
    b = Diagonal(values, tags=PSD if semidefinite else ())
    return BlockDiagonal({"w": kronecker_sum(rng, semidefinite=semidefinite), "b": b})


def residual_of(matrix, x, b):
    return np.linalg.norm(b - matrix @ x) / np.linalg.norm(b)


@pytest.mark.parametrize("semidefinite", [True, False])
@pytest.mark.parametrize("method", ["auto", "minres"])
def test_a_tree_of_parameters_against_the_dense_solve(rng, helpers, semidefinite, method):
    H = blocks(rng, semidefinite)
    b = helpers.like(H, rng)
    x, info = iterative_solve(H, b, 0.3, method=method, **TIGHT)
    matrix = np.asarray(H.as_matrix()) + 0.3 * np.eye(15)
    np.testing.assert_allclose(ravel_pytree(x)[0], np.linalg.solve(matrix, ravel_pytree(b)[0]), rtol=1e-9, atol=1e-9)
    assert jax.tree.structure(x) == jax.tree.structure(b)
    assert info.converged
    assert 0 < info.iterations < 150
    np.testing.assert_allclose(info.residual, residual_of(matrix, ravel_pytree(x)[0], ravel_pytree(b)[0]), atol=1e-14)
    assert info.method == ("cg" if semidefinite and method == "auto" else "minres")
    expected = "" if method == "minres" else "semidefinite"
    assert expected in info.reason
    assert bool(info.reason) == (method == "auto")


def test_a_damping_for_each_parameter(rng, helpers):
    H = blocks(rng)
    b = helpers.like(H, rng)
    x, info = iterative_solve(H, b, {"w": 0.1, "b": jnp.asarray(3.0)}, **TIGHT)
    dampings = np.array([3.0] * 3 + [0.1] * 12)
    expected = np.linalg.solve(np.asarray(H.as_matrix()) + np.diag(dampings), ravel_pytree(b)[0])
    np.testing.assert_allclose(ravel_pytree(x)[0], expected, rtol=1e-8, atol=1e-8)
    assert info.converged


@pytest.mark.parametrize("consistent", [True, False])
def test_singular_operators_have_the_solution_of_least_norm(rng, consistent):
    A = with_eigenvalues(rng, [0, 0, 0, -3, -1, 1, 2, 5, 4, -2])
    b = rng.standard_normal(10)
    b = A @ b if consistent else b
    x, info = iterative_solve(operator(A), b, 0.0)
    expected = np.linalg.pinv(A, rcond=1e-10) @ b
    np.testing.assert_allclose(x, expected, rtol=1e-7, atol=1e-7)
    assert bool(info.converged) == consistent
    np.testing.assert_allclose(info.residual, residual_of(A, expected, b), atol=1e-9)
    # To lineax, least squares is a success; the first guess keeps its part in the null space.
    found = lx.linear_solve(operator(A), jnp.asarray(b), MINRES(rtol=1e-10, atol=0.0), options={"y0": jnp.asarray(expected)})
    np.testing.assert_allclose(found.value, expected, rtol=1e-7, atol=1e-7)


def test_small_eigenvalues_are_no_singularity(rng):
    # b is almost all in the eigenspace of 1e-9: A r is small long before r is.
    values = np.array([1e-9] * 3 + [1.0, -1.0, 2.0, -2.0, 3.0])
    A = with_eigenvalues(rng, values)
    b = rng.standard_normal(8)
    x, info = iterative_solve(operator(A), b, 0.0, tolerance=1e-5)
    assert info.converged
    assert residual_of(A, np.asarray(x), b) <= 1e-5


def test_few_steps_are_told_truly(rng):
    A = with_eigenvalues(rng, np.linspace(-3, 5, 30))
    b = rng.standard_normal(30)
    x, info = iterative_solve(operator(A), b, 0.05, max_steps=4)
    assert not info.converged
    assert info.iterations == 4
    np.testing.assert_allclose(info.residual, residual_of(A + 0.05 * np.eye(30), np.asarray(x), b), rtol=1e-12)
    # The least residual there is over the Krylov space of four products.
    K = np.stack([np.linalg.matrix_power(A + 0.05 * np.eye(30), k) @ b for k in range(1, 5)], axis=1)
    best = b - K @ np.linalg.lstsq(K, b, rcond=None)[0]
    np.testing.assert_allclose(info.residual, np.linalg.norm(best) / np.linalg.norm(b), rtol=1e-8)
    assert "NOT converged, 4 iterations" in repr(info)


def test_a_first_guess(rng):
    A, b = with_eigenvalues(rng, np.linspace(-3, 5, 30)), rng.standard_normal(30)
    x, cold = iterative_solve(operator(A), b, 0.1)
    for start, steps in ((x, 0), (x * (1 + 1e-6), cold.iterations - 1)):
        again, info = iterative_solve(operator(A), b, 0.1, start=start)
        assert info.iterations <= steps
        assert info.converged
        np.testing.assert_allclose(again, x, rtol=1e-8, atol=1e-8)


def test_zero_has_the_solution_zero(rng):
    A = operator(with_eigenvalues(rng, [1.0, -2.0, 3.0]))
    for start in (None, np.ones(3)):
        x, info = iterative_solve(A, np.zeros(3), 0.1, start=start)
        np.testing.assert_array_equal(x, np.zeros(3))
        assert info.converged
        assert info.residual == 0
        assert info.iterations == 0


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_what_is_not_finite_does_not_converge(rng, method):
    A, b = with_eigenvalues(rng, [1.0, 2.0, 3.0]), np.ones(3)
    for matrix, vector in ((A, b * np.nan), (A * np.nan, b), (A, np.array([1.0, np.inf, 0.0]))):
        x, info = iterative_solve(operator(matrix), vector, 0.1, method=method)
        assert not info.converged
        assert not np.isfinite(info.residual) or matrix is not A
        assert not (np.isfinite(x).all() and np.isnan(vector).any())


def test_conjugate_gradients_that_break_down_are_told(rng):
    A, b = with_eigenvalues(rng, [-1.0, 2.0, 3.0]), np.array([1.0, 2.0, -1.0])
    x, info = iterative_solve(operator(A, PSD), b, jnp.asarray(0.0))
    assert info.method == "cg"
    assert bool(info.converged) == (residual_of(A, np.asarray(x), b) <= 1e-10)
    assert info.residual <= 1
    assert iterative_solve(operator(A, PSD), b, -0.5)[1].method == "minres"


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_float32_at_any_scale(rng, scale):
    A = with_eigenvalues(rng, np.linspace(-3, 5, 20)).astype(np.float32)
    b = (scale * rng.standard_normal(20)).astype(np.float32)
    x, info = iterative_solve(operator(A), b, np.float32(0.1))
    assert x.dtype == info.residual.dtype == jnp.float32
    assert info.converged
    assert residual_of(A + 0.1 * np.eye(20), np.asarray(x, float), b.astype(float)) < 1.1e-5


def test_many_parameters_in_float32():
    # lineax's own conjugate gradients give NaN from a hundred thousand on.
    H = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(jnp.linspace(0.3, 0.6, 200_000, dtype=jnp.float32)), PSD)
    x, info = iterative_solve(H, jnp.ones(200_000, jnp.float32), 0.0)
    assert info.converged
    np.testing.assert_allclose(x, 1 / H.operator.diagonal, rtol=1e-4)


def test_narrow_dtypes_are_solved_in_float32(rng):
    A = with_eigenvalues(rng, [1.0, -2.0, 3.0])
    x, info = iterative_solve(operator(A.astype(jnp.bfloat16)), jnp.ones(3, jnp.bfloat16), 0.5)
    assert x.dtype == jnp.float32
    assert info.residual < 1e-2


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_kronecker_preconditioner_saves_steps(rng, method):
    m, n = 6, 8
    A, B = with_eigenvalues(rng, np.logspace(-3, 0, m)), with_eigenvalues(rng, np.logspace(-3, 0, n))
    a, z = np.linalg.cholesky(A), np.linalg.cholesky(B)
    # A ⊗ B as a sum of n products, each turned a little: no Kronecker product is near all of it.
    turned = [a @ (np.eye(m) + 0.05 * with_eigenvalues(rng, rng.uniform(-1, 1, m))) @ a.T for _ in range(n)]
    layout = Layout.transposed(m, n)
    H = KroneckerProductSum(np.stack(turned) * n, z.T, layout, tags=PSD)
    M = kronecker_preconditioner(A, B, 1e-6, layout)
    b = rng.standard_normal((n, m))
    x, plain = iterative_solve(H, b, 1e-6, method=method, tolerance=1e-8)
    y, info = iterative_solve(H, b, 1e-6, method=method, tolerance=1e-8, preconditioner=M)
    assert info.converged
    assert 8 * info.iterations < plain.iterations
    matrix = np.asarray(H.as_matrix()) + 1e-6 * np.eye(m * n)
    assert residual_of(matrix, np.asarray(y).reshape(-1), b.reshape(-1)) <= 1e-8
    expected = np.linalg.solve(matrix, b.reshape(-1))
    np.testing.assert_allclose(y.reshape(-1), expected, atol=1e-4 * np.abs(expected).max())
    del x


def test_preconditioners_are_the_inverses_they_say(rng):
    A, B = with_eigenvalues(rng, [2.0, -1.0]), with_eigenvalues(rng, [-3.0, 1.0, 0.0])
    layout = Layout.transposed(2, 3)
    M = kronecker_preconditioner(A, B, 0.1, layout)

    def absolute(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return (vectors * np.abs(values)) @ vectors.T

    dense = np.asarray(layout.reorder(jnp.asarray(np.kron(absolute(A), absolute(B)))))
    np.testing.assert_allclose(M.as_matrix(), np.linalg.inv(dense + 0.1 * np.eye(6)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(M.with_damping(0.1).as_matrix(), M.as_matrix())
    undamped = np.linalg.eigvalsh(M.with_damping(0.0).as_matrix())
    assert undamped[0] > 0.1
    assert np.isfinite(undamped).all()
    assert np.isfinite(kronecker_preconditioner(0 * A, B).as_matrix()).all()

    both = block_preconditioner({"w": M, "b": lx.IdentityLinearOperator(jax.ShapeDtypeStruct((2,), float))})
    expected = np.eye(8)
    expected[2:, 2:] = M.as_matrix()
    np.testing.assert_allclose(both.as_matrix(), expected)
    for operator in (M, both):
        assert lx.is_symmetric(operator)
        assert lx.is_positive_semidefinite(operator)
        assert not lx.is_diagonal(operator)
        assert lx.linearise(operator) is lx.conj(operator) is operator.T is operator
    assert "6 x 6" in repr(M)
    assert "KroneckerPreconditioner" in repr(both)


def test_a_preconditioned_tree_under_jit_and_lineax(rng, helpers):
    H = blocks(rng, semidefinite=True)
    b = helpers.like(H, rng)
    w, structure = H["w"], H["b"].in_structure()

    @jax.jit
    def solve(H, b, Q, Z):
        M = kronecker_preconditioner(jnp.mean(Q, 0), Z.T @ Z / len(Z), 0.3)
        M = block_preconditioner({"w": M, "b": lx.IdentityLinearOperator(structure)})
        damped = lx.TaggedLinearOperator(H + 0.3 * lx.IdentityLinearOperator(H.in_structure()), PSD)
        options = {"preconditioner": M}
        theirs = [lx.linear_solve(damped, b, s(rtol=1e-12, atol=1e-13), options=options).value for s in (MINRES, lx.CG)]
        return [iterative_solve(H, b, 0.3, preconditioner=M, **TIGHT)[0], *theirs]

    matrix = np.asarray(H.as_matrix()) + 0.3 * np.eye(15)
    for x in solve(H, b, w.Q, w.Z):
        np.testing.assert_allclose(ravel_pytree(x)[0], np.linalg.solve(matrix, ravel_pytree(b)[0]), rtol=1e-9, atol=1e-9)


def test_vmap_and_derivatives(rng):
    A, B = with_eigenvalues(rng, np.linspace(-3, 5, 6)), rng.standard_normal((3, 6))
    dampings = jnp.array([0.1, 0.2, 0.5])

    def ours(A, b, damping):
        return iterative_solve(operator((A + A.T) / 2), b, damping, **TIGHT)[0]

    def dense(A, b, damping):
        return jnp.linalg.solve((A + A.T) / 2 + damping * jnp.eye(6), b)

    def readings(solve):
        def value(A, b, damping):
            return jnp.sum(jnp.sin(solve(A, b, damping)))

        def reading(b, damping):
            second = jax.jvp(jax.grad(value, 1), (A, b, damping), (A, b, 1.0))[1]
            return solve(A, b, damping), jax.grad(value, (0, 1, 2))(A, b, damping), second

        return jax.jit(jax.vmap(reading))(B, dampings)

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-7, atol=1e-7), readings(ours), readings(dense))
    infos = jax.vmap(lambda b: iterative_solve(operator(A), b, 0.1)[1])(B)
    assert infos.converged.shape == (3,)
    assert "of shape (3,)" in repr(infos)


def test_derivatives_that_do_not_converge_are_nan(rng):
    A, b = with_eigenvalues(rng, np.linspace(-3, 5, 12)), rng.standard_normal(12)
    gradient = jax.grad(lambda b: jnp.sum(iterative_solve(operator(A), b, 0.0, max_steps=2)[0]))(jnp.asarray(b))
    assert np.isnan(gradient).all()


def test_minres_is_differentiated_by_lineax(rng):
    K = jnp.asarray(rng.standard_normal((6, 6)))
    A, b = with_eigenvalues(rng, [0.0, 0.0, 1.0, -1.0, 2.0, -3.0]), jnp.asarray(rng.standard_normal(6))

    def moved(t):
        E = jnp.eye(6) + t * K
        return E @ A @ E.T

    @jax.jit
    def derivative(t, b):
        def solve(t, b):
            return lx.linear_solve(operator(moved(t)), b, MINRES(rtol=1e-10, atol=0.0)).value

        return jax.jvp(solve, (t, b), (1.0, b)), jax.vjp(lambda b: solve(t, b), b)[1](b)[0]

    (_, tangent), cotangent = derivative(0.0, b)
    ahead, behind = (np.linalg.pinv(moved(t), rcond=1e-9) @ ((1 + t) * b) for t in (1e-5, -1e-5))
    np.testing.assert_allclose(tangent, (ahead - behind) / 2e-5, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cotangent, np.linalg.pinv(A, rcond=1e-9) @ b, rtol=1e-6, atol=1e-6)


def test_minres_as_lineax_calls_it(rng):
    A, b = operator(with_eigenvalues(rng, np.linspace(-3, 5, 20))), jnp.asarray(rng.standard_normal(20))
    few = lx.linear_solve(A, b, MINRES(rtol=1e-6, atol=0.0, max_steps=3), throw=False)
    assert few.result == lx.RESULTS.max_steps_reached
    assert few.stats["num_steps"] == 3
    tight = lx.linear_solve(A, b, MINRES(rtol=0.0, atol=0.0), throw=False)
    assert tight.result == lx.RESULTS.stagnation
    np.testing.assert_allclose(A.mv(tight.value), b, rtol=1e-11, atol=1e-11)
    negative = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(-jnp.ones(20)), PSD)
    broken = lx.linear_solve(A, b, MINRES(rtol=1e-6, atol=0.0), options={"preconditioner": negative}, throw=False)
    assert broken.result == lx.RESULTS.breakdown
    with pytest.raises(InputError, match="rtol must not be negative, got -1"):
        MINRES(rtol=-1.0, atol=0.0)
    with pytest.raises(InputError, match="needs a symmetric operator"):
        lx.linear_solve(lx.MatrixLinearOperator(jnp.eye(3)), jnp.ones(3), MINRES(rtol=1e-6, atol=0.0))


def test_nothing_is_traced_twice(rng, helpers):
    traces = []

    class Counted(lx.IdentityLinearOperator):
        def mv(self, vector):
            traces.append(1)
            return vector

    for question in ("is_symmetric", "is_positive_semidefinite"):
        getattr(lx, question).register(Counted)(lambda operator: True)
    b = helpers.like(blocks(rng), rng)
    counts = []
    for factor in (1.0, 2.0):
        scaled = jax.tree.map(lambda leaf, factor=factor: factor * leaf, b)
        H = Counted(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), b))
        x, info = iterative_solve(H, scaled, factor, tolerance=1e-6 * factor, start=scaled)
        assert info.converged
        np.testing.assert_allclose(x["w"], scaled["w"] / (1 + factor), rtol=1e-6)
        counts.append(len(traces))
    assert 0 < counts[0] == counts[1]


def test_functions_are_operators_too():
    H = lx.FunctionLinearOperator(lambda v: jnp.flip(v), jax.ShapeDtypeStruct((4,), float), SYMMETRIC)
    x, info = iterative_solve(H, jnp.arange(4.0), 0.5)
    np.testing.assert_allclose(jnp.flip(x) + 0.5 * x, jnp.arange(4.0), atol=1e-9)
    assert info.method == "minres"


def test_refusals(rng, helpers):
    H = blocks(rng)
    b = helpers.like(H, rng)
    cases = [
        ({"vector": b["w"]}, "the vector must have the operator's structure"),
        ({"vector": {"w": b["w"], "b": np.ones(4)}}, r"the vector needs shapes \(3,\), \(3, 4\), got \(4,\), \(3, 4\)"),
        ({"vector": {"w": b["w"], "b": 1j * np.ones(3)}}, "the vector is complex"),
        ({"start": {"w": b["w"]}}, "the start must have the operator's structure"),
        ({"damping": {"w": 1.0}}, "a tree of numbers that leads the parameters'"),
        ({"damping": {"w": 1.0, "b": np.ones(3)}}, r"the damping of 'b' must be a number, got an array of shape \(3,\)"),
        ({"method": "newton"}, "method='newton' is not known"),
        ({"max_steps": -1}, "max_steps must not be negative"),
        ({"tolerance": -1.0}, "tolerance must not be negative"),
        (
            {"preconditioner": lx.IdentityLinearOperator(jax.ShapeDtypeStruct((3,), float))},
            "the operator's structure, shapes",
        ),
        ({"preconditioner": H}, "a BlockDiagonal, is not tagged as positive semidefinite"),
        ({"operator": lx.MatrixLinearOperator(jnp.eye(3))}, "not known to be symmetric"),
    ]
    for changed, message in cases:
        with pytest.raises(InputError, match=message):
            iterative_solve(**{"operator": H, "vector": b, "damping": 0.1, **changed})
    with pytest.raises(InputError, match=r"A must be a square matrix, got shape \(2, 3\)"):
        kronecker_preconditioner(np.ones((2, 3)), np.eye(2))
    with pytest.raises(InputError, match="reads the parameter of shape"):
        kronecker_preconditioner(np.eye(2), np.eye(3), 0.0, Layout.of_matrix(3, 2))
    with pytest.raises(InputError, match=r"'w'.* is a float, not a lineax operator"):
        block_preconditioner({"w": 1.0})
    with pytest.raises(InputError, match="there is no block"):
        block_preconditioner({})


def test_what_is_said_of_a_solve():
    info = SolveInfo("eigh", "small", jnp.array(0), jnp.array(1.5e-16), jnp.array(True), jnp.array(-0.25))
    assert str(info) == "SolveInfo(eigh: converged, relative residual 1.5e-16, nearest eigenvalue -0.25; small)"
    assert "iterations" not in repr(info)
    texts = []
    jax.jit(lambda i: texts.append(repr(i)))(SolveInfo("cg", "", jnp.array(1), jnp.array(1.0), jnp.array(False)))
    assert texts == ["SolveInfo(cg: converged traced, traced iterations, relative residual traced)"]
    assert "?" in repr(jax.eval_shape(lambda: info))
