"""Bounds on every eigenvalue of a Hessian from those of its m x m blocks, without the (mn, mn) array.

For the mean of r examples of τ steps each (section 8 of the mathematics; Naumov (2017), equations 101-108),

    H = (1/r) sum_i sum_{s,ζ} kron(Q_i[s,ζ], z_i^s z_i^ζT)          Q (r, τ, m, τ, m), Z (r, τ, n)
      = (1/r) sum_i ( sum_s B_i[s,s] + sum_{s<ζ} B_i[s,ζ] ),        B[s,ζ] (s < ζ) being the term of s, ζ and that of ζ, s

Weyl's inequality `λ_q(A) + λ_1(B) <= λ_q(A + B) <= λ_q(A) + λ_max(B)` (101) keeps the eigenvalues of one term B_j[t,t],
the anchor, and moves them by the extreme eigenvalues of the others:

    λ_q(B[s,s]) = ||z^s||^2 λ_i(Q[s,s]), i = 1..m, and 0, m(n-1) times              (105)
    |λ_q(B[s,ζ])| <= 2 σ_max(Q[s,ζ]) ||z^s|| ||z^ζ||                                (102), (106)

This covers the weight of a dense layer, τ = 1, where there are no cross terms; of a recurrent layer; and their biases,
with Z of ones and n = 1. The feedback U of a recurrent layer has more in its Hessian than these terms.

Q and Z are given as `Q (r, τ, m, τ, m), Z (r, τ, n)`; for one example as `Q (τ, m, τ, m), Z (τ, n)`; for a batch without
time as `Q (r, m, m), Z (r, n)`, or as the block of a Hessian: a `KroneckerProductSum`, or an `ImplicitKroneckerSum` of one
use, whose Q takes (τm)^2 numbers an example. Each Q_i has to be symmetric as a (τm, τm) matrix, which is trusted: of its
cross blocks those with s < ζ are read. All bounds hold up to rounding, in the dtype of Q and Z, float32 at least.
"""

import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxhess._typing import Array, Float, InputError, Shaped
from jaxhess.operators import ImplicitKroneckerSum, KroneckerProductSum
from jaxhess.operators.support import as_real_arrays

__all__ = ["EigenvalueBounds", "cross_term_bounds", "naumov_bounds", "weyl_bounds"]


class EigenvalueBounds(NamedTuple):
    """`lower[q] <= λ_q <= upper[q]` for the mn eigenvalues in ascending order, as `eigvalsh` gives them."""

    lower: Float[Array, " mn"]
    upper: Float[Array, " mn"]


def weyl_bounds(
    Q: Shaped[Array, "..."] | KroneckerProductSum | ImplicitKroneckerSum,
    Z: Shaped[Array, "..."] | None = None,
    *,
    anchor: int | tuple[int, int] | None = None,
) -> EigenvalueBounds:
    """Each eigenvalue of H between those of the anchor, moved by the sum of the other terms' extremes: (101)-(105).

        λ_q(B[t,t]) + sum_{s≠t} μ_1^s - sum_{s<ζ} 2 σ_max(Q[s,ζ]) ||z^s|| ||z^ζ||
          <= λ_q(H) <= λ_q(B[t,t]) + sum_{s≠t} μ_n^s + sum_{s<ζ} 2 σ_max(Q[s,ζ]) ||z^s|| ||z^ζ||

    μ_1^s and μ_n^s being the least and the greatest eigenvalue of B[s,s] (for n > 1: of ||z^s||^2 λ(Q[s,s]) and 0). For a
    batch, s runs over the examples' steps, the cross terms are those within each example, and all is divided by r. With
    one term (r = τ = 1) both bounds are the eigenvalues.

    Args:
        Q, Z: as in this module's docstring; or Q a block of a Hessian that holds both.
        anchor: the term whose eigenvalues are kept: the step t; for a batch without time the example; for a batch with
            time the pair (example, step). From 0, negative ones from the end. By default the last step of the last
            example. Any choice gives valid bounds, so that the best of several are valid too.

    Raises:
        InputError: for shapes that do not fit, or an anchor that is not one of the terms.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.bounds import weyl_bounds
        >>> Q, Z = jnp.array([[[1.0]], [[2.0]]]), jnp.array([[1.0, 0.0], [0.0, 3.0]])  # H = diag(1, 18) / 2
        >>> lower, upper = weyl_bounds(Q, Z)
        >>> lower.tolist(), upper.tolist()
        ([0.0, 9.0], [0.5, 9.5])
    """
    terms = _terms("weyl_bounds", Q, Z, anchor)
    lowest, highest = terms.lowest, terms.highest
    if terms.has_zeros:
        lowest, highest = jnp.minimum(lowest, 0), jnp.maximum(highest, 0)
    cross = 2 * jnp.sum(terms.cross)
    return EigenvalueBounds(terms.kept + jnp.sum(lowest) - cross, terms.kept + jnp.sum(highest) + cross)


