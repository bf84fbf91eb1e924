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


@pytest.mark.slow
def test_pruning(tmp_path, capsys):
    picture = tmp_path / "pruning.png"
    arguments = ["--picture", str(picture), "--seeds", "1", "--units", "6", "--steps", "400", "--rounds", "4"]
    levels, results = load("pruning").main(arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "2 points lost after" in capsys.readouterr().out
    accuracy = {method: found[0, :, 0] for method, found in results.items()}
    training_error = {method: found[0, :, 1] for method, found in results.items()}
    assert accuracy["magnitude"][0] > 0.9
    # With half of the weights and more gone, the exact inverse keeps the network better than all that leave it out.
    for method in set(results) - {"optimal brain surgeon"}:
        np.testing.assert_array_equal(accuracy[method][0], accuracy["optimal brain surgeon"][0])
        assert np.all(training_error["optimal brain surgeon"][levels > 0.5] < training_error[method][levels > 0.5])


@pytest.mark.slow
def test_laplace(tmp_path, capsys):
    picture = tmp_path / "laplace.png"
    arguments = ["--picture", str(picture), "--units", "12", "--images", "60", "--steps", "400"]
    module = load("laplace")
    grid, chosen, forecasts, labels = module.main(arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "chosen by the exact Laplace evidence" in capsys.readouterr().out
    found = grid[1.0]
    dense = 60 * found["operator"].as_matrix() + np.eye(found["operator"].in_size())
    diagonal = np.log(np.diagonal(dense)).sum()
    # The two evidences differ by their determinants alone, and draws are those of the posterior.
    difference = found["evidence"]["exact Laplace"] - found["evidence"]["diagonal Laplace"]
    np.testing.assert_allclose(difference, (diagonal - np.linalg.slogdet(dense)[1]) / 2, rtol=1e-8)
    draws = np.asarray(found["draws"]["exact Laplace"]["out"]["b"])
    covariance = np.linalg.inv(dense)[-12 * 10 - 10 : -12 * 10, -12 * 10 - 10 : -12 * 10]
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.3 * covariance.max())
    # The exact evidence is nearer to the best weight decay, and its posterior is less sure of images upside down.
    test = {kind: grid[precision]["test"] for kind, precision in chosen.items()}
    assert test["exact Laplace"] <= test["diagonal Laplace"]
    assert module.nll(forecasts["exact Laplace"][90], labels) < module.nll(forecasts["network alone"][90], labels)


@pytest.mark.slow
def test_landscape(tmp_path, capsys):
    picture = tmp_path / "landscape.png"
    (run,) = load("landscape").main(["--picture", str(picture), "--networks", "1", "--units", "4", "--steps", "600"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "steps until 10% of the fall" in capsys.readouterr().out
    saddles = [point for point in run["points"] if "leave" in point]
    assert saddles
    for point in saddles:
        assert point["eigenvalues"][0] < 0
        assert point["negative"] == np.sum(point["eigenvalues"] < 0)
        assert point["leave"]["negative curvature"][0] < point["leave"]["gradient descent"][0] / 5


@pytest.mark.slow
def test_train_regression(tmp_path, capsys):
    picture = tmp_path / "train_regression.png"
    curves = load("train_regression").main(["--picture", str(picture), "--seconds", "1.5", "--points", "300"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Gauss-Newton's error is" in capsys.readouterr().out
    ours, adam = (errors for _, errors in curves.values())
    assert ours[-1] < adam[-1] / 2
    assert ours[-1] < ours[0] / 20


@pytest.mark.slow
def test_train_recurrent(tmp_path, capsys):
    picture = tmp_path / "train_recurrent.png"
    curves = load("train_recurrent").main(["--picture", str(picture), "--seconds", "1.5", "--steps", "10"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "wrong at the end" in capsys.readouterr().out
    ours, adam = (shares for _, shares in curves.values())
    assert ours[-1] < 0.5 * ours[0]
    assert ours[-1] <= adam[-1]
