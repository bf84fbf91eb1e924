"""Labelled contractions against jnp.einsum and against autodiff of a parameter used twice."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from jaxhess._typing import InputError
from jaxhess.operators import ContractionOperator, KroneckerProductSum


def test_same_as_sum_of_kronecker_products(rng, helpers):
    Q, Z = helpers.symmetric(rng, 3, 2, 2), rng.standard_normal((3, 4))
    H = KroneckerProductSum(Q, Z)
    C = ContractionOperator((Q, Z, Z), ("rip", "rq", "rs"), "iq", "ps", (2, 4), 1 / 3, tags=lx.symmetric_tag)
    X = rng.standard_normal((2, 4))
    for a, b in ((C.mv(X), H.mv(X)), (C.as_matrix(), H.as_matrix()), (C.diagonal(), H.diagonal())):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(C.eigvalsh(), H.eigvalsh(), rtol=1e-12, atol=1e-12)


def test_parameter_used_twice(rng):
    # y = W a, x = W b, E = y^T K x: d2E/dW_j dW_k[(i,q),(p,s)] = K[i,p] a[q] b[s], and its transpose.
    W, a, b, K = (rng.standard_normal(shape) for shape in ((2, 3), (3,), (3,), (2, 2)))
    expected = jax.hessian(lambda W: (W @ a) @ K @ (W @ b))(W).reshape(6, 6)
    H = ContractionOperator((K, a, b), ("ip", "q", "s"), "iq", "ps", (2, 3), symmetrised=True)
    np.testing.assert_allclose(H.as_matrix(), expected, rtol=1e-12, atol=1e-12)
    assert lx.is_symmetric(H)


def test_convolution_weight(rng):
    # y[t, i] = sum_kc w[k, c, i] x[t+k, c], E = |tanh-free quadratic form of y|: places t, u are labels to be summed.
    w, x = rng.standard_normal((2, 3, 2)), rng.standard_normal((2, 5, 3))
    windows = np.stack([x[:, t : t + 2] for t in range(4)], axis=1)
    M = rng.standard_normal((8, 8))
    Q = (M @ M.T).reshape(4, 2, 4, 2)

    def error(w):
        y = jnp.einsum("kci,rtkc->rti", w, windows)
        return jnp.mean(jnp.einsum("rti,tiuj,ruj->r", y, Q, y)) / 2

    expected = jax.hessian(error)(w).reshape(12, 12)
    labels = ("tiuj", "rtkc", "rude")
    H = ContractionOperator((Q, windows, windows), labels, "kci", "dej", (2, 3, 2), 1 / 2, tags=lx.symmetric_tag)
    np.testing.assert_allclose(H.as_matrix(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(H.trace(), np.trace(expected), rtol=1e-12)


def test_transpose_swaps_the_sides(rng):
    a, b = rng.standard_normal(3), rng.standard_normal(3)
    C = ContractionOperator((a, b), ("i", "j"), "i", "j", (3,))
    assert (C.T.rows, C.T.columns) == (("j",), ("i",))
    np.testing.assert_allclose(C.T.as_matrix(), np.outer(b, a), rtol=1e-12)
    assert C.sizes == (3,)


@pytest.mark.parametrize(
    ("labels", "rows", "columns", "shape", "message"),
    [
        (("ij",), "i", "j", (2,), "2 operands have 1 tuples of labels"),
        (("ij", "ij"), "i", "j", (2,), r"operand 1 of shape \(3,\) has the labels"),
        (("ij", "j"), "i", "j", (2,), "label 'j' has the sizes 2 and 3"),
        (("ij", "k"), "i", "i", (2,), "must not share a label"),
        (("ij", "k"), "i", "x", (2,), "no operand has the labels"),
        (("ij", "k"), "i", "k", (2,), r"rows of sizes \(2,\) and columns of sizes \(3,\) must both refine"),
        (("ij", "k"), "i", "j", (5,), r"must both refine the parameter's shape \(5,\)"),
    ],
)
def test_refusals(labels, rows, columns, shape, message):
    with pytest.raises(InputError, match=message):
        ContractionOperator((np.ones((2, 2)), np.ones(3)), labels, rows, columns, shape)
