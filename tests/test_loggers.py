"""Loggers: files a record at a time, functions, and the real TensorBoard, Weights & Biases (offline) and trackio."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
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
from grokcurv.runs import RunError


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


WHOLE = b"step,rho,method\r\n0,0.5,bracket\r\n10,0.25,bracket\r\n"


@pytest.mark.parametrize("cut", range(1, len(b"10,0.25,bracket\r\n") + 1))
def test_csv_continues_after_a_cut(tmp_path: Path, cut: int) -> None:
    """Wherever the last line ends, later ones are whole, and what is cut visibly is gone."""
    path = tmp_path / "records.csv"
    path.write_bytes(WHOLE[:-cut])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with CSVLogger(path) as logger:
            logger.log({"rho": 1.0, "method": "difference"}, step=20)
    # A line that has all its fields stays: it may lack its newline alone.
    kept = {1: "bracket", 2: "bracket"} | {2 + lost: "bracket"[:-lost] for lost in range(1, 8)}
    assert [row["method"] for row in rows(path)] == ["bracket", *([kept[cut]] if cut in kept else []), "difference"]
    assert [str(path) in str(one.message) for one in said] == [True] * (cut < len(b"10,0.25,bracket\r\n"))
    assert path.read_bytes().count(b"\r\n") == len(path.read_bytes().splitlines())


@pytest.mark.parametrize("there", [WHOLE[:3], WHOLE[:9], WHOLE[:15], WHOLE[:16], b"rho,method,step"])
def test_csv_completes_a_cut_header(tmp_path: Path, there: bytes) -> None:
    path = tmp_path / "records.csv"
    path.write_bytes(there)
    for step in (0, 1):
        with CSVLogger(path) as logger:
            logger.log({"rho": 1.0, "method": ""}, step=step)
    assert rows(path) == [{"step": f"{step}", "rho": "1.0", "method": ""} for step in (0, 1)]


@pytest.mark.parametrize("there", [b"some notes", b"step,loss", WHOLE + b'20,0.5,"difference\r\n30,0.5,bracket\r\n'])
def test_csv_spoils_no_other_file(tmp_path: Path, there: bytes) -> None:
    path = tmp_path / "records.csv"
    path.write_bytes(there)
    with pytest.raises(ValueError, match=r"records\.csv"), CSVLogger(path) as logger:
        logger.log({"rho": 1.0, "method": ""}, step=0)
    assert path.read_bytes() == there


def test_csv_drops_what_is_cut_inside_a_quotation(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_bytes(WHOLE + b'20,0.5,"two\nlines, of')
    with pytest.warns(UserWarning, match=r"records\.csv lost its last line"), CSVLogger(path) as logger:
        logger.log({"rho": 1.0, "method": "two\nlines"}, step=30)
    assert [row["step"] for row in rows(path)] == ["0", "10", "30"]


def test_csv_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.csv"

    class Full:
        """A file on a disk with room for a few bytes more."""

        def __init__(self, file: io.FileIO) -> None:
            self._file, self._room = file, 5

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            if not self._room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = self._file.write(data[: self._room])
            self._room -= written
            return written

    with CSVLogger(path) as logger:
        logger.log({"rho": 0.5}, step=0)
        with monkeypatch.context() as patched:
            patched.setattr(logger, "_file", Full(logger._file))
            with pytest.raises(RunError, match=r"records\.csv: No space left"):
                logger.log({"rho": 0.625}, step=1)
        logger.log({"rho": 0.75}, step=2)
    assert rows(path) == [{"step": "0", "rho": "0.5"}, {"step": "2", "rho": "0.75"}]


def test_two_csv_loggers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    with CSVLogger(path) as one, CSVLogger(path) as other:
        one.log({"rho": 0.5}, step=0)
        other.log({"rho": 0.5}, step=1)
        one.log({"rho": 0.5}, step=2)
    assert [row["step"] for row in rows(path)] == ["0", "1", "2"]


def test_a_relative_path_is_of_the_folder_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with ParquetLogger("records.parquet", every=1) as parquet, CSVLogger("records.csv") as lines:
        for step in (0, 1):
            parquet.log({"rho": 0.5}, step=step)
            lines.log({"rho": 0.5}, step=step)
            monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(pd.read_parquet(tmp_path / "records.parquet")) == len(rows(tmp_path / "records.csv")) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


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


NUMBERS = [torch.tensor(2.0, requires_grad=True), torch.tensor(2.0).bfloat16(), np.float32(2), np.array(2.0), 2, True]


@pytest.mark.parametrize("value", [*NUMBERS, np.int64(2), torch.tensor(2), np.bool_(True), np.str_("two"), None])
def test_numbers_of_other_libraries(tmp_path: Path, value: object) -> None:
    plain = value.item() if isinstance(value, torch.Tensor | np.generic | np.ndarray) else value
    with ParquetLogger(tmp_path / "records.parquet") as parquet, CSVLogger(tmp_path / "records.csv") as lines:
        parquet.log({"x": value}, step=0)
        lines.log({"x": value}, step=0)
    assert pq.read_table(tmp_path / "records.parquet")["x"].to_pylist() == [plain]
    assert rows(tmp_path / "records.csv") == [{"step": "0", "x": "" if plain is None else str(plain)}]


def test_parquet_refuses_what_it_cannot_hold_when_it_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    with ParquetLogger(path) as logger:
        for value in (torch.ones(2), [1.0], 1j, {}):
            with pytest.raises(
                TypeError, match=r"records\.parquet: x must be a number, truth value, text or None; got"
            ):
                logger.log({"x": value}, step=0)
        for value in (2**63, "\udce4"):
            with pytest.raises(ValueError, match=r"records\.parquet: x must be .*; got"):
                logger.log({"x": value}, step=0)
        logger.log({"x": 1.0}, step=0)
        for value in ("1", True):
            with pytest.raises(ValueError, match=r"records\.parquet: x must be numbers in every record; got t"):
                logger.log({"x": value}, step=0)
    assert pq.read_table(path).to_pydict() == {"step": [0], "x": [1.0]}


def test_parquet_makes_a_column_of_floats(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    values = [None, 2**53 + 1, 3, 0.5, None, 4]
    for step, value in enumerate(values):  # a file each time, so that what is there changes its type too
        with ParquetLogger(path) as logger:
            logger.log({"x": value}, step=step)
    assert pq.read_table(path)["x"].to_pylist() == [None, 2.0**53, 3.0, 0.5, None, 4.0]
    other = tmp_path / "at once.parquet"
    with ParquetLogger(other) as logger:
        for step, value in enumerate(values):
            logger.log({"x": value}, step=step)
    assert pq.read_table(other).equals(pq.read_table(path))


def test_parquet_names_a_file_it_cannot_continue(tmp_path: Path) -> None:
    path = tmp_path / "lr=0.1" / "records.parquet"
    path.parent.mkdir()
    with ParquetLogger(path) as logger:
        logger.log(RECORD, step=4)
    ParquetLogger(path).log(RECORD, step=5)  # the folder's name adds no column
    whole = path.read_bytes()
    for data in (b"", b"PAR1", whole[:-10], whole[:40] + bytes(40) + whole[80:], b"step,rho\n"):
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"lr=0\.1/records\.parquet is damaged"):
            ParquetLogger(path)
    pq.write_table(pa.table({"step": [0], "rho": [[1.0]]}), path)
    with pytest.raises(
        RunError, match=r"records\.parquet is damaged, or no file of records: its column rho is of list"
    ):
        ParquetLogger(path)


def test_parquet_writes_as_many_rows_as_there_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant number of times, that is, however long the run is, and though nobody waits between two records."""
    sizes: list[int] = []

    def write(path: Path, data: bytes) -> None:
        sizes.append(pq.read_metadata(io.BytesIO(data)).num_rows)
        path.write_bytes(data)

    monkeypatch.setattr("grokcurv.storage.write_atomically", write)
    monkeypatch.setattr("grokcurv.loggers.time", SimpleNamespace(monotonic=lambda: 0.0))
    with ParquetLogger(tmp_path / "records.parquet", every=5) as logger:
        for step in range(3000):
            logger._took = 1.0  # and the clock stands still
            logger.log({"rho": 0.5}, step=step)
            assert len(logger._rows) < max(5, step / 8 + 1)
    assert sizes[:8] == list(range(5, 41, 5))
    assert sizes[-1] == 3000
    assert sum(sizes) < 11 * 3000


def test_parquet_writes_more_often_where_that_takes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "records.parquet", 0.0
    monkeypatch.setattr("grokcurv.loggers.time", SimpleNamespace(monotonic=lambda: now))
    with ParquetLogger(path, every=1) as logger:
        for step in range(100):
            logger.log({"rho": 0.5}, step=step)
            now += 1.0
            assert len(pq.read_table(path)) == step + 1


def test_two_parquet_loggers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    with ParquetLogger(path, every=2) as one, ParquetLogger(path, every=3) as other:
        for step in range(12):
            (one if step % 2 else other).log({"rho": step if step % 2 else 0.5}, step=step)
    assert sorted(pq.read_table(path)["step"].to_pylist()) == list(range(12))
    assert [file.name for file in tmp_path.iterdir()] == ["records.parquet"]


def test_two_parquet_loggers_with_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "records.parquet"
    one, other = ParquetLogger(path), ParquetLogger(path)
    one.log({"rho": 0.5}, step=0)
    other.log({"loss": 0.5}, step=0)
    one.close()
    with pytest.raises(ValueError, match=r"records\.parquet: they differ in loss, rho"):
        other.close()
    assert pq.read_table(path).column_names == ["step", "rho"]


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
