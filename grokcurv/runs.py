"""The run folder: what a training run leaves on disk, written so that it survives being killed at any instant.

=========================  ===========================================================================
``config.json``            the settings of the run
``environment.json``       where it ran last: versions, machine, device, threads
``status.json``            ``running``, ``interrupted``, ``finished`` or ``failed: reason``
``metrics.parquet``        one row an evaluation
``curvature.parquet``      one row a measurement
``pca.parquet``            PC1 % by matrix and step
``checkpoint.safetensors`` everything needed to go on
``basis.safetensors``      the execution basis
``snapshots/``             the weights at chosen steps, a file each
=========================  ===========================================================================

Every file is written under a temporary name, synced and renamed, and carries a schema version. Tables go before the
checkpoint, so after a crash they may be ahead of it; resuming drops the rows that are. One writer at a time holds a
lock. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import platform
import re
import time
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SCHEMA = 1
"""Version of every file of the folder."""

TABLES = ("metrics", "curvature", "pca")
"""Names of the Parquet files; each has a column ``step``."""

PACKAGES = ("grokcurv", "torch", "numpy", "pandas", "pyarrow", "scipy", "safetensors")


class RunError(RuntimeError):
    """A run folder that cannot be read, written or continued; the message says which and what to do."""


class Run:
    """A run, finished or not: read from its folder when asked for, or held in memory when it never had one.

    Attributes:
        path: the folder, or None.
        config: the settings, by name.
        environment: versions, machine, device and threads of the process that wrote it last.
    """

    def __init__(
        self,
        path: Path | None,
        config: dict[str, Any],
        environment: dict[str, Any],
        *,
        status: str | None = None,
        tables: Mapping[str, pd.DataFrame] | None = None,
    ) -> None:
        self.path, self.config, self.environment = path, config, environment
        self._status = status
        self._tables = dict(tables or {})

    @property
    def metrics(self) -> pd.DataFrame:
        """One row an evaluation.

        step, train_loss, train_acc, test_loss, test_acc, weight_norm, fourier_embedding and fourier_logits (see
        ``docs/runs.md``; NaN where not defined), learning_rate (of the next update) and seconds (since the run began,
        the time it stood still left out). With an intervention, interventions (how many so far) and intervention_norm
        (length of what the latest one changed; NaN before the first).
        """
        return self._table("metrics")

    @property
    def curvature(self) -> pd.DataFrame:
        """One row a measurement: the columns of :meth:`grokcurv.CurvatureMonitor.records`."""
        return self._table("curvature")

    @property
    def pca_history(self) -> pd.DataFrame:
        """PC1 % of the trajectory so far: step, matrix, pc1_percent."""
        return self._table("pca")

    def records(self) -> pd.DataFrame:
        """Metrics and curvature joined on ``step``, every step of either, for :mod:`grokcurv.analysis`."""
        if self.curvature.empty or self.metrics.empty:
            return (self.metrics if self.curvature.empty else self.curvature).copy()
        return self.metrics.merge(self.curvature, on="step", how="outer").sort_values("step", ignore_index=True)

    @property
    def status(self) -> str:
        """``running``, ``interrupted`` (also: killed), ``finished`` or ``failed: reason``; read afresh at every use."""
        if self.path is None:
            return self._status or "finished"
        status: str = _read_json(self.path / "status.json", "status", str)
        return "interrupted" if status == "running" and _holder(self.path) is None else status

    def checkpoint(self) -> dict[str, Any]:
        """The latest checkpoint; RunError if there is none or it is damaged."""
        if self.path is None:
            raise RunError("this run was kept in memory alone: it has no checkpoint")
        return _read_state(self.path / "checkpoint.safetensors")

    def basis(self) -> dict[str, Any]:
        """The execution basis at the last checkpoint: the arguments of :meth:`grokcurv.Subspace.from_table`.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = self.path / "basis.safetensors" if self.path else None
        if path is None or not path.exists():
            raise RunError(f"{self.path or 'this run, kept in memory,'} holds no execution basis (basis.safetensors)")
        return _read_state(path)

    @property
    def snapshots(self) -> list[int]:
        """The steps whose weights were kept, in order (setting ``snapshot_every``)."""
        files = self.path.glob("snapshots/*.safetensors") if self.path else ()
        return sorted(int(file.stem) for file in files if re.fullmatch("[0-9]{9,}", file.stem))

    def snapshot(self, step: int) -> dict[str, Any]:
        """The network's ``state_dict`` at ``step``, one of :attr:`snapshots`; RunError if it is none or damaged."""
        if self.path is None:
            raise RunError("this run was kept in memory alone: it has no snapshot")
        return _read_state(_snapshot_path(self.path, step))

    def _table(self, name: str) -> pd.DataFrame:
        if name not in self._tables:
            if self.path is None:
                raise RunError(f"this run has no {name}")
            self._tables[name] = _read_table(self.path / f"{name}.parquet")
        return self._tables[name]


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder for reading; tables are loaded when first used.

    Raises:
        RunError: no run there, or one whose files are damaged or of a later schema version.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} holds no run: there is no config.json in it")
    config = _read_json(folder / "config.json", "config", dict)
    return Run(folder, config, _read_json(folder / "environment.json", "environment", dict))


