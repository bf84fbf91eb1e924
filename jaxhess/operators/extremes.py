"""The k extreme eigenpairs of a symmetric operator, from products alone: a block Davidson method.

With V (p, N) an orthonormal basis held as rows, `W = V H` and the Rayleigh-Ritz pairs of `T = V W^T`:

    T s = θ s        x = V^T s        r = W^T s - θ x        R = the residuals of the wanted pairs

V grows by the b largest residuals (Krylov's directions), or by `(K - θ)^-1 r` with K near H (Davidson 1975, Morgan & Scott
1986), until it is full; then it is rotated onto its best Ritz vectors (thick restart; Wu & Simon 2000). No product is ever
repeated: W is kept, and every vector multiplied stays in the search space.

The error of an eigenvalue is bounded by its residual and, for each group a..b of neighbouring Ritz values that holds it and
lies apart from the others, by a quadratic of the group's residuals (Mathias 1998, Kato 1949):

    |λ_i - θ_i| <= ||r_i||        |λ_i - θ_i| <= sum_{l=a..b} ||r_l||^2 / δ
    δ = min(θ_a - θ_{a-1} - ||r_{a-1}||,  θ_{b+1} - θ_b - ||r_{b+1}||)

so repeated and clustered eigenvalues converge as the well separated ones do. One guard pair beyond the wanted ones on
either side closes the last group.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, Float, InputError, PyTree
from jaxhess.operators.layout import Layout

Which = Literal["magnitude", "largest", "smallest", "both"]

_STEPS = 8  # blocks that the search space takes up before it is restarted
_START_NOISE = 0.05
_ENOUGH = 0.1  # of the squares of directions left by projections: else rounding shows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExtremesInfo:
    """How `extreme_eigenpairs` went.

    `products` () is the number of vectors that were multiplied, `error` (k,) a bound on the distance of each eigenvalue to
    one of the operator's, `converged` () whether all of them are within the tolerance.
    """

    products: Array
    error: Float[Array, "k"]
    converged: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerGuess:
    """kron(A, B) by its eigenvectors, as something near an operator: where to start from, and where to go on to.

    Made by `kronecker_guess`. `rows` (m,) and `row_vectors` (m, m) are eigenvalues and eigenvectors of A, `columns` (n,)
    and `column_vectors` (n, n) those of B.
    """

    rows: Float[Array, "m"]
    row_vectors: Float[Array, "m m"]
    columns: Float[Array, "n"]
    column_vectors: Float[Array, "n n"]
    layout: Layout = dataclasses.field(metadata={"static": True})

    def start(self, count: int, which: Which = "magnitude") -> Float[Array, "count ..."]:
        """The `count` extreme eigenvectors, outer products of those of A and B, (count, *shape of the parameter)."""
        products = jnp.outer(self.rows, self.columns).reshape(-1)
        if count > products.size:
            raise InputError(
                f"KroneckerGuess.start: asked for {count} eigenvectors of a {products.size} x {products.size} matrix"
            )
        chosen = _extreme_positions(products, count, which)
        i, j = chosen // self.columns.size, chosen % self.columns.size
        outer = self.row_vectors.T[i][:, :, None] * self.column_vectors.T[j][:, None, :]
        return jax.vmap(self.layout.from_matrix)(outer)

    def directions(self, residuals: Float[Array, "b ..."], eigenvalues: Float[Array, "b"]) -> Float[Array, "b ..."]:
        """`(kron(A, B) - θ)^-1 r` for each residual, but for denominators kept away from zero."""
        # Nearer to θ than a tenth of it, the spectrum of kron(A, B) does not tell where the operator's is.
        R = jax.vmap(self.layout.to_matrix)(residuals)
        largest = jnp.max(jnp.abs(eigenvalues))
        least = jnp.where(largest > 0, 0.1 * largest, 1)
        difference = jnp.outer(self.rows, self.columns)[None] - eigenvalues[:, None, None]
        bounded = jnp.where(difference < 0, jnp.minimum(difference, -least), jnp.maximum(difference, least))
        U, V = self.row_vectors, self.column_vectors
        inner = matmul(matmul(U.T, R), V) / bounded
        return jax.vmap(self.layout.from_matrix)(matmul(U, matmul(inner, V.T)))


def kronecker_guess(A: Float[Array, "m m"], B: Float[Array, "n n"], layout: Layout | None = None) -> KroneckerGuess:
    """A start for `extreme_eigenpairs` of an operator near kron(A, B), both symmetric: two small eigendecompositions.

    For the Hessian of a batch, `(1/r) sum_i kron(Q_i, z_i z_i^T)`, take the means of Q and of z z^T. `layout` says how the
    parameter is read as (m, n), by default as it is. Raises `InputError` if A or B is not square or does not fit.

    >>> import jax.numpy as jnp
    >>> guess = kronecker_guess(jnp.diag(jnp.array([1.0, 3.0])), jnp.diag(jnp.array([2.0, -1.0])))
    >>> abs(guess.start(1, "largest")).tolist()
    [[[0.0, 0.0], [1.0, 0.0]]]
    """
    for name, factor in (("A", A), ("B", B)):
        if jnp.ndim(factor) != 2 or factor.shape[0] != factor.shape[1]:
            raise InputError(f"kronecker_guess: {name} must be a square matrix, got shape {jnp.shape(factor)}")
    m, n = A.shape[0], B.shape[0]
    if layout is None:
        layout = Layout.of_matrix(m, n)
    if (layout.m, layout.n) != (m, n):
        raise InputError(
            f"kronecker_guess: A and B belong to a {m} x {n} matrix, the layout describes {layout.m} x {layout.n}"
        )
    return KroneckerGuess(*jnp.linalg.eigh(A), *jnp.linalg.eigh(B), layout)


def kronecker_start(A: Float[Array, "m m"], B: Float[Array, "n n"], k: int, which: Which = "magnitude") -> Array:
    """The k extreme eigenvectors of kron(A, B), A and B symmetric, as outer products: (k, m, n), each of norm one."""
    return kronecker_guess(A, B).start(k, which)


def extreme_eigenpairs(
    operator: Any,
    k: int,
    *,
    which: Which = "magnitude",
    tolerance: Any = 1e-5,
    start: Any = None,
    max_products: int | None = None,
) -> tuple[Float[Array, "k"], PyTree, ExtremesInfo]:
    """The k extreme eigenvalues of a symmetric operator with their eigenvectors.

    Parameters:

    * `operator`: anything with `mv`, `in_structure` and `in_size` (a lineax operator), on an array or a tree of arrays,
      N entries in all. Its symmetry is trusted.
    * `which`: the k of largest `"magnitude"`, the `"largest"`, the `"smallest"` (most negative), or `"both"`: k // 2
      smallest and the rest largest.
    * `tolerance`: the error allowed of each eigenvalue, relative to the largest |eigenvalue|. Traced or not.
    * `start`: where to look first: a block of vectors, (b, *shape) or a tree of these; a `KroneckerGuess`, which also
      says where to go on to; or a PRNG key. A little noise is added, so that no start misses an eigenvector for good.
    * `max_products`: when to stop without having converged, by default 100 (k + 10). Static, as k and `which` are.

    Returns the eigenvalues (k,), ascending; the orthonormal eigenvectors, in the operator's structure with a leading axis of
    k; and an `ExtremesInfo`, whose `converged` is False where the tolerance was not reached within `max_products`. Its
    errors are bounds on the distance to the operator's nearest eigenvalues; that none of the extreme ones was passed over
    is, as with every method that uses products only, a matter of the random part of the start.

    Where N is as small as the search space (about 8 k), the dense matrix is taken, from N products. Memory is about
    16 k N numbers. Raises `InputError` for k out of range, an unknown `which`, `max_products` too small to begin with or a
    start of the wrong shape.

    >>> import jax, jax.numpy as jnp, lineax as lx
    >>> H = lx.DiagonalLinearOperator(jnp.array([3.0, -5.0, 1.0, 0.0]))
    >>> eigenvalues, eigenvectors, info = extreme_eigenpairs(H, 2)
    >>> eigenvalues.tolist(), bool(info.converged)
    ([-5.0, 3.0], True)
    """
    plan = _plan(operator, k, which, max_products, start)
    arrays = all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(operator))
    return (_compiled_solution if arrays else _solution)(operator, tolerance, start, plan)


class _Plan(NamedTuple):
    """Everything static: sizes of the first block, of the following ones, and how many of these fit."""

    k: int
    which: Which
    guards: tuple[int, int]  # at the inner end of the smallest and of the largest ones
    first: int
    block: int
    steps: int
    budget: int
    dense: bool

    @property
    def sizes(self) -> list[int]:
        return [self.first + j * self.block for j in range(self.steps + 1)]

    @property
    def capacity(self) -> int:
        return self.sizes[-1]


def _plan(operator: Any, k: int, which: Which, max_products: int | None, start: Any) -> _Plan:
    N = operator.in_size()
    if which not in ("magnitude", "largest", "smallest", "both"):
        raise InputError(f"extreme_eigenpairs: which must be magnitude, largest, smallest or both, got {which!r}")
    if not 1 <= k <= N:
        raise InputError(f"extreme_eigenpairs: k must be between 1 and the operator's size {N}, got {k}")
    budget = 100 * (k + 10) if max_products is None else max_products
    guard = 1 if k >= 8 else 2
    guards = (0 if which == "largest" else guard, 0 if which == "smallest" else guard)
    wanted = k + sum(guards)
    block = min(wanted, max(4, min(32, 4 * -(-k // 5))))
    given = 0 if start is None or _is_key(start) or isinstance(start, KroneckerGuess) else _rows_of(operator, start)
    first = max(wanted, 2 * block, -(-3 * k // 2), given)
    full = first + _STEPS * block
    if min(full, budget) >= N:
        return _Plan(k, which, guards, N, block, 0, budget, True)
    if budget < wanted:
        raise InputError(f"extreme_eigenpairs: {k} eigenpairs need max_products >= {min(wanted, N)}, got {budget}")
    first = min(first, budget)
    return _Plan(k, which, guards, first, block, min(_STEPS, (budget - first) // block), budget, False)


def _is_key(start: Any) -> bool:
    return isinstance(start, jax.Array) and (
        jnp.issubdtype(start.dtype, jax.dtypes.prng_key) or (start.dtype == jnp.uint32 and start.shape == (2,))
    )


def _rows_of(operator: Any, start: Any) -> int:
    """How many vectors a given start has."""
    shapes = jax.tree.map(lambda leaf: tuple(leaf.shape), operator.in_structure())
    leaves = jax.tree.leaves(start)
    rows = leaves[0].shape[0] if leaves and jnp.ndim(leaves[0]) else 0
    given = jax.tree.map(lambda leaf: tuple(jnp.shape(leaf)), start)
    if given != jax.tree.map(lambda s: (rows, *s), shapes, is_leaf=lambda s: isinstance(s, tuple)) or rows == 0:
        raise InputError(f"extreme_eigenpairs: start must be vectors of {shapes} with a leading axis, got {given}")
    return rows


class _Space(NamedTuple):
    """Shapes of the operator's vectors, to and from rows (b, N) of one array."""

    leaves: list[Any]
    structure: Any
    dtype: Any

    @classmethod
    def of(cls, operator: Any) -> "_Space":
        leaves, structure = jax.tree.flatten(operator.in_structure())
        return cls(leaves, structure, jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves)))

    def rows(self, vectors: PyTree) -> Array:
        flat = [leaf.reshape(leaf.shape[0], -1).astype(self.dtype) for leaf in jax.tree.leaves(vectors)]
        return flat[0] if len(flat) == 1 else jnp.concatenate(flat, axis=1)

    def vectors(self, rows: Array) -> PyTree:
        ends = np.cumsum([math.prod(leaf.shape) for leaf in self.leaves])[:-1].tolist()
        parts = jnp.split(rows, ends, axis=1) if ends else [rows]
        shaped = [part.reshape(-1, *leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, self.leaves, strict=True)]
        return jax.tree.unflatten(self.structure, shaped)


