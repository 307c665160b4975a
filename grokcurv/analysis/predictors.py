"""Which column of a sweep's measurements predicts grokking: all of them by one protocol, docs/predictors.md."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from grokcurv.analysis.statistics import clopper_pearson
from grokcurv.analysis.sweeps import measured_rows, places_of
from grokcurv.analysis.timing import check_threshold

if TYPE_CHECKING:
    import pandas as pd

    from grokcurv.sweep import Sweep

Numbers = NDArray[np.float64]

PAST_ROWS = 10
"""Rows of a run's own past before its first statistic."""

IN_A_ROW = 3
"""Rows in a row that must be beyond a threshold."""

THRESHOLDS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)

DIRECTIONS = ("up", "down")

BEST = 4
"""Candidates of which pairs are made."""

FEW = 20
"""Fewer runs on a side are said to be few."""

REFERENCES = (
    *("train_loss", "test_loss", "train_acc", "test_acc", "weight_norm"),
    *("fourier_embedding", "fourier_logits"),
)
"""Columns of the evaluations that are judged beside the candidates, and are none."""

JUDGED_BY_RELIABLE = ("defect_median", "defect_p25", "defect_p75", "bracket_norm")
"""Columns of which the rows count that are ``reliable``."""

NO_SIGNALS = ("run", "step", "reliable", "measure_seconds")
NO_SIGNAL_ENDS = ("_error", "_floor", "_residual", "_stderr", "_checked")
"""Columns that say how far others are to be trusted."""

NORMAL_IQR = 0.7413011092528009
"""Standard deviation of a normal distribution over its interquartile range."""


