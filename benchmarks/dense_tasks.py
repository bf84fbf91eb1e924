"""Tasks of feedforward networks: function fitting, a differential equation, regression, autoencoders, classification."""

import gzip
import pathlib
from functools import partial

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_diabetes, load_digits
from task import Array, PyTree, Task, initial_dense, misclassified, perceptron, plain_perceptron

from jaxhess.losses import softmax_cross_entropy, squared_error

__all__ = ["diabetes", "digits_autoencoder", "digits_classifier", "fashion_autoencoder", "franke", "pinn", "spirals"]

FASHION = "/usr/share/datasets/fashion-mnist"
DIGITS_CODE, FASHION_CODE = 2, 3  # the layer whose output is the code of an autoencoder
_DIABETES_WIDTHS, _DIABETES_COUNT, _DIABETES_DECAY = (10, 16, 1), 353, 1e-2


def _root_mean_square(params: PyTree, xs: Array, ts: Array) -> Array:
    return jnp.sqrt(jnp.mean((plain_perceptron(params, xs) - ts) ** 2))


def _franke(points: np.ndarray) -> np.ndarray:
    x, y = 9 * points[:, :1], 9 * points[:, 1:]
    return (
        0.75 * np.exp(-((x - 2) ** 2 + (y - 2) ** 2) / 4)
        + 0.75 * np.exp(-((x + 1) ** 2) / 49 - (y + 1) / 10)
        + 0.5 * np.exp(-((x - 7) ** 2 + (y - 3) ** 2) / 4)
        - 0.2 * np.exp(-((x - 4) ** 2) - (y - 7) ** 2)
    )


def _square_grid(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.linspace(0, 1, side)] * 2), axis=-1).reshape(-1, 2)


def franke(seed: int) -> Task:
    """Franke's function on random points of the unit square. Source: Franke (1979), a critical comparison of methods."""
    points, grid = np.random.default_rng(seed).random((1000, 2)), _square_grid(41)
    return Task(
        name="franke",
        what="Franke's function, 2-20-20-1 tanh, 1000 points, squared error",
        init=partial(initial_dense, widths=(2, 20, 20, 1), dtype=np.dtype(np.float64)),
        model=perceptron,
        plain=plain_perceptron,
        loss=squared_error,
        train=(points, _franke(points)),
        test=(grid, _franke(grid)),
        metric=_root_mean_square,
        metric_name="RMSE on a grid",
        dtype=np.dtype(np.float64),
        batches=(None, 100),
        budget=6.0,
        kfac="squared",
    )


def _solution_and_laplacian(params: PyTree, points: Array) -> tuple[Array, Array]:
    """u and its Laplacian at points (..., 2), by carrying value, gradient and Laplacian through the layers.

    Through y = W h + b all three go by W; through h = tanh(y), with f' = 1 - h^2 and f'' = -2 h f', the gradient by
    f' dy and the Laplacian by f' lap(y) + f'' |dy|^2. Three times as fast as `jax.hessian` under autodiff.
    """
    first = params[0]["w"].T
    u = points @ first + params[0]["b"]
    along_x, along_y, laplacian = first[0], first[1], jnp.zeros((), u.dtype)
    for layer in params[1:]:
        h = jnp.tanh(u)
        d = 1 - h * h
        laplacian = d * (laplacian - 2 * h * (along_x * along_x + along_y * along_y))
        W = layer["w"].T
        u, along_x, along_y, laplacian = h @ W + layer["b"], (d * along_x) @ W, (d * along_y) @ W, laplacian @ W
    return u, laplacian


def _weighted_residual(params: PyTree, x: Array) -> Array:
    """The network's side of the equation inside, -lap u, or on the boundary, u, times the root of its weight.

    x (..., 4) holds the two coordinates, 1 on the boundary or 0 inside, and the root of the weight.
    """
    u, laplacian = _solution_and_laplacian(params, x[..., :2])
    return x[..., 3:] * jnp.where(x[..., 2:3] > 0, u, -laplacian)


def _relative_error(params: PyTree, points: Array, u: Array) -> Array:
    return jnp.linalg.norm(plain_perceptron(params, points) - u) / jnp.linalg.norm(u)