class _State(NamedTuple):
    V: Array  # (capacity, N), rows from `sizes[step]` on not yet in use
    W: Array
    T: Array
    Y: Array  # (b, N), the orthonormal directions to multiply next
    step: Array
    products: Array
    found: "_Found"


class _Pairs(NamedTuple):
    T: Array
    values: Array  # (K,), wanted ones and guards, ascending
    X: Array  # (K, N)
    R: Array  # (K, N)
    smallest: Array  # how many of the k wanted ones are at the lower end
    scale: Array


class _Found(NamedTuple):
    values: Array  # (k,)
    X: Array  # (k, N)
    error: Array
    converged: Array


def _solution(operator: Any, tolerance: Any, start: Any, plan: _Plan) -> tuple[Array, PyTree, ExtremesInfo]:
    space = _Space.of(operator)

    def multiply(rows: Array) -> Array:
        return space.rows(jax.vmap(operator.mv)(space.vectors(rows)))

    if plan.dense:
        found = _dense_pairs(multiply, plan, operator.in_size(), space.dtype, tolerance)
        products = jnp.asarray(plan.first, jnp.int32)
    else:
        found, products = _search(multiply, plan, operator.in_size(), space, tolerance, start)
    return found.values, space.vectors(found.X), ExtremesInfo(products, found.error, found.converged)


