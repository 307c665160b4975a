"""A run that is killed at any instant and resumed ends as if it had never been killed.

``GROKCURV_KILLS=20`` kills at more moments than the few of an ordinary test run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from grokcurv.runs import Run, open_run
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
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[path].dtype, path
            assert value.equal(b[path]) or (value.isnan() == b[path].isnan()).all(), path
        elif "row_seconds" not in path:
            assert value == b[path], path


@pytest.mark.parametrize("rng", ["philox", "paper"])
def test_killed_and_resumed_is_never_killed(tmp_path: Path, rng: str) -> None:
    config = dataclasses.replace(CONFIG, rng=rng)
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


def test_stopped_between_tables_and_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are then ahead of the checkpoint; resuming drops the rows that are."""
    from grokcurv.runs import RunWriter

    class Stop(BaseException):
        pass

    def stop(_writer: RunWriter, state: dict[str, object]) -> None:
        if state["step"] == 21:
            raise Stop
        write(_writer, state)

    whole = train(CONFIG, out=tmp_path / "whole")
    write = RunWriter.write_checkpoint
    monkeypatch.setattr(RunWriter, "write_checkpoint", stop)
    with pytest.raises(Stop):
        train(CONFIG, out=tmp_path / "stopped")
    monkeypatch.undo()
    stopped = open_run(tmp_path / "stopped")
    assert stopped.checkpoint()["step"] == 14
    assert stopped.metrics["step"].max() == 20
    assert_same_run(train(CONFIG, out=tmp_path / "stopped", resume=True), whole)
