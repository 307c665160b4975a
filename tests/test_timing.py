"""Phases, grok step, onset and lead time: the published runs, small cases worked by hand, and what bad records get."""

from __future__ import annotations

import csv
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from grokcurv.analysis import (
    PHASES,
    by_phase,
    changepoint_step,
    grok_step,
    lead_time,
    lead_times,
    onset_step,
    phases,
    settled_step,
)

DATA = Path(__file__).parent / "data"

NAN = math.nan


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    """Trajectories published with arXiv 2602.16746: learning rate 1e-3, weight decay 1, every 100 steps."""
    return pd.read_csv(DATA / "published_onset.csv")


@pytest.mark.parametrize(
    ("op", "seed", "onset", "grok"),
    [
        ("add", 42, 1800, 3100),
        ("add", 137, 1800, 3200),
        ("add", 2024, 1900, 2500),
        ("mul", 42, 1900, 2500),
        ("mul", 137, 1900, 2800),
        ("mul", 2024, 1900, 2600),
    ],
)
def test_published_runs(published: pd.DataFrame, op: str, seed: int, onset: int, grok: int) -> None:
    run = published[(published.op == op) & (published.seed == seed)]
    for records in (run, run.sample(frac=1, random_state=seed), {name: run[name].tolist() for name in run}):
        assert onset_step(records) == onset
        assert grok_step(records) == grok
        assert lead_time(records) == grok - onset
    half = grok_step(run, threshold=0.5)
    assert half is not None
    assert half <= grok
    assert lead_time(run, threshold=0.5) == half - onset


def defects(*values: float) -> pd.DataFrame:
    return pd.DataFrame({"step": np.arange(len(values)) * 50, "defect_median": values})


@pytest.mark.parametrize(
    ("values", "onset"),
    [
        ((3, 2, 4, 30, 30.1), 200),  # ten times the median of 3, 2, 4, exceeded
        ((0.2, 0.3, 0.2, 19, 20, 20.5), 250),  # 20 must be exceeded as well
        ((0, 0, 0, 0.9, 21), 200),  # an early level of zero is no onset by itself
        ((1, 25, 1), 50),  # among the first three too
        ((5, 5, 5, 49, 50), None),
        ((1, 1000), None),  # two values: the larger is below ten times their mean
        ((1e9,), None),
        ((), None),
    ],
)
def test_onset_rule(values: tuple[float, ...], onset: int | None) -> None:
    assert onset_step(defects(*values)) == onset


def test_rows_that_were_not_measured_do_not_count() -> None:
    nan = float("nan")
    assert onset_step(defects(nan, 3, nan, 2, 4, nan, 29, 31)) == 350
    assert onset_step(defects(nan, nan)) is None
    assert onset_step(defects(1, 1, 1, float("inf"), 22)) == 200
    records = pd.DataFrame({"step": [0, 10, 20, 30], "test_acc": [nan, 0.5, nan, 0.9]})
    assert grok_step(records) == 30
    assert grok_step(records, threshold=0.5) == 10


def test_joined_metrics_and_measurements() -> None:
    metrics = pd.DataFrame({"step": [0, 100, 200, 300], "test_acc": [0.0, 0.1, 0.2, 0.95]})
    curvature = pd.DataFrame({"step": [0, 50, 75, 150], "defect_median": [1.0, 2, 1, 40]})
    assert lead_time(metrics.merge(curvature, on="step", how="outer")) == 300 - 150


def test_random_records_against_a_plain_loop() -> None:
    generator = np.random.default_rng()
    for _ in range(50):
        count = int(generator.integers(0, 40))
        values = np.exp(generator.normal(0, 3, count))
        accuracy = generator.uniform(0, 1, count)
        records = {"step": np.arange(count), "defect_median": values, "test_acc": accuracy}
        early = max(0.1, sorted(values[:3])[1] if count >= 3 else np.inf)
        onset = next((i for i, d in enumerate(values) if d > 10 * early and d > 20), None)
        grok = next((i for i, a in enumerate(accuracy) if a >= 0.7), None)
        assert onset_step(records) == onset
        assert grok_step(records, 0.7) == grok
        assert lead_time(records, 0.7) == (None if onset is None or grok is None else grok - onset)


