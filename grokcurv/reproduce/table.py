"""What each run came to, and each of its matrices, as tables."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from grokcurv.analysis import sweep_results
from grokcurv.reproduce.evidence import WALKED, Evidence
from grokcurv.reproduce.plan import NEEDS
from grokcurv.reproduce.rules import GROKKED
from grokcurv.sweep import Sweep

RESULTS = ("grok_step", "settled_step", "onset_step", "lead_time", "max_defect", "last_step", "test_acc")
"""Those of :func:`grokcurv.analysis.sweep_results` that are kept."""

COUNTS = ("measurements", "difference", "bracket", "unreliable")


def table_of(sweeps: Mapping[str, Sweep]) -> pd.DataFrame:
    """A row a run that has begun.

    ``run``, its sweep and id; the settings in which runs of a sweep differ; ``status``; of
    :func:`grokcurv.analysis.sweep_results`, from reliable defects alone, ``grok_step``, ``settled_step``,
    ``onset_step``, ``lead_time``, ``max_defect``, ``last_step`` and ``test_acc``; ``onset_step_published`` and
    ``lead_time_published``, from the float32 formula; ``measurements``, how many by ``difference`` and by ``bracket``,
    and how many ``unreliable``.
    """
    varied = dict.fromkeys(["op", "seed", *(name for sweep in sweeps.values() for name in sweep.varied)])
    settings = [name for name in varied if name != "basis_from"]  # a path
    return pd.concat([_table(name, sweep, settings) for name, sweep in sweeps.items()], ignore_index=True)


def matrices_of(evidence: Evidence) -> pd.DataFrame:
    """A row for each attention matrix of each run that ``pc1`` reads: ``run``; ``op``, ``weight_decay``, ``seed``;
    ``step``, at which the trajectory ends, as there; and what :func:`grokcurv.reproduce.evidence.compare_walks` has."""
    rows = []
    for trial in (trial for name in NEEDS["pc1"] for trial in evidence[name]):
        settings = {name: getattr(trial.config, name) for name in ("op", "weight_decay", "seed")}
        step = trial.records["step"].max() if trial.end is None else trial.end
        rows.append(trial.walks.assign(run=trial.id, **settings, step=step))
    columns = ["run", "op", "weight_decay", "seed", "step", *WALKED]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


_PUBLISHED = ("onset_step_published", "lead_time_published")
_NUMBERS = ("status", *RESULTS, *_PUBLISHED, *COUNTS)


def _table(name: str, sweep: Sweep, settings: list[str]) -> pd.DataFrame:
    """The rows of one sweep's runs that have begun."""
    runs, metrics, curvature = sweep.runs, sweep.table("metrics"), sweep.table("curvature")
    if curvature.columns.size < 2:  # nothing was measured
        curvature = pd.DataFrame(columns=["run", "step", "method", "reliable", "defect_median", "reference_median"])
    reliable = curvature["reliable"].eq(True)
    trusted = curvature.assign(defect_median=curvature["defect_median"].where(reliable))
    published = curvature.assign(defect_median=curvature["reference_median"])
    results = sweep_results(runs, metrics, trusted, GROKKED)
    past = sweep_results(runs, metrics, published, GROKKED)
    results[list(_PUBLISHED)] = past[["onset_step", "lead_time"]]
    kinds = pd.DataFrame(
        {
            "measurements": True,
            **{method: curvature["method"] == method for method in ("difference", "bracket")},
            "unreliable": ~reliable,
        }
    )
    counts = kinds.groupby(curvature["run"]).sum().reindex(results.index, fill_value=0)
    results[list(COUNTS)] = counts.astype(np.int64)
    begun = results[results["status"] != "pending"]
    table = begun[[*settings, *_NUMBERS]].reset_index(names="run")
    return table.assign(run=f"{name}/" + table["run"])
