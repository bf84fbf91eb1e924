"""Preconditioners: approximate inverses of `H + λI`, positive definite, that cost two small eigendecompositions.

    A = U diag(a) U^T      B = V diag(b) V^T      |kron(A, B)| = kron(|A|, |B|)
    (kron(|A|, |B|) + λI)^-1 vec(X) = vec(U ((U^T X V) / (|a_i b_j| + λ)) V^T)

With A and B the factors of the Kronecker product nearest to H, or the means of its Q_i and z_i z_i^T (section 3 of the
mathematics). Absolute values since a preconditioner must be positive definite, whatever the signs of H; where H is that
product, the preconditioned operator then has eigenvalues 1 and -1, and MINRES takes two steps.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import matmul, symmetrise, widened
from jaxhess._typing import Array, Float, InputError, PyTree
from jaxhess.operators.layout import Layout
from jaxhess.operators.mapped import mapped_matrix
from jaxhess.operators.support import as_real_arrays, as_scalar, check_operator_fits, check_vector, describe, shape_text

__all__ = [
    "BlockPreconditioner",
    "KroneckerPreconditioner",
    "block_preconditioner",
    "kronecker_preconditioner",
    "register_semidefinite",
]


def kronecker_preconditioner(
    A: Float[Array, "m m"], B: Float[Array, "n n"], damping: Any = 0.0, layout: Layout | None = None
) -> "KroneckerPreconditioner":
    """`(|A| ⊗ |B| + damping I)^-1` for symmetric A (m, m) and B (n, n), by their eigendecompositions.

    `damping` is a number or 0-d array, traced or not; `layout` says how the parameter is read as (m, n), by default as
    just that. Where `|a_i b_j| + damping` is below `eps max|a b|`, that takes its place, so that the result is positive
    definite without damping too. Raises `InputError` for factors that are not square matrices or do not fit the layout.

    >>> import jax.numpy as jnp
    >>> M = kronecker_preconditioner(jnp.diag(jnp.array([2.0, -4.0])), jnp.eye(1), damping=1.0)
    >>> M.mv(jnp.array([[3.0], [5.0]])).tolist()
    [[1.0], [1.0]]
    """
    A, B = (widened(factor) for factor in as_real_arrays("kronecker_preconditioner", ["A", "B"], [A, B]))
    for name, factor in (("A", A), ("B", B)):
        if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
            raise InputError(f"kronecker_preconditioner: {name} must be a square matrix, got shape {factor.shape}")
    m, n = A.shape[0], B.shape[0]
    layout = Layout.of_matrix(m, n) if layout is None else layout
    if (layout.m, layout.n) != (m, n):
        raise InputError(
            f"kronecker_preconditioner: A {A.shape} and B {B.shape} are for a matrix of {m} x {n}, the layout reads the "
            f"parameter of shape {layout.shape} as {layout.m} x {layout.n}"
        )
    damping = as_scalar("kronecker_preconditioner, damping", damping, A.dtype)
    (a, U), (b, V) = _eigh(A), _eigh(B)
    return KroneckerPreconditioner(U, V, jnp.abs(a), jnp.abs(b), damping, layout)


def block_preconditioner(blocks: PyTree) -> "BlockPreconditioner":
    """The block-diagonal preconditioner of a tree of parameters, with an approximate inverse at each of them.

    The leaves are lineax operators tagged positive semidefinite: those of `kronecker_preconditioner`, or any other, such
    as `lineax.IdentityLinearOperator`. Raises `InputError` if a leaf is no such operator, or if there is none.

    >>> import jax.numpy as jnp
    >>> M = block_preconditioner({"w": kronecker_preconditioner(4 * jnp.eye(2), jnp.eye(3))})
    >>> M.mv({"w": jnp.ones((2, 3))})["w"].tolist()
    [[0.25, 0.25, 0.25], [0.25, 0.25, 0.25]]
    """
    for path, operator in jax.tree_util.tree_leaves_with_path(blocks, is_leaf=_is_operator):
        where = jax.tree_util.keystr(path)
        if not _is_operator(operator):
            raise InputError(f"block_preconditioner: {where} is a {type(operator).__name__}, not a lineax operator")
        if not lx.is_positive_semidefinite(operator):
            raise InputError(
                f"block_preconditioner: {where}, a {type(operator).__name__}, is not tagged as positive semidefinite"
            )
    if not jax.tree.leaves(blocks, is_leaf=_is_operator):
        raise InputError("block_preconditioner: there is no block")
    return BlockPreconditioner(blocks)


class KroneckerPreconditioner(lx.AbstractLinearOperator):
    """`(|A| ⊗ |B| + damping I)^-1` on arrays of the shape of `layout`; `kronecker_preconditioner` makes it.

    `with_damping` changes the damping without decomposing again.
    """

    left_vectors: Float[Array, "m m"]
    right_vectors: Float[Array, "n n"]
    left_values: Float[Array, "m"]
    right_values: Float[Array, "n"]
    damping: Float[Array, ""]
    layout: Layout = dataclasses.field(metadata={"static": True})

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.layout.shape, self.left_vectors.dtype)

    def out_structure(self):
        return self.in_structure()

    def mv(self, vector):
        check_vector("KroneckerPreconditioner", vector, self.layout.shape)
        U, V = self.left_vectors, self.right_vectors
        X = matmul(matmul(U.T, self.layout.to_matrix(vector)), V)
        values = self.left_values[:, None] * self.right_values[None, :]
        largest = jnp.max(values, initial=0)
        floor = jnp.where(largest > 0, jnp.finfo(values.dtype).eps * largest, 1)
        X = X / jnp.maximum(values + self.damping, floor)
        return self.layout.from_matrix(matmul(matmul(U, X), V.T))

    def as_matrix(self):
        check_operator_fits(self, instead="mv")
        return mapped_matrix(self)

    def transpose(self):
        return self

    def with_damping(self, damping: Any) -> "KroneckerPreconditioner":
        """The same factors with another damping, a number or 0-d array."""
        scalar = as_scalar("KroneckerPreconditioner, damping", damping, self.left_vectors.dtype)
        return dataclasses.replace(self, damping=scalar)

    def __repr__(self):
        return describe(self, f"A {shape_text(self.left_vectors)}", f"B {shape_text(self.right_vectors)}")


class BlockPreconditioner(lx.AbstractLinearOperator):
    """A positive definite operator at each leaf of a tree of parameters; `block_preconditioner` makes it."""

    blocks: PyTree

    def in_structure(self):
        return jax.tree.map(lambda operator: operator.in_structure(), self.blocks, is_leaf=_is_operator)

    def out_structure(self):
        return self.in_structure()

    def mv(self, vector):
        return jax.tree.map(lambda operator, part: operator.mv(part), self.blocks, vector, is_leaf=_is_operator)

    def as_matrix(self):
        check_operator_fits(self, instead="mv")
        return jax.scipy.linalg.block_diag(*(operator.as_matrix() for operator in self._operators()))

    def transpose(self):
        return self

    def __repr__(self):
        lines = "\n".join(f"  {operator!r}" for operator in self._operators())
        return f"BlockPreconditioner(\n{lines})"

    def _operators(self) -> Iterator[lx.AbstractLinearOperator]:
        yield from jax.tree.leaves(self.blocks, is_leaf=_is_operator)


def _is_operator(node: Any) -> bool:
    return isinstance(node, lx.AbstractLinearOperator)


def _decomposed(matrix: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(symmetrise(matrix))
    return values, vectors


_eigh = jax.jit(_decomposed)


def register_semidefinite(*classes: type) -> None:
    """Answers lineax's questions about positive semidefinite operators; those that its older releases do not ask are passed
    over."""

    def itself(operator):
        return operator

    def is_scalar(operator):
        return operator.in_size() == 1

    def no(operator):
        del operator
        return False

    def yes(operator):
        del operator
        return True

    def flat_diagonal(operator):
        return jnp.diagonal(operator.as_matrix())

    def three_diagonals(operator):
        matrix = operator.as_matrix()
        return jnp.diagonal(matrix), jnp.diagonal(matrix, -1), jnp.diagonal(matrix, 1)

    answers = {
        "is_symmetric": yes,
        "is_positive_semidefinite": yes,
        "is_negative_semidefinite": no,
        "has_unit_diagonal": no,
        **dict.fromkeys(["is_diagonal", "is_tridiagonal", "is_lower_triangular", "is_upper_triangular"], is_scalar),
        **dict.fromkeys(["linearise", "materialise", "conj"], itself),
        "diagonal": flat_diagonal,
        "tridiagonal": three_diagonals,
    }
    for question, answer in answers.items():
        for kind in classes:
            if hasattr(lx, question):
                getattr(lx, question).register(kind)(answer)


register_semidefinite(KroneckerPreconditioner, BlockPreconditioner)
