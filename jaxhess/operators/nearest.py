"""How well ONE Kronecker product describes a Hessian block, as K-FAC and its relatives assume it does.

    nearest_kronecker      argmin ||H - kron(A, B)||_F                   Van Loan and Pitsianis (1993)
    mean_kronecker         kron(mean Q, mean z z^T)                      Martens and Grosse (2015)

each with the exact `||H - kron(A, B)||_F / ||H||_F`. The computations are in `jaxhess.operators.rearranged`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array, Float, InputError
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.functions import provides
from jaxhess.operators.kronecker import KroneckerProduct, KroneckerProductSum
from jaxhess.operators.layout import Layout
from jaxhess.operators.mapped import require_symmetric
from jaxhess.operators.rearranged import mean_of_sum, nearest_to_dense, nearest_to_sum
from jaxhess.operators.support import check_operator_fits

__all__ = ["KroneckerApproximation", "mean_kronecker", "nearest_kronecker"]


class KroneckerApproximation(NamedTuple):
    """A Kronecker product in the place of a block H, and how far from H it is.

    `operator` is the `KroneckerProduct` with the layout of the block. `relative_error` is `||H - kron(A, B)||_F / ||H||_F`,
    0-d and exact, for small errors down to rounding as well; 0 where H and the product are both zero, infinite where H
    alone is.
    """

    operator: KroneckerProduct
    relative_error: Float[Array, ""]


@provides("nearest_kronecker")
def nearest_kronecker(block: CurvatureOperator, layout: Layout | None = None) -> KroneckerApproximation:
    """The Kronecker product of symmetric A (m, m) and B (n, n) that is nearest to `block` in the Frobenius norm.

    Its scale and sign are shared so that `||A||_F = ||B||_F` and `tr B >= 0`. Where `block` is a sum of Kronecker products
    (a `KroneckerProductSum`, or an operator that `kronecker_terms()` turns into one), or is positive semidefinite, no
    other product is nearer; a positive semidefinite one has A and B that are so too, and the tag. Any other symmetric
    matrix may have a nearer product of two antisymmetric factors, which is not looked for.

    A sum is never made dense. Other blocks go by their dense matrix, the parameter read by `layout`: by default a matrix
    as it is stored, (m, n), and a vector as (N, 1), for which the product is exact. A `KroneckerProduct` is itself. Where
    the two largest singular values are equal there are several nearest products, of which this is one.

    Raises `InputError` if the block is not known to be symmetric, if the layout is for another shape, or if the parameter
    has more than two axes and no layout; `DenseTooLargeError` if a dense matrix is needed and does not fit. Source: Van
    Loan and Pitsianis (1993).

    >>> import jax.numpy as jnp
    >>> H = KroneckerProductSum(Q=jnp.array([[[2.0]], [[4.0]]]), Z=jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> nearest_kronecker(H).relative_error.item()
    0.0
    >>> Q = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])
    >>> nearest = nearest_kronecker(KroneckerProductSum(Q, Z=jnp.eye(2)))
    >>> nearest.operator.diagonal().round(4).tolist(), round(nearest.relative_error.item(), 4)
    ([[0.0, 0.0], [0.0, 1.0]], 0.4472)
    """
    if isinstance(block, KroneckerProduct) and layout in (None, block.layout):
        return KroneckerApproximation(block, jnp.zeros((), block.A.dtype))
    definite = lx.is_positive_semidefinite(block)
    tags = lx.positive_semidefinite_tag if definite else lx.symmetric_tag
    terms = _kronecker_terms(block)
    if terms is not None and layout in (None, terms.layout):
        A, B, error = nearest_to_sum(terms.Q, terms.Z, definite)
        return KroneckerApproximation(KroneckerProduct(A, B, terms.layout, tags), error)
    require_symmetric(block, "nearest_kronecker")
    layout = _layout_of(block, layout)
    check_operator_fits(block, ".nearest_kronecker", "it on a KroneckerProductSum, or mv, diagonal() or trace()")
    A, B, error = nearest_to_dense(block.as_matrix(), layout, definite)
    return KroneckerApproximation(KroneckerProduct(A, B, layout, tags), error)


@provides("mean_kronecker")
def mean_kronecker(block: CurvatureOperator) -> KroneckerApproximation:
    """`kron(mean Q, mean z z^T)`, the product of the mean factors (m, m) and (n, n), and its error.

    This is what K-FAC takes for a batch: it equals H where Q and z z^T are uncorrelated over the examples. `block` is a
    `KroneckerProductSum`, an operator that `kronecker_terms()` turns into one, or a `KroneckerProduct`, which is itself.
    Positive semidefinite where `block` is tagged so, which trusts every Q_i to be. Raises `InputError` for other
    operators: they have no factors of single examples. Source: Martens and Grosse (2015).

    >>> import jax.numpy as jnp
    >>> H = KroneckerProductSum(Q=jnp.array([[[2.0]], [[4.0]]]), Z=jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    >>> mean_kronecker(H).operator.as_matrix().tolist()
    [[3.0, 1.5], [1.5, 1.5]]
    >>> round(mean_kronecker(H).relative_error.item(), 4)
    0.189
    """
    if isinstance(block, KroneckerProduct):
        return KroneckerApproximation(block, jnp.zeros((), block.A.dtype))
    terms = _kronecker_terms(block)
    if terms is None:
        raise InputError(
            f"mean_kronecker: {block!r} has no factors Q_i and z_i of single examples, of which there would be a mean; it "
            "needs a KroneckerProductSum. nearest_kronecker takes any symmetric operator."
        )
    A, B, error = mean_of_sum(terms.Q, terms.Z)
    tags = lx.positive_semidefinite_tag if lx.is_positive_semidefinite(block) else lx.symmetric_tag
    return KroneckerApproximation(KroneckerProduct(A, B, terms.layout, tags), error)


def _kronecker_terms(block: Any) -> KroneckerProductSum | None:
    if isinstance(block, KroneckerProductSum):
        return block
    if not hasattr(block, "kronecker_terms"):
        return None
    try:  # Not computed before it is known to be of use.
        kind = jax.eval_shape(block.kronecker_terms)
    except InputError:
        return None
    return block.kronecker_terms() if isinstance(kind, KroneckerProductSum) else None


def _layout_of(block: CurvatureOperator, layout: Layout | None) -> Layout:
    shape = block.in_structure().shape
    if layout is not None:
        if layout.shape != shape:
            raise InputError(f"nearest_kronecker: the layout is for a parameter of shape {layout.shape}, not {shape}")
        return layout
    if len(shape) > 2:
        raise InputError(
            f"nearest_kronecker: which axes of the parameter of shape {shape} belong to A and which to B is not known; pass "
            f"layout=Layout({shape}, {shape}, rows=(..), columns=(..))"
        )
    return Layout(shape, shape, tuple(range(len(shape)))[:1], tuple(range(len(shape)))[1:])