# Called outside of a user's `jit`, the loop would be compiled every time.
_compiled_solution = jax.jit(_solution, static_argnums=3)


def _dense_pairs(multiply: Callable[[Array], Array], plan: _Plan, N: int, dtype: Any, tolerance: Any) -> _Found:
    H = symmetrise(multiply(jnp.eye(N, dtype=dtype)))
    values, vectors = jnp.linalg.eigh(H)
    chosen = _extreme_of_sorted(values, plan.k, plan.which)
    scale = jnp.max(jnp.abs(values), initial=0)
    error = jnp.full(plan.k, N * jnp.finfo(dtype).eps, dtype) * scale
    return _Found(values[chosen], vectors.T[chosen], error, jnp.all(error <= tolerance * scale))


def _search(multiply: Callable, plan: _Plan, N: int, space: _Space, tolerance: Any, start: Any) -> tuple[_Found, Array]:
    p, b, P, dtype = plan.first, plan.block, plan.capacity, space.dtype
    guess = start if isinstance(start, KroneckerGuess) else None

    def ritz(size: int):
        return lambda V, W, T: _ritz(plan, size, V, W, T)

    branches = [ritz(size) for size in plan.sizes]

    def analysed(V: Array, W: Array, T: Array, step: Array, products: Array) -> _State:
        pairs = jax.lax.switch(step, branches, V, W, T)
        found, worst = _assessed(plan, pairs, tolerance)
        R, theta = pairs.R[worst], pairs.values[worst]
        if guess is not None:
            R = space.rows(guess.directions(space.vectors(R), theta))
        Y = _orthonormal(_unit_rows(R), V, p + step * b, products)
        return _State(V, W, pairs.T, Y, step, products, found)

    def body(state: _State) -> _State:
        # A loop of one turn or none, and not a `cond`: it leaves V and W where they are.
        state = jax.lax.while_loop(lambda s: s.step == plan.steps, lambda s: _restarted(plan, s), state)
        at = (p + state.step * b, jnp.zeros_like(state.step))
        V = jax.lax.dynamic_update_slice(state.V, state.Y, at)
        W = jax.lax.dynamic_update_slice(state.W, multiply(state.Y), at)
        return analysed(V, W, state.T, state.step + 1, state.products + b)

    def unfinished(state: _State) -> Array:
        return ~state.found.converged & (state.products + b <= plan.budget)

    V = _orthonormal(_unit_rows(_first_block(plan, N, space, start)), jnp.zeros((0, N), dtype), jnp.asarray(0), 1)
    W = multiply(V)
    T = jnp.zeros((P, P), dtype).at[:p, :p].set(symmetrise(matmul(V, W.T)))
    V, W = (jnp.zeros((P, N), dtype).at[:p].set(rows) for rows in (V, W))
    if plan.steps == 0:
        found, _ = _assessed(plan, branches[0](V, W, T), tolerance)
        return found, jnp.asarray(p, jnp.int32)
    final = jax.lax.while_loop(unfinished, body, analysed(V, W, T, jnp.asarray(0, jnp.int32), jnp.asarray(p, jnp.int32)))
    return final.found, final.products


