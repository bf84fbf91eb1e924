"""The drop-in layers: the library's own numbers, derivatives in every mode, the library's own tools."""

import builtins
import importlib
import sys

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from foreign import cubes, data, generic

import jaxhess
from jaxhess._typing import InputError
from jaxhess.interop import equinox, flax, linen
from jaxhess.operators import ImplicitKroneckerSum, KroneckerProductSum

KEY = jax.random.key(0)
SEQUENCE = jnp.cos(jnp.arange(15.0)).reshape(5, 3)


def nnx_layer(build):
    graphdef, state = nnx.split(build(nnx.Rngs(0)))
    return lambda params, *args, **options: nnx.merge(graphdef, params)(*args, **options), generic(state)


def linen_layer(module, x):
    variables = generic(jax.eval_shape(module.init, KEY, x))
    return module.apply, variables


def equinox_layer(module):
    return lambda params, *args, **options: params(*args, **options), generic(module)


LAYERS = {
    "nnx": lambda: nnx_layer(lambda rngs: flax.Dense(3, 2, activation=jaxhess.tanh, rngs=rngs)),
    "linen": lambda: linen_layer(linen.Dense(2, jaxhess.tanh), jnp.ones(3)),
    "equinox": lambda: equinox_layer(equinox.Dense(3, 2, jaxhess.tanh, key=KEY)),
    "nnx recurrent": lambda: nnx_layer(lambda rngs: flax.Recurrent(3, 2, rngs=rngs)),
    "linen recurrent": lambda: linen_layer(linen.Recurrent(2), SEQUENCE),
    "equinox recurrent": lambda: equinox_layer(equinox.Recurrent(3, 2, key=KEY)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_mode_of_differentiation(name):
    apply, params = LAYERS[name]()

    def error(params, x):
        return cubes(apply(params, x))

    tangent = jax.tree.map(jnp.cos, params)
    gradient = jax.jit(jax.grad(error))(params, SEQUENCE)
    chex.assert_trees_all_close(jax.jacfwd(error)(params, SEQUENCE), gradient, rtol=1e-12)
    _, slope = jax.jvp(lambda p: error(p, SEQUENCE), (params,), (tangent,))
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, tangent)
    np.testing.assert_allclose(slope, sum(jax.tree.leaves(products)), rtol=1e-12)
    step = 1e-5
    ahead = error(jax.tree.map(lambda p, t: p + step * t, params, tangent), SEQUENCE)
    behind = error(jax.tree.map(lambda p, t: p - step * t, params, tangent), SEQUENCE)
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7)
    stack = jnp.stack([SEQUENCE, 2 * SEQUENCE])
    mapped = jax.vmap(apply, in_axes=(None, 0))(params, stack)
    np.testing.assert_allclose(apply(params, stack), mapped, rtol=1e-13)
    np.testing.assert_allclose(apply(params, stack[:, None]), mapped[:, None], rtol=1e-13)


@pytest.mark.parametrize("name", LAYERS)
def test_the_hessian_is_exact_and_keeps_its_structure(name):
    apply, params = LAYERS[name]()
    recurrent = name.endswith("recurrent")
    batch = data(4, 3) if recurrent else data(3)
    report = jaxhess.test_util.check_hessian(lambda params, x: cubes(apply(params, x)), params, batch)
    kinds = {check.path.split("/")[-2 if name.startswith("nnx") else -1]: check.found for check in report.checks}
    weight = "weight" if name.startswith("equinox") else "kernel"
    assert kinds[weight] == (ImplicitKroneckerSum if recurrent else KroneckerProductSum).__name__


def test_dense_takes_the_parameters_of_the_librarys_own_layer():
    x = data(3)
    own, theirs = flax.Dense(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(own)), nnx.to_pure_dict(nnx.state(theirs)))
    np.testing.assert_allclose(own(x), theirs(x), rtol=1e-6)
    variables = nn.Dense(2).init(KEY, x)
    chex.assert_trees_all_equal(linen.Dense(2).init(KEY, x), variables)
    np.testing.assert_allclose(linen.Dense(2).apply(variables, x), nn.Dense(2).apply(variables, x), rtol=1e-6)
    linear = eqx.nn.Linear(3, 2, key=KEY)
    dense = equinox.Dense(3, 2, key=KEY)
    chex.assert_trees_all_equal((dense.weight, dense.bias), (linear.weight, linear.bias))
    np.testing.assert_allclose(dense(x), jax.vmap(linear)(x), rtol=1e-13)