@dataclass(frozen=True)
class Predictors:
    """Made by :func:`predictors`; what each column of its tables means is in docs/predictors.md.

    Attributes:
        table: one row a column of the records, by AUROC from the highest: ``column``, ``reference`` (of the
            evaluations, and no candidate), ``scale`` (log or raw), ``direction`` (up, down, or mixed where operations
            disagree), ``threshold`` (median over operations), ``cross_validated``; ``grokked`` runs, ``hits`` among
            them with ``hit_rate``, ``hit_low``, ``hit_high``; ``lead``, ``lead_min``, ``lead_max`` (steps); ``never``
            runs, ``false_alarms`` among them with ``false_rate``, ``false_low``, ``false_high``; ``gain``; ``auroc``,
            ``auroc_low``, ``auroc_high``; ``behind``, ``behind_low``, ``behind_high`` (of the AUROC, behind that of the
            best candidate); ``spearman`` of alarm and grok step within operations, over ``spearman_runs``. Intervals
            are of 95 %; NaN where there is none.
        pairs: of the best candidates two by two, ``first``, ``second`` and ``rule`` (both, either), with the columns of
            the table from grokked to gain.
        alarms: one row a run and column: ``run``, ``op``, ``column``, ``grok_step`` (NaN: never), ``alarm_step`` (NaN:
            none that counts) and ``lead``.
        protocol: the numbers of the protocol, and how many runs of which operations it was held to.
        notes: what these runs cannot tell, a sentence each.
    """

    table: pd.DataFrame
    pairs: pd.DataFrame
    alarms: pd.DataFrame
    protocol: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def predictors(
    sweep: Sweep | str | os.PathLike[str],
    columns: Sequence[str] | None = None,
    weight_decay: float | None = None,
    *,
    threshold: float = 0.9,
    trials: int = 2000,
    seed: int = 0,
) -> Predictors:
    """Judge each column of a sweep's measurements as an alarm that a run will grok, by one frozen protocol.

    A row is set against the run's own past by a robust z; three rows in a row beyond a threshold are an alarm.
    Direction and threshold of a column are chosen on other operations than those they are judged on. Runs that grok
    are compared with runs that never do at equal steps, so that a column which only tells the time has an AUROC of 1/2.
    Intervals of the AUROC are percentiles over resamples of whole operations, since runs of one operation are alike
    (Field & Welsh 2007, Obuchowski 1997); those of fractions are Clopper & Pearson's (1934), which take runs for
    independent. Finished runs alone count.

    Args:
        sweep: an open sweep, or its folder.
        columns: names of columns; by default all that may be signals, and the :data:`REFERENCES`. One that no run has
            gets a row without numbers.
        weight_decay: takes the runs with this one; by default those with any above 0.
        threshold: test accuracy that counts as grokked.
        trials: resamples of the operations.
        seed: of the resamples.

    Raises:
        ValueError: ``threshold`` outside (0, 1], or ``trials`` below one.
        RunError: a folder without a sweep, or damaged tables.

    Example:
        Two runs grok at step 900, one of another operation never does. In the first two ``alarm`` rises 400 steps
        before, and the third row in a row comes 50 steps later.

        >>> import numpy as np, pandas as pd
        >>> from types import SimpleNamespace
        >>> from grokcurv.analysis import predictors
        >>> step = np.arange(0, 1100, 25)
        >>> runs = pd.DataFrame({"op": ["add", "mul", "x3"], "status": "finished", "weight_decay": 1.0})
        >>> groks = {run: 900 if op != "x3" else np.inf for run, op in runs["op"].items()}
        >>> tables = {name: pd.concat([pd.DataFrame({"run": run, "step": step, **make(groks[run])}) for run in groks])
        ...     for name, make in {
        ...         "metrics": lambda grok: {"test_acc": 0.1 + 0.85 * (step >= grok)},
        ...         "curvature": lambda grok: {"alarm": 1 + step % 2 + 9.0 * (step >= grok - 400), "reliable": True},
        ...     }.items()}
        >>> sweep = SimpleNamespace(runs=runs, table=lambda name, columns=None: tables[name])
        >>> predictors(sweep).table.loc[0, ["column", "hits", "false_alarms", "auroc", "lead"]].to_dict()
        {'column': 'alarm', 'hits': 2, 'false_alarms': 0, 'auroc': 1.0, 'lead': 350.0}
    """
    import pandas as pd

    from grokcurv.sweep import open_sweep

    check_threshold(threshold)
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    opened = open_sweep(sweep) if isinstance(sweep, str | os.PathLike) else sweep
    runs = opened.runs  # before the tables: a run that has finished by now has written all its rows
    names = None if columns is None else tuple(dict.fromkeys(columns))
    metrics = opened.table("metrics", {"test_acc", *(REFERENCES if names is None else names)})
    curvature = opened.table("curvature", None if names is None else {*names, "reliable"})
    cohort = _Cohort.of(runs, metrics, curvature, threshold, weight_decay)
    tables = {"curvature": _ordered(curvature, runs), "metrics": _ordered(metrics, runs)}
    if names is None:
        names = (*filter(_may_signal, _numeric(curvature)), *(n for n in REFERENCES if n in _numeric(metrics)))
    count = len(cohort.operations)
    weights = np.zeros((trials, count), dtype=np.int64)  # how often each operation is in a resample
    if count:
        weights[:] = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=trials)
    judged = [_Judged(name, cohort, *_series(name, tables, cohort), weights) for name in names]
    rows = [one.row for one in judged]
    table = pd.DataFrame(rows, columns=COLUMNS)
    order = table.sort_values("auroc", ascending=False, kind="stable").index
    judged, table = [judged[place] for place in order], table.loc[order].reset_index(drop=True)
    candidates = [one for one in judged if not one.row["reference"] and math.isfinite(one.row["auroc"])]
    if candidates:
        _compare(table, judged, candidates[0])
    alarms = [one.alarms(runs) for one in judged]
    return Predictors(
        table,
        pd.DataFrame(list(_pairs(candidates[:BEST])), columns=["first", "second", "rule", *OUTCOMES]),
        pd.concat(alarms, ignore_index=True) if alarms else pd.DataFrame(columns=ALARMS),
        {
            "threshold": threshold,
            "weight_decay": "above 0" if weight_decay is None else weight_decay,
            "past_rows": PAST_ROWS,
            "in_a_row": IN_A_ROW,
            "thresholds": THRESHOLDS,
            "grokked": cohort.counts(cohort.grokked),
            "never": cohort.counts(cohort.never),
            "longest_horizon": cohort.longest,
            "trials": trials,
            "seed": seed,
        },
        list(_notes(cohort, table)),
    )


