"""What a sweep's report says in words and numbers, worked out from the tables of its runs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from grokcurv.analysis import Predictors, predictors, sweep_results, sweep_settings
from grokcurv.analysis.sweeps import UNFINISHED
from grokcurv.report.beside import Beside
from grokcurv.report.format import count, number, plain
from grokcurv.report.summary import check_table
from grokcurv.report.sweep_figures import arrange
from grokcurv.sweep import Sweep
from grokcurv.training.run import GROKKED

MANY = 24
"""More values of a number than this are put into classes."""

CLASSES = 8

Row = tuple[str, str, list[str]]  # a run's id, the address of its report or "", its cells

FEWEST = 3
"""Runs that grok, and runs that never do, from which on columns are judged as signals."""

SIGNALS: dict[str, float | None] = {"signals": None, "signals-without-decay": 0.0}
"""By figure, the weight decay of the runs that it is of; None: any above 0."""

Table = tuple[list[str], list[tuple[str, list[str]]]]  # names of the columns after the first; rows


class SweepSummary:
    """The words and numbers of a sweep's report; runs need not have started.

    Args:
        sweep: what is reported.
        folder: where its page will be; with the sweep if None.

    Attributes:
        path: the sweep's folder.
        varied: the settings in which runs differ.
        fields: those but the seed, with their values in the order of the figures.
        classed: those of the fields, drawn at random as a rule, whose many values were put into classes.
        metrics, curvature: the rows of all runs.
        results: one row a run, from ``analysis.sweep_results``; grouped: the same with classes for values.
        lines: what tells the lines of the runs apart, as fields do.
        settings: one row a setting, from ``analysis.sweep_settings``, over all seeds; total: the same over all runs.
        signals: by figure, what ``analysis.predictors`` found, where some runs grok and others never do.
    """

    def __init__(self, sweep: Sweep | Beside, folder: Path | None = None) -> None:
        self.path, self.folder, self.varied = sweep.path, folder or sweep.path, list(sweep.varied)
        self._folder_of = sweep.folder
        runs = sweep.runs  # before the tables: a run that has finished by now has written all its rows
        if "basis_from" in self.varied:
            runs = runs.assign(basis_from=_sources(runs))
            if runs["basis_from"].nunique() == 1:
                self.varied.remove("basis_from")
        tables = {"metrics": ("test_acc",), "curvature": ("defect_median", "reliable")}
        self.metrics, self.curvature = (
            check_table(sweep.table(name, needed), name, sweep.path, needed) for name, needed in tables.items()
        )
        self.results = sweep_results(runs, self.metrics, self.curvature, GROKKED)
        fields = arrange(runs, [name for name in self.varied if name != "seed"])
        self.classed = [
            name for name, values in fields.items() if len(values) > MANY and not isinstance(values[0], str)
        ]
        self.grouped = self.results.assign(**{name: _classes(runs[name]) for name in self.classed})
        self.fields = self.lines = arrange(self.grouped, list(fields))
        self.settings = sweep_settings(self.grouped, list(self.fields))
        self.total: dict[Any, Any] = sweep_settings(self.results, []).to_dict("records")[0]
        self.signals = self._signals(sweep)

    def _signals(self, sweep: Sweep | Beside) -> dict[str, Predictors]:
        """Columns are read for this alone: only where runs have both outcomes."""
        if isinstance(sweep, Beside):
            return {}
        done = self.results[(self.results["status"] == "finished") & self.results["test_acc"].notna()]
        decays = done["weight_decay"] > 0 if "weight_decay" in done else pd.Series(True, index=done.index)
        signals = {}
        for name, decay in SIGNALS.items():
            grokked = done.loc[decays == (decay is None), "grok_step"].notna()
            if min(grokked.sum(), (~grokked).sum()) >= FEWEST:
                found = predictors(sweep, weight_decay=decay, threshold=GROKKED)
                if found.table.loc[~found.table["reference"].astype(bool), "auroc"].notna().any():
                    signals[name] = found
        return signals

    def signal_tables(self, name: str) -> list[tuple[str, Table]]:
        """Of one figure: each column's numbers, and those of pairs of the best, with their headings."""
        found = self.signals[name]
        columns = ["moves", "AUROC", "95% interval", "behind the best", "alarms", "lead", "from", "to", "false alarms"]
        columns += ["95% interval", "gain", "Spearman"]
        rows = []
        for row in found.table.to_dict("records"):
            cells = [
                {"up": "rises", "down": "falls"}.get(row["direction"], row["direction"]),
                _fraction(row["auroc"]),
                _range(row["auroc_low"], row["auroc_high"]),
                _range(row["behind_low"], row["behind_high"]),
                *_outcome(row),
                _fraction(row["spearman"]),
            ]
            rows.append((row["column"] + " (reference)" * row["reference"], cells))
        tables = [("column", (columns, rows))]
        if len(found.pairs):
            pairs = [
                (f"{row['first']} {'and' if row['rule'] == 'both' else 'or'} {row['second']}", _outcome(row))
                for row in found.pairs.to_dict("records")
            ]
            tables.append(("pair", (columns[4:-1], pairs)))
        return tables

    @property
    def title(self) -> str:
        return self.path.resolve().name

    @property
    def subtitle(self) -> list[str]:
        """How many values of which settings, and how many runs in all."""
        values = [f"{name} ({self.results[name].nunique(dropna=False):,})" for name in self.varied]
        return [", ".join(values) or "one setting", count(self.total["runs"], "run")]

    @property
    def missing(self) -> list[str]:
        """What keeps these numbers from being the whole sweep's, a sentence each."""
        said, total = [], self.total
        if unfinished := total["unfinished"]:
            are, counts = ("is", "counts") if unfinished == 1 else ("are", "count")
            said.append(
                f"{count(unfinished, 'run')} of {total['runs']:,} {are} not finished ({self._statuses(*UNFINISHED)}) "
                f"and {counts} neither for grokking nor against it. Until then the fractions may be too high, as runs "
                "that grok end sooner."
            )
        if total["failed"]:
            said.append(f"{count(total['failed'], 'run')} failed and count{'s' * (total['failed'] == 1)} neither way.")
        if self.classed:
            said.append(
                f"The many values of {' and '.join(self.classed)} are in {CLASSES} classes of about as many runs, each "
                "named after its median."
            )
        if self.metrics.empty:
            said.append("No evaluation was recorded: there are no accuracies.")
        if self.curvature.empty:
            said.append("No curvature was measured: there is no defect, no onset and no lead.")
        return said

    @property
    def key_numbers(self) -> list[tuple[str, str, str]]:
        """(name, value, remark) of what a reader wants first."""
        total, results = self.total, self.results
        numbers = [("Runs", f"{total['runs']:,}", self._statuses("finished", "failed", *UNFINISHED))]
        if total["finished"]:
            reached = f"finished runs; test accuracy of {GROKKED:.0%} or more"
            numbers.append(("Grokked", f"{total['grokked']:,} of {total['finished']:,}", reached))
        finished = results[results["status"] == "finished"]
        if total["grokked"]:
            lowest, highest = total["grok_step_min"], total["grok_step_max"]
            settled = _steps(total["settled_step"]) or "none"
            remark = f"median of those that did; {lowest:,.0f} to {highest:,.0f}; of settled steps {settled}"
            numbers.append(("Grok step", f"{total['grok_step']:,.0f}", remark))
        leads = finished["lead_time"].dropna()
        if len(leads):
            remark = f"median; the defect rose first in {(leads > 0).sum():,} of {len(leads):,}"
            numbers.append(("Lead", f"{total['lead_time']:,.0f} steps", remark))
        if finished["max_defect"].notna().any():
            top = finished.sort_values("max_defect", na_position="first").iloc[-1]
            remark = f"reliable; {top.name} at step {top['max_defect_step']:,.0f}"
            numbers.append(("Highest defect", number(top["max_defect"]), remark))
        return numbers

    @property
    def settings_table(self) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
        """Names of the columns after those of the fields; then each setting's values and its cells."""
        told = [name for name in ("failed", "unfinished") if self.total[name]]
        columns = ["grokked", "95% interval", "grok step", "over seeds", "settled", "highest defect", "lead", *told]
        table = []
        for row in self.settings.to_dict("records"):
            spread = f"{_steps(row['grok_step_min'])} to {_steps(row['grok_step_max'])}" if row["grokked"] > 1 else ""
            step = f"not by {row['censored_step']:,.0f}" if row["censored_step"] > 0 else "never"
            cells = [
                f"{row['grokked']:,} of {row['finished']:,}" if row["finished"] else "",
                f"{100 * row['grok_low']:.0f} to {row['grok_high']:.0%}" if row["finished"] else "",
                _steps(row["grok_step"]) if row["grokked"] else step if row["finished"] else "",
                spread,
                _steps(row["settled_step"]),
                _defect(row["max_defect"]),
                _steps(row["lead_time"]),
                *(f"{row[name]:,}" if row[name] else "" for name in told),
            ]
            table.append(([plain(row[name]) for name in self.fields], cells))
        return columns, table

    @property
    def runs_table(self) -> tuple[list[str], list[Row]]:
        """Names of the columns after the run's; then a row a run."""
        columns = [*self.varied, "status", "grok step", "settled", "onset", "lead", "highest defect"]
        columns += ["last step", "test accuracy"]
        rows: list[Row] = []
        for name, row in zip(self.results.index, self.results.to_dict("records"), strict=True):
            never = "never" if row["status"] == "finished" else ""
            cells = [
                *(plain(row[field]) for field in self.varied),
                row["status"],
                _steps(row["grok_step"]) or never,
                _steps(row["settled_step"]) or never,
                _steps(row["onset_step"]) or (never if math.isfinite(row["max_defect"]) else ""),
                _steps(row["lead_time"]),
                _defect(row["max_defect"]),
                _steps(row["last_step"]),
                f"{row['test_acc']:.1%}" if math.isfinite(row["test_acc"]) else "",
            ]
            report = self._folder_of(str(name)) / "report.html"
            link = quote(os.path.relpath(report, self.folder)) if report.is_file() else ""
            rows.append((str(name), link, cells))
        return columns, rows

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Why runs failed, and the settings that all runs share."""
        runs = self.results.iloc[:, : self.results.columns.get_loc("grok_step")]
        settings = runs.drop(columns=[*self.varied, "status", "reason"])
        shared = settings.loc[:, settings.nunique(dropna=False) == 1]
        failed = self.results[self.results["reason"] != ""]
        return [
            ("Failed runs", dict(zip(map(str, failed.index), failed["reason"], strict=True))),
            ("Settings of every run", {str(name): plain(column.iloc[0]) for name, column in shared.items()}),
        ]

    def _statuses(self, *statuses: str) -> str:
        """Runs by status, those that occur: 51 finished, 1 failed, 2 pending."""
        counts: pd.Series = self.results["status"].value_counts()
        return ", ".join(f"{counts[status]:,} {status}" for status in statuses if status in counts)


class BesideSummary(SweepSummary):
    """The words and numbers of runs beside each other: a line a run, and no settings with several."""

    def __init__(self, runs: Beside) -> None:
        super().__init__(runs, runs.path)
        self.fields, self.lines = {}, {"run": list(self.results.index)}

    @property
    def title(self) -> str:
        return " beside ".join(self.results.index)

    @property
    def subtitle(self) -> list[str]:
        return [f"they differ in {', '.join(self.varied)}" if self.varied else "all of one setting"]


def _sources(runs: pd.DataFrame) -> list[str]:
    """Whose basis each run has: that run's id without its number, and without its seed where both have the same.

    So runs that differ in their seed alone are of one setting, each with the basis of its own.
    """
    said = []
    for path, seed in zip(runs["basis_from"], runs["seed"], strict=True):
        name = re.sub(r"^\d{4,}-", "", Path(path).name)
        said.append("-".join(word for word in name.split("-") if word != f"seed{seed}") or name)
    return said


def _classes(values: pd.Series) -> pd.Series:
    """For every value the median of its class, to two digits; the classes hold about equally many values."""
    rank = values.rank(method="min") - 1  # ties stay together
    medians = values.groupby((rank * CLASSES / len(values)).astype(int)).transform("median")
    return medians.map(lambda median: float(f"{median:.2g}"))


def _outcome(row: Mapping[Any, Any]) -> list[str]:
    """What the alarms of a column or a pair came to."""
    return [
        f"{row['hits']} of {row['grokked']}",
        *(_steps(row[name]) for name in ("lead", "lead_min", "lead_max")),
        f"{row['false_alarms']} of {row['never']}",
        f"{100 * row['false_low']:.0f} to {row['false_high']:.0%}" if math.isfinite(row["false_low"]) else "",
        _fraction(row["gain"]),
    ]


def _fraction(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else ""


def _range(low: float, high: float) -> str:
    return f"{low:.2f} to {high:.2f}" if math.isfinite(low) else ""


def _steps(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else ""


def _defect(value: float) -> str:
    return number(value) if math.isfinite(value) else ""