def pinn(seed: int) -> Task:
    """-lap u = f on the unit square, u = 0 on its boundary: half the sum of the mean squared residuals of both."""
    rng = np.random.default_rng(seed)
    inside, along = rng.random((1000, 2)), rng.random((4, 50))
    sides = [np.stack([along[k], np.full(50, k % 2)], axis=1)[:, :: 1 if k < 2 else -1] for k in range(4)]
    points = np.concatenate([inside, *sides])
    boundary = np.repeat([0.0, 1.0], [1000, 200])[:, None]
    weight = np.sqrt(np.where(boundary > 0, 1200 / 200, 1200 / 1000))

    def u(points: np.ndarray) -> np.ndarray:
        return np.prod(np.sin(np.pi * points), axis=1, keepdims=True)

    f = 2 * np.pi**2 * u(points)
    grid = _square_grid(41)
    return Task(
        name="pinn",
        what="-lap u = f on the unit square, 2-32-32-1 tanh, 1000 points inside, 200 on the boundary",
        init=partial(initial_dense, widths=(2, 32, 32, 1), dtype=np.dtype(np.float64)),
        model=_weighted_residual,
        plain=_weighted_residual,
        loss=squared_error,
        train=(np.concatenate([points, boundary, weight], axis=1), weight * np.where(boundary > 0, 0.0, f)),
        test=(grid, u(grid)),
        metric=_relative_error,
        metric_name="relative L2 error",
        dtype=np.dtype(np.float64),
        batches=(None,),
        budget=20.0,
    )


def _decayed(network, params: PyTree, x: Array) -> Array:
    """The network at the features x[1:], or a multiple of the parameter number x[0] where that is not negative."""
    number = x[..., :1].astype(np.int32)
    multiple = np.sqrt(_DIABETES_DECAY * _DIABETES_COUNT).astype(x.dtype)
    return jnp.where(number < 0, network(params, x[..., 1:]), multiple * ravel_pytree(params)[0][number])


_diabetes_model, _diabetes_plain = partial(_decayed, perceptron), partial(_decayed, plain_perceptron)


def diabetes(seed: int) -> Task:
    """The progression of diabetes from ten measurements, standardised, with weight decay.

    The decay is part of the sum of squares: an example for each parameter, with the parameter as the output and target 0.
    """
    xs, ts = map(np.asarray, load_diabetes(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(xs))
    xs = ((xs - xs.mean(axis=0)) / xs.std(axis=0))[order].astype(np.float32)
    ts = ((ts - ts.mean()) / ts.std())[order, None].astype(np.float32)
    count = _DIABETES_COUNT
    n, m, _ = _DIABETES_WIDTHS
    numbers = np.arange(m * (n + 2) + 1, dtype=np.float32)
    train_xs = np.zeros((count + numbers.size, 1 + n), np.float32)
    train_xs[:count, 0], train_xs[:count, 1:], train_xs[count:, 0] = -1, xs[:count], numbers
    return Task(
        name="diabetes",
        what="diabetes regression, 10-16-1 tanh, 353 patients, squared error, weight decay 0.01",
        init=partial(initial_dense, widths=_DIABETES_WIDTHS, dtype=np.dtype(np.float32)),
        model=_diabetes_model,
        plain=_diabetes_plain,
        loss=squared_error,
        train=(train_xs, np.concatenate([ts[:count], np.zeros((numbers.size, 1), np.float32)])),
        test=(xs[count:], ts[count:]),
        metric=_root_mean_square,
        metric_name="RMSE, in standard deviations",
        dtype=np.dtype(np.float32),
        batches=(None,),
        budget=2.0,
        kfac="squared",
        kfac_train=(xs[:count], ts[:count]),
        decay=_DIABETES_DECAY,
    )


def _digits(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images / 16)[order].astype(np.float32), labels[order].astype(np.int32)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:])


