import jax
import pytest


@pytest.fixture(autouse=True)
def _other_libraries_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield
