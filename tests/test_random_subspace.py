"""The random-subspace null: against projections by brute force, many digits, and what bad input gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from grokcurv.analysis import RandomBaseline, alignment_p_value


@pytest.mark.parametrize(("k", "m"), [(1, 2), (1, 9), (3, 8), (7, 9), (16, 300)])
def test_baseline_is_the_distribution_of_brute_force_projections(k: int, m: int):
    rng = np.random.default_rng(12345 + 1000 * k + m)
    trials = 4000 if m < 100 else 1500
    v = rng.standard_normal(m)
    q = np.linalg.qr(rng.standard_normal((trials, m, k))).Q
    fractions = np.linalg.norm(np.einsum("tmk,m->tk", q, v), axis=1) / np.linalg.norm(v)
    baseline = RandomBaseline(k, m)
    assert stats.kstest(fractions, lambda f: 1 - baseline.p_value(f)).pvalue > 1e-3
    # The same test must notice a distribution that is off by one dimension.
    other = RandomBaseline(k, m + 1) if m < 100 else RandomBaseline(k + 1, m)
    assert stats.kstest(fractions, lambda f: 1 - other.p_value(f)).pvalue < 1e-3
    assert abs(fractions.mean() - baseline.mean) < 5 * fractions.std() / math.sqrt(trials)


@pytest.mark.parametrize(("k", "m"), [(1, 2), (2, 5), (16, 290_401), (199, 230), (24, 30_000_000), (6, 10**9)])
def test_mean_against_many_digits(k: int, m: int):
    mpmath = pytest.importorskip("mpmath", reason="sympy, which torch requires, brings mpmath")
    with mpmath.workdps(60):
        a, b = mpmath.mpf(k) / 2, mpmath.mpf(m) / 2
        half = mpmath.mpf(1) / 2
        exact = float(
            mpmath.exp(sum(s * mpmath.loggamma(x) for s, x in ((1, a + half), (-1, a), (1, b), (-1, b + half))))
        )
    mean = RandomBaseline(k, m).mean
    assert abs(mean / exact - 1) < 1e-13
    assert mean <= math.sqrt(k / m)


def test_mean_of_a_random_direction():
    # The mean of |cos| in the plane is 2 / pi, and 1 / 2 in space.
    assert RandomBaseline(1, 2).mean == pytest.approx(2 / math.pi, rel=1e-14)
    assert RandomBaseline(1, 3).mean == pytest.approx(0.5, rel=1e-14)
    assert RandomBaseline(16, 290_401).mean == pytest.approx(math.sqrt(16 / 290_401), rel=0.02)


def test_quantiles_and_p_values_are_inverse():
    baseline = RandomBaseline(16, 290_401)
    q = np.array([0.0, 0.001, 0.5, 0.999, 1.0])
    fractions = baseline.quantile(q)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert np.allclose(baseline.p_value(fractions), 1 - q, rtol=1e-9, atol=1e-15)
    assert baseline.quantile(0.25) < baseline.mean < baseline.quantile(0.75)
    assert isinstance(baseline.quantile(0.5), float)
    assert 0 < baseline.p_value(0.05) < 1e-100  # far tails do not round to zero


@pytest.mark.parametrize(("k", "m", "value"), [(0, 5, 0.0), (5, 5, 1.0), (0, 0, 0.0)])
def test_degenerate_baselines(k: int, m: int, value: float):
    baseline = RandomBaseline(k, m)
    assert baseline.mean == value
    assert baseline.quantile(0.3) == value
    assert baseline.p_value(value) == 1.0
    if value < 1:
        assert baseline.p_value(0.5) == 0.0
    assert math.isnan(baseline.p_value(math.nan))


def test_baseline_checks_its_arguments():
    with pytest.raises(ValueError, match="dim must lie in"):
        RandomBaseline(4, 3)
    baseline = RandomBaseline(2, 5)
    with pytest.raises(ValueError, match="q must lie"):
        baseline.quantile(1.5)
    for bad in (-0.1, [0.5, 1.2]):
        with pytest.raises(ValueError, match="fraction must lie"):
            baseline.p_value(bad)
    assert baseline.p_value(1 + 1e-6) == 0.0
    assert math.isnan(baseline.p_value(math.nan))


# What trajectories are asked: the alignment of a step with a commutator, the share of a step in the span of several.


@pytest.mark.parametrize("size", [2, 3, 50, 1001])
def test_p_values_of_an_alignment_are_uniform(size: int) -> None:
    rng = np.random.default_rng(2016 + size)
    step = rng.standard_exponential(size)  # any vector, so long as the other is random
    others = rng.standard_normal((1000, size))
    cosines = others @ step / (np.linalg.norm(others, axis=1) * np.linalg.norm(step))
    values = RandomBaseline(1, size).p_value(np.abs(cosines))
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert stats.kstest(values**1.5, "uniform").pvalue < 1e-6
    assert abs(np.abs(cosines).mean() / RandomBaseline(1, size).mean - 1) < 5 / math.sqrt(1000)


@pytest.mark.parametrize(
    ("count", "size", "alike"), [(1, 2, 0), (1, 50, 0), (3, 3, 0), (12, 13, 1), (12, 200, 3), (12, 200, math.inf)]
)
def test_p_values_of_a_mean_alignment_are_uniform(count: int, size: int, alike: float) -> None:
    """For vectors that share a part, ``alike`` times as long as what they do not share."""
    rng = np.random.default_rng(907 + size + count)
    deltas = rng.standard_normal((count, size)) / max(1.0, alike) + min(alike, 1.0) * rng.standard_normal(size)
    deltas /= np.linalg.norm(deltas, axis=1, keepdims=True)
    ways = rng.standard_normal((1000, size))
    means = np.abs(ways @ deltas.T / np.linalg.norm(ways, axis=1, keepdims=True)).mean(1)
    values = np.array([alignment_p_value(mean, deltas @ deltas.T, size, trials=2000) for mean in means])
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert stats.kstest(values**1.5, "uniform").pvalue < 1e-6
    if count == 1:
        np.testing.assert_allclose(values, RandomBaseline(1, size).p_value(means), atol=0.06)


def test_a_mean_alignment_checks_its_arguments() -> None:
    one = np.eye(1)
    assert math.isnan(alignment_p_value(math.nan, one, 5))
    assert alignment_p_value(0.0, one, 5) == 1.0
    assert alignment_p_value(1.0, np.eye(2), 5, trials=9) == 0.1
    assert alignment_p_value(1 - 1e-9, np.ones((3, 3)), 1) == 1.0  # of a line there is one direction
    for bad in (np.ones((2, 3)), np.ones(3), np.full((1, 1), np.nan), np.eye(6), np.empty((0, 0))):
        with pytest.raises(ValueError, match=r"correlations (must be finite, of shape|of rank 6)"):
            alignment_p_value(0.5, bad, 5)
    for bad_mean in (-0.1, 1.1):
        with pytest.raises(ValueError, match="mean must lie in"):
            alignment_p_value(bad_mean, one, 5)
    with pytest.raises(ValueError, match="trials must be at least 1"):
        alignment_p_value(0.5, one, 5, trials=0)


@pytest.mark.parametrize(("count", "size"), [(2, 5), (12, 13), (12, 200)])
def test_p_values_of_a_share_in_a_random_span_are_uniform(count: int, size: int) -> None:
    rng = np.random.default_rng(602 + size)
    step = rng.standard_exponential(size)
    deltas = rng.standard_normal((5000, size, count)) * rng.lognormal(size=(5000, 1, count))  # lengths do not matter
    inside = np.einsum("tpk,p->tk", np.linalg.qr(deltas).Q, step)
    values = RandomBaseline(count, size).p_value(np.linalg.norm(inside, axis=1) / np.linalg.norm(step))
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert stats.kstest(values**1.5, "uniform").pvalue < 1e-6