def naumov_bounds(
    Q: Shaped[Array, "..."] | KroneckerProductSum | ImplicitKroneckerSum,
    Z: Shaped[Array, "..."] | None = None,
    *,
    anchor: int | tuple[int, int] | None = None,
) -> EigenvalueBounds:
    """Equation (108): `weyl_bounds` with each sum replaced by its number of terms times its extreme term; never tighter.

        (τ-1) min_{s≠t} μ_1^s - τ(τ-1) max_{s<ζ} σ_max(Q[s,ζ]) ||z^s|| ||z^ζ||
          <= λ_q(H) - λ_q(B[t,t]) <= (τ-1) max_{s≠t} μ_n^s + τ(τ-1) max_{s<ζ} σ_max(Q[s,ζ]) ||z^s|| ||z^ζ||

    Here μ_1^s = min(0, ||z^s||^2 λ_1(Q[s,s])) and μ_n^s = max(0, ||z^s||^2 λ_max(Q[s,s])) for n = 1 too, as printed. For a
    batch there are rτ - 1 and r τ(τ-1) terms in the place of τ - 1 and τ(τ-1), and all is divided by r. Arguments and
    errors are those of `weyl_bounds`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.bounds import naumov_bounds, weyl_bounds
        >>> Q, Z = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1), jnp.ones((4, 1))  # H = 2.5
        >>> [bound.tolist() for bound in naumov_bounds(Q, Z)], [bound.tolist() for bound in weyl_bounds(Q, Z)]
        ([[1.0], [3.25]], [[2.5], [2.5]])
    """
    terms = _terms("naumov_bounds", Q, Z, anchor)
    cross = 2 * terms.cross.size * jnp.max(terms.cross, initial=0)
    down = terms.lowest.size * jnp.min(terms.lowest, initial=0)
    up = terms.highest.size * jnp.max(terms.highest, initial=0)
    return EigenvalueBounds(terms.kept + down - cross, terms.kept + up + cross)


def cross_term_bounds(Q: Shaped[Array, "m m"], z_s: Shaped[Array, " n"], z_zeta: Shaped[Array, " n"]) -> Float[Array, " mn"]:
    """Upper bounds on the mn absolute eigenvalues, in ascending order, of a cross term: (107), in the order it holds in.

    For `B = kron(Q, z^s z^ζT) + its transpose`, Q = Q[s,ζ] (m, m) any matrix, and 1 <= q <= mn,

        |λ|_q(B) <= ||z^s|| ||z^ζ|| (σ_q + σ_max(Q)),      σ = 0, m(n-1) times, then the singular values of Q, ascending

    by (102) and (106). The print has |λ_q(B)|, with the eigenvalues ordered by value, and σ_q(Q). That fails: `|λ_q| =
    σ_q` needs the order by absolute value, and q counts mn singular values of the Kronecker product, not Q's m.

    Raises `InputError` for other shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.bounds import cross_term_bounds
        >>> cross_term_bounds(jnp.diag(jnp.array([3.0, 1.0])), jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])).tolist()
        [6.0, 6.0, 8.0, 12.0]
    """
    Q, z_s, z_zeta = _as_arrays("cross_term_bounds", ["Q", "z_s", "z_zeta"], [Q, z_s, z_zeta])
    if Q.ndim != 2 or Q.shape[0] != Q.shape[1] or z_s.ndim != 1 or z_s.shape != z_zeta.shape or 0 in Q.shape + z_s.shape:
        raise InputError(
            "cross_term_bounds: needs Q (m, m), z_s (n,) and z_zeta (n,), none of them empty, "
            f"got {Q.shape}, {z_s.shape} and {z_zeta.shape}"
        )
    ascending = jnp.linalg.svd(Q, compute_uv=False)[::-1]
    zeros = jnp.zeros(Q.shape[0] * (z_s.size - 1), Q.dtype)
    return jnp.linalg.norm(z_s) * jnp.linalg.norm(z_zeta) * (jnp.concatenate([zeros, ascending]) + ascending[-1])


