"""The folder of a sweep: its plan, what failed for good, and an ordinary run folder for each of its runs.

=================  ====================================================================================
``sweep.json``     what the sweep file said, and the plan: settings by run
``progress.json``  how far it is, for ``grokcurv watch``
``failures.json``  why runs failed, by run, as far as their own folders cannot tell
``runs/ID/``       a run, see :mod:`grokcurv.runs`
``workers.log``    what the worker processes of the local engine printed
=================  ====================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import asdict
from os.path import lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grokcurv.runs import TABLES, Run, current_settings, differences, open_run
from grokcurv.storage import RunError, check_folder, read_json, read_parquet, write_json
from grokcurv.sweep.config import LONGEST_ID, SweepConfig, checked, varied_fields
from grokcurv.training.config import CHANGEABLE, TrainConfig

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

TOGETHER = 64
"""Runs whose tables are joined at a time."""


class Sweep:
    """A sweep, finished or not; its runs are read from their folders at every use.

    >>> from grokcurv.sweep import SweepConfig, run_sweep
    >>> sweep = run_sweep(SweepConfig(run={"steps": 10}, grid={"seed": [0, 1]}), "runs/seeds", only=[])
    >>> sweep.varied, sweep.runs["status"].tolist()
    (('seed',), ['pending', 'pending'])

    Attributes:
        path: the folder.
        config: what the sweep file said.
        plan: the settings of the runs by id, in order.
        varied: the fields the sweep sets in which the runs differ, in the file's order.
        failures: why runs failed, by id, where the driver knows: ``reason``, and whether it is ``final``: the same
            command does not try those again unless asked.
    """

    def __init__(
        self,
        path: Path,
        config: SweepConfig,
        plan: dict[str, TrainConfig],
        failures: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        self.path, self.config, self.plan, self.failures = path, config, plan, failures or {}
        self.varied = varied_fields(config.named, list(plan.values()))

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run, indexed by its id: every setting, ``status`` and ``reason``.

        ``status`` is one of pending, running, interrupted, finished and failed; ``reason`` is '' unless failed.
        """
        import pandas as pd

        states = [self._state(run) for run in self.plan]
        frame = pd.DataFrame(map(vars, self.plan.values()), index=pd.Index(self.plan, name="run"))
        return frame.assign(status=[status for status, _ in states], reason=[reason for _, reason in states])

    def run(self, run: str) -> Run:
        """One run by its id; RunError if the sweep has no such run, or it has not begun."""
        if run not in self.plan:
            raise RunError(f"{self.path} has no run {run!r}")
        return open_run(self.folder(run))

    def folder(self, run: str) -> Path:
        """That of one run; RunError where a link would lead elsewhere."""
        return check_folder(check_folder(self.path / "runs") / run)

    def table(self, name: str, columns: Collection[str] | None = None) -> pd.DataFrame:
        """The rows of all runs, in the order of the plan: the column ``run``, then those of ``<name>.parquet``.

        Runs that have no such table yet have no rows. With ``columns`` there are ``step`` and these alone.

        Raises:
            ValueError: ``name`` is not one of :data:`grokcurv.runs.TABLES`.
            RunError: a table that is damaged.
        """
        import pandas as pd
        import pyarrow as pa

        if name not in TABLES:
            raise ValueError(f"name must be one of {', '.join(map(repr, TABLES))}; got {name!r}")
        runs = list(self.plan)
        try:
            # In parts, for thousands of small tables take more room than what is in them.
            read = (
                self._read(runs[at : at + TOGETHER], f"{name}.parquet", columns) for at in range(0, len(runs), TOGETHER)
            )
            tables = [table for table in read if table.num_columns > 1]
            if not tables:
                return pd.DataFrame({"run": pd.Series(dtype=object)})
            frame: pd.DataFrame = pa.concat_tables(tables, promote_options="permissive").to_pandas()
        except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
            raise RunError(f"{self.path}: the {name} of its runs are no one table: {error}") from error
        return frame

    def _read(self, runs: list[str], file: str, columns: Collection[str] | None) -> pa.Table:
        """The rows of some of the runs, each with its run; of none, that column alone."""
        import pyarrow as pa

        folder = check_folder(self.path / "runs")
        tables = {run: read_parquet(check_folder(folder / run) / file, columns) for run in runs}
        there = {run: table for run, table in tables.items() if table}  # has rows
        owners = pa.array(
            np.repeat(np.array(list(there), dtype=object), [len(table) for table in there.values()]), pa.string()
        )
        rows = pa.concat_tables(there.values(), promote_options="permissive") if there else pa.table({})
        if "run" in rows.column_names:
            raise ValueError("one has a column run of its own")
        return rows.replace_schema_metadata(None).add_column(0, "run", owners).combine_chunks()

    def is_short(self, run: str) -> bool:
        """Whether a run that has finished was to end sooner than the plan says now."""
        there = self.run(run).config
        return any(there[name] < getattr(self.plan[run], name) for name in ("steps", "steps_after_grok"))

    def _state(self, run: str) -> tuple[str, str]:
        """Status of a run and the reason for it, from its folder and the sweep's failures."""
        failure = self.failures.get(run)
        try:
            status = Run(self.folder(run), {}, {}).status if lexists(self.folder(run) / "status.json") else "pending"
        except RunError as error:
            status = f"failed: {error}"
        state, _, reason = status.partition(": ")
        if failure and state not in ("finished", "running"):
            return "failed", failure["reason"]
        return state, reason