def _first_block(plan: _Plan, N: int, space: _Space, start: Any) -> Array:
    if _is_key(start):
        return jax.random.normal(start, (plan.first, N), space.dtype)
    noise = _noise(plan.first, N, 0, space.dtype)
    if start is None:
        return noise
    if isinstance(start, KroneckerGuess):
        start = start.start(plan.first, plan.which)
    given = space.rows(start)[: plan.first]
    return (_START_NOISE * noise).at[: given.shape[0]].add(_unit_rows(given))


def _ritz(plan: _Plan, p: int, V: Array, W: Array, T: Array) -> _Pairs:
    """Rayleigh-Ritz on the first p rows, of which the last b are new: the wanted pairs and the guards, ascending."""
    K, b = plan.k + sum(plan.guards), plan.block
    new = matmul(W[p - b : p], V[:p].T)
    T = T.at[p - b : p, :p].set(new).at[:p, p - b : p].set(new.T)
    theta, S = jnp.linalg.eigh(symmetrise(T[:p, :p]))
    smallest = jnp.asarray(_count_smallest(theta, plan.k, plan.which), jnp.int32)
    i = jnp.arange(K)
    chosen = jnp.where(i < smallest + plan.guards[0], i, i + p - K)
    values, S = theta[chosen], S[:, chosen].T
    S = jnp.pad(S, ((0, -K % 8), (0, 0)))  # a product of 24 rows takes less time than one of 21
    X = matmul(S, V[:p])[:K]
    R = matmul(S, W[:p])[:K] - values[:, None] * X
    return _Pairs(T, values, X, R, smallest, jnp.max(jnp.abs(theta)))