class RunWriter:
    """The one writer of a run folder, as a context manager.

    Leaving it by an exception sets the status: ``interrupted`` for Ctrl-C, ``failed: ...`` otherwise.

    Args:
        path: the folder; made if missing.
        config: the settings, plain values that JSON can hold.
        resume: continue the run that is there, if any; without it a folder that holds a run is an error.
        environment: what to record beside :func:`describe_environment`.

    Raises:
        RunError: on entering, for a folder held by another writer, one that holds a run of other settings (they are
            named), or a damaged one; at any write, for a full disk or one that fails otherwise: the file that was
            there is then intact.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads(json.dumps(dict(config)))
        self.resume = resume
        self.environment = {**describe_environment(), **(environment or {})}
        self._lock: TextIO | None = None

    def __enter__(self) -> RunWriter:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise RunError(f"cannot write into {self.path}: {error.strerror}") from error
        try:
            self._acquire(self._lock)
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._lock is not None
        try:
            if kind is not None:
                with contextlib.suppress(RunError):  # the first error is the one to report
                    self.set_status("interrupted" if issubclass(kind, KeyboardInterrupt) else f"failed: {error}")
        finally:
            self._lock.close()

    def set_status(self, status: str) -> None:
        self._write_json("status", status)

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Replace ``<name>.parquet``; ``name`` is one of :data:`TABLES`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pandas(frame, preserve_index=False)
        known = table.schema.metadata or {}
        table = table.replace_schema_metadata({**known, b"grokcurv_schema": str(SCHEMA).encode()})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, write_page_checksum=True)
        write_atomically(self.path / f"{name}.parquet", buffer.getvalue())

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by a nested state of tensors, plain values, lists, tuples and dicts."""
        write_atomically(self.path / "checkpoint.safetensors", pack(state))

    def write_basis(self, state: Mapping[str, Any]) -> None:
        write_atomically(self.path / "basis.safetensors", pack(state))

    def write_snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep a network's ``state_dict``; one that is there from before a crash has the same bits."""
        file = _snapshot_path(self.path, step)
        if file.exists():
            return
        try:
            file.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write {file.parent}: {error.strerror}") from error
        write_atomically(file, pack(state))

    def read_table(self, name: str) -> pd.DataFrame:
        return _read_table(self.path / f"{name}.parquet")

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None where the run has to start from the beginning."""
        path = self.path / "checkpoint.safetensors"
        return _read_state(path) if path.exists() else None

    def drop_after(self, step: int) -> None:
        """Drop every table's rows past ``step``: they were written after the checkpoint one goes on from."""
        for name in TABLES:
            frame = self.read_table(name)
            if not frame.empty and frame["step"].max() > step:
                self.write_table(name, frame[frame["step"] <= step])

    def _acquire(self, lock: TextIO) -> None:
        for patience in (0.05, 0.2, None):  # a reader asking for the status holds the lock for an instant
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience is None:
                    holder = _holder(self.path) or "unknown"
                    raise RunError(f"{self.path} is being written by process {holder}") from None
                time.sleep(patience)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()

    def _claim(self) -> None:
        if (self.path / "config.json").exists():
            there = _read_json(self.path / "config.json", "config", dict)
            differing = [
                f"{name} ({there.get(name, 'missing')!r} there, {self.config.get(name, 'missing')!r} here)"
                for name in sorted(there.keys() | self.config.keys())
                if name not in there or name not in self.config or there[name] != self.config[name]
            ]
            if differing:
                raise RunError(f"{self.path} holds a run of another configuration: {', '.join(differing)}")
            if not self.resume:
                raise RunError(f"{self.path} already holds this run: resume it, or choose another folder")
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("snapshots/.*.tmp")):
            leftover.unlink()
        self._write_json("environment", self.environment)
        self.set_status("running")
        self._write_json("config", self.config)

    def _write_json(self, name: str, value: Any) -> None:
        text = json.dumps({"schema": SCHEMA, name: value}, indent=1)
        write_atomically(self.path / f"{name}.json", text.encode())


