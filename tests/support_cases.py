"""Operations of JAX between parameters and an error: the rows of the first part of docs/support.md.

A case is a function that uses one primitive; nothing here says which rule passes it (`support_plan` reads that).
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.scipy import special
from jax.scipy.sparse.linalg import cg

EXAMPLES, UNITS = 2, 4
CASES: list["Case"] = []


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One row: `names` are those of the primitive, the one of recent releases of JAX first, and `instead` the primitives
    that releases without it use; `use` says in which place.

    `function` takes one or two activations, or, where there are shapes of `params`, (params, x, index).
    """

    section: str
    names: tuple[str, ...]
    function: Callable[..., Any]
    use: str = ""
    shapes: dict[str, tuple[int, ...]] | None = None
    instead: tuple[str, ...] = ()
    also: bool = False
    tolerance: float = 1e-10

    def __str__(self) -> str:
        return "-".join([self.names[0], *self.use.replace("`", "").split()])

    @property
    def title(self) -> str:
        """The operation in the table."""
        return f"`{self.names[0]}`" + (f" {self.use}" if self.use else "")

    @property
    def params(self) -> dict[str, Any]:
        """Positive arrays, no two entries the same."""
        shapes = self.shapes or {"a": (UNITS,), "b": (UNITS,), "c": (UNITS,)}
        return {name: _numbers(shape, n) for n, (name, shape) in enumerate(shapes.items())}

    @property
    def batch(self) -> tuple[Any, Any]:
        """Vectors x, and the number of a row of a table."""
        return _numbers((EXAMPLES, UNITS), 7) + 0.3, jnp.arange(EXAMPLES) + 1

    def outputs(self, p: dict[str, Any], x: Any, index: Any) -> list[Any]:
        """What the function gives."""
        if self.shapes is not None:
            return jax.tree.leaves(self.function(p, x, index))
        activations = p["a"] * x + p["b"], p["c"] * x
        wanted = [a for a in inspect.signature(self.function).parameters.values() if a.default is a.empty]
        given = activations[: len(wanted)]
        return [*jax.tree.leaves(self.function(*given)), *(given if self.also else ())]

    def error(self, p: dict[str, Any], x: Any, index: Any) -> Any:
        """The error of one example, not quadratic in the outputs and different in each component."""
        total = jnp.zeros(())
        for output in self.outputs(p, x, index):
            flat = jnp.ravel(output if jnp.issubdtype(output.dtype, jnp.inexact) else output.astype(float))
            total += jnp.sum(jnp.cos(jnp.arange(flat.size)) * flat**3) + jnp.sum(flat) ** 2
        return total


def _numbers(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.4, shape))


def case(section: str, names: str, function: Callable[..., Any], use: str = "", **shapes: tuple[int, ...]) -> None:
    """Enter a case; `names` are separated by spaces, and what older releases have instead follows a bar."""
    names, _, instead = names.partition("|")
    tolerance = 1e-6 if names == "convert_element_type" else 1e-10
    split = tuple(names.split()), tuple(instead.split())
    CASES.append(Case(section, split[0], function, use, shapes or None, split[1], section == FLAT, tolerance))


FUNCTIONS = "Functions of each component"
FLAT = "Steps, flags and integers"
MOVES = "Components moved"
SUMS = "Sums, extremes and sorting"
PRODUCTS = "Products"
KERNELS = "Convolutions and lookups"
ALGEBRA = "Linear algebra"
LOOPS = "Loops and branches"
CALLS = "Calls and rules of your own"
OUTSIDE = "Complex numbers, randomness and code outside of JAX"

for _name in [
    "abs",
    "acos",
    "asin",
    "asinh",
    "atan",
    "atanh",
    "bessel_i0e",
    "bessel_i1e",
    "cbrt",
    "cos",
    "cosh",
    "digamma",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "neg",
    "rsqrt",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]:
    case(FUNCTIONS, _name, getattr(lax, _name))