def _assessed(plan: _Plan, pairs: _Pairs, tolerance: Any) -> tuple[_Found, Array]:
    """The wanted pairs with their errors, and where the b worst residuals are."""
    k, (low, high) = plan.k, plan.guards
    values, X, smallest, scale = pairs.values, pairs.X, pairs.smallest, pairs.scale
    norms = jnp.sqrt(jnp.sum(pairs.R**2, axis=1))
    # What the bounds take for granted, orthonormal Ritz vectors, holds up to rounding only.
    defect = jnp.max(jnp.sum(jnp.abs(matmul(X, X.T) - jnp.eye(values.size, dtype=X.dtype)), axis=1))
    error = _bounds(values, norms, smallest + low) + (defect + 10 * jnp.finfo(X.dtype).eps) * scale
    j = jnp.arange(k)
    wanted = jnp.where(j < smallest, j, j + low + high)
    found = _Found(values[wanted], X[wanted], error[wanted], jnp.all(error[wanted] <= tolerance * scale))
    # A guard is worth a product only where it closes a group of wanted ones.
    i = jnp.arange(values.size)
    idle = ((smallest == 0) & (i < low)) | ((smallest == k) & (i >= k + low))
    return found, jax.lax.top_k(jnp.where(idle, -1, norms), plan.block)[1]


def _bounds(values: Array, norms: Array, hole: Array) -> Array:
    """The bound on each error: its residual's norm, or the least quadratic one of the groups a..b it belongs to.

    `values` are ascending; between those before and those from `hole` on, there may be others, unknown.
    """
    K = values.size
    infinite = jnp.full(1, jnp.inf, values.dtype)
    outer = jnp.arange(K) == hole
    below = jnp.concatenate([infinite, values[1:] - values[:-1] - norms[:-1]])
    above = jnp.concatenate([values[1:] - values[:-1] - norms[1:], infinite])
    below, above = jnp.where(outer, 0, below), jnp.where(jnp.arange(K) == hole - 1, 0, above)
    a, b = jnp.arange(K)[:, None], jnp.arange(K)[None, :]
    apart = jnp.minimum(below[:, None], above[None, :])
    sums = jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(norms**2)])
    group = jnp.maximum(sums[None, 1:] - sums[:-1, None], jnp.maximum(norms[:, None], norms[None, :]) ** 2)
    allowed = (a <= b) & (apart > 0) & ((a >= hole) | (b < hole))
    quadratic = jnp.where(allowed, group / jnp.where(allowed, apart, 1), jnp.inf)
    least = jax.lax.cummin(jax.lax.cummin(quadratic, axis=0), axis=1, reverse=True)
    return jnp.minimum(norms, jnp.diagonal(least))


def _restarted(plan: _Plan, state: _State) -> _State:
    """The full space rotated onto its best Ritz vectors; the directions Y stay what they are."""
    step = plan.steps // 3
    kept = plan.sizes[step]
    theta, S = jnp.linalg.eigh(symmetrise(state.T))
    chosen = _extreme_of_sorted(theta, kept, plan.which)
    S = S[:, chosen].T
    V, W = (rows.at[:kept].set(matmul(S, rows)) for rows in (state.V, state.W))
    T = jnp.zeros_like(state.T).at[:kept, :kept].set(jnp.diag(theta[chosen]))
    return state._replace(V=V, W=W, T=T, step=jnp.asarray(step, jnp.int32))


