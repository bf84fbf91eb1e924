"""The code of every page runs as it stands there, block after block in one namespace for each page."""

import pathlib
import re

import jax
import pytest

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def blocks_of(text):
    """The line that each block marked as Python starts at, and its code, without the indentation of a list."""
    for match in re.finditer(r"^( *)```python[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE):
        indent = len(match.group(1))
        code = "".join(line[indent:] if line.strip() else "\n" for line in match.group(2).splitlines(keepends=True))
        yield 1 + text.count("\n", 0, match.start(2)), code


def test_blocks_are_found():
    listed = "* item\n\n  ```python title='b'\n  if a:\n      b = 2\n\n  c = 3\n  ```\n\n"
    text = f"```python\na = 1\n```\n\n{listed}```sh\nls\n```\n"
    assert list(blocks_of(text)) == [(2, "a = 1\n"), (8, "if a:\n    b = 2\n\nc = 3\n")]


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"):
        for line, code in blocks_of((DOCS / page).read_text()):
            # Empty lines before it: an error is reported at its line of the page.
            exec(compile("\n" * (line - 1) + code, f"docs/{page}", "exec"), names)


def test_the_page_on_models_shows_each_library():
    text = (DOCS / "models.md").read_text()
    code = "".join(block for _, block in blocks_of(text))
    for library in ("from flax import nnx", "from flax import linen", "import equinox", "import haiku", "scipy"):
        assert library in code