class _Terms(NamedTuple):
    """What the bounds are sums of, each divided by r already."""

    kept: Array  # (mn,) eigenvalues of the anchor (105), ascending
    lowest: Array  # (rτ - 1,) ||z||^2 λ_1(Q[s,s]) of the other terms
    highest: Array  # (rτ - 1,) ||z||^2 λ_max(Q[s,s])
    cross: Array  # (r τ(τ-1)/2,) σ_max(Q[s,ζ]) ||z^s|| ||z^ζ||, s < ζ
    has_zeros: bool  # n > 1: zero is an eigenvalue of each B[s,s]


def _terms(what: str, Q: Any, Z: Any, anchor: Any) -> _Terms:
    Q, Z, kept = _with_batch_and_time(what, Q, Z, anchor)
    (r, steps, m), n = Q.shape[:3], Z.shape[2]
    blocks = jnp.transpose(Q, (1, 3, 0, 2, 4))
    norms = jnp.linalg.norm(Z, axis=2).T

    every = np.arange(steps)
    eigenvalues = norms[..., None] ** 2 * jnp.linalg.eigvalsh(blocks[every, every]) / r
    zeros = jnp.zeros(m * (n - 1), Q.dtype)
    others = np.ones((steps, r), bool)
    others[kept[::-1]] = False

    s, zeta = np.triu_indices(steps, 1)
    largest = jnp.linalg.svd(blocks[s, zeta], compute_uv=False)[..., 0]
    return _Terms(
        kept=jnp.sort(jnp.concatenate([eigenvalues[kept[::-1]], zeros])),
        lowest=eigenvalues[others, 0],
        highest=eigenvalues[others, -1],
        cross=largest * norms[s] * norms[zeta] / r,
        has_zeros=n > 1,
    )


def _with_batch_and_time(what: str, Q: Any, Z: Any, anchor: Any) -> tuple[Array, Array, tuple[int, int]]:
    """Q (r, τ, m, τ, m), Z (r, τ, n) and the anchor as (example, step), whichever way they were given."""
    if isinstance(Q, KroneckerProductSum | ImplicitKroneckerSum):
        if Z is not None:
            raise InputError(f"{what}: a {type(Q).__name__} has its own Z, got another of shape {jnp.shape(Z)}")
        Q, Z = (Q.Q, Q.Z) if isinstance(Q, KroneckerProductSum) else Q.kronecker_terms()
    elif Z is None:
        raise InputError(f"{what}: needs Q and Z, or an operator that holds them, got a {type(Q).__name__} alone")
    Q, Z = _as_arrays(what, ["Q", "Z"], [Q, Z])
    m, leading = Q.shape[-1:], Z.shape[:-1]
    steps = leading[-1:]
    expected = {3: (*leading, *m, *m), 4: (*steps, *m, *steps, *m), 5: (*leading, *m, *steps, *m)}
    if Q.shape != expected.get(Q.ndim) or Z.ndim != {3: 2, 4: 2, 5: 3}[Q.ndim] or 0 in Q.shape + Z.shape:
        raise InputError(
            f"{what}: needs Q (r, τ, m, τ, m) and Z (r, τ, n), Q (τ, m, τ, m) and Z (τ, n), or Q (r, m, m) and Z (r, n), "
            f"none of them empty, got {Q.shape} and {Z.shape}"
        )
    place = _place(what, anchor, leading)
    if Q.ndim == 3:
        return Q[:, None, :, None, :], Z[:, None, :], (*place, 0)
    if Q.ndim == 4:
        return Q[None], Z[None], (0, *place)
    return Q, Z, place


def _place(what: str, anchor: Any, leading: tuple[int, ...]) -> Any:
    """The indices of one term among `leading`, from 0."""
    given = anchor if isinstance(anchor, tuple) else (-1,) * len(leading) if anchor is None else (anchor,)
    try:
        indices = [operator.index(index) for index in given]
    except TypeError as error:  # a traced index as well
        raise InputError(f"{what}: anchor must be made of Python integers, got {anchor!r}") from error
    if len(indices) != len(leading) or not all(-size <= i < size for i, size in zip(indices, leading, strict=True)):
        raise InputError(f"{what}: anchor must be the place of one of {leading} terms, got {anchor!r}")
    return tuple(i % size for i, size in zip(indices, leading, strict=True))


def _as_arrays(what: str, names: list[str], arrays: list[Any]) -> list[Array]:
    converted = as_real_arrays(what, names, arrays)
    return [a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in converted]
