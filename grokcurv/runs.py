"""The run folder: what a training run leaves on disk, written so that it survives being killed at any instant.

=========================  ===========================================================================
``config.json``            the settings of the run
``environment.json``       where it ran last: versions, machine, device, threads
``status.json``            ``running``, ``interrupted``, ``finished`` or ``failed: reason``
``progress.json``          how far it is, for ``grokcurv watch``
``metrics.parquet``        one row an evaluation
``curvature.parquet``      one row a measurement
``pca.parquet``            PC1 % by matrix and step
``checkpoint.safetensors`` everything needed to go on
``basis.safetensors``      the execution basis
``snapshots/``             the weights at chosen steps, a file each
=========================  ===========================================================================

Every file is as :mod:`grokcurv.storage` writes it. Tables go before the checkpoint, so after a crash they may be ahead
of it; resuming drops the rows that are. A checkpoint says of which settings it is and what the tables held: it is gone
on with beside no others. One writer at a time holds a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib import metadata
from os.path import lexists
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from grokcurv.commutator import RENAMED
from grokcurv.measures.commutator import CHECK_EVERY
from grokcurv.storage import (
    SCHEMA,
    News,
    RunError,
    check_folder,
    hold,
    holder,
    make_folder,
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

REMEDIES = {
    **dict.fromkeys(
        ("environment.json", "status.json", "curvature.parquet", "pca.parquet", "basis.safetensors"),
        "it can be deleted: it is written anew when the run goes on",
    ),
    "config.json": "if it is deleted, the run can go on with the same settings: its checkpoint knows them",
    "checkpoint.safetensors": "if it is deleted, the run begins anew",
    "metrics.parquet": "if it is deleted, and checkpoint.safetensors too, the run begins anew",
}
"""What helps where a file is damaged."""

PACKAGES = ("grokcurv", "torch", "numpy", "pandas", "pyarrow", "scipy", "safetensors")


class Run:
    """A run, finished or not: read from its folder when asked for, or held in memory when it never had one.

    >>> from grokcurv.training import TrainConfig, train
    >>> small = TrainConfig(p=7, d_model=8, d_ff=8, heads=2, batch_size=8, steps=2, measure_every=1)
    >>> run = train(small)
    >>> run.path, run.status, run.curvature["step"].tolist()
    (None, 'finished', [0, 1, 2])

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
        return self.table("metrics")

    @property
    def curvature(self) -> pd.DataFrame:
        """One row a measurement: the columns of :meth:`grokcurv.CurvatureMonitor.records`."""
        return self.table("curvature")

    @property
    def pca_history(self) -> pd.DataFrame:
        """PC1 % of the trajectory so far: step, matrix, pc1_percent; of more than 500 rows also pc1_error."""
        return self.table("pca")

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
        status: str = _read_or(self.path / "status.json", "status", "running")
        return "interrupted" if status == "running" and holder(self.path) is None else status

    def checkpoint(self) -> dict[str, Any]:
        """The latest checkpoint; RunError if there is none or it is damaged."""
        with _remedy(path := self._folder("checkpoint") / "checkpoint.safetensors"):
            return {name: value for name, value in read_state(path).items() if name != "belongs"}

    def basis(self) -> dict[str, Any]:
        """The execution basis at the last checkpoint: the arguments of :meth:`grokcurv.Subspace.from_table`.

        Raises:
            RunError: there is none, or it is damaged.
        """
        path = self._folder("execution basis") / "basis.safetensors"
        if not lexists(path):
            raise RunError(f"{self.path} holds no execution basis (basis.safetensors)")
        with _remedy(path):
            return read_state(path)

    @property
    def snapshots(self) -> list[int]:
        """The steps whose weights were kept, in order (setting ``snapshot_every``)."""
        files = check_folder(self.path / "snapshots").glob("*.safetensors") if self.path else ()
        return sorted(int(file.stem) for file in files if re.fullmatch("[0-9]{9,}", file.stem))

    def snapshot(self, step: int) -> dict[str, Any]:
        """The network's ``state_dict`` at ``step``, one of :attr:`snapshots`; RunError if it is none or damaged."""
        return read_state(_snapshot_path(self._folder("snapshot"), step))

    def table(self, name: str) -> pd.DataFrame:
        """One of :data:`TABLES`, by its name; empty where none has been written yet."""
        if name not in self._tables:
            self._tables[name] = _read_table(self._folder(name), name)
        return self._tables[name]

    def _folder(self, wanted: str) -> Path:
        """The run's folder; a RunError if it has none, and so not what is wanted."""
        if self.path is None:
            raise RunError(f"this run was kept in memory alone: it has no {wanted}")
        return self.path


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder for reading; tables are loaded when first used.

    Raises:
        RunError: no run there, or one whose files are damaged or of a later schema version.
    """
    folder = Path(path)
    if not lexists(folder / "config.json"):
        raise RunError(f"{folder} holds no run: there is no config.json in it")
    return Run(folder, _read_settings(folder), _read_or(folder / "environment.json", "environment", {}))


class RunWriter:
    """The one writer of a run folder, as a context manager.

    On entering it looks at what is there, before anything is changed. Leaving it by an exception sets the status:
    ``interrupted`` for Ctrl-C, ``failed: ...`` otherwise.

    >>> import pandas as pd
    >>> with RunWriter("runs/first", {"lr": 1e-3}) as writer:
    ...     writer.write_table("metrics", pd.DataFrame({"step": [0, 100], "test_acc": [0.1, 0.9]}))
    ...     writer.set_status("finished")
    >>> run = open_run("runs/first")
    >>> run.status, run.config, float(run.metrics["test_acc"].max())
    ('finished', {'lr': 0.001}, 0.9)

    Args:
        path: the folder; made if missing.
        config: the settings, plain values that JSON can hold.
        resume: continue the run that is there, if any; without it a folder that holds a run is an error.
        environment: what to record beside :func:`describe_environment`.
        changeable: settings in which the run that is continued may have differed so far.
        accept: called on entering, with this, when it has found nothing amiss; what it raises is a refusal.

    Attributes:
        checkpoint: what to go on from; None where the run has to start from the beginning.

    Raises:
        RunError: on entering, for a folder held by another writer, one that holds a run of other settings (they are
            named), or a damaged one, or a checkpoint that belongs to other settings or tables; at any write, for a full
            disk or one that fails otherwise: the file that was there is then intact.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        resume: bool = False,
        environment: Mapping[str, Any] | None = None,
        changeable: Collection[str] = (),
        accept: Callable[[RunWriter], object] | None = None,
    ) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads(json.dumps(dict(config)))
        self.resume, self.changeable, self._accept = resume, changeable, accept
        self.environment = {**describe_environment(), **(environment or {})}
        self.checkpoint: dict[str, Any] | None = None
        self.news = News(self.path)
        self._held = contextlib.ExitStack()
        self._holds: dict[str, str] = {}  # by table, what the checkpoint that is written next says of it

    def __enter__(self) -> RunWriter:
        with contextlib.ExitStack() as held:
            held.enter_context(hold(self.path, "written"))
            self._look()
            if self._accept is not None:
                self._accept(self)
            self._begin()
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
        self._holds[name] = _digest(frame)

    def write_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint by a nested state of tensors, plain values, lists, tuples and dicts.

        It is one of the step that it says, of these settings, and of the tables as they were written last.
        """
        belongs = {"settings": self.config, "tables": self._holds}
        write_atomically(self.path / "checkpoint.safetensors", pack({**state, "belongs": belongs}))

    def write_basis(self, state: Mapping[str, Any]) -> None:
        write_atomically(self.path / "basis.safetensors", pack(state))

    def write_snapshot(self, step: int, state: Mapping[str, Any]) -> None:
        """Keep a network's ``state_dict``; one that is there from before a crash has the same bits."""
        make_folder(self.path / "snapshots")
        file = _snapshot_path(self.path, step)
        if not lexists(file):
            write_atomically(file, pack(state))

    def read_table(self, name: str) -> pd.DataFrame:
        return _read_table(self.path, name)

    @property
    def lacks_tables(self) -> bool:
        """Whether there are none, or not all of them."""
        return not all((self.path / f"{name}.parquet").exists() for name in TABLES)

    def _look(self) -> None:
        """Read what is there of the run; RunError if it is another, or cannot be continued."""
        check_folder(self.path / "snapshots")
        there = lexists(self.path / "config.json")
        if there:
            self._compare(_read_settings(self.path), "holds a run of another configuration")
            if not self.resume:
                raise RunError(f"{self.path} already holds this run: resume it, or choose another folder")
        others = [name for name in REMEDIES if name not in ("config.json", "environment.json", "status.json")]
        found = [name for name in others if lexists(self.path / name)]
        begun = "checkpoint.safetensors" in found
        if found and not there and not (begun and self.resume):
            raise RunError(
                f"{self.path} has no config.json, and yet {', '.join(found)} of a run: choose another folder"
            )
        if begun:
            self.checkpoint = self._read_checkpoint("" if there else "no config.json, and ")

    def _begin(self) -> None:
        """Make the folder this run's: rows past the checkpoint go, settings and status are written."""
        for leftover in (*self.path.glob(".*.tmp"), *self.path.glob("snapshots/.*.tmp")):
            leftover.unlink()
        if self.checkpoint is not None:
            for name in TABLES:
                frame = self.read_table(name)
                if not frame.empty and frame["step"].max() > self.checkpoint["step"]:
                    self.write_table(name, frame[frame["step"] <= self.checkpoint["step"]])
        write_json(self.path / "environment.json", "environment", self.environment)
        self.set_status("running")
        write_json(self.path / "config.json", "config", self.config)

    def _read_checkpoint(self, lacking: str) -> dict[str, Any]:
        """The checkpoint's state; a RunError if it is of another run, or its tables are not what they were."""
        with _remedy(path := self.path / "checkpoint.safetensors"):
            state = read_state(path)
            try:
                step, belongs = state["step"], state.pop("belongs")
                settings, tables = dict(belongs["settings"]), dict(belongs["tables"])
                if not isinstance(step, int):
                    raise ValueError(f"its step is {step!r}")
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(f"{path} does not say to which run it belongs ({error!r})") from error
            self._compare(current_settings(settings), f"has {lacking}a checkpoint.safetensors of another configuration")
        for name in TABLES:
            path = self.path / f"{name}.parquet"
            if not lexists(path):
                if name == "metrics" and name in tables:
                    raise RunError(f"{path} is missing; {REMEDIES['checkpoint.safetensors']} without it")
                continue  # the others can be made anew, of what the checkpoint holds
            frame = self.read_table(name)
            rows = frame if frame.empty else frame[frame["step"] <= step]
            if name in tables and _digest(rows) != tables[name]:
                with _remedy(path):
                    raise RunError(f"{path} is not what it was when checkpoint.safetensors was written, at step {step}")
        return state

    def _compare(self, there: Mapping[str, Any], said: str) -> None:
        """Raise a RunError if settings differ from this run's that may not change."""
        differing = differences(there, self.config)
        if wrong := [f"{name} ({values})" for name, values in differing.items() if name not in self.changeable]:
            lacking = [name for name in self.config if name not in there]
            if len(lacking) == len(wrong):
                raise RunError(
                    f"{self.path} was written by an older version, without {', '.join(lacking)}: it is read and "
                    "reported, but not gone on with; choose another folder"
                )
            may = f"; when it is resumed, {', '.join(self.changeable)} may change" if self.changeable else ""
            raise RunError(f"{self.path} {said}: {', '.join(wrong)}{may}")


