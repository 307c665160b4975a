"""The random-walk null: against walks simulated in full, closed forms, and what bad input gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from grokcurv.analysis import RandomWalkNull, random_walk_pc1
from grokcurv.pca import StreamingPCA

LIMIT = 6 / math.pi**2
"""PC1 share of a long walk of equal steps in many dimensions (Antognini & Sohl-Dickstein 2018)."""

CHANCE = 1e-6
"""A right implementation fails a test on fresh random numbers this often."""


def fresh_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator))


def simulated(norms: NDArray[np.float64], size: int, trials: int, seed: int) -> NDArray[np.float64]:
    """Shares of walks simulated step by step in R^size."""
    steps = np.random.default_rng(seed).standard_normal((trials, norms.size, size))
    steps *= norms[:, None] / np.linalg.norm(steps, axis=2, keepdims=True)
    positions = np.concatenate([np.zeros((trials, 1, size)), steps.cumsum(axis=1)], axis=1)
    variances = np.linalg.svd(positions - positions.mean(axis=1, keepdims=True), compute_uv=False) ** 2
    return variances[:, 0] / variances.sum(axis=1)


# Dimensions below, equal to and above the number of steps.
@pytest.mark.parametrize(("size", "steps"), [(2, 7), (3, 30), (3, 3), (6, 6), (12, 5), (40, 2)])
@pytest.mark.parametrize("lengths", ["equal", "unequal", "some zero"])
def test_against_simulated_walks(size: int, steps: int, lengths: str, generator: torch.Generator) -> None:
    norms = np.ones(steps)
    if lengths != "equal":
        norms = torch.rand(steps, generator=generator, dtype=torch.float64).numpy() + 0.1
    if lengths == "some zero":
        norms = np.concatenate([[0], norms[:1], [0, 0], norms[1:], [0]])
    trials = 2000
    walks = simulated(norms, size, trials, fresh_seed(generator))
    null = random_walk_pc1(norms, size, trials, fresh_seed(generator))
    assert stats.ks_2samp(walks, null.samples).pvalue > CHANCE
    error = math.hypot(walks.std(), null.std) / math.sqrt(trials)
    assert abs(walks.mean() - null.mean) < 5 * error
    # The same test must notice a space with a quarter of the dimensions.
    other = random_walk_pc1(norms, max(size // 4, 1), trials, fresh_seed(generator))
    assert stats.ks_2samp(walks, other.samples).pvalue < CHANCE


@pytest.mark.parametrize("steps", [2, 5, 33, 120])
def test_orthogonal_steps_have_a_closed_form(steps: int) -> None:
    # In very many dimensions the steps are orthogonal. The scatter matrix is then the inverse of the Laplacian of a
    # path: its eigenvalues are 1 / (4 sin^2(k pi / 2T)), k = 1 to T - 1, and their sum is (T^2 - 1) / 6.
    size = steps + 1
    share = 1 / (4 * math.sin(math.pi / (2 * size)) ** 2) / ((size**2 - 1) / 6)
    null = random_walk_pc1(np.full(steps, 0.3), 10**12, trials=20)
    assert np.abs(null.samples - share).max() < 1e-5
    assert null.std < 1e-5


def test_a_long_walk_in_many_dimensions() -> None:
    null = random_walk_pc1(np.ones(399), 10**9, trials=20)
    assert null.mean == pytest.approx(LIMIT, abs=1e-4)
    assert null.std < 1e-4


def test_one_dimension_and_one_move() -> None:
    for norms, size in (([1.0, 2, 3], 1), ([0, 0, 0.7, 0], 1), ([0, 0, 0.7, 0], 50)):
        null = random_walk_pc1(norms, size, trials=20)
        assert np.all(null.samples == 1)
        assert (null.mean, null.std, null.p_value(1)) == (1, 0, 1)
        assert math.isnan(null.z_score(1))
        assert null.z_score(0.9) == -math.inf


def test_p_values_of_random_walks_are_uniform(generator: torch.Generator) -> None:
    norms = torch.rand(9, generator=generator, dtype=torch.float64).numpy()
    null = random_walk_pc1(norms, 30, trials=10_000, seed=fresh_seed(generator))
    values = null.p_value(simulated(norms, 30, 1000, fresh_seed(generator)))
    # The null is a sample too: its own error of the distribution, adds to that of the thousand walks.
    assert stats.kstest(values, "uniform").statistic < stats.kstwo.isf(CHANCE, 1000) + stats.kstwo.isf(CHANCE, 10_000)
    assert stats.kstest(values**1.5, "uniform").pvalue < CHANCE


def test_beside_the_streaming_pca(generator: torch.Generator) -> None:
    size, steps = 200, 25
    moves = torch.randn(steps, size, generator=generator, dtype=torch.float64)
    drift = torch.randn(size, generator=generator, dtype=torch.float64)
    for rows, least, most in ((moves, CHANCE, 1.0), (moves + drift, 0.0, 1 / 1000)):
        pca = StreamingPCA(n_components=1).partial_fit(torch.cat([torch.zeros(1, size), rows.cumsum(0)]))
        null = random_walk_pc1(rows.norm(dim=1), size, trials=999, seed=fresh_seed(generator))
        assert least < null.p_value(pca.explained_variance_ratio_[0]) <= most
        assert (null.z_score(float(pca.explained_variance_ratio_[0])) > 10) == (rows is not moves)


def test_a_sample_read_by_hand() -> None:
    null = RandomWalkNull(np.array([0.2, 0.3, 0.3, 0.6]))
    assert null.mean == pytest.approx(0.35)
    assert null.std == pytest.approx(math.sqrt((0.15**2 + 2 * 0.05**2 + 0.25**2) / 3))
    assert null.z_score(0.6) == pytest.approx(0.25 / null.std)
    assert null.p_value([0.1, 0.2, 0.25, 0.3, 0.6, 0.61]).tolist() == [1, 1, 0.8, 0.8, 0.4, 0.2]
    assert null.quantile([0, 0.5, 1]).tolist() == [0.2, 0.3, 0.6]
    for value in (null.quantile(0.5), null.p_value(0.3), null.z_score(0.3)):
        assert isinstance(value, float)
    assert math.isnan(null.p_value(math.nan))
    assert math.isnan(null.z_score(math.nan))
    assert null.p_value(1 + 1e-6) == null.p_value(1.0)
    assert "samples" not in repr(null)


def test_one_trial() -> None:
    null = random_walk_pc1([1, 1, 1], 5, trials=1)
    assert math.isnan(null.std)
    assert math.isnan(null.z_score(0.7))
    assert null.p_value(0.999) == 0.5


def test_the_seed_decides(generator: torch.Generator) -> None:
    norms = torch.rand(20, generator=generator, dtype=torch.float64)
    first, again, other = (random_walk_pc1(norms, 1000, trials=30, seed=seed) for seed in (3, 3, 4))
    assert first.samples.shape == (30,)
    assert np.all(np.diff(first.samples) >= 0)
    assert np.array_equal(first.samples, again.samples)
    assert not np.array_equal(first.samples, other.samples)
    for unit in (1e-200, 1e200):
        assert np.allclose(random_walk_pc1(norms * unit, 1000, trials=30, seed=3).samples, first.samples, rtol=1e-12)
    with pytest.raises(ValueError, match="read-only"):
        first.samples[0] = 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(step_norms=[1.0]), r"at least two steps, got \(1,\)"),
        (dict(step_norms=[]), r"at least two steps, got \(0,\)"),
        (dict(step_norms=1.0), r"at least two steps, got \(\)"),
        (dict(step_norms=np.ones((4, 8))), r"shape \(T - 1,\) .* got \(4, 8\)"),
        (dict(step_norms=[1, -0.5]), "finite and not negative"),
        (dict(step_norms=[1, math.nan]), "finite and not negative"),
        (dict(step_norms=[1, math.inf]), "finite and not negative"),
        (dict(step_norms=[0, 0, 0]), "all zero"),
        (dict(size=0), "size must be at least 1, got 0"),
        (dict(trials=0), "trials must be at least 1, got 0"),
    ],
)
def test_bad_walks(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        random_walk_pc1(**{"step_norms": [1, 1], "size": 5, "trials": 5, **arguments})


def test_sizes_are_whole_numbers() -> None:
    with pytest.raises(TypeError):
        random_walk_pc1([1, 1], 5.5)
    with pytest.raises(TypeError):
        random_walk_pc1([1, 1], 5, trials=1e3)


def test_bad_questions() -> None:
    null = random_walk_pc1([1, 1], 5, trials=5)
    for share in (-0.1, [0.5, 70.0]):  # 70 is a percentage
        with pytest.raises(ValueError, match="share must lie"):
            null.p_value(share)
        with pytest.raises(ValueError, match="share must lie"):
            null.z_score(share)
    for q in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="q must lie"):
            null.quantile(q)
