"""A program of several runs: each is what it is alone, and a step is on the device alone, captured and replayed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tape
import torch
from models import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from grokcurv.gradients import Strategy
from grokcurv.report import write_report
from grokcurv.runs import RunError, open_run
from grokcurv.training import TrainConfig, load_model, train, train_ensemble
from grokcurv.training.captured import Launcher
from grokcurv.training.program import Program
from grokcurv.training.run import Training

SUCCESSIVE = dataclasses.replace(TINY, successive=True, pairs=1, measure_every=1, pca_every=0, eval_every=1000)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[], None]]]:
    """Programs on the CPU are launched as on a GPU, with tapes for graphs; those that there are."""
    tapes: list[Callable[[], None]] = []

    def capture(run: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
        _, replay = tape.capture(run)
        recorded = [True]  # a tape, unlike a graph, has carried out what it noted

        def again() -> None:
            if not recorded:
                replay()
            recorded.clear()

        tapes.append(again)
        return again, pool

    monkeypatch.setattr("grokcurv.training.captured.capture", capture)
    with tape.patched("is_asynchronous", lambda device: True):
        yield tapes


SETTINGS = {
    "every step": {"pairs": 1, "successive": True, "measure_every": 1},
    "with a basis": {"pairs": 1, "successive": True, "measure_every": 1, "pca_every": 3},
    "now and then": {"pairs": 2, "measure_every": 2, "pca_every": 4},
    "not": {"measure_every": 0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_replays_of_captured_steps_are_steps(name: str, captured: list[Callable[[], None]]) -> None:
    """With new draws and new checks: the step that the device counts says which they are."""
    base = dataclasses.replace(TINY, **{"pca_every": 0} | SETTINGS[name])
    configs = [dataclasses.replace(base, seed=seed, lr=1e-3 * (seed + 1)) for seed in range(3)]
    replayed, eager = (Program([Training(config) for config in configs], "vmap") for _ in range(2))
    replayed.launcher = Launcher(True)
    for one in (replayed, eager):
        for group in one.groups:
            group.monitor.commutator.check_every = 4
        one.observe(one.runs)
        for _ in range(17):
            assert not one.update()
            assert not one.observe(one.runs)
    assert 1 <= len(captured) <= 6
    assert torch.equal(replayed.theta, eager.theta)
    for mine, its in zip(replayed.runs, eager.runs, strict=True):
        for table, wanted in its.tables().items():
            columns = [column for column in wanted.columns if "seconds" not in column]
            assert mine.tables()[table][columns].equals(wanted[columns]), table


def test_what_no_graph_holds_is_launched_and_all_else_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, launched = Launcher(True), {"good": 0, "bad": 0}

    def capture(run: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
        before = launched["bad"]
        run()
        if launched["bad"] > before:
            raise RuntimeError("not this one")
        return lambda: None, pool

    def launch(kind: str) -> str:
        launched[kind] += 1
        return kind

    monkeypatch.setattr("grokcurv.training.captured.capture", capture)
    kinds = ["good", "bad"] * 5
    with pytest.warns(UserWarning, match=r"operator by operator: no graph holds it \(not this one\)"):
        assert [launcher(kind, partial(launch, kind)) for kind in kinds] == kinds
    assert launched == {"good": 2, "bad": 6}


def test_a_run_that_ends_is_compacted_away(captured: list[Callable[[], None]]) -> None:
    base = dataclasses.replace(SUCCESSIVE, eval_every=10, pca_every=5)
    configs = [dataclasses.replace(base, seed=seed, steps=steps) for seed, steps in enumerate((30, 12, 30, 21))]
    replayed, eager = (Program([Training(config) for config in configs], "vmap") for _ in range(2))
    replayed.launcher = Launcher(True)
    assert replayed.train() == eager.train() == ["finished"] * 4
    assert len(captured) >= 3  # anew when one has left
    for mine, its in zip(replayed.all, eager.all, strict=True):
        for table, wanted in its.tables().items():
            columns = [column for column in wanted.columns if "seconds" not in column]
            assert mine.tables()[table][columns].equals(wanted[columns]), table


WHOLE = TrainConfig(measure_every=10, eval_every=10, threads=1)
MIXED = [
    {"op": "add", "seed": 1},
    {"op": "mul", "seed": 2, "lr": 3e-3},
    {"op": "add", "seed": 3, "optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-3},
    {"op": "mul", "seed": 4, "optimizer": "muon", "lr": 3e-3, "clip": 0.0, "warmup": 10},
]


@pytest.mark.parametrize("base", [TINY, pytest.param(WHOLE, marks=pytest.mark.long)], ids=["tiny", "whole"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_mixed_runs_are_what_they_are_alone(strategy: Strategy, base: TrainConfig) -> None:
    """Two operations, several rates, three optimisers: to the bit, or as far as batched products round otherwise."""
    configs = [dataclasses.replace(base, steps=200, pca_every=10, **mixed) for mixed in MIXED]
    exactly = strategy == "loop"
    for config, run in zip(configs, train_ensemble(configs, strategy=strategy), strict=True):
        alone = train(config)
        within = 0.0 if exactly else 2e-5  # of a loss, or of one where that is more
        for name in ("train_loss", "test_loss"):
            np.testing.assert_allclose(run.metrics[name], alone.metrics[name], rtol=within, atol=within)
        assert len(run.curvature) == len(alone.curvature) == 21
        alike = run.curvature["method"] == alone.curvature["method"]  # where the floor is close, rounding decides
        assert alike.mean() > (0.99 if exactly else 0.8)
        defects = (curvature["defect_median"][alike] for curvature in (run.curvature, alone.curvature))
        np.testing.assert_allclose(*defects, rtol=0.0 if exactly else 5e-3)


def test_draws_are_those_of_the_run_alone() -> None:
    configs = [dataclasses.replace(TINY, **{**mixed, "optimizer": "adamw"}) for mixed in MIXED]
    together = Program([Training(config) for config in configs], "vmap")
    alone = [Program([Training(config)]) for config in configs]
    for _ in range(3):
        for row, one in enumerate(alone):
            for drawn in (
                lambda x: x.batches.training(),
                lambda x: x.batches.training(following=True),
                lambda x: x.batches.measuring(2, 3)[1],
            ):
                for mine, its in zip(drawn(together)[row], drawn(one)[0], strict=True):
                    assert torch.equal(mine, its)
            now = one.batches.training(following=True)[0]
            one.batches.steps.add_(1)
            assert torch.equal(now[0], one.batches.training()[0][0])
        together.batches.steps.add_(1)


@pytest.mark.usefixtures("drawn_once")
def test_folders_of_older_draws_are_read_and_not_gone_on_with(tmp_path: Path) -> None:
    run = train(TINY, out=tmp_path)
    assert run.checkpoint()["draws"] == {}
    described = json.loads((tmp_path / "config.json").read_text())
    described["config"]["rng"] = "torch"
    (tmp_path / "config.json").write_text(json.dumps(described))
    old = open_run(tmp_path)
    assert load_model(old) is not None
    assert write_report(tmp_path).exists()
    with pytest.raises(ValueError, match="rng 'torch' is that of older versions, whose runs are read and reported"):
        train(TrainConfig(**old.config), out=tmp_path, resume=True)
    with pytest.raises(RunError, match="rng"):
        train(TINY, out=tmp_path, resume=True)


def test_the_papers_stream_is_for_one_run() -> None:
    with pytest.raises(ValueError, match="rng 'paper' has one stream for one run, which must be alone; got 2 runs"):
        train_ensemble([dataclasses.replace(TINY, rng="paper", seed=seed) for seed in (1, 2)])


class OnDevice(TorchDispatchMode):
    """No operator has tensors both of the host and of the meta device, where no number can be looked at.

    The package's own may: a table of segments is of the host and goes to the kernel by value.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = func.namespace == "grokcurv"
        assert own or len({x.device for x in tape.tensors((args, kwargs, result))}) <= 1, func
        return result


@pytest.mark.parametrize("options", [{}, {"successive": False, "pairs": 3}])
def test_a_step_neither_copies_from_the_host_nor_waits(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grokcurv.training.run.describe_device", str)  # "meta" cannot draw for interventions
    monkeypatch.setattr("grokcurv.measures.commutator.VERDICT_LAG", 100)  # there is no verdict to read
    configs = [dataclasses.replace(SUCCESSIVE, seed=seed, device="meta", **options) for seed in range(3)]
    one = Program([Training(config) for config in configs], "vmap")
    for _check in (True, False):
        with OnDevice():
            one.update()
            for group in one.groups:
                if not group.looks_ahead:
                    group.prepare()
                    group.advance(group.launch())
