"""The studies in examples/, a few steps of each. What they show at full length is in docs/studies.md."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
STEPS = {"digits": 100, "chars": 50, "prieto": 50, "nanda": 50}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, small enough for a test."""
    if name == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def tables(result: Any) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Metrics, curvature and PCA of a study."""
    if isinstance(result, tuple):
        metrics, monitor = result
        return metrics, monitor.records(), monitor.pca_records()
    return result.metrics, result.curvature, result.pca_history


def test_each_script_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*STEPS, "figure"}


@pytest.mark.parametrize("name", STEPS)
def test_a_study(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    module = load(name, monkeypatch)
    small = {"p": 11} if name in ("prieto", "nanda") else {}
    result = module.study(STEPS[name], **small)
    metrics, curvature, pca = tables(result)
    assert metrics["step"].iloc[0] == 0
    assert metrics["step"].iloc[-1] == STEPS[name]
    assert metrics["train_acc"].iloc[-1] > metrics["train_acc"].iloc[0]
    assert metrics[["train_acc", "test_acc"]].stack().between(0, 1).all()
    assert len(curvature) >= 1
    assert curvature["reliable"].all()
    assert set(curvature["method"]) == {"difference" if name == "chars" else "bracket"}
    assert pca["pc1_percent"].dropna().between(0, 100.0001).all()

    torch.manual_seed(1)  # nor does it depend on what came before
    again, same_curvature, same_pca = tables(module.study(STEPS[name], **small))
    columns = ["step", "train_acc", "test_acc"]
    pd.testing.assert_frame_equal(metrics[columns], again[columns])
    pd.testing.assert_frame_equal(
        curvature.drop(columns="measure_seconds"), same_curvature.drop(columns="measure_seconds")
    )
    pd.testing.assert_frame_equal(pca, same_pca)

    monkeypatch.setattr(module, "study", lambda *_: result)
    module.main(STEPS[name], tmp_path / "figure.png", **small)
    assert "train_acc" in capsys.readouterr().out
    image = matplotlib.image.imread(tmp_path / "figure.png")
    assert image.shape[:2] == (650, 700)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_a_gradient_loses_its_part_along_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    module, model = load("prieto", monkeypatch), torch.nn.Linear(7, 5, bias=False)
    model.weight.grad = torch.randn(5, 7) + model.weight.detach()
    length = model.weight.grad.norm()
    module.orthogonalise(model)
    torch.testing.assert_close(model.weight.grad.norm(), length)
    assert abs((model.weight * model.weight.grad).sum()) < 1e-5 * model.weight.norm() * length


def test_remedies_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("prieto", monkeypatch)
    losses = [module.study(25, remedy, p=7)[0]["loss"].iloc[-1] for remedy in ("none", "decay", "orthogonal")]
    assert len(set(losses)) == 3


def test_a_script_runs_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "chars.py"), "--steps", "2", "--out", str(tmp_path / "figure.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split()[:3] == ["step", "train_acc", "test_acc"]
    assert (tmp_path / "figure.png").exists()


def test_the_documentation_names_each_study() -> None:
    text = (ROOT / "docs" / "studies.md").read_text()
    for name in STEPS:
        assert re.search(rf"^python examples/{name}\.py", text, re.MULTILINE)
        assert (ROOT / "docs" / re.search(rf"\((images/{name}\.png)\)", text)[1]).exists()
