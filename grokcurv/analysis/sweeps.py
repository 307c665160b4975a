"""What the runs of a sweep came to, one row a run and one row a setting, without a loop over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grokcurv.analysis.statistics import wilson
from grokcurv.analysis.timing import EARLY, check_threshold, has_risen

if TYPE_CHECKING:
    import pandas as pd

UNFINISHED = ("pending", "running", "interrupted")
"""Statuses of a run that may still grok."""


def sweep_results(
    runs: pd.DataFrame, metrics: pd.DataFrame, curvature: pd.DataFrame, threshold: float = 0.9
) -> pd.DataFrame:
    """``runs`` with what each came to; NaN where it did not, or has not yet.

    The columns added are grok_step, settled_step (by each run's grok_threshold and grok_patience, where ``runs`` has
    them), onset_step and lead_time, as the functions of those names define them; max_defect,
    the highest reliable defect, and max_defect_step; last_step, of an evaluation or a measurement; and test_acc, the
    last one measured. A run without a grok step is censored at its last step: it had not grokked by then.

    Args:
        runs: one row a run, indexed by its id.
        metrics, curvature: the rows of all runs, in any order; ``run`` holds the id. Either may be empty.
        threshold: test accuracy that counts as grokked.
    """
    import pandas as pd

    check_threshold(threshold)
    accuracy, defect = measured_rows(metrics, "test_acc", runs), measured_rows(curvature, "defect_median", runs)
    early = defect.groupby("run").head(EARLY).groupby("run")["defect_median"].median()
    risen = has_risen(defect["defect_median"].to_numpy(float), early.reindex(defect["run"]).to_numpy(float))
    peak = defect[defect["reliable"].astype(bool)].sort_values("defect_median", kind="stable").groupby("run").last()
    found = {
        "grok_step": accuracy[accuracy["test_acc"] >= threshold].groupby("run")["step"].min(),
        "settled_step": _settled(accuracy, runs),
        "onset_step": defect[risen].groupby("run")["step"].min(),
        "max_defect": peak["defect_median"],
        "max_defect_step": peak["step"],
        "last_step": pd.concat([_last(metrics, runs), _last(curvature, runs)], axis=1).max(axis=1),
        "test_acc": accuracy.groupby("run")["test_acc"].last(),
    }
    numbers = range(len(runs))
    results = runs.assign(**{name: column.reindex(numbers).to_numpy(float) for name, column in found.items()})
    results.insert(len(runs.columns) + 3, "lead_time", results["grok_step"] - results["onset_step"])
    return results


def sweep_settings(results: pd.DataFrame, fields: Sequence[str]) -> pd.DataFrame:
    """The results of :func:`sweep_results` by setting: one row a combination of the fields, in order of appearance.

    Only finished runs enter the fraction and the medians. A failed or unfinished run is counted as such: it stands
    neither for grokking nor against it, not even when it has passed the threshold, since the others that are still
    running cannot yet. As runs that grok end sooner, the fractions of a sweep in progress lie rather too high.

    Returns:
        The fields; then runs, finished, failed, unfinished, grokked (of the finished); grok_fraction with its 95 %
        Wilson interval, grok_low and grok_high; grok_step, the median of those that grokked, with grok_step_min and
        grok_step_max; settled_step, the median of those that settled; censored_step, to which the shortest run went
        that finished without grokking; max_defect and lead_time, medians. NaN where there is none.
    """
    fields = list(fields)
    finished = results["status"] == "finished"
    step = results["grok_step"].where(finished)
    columns = results[fields].assign(
        runs=1,
        finished=finished,
        failed=results["status"] == "failed",
        unfinished=results["status"].isin(UNFINISHED),
        grokked=step.notna(),
        grok_step=step,
        grok_step_min=step,
        grok_step_max=step,
        settled_step=results["settled_step"].where(finished),
        censored_step=results["last_step"].where(finished & step.isna()),
        max_defect=results["max_defect"].where(finished),
        lead_time=results["lead_time"].where(finished),
    )
    counts = ("runs", "finished", "failed", "unfinished", "grokked")
    how = dict.fromkeys(counts, "sum") | {"grok_step_min": "min", "grok_step_max": "max", "censored_step": "min"}
    how |= dict.fromkeys(("grok_step", "settled_step", "max_defect", "lead_time"), "median")
    # One group where no field differs; groupby wants at least one key.
    keys = fields or np.zeros(len(columns), dtype=int)
    settings = columns.groupby(keys, sort=False, dropna=False).agg(how).reset_index(drop=not fields)
    fraction, low, high = wilson(settings["grokked"], settings["finished"])
    settings = settings.assign(grok_fraction=fraction, grok_low=low, grok_high=high)
    steps = ["grok_step", "grok_step_min", "grok_step_max", "settled_step", "censored_step"]
    return settings[[*fields, *counts, "grok_fraction", "grok_low", "grok_high", *steps, "max_defect", "lead_time"]]


def _settled(accuracy: pd.DataFrame, runs: pd.DataFrame) -> pd.Series:
    """By run the step at which so many evaluations in a row had reached what it asks for."""
    ordered = accuracy.sort_values(["run", "step"], kind="stable")
    own, owners = {"grok_threshold": 0.98, "grok_patience": 3}, ordered["run"].to_numpy(int)
    of = {name: runs[name].to_numpy()[owners] if name in runs else default for name, default in own.items()}
    reached = ordered["test_acc"] >= of["grok_threshold"]
    streak = reached.groupby([ordered["run"], (~reached).cumsum()]).cumsum()
    settled: pd.Series = ordered[streak == of["grok_patience"]].groupby("run")["step"].min()
    return settled


def measured_rows(table: pd.DataFrame, name: str, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows in which ``step`` and the column ``name`` are finite, in order of steps; ``run`` is a number."""
    import pandas as pd

    if table.empty:
        return pd.DataFrame({"run": [], "step": [], name: [], "reliable": []}, dtype=float)
    missing = {"run", "step", name} - set(table)
    if missing:
        raise ValueError(f"the rows of the runs have no column {', '.join(map(repr, sorted(missing)))}")
    owners = places_of(table, runs)
    kept = np.isfinite(table[["step", name]].to_numpy(dtype=float)).all(axis=1) & (owners >= 0)
    columns = [column for column in ("step", name, "reliable") if column in table]
    ordered: pd.DataFrame = table.loc[kept, columns].assign(run=owners[kept]).sort_values("step", kind="stable")
    return ordered


def _last(table: pd.DataFrame, runs: pd.DataFrame) -> pd.Series:
    """The last step of each run in a table, by the run's place."""
    import pandas as pd

    return pd.Series(dtype=float) if table.empty else table["step"].groupby(places_of(table, runs)).max()


def places_of(table: pd.DataFrame, runs: pd.DataFrame) -> Any:
    """(n,) int: whose rows they are, by place in ``runs``; -1 for others. Words would take longer to compare."""
    import pandas as pd

    return runs.index.astype(str).get_indexer(pd.Index(table["run"].astype(str)))
