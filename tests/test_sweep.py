"""Sweeps without an engine: what a file becomes, what bad ones get, the folder as it is read, who goes next."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import signal
import sys
import time
from collections import Counter, deque
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import synthetic_run

from grokcurv.runs import RunError, open_run
from grokcurv.storage import hold, write_json
from grokcurv.sweep import Random, SweepConfig, driver, folder, open_sweep, run_sweep
from grokcurv.sweep.engine import Event, Job
from grokcurv.training import PRESETS, TrainConfig

EXAMPLES = Path(__file__).parent.parent / "examples" / "sweeps"


def parse(tmp_path: Path, text: str) -> SweepConfig:
    (tmp_path / "sweep.toml").write_text(text)
    return SweepConfig.from_toml(tmp_path / "sweep.toml")


def test_grid(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        """
        run = {preset = "nanda", weight_decay = 2}
        grid = {op = ["add", "x2_y2"], lr = [1e-5, 1], seed = [7]}
        """,
    )
    start = dataclasses.replace(PRESETS["nanda"], weight_decay=2.0, seed=7, threads=1)
    assert config.plan == {
        "0000-add-lr1e-05": dataclasses.replace(start, op="add", lr=1e-5),
        "0001-add-lr1": dataclasses.replace(start, op="add", lr=1.0),
        "0002-x2_y2-lr1e-05": dataclasses.replace(start, op="x2_y2", lr=1e-5),
        "0003-x2_y2-lr1": dataclasses.replace(start, op="x2_y2", lr=1.0),
    }
    assert next(iter(config.plan)) == "0000-add-lr1e-05"
    assert type(config.plan["0001-add-lr1"].lr) is float


def test_list(tmp_path: Path) -> None:
    config = parse(
        tmp_path,
        """
        run = {lr = 0.5, threads = 2}
        runs = [{preset = "power"}, {preset = "paper", lr = 0.25, sequence = "a b ="}]
        """,
    )
    first, second = config.plan.values()
    assert first == dataclasses.replace(PRESETS["power"], lr=0.5, threads=2)
    assert second == TrainConfig(lr=0.25, sequence="a b =", threads=2)
    assert list(config.plan) == [
        "0000-power-lr0.5",
        "0001-paper-lr0.25-a_b",
    ]  # what an entry does not name is not in its id


def test_random() -> None:
    laws: dict[str, dict[str, list[Any]]] = {
        "lr": {"log_uniform": [1e-5, 1e-1]},
        "weight_decay": {"uniform": [0, 2]},
        "layers": {"uniform": [1, 3]},
        "warmup": {"log_uniform": [1, 100]},
        "op": {"choice": ["add", "mul"]},
    }
    plan = list(SweepConfig(random=Random(400, laws)).plan.values())
    assert {config.layers for config in plan} == {1, 2, 3}
    assert {config.op for config in plan} == {"add", "mul"}
    assert all(type(config.warmup) is int and 1 <= config.warmup <= 100 for config in plan)
    logs = sorted(math.log10(config.lr) for config in plan)
    assert -5 <= logs[0] < -4.9 < -1.1 < logs[-1] <= -1
    assert logs[200] == pytest.approx(-3, abs=0.3)
    assert sorted(config.weight_decay for config in plan)[200] == pytest.approx(1, abs=0.15)
    fewer = SweepConfig(random=Random(3, {"lr": laws["lr"]})).plan.values()
    assert [config.lr for config in fewer] == [config.lr for config in plan[:3]]
    other = SweepConfig(random=Random(3, {"lr": laws["lr"]}, seed=1)).plan.values()
    assert [config.lr for config in other] != [config.lr for config in fewer]


def test_all_three_together() -> None:
    config = SweepConfig(
        runs=[{"op": "add"}, {"op": "mul"}],
        random=Random(2, {"lr": {"choice": [0.25]}}),
        grid={"seed": [3, 4], "layers": [1, 2]},
    )
    assert len(config.plan) == 16
    assert config.named == ("op", "lr", "seed", "layers")
    assert list(config.plan)[:5] == [
        "0000-add-seed3-layers1",
        "0001-add-seed3-layers2",
        "0002-add-seed4-layers1",
        "0003-add-seed4-layers2",
        "0004-add-seed3-layers1",
    ]


def test_examples() -> None:
    lr = SweepConfig.from_toml(EXAMPLES / "lr.toml").plan
    assert len(lr) == 54
    assert list(lr)[7] == "0007-add-lr0.01-seed137"
    assert lr["0007-add-lr0.01-seed137"] == TrainConfig(lr=0.01, seed=137, threads=1)
    assert len(SweepConfig.from_toml(EXAMPLES / "grokking.toml").plan) == 12
    assert len(SweepConfig.from_toml(EXAMPLES / "small.toml").plan) == 6
    bases = SweepConfig.from_toml(EXAMPLES / "bases.toml").plan
    damped, strength = (SweepConfig.from_toml(EXAMPLES / f"{name}.toml").plan for name in ("damped", "strength"))
    assert (len(damped), len(strength)) == (24, 9)
    sources = {Path(config.basis_from).name: config.seed for config in (*damped.values(), *strength.values())}
    assert sources == {run: config.seed for run, config in bases.items()}
    assert all(bases[Path(config.basis_from).name].seed == config.seed for config in strength.values())
    suppression = SweepConfig.from_toml(EXAMPLES / "suppression.toml").plan
    assert list(suppression)[-1] == "0005-project-update-strength1"


def test_ids_are_short_enough_for_a_file_system() -> None:
    names = [f.name for f in dataclasses.fields(TrainConfig) if type(getattr(TrainConfig(), f.name)) is float]
    plan = SweepConfig(runs=[dict.fromkeys(names, 0.1), dict.fromkeys(names, 0.123456789)]).plan
    assert max(map(len, plan)) == 120


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a sweep needs at least one of [grid], [[runs]] and [random]; got none"),
        ("grid = ", "Invalid value"),
        ("[gird]", "there is no table [gird]; wanted run, grid, runs or random"),
        ("run = 1", "run must be a table, [run]; got 1"),
        ("[runs]\nlr = 1", "runs must be an array of tables, [[runs]]; got {'lr': 1}"),
        ("runs = [1]", "runs must be an array of tables, [[runs]]; got 1 in it"),
        ("grid.lr = 0.1", "[grid] lr must be a list of values; got 0.1"),
        ("grid.lr = []", "[grid] lr must be a list of values; got []"),
        ("grid.lr = [0.1, 0.1]", "[grid] lr has 0.1 twice"),
        ("grid.learn = [0.1]", "[grid] learn is no setting of a run; grokcurv train --help lists them"),
        ("grid.sed = [1]", "[grid] sed is no setting of a run; did you mean seed?"),
        ("grid.lr = ['fast']", "[grid] lr must be a number; got 'fast'"),
        ("grid.seed = [1.5]", "[grid] seed must be a whole number; got 1.5"),
        ("grid.layers = [true]", "[grid] layers must be a whole number; got True"),
        ("grid.layer_norm = [1]", "[grid] layer_norm must be true or false; got 1"),
        ("grid.op = [1]", "[grid] op must be a string; got 1"),
        ("runs = [{}, {steps = '5'}]", "[[runs]] number 2 steps must be a whole number; got '5'"),
        ("run.lr = 1\ngrid.lr = [1]", "lr is in [run] and in [grid]; wanted it in one of them"),
        ("runs = [{lr = 1}]\ngrid.lr = [1]", "lr is in [grid] and in [[runs]]; wanted it in one of them"),
        (
            "run.p = 100\ngrid.op = ['add', 'div']",
            "the run of [run] p = 100; [grid] op = 'div': p must be prime for op 'div'",
        ),
        ("grid.preset = ['mine']", "the run of [grid] preset = 'mine': preset must be one of 'paper'"),
        ("grid.lr = [-1]", "the run of [grid] lr = -1.0: lr must be a positive number; got -1.0"),
        ("random.samples = 1", "[random] needs fields, the fields drawn"),
        ("random.fields.lr.choice = [1]", "[random] needs samples, the number of draws"),
        ("random = {samples = 1, fields = 2}", "[random] fields must be a table, [random.fields]; got 2"),
        ("random = {draws = 1}", "[random] has no draws; it has samples, seed and the table [random.fields]"),
        ("random = {samples = 0, fields = {}}", "[random] samples must be a whole number, at least 1; got 0"),
        ("random = {samples = 1, seed = -1, fields = {}}", "[random] seed must be a whole number, at least 0; got -1"),
        ("random = {samples = 1, fields = {lr = 1}}", "[random.fields] lr must be one of {uniform = ...},"),
        ("random = {samples = 1, fields = {lr = {normal = [0, 1]}}}", "[random.fields] lr must be one of {uniform ="),
        ("random = {samples = 1, fields = {lr = {choice = []}}}", "[random.fields] lr: choice must be a list; got []"),
        (
            "random = {samples = 1, fields = {lr = {log_uniform = [0, 1]}}}",
            "[random.fields] lr: log_uniform must be [low, high] above 0, low below high; got [0.0, 1.0]",
        ),
        (
            "random = {samples = 1, fields = {lr = {uniform = [2, 1]}}}",
            "[random.fields] lr: uniform must be [low, high], low below high; got [2.0, 1.0]",
        ),
        (
            "random = {samples = 1, fields = {op = {uniform = ['add', 'sub']}}}",
            "[random.fields] op is a string: it can be drawn by choice alone; got uniform",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        parse(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'sweep.toml'}: {said}")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read \(No such file or directory\)"):
        SweepConfig.from_toml(tmp_path / "none.toml")


SMALL = SweepConfig(run={"p": 97}, grid={"op": ["add", "mul"], "lr": [1e-3, 1e-2], "seed": [1, 2]})


def test_folder(tmp_path: Path) -> None:
    with hold(tmp_path, "run"):
        folder.claim(tmp_path, SMALL)
    sweep = open_sweep(tmp_path)
    assert sweep.config == SMALL
    assert sweep.plan == SMALL.plan
    assert list(sweep.plan) == list(SMALL.plan)
    assert sweep.varied == ("op", "lr", "seed")
    ids = list(sweep.plan)
    assert sweep.runs.index.tolist() == ids
    assert sweep.runs["status"].tolist() == ["pending"] * 8
    assert sweep.table("metrics").columns.tolist() == ["run"]
    for run, status in zip(ids, ("finished", "interrupted", "running", "failed: loss is NaN at step 5"), strict=False):
        config = dataclasses.asdict(sweep.plan[run])
        synthetic_run.write_run(sweep.folder(run), None if status == "finished" else {}, status=status, **config)
    sweep.failures = {ids[3]: {"reason": "loss is NaN", "final": True}, ids[4]: {"reason": "no space", "final": False}}
    folder.write_failures(sweep)
    (sweep.folder(ids[5])).mkdir()
    (sweep.folder(ids[5]) / "status.json").write_text("{")
    sweep = open_sweep(tmp_path)
    runs = sweep.runs
    # A run that says it is running without a process that holds it was killed.
    expected = ["finished", "interrupted", "interrupted", "failed", "failed", "failed", "pending", "pending"]
    assert runs["status"].tolist() == expected
    assert runs["reason"].tolist()[:5] == ["", "", "", "loss is NaN", "no space"]
    assert "status.json is missing or damaged" in runs["reason"].iloc[5]
    assert runs["lr"].tolist() == [1e-3, 1e-3, 1e-2, 1e-2] * 2
    assert set(runs.columns) == {f.name for f in dataclasses.fields(TrainConfig)} | {"status", "reason"}
    assert sweep.run(ids[0]).status == "finished"
    metrics = sweep.table("metrics")
    assert metrics.columns[0] == "run"
    assert set(metrics["run"]) == {ids[0]}
    pd.testing.assert_frame_equal(metrics.drop(columns="run"), open_run(sweep.folder(ids[0])).metrics)
    with pytest.raises(RunError, match="has no run 'nobody'"):
        sweep.run("nobody")
    with pytest.raises(ValueError, match="name must be one of 'metrics', 'curvature', 'pca'; got 'losses'"):
        sweep.table("losses")
    (sweep.folder(ids[0]) / "pca.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"pca\.parquet is damaged"):
        sweep.table("pca")


def test_another_sweep_in_the_folder(tmp_path: Path) -> None:
    folder.claim(tmp_path, SMALL)
    folder.claim(tmp_path, SMALL)
    with pytest.raises(RunError, match=r"holds another sweep: p \(97 there, 89 here, in run 0000-add-lr0.001-seed1\);"):
        folder.claim(tmp_path, dataclasses.replace(SMALL, run={"p": 89}))
    with pytest.raises(RunError, match=r"4 runs are only there \(0004-mul-lr0.001-seed1, ...\), 4 runs are only here"):
        folder.claim(tmp_path, dataclasses.replace(SMALL, grid={**SMALL.grid, "op": ["add", "sub"]}))
    with hold(tmp_path, "run"), pytest.raises(RunError, match="is being run by process"):
        run_sweep(SMALL, tmp_path)
    (old := tmp_path / "old").mkdir()
    folder.claim(old, dataclasses.replace(SMALL, run={"rng": "torch"}))
    for grow in (False, True):
        with pytest.raises(RunError, match="one of an older version"):
            folder.claim(old, SMALL, grow=grow)
    with pytest.raises(RunError, match="only there"):  # the file does not ask for today's draws
        folder.claim(old, dataclasses.replace(SMALL, run={"rng": "torch", "p": 89}), grow=True)


def test_a_sweep_grows(script: dict[str, Any], tmp_path: Path) -> None:
    """Runs keep their ids, only new ones and those that are to be longer start; what else differs is refused."""
    sweep = folder.claim(tmp_path, SMALL)
    ids = list(sweep.plan)
    for run, config in sweep.plan.items():
        synthetic_run.write_run(sweep.folder(run), {}, status="finished", **dataclasses.asdict(config))
    more = {**SMALL.grid, "seed": [7, *SMALL.grid["seed"]]}
    points = [("add", "mul"), ("0.001", "0.01")]
    numbers = [f"{number:04}-{op}-lr{lr}-seed7" for number, (op, lr) in enumerate(product(*points), 8)]
    script["ends"] = {run: [Event(run, "finished", latest(100))] for run in [*ids, *numbers]}
    grown = run_sweep(dataclasses.replace(SMALL, grid=more), tmp_path, grow=True)
    new = script["engine"].started
    assert [run for run in grown.plan if run not in ids] == new
    assert [run.partition("-")[0] for run in new] == [f"{len(ids) + number:04}" for number in range(len(new))]
    assert all(grown.plan[run] == config for run, config in sweep.plan.items())
    assert {grown.plan[run].seed for run in new} == {7}
    assert len(grown.plan) == len(dataclasses.replace(SMALL, grid=more).plan) == len(set(grown.plan))
    assert open_sweep(tmp_path).plan == grown.plan
    longer = dataclasses.replace(SMALL, grid=more, run={**SMALL.run, "steps": 10**6, "checkpoint_every": 3})
    assert run_sweep(longer, tmp_path, grow=True).plan.keys() == grown.plan.keys()
    assert set(script["engine"].started) == set(grown.plan)
    with pytest.raises(RunError, match=r"holds another sweep: 12 runs are only there \(0000-add-lr0.001-seed1, ...\);"):
        run_sweep(dataclasses.replace(longer, run={**longer.run, "d_ff": 64}), tmp_path, grow=True)
    with pytest.raises(RunError, match="holds another sweep"):
        run_sweep(dataclasses.replace(longer, run={**longer.run, "checkpoint_every": 5}), tmp_path)


def test_folders_that_hold_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no sweep: there is no sweep\.json in it"):
        open_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text(json.dumps({"schema": 1, "sweep": {"config": {"grid": {"lr": [1]}}}}))
    with pytest.raises(RunError, match=r"sweep\.json is damaged: KeyError\('plan'\)"):
        open_sweep(tmp_path)
    synthetic_run.write_run(tmp_path / "run", {})
    with pytest.raises(RunError, match="holds a run; a sweep needs a folder of its own"):
        run_sweep(SMALL, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write into .*file: File exists"):
        run_sweep(SMALL, tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "slurm"}, "engine must be one of 'local', 'ray'; got 'slurm'"),
        ({"workers": 0}, "workers must be at least 1; got 0"),
        ({"gpus_per_run": -1.0}, r"gpus_per_run must not be negative; got -1\.0"),
        ({"address": "auto"}, "address is for the engine 'ray'; got 'auto' with 'local'"),
        ({"gpus_per_run": 0.5}, r"gpus_per_run is for the engine 'ray'; got 0\.5 with 'local'"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run_sweep(SMALL, tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


def test_many_runs(tmp_path: Path) -> None:
    """All of a sweep's runs in one frame, each with its own rows; some with tables that others lack."""
    config = SweepConfig(grid={"seed": list(range(300))})
    sweep = folder.claim(tmp_path, config)
    template = synthetic_run.write_run(tmp_path / "template", None, **dataclasses.asdict(TrainConfig(threads=1)))
    for run in sweep.plan:
        shutil.copytree(template, sweep.folder(run))
    without = list(sweep.plan)[17]
    (sweep.folder(without) / "curvature.parquet").unlink()
    shorter = open_run(template).metrics.head(2).assign(test_acc=[0, 1])  # a column of another type
    shutil.rmtree(sweep.folder(without))
    synthetic_run.write_run(sweep.folder(without), {"metrics": shorter, "pca": pd.DataFrame()})
    assert (open_sweep(tmp_path).runs["status"] == "finished").all()
    metrics, curvature = sweep.table("metrics"), sweep.table("curvature")
    rows = metrics.groupby("run", sort=False).size()
    assert rows.index.tolist() == list(sweep.plan)
    assert rows.pop(without) == 2
    assert (rows == len(synthetic_run.metrics())).all()
    assert metrics["test_acc"].dtype == float
    assert curvature["run"].nunique() == 299
    assert without not in set(curvature["run"])