case(FUNCTIONS, "acosh", lambda h: lax.acosh(1.5 + h))
case(FUNCTIONS, "square", lax.square)
case(FUNCTIONS, "integer_pow", lambda h: lax.integer_pow(h, 5))
case(FUNCTIONS, "add", lax.add)
case(FUNCTIONS, "sub", lax.sub)
case(FUNCTIONS, "mul", lax.mul)
case(FUNCTIONS, "div", lax.div)
case(FUNCTIONS, "rem", lambda h, k: lax.rem(h, k + 0.1))
case(FUNCTIONS, "pow", lax.pow)
case(FUNCTIONS, "atan2", lax.atan2)
case(FUNCTIONS, "max", lax.max)
case(FUNCTIONS, "min", lax.min)
case(FUNCTIONS, "clamp", lambda h: lax.clamp(0.2, h, 0.5))
case(FUNCTIONS, "select_n", lambda h, k: jnp.where(h > 2 * k, h, k))
case(FUNCTIONS, "add_any", lambda h: jax.grad(lambda h: jnp.sum(jnp.sin(h) * h))(h))
case(FUNCTIONS, "convert_element_type", lambda h: h.astype(jnp.float32))
case(FUNCTIONS, "reduce_precision", lambda h: lax.reduce_precision(h, 11, 52))
case(FUNCTIONS, "name", lambda h: checkpoint_name(h, "h"))
case(FUNCTIONS, "copy copy_p", lambda h: jnp.array(h, copy=True))
case(FUNCTIONS, "polygamma", lambda h: lax.polygamma(jnp.ones_like(h), h + 1), "of its second argument")
case(FUNCTIONS, "zeta", lambda h: special.zeta(jnp.full_like(h, 3.0), h + 1), "of its second argument")
case(FUNCTIONS, "igamma", lambda h: lax.igamma(jnp.full_like(h, 1.5), h), "of its second argument")
case(FUNCTIONS, "igammac", lambda h: lax.igammac(jnp.full_like(h, 1.5), h), "of its second argument")
case(FUNCTIONS, "igamma", lambda h: lax.igamma(h, jnp.full_like(h, 1.5)), "of its first argument")
case(FUNCTIONS, "regularized_incomplete_beta", lambda h: lax.betainc(h + 1, h + 2, jnp.full_like(h, 0.3)), "of a, b")
case(
    FUNCTIONS, "regularized_incomplete_beta", lambda h: lax.betainc(jnp.full_like(h, 1.5), jnp.full_like(h, 2.0), h), "of x"
)
case(FUNCTIONS, "polygamma", lambda h: lax.polygamma(h, jnp.full_like(h, 1.5)), "of its first argument")
case(FUNCTIONS, "zeta", lambda h: lax.zeta(h + 2, jnp.full_like(h, 1.5)), "of its first argument")

for _name in ["ceil", "floor", "is_finite", "round", "sign"]:
    case(FLAT, _name, getattr(lax, _name))
for _name in ["eq", "ge", "gt", "le", "lt", "ne"]:
    case(FLAT, _name, getattr(lax, _name))
for _name in ["and", "or", "xor"]:
    case(FLAT, _name, lambda h, k, _name=_name: getattr(lax, f"bitwise_{_name}")(h > 0.3, k > 0.1))
case(FLAT, "not", lambda h: ~(h > 0.3))
case(FLAT, "argmax", jnp.argmax)
case(FLAT, "argmin", jnp.argmin)
case(FLAT, "reduce_and", lambda h: jnp.all(h > 0.3))
case(FLAT, "reduce_or", lambda h: jnp.any(h > 0.3))
case(FLAT, "stop_gradient", lax.stop_gradient)
case(FLAT, "population_count", lambda h: lax.population_count((8 * h).astype(int)))
case(FLAT, "shift_left", lambda h: (8 * h).astype(int) << 1)

