"""Loggers: the CSV file a record at a time, functions, and a run object with its own ``log``."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from grokcurv.loggers import CallableLogger, CSVLogger, Logger


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
