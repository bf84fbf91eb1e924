"""Eigenvalues of a whole operator or of each block: exact where a matrix can be factored, else Ritz values with bounds.

A Q = Q T + β_k q_{k+1} e_k^T,   T = S diag(θ) S^T           |θ_i - λ| <= β_k |S_ki| for some eigenvalue λ of A
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxhess._typing import Array, Float, InputError
from jaxhess.operators import BlockDiagonal
from jaxhess.spectra._common import blocks_of, checked, eigenvalues_of, flat_product
from jaxhess.spectra.lanczos import gauss, rounding, tridiagonal

__all__ = ["Spectrum", "spectra_by_block", "spectrum"]

_FACTORED = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in ascending order, all of them or some, with what is known of their error.

    `eigenvalues` (k,) of an operator of `size` N rows; `error` (k,): within it of each value there is an eigenvalue, zero
    where they were computed as such (then they are right to rounding). `exact` tells which it is; k = N if all are there.
    """

    eigenvalues: Float[Array, " k"]
    error: Float[Array, " k"]
    size: int = dataclasses.field(metadata={"static": True})
    exact: bool = dataclasses.field(metadata={"static": True})


def spectrum(
    operator: Any,
    *,
    method: Literal["auto", "exact", "lanczos"] = "auto",
    steps: int = 100,
    count: int | None = None,
    key: Array | None = None,
) -> Spectrum:
    """The eigenvalues of a symmetric operator: all of them, or as Lanczos' method finds them.

    "exact" factors a dense matrix, in the operator's reduced space if it has one, block by block if it has blocks; "auto"
    does so up to 4096 rows of that matrix and takes "lanczos" beyond. `result.exact` tells.

    Lanczos' method takes `steps` + 1 products and about `steps * N` numbers of memory. Its `steps` Ritz values are near the
    outer eigenvalues long before the inner ones; how near, each one's `error` bounds. How many eigenvalues there are is not
    told: any number may lie between two of them, equal ones are found once, and where less than `steps` are found (as for a
    low rank) the one of least magnitude is repeated.

    Args:
        operator: any operator of this library, or of lineax's, on an array or a tree, tagged as symmetric.
        steps: number of Lanczos steps, at most N of them are made.
        count: return only so many values, the largest in magnitude.
        key: draws the start of Lanczos' method, by default `jax.random.key(0)`.

    Raises:
        InputError: if the operator is not known to be symmetric, or for numbers out of range.
        DenseTooLargeError: for "exact", if the dense matrix does not fit in memory.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.operators import Diagonal
        >>> H = Diagonal(jnp.arange(-1.0, 4.0))
        >>> spectrum(H).eigenvalues.tolist()
        [-1.0, 0.0, 1.0, 2.0, 3.0]
        >>> found = spectrum(H, method="lanczos", steps=5, count=2)
        >>> found.exact, [round(value, 3) for value in found.eigenvalues.tolist()]
        (False, [2.0, 3.0])
    """
    size = checked("spectrum", operator, steps=steps)
    if method not in ("auto", "exact", "lanczos"):
        raise InputError(f"spectrum: method must be 'auto', 'exact' or 'lanczos', got {method!r}")
    exact = method == "exact" or (method == "auto" and _factored_size(operator) <= _FACTORED)
    available = size if exact else min(steps, size)
    if count is not None and not 0 < count <= available:
        raise InputError(f"spectrum: count={count} of {available} values" + ("" if exact else "; take more steps"))
    if exact:
        eigenvalues = eigenvalues_of(operator)
        error = jnp.zeros_like(eigenvalues)
    else:
        eigenvalues, error = _ritz(operator, jax.random.key(0) if key is None else key, available)
    if count is not None and count < available:
        kept = jnp.sort(jax.lax.top_k(jnp.abs(eigenvalues), count)[1])
        eigenvalues, error = eigenvalues[kept], error[kept]
    return Spectrum(eigenvalues, error, size, exact)


def spectra_by_block(operator: Any, **options: Any) -> dict[str, Spectrum]:
    """`spectrum` of the diagonal block of every parameter, by its path; `options` are those of `spectrum`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess.operators import BlockDiagonal, Diagonal
        >>> H = BlockDiagonal({"w": Diagonal(jnp.array([2.0, 1.0])), "b": Diagonal(jnp.zeros(1))})
        >>> {path: found.eigenvalues.tolist() for path, found in spectra_by_block(H).items()}
        {'b': [0.0], 'w': [1.0, 2.0]}
    """
    return {path: spectrum(block, **options) for path, block in blocks_of("spectra_by_block", operator).items()}


def _factored_size(operator: Any) -> int:
    """Rows of the largest matrix whose eigenvalues `eigvalsh` takes."""
    if isinstance(operator, BlockDiagonal):
        return max(_factored_size(block) for _, block in operator.items())
    return operator._reduced_size() if hasattr(operator, "_reduced_size") else operator.in_size()


# Compiled here once for each structure: called outside of a user's `jit`, their loops would be compiled every time.


@eqx.filter_jit
def _ritz(operator: Any, key: Array, steps: int) -> tuple[Array, Array]:
    product, size, dtype = flat_product(operator)
    T = tridiagonal(product, jax.random.normal(key, (size,), dtype), steps)
    rule = gauss(T)
    return rule.nodes, rule.error + rounding(T, size)
