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

import contextlib
import csv
import fcntl
import io
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from grokcurv.storage import RunError, write_parquet

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["CSVLogger", "CallableLogger", "Logger", "ParquetLogger", "TensorBoardLogger", "WandbLogger", "scalars"]

PREFIX = "curvature/"
"""What the names of the curves begin with where they stand beside others."""

KINDS = {
    NoneType: ("nothing", "null"),
    bool: ("truth values", "bool"),
    int: ("numbers", "int64"),
    float: ("numbers", "float64"),
    str: ("text", "string"),
}
"""What a column of a Parquet file can hold, and the type that Arrow has for it."""


class Logger(Protocol):
    """What takes the records."""

    def log(self, record: dict[str, object], /, *, step: int) -> object:
        """Take one record (a column's name to a number, truth value or text) of training step ``step``."""


def scalars(record: Mapping[str, object], prefix: str = PREFIX) -> dict[str, float]:
    """What can be drawn of a record: its finite numbers, truth values as 0 and 1; without the step, text and NaN."""
    numbers = {name: float(x) for name, x in record.items() if name != "step" and isinstance(x, int | float)}
    return {prefix + name: x for name, x in numbers.items() if math.isfinite(x)}


class CallableLogger:
    """Hands each record to ``function(record, step)``; what the function raises passes through.

    >>> CallableLogger(lambda record, step: print(step, record)).log({"defect_median": 1.5}, step=7)
    7 {'defect_median': 1.5}
    """

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

    The file is whole at any time: it is written anew after every ``every`` records, and by ``close``. Since that takes
    as long as the file is long, a file of more than eight times ``every`` rows waits until it has grown by an eighth,
    or until twenty times as long has passed as the last writing took: the time is linear in the number of records. A
    run that is killed loses what came since the last writing: fewer than ``every`` records, or in a longer file fewer
    than came in that time, and than an eighth of its rows.

    A value is a number, truth value, text or None; a tensor or array without dimensions counts as the number in it.
    Whole numbers and others in one column make it one of floats. An existing file is continued when its columns are
    the same. Two loggers of one file, in one process or two, both keep their records: each puts them after what is
    there when it writes.

    >>> import pandas as pd
    >>> with ParquetLogger("curvature.parquet") as logger:
    ...     logger.log({"defect_median": 1.5}, step=7)
    >>> pd.read_parquet("curvature.parquet").to_dict("records")
    [{'step': 7, 'defect_median': 1.5}]

    Args:
        path: of the file, in a folder that is there; a relative one is of the folder the process is in now.
        every: records between two writings, at least.

    Raises:
        ValueError: ``every`` below one; when logging, a record with other columns than the file's, a value of another
            kind than its column's or too large for it, or after ``close``.
        TypeError: when logging, a value that is none of those.
        FileNotFoundError: there is no such folder.
        grokcurv.runs.RunError: the file that is there is damaged, or has columns of other kinds; when writing, the disk
            is full, or refuses otherwise, and the file that was there is then intact.
    """

    def __init__(self, path: str | Path, *, every: int = 100) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.path, self.every = Path(path).resolve(), every
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{self.path}: there is no folder {self.path.parent}")
        self._rows: list[dict[str, Any]] = []
        self._stamp = _stamp(self.path)
        self._table = None if self._stamp is None else _read_table(self.path)
        self._kinds = None if self._table is None else _kinds(self._table.schema)
        self._written, self._took, self._closed = 0.0, 0.0, False

    def log(self, record: Mapping[str, object], /, *, step: int) -> None:
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        row = _row(record, step)
        kinds = {name: self._kind(name, value) for name, value in row.items()}
        self._kinds = kinds if self._kinds is None else _joined(self.path, self._kinds, kinds)
        self._rows.append(row)
        if self._due():
            self.flush()

    def flush(self) -> None:
        """Write what has not been written yet."""
        if self._kinds is None or not self._rows:
            return
        began = time.monotonic()
        with _locked(self.path.parent):
            if _stamp(self.path) not in (None, self._stamp):  # by another logger, or somebody else
                there = _read_table(self.path)
                self._kinds = _joined(self.path, _kinds(there.schema), self._kinds)
                self._table = there
            table = self._whole(self._kinds)
            write_parquet(self.path, table)
            self._stamp = _stamp(self.path)
        self._table, self._rows = table, []
        self._written = time.monotonic()
        self._took = self._written - began

    def close(self) -> None:
        self.flush()
        self._closed = True

    def _due(self) -> bool:
        """Whether to write: at growing intervals, else the time would be quadratic; sooner where it takes no time."""
        waiting, written = len(self._rows), 0 if self._table is None else len(self._table)
        rested = time.monotonic() - self._written >= 20 * self._took
        return waiting >= self.every and (8 * waiting >= written or rested)

    def _kind(self, name: str, value: object) -> type:
        """The type of a value that a file can hold: what it cannot is refused now, not when it is written."""
        kind = type(value)
        if kind not in KINDS:
            raise TypeError(f"{self.path}: {name} must be a number, truth value, text or None; got {kind.__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{self.path}: {name} must be a number of 64 bits; got {value}")
        # The names of files may hold bytes that UTF-8 cannot, as halves of surrogate pairs.
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{self.path}: {name} must be text that UTF-8 can hold; got {value!r}")
        return kind

    def _whole(self, kinds: Mapping[str, type]) -> pa.Table:
        """The rows of the file, then those that have not been written yet."""
        import pyarrow as pa

        schema = _schema(kinds)
        columns = {name: [row[name] for row in self._rows] for name in kinds}
        for name, kind in kinds.items():
            if kind is float:  # Arrow refuses a whole number that is not a float exactly
                columns[name] = [None if value is None else float(value) for value in columns[name]]
        added = pa.Table.from_pydict(columns, schema)
        if self._table is None:
            return added
        return pa.concat_tables([self._table.cast(schema, safe=False), added]).combine_chunks()


class CSVLogger(_Closing):
    """Appends each record to a CSV file, one flushed line a record; ``step`` is the first column.

    The first record names the columns. An existing file is continued when its columns are the same. If its last line is
    cut, because the machine or the disk failed, that line is dropped, with a warning. A last line that lacks nothing
    but its newline stays; its last value may be cut, and there is a warning too. Two loggers of one file, in one
    process or two, both keep their records. A tensor or array without dimensions counts as the number in it.

    >>> with CSVLogger("curvature.csv") as logger:
    ...     logger.log({"defect_median": 1.5}, step=7)
    >>> Path("curvature.csv").read_text().split()
    ['step,defect_median', '7,1.5']

    Args:
        path: of the file, in a folder that is there; a relative one is of the folder the process is in now.

    Raises:
        ValueError: a file that is no CSV; when logging, a record with other columns than the file's, or after
            ``close``.
        OSError: the file cannot be opened.
        grokcurv.runs.RunError: when logging, the disk is full, or refuses otherwise; the lines that were there are then
            intact.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        self._columns: list[str] | None = None
        # Without a buffer: what a failed write left in one would come out later, in the middle of a line.
        self._file = self.path.open("a+b", buffering=0)
        try:
            with _locked(self.path):
                self._continue()
        except BaseException:
            self._file.close()
            raise

    def log(self, record: Mapping[str, object], /, *, step: int) -> None:
        row = _row(record, step)
        with _locked(self.path):
            if self._columns is None:  # by now another logger may have written the header
                self._continue(list(row))
            if self._columns is None:
                self._append(_line(row))
                self._columns = list(row)
            if row.keys() != set(self._columns):
                raise ValueError(_unlike(self.path, row.keys() ^ set(self._columns)))
            self._append(_line(row[name] for name in self._columns))

    def close(self) -> None:
        self._file.close()

    def _continue(self, wanted: list[str] | None = None) -> None:
        """Read the columns of the file, and mend its end. A header without newline waits for the columns ``wanted``."""
        found = _Scan(self.path)
        if found.columns is None and found.tail and wanted is not None:
            if set(found.fields) != set(wanted) and not _line(wanted).encode().startswith(found.tail):
                raise ValueError(_unlike(self.path, set(found.fields) ^ set(wanted)))
            self._file.truncate(0)
        elif found.columns is not None and found.tail:
            self._file.truncate(found.whole + len(found.tail.rstrip(b"\r")) if found.complete else found.whole)
            said = "lost its last line, which was cut"
            if found.complete:
                self._append("\r\n")
                said = "had no newline at its end: its last value may be cut"
            warnings.warn(f"{self.path} {said}", stacklevel=3)
        self._columns = found.columns

    def _append(self, text: str) -> None:
        """Write text at the end of the file: all of it, or nothing."""
        data, size = text.encode(), os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line would spoil the next one
                self._file.truncate(size)
            raise RunError(f"cannot write {self.path}: {error.strerror}; what was there is intact") from error