def _digest(frame: pd.DataFrame) -> str:
    """Of the rows of a table, bit for bit, as it is read again: there, what is missing has one form."""
    import numpy as np
    import pyarrow as pa

    found = hashlib.sha256()
    for name, column in frame.items():
        values = (pa.array(column, from_pandas=True).to_pandas() if column.dtype == object else column).to_numpy()
        numbers = values.dtype.kind in "biuf"
        if values.dtype.kind == "f":
            values = np.where(np.isnan(values), np.nan, values)
        found.update(f"{name} {values.dtype if numbers else 'text'} {len(values)} ".encode())
        found.update(values.tobytes() if numbers else "\0".join(map(str, values)).encode())
    return found.hexdigest()


@contextlib.contextmanager
def _remedy(path: Path) -> Iterator[None]:
    """What is wrong with a file is said together with what helps."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{error}; {REMEDIES[path.name]}") from error


def _read_table(folder: Path, name: str) -> pd.DataFrame:
    with _remedy(path := folder / f"{name}.parquet"):
        return read_table(path)


def _read_settings(folder: Path) -> dict[str, Any]:
    with _remedy(path := folder / "config.json"):
        return current_settings(read_json(path, "config", dict))


def _read_or(path: Path, name: str, missing: Any) -> Any:
    """What a file says that can be done without."""
    with _remedy(path):
        return read_json(path, name, type(missing)) if lexists(path) else missing


def current_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are called now, and those there are now, of a folder that an older version may have written."""
    named = {name: RENAMED.get(value, value) if name == "method" else value for name, value in config.items()}
    return {**named, "check_every": CHECK_EVERY} if "method" in named and "check_every" not in named else named


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
