"""What a curvature operator offers, and the sum of several.

A parameter of shape S with N entries has an (N, N) Hessian block. Everything here speaks of it without that array: `mv`
maps an array of shape S to one of shape S, and `as_matrix`, on request, orders rows and columns as `reshape(-1)` does
(row-major vec, section 3 of the mathematics).

    StructuredOperator          a lineax operator with diagonal, trace, norm, exact scaling, sizes; maybe not square
      CurvatureOperator         square, on arrays of ONE parameter's shape; with eigenvalues, inertia, solves (`Solvable`)
        OperatorSum             H_1 + H_2 + ...

All of them are lineax operators, so lineax's solvers take them, and JAX pytrees, so `jit`, `vmap` and `tree.map` do.
Whether an operator is symmetric or positive semidefinite is told by its `tags`, as everywhere in lineax.
"""

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.functions import late
from jaxhess.operators.mapped import Inertia, count_signs, dense_eigvalsh, mapped_frobenius_norm
from jaxhess.operators.solvable import Solvable
from jaxhess.operators.support import (
    as_tags,
    check_operator_fits,
    check_same_structure,
    common_tags,
    describe,
    itemsize,
    leaf_bytes,
    scaled_tags,
    transposed_tags,
)

_SIZES = frozenset({"in_structure", "out_structure", "in_size", "out_size"})


class StructuredOperator(lx.AbstractLinearOperator):
    """A lineax operator stored as small arrays, with exact `diagonal`, `trace`, `frobenius_norm` and `scaled`.

    Multiplication and division by scalars stay within the class (`scaled`). The sum of two operators of this library is
    again one where that keeps structure; any other lineax operator is added as lineax does it. The `tags` are lineax's.
    """

    tags: frozenset[object] = dataclasses.field(metadata={"static": True})

    # numpy scalars on the left of `*` must leave the product to `__rmul__`.
    __array_ufunc__ = None

    def __getattribute__(self, name: str) -> Any:
        # Equinox makes a pytree of every bound method, so that `jit` takes it: the most of a small operation's time, for
        # methods that are called on the spot.
        on_the_spot = name.startswith("_") or name in _SIZES
        return object.__getattribute__(self, name) if on_the_spot else super().__getattribute__(name)

    @abc.abstractmethod
    def diagonal(self) -> PyTree:
        """The diagonal, in the structure of the operator's input."""

    @abc.abstractmethod
    def trace(self) -> Array:
        """The sum of the diagonal, 0-d."""

    @abc.abstractmethod
    def frobenius_norm(self) -> Array:
        """The root of the sum of all squared entries, 0-d."""

    @abc.abstractmethod
    def scaled(self, factor: Any) -> Self:
        """The operator times a scalar: a number or a 0-d array, traced or not.

        Definiteness is kept in the `tags` only for a number whose sign is known. Raises `InputError` for other shapes.
        """

    @abc.abstractmethod
    def _plus(self, other: "StructuredOperator") -> "StructuredOperator | None":
        """The sum in a form of this library, or None if there is none; both have the same structure."""

    @property
    def storage_bytes(self) -> int:
        """Bytes of the arrays held."""
        return sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(self))

    @property
    def dense_bytes(self) -> int:
        """Bytes that the dense form would take."""
        return self.out_size() * self.in_size() * itemsize(self)

    def with_tags(self, tags: Any) -> Self:
        """The same operator with lineax `tags` (one, or several) added; they are trusted, not checked."""
        return dataclasses.replace(self, tags=self.tags | as_tags(tags))

    def __add__(self, other):
        if isinstance(other, StructuredOperator):
            check_same_structure(self, other)
            combined = self._plus(other)
            if combined is not None:
                return combined
        return super().__add__(other)

    def __sub__(self, other):
        return self + (-other) if isinstance(other, StructuredOperator) else super().__sub__(other)

    def __mul__(self, other):
        return self.scaled(other)

    def __rmul__(self, other):
        return self.scaled(other)

    def __truediv__(self, other):
        return self.scaled(1 / other)

    def __neg__(self):
        return self.scaled(-1)


class CurvatureOperator(Solvable, StructuredOperator):
    """A square operator on arrays of one parameter's shape: a diagonal block of a Hessian, or a term of one.

    Symmetric unless its class says otherwise; `lineax.is_symmetric` tells.
    """

    @abc.abstractmethod
    def eigvalsh(self) -> Array:
        """All N eigenvalues in ascending order, (N,). Raises `InputError` if the operator is not symmetric."""

    @abc.abstractmethod
    def inertia(self, tolerance: Any = None) -> Inertia:
        """How many eigenvalues are above `tolerance`, below `-tolerance`, and between.

        The default tolerance is `k * eps * max|eigenvalue|` for the k eigenvalues that are not zero by construction. Raises
        `InputError` if the operator is not symmetric.
        """

    def nearest_kronecker(self, layout: Any = None) -> Any:
        """The Kronecker product nearest to the block in the Frobenius norm, with its exact relative error: a
        `KroneckerApproximation(operator, relative_error)`; see `jaxhess.operators.nearest_kronecker`."""
        return late["nearest_kronecker"](self, layout)

    def mean_kronecker(self) -> Any:
        """`kron(mean Q, mean z z^T)`, K-FAC's approximation, with its exact relative error; see
        `jaxhess.operators.mean_kronecker`."""
        return late["mean_kronecker"](self)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        return self.in_structure()

    def _plus(self, other: StructuredOperator) -> "OperatorSum | None":
        return OperatorSum((self, other)) if isinstance(other, CurvatureOperator) else None