def test_recurrent_gives_the_states_of_the_librarys_simple_cell():
    x = data(4, 3)
    cell = nn.SimpleCell(2, param_dtype=jnp.float64)
    variables = nn.RNN(cell).init(KEY, x)["params"]["cell"]
    params = {"kernel": variables["i"]["kernel"], "recurrent_kernel": variables["h"]["kernel"], "bias": jnp.ones(2)}
    theirs = {"i": {"kernel": params["kernel"], "bias": params["bias"]}, "h": variables["h"]}
    expected = nn.RNN(cell).apply({"params": {"cell": theirs}}, x)
    np.testing.assert_allclose(linen.Recurrent(2).apply({"params": params}, x), expected, rtol=1e-12)
    model = flax.Recurrent(3, 2, rngs=nnx.Rngs(0))
    nnx.update(model, params)
    np.testing.assert_allclose(model(x), expected, rtol=1e-12)
    module = equinox.Recurrent(3, 2, key=KEY)
    arrays = params["kernel"].T, params["recurrent_kernel"].T, params["bias"]
    module = eqx.tree_at(lambda m: (m.weight, m.feedback, m.bias), module, arrays)
    np.testing.assert_allclose(module(x), expected, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in LAYERS if name.endswith("recurrent")])
def test_masks_and_initial_states(name):
    apply, params = LAYERS[name]()
    z0, taken = jnp.array([0.3, -0.2]), jnp.array([True, False, True, True, False])
    states = apply(params, SEQUENCE, z0, mask=taken)
    np.testing.assert_allclose(states[taken], apply(params, SEQUENCE[taken], z0), rtol=1e-13)
    np.testing.assert_array_equal(states[4], states[3])
    assert not np.allclose(states, apply(params, SEQUENCE))


def test_the_libraries_own_transformations():
    x = data(3)
    layer = flax.Dense(3, 2, activation=jaxhess.silu, rngs=nnx.Rngs(0))
    gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(layer(x) ** 2)))(layer, x)
    W, b = layer.kernel[...].T, layer.bias[...]
    expected = jax.grad(lambda W, b: jnp.sum(jaxhess.dense(W, b, x, jaxhess.silu) ** 2), (0, 1))(W, b)
    np.testing.assert_allclose(gradient["kernel"][...], expected[0].T, rtol=1e-5)
    np.testing.assert_allclose(gradient["bias"][...], expected[1], rtol=1e-5)
    module = equinox.Dense(3, 2, jaxhess.silu, key=KEY)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda module, x: jnp.sum(module(x) ** 2)))(module, x)
    expected = jax.grad(lambda W: jnp.sum(jaxhess.dense(W, module.bias, x, jaxhess.silu) ** 2))(module.weight)
    np.testing.assert_allclose(gradient.weight, expected, rtol=1e-12)
    model = eqx.nn.Sequential([module, equinox.Dense(2, 1, key=KEY)])
    assert jax.vmap(model)(x).shape == (3, 1)


def test_options():
    x = jnp.arange(3)
    plain = flax.Dense(3, 2, use_bias=False, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert plain.bias is None
    assert plain.kernel.dtype == jnp.bfloat16
    assert plain(x).dtype == jnp.bfloat16
    assert flax.Dense(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x).dtype == jnp.bfloat16
    assert flax.Recurrent(3, 2, use_bias=False, dtype=jnp.float64, rngs=nnx.Rngs(0))(x[None]).dtype == jnp.float64
    params = linen.Dense(2, use_bias=False, param_dtype=jnp.float64).init(KEY, x)["params"]
    assert {name: p.dtype for name, p in params.items()} == {"kernel": jnp.float64}
    assert set(linen.Recurrent(2, use_bias=False).init(KEY, x[None])["params"]) == {"kernel", "recurrent_kernel"}
    assert equinox.Dense(3, 2, use_bias=False, dtype=jnp.float32, key=KEY).bias is None
    assert equinox.Recurrent(3, 2, dtype=jnp.float32, key=KEY).feedback.dtype == jnp.float32
    named = nn.with_partitioning(jax.nn.initializers.ones, (None, "model"))
    boxed = linen.Dense(2, kernel_init=named).init(KEY, x)
    assert boxed["params"]["kernel"].names == (None, "model")
    np.testing.assert_array_equal(linen.Dense(2, kernel_init=named).apply(boxed, x), [3.0, 3.0])


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_shapes_are_refused_with_the_sizes(name):
    apply, params = LAYERS[name]()
    error = (InputError, Exception) if name.startswith("linen") else InputError  # linen checks its parameters' shapes first
    with pytest.raises(error, match=r"3.*4|4.*3"):
        apply(params, jnp.ones((5, 4)))


@pytest.mark.parametrize(("module", "library"), [("flax", "flax"), ("linen", "flax"), ("equinox", "equinox")])
def test_a_missing_library_names_the_extra(module, library, monkeypatch):
    real = builtins.__import__

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {library!r}")
        return real(name, globals, locals, fromlist, level)

    monkeypatch.delitem(sys.modules, f"jaxhess.interop.{module}")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"jaxhess.interop.{module} needs {library}.*pip install 'jaxhess\[{library}\]'"):
        importlib.import_module(f"jaxhess.interop.{module}")