def test_settled_against_a_plain_loop(generator: torch.Generator) -> None:
    """The last of so many in a row, in order of steps; what was not measured is not between."""
    for patience in (1, 2, 3, 5):
        accuracy = torch.rand(40, generator=generator, dtype=torch.float64).sqrt().numpy()
        accuracy[::7] = np.nan
        steps = np.arange(40) * 10
        streak, wanted = 0, None
        for step, value in zip(steps, accuracy, strict=True):
            if not np.isnan(value):
                streak = streak + 1 if value >= 0.6 else 0
                if streak == patience and wanted is None:
                    wanted = int(step)
        order = torch.randperm(40, generator=generator).numpy()
        shuffled = {"step": steps[order], "test_acc": accuracy[order]}
        assert settled_step(shuffled, 0.6, patience) == wanted
    assert settled_step({"step": [], "test_acc": []}) is None
    with pytest.raises(ValueError, match="patience must be at least 1; got 0"):
        settled_step({"step": [], "test_acc": []}, patience=0)
    with pytest.raises(ValueError, match="threshold is a fraction"):
        settled_step({"step": [], "test_acc": []}, threshold=98)


def test_one_row_and_empty_records() -> None:
    one = pd.DataFrame({"step": [7], "defect_median": [3.0], "test_acc": [1.0]})
    assert (grok_step(one), onset_step(one), lead_time(one)) == (7, None, None)
    none = one.iloc[:0]
    assert (grok_step(none), onset_step(none), lead_time(none)) == (None, None, None)


def test_bad_records() -> None:
    with pytest.raises(ValueError, match=r"no column 'test_acc'; it has 'step', 'defect_median'"):
        grok_step(defects(1, 2))
    with pytest.raises(ValueError, match="no column 'defect_median'"):
        onset_step({"step": [1], "test_acc": [0.5]})
    with pytest.raises(ValueError, match="no column 'step'; it has none"):
        lead_time({})
    with pytest.raises(ValueError, match="wanted equal lengths"):
        onset_step({"step": [1, 2], "defect_median": [0.5]})
    with pytest.raises(ValueError, match=r"threshold is a fraction .* got 90"):
        grok_step({"step": [1], "test_acc": [0.5]}, threshold=90)


def test_needs_no_pandas() -> None:
    use = "from grokcurv.analysis import onset_step; onset_step({'step': [0], 'defect_median': [1.0]})"
    subprocess.run([sys.executable, "-c", f"import sys; {use}; assert 'pandas' not in sys.modules"], check=True)


# Thresholds


def test_published_lead_times_from_the_rows_alone(published: pd.DataFrame) -> None:
    runs: dict[tuple[str, str], list[tuple[int, float, float]]] = {}
    with (DATA / "published_onset.csv").open() as lines:
        for row in csv.DictReader(lines):
            measured = int(row["step"]), float(row["defect_median"]), float(row["test_acc"])
            runs.setdefault((row["op"], row["seed"]), []).append(measured)
    thresholds, leads_at_90 = (0.5, 0.7, 0.9, 0.95, 0.98), []
    for (op, seed), rows in runs.items():
        early = sorted(defect for _, defect, _ in rows[:3])[1]
        onset = next(step for step, defect, _ in rows if defect > 10 * early and defect > 20)
        groks = [next(step for step, _, accuracy in rows if accuracy >= level) for level in thresholds]
        leads = [grok - onset for grok in groks]
        found = lead_times(published[(published.op == op) & (published.seed == int(seed))])
        assert found.to_dict("list") == {"threshold": [*thresholds], "grok_step": groks, "lead_time": leads}
        leads_at_90.append(leads[2])
    assert leads_at_90 == [1300, 1400, 600, 600, 900, 700]


