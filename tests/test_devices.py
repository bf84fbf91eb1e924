"""Sharded batches give the same result, and everything lowers for accelerators that are not here."""

import os
import subprocess
import sys

import jax
import jax.export
import pytest
from models import MODELS, inputs, normal

import jaxhess

SHARDED = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import jaxhess

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in {"w": (5, 4), "b": 5, "v": (3, 5)}.items()}
x, t = jnp.asarray(rng.normal(size=(16, 4))), jnp.asarray(rng.normal(size=(16, 3)))

def error(p, x, t):
    return jaxhess.losses.squared_error(p["v"] @ jaxhess.dense(p["w"], p["b"], x, jaxhess.tanh), t)

expected = jaxhess.hessian(error)(params, x, t)
batch = jax.device_put((x, t), NamedSharding(mesh, PartitionSpec("examples")))
found = jax.jit(jaxhess.hessian(error))(params, *batch)
assert len(found["w"].Q.sharding.device_set) == 8
np.testing.assert_allclose(found.as_matrix(), expected.as_matrix(), rtol=1e-12, atol=1e-12)
np.testing.assert_allclose(found.mv(params)["w"], expected.mv(params)["w"], rtol=1e-12, atol=1e-12)

def through_time(p, x, t):
    states = jaxhess.recurrent(p["w"], p["u"], p["b"], x.reshape(2, 2))
    return jaxhess.losses.squared_error(p["v"] @ states[-1], t)

params = {"w": params["w"][:, :2], "u": jnp.asarray(rng.normal(size=(5, 5))), "b": params["b"], "v": params["v"]}
expected = jaxhess.hessian(through_time)(params, x, t)
found = jax.jit(jaxhess.hessian(through_time))(params, *batch)
assert len(found["u"].term.uses[0].outputs.sharding.device_set) == 8
np.testing.assert_allclose(found.as_matrix(), expected.as_matrix(), rtol=1e-11, atol=1e-11)
"""

TRAINING = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jax.numpy as jnp
import jaxhess
from jaxhess import optimizers

mesh = jax.make_mesh((8,), ("examples",), axis_types=(AxisType.Auto,))
rng = np.random.default_rng(0)
params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in {"w": (8, 4), "b": 8, "v": (3, 8)}.items()}
batch = jnp.asarray(rng.normal(size=(16, 4))), jnp.asarray(rng.normal(size=(16, 3)))

def model(p, x):
    return p["v"] @ jnp.tanh(p["w"] @ x + p["b"])

for optimizer in (optimizers.kronecker_newton(), optimizers.gauss_newton(), optimizers.newton()):
    train = optimizers.step((model, jaxhess.losses.squared_error), optimizer)

    def trained(params, batch):
        state = optimizer.init(params)
        for _ in range(3):
            params, state, metrics = train(params, state, *batch)
        return params, metrics

    expected, metrics = trained(params, batch)
    by_rows = NamedSharding(mesh, PartitionSpec("examples"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    for placed, shared in (
        (jax.device_put(params, everywhere), jax.device_put(batch, by_rows)),
        (jax.device_put(params, {"w": by_rows, "b": by_rows, "v": everywhere}), jax.device_put(batch, everywhere)),
    ):
        found, metrics_there = trained(placed, shared)
        np.testing.assert_allclose(metrics_there.loss, metrics.loss, rtol=1e-9)
        for name in params:
            assert len(found[name].sharding.device_set) == 8
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-9)
"""


@pytest.mark.parametrize("program", [SHARDED, TRAINING], ids=["curvature", "training"])
def test_a_sharded_batch_gives_the_same(program):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def recurrent():
    def error(p, x, t):
        states = jaxhess.recurrent(p["w"], p["u"], p["b"], x.reshape(2, 2))
        return jaxhess.losses.squared_error(states[-1], t)

    return error, {"w": normal(0, 3, 2), "u": normal(1, 3, 3), "b": normal(2, 3)}, inputs()


@pytest.mark.parametrize(
    "make", [recurrent, *(MODELS[name] for name in ("perceptron", "tied_weights", "attention", "gates_and_layer_norm"))]
)
def test_lowers_for_gpu_and_tpu(make):
    error, params, batch = make()
    params, batch = jax.tree.map(lambda a: a.astype("float32") if a.dtype == "float64" else a, (params, batch))

    def readings(params, batch):
        H = jaxhess.hessian(error)(params, *batch)
        return H.mv(params), H.diagonal(), H.trace()

    exported = jax.export.export(jax.jit(readings), platforms=("cuda", "tpu"))(params, batch)
    assert exported.platforms == ("cuda", "tpu")
