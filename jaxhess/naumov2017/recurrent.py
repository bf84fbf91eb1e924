"""The recurrent recursions of Naumov (2017) as printed, and corrected: for comparison only.

**The printed Hessian is wrong but for special cases, and so is the printed gradient of every layer below the last.** The
errors, each of which `tests/naumov2017/test_recurrent.py` shows against `jax.grad` and `jax.hessian`:

* (58) carries v^(k,t) back through the layer's own U only. z^(k,s) also reaches z^(k+1,t) by way of z^(k+1,s..t-1) and
  U^(k+1): missing for every k < l. It also enters (77).
* (60), (82), (84) add what comes from step t + 1 to quantities of E^(t), which does not depend on that step. Summed over
  t, as (49) and (54) say, the errors of later steps enter layers k < l twice: here, and by (58) or (77). Harmless only
  if a = τ, for then the terms of step t + 1 are the zero ones. (58) and (82) are wrong for a = τ as well.
* (77) has one A^(k,t), at the last step: dz^(k,t-1)/dw is held constant, so that f'' is lost at all earlier steps.
* (81) `C^(l,t) = I∘F` and (83)-(84) repeat (32) and (34)-(35): see `jaxhess.naumov2017.feedforward`.
* (82) keeps C at equal times. For k < l the curvature couples all pairs of steps s, ζ, through the U of the layers above.
* (75) holds the layer's past output constant, which depends on its U: it lacks X + X^T below, which is zero for τ <= 2.

How the print was read: in (58) and (77) the product over h has its later factors on the left, as the proof unrolls it
(65), (89); v and A are zero at steps before a; gradients and Hessians are summed over t = a..τ. With (60), (82) and (84)
read as of one E^(t), the terms of step t + 1 zero, the result is the sum over t of these functions' for the first t steps
and `start=t`: right where a single t is.

Corrected, with V^(k,s) = dE/dy^(k,s) and N[t,s] = dy^(k,t)/dy^(k,s) = prod_{h=s}^{t-1} U^(k) diag(f'(y^(k,h))):

    g^(k,s) = (W^(k+1)T V^(k+1,s), or z^(l,s) - z^(*,s) for s >= a at k = l) + U^(k)T V^(k,s+1),   V = g∘f'
    A[s,ζ] = C^(k)[s,ζ]∘f'_s f'_ζ^T + [s=ζ] diag(g^(k,s)∘f''(y^(k,s)))      C^(l)[s,ζ] = [s=ζ>=a] I
    Q[s,ζ] = d2E/dy^(k,s)dy^(k,ζ) = sum_{t,t'} N[t,s]^T A[t,t'] N[t',ζ]     C^(k-1)[s,ζ] = W^(k)T Q[s,ζ] W^(k)
    H_w = sum_{s,ζ} kron(Q[s,ζ], z^(k-1,s) z^(k-1,ζ)T)    H_b = sum_{s,ζ} Q[s,ζ]
    H_u = sum_{s,ζ} kron(Q[s,ζ], z^(k,s-1) z^(k,ζ-1)T) + X + X^T
    X[(p,q),(i,j)] = sum_{s<ζ} V_i^(k,ζ) S[ζ-1,s]_jp z_q^(k,s-1)            S[h,s] = diag(f'(y^(k,h))) N[h,s]

Everything here is dense and loops over time in Python: for small sizes. Arguments: `weights` is a list of W^(k) (m_k, n_k),
`feedbacks` of U^(k) (m_k, m_k), `biases` of b^(k) (m_k,), k = 1..l; `activation` is one for all layers or a list of one
for each; `inputs` is x* (τ, n_1) and `targets` z* (τ, m_l); `start` is the paper's a, a Python integer, the first step
whose output counts, 1 <= a <= τ (`InputError` otherwise). The state before the first step is zero. The error is
`sum_{t=a}^τ ||z^(*,t) - z^(l,t)||^2 / 2` (49).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxhess._linalg import einsum, matmul
from jaxhess._typing import Array, Float, InputError
from jaxhess.naumov2017.feedforward import Biases, Function, Weights, _congruence, _each, _outer

__all__ = [
    "RecurrentForward",
    "RecurrentGradients",
    "RecurrentHessians",
    "corrected_recurrent_gradient",
    "corrected_recurrent_hessian",
    "printed_recurrent_gradient",
    "printed_recurrent_hessian",
    "printed_recurrent_relu_hessian",
    "recurrent_forward",
]

Feedbacks = Sequence[Float[Array, "m m"]]


class RecurrentForward(NamedTuple):
    """`preactivations[k-1]` is y^(k) (τ, m_k), `outputs[k]` is z^(k) (τ, m_k), `outputs[0]` the inputs (τ, n_1)."""

    preactivations: list[Array]
    outputs: list[Array]


class RecurrentGradients(NamedTuple):
    """`weights[k-1]` is G_w^(k) (m_k, n_k), `feedbacks[k-1]` is G_u^(k) (m_k, m_k), `biases[k-1]` is G_b^(k) (m_k,)."""

    weights: list[Array]
    feedbacks: list[Array]
    biases: list[Array]


class RecurrentHessians(NamedTuple):
    """The diagonal blocks of each layer, dense, for row-major `vec`, and the curvature that they are made of.

    `weights[k-1]` is H_w^(k) (m_k n_k, m_k n_k), `feedbacks[k-1]` is H_u^(k) (m_k^2, m_k^2), `biases[k-1]` is H_b^(k)
    (m_k, m_k), `Q[k-1]` is Q^(k) (τ, m_k, τ, m_k): the block at steps s, ζ is `Q[k-1][s-1, :, ζ-1, :]`.
    """

    weights: list[Array]
    feedbacks: list[Array]
    biases: list[Array]
    Q: list[Array]


def recurrent_forward(
    weights: Weights, feedbacks: Feedbacks, biases: Biases, activation: Function, inputs: Array
) -> RecurrentForward:
    """Forward propagation, equations (47)-(48), layer after layer.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> I, b, x = jnp.eye(1), jnp.zeros(1), jnp.ones((3, 1))
        >>> naumov2017.recurrent_forward([I], [2 * I], [b], lambda y: y, x).outputs[1].tolist()
        [[1.0], [3.0], [7.0]]
    """
    y, z = [], [jnp.asarray(inputs)]
    for W, U, b, f in zip(weights, feedbacks, biases, _each(activation, len(weights)), strict=True):
        state, steps = jnp.zeros_like(b), []
        for below in z[-1]:
            steps.append(matmul(W, below) + matmul(U, state) + b)
            state = f(steps[-1])
        y.append(jnp.stack(steps))
        z.append(f(y[-1]))
    return RecurrentForward(y, z)


def printed_recurrent_gradient(
    weights: Weights,
    feedbacks: Feedbacks,
    biases: Biases,
    activation: Function,
    inputs: Array,
    targets: Array,
    start: int = 1,
) -> RecurrentGradients:
    """Lemma 2 as printed, equations (55)-(60), summed over t = a..τ (54). Right for the last layer only.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> I, b, x, t = jnp.eye(1), jnp.zeros(1), jnp.ones((2, 1)), jnp.zeros((2, 1))
        >>> two_layers = [I, I], [I, I], [b, b], lambda y: y, x, t, 2
        >>> [g.tolist() for g in naumov2017.printed_recurrent_gradient(*two_layers).biases]
        [[6.0], [6.0]]
        >>> [g.tolist() for g in naumov2017.corrected_recurrent_gradient(*two_layers).biases]
        [[9.0], [6.0]]
    """
    f = _each(activation, len(weights))
    y, z = recurrent_forward(weights, feedbacks, biases, f, inputs)
    slopes = [f_k.derivative(y_k) for f_k, y_k in zip(f, y, strict=True)]
    v = _printed_vectors(weights, feedbacks, _residual(z[-1], targets, start), slopes, start)
    V = [einsum("tisj,ti->sj", _propagators(U, df), v_k) for U, df, v_k in zip(feedbacks, slopes, v, strict=True)]  # (58)
    return _gradients(V, z)


def corrected_recurrent_gradient(
    weights: Weights,
    feedbacks: Feedbacks,
    biases: Biases,
    activation: Function,
    inputs: Array,
    targets: Array,
    start: int = 1,
) -> RecurrentGradients:
    """Lemma 2 corrected: exact for every layer.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> W, U, b, x, t = jnp.eye(1), jnp.eye(1), jnp.zeros(1), jnp.ones((2, 1)), jnp.zeros((2, 1))
        >>> def error(W):
        ...     z = naumov2017.recurrent_forward([W], [U], [b], jnp.tanh, x).outputs[1]
        ...     return 0.5 * jnp.sum((t - z) ** 2)
        >>> G = naumov2017.corrected_recurrent_gradient([W], [U], [b], jnp.tanh, x, t).weights[0]
        >>> bool(jnp.allclose(G, jax.grad(error)(W), rtol=1e-5))
        True
    """
    f = _each(activation, len(weights))
    y, z = recurrent_forward(weights, feedbacks, biases, f, inputs)
    slopes = [f_k.derivative(y_k) for f_k, y_k in zip(f, y, strict=True)]
    g = _output_derivatives(weights, feedbacks, _residual(z[-1], targets, start), slopes)
    return _gradients([g_k * df for g_k, df in zip(g, slopes, strict=True)], z)


def printed_recurrent_hessian(
    weights: Weights,
    feedbacks: Feedbacks,
    biases: Biases,
    activation: Function,
    inputs: Array,
    targets: Array,
    start: int = 1,
) -> RecurrentHessians:
    """Theorem 2 as printed, equations (74)-(84), summed over t = a..τ.

    Right in the last layer for activations with f' in {0, 1} and f'' = 0, and there for W and b only (for U if τ <= 2).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> I, b, x, t = jnp.eye(1), jnp.zeros(1), jnp.ones((3, 1)), jnp.zeros((3, 1))
        >>> one_layer = [I], [I], [b], lambda y: y, x, t, 3
        >>> printed, corrected = (h(*one_layer) for h in (
        ...     naumov2017.printed_recurrent_hessian, naumov2017.corrected_recurrent_hessian))
        >>> [(float(a[0][0, 0]), float(c[0][0, 0])) for a, c in zip(printed[:3], corrected[:3])]  # W, U, b
        [(9.0, 9.0), (9.0, 15.0), (9.0, 9.0)]
    """
    f = _each(activation, len(weights))
    y, z = recurrent_forward(weights, feedbacks, biases, f, inputs)
    slopes = [f_k.derivative(y_k) for f_k, y_k in zip(f, y, strict=True)]
    bends = [f_k.second_derivative(y_k) for f_k, y_k in zip(f, y, strict=True)]
    v = _printed_vectors(weights, feedbacks, _residual(z[-1], targets, start), bends, start)
    Q = _printed_curvatures(weights, feedbacks, slopes, v, start, repeat_slopes=True)
    return _hessians(Q, z)


def printed_recurrent_relu_hessian(
    weights: Weights,
    feedbacks: Feedbacks,
    biases: Biases,
    activation: Function,
    inputs: Array,
    targets: Array,
    start: int = 1,
) -> RecurrentHessians:
    """Corollary 4 as printed, equations (96)-(100), summed over t = a..τ; (76) for the bias.

    Right in the last layer for piecewise-linear activations, and there for W and b only (for U if τ <= 2). The targets are
    not used.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> from jaxhess.activations import relu
        >>> I, b, x = jnp.eye(1), jnp.zeros(1), jnp.array([[1.0], [-3.0], [1.0]])
        >>> naumov2017.printed_recurrent_relu_hessian([I], [I], [b], relu, x, x).weights[0].tolist()
        [[2.0]]
    """
    del targets
    f = _each(activation, len(weights))
    y, z = recurrent_forward(weights, feedbacks, biases, f, inputs)
    _check_start(start, len(z[0]))
    slopes = [f_k.derivative(y_k) for f_k, y_k in zip(f, y, strict=True)]
    v = [jnp.zeros_like(y_k) for y_k in y]
    Q = _printed_curvatures(weights, feedbacks, slopes, v, start, repeat_slopes=False)
    return _hessians(Q, z)


def corrected_recurrent_hessian(
    weights: Weights,
    feedbacks: Feedbacks,
    biases: Biases,
    activation: Function,
    inputs: Array,
    targets: Array,
    start: int = 1,
) -> RecurrentHessians:
    """Theorem 2 corrected: exact for every layer and every twice differentiable activation.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> W, U, b, x, t = jnp.eye(1), jnp.eye(1), jnp.zeros(1), jnp.ones((3, 1)), jnp.zeros((3, 1))
        >>> def error(U):
        ...     z = naumov2017.recurrent_forward([W], [U], [b], jnp.tanh, x).outputs[1]
        ...     return 0.5 * jnp.sum((t - z) ** 2)
        >>> H = naumov2017.corrected_recurrent_hessian([W], [U], [b], jnp.tanh, x, t).feedbacks[0]
        >>> bool(jnp.allclose(H, jax.hessian(error)(U).reshape(1, 1), rtol=1e-4))
        True
    """
    f = _each(activation, len(weights))
    y, z = recurrent_forward(weights, feedbacks, biases, f, inputs)
    slopes = [f_k.derivative(y_k) for f_k, y_k in zip(f, y, strict=True)]
    residual = _residual(z[-1], targets, start)
    g = _output_derivatives(weights, feedbacks, residual, slopes)
    counted = jnp.diag((jnp.arange(1, len(residual) + 1) >= start).astype(residual.dtype))
    C = einsum("st,ij->sitj", counted, jnp.eye(residual.shape[1], dtype=residual.dtype))
    Q, X = [], []
    for k in reversed(range(len(weights))):
        N, df, V = _propagators(feedbacks[k], slopes[k]), slopes[k], g[k] * slopes[k]
        bend = g[k] * f[k].second_derivative(y[k])
        A = einsum("sitj,si,tj->sitj", C, df, df) + jnp.diag(bend.reshape(-1)).reshape(C.shape)
        Q.insert(0, einsum("aisj,aibk,bktl->sjtl", N, A, N))
        C = einsum("ih,sitj,jg->shtg", weights[k], Q[0], weights[k])
        S = einsum("hj,hjsp->hjsp", df, N)  # zero unless s <= h
        X.insert(0, einsum("hi,hjsp,sq->pqij", V[1:], S[:-1], _previous(z[k + 1])))
    H = _hessians(Q, z)
    X = [X_k.reshape(H_k.shape) for X_k, H_k in zip(X, H.feedbacks, strict=True)]
    return H._replace(feedbacks=[H_k + X_k + X_k.T for H_k, X_k in zip(H.feedbacks, X, strict=True)])


def _printed_vectors(
    weights: Weights, feedbacks: Feedbacks, residual: Array, factors: list[Array], start: int
) -> list[Array]:
    """v^(k) (τ, m_k) by (59)-(60), where the factors are f'(y), or by (83)-(84), where they are f''(y)."""
    v = [residual * factors[-1]]
    for k in reversed(range(1, len(weights))):
        steps = [jnp.zeros_like(factors[k - 1][0])] * (len(residual) + 1)
        for t in reversed(range(start - 1, len(residual))):
            from_above, from_later = matmul(weights[k].T, v[0][t]), matmul(feedbacks[k - 1].T, steps[t + 1])
            steps[t] = (from_above + from_later) * factors[k - 1][t]
        v.insert(0, jnp.stack(steps[:-1]))
    return v