def test_thresholds_never_reached() -> None:
    records = defects(1, 1, 1, 30, 30).assign(test_acc=[0, 0, 0.2, 0.6, 0.8])
    found = lead_times(records, [0.2, 0.6, 0.9])
    assert found["grok_step"].tolist()[:2] == [100, 150]
    assert found["lead_time"].tolist()[:2] == [-50, 0]
    assert found.iloc[2, 1:].isna().all()
    flat = lead_times(defects(1, 1, 1).assign(test_acc=1.0), [0.5])  # grokked, and the defect never rose
    assert (flat["grok_step"][0], flat.dtypes.tolist()) == (0, [np.dtype(float)] * 3)
    assert flat["lead_time"].isna().all()
    empty = lead_times({"step": [], "defect_median": [], "test_acc": []})
    assert empty["threshold"].tolist() == [0.5, 0.7, 0.9, 0.95, 0.98]
    assert empty.iloc[:, 1:].isna().all(axis=None)
    assert lead_times(records, []).shape == (0, 3)
    with pytest.raises(ValueError, match=r"threshold is a fraction .* got 98"):
        lead_times(records, [98])


# Phases


def test_published_phases() -> None:
    rows = pd.read_csv(DATA / "published_phases.csv", comment="#")
    named = rows["phase"].replace("memorization", "memorisation")
    assert phases(rows).tolist() == named.tolist()
    assert set(named) == set(PHASES)


def test_phases_by_hand() -> None:
    rows = [
        (0.0, 0.0, "early"),
        (0.949, 0.99, "early"),
        (0.95, 0.299, "memorisation"),
        (1.0, 0.3, "pre-grok"),
        (0.95, 0.949, "pre-grok"),
        (1.0, 0.95, "post-grok"),
        (0.96, 0.85, "pre-grok"),  # the accuracy of a run that grokked may drop
        (NAN, 1.0, ""),
        (1.0, NAN, ""),
    ]
    train, test, named = zip(*rows, strict=True)
    assert phases({"train_acc": train, "test_acc": test}).tolist() == list(named)
    for nothing in ([], [NAN, NAN]):
        assert phases({"train_acc": nothing, "test_acc": nothing}).tolist() == [""] * len(nothing)
    with pytest.raises(ValueError, match="no column 'train_acc'"):
        phases({"test_acc": [1.0]})
    with pytest.raises(ValueError, match="wanted equal lengths"):
        phases({"test_acc": [1.0], "train_acc": [1.0, 1.0]})


def test_medians_by_phase() -> None:
    records = pd.DataFrame(
        {
            "train_acc": [0.1, 0.5, 0.9, 0.2, 1, 1, 1, NAN, 1],
            "test_acc": [0.0, 0.0, 0.0, 0.0, 0.5, 0.6, 1, 1, NAN],
            "ratio": [1.0, 7, 2, NAN, 3, math.inf, NAN, 9, 9],
        }
    )
    found = by_phase(records, "ratio")
    assert found.name == "ratio"
    assert found.index.tolist() == list(PHASES)
    assert found.fillna(-1).tolist() == [2, -1, 3, -1]
    assert by_phase(records.iloc[:0], "ratio").isna().all()
    assert by_phase(records.iloc[:1].to_dict("list"), "ratio")["early"] == 1
    with pytest.raises(ValueError, match="no column 'share'"):
        by_phase(records, "share")


# The changepoint


def test_published_changepoints(published: pd.DataFrame) -> None:
    for _, run in published.groupby(["op", "seed"]):
        grok = grok_step(run)
        warm_up, rise = changepoint_step(run), changepoint_step(run, since=500)
        assert 600 <= warm_up <= 800
        assert 1400 <= rise <= 1900 < grok
        for since, alarm in ((0, warm_up), (500, rise)):
            late = run[run.step >= since]
            wealth = wealth_of(late.defect_median.to_numpy())
            assert alarm == next(step for step, w in zip(late.step, wealth, strict=True) if w >= 100)


def wealth_of(values: np.ndarray) -> list[float]:
    """The wealth after every row, bet by bet: for each row k the stake 1 / k(k+1), multiplied from k on."""
    growth = [0.0]
    for row in range(1, len(values)):
        powers = [rank**9 for rank in range(1, row + 2)]
        growth.append(powers[sum(earlier < values[row] for earlier in values[:row])] / (sum(powers) / (row + 1)))
    return [
        math.fsum(math.prod(growth[k : row + 1]) / (k * (k + 1)) for k in range(1, row + 1))
        for row in range(len(values))
    ]


