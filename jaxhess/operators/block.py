"""The block-diagonal Hessian of a whole network: one curvature operator for each parameter.

    H = diag(H_1, H_2, ...)       blocks in the order of the parameters' leaves, as in `jax.flatten_util.ravel_pytree`

The blocks sit in a tree of the parameters' own structure, so `H["layer"]["w"]` is where `params["layer"]["w"]` is.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx

from jaxhess._linalg import format_bytes
from jaxhess._typing import Array, InputError, PyTree
from jaxhess.operators.base import CurvatureOperator, StructuredOperator, sum_of
from jaxhess.operators.dense import Dense
from jaxhess.operators.direct import Factorization
from jaxhess.operators.eigen import select
from jaxhess.operators.functions import NegativeCurvature
from jaxhess.operators.kronecker import KroneckerProductSum
from jaxhess.operators.mapped import Inertia
from jaxhess.operators.paths import children_of, key_of, leaves_like, naming, paths_of, spread, unwrapped
from jaxhess.operators.support import (
    as_tags,
    check_operator_fits,
    common_tags,
    leaf_bytes,
    scaled_tags,
    transposed_tags,
)


class BlockDiagonal(StructuredOperator):
    """A block-diagonal operator on a tree of parameters: `blocks` has a `CurvatureOperator` at each leaf.

    Vectors are trees of the parameters' structure. `H[key]` descends one level, `H.block("layer/w")` several; a leaf
    gives its operator, a subtree a `BlockDiagonal`. Symmetric or positive semidefinite if every block is. `layers` are the
    places, among the leaves, of the weight and the bias of each layer that the error sees as `W z + b` only, as far as that
    is known. Raises `InputError` if a leaf is no `CurvatureOperator` or if there is none.

    >>> import jax.numpy as jnp
    >>> from jaxhess.operators import Diagonal
    >>> H = BlockDiagonal({"w": Diagonal(jnp.ones((2, 3))), "b": Diagonal(jnp.array([2.0, -1.0]))})
    >>> H.mv({"w": jnp.ones((2, 3)), "b": jnp.ones(2)})["b"].tolist()
    [2.0, -1.0]
    >>> H["w"].trace().item(), H.trace().item()
    (6.0, 7.0)
    """

    blocks: PyTree
    layers: tuple[tuple[int, int], ...] = dataclasses.field(metadata={"static": True})

    def __init__(self, blocks: PyTree, tags: Any = (), layers: Sequence[tuple[int, int]] = ()):
        self.blocks, self.layers = blocks, tuple(layers)
        operators = []
        for path, operator in self.items():
            if not isinstance(operator, CurvatureOperator):
                raise InputError(f"BlockDiagonal: the block {path!r} is a {type(operator).__name__}, not an operator")
            operators.append(operator)
        if not operators:
            raise InputError("BlockDiagonal: there is no block")
        self.tags = as_tags(tags) | common_tags(operators)

    def in_structure(self):
        return self._map(lambda operator: operator.in_structure())

    def out_structure(self):
        return self._map(lambda operator: operator.out_structure())

    def mv(self, vector):
        parts = leaves_like("BlockDiagonal.mv", self.in_structure(), vector)
        results = [operator.mv(part) for operator, part in zip(self._operators(), parts, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(self.blocks, is_leaf=_is_operator), results)

    def as_matrix(self):
        for path, operator in self.items():
            check_operator_fits(operator, f" of {path!r}")
        check_operator_fits(self)
        return jax.scipy.linalg.block_diag(*(operator.as_matrix() for operator in self._operators()))

    def transpose(self):
        if lx.is_symmetric(self):
            return self
        return BlockDiagonal(self._map(lambda operator: operator.transpose()), transposed_tags(self.tags))

    def diagonal(self):
        return self._map(lambda operator: operator.diagonal())

    def trace(self):
        return sum_of(operator.trace() for operator in self._operators())

    def frobenius_norm(self):
        return jnp.sqrt(sum_of(operator.frobenius_norm() ** 2 for operator in self._operators()))

    def scaled(self, factor):
        return BlockDiagonal(
            self._map(lambda operator: operator.scaled(factor)), scaled_tags(self.tags, factor), self.layers
        )

    def eigvalsh(self):
        """All eigenvalues of all blocks in ascending order, (N,)."""
        return jnp.sort(jnp.concatenate([operator.eigvalsh() for operator in self._operators()]))

    def inertia(self, tolerance: Any = None) -> Inertia:
        """The inertia, summed over the blocks; the default tolerance is each block's own."""
        counts = [operator.inertia(tolerance) for operator in self._operators()]
        return Inertia(*(sum_of(count) for count in zip(*counts, strict=True)))

    def factorize(self, damping: Any = None, *, method: str = "auto") -> Any:
        """Factor every block: a `BlockDiagonal` of eigendecompositions, or with `damping`, one number or a tree of them, a
        `FactorizedBlocks` for that damping. Arguments and errors are those of `CurvatureOperator.factorize`, by block."""
        dampings = self._spread("factorize", damping)
        factors = []
        for (path, operator), d in zip(self.items(), dampings, strict=True):
            with naming(path):
                factors.append(operator.factorize(d, method=method))
        blocks = self._unflatten(factors)
        return BlockDiagonal(blocks, self.tags) if damping is None else FactorizedBlocks(blocks)

    def solve(self, vector: PyTree, damping: Any = 0.0, *, return_info: bool = False, **options: Any) -> Any:
        """`(H + damping I)^-1` times a tree of the parameters' structure, block by block; `damping` is one number, or a tree
        of them that leads the parameters' (one for a layer, one for each parameter).

        The options are those of `CurvatureOperator.solve`; `preconditioner` and `start` may be trees. With `return_info`,
        the second result has a `SolveInfo` at each parameter. Errors name the block.
        """
        parts = leaves_like("BlockDiagonal.solve", self.in_structure(), vector)
        dampings = self._spread("solve", damping)
        per_block: dict[str, list[Any]] = {
            name: self._given(options.pop(name)) for name in ("preconditioner", "start") if name in options
        }
        results = []
        for n, ((path, operator), part, d) in enumerate(zip(self.items(), parts, dampings, strict=True)):
            own = {name: values[n] for name, values in per_block.items()}
            with naming(path):
                results.append(operator.solve(part, d, return_info=return_info, **own, **options))
        if not return_info:
            return self._unflatten(results)
        return self._unflatten([x for x, _ in results]), self._unflatten([info for _, info in results])

    def logdet(self, damping: Any = 0.0) -> Array:
        """`log |det(H + damping I)|`, the sum over the blocks; `damping` is one number or a tree of them."""
        return self.slogdet(damping)[1]

    def slogdet(self, damping: Any = 0.0) -> tuple[Array, Array]:
        """The sign of `det(H + damping I)` and the logarithm of its absolute value."""
        dampings = self._spread("slogdet", damping)
        pairs = []
        for (path, operator), d in zip(self.items(), dampings, strict=True):
            with naming(path):
                pairs.append(operator.slogdet(d))
        return functools.reduce(jnp.multiply, [sign for sign, _ in pairs]), sum_of(value for _, value in pairs)

    def eigh(self, k: int | None = None, *, which: str = "magnitude", return_info: bool = False, **options: Any) -> Any:
        """The extreme eigenvalues of the whole (k,), ascending, and their eigenvectors, each zero but for one block; as
        `CurvatureOperator.eigh`."""
        count = self.in_size() if k is None else k
        if not 0 < count <= self.in_size():
            raise InputError(f"BlockDiagonal.eigh: there are {self.in_size()} eigenvalues, k={k} were asked for")
        found = []
        for path, operator in self.items():
            if operator.in_size():
                with naming(path):
                    found.append(
                        operator.eigh(min(count, operator.in_size()), which=which, return_info=return_info, **options)
                    )
            else:
                found.append((jnp.zeros(0), jnp.zeros((0, *operator.in_structure().shape))))
        values = jnp.concatenate([result[0] for result in found])
        chosen = select(values, jnp.ones(values.shape, bool), count, which)
        vectors, start = [], 0
        for result in found:
            size = result[0].size
            inside = (chosen >= start) & (chosen < start + size)
            own = (
                result[1][jnp.clip(chosen - start, 0, max(size - 1, 0))]
                if size
                else jnp.zeros((count, *result[1].shape[1:]))
            )
            vectors.append(jnp.where(inside.reshape(-1, *(1 for _ in own.shape[1:])), own, 0))
            start += size
        tree = self._unflatten(vectors)
        return (values[chosen], tree, self._unflatten([r[2] for r in found])) if return_info else (values[chosen], tree)

    def matrix_function(self, function: Callable[[Array], Array]) -> "BlockDiagonal":
        """`h(H)`, block by block."""
        return BlockDiagonal(self._map(lambda operator: operator.matrix_function(function)))

    def absolute(self, *, per_example: bool = False) -> "BlockDiagonal":
        """`|H|`, block by block, as `CurvatureOperator.absolute`. With `per_example`, a bias has the mean of the `|Q_i|` of
        its layer's weight; the blocks of other parameters without such Q raise `InputError`."""
        return self._positive("absolute", per_example)

    def positive_part(self, *, per_example: bool = False) -> "BlockDiagonal":
        """The nearest positive semidefinite operator, block by block, as `CurvatureOperator.positive_part`; `per_example` as
        in `absolute`."""
        return self._positive("positive_part", per_example)

    def _positive(self, what: str, per_example: bool) -> "BlockDiagonal":
        if not per_example:
            return self._named(what)
        operators, results = self._operators(), {}
        weight_of = {
            bias: weight
            for weight, bias in self.layers
            if isinstance(operators[weight], KroneckerProductSum) and not lx.is_positive_semidefinite(operators[bias])
        }
        for n, (path, operator) in enumerate(self.items()):
            if n not in weight_of:
                with naming(path):
                    results[n] = getattr(operator, what)(per_example=True)
        for bias, weight in weight_of.items():
            Q = jnp.mean(results[weight].Q, axis=0)
            results[bias] = Dense(Q, operators[bias].in_structure().shape, lx.positive_semidefinite_tag)
        return BlockDiagonal(self._unflatten([results[n] for n in range(len(operators))]), layers=self.layers)

    def inverse(self, damping: Any = 0.0) -> "BlockDiagonal":
        """`(H + damping I)^-1`, block by block; `damping` is one number or a tree of them."""
        return self._named("inverse", damping)

    def inverse_sqrt(self, damping: Any = 0.0) -> "BlockDiagonal":
        """`(H + damping I)^(-1/2)`, block by block; `damping` is one number or a tree of them."""
        return self._named("inverse_sqrt", damping)

    def sample(self, key: Array, damping: Any = 0.0, shape: tuple[int, ...] = ()) -> PyTree:
        """Draws from the normal distribution with covariance `(H + damping I)^-1`, as `CurvatureOperator.sample`."""
        dampings = self._spread("sample", damping)
        keys, draws = jax.random.split(key, len(dampings)), []
        for (path, operator), k, d in zip(self.items(), keys, dampings, strict=True):
            with naming(path):
                draws.append(operator.sample(k, d, shape))
        return self._unflatten(draws)

    def negative_curvature_direction(self) -> NegativeCurvature:
        """The lowest of all blocks' eigenvalues and its direction, zero but for that block, where it is negative."""
        found = [operator.negative_curvature_direction() for operator in self._operators()]
        values = jnp.stack([each.eigenvalue for each in found])
        lowest = jnp.argmin(values)
        directions = [jnp.where(lowest == n, each.direction, 0) for n, each in enumerate(found)]
        return NegativeCurvature(values[lowest], self._unflatten(directions))

    def nearest_kronecker(self) -> PyTree:
        """For each parameter of two axes or more, its block's `nearest_kronecker`; for others their exact block."""
        return self._map(lambda operator: operator.nearest_kronecker())

    def items(self) -> Iterator[tuple[str, CurvatureOperator]]:
        """The blocks with their paths, such as `"layer/w"`, in the order of the parameters' leaves."""
        for path, operator in jax.tree_util.tree_leaves_with_path(self.blocks, is_leaf=_is_operator):
            yield "/".join(str(key_of(entry)) for entry in path), operator

    def block(self, path: Any) -> Any:
        """The block, or the part of the tree, at `path`: `"layer/w"`, a tuple of keys, or a JAX key path.

        Raises `KeyError`, with what is there, if there is nothing at `path`.
        """
        if isinstance(path, str):
            exact = dict(self.items())
            if path in exact:
                return exact[path]
            path = path.split("/")
        operators = self._operators()
        node = self._unflatten(list(range(len(operators))))
        for depth, entry in enumerate(path):
            key, children = key_of(entry), children_of(node)
            if isinstance(node, tuple | list) and isinstance(key, int) and -len(node) <= key < len(node):
                node = node[key]
            elif str(key) in children:
                node = children[str(key)]
            else:
                here = "/".join(str(key_of(entry)) for entry in path[:depth])
                raise KeyError(f"no block {str(key)!r} at {here!r}; there is {', '.join(children) or 'nothing below'}")
        node = unwrapped(node)
        if isinstance(node, int):
            return operators[node]
        places = jax.tree.leaves(node)
        inside = [pair for pair in self.layers if set(pair) <= set(places)]
        layers = [(places.index(weight), places.index(bias)) for weight, bias in inside]
        return BlockDiagonal(jax.tree.map(lambda n: operators[n], node), layers=layers)

    def __getitem__(self, key: Any) -> Any:
        return self.block((key,))

    def _operators(self) -> list[CurvatureOperator]:
        return jax.tree.leaves(self.blocks, is_leaf=_is_operator)

    def _map(self, function: Callable[[CurvatureOperator], Any]) -> PyTree:
        return jax.tree.map(function, self.blocks, is_leaf=_is_operator)

    def _unflatten(self, leaves: Sequence[Any]) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self.blocks, is_leaf=_is_operator), leaves)

    def _spread(self, what: str, damping: Any) -> list[Any]:
        """One damping for each block, from a number or from a tree that leads the parameters'."""
        return spread(f"BlockDiagonal.{what}", damping, self.in_structure())

    def _given(self, option: Any) -> list[Any]:
        """An option of each block: the same for all, or a tree of them."""
        structure = jax.tree.structure(self.blocks, is_leaf=_is_operator)
        leaves, given = jax.tree.flatten(option, is_leaf=_is_operator)
        return leaves if given == structure else [option] * structure.num_leaves

    def _named(self, method: str, *dampings: Any, **options: Any) -> "BlockDiagonal":
        given = [self._spread(method, damping) for damping in dampings]
        results = []
        for n, (path, operator) in enumerate(self.items()):
            with naming(path):
                results.append(getattr(operator, method)(*(values[n] for values in given), **options))
        return BlockDiagonal(self._unflatten(results))

    def _plus(self, other):
        if not isinstance(other, BlockDiagonal):
            return None
        return BlockDiagonal(jax.tree.map(lambda a, b: a + b, self.blocks, other.blocks, is_leaf=_is_operator))

    def __repr__(self):
        lines = [f"  {path}: {operator!r}" for path, operator in self.items()]
        total = format_bytes(sum(leaf_bytes(leaf) for leaf in jax.tree.leaves(self.blocks)))
        return "\n".join([f"BlockDiagonal({len(lines)} blocks, {total}", *lines]) + ")"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorizedBlocks:
    """A block-diagonal operator factored block by block for the dampings given; `H.factorize(damping)` makes it. `blocks`
    has a `Factorization` at each parameter."""

    blocks: PyTree

    def solve(self, vector: PyTree) -> PyTree:
        """`(H + damping I)^-1` times a tree of the parameters' structure. Raises `SingularError` with the block's path."""
        factors, treedef = jax.tree.flatten(self.blocks, is_leaf=_is_factored)
        structure = jax.tree.unflatten(treedef, [f.reduction.columns.structure for f in factors])
        parts, solutions = leaves_like("FactorizedBlocks.solve", structure, vector), []
        for path, f, part in zip(paths_of(structure), factors, parts, strict=True):
            with naming(path):
                solutions.append(f.solve(part))
        return jax.tree.unflatten(treedef, solutions)

    def logdet(self) -> Array:
        """`log |det(H + damping I)|`, the sum over the blocks."""
        return self.slogdet()[1]

    def slogdet(self) -> tuple[Array, Array]:
        """The sign of `det(H + damping I)` and the logarithm of its absolute value."""
        pairs = [f.slogdet() for f in jax.tree.leaves(self.blocks, is_leaf=_is_factored)]
        return functools.reduce(jnp.multiply, [sign for sign, _ in pairs]), sum_of(value for _, value in pairs)


def _is_factored(node: Any) -> bool:
    return isinstance(node, Factorization)


def _is_operator(node: Any) -> bool:
    return isinstance(node, StructuredOperator)
