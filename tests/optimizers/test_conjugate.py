"""Conjugate gradients beside the last step against the minimum over the space that they look in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhess.optimizers.conjugate import minimise
from jaxhess.optimizers.quadratic import Quadratic

N, DAMPING = 9, 0.3


def tree(vector):
    return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:]).reshape(7, 1)}


def flat(vector):
    return jnp.concatenate([jnp.ravel(vector["a"]), jnp.ravel(vector["b"])])


def case(seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(2, N, N))
    C, P = X[0] @ X[0].T + 0.01 * np.eye(N), np.linalg.inv(X[1] @ X[1].T + np.eye(N))
    return C, P, *rng.normal(size=(2, N))


@functools.partial(jax.jit, static_argnums=(4, 5))
def found(C, P, g, v, most, progress):
    model = Quadratic(tree(g), lambda x: tree(C @ flat(x)))
    return minimise(model, lambda x: tree(P @ flat(x)), tree(v), jnp.asarray(DAMPING), most, progress)


def lowest_in(basis, A, g):
    basis = np.linalg.qr(np.stack(basis, axis=1))[0]
    return basis @ np.linalg.solve(basis.T @ A @ basis, -basis.T @ g)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("moving", [True, False])
def test_the_minimum_over_the_last_step_and_the_krylov_space(seed, moving):
    C, P, g, v = case(seed)
    v = v if moving else np.zeros(N)
    A = C + DAMPING * np.eye(N)
    mu = -(v @ g) / (v @ A @ v) if moving else 0.0
    residual = -g - mu * A @ v
    basis = [v] if moving else []
    for k in range(1, 6):
        # Conjugate to v, as the directions are: the residuals stay orthogonal to it.
        basis.append(P @ residual if k == 1 else P @ A @ basis[-1])
        if moving:
            basis[-1] = basis[-1] - v * (v @ A @ basis[-1]) / (v @ A @ v)
        step, iterations, left = found(C, P, g, v, k, 0.0)
        s = flat(step.step)
        np.testing.assert_allclose(s, lowest_in(basis, A, g), rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(step.curved, s @ C @ s, rtol=1e-8)
        np.testing.assert_allclose(left, np.linalg.norm(A @ s + g) / np.linalg.norm(g), rtol=1e-7)
        np.testing.assert_allclose(step.momentum, mu, rtol=1e-12)
        assert iterations == k


def test_all_of_the_space_is_the_solution():
    C, P, g, v = case(4)
    step, iterations, residual = found(C, P, g, v, 3 * N, 0.0)
    np.testing.assert_allclose(flat(step.step), -np.linalg.solve(C + DAMPING * np.eye(N), g), rtol=1e-8)
    assert residual < 1e-9
    assert iterations <= 3 * N


@pytest.mark.parametrize("progress", [0.01, 0.1, 0.5])
def test_the_last_iteration_gains_less_than_its_share(progress):
    for seed in range(4):
        C, P, g, v = case(seed)
        A = C + DAMPING * np.eye(N)

        def gain(k, A=A, case=(C, P, g, v)):
            s = flat(found(*case, k, 0.0)[0].step)
            return -(case[2] @ s + s @ A @ s / 2)

        _, iterations, _ = found(C, P, g, v, N, progress)
        k = int(iterations)
        assert gain(k) - gain(k - 1) <= progress * gain(k) * (1 + 1e-9) or k == N
        for j in range(1, k):
            assert gain(j) - gain(j - 1) > progress * gain(j) * (1 - 1e-9)


def test_a_perfect_preconditioner_takes_one_iteration():
    C, _, g, _ = case(1)
    P = np.linalg.inv(C + DAMPING * np.eye(N))
    step, _, residual = found(C, P, g, np.zeros(N), 1, 0.1)
    np.testing.assert_allclose(flat(step.step), -P @ g, rtol=1e-9)
    np.testing.assert_allclose(step.learning_rate, 1, rtol=1e-9)
    assert residual < 1e-10
    # Where the last step is the solution itself, nothing is left to do.
    step, _, _ = found(C, P, g, -2 * P @ g, 5, 0.1)
    np.testing.assert_allclose(flat(step.step), -P @ g, rtol=1e-9)
    np.testing.assert_allclose(step.momentum, 0.5, rtol=1e-9)


def test_negative_curvature_ends_it():
    C, P, g, v = case(2)
    # At once: the preconditioned gradient as it is, without the last step.
    step, iterations, _ = found(-10 * C, P, g, v, 5, 0.0)
    np.testing.assert_allclose(flat(step.step), -P @ g, rtol=1e-12)
    assert iterations == 1
    assert step.momentum == 0
    # Later: what was found until then.
    values = np.ones(N)
    values[-1] = -50
    g = np.ones(N)
    g[-1] = 1e-2
    step, iterations, _ = found(np.diag(values), np.eye(N), g, np.zeros(N), 5, 0.0)
    assert 1 <= iterations <= 3
    assert np.isfinite(flat(step.step)).all()
    s = flat(step.step)
    assert g @ s + s @ np.diag(values) @ s / 2 < 0


def test_no_gradient_no_step():
    C, P, g, v = case(3)
    step, iterations, residual = found(C, P, 0 * g, v, 5, 0.1)
    np.testing.assert_array_equal(flat(step.step), np.zeros(N))
    assert iterations == 0
    assert residual == 0


@pytest.mark.parametrize("where", range(4))
def test_what_is_not_finite_ends_it(where):
    arrays = [np.array(x) for x in case(5)]
    arrays[where].flat[0] = np.nan
    step, iterations, _ = found(*arrays, 5, 0.1)
    assert iterations <= 5
    # A last step that is not finite is left out.
    assert np.isfinite(flat(step.step)).all() == (where == 3)
