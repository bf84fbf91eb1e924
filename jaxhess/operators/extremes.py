"""The k extreme eigenpairs of a symmetric operator, from products alone: a block Davidson method.

With V (p, N) an orthonormal basis held as rows, `W = V H` and the Rayleigh-Ritz pairs of `T = V W^T`:

    T s = θ s        x = V^T s        r = W^T s - θ x        R = the residuals of the wanted pairs

V grows by the b largest residuals (Krylov's directions), or by `(K - θ)^-1 r` with K near H (Davidson 1975, Morgan & Scott
1986), until it is full; then it is rotated onto its best Ritz vectors (thick restart; Wu & Simon 2000). No product is ever
repeated: W is kept, and every vector multiplied stays in the search space.

One guard pair or more beyond the wanted ones close the last group of the error bounds, which `ritz.py` states.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._linalg import matmul, symmetrise
from jaxhess._typing import Array, Float, InputError, PyTree
from jaxhess.operators.coarse import KroneckerGuess, kronecker_guess
from jaxhess.operators.ritz import (
    RowSpace,
    Which,
    bounds,
    count_smallest,
    extreme_of_sorted,
    noise,
    orthonormal,
    unit_rows,
)

_STEPS = 8  # blocks that the search space takes up before it is restarted
_START_NOISE = 0.05
_DENSE = 256  # size up to which all columns are taken, whatever k


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

    Where N is at most 256 or the search space (about 8 k), the dense matrix is taken, from N products. Memory is about
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
    guard = 1 if k >= 8 else 3
    guards = (0 if which == "largest" else guard, 0 if which == "smallest" else guard)
    wanted = k + sum(guards)
    block = min(wanted, max(8, min(32, 4 * -(-k // 5))))
    given = 0 if start is None or _is_key(start) or isinstance(start, KroneckerGuess) else _rows_of(operator, start)
    first = max(wanted, 2 * block, -(-3 * k // 2), given)
    full = first + _STEPS * block
    if min(max(full, _DENSE), budget) >= N:
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


class _State(NamedTuple):
    V: Array  # (capacity, N), rows from `sizes[step]` on not yet in use
    W: Array
    T: Array
    Y: Array  # (b, N), the orthonormal directions to multiply next
    pending: Array  # whether Y is still to be multiplied
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
    turned = start.turned if isinstance(start, KroneckerGuess) else None
    searched = operator if turned is None else turned
    space = RowSpace.of(searched)

    def multiply(rows: Array) -> Array:
        return space.rows(jax.vmap(searched.mv)(space.vectors(rows)))

    if plan.dense:
        found = _dense_pairs(multiply, plan, operator.in_size(), space.dtype, tolerance)
        products = jnp.asarray(plan.first, jnp.int32)
    else:
        found, products = _search(multiply, plan, operator.in_size(), space, tolerance, start)
    vectors = space.vectors(found.X)
    if turned is not None:
        vectors = start.from_coordinates(vectors)
    return found.values, vectors, ExtremesInfo(products, found.error, found.converged)


# Called outside of a user's `jit`, the loop would be compiled every time.
_compiled_solution = jax.jit(_solution, static_argnums=3)


def _dense_pairs(multiply: Callable[[Array], Array], plan: _Plan, N: int, dtype: Any, tolerance: Any) -> _Found:
    H = symmetrise(multiply(jnp.eye(N, dtype=dtype)))
    values, vectors = jnp.linalg.eigh(H)
    chosen = extreme_of_sorted(values, plan.k, plan.which)
    scale = jnp.max(jnp.abs(values), initial=0)
    values, X = values[chosen], vectors.T[chosen]
    error = jnp.linalg.norm(matmul(X, H) - values[:, None] * X, axis=1) + 10 * jnp.finfo(dtype).eps * scale
    return _Found(values, X, error, jnp.all(error <= tolerance * scale))


def _search(multiply: Callable, plan: _Plan, N: int, space: RowSpace, tolerance: Any, start: Any) -> tuple[_Found, Array]:
    p, b, P, dtype = plan.first, plan.block, plan.capacity, space.dtype
    guess = start if isinstance(start, KroneckerGuess) else None

    def ritz(size: int):
        return lambda V, W, T: _ritz(plan, size, V, W, T)

    def projection(size: int):
        return lambda D, V: D - matmul(matmul(D, V[:size].T), V[:size])

    branches, projections = [ritz(size) for size in plan.sizes], [projection(size) for size in plan.sizes]

    def body(state: _State) -> _State:
        # A loop of one turn or none, and not a `cond`: it leaves V and W where they are.
        state = jax.lax.while_loop(lambda s: s.pending & (s.step == plan.steps), lambda s: _restarted(plan, s), state)
        Y = state.Y
        HY = jax.lax.cond(state.pending, multiply, lambda Y: Y, Y)
        at = (p + state.step * b, jnp.zeros_like(state.step))
        new = state.pending.astype(state.step.dtype)
        state = state._replace(
            V=jax.lax.dynamic_update_slice(state.V, Y, at),
            W=jax.lax.dynamic_update_slice(state.W, HY, at),
            step=state.step + new,
            products=state.products + new * b,
        )
        pairs = jax.lax.switch(state.step, branches, state.V, state.W, state.T)
        found, worst = _assessed(plan, pairs, tolerance)

        def directions() -> Array:
            R, theta = pairs.R[worst], pairs.values[worst]
            if guess is not None:
                towards = guess.directions if guess.turned is None else guess.direction_coordinates
                R = space.rows(towards(space.vectors(R), theta))
            return orthonormal(unit_rows(R), lambda D: jax.lax.switch(state.step, projections, D, state.V), state.products)

        Y = jax.lax.cond(found.converged, lambda: Y, directions)
        return state._replace(T=pairs.T, Y=Y, pending=jnp.asarray(True), found=found)

    def unfinished(state: _State) -> Array:
        return ~state.pending | (~state.found.converged & (state.products + b <= plan.budget))

    V = orthonormal(unit_rows(_first_block(plan, N, space, start)), lambda D: D, 1)
    W = multiply(V)
    T = jnp.zeros((P, P), dtype).at[:p, :p].set(symmetrise(matmul(V, W.T)))
    V, W = (jnp.zeros((P, N), dtype).at[:p].set(rows) for rows in (V, W))
    if plan.steps == 0:
        return _assessed(plan, branches[0](V, W, T), tolerance)[0], jnp.asarray(p, jnp.int32)
    nothing = _Found(jnp.zeros(plan.k, dtype), jnp.zeros((plan.k, N), dtype), jnp.zeros(plan.k, dtype), jnp.asarray(False))
    zero, no = jnp.asarray(0, jnp.int32), jnp.asarray(False)
    state = _State(V, W, T, jnp.zeros((b, N), dtype), no, zero, jnp.asarray(p, jnp.int32), nothing)
    final = jax.lax.while_loop(unfinished, body, state)
    return final.found, final.products


def _first_block(plan: _Plan, N: int, space: RowSpace, start: Any) -> Array:
    if _is_key(start):
        return jax.random.normal(start, (plan.first, N), space.dtype)
    added = noise(plan.first, N, 0, space.dtype)
    if start is None:
        return added
    if isinstance(start, KroneckerGuess):
        count, which = plan.first, plan.which
        start = start.start(count, which) if start.turned is None else start.start_coordinates(count, which)
    given = space.rows(start)[: plan.first]
    return (_START_NOISE * added).at[: given.shape[0]].add(unit_rows(given))


def _ritz(plan: _Plan, p: int, V: Array, W: Array, T: Array) -> _Pairs:
    """Rayleigh-Ritz on the first p rows, of which the last b are new: the wanted pairs and the guards, ascending."""
    K, b = plan.k + sum(plan.guards), plan.block
    new = matmul(W[p - b : p], V[:p].T)
    T = T.at[p - b : p, :p].set(new).at[:p, p - b : p].set(new.T)
    theta, S = jnp.linalg.eigh(symmetrise(T[:p, :p]))
    smallest = jnp.asarray(count_smallest(theta, plan.k, plan.which), jnp.int32)
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
    error = bounds(values, norms, smallest + low) + (defect + 10 * jnp.finfo(X.dtype).eps) * scale
    j = jnp.arange(k)
    wanted = jnp.where(j < smallest, j, j + low + high)
    found = _Found(values[wanted], X[wanted], error[wanted], jnp.all(error[wanted] <= tolerance * scale))
    # A guard is worth a product only where it closes a group of wanted ones.
    i = jnp.arange(values.size)
    idle = ((smallest == 0) & (i < low)) | ((smallest == k) & (i >= k + low))
    return found, jax.lax.top_k(jnp.where(idle, -1, norms), plan.block)[1]


def _restarted(plan: _Plan, state: _State) -> _State:
    """The full space rotated onto its best Ritz vectors; the directions Y stay what they are."""
    step = plan.steps // 3
    kept = plan.sizes[step]
    theta, S = jnp.linalg.eigh(symmetrise(state.T))
    chosen = extreme_of_sorted(theta, kept, plan.which)
    S = S[:, chosen].T
    V, W = (rows.at[:kept].set(matmul(S, rows)) for rows in (state.V, state.W))
    T = jnp.zeros_like(state.T).at[:kept, :kept].set(jnp.diag(theta[chosen]))
    return state._replace(V=V, W=W, T=T, step=jnp.asarray(step, jnp.int32))
