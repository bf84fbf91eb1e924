"""The feedforward recursions of Naumov (2017) as printed, and corrected: for comparison only.

**The printed Hessian is wrong for every activation that is not piecewise linear.** Use `jaxhess.hessian` for work. The
errors, each of which `tests/naumov2017/test_feedforward.py` shows against `jax.hessian`:

* (32) `C^(l) = I∘F^(l)`. Equation (39) of the proof gives `C^(l) = I`; as (28) multiplies by F^(l) again, the last layer's
  block contains f'^4 in the place of f'^2. Harmless only if f' is 0 or 1.
* (34)-(35) `D^(k) = diag(v^(k))` with `v^(l) = -(z* - z^(l))∘f''`, `v^(k-1) = W^(k)T v^(k) ∘ f''`. The proof's own (37) and
  (41) multiply f'' by the total derivative dE/dz^(k), which obeys the FIRST-order recursion (19) and contains f', not f''.
  (34) is right; (35) is wrong for every layer below the last unless f'' = 0.
* (44) `W^T C̃ W ∘ F` has to be read as `(W^T C̃ W) ∘ F`, and is exact for f' in {0, 1}.

Corrected, with `g^(l) = z^(l) - z*`, `g^(k-1) = W^(k)T (g^(k)∘f'(y^(k)))` and `C^(l) = I`:

    Q^(k) = C^(k)∘f'f'^T + diag(g^(k)∘f''(y^(k)))        C^(k-1) = W^(k)T Q^(k) W^(k)

Everywhere `Q^(k)` is the paper's `C^(k)∘F^(k) + D^(k)` (29), and the weight block is `kron(Q, z z^T)` (28). Arguments:
`weights` is a list of W^(k) (m_k, n_k) and `biases` of b^(k) (m_k,), k = 1..l, so that index k - 1 holds layer k;
`activation` is one for all layers or a list of one for each; `inputs` is x* (n_1,) and `target` z* (m_l,); the error is
`||z* - z^(l)||^2 / 2` (12).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxhess._linalg import einsum, matmul
from jaxhess._typing import Array, Float, InputError
from jaxhess.activations import Activation, as_activation

__all__ = [
    "Curvatures",
    "Forward",
    "Gradients",
    "corrected_hessian",
    "forward",
    "gradient",
    "kronecker_block",
    "printed_hessian",
    "printed_relu_hessian",
]

Weights = Sequence[Float[Array, "m n"]]
Biases = Sequence[Float[Array, " m"]]
Function = Activation | Callable[[Array], Array] | Sequence[Activation | Callable[[Array], Array]]


class Forward(NamedTuple):
    """`preactivations[k-1]` is y^(k) (m_k,), `outputs[k]` is z^(k), `outputs[0]` the input."""

    preactivations: list[Array]
    outputs: list[Array]


class Gradients(NamedTuple):
    """`weights[k-1]` is G_w^(k) (m_k, n_k), `biases[k-1]` is G_b^(k) = v^(k) (m_k,)."""

    weights: list[Array]
    biases: list[Array]


class Curvatures(NamedTuple):
    """`Q[k-1]` is Q^(k) (m_k, m_k), which is the bias block; `inputs[k-1]` is z^(k-1) (n_k,)."""

    Q: list[Array]
    inputs: list[Array]


def forward(weights: Weights, biases: Biases, activation: Function, inputs: Array) -> Forward:
    """Forward propagation, equations (10)-(11).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> y, z = naumov2017.forward([2 * jnp.eye(2)], [jnp.ones(2)], jnp.tanh, jnp.array([0.0, -0.5]))
        >>> y[0].tolist()
        [1.0, 0.0]
    """
    y, z = [], [jnp.asarray(inputs)]
    for W, b, f in zip(weights, biases, _each(activation, len(weights)), strict=True):
        y.append(matmul(W, z[-1]) + b)
        z.append(f(y[-1]))
    return Forward(y, z)


def gradient(weights: Weights, biases: Biases, activation: Function, inputs: Array, target: Array) -> Gradients:
    """Lemma 1, equations (16)-(19), which are right as printed.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> W, b, x, t = jnp.eye(2), jnp.zeros(2), jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])
        >>> naumov2017.gradient([W], [b], lambda y: y, x, t).weights[0].tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    f = _each(activation, len(weights))
    y, z = forward(weights, biases, f, inputs)
    v = -(target - z[-1]) * f[-1].derivative(y[-1])
    V = [v]
    for k in reversed(range(1, len(weights))):
        v = matmul(weights[k].T, v) * f[k - 1].derivative(y[k - 1])
        V.insert(0, v)
    return Gradients([jnp.outer(v, below) for v, below in zip(V, z[:-1], strict=True)], V)


