"""The guard against the CPU backend's wrong sums."""

import os
import subprocess
import sys

import pytest

from jaxhess import _backend

SUM = """
import jax, numpy as np
{first}
import jaxhess
p, v = np.random.default_rng(0).normal(size=(1, 32, 20, 10)), np.random.default_rng(1).normal(size=(8, 32, 20, 10))
p, v = p.astype(np.float32), v.astype(np.float32)
found = jax.jit(lambda p, v: v - (p * v).sum(-1, keepdims=True))(p, v)
print(np.abs(np.asarray(found) - (v - (p * v).sum(-1, keepdims=True))).max() < 1e-4)
"""


def run(first, **settings):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | settings
    result = subprocess.run([sys.executable, "-c", SUM.format(first=first)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_sums_are_right_once_jaxhess_is_imported():
    assert run("") == "True"


def test_a_setting_of_the_users_own_stays():
    option = "--xla_cpu_experimental_ynn_fusion_type=dot"
    for flags in (option, f"--other {option}"):
        settings = {"XLA_FLAGS": flags}
        _backend.avoid_wrong_sums(settings, "0.10.2")
        assert settings == {"XLA_FLAGS": flags}


@pytest.mark.parametrize(("version", "expected"), [("0.9.0", {}), ("0.10.1", {}), ("99.0.0", {})])
def test_other_versions_are_left_alone(version, expected):
    settings = {}
    _backend.avoid_wrong_sums(settings, version)
    assert settings == expected


def test_options_are_added_to_those_there_are():
    settings = {"XLA_FLAGS": "--other"}
    _backend.avoid_wrong_sums(settings, "0.10.2")
    assert settings == {"XLA_FLAGS": "--other --xla_cpu_experimental_ynn_fusion_type=-reduce"}


def test_wrong_sums_are_told(monkeypatch):
    _backend.warn_of_wrong_sums.cache_clear()
    _backend.warn_of_wrong_sums()
    _backend.warn_of_wrong_sums.cache_clear()
    monkeypatch.setattr(_backend, "_TOLERANCE", -1.0)
    with pytest.warns(RuntimeWarning, match="XLA_FLAGS"):
        _backend.warn_of_wrong_sums()
    _backend.warn_of_wrong_sums.cache_clear()
