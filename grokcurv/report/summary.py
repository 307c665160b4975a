"""What a report says in words and numbers, worked out from a run's tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from grokcurv.analysis import grok_step, onset_step, settled_step
from grokcurv.report.figures import matrix_label
from grokcurv.report.format import duration, number
from grokcurv.report.measures import COLUMNS, FIGURED
from grokcurv.runs import TABLES, Run
from grokcurv.storage import RunError
from grokcurv.training.run import GROKKED

NEEDED: dict[str, tuple[str, ...]] = {
    "metrics": ("train_loss", "train_acc", "test_loss", "test_acc", "seconds"),
    "curvature": (
        *("defect_median", "defect_p25", "defect_p75", "reliable", "method"),
        *("rho", "exec_random_ratio", "exec_matched_ratio", "measure_seconds"),
    ),
    "pca": ("matrix", "pc1_percent"),
}
"""Columns besides ``step`` without which a table that has rows cannot be reported."""

DRAWN: dict[str, tuple[str, ...]] = {
    "metrics": ("fourier_embedding", "fourier_logits"),
    "curvature": ("noise_floor", "reference_median", "grad_norm", "bracket_norm", *COLUMNS),
}
"""Columns that are drawn where they are."""

WORDS = ("method", "matrix")
"""Columns of text; all others named here hold numbers or truth values."""

LARGEST = 1e100
"""No axis is drawn for numbers beyond it, and no run in float32 records any but infinity."""


def check_table(table: pd.DataFrame, name: str, source: object, needed: tuple[str, ...] | None = None) -> pd.DataFrame:
    """The table, an empty one with the columns it would have.

    Raises:
        RunError: naming ``source``, if it lacks a column or holds something else in one.
    """
    needed = NEEDED[name] if needed is None else needed
    if table.empty:
        return pd.DataFrame(columns=["step", *needed], dtype=float)
    for column in (*needed, *DRAWN.get(name, ())):
        if column not in table:
            if column in needed:
                raise RunError(f"{source}: {name}.parquet has no column {column}; it has {', '.join(map(str, table))}")
        elif column in WORDS:
            if not all(isinstance(value, str) for value in table[column]):
                raise RunError(f"{source}: {column} in {name}.parquet must be text; got {table[column].dtype}")
        elif not pd.api.types.is_numeric_dtype(table[column]):
            raise RunError(f"{source}: {column} in {name}.parquet must be numbers; got {table[column].dtype}")
        elif (extreme := table[column].abs().between(LARGEST, math.inf, inclusive="neither")).any():
            worst = table[column][extreme].iloc[0]
            raise RunError(f"{source}: {column} in {name}.parquet must lie within {LARGEST:g}; got {worst:g}")
    return table


class Summary:
    """The words and numbers of one run's report; every table of the run may be empty.

    Attributes:
        name: of the run's folder.
        config, status: the run's.
        environment: the run's, nested names joined by dots.
        metrics, curvature, pca: the run's tables.
        grok, onset: steps, or None.
        settled: the step at which the test accuracy was ``threshold`` for ``patience`` evaluations, or None.

    Raises:
        RunError: files that are damaged, or tables of something else than a run's evaluations and measurements.
    """

    def __init__(self, run: Run) -> None:
        self.name = run.path.resolve().name if run.path else "run"
        self.config = run.config
        self.environment = dict(flat(run.environment))
        self.status = run.status
        tables = (check_table(run.table(name), name, run.path or "run") for name in TABLES)
        self.metrics, self.curvature, self.pca = tables
        self.grok, self.onset = grok_step(self.metrics, GROKKED), onset_step(self.curvature)
        self.threshold, self.patience = criterion(run.config)
        self.settled = settled_step(self.metrics, self.threshold, self.patience)

    @property
    def title(self) -> str:
        """The task and the seed, or the folder's name where the settings do not name them."""
        config = self.config
        return "{op} mod {p}, seed {seed}".format_map(config) if {"op", "p", "seed"} <= config.keys() else self.name

    @property
    def subtitle(self) -> list[str]:
        """The settings that tell one run from another, and how far it got."""
        labels = {"preset": "preset {}", "lr": "learning rate {}", "weight_decay": "weight decay {}"}
        said = [label.format(self.config[name]) for name, label in labels.items() if name in self.config]
        if self.config.get("intervention", "none") != "none":
            strength = self.config.get("strength")
            strength = f"{strength:g}" if isinstance(strength, float) else strength
            said.append(f"{self.config['intervention']} at strength {strength}, {self.config.get('basis')} basis")
        return [*said, f"{self.last_step:,} steps", str(self.status)]

    @property
    def last_step(self) -> int:
        tables = (self.metrics, self.curvature, self.pca)
        return max((int(table["step"].max()) for table in tables if len(table)), default=0)

    @property
    def missing(self) -> list[str]:
        """What a reader might look for and not find, a sentence each."""
        said = []
        if self.status != "finished":
            said.append(f"The run is not finished (status: {self.status}). This page shows what it has recorded.")
        if self.metrics.empty:
            said.append("No evaluation was recorded: there are no accuracies and no losses.")
        if self.curvature.empty:
            said.append("No curvature was measured: there is no defect, no onset and no lead.")
        elif not self.defects.size:
            said.append("No measurement of the defect was reliable.")
        elif not self.has_geometry:
            said.append("No commutator was split along the execution basis, which takes three kept weight vectors.")
        if not self.has_pca:
            said.append("No principal components: fewer than two weight vectors of the trajectory were kept.")
        return said

    @property
    def has_pca(self) -> bool:
        return bool(self.pca["pc1_percent"].notna().any())

    @property
    def has_geometry(self) -> bool:
        names = ["rho", "exec_random_ratio", "exec_matched_ratio"]
        return bool(self.curvature[names].notna().all(axis=1).any())

    @property
    def has_fourier(self) -> bool:
        return bool(self.metrics.reindex(columns=["fourier_embedding", "fourier_logits"]).notna().any(axis=None))

    @property
    def measured_titles(self) -> dict[str, str]:
        """Titles of the figures of measures, by their names."""
        return {name: figure.title for name, figure in FIGURED.items()}

    @property
    def measured_captions(self) -> dict[str, str]:
        """What stands beneath them."""
        return {name: figure.caption for name, figure in FIGURED.items()}

    @property
    def defects(self) -> pd.DataFrame:
        """The measurements whose defect can be trusted."""
        trusted = self.curvature["reliable"].astype(bool) & self.curvature["defect_median"].notna()
        return self.curvature[trusted]

    @property
    def key_numbers(self) -> list[tuple[str, str, str]]:
        """(name, value, remark) of what a reader wants first."""
        numbers = []
        if not self.metrics.empty:
            when = "not settled" if self.settled is None else f"settled at step {self.settled:,}"
            remark = (
                f"first test accuracy of {GROKKED:.0%} or more; {when} ({self.threshold:.0%}, {self.patience} in a row)"
            )
            numbers.append(("Grok step", _step(self.grok), remark))
        if not self.curvature.empty:
            numbers.append(("Defect onset", _step(self.onset), "first D above 20 and ten times its early level"))
        if self.grok is not None and self.onset is not None:
            order = "before" if self.onset < self.grok else "after"
            numbers.append(("Lead", f"{self.grok - self.onset:,} steps", f"the defect rose {order} the test accuracy"))
        if not self.metrics.empty:
            last = self.metrics.iloc[-1]
            numbers.append(("Test accuracy", f"{last['test_acc']:.1%}", f"at the end; train {last['train_acc']:.1%}"))
        if not self.curvature.empty:
            count, total = len(self.defects), len(self.curvature)
            if count:
                top = self.defects.sort_values("defect_median").iloc[-1]
                numbers.append(("Highest defect", number(top["defect_median"]), f"reliable, at step {top['step']:,}"))
            brackets = int((self.defects["method"] == "bracket").sum())
            remark = f"{count:,} of {total:,} measurements; {brackets:,} by the bracket"
            numbers.append(("Reliable", f"{math.floor(100 * count / total)}%", remark))
        return numbers

    @property
    def pc1_table(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Names of the columns; then (layer, cells): each matrix's last PC1 % and the layer's mean."""
        layers: dict[str, dict[str, float]] = {}
        for name, rows in self.pca.dropna(subset="pc1_percent").groupby("matrix", sort=False):
            layer, matrix = matrix_label(str(name))
            layers.setdefault(layer, {})[matrix] = float(rows["pc1_percent"].iloc[-1])
        matrices = list(dict.fromkeys(matrix for row in layers.values() for matrix in row))
        table = []
        for layer, row in layers.items():
            cells = [f"{row[matrix]:.1f}" if matrix in row else "" for matrix in matrices]
            table.append((layer, [*cells, f"{sum(row.values()) / len(row):.1f}"]))
        return [*matrices, "mean"], table

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Lists of names and values, each under its heading."""
        return [("Settings", self.config), ("Environment", self.environment), ("Timings", self.timings)]

    @property
    def timings(self) -> dict[str, str]:
        """How long the run and its measurements took, in words."""
        said = {}
        seconds = float(self.metrics["seconds"].max())
        if 0 < seconds < math.inf:
            said["whole run"] = duration(seconds)
            said["steps a second"] = number(float(self.metrics["step"].max()) / seconds)
        if not self.curvature.empty:
            measuring = self.curvature["measure_seconds"]
            said["one measurement"] = f"{number(1000 * float(measuring.median()))} ms (median of {len(measuring):,})"
            total = float(measuring.sum())
            # The run's seconds end at its last evaluation, which a measurement may follow.
            share = f" ({total / seconds:.0%} of the run)" if 0 <= total < seconds else ""
            said["all measurements"] = duration(total) + share
        return said


def criterion(config: Mapping[str, Any]) -> tuple[float, int]:
    """With which test accuracy, in how many evaluations, a run settles; the defaults where its settings do not say."""
    threshold, patience = config.get("grok_threshold", 0.98), config.get("grok_patience", 3)
    sound = isinstance(threshold, float) and 0 < threshold <= 1 and isinstance(patience, int) and patience >= 1
    return (threshold, patience) if sound else (0.98, 3)


def _step(step: int | None) -> str:
    return "not reached" if step is None else f"{step:,}"


def flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by dots."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
