"""Operators for SciPy's solvers: `as_linear_operator(H)` is a `scipy.sparse.linalg.LinearOperator`.

    flat operator = ravel · H · unravel        N numbers in the order of `jax.flatten_util.ravel_pytree`

Products are compiled once for each structure of operator: the next product, and the next Hessian of the same network, run
the same code. Arrays go in and come out as NumPy's.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from scipy.sparse.linalg import LinearOperator

from jaxhess._typing import Array, InputError, PyTree

__all__ = ["as_linear_operator"]


def as_linear_operator(
    operator: lx.AbstractLinearOperator | Callable[[PyTree], PyTree], vector: PyTree | None = None
) -> LinearOperator:
    """A SciPy operator on flat vectors, for `eigsh`, `svds`, `cg`, `minres`, `expm_multiply` and so on.

    Args:
        operator: a block, a `BlockDiagonal`, any other operator of this library or of lineax (a damped sum, say),
            rectangular ones included; or a linear function of one vector.
        vector: an example of what a function takes, arrays or shapes; not needed for operators, which know it.

    Returns:
        A `LinearOperator` of shape (outputs, inputs), with `matvec`, `rmatvec` (the transpose), `matmat`, `rmatmat` and
        `dtype`: float64 if the operator's is, else float32. Entries are in the order of `ravel_pytree` of the
        parameters; complex vectors are taken apart.

    Raises:
        InputError: if `operator` is neither, or a function comes without a vector.

    >>> import jax.numpy as jnp, jaxhess, numpy as np
    >>> from scipy.sparse.linalg import eigsh
    >>> from jaxhess.interop.scipy import as_linear_operator
    >>> H = jaxhess.hessian(lambda w, x: jnp.sum(w @ x) ** 2)(jnp.zeros((2, 3)), jnp.ones((4, 3)))
    >>> A = as_linear_operator(H.blocks)
    >>> A.shape, round(float(eigsh(A, 1, v0=np.arange(6.0))[0][0]), 4)
    ((6, 6), 12.0)
    """
    if not isinstance(operator, lx.AbstractLinearOperator):
        operator = _of_function(operator, vector)
    return _Flat(operator)


class _Flat(LinearOperator):
    def __init__(self, operator: lx.AbstractLinearOperator) -> None:
        leaves = jax.tree.leaves((operator.in_structure(), operator.out_structure()))
        wide = any(leaf.dtype == np.float64 for leaf in leaves)
        super().__init__(np.float64 if wide else np.float32, (operator.out_size(), operator.in_size()))
        self._rest, self._arrays = _parted(operator)

    def _matvec(self, x: Any) -> np.ndarray:
        return self._times(x, False)

    def _rmatvec(self, x: Any) -> np.ndarray:
        return self._times(x, True)

    def _matmat(self, X: Any) -> np.ndarray:
        return self._times(X, False)

    def _rmatmat(self, X: Any) -> np.ndarray:
        return self._times(X, True)

    def _times(self, x: Any, transposed: bool) -> np.ndarray:
        if np.iscomplexobj(x):
            return self._times(x.real, transposed) + 1j * self._times(x.imag, transposed)
        columns = np.asarray(x, self.dtype).reshape(np.shape(x)[0], -1)
        found = np.asarray(_product(self._rest, transposed, self._arrays, columns))
        return found.reshape(-1, *np.shape(x)[1:])


def _of_function(function: Any, vector: PyTree | None) -> lx.AbstractLinearOperator:
    if not callable(function):
        raise InputError(
            f"as_linear_operator: operator must be a linear operator or a function, but is a {type(function).__name__}"
        )
    if vector is None:
        raise InputError("as_linear_operator: a function needs `vector`, an example of what it takes")
    structure = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), vector)
    return lx.FunctionLinearOperator(function, structure)


def _parted(operator: Any) -> tuple[Any, list[Any]]:
    """An operator's structure with all that is no array (functions), and its arrays."""
    leaves, structure = jax.tree.flatten(operator)
    is_array = tuple(isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float) for leaf in leaves)
    others = tuple(None if known else leaf for leaf, known in zip(leaves, is_array, strict=True))
    return (structure, is_array, others), [leaf for leaf, known in zip(leaves, is_array, strict=True) if known]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(rest: Any, transposed: bool, arrays: list[Array], columns: Array) -> Array:
    """The operator, or its transpose, times each column."""
    structure, is_array, others = rest
    known = iter(arrays)
    operator = jax.tree.unflatten(structure, [next(known) if a else o for a, o in zip(is_array, others, strict=True)])
    operator = operator.transpose() if transposed else operator
    leaves, inputs = jax.tree.flatten(operator.in_structure())
    ends = list(itertools.accumulate(leaf.size for leaf in leaves))

    def of_column(flat: Array) -> Array:
        parts = [
            flat[end - leaf.size : end].reshape(leaf.shape).astype(leaf.dtype)
            for end, leaf in zip(ends, leaves, strict=True)
        ]
        result = jax.tree.leaves(operator.mv(jax.tree.unflatten(inputs, parts)))
        return jnp.concatenate([jnp.ravel(leaf).astype(columns.dtype) for leaf in result])

    return jax.vmap(of_column, in_axes=1, out_axes=1)(columns)
