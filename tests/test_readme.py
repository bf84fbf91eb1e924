"""The code in the README runs as it stands there."""

import pathlib
import re

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from flax import nnx

import jaxhess

TEXT = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_python_blocks_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 3
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "hidden": {"w": jax.random.normal(keys[0], (6, 5)), "b": jnp.zeros(6)},
        "out": {"w": 0.1 * jax.random.normal(keys[1], (3, 6)), "b": jnp.zeros(3)},
    }
    xs, labels = jax.random.normal(keys[2], (8, 5)), jnp.arange(8) % 3
    names = {"jax": jax, "jnp": jnp, "lx": lx, "jaxhess": jaxhess, "params": params, "xs": xs, "labels": labels}
    shapes = {"w": (6, 5), "u": (6, 6), "b": (6,), "v": (2, 6)}
    names["cell"] = {name: 0.3 * jnp.sin(jnp.arange(1.0, 1 + np.prod(s))).reshape(s) for name, s in shapes.items()}
    names |= {"sequences": jax.random.normal(keys[0], (4, 7, 5)), "targets": jnp.ones((4, 2))}
    names["v"] = jax.tree.map(jnp.ones_like, params)
    names |= {"nnx": nnx, "optax": optax}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["H"], jaxhess.operators.FullHessian)
    assert repr(names["R"]["u"]).startswith("ImplicitKroneckerSum(36 x 36")
    assert jax.tree.structure(names["step"]) == jax.tree.structure(params)


def test_the_first_two_commands_do_everything():
    commands = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    assert "examples/digits.py" in commands[0]
    assert "pytest" in commands[1]
