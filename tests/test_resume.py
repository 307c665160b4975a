"""A run that is killed at any instant and resumed ends as if it had never been killed.

``GROKCURV_KILLS=20`` kills at more moments than the few of an ordinary test run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from grokcurv import storage
from grokcurv.runs import Run, RunError, open_run, pack
from grokcurv.training import TrainConfig, train

KILLS = int(os.environ.get("GROKCURV_KILLS", "2"))

CONFIG = TrainConfig(
    p=11,
    layers=1,
    d_model=16,
    heads=2,
    d_ff=24,
    batch_size=24,
    steps=100,
    eval_every=10,
    pairs=2,
    measure_every=10,
    pca_every=5,
    checkpoint_every=7,
    snapshot_every=4,
    threads=1,
)

CHILD = """
import json, sys
from grokcurv.training import TrainConfig, train
config = TrainConfig(**json.loads(sys.argv[1]))
print(0, flush=True)
train(config, out=sys.argv[2], on_progress=lambda latest: print(latest["step"], flush=True))
"""

SIGNALLED = """
import sys
from grokcurv import cli, training
train = training.train
def telling(*args, on_progress, **how):
    return train(*args, on_progress=lambda latest: print(latest["step"], flush=True), **how)
training.train = telling
print(0, flush=True)
sys.exit(cli.main(["train", *sys.argv[1:]]))
"""


def tensors(state: object) -> dict[str, object]:
    """Everything a nested state holds, by path."""
    if isinstance(state, dict):
        return {f"{key}/{path}": value for key in state for path, value in tensors(state[key]).items()}
    if isinstance(state, list | tuple):
        return tensors(dict(enumerate(state)))
    return {"": state}


def assert_same_run(run: Run, other: Run) -> None:
    for name in ("metrics", "curvature", "pca_history"):
        a, b = (getattr(r, name).drop(columns=["seconds", "measure_seconds"], errors="ignore") for r in (run, other))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert run.snapshots == other.snapshots != []
    for step in run.snapshots:
        assert tensors(run.snapshot(step)).keys() == tensors(other.snapshot(step)).keys()
        assert all(map(torch.equal, run.snapshot(step).values(), other.snapshot(step).values()))
    a, b = tensors(run.checkpoint()), tensors(other.checkpoint())
    assert a.keys() == b.keys()
    for path, value in a.items():
        if "row_seconds" in path:
            continue
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[path].dtype, path
            assert value.equal(b[path]) or (value.isnan() == b[path].isnan()).all(), path
        else:
            assert value == b[path], path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That was never killed. Nobody writes to its folder."""
    return train(CONFIG, out=tmp_path_factory.mktemp("never killed") / "run")