def describe_environment() -> dict[str, Any]:
    """Versions and machine of this process, and the time (UTC)."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file, or leave the one that was there as it was.

    Raises:
        RunError: the disk is full, or refuses for another reason.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        reason = f"{error.strerror} ({len(data)} bytes to write); what was there is intact"
        raise RunError(f"cannot write {path}: {reason}") from error


def pack(state: Mapping[str, Any]) -> bytes:
    """A nested state as a safetensors file: tensors by their path in it, everything else as JSON metadata.

    Raises:
        TypeError: a value that is not a tensor, number, string, None, list, tuple or dict of these.
    """
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_flatten(state, "", tensors))
    return save(tensors, {"schema": str(SCHEMA), "state": tree, "crc32": str(_checksum(tree, tensors))})


def unpack(data: bytes) -> dict[str, Any]:
    """The state that :func:`pack` packed; ValueError if it was not that, or is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])["__metadata__"]
        schema, tree, crc = int(header["schema"]), header["state"], int(header["crc32"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"not a packed state ({error})") from error
    _check_schema(schema)
    if _checksum(tree, tensors) != crc:
        raise ValueError("its checksum does not match its contents")
    try:
        state = _unflatten(json.loads(tree), tensors)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a packed state ({error!r})") from error
    if not isinstance(state, dict):
        raise ValueError(f"not a packed state (of {type(state).__name__})")
    return state


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON; its tensors go into ``tensors`` and leave their path behind."""
    if isinstance(value, Tensor):
        while path in tensors:  # a key with a slash in it
            path += "'"
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[k, _flatten(v, f"{path}/{k}" if path else str(k), tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"state: {path} is a {type(value).__name__}; tensors and plain values can be saved")


def _unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_unflatten(item, tensors) for item in content)
    return {key: _unflatten(item, tensors) for key, item in content}


def _checksum(tree: str, tensors: Mapping[str, Tensor]) -> int:
    crc = zlib.crc32(tree.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _check_schema(schema: int) -> None:
    if schema != SCHEMA:
        raise ValueError(f"its schema version is {schema}, this grokcurv reads {SCHEMA}")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        return unpack(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is missing or damaged: {error}") from error


def _read_json(path: Path, name: str, kind: type) -> Any:
    """What the file says of ``name``; RunError unless it is whole, of this schema, and a ``kind``."""
    try:
        content = json.loads(path.read_bytes())
        _check_schema(content["schema"])
        value = content[name]
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could be neither printed nor written
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(value, kind):
        raise RunError(f"{path} is damaged: {name} must be a {kind.__name__}; got {value!r:.100}")
    return value


def _read_table(path: Path) -> pd.DataFrame:
    """A table; an empty one where none has been written yet."""
    import pandas as pd
    import pyarrow as pa

    table = read_parquet(path)
    try:
        frame: pd.DataFrame = pd.DataFrame() if table is None else table.to_pandas(ignore_metadata=True)
    except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
        raise RunError(f"{path} has a column that pandas cannot hold: {error}") from error
    return frame


def read_parquet(path: Path) -> pa.Table | None:
    """A table of a run folder as Arrow has it, in one thread; None where none has been written yet.

    Raises:
        RunError: it is damaged, of another schema version, or its ``step`` is not a whole number in every row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as file:
            table = pq.ParquetFile(file, page_checksum_verification=True).read(use_threads=False)
        table.validate(full=True)
        _check_schema(int((table.schema.metadata or {})[b"grokcurv_schema"]))
        names = table.column_names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have one name, of {', '.join(names)}")
        if table.num_rows and ("step" not in names or not pa.types.is_integer(table["step"].type)):
            raise ValueError("it has no column step of whole numbers")
        if table.num_rows and table["step"].null_count:
            raise ValueError("step is missing in some rows")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    return table


def _snapshot_path(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"{step:09}.safetensors"


def _holder(path: Path) -> int | None:
    """The process that is writing into the folder, or None; 0 where it cannot be told which."""
    try:
        with (path / ".lock").open(encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                try:
                    return int(lock.read())
                except ValueError:
                    return 0
    except OSError:
        pass
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
