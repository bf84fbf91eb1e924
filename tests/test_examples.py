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


@pytest.mark.slow
def test_sunspots(tmp_path, capsys):
    picture = tmp_path / "sunspots.png"
    stages = load("sunspots").main(["--picture", str(picture), "--steps", "20"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "linear autoregression, 32 lags" in capsys.readouterr().out
    assert max(stage["difference"] for stage in stages) < 1e-10
    for spectrum in stages[0]["spectra"]:
        # U halves what it carries, so after 32 steps the first ones have no curvature left.
        np.testing.assert_allclose(spectrum[64]["U"], spectrum[32]["U"], atol=1e-6)
        assert not np.allclose(spectrum[32]["U"], spectrum[2]["U"], atol=1e-2)


@pytest.mark.slow
def test_sequential_digits(tmp_path, capsys):
    picture = tmp_path / "sequential_digits.png"
    stages = load("sequential_digits").main(["--picture", str(picture), "--steps", "240"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "ImplicitKroneckerSum" in capsys.readouterr().out
    assert stages[-1]["accuracy"] > 0.9
    for stage in stages:
        np.testing.assert_allclose(stage["pairs"].sum(), stage["spectra"]["recurrent/weight"].sum(), rtol=1e-9)
        np.testing.assert_allclose(stage["pairs"], stage["pairs"].T, atol=1e-12)


@pytest.mark.slow
def test_any_model(tmp_path, capsys):
    picture = tmp_path / "any_model.png"
    studies, whole = load("any_model").main(["--picture", str(picture), "--steps", "150"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Gauss-Newton leaves out" in capsys.readouterr().out
    for study in studies:
        assert min(study["accuracies"]) > 0.5
        for parameter in study["parameters"].values():
            assert parameter["difference"] < 1e-10
            scale = np.abs(parameter["matrix"]).max()
            np.testing.assert_allclose(parameter["diagonal"], np.diagonal(parameter["matrix"]), atol=1e-10 * scale)
    H, G = whole["hessian"], whole["gauss_newton"]
    assert whole["difference"] < 1e-10
    # The last layer is linear in its own parameters, so its blocks are those of Gauss-Newton; others are not.
    last = whole["sizes"]["head/weight"] + whole["sizes"]["head/bias"]
    np.testing.assert_allclose(H[-last:, -last:], G[-last:, -last:], atol=1e-10 * np.abs(H).max())
    assert not np.allclose(H[:-last, :-last], G[:-last, :-last], atol=1e-4 * np.abs(H).max())
    assert whole["eigenvalues"]["gauss_newton"].min() > -1e-10 * np.abs(G).max()
