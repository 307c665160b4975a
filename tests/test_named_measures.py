"""Measures that a run's settings name: what a run has of them does not depend on the runs beside it, nor on a stop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import TINY

from grokcurv.measures import MEASURES, Given, HessianEdges, measure_names, named_measures
from grokcurv.runs import Run
from grokcurv.training import TrainConfig, load_model, train, train_ensemble

CASES = [
    *((name, "drawn") for name in MEASURES),
    ("optimizer_commutator", "successive"),
    ("gradient_noise", "with anatomy"),
]
MODES = {
    "drawn": {"pairs": 2, "measure_every": 2},
    "with anatomy": {"pairs": 2, "measure_every": 2, "anatomy": True},
    "successive": {"pairs": 1, "measure_every": 1, "successive": True},
}


def settings(name: str, mode: str = "drawn", seed: int = 0, steps: int = 7) -> TrainConfig:
    shared = {"pca_every": 0, "eval_every": 7, "checkpoint_every": 100, "update_window": 3, "update_every": 2}
    return dataclasses.replace(TINY, **shared, **MODES[mode], measures=name, seed=seed, steps=steps)


def rows(run: Run) -> pd.DataFrame:
    return run.curvature.drop(columns="measure_seconds")


@pytest.fixture(autouse=True)
def fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanczos runs a third as long, which find nothing else out here."""
    monkeypatch.setitem(
        MEASURES, HessianEdges.name, lambda given: HessianEdges(given.batch, probes=2, lanczos_steps=20)
    )


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_of_three_runs_each_has_what_it_has_alone(name: str, mode: str, tmp_path: Path) -> None:
    configs = [settings(name, mode, seed) for seed in range(3)]
    folders = [tmp_path / str(config.seed) for config in configs]
    runs = train_ensemble(configs, outs=folders)
    for run, config in zip(runs, configs, strict=True):
        pd.testing.assert_frame_equal(rows(run), rows(train(config)), check_exact=True)
        assert rows(run)[list(named_measures(name, Given(batch=[]))[0].columns)].notna().any().any()
    unmeasured = train(dataclasses.replace(configs[0], measures=""), out=tmp_path / "unmeasured")
    pairs = zip(load_model(runs[0]).parameters(), load_model(unmeasured).parameters(), strict=True)
    assert all(torch.equal(mine, its) for mine, its in pairs)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_stopped_and_gone_on_with_it_is_never_stopped(name: str, mode: str, tmp_path: Path) -> None:
    whole = rows(train(settings(name, mode)))
    train(settings(name, mode, steps=4), out=tmp_path / "run")
    pd.testing.assert_frame_equal(rows(train(settings(name, mode), out=tmp_path / "run", resume=True)), whole)


def test_names() -> None:
    assert measure_names("") == []
    assert measure_names(" update_gram ,") == ["update_gram"]
    with pytest.raises(ValueError, match="none called 'gram'; there are update_gram"):
        settings("update_gram,gram")
    with pytest.raises(ValueError, match="'update_gram' twice"):
        settings("update_gram,update_gram")
    with pytest.raises(ValueError, match="need measure_every above 0; got 0"):
        dataclasses.replace(settings("update_gram"), measure_every=0)
    with pytest.raises(ValueError, match="update_window must be at least 3; got 2"):
        dataclasses.replace(settings("update_gram"), update_window=2)
