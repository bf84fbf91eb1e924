"""Block-diagonal operators on parameter trees of every kind."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxhess._typing import InputError
from jaxhess.operators import BlockDiagonal, Dense, Diagonal, KroneckerProductSum, LowRank


class Pair(NamedTuple):
    w: object
    b: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    w: object
    b: object


class Module(eqx.Module):
    w: object
    b: object
    name: str = eqx.field(static=True, default="layer")


CONTAINERS = {
    "dict": (lambda w, b: {"w": w, "b": b}, "w", "w"),
    "list": (lambda w, b: [w, b], 0, "0"),
    "tuple": (lambda w, b: (w, b), 0, "0"),
    "named tuple": (Pair, "w", "w"),
    "dataclass": (Record, "w", "w"),
    "equinox": (Module, "w", "w"),
    "nested": (lambda w, b: {"w": w, "rest": [None, Pair(b, None)]}, "w", "w"),
}


@pytest.fixture(params=CONTAINERS)
def container(request):
    return CONTAINERS[request.param]


def test_every_container(container, rng):
    make, key, path = container
    params = make(jnp.asarray(rng.standard_normal((2, 3))), jnp.asarray(rng.standard_normal(2)))
    H = BlockDiagonal(jax.tree.map(lambda p: Diagonal(jnp.arange(float(p.size)).reshape(p.shape)), params))
    flat, unravel = ravel_pytree(params)
    matrix = H.as_matrix()
    np.testing.assert_allclose(ravel_pytree(H.mv(params))[0], matrix @ flat, rtol=1e-12, atol=1e-12)
    assert jax.tree.structure(H.mv(params)) == jax.tree.structure(params)
    assert jax.tree.structure(H.diagonal()) == jax.tree.structure(params)
    np.testing.assert_array_equal(ravel_pytree(H.diagonal())[0], np.diag(matrix))
    jax.tree.map(np.testing.assert_array_equal, H.diagonal(), unravel(jnp.diag(matrix)))
    assert H[key].in_size() == H.block(path).in_size() == 6
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert H.block(keys).in_structure().shape == leaf.shape
    for name, operator in H.items():
        assert H.block(name) is operator
    y = jax.jit(lambda h, p: (h * 2 + h).mv(p))(H, params)
    np.testing.assert_allclose(ravel_pytree(y)[0], 3 * matrix @ flat, rtol=1e-12, atol=1e-12)


@pytest.fixture
def nested(rng):
    return BlockDiagonal(
        {
            "hidden": {"w": KroneckerProductSum(np.ones((2, 2, 2)), np.ones((2, 3))), "b": Dense(np.eye(2))},
            "out": [Diagonal(np.ones(4)), Diagonal(np.zeros(1))],
            "with/slash": Diagonal(np.ones(2)),
        }
    )


def test_descending(nested):
    assert isinstance(nested["hidden"], BlockDiagonal)
    assert nested["hidden"]["b"] is nested.block("hidden/b") is nested.block(("hidden", "b"))
    assert nested["out"][-1] is nested.block("out/1")
    assert nested["with/slash"] is nested.block("with/slash")
    assert [path for path, _ in nested.items()] == ["hidden/b", "hidden/w", "out/0", "out/1", "with/slash"]
    with pytest.raises(KeyError, match="no block 'bias' at 'hidden'; there is b, w"):
        nested.block("hidden/bias")
    with pytest.raises(KeyError, match="no block 'head' at ''; there is hidden, out, with/slash"):
        nested["head"]
    with pytest.raises(KeyError, match="nothing below"):
        nested.block("hidden/b/x")


def test_repr_has_a_line_for_each_block(nested):
    lines = repr(nested).splitlines()
    assert lines[0].startswith("BlockDiagonal(5 blocks, ")
    assert lines[2] == "  hidden/w: KroneckerProductSum(6 x 6, r=2, Q (2, 2, 2), Z (2, 3), 112 B instead of 288 B)"
    assert len(lines) == 6


def test_single_array_as_parameters():
    H = BlockDiagonal(Diagonal(np.arange(3.0)))
    np.testing.assert_array_equal(H.mv(jnp.ones(3)), np.arange(3.0))
    assert H.block("") is H.block(()) is H.blocks


def test_tags_are_those_of_all_blocks():
    psd = Dense(np.eye(2), tags=lx.positive_semidefinite_tag)
    assert lx.is_positive_semidefinite(BlockDiagonal([psd, psd]))
    assert lx.is_positive_semidefinite(BlockDiagonal([psd, psd]) * 2)
    assert not lx.is_positive_semidefinite(BlockDiagonal([psd, Dense(np.eye(2))]))
    assert lx.is_symmetric(BlockDiagonal([psd, Dense(np.eye(2))]))
    assert lx.is_diagonal(BlockDiagonal([Diagonal(np.ones(2)), Diagonal(np.ones(3))]))


def test_refusals(nested):
    vector = jax.tree.map(lambda s: jnp.ones(s.shape), nested.in_structure())
    del vector["hidden"]["b"]
    vector["hidden"]["c"] = jnp.ones(2)
    with pytest.raises(InputError, match=r"missing \['hidden/b'\], unexpected \['hidden/c'\]"):
        nested.mv(vector)
    wrong = jax.tree.map(lambda s: jnp.ones((2, 2)), nested.in_structure())
    with pytest.raises(InputError, match=r"'hidden/b' needs shape \(2,\), got shape \(2, 2\)"):
        nested.mv(wrong)
    with pytest.raises(InputError, match="the block 'a' is a LowRank"):
        BlockDiagonal({"a": LowRank(np.ones((2, 1)), np.ones((2, 1)))})
    with pytest.raises(InputError, match="the block 'a' is a float"):
        BlockDiagonal({"a": 1.0})
    with pytest.raises(InputError, match="there is no block"):
        BlockDiagonal({})
    with pytest.raises(InputError, match="different structures"):
        nested + BlockDiagonal(nested.blocks["hidden"])
