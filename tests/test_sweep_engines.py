"""Sweeps through the engines, undisturbed and disturbed: the records are the same whatever happened.

``GROKCURV_KILLS=20`` kills more workers and drivers than the few of an ordinary test run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from grokcurv.report import write_report
from grokcurv.runs import TABLES
from grokcurv.storage import holder, read_json
from grokcurv.sweep import Sweep, SweepConfig, folder, open_sweep, run_sweep
from grokcurv.training import train

KILLS = int(os.environ.get("GROKCURV_KILLS", "2"))

EXAMPLES = Path(__file__).parent.parent / "examples" / "sweeps"

SMALL = """
[run]
p = 11
layers = 1
d_model = 16
heads = 2
d_ff = 32
batch_size = 24
steps = 120
eval_every = 20
pairs = 2
measure_every = 30
pca_every = 10
checkpoint_every = 20

[grid]
op = ["add", "mul"]
seed = [1, 2]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def config(file: Path) -> SweepConfig:
    return SweepConfig.from_toml(file)


@pytest.fixture(scope="module")
def undisturbed(config: SweepConfig, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return one_after_another(config, tmp_path_factory.mktemp("undisturbed"))


def one_after_another(config: SweepConfig, path: Path) -> Sweep:
    """The sweep's runs, each alone in this process."""
    path.mkdir(exist_ok=True)
    sweep = folder.claim(path, config)
    for run, settings in sweep.plan.items():
        train(settings, out=sweep.folder(run))
    return sweep


def assert_same_records(sweep: Sweep, other: Sweep) -> None:
    for name in TABLES:
        a, b = (s.table(name).drop(columns=["seconds", "measure_seconds"], errors="ignore") for s in (sweep, other))
        assert len(a), name
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def command(file: Path, out: Path, *options: str) -> list[str]:
    return [sys.executable, "-P", "-m", "grokcurv.cli", "sweep", str(file), "--out", str(out), "--workers=2", *options]


@contextlib.contextmanager
def driver(file: Path, out: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command(file, out, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def writers(out: Path) -> dict[str, int]:
    """The processes that write into runs of the sweep, by run."""
    holders = {path.name: holder(path) for path in (out / "runs").glob("*")}
    return {run: holder for run, holder in holders.items() if holder}


def wait_for(process: subprocess.Popen[str], what: Callable[[], Any]) -> Any:
    """What there is of ``what`` as soon as there is something; nothing if the driver ends first.

    It gives up after five minutes: on a busy machine Ray alone takes two to start.
    """
    deadline = time.monotonic() + 300
    while not (there := what()) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return there


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_killed_and_losses_not_finite(
    engine: str, config: SweepConfig, undisturbed: Sweep, tmp_path: Path
) -> None:
    """A worker is killed in the middle of a run; two runs that cannot learn fail by themselves."""
    out = tmp_path / "sweep"
    grid = {"lr": [1e-3, 1e30], **config.grid, "seed": [1]}
    both = SweepConfig(run=config.run, grid=grid)
    killed: list[str] = []

    def kill(news: dict[str, Any]) -> None:
        for run, pid in writers(out).items():
            if not killed and (out / "runs" / run / "checkpoint.safetensors").exists():
                killed.append(run)
                os.kill(pid, signal.SIGKILL)
        seen.append(news)

    seen: list[dict[str, Any]] = []
    sweep = run_sweep(both, out, engine=engine, workers=2, on_progress=kill)
    assert killed
    assert seen[-1]["deaths"] == 1
    assert any(any(news["running"].values()) for news in seen)
    runs = sweep.runs
    assert runs["status"].tolist() == ["finished", "finished", "failed", "failed"]
    assert runs["reason"].str.contains("loss is NaN at step").tolist() == [False, False, True, True]
    for run in list(sweep.plan)[:2]:
        same = next(other for other, settings in undisturbed.plan.items() if settings == sweep.plan[run])
        for name in TABLES:
            a, b = (
                s.table(name).query("run == @id", local_dict={"id": r}) for s, r in ((sweep, run), (undisturbed, same))
            )
            timing = ["run", "seconds", "measure_seconds"]
            a, b = (t.drop(columns=timing, errors="ignore").reset_index(drop=True) for t in (a, b))
            pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert not writers(out)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_ctrl_c_then_the_same_command(engine: str, tmp_path: Path) -> None:
    """Runs under way write a checkpoint, though none is due, and go on from it.

    They are long enough for Ctrl-C to find them under way: what each run says of itself is there from its first steps.
    """
    file, out = tmp_path / "long.toml", tmp_path / "sweep"
    file.write_text(
        SMALL.replace("steps = 120", "steps = 600")
        .replace("measure_every = 30", "measure_every = 250")
        .replace("checkpoint_every = 20", "checkpoint_every = 2000")
        .replace('op = ["add", "mul"]', 'op = ["add"]')
    )

    def stepped() -> bool:
        return any(read_json(path, "progress", dict).get("step") for path in out.glob("runs/*/progress.json"))

    with driver(file, out, f"--engine={engine}") as process:
        assert wait_for(process, stepped)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; to go on: the same command" in said
    assert "Traceback" not in said
    assert not writers(out)
    sweep = open_sweep(out)
    interrupted = sweep.runs.query("status == 'interrupted'").index
    assert any(0 < sweep.run(run).checkpoint()["step"] < 600 for run in interrupted)
    assert (sweep.runs["reason"] == "").all()
    sweep = run_sweep(sweep.config, out, workers=1)
    assert (sweep.runs["status"] == "finished").all()
    assert_same_records(sweep, one_after_another(sweep.config, tmp_path / "undisturbed"))


def test_a_full_disk(config: SweepConfig, undisturbed: Sweep, tmp_path: Path) -> None:
    """A limit to the size of files does to one of the runs what a full disk does."""
    sizes = [path.stat().st_size for path in undisturbed.path.glob("runs/*/checkpoint.safetensors")]
    large = SweepConfig(run={**config.run, "seed": 1, "steps": 20}, runs=[{"d_ff": 4096}, {"d_ff": 24}])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes), hard))
    try:
        sweep = run_sweep(large, tmp_path, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sweep.runs["status"].tolist() == ["failed", "finished"]
    assert "File too large" in sweep.runs["reason"].iloc[0]
    assert open_sweep(tmp_path).runs["reason"].tolist() == sweep.runs["reason"].tolist()
    sweep = run_sweep(large, tmp_path, workers=1)
    assert sweep.runs["status"].tolist() == ["finished", "finished"]
    assert sweep.runs["reason"].tolist() == ["", ""]


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_chaos(engine: str, file: Path, undisturbed: Sweep, tmp_path: Path) -> None:
    """Workers and drivers are killed at random; another driver takes over at once."""
    killed: Counter[str] = Counter()
    rounds = 0
    out = tmp_path
    while True:
        with driver(file, out, f"--engine={engine}") as process:
            while killed.total() < KILLS and wait_for(process, partial(writers, out)):
                time.sleep(random.uniform(0.0, 2.0))
                victim, pid = random.choice(
                    [("driver", process.pid), *(("worker", pid) for pid in writers(out).values())]
                )
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed[victim] += 1
                if victim == "driver":
                    break
            said, _ = process.communicate(timeout=300)
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, said
            assert_same_records(open_sweep(out), undisturbed)
            rounds += 1
            if killed.total() >= KILLS:
                break
            out = tmp_path / f"round-{rounds}"
    print(f"{engine}: killed {dict(killed)} in {rounds} sweeps")


def test_runs_as_one_program(config: SweepConfig, undisturbed: Sweep, tmp_path: Path) -> None:
    """Workers take groups of runs; a run that fails leaves its group."""
    sweep = run_sweep(config, tmp_path / "alike", workers=1, together=3)
    assert_same_records(sweep, undisturbed)
    lengths = [{"steps": 20}, {"steps": 40}, {"lr": 1e30}, {"d_ff": 48}]
    base = {**config.run, "layer_norm": False, "sequence": "a b =", "measure_every": 0}
    mixed = run_sweep(SweepConfig(run=base, runs=lengths), tmp_path / "mixed", workers=2, together=4)
    assert mixed.runs["status"].tolist() == ["finished", "finished", "failed", "finished"]
    assert "loss is" in mixed.runs["reason"].iloc[2]
    for run, settings in mixed.plan.items():
        if mixed.runs["status"][run] == "finished":
            assert mixed.run(run).metrics["test_loss"].equals(train(settings).metrics["test_loss"])


@pytest.mark.usefixtures("drawn_once")
def test_report(undisturbed: Sweep) -> None:
    page = write_report(undisturbed.path).read_text()
    assert all(run in page for run in undisturbed.plan)
    assert "4 finished" in page
    drawn = {path.stem for path in undisturbed.path.glob("figures/*.png")}
    assert drawn == {"phase", "trajectories"}


@pytest.mark.long
def test_the_54_settings_through_both_engines(tmp_path: Path) -> None:
    """``GROKCURV_STEPS`` caps the steps of a run."""
    config = SweepConfig.from_toml(EXAMPLES / "lr.toml")
    config = dataclasses.replace(config, run={**config.run, "steps": int(os.environ.get("GROKCURV_STEPS", "200"))})
    local, ray = (run_sweep(config, tmp_path / engine, engine=engine) for engine in ("local", "ray"))
    assert len(local.runs) == 54
    for sweep in (local, ray):
        assert (sweep.runs["status"] == "finished").all()
    assert_same_records(local, ray)