def printed_hessian(weights: Weights, biases: Biases, activation: Function, inputs: Array, target: Array) -> Curvatures:
    """Theorem 1 as printed, equations (28)-(35). Wrong unless the activation is piecewise linear with f' in {0, 1}.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> layer = [jnp.eye(1)], [jnp.zeros(1)]
        >>> printed = naumov2017.printed_hessian(*layer, lambda y: 2 * y, jnp.ones(1), jnp.zeros(1))
        >>> corrected = naumov2017.corrected_hessian(*layer, lambda y: 2 * y, jnp.ones(1), jnp.zeros(1))
        >>> float(printed.Q[0][0, 0]), float(corrected.Q[0][0, 0])  # f'^4 and f'^2
        (16.0, 4.0)
    """
    f = _each(activation, len(weights))
    y, z = forward(weights, biases, f, inputs)
    F = [_outer(f_k.derivative(y_k)) for f_k, y_k in zip(f, y, strict=True)]  # (30)
    C = jnp.eye(len(y[-1]), dtype=y[-1].dtype) * F[-1]  # (32)
    v = -(target - z[-1]) * f[-1].second_derivative(y[-1])  # (34)
    Q = []
    for k in reversed(range(len(weights))):
        Q.insert(0, C * F[k] + jnp.diag(v))  # (29), (31)
        if k > 0:
            C = _congruence(weights[k], Q[0])  # (33)
            v = matmul(weights[k].T, v) * f[k - 1].second_derivative(y[k - 1])  # (35)
    return Curvatures(Q, z[:-1])


def printed_relu_hessian(weights: Weights, biases: Biases, activation: Function, inputs: Array, target: Array) -> Curvatures:
    """Corollary 2 as printed, equations (43)-(44), whose C̃^(k) is Q^(k). Exact for activations with f' in {0, 1}.

    The target is not used: curvature of a piecewise-linear network under the squared error does not depend on it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> from jaxhess.activations import relu
        >>> y = jnp.array([1.0, -1.0])
        >>> naumov2017.printed_relu_hessian([jnp.eye(2)], [jnp.zeros(2)], relu, y, y).Q[0].tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    del target
    f = _each(activation, len(weights))
    y, z = forward(weights, biases, f, inputs)
    F = [_outer(f_k.derivative(y_k)) for f_k, y_k in zip(f, y, strict=True)]
    C = [jnp.eye(len(y[-1]), dtype=y[-1].dtype) * F[-1]]
    for k in reversed(range(1, len(weights))):
        C.insert(0, _congruence(weights[k], C[0]) * F[k - 1])  # (44)
    return Curvatures(C, z[:-1])


def corrected_hessian(weights: Weights, biases: Biases, activation: Function, inputs: Array, target: Array) -> Curvatures:
    """Theorem 1 corrected: exact for every twice differentiable activation. The example is `printed_hessian`'s.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> b, x, t = jnp.array([0.3]), jnp.array([0.5]), jnp.array([1.0])
        >>> error = lambda b: 0.5 * jnp.sum((t - jnp.tanh(x + b)) ** 2)
        >>> Q = naumov2017.corrected_hessian([jnp.eye(1)], [b], jnp.tanh, x, t).Q[0]
        >>> bool(jnp.allclose(Q, jax.hessian(error)(b), rtol=1e-5))
        True
    """
    f = _each(activation, len(weights))
    y, z = forward(weights, biases, f, inputs)
    g = z[-1] - target  # (23)
    C = jnp.eye(len(y[-1]), dtype=y[-1].dtype)  # (39)
    Q = []
    for k in reversed(range(len(weights))):
        slope = f[k].derivative(y[k])
        Q.insert(0, C * _outer(slope) + jnp.diag(g * f[k].second_derivative(y[k])))
        C = _congruence(weights[k], Q[0])  # (33)
        g = matmul(weights[k].T, g * slope)  # (25)
    return Curvatures(Q, z[:-1])


def kronecker_block(Q: Float[Array, "m m"], inputs: Float[Array, " n"]) -> Float[Array, "mn mn"]:
    """The dense weight Hessian `kron(Q, z z^T)` (28) of one layer, for row-major `vec(W)`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxhess import naumov2017
        >>> naumov2017.kronecker_block(jnp.array([[2.0]]), jnp.array([1.0, 3.0])).tolist()
        [[2.0, 6.0], [6.0, 18.0]]
    """
    return jnp.kron(Q, _outer(inputs))


def _each(activation: Function, layers: int) -> list[Activation]:
    if isinstance(activation, Sequence):
        if len(activation) != layers:
            raise InputError(f"activation must be one or a list of {layers}, got {len(activation)}")
        return [as_activation(f) for f in activation]
    return [as_activation(activation)] * layers


def _outer(a: Array) -> Array:
    return jnp.outer(a, a)


def _congruence(W: Array, Q: Array) -> Array:
    """`W^T Q W`."""
    return einsum("ih,ij,jg->hg", W, Q, W)
