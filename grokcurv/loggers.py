"""Where records go, one by one, besides the run folder.

A logger is anything with ``log(record, step=...)``: three lines make another::

    class Print:
        def log(self, record, /, *, step):
            print(step, record["defect_median"])

    CurvatureMonitor(model, loss_fn, loggers=[Print(), ParquetLogger("curvature.parquet")])

Those here that hold a file are context managers, and ``close`` completes it. TensorBoard and the runs of Weights &
Biases and trackio come with the extras ``tensorboard`` and ``wandb``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

__all__ = ["CSVLogger", "CallableLogger", "Logger", "ParquetLogger", "TensorBoardLogger", "WandbLogger", "scalars"]

PREFIX = "curvature/"
"""What the names of the curves begin with where they stand beside others."""


class Logger(Protocol):
    """What takes the records."""

    def log(self, record: dict[str, object], /, *, step: int) -> object:
        """Take one record (a column's name to a number, truth value or text) of training step ``step``."""


def scalars(record: Mapping[str, object], prefix: str = PREFIX) -> dict[str, float]:
    """What can be drawn of a record: its finite numbers, truth values as 0 and 1; without the step, text and NaN."""
    numbers = {name: float(x) for name, x in record.items() if name != "step" and isinstance(x, int | float)}
    return {prefix + name: x for name, x in numbers.items() if math.isfinite(x)}


class CallableLogger:
    """Hands each record to ``function(record, step)``; what the function raises passes through."""

    def __init__(self, function: Callable[[dict[str, object], int], object]) -> None:
        if not callable(function):
            raise TypeError(f"function must be callable as function(record, step); got {type(function).__name__}")
        self._function = function

    def log(self, record: dict[str, object], /, *, step: int) -> None:
        self._function(record, step)


class _Closing:
    """A context manager that closes."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class ParquetLogger(_Closing):
    """Keeps the records in a Parquet file, one row each; ``step`` is the first column.

    The file is written anew, and is whole at any time, after every ``every`` records and by ``close``: a run that is
    killed loses fewer than ``every``. An existing file is continued when its columns are the same.

    Args:
        path: of the file, in a folder that is there.
        every: records between two writings.

    Raises:
        ValueError: ``every`` below one; when logging, a record with other columns than the file's, or after ``close``.
        grokcurv.runs.RunError: the disk is full, or refuses otherwise; the file that was there is then intact.
    """

    def __init__(self, path: str | Path, *, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.path, self.every = Path(path), every
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: there is no folder {self.path.parent}")
        self._rows: list[dict[str, Any]] = []
        if self.path.exists():
            import pyarrow.parquet as pq

            self._rows = pq.read_table(self.path).to_pylist()
        self._unwritten, self._closed = 0, False

    def log(self, record: Mapping[str, object], /, *, step: int) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        row = {"step": step, **{name: value for name, value in record.items() if name != "step"}}
        if self._rows and row.keys() != self._rows[0].keys():
            raise ValueError(_unlike(self.path, row.keys() ^ self._rows[0].keys()))
        self._rows.append(row)
        self._unwritten += 1
        if self._unwritten >= self.every:
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if not self._unwritten:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        from grokcurv.runs import write_atomically

        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self._rows), buffer)
        write_atomically(self.path, buffer.getvalue().to_pybytes())
        self._unwritten = 0

    def close(self) -> None:
        self.flush()
        self._closed = True


class CSVLogger(_Closing):
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
            raise ValueError(_unlike(self.path, row.keys() ^ set(self._columns)))
        self._writer.writerow([row[name] for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLogger(_Closing):
    """Draws each number of a record as a curve of TensorBoard, named ``curvature/defect_median`` and so on.

    Args:
        target: the folder for the event files, or a ``SummaryWriter`` that is there and stays open on ``close``.
        prefix: of the curves' names.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, target: str | Path | Any, *, prefix: str = PREFIX) -> None:
        self._own, self._prefix = isinstance(target, str | Path), prefix
        self._writer: Any = _summary_writer(Path(target)) if self._own else target

    def log(self, record: Mapping[str, object], /, *, step: int) -> None:
        for name, value in scalars(record, self._prefix).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush, and close a writer that was made here."""
        if self._own:
            self._writer.close()
        else:
            self._writer.flush()


class WandbLogger:
    """Adds each number of a record to a run of Weights & Biases, or to one that logs alike, such as trackio's.

    A run of Weights & Biases draws them over an axis of their own, ``curvature/step``: its own step counts the calls of
    ``run.log``, others' included, and never goes back. The run stays open.

    Args:
        run: what ``wandb.init`` or ``trackio.init`` returned.
        prefix: of the names.

    Raises:
        TypeError: ``run`` has no ``log``.
    """

    def __init__(self, run: Any, *, prefix: str = PREFIX) -> None:
        if not callable(getattr(run, "log", None)):
            raise TypeError(f"run must have a method log, as what wandb.init() returns; got {type(run).__name__}")
        self._run, self._prefix = run, prefix
        self._axis = f"{prefix}step" if hasattr(run, "define_metric") else None
        if self._axis:
            run.define_metric(self._axis, hidden=True)
            run.define_metric(f"{prefix}*", step_metric=self._axis)

    def log(self, record: Mapping[str, object], /, *, step: int) -> None:
        values = scalars(record, self._prefix)
        if self._axis:
            self._run.log({**values, self._axis: step})
        else:
            self._run.log(values, step=step)


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoardLogger needs TensorBoard: pip install 'grokcurv[tensorboard]'") from error
    return SummaryWriter(str(folder))


def _unlike(path: Path, names: set[str]) -> str:
    return f"record has other columns than {path}: they differ in {', '.join(sorted(names))}"
