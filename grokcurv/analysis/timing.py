"""When a run memorised and grokked, when its defect rose, and how long the rise came before."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grokcurv.analysis.records import Records, columns, measured, reliable

if TYPE_CHECKING:
    import pandas as pd

EARLY = 3
"""Measurements of whose median a rise of the defect is told."""

PHASES = ("early", "memorisation", "pre-grok", "post-grok")
"""Of a run that groks, in order, as :func:`phases` names them."""

RANK_POWER = 9
"""A bet on rising defects pays rank^9: at most 10 to 1, for a row that tops all before it."""


def phases(records: Records) -> NDArray[np.str_]:
    """The phase of training in every row, by its accuracies; (n,) str, rows as they come.

    ``early`` while the training accuracy is below 0.95; from then on ``memorisation`` while the test accuracy is below
    0.3, ``post-grok`` where it is at least 0.95, and ``pre-grok`` between (arXiv 2602.16746). Empty where one of the
    two is NaN. Every row is judged alone: a run whose accuracy drops goes back. Reads ``train_acc`` and ``test_acc``
    (fractions, 0 to 1); ValueError when one is missing or they differ in length.
    """
    train, test = columns(records, "train_acc", "test_acc")
    rules = [np.isnan(train) | np.isnan(test), train < 0.95, test < 0.3, test < 0.95]
    return np.select(rules, ["", *PHASES[:3]], PHASES[3])


def by_phase(records: Records, column: str) -> pd.Series:
    """Median of a column over the rows of each of the four phases, in their order; NaN where there is none.

    Rows in which the column is not finite, or an accuracy that decides the phase is missing, do not count. Raises as
    :func:`phases` does.
    """
    import pandas as pd

    _, values = columns(records, "train_acc", column)
    named, finite = phases(records), np.isfinite(values)
    medians = pd.Series(values[finite], name=column).groupby(named[finite]).median()
    return medians.reindex(pd.Index(PHASES, name="phase"))


def settled_step(records: Records, threshold: float = 0.98, patience: int = 3) -> int | None:
    """Step of the last of the first ``patience`` evaluations in a row with a test accuracy of ``threshold`` or more.

    None when there are not so many in a row. This is what the trainer waits for; :func:`grok_step`, which is never
    later, is where the paper counts lead times from. Reads ``step`` and ``test_acc``; ValueError as there.
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1; got {patience}")
    steps, accuracy = measured(records, "test_acc")
    reached = accuracy >= check_threshold(threshold)
    seen = np.arange(1, len(reached) + 1)
    streak = seen - np.maximum.accumulate(np.where(reached, 0, seen))
    return _first(steps, streak == patience)


def grok_step(records: Records, threshold: float = 0.9) -> int | None:
    """First step at which the test accuracy is at least ``threshold``; None when it never is.

    Reads the columns ``step`` and ``test_acc`` (a fraction, 0 to 1). Raises ValueError when one is missing, when they
    differ in length, or when ``threshold`` is outside (0, 1].
    """
    steps, accuracy = measured(records, "test_acc")
    return _first(steps, accuracy >= check_threshold(threshold))


