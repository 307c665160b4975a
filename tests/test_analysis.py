"""Grok step, onset and lead time: the published runs, small cases worked by hand, and what bad records get."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from grokcurv.analysis import grok_step, lead_time, onset_step

DATA = Path(__file__).parent / "data"


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
