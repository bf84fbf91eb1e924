"""Gauss-Newton operators on factors of random numbers: the paths that depend on sizes, against the dense matrix."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxhess import operators as ops
from jaxhess.operators import jacobian as jacobian_module
from jaxhess.operators.uses import Use

PLAIN = Use((1, 2), (4, 3), (1,), (4,), (2,), (3,), ())
PLACES = Use((1, 2), (4, 3), (3, 1), (2, 4), (3, 2), (2, 3), (3,))
TURNED = Use((1, 2), (4, 3), (2,), (3,), (1,), (4,), ())
FREE = Use((1, 2), (4, 3), (2, 1), (3, 4), None, (), ())


def make(rng, *uses, r=5, M=2, B="dense"):
    """A Jacobian of random factors, a curvature of this kind, and the dense matrix."""
    parts, A = [], np.zeros((r, M, 4, 3))
    for use in uses:
        V, scale = rng.standard_normal((r, M, *use.output_sizes)), rng.uniform(0.5, 2)
        z = None if use.input is None else rng.standard_normal((r, *use.input_sizes))
        parts.append(ops.JacobianUse(jnp.asarray(V), None if z is None else jnp.asarray(z), jnp.asarray(scale), use, 0))
        spell = {1: "i", 2: "j", 3: "s"}
        y = "rc" + "".join(spell[label] for label in use.output)
        if z is None:
            A += scale * np.einsum(f"{y}->rcij", V)
        else:
            A += scale * np.einsum(f"{y},r{''.join(spell[label] for label in use.input)}->rcij", V, z)
    S = rng.standard_normal((r, M, M))
    curvature = {"dense": S @ np.swapaxes(S, 1, 2), "diagonal": S[:, 0] ** 2, "none": None}[B]
    full = {"dense": curvature, "none": np.tile(np.eye(M), (r, 1, 1))}.get(B)
    full = np.stack([np.diag(b) for b in S[:, 0] ** 2]) if full is None else full
    A = A.reshape(r, M, 12)
    J = ops.OutputJacobian(tuple(parts), None, (4, 3), np.dtype(np.float64), r, M, ((4, 3),))
    return J, None if curvature is None else jnp.asarray(curvature), A, full


def close(found, expected):
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-12, atol=1e-12 * np.max(np.abs(expected)))


USES = {
    "plain": [PLAIN],
    "places": [PLACES],
    "tied": [PLAIN, TURNED],
    "free": [FREE],
    "mixed": [PLACES, FREE, PLAIN],
    "none": [],
}


@pytest.mark.parametrize(("r", "B", "chunk"), [(5, "dense", 5), (5, "diagonal", 2), (20, "dense", 3), (20, "none", 20)])
@pytest.mark.parametrize("uses", USES)
def test_every_method(monkeypatch, uses, r, B, chunk):
    """r = 5: fewer rows of the Jacobian than parameters. In chunks of so many examples."""
    monkeypatch.setattr(jacobian_module, "_CHUNK_BYTES", chunk * 2 * 12 * 8)
    rng = np.random.default_rng(0)
    J, curvature, A, full = make(rng, *USES[uses], r=r, B=B)
    H = ops.GaussNewtonBlock(J, curvature)
    matrix = np.einsum("rci,rcd,rdj->ij", A, full, A) / r
    x = rng.standard_normal((4, 3))
    close(H.as_matrix(), matrix)
    close(H.mv(x).reshape(-1), matrix @ x.reshape(-1))
    close(H.diagonal().reshape(-1), np.diag(matrix))
    close(H.trace(), np.trace(matrix))
    close(H.frobenius_norm(), np.linalg.norm(matrix))
    close(H.eigvalsh(), np.linalg.eigvalsh(matrix))
    rank = np.linalg.matrix_rank(matrix)
    assert [int(n) for n in H.inertia(1e-10)] == [rank, 0, 12 - rank]
    assert lx.is_positive_semidefinite(H)
    assert not lx.is_positive_semidefinite(-H)
    close((-3.0 * H).eigvalsh(), np.linalg.eigvalsh(-3 * matrix))
    close((H + ops.Diagonal(jnp.ones((4, 3)))).as_matrix(), matrix + np.eye(12))
    terms = H.kronecker_terms()
    assert (terms is None) == (uses not in ("plain",))
    if terms is not None:
        close(terms.as_matrix(), matrix)


@pytest.mark.parametrize("r", [2, 20])
def test_trees_and_cross_blocks(r):
    rng = np.random.default_rng(0)
    first, curvature, A, full = make(rng, PLACES, r=r)
    second, _, C, _ = make(rng, TURNED, PLAIN, r=r)
    G = ops.GaussNewton({"a": first, "b": [second]}, curvature)
    rows = np.concatenate([A, C], axis=2)
    matrix = np.einsum("rci,rcd,rdj->ij", rows, full, rows) / r
    vector = {"a": rng.standard_normal((4, 3)), "b": [rng.standard_normal((4, 3))]}
    close(G.as_matrix(), matrix)
    close(ravel_pytree(G.mv(vector))[0], matrix @ ravel_pytree(vector)[0])
    close(ravel_pytree(G.diagonal())[0], np.diag(matrix))
    close(G.frobenius_norm(), np.linalg.norm(matrix))
    close(G.eigvalsh(), np.linalg.eigvalsh(matrix))
    close((G * 2).trace(), 2 * np.trace(matrix))
    assert [int(n) for n in G.inertia(1e-10)] == [min(2 * r, 24), 0, 24 - min(2 * r, 24)]
    cross = G["a"]["b"][0]
    close(cross.as_matrix(), matrix[:12, 12:])
    close(cross.frobenius_norm(), np.linalg.norm(matrix[:12, 12:]))
    close(cross.T.as_matrix(), matrix[12:, :12])
    close(jnp.reshape((cross / 2).mv(vector["b"][0]), -1), matrix[:12, 12:] @ vector["b"][0].reshape(-1) / 2)


def test_they_pass_through_transformations():
    rng = np.random.default_rng(0)
    J, curvature, *_ = make(rng, PLAIN)
    for H in (
        ops.GaussNewtonBlock(J, curvature),
        ops.GaussNewton({"w": J}, curvature),
        ops.GaussNewtonCrossBlock(J, J, None),
    ):
        matrix = H.as_matrix()
        close(jax.jit(lambda h: h.as_matrix())(H), matrix)
        close(jax.jit(lambda h: h)(H).as_matrix(), matrix)
        close(jax.tree.map(lambda a: a, H).as_matrix(), matrix)
        factors = jnp.array([1.0, -2.0])
        batch = jax.vmap(H.scaled)(factors)
        close(jax.vmap(lambda h: h.as_matrix())(batch), factors[:, None, None] * matrix[None])
        assert H.storage_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(H))
        for stripped in (
            batch,
            jax.tree.map(lambda a: None, H),
            jax.tree.map(lambda a: "leaf", H),
            jax.eval_shape(lambda h: h, H),
            jax.tree.map(lambda a: a.shape, H),
        ):
            assert type(H).__name__ in repr(stripped)
        with pytest.raises(ValueError, match="can be multiplied by scalars only"):
            H * np.ones(3)


def test_what_would_not_fit_is_refused():
    r, n = 20000, 10**6
    use = Use((1, 2), (n, 3), (1,), (n,), (2,), (3,), ())

    def read(V, z):
        J = ops.OutputJacobian(
            (ops.JacobianUse(V, z, jnp.ones(()), use, 0),), None, (n, 3), np.dtype(np.float64), r, 100, ((n, 3),)
        )
        H = ops.GaussNewtonBlock(J, None)
        return H.as_matrix if V.ndim == 3 else None, H.eigvalsh

    shapes = jax.ShapeDtypeStruct((r, 100, n), float), jax.ShapeDtypeStruct((r, 3), float)
    for which in (0, 1):
        with pytest.raises(MemoryError, match=r"dense 2000000 x 2000000|dense 3000000 x 3000000"):
            jax.eval_shape(lambda V, z, which=which: read(V, z)[which](), *shapes)


def test_it_solves_with_lineax():
    rng = np.random.default_rng(0)
    J, curvature, *_ = make(rng, PLAIN, r=20)
    H = ops.GaussNewtonBlock(J, curvature)
    b = jnp.asarray(rng.standard_normal((4, 3)))
    for operator in (H, H + ops.Diagonal(jnp.full((4, 3), 0.1), tags=lx.positive_semidefinite_tag)):
        solution = lx.linear_solve(operator, b, lx.CG(rtol=1e-12, atol=1e-12)).value
        np.testing.assert_allclose(operator.mv(solution), b, atol=1e-9)
