"""The examples run, and what they show is right."""

import importlib.util
import pathlib

import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def load(name):
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_digits(tmp_path, capsys):
    picture = tmp_path / "digits.png"
    studies = load("digits").main(["--picture", str(picture), "--steps", "150"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "KroneckerProductSum" in capsys.readouterr().out
    for study in studies:
        assert study["difference"] < 1e-10
        np.testing.assert_allclose(study["eigenvalues"].sum(), study["block"].trace(), rtol=1e-9)