def _autoencoder(code: int):
    model, plain = partial(perceptron, linear=(code,)), partial(plain_perceptron, linear=(code,))

    def metric(params: PyTree, xs: Array, ts: Array) -> Array:
        return jnp.mean(jnp.sum((plain(params, xs) - ts) ** 2, axis=-1))

    return {"linear": (code,), "model": model, "plain": plain, "metric": metric, "metric_name": "squared error of an image"}


_DIGITS_AUTOENCODER, _FASHION_AUTOENCODER = _autoencoder(DIGITS_CODE), _autoencoder(FASHION_CODE)


def digits_autoencoder(seed: int) -> Task:
    """Code and output are linear, all other layers tanh."""
    (train, _), (test, _) = _digits(seed)
    return Task(
        name="digits_autoencoder",
        what="digits autoencoder 64-32-16-6-16-32-64 tanh, linear code, 1437 images, squared error",
        init=partial(initial_dense, widths=(64, 32, 16, 6, 16, 32, 64), dtype=np.dtype(np.float32)),
        **_DIGITS_AUTOENCODER,
        loss=squared_error,
        train=(train, train),
        test=(test, test),
        dtype=np.dtype(np.float32),
        batches=(None, 100),
        budget=15.0,
        kfac="squared",
    )


def fashion_autoencoder(seed: int, folder: str = FASHION) -> Task:
    """Fashion-MNIST as Debian's package dataset-fashion-mnist has it; raises `FileNotFoundError` where it is missing."""
    del seed

    def images(name: str) -> np.ndarray:
        path = pathlib.Path(folder) / f"{name}-images-idx3-ubyte.gz"
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist. Debian's package has it: `apt-get install dataset-fashion-mnist`, or without "
                "being root `apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb DIRECTORY` and "
                "--fashion DIRECTORY/usr/share/datasets/fashion-mnist."
            )
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 784) / np.float32(255)

    train, test = images("train"), images("t10k")[:2000]
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    return Task(
        name="fashion_autoencoder",
        what="Fashion-MNIST autoencoder 784-1000-500-250-30-250-500-1000-784 tanh, linear code, squared error",
        init=partial(initial_dense, widths=widths, dtype=np.dtype(np.float32)),
        **_FASHION_AUTOENCODER,
        loss=squared_error,
        train=(train, train),
        test=(test, test),
        dtype=np.dtype(np.float32),
        batches=(200, 1000),
        curvature_batch=2000,
        budget=240.0,
        kfac="squared",
        evaluated=2000,
    )


def spirals(seed: int) -> Task:
    """Two intertwined spirals. Source: Lang and Witbrock (1988); tested half-way between the points."""
    del seed

    def points(offset: float) -> tuple[np.ndarray, np.ndarray]:
        i = np.arange(97) + offset
        radius, angle = (104 - i) / 104, i * np.pi / 16
        one = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=1)
        return (2 * np.concatenate([one, -one])).astype(np.float32), np.repeat([0, 1], 97).astype(np.int32)

    return Task(
        name="spirals",
        what="two spirals, 2-20-20-2 tanh, 194 points, softmax",
        init=partial(initial_dense, widths=(2, 20, 20, 2), dtype=np.dtype(np.float32)),
        model=perceptron,
        plain=plain_perceptron,
        loss=softmax_cross_entropy,
        train=points(0.0),
        test=points(0.5),
        metric=_misclassified,
        metric_name="share misclassified",
        dtype=np.dtype(np.float32),
        batches=(None,),
        budget=3.0,
        kfac="softmax",
        floor=1e-4,
    )


_misclassified = misclassified(plain_perceptron)


def digits_classifier(seed: int) -> Task:
    """Names of digits from all their pixels at once."""
    train, test = _digits(seed)
    return Task(
        name="digits_classifier",
        what="digits classifier 64-32-10 tanh, 1437 images, softmax",
        init=partial(initial_dense, widths=(64, 32, 10), dtype=np.dtype(np.float32)),
        model=perceptron,
        plain=plain_perceptron,
        loss=softmax_cross_entropy,
        train=train,
        test=test,
        metric=_misclassified,
        metric_name="share misclassified",
        dtype=np.dtype(np.float32),
        batches=(None, 100),
        budget=3.0,
        kfac="softmax",
        floor=1e-4,
    )
