"""An operator held as its eigendecomposition: what `factorize` gives, and every function of an operator."""

from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._typing import Array
from jaxhess.operators.base import CurvatureOperator
from jaxhess.operators.eigen import Eigen
from jaxhess.operators.functions import provides
from jaxhess.operators.paths import leaves_like
from jaxhess.operators.reduction import unravel
from jaxhess.operators.support import as_scalar, as_tags, check_operator_fits, describe, scaled_tags

__all__ = ["SpectralOperator"]


@provides("spectral")
class SpectralOperator(CurvatureOperator):
    """`H = ρ I + sum_e (λ_e - ρ) u_e u_e^T`: k eigenpairs, and the eigenvalue ρ on all that is orthogonal to them.

    On an array, or on a tree of arrays. Solves, logarithms of determinants, roots, samples, absolute values and positive
    parts reuse the decomposition, whatever the damping. Source: sections 3 and 7 of the mathematics.

    >>> import jax.numpy as jnp
    >>> from jaxhess.operators import KroneckerProductSum
    >>> H = KroneckerProductSum(Q=jnp.array([[[2.0]], [[-4.0]]]), Z=jnp.eye(3)[:2]).factorize()
    >>> H.eigenvalues.tolist(), H.solve(jnp.ones((1, 3)), 1.0).tolist()
    ([-2.0, 1.0], [[0.5, -1.0, 1.0]])
    >>> H.absolute().diagonal().tolist(), round(H.logdet(3.0).item(), 4)
    ([[1.0, 2.0, 0.0]], 2.4849)
    """

    eigen: Eigen

    def __init__(self, eigen: Eigen, tags: Any = ()):
        self.eigen = eigen
        self.tags = (as_tags(tags) & _ABOUT_SPECTRUM) | {lx.symmetric_tag}

    @property
    def eigenvalues(self) -> Array:
        """The k held ones, in the order of the decomposition."""
        return self.eigen.values

    @property
    def rest(self) -> Array:
        """The eigenvalue of all that is orthogonal to the held eigenvectors, N - k times."""
        return self.eigen.rest

    def in_structure(self):
        return self.eigen.columns.structure

    def mv(self, vector):
        structure = self.in_structure()
        leaves = leaves_like("SpectralOperator.mv", structure, vector)
        return _product(self.eigen, jax.tree.unflatten(jax.tree.structure(structure), leaves))

    def as_matrix(self):
        check_operator_fits(self)
        return _matrix(self.eigen)

    def transpose(self):
        return self

    def diagonal(self):
        return unravel(self.in_structure(), _diagonal(self.eigen))

    def trace(self):
        return jnp.sum(self.eigen.values) + self.eigen.missing * self.eigen.rest

    def frobenius_norm(self):
        return jnp.sqrt(jnp.sum(self.eigen.values**2) + self.eigen.missing * self.eigen.rest**2)

    def scaled(self, factor):
        scalar = as_scalar("SpectralOperator", factor, self.eigen.values.dtype)
        return SpectralOperator(self.eigen.mapped(lambda values: scalar * values), scaled_tags(self.tags, factor))

    def eigvalsh(self):
        return self.eigen.all_values()

    def inertia(self, tolerance=None):
        return self.eigen.inertia(tolerance)

    def factorize(self, damping: Any = None, *, method: str = "auto") -> Any:
        """Itself, as it is factored; with `damping`, a `Factorization` for that."""
        return self if damping is None else super().factorize(damping, method=method)

    def _plus(self, other):
        return super()._plus(other) if isinstance(self.in_structure(), jax.ShapeDtypeStruct) else None

    def _eigen(self):
        return self.eigen

    def _reduced_size(self):
        return self.eigen.columns.count

    def _held(self):
        return "the eigendecomposition is held"

    def __repr__(self):
        return describe(self, f"{self.eigen.values.size} eigenpairs")


_ABOUT_SPECTRUM = {lx.positive_semidefinite_tag, lx.negative_semidefinite_tag}


@jax.jit
def _product(eigen: Eigen, vector: Any) -> Any:
    vector = jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), vector, eigen.columns.structure)
    return eigen.product(vector)


@jax.jit
def _matrix(eigen: Eigen) -> Array:
    return eigen.matrix()


@jax.jit
def _diagonal(eigen: Eigen) -> Array:
    return eigen.diagonal()
