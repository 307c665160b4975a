"""The public names, pinned: none comes or goes unseen, and old ones still work and say what they are called now."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import grokcurv as gc
from grokcurv import flat, modular, partition, tasks, training
from grokcurv.cli import main
from grokcurv.gradients import GradientEngine
from grokcurv.runs import RunWriter, open_run
from grokcurv.sweep import SweepConfig
from grokcurv.training import TrainConfig, train

PUBLIC: dict[str, list[str]] = {}
"""By module of the documentation, its names."""

for line in (Path(__file__).parent / "data/public_names.txt").read_text().splitlines():
    if line.startswith(" "):
        PUBLIC[next(reversed(PUBLIC))].append(line.strip())
    else:
        PUBLIC[line] = []

OPTIONAL = {"grokcurv.integrations.huggingface": "transformers", "grokcurv.integrations.lightning": "lightning"}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module: str) -> None:
    if module in OPTIONAL:
        pytest.importorskip(OPTIONAL[module])
    found = import_module(module)
    own = [n for n, x in vars(found).items() if not n.startswith("_") and getattr(x, "__module__", None) == module]
    assert sorted(getattr(found, "__all__", own)) == PUBLIC[module]
    for name in PUBLIC[module]:
        assert getattr(found, name) is not None


# -------------------------------------------------------------------------------------------------------- old names


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


@pytest.mark.parametrize("make", [gc.CommutatorProbe, gc.CurvatureMonitor])
def test_the_published_method_by_its_old_name(make: Any) -> None:
    with pytest.warns(FutureWarning, match="'reference' is called 'published' now"):
        made = make(nn.Linear(3, 2), loss_fn, method="reference")
    assert getattr(made, "probe", made).method == "published"
    with pytest.raises(ValueError, match="method must be one of difference, bracket, published, got 'exact'"):
        make(nn.Linear(3, 2), loss_fn, method="exact")


def test_what_the_old_name_measures(generator: torch.Generator) -> None:
    model, pair = nn.Linear(3, 2), (torch.randn(4, 3, generator=generator), torch.randn(4, 3, generator=generator))
    with pytest.warns(FutureWarning):
        old = gc.commutator_defect(model, loss_fn, *pair, method="reference")
    new = gc.commutator_defect(model, loss_fn, *pair, method="published")
    assert old.method == new.method == "published"
    assert torch.equal(old.defect, new.defect)
    assert torch.equal(new.defect, new.reference)


def test_other_old_names() -> None:
    engine = GradientEngine(nn.Linear(3, 2), loss_fn)
    with pytest.warns(FutureWarning, match="is_nonsmooth"):
        assert not engine.kinked(torch.randn(4, 3))
    for old, new in (("Coordinates", "Partition"), ("ALL_HERE", "WHOLE")):
        with pytest.warns(FutureWarning, match=new):
            assert getattr(flat, old) is getattr(partition, new)
    with pytest.raises(AttributeError, match="no attribute 'Coordinate'"):
        _ = flat.Coordinate  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        *((name, f"tasks.modular.{name}") for name in ("fast", "fourier", "model")),
        *((name, f"training.{name}") for name in ("config", "draws", "network", "process", "trainer")),
        ("tasks", "tasks.modular.operations"),
    ],
)
def test_modules_where_they_were(old: str, new: str) -> None:
    assert import_module(f"grokcurv.modular.{old}") is import_module(f"grokcurv.{new}")
    assert getattr(modular, old) is import_module(f"grokcurv.{new}")


def test_names_where_they_were() -> None:
    for name in modular.__all__:
        assert getattr(modular, name) is getattr(training, name, getattr(tasks, name, None))


SMALL: dict[str, Any] = {
    "p": 7,
    "d_model": 8,
    "d_ff": 8,
    "heads": 2,
    "batch_size": 8,
    "measure_every": 5,
    "eval_every": 5,
}


def test_folders_of_an_older_version_are_read_and_gone_on_with(tmp_path: Path) -> None:
    config = TrainConfig(**SMALL, steps=10, method="published")
    older = {**asdict(config), "method": "reference"}
    with RunWriter(tmp_path / "old", older):
        pass
    run = open_run(tmp_path / "old")
    assert run.config == asdict(config)  # without a warning: nobody here could do anything about it
    gone_on = train(config, out=tmp_path / "old", resume=True)
    fresh = train(config)
    same = gone_on.curvature.drop(columns="measure_seconds"), fresh.curvature.drop(columns="measure_seconds")
    pd.testing.assert_frame_equal(*same, check_exact=True)
    assert {"reference_median", "reference_p25", "reference_p75"} <= set(gone_on.curvature)


def test_settings_by_their_old_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(FutureWarning, match="published"):
        assert TrainConfig(**SMALL, method="reference").method == "published"
    with pytest.warns(FutureWarning, match="published"):
        sweep = SweepConfig(run=SMALL, grid={"method": ["difference", "reference"]})
    assert [config.method for config in sweep.plan.values()] == ["difference", "published"]
    flags = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for said in (["--method", "reference"], ["--method=reference"]):
        out = tmp_path / str(len(said))
        assert main(["train", *flags, "--steps", "5", *said, "--out", str(out)]) == 0
        assert "--method reference is called --method published now" in capsys.readouterr().err
        assert open_run(out).config["method"] == "published"