def _printed_curvatures(
    weights: Weights, feedbacks: Feedbacks, slopes: list[Array], v: list[Array], start: int, *, repeat_slopes: bool
) -> list[Array]:
    """sum_t C̃^(k,t,s,ζ) as (τ, m_k, τ, m_k) for each layer, by (77)-(82); (98)-(100) are that with v = 0.

    They differ in the last layer: (81) puts F into C, which (78) multiplies by F again (`repeat_slopes`); (99) does not.
    """
    steps = range(start - 1, len(v[0]))
    Q, A_above = [], {}
    for k in reversed(range(len(weights))):
        m = v[k].shape[1]
        A, zero = {}, jnp.zeros((m, m), v[k].dtype)
        for t in reversed(steps):
            F = _outer(slopes[k][t])  # (79)
            if k == len(weights) - 1:
                C = jnp.eye(m, dtype=F.dtype) * (F if repeat_slopes else 1)  # (81), (99)
            else:
                C = _congruence(weights[k + 1], A_above[t]) + _congruence(feedbacks[k], A.get(t + 1, zero))  # (82)
            A[t] = C * F + jnp.diag(v[k][t])  # (78), (80)
        N = _propagators(feedbacks[k], slopes[k])
        Q.insert(0, sum(einsum("isj,ik,ktl->sjtl", N[t], A[t], N[t]) for t in steps))  # (77)
        A_above = A
    return Q


