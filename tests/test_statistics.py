"""Statistics over runs: against SciPy and small cases by hand, their error rates by simulation, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from grokcurv.analysis import censored_power_law, control_ratio, log_log_bend, power_law, sign_test, wilson

NAN = math.nan


def fresh(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))


# The sign test


def test_signs_by_hand() -> None:
    assert sign_test([600] * 12) == (12, 0, 0, 2**-12)  # 12 of 12 runs
    assert sign_test([3, -1, 2]) == (2, 1, 0, 4 / 8)
    assert sign_test([[3, -1], [2, 0]]) == (2, 1, 1, 4 / 8)
    assert sign_test([math.inf, -math.inf, NAN]) == (1, 1, 0, 3 / 4)
    assert sign_test([None, 100, 0.0, -0.0]) == (1, 0, 2, 1 / 2)
    assert sign_test([-5]) == (0, 1, 0, 1)
    for nothing in ([], [0, 0], [NAN]):
        assert sign_test(nothing).p_value == 1


def test_signs_against_scipy(generator: torch.Generator) -> None:
    rng = fresh(generator)
    for count in (1, 2, 7, 50, 2000):
        values = rng.normal(0.1, 1, count).round(1)
        found = sign_test(values)
        signs = found.positive + found.negative
        assert signs + found.ties == count
        assert found.p_value == pytest.approx(
            stats.binomtest(found.positive, signs, alternative="greater").pvalue if signs else 1, rel=1e-9
        )


def test_a_p_value_below_alpha_is_as_rare_as_alpha() -> None:
    for signs in range(13):
        p_values = [sign_test([1] * k + [-1] * (signs - k)).p_value for k in range(signs + 1)]
        chances = [math.comb(signs, k) / 2**signs for k in range(signs + 1)]
        for alpha in (*p_values, 0.001, 0.01, 0.05, 0.5):
            assert sum(chance for p, chance in zip(p_values, chances, strict=True) if p <= alpha) <= alpha
        # and not rarer than a discrete p-value has to be
        assert p_values == pytest.approx([sum(chances[k:]) for k in range(signs + 1)])


def test_randomised_p_values_of_the_sign_test_are_uniform() -> None:
    # P(more) + U P(as many) is uniform under the null, whatever the distribution of the differences.
    rng = np.random.default_rng(16)
    for differences in (rng.standard_cauchy((2000, 11)), rng.uniform(-1, 1, (2000, 6)).round(1)):
        values = []
        for row in differences:
            found = sign_test(row)
            more = [1] * (found.positive + 1) + [-1] * (found.negative - 1)
            least = sign_test(more).p_value if found.negative else 0
            values.append(least + rng.uniform() * (found.p_value - least))
        assert stats.kstest(values, "uniform").pvalue > 0.01
        assert stats.kstest(np.power(values, 1.5), "uniform").pvalue < 1e-6


# Power laws


def test_an_exact_power_law(generator: torch.Generator) -> None:
    x = torch.rand(9, generator=generator, dtype=torch.float64) * 1e4 + 1
    found = power_law(x, 0.02 * x**1.3)
    assert found == pytest.approx((1.3, 0.02, 1.3, 1.3), rel=1e-9)
    assert power_law(x, torch.full_like(x, 3.0)) == pytest.approx((0, 3, 0, 0), abs=1e-9)


def test_the_fit_against_scipy(generator: torch.Generator) -> None:
    rng = fresh(generator)
    for count in (2, 3, 40):
        x, y = rng.lognormal(8, 1, count), rng.lognormal(5, 1, count)
        found, line = power_law(x, y), stats.linregress(np.log(x), np.log(y))
        with np.errstate(over="ignore"):  # two x that hardly differ may have a prefactor that is no number
            prefactor = np.exp(line.intercept)
        assert (found.exponent, found.prefactor) == pytest.approx((line.slope, prefactor), rel=1e-9)
        assert math.isnan(found.low) == math.isnan(found.high) == (count == 2)
        assert count == 2 or found.low <= found.high


def test_the_interval_against_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.lognormal(8, 1, 6), rng.lognormal(5, 1, 6)
    slopes = []
    for _ in range(4000):
        rows = rng.integers(6, size=6)
        if len(set(rows)) > 1:
            slopes.append(np.polyfit(np.log(x[rows]), np.log(y[rows]), 1)[0])
    found = power_law(x, y, trials=4000)
    below = [np.mean(np.array(slopes) < end) for end in (found.low, found.high)]
    assert below == pytest.approx([0.025, 0.975], abs=5 * math.sqrt(2 * 0.025 / 4000))


def test_the_interval_covers_the_exponent() -> None:
    rng = np.random.default_rng(13)
    covered = 0
    for run in range(400):
        x = rng.lognormal(8, 1, 60)
        y = 0.02 * x**1.3 * np.exp(rng.normal(0, 0.1 + 0.05 * np.log(x)))  # the scatter grows with x
        found = power_law(x, y, trials=400, seed=run)
        covered += found.low <= 1.3 <= found.high
    assert stats.binomtest(covered, 400, 0.95).pvalue > 1e-4


def test_few_and_missing_pairs() -> None:
    assert np.isnan(power_law([], [])).all()
    assert np.isnan(power_law([100], [3])).all()
    assert np.isnan(power_law([5, 5, 5, 5], [1, 2, 3, 4])).all()
    assert np.isnan(power_law([5.1, 5.1], [1, 2])).all()
    two = power_law([10, 1000, 7, NAN], [3, 300, NAN, 8])
    assert two[:2] == pytest.approx((1, 0.3))
    assert np.isnan(two[2:]).all()
    assert np.isfinite(power_law([1, 2, 2], [1, 3, 4])).all()


def test_a_line_so_steep_that_its_prefactor_is_no_number() -> None:
    assert power_law([1000, 1001], [1, 100]).prefactor == 0
    assert power_law([1000, 1001], [100, 1]).prefactor == math.inf


def test_the_seed_decides(generator: torch.Generator) -> None:
    rng = fresh(generator)
    x, y = rng.lognormal(8, 1, 12), rng.lognormal(5, 1, 12)
    assert power_law(x, y, seed=3) == power_law(x, y, seed=3)
    assert power_law(x, y, seed=3)[:2] == power_law(x, y, seed=4)[:2]
    assert power_law(x, y, seed=3)[2:] != power_law(x, y, seed=4)[2:]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(x=[1, 0, 3]), "x must be finite and positive"),
        (dict(y=[1, -2, 3]), "y must be finite and positive"),
        (dict(y=[1, math.inf, 3]), "y must be finite and positive"),
        (dict(x=[1, 2]), r"one shape \(n,\), got \(2,\) and \(3,\)"),
        (dict(x=np.ones((3, 1)), y=np.ones((3, 1))), r"one shape \(n,\), got \(3, 1\)"),
        (dict(trials=0), "trials must be at least 1, got 0"),
        (dict(groups=[1, 2]), r"groups must have the shape \(3,\) of x, got \(2,\)"),
    ],
)
def test_bad_pairs(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        power_law(**{"x": [1, 2, 3], "y": [1, 2, 4], **arguments})


def test_whole_groups_are_resampled(generator: torch.Generator) -> None:
    """Copies of a pair say nothing new where they are known to be copies."""
    rng = fresh(generator)
    x, y = rng.lognormal(8, 1, 9), rng.lognormal(5, 1, 9)
    four = [np.tile(values, 4) for values in (x, y, np.arange(9))]
    assert power_law(*four[:2], groups=four[2]) == pytest.approx(power_law(x, y), rel=1e-9)
    apart = power_law(*four[:2])
    assert apart.high - apart.low < power_law(x, y).high - power_law(x, y).low
    labels = np.array(["a", "b"])[np.arange(9) % 2]
    assert np.isnan(power_law(x, y, groups=labels)[2:]).all()


# What only looks like a power law


def test_the_parabola_against_numpy(generator: torch.Generator) -> None:
    rng = fresh(generator)
    for count in (3, 4, 40):
        x = np.exp(np.arange(count) / 2 + rng.uniform(0, 0.3, count))  # apart, for the truth's own digits
        y = rng.lognormal(5, 1, count)
        found = log_log_bend(x, y, trials=50)
        assert found.value == pytest.approx(np.polyfit(np.log(x), np.log(y), 2)[0], rel=1e-6, abs=1e-6)
        assert found.low <= found.high


def test_a_difference_bends_and_a_power_does_not() -> None:
    rng = np.random.default_rng(3)
    rejected = {"power": 0, "difference": 0}
    for run in range(100):
        x = np.exp(rng.uniform(math.log(2500), math.log(34_000), 40))
        noise = rng.lognormal(0, 0.1, 40)
        for name, y in {"power": 0.03 * x**1.3 * noise, "difference": (x - 2000) * noise}.items():
            found = log_log_bend(x, y, trials=200, seed=run)
            rejected[name] += not found.low <= 0 <= found.high
    assert stats.binomtest(rejected["power"], 100, 0.05).pvalue > 1e-4
    assert rejected["difference"] == 100


def test_few_x_have_no_parabola() -> None:
    assert np.isnan(log_log_bend([], [])).all()
    assert np.isnan(log_log_bend([1, 2, 2, 1], [1, 2, 3, 4])).all()
    assert np.isnan(log_log_bend([1, 2, NAN], [1, 2, 3])).all()
    grouped = log_log_bend([1, 2, 4, 8], [1, 2, 3, 4], groups=["a", "a", "b", "b"])
    assert math.isfinite(grouped.value)
    assert np.isnan(grouped[1:]).all()
    with pytest.raises(ValueError, match="x must be finite and positive"):
        log_log_bend([0, 1, 2], [1, 2, 3])


# Power laws of which bounds are known


def looked_at(y: np.ndarray, every: float, until: np.ndarray | float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of what is looked at every so often, and no more from some time on."""
    low = np.floor(y / every) * every
    late = y > until
    return np.where(late, until, low), np.where(late, math.inf, low + every)