case(MOVES, "broadcast_in_dim", lambda h: jnp.broadcast_to(h, (3, UNITS)))
case(MOVES, "reshape expand_dims", lambda h: h.reshape(2, 2))
case(MOVES, "squeeze", lambda h: lax.squeeze(h[None], (0,)))
case(MOVES, "transpose", lambda h: h.reshape(2, 2).T)
case(MOVES, "rev", lambda h: h[::-1])
case(MOVES, "slice", lambda h: lax.slice(h, (1,), (3,)))
case(MOVES, "split", lambda h: jnp.split(h, 2)[0])
case(MOVES, "concatenate", lambda h, k: jnp.concatenate([h, k]))
case(MOVES, "stack|concatenate", lambda h, k: jnp.stack([h, k]))
case(MOVES, "unstack|split slice", lambda h: jnp.unstack(h.reshape(2, 2))[1])
case(MOVES, "tile|broadcast_in_dim", lambda h: jnp.tile(h, 2))
case(MOVES, "pad", lambda h: jnp.pad(h, 1))
case(MOVES, "dynamic_slice", lambda h: lax.dynamic_slice(h, (jnp.argmax(h) // 2,), (2,)), "of an activation")
case(MOVES, "dynamic_update_slice", lambda h, k: lax.dynamic_update_slice(h, k[:2], (1,)))
case(MOVES, "gather", lambda h: h[jnp.array([0, 2, 2])], "of an activation")
case(MOVES, "scatter", lambda h, k: h.at[jnp.array([0, 2])].set(k[:2]))
case(MOVES, "optimization_barrier", lax.optimization_barrier)
case(MOVES, "device_put", lambda h: jax.device_put(h))
case(
    MOVES,
    "sharding_constraint",
    lambda h: lax.with_sharding_constraint(h, jax.sharding.SingleDeviceSharding(jax.devices()[0])),
)

case(SUMS, "reduce_sum", jnp.sum)
case(SUMS, "reduce_max", jnp.max)
case(SUMS, "reduce_min", jnp.min)
case(SUMS, "reduce_prod", jnp.prod)
case(SUMS, "cumsum", lambda h: lax.cumsum(h))
case(SUMS, "cummax", lambda h: lax.cummax(h))
case(SUMS, "cummin", lambda h: lax.cummin(h))
case(SUMS, "cumprod", lambda h: lax.cumprod(h))
case(SUMS, "cumlogsumexp", lambda h: lax.cumlogsumexp(h))
case(SUMS, "reduce_window_sum", lambda h: lax.reduce_window(h, 0.0, lax.add, (2,), (1,), "VALID"))
case(SUMS, "reduce_window_max", lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (2,), (1,), "VALID"))
case(SUMS, "reduce_window_min", lambda h: lax.reduce_window(h, jnp.inf, lax.min, (2,), (1,), "VALID"))
case(SUMS, "select_and_scatter_add", lambda h: jax.grad(lambda h: jnp.sum(_pooled(h) ** 2))(h))
case(SUMS, "select_and_gather_add", lambda h, k: jax.jvp(_pooled, (h,), (k,))[1])
case(SUMS, "reduce_window", lambda h: lax.reduce_window(h, 1.0, lax.mul, (2,), (1,), "VALID"), "of another function")
case(SUMS, "reduce", lambda h: lax.reduce(h, 0.0, lambda a, b: a + b + a * b, (0,)), "of another function")
case(SUMS, "scatter-add scatter_add", lambda h, k: h.at[jnp.array([0, 2, 2])].add(k[:3]))
case(SUMS, "scatter-mul scatter_mul", lambda h, k: h.at[jnp.array([0, 2])].multiply(k[:2], unique_indices=True))
case(SUMS, "scatter-max scatter_max", lambda h, k: h.at[jnp.array([0, 2])].max(k[:2]))
case(SUMS, "scatter-min scatter_min", lambda h, k: h.at[jnp.array([0, 2])].min(k[:2]))
case(SUMS, "sort", jnp.sort, "of one array")
case(SUMS, "sort", lambda h, k: lax.sort((h, k), num_keys=1), "of several arrays")
case(SUMS, "top_k", lambda h: lax.top_k(h, 2)[0])
case(SUMS, "approx_top_k", lambda h: lax.approx_max_k(h, 2)[0])


def _pooled(h):
    return lax.reduce_window(h, -jnp.inf, lax.max, (2,), (1,), "VALID")


W = (UNITS, UNITS)
case(PRODUCTS, "dot_general", lambda p, x, i: p["w"] @ x, "of a weight and data", w=W)
case(PRODUCTS, "dot_general", lambda p, x, i: p["w"] @ (p["a"] * x), "of a weight and activations", w=W, a=(UNITS,))
case(PRODUCTS, "dot_general", lambda h: jnp.ones((2, UNITS)) @ h, "of activations and data or constants")
case(PRODUCTS, "dot_general", lambda h, k: h.reshape(2, 2) @ k.reshape(2, 2), "of activations")
case(PRODUCTS, "dot_general", lambda h: h @ h, "of an activation and itself")
case(PRODUCTS, "dot_general", lambda p, x, i: jnp.sin(p["w"] @ p["v"]) @ x, "of two weights", w=W, v=W)

X = (1, 1, UNITS)
K = (2, 1, 2)
case(KERNELS, "conv_general_dilated", lambda p, x, i: _convolved(x, p["k"]), "of a kernel and data or activations", k=K)
case(KERNELS, "conv_general_dilated", lambda h: _convolved(h, jnp.ones(K)), "of activations and constants")
case(KERNELS, "conv_general_dilated", lambda h, k: _convolved(h, k.reshape(2, 1, 2)), "of activations")
case(KERNELS, "gather", lambda p, x, i: p["table"][jnp.stack([i, i - 1])], "of rows of a table", table=(3, 2))
case(KERNELS, "dynamic_slice", lambda p, x, i: _rows(p["table"], i, 1), "of a row of a table", table=(3, 2))
case(KERNELS, "dynamic_slice", lambda p, x, i: _rows(p["table"], i, 2), "of several rows", table=(4, 2))


def _convolved(x, kernel):
    return lax.conv_general_dilated(x.reshape(X), kernel, (1,), "VALID")


def _rows(table, first, count):
    return lax.dynamic_slice(table, (first, 0), (count, 2))


def _symmetric(h):
    return jnp.diag(2 + h) + jnp.outer(h, h)


case(ALGEBRA, "cholesky", lambda h: jnp.linalg.cholesky(_symmetric(h)))
case(ALGEBRA, "triangular_solve", lambda h, k: jax.scipy.linalg.solve_triangular(_symmetric(h), k))
case(ALGEBRA, "lu", lambda h: jax.scipy.linalg.lu_factor(_symmetric(h))[0])
case(ALGEBRA, "custom_linear_solve", lambda h, k: jnp.linalg.solve(_symmetric(h), k), "(`jnp.linalg.solve`, `inv`)")
case(ALGEBRA, "custom_linear_solve", lambda h, k: cg(_symmetric(h), k, maxiter=9)[0], "(`cg`)")
case(ALGEBRA, "qr", lambda h: jnp.linalg.qr(_symmetric(h))[1])
case(ALGEBRA, "householder_product", lambda h: lax.linalg.householder_product(_symmetric(h), h))
case(ALGEBRA, "eigh", lambda h: jnp.linalg.eigh(_symmetric(h))[0])
case(ALGEBRA, "svd", lambda h: jnp.linalg.svd(_symmetric(h), compute_uv=False), "(singular values)")
case(ALGEBRA, "eig", lambda h: jnp.abs(jnp.linalg.eigvals(_symmetric(h))))
case(ALGEBRA, "schur", lambda h: jax.scipy.linalg.schur(_symmetric(h))[0])
case(ALGEBRA, "hessenberg", lambda h: lax.linalg.hessenberg(_symmetric(h))[0])
case(ALGEBRA, "tridiagonal", lambda h: lax.linalg.tridiagonal(_symmetric(h))[1])
case(ALGEBRA, "tridiagonal_solve", lambda h, k: lax.linalg.tridiagonal_solve(k, h + 2, k, h[:, None]))


def _cell(p):
    def step(h, x):
        h = jnp.tanh(p["u"] @ h + x)
        return h, h

    return step


U, START = {"u": (2, 2)}, (np.ones(2), np.ones((2, 2)))
case(LOOPS, "scan", lambda p, x, i: lax.scan(_cell(p), jnp.ones(2), x.reshape(2, 2)), "over an example", **U)
case(LOOPS, "scan", lambda p, x, i: lax.scan(_cell(p), *START)[0] @ x[:2], "over parameters alone", **U)
case(LOOPS, "scan", lambda p, x, i: lax.fori_loop(0, 3, lambda n, h: jnp.tanh(p["u"] @ h), x[:2]), "(`fori_loop`)", **U)
case(LOOPS, "while", lambda p, x, i: _repeated(p, x, 3), "of known length", **U)
case(LOOPS, "while", lambda p, x, i: _repeated(p, x, i), "whose length depends on data or parameters", **U)
case(LOOPS, "cond", lambda h: lax.cond(h[0] > h[1], jnp.sin, lambda h: h**2, h), "(`cond`, `switch`)")


def _repeated(p, x, steps):
    def more(state):
        return state[0] < steps

    return lax.while_loop(more, lambda state: (state[0] + 1, jnp.tanh(p["u"] @ state[1])), (0, x[:2]))[1]


case(CALLS, "jit pjit closed_call core_call xla_call", jax.jit(jnp.sin))
case(CALLS, "checkpoint remat remat2", jax.checkpoint(jnp.sin))


def _own_jvp(function, slope):
    rule = jax.custom_jvp(function)
    rule.defjvp(lambda p, t: (function(p[0]), slope(p[0], t[0])))
    return rule


def _own_vjp(function, pull):
    rule = jax.custom_vjp(function)
    rule.defvjp(lambda h: (function(h), h), lambda h, g: (pull(h, g),))
    return rule


def _gamma(h):
    return lax.igamma(h, jnp.full_like(h, 1.5))


def _pull_gamma(h, g):
    return lax.igamma_grad_a(h, jnp.full_like(h, 1.5)) * g


def _squares(h):
    return jnp.sum(h**2)


COMPONENTS, OTHERS = "component by component", "of any other function"
case(CALLS, "custom_jvp_call", lambda h: _own_jvp(jnp.sin, lambda h, t: jnp.cos(h) * t)(h), COMPONENTS)
case(CALLS, "custom_jvp_call", lambda h: _own_jvp(_squares, lambda h, t: jnp.sum(2 * h * t))(h), OTHERS)
VJP = "custom_vjp_call custom_vjp_call_jaxpr"
case(CALLS, VJP, lambda h: _own_vjp(jnp.sin, lambda h, g: jnp.cos(h) * g)(h), COMPONENTS)
case(CALLS, VJP, lambda h: _own_vjp(_squares, lambda h, g: 2 * h * g)(h), OTHERS)
NOT = "whose rule is not its derivative (straight through, reversed, clipped)"
case(CALLS, "custom_jvp_call", lambda h: _own_jvp(lambda h: jnp.round(h), lambda h, t: t)(h), NOT)
case(CALLS, VJP, lambda h: _own_vjp(lambda h: h * 1.0, lambda h, g: -g)(h), NOT)
case(CALLS, VJP, lambda h: _own_vjp(_gamma, _pull_gamma)(h), "whose rule has no derivative")
case(CALLS, "custom_vmap_call", lambda h: _own_vmap(h))


def _own_vmap(h):
    rule = jax.custom_batching.custom_vmap(jnp.sin)
    rule.def_vmap(lambda size, batched, h: (jnp.sin(h), True))
    return rule(h)


def _outside(h):
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return jax.pure_callback(np.sin, shape, h, vmap_method="sequential")


case(OUTSIDE, "complex", lambda h, k: jnp.abs(lax.complex(h, k)))
case(OUTSIDE, "fft", lambda h: jnp.abs(jnp.fft.rfft(h)))
case(OUTSIDE, "random_bits", lambda h: h * jax.random.bernoulli(jax.random.key(0), shape=h.shape), "(dropout)")
case(OUTSIDE, "pure_callback", lambda h: _outside(h))
case(OUTSIDE, "psum psum_invariant", lambda h: lax.psum(h, "batch"), "over the examples of the batch")
