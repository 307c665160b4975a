"""Loggers: files a record at a time, functions, and the real TensorBoard, Weights & Biases (offline) and trackio."""

from __future__ import annotations

import csv
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from models import PROBLEMS

from grokcurv import CurvatureMonitor
from grokcurv.loggers import (
    CallableLogger,
    CSVLogger,
    Logger,
    ParquetLogger,
    TensorBoardLogger,
    WandbLogger,
    scalars,
)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_is_readable_after_every_record(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    with CSVLogger(path) as logger:
        logger.log({"defect_median": 0.25, "method": "difference", "reliable": True}, step=0)
        assert rows(path) == [{"step": "0", "defect_median": "0.25", "method": "difference", "reliable": "True"}]
        logger.log(
            {"method": 'a "quoted", word', "reliable": False, "step": 100, "defect_median": float("nan")}, step=100
        )
    assert rows(path)[1] == {"step": "100", "defect_median": "nan", "method": 'a "quoted", word', "reliable": "False"}
    with pytest.raises(ValueError, match="closed file"):
        logger.log({"defect_median": 1.0, "method": "", "reliable": True}, step=200)


def test_csv_continues_a_file_with_the_same_columns(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    for step in (0, 1):
        with CSVLogger(path) as logger:
            logger.log({"rho": 0.5 + step}, step=step)
    assert rows(path) == [{"step": "0", "rho": "0.5"}, {"step": "1", "rho": "1.5"}]
    with CSVLogger(path) as logger, pytest.raises(ValueError, match=r"records\.csv: they differ in grad_norm, rho"):
        logger.log({"grad_norm": 1.0}, step=2)
    assert len(rows(path)) == 2


def test_csv_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        CSVLogger(tmp_path / "nowhere" / "records.csv")


def test_callable() -> None:
    seen: list[tuple[dict[str, object], int]] = []
    CallableLogger(lambda record, step: seen.append((record, step))).log({"rho": 1.0}, step=3)
    assert seen == [({"rho": 1.0}, 3)]
    with pytest.raises(TypeError, match=r"must be callable as function.* got str"):
        CallableLogger("print")  # type: ignore[arg-type]


class FakeWandbRun:
    """``log`` as Weights & Biases declares it."""

    def __init__(self) -> None:
        self.history: dict[int | None, dict[str, object]] = {}

    def log(self, data: dict[str, object], step: int | None = None, commit: bool | None = None) -> None:
        self.history[step] = data


def test_a_wandb_run_is_a_logger(tmp_path: Path) -> None:
    run = FakeWandbRun()
    csv_logger = CSVLogger(tmp_path / "records.csv")
    loggers: list[Logger] = [run, csv_logger]
    for logger in loggers:
        logger.log({"defect_median": 2.0}, step=5)
    csv_logger.close()
    assert run.history == {5: {"defect_median": 2.0}}
    assert rows(tmp_path / "records.csv") == [{"step": "5", "defect_median": "2.0"}]


RECORD = {
    "step": 4,
    "method": "bracket",
    "defect_median": 0.25,
    "rho": float("nan"),
    "reliable": True,
    "exec_fraction": float("inf"),
}


def test_scalars_are_what_can_be_drawn() -> None:
    assert scalars(RECORD) == {"curvature/defect_median": 0.25, "curvature/reliable": 1.0}
    assert scalars({"count": 3}, prefix="") == {"count": 3.0}


def test_parquet_is_whole_after_every_so_many_records(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    with ParquetLogger(path, every=2) as logger:
        logger.log(RECORD, step=4)
        assert not path.exists()
        logger.log({**RECORD, "defect_median": 0.5}, step=6)
        frame = pd.read_parquet(path)
        assert list(frame.columns) == list(RECORD)
        assert frame["step"].tolist() == [4, 6]
        assert frame["reliable"].dtype == bool
        assert frame["rho"].isna().all()
        logger.log(RECORD, step=8)
        assert len(pd.read_parquet(path)) == 2  # this is what a kill would leave
    assert pd.read_parquet(path)["defect_median"].tolist() == [0.25, 0.5, 0.25]
    with pytest.raises(ValueError, match=r"records\.parquet is closed"):
        logger.log(RECORD, step=10)


def test_parquet_continues_a_file_with_the_same_columns(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    for step in (0, 1):
        with ParquetLogger(path) as logger:
            logger.log({"rho": 0.5 + step}, step=step)
    assert pd.read_parquet(path).to_dict("list") == {"step": [0, 1], "rho": [0.5, 1.5]}
    with ParquetLogger(path) as logger, pytest.raises(ValueError, match=r"\.parquet: they differ in grad_norm, rho"):
        logger.log({"grad_norm": 1.0}, step=2)
    assert len(pd.read_parquet(path)) == 2


def test_parquet_bad_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        ParquetLogger(tmp_path / "nowhere" / "records.parquet")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ParquetLogger(tmp_path / "records.parquet", every=0)


def test_parquet_has_the_monitor_s_records(tmp_path: Path, generator: torch.Generator) -> None:
    problem = PROBLEMS["perceptron"]
    with ParquetLogger(tmp_path / "records.parquet") as logger:
        drawn = lambda: (problem.batch(generator), problem.batch(generator))  # noqa: E731
        monitor = CurvatureMonitor(problem.model(), problem.loss_fn, sampler=drawn, loggers=[logger])
        for _ in range(3):
            monitor.step()
    frame, records = pd.read_parquet(tmp_path / "records.parquet"), monitor.records()
    pd.testing.assert_frame_equal(frame[records.columns], records, check_exact=True, check_dtype=False)


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(folder)).Reload()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}

    with TensorBoardLogger(tmp_path / "own") as logger:
        logger.log(RECORD, step=4)
        logger.log({**RECORD, "defect_median": 0.5}, step=6)
    expected = {"curvature/defect_median": [(4, 0.25), (6, 0.5)], "curvature/reliable": [(4, 1.0), (6, 1.0)]}
    assert curves(tmp_path / "own") == expected
    with SummaryWriter(str(tmp_path / "theirs")) as writer:
        with TensorBoardLogger(writer, prefix="") as logger:
            logger.log(RECORD, step=4)
        writer.add_scalar("loss", 2.0, 5)
    assert curves(tmp_path / "theirs") == {"defect_median": [(4, 0.25)], "reliable": [(4, 1.0)], "loss": [(5, 2.0)]}


def test_tensorboard_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'grokcurv\[tensorboard\]'"):
        TensorBoardLogger(tmp_path)


def in_a_process(script: str, folder: Path, **environment: str) -> list[str]:
    """Lines that a script prints which has ``RECORD`` and works in ``folder``: these libraries leave threads behind."""
    program = f"RECORD = {RECORD!r}\n".replace("nan", "float('nan')").replace("inf,", "float('inf'),")
    program = program.replace("inf}", "float('inf')}") + "from grokcurv.loggers import WandbLogger\n" + script
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


WANDB = """
import wandb
run = wandb.init(project="curvature", mode="offline", settings=wandb.Settings(silent=True, console="off"))
logger = WandbLogger(run)
run.log({"loss": 3.0})
run.log({"loss": 2.0})
logger.log(RECORD, step=0)
logger.log({**RECORD, "defect_median": 0.5}, step=100)
run.log({"loss": 1.0})
run.finish()
print(run.settings.sync_file)
"""


def framed(data: bytes) -> Iterator[bytes]:
    """The messages in a file of wandb's: LevelDB's log format, after a header of 7 bytes."""
    at, message = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield message
            message = b""


def test_wandb_offline(tmp_path: Path) -> None:
    """What the run's file holds, read back as wandb's own messages."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    home = {name: str(tmp_path) for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR")}
    file = in_a_process(WANDB, tmp_path, **home)[-1]
    history = []
    for message in framed(Path(file).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
        history += [{name: x for name, x in items.items() if not name.startswith("_")}] if items else []
    drawn = {"curvature/reliable": 1.0}
    assert history == [
        {"loss": 3.0},
        {"loss": 2.0},
        {"curvature/defect_median": 0.25, "curvature/step": 0, **drawn},
        {"curvature/defect_median": 0.5, "curvature/step": 100, **drawn},
        {"loss": 1.0},
    ]


TRACKIO = """
import json, trackio
run = trackio.init(project="curvature", name="run", embed=False, auto_log_cpu=False, auto_log_gpu=False)
logger = WandbLogger(run)
logger.log(RECORD, step=0)
logger.log({**RECORD, "defect_median": 0.5}, step=100)
trackio.finish()
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("curvature", "run")))
"""


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    home = {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    logs = json.loads(in_a_process(TRACKIO, tmp_path, **home)[-1])
    assert [(row["step"], row["curvature/defect_median"], row["curvature/reliable"]) for row in logs] == [
        (0, 0.25, 1.0),
        (100, 0.5, 1.0),
    ]


def test_wandb_logger_wants_a_run() -> None:
    with pytest.raises(TypeError, match=r"run must have a method log, .* got str"):
        WandbLogger("curvature")