def check_threshold(threshold: float) -> float:
    """The test accuracy that counts as grokked; ValueError where it is no fraction above 0."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is a fraction of the test set, 0 < threshold <= 1; got {threshold}")
    return threshold


def onset_step(records: Records) -> int | None:
    """First step at which the defect exceeds both 20 and ten times its early level; None when it never does.

    The early level is the median of the first three measurements, taken as 0.1 where it is lower (the rule of
    arXiv 2602.16746). Reads ``step`` and ``defect_median`` (dimensionless); ValueError when one is missing or they
    differ in length.
    """
    steps, defect = measured(records, "defect_median")
    if not defect.size:
        return None
    return _first(steps, has_risen(defect, np.median(defect[:EARLY])))


def has_risen(defect: NDArray[np.float64], early: ArrayLike) -> NDArray[np.bool_]:
    """Where a defect is past its onset, given the median of its first :data:`EARLY` measurements."""
    risen: NDArray[np.bool_] = (defect > 10 * np.maximum(early, 0.1)) & (defect > 20)
    return risen


def changepoint_step(records: Records, false_alarm: float = 0.01, since: int = 0) -> int | None:
    r"""First step at which the defects up to it can no longer pass for a sequence without a rise; None if they can.

    A wager against exchangeability. While the order of the measurements carries no information, the rank of each among
    those up to it is uniform and independent of all ranks before (Rényi 1962), so a stake that every further row
    multiplies by rank^9, over its mean under uniform ranks, keeps its expectation. Of a unit stake a part
    :math:`1 / k(k+1)` is put down at row k, counted from 0: the prior odds that the rise begins there (Shiryaev 1963).
    The alarm comes when the wealth reaches ``1 / false_alarm``.

    By Ville's inequality (1939) that happens in at most a share ``false_alarm`` of exchangeable records, whatever their
    length and the distribution of their defects: this is a conformal test martingale (Vovk, Gammerman & Shafer,
    *Algorithmic Learning in a Random World*, 2nd ed. 2022, chapter 8). Ties count as the lowest rank, which only loses
    wealth. Ranks alone matter: the defect and its logarithm give one answer, no level and no scale is assumed. Rows
    that come later never move an alarm. It takes six rows, each above all before, to raise one at 0.01; the rise itself
    begins some rows earlier.

    What is rejected is exchangeability, and the defect of a training run has a trend before any grokking: it rises
    while the network memorises, whether or not it groks later. From step 0 the rule finds that rise, in the six
    published runs at steps 600 to 800. ``since`` the step by which the training set is memorised, it finds whether the
    defect went on rising: 1400 to 1900 since step 500, beside 1800 to 1900 by :func:`onset_step`; all before grokking
    (2500 to 3200). That step must not be chosen by the defects. Measurements a few steps apart share their weights:
    slow swings are a trend to this rule, and are not in its false-alarm rate.

    Args:
        records: ``step`` and ``defect_median``; of a column ``reliable``, only the rows where it is true.
        false_alarm: bound on the probability of an alarm anywhere in an exchangeable record, 0 < false_alarm < 1.
        since: rows before this step are left out.

    Raises:
        ValueError: a column is missing, lengths differ, or ``false_alarm`` lies outside 0..1.
    """
    if not 0 < false_alarm < 1:
        raise ValueError(f"false_alarm is a probability, 0 < false_alarm < 1; got {false_alarm}")
    steps, defect = reliable(records, "defect_median")
    wealth, total = 0.0, 0.0
    seen: list[float] = []
    for row, (step, value) in enumerate(zip(steps[steps >= since], defect[steps >= since].tolist(), strict=True)):
        count = row + 1
        total += float(count) ** RANK_POWER
        if row:
            rank = bisect_left(seen, value) + 1
            wealth = (wealth + 1 / (row * count)) * count * float(rank) ** RANK_POWER / total
            if wealth >= 1 / false_alarm:
                return int(step)
        insort(seen, value)
    return None


def lead_time(records: Records, threshold: float = 0.9) -> int | None:
    """Steps from the onset of the defect to grokking: positive when the defect rose first.

    That is ``grok_step(records, threshold) - onset_step(records)``, None when either is. Raises as those two do.
    """
    grok, onset = grok_step(records, threshold), onset_step(records)
    return None if grok is None or onset is None else grok - onset


def lead_times(records: Records, thresholds: Iterable[float] = (0.5, 0.7, 0.9, 0.95, 0.98)) -> pd.DataFrame:
    """How the lead time depends on what counts as grokked: threshold, grok_step and lead_time, a row a threshold.

    float64, NaN where :func:`grok_step` or :func:`lead_time` is None. Raises as those do.
    """
    import pandas as pd

    rows = [(level, grok_step(records, level), lead_time(records, level)) for level in thresholds]
    return pd.DataFrame(rows, columns=["threshold", "grok_step", "lead_time"], dtype=float)


def _first(steps: NDArray[np.float64], holds: NDArray[np.bool_]) -> int | None:
    """The first of the steps at which it holds; None if at none."""
    where = np.flatnonzero(holds)
    return int(steps[where[0]]) if where.size else None