def open_sweep(path: str | os.PathLike[str]) -> Sweep:
    """Open the folder of a sweep for reading.

    Raises:
        RunError: no sweep there, or one whose files are damaged or of another schema version.
    """
    folder = Path(path)
    file = folder / "sweep.json"
    if not lexists(file):
        raise RunError(f"{folder} holds no sweep: there is no sweep.json in it")
    content = read_json(file, "sweep", dict)
    try:
        config = SweepConfig.from_dict(content["config"])
        plan = {_run_id(run): _settings({**content["common"], **own}) for run, own in content["plan"].items()}
        if not plan:
            raise ValueError("there is no run in its plan")
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise RunError(f"{file} is damaged: {error!r}") from error
    file = folder / "failures.json"
    failures = read_json(file, "failures", dict) if lexists(file) else {}
    for run, failure in failures.items():
        kinds = {name: type(value) for name, value in failure.items()} if isinstance(failure, dict) else None
        if kinds != {"reason": str, "final": bool}:
            raise RunError(f"{file} is damaged: of {run} it says {failure!r:.100}")
    return Sweep(folder, config, plan, failures)


def _run_id(run: str) -> str:
    """The id, which is the name of a folder; ValueError if it cannot be one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", run) or len(run) > LONGEST_ID:
        raise ValueError(f"{run!r:.200} is no id of a run")
    return run


def _settings(settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig(**{name: checked("plan:", name, value) for name, value in current_settings(settings).items()})


def find(path: Path, config: SweepConfig, *, grow: bool = False) -> tuple[Sweep, bool]:
    """The sweep that is to be in ``path``, and whether it is there; nothing is written.

    Args:
        path: its folder.
        config: what the sweep file says.
        grow: it may have more runs than the one that is there, and other :data:`CHANGEABLE` settings. Runs that are
            there keep their ids.

    Raises:
        RunError: the folder holds another sweep (what differs is named) or a run.
    """
    plan = config.plan
    if not lexists(path / "sweep.json"):
        if lexists(path / "config.json"):
            raise RunError(f"{path} holds a run; a sweep needs a folder of its own")
        return Sweep(path, config, plan), False
    sweep = open_sweep(path)
    if grow:
        plan = _grown(sweep.plan, plan)
    if differing := _differences(sweep.plan, plan, CHANGEABLE if grow else ()):
        if {"torch"} == {run.rng for run in sweep.plan.values()} - {run.rng for run in plan.values()}:
            differing = "one of an older version (rng 'torch'), which is read and reported, but not gone on with"
        raise RunError(f"{path} holds another sweep: {differing}; choose another folder")
    return (sweep, True) if plan == sweep.plan else (Sweep(path, config, plan, sweep.failures), False)


def claim(path: Path, config: SweepConfig, *, grow: bool = False) -> Sweep:
    """The sweep in ``path`` as :func:`find` has it, written there where it is not what is there.

    Raises:
        RunError: as there; or the folder cannot be written.
    """
    sweep, there = find(path, config, grow=grow)
    if there:
        return sweep
    plan = sweep.plan
    configs = [asdict(settings) for settings in plan.values()]
    common = {name: value for name, value in configs[0].items() if all(other[name] == value for other in configs)}
    own = {
        run: {name: value for name, value in settings.items() if name not in common}
        for run, settings in zip(plan, configs, strict=True)
    }
    write_json(path / "sweep.json", "sweep", {"config": config.to_dict(), "common": common, "plan": own})
    return sweep


def _grown(there: dict[str, TrainConfig], here: dict[str, TrainConfig]) -> dict[str, TrainConfig]:
    """The runs from here, those that are there by their ids there, others with numbers after theirs."""

    def lasting(config: TrainConfig) -> str:
        return json.dumps({name: value for name, value in asdict(config).items() if name not in CHANGEABLE})

    known: dict[str, list[str]] = {}
    for run, config in there.items():
        known.setdefault(lasting(config), []).append(run)
    plan, number = {}, len(there)
    for run, config in here.items():
        if ids := known.get(lasting(config)):
            plan[ids.pop(0)] = config
        else:
            _, dash, words = run.partition("-")
            plan[f"{number:04}{dash}{words}"] = config
            number += 1
    return plan


def write_failures(sweep: Sweep) -> None:
    """Keep ``sweep.failures``, if the disk lets it."""
    with contextlib.suppress(RunError):  # the disk may be full, and that be the reason: it is known until the end
        write_json(sweep.path / "failures.json", "failures", sweep.failures)


def _differences(there: dict[str, TrainConfig], here: dict[str, TrainConfig], changeable: Collection[str]) -> str:
    """What differs between two plans and may not, in words; '' if nothing does."""
    said = []
    new = set() if changeable else here.keys() - there.keys()
    for runs, where in ((there.keys() - here.keys(), "there"), (new, "here")):
        if runs:
            said.append(f"{len(runs)} runs are only {where} ({min(runs)}{', ...' if len(runs) > 1 else ''})")
    changed: dict[str, str] = {}
    for run in (run for run in there if run in here):
        for name, values in differences(asdict(there[run]), asdict(here[run])).items():
            if name not in changeable:
                changed.setdefault(name, f"{name} ({values}, in run {run})")
    return ", ".join([*said, *changed.values()])
