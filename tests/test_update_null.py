"""The nulls of the Gram matrix of updates: against updates drawn in full, closed forms, and what bad input gets."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from grokcurv.analysis import noise_edge, update_gram_bands, update_gram_null
from grokcurv.analysis.update_null import _covariance

CHANCE = 1e-6
"""A right implementation fails a test on fresh random numbers this often."""


def fresh(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))


def simulated(
    lengths: NDArray[np.float64], size: int, beta: float, every: int, trials: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(trials, W) singular values of sums of averages of normal vectors, step by step, made as long as asked for."""
    spread = 0 if beta == 0 else math.ceil(math.log(1e-4) / math.log(beta))
    average, rows = np.zeros((trials, size)), []
    for step in range(spread + len(lengths) * every):
        average = beta * average + (1 - beta) * rng.standard_normal((trials, size))
        if step >= spread:
            if (step - spread) % every == 0:
                rows.append(np.zeros((trials, size)))
            rows[-1] += average
    updates = np.stack(rows, 1)
    updates *= lengths[:, None] / np.linalg.norm(updates, axis=2, keepdims=True)
    return np.linalg.svd(updates, compute_uv=False)


@pytest.mark.parametrize(("size", "window"), [(40, 5), (5, 5), (3, 6), (1, 3)])
@pytest.mark.parametrize(("beta", "every"), [(0.0, 1), (0.0, 3), (0.9, 1), (0.6, 4)])
def test_against_updates_drawn_in_full(
    size: int, window: int, beta: float, every: int, generator: torch.Generator
) -> None:
    rng = fresh(generator)
    lengths, trials = rng.uniform(0.5, 2.0, window), 1000
    truth = simulated(lengths, size, beta, every, trials, rng)
    null = update_gram_null(
        lengths, size, momentum=beta, every=every, trials=trials, seed=int(rng.integers(1 << 30))
    ).values
    for j in range(min(size, window)):
        # In one dimension there is one value, up to rounding, and nothing to compare the distributions of.
        assert size == 1 or stats.ks_2samp(null[f"sigma_{j + 1}"], truth[:, j]).pvalue > CHANCE
        np.testing.assert_allclose(null[f"sigma_{j + 1}"].mean(), truth[:, j].mean(), rtol=0.2)
    if size == 1:
        np.testing.assert_allclose(null["sigma_1"], np.linalg.norm(lengths), rtol=1e-12)
    if beta == 0.9 and size == 40:  # the same comparison must notice that there is momentum
        other = update_gram_null(lengths, size, trials=trials).values
        assert stats.ks_2samp(other["sigma_1"], truth[:, 0]).pvalue < CHANCE


@pytest.mark.parametrize(("beta", "every"), [(0.0, 1), (0.0, 7), (0.5, 1), (0.9, 2), (0.99, 40)])
def test_covariances_are_those_of_sums(beta: float, every: int) -> None:
    window = 4
    steps = np.arange(window * every)
    each = np.where(np.subtract.outer(steps, steps) == 0, 1.0, beta ** np.abs(np.subtract.outer(steps, steps)))
    sums = np.kron(np.eye(window), np.ones(every))
    np.testing.assert_allclose(_covariance(window, beta, every), sums @ each @ sums.T, rtol=1e-12, atol=1e-12)


def test_momentum_alone_spreads_singular_values() -> None:
    """In many dimensions the cosines are the covariances: beta = 0.9, W = 10 spread them 11.6 times."""
    null = update_gram_null(np.ones(10), 10**12, momentum=0.9, trials=20).values
    sigma = np.sqrt(np.linalg.eigvalsh(0.9 ** np.abs(np.subtract.outer(np.arange(10), np.arange(10)))))
    np.testing.assert_allclose(null["sigma_1"] / null["sigma_10"], sigma[-1] / sigma[0], rtol=1e-4)
    assert sigma[-1] / sigma[0] == pytest.approx(11.6, abs=0.05)


