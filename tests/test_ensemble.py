"""An ensemble's runs are what they would be alone."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import TINY

from grokcurv.runs import Run, RunError, open_run
from grokcurv.training import TrainConfig, train, train_ensemble
from grokcurv.training.trainer import SHARED

MIXED = [
    {},
    {"op": "mul", "seed": 1, "lr": 3e-3, "weight_decay": 0.1},
    {"op": "x2_y2", "seed": 2, "beta1": 0.8, "beta2": 0.95, "clip": 0.0, "warmup": 5, "alignment": True},
    {"op": "sub", "seed": 3, "clip": 0.01, "steps": 25, "train_fraction": 0.7},
    {"op": "add", "seed": 4, "measure_every": 0},
    {"op": "div", "seed": 5, "eval_every": 7, "measure_every": 3, "pairs": 1, "pca_every": 0},
]


def configs(base: TrainConfig = TINY) -> list[TrainConfig]:
    return [dataclasses.replace(base, **values) for values in MIXED]


def assert_same(one: Run, other: Run) -> None:
    assert one.status == other.status
    for name in ("metrics", "curvature", "pca_history"):
        frames = [
            getattr(run, name).drop(columns=["seconds", "measure_seconds"], errors="ignore") for run in (one, other)
        ]
        if not all(frame.empty for frame in frames):
            pd.testing.assert_frame_equal(*(frame.reset_index(drop=True) for frame in frames), check_exact=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder = tmp_path_factory.mktemp("alone")
    return [train(config, out=folder / str(config.seed)) for config in configs()]


def test_every_run_is_bitwise_what_it_is_alone(alone: list[Run], tmp_path: Path) -> None:
    outs = [tmp_path / str(i) for i in range(len(MIXED))]
    runs = train_ensemble(configs(), outs=outs)
    for one, run in zip(alone, runs, strict=True):
        assert_same(run, one)
        torch.testing.assert_close(run.checkpoint()["model"], one.checkpoint()["model"], rtol=0, atol=0)
        torch.testing.assert_close(run.checkpoint()["optimizer"], one.checkpoint()["optimizer"], rtol=0, atol=0)


def test_successive_steps() -> None:
    base = dataclasses.replace(TINY, successive=True, pairs=1, measure_every=1, steps=20, alignment=True)
    changed = [dataclasses.replace(base, seed=seed, lr=lr) for seed, lr in ((1, 1e-3), (2, 3e-3))]
    for config, run in zip(changed, train_ensemble(changed), strict=True):
        assert_same(run, train(config))
        assert len(run.curvature) == 20


def test_successive_steps_as_one_program() -> None:
    """The gradients on both batches of a pair are taken together, and training is what it is without."""
    base = dataclasses.replace(TINY, successive=True, pairs=1, measure_every=1, steps=20)
    changed = [dataclasses.replace(base, seed=seed) for seed in (1, 2)]
    loop, vmap = (train_ensemble(changed, strategy=strategy) for strategy in ("loop", "vmap"))
    plain = train_ensemble([dataclasses.replace(one, measure_every=0) for one in changed], strategy="vmap")
    for one, together, unmeasured in zip(loop, vmap, plain, strict=True):
        assert together.curvature["reliable"].all()
        columns = ["defect_median", "grad_norm", "grad_cosine", "bracket_norm"]
        np.testing.assert_allclose(together.curvature[columns], one.curvature[columns], rtol=5e-3)
        metrics = (run.metrics.drop(columns="seconds") for run in (together, unmeasured))
        pd.testing.assert_frame_equal(*metrics, check_exact=True)


def test_one_program_agrees_over_200_steps() -> None:
    """Batched products round differently, and training amplifies that: in 200 steps to less than a thousandth."""
    longer = [dataclasses.replace(c, steps=200, eval_every=20) for c in configs()]
    for config, run in zip(longer, train_ensemble(longer, strategy="vmap"), strict=True):
        alone = train(config)
        for name in ("train_loss", "test_loss", "weight_norm"):
            np.testing.assert_allclose(run.metrics[name], alone.metrics[name], rtol=1e-3)
        if config.measure_every:
            assert len(run.curvature) == len(alone.curvature)
            same = run.curvature["method"] == alone.curvature["method"]  # where the floor is close, rounding decides
            assert same.mean() > 0.8
            np.testing.assert_allclose(
                run.curvature["defect_median"][same], alone.curvature["defect_median"][same], rtol=1e-2
            )


def test_an_mlp_and_full_batches() -> None:
    base = dataclasses.replace(TINY, architecture="mlp", batch_size=0, float64_logits=True)
    changed = [dataclasses.replace(base, op=op) for op in ("add", "mul")]
    for config, run in zip(changed, train_ensemble(changed), strict=True):
        assert_same(run, train(config))
    with pytest.raises(ValueError, match="strategy 'vmap' needs batches of one size"):
        train_ensemble(changed, strategy="vmap")


def test_a_run_that_fails_leaves_the_others(tmp_path: Path) -> None:
    base = dataclasses.replace(TINY, layer_norm=False, sequence="a b =", measure_every=0)
    changed = [base, dataclasses.replace(base, lr=1e30), dataclasses.replace(base, seed=7)]
    runs = train_ensemble(changed, outs=[tmp_path / str(i) for i in range(3)])
    assert runs[1].status.startswith("failed: loss is")
    for index in (0, 2):
        assert_same(runs[index], train(changed[index]))


def test_runs_end_after_they_have_grokked() -> None:
    base = dataclasses.replace(TINY, grok_threshold=0.0, grok_patience=1, steps_after_grok=0, measure_every=0)
    changed = [dataclasses.replace(base, steps_after_grok=n) for n in (0, 10, 20)]
    assert [run.metrics["step"].max() for run in train_ensemble(changed)] == [0, 10, 20]


def test_ctrl_c_and_resume_end_the_same(alone: list[Run], tmp_path: Path) -> None:
    outs = [tmp_path / str(i) for i in range(len(MIXED))]

    def press(index: int, latest: dict[str, Any]) -> None:
        if index == 0 and latest["step"] == 20:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_ensemble(configs(), outs=outs, on_progress=press)
    assert {open_run(out).status for out in outs} == {"interrupted"}
    with pytest.raises(RunError, match="already holds this run"):
        train_ensemble(configs(), outs=outs)
    # One goes on alone, the others together: an ensemble's checkpoints are a run's own.
    train(configs()[0], out=outs[0], resume=True)
    for one, run in zip(alone, train_ensemble(configs(), outs=outs, resume=True), strict=True):
        assert_same(run, one)


@pytest.mark.long
def test_batched_products_grok_when_the_loop_does() -> None:
    base = TrainConfig(measure_every=0, eval_every=20, steps_after_grok=0, threads=1)
    settings = [dataclasses.replace(base, op=op, seed=seed) for op, seed in (("add", 42), ("mul", 137))]
    loop, vmap = (train_ensemble(settings, strategy=strategy) for strategy in ("loop", "vmap"))
    for one, other in zip(loop, vmap, strict=True):
        steps = [run.metrics["step"].iloc[-1] for run in (one, other)]
        print(f"grokked at {steps[0]} by the loop, {steps[1]} by vmap")
        assert steps[0] < base.steps
        assert steps[1] == pytest.approx(steps[0], rel=0.05)


@pytest.mark.parametrize("name", SHARED)
def test_runs_must_agree(name: str) -> None:
    other = {
        "p": 11,
        "architecture": "mlp",
        "layers": 2,
        "d_model": 32,
        "heads": 4,
        "d_ff": 32,
        "activation": "relu",
        "layer_norm": False,
        "sequence": "a b =",
        "batch_size": 8,
        "rng": "paper",
        "float64_logits": True,
        "successive": True,
        "device": "meta",
        "threads": 2,
        "compile": True,
    }[name]
    base = dataclasses.replace(TINY, pairs=1)
    with pytest.raises(ValueError, match=f"must agree in {name}; got {getattr(TINY, name)!r}, {other!r}"):
        train_ensemble([base, dataclasses.replace(base, **{name: other})])


def test_what_is_missing() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        train_ensemble([])
    with pytest.raises(ValueError, match="one folder for each of the 2 runs; got 1"):
        train_ensemble([TINY, TINY], outs=["a"])
    with pytest.raises(ValueError, match="resume needs outs"):
        train_ensemble([TINY], resume=True)
