"""The paper's own run, digit by digit: same draws, same order, same float32 arithmetic.

The ordinary suite follows one run for 100 steps. ``pytest -m published`` follows all six for 500, in a few minutes on
one thread.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from grokcurv.training import TrainConfig, train

PUBLISHED = pd.read_csv(Path(__file__).parent / "data" / "published_trajectories.csv", comment="#")


def beside_the_published(op: str, seed: int, steps: int) -> pd.DataFrame:
    """Our run joined with the published rows on ``step``; ``error`` is that of the float32 formula's median."""
    config = TrainConfig(op=op, seed=seed, steps=steps, rng="paper", threads=1)
    published = PUBLISHED[(PUBLISHED["op"] == op) & (PUBLISHED["seed"] == seed) & (PUBLISHED["step"] <= steps)]
    both = train(config).records().merge(published, on="step", suffixes=("", "_published"))
    assert both["step"].tolist() == list(range(0, steps + 1, 100))
    both["error"] = (both["reference_median"] / both["defect_median_published"] - 1).abs()
    return both


def assert_accuracies(both: pd.DataFrame) -> None:
    for name in ("train_acc", "test_acc"):
        assert (both[name] - both[f"{name}_published"]).abs().max() < 3e-4


def test_the_first_hundred_steps() -> None:
    both = beside_the_published("add", 42, 100)
    assert_accuracies(both)
    assert both["error"].max() < 0.002
    assert both["reliable"].all()
    assert both["defect_median"][0] == pytest.approx(0.2165, abs=1e-4)  # the same batches in float64


@pytest.mark.published
def test_six_runs_to_step_500() -> None:
    runs = [beside_the_published(op, seed, 500) for op in ("add", "mul") for seed in (42, 137, 2024)]
    both = pd.concat(runs, ignore_index=True)
    columns = ["op", "seed", "step", "train_acc", "test_acc", "reference_median", "defect_median_published", "error"]
    print(both[[*columns, "defect_median"]].to_string(float_format="%.5g"))
    assert len(both) == len(PUBLISHED) == 36
    assert_accuracies(both)
    assert (both["error"] < 0.002).mean() >= 0.9
    assert both["error"].max() < 0.03