def test_changepoint_against_its_definition(generator: torch.Generator) -> None:
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    found = []
    for _ in range(60):
        count = int(rng.integers(0, 30))
        values = np.exp(rng.normal(0, 1, count) + rng.uniform(0, 0.2) * np.arange(count)).round(1)
        false_alarm = 10 ** rng.uniform(-3, -0.1)
        alarm = next((row for row, wealth in enumerate(wealth_of(values)) if wealth >= 1 / false_alarm), None)
        records = defects(*values)
        found.append(changepoint_step(records, false_alarm))
        assert found[-1] == (None if alarm is None else 50 * alarm)
        assert changepoint_step(records.sample(frac=1, random_state=1), false_alarm) == found[-1]
        if alarm is not None:  # known when it happens, and not moved by what comes later
            assert changepoint_step(records[: alarm + 1], false_alarm) == found[-1]
            assert changepoint_step(records[:alarm], false_alarm) is None
    assert None in found
    assert len(set(found)) > 3


def test_false_alarms_over_all_orders() -> None:
    # Every order of six values is as likely when they are exchangeable: the rate is a count, not an estimate.
    for values in (range(6), (1, 1, 2, 3, 3, 4)):
        peaks = np.array([max(wealth_of(np.array(order))) for order in itertools.permutations(values)])
        for false_alarm in (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.001):
            assert (peaks >= 1 / false_alarm).mean() <= false_alarm
        assert (peaks >= 10).any()


@pytest.mark.parametrize(("false_alarm", "digits"), [(0.01, 9), (0.1, 9), (0.1, 0)])
def test_false_alarms_of_long_records(false_alarm: float, digits: int, generator: torch.Generator) -> None:
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    level = rng.lognormal(0, 1, 1000)  # exchangeable, not independent: each record has its own level
    values = (level[:, None] * rng.lognormal(2, 0.3, (1000, 80))).round(digits)  # whole numbers tie
    alarms = sum(changepoint_step(defects(*row), false_alarm) is not None for row in values)
    assert alarms <= stats.binom.isf(1e-6, 1000, false_alarm)


def test_power_on_a_rise_like_the_published(generator: torch.Generator) -> None:
    # From step 500 the published defects lie level for ten rows, scatter by 12 %, then grow by 7 % a row.
    rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    trend = 0.07 * np.maximum(np.arange(25) - 9, 0)
    runs = np.exp(np.log(10) + trend + rng.normal(0, 0.12, (500, 25)))
    alarms = [changepoint_step(defects(*run)) for run in runs]
    assert sum(alarm is not None for alarm in alarms) > 0.95 * 500


def test_changepoint_reads_reliable_rows_only() -> None:
    rising = defects(*np.arange(1.0, 12))
    assert changepoint_step(rising) == 250  # the sixth row in ascending order: a wealth of 279
    assert changepoint_step(rising.iloc[::-1]) == 250
    assert changepoint_step(rising, since=200) == 450
    assert changepoint_step(rising, since=10_000) is None
    assert changepoint_step(rising.assign(reliable=True)) == 250
    assert changepoint_step(rising.assign(reliable=False)) is None
    trusted = rising.assign(reliable=[True, False, None, NAN, *[True] * 7])
    assert changepoint_step(trusted) == 400
    assert changepoint_step(rising.assign(defect_median=[NAN, math.inf, *range(9)])) == 350


def test_degenerate_changepoints() -> None:
    for values in ((), (1,), (NAN, NAN), (3,) * 100, tuple(range(50, 0, -1)), (0,) * 9):
        assert changepoint_step(defects(*values)) is None
    for false_alarm in (0, 1, -0.1, NAN, 5):
        with pytest.raises(ValueError, match="false_alarm is a probability"):
            changepoint_step(defects(1, 2), false_alarm)
    with pytest.raises(ValueError, match="no column 'defect_median'"):
        changepoint_step({"step": [1]})
    with pytest.raises(ValueError, match="wanted equal lengths"):
        changepoint_step({"step": [1], "defect_median": [1], "reliable": [True, True]})