def test_narrow_bounds_are_the_numbers_themselves(generator: torch.Generator) -> None:
    rng = fresh(generator)
    x, y = rng.lognormal(8, 1, 12), rng.lognormal(5, 1, 12)
    found, want = censored_power_law(x, y * (1 - 1e-4), y * (1 + 1e-4), trials=20), power_law(x, y)
    assert found[:2] == pytest.approx(want[:2], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("every", [1.0, 300.0])
def test_the_most_likely_line(every: float, generator: torch.Generator) -> None:
    """No line near by is likelier, by plain probabilities."""
    rng = fresh(generator)
    x = rng.lognormal(8, 1, 30)
    y = 0.02 * x**1.3 * rng.lognormal(0, 0.4, 30)
    low, high = looked_at(y, every, np.where(rng.random(30) < 0.3, y * rng.lognormal(-0.3, 0.5, 30), math.inf))
    found = censored_power_law(x, low, high, trials=1)
    with np.errstate(divide="ignore"):
        ends = np.log(low), np.log(high)

    def likelihood(exponent: float, constant: float, scatter: float) -> float:
        law = stats.norm(constant + exponent * np.log(x), scatter)
        with np.errstate(divide="ignore"):
            return float(np.log(law.cdf(ends[1]) - law.cdf(ends[0])).sum())

    at = np.array([found.exponent, math.log(found.prefactor)])
    scatters = np.linspace(0.1, 1.5, 400)
    best = max(likelihood(*at, scatter) for scatter in scatters)
    scatter = max(scatters, key=lambda scatter: likelihood(*at, scatter))
    for _ in range(200):
        exponent, constant = at + rng.normal(size=2) * [0.05, 0.4] * rng.choice([0.01, 0.1, 1])
        assert likelihood(exponent, constant, scatter * rng.lognormal(0, 0.1)) <= best + 1e-3


def test_what_did_not_come_is_not_left_out(generator: torch.Generator) -> None:
    """Long waits that are cut off: without them the exponent comes out too small, with them it does not."""
    rng = fresh(generator)
    exponents = []
    for _ in range(20):
        x = rng.lognormal(8, 1, 60)
        y = 0.02 * x**1.3 * rng.lognormal(0, 0.8, 60)
        low, high = looked_at(y, 50, 4000)
        seen = np.isfinite(high)
        cut = power_law(x[seen], high[seen], trials=1).exponent
        exponents.append((censored_power_law(x, low, high, trials=1).exponent, cut))
    found, cut = np.array(exponents).T
    error = 5 * found.std() / math.sqrt(20)
    assert found.mean() == pytest.approx(1.3, abs=error)
    assert cut.mean() < 1.3 - error


def test_resamples_are_fitted_as_they_are_alone(generator: torch.Generator) -> None:
    rng = fresh(generator)
    x = rng.lognormal(8, 1, 15)
    low, high = looked_at(0.02 * x**1.3 * rng.lognormal(0, 0.8, 15), 50, 4000)
    found = censored_power_law(x, low, high, trials=40, seed=3)
    draws = np.random.default_rng(3).integers(15, size=(40, 15))
    alone = [censored_power_law(x[rows], low[rows], high[rows], trials=1).exponent for rows in draws]
    assert found[2:] == pytest.approx(np.quantile(alone, [0.025, 0.975]), rel=1e-6)


def test_bounds_that_say_little() -> None:
    nothing, inf = [0.0, 0.0, 0.0], math.inf
    assert np.isnan(censored_power_law([], [], [])).all()
    assert np.isnan(censored_power_law([1, 2, 3], nothing, [inf, inf, inf])).all()
    assert np.isnan(censored_power_law([5, 5, 5], [1, 2, 3], [2, 3, 4])).all()
    between = censored_power_law([1, 2, 4, 8], [0.9, 1.7, 3.5, 7], [1.2, 2.2, 4.5, inf], trials=20)
    assert 0.9 < between.exponent < 1.1  # every such line passes between the bounds
    two = censored_power_law([1, 2, NAN], [1, 2, 3], [1.1, 2.1, 4], trials=20)
    assert np.isfinite(two[:2]).all()
    assert np.isnan(two[2:]).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(x=[1, 0, 3]), "x must be finite and positive"),
        (dict(low=[1, 2, 5]), "low must be at least 0 and below high"),
        (dict(low=[-1, 2, 3]), "low must be at least 0 and below high"),
        (dict(high=[2, 3]), r"x, low and high must have one shape \(n,\), got \(3,\), \(3,\) and \(2,\)"),
        (dict(groups=[1]), r"groups must have the shape \(3,\) of x, got \(1,\)"),
        (dict(trials=0), "trials must be at least 1, got 0"),
    ],
)
def test_bad_bounds(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        censored_power_law(**{"x": [1, 2, 3], "low": [1, 2, 3], "high": [2, 3, 5], **arguments})


# A run beside its control


def test_a_control_by_hand() -> None:
    run = pd.DataFrame(
        {
            "step": [400, 0, 100, 200, 300, 500],  # in any order
            "defect_median": [90.0, 1, 8, 60, NAN, 7],
            "reference_median": [90.0, 2, 8, 60, 5, 7],
            "reliable": [True, True, True, True, False, True],
        }
    )
    control = pd.DataFrame(
        {
            "step": [0, 100, 200, 300, 400, 450],
            "defect_median": [1.0, 4, 3, 3, 3, 7],
            "reference_median": [1.0, 4, 0, 5, 3, 7],
            "reliable": [True, True, True, True, False, True],
        }
    )
    assert control_ratio(run, control) == (2, 1, 20, 3, 4)
    assert control_ratio(run, control, "reference_median") == (2, 2, 2, 2, 5)
    every = [records.drop(columns="reliable") for records in (run, control)]
    assert control_ratio(*every) == (11, 1, 30, 4, 4)
    assert control_ratio(*every, column="reference_median") == (2, 1, 30, 4, 5)  # where the control is 0, no ratio
    assert control_ratio(run, control.to_dict("list")) == control_ratio(run, control)


def test_reliable_in_joined_records() -> None:
    # A row of the metrics alone has no measurement: the join leaves NaN and makes the column one of objects.
    metrics = pd.DataFrame({"step": [0, 50, 100], "test_acc": [0.0, 0.1, 0.2]})
    curvature = pd.DataFrame({"step": [0, 100], "defect_median": [2.0, 6.0], "reliable": [False, True]})
    run = metrics.merge(curvature, on="step", how="outer")
    assert run["reliable"].dtype == object
    assert control_ratio(run, {"step": [0, 100], "defect_median": [1.0, 2.0]}) == (3, 3, 3, 1, 2)


def test_nothing_in_common() -> None:
    run = {"step": [0, 100], "defect_median": [1.0, NAN]}
    for control in ({"step": [100], "defect_median": [1.0]}, {"step": [], "defect_median": []}):
        found = control_ratio(run, control)
        assert np.isnan(found[:3]).all()
        assert found[3:] == (0, 0)
    with pytest.raises(ValueError, match="no column 'reference_median'"):
        control_ratio(run, run, "reference_median")


# Intervals of a fraction


@pytest.mark.parametrize("trials", [1, 3, 20])
def test_wilson_against_scipy(trials: int) -> None:
    for successes in range(trials + 1):
        interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
        assert wilson(successes, trials) == pytest.approx((successes / trials, *interval), abs=1e-12)


def test_wilson_of_arrays() -> None:
    found = wilson([0, 3, 0], [3, 3, 0])
    assert found[0].tolist()[:2] == [0, 1]
    assert found[1][0] == 0
    assert found[2][1] == 1
    assert np.isnan([part[2] for part in found]).all()