def _output_derivatives(weights: Weights, feedbacks: Feedbacks, residual: Array, slopes: list[Array]) -> list[Array]:
    """g^(k) = dE/dz^(k) (τ, m_k), all of E and through all paths."""
    g, from_above = [], residual
    for W, U, df in reversed(list(zip(weights, feedbacks, slopes, strict=True))):
        steps = [from_above[-1]]
        for s in reversed(range(len(df) - 1)):
            steps.insert(0, from_above[s] + matmul(U.T, steps[0] * df[s + 1]))
        g.insert(0, jnp.stack(steps))
        from_above = matmul(g[0] * df, W)
    return g


def _propagators(U: Array, slopes: Array) -> Array:
    """N[t, :, s, :] = dy^(k,t)/dy^(k,s) inside a layer, prod_{h=s}^{t-1} U diag(f'_h), zero for s > t: (τ, m, τ, m)."""
    m, rows = len(U), []
    for t in range(len(slopes)):
        factor = U * jnp.broadcast_to(slopes[t - 1], (m, m))
        earlier = [matmul(factor, block) for block in rows[-1][:t]] if t else []
        later = [jnp.zeros((m, m), U.dtype)] * (len(slopes) - t - 1)
        rows.append([*earlier, jnp.eye(m, dtype=U.dtype), *later])
    return jnp.stack([jnp.stack(row, axis=1) for row in rows])


