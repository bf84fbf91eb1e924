"""Scalar functions and their derivatives in forms that keep their relative accuracy where they saturate.

Textbook forms subtract numbers that agree to all digits once an activation saturates (tanh' = 1 - tanh^2 is 0 in
float32 from |y| = 9 on), or round the argument of an exponential, which costs its absolute size in relative accuracy.
Four remedies are used throughout, with `a = |y|`:

* tails are written through `exp(-a)`, and large exponents as `h * (..) * h` with `h = exp(-exponent / 2)`, so that no
  factor underflows before the result does;
* an exponent is held as a short number, which the argument of `exp` represents exactly, plus a small remainder;
* near a zero at `a0` the common factor `d = a0 - a` is divided out by hand (a0 is stored to twice the precision), so
  that the sign change happens in `d` and nowhere else;
* `f'(y)` of the gated functions `y s(y)`, `s(y) + s(-y) = 1`, is computed for y <= 0 only: `f'(y) = 1 - f'(-y)`.

Every function here is component-wise to a reader of the traced graph: its operations act on arrays of one shape and on
scalar literals. NaN gives NaN, also where the value does not otherwise depend on y.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxhess._typing import Array

ComponentWise = Callable[[Array], Array]
Pair = tuple[float, float]  # a real number as the unevaluated sum of two float64


def with_derivative(function: ComponentWise, slope: ComponentWise) -> ComponentWise:
    """`function`, differentiated as `slope` says in place of its own operations."""

    # One argument, whatever defaults the function has for others: custom_jvp would differentiate those too.
    @functools.wraps(function)
    def of_one(y: Array, /) -> Array:
        return function(y)

    del of_one.__wrapped__
    result = jax.custom_jvp(of_one)
    result.defjvps(lambda tangent, _, y: slope(y) * tangent)
    return result


def in_float32(function: ComponentWise, name: str) -> ComponentWise:
    """`function` under that name, computed in float32 for arguments of half precision and rounded once at the end."""

    def wrapped(y: Array) -> Array:
        if jnp.finfo(y.dtype).bits >= 32:
            return function(y)
        return function(y.astype(jnp.float32)).astype(y.dtype)

    wrapped.__name__ = wrapped.__qualname__ = name
    return wrapped


def _from_root(root: Pair, a: Array) -> Array:
    """`root - a` to full relative accuracy on both sides of the root.

    The remainder enters in proportion to a (the same at the root): XLA would fold it into the first constant otherwise.
    """
    high = float(np.asarray(root[0], a.dtype))
    low = (root[0] - high) + root[1]
    return (high - a) + (low / high) * a


def _exp_of_sum(x: Array, small: Array) -> Array:
    """exp(x + small) without the rounding of the sum; XLA would merge exp(x) exp(small) into the exp of the sum."""
    e = jnp.exp(x)
    return e + e * jnp.expm1(small)


def _short(a: Array) -> Array:
    """a rounded to half of its significant digits: products of two such numbers are exact, fused or not."""
    info = jnp.finfo(a.dtype)
    return jax.lax.reduce_precision(a, exponent_bits=info.nexp, mantissa_bits=(info.nmant - 1) // 2)


def _split_constant(value: Pair, dtype: np.dtype) -> Pair:
    """A constant as a short number plus the remainder."""
    digits = (jnp.finfo(dtype).nmant - 1) // 2 + 1
    scale = 2.0 ** (digits - np.frexp(value[0])[1])
    short = float(np.round(value[0] * scale) / scale)
    return short, (value[0] - short) + value[1]


# --- identity, relu, leaky_relu, elu: sign(y) carries NaN into derivatives that are otherwise constant


def zero(y: Array) -> Array:
    """0, and NaN for NaN."""
    return 0 * jnp.abs(jnp.sign(y))


def one(y: Array) -> Array:
    return 1 + zero(y)


def relu(y: Array) -> Array:
    return jnp.maximum(y, 0)


def relu_d1(y: Array) -> Array:
    return jnp.maximum(jnp.sign(y), 0)


def leaky_relu(y: Array) -> Array:
    return jnp.maximum(y, 0) + 0.01 * jnp.minimum(y, 0)


def leaky_relu_d1(y: Array) -> Array:
    below = jnp.minimum(jnp.sign(y), 0)
    return (1 + below) - 0.01 * below


def elu(y: Array) -> Array:
    return jnp.maximum(y, 0) + jnp.expm1(jnp.minimum(y, 0))


def elu_d1(y: Array) -> Array:
    return jnp.exp(jnp.minimum(y, 0))


def elu_d2(y: Array) -> Array:
    return jnp.exp(jnp.minimum(y, 0)) * (1 - relu_d1(y))


# --- tanh, sigmoid, softplus: sech(y) = 2 e / (1 + e^2) and s'(y) = e / (1 + e)^2 with e = exp(-|y|).


def _sech(y: Array) -> Array:
    e = jnp.exp(-jnp.abs(y))
    # 1 + e^2, but XLA would make a second exponential of the product of e with itself.
    return 2 * e / ((1 + e) * (1 + e) - 2 * e)


sech = with_derivative(_sech, lambda y: -sech(y) * jnp.tanh(y))


def tanh_d1(y: Array) -> Array:
    s = sech(y)
    return s * s


def tanh_d2(y: Array) -> Array:
    s = sech(y)
    return -2 * jnp.tanh(y) * s * s


def sigmoid(y: Array) -> Array:
    return jax.lax.logistic(y)


def _sigmoid_d1(y: Array) -> Array:
    e = jnp.exp(-jnp.abs(y))
    return e / ((1 + e) * (1 + e))


def sigmoid_d2(y: Array) -> Array:
    return -sigmoid_d1(y) * jnp.tanh(y / 2)


sigmoid_d1 = with_derivative(_sigmoid_d1, sigmoid_d2)


def softplus(y: Array) -> Array:
    return jnp.maximum(y, 0) + jnp.log1p(jnp.exp(-jnp.abs(y)))


# --- silu = y s(y). With d = a0 - a and e^-a0 = a0 - 1:  f'(-a) = s'(a) (d + e^-a0 expm1(d)),
#     f''(a) = s'(a) (2 - a tanh(a/2)) = s'(a) (t1 d + a tanh(d/2) (1 - t1 tanh(a/2))) with d = a1 - a, t1 = 2 / a1.

_SILU_D1_ROOT = (1.2784645427610737, 1.0946994183093437e-16)
_SILU_D2_ROOT = (2.3993572805154675, 1.8464872855353363e-16)
_FAR = 1600.0  # exp(-_FAR / 2) is 0 in float64, and the polynomials below cannot overflow in float32


def _gated_d1(tail: ComponentWise, far: float) -> ComponentWise:
    """f'(y) of a gated function from `tail(a) = f'(-a)`; beyond `far` the tail is 0."""

    def slope(y: Array) -> Array:
        below = tail(jnp.minimum(jnp.abs(y), far))
        return jax.lax.select(y < 0, below, 1 - below)

    return slope


def silu(y: Array) -> Array:
    return y * jax.lax.logistic(y)


def _silu_tail(a: Array) -> Array:
    h, d = jnp.exp(-a / 2), _from_root(_SILU_D1_ROOT, a)
    q = 1 + h * h
    return h * ((d + (_SILU_D1_ROOT[0] - 1) * jnp.expm1(d)) / (q * q)) * h


silu_d1 = _gated_d1(_silu_tail, _FAR)


def silu_d2(y: Array) -> Array:
    a = jnp.minimum(jnp.abs(y), _FAR)
    h, d, t = jnp.exp(-a / 2), _from_root(_SILU_D2_ROOT, a), 2 / _SILU_D2_ROOT[0]
    q = 1 + h * h
    return h * ((t * d + a * jnp.tanh(d / 2) * (1 - t * jnp.tanh(a / 2))) / (q * q)) * h


# --- gelu = y Phi(y), phi = Phi'. With the Mills ratio M = (1 - Phi) / phi:  f'(-a) = phi(a) (M(a) - a), and
#     M(a) - a = d G(a), G positive, as a Chebyshev series in q = (a - 5) / (a + 5).  f''(a) = phi(a) (2 - a^2).

_GELU_FAR = 64.0
_GELU_D1_ROOT = (0.7517915246935645, -1.4956759177009883e-17)
_GELU_D2_ROOT = (1.4142135623730951, -9.667293313452913e-17)
_INVERSE_SQRT_2PI = 0.3989422804014327
_GELU_SERIES = (
    *(1.2259182622406541, -0.30393785499390014, 0.10080911941980679, -0.02834394150977215, 0.006648706164325906),
    *(-0.0012562643746282273, 0.0001762481522962657, -1.3934341854313243e-05, -6.54352032292436e-07),
    *(3.4603378634424706e-07, -2.8982042399895598e-08, -4.561373933353276e-09, 1.103611736562751e-09),
    *(3.1381299877663516e-11, -3.1843566810017055e-11, 7.326034994733094e-13, 9.279813088657945e-13),
    *(-4.932455102179649e-14, -2.9600864941493794e-14, 1.9120642281862737e-15, 1.0532083706440697e-15),
)


def gelu(y: Array) -> Array:
    return y * jax.lax.erfc(-y * 0.7071067811865476) / 2


def _gelu_half(a: Array) -> Array:
    """exp(-a^2 / 4), where a^2 = s^2 + (a - s)(a + s) with s short."""
    s = _short(a)
    return _exp_of_sum(-s * s / 4, -(a - s) * (a + s) / 4)


gelu_half = with_derivative(_gelu_half, lambda a: -a / 2 * gelu_half(a))


def _gelu_series(a: Array) -> Array:
    q, terms = (a - 5) / (a + 5), _GELU_SERIES if a.dtype == jnp.float64 else _GELU_SERIES[:13]
    c1, c2 = terms[-1], 0.0
    for c in reversed(terms[1:-1]):
        c1, c2 = 2 * q * c1 - c2 + c, c1
    return q * c1 - c2 + terms[0]


def _gelu_tail(a: Array) -> Array:
    h = gelu_half(a)
    return h * (_INVERSE_SQRT_2PI * _from_root(_GELU_D1_ROOT, a) * _gelu_series(a)) * h


gelu_d1 = _gated_d1(_gelu_tail, _GELU_FAR)


def gelu_d2(y: Array) -> Array:
    a = jnp.minimum(jnp.abs(y), _GELU_FAR)
    h = gelu_half(a)
    return h * (_INVERSE_SQRT_2PI * _from_root(_GELU_D2_ROOT, a) * (_GELU_D2_ROOT[0] + a)) * h


# --- the tanh form of gelu = y s(P(y)), P = α a + β a^3 = a w.  With S = a0^2 + a0 a + a^2, d = a0 - a, e0 = e^-P(a0):
#     f'(-a) = s'(P) (1 + e^-P - a P')  = s'(P) (d (α + 3 β S) + e0 expm1(d (α + β S)))
#     f''(a) = s'(P) (2 P' + a P'' - a P'^2 tanh(P/2)), whose bracket is N(a) - K(a) tanh(P/2) with N = 2 α + 12 β a^2,
#     K = α^2 a + 6 α β a^3 + 9 β^2 a^5: the differences N - N0, K0 - K and t0 - tanh(P/2) each have the factor d.

_ALPHA = (1.5957691216057308, -9.96930880911092e-17)  # 2 sqrt(2 / pi)
_BETA = (0.07135481627260025, -6.175149918155315e-19)  # 0.044715 α
_GELU_TANH_D1_ROOT, _GELU_TANH_E0 = (0.7524614220710163, -3.635560509207687e-17), 0.29195521191476714
_GELU_TANH_D2_ROOT, _GELU_TANH_T0 = (1.4185040087908283, 8.089265124388305e-17), 0.843630359924267


def gelu_tanh(y: Array) -> Array:
    return y * jax.lax.logistic(y * (_ALPHA[0] + _BETA[0] * (y * y)))


def _gelu_tanh_half(a: Array) -> Array:
    """exp(-P(a) / 2), every product carried as a short number plus its remainder."""
    (α, α_low), (β, β_low) = _split_constant(_ALPHA, a.dtype), _split_constant(_BETA, a.dtype)
    s, square = _short(a), a * a
    q = _short(square)
    q_low = (s * s - q) + (a - s) * (a + s)
    w = _short(_ALPHA[0] + _BETA[0] * square)
    w_low = ((α - w) + β * q) + (α_low + β * q_low + β_low * square)
    p = _short(a * (w + w_low))
    p_low = ((s * w - p) + (a - s) * w) + a * w_low
    return _exp_of_sum(-p / 2, -p_low / 2)


gelu_tanh_half = with_derivative(_gelu_tanh_half, lambda a: -(_ALPHA[0] + 3 * _BETA[0] * (a * a)) / 2 * gelu_tanh_half(a))


def _gelu_tanh_tail(a: Array) -> Array:
    α, β, a0 = _ALPHA[0], _BETA[0], _GELU_TANH_D1_ROOT[0]
    h, d, S = gelu_tanh_half(a), _from_root(_GELU_TANH_D1_ROOT, a), a0 * a0 + a0 * a + a * a
    q = 1 + h * h
    return h * ((d * (α + 3 * β * S) + _GELU_TANH_E0 * jnp.expm1(d * (α + β * S))) / (q * q)) * h


gelu_tanh_d1 = _gated_d1(_gelu_tanh_tail, _GELU_FAR)


def gelu_tanh_d2(y: Array) -> Array:
    a = jnp.minimum(jnp.abs(y), _GELU_FAR)
    α, β, a0, t0 = _ALPHA[0], _BETA[0], _GELU_TANH_D2_ROOT[0], _GELU_TANH_T0
    h, d, a2 = gelu_tanh_half(a), _from_root(_GELU_TANH_D2_ROOT, a), a * a
    S = a0 * a0 + a0 * a + a2
    S5 = a0**4 + a0**3 * a + a0**2 * a2 + a0 * (a2 * a) + a2 * a2
    K = a * (α + 3 * β * a2) * (α + 3 * β * a2)
    T = jnp.tanh(a * (α + β * a2) / 2)
    linear = t0 * (α * α + 6 * α * β * S + 9 * β * β * S5) - 12 * β * (a0 + a)
    q = 1 + h * h
    return h * ((d * linear + K * jnp.tanh(d * (α + β * S) / 2) * (1 - t0 * T)) / (q * q)) * h
