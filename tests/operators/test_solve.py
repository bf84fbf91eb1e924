"""Solves, determinants, roots and extremes of operators against the same of their dense matrices."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from jaxhess._typing import InputError, NotConvergedError, SingularError
from jaxhess.operators import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    KroneckerProduct,
    KroneckerProductSum,
    Layout,
    SpectralOperator,
    functions,
)
from jaxhess.operators.reduction import ravel, unravel

PSD, SYMMETRIC = lx.positive_semidefinite_tag, lx.symmetric_tag
LAYOUTS = {
    "plain": Layout.of_matrix(3, 4),
    "transposed": Layout.transposed(3, 4),
    "heads": Layout(shape=(4, 3), sizes=(2, 2, 3), rows=(2,), columns=(1, 0)),
}


def close(actual, expected, tolerance=1e-9):
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected), initial=0) <= tolerance * max(np.max(np.abs(expected), initial=0), 1e-300)


def rows_of(tree, count):
    return np.stack([np.asarray(ravel(jax.tree.map(lambda leaf, i=i: leaf[i], tree))) for i in range(count)])


def solution(H, b, damping, **options):
    return ravel(H.solve(unravel(H.in_structure(), jnp.asarray(b)), damping, **options))


def check(H, damping=0.37, tolerance=1e-9, methods=("auto", "lu")):
    """Every operation of a symmetric operator, whose dense form is trusted."""
    D = np.asarray(H.as_matrix(), float)
    N, b = len(D), np.random.default_rng(5).standard_normal(len(D))
    w, V = np.linalg.eigh((D + D.T) / 2)
    size = np.max(np.abs(w), initial=0)
    A = D + damping * np.eye(N)
    x = np.linalg.solve(A, b)
    for method in methods:
        close(solution(H, b, damping, method=method), x, tolerance)
    _, info = H.solve(unravel(H.in_structure(), jnp.asarray(b)), damping, return_info=True)
    assert info.converged
    assert info.reason
    assert info.residual < tolerance
    close(info.eigenvalue + damping, w[np.argmin(np.abs(w + damping))] + damping, 1e3 * tolerance)
    sign, value = H.slogdet(damping)
    expected = np.linalg.slogdet(A)
    assert float(sign) == expected[0]
    assert abs(float(value) - expected[1]) < tolerance * N
    F, E = H.factorize(damping), H.factorize()
    vector = unravel(H.in_structure(), jnp.asarray(b))
    close(ravel(F.solve(vector)), x, tolerance)
    assert float(F.slogdet()[0]) == expected[0]
    assert abs(float(F.logdet(damping)) - expected[1]) < tolerance * N
    close(ravel(E.solve(vector, damping)), x, tolerance)
    close(E.as_matrix() + size * np.eye(N), D + size * np.eye(N), tolerance)
    close(ravel(E.mv(vector)), D @ b, tolerance * max(1, size / max(np.max(np.abs(D @ b)), 1e-300)))
    close(ravel(E.diagonal()) + size, np.diag(D) + size, tolerance)
    close(E.eigvalsh(), w, tolerance)
    close(E.absolute().as_matrix(), (V * np.abs(w)) @ V.T, tolerance)
    close(E.positive_part().as_matrix() + size * np.eye(N), (V * np.maximum(w, 0)) @ V.T + size * np.eye(N), tolerance)
    assert lx.is_positive_semidefinite(H.absolute())
    assert lx.is_positive_semidefinite(H.positive_part())
    inertia = [int(count) for count in E.inertia(1e-6 * size if size else None)]
    assert inertia == [np.sum(w > 1e-6 * size), np.sum(w < -1e-6 * size), np.sum(np.abs(w) <= 1e-6 * size)]
    safe = damping + max(0.0, -w[0])
    close(E.inverse_sqrt(safe).as_matrix(), (V / np.sqrt(w + safe)) @ V.T, tolerance)
    close(E.inverse(damping).as_matrix(), np.linalg.inv(A), tolerance)
    lowest = H.negative_curvature_direction()
    close(lowest.eigenvalue, w[0] if w[0] < -1e-10 * size else 0.0, tolerance)
    direction = np.asarray(ravel(lowest.direction))
    close(D @ direction, float(lowest.eigenvalue) * direction, max(tolerance, 1e-8))
    for which in ("magnitude", "largest", "smallest", "both"):
        check_extremes(E, D, which, N, tolerance)
    return E


def check_extremes(E, D, which, k, tolerance):
    N, w = len(D), np.linalg.eigvalsh(D)
    size = max(np.max(np.abs(w)), 1e-300)
    values, vectors = E.eigh(k, which=which, method="exact")
    rows = rows_of(vectors, k)
    low = {"smallest": k, "both": k // 2, "largest": 0}.get(which)
    expected = np.sort(w[np.argsort(-np.abs(w))[:k]]) if low is None else np.concatenate([w[:low], w[N - (k - low) :]])
    assert np.max(np.abs(np.asarray(values) - expected)) <= tolerance * size
    assert np.max(np.abs(rows @ rows.T - np.eye(k))) < 10 * tolerance
    assert np.max(np.abs(D @ rows.T - rows.T * np.asarray(values))) <= 10 * tolerance * size


def kronecker(rng, helpers, r, m, n, **options):
    return KroneckerProductSum(helpers.symmetric(rng, r, m, m), rng.standard_normal((r, n)), **options)


@pytest.mark.parametrize(("r", "m", "n"), [(2, 3, 4), (4, 3, 4), (1, 3, 4), (3, 1, 4), (2, 3, 1), (1, 1, 1)])
def test_every_operation_equals_its_dense_counterpart(rng, helpers, r, m, n):
    check(kronecker(rng, helpers, r, m, n))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_degenerate_blocks(rng, helpers, name):
    # More examples than inputs; the shapes are those of one compiled program.
    layout, r = LAYOUTS[name], 6
    Q, Z = helpers.symmetric(rng, r, 3, 3), rng.standard_normal((r, 4))
    deficient, some_zero = Z.copy(), Z.copy()
    deficient[2:] = deficient[:1] * rng.standard_normal((r - 2, 1))
    some_zero[[0, 3]] = 0
    definite = Q @ np.swapaxes(Q, 1, 2)
    cases = [
        (Q, Z),
        (Q, deficient),
        (Q, some_zero),
        (definite, Z),
        (definite, deficient),
        (Q, 0 * Z),
        (-definite, deficient),
    ]
    for q, z in cases[: None if name == "plain" else 2]:
        H = KroneckerProductSum(q, z, layout)
        close(H.as_matrix(), helpers.reordered(helpers.mean_of_krons(q, z), layout))
        check(H)
    E = check(KroneckerProductSum(definite, deficient, layout, tags=PSD), methods=("auto", "cholesky"))
    assert E.absolute() is E
    root = KroneckerProductSum(definite, deficient, layout, tags=PSD).matrix_function(jnp.sqrt).as_matrix()
    close(root @ root, helpers.reordered(helpers.mean_of_krons(definite, deficient), layout))


def test_other_operators(rng, helpers):
    dense = Dense(helpers.symmetric(rng, 6, 6), (2, 3))
    A, B = helpers.symmetric(rng, 3, 3), helpers.symmetric(rng, 2, 2)
    for H in (
        dense,
        Diagonal(rng.standard_normal((2, 3))),
        KroneckerProduct(A, B, Layout.transposed(3, 2), tags=SYMMETRIC),
        dense + Diagonal(rng.standard_normal((2, 3))),
        dense.factorize().matrix_function(lambda values: values**2 - 1),
    ):
        check(H)
        check(H * -2.0)
    with pytest.raises(InputError, match="not known to be symmetric"):
        KroneckerProduct(A, B).solve(np.ones((3, 2)), 1.0)


def test_float32_and_narrower(rng, helpers):
    H = kronecker(rng, helpers, 2, 3, 4)
    short = KroneckerProductSum(H.Q.astype(jnp.float32), H.Z.astype(jnp.float32))
    E = check(short, tolerance=2e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(E)} == {jnp.dtype("float32")}
    assert short.factorize(0.1).solve(jnp.ones((3, 4)), 0.1).dtype == jnp.float32
    half = KroneckerProductSum(H.Q.astype(jnp.bfloat16), H.Z.astype(jnp.bfloat16))
    same = KroneckerProductSum(half.Q.astype(jnp.float32), half.Z.astype(jnp.float32))
    ones = jnp.ones((3, 4), jnp.bfloat16)
    for method in ("eigh", "lu"):
        np.testing.assert_allclose(half.solve(ones, 0.3, method=method), same.solve(ones, 0.3, method=method), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "scale", "tolerance"), [("float64", 1e20, 1e-9), ("float32", 1e12, 1e-4)])
def test_scale_is_no_matter(rng, helpers, dtype, scale, tolerance):
    H = kronecker(rng, helpers, 2, 3, 4)
    H = KroneckerProductSum(H.Q.astype(dtype), H.Z.astype(dtype))
    b = rng.standard_normal((3, 4)).astype(dtype)
    for method in ("eigh", "lu"):
        x = H.solve(b, 0.3, method=method)
        for s in (scale, 1 / scale):
            close(np.asarray((H * s).solve(b, 0.3 * s, method=method), float) * s, x, tolerance)
            _, info = (H * s).solve(b * s, 0.3 * s, method=method, return_info=True)
            assert info.converged
            assert 0 < info.residual < tolerance
            close(info.eigenvalue / s, H.solve(b, 0.3, return_info=True)[1].eigenvalue, 1e3 * tolerance)
    tiny = Dense(jnp.asarray(np.diag([1.0, -1, 2, 3, -4, 5, 6]) * 1e-25, jnp.float32))
    _, info = tiny.solve(jnp.ones(7), 0.0, method="lu", return_info=True)
    assert info.converged


def test_eigenvalues_as_near_on_both_sides_of_zero(rng):
    V = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    H = Dense((V * np.array([1.0, -1] * 4)) @ V.T)
    _, info = H.solve(jnp.ones(8), 0.0, method="lu", return_info=True)
    close(abs(info.eigenvalue), 1.0)


def test_refusals_name_the_eigenvalue(rng, helpers):
    H = kronecker(rng, helpers, 4, 3, 4)
    b, w = jnp.ones((3, 4)), np.linalg.eigvalsh(H.as_matrix())
    for value in (w[0], w[5], w[-1]):
        text = re.escape(f"has the eigenvalue {value:.6g}, ")
        attempts = [H.inverse, H.factorize] + [functools.partial(H.solve, b, method=m) for m in ("auto", "lu")]
        for attempt in attempts:
            with pytest.raises(SingularError, match=text):
                attempt(-value)
        _, info = H.solve(b, -value, return_info=True)
        assert not info.converged
        close(info.eigenvalue, value)
        assert H.slogdet(-value) == (0, -np.inf)
    wide = kronecker(rng, helpers, 2, 3, 4)
    for method in ("auto", "lu"):
        with pytest.raises(SingularError, match="has the eigenvalue 0"):
            wide.solve(b, method=method)
    assert wide.logdet() == -np.inf
    assert wide.solve(b, 1e-200).shape == b.shape  # what is orthogonal to all z is known exactly
    lowest = w[0]
    for attempt in (H.inverse_sqrt, functools.partial(H.sample, jax.random.key(0))):
        with pytest.raises(SingularError, match=f"not positive definite.*{re.escape(f'{lowest:.6g}')}"):
            attempt(0.5 * -lowest)
    with pytest.raises(SingularError, match=r"not positive definite to rounding.*method='lu'"):
        H.solve(b, 0.1, method="cholesky")
    definite = Dense(np.diag([1.0, 2, 3]), tags=PSD)
    close(definite.factorize(-1.5).solve(np.ones(3)), [-2, 2, 2 / 3])
    assert not lx.is_positive_semidefinite(definite.inverse(-1.5))
    assert lx.is_positive_semidefinite(definite.inverse(1.5))
    poisoned = Dense(jnp.full((3, 3), jnp.nan))
    for method in ("eigh", "lu"):
        with pytest.raises(SingularError):
            poisoned.solve(jnp.ones(3), 0.1, method=method)
    assert np.isnan(poisoned.logdet(0.1))
    assert np.isnan(H.solve(b * jnp.nan, 0.1)).all()


def test_dampings_that_are_none(rng, helpers):
    H = kronecker(rng, helpers, 2, 3, 4)
    b = jnp.ones((3, 4))
    for damping in (None, "0.1", [0.1], {"w": 1.0}, np.ones(3), 1j):
        with pytest.raises(InputError):
            H.solve(b, damping)
    for vector in (jnp.ones((4, 3)), [b], jnp.ones(12), 1j * b):
        with pytest.raises(InputError, match="solve"):
            H.solve(vector, 0.1)
    for wrong in ({"method": "qr"}, {"method": "cg", "preconditioner": "diagonal"}):
        with pytest.raises(InputError, match="not known"):
            H.solve(b, 0.1, **wrong)
    for k in (0, 13):
        with pytest.raises(InputError, match="12 eigenvalues"):
            H.eigh(k)
    with pytest.raises(InputError, match="which"):
        H.eigh(2, which="middle")
    with pytest.raises(InputError, match="needs a damping"):
        H.factorize(method="lu")
    factored = H.factorize(0.1)
    with pytest.raises(InputError, match="several dampings"):
        factored.solve(b, 0.2)
    with pytest.raises(InputError, match="shape"):
        factored.solve(jnp.ones((4, 3)))
    with pytest.raises(InputError, match="per_example"):
        Dense(np.eye(2)).absolute(per_example=True)


def blocks(rng, helpers):
    w, b = kronecker(rng, helpers, 2, 3, 4, layout=Layout.transposed(3, 4)), Dense(helpers.symmetric(rng, 3, 3))
    return BlockDiagonal({"a": {"b": b, "w": w}, "c": Diagonal(rng.standard_normal(2))})


def test_trees_block_by_block(rng, helpers):
    H = blocks(rng, helpers)
    structure, N = H.in_structure(), H.in_size()
    D, b = np.asarray(H.as_matrix()), rng.standard_normal(H.in_size())
    vector = unravel(structure, jnp.asarray(b))
    each = {"a": {"b": 0.3, "w": 0.5}, "c": jnp.asarray(0.7)}
    for damping, numbers in ((0.4, [0.4] * N), ({"a": 0.4, "c": 2.0}, [0.4] * 15 + [2.0] * 2), (each, None)):
        numbers = np.repeat([0.3, 0.5, 0.7], [3, 12, 2]) if numbers is None else np.array(numbers)
        A = D + np.diag(numbers)
        x, info = H.solve(vector, damping, return_info=True)
        close(ravel(x), np.linalg.solve(A, b))
        assert info["a"]["w"].converged
        assert "diagonal" in info["c"].reason
        F = H.factorize(damping)
        close(ravel(F.solve(vector)), np.linalg.solve(A, b))
        close(ravel(H.factorize(damping, method="eigh").solve(vector)), np.linalg.solve(A, b))
        close(ravel(H.factorize().factorize(damping).solve(vector)), np.linalg.solve(A, b))
        for sign, value in (H.slogdet(damping), F.slogdet()):
            assert float(sign) == np.linalg.slogdet(A)[0]
            close(value, np.linalg.slogdet(A)[1])
        close(H.inverse(damping).as_matrix(), np.linalg.inv(A))
        # The same with one operator for all: what `Damped` is for.
        close(Damped(H, numbers[[0, 3, 15]]).as_matrix(), A)
    close(solution(Damped(H, numbers[[0, 3, 15]]), b, 0.0), np.linalg.solve(A, b))
    w = np.linalg.eigvalsh(D)
    for which, k in (("both", 3), ("smallest", 4), ("magnitude", N)):
        check_extremes(H, D, which, k, 1e-9)
    close(H.negative_curvature_direction().eigenvalue, w[0])
    close(np.linalg.eigvalsh(H.absolute().as_matrix()), np.sort(np.abs(w)))
    for damping in ({"a": 0.1}, {"a": 0.1, "c": np.ones(2)}, {"a": 0.1, "c": 1j}, None):
        with pytest.raises(InputError):
            H.solve(vector, damping)
    value = float(H["c"].values[0])
    attempts = (functools.partial(H.solve, vector), H.factorize, H.inverse, H.inverse_sqrt)
    for attempt in (*attempts, functools.partial(H.sample, jax.random.key(0))):
        with pytest.raises(SingularError, match=r"block 'c': .*eigenvalue"):
            attempt({"a": 20.0, "c": -value})
    with pytest.raises(InputError, match="'a/w' needs shape"):
        H.solve({"a": {"b": vector["a"]["b"], "w": vector["a"]["w"].T}, "c": vector["c"]}, 0.1)


def test_refusals_in_compiled_code_are_raised_when_it_runs(rng, helpers):
    H = blocks(rng, helpers)
    vector = unravel(H.in_structure(), jnp.ones(H.in_size()))
    value = H["c"].values[0]
    solve = eqx.filter_jit(lambda H, v, damping: H.solve(v, damping)["c"])
    close(solve(H, vector, 0.3), H.solve(vector, 0.3)["c"])
    with pytest.raises(Exception, match=r"block 'c': Diagonal.solve"):
        jax.block_until_ready(solve(H, vector, -value))
    x, info = jax.jit(lambda H, v, damping: H["c"].solve(v, damping, return_info=True))(H, vector["c"], -value)
    assert not info.converged
    del x


def test_one_example_takes_work_of_its_outputs_only(rng, helpers):
    m, n = 3, 40
    H = kronecker(rng, helpers, 1, m, n)
    text = str(jax.make_jaxpr(lambda H, b: (H.solve(b, 0.3, return_info=True)[0], H.logdet(0.3)))(H, jnp.ones((m, n))))
    assert not re.search(r"\b(qr|householder_product|lu)\b", text)
    assert f"f64[{m},{m}]" in text
    assert f"[{m * n},{m * n}]" not in text
    assert H.factorize().eigenvalues.shape == (m,)
    close(H.factorize().eigenvalues, np.sum(np.asarray(H.Z) ** 2) * np.linalg.eigvalsh(H.Q[0]))
    check(H)


def test_a_held_factorisation_is_not_computed_again(rng, helpers):
    E = kronecker(rng, helpers, 2, 3, 200).factorize()
    b = jnp.ones((3, 200))

    def solve(E, b, damping):
        return E.solve(b, damping, return_info=True)[0], E.logdet(damping)

    text = str(jax.make_jaxpr(solve)(E, b, 0.1))
    assert not re.search(r"\b(qr|householder_product|lu|eigh|cholesky)\b", text)
    memory = jax.jit(solve).lower(E, b, 0.1).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20 * b.nbytes
    assert isinstance(E, SpectralOperator)
    assert E.factorize() is E


def test_nothing_is_compiled_twice(rng, helpers):
    counted = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: counted.append(name) if name.endswith("backend_compile_duration") else None
    )

    def everything(seed):
        rng = np.random.default_rng(seed)
        H, b = kronecker(rng, helpers, 2, 3, 4), jnp.asarray(rng.standard_normal((3, 4)))
        E, damping = H.factorize(), 0.3 + seed
        results = [H.solve(b, damping, method=m, return_info=True) for m in ("auto", "lu", "minres")]
        results += [H.solve(b, damping), H.factorize(damping).solve(b), E.solve(b, damping), E.mv(b), H.slogdet(damping)]
        results += [
            H.eigh(2, which="both"),
            H.absolute().mv(b),
            H.inverse(damping).mv(b),
            H.absolute(per_example=True).mv(b),
        ]
        results += [H.sample(jax.random.key(0), 40.0 + seed, (2,)), H.negative_curvature_direction(), E.diagonal()]
        return results

    everything(0)
    before = len(counted)
    assert before > 0
    everything(1)
    assert len(counted) == before


def test_public_methods_go_through_transformations_as_pytrees(rng, helpers):
    """They do in Equinox; methods for inner use, and sizes, are plain ones, which cost a twentieth."""
    H, X = kronecker(rng, helpers, 3, 3, 4), jnp.asarray(rng.standard_normal((3, 4)))
    close(jax.jit(lambda method, *arguments: method(*arguments))(H.solve, X, 9.0), H.solve(X, 9.0))
    assert len(jax.tree.leaves(H.mv)) == len(jax.tree.leaves(H))
    assert H._held.__self__ is H.in_size.__self__ is H


def test_per_example_forms_keep_the_structure(rng, helpers):
    H = kronecker(rng, helpers, 3, 3, 4)
    values, vectors = np.linalg.eigh(H.Q)
    for name, function in (("absolute", np.abs), ("positive_part", lambda v: np.maximum(v, 0))):
        K = getattr(H, name)(per_example=True)
        Q = np.einsum("rij,rj,rkj->rik", vectors, function(values), vectors)
        assert isinstance(K, KroneckerProductSum)
        assert lx.is_positive_semidefinite(K)
        close(K.as_matrix(), helpers.mean_of_krons(Q, np.asarray(H.Z)))


def test_derivatives_go_through_solves(rng, helpers):
    H, b = kronecker(rng, helpers, 2, 3, 4), jnp.asarray(rng.standard_normal((3, 4)))
    target = jnp.asarray(rng.standard_normal((3, 4)))

    def dense(Q, Z, b, damping):
        A = sum(jnp.kron(q, jnp.outer(z, z)) for q, z in zip(Q, Z, strict=True)) / len(Q) + damping * jnp.eye(12)
        return target.reshape(-1) @ jnp.linalg.solve(A, b.reshape(-1)), jnp.linalg.slogdet(A)[1]

    expected = jax.jacrev(dense, argnums=(0, 1, 2, 3))(H.Q, H.Z, b, 0.37)
    for method in ("eigh", "lu"):

        def structured(Q, Z, b, damping, method=method):
            K = KroneckerProductSum(Q, Z)
            return jnp.vdot(target, K.solve(b, damping, method=method)), K.logdet(damping)

        value, vjp = jax.vjp(jax.jit(structured), H.Q, H.Z, b, 0.37)
        close(jnp.stack(value), jnp.stack(dense(H.Q, H.Z, b, 0.37)))
        for n in range(2):
            got = vjp(tuple(jnp.asarray(float(n == j)) for j in range(2)))
            close(got[0], np.asarray(expected[n][0] + jnp.swapaxes(expected[n][0], 1, 2)) / 2, 1e-8) if n else None
            for g, e in zip(got[1:], expected[n][1:], strict=True):
                close(g, e, 1e-8)


def test_many_at_once(rng, helpers):
    Q, Z, b = helpers.symmetric(rng, 3, 2, 3, 3), rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 3, 4))
    H = jax.vmap(KroneckerProductSum)(jnp.asarray(Q), jnp.asarray(Z))
    for method in ("eigh", "lu"):
        many = jax.vmap(lambda H, b, method=method: H.solve(b, 0.37, method=method))(H, jnp.asarray(b))
        for n in range(3):
            close(many[n], KroneckerProductSum(Q[n], Z[n]).solve(b[n], 0.37))
    E = jax.jit(lambda H: H.factorize())(KroneckerProductSum(Q[0], Z[0]))
    doubled = jax.tree.map(lambda leaf: leaf * 1, E)
    dampings = jnp.array([0.1, 0.37])
    several = jax.vmap(lambda damping: doubled.solve(jnp.asarray(b[0]), damping))(dampings)
    for damping, x in zip(dampings, several, strict=True):
        close(x, E.solve(b[0], damping))
    F = jax.jit(lambda H: H.factorize(0.37))(KroneckerProductSum(Q[0], Z[0]))
    close(jax.tree.map(lambda leaf: leaf * 1, F).solve(b[0]), several[1])
    assert "Factorization(lu of 6^2 for 12" in repr(F)


def test_samples(rng, helpers):
    H = kronecker(rng, helpers, 2, 2, 3)
    D = np.asarray(H.as_matrix())
    damping = 1.0 - np.linalg.eigvalsh(D)[0]
    root = np.asarray(H.inverse_sqrt(damping).as_matrix())
    covariance = np.linalg.inv(D + damping * np.eye(6))
    close(root @ root, covariance)
    draws = np.asarray(H.sample(jax.random.key(3), damping, (200, 100))).reshape(-1, 6)
    assert np.max(np.abs(draws.T @ draws / len(draws) - covariance)) < 4 * np.max(covariance) * np.sqrt(2 / len(draws))
    close(draws[:2], np.asarray(jax.random.normal(jax.random.key(3), (20000, 6)))[:2] @ root)
    assert H.sample(jax.random.key(0), damping).shape == (2, 3)


def test_repeated_eigenvalues_and_more_than_are_held():
    # kron(I, z z^T): one eigenvalue three times, and zero nine times, of which none is held.
    H = KroneckerProductSum(jnp.eye(3)[None], jnp.ones((1, 4)))
    D = np.asarray(H.as_matrix())
    for which, k in (("magnitude", 2), ("both", 5), ("smallest", 12)):
        check_extremes(H, D, which, k, 1e-10)
    direction = H.negative_curvature_direction()
    assert direction.eigenvalue == 0
    assert not np.any(direction.direction)


def test_extremes_by_iterations(rng, helpers):
    H = kronecker(rng, helpers, 6, 6, 12)
    w = np.linalg.eigvalsh(H.as_matrix())
    values, _, info = H.eigh(3, method="iterative", which="both", tolerance=1e-8, return_info=True)
    assert info.converged
    close(values, [w[0], w[-2], w[-1]], 1e-7)
    exact, _, told = H.eigh(3, which="both", return_info=True)
    close(exact, values, 1e-7)
    assert told.products == 0
    assert Diagonal(jnp.arange(3000.0)).eigh(2, return_info=True)[2].products == 0


def test_what_auto_picks_is_told(rng, helpers, monkeypatch):
    H, b = kronecker(rng, helpers, 2, 3, 4), jnp.asarray(rng.standard_normal((3, 4)))
    _, info = H.solve(b, 0.37, return_info=True)
    assert (info.method, info.reason) == ("eigh", "6 dimensions of the reduced space are factored")
    monkeypatch.setattr(functions, "SMALL", 2)
    for operator, kind in ((H, "lu"), (H.absolute(per_example=True), "cholesky")):
        x, info = operator.solve(b, 0.37, return_info=True)
        assert info.method == kind
        close(x, operator.solve(b, 0.37, method="eigh"))
    monkeypatch.setattr(functions, "_DIRECT", 2)
    for operator, kind in ((H, "minres"), (H.absolute(per_example=True), "cg")):
        x, info = operator.solve(b, 0.37, return_info=True)
        assert info.method == kind
        assert "6 dimensions, too many" in info.reason
        assert info.converged
        close(x, operator.solve(b, 0.37, method="eigh"), 1e-8)
        x, info = operator.solve(b, 0.37, max_steps=1, preconditioner=None, return_info=True)
        assert not info.converged
        left = b - operator.mv(x) - 0.37 * x
        close(info.residual, jnp.linalg.norm(left) / jnp.linalg.norm(b))
        with pytest.raises(NotConvergedError, match=r"residual of .* after 1 steps"):
            operator.solve(b, 0.37, max_steps=1, preconditioner=None)


def test_dampings_of_outside_of_a_trace():
    """A number that is known where the program is traced, as an array: its sign is read there."""
    H, damping = Dense(jnp.diag(jnp.array([1.0, 3.0]))), jnp.asarray(1.0)
    G = H.with_tags(lx.positive_semidefinite_tag)
    vector, factored = jnp.array([2.0, 4.0]), G.factorize(damping)

    @jax.jit
    def run(vector):
        tags = [lx.is_positive_semidefinite(G.inverse(d)) for d in (damping, -damping / 2)]
        return [K.solve(vector, damping) for K in (H, G)], factored.solve(vector, damping), tags

    solved, held, tags = run(vector)
    for x in (*solved, held):
        np.testing.assert_allclose(x, [1.0, 1.0], rtol=1e-12)
    assert tags[0]
