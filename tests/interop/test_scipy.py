"""Operators in SciPy's solvers."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from models import MODELS, inputs, normal
from scipy.sparse.linalg import cg, eigsh, lobpcg, lsqr, minres, svds

import jaxhess
from jaxhess._typing import InputError
from jaxhess.interop import scipy as interop
from jaxhess.interop.scipy import as_linear_operator
from jaxhess.operators import LowRank

OPERATORS = {}


def operator(function):
    OPERATORS[function.__name__] = function
    return function


def hessian(name="perceptron"):
    error, params, batch = MODELS[name]()
    return jaxhess.hessian(error)(params, *batch)


@operator
def whole_network():
    return hessian()


@operator
def one_block():
    return hessian()["hidden"]["w"]


@operator
def labelled_contractions():
    return hessian("tied_weights")


@operator
def low_rank_and_rectangular():
    return LowRank(normal(0, 3, 2), normal(1, 5, 2))


@operator
def damped_as_lineax_does_it():
    H = hessian()
    return H + 0.1 * lx.IdentityLinearOperator(H.in_structure())


@operator
def unsymmetric():
    return lx.MatrixLinearOperator(normal(0, 3, 4))


@operator
def through_a_loop():
    def error(params, x):
        return jnp.sum(jaxhess.recurrent(params["w"], params["u"], params["b"], x) ** 3)

    params = {"w": normal(0, 3, 2), "u": normal(1, 3, 3), "b": normal(2, 3)}
    return jaxhess.hessian(error)(params, normal(3, 4, 5, 2))


@pytest.mark.parametrize("name", OPERATORS)
def test_products_are_those_of_the_matrix(name):
    H = OPERATORS[name]()
    A, dense = as_linear_operator(H), np.asarray(H.as_matrix())
    rng = np.random.default_rng(0)
    assert A.shape == dense.shape
    assert A.dtype == np.float64
    for B, M in ((A, dense), (A.T, dense.T), (A.H, dense.T), (2 * A, 2 * dense)):
        x, X = rng.normal(size=M.shape[1]), rng.normal(size=(M.shape[1], 3))
        assert isinstance(B @ x, np.ndarray)
        np.testing.assert_allclose(B @ x, M @ x, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(B @ x[:, None], M @ x[:, None], rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(B @ X, M @ X, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(B @ (x + 2j * x[::-1]), M @ (x + 2j * x[::-1]), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(A.rmatmat(np.eye(len(dense))), dense.T, rtol=1e-11, atol=1e-12)


def test_the_order_is_that_of_ravel_pytree():
    error, params, batch = MODELS["gates_and_layer_norm"]()
    H = jaxhess.hessian(error)(params, *batch)
    flat, unravel = ravel_pytree(params)
    expected = ravel_pytree(H.mv(unravel(flat)))[0]
    np.testing.assert_allclose(as_linear_operator(H) @ np.asarray(flat), expected, rtol=1e-12, atol=1e-14)


def test_eigenvalues():
    H = hessian()["hidden"]["w"]  # no multiple eigenvalues, of which one start vector finds one
    A, expected = as_linear_operator(H), np.linalg.eigvalsh(H.as_matrix())
    start = np.ones(len(expected))
    np.testing.assert_allclose(eigsh(A, 3, which="LA", v0=start)[0], expected[-3:], rtol=1e-9)
    np.testing.assert_allclose(eigsh(A, 2, which="SA", v0=start)[0], expected[:2], rtol=1e-9)
    X = np.random.default_rng(0).normal(size=(len(expected), 3))
    np.testing.assert_allclose(np.sort(lobpcg(A, X, tol=1e-9, maxiter=200)[0]), expected[-3:], rtol=1e-9)


def test_singular_values_of_a_rectangular_operator():
    L = LowRank(normal(0, 7, 2), normal(1, 5, 2))
    expected = np.linalg.svd(L.as_matrix(), compute_uv=False)
    np.testing.assert_allclose(np.sort(svds(as_linear_operator(L), 2, v0=np.ones(5))[1]), np.sort(expected[:2]), rtol=1e-9)
    b = np.arange(7.0)
    x = lsqr(as_linear_operator(L), b, damp=0.5, atol=1e-13, btol=1e-13)[0]
    M = np.asarray(L.as_matrix())
    np.testing.assert_allclose(x, np.linalg.solve(M.T @ M + 0.25 * np.eye(5), M.T @ b), rtol=1e-8)


def test_linear_systems():
    H = hessian()
    M = np.asarray(H.as_matrix())
    b = np.sin(np.arange(len(M)))
    damping = 0.1 - min(0.0, np.linalg.eigvalsh(M)[0])
    damped = H + damping * lx.IdentityLinearOperator(H.in_structure())
    x, failed = cg(as_linear_operator(damped), b, rtol=1e-12)
    assert not failed
    np.testing.assert_allclose(x, np.linalg.solve(M + damping * np.eye(len(M)), b), rtol=1e-8)
    x, failed = minres(as_linear_operator(H), M @ b, rtol=1e-13, maxiter=2000)
    assert not failed
    np.testing.assert_allclose(M @ x, M @ b, rtol=0, atol=1e-7)


def test_nothing_is_compiled_again():
    error, params, (x, t) = MODELS["perceptron"]()
    build = jaxhess.hessian(error)
    first = as_linear_operator(build(params, x, t))
    v = np.ones(first.shape[1])
    before = first @ v
    compiled = interop._product._cache_size()
    first @ (2 * v)
    second = as_linear_operator(build(jax.tree.map(lambda p: 2 * p, params), x, t))
    assert not np.allclose(second @ v, before)
    assert interop._product._cache_size() == compiled


def test_functions_and_dtypes():
    H = hessian()
    A = as_linear_operator(lambda v: jax.tree.map(lambda a, b: a + 0.5 * b, H.mv(v), v), MODELS["perceptron"]()[1])
    M = np.asarray(H.as_matrix()) + 0.5 * np.eye(A.shape[0])
    v = np.arange(A.shape[0], dtype=float)
    np.testing.assert_allclose(A @ v, M @ v, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(A.rmatvec(v), M.T @ v, rtol=1e-11, atol=1e-12)
    for dtype in (jnp.float32, jnp.bfloat16):
        x, t = (a.astype(dtype) for a in inputs())
        narrow = as_linear_operator(
            jaxhess.hessian(lambda w, x, t: jnp.sum((w @ x - t) ** 2))(jnp.ones((3, 4), dtype), x, t)
        )
        assert narrow.dtype == np.float32
        assert (narrow @ np.ones(12)).dtype == np.float32
        assert eigsh(narrow, 1, v0=np.ones(12, np.float32))[0] > 0


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="ndarray"):
        as_linear_operator(np.eye(3))
    with pytest.raises(InputError, match="example of what it takes"):
        as_linear_operator(lambda v: v)
    with pytest.raises(ValueError, match=r"(?i)dimension mismatch"):
        as_linear_operator(hessian()) @ np.ones(3)
