"""Where records go, one by one, besides the run folder.

A logger is anything with ``log(record, step=...)``. A Weights & Biases run is one as it is::

    CurvatureMonitor(model, loss_fn, loggers=[wandb.init()])

``CallableLogger`` wraps a function for everything else, for instance TensorBoard::

    writer = SummaryWriter("logs")
    CallableLogger(lambda record, step: writer.add_scalar("defect", record["defect_median"], step))
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

__all__ = ["CSVLogger", "CallableLogger", "Logger"]


class Logger(Protocol):
    """What takes the records."""

    def log(self, record: dict[str, object], /, *, step: int) -> object:
        """Take one record (a column's name to a number, truth value or text) of training step ``step``."""


class CallableLogger:
    """Hands each record to ``function(record, step)``; what the function raises passes through."""

    def __init__(self, function: Callable[[dict[str, object], int], object]) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable as function(record, step); got {type(function).__name__}")
        self._function = function

    def log(self, record: dict[str, object], /, *, step: int) -> None:
        self._function(record, step)


class CSVLogger:
    """Appends each record to a CSV file, one flushed line a record; ``step`` is the first column.

    The first record names the columns. An existing file is continued when its columns are the same. A record with
    other columns than the file's is a ValueError, and so is logging after ``close``. Also a context manager.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._columns: list[str] | None = None
        self._file = self.path.open("a+", newline="", encoding="utf-8")
        self._file.seek(0)
        header = next(csv.reader(self._file), None)
        if header is not None:
            self._columns = header
        self._writer = csv.writer(self._file)

    def log(self, record: Mapping[str, object], /, *, step: int) -> None:
        row = {"step": step, **{name: value for name, value in record.items() if name != "step"}}
        if self._columns is None:
            self._columns = list(row)
            self._writer.writerow(self._columns)
        if row.keys() != set(self._columns):
            unlike = ", ".join(sorted(row.keys() ^ set(self._columns)))
            raise ValueError(f"record has other columns than {self.path}: they differ in {unlike}")
        self._writer.writerow([row[name] for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> CSVLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