def test_the_edge_of_noise_and_a_signal(generator: torch.Generator) -> None:
    """Noise stays below as often as the docstring says, whatever its scale; the divisor p would have it beyond."""
    rng, size, window = fresh(generator), 400, 10
    noise = 3.0 * np.linalg.svd(rng.standard_normal((400, window, size)), compute_uv=False)
    edge = noise_edge(noise, size)
    beyond = int((noise[:, 0] > edge).sum())
    assert stats.binomtest(beyond, 400, 0.14).pvalue > 1e-4
    np.testing.assert_allclose(edge, 3.0 * (math.sqrt(size) + math.sqrt(window)), rtol=0.1)
    nu = np.sqrt((noise[:, window // 2 :] ** 2).mean(1) / size)
    assert (noise[:, 0] > nu * (math.sqrt(size) + math.sqrt(window))).mean() > 0.9
    assert noise_edge(noise[0][::-1], size) == edge[0]
    assert math.isnan(noise_edge([1.0, 0.0, 0.0, 0.0], 1))
    assert not math.isnan(noise_edge([2.0, 1.0, 0.5, 0.0], 3))


def test_bands_beside_records(generator: torch.Generator) -> None:
    rng, size, window = fresh(generator), 60, 4
    updates = rng.standard_normal((5, window, size)) * rng.uniform(1, 3, (5, window, 1))
    numbers = {"step": np.arange(7.0)}
    for name, values in (
        ("sigma", np.linalg.svd(updates, compute_uv=False)),
        ("length", np.linalg.norm(updates, axis=2)),
    ):
        for j in range(window):
            numbers[f"{name}_{j + 1}"] = np.concatenate([np.full(2, np.nan), values[:, j]])
    records = pd.DataFrame(numbers)
    bands = update_gram_bands(records, size, momentum=0.8, levels=(0.1, 0.5), trials=50)
    assert bands["step"].tolist() == [2, 3, 4, 5, 6]
    for i, row in bands.iterrows():
        own = records.iloc[int(i) + 2]
        sigma = own[[f"sigma_{j + 1}" for j in range(window)]].astype(float)
        assert row["noise_edge"] == pytest.approx(noise_edge(sigma, size))
        assert row["above_edge"] == (sigma > row["noise_edge"]).sum()
        lengths = own[[f"length_{j + 1}" for j in range(window)]].astype(float)
        for name, beta in (("independent", 0.0), ("momentum", 0.8)):
            null = update_gram_null(lengths, size, momentum=beta, trials=50)
            assert row[f"g23_{name}_0.1"] == null.quantile("g23", 0.1)
            assert row[f"rotation_1_{name}_0.5"] == null.quantile("rotation_1", 0.5)
    assert len(update_gram_bands(records.iloc[:2], size, momentum=0.9)) == 0


def test_p_values_count_the_null() -> None:
    null = update_gram_null([1.0, 2.0, 3.0], 20, trials=99)
    assert null.p_value("g23", -1.0) == 1.0
    assert null.p_value("g23", math.inf) == 0.01
    assert null.p_value("g23", null.values["g23"].max()) == 0.02
    assert np.isnan(null.p_value("g23", [math.nan, 0.0])).tolist() == [True, False]
    again = update_gram_null([1.0, 2.0, 3.0], 20, trials=99)
    assert all(np.array_equal(null.values[name], again.values[name], equal_nan=True) for name in null.values)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"lengths must have shape \(W,\) with W >= 3, got \(2,\)"):
        update_gram_null([1, 2], 5)
    for lengths in ([0, 0, 0], [1, -1, 1], [1, math.nan, 1]):
        with pytest.raises(ValueError, match="finite, not negative and not all zero"):
            update_gram_null(lengths, 5)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\), got 1"):
        update_gram_null([1, 1, 1], 5, momentum=1)
    for name in ("size", "every", "trials"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            update_gram_null([1, 1, 1], **{"size": 5, name: 0})
    null = update_gram_null([1, 1, 1], 5, trials=3)
    with pytest.raises(ValueError, match=r"column must be one of sigma_1, sigma_2.*got 'nothing'"):
        null.quantile("nothing", 0.5)
    with pytest.raises(ValueError, match=r"q must lie in 0\.\.1"):
        null.quantile("g23", 2)
    with pytest.raises(ValueError, match=r"UpdateGram\(spectrum=True\)"):
        update_gram_bands({"step": [1.0], "g23": [1.0]}, 5, momentum=0.9)
    with pytest.raises(ValueError, match=r"sigma must have shape"):
        noise_edge(1.0, 5)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        noise_edge([1.0, 2.0], 0)