OUTCOMES = (
    *("grokked", "hits", "hit_rate", "hit_low", "hit_high", "lead", "lead_min", "lead_max"),
    *("never", "false_alarms", "false_rate", "false_low", "false_high", "gain"),
)
COLUMNS = (
    *("column", "reference", "scale", "direction", "threshold", "cross_validated"),
    *OUTCOMES,
    *("auroc", "auroc_low", "auroc_high", "behind", "behind_low", "behind_high", "spearman", "spearman_runs"),
)
ALARMS = ("run", "op", "column", "grok_step", "alarm_step", "lead")


@dataclass(frozen=True)
class _Cohort:
    """The runs that count, by their places in the sweep.

    ``operation`` (R,) is the number of each run's operation; ``grok_step``, ``horizon`` and ``end`` (R,) are steps.
    """

    operations: list[str]
    operation: NDArray[np.intp]
    grok_step: Numbers
    horizon: Numbers
    end: Numbers
    grokked: NDArray[np.intp]
    never: NDArray[np.intp]

    @classmethod
    def of(
        cls,
        runs: pd.DataFrame,
        metrics: pd.DataFrame,
        curvature: pd.DataFrame,
        threshold: float,
        weight_decay: float | None,
    ) -> _Cohort:
        """The finished runs of a sweep with weight decay, or with the one given, and the step at which each grokked."""
        import pandas as pd

        here = (runs["status"] == "finished").to_numpy()
        if "weight_decay" in runs:
            decay = runs["weight_decay"].to_numpy(float)
            here = here & (decay > 0 if weight_decay is None else decay == weight_decay)
        accuracy = measured_rows(metrics, "test_acc", runs)
        numbers = range(len(runs))
        reached = accuracy[accuracy["test_acc"] >= threshold].groupby("run")["step"].min()
        grok: Numbers = reached.reindex(numbers).to_numpy(float)
        before = accuracy[accuracy["step"].to_numpy() < grok[accuracy["run"].to_numpy(int)]]
        horizon: Numbers = before.groupby("run")["step"].max().reindex(numbers).to_numpy(float)
        steps = [table["step"].groupby(places_of(table, runs)).max() for table in (metrics, curvature) if len(table)]
        last = pd.concat(steps, axis=1).max(axis=1).reindex(numbers) if steps else pd.Series(np.nan, index=numbers)
        end = np.asarray(last, dtype=np.float64)
        names = runs["op"].astype(str) if "op" in runs else pd.Series("all", index=runs.index)
        evaluated = here & np.isin(numbers, accuracy["run"])
        grokked, never = np.flatnonzero(here & np.isfinite(horizon)), np.flatnonzero(evaluated & np.isnan(grok))
        code, operations = pd.factorize(names.where(np.isin(numbers, [*grokked, *never])))
        return cls(list(operations), np.asarray(code), grok, horizon, end, grokked, never)

    @property
    def longest(self) -> float:
        """The latest horizon: false alarms count up to it."""
        return float(self.horizon[self.grokked].max(initial=-math.inf))

    def counts(self, places: NDArray[np.intp]) -> dict[str, int]:
        """Of these runs by operation."""
        numbers = np.bincount(self.operation[places], minlength=len(self.operations))
        return {name: int(number) for name, number in zip(self.operations, numbers, strict=True) if number}


