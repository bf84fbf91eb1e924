import os

import hypothesis
import jax
import pytest

# Most of the time would go into optimising programs that run once, on tiny arrays. A level set before holds.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    quick = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
    if jax.__version_info__ < (0, 11):  # XLA ends the process for a flag that it no longer has
        quick.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick]).strip()
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same cases in every run: a failure is of the change at hand. `--hypothesis-profile=search` looks for new ones.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=200)
hypothesis.settings.load_profile("same")


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code():
    yield
    jax.clear_caches()