def _gradients(V: list[Array], z: list[Array]) -> RecurrentGradients:
    """(55)-(57) for V^(k) (τ, m_k)."""
    by_weight = [matmul(V_k.T, below) for V_k, below in zip(V, z[:-1], strict=True)]
    by_feedback = [matmul(V_k.T, _previous(own)) for V_k, own in zip(V, z[1:], strict=True)]
    return RecurrentGradients(by_weight, by_feedback, [jnp.sum(V_k, axis=0) for V_k in V])


def _hessians(Q: list[Array], z: list[Array]) -> RecurrentHessians:
    """(74)-(76) for Q^(k) (τ, m_k, τ, m_k)."""
    by_weight = [_kronecker_sum(Q_k, below) for Q_k, below in zip(Q, z[:-1], strict=True)]
    by_feedback = [_kronecker_sum(Q_k, _previous(own)) for Q_k, own in zip(Q, z[1:], strict=True)]
    return RecurrentHessians(by_weight, by_feedback, [jnp.sum(Q_k, axis=(0, 2)) for Q_k in Q], Q)


def _kronecker_sum(Q: Array, z: Array) -> Array:
    size = Q.shape[1] * z.shape[1]
    return einsum("sitj,sq,tr->iqjr", Q, z, z).reshape(size, size)


def _previous(z: Array) -> Array:
    """z^(k,s-1) at place s, for the initial state zero."""
    return jnp.concatenate([jnp.zeros_like(z[:1]), z[:-1]])


def _residual(output: Array, targets: Array, start: int) -> Array:
    """z^(l,s) - z^(*,s) (66), zero at steps before a."""
    _check_start(start, len(output))
    return jnp.concatenate([jnp.zeros_like(output[: start - 1]), (output - targets)[start - 1 :]])


def _check_start(start: int, steps: int) -> None:
    if not 1 <= start <= steps:
        raise InputError(f"start must be one of the time steps 1..{steps}, got {start}")