class _Judged:
    """A column and what it came to.

    Args:
        steps, values, starts: its rows, run after run, and where those of each run of the sweep begin and the last end.
        weights: (trials, operations) how often each is in a resample.
    """

    def __init__(
        self, name: str, cohort: _Cohort, steps: Numbers, values: Numbers, starts: NDArray[np.intp], weights: Any
    ) -> None:
        self.name, self.cohort, self.steps, self.starts = name, cohort, steps, starts
        has_rows = np.diff(starts) > 0
        self.grokked = cohort.grokked[has_rows[cohort.grokked]]
        self.never = cohort.never[has_rows[cohort.never]]
        scaled, self.scale = _scaled(values)
        self.scores = _scores(scaled, starts)
        self.horizons = cohort.horizon[self.grokked]
        self._count()
        operations = range(len(cohort.operations))
        there = {*cohort.operation[self.grokked], *cohort.operation[self.never]}
        both = [(a, b) for a in operations for b in operations if self.total[a, b]]
        leaves = [(a,) for a in there] + both
        self.cross_validated = bool(leaves) and all(self._chosen(leave) for leave in leaves)
        self.folds = {a: self._chosen((a,) if self.cross_validated else ()) for a in there}
        self.alarm = np.array([self._alarm(run) for run in range(len(starts) - 1)])
        self.concordant = np.zeros_like(self.total)
        for a, b in both:
            way, _ = self._chosen((a, b) if self.cross_validated else ()) or (0, 0)
            self.concordant[a, b] = self.concordances[way][a, b]
        self.samples = _resampled(self.concordant, self.total, weights)

    def _count(self) -> None:
        """Sums over the pairs of runs of each two operations: pairs, concordant ones, and those with alarms."""
        own = np.array([self._at(run, self.cohort.horizon[run : run + 1])[:, 0] for run in self.grokked])
        own = own.reshape(-1, 2).T
        other = np.empty((2, len(self.grokked), len(self.never)))
        for place, run in enumerate(self.never):
            seen = self.cohort.end[run] >= self.horizons
            other[:, :, place] = np.where(seen, self._at(run, self.horizons), np.nan)
        compared = ~np.isnan(other[0])
        self.total = self._by_operation(compared)
        sides = list(zip(own[:, :, None], other, strict=True))
        add = self._by_operation
        self.concordances = np.stack([add((mine > theirs) + 0.5 * (mine == theirs)) for mine, theirs in sides])
        # By direction and threshold.
        self.hits = np.stack([[add(compared & (mine >= level)) for level in THRESHOLDS] for mine, _ in sides])
        self.falses = np.stack([[add(theirs >= level) for level in THRESHOLDS] for _, theirs in sides])

    def _by_operation(self, pairs: NDArray[Any]) -> Numbers:
        """(grokked, never) summed to (operations, operations)."""
        every = np.arange(len(self.cohort.operations))
        left, right = (self.cohort.operation[runs][:, None] == every for runs in (self.grokked, self.never))
        summed: Numbers = left.T.astype(float) @ (pairs.astype(float) @ right.astype(float))
        return summed

    def _at(self, run: int, steps: Numbers) -> Numbers:
        """(2, n) the scores of a run at these steps, up and down."""
        here = slice(self.starts[run], self.starts[run + 1])
        place = np.searchsorted(self.steps[here], steps, side="right")
        scores = np.concatenate([np.full((2, 1), -np.inf), self.scores[:, here]], axis=1)
        found: Numbers = scores[:, place]
        return found

    def _chosen(self, leave: tuple[int, ...]) -> tuple[int, float] | None:
        """Direction and threshold by the pairs of runs of other operations than these; None where there are none."""

        kept = np.ones(len(self.total))
        kept[list(leave)] = 0
        if not kept @ self.total @ kept:
            return None
        up, down = self.concordances @ kept @ kept
        way = int(up < down)
        hits, falses = self.hits[way] @ kept @ kept, self.falses[way] @ kept @ kept
        gains = hits - falses
        best = np.flatnonzero(gains == gains.max())
        best = best[falses[best] == falses[best].min()]
        return way, THRESHOLDS[best[(len(best) - 1) // 2]]

    def _alarm(self, run: int) -> float:
        """Its step, if it counts."""
        here = slice(self.starts[run], self.starts[run + 1])
        fold = self.folds.get(self.cohort.operation[run])
        if fold is None or here.start == here.stop:
            return math.nan
        way, level = fold
        place = int(np.searchsorted(self.scores[way, here], level))
        step = self.steps[here][place] if place < here.stop - here.start else math.inf
        last = self.cohort.horizon[run] if run in self.grokked else self.cohort.longest
        return float(step) if step <= last else math.nan

    @property
    def row(self) -> dict[str, Any]:
        """The column's row of the table: its rule, what it is worth as an alarm, and its AUROC."""
        ways = {fold[0] for fold in self.folds.values() if fold}
        auroc = self.concordant.sum() / self.total.sum() if self.total.sum() else math.nan
        low, high = _interval(self.samples)
        within, pairs = _within(self.alarm, self.cohort, self.grokked)
        return {
            "column": self.name,
            "reference": self.name in REFERENCES,
            "scale": self.scale,
            "direction": "mixed" if len(ways) > 1 else DIRECTIONS[ways.pop()] if ways else "",
            "threshold": float(np.median(levels)) if (levels := [f[1] for f in self.folds.values() if f]) else math.nan,
            "cross_validated": self.cross_validated,
            **self.outcome(self.alarm),
            "auroc": auroc,
            "auroc_low": low,
            "auroc_high": high,
            **dict.fromkeys(("behind", "behind_low", "behind_high"), math.nan),
            "spearman": within,
            "spearman_runs": pairs,
        }

    def outcome(self, alarm: Numbers) -> dict[str, Any]:
        """What alarms (R,) come to: hits, leads, false alarms and gain."""
        return _outcome(self.cohort, self.grokked, self.never, alarm, any(self.folds.values()))

    def alarms(self, runs: pd.DataFrame) -> pd.DataFrame:
        """A row for each run that is judged: when it grokked, and when the column's alarm came."""
        import pandas as pd

        there = np.sort(np.concatenate([self.grokked, self.never]))
        step, alarm = self.cohort.grok_step[there], self.alarm[there]
        operations = [self.cohort.operations[code] for code in self.cohort.operation[there]]
        values = (runs.index[there], operations, self.name, step, alarm, step - alarm)
        return pd.DataFrame(dict(zip(ALARMS, values, strict=True)))


def _outcome(
    cohort: _Cohort, grokked: NDArray[np.intp], never: NDArray[np.intp], alarm: Numbers, judged: bool = True
) -> dict[str, Any]:
    """What an alarm (R,) came to: hits and how far ahead of grokking, false alarms, both rates with intervals."""
    leads = (cohort.grok_step - alarm)[grokked]
    leads = leads[np.isfinite(leads)]
    false = int(np.isfinite(alarm[never]).sum())
    horizons = cohort.horizon[grokked][:, None]
    compared = cohort.end[never] >= horizons
    first = np.isfinite(alarm[grokked])[:, None].astype(float) - (alarm[never] <= horizons)
    hit, hit_low, hit_high = map(float, clopper_pearson(len(leads), len(grokked) if judged else 0))
    rate, low, high = map(float, clopper_pearson(false, len(never) if judged else 0))
    return {
        "grokked": len(grokked),
        "hits": len(leads),
        "hit_rate": hit,
        "hit_low": hit_low,
        "hit_high": hit_high,
        "lead": float(np.median(leads)) if len(leads) else math.nan,
        "lead_min": float(leads.min(initial=math.inf)) if len(leads) else math.nan,
        "lead_max": float(leads.max(initial=-math.inf)) if len(leads) else math.nan,
        "never": len(never),
        "false_alarms": false,
        "false_rate": rate,
        "false_low": low,
        "false_high": high,
        "gain": float(first[compared].mean()) if judged and compared.any() else math.nan,
    }


def _may_signal(name: str) -> bool:
    return name not in NO_SIGNALS and not name.endswith(NO_SIGNAL_ENDS)


def _numeric(table: pd.DataFrame) -> list[str]:
    return [str(name) for name, column in table.items() if column.dtype.kind in "iuf"]


def _ordered(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Rows by the place of their run, which is ``run``, then by step."""
    if table.empty:
        return table
    ordered: pd.DataFrame = table.assign(run=places_of(table, runs)).sort_values(["run", "step"], kind="stable")
    return ordered[ordered["run"] >= 0]


def _series(name: str, tables: dict[str, pd.DataFrame], cohort: _Cohort) -> tuple[Numbers, Numbers, NDArray[np.intp]]:
    """The rows of a column that count: steps, values, and where each run's begin."""
    table = next((table for table in tables.values() if name in _numeric(table)), None)
    count = len(cohort.operation)
    if table is None:
        return np.empty(0), np.empty(0), np.zeros(count + 1, dtype=np.intp)
    owner, values = table["run"].to_numpy(int), table[name].to_numpy(float)
    kept = np.isfinite(values) & (cohort.operation[owner] >= 0)
    if name in JUDGED_BY_RELIABLE and "reliable" in table:
        kept &= table["reliable"].eq(True).to_numpy(bool)  # of joined tables it is NaN in some rows
    starts = np.searchsorted(owner[kept], np.arange(count + 1))
    return table["step"].to_numpy(float)[kept], values[kept], starts


def _scaled(values: Numbers) -> tuple[Numbers, str]:
    """Logarithms where all values have one sign."""
    if values.size and ((values > 0).all() or (values < 0).all()):
        return np.log(np.abs(values)), "log"
    return values, "raw"


def _scores(values: Numbers, starts: NDArray[np.intp]) -> Numbers:
    """(2, n) the highest statistic of a run so far, up and down; -inf before there is one."""
    import pandas as pd

    owners = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    place = np.arange(len(values)) - starts[owners]
    if not values.size:
        return np.empty((2, 0))
    expanding = pd.Series(values).groupby(owners).expanding(PAST_ROWS)
    lower, middle, upper = (_before(expanding.quantile(level), place) for level in (0.25, 0.5, 0.75))
    width = np.where(upper > lower, NORMAL_IQR * (upper - lower), _before(expanding.std(ddof=0), place))
    away = values - middle
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        z = np.where(away == 0, 0.0, away / width)
    scores = np.full((2, len(values)), -np.inf)
    # A run's own rows: its first statistic is of rows that each have a past.
    whole = place >= PAST_ROWS + IN_A_ROW - 1
    for score, way in zip(scores, (z, -z), strict=True):
        least = np.min([np.roll(way, back) for back in range(IN_A_ROW)], axis=0)
        score[whole] = least[whole]
    return np.stack([pd.Series(score).groupby(owners).cummax().to_numpy() for score in scores])


def _before(rows: pd.Series, place: NDArray[np.intp]) -> Numbers:
    """Each row's value at the row before it in the same run."""
    shifted = np.roll(rows.to_numpy(float), 1)
    shifted[place == 0] = np.nan
    return shifted


def _resampled(concordant: Numbers, total: Numbers, weights: NDArray[np.int64]) -> Numbers:
    """AUROC of every resample; NaN where it has no pair, and all where one side is of one operation."""
    if min(total.any(axis=1).sum(), total.any(axis=0).sum()) < 2:
        return np.full(len(weights), np.nan)
    pairs, there = (((weights @ sums) * weights).sum(axis=1) for sums in (concordant, total))
    samples: Numbers = np.divide(pairs, there, out=np.full(len(weights), np.nan), where=there > 0)
    return samples


def _interval(samples: Numbers) -> tuple[float, float]:
    """The middle 95 % of the finite ones."""
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return math.nan, math.nan
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def _within(alarm: Numbers, cohort: _Cohort, grokked: NDArray[np.intp]) -> tuple[float, int]:
    """Correlation of the ranks of alarm and grok step, each less its mean in the operation; and of how many runs."""
    from scipy.stats import rankdata

    ranks: list[Numbers] = []
    alarmed = grokked[np.isfinite(alarm[grokked])]
    for operation in np.unique(cohort.operation[alarmed]):
        runs = alarmed[cohort.operation[alarmed] == operation]
        if len(runs) > 2:
            pair = np.stack([rankdata(alarm[runs]), rankdata(cohort.grok_step[runs])])
            ranks.append(pair - pair.mean(axis=1, keepdims=True))
    if not ranks:
        return math.nan, 0
    x, y = np.concatenate(ranks, axis=1)
    length = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / length if length else math.nan, len(x)


def _compare(table: pd.DataFrame, judged: list[_Judged], best: _Judged) -> None:
    """How far each is behind the best candidate, over the same resamples."""
    table["behind"] = best.row["auroc"] - table["auroc"]
    ends = [_interval(best.samples - one.samples) for one in judged]
    table["behind_low"], table["behind_high"] = zip(*ends, strict=True)


def _pairs(candidates: list[_Judged]) -> Iterator[dict[str, Any]]:
    """A row for each two columns and each rule: an alarm where both have one, or where either has."""
    for first, second in combinations(candidates, 2):
        grokked = np.intersect1d(first.grokked, second.grokked)
        never = np.intersect1d(first.never, second.never)
        for rule, combine in (("both", np.maximum), ("either", np.fmin)):
            alarm = combine(first.alarm, second.alarm)
            outcome = _outcome(first.cohort, grokked, never, alarm)
            yield {"first": first.name, "second": second.name, "rule": rule, **outcome}


def _notes(cohort: _Cohort, table: pd.DataFrame) -> Iterator[str]:
    """What these runs cannot tell."""
    if lacking := [name for name, n in zip(table["column"], table["grokked"] + table["never"], strict=True) if not n]:
        yield f"No run has rows of {', '.join(lacking)}."
    left, right = cohort.counts(cohort.grokked), cohort.counts(cohort.never)
    sides = f"{_runs(left)} and {_runs(right)}"
    if not left or not right:
        yield f"There is nothing to tell apart: {sides.replace(' and ', ' grok, ')} never do."
        return
    said = sides.replace(" and ", " grok, ") + " never do"
    if not set(left) & set(right):
        total, ways = len(left) + len(right), math.comb(len(left) + len(right), len(right))
        yield (
            f"{said}. Of the {ways:,} ways to choose {len(right)} of {total} operations one is this outcome: a column "
            f"that reads no more than some trait of the operation meets it by chance with p = {1 / ways:.2g}, and none "
            "can do better here."
        )
    else:
        yield f"{said}."
    candidates = table[~table["reference"].astype(bool) & table["auroc"].notna()]
    if not candidates["cross_validated"].all():
        yield (
            f"Direction and threshold of {(~candidates['cross_validated'].astype(bool)).sum()} of {len(candidates)} "
            "columns were chosen on the runs they are judged on, for want of other operations: their numbers are too "
            "good."
        )
    if len(candidates) < 2:
        return
    best, rest = candidates.iloc[0], candidates.iloc[1:]
    if rest["behind_low"].isna().all():
        yield "There are no intervals of the AUROC: they need two operations on each side."
        return
    untold = rest[~(rest["behind_low"] > 0)]
    few = f", with fewer than {FEW} runs on a side" if min(sum(left.values()), sum(right.values())) < FEW else ""
    if len(untold):
        names = ", ".join(untold["column"].head(12)) + ", and others" * (len(untold) > 12)
        yield f"{len(untold)} of {len(rest)} columns cannot be told from the best, {best['column']}{few}: {names}."
    else:
        yield f"All other columns are behind the best, {best['column']}, beyond the resamples of operations{few}."


def _operations(number: int) -> str:
    return f"{number} operation{'s' * (number != 1)}"


def _runs(counts: dict[str, int]) -> str:
    """12 runs of 4 operations."""
    number = sum(counts.values())
    return f"{number:,} run{'s' * (number != 1)} of {_operations(len(counts))}" if number else "no run"
