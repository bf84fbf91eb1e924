"""Writes docs/support.md from the rules themselves: `python tests/support_page.py`."""

import pathlib
from collections.abc import Iterable

import jax
from support_cases import CASES, Case
from support_plan import how, outcome

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "support.md"
COMMAND = "python tests/support_page.py"
KINDS = {
    "contraction": "contraction",
    "componentwise": "component-wise",
    "indexing": "moves components",
    "linear": "linear",
    "bilinear": "bilinear",
    "along time": "along time",
    "looked into": "looked into",
    "constant": "no curvature",
}
INTRODUCTION = f"""# What is exact, and how

`jaxhess.hessian` is exact or refuses: there is no operation that it approximates. This page says which it is, for JAX's
operations and for the layers of other libraries. It is written by `{COMMAND}` from the plan that the
library makes for a small error with each of them, and a test fails when it is no longer what the library does. Another test
holds every operation that is not refused against `jax.hessian`.

* **Exact closed form**: curvature passes the operation by its own formula.
    * *contraction*: a parameter meets a vector, `y = W z`. Its block is a sum of Kronecker products.
    * *component-wise*: first and second derivative are diagonal, as those of an activation.
    * *moves components*, *linear*: there is no second derivative. For extremes and sorting that is so piece by piece; at a
      tie the first derivative is the one that JAX takes.
    * *bilinear*: the product of two arrays that both depend on parameters; only the mixed second derivative is not zero.
    * *along time*: a loop is one block-bidiagonal system over its steps, and its blocks are products by substitution
      forwards and backwards, whatever the cell computes.
    * *looked into*: a call is what there is inside of it.
    * *no curvature*: the result is constant, or JAX takes its derivative to be zero.
* **Exact by local autodiff**: the operation has no formula of its own here. JAX differentiates it alone,
  twice, to a dense matrix over its own inputs; the rest of the network is not concerned.
* **Refused**: an error that names the operation and the line where it was written, for the reason given.

A name may stand in several rows, where how it is passed depends on what it is applied to: a *weight* is an array of
parameters or made of nothing else, an *activation* depends on parameters and data.
"""


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cells(case: Case) -> tuple[str, str, str]:
    found = outcome(case)
    closed = ", ".join(word for kind, word in KINDS.items() if kind in found.kinds)
    return closed, "yes" if "local" in found.kinds else "", found.refused


def operations() -> str:
    """The first part: a table for each section, operations with the same answer in one row."""
    parts = ["## Operations of JAX\n"]
    for section in dict.fromkeys(case.section for case in CASES):
        rows: dict[tuple[str, str, str], list[str]] = {}
        for case in CASES:
            if case.section == section:
                rows.setdefault(_cells(case), []).append(case.title)
        header = ("operation", "exact closed form", "exact by local autodiff", "refused")
        ordered = sorted(rows, key=lambda cells: (not cells[0], not cells[1]))
        parts.append(f"### {section}\n\n" + _table(header, ((", ".join(rows[cells]), *cells) for cells in ordered)))
    names = {case.names[0]: case.names[1:] for case in CASES if case.names[1:]}
    aliases = "; ".join(f"`{name}` is {' or '.join(f'`{n}`' for n in others)}" for name, others in names.items())
    parts.append(f"In other releases of JAX {aliases}.\n")
    return "\n".join(parts)


def layers() -> str:
    """The second part; it needs the libraries."""
    from support_layers import FUNCTIONS, LAYERS, LIBRARIES, as_model

    def answer(build) -> str:
        along_time, local = how(build)
        names = " and ".join(f"`{name}`" for name in local)
        return ("closed form" + ", along time" * along_time) if not local else f"local autodiff of {names}"

    def cell(row, library: str) -> str:
        return f"`{row[library][1]}`: {answer(row[library][0])}" if library in row else ""

    rows = [(title, *(cell(row, library) for library in LIBRARIES)) for title, row in LAYERS.items()]
    table = _table(("layer", *LIBRARIES), rows)
    parts = [
        "## Layers\n\nUnmodified layers, with parameters below them as well as in them. *Closed form* means that every "
        "operation of the layer has one; otherwise those that pass by local autodiff are named. None is refused; models of "
        "such layers are held against `jax.hessian` in the tests too.\n\n" + table
    ]
    rows = []
    for title, functions in FUNCTIONS.items():
        answers: dict[str, list[str]] = {}
        for name, function in functions.items():
            answers.setdefault(answer(as_model(function)), []).append(f"`{name}`")
        rows += [(title, ", ".join(names), found) for found, names in answers.items()]
    parts.append(_table(("functions", "names", "how"), rows))
    return "\n".join(parts)


def page() -> str:
    """The whole text."""
    return "\n".join([INTRODUCTION, operations(), layers()])


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    PAGE.write_text(page())
