"""The page of what is supported says what the rules do, of every operation that they name; and what it says is so."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support_page
from jaxprs import equations
from support_cases import CASES
from support_plan import outcome

import jaxhess
from jaxhess._typing import InputError, UnsupportedOperationError
from jaxhess.engine import contractions, trace
from jaxhess.engine.rules import elementwise, linear, local

# Programs that are not optimised, as in conftest.py, make NaN of autodiff's derivative of this on the CPU.
NOT_QUICK = {"reduce_min"}
THOROUGH = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
FORMS = {
    "componentwise": elementwise.COMPONENTWISE,
    "indexing": linear.INDEXING - elementwise.COMPONENTWISE,
    "linear": linear.LINEAR - linear.INDEXING,
    "bilinear": local.BILINEAR,
    "contraction": contractions._CANDIDATES | {"dot_general"},
    "looked into": trace._CALLS,
    "along time": {"scan", "while"},
    "constant": elementwise._FLAGS_AND_STEPS,
}
STALE = f"docs/support.md is not what the rules say: run `{support_page.COMMAND}` and look at what has changed."


@pytest.mark.parametrize("kind", FORMS)
def test_every_name_in_the_rules_has_a_case_that_shows_it(kind):
    shown = {name for case in CASES for name in case.names if kind in outcome(case).kinds}
    assert not FORMS[kind] - shown


def test_every_kind_of_custom_rule_has_cases():
    found = {(name, kind) for case in CASES for name in case.names for kind in outcome(case).kinds or ("refused",)}
    for name in trace._CUSTOM:
        assert {(name, "componentwise"), (name, "local"), (name, "refused")} <= found


@pytest.mark.parametrize("case", [case for case in CASES if "psum" not in case.names], ids=str)
def test_a_case_has_its_primitive(case):
    """But for the sum over a batch that is not there, which cannot be traced."""
    jaxpr = jax.make_jaxpr(case.outputs)(case.params, *(a[0] for a in case.batch))
    assert {*case.names, *case.instead} & {equation.primitive.name for equation in equations(jaxpr.jaxpr)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exact_or_refused(case):
    if outcome(case).refused:
        assert_refused(case)
    else:
        assert_exact(case)


def assert_exact(case):
    @functools.partial(jax.jit, compiler_options=THOROUGH if NOT_QUICK.intersection(case.names) else {})
    def both(params, batch):
        def mean(params):
            return jnp.mean(jax.vmap(lambda example: case.error(params, *example))(batch))

        inner = jax.jacfwd if "while" in case.names else jax.jacrev  # JAX has no reverse mode there
        expected = jax.jacfwd(inner(mean))(params)
        H = jaxhess.hessian(case.error)(params, *batch)
        return {path: (block.as_matrix(), expected[path][path]) for path, block in H.items()}

    blocks = {path: tuple(map(np.asarray, pair)) for path, pair in both(case.params, case.batch).items()}
    largest = max(np.abs(expected).max() for _, expected in blocks.values())
    assert 1e-6 < largest < np.inf
    assert blocks.keys() == case.params.keys()
    for path, (found, expected) in blocks.items():
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=0, atol=case.tolerance * largest, err_msg=path)


def assert_refused(case):
    with pytest.raises((UnsupportedOperationError, InputError)) as caught:
        jaxhess.hessian(case.error)(case.params, *case.batch)
    message = str(caught.value)
    if isinstance(caught.value, UnsupportedOperationError):
        assert re.search(rf"\b({'|'.join(map(re.escape, case.names))})\b", message)
        assert re.search(r" at \S*support_cases\.py:\d+ \(", message)
    else:
        assert message.startswith(f"{case.error.__name__} mixes the examples")
    assert not re.search(r"\.py|\d", outcome(case).refused), "the page says no more than the reason"


def test_the_page_has_the_operations():
    assert support_page.operations() in support_page.PAGE.read_text(), STALE


def test_the_page_is_what_is_written_today():
    for library in ("equinox", "flax", "haiku"):
        pytest.importorskip(library)
    with jax.numpy_rank_promotion("allow"):
        assert support_page.PAGE.read_text() == support_page.page(), STALE
