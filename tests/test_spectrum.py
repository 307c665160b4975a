"""Shares and effective ranks: spectra worked by hand, bounds that hold for all, and what bad input gets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

import grokcurv as gc
from grokcurv.analysis import eigenspectrum


def test_by_hand() -> None:
    found = eigenspectrum([1.0, 4, 0, 3])
    assert found.shares.tolist() == [0.5, 0.375, 0.125, 0]
    assert found.cumulative.tolist() == [0.5, 0.875, 1, 1]
    assert found.participation_ratio == pytest.approx(64 / 26)
    assert found.entropy_rank == pytest.approx(8 / (4**0.5 * 3**0.375))  # exp of log 8 - (4 log 4 + 3 log 3) / 8


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_equal_variances_count(count: int) -> None:
    found = eigenspectrum([0.3] * count + [0] * (count // 2))
    assert found.participation_ratio == pytest.approx(count)
    assert found.entropy_rank == pytest.approx(count)


def test_random_spectra(generator: torch.Generator) -> None:
    variances = torch.rand(20, 9, generator=generator, dtype=torch.float64) ** 4
    found = eigenspectrum(variances)
    assert np.all(np.diff(found.shares) <= 0)
    np.testing.assert_allclose(found.cumulative[:, -1], 1)
    np.testing.assert_allclose(found.entropy_rank, np.exp(stats.entropy(variances.numpy(), axis=1)))
    assert np.all(found.participation_ratio >= 1)
    assert np.all(found.participation_ratio <= found.entropy_rank)
    assert np.all(found.entropy_rank <= 9)
    for part, of_one in zip(found, eigenspectrum(variances[3] * 1e200), strict=True):
        np.testing.assert_allclose(part[3], of_one)


def test_beside_the_streaming_pca(generator: torch.Generator) -> None:
    rows = torch.randn(12, 30, generator=generator, dtype=torch.float64)
    pca = gc.StreamingPCA(n_components=11, method="gram").partial_fit(rows)
    shares = eigenspectrum(pca.explained_variance_).shares
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_.numpy(), atol=1e-12)


def test_no_variance() -> None:
    found = eigenspectrum([[0.0, 0], [1, 0]])
    assert np.isnan([*found.shares[0], *found.cumulative[0], found.participation_ratio[0], found.entropy_rank[0]]).all()
    assert found.participation_ratio[1] == found.entropy_rank[1] == 1


@pytest.mark.parametrize(
    ("variances", "said"),
    [
        ([], r"at least one component, got \(0,\)"),
        (1.0, r"shape \(\.\.\., k\) .* got \(\)"),
        ([1, -1e-9], "finite and not negative"),
        ([1, math.nan], "finite and not negative"),
        ([1, math.inf], "finite and not negative"),
    ],
)
def test_bad_variances(variances: list[float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        eigenspectrum(variances)
