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

Every file is as :mod:`grokcurv.storage` writes it. Tables go before the checkpoint, so after a crash they may be ahead
of it; resuming drops the rows that are. One writer at a time holds a lock.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grokcurv.commutator import RENAMED
from grokcurv.storage import (
    SCHEMA,
    RunError,
    hold,
    holder,
    pack,
    read_json,
    read_parquet,
    read_state,
    read_table,
    unpack,
    write_atomically,
    write_json,
    write_table,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "SCHEMA",
    "TABLES",
    "Run",
    "RunError",
    "RunWriter",
    "describe_environment",
    "open_run",
    "pack",
    "processor",
    "read_parquet",
    "unpack",
    "write_atomically",
]

TABLES = ("metrics", "curvature", "pca")
"""Names of the Parquet files; each has a column ``step``."""

PACKAGES = ("grokcurv", "torch", "numpy", "pandas", "pyarrow", "scipy", "safetensors")


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
        status: str = read_json(self.path / "status.json", "status", str)
        return "interrupted" if status == "running" and holder(self.path) is None else status

    def checkpoint(self) -> dict[str, Any]:
        """The latest checkpoint; RunError if there is none or it is damaged."""
        return read_state(self._folder("checkpoint") / "checkpoint.safetensors")

    def basis(self) -> dict[str, Any]:
        """The execution basis at the last checkpoint: the arguments of :meth:`grokcurv.Subspace.from_table`.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = self._folder("execution basis") / "basis.safetensors"
        if not path.exists():
            raise RunError(f"{self.path} holds no execution basis (basis.safetensors)")
        return read_state(path)

    @property
    def snapshots(self) -> list[int]:
        """The steps whose weights were kept, in order (setting ``snapshot_every``)."""
        files = self.path.glob("snapshots/*.safetensors") if self.path else ()
        return sorted(int(file.stem) for file in files if re.fullmatch("[0-9]{9,}", file.stem))

    def snapshot(self, step: int) -> dict[str, Any]:
        """The network's ``state_dict`` at ``step``, one of :attr:`snapshots`; RunError if it is none or damaged."""
        return read_state(_snapshot_path(self._folder("snapshot"), step))

    def _table(self, name: str) -> pd.DataFrame:
        if name not in self._tables:
            self._tables[name] = read_table(self._folder(name) / f"{name}.parquet")
        return self._tables[name]

    def _folder(self, wanted: str) -> Path:
        if self.path is None:
            raise RunError(f"this run was kept in memory alone: it has no {wanted}")
        return self.path


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder for reading; tables are loaded when first used.

    Raises:
        RunError: no run there, or one whose files are damaged or of a later schema version.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder} holds no run: there is no config.json in it")
    config = current_settings(read_json(folder / "config.json", "config", dict))
    return Run(folder, config, read_json(folder / "environment.json", "environment", dict))


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
        self._held = contextlib.ExitStack()

    def __enter__(self) -> RunWriter:
        with contextlib.ExitStack() as held:
            held.enter_context(hold(self.path, "written"))
            self._claim()
            self._held = held.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._held:
            if kind is not None:
                with contextlib.suppress(RunError):  # the first error is the one to report
                    self.set_status("interrupted" if issubclass(kind, KeyboardInterrupt) else f"failed: {error}")

    def set_status(self, status: str) -> None:
        write_json(self.path / "status.json", "status", status)

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """Replace ``<name>.parquet``; ``name`` is one of :data:`TABLES`."""
        write_table(self.path / f"{name}.parquet", frame)

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
        return read_table(self.path / f"{name}.parquet")

    def read_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, or None where the run has to start from the beginning."""
        path = self.path / "checkpoint.safetensors"
        return read_state(path) if path.exists() else None

    def drop_after(self, step: int) -> None:
        """Drop every table's rows past ``step``: they were written after the checkpoint one goes on from."""
        for name in TABLES:
            frame = self.read_table(name)
            if not frame.empty and frame["step"].max() > step:
                self.write_table(name, frame[frame["step"] <= step])

    def _claim(self) -> None:
        if (self.path / "config.json").exists():
            there = current_settings(read_json(self.path / "config.json", "config", dict))
            if differing := differences(there, self.config):
                said = ", ".join(f"{name} ({values})" for name, values in differing.items())
                raise RunError(f"{self.path} holds a run of another configuration: {said}")
            if not self.resume:
                raise RunError(f"{self.path} already holds this run: resume it, or choose another folder")
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("snapshots/.*.tmp")):
            leftover.unlink()
        write_json(self.path / "environment.json", "environment", self.environment)
        self.set_status("running")
        write_json(self.path / "config.json", "config", self.config)


def current_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are called now, of a folder that an older version may have written."""
    return {name: RENAMED.get(value, value) if name == "method" else value for name, value in config.items()}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, str]:
    """By name, in words, the settings in which a run's configuration in a folder and one from here differ."""
    both = {name: (there.get(name, "missing"), here.get(name, "missing")) for name in sorted({*there, *here})}
    return {name: f"{one!r} there, {other!r} here" for name, (one, other) in both.items() if one != other}


def describe_environment() -> dict[str, Any]:
    """Versions and machine of this process, and the time (UTC)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "packages": versions(PACKAGES),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _snapshot_path(folder: Path, step: int) -> Path:
    return folder / "snapshots" / f"{step:09}.safetensors"


def processor() -> str:
    """Its name, as the system has it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
