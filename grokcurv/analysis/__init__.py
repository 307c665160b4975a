"""When a run grokked, when its defect rose, and how long the rise came before: from the records alone; null models.

The functions of this module take *records*: a pandas DataFrame, or any mapping from a column's name to equally many
numbers, in any order of steps. A NaN is "not measured in this row": the accuracy and the defect may be on different
rows, as they are when a run's metrics and measurements are joined on ``step``. Steps are training steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from grokcurv.analysis.random_walk import RandomWalkNull, random_walk_pc1
from grokcurv.analysis.sweeps import sweep_results, sweep_settings

if TYPE_CHECKING:
    import pandas as pd

    Records = pd.DataFrame | Mapping[str, Iterable[float]]

__all__ = [
    "RandomWalkNull",
    "grok_step",
    "lead_time",
    "onset_step",
    "random_walk_pc1",
    "sweep_results",
    "sweep_settings",
]


def grok_step(records: Records, threshold: float = 0.9) -> int | None:
    """First step at which the test accuracy is at least ``threshold``; None when it never is.

    Reads the columns ``step`` and ``test_acc`` (a fraction, 0 to 1). Raises ValueError when one is missing, when they
    differ in length, or when ``threshold`` is outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a fraction of the test set, 0 < threshold <= 1; got {threshold}")
    steps, accuracy = _measured(records, "test_acc")
    return _first(steps, accuracy >= threshold)


def onset_step(records: Records) -> int | None:
    """First step at which the defect exceeds both 20 and ten times its early level; None when it never does.

    The early level is the median of the first three measurements, taken as 0.1 where it is lower (the rule of
    arXiv 2602.16746). Reads ``step`` and ``defect_median`` (dimensionless); ValueError when one is missing or they
    differ in length.
    """
    steps, defect = _measured(records, "defect_median")
    if not defect.size:
        return None
    early = max(float(np.median(defect[:3])), 0.1)
    return _first(steps, (defect > 10 * early) & (defect > 20))


def lead_time(records: Records, threshold: float = 0.9) -> int | None:
    """Steps from the onset of the defect to grokking: positive when the defect rose first.

    That is ``grok_step(records, threshold) - onset_step(records)``, None when either is. Raises as those two do.
    """
    grok, onset = grok_step(records, threshold), onset_step(records)
    return None if grok is None or onset is None else grok - onset


def _measured(records: Records, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``step`` and the column ``name``, in order of steps, without the rows in which either is not finite."""
    for column in ("step", name):
        if column not in records:
            raise ValueError(f"records has no column {column!r}; it has {', '.join(map(repr, records)) or 'none'}")
    steps, values = (np.asarray(records[column], dtype=np.float64) for column in ("step", name))
    if steps.ndim != 1 or steps.shape != values.shape:
        raise ValueError(f"records: 'step' has shape {steps.shape}, {name!r} has {values.shape}; wanted equal lengths")
    kept = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[kept], values[kept]
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def _first(steps: NDArray[np.float64], holds: NDArray[np.bool_]) -> int | None:
    where = np.flatnonzero(holds)
    return int(steps[where[0]]) if where.size else None
