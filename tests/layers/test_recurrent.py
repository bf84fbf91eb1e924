"""The recurrent layer: Lemma 2 against autodiff of a plain loop, in every transformation, and its structure."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxprs import equations

from jaxhess import activations
from jaxhess._typing import InputError
from jaxhess.activations import Activation, identity, relu, sigmoid, softplus, tanh
from jaxhess.engine.loops import scan_sizes
from jaxhess.layers.dense import dense
from jaxhess.layers.recurrent import recurrent

OWN = [f for f in (getattr(activations, name) for name in activations.__all__) if isinstance(f, Activation)]
FOREIGN = [jax.nn.mish, jax.nn.softmax]
ALL = (0, 1, 2, 3, 4)


def _name(f):
    return getattr(f, "name", None) or getattr(f, "__name__", None)


def _loop(W, U, b, x, f=tanh, z=None, *, mask=None):
    """The definition, step by step."""
    z = jnp.broadcast_to(jnp.zeros(W.shape[:1], x.dtype) if z is None else z, (*x.shape[:-2], W.shape[0]))
    states = []
    for s in range(x.shape[-2]):
        y = jnp.einsum("mn,...n->...m", W, x[..., s, :]) + jnp.einsum("mp,...p->...m", U, z)
        new = f(y if b is None else y + jnp.broadcast_to(b, y.shape))
        z = new if mask is None else jnp.where(mask[..., s, None], new, z)
        states.append(z)
    return jnp.stack(states, -2)


def _arrays(m=3, n=2, tau=4, batch=(), bias=True, state=True, seed=0):
    random = np.random.default_rng(seed)
    shapes = (m, n), (m, m), (m,), (*batch, tau, n), (*batch, m)
    W, U, b, x, z0 = (jnp.asarray(random.normal(size=shape)) for shape in shapes)
    return W, U, b if bias else None, x, z0 if state else None


def _mask(batch, tau, seed=3):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(*batch, tau)) < 0.6)


def _close(actual, expected, tolerance=1e-12):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance * max(1.0, float(np.max(np.abs(e), initial=0))))


def _error(layer, f=tanh, mask=None):
    """A scalar of all states whose gradient and curvature with respect to them are not constant."""

    def error(W, U, b, x, z0=None):
        states = layer(W, U, b, x, f, z0, mask=mask)
        return jnp.sum(jnp.sin(states) * jnp.arange(1.0, states.size + 1).reshape(states.shape))

    return error


def _both(transform, *arguments, f=tanh, mask=None):
    """A transformation of the error of the layer and of the loop, applied to the arguments."""
    return jax.jit(lambda *a: [transform(_error(layer, f, mask))(*a) for layer in (recurrent, _loop)])(*arguments)


# --- values and derivatives


@pytest.mark.parametrize("f", [*OWN, *FOREIGN], ids=_name)
@settings(max_examples=2)
@given(
    m=st.integers(1, 4),
    n=st.integers(1, 3),
    tau=st.integers(1, 4),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    bias=st.booleans(),
    state=st.booleans(),
    masked=st.booleans(),
)
def test_value_gradient_and_tangent(f, m, n, tau, batch, bias, state, masked):
    arrays, tangents = (_arrays(m, n, tau, batch, bias, state, seed) for seed in (0, 1))
    mask = _mask(batch, tau) if masked else None
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(*batch, tau, m)))

    @jax.jit
    def first_order(arrays, tangents, cotangent):
        results = []
        for layer in (recurrent, _loop):
            function = lambda W, U, b, x, z0, layer=layer: layer(W, U, b, x, f, z0, mask=mask)  # noqa: E731
            states, pullback = jax.vjp(function, *arrays)
            tangent = jax.linearize(function, *arrays)[1](*tangents)
            results.append((states, pullback(cotangent), jax.jvp(function, arrays, tangents)[1], tangent))
        return results

    ours, theirs = first_order(arrays, tangents, cotangent)
    assert ours[0].shape == (*batch, tau, m)
    _close(ours, theirs)


@pytest.mark.parametrize(
    ("f", "masked"), [(tanh, False), (tanh, True), (relu, True), (identity, False), (jax.nn.softmax, True)], ids=_name
)
def test_hessian_and_jacobians(f, masked):
    arrays = _arrays(m=2, n=1, tau=3, batch=(2,))
    mask = jnp.array([[True, True, False], [False, True, True]]) if masked else None
    twice = (jax.jacrev, jax.jacrev), (jax.jacfwd, jax.jacfwd)
    transforms = [
        lambda e: jax.hessian(e, ALL),
        lambda e: jax.jacfwd(e, ALL),
        *(lambda e, outer=outer, inner=inner: outer(inner(e, 1), 1) for outer, inner in twice),
    ]
    ours, theirs = _both(lambda e: lambda *a: [t(e)(*a) for t in transforms], *arrays, f=f, mask=mask)
    _close(ours, theirs)


@pytest.mark.parametrize("f", [softplus, jax.nn.softmax], ids=_name)
def test_third_derivative_along_a_line(f):
    arrays, directions = _arrays(tau=3, batch=(2,)), _arrays(tau=3, batch=(2,), seed=1)

    def third(error):
        along = lambda t: error(*(a + t * d for a, d in zip(arrays, directions, strict=True)))  # noqa: E731
        forward, reverse = along, along
        for _ in range(3):
            forward, reverse = jax.jacfwd(forward), jax.grad(reverse)
        return lambda t: (forward(t), reverse(t))

    ours, theirs = _both(third, 0.0, f=f, mask=_mask((2,), 3))
    _close(ours, theirs, 1e-11)


@pytest.mark.parametrize("depth", [2, 3])
def test_stacked_layers(depth):
    """The derivative with respect to z^(1,s) goes through the layers above at all later steps."""
    random = np.random.default_rng(0)
    widths = [2, 3, 2, 3][: depth + 1]
    params = [
        tuple(jnp.asarray(random.normal(size=shape)) for shape in ((m, n), (m, m), (m,)))
        for n, m in itertools.pairwise(widths)
    ]
    x, mask = jnp.asarray(random.normal(size=(2, 4, 2))), _mask((2,), 4)

    def error(layer):
        def of_params(params):
            z = x
            for W, U, b in params:
                z = layer(W, U, b, z, sigmoid, mask=mask)
            return jnp.sum(jnp.sin(z[:, -1]))

        return of_params

    gradients = jax.jit(lambda p: [jax.grad(error(layer))(p) for layer in (recurrent, _loop)])(params)
    _close(*gradients)
    if depth == 2:
        first = lambda layer: lambda U: error(layer)([(params[0][0], U, params[0][2]), params[1]])  # noqa: E731
        _close(*jax.jit(lambda U: [jax.hessian(first(layer))(U) for layer in (recurrent, _loop)])(params[0][1]))


# --- transformations


@pytest.mark.parametrize("f", [tanh, jax.nn.softmax], ids=_name)
def test_eager_jit_remat(f):
    arrays = _arrays(batch=(2,))
    gradient = jax.grad(_error(recurrent, f), ALL)
    expected = jax.jit(jax.grad(_error(_loop, f), ALL))(*arrays)
    _close(gradient(*arrays), expected)
    _close(jax.jit(gradient)(*arrays), expected)
    _close(jax.jit(jax.grad(jax.checkpoint(_error(recurrent, f)), ALL))(*arrays), expected)


@pytest.mark.parametrize("masked", [False, True])
def test_vmap_over_examples_and_weights(masked):
    W, U, b, x, z0 = _arrays(batch=(3,))
    mask = _mask((3,), 4) if masked else None

    def per_example(layer):
        error = lambda W, U, b, x, z0, mask: _error(layer, mask=mask)(W, U, b, x, z0)  # noqa: E731
        axes = (None, None, None, 0, 0, 0 if masked else None)
        summed = lambda *a: jnp.sum(jax.vmap(error, axes)(*a))  # noqa: E731
        derivatives = jax.vmap(jax.grad(error, ALL), axes), jax.grad(summed, ALL), jax.vmap(jax.jacfwd(error, 1), axes)
        return lambda *a: [d(*a) for d in derivatives]

    ours, theirs = jax.jit(lambda *a: [per_example(layer)(*a) for layer in (recurrent, _loop)])(W, U, b, x, z0, mask)
    _close(ours, theirs)
    ensemble = lambda e: jax.vmap(jax.grad(e, (0, 1)), (0, 0, None, None, None))  # noqa: E731
    _close(*_both(ensemble, jnp.stack([W, -W]), jnp.stack([U, 2 * U]), b, x, z0, mask=mask))


@pytest.mark.parametrize("remat", [False, True])
def test_inside_a_scan(remat):
    """An outer loop over chunks of a sequence that hands the last state on: the states of the whole sequence."""
    W, U, b, x, z0 = _arrays(tau=4)

    def chunked(W, U, b, x, z0):
        def step(z, chunk):
            states = recurrent(W, U, b, chunk, tanh, z)
            return states[-1], states

        step = jax.checkpoint(step) if remat else step
        return jax.lax.scan(step, z0, x.reshape(2, 2, 2))[1].reshape(4, 3)

    whole = lambda W, U, b, x, z0: _loop(W, U, b, x, tanh, z0)  # noqa: E731
    for transform in (
        lambda s: jax.grad(lambda *a: jnp.sum(s(*a) ** 3), ALL),
        lambda s: jax.jacfwd(s, 1),
        lambda s: jax.hessian(lambda *a: jnp.sum(s(*a) ** 3), 1),
    ):
        _close(*jax.jit(lambda *a, t=transform: [t(s)(*a) for s in (chunked, whole)])(W, U, b, x, z0))


def test_over_a_dense_layer():
    W, U, b, x, z0 = _arrays(batch=(2,))
    V = jnp.asarray(np.random.default_rng(5).normal(size=(2, 2)))

    def error(layer):
        return lambda V, W, U: jnp.sum(layer(W, U, b, dense(V, None, x, tanh), tanh, z0)[:, -1] ** 2)

    ours, theirs = jax.jit(lambda *a: [jax.hessian(error(layer), (0, 1, 2))(*a) for layer in (recurrent, _loop)])(V, W, U)
    _close(ours, theirs)


# --- mask and initial state


def test_masked_steps_hold_the_state():
    W, U, b, x, z0 = _arrays(tau=5, batch=(3,))
    lengths = np.array([2, 5, 0])
    mask = jnp.asarray(np.arange(5) < lengths[:, None])
    states = recurrent(W, U, b, x, tanh, z0, mask=mask)
    for i, length in enumerate(lengths):
        alone = recurrent(W, U, b, x[i, :length], tanh, z0[i])[-1] if length else z0[i]
        _close(states[i, -1], alone)
    _close(recurrent(W, U, b, x, tanh, z0, mask=jnp.ones((3, 5), bool)), recurrent(W, U, b, x, tanh, z0))


@pytest.mark.parametrize("shape", [(), (4,), (1,), (3, 1), (1, 4), (2, 3, 4), (2, 1, 4)])
def test_mask_broadcasts(shape):
    W, U, b, x, z0 = _arrays(batch=(2, 3))
    mask = jnp.asarray(np.random.default_rng(1).uniform(size=shape) < 0.5)
    full = jnp.broadcast_to(mask, (2, 3, 4))
    _close(recurrent(W, U, b, x, tanh, z0, mask=mask), _loop(W, U, b, x, tanh, z0, mask=full))


@pytest.mark.parametrize("f", [tanh, relu, jax.nn.softmax], ids=_name)
@pytest.mark.parametrize("padding", [np.nan, np.inf])
def test_what_is_left_out_may_be_anything(f, padding):
    W, U, b, x, z0 = _arrays(batch=(2,))
    mask = jnp.array([[True, True, False, False], [True, False, True, True]])
    padded = jnp.where(mask[..., None], x, padding)
    for transform in (
        lambda e: jax.value_and_grad(e, ALL),
        lambda e: jax.jacfwd(e, ALL),
        lambda e: jax.hessian(e, 1),
    ):
        result = jax.jit(transform(_error(recurrent, f, mask)))
        _close(result(W, U, b, padded, z0), result(W, U, b, x, z0))
    assert not np.any(jax.grad(_error(recurrent, f, mask), 3)(W, U, b, padded, z0)[~mask])


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3), (4, 1, 3), (4, 2, 3)])
def test_initial_state_broadcasts(shape):
    W, U, b, x, _ = _arrays(batch=(4, 2))
    z0 = jnp.asarray(np.random.default_rng(1).normal(size=shape))
    gradients = _both(lambda e: jax.value_and_grad(e, ALL), W, U, b, x, z0)
    assert gradients[0][1][4].shape == shape
    _close(*gradients)


def test_no_initial_state_is_zero():
    W, U, b, x, _ = _arrays(batch=(2,))
    _close(recurrent(W, U, b, x), recurrent(W, U, b, x, tanh, jnp.zeros(3)))


# --- structure: what Lemma 2 and Corollary 3 save


def _gradient_jaxpr(argnums, *arrays, f=tanh, mask=None):
    return jax.make_jaxpr(jax.grad(_error(recurrent, f, mask), argnums))(*arrays).jaxpr


def _named(jaxpr, name):
    return [e for e in equations(jaxpr) if e.primitive.name == name]


def _carry_and_products(scan):
    constants, carried = scan_sizes(scan)
    carry = scan.invars[constants:][:carried]
    return [v.aval.shape for v in carry], len(_named(scan.params["jaxpr"].jaxpr, "dot_general"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_backward_scan_carries_the_state_cotangent_alone(batch, masked):
    arrays = _arrays(batch=batch)
    jaxpr = _gradient_jaxpr(ALL, *arrays, mask=_mask(batch, 4) if masked else None)
    forward, backward = _named(jaxpr, "scan")
    assert _carry_and_products(forward) == ([(*batch, 3)], 1)
    assert backward.params["reverse"]
    assert _carry_and_products(backward) == ([(*batch, 3)], 1)


@pytest.mark.parametrize(("argnums", "after"), [((0, 1, 2), 2), (ALL, 3), (1, 1), (2, 0), (3, 1), (4, 0)])
def test_one_product_each_over_time_and_batch(argnums, after):
    """Outside of the scans: W x forward, then one product each for W, U and x, none for b and the initial state."""
    jaxpr = _gradient_jaxpr(argnums, *_arrays(batch=(5,)))
    inside = sum(_carry_and_products(scan)[1] for scan in _named(jaxpr, "scan"))
    products = _named(jaxpr, "dot_general")
    assert inside == 2
    assert len(products) - inside == 1 + after


def test_one_product_each_under_vmap():
    W, U, b, x, z0 = _arrays(batch=(5,))
    error = lambda W, U, b: jnp.sum(jax.vmap(lambda x, z0: _error(recurrent)(W, U, b, x, z0))(x, z0))  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(error, (0, 1, 2)))(W, U, b).jaxpr
    assert [_carry_and_products(scan) for scan in _named(jaxpr, "scan")] == [([(5, 3)], 1)] * 2
    assert len(_named(jaxpr, "dot_general")) == 2 + 1 + 2


@pytest.mark.parametrize("f", [tanh, identity], ids=_name)
def test_reverse_mode_keeps_states_slopes_and_inputs(f):
    W, U, b, x, _ = _arrays(m=3, n=2, tau=4, batch=(5,))
    pullback = jax.vjp(lambda W, U, b: recurrent(W, U, b, x, f), W, U, b)[1]
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(pullback))
    slopes = [] if f is identity else [(4, 5, 3)]
    zero_tangent_of_initial_state = (5, 3)
    assert kept == sorted([(3, 3), (4, 5, 2), (4, 5, 3), *slopes, zero_tangent_of_initial_state])


def test_graph_shows_one_named_call():
    W, U, b, x, z0 = _arrays()
    (call,) = jax.make_jaxpr(lambda *a: recurrent(*a[:4], tanh, a[4]))(W, U, b, x, z0).jaxpr.eqns
    assert call.primitive.name == "custom_jvp_call"
    (inner,) = call.params["call_jaxpr"].jaxpr.eqns
    assert inner.params["name"] == "jaxhess_recurrent"
    names = [e.primitive.name for e in inner.params["jaxpr"].jaxpr.eqns]
    assert names == ["dot_general", "broadcast_in_dim", "add", "scan"]
    scan = inner.params["jaxpr"].jaxpr.eqns[-1]
    assert scan_sizes(scan) == (1, 1)
    assert [e.primitive.name for e in scan.params["jaxpr"].jaxpr.eqns] == ["dot_general", "add", "custom_jvp_call"]


def test_same_activation_is_traced_once():
    traces = []

    def f(y):
        traces.append(y)
        return y * y

    square = Activation(f, lambda y: 2 * y, lambda y: 2 + 0 * y, "square")
    arrays = _arrays()[:4]
    layer = jax.jit(lambda *a: recurrent(*a, square))
    layer(*arrays)
    recurrent(*arrays, square)
    first = len(traces)
    for _ in range(3):
        layer(*arrays)
        recurrent(*arrays, square)
    assert len(traces) == first > 0


# --- numbers


def test_saturated_tanh_keeps_its_gradient_in_float32():
    one, x = jnp.ones((1, 1), jnp.float32), jnp.full((1, 1), 20, jnp.float32)
    slope = jax.grad(lambda b: recurrent(one, one, b, x)[0, 0])(jnp.zeros(1, jnp.float32))
    np.testing.assert_allclose(slope, 4 * np.exp(-40.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    arrays = [a.astype(dtype) / 2 for a in _arrays(batch=(2,))]
    mask = _mask((2,), 4)
    W, U, b, x, z0 = arrays
    states = recurrent(W, U, b, x, tanh, z0, mask=mask)
    assert states.dtype == dtype
    exact = [a.astype(jnp.float64) for a in arrays]
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    _close(states.astype(jnp.float64), _loop(*exact[:4], tanh, exact[4], mask=mask), tolerance)
    total = lambda W: recurrent(W, U, b, x, tanh, z0, mask=mask).sum()  # noqa: E731
    for transform in (jax.grad, jax.jacfwd, jax.hessian):
        assert jax.jit(transform(total))(W).dtype == dtype
    for wider in range(5):
        mixed = [a.astype(jnp.float64) if i == wider else a for i, a in enumerate(arrays)]
        assert recurrent(*mixed[:4], tanh, mixed[4]).dtype == jnp.float64


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": (3,)}, r"weight must have shape \(m, n\), got \(3,\)"),
        ({"feedback": (3, 2)}, r"feedback must have shape \(3, 3\), got \(3, 2\)"),
        ({"feedback": (2, 2)}, r"feedback must have shape \(3, 3\), got \(2, 2\)"),
        ({"bias": (2,)}, r"bias must have shape \(3,\), got \(2,\)"),
        ({"inputs": (5, 4, 3)}, r"last axis of inputs must be 2, got \(5, 4, 3\)"),
        ({"inputs": ()}, r"last axis of inputs must be 2, got \(\)"),
        ({"inputs": (2,), "mask": None}, r"inputs must have shape \(..., tau, 2\), got \(2,\)"),
        ({"inputs": (5, 0, 2)}, r"at least one time step, got \(5, 0, 2\)"),
        ({"initial_state": (5,)}, r"initial_state must broadcast from \(..., 3\) to \(5, 3\), got \(5,\)"),
        ({"initial_state": (1,)}, r"initial_state must broadcast from \(..., 3\) to \(5, 3\), got \(1,\)"),
        ({"initial_state": ()}, r"initial_state must broadcast from \(..., 3\) to \(5, 3\), got \(\)"),
        ({"initial_state": (4, 3)}, r"initial_state must broadcast from \(..., 3\) to \(5, 3\), got \(4, 3\)"),
        ({"initial_state": (1, 5, 3)}, r"initial_state must broadcast from \(..., 3\) to \(5, 3\), got \(1, 5, 3\)"),
        ({"mask": (5,)}, r"mask must broadcast to \(5, 4\), got \(5,\)"),
        ({"mask": (5, 4, 3)}, r"mask must broadcast to \(5, 4\), got \(5, 4, 3\)"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    shapes = {"weight": (3, 2), "feedback": (3, 3), "bias": None, "inputs": (5, 4, 2), "initial_state": (3,), "mask": (5, 4)}
    shapes |= changes
    given = {
        name: None if shape is None else jnp.ones(shape, bool if name == "mask" else None) for name, shape in shapes.items()
    }
    with pytest.raises(InputError, match=message) as caught:
        recurrent(**given)
    for name, shape in shapes.items():
        assert f"{name} {shape}" in str(caught.value)


def test_other_refusals():
    W, U, b, x, z0 = _arrays()
    with pytest.raises(InputError, match=r"recurrent: inputs must be floating-point, got int.*inputs \(4, 2\)"):
        recurrent(W, U, b, jnp.ones((4, 2), int))
    with pytest.raises(InputError, match=r"initial_state must be floating-point, got bool"):
        recurrent(W, U, b, x, tanh, z0 > 0)
    with pytest.raises(InputError, match=r"mask must be boolean, got float64.*mask \(4,\)"):
        recurrent(W, U, b, x, mask=jnp.ones(4))
    with pytest.raises(InputError, match="keep the shape"):
        recurrent(W, U, b, x, jnp.sum)
    with pytest.raises(InputError, match="traced values"):
        jax.grad(lambda a: recurrent(W, U, b, x, lambda y: a * y).sum())(1.0)

    class Unhashable:
        __hash__ = None

        def __call__(self, y):
            return y

    with pytest.raises(InputError, match="recurrent: activation must be hashable"):
        recurrent(W, U, b, x, Unhashable())