class Script:
    """An engine that has the runs end as a script says, one a call, and remembers what it was asked."""

    def __init__(self, sweep: folder.Sweep, ends: dict[str, list[Event]], workers: int = 2) -> None:
        self.workers, self.sweep = workers, sweep
        self.ends = {run: deque(events) for run, events in ends.items()}
        self.started: list[str] = []
        self.under_way: list[Job] = []
        self.interrupted = False

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, job: Job) -> None:
        assert not self.interrupted
        self.under_way.append(job)
        self.started.append(job.run)
        assert len(self.under_way) <= self.workers

    def wait(self, seconds: float) -> list[Event]:
        job = self.under_way[0]
        event = Event(job.run, "interrupted") if self.interrupted else self.ends[job.run].popleft()
        if event.latest and event.latest.get("checkpoint"):
            Path(job.folder).mkdir(parents=True, exist_ok=True)
            (Path(job.folder) / "checkpoint.safetensors").write_text(str(time.time_ns()))
            time.sleep(0.01)
        if event.kind != "progress":
            self.under_way.pop(0)
        return [event]

    def interrupt(self) -> None:
        self.interrupted = True


def latest(step: int, **more: object) -> dict[str, Any]:
    return {"step": step, "steps": 100, "test_acc": 0.5, "steps_per_second": 10.0, **more}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Replaces the engine by a script; ``ends`` is what happens, by run, and ``engine`` what did."""
    stage: dict[str, Any] = {"ends": {}}

    def engine(_name: str, sweep: folder.Sweep, *_: object) -> Script:
        stage["engine"] = Script(sweep, stage["ends"])
        return stage["engine"]

    monkeypatch.setattr(driver, "_engine", engine)
    return stage


FOUR = SweepConfig(grid={"seed": [0, 1, 2, 3]}, run={"steps": 100})
A, B, C, D = FOUR.plan


def test_what_becomes_of_runs(script: dict[str, Any], tmp_path: Path) -> None:
    script["ends"] = {
        A: [Event(A, "progress", latest(10)), Event(A, "progress", latest(60)), Event(A, "finished", latest(80))],
        B: [Event(B, "failed", latest(5), "loss is NaN at step 5", final=True)],
        C: [Event(C, "died", latest(1, checkpoint=True), "killed")] * 4 + [Event(C, "failed", None, "No space left")],
        D: [Event(D, "progress", latest(7, checkpoint=True))] + [Event(D, "died", None, "it was killed")] * 3,
    }
    seen: list[dict[str, Any]] = []
    sweep = run_sweep(FOUR, tmp_path, on_progress=seen.append)
    assert Counter(script["engine"].started) == {A: 1, B: 1, C: 5, D: 3}
    assert sweep.runs["status"].tolist() == ["pending", "failed", "failed", "failed"]  # the script writes no folders
    assert sweep.runs["reason"].tolist() == [
        "",
        "loss is NaN at step 5",
        "No space left",
        "it was killed, 3 times in a row without a new checkpoint",
    ]
    assert open_sweep(tmp_path).failures == sweep.failures
    assert seen[1]["running"] == {A: latest(60), B: {}}
    assert seen[1]["steps_per_second"] > 0
    assert seen[1]["seconds_left"] == pytest.approx((40 + 3 * 100) / seen[1]["steps_per_second"])
    assert seen[-1]["seconds_left"] == 0
    assert {name: seen[-1][name] for name in ("runs", "finished", "failed", "deaths", "running")} == {
        "runs": 4,
        "finished": 1,
        "failed": 3,
        "deaths": 7,
        "running": {},
    }


def test_what_is_tried_again(script: dict[str, Any], tmp_path: Path) -> None:
    finish = {run: [Event(run, "finished", latest(100))] for run in FOUR.plan}
    script["ends"] = {**finish, B: [Event(B, "failed", None, "NaN", final=True)], C: [Event(C, "failed", None, "full")]}
    run_sweep(FOUR, tmp_path)
    for run in (A, D):
        synthetic_run.write_run(tmp_path / "runs" / run, {}, **dataclasses.asdict(FOUR.plan[run]))
    script["ends"] = finish
    assert run_sweep(FOUR, tmp_path).runs["reason"].tolist() == ["", "NaN", "", ""]
    assert script["engine"].started == [C]
    synthetic_run.write_run(tmp_path / "runs" / C, {}, **dataclasses.asdict(FOUR.plan[C]))
    assert script.pop("engine")
    assert run_sweep(FOUR, tmp_path).runs["status"].tolist() == ["finished", "failed", "finished", "finished"]
    assert "engine" not in script  # nothing was left to do
    run_sweep(FOUR, tmp_path, retry_failed=True)
    assert script["engine"].started == [B]


def test_ctrl_c(script: dict[str, Any], tmp_path: Path) -> None:
    script["ends"] = {A: [Event(A, "finished", latest(100))], B: [Event(B, "progress", latest(10))] * 9}

    def press(news: dict[str, Any]) -> None:
        if news["running"].get(B) and not script["engine"].interrupted:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(FOUR, tmp_path, on_progress=press)
    assert script["engine"].started == [A, B, C]
    assert not script["engine"].under_way
    assert signal.getsignal(signal.SIGINT) is before
    assert not open_sweep(tmp_path).failures


def test_a_full_disk_keeps_reasons_until_the_end(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, name: str, value: Any) -> None:
        if name == "failures":
            raise RunError("no space")
        write_json(path, name, value)

    monkeypatch.setattr(folder, "write_json", full)
    script["ends"] = {run: [Event(run, "failed", None, "disk full")] for run in FOUR.plan}
    assert run_sweep(FOUR, tmp_path).runs["reason"].tolist() == ["disk full"] * 4


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"engine 'ray' needs Ray: pip install 'grokcurv\[ray\]'"):
        run_sweep(FOUR, tmp_path, engine="ray")


def test_ray_runs_on_a_gpu_need_a_share_of_one(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match="gpus_per_run must be above 0 for runs whose device is cuda; got 0"):
        run_sweep(SweepConfig(run={"device": "cuda"}, grid={"seed": [0]}), tmp_path, engine="ray")


def test_workers_that_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match=r"worker processes do not start \(exit status 1\): .*workers\.log says more"):
        run_sweep(FOUR, tmp_path, workers=2)
    assert (open_sweep(tmp_path).runs["status"] == "pending").all()


def test_only_some_of_the_runs(script: dict[str, Any], tmp_path: Path) -> None:
    script["ends"] = {run: [Event(run, "finished", latest(100))] for run in (B, D)}
    seen: list[dict[str, Any]] = []
    run_sweep(FOUR, tmp_path, only=[D, B], on_progress=seen.append)
    assert script["engine"].started == [B, D]
    assert (seen[-1]["runs"], seen[-1]["finished"], seen[-1]["seconds_left"]) == (2, 2, 0)
    with pytest.raises(ValueError, match="only must name runs of the sweep; it has no '0009'"):
        run_sweep(FOUR, tmp_path / "other", only=[A, "0009"])
    assert not (tmp_path / "other").exists()
    del script["engine"]
    run_sweep(FOUR, tmp_path, only=[])
    assert "engine" not in script


def test_ids_without_paths() -> None:
    runs = [{"basis": "oracle", "basis_from": f"runs/a b/{seed}", "seed": seed} for seed in (1, 2)]
    assert list(SweepConfig(runs=runs, run={"intervention": "noise"}).plan) == ["0000-seed1", "0001-seed2"]
