"""The command line: what flags become, what bad input gets, what is shown, and one small run from end to end."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import synthetic_run
from rich.console import Console

from grokcurv import cli, progress
from grokcurv.runs import Run, open_run
from grokcurv.storage import News, hold
from grokcurv.sweep import Sweep, SweepConfig, estimate
from grokcurv.sweep.folder import claim
from grokcurv.training import PRESETS, TrainConfig, TrainingError

SMALL = [
    f"--{flag}" for flag in ("p=11", "d-model=8", "heads=2", "d-ff=8", "layers=1", "batch-size=16", "eval-every=5")
]


@dataclasses.dataclass
class Call:
    config: TrainConfig
    out: Path
    resume: bool


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Replaces training; what it was called with."""
    calls: list[Call] = []

    def train(config: TrainConfig, *, out: Path, resume: bool, on_progress: Callable[[dict[str, Any]], None]) -> Run:
        calls.append(Call(config, out, resume))
        return Run(None, {}, {}, tables={"metrics": pd.DataFrame({"step": [0, 7000], "test_acc": [0.0, 0.991]})})

    monkeypatch.setattr("grokcurv.training.train", train)
    return calls


def train_raises(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(*_: object, **__: object) -> Run:
        raise error

    monkeypatch.setattr("grokcurv.training.train", train)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == cli.USAGE
    assert cli.main([]) == 2
    assert capsys.readouterr().err == cli.USAGE
    for command in ("train", "sweep", "reproduce", "report", "bench", "doctor"):
        assert f"\n  {command} " in cli.USAGE
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        assert f"usage: grokcurv {command}" in capsys.readouterr().out


def test_help_loads_no_more_than_the_package() -> None:
    code = """\
import sys, grokcurv
before = set(sys.modules)
from grokcurv.cli import main
main(["--help"])
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not loaded & {"tyro", "rich", "pandas", "matplotlib", "jinja2", "pyarrow"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_train_has_a_flag_for_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    for field in dataclasses.fields(TrainConfig):
        assert "--" + field.name.replace("_", "-") in words
    assert {"--out", "--resume"} <= set(words)


@pytest.mark.parametrize(
    ("arguments", "config", "out", "resume"),
    [
        ("", PRESETS["paper"], "runs/add-seed42", False),
        ("--preset nanda --lr 0.5", dataclasses.replace(PRESETS["nanda"], lr=0.5), "runs/add-seed42", False),
        ("--lr 0.5 --preset=nanda", dataclasses.replace(PRESETS["nanda"], lr=0.5), "runs/add-seed42", False),
        ("--op mul --seed 7 --out some/where", TrainConfig(op="mul", seed=7), "some/where", False),
        (
            "--no-layer-norm --rng paper --measure-every 0 --resume --out .",
            TrainConfig(layer_norm=False, rng="paper", measure_every=0),
            ".",
            True,
        ),
    ],
)
def test_flags(
    trained: list[Call],
    capsys: pytest.CaptureFixture[str],
    arguments: str,
    config: TrainConfig,
    out: str,
    resume: bool,
) -> None:
    assert cli.main(["train", *arguments.split()]) == 0
    assert trained == [Call(config, Path(out), resume)]
    said = capsys.readouterr().out
    assert said == f"{out}: 7,000 steps, test accuracy 99.1%\nto see it: grokcurv report {out}\n"


def test_resume_takes_the_settings_of_the_run(trained: list[Call], tmp_path: Path) -> None:
    there = dataclasses.replace(PRESETS["nanda"], seed=3, lr=0.25)
    synthetic_run.write_run(tmp_path / "run", {}, status="interrupted", **dataclasses.asdict(there))
    resume = ["train", "--resume", "--out", str(tmp_path / "run")]
    assert cli.main(resume) == 0
    assert cli.main([*resume, "--preset", "paper"]) == 0
    # Without a run in the folder: from the beginning, if anything says what.
    assert cli.main(["train", "--resume", "--out", str(tmp_path), "--preset", "paper"]) == 0
    assert [call.config for call in trained] == [there, PRESETS["paper"], PRESETS["paper"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("fly", "no command 'fly': there are train, sweep, reproduce, report, replay, watch, export, bench, doctor"),
        ("trian", "no command 'trian': did you mean train?"),
        ("train --op pow", "op must be one of add, sub, mul,"),
        ("train --op div --p 10", "p must be prime for op 'div'"),
        ("train --preset mine", "invalid choice 'mine'"),
        ("train --preset", "Missing value for argument '--preset'"),
        ("train --lr fast", "could not convert string to float: 'fast'"),
        ("train --learning-rate 1", "Unrecognized options: --learning-rate"),
        ("train --batch-size 100000", "batch_size is larger than the training set"),
        ("train --device nowhere --out {}/new", "device must be one that torch has here; got 'nowhere'"),
        ("train --out {}/file", "cannot write into"),
        ("train --resume --out {}/damaged", "config.json is missing or damaged"),
        ("train --resume --out {}/none", "none holds no run to go on with, and no settings say which to begin"),
        ("train --resume --op add --out {}/none", "none does not exist: to begin a run there, leave --resume out"),
        ("train --resume --out={}", "holds no run to go on with"),
        ("train --resume --out {}/stranger", "config.json holds other settings than this grokcurv has:"),
        ("train --resume --out {}/{long}", "holds no run to go on with"),
        ("train --d-ff 9999999999999999999999", "d_ff must be below 2^63"),
        ("train --threads 2000", "threads must be at most 1024; got 2000"),
        ("train --device meta --out {}/new", "device must be one that torch has here; got 'meta'"),
        ("report {}/{long}", "holds neither a run nor a sweep"),
        ("report {}", "holds neither a run nor a sweep: there is no config.json or sweep.json in it"),
        ("report", "report needs the folder of a run or a sweep"),
        ("report {} {}", "runs beside each other need out"),
        ("sweep", "Missing from grokcurv sweep: FILE"),
        ("sweep {}/none.toml", "none.toml: cannot be read (No such file or directory)"),
        ("sweep {}/empty.toml", "empty.toml: a sweep needs at least one of [grid], [[runs]] and [random]; got none"),
        ("sweep {}/good.toml --out {}/damaged", "damaged holds a run; a sweep needs a folder of its own"),
        ("sweep {}/good.toml --address there --out {}/new", "address is for the engine 'ray'; got 'there' with"),
        ("sweep {}/good.toml --engine slurm", "invalid choice 'slurm'"),
        ("doctor --loud", "Unrecognized options: --loud"),
    ],
)
def test_bad_input(arguments: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty.toml").touch()
    (tmp_path / "good.toml").write_text("grid.lr = [0.1]")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    synthetic_run.write_run(tmp_path / "stranger", {}, colour="red")
    try:
        status: object = cli.main([argument.format(tmp_path, long="x" * 300) for argument in arguments.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_another_configuration_in_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.asdict(TrainConfig(lr=0.25))
    synthetic_run.write_run(tmp_path, {}, **config)
    assert cli.main(["train", "--out", str(tmp_path)]) == 2
    assert "another configuration: lr (0.25 there, 0.001 here)" in capsys.readouterr().err


def test_training_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train_raises(monkeypatch, TrainingError("loss is NaN at step 30", Run(None, {}, {})))
    assert cli.main(["train", "--out", "somewhere"]) == 1
    assert capsys.readouterr().err == "grokcurv: somewhere: loss is NaN at step 30\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train_raises(monkeypatch, KeyboardInterrupt())
    assert cli.main(["train", "--out", "somewhere"]) == 130
    assert capsys.readouterr().err == "stopped; to go on: grokcurv train --resume --out somewhere\n"
    monkeypatch.setattr(cli, "_defaults", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))  # before training
    assert cli.main(["train"]) == 130


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replaces the running of a sweep, of which every other run fails; what it was called with."""
    call: dict[str, Any] = {}

    def run_sweep(config: SweepConfig, out: Path, **options: Any) -> Sweep:
        call.update(options, config=config, out=out)
        failures = {run: {"reason": "loss is NaN", "final": True} for run in list(config.plan)[1::2]}
        return Sweep(out, config, config.plan, failures)

    monkeypatch.setattr("grokcurv.sweep.run_sweep", run_sweep)
    return call


def test_sweep(swept: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.toml").write_text("grid.lr = [0.1, 0.2, 0.3, 0.4]")
    file = str(tmp_path / "rates.toml")
    assert cli.main(["sweep", file]) == 1
    assert (
        capsys.readouterr().out
        == """\
runs/rates: 4 runs, 0 finished, 2 failed
  0001-lr0.2: loss is NaN
  0003-lr0.4: loss is NaN
to see it: grokcurv report runs/rates
"""
    )
    assert swept.pop("on_progress").describe is progress.of_sweep
    assert swept.pop("config") == SweepConfig(grid={"lr": [0.1, 0.2, 0.3, 0.4]})
    assert swept == {
        "out": Path("runs/rates"),
        "engine": "local",
        "workers": None,
        "address": None,
        "gpus_per_run": 0.0,
        "together": None,
        "retry_failed": False,
        "grow": True,
    }
    options = "--out some/where --engine ray --workers 3 --address a:1 --gpus-per-run 0.5 --together 2 --retry-failed"
    (tmp_path / "rates.toml").write_text("grid.lr = [0.1]")
    assert cli.main(["sweep", file, *options.split()]) == 0
    del swept["config"], swept["on_progress"]
    assert swept == {
        "out": Path("some/where"),
        "engine": "ray",
        "workers": 3,
        "address": "a:1",
        "gpus_per_run": 0.5,
        "together": 2,
        "retry_failed": True,
        "grow": True,
    }


def test_a_sweep_is_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its runs and their time, of which none is spent."""
    (tmp_path / "ours.toml").write_text(
        "run = {p = 11, d_model = 8, heads = 2, d_ff = 8, layers = 1, batch_size = 16, steps = 5000, "
        "measures = 'update_gram'}\n"
        "grid = {lr = [0.1, 0.2], architecture = ['mlp', 'transformer']}"
    )
    config = SweepConfig.from_toml(tmp_path / "ours.toml")
    command = ["sweep", str(tmp_path / "ours.toml"), "--out", str(tmp_path / "out"), "--workers", "2", "--dry-run"]
    assert cli.main(command) == 0
    *ids, time_said, _ = capsys.readouterr().out.splitlines()
    assert ids == list(config.plan)
    assert re.fullmatch(r"4 runs, at most \d.* on 2 workers by 30 steps taken now;", time_said)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(estimate, "seconds_of", lambda run: (0.01 if run.architecture == "mlp" else 0.02, 0.5))
    steps = 2 * 5000 * (0.01 + 0.02)  # with a measurement of 20 gradients, and a check of eight, every 100
    wanted = steps * (1 + 28 / 100) + 4 * 50 * 0.5
    assert estimate.expected_seconds(config, 1) == pytest.approx(wanted)
    assert estimate.expected_seconds(config, 2) == pytest.approx(wanted / 2)
    assert estimate.expected_seconds(config, 100) == pytest.approx(wanted / 4)


def test_ctrl_c_in_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_sweep(*_: object, **__: object) -> Sweep:
        raise KeyboardInterrupt

    monkeypatch.setattr("grokcurv.sweep.run_sweep", run_sweep)
    (tmp_path / "rates.toml").write_text("grid.lr = [0.1]")
    assert cli.main(["sweep", str(tmp_path / "rates.toml")]) == 130
    assert capsys.readouterr().err == "stopped; to go on: the same command\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    train_raises(monkeypatch, IndexError("ours"))
    with pytest.raises(IndexError, match="ours"):
        cli.main(["train"])


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--d-ff", "2000000000000", "--out", "somewhere"]) == 1
    train_raises(monkeypatch, MemoryError("of Python"))
    assert cli.main(["train"]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("grokcurv: there is not enough memory for this: ")


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [("doctor | true", 141, ""), ("--help > /dev/full", 2, "grokcurv: [Errno 28] No space left on device\n")],
)
def test_output_that_nobody_takes(command: str, status: int, said: str) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"{sys.executable}" -m grokcurv.cli {command}'],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (status, said)


def test_names_that_the_output_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "läuf 文"
    synthetic_run.write_run(folder, {}, **dataclasses.asdict(TrainConfig()))
    said = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(said, encoding="ascii"))
    assert cli.main(["report", str(folder)]) == 0
    assert said.getvalue() == rf"{tmp_path}/l\xe4uf \u6587/report.html".encode() + b"\n"
    assert (folder / "report.html").exists()


def test_training_goes_on_when_nobody_reads_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    with progress.RunProgress("add", Console(file=Gone())) as shown:
        shown(LATEST)


@pytest.mark.usefixtures("drawn_once")
def test_train_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    measuring = ["--steps=30", "--measure-every=10", "--pca-every=5", "--pairs=2", "--threads=1"]
    assert cli.main(["train", *SMALL, *measuring, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"{out}: 30 steps, test accuracy " in said.out
    assert said.err.splitlines()[-1].startswith(
        "30/30  "
    )  # not a terminal: a line at the end, others where it takes long
    assert cli.main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    page = (out / "report.html").read_text()
    assert "add mod 11, seed 42" in page
    assert page.count("<img ") == 5


def test_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is followed while it is held, and a sweep; what they say last is its status."""
    monkeypatch.setattr(cli, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    run = synthetic_run.write_run(tmp_path / "run", {}, status="finished")
    grid = SweepConfig(grid={"lr": [0.1, 0.2]})
    (tmp_path / "sweep").mkdir()
    claim(tmp_path / "sweep", grid)
    under_way = {"runs": 2, "finished": 1, "failed": 0, "deaths": 0, "running": {"0001": LATEST}}
    for folder, news, said, end in (
        (run, LATEST, "defect", "finished"),
        (tmp_path / "sweep", {**under_way, "steps_per_second": 3.0, "seconds_left": None}, "1/2 runs", "2 pending"),
    ):
        held = contextlib.ExitStack()
        held.enter_context(hold(folder, "written"))
        News(folder).tell(news)
        looks = iter(range(3))
        monkeypatch.setattr(time, "sleep", lambda _, looks=looks, held=held: held.close() if next(looks) == 2 else None)
        assert cli.main(["watch", str(folder)]) == 0
        out, err = capsys.readouterr()
        assert said in err
        assert len(err.splitlines()) == 4  # three looks, and the last again at the end
        assert out == f"{folder}: {end}\n"
    (run / "progress.json").write_text(json.dumps({"schema": 1, "progress": {"step": "many"}}))
    with hold(run, "written"):
        assert cli.main(["watch", str(run)]) == 2
    assert "progress.json is damaged" in capsys.readouterr().err


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = synthetic_run.write_run(tmp_path / "run")
    (tmp_path / "sweep").mkdir()
    sweep = claim(tmp_path / "sweep", SweepConfig(grid={"lr": [0.1, 0.2]}))
    for name in sweep.plan:
        shutil.copytree(run, sweep.folder(name))
    assert cli.main(["export", str(run), "--csv"]) == 0
    assert cli.main(["export", str(sweep.path), "--out", str(tmp_path / "there" / "deep")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = ("metrics", "curvature", "pca")
    assert written[:3] == [run / "tables" / f"{name}.csv" for name in names]
    assert written[3:] == [tmp_path / "there" / "deep" / f"{name}.parquet" for name in (*names, "runs")]
    pd.testing.assert_frame_equal(pd.read_csv(written[0]), open_run(run).metrics, check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(written[4]), sweep.table("curvature"), check_dtype=False)
    results = pd.read_parquet(written[6])
    assert results["run"].tolist() == list(sweep.plan)
    assert results["lr"].tolist() == [0.1, 0.2]
    assert set(results["last_step"]) == {open_run(run).metrics["step"].max()}
    assert {"status", "reason", "grok_step", "settled_step", "onset_step", "lead_time"} < set(results)
    assert "seed" not in results  # which is the same for both


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grokcurv.cli", "train", *SMALL, "--measure-every", "0", "--steps", "10000000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        for _ in range(600):
            if (tmp_path / "checkpoint.safetensors").exists():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"to go on: grokcurv train --resume --out {tmp_path}" in err
    assert "Traceback" not in err
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "interrupted"


LATEST = {
    "step": 2000,
    "steps": 20_000,
    "train_loss": 0.01234,
    "train_acc": 1.0,
    "test_acc": 0.3421,
    "defect": 87.31,
    "steps_per_second": 225.0,
    "grok_step": None,
    "settled_step": None,
}


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    with progress.RunProgress("add", Console(file=file)) as shown:
        shown(LATEST)
        assert not file.getvalue()  # the first line is due after PLAIN_SECONDS
        monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
        shown(LATEST)
        late = {"step": 3000, "steps": 4100, "grok_step": 2900, "defect": None, "steps_per_second": 0.0}
        shown({**LATEST, **late})
        shown({**LATEST, **late, "settled_step": 3000})
    lines = file.getvalue().splitlines()
    assert lines[0] == ("2,000/20,000  225 steps/s  0:01:20 left  loss 0.0123  train 100.0%  test 34.2%  defect 87.3")
    late_line = "3,000/4,100  0 steps/s  loss 0.0123  train 100.0%  test 34.2%  grokked at 2,900, settled "
    assert lines[1:3] == [f"{late_line}not yet", f"{late_line}at 3,000"]
    assert lines[3:] == lines[2:3]  # the last one again, at the end


def test_nothing_is_said_of_a_run_that_never_started() -> None:
    file = io.StringIO()
    with progress.RunProgress("add", Console(file=file)):
        pass
    assert not file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_bar_on_a_terminal(width: int) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    with progress.RunProgress("add mod 97, seed 42", console) as shown:
        shown.live.refresh()
        assert "starting" in file.getvalue()
        shown(LATEST)
        shown.live.refresh()
    bar, state = file.getvalue().rpartition("starting")[2].splitlines()[-3:-1]
    assert "add mod 97, seed 42" in bar
    assert "━" in bar
    assert "2,000/20,000  225 steps/s  0:01:20 left" in bar
    assert state == "loss 0.0123  train 100.0%  test 34.2%  defect 87.3"


SWEEP = {
    "runs": 5000,
    "finished": 1200,
    "failed": 2,
    "deaths": 0,
    "running": {f"{index:04}-add": {} if index % 2 else LATEST for index in range(14)},
    "steps_per_second": 1234.4,
    "seconds_left": 3723.3,
}


def test_lines_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    file = io.StringIO()
    with progress.SweepProgress("lr", Console(file=file)) as shown:
        shown(SWEEP)
        shown({**SWEEP, "running": {}, "deaths": 3, "seconds_left": None, "steps_per_second": 0.0})
    first, second, _ = file.getvalue().splitlines()
    assert first == "1,202/5,000 runs  1,234 steps/s  1:02:03 left  14 running  1,200 finished  2 failed"
    assert second == "1,202/5,000 runs  0 steps/s  0 running  1,200 finished  2 failed  3 workers died"


def test_a_sweep_on_a_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None, height=40)
    with progress.SweepProgress("lr", console) as shown:
        shown(SWEEP)
        shown.live.refresh()
    lines = [line.rstrip() for line in file.getvalue().splitlines()[-16:]]
    bar = next(index for index, line in enumerate(lines) if "1,202/5,000 runs  1,234 steps/s  1:02:03 left" in line)
    assert lines[bar + 1] == "14 running  1,200 finished  2 failed"
    assert lines[bar + 2] == "  0000-add  2,000/20,000  test 34.2%"
    assert lines[bar + 3] == "  0001-add  starting"
    assert "  and 2 more" in lines