@pytest.mark.parametrize("rng", ["philox", "paper"])
def test_killed_and_resumed_is_never_killed(tmp_path: Path, whole: Run, rng: str) -> None:
    config = dataclasses.replace(CONFIG, rng=rng)
    if config != CONFIG:
        whole = train(config, out=tmp_path / "whole")
    pause = 10 * whole.metrics["seconds"].max() / config.steps  # ten steps: how often the child reports
    arguments = [sys.executable, "-P", "-c", CHILD, json.dumps(dataclasses.asdict(config))]
    reached = []
    for kill in range(KILLS):
        folder = tmp_path / f"killed-{kill}"
        child = subprocess.Popen([*arguments, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child.stdout:
            moment = random.randrange(0, config.steps, 10)
            assert any(int(line) == moment for line in child.stdout)
            time.sleep(random.uniform(0.0, pause))
            child.kill()
            child.wait()
        reached.append(open_run(folder).metrics["step"].max() if (folder / "metrics.parquet").exists() else None)
        resumed = train(config, out=folder, resume=True)
        assert resumed.status == "finished"
        assert_same_run(resumed, whole)
    print(f"{rng}: killed at steps {reached} of {config.steps}")


def test_asked_to_end_it_writes_a_checkpoint(tmp_path: Path, whole: Run) -> None:
    """By Slurm, ``docker stop`` or a terminal that is closed, at any instant of training."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(CONFIG).items() if value != ""]
    flags = [re.sub("--(.*)=(True|False)", lambda m: f"--{'no-' * (m[2] == 'False')}{m[1]}", flag) for flag in flags]
    reached = []
    for kill in range(KILLS):
        number, folder = (signal.SIGTERM, signal.SIGHUP)[kill % 2], tmp_path / f"asked-{kill}"
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", SIGNALLED, *flags, "--out", str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        moment = random.randrange(10, CONFIG.steps, 10)
        assert any(int(line) == moment for line in child.stdout)
        time.sleep(random.uniform(0.0, 0.05))  # so that the signal comes anywhere in a step, not behind its report
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
        reached.append(open_run(folder).checkpoint()["step"])
        if child.returncode not in (0, -number):  # else it had ended before
            assert child.returncode == 128 + number, said
            assert open_run(folder).status == "interrupted"
            assert moment <= reached[-1] <= CONFIG.steps
            assert said.splitlines()[-1] == f"stopped; to go on: grokcurv train --resume --out {folder}"
        assert_same_run(train(CONFIG, out=folder, resume=True), whole)
    print(f"asked to end at steps {reached} of {CONFIG.steps}")


def test_a_run_is_extended(tmp_path: Path) -> None:
    """To more steps, with checkpoints at others: it is the longer run, whose evaluations are where its own are."""
    short = dataclasses.replace(CONFIG, steps=35, checkpoint_every=16, snapshot_every=5)
    train(short, out=tmp_path / "run")
    assert open_run(tmp_path / "run").metrics["step"].tolist() == [0, 10, 20, 30, 35]
    extended = train(dataclasses.replace(CONFIG, snapshot_every=5), out=tmp_path / "run", resume=True)
    assert_same_run(extended, train(dataclasses.replace(CONFIG, snapshot_every=5), out=tmp_path / "whole"))
    assert extended.config["steps"] == 100
    with pytest.raises(RunError, match="stands at step 100, and is to end at 35"):
        train(short, out=tmp_path / "run", resume=True)
    with pytest.raises(
        RunError, match=r"lr \(0.001 there, 0.5 here\); when it is resumed, steps, steps_after_grok, che"
    ):
        train(dataclasses.replace(CONFIG, lr=0.5), out=tmp_path / "run", resume=True)
    assert open_run(tmp_path / "run").status == "finished"


def test_tables_that_are_lost_are_written_anew(tmp_path: Path, whole: Run) -> None:
    for name in ("curvature.parquet", "pca.parquet", "environment.json", "status.json"):
        shutil.copytree(whole.path, folder := tmp_path / name)
        (folder / name).unlink()
        assert_same_run(train(CONFIG, out=folder, resume=True), whole)


def _other_checkpoint(folder: Path, **changes: object) -> None:
    state = storage.read_state(folder / "checkpoint.safetensors")
    (folder / "checkpoint.safetensors").write_bytes(pack(state | changes))


SWAPPED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "settings lost": (
        lambda run, other: (run / "config.json").unlink(),
        r"no config\.json, and a checkpoint.*seed \(42",
    ),
    "checkpoint of other settings": (
        lambda run, other: shutil.copy(other / "checkpoint.safetensors", run),
        r"checkpoint\.safetensors of another configuration: seed \(7 there, 42 here\)",
    ),
    "metrics of another run": (
        lambda run, other: shutil.copy(other / "metrics.parquet", run),
        r"metrics\.parquet is not what it was when checkpoint\.safetensors was written, at step 20",
    ),
    "curvature of another run": (
        lambda run, other: shutil.copy(other / "curvature.parquet", run),
        r"curvature\.parquet is not what it was",
    ),
    "a later step": (lambda run, other: _other_checkpoint(run, step=40), r"of step 40, and evaluations end at step 20"),
    "an earlier step": (lambda run, other: _other_checkpoint(run, step=1), r"metrics\.parquet is not what it was"),
    "no word of where it belongs": (
        lambda run, other: _other_checkpoint(run, belongs=None),
        r"checkpoint\.safetensors does not say to which run it belongs",
    ),
    "another dtype": (
        lambda run, other: _other_checkpoint(
            run, model={name: x.double() for name, x in open_run(run).checkpoint()["model"].items()}
        ),
        r"checkpoint\.safetensors does not fit .*torch\.float32\) here$",
    ),
    "a monitor of nonsense": (
        lambda run, other: _other_checkpoint(run, monitor={"pca": None}),
        r"checkpoint\.safetensors does not fit",
    ),
    "an optimizer of nonsense": (
        lambda run, other: _other_checkpoint(run, optimizer={"exp_avg": torch.zeros(3)}),
        r"checkpoint\.safetensors does not fit",
    ),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs of two seeds that stand at step 20."""
    folder = tmp_path_factory.mktemp("interrupted")

    def stop(latest: dict[str, object]) -> None:
        if latest["step"] == 20:
            signal.raise_signal(signal.SIGINT)

    for seed in (42, 7):
        with pytest.raises(KeyboardInterrupt):
            train(dataclasses.replace(CONFIG, seed=seed), out=folder / str(seed), on_progress=stop)
    return {seed: folder / str(seed) for seed in (42, 7)}


@pytest.mark.parametrize("swapped", SWAPPED)
def test_what_belongs_to_another_run_is_refused(swapped: str, interrupted: dict[int, Path], tmp_path: Path) -> None:
    """By name, before anything is deleted."""
    change, said = SWAPPED[swapped]
    run = tmp_path / "run"
    shutil.copytree(interrupted[42], run)
    change(run, interrupted[7])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "status.json"}
    config = dataclasses.replace(CONFIG, seed=7) if swapped == "settings lost" else CONFIG
    with pytest.raises(RunError, match=said):
        train(config, out=run, resume=True)
    tables = [path for path in before if path.suffix != ".json"]
    assert all(path.read_bytes() == before[path] for path in tables)


def test_without_resume_no_checkpoint_is_read(interrupted: dict[int, Path], tmp_path: Path, whole: Run) -> None:
    shutil.copytree(interrupted[42], tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(RunError, match=r"no config\.json, and yet .* of a run: choose another folder"):
        train(CONFIG, out=tmp_path / "run")
    assert_same_run(train(CONFIG, out=tmp_path / "run", resume=True), whole)


def test_stopped_between_tables_and_checkpoint(tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are then ahead of the checkpoint; resuming drops the rows that are."""
    from grokcurv.runs import RunWriter

    class Stop(BaseException):
        pass

    def stop(_writer: RunWriter, state: dict[str, object]) -> None:
        if state["step"] == 21:
            raise Stop
        write(_writer, state)

    write = RunWriter.write_checkpoint
    monkeypatch.setattr(RunWriter, "write_checkpoint", stop)
    with pytest.raises(Stop):
        train(CONFIG, out=tmp_path / "stopped")
    monkeypatch.undo()
    stopped = open_run(tmp_path / "stopped")
    assert stopped.checkpoint()["step"] == 14
    assert stopped.metrics["step"].max() == 20
    assert_same_run(train(CONFIG, out=tmp_path / "stopped", resume=True), whole)