class OperatorSum(CurvatureOperator):
    """The sum of curvature operators on the same parameter; sums within it are flattened.

    Symmetric or positive semidefinite if every term is. Its Frobenius norm takes N products (in bounded memory), its
    eigenvalues the dense form. Raises `InputError` if there is no term or if their structures differ.

    >>> import jax.numpy as jnp
    >>> from jaxhess.operators import Diagonal
    >>> H = Diagonal(jnp.ones((2, 2))) + Diagonal(jnp.arange(4.0).reshape(2, 2))
    >>> H.trace().item()
    10.0
    """

    terms: tuple[CurvatureOperator, ...]

    def __init__(self, terms: Iterable[CurvatureOperator], tags: Any = ()):
        flat: list[CurvatureOperator] = []
        for term in terms:
            if not isinstance(term, CurvatureOperator):
                raise InputError(f"OperatorSum: a term is a {type(term).__name__}, not a CurvatureOperator")
            flat.extend(term.terms if isinstance(term, OperatorSum) else (term,))
        if not flat:
            raise InputError("OperatorSum: there is no term")
        for term in flat[1:]:
            check_same_structure(flat[0], term)
        self.terms = tuple(flat)
        self.tags = as_tags(tags) | common_tags(flat)

    def in_structure(self):
        structures = [term.in_structure() for term in self.terms]
        return jax.ShapeDtypeStruct(structures[0].shape, jnp.result_type(*(s.dtype for s in structures)))

    def mv(self, vector):
        return sum_of(term.mv(vector) for term in self.terms)

    def as_matrix(self):
        check_operator_fits(self)
        return sum_of(term.as_matrix() for term in self.terms)

    def transpose(self):
        if lx.is_symmetric(self):
            return self
        terms = [cast(CurvatureOperator, term.transpose()) for term in self.terms]
        return OperatorSum(terms, transposed_tags(self.tags))

    def diagonal(self):
        return sum_of(term.diagonal() for term in self.terms)

    def trace(self):
        return sum_of(term.trace() for term in self.terms)

    def frobenius_norm(self):
        return mapped_frobenius_norm(self)

    def scaled(self, factor):
        return OperatorSum([term.scaled(factor) for term in self.terms], scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return dense_eigvalsh(self)

    def inertia(self, tolerance=None):
        return count_signs(self.eigvalsh(), self.in_size(), tolerance)

    def _per_example(self, function, what):
        return OperatorSum([term._per_example(function, what) for term in self.terms])

    def __repr__(self):
        kinds = ", ".join(type(term).__name__ for term in self.terms)
        return describe(self, f"{len(self.terms)} terms: {kinds}")


def sum_of(arrays: Iterable[Array]) -> Array:
    """The sum of one or more arrays of one shape."""
    first, *others = arrays
    for other in others:
        first = first + other
    return first


def _register_with_lineax() -> None:
    """Answers lineax's questions about an operator; those that its older releases do not ask are passed over."""

    def told_by(*tags: object, scalars: bool = False):
        wanted = frozenset(tags)
        return lambda operator: bool(operator.tags & wanted) or (scalars and operator.in_size() == operator.out_size() == 1)

    def flat_diagonal(operator):
        return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(operator.diagonal())])

    def three_diagonals(operator):
        matrix = operator.as_matrix()
        return jnp.diagonal(matrix), jnp.diagonal(matrix, -1), jnp.diagonal(matrix, 1)

    def itself(operator):
        return operator

    answers = {
        "is_symmetric": told_by(lx.symmetric_tag),
        "is_diagonal": told_by(lx.diagonal_tag, scalars=True),
        "is_tridiagonal": told_by(lx.tridiagonal_tag, lx.diagonal_tag, scalars=True),
        "has_unit_diagonal": told_by(lx.unit_diagonal_tag),
        "is_lower_triangular": told_by(lx.lower_triangular_tag, lx.diagonal_tag),
        "is_upper_triangular": told_by(lx.upper_triangular_tag, lx.diagonal_tag),
        "is_positive_semidefinite": told_by(lx.positive_semidefinite_tag),
        "is_negative_semidefinite": told_by(lx.negative_semidefinite_tag),
        "linearise": itself,
        "materialise": itself,
        "conj": itself,
        "diagonal": flat_diagonal,
        "tridiagonal": three_diagonals,
    }
    for question, answer in answers.items():
        if hasattr(lx, question):
            getattr(lx, question).register(StructuredOperator)(answer)

    @lx.materialise.register(CurvatureOperator)
    def _(operator):
        structure = operator.out_structure()
        if lx.is_diagonal(operator) or not isinstance(structure, jax.ShapeDtypeStruct):
            return operator
        matrix = operator.as_matrix().reshape(structure.shape * 2)
        return lx.PyTreeLinearOperator(matrix, structure, operator.tags)


_register_with_lineax()