def _orthonormal(D: Array, V: Array, used: Array, seed: Any) -> Array:
    """Rows that span those of D, unit ones, orthonormal and orthogonal to the first `used` rows of V.

    A round is a projection, a Gram matrix and its Cholesky factor. One does where D is far enough from V and from
    dependence, else there is another. Where D has no independent rows left, noise is put in: it keeps the smallest
    eigenvalue of the Gram matrix above the shift of the diagonal.
    """
    b, shift = D.shape[0], jnp.finfo(D.dtype).eps ** 0.8

    def one_round(D: Array) -> tuple[Array, Array]:
        if V.shape[0]:
            D = D - matmul(jnp.where(jnp.arange(V.shape[0])[None, :] < used, matmul(D, V.T), 0), V)
        gram = symmetrise(matmul(D, D.T))
        left = jnp.diagonal(gram)
        scale = jax.lax.rsqrt(jnp.where(left > 0, left, 1))
        identity = jnp.eye(b, dtype=D.dtype)
        factor = gram * scale[:, None] * scale[None, :]
        L = jnp.linalg.cholesky(factor)
        L = jnp.where(jnp.all(jnp.isfinite(L)), L, jnp.linalg.cholesky(factor + shift * identity))
        quality = jnp.nan_to_num(jnp.min(left) * jnp.min(jnp.diagonal(L)) ** 2)
        return matmul(jax.lax.linalg.triangular_solve(L, identity, left_side=True, lower=True) * scale[None, :], D), quality

    def another(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        cleaned, quality, rounds = state
        noisy = _unit_rows(D + shift**0.5 * 10.0**rounds * _noise(b, D.shape[1], seed, D.dtype))
        return *one_round(jnp.where(quality > shift / 100, cleaned, noisy)), rounds + 1

    def doubtful(state: tuple[Array, Array, Array]) -> Array:
        return (state[1] < _ENOUGH) & (state[2] < 6)

    return jax.lax.while_loop(doubtful, another, (*one_round(D), jnp.zeros((), D.dtype)))[0]


def _unit_rows(rows: Array) -> Array:
    norms = jnp.sqrt(jnp.sum(rows**2, axis=1, keepdims=True))
    return rows / jnp.where(norms > 0, norms, 1)


def _noise(rows: int, N: int, seed: Any, dtype: Any) -> Array:
    """Rows of norm about one from a hash of their position: drawing normal numbers would take longer than a step."""

    def mixed(h: Array) -> Array:
        h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
        h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
        return h ^ (h >> 16)

    row = mixed(
        jnp.arange(rows, dtype=jnp.uint32) + jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(1)
    )
    h = mixed(mixed(jnp.arange(N, dtype=jnp.uint32))[None, :] ^ row[:, None])
    return (h.astype(dtype) * 2.0**-31 - 1) * math.sqrt(3 / N)


def _count_smallest(theta: Array, k: int, which: Which) -> Any:
    """How many of the k extreme ones of the ascending `theta` are at its lower end."""
    if which != "magnitude":
        return {"largest": 0, "smallest": k, "both": k // 2}[which]
    # The i-th smallest is taken if it is larger in magnitude than what would be taken in its place at the other end.
    return jnp.sum(-theta[:k] > theta[theta.size - k :])


def _extreme_of_sorted(theta: Array, k: int, which: Which) -> Array:
    """The positions, ascending, of the k extreme ones of the ascending `theta`."""
    i = jnp.arange(k)
    return jnp.where(i < _count_smallest(theta, k, which), i, i + theta.size - k)


def _extreme_positions(values: Array, k: int, which: Which) -> Array:
    """The positions of the k extreme ones of unsorted values, in no particular order."""
    if which == "both":
        low, high = (
            _extreme_positions(values, count, side) for count, side in ((k // 2, "smallest"), (k - k // 2, "largest"))
        )
        return jnp.concatenate([low, high])
    return jax.lax.top_k({"magnitude": jnp.abs(values), "largest": values, "smallest": -values}[which], k)[1]
