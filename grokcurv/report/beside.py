"""Runs from folders of their own, beside each other on one page."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from grokcurv.runs import open_run


class Beside:
    """Several runs, with what a report asks of a sweep.

    Attributes:
        path: where their page will be.
        varied: the settings in which they differ.

    Raises:
        RunError: a folder that holds no run, or a damaged one.
        ValueError: fewer than two folders, or one twice.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]], path: Path) -> None:
        places = [Path(folder).resolve() for folder in folders]
        if len(set(places)) < max(len(places), 2):
            raise ValueError(
                f"runs beside each other must be at least two, each once; got {', '.join(map(str, folders))}"
            )
        self.path, self._runs = path, dict(zip(_names(places), map(open_run, places), strict=True))
        configs = [run.config for run in self._runs.values()]
        names = dict.fromkeys(name for config in configs for name in config)
        self.varied = tuple(name for name in names if len({repr(config.get(name)) for config in configs}) > 1)

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run: every setting, ``status`` and ``reason``."""
        frame = pd.DataFrame([run.config for run in self._runs.values()], index=pd.Index(self._runs, name="run"))
        said = [run.status.partition(": ") for run in self._runs.values()]
        return frame.assign(status=[state for state, _, _ in said], reason=[reason for _, _, reason in said])

    def table(self, name: str, columns: Collection[str]) -> pd.DataFrame:
        """The rows of all runs: ``run``, ``step`` and these columns."""
        wanted = ["step", *columns]
        tables = {run: opened.table(name).reindex(columns=wanted) for run, opened in self._runs.items()}
        parts = [table.assign(run=run) for run, table in tables.items() if not table.empty]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"run": pd.Series(dtype=object)})

    def folder(self, run: str) -> Path:
        path = self._runs[run].path
        assert path is not None
        return path


def _names(places: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    for length in range(1, max(len(place.parts) for place in places)):
        names = ["/".join(place.parts[-length:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return list(map(str, places))