class TensorBoardLogger(_Closing):
    """Draws each number of a record as a curve of TensorBoard, named ``curvature/defect_median`` and so on.

    >>> from types import SimpleNamespace
    >>> writer = SimpleNamespace(add_scalar=print)  # as a SummaryWriter's
    >>> TensorBoardLogger(writer).log({"defect_median": 1.5}, step=7)
    curvature/defect_median 1.5 7

    Args:
        target: the folder for the event files, or a ``SummaryWriter`` that is there and stays open on ``close``.
        prefix: of the curves' names.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, target: str | Path | Any, *, prefix: str = PREFIX) -> None:
        self._own, self._prefix = isinstance(target, str | Path), prefix
        self._writer: Any = target
        if self._own:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("TensorBoardLogger needs TensorBoard: pip install 'grokcurv[tensorboard]'") from error
            self._writer = SummaryWriter(str(target))

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

    >>> from types import SimpleNamespace
    >>> run = SimpleNamespace(log=lambda values, step: print(step, values))  # as trackio's
    >>> WandbLogger(run).log({"defect_median": 1.5}, step=7)
    7 {'curvature/defect_median': 1.5}

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


def _unlike(path: Path, names: set[str]) -> str:
    return f"record has other columns than {path}: they differ in {', '.join(sorted(names))}"


def _row(record: Mapping[str, object], step: int) -> dict[str, Any]:
    """A record as a row: ``step`` first, every number Python's own."""
    return {"step": _plain(step), **{name: _plain(value) for name, value in record.items() if name != "step"}}


