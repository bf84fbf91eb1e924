"""The structure of the package: imports go down only, and every public name is documented."""

import ast
import inspect
import pathlib

import pytest

import jaxhess

PACKAGE = pathlib.Path(jaxhess.__file__).parent
# A file imports only from floors below its own, or from an earlier file of its own floor.
FLOORS = [
    ["_backend", "_typing", "_linalg"],
    [
        "_componentwise", "activations", "_softmax", "_sequence", "losses", "operators.support", "operators.mapped",
        "operators.layout", "operators.paths", "operators.vectors", "operators.krylov", "operators.minres",
        "operators.preconditioner", "operators.iterative", "operators.ritz", "operators.coarse", "operators.extremes",
        "operators.reduction", "operators.eigen", "operators.direct", "operators.functions", "operators.solvable",
        "operators.base", "operators.spectral", "operators.damped", "operators.kronecker", "operators.rearranged",
        "operators.nearest",
        "operators.low_rank", "operators.dense", "operators.contraction", "operators.uses", "operators.jacobian",
        "operators.gram", "operators.gauss_newton", "operators.gauss_newton_full", "operators.linearised",
        "operators.implicit", "operators.pullback", "operators.layer", "operators.cross", "operators.assembly",
        "operators.restricted", "operators.full", "operators.block", "operators.preconditioning", "operators",
    ],
    [
        "layers._common", "layers.dense", "layers.recurrent", "layers", "taps", "bounds", "spectra._common",
        "spectra.lanczos", "spectra.eigenvalues", "spectra.density", "spectra.estimates", "spectra.inertia", "spectra",
    ],
    [
        "engine.kinds", "engine.through_time", "engine.graph", "engine.loops", "engine.accurate", "engine.trace",
        "engine.views", "engine.rules.base", "engine.rules.linear", "engine.rules.elementwise", "engine.rules.local",
        "engine.rules", "engine.reach", "engine.convolution", "engine.lookup", "engine.contractions", "engine.partition",
        "engine.plan", "engine.custom", "engine.sweep", "engine.failure", "engine.implicit", "engine.compact",
        "engine.products", "engine.batch", "engine.labels", "engine.parameters", "engine.targets", "engine.assemble",
        "engine.diagonal", "engine.full", "engine.jacobian", "engine.gauss_newton", "engine.convex", "engine",
    ],
    [
        "transforms.checks", "transforms.traced", "transforms.products", "transforms.diagonals", "transforms.full",
        "transforms.targets", "transforms.hessian", "transforms.gauss_newton", "transforms",
    ],
    [
        "optimizers.damping", "optimizers.state", "optimizers.quadratic", "optimizers.trust_region", "optimizers.products",
        "optimizers.masking", "optimizers.method", "optimizers.flattened", "optimizers.conjugate", "optimizers.attempts",
        "optimizers.core", "optimizers.newton", "optimizers.kronecker_places", "optimizers.kronecker_factors",
        "optimizers.kronecker_inverse", "optimizers.gauss_newton", "optimizers.kronecker_newton", "optimizers.sampling",
        "optimizers.training", "optimizers",
    ],
    [
        "test_util", "naumov2017.feedforward", "naumov2017.recurrent", "naumov2017", "interop._common", "interop.flax",
        "interop.linen", "interop.equinox", "interop.scipy", "interop", "plotting",
    ],
    [""],
]  # fmt: skip
ORDER = [name for floor in FLOORS for name in floor]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxhess":
            base = node.module.partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in ORDER else base
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "jaxhess")


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_imports_go_down_only(name, path):
    assert name in ORDER, f"{name} has no place in the house"
    for imported in imports(path):
        assert ORDER.index(imported) < ORDER.index(name), f"{name} imports {imported}, which is not below it"


@pytest.mark.parametrize(("name", "path"), list(modules()))
def test_only_public_jax_and_rooms_of_a_size(name, path):
    text = path.read_text()
    assert "jax._src" not in text
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text)), f"{name} does not say what it is"


def test_init_files_only_export():
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr), path


def public_objects():
    rooms = (
        jaxhess.activations,
        jaxhess.bounds,
        jaxhess.losses,
        jaxhess.naumov2017,
        jaxhess.operators,
        jaxhess.plotting,
        jaxhess.spectra,
        jaxhess.test_util,
    )
    for module in (jaxhess, *rooms):
        for name in module.__all__:
            yield f"{module.__name__}.{name}", getattr(module, name)


@pytest.mark.parametrize(("name", "value"), list(public_objects()))
def test_public_names_are_documented(name, value):
    assert inspect.getdoc(value), f"{name} has no docstring"