def _plain(value: object) -> object:
    """A number of torch, NumPy or another library as Python's own; everything else as it is."""
    if type(value) in KINDS:
        return value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):  # a subclass
        return str.__str__(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def _joined(path: Path, there: dict[str, type], here: dict[str, type]) -> dict[str, type]:
    """The kinds of columns that hold what those of both do."""
    if there.keys() != here.keys():
        raise ValueError(_unlike(path, there.keys() ^ here.keys()))
    joined = {}
    for name, one in there.items():
        other = here[name]
        kinds = {one, other} - {NoneType}
        if len(kinds) == 2 and kinds != {int, float}:
            raise ValueError(f"{path}: {name} must be {KINDS[one][0]} in every record; got {KINDS[other][0]} too")
        joined[name] = float if len(kinds) == 2 else next(iter(kinds), NoneType)
    return joined


def _kinds(schema: pa.Schema) -> dict[str, type]:
    """What the columns of a file hold; ValueError for one that no record could continue."""
    import pyarrow.types as t

    numbers = (bool, t.is_boolean), (int, t.is_integer), (float, t.is_floating)
    tests = (NoneType, t.is_null), *numbers, (str, t.is_string), (str, t.is_large_string)
    kinds: dict[str, type] = {}
    for field in schema:
        type_ = field.type.value_type if t.is_dictionary(field.type) else field.type
        kind = next((kind for kind, holds in tests if holds(type_)), None)
        if kind is None or field.name in kinds:
            reason = "there twice" if field.name in kinds else f"of {field.type}"
            raise ValueError(f"its column {field.name} is {reason}")
        kinds[field.name] = kind
    return kinds


def _schema(kinds: Mapping[str, type]) -> pa.Schema:
    """The columns of a file that holds these."""
    import pyarrow as pa

    return pa.schema([(name, KINDS[kind][1]) for name, kind in kinds.items()])


def _read_table(path: Path) -> pa.Table:
    """The rows of a file that is to be continued, in the types that records have."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:  # given the path, Arrow would make columns of folders named like lr=0.1
            table = pq.ParquetFile(file, page_checksum_verification=True).read()
        return table.cast(_schema(_kinds(table.schema)))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{path} is damaged, or no file of records: {error}") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever somebody writes the file; None where there is none."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return None
    return there.st_ino, there.st_mtime_ns, there.st_size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a folder or a file, which other loggers wait for; without one where the disk has none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which gives the lock back
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _line(values: Iterable[object]) -> str:
    """Values as a line of CSV."""
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue()


class _Scan:
    """How far a CSV file is whole.

    Attributes:
        columns: the header, if it has its newline.
        whole: the number of bytes in the lines that are whole.
        fields: what the last line says, if it is not.
        tail: its bytes.
        complete: whether it may be lacking its newline alone.
    """

    def __init__(self, path: Path) -> None:
        self.columns: list[str] | None = None
        self.whole, self.fields, self.tail = 0, list[str](), b""
        taken: list[bytes] = []

        def lines() -> Iterator[str]:
            with path.open("rb") as file:
                # Inside of a quotation the reader takes what comes behind the last line into that line's record.
                for line in chain(file, [b""]):
                    taken.append(line)
                    yield line.decode("utf-8" if self.whole else "utf-8-sig", errors="replace")

        quoted = False
        try:
            for fields in csv.reader(lines()):
                line = b"".join(taken)
                if taken[-1].endswith(b"\n"):
                    self.whole += len(line)
                    self.columns = self.columns or fields
                elif line:  # else it is what comes behind the last one
                    self.fields, self.tail, quoted = fields, line, not taken[-1]
                taken.clear()
        except csv.Error as error:
            raise ValueError(f"{path} is no CSV file: {error}") from error
        if self.columns and any(len(_fields(line)) == len(self.columns) for line in self.tail.splitlines()[1:]):
            raise ValueError(f"{path} has a quotation without end, and records behind it: mend it, or log elsewhere")
        self.complete = not quoted and len(self.fields) == len(self.columns or self.fields) and b"\0" not in self.tail


def _fields(line: bytes) -> list[str]:
    return next(csv.reader([line.decode(errors="replace")]), [])
