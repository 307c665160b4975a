"""StreamingPCA, method incremental: what is cut off only loses, and is measured; shrinkage bounds it beforehand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from test_pca import FLOATS, assert_within_bound, spoilt, svd, trajectory, variances
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from grokcurv.bench.check import available_memory
from grokcurv.pca import StreamingPCA

SPECTRA = ("decaying", "flat", "deficient", "spiked")


def incremental(k: int = 3, **options: Any) -> StreamingPCA:
    return StreamingPCA(k, "incremental", **options)


def rows_with(spectrum: str, n: int, p: int, generator: Generator) -> Tensor:
    """(n, p) float64, away from the origin."""
    x = torch.randn(n, p, generator=generator, dtype=torch.float64)
    place = torch.arange(p, dtype=torch.float64)
    scales = {
        "decaying": 0.7**place,
        "flat": torch.ones(p),
        "deficient": (place < 4).double(),
        "spiked": torch.where(place < 2, 30.0, 1.0),
    }
    turn = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q
    return x * scales[spectrum] @ turn + 3 * torch.randn(p, generator=generator, dtype=torch.float64)


def squares(x: Tensor) -> float:
    """Of the distances from the first row."""
    return float((x.double() - x[0].double()).square().sum())


def rounding(x: Tensor) -> float:
    """Bound on the error of the trace of the scatter by rounding.

    A row about the first one is off by a unit u of its length, and so is the mean that is taken from it, at most as
    long as the longest. By Cauchy and Schwarz the trace T is then off by 2 u sqrt(T) (sqrt(F) + sqrt(n) f) at most, F
    the sum and f^2 the largest of the squared distances; T <= F. Beside it the float64 sums.
    """
    unit = 2.0**-53 if x.dtype == torch.float64 else 2.0**-24
    far = squares(x)
    longest = float((x.double() - x[0].double()).square().sum(1).max())
    loss = 2 * unit * far**0.5 * (far**0.5 + (len(x) * longest) ** 0.5)
    return 1.01 * loss + (x.shape[1] + 20 * len(x)) * 2.0**-52 * (far + len(x) * longest)


# The certificate


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_variances_are_within_the_bound_and_lose_only(spectrum: str, dtype: torch.dtype, generator: Generator) -> None:
    for n, p, block, oversampling, shrinkage in (
        (40, 30, 1, 0, False),
        (41, 30, 2, 1, True),
        (60, 30, 5, 0, False),
        (60, 30, 5, 3, True),
        (43, 300, 7, 8, False),
        (200, 12, None, 2, False),
        (9, 30, 64, 4, False),  # never full
    ):
        x = rows_with(spectrum, n, p, generator).to(dtype)
        pca = incremental(block=block, oversampling=oversampling, shrinkage=shrinkage).partial_fit(x)
        assert_within_bound(pca, x)
        slack = rounding(x) / (n - 1) + 1e-12 * variances(x, 1)[0]
        assert (pca.explained_variance_.numpy() <= variances(x, 3) + slack).all()  # they lose, and never gain
        assert abs(pca.total_variance_.item() - svd(x)[0].sum()) <= slack
        assert pca.explained_variance_.sum() <= pca.total_variance_ + slack


def test_the_bound_is_that_of_gram_where_nothing_is_cut_off(generator: Generator) -> None:
    """Rank 4, a basis of 5: the bound is rounding alone, and the variances are as good."""
    x = rows_with("deficient", 80, 100, generator)
    pca = incremental(block=6, oversampling=2).partial_fit(x)
    np.testing.assert_allclose(pca.explained_variance_, variances(x, 3), rtol=1e-10)
    assert pca.error_bound_ < 1e-10 * pca.total_variance_
    narrow = incremental(block=6, oversampling=2).partial_fit(x.float())
    assert_within_bound(narrow, x.float())
    assert narrow.error_bound_ < 1e-5 * narrow.total_variance_


def test_the_bound_shows_that_something_was_cut_off(generator: Generator) -> None:
    """Of a flat spectrum a small basis must lose, and says so."""
    x = rows_with("flat", 200, 50, generator)
    pca = incremental(block=5, oversampling=0).partial_fit(x)
    lost = variances(x, 3)[0] - pca.explained_variance_[0].item()
    assert 0.01 * variances(x, 1)[0] < lost <= pca.error_bound_.item()


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("order", ["random", "growing", "sorted"])
def test_shrinkage_keeps_the_bound_of_frequent_directions(spectrum: str, order: str, generator: Generator) -> None:
    """error <= (variance outside the leading j directions) / (r + 1 - j), for every j <= r and any order of rows."""
    for block, oversampling in ((1, 0), (5, 4), (20, 7)):
        x = rows_with(spectrum, 80, 30, generator)
        if order == "growing":
            x *= torch.logspace(-2, 3, 80, dtype=torch.float64)[:, None]
        elif order == "sorted":
            x = x[x[:, 0].argsort()]
        pca = incremental(block=block, oversampling=oversampling, shrinkage=True).partial_fit(x)
        exact, rank = svd(x)[0], 3 + oversampling
        known = min(exact[j:].sum() / (rank + 1 - j) for j in range(rank + 1))
        # Rounding as in gram: of sums of 30 products and of a solver that is right to 1e-12, once in every fold.
        slack = 1e-12 * (80 / block + 1) * 2 * squares(x) / 79
        assert pca.error_bound_.item() <= known + slack
        losses = exact[:3] - pca.explained_variance_.numpy()
        assert (losses <= known + slack).all()
        assert (losses >= -slack).all()


@pytest.mark.parametrize("shrinkage", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trajectories_far_from_the_origin(dtype: torch.dtype, shrinkage: bool, generator: Generator) -> None:
    """Drift and a falling spectrum: two variances to a per mille, and the leading direction to a per cent."""
    x = trajectory(120, 2000, generator, torch.float64)
    x = (1000 + x).to(dtype)
    pca = incremental(2, oversampling=30, block=20, shrinkage=shrinkage).partial_fit(x)
    assert_within_bound(pca, x)
    exact, directions = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, exact[:2], rtol=1e-3 if not shrinkage else 3e-2)
    cosines = np.abs((pca.components_.double().numpy() * directions[:2]).sum(1))
    np.testing.assert_allclose(cosines, 1, atol=1e-2)
    assert abs(pca.total_variance_.item() - exact.sum()) <= rounding(x) / 119


def test_the_components_hold_what_the_variances_say(generator: Generator) -> None:
    """At least the sum of the variances less k times the bound; and no k directions hold more than that much above."""
    for spectrum in SPECTRA:
        x = rows_with(spectrum, 100, 40, generator)
        pca = incremental(block=7, oversampling=2).partial_fit(x)
        held = ((x - x.mean(0)) @ pca.components_.T).square().sum().item() / 99
        said, margin = pca.explained_variance_.sum().item(), 3 * pca.error_bound_.item()
        assert said - margin <= held <= said + margin
        assert variances(x, 3).sum() <= said + margin


# Mean and total


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_mean_is_that_of_the_rows(dtype: torch.dtype, generator: Generator) -> None:
    """Rows are rounded once as they arrive, as distances from the first; their sum is float64; the mean is rounded."""
    for n in (3, 5, 64, 333):
        x = (50 + rows_with("spiked", n, 20, generator)).to(dtype)
        pca = incremental(block=5).partial_fit(x)
        exact, unit = x.double().mean(0), 2.0**-53 if dtype == torch.float64 else 2.0**-24
        far = (x.double() - x[0].double()).abs().mean(0)
        assert ((pca.mean_.double() - exact).abs() <= 1.01 * unit * (far + exact.abs()) + n * 2.0**-53 * 200).all()


def test_the_total_does_not_depend_on_what_was_cut_off(generator: Generator) -> None:
    x = rows_with("flat", 60, 40, generator)
    little, much = (incremental(block=6, oversampling=extra).partial_fit(x) for extra in (0, 30))
    torch.testing.assert_close(little.total_variance_, much.total_variance_, rtol=1e-13, atol=0)
    assert torch.equal(little.mean_, much.mean_)
    assert little.explained_variance_[0] < much.explained_variance_[0]


def test_a_long_run_does_not_drift(generator: Generator) -> None:
    """5000 rows in 313 folds; the spectrum falls below what float32 can hold within the basis."""
    x = rows_with("decaying", 5000, 50, generator).float()
    pca = incremental(block=16, oversampling=8)
    for rows in x.split(500):
        pca.partial_fit(rows)
    assert_within_bound(pca, x)
    exact = svd(x)[0]
    assert abs(pca.total_variance_.item() - exact.sum()) <= rounding(x) / 4999
    # 11 of 50 directions are kept: the rest is 0.7^22 = 4e-4 of the largest, and of that a fold loses a share.
    np.testing.assert_allclose(pca.explained_variance_, exact[:3], rtol=1e-3)
    products = pca.components_.double() @ pca.components_.double().T
    torch.testing.assert_close(products, torch.eye(3).double(), rtol=0, atol=1e-6)
    error = (pca.mean_.double() - x.double().mean(0)).abs()
    assert (error <= 2.0**-23 * ((x - x[0]).abs().mean(0) + x.abs().mean(0))).all()


def test_one_row_far_away_harms_no_other(generator: Generator) -> None:
    """A first row a thousand times as far: everything is measured about it, and the bound says what that costs."""
    x = rows_with("decaying", 60, 30, generator).float()
    x[0] *= 1e3
    pca = incremental(block=5, oversampling=20).partial_fit(x)
    assert_within_bound(pca, x)
    assert pca.error_bound_ < 1e-4 * pca.explained_variance_[0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merges_are_within_their_bound(dtype: torch.dtype, generator: Generator) -> None:
    """Also of parts whose means are far apart or nearly the same, and of their merges."""
    for apart in (0.0, 1e-3, 1.0, 1e3):
        x = rows_with("decaying", 64, 40, generator)
        x[20:45] += apart * torch.randn(40, generator=generator, dtype=torch.float64)
        x = x.to(dtype)
        first, second, third = (
            incremental(block=6, oversampling=4).partial_fit(part) for part in x.split([20, 25, 19])
        )
        assert_within_bound(first.merge(second), x[:45])
        assert_within_bound(first.merge(third), x)
        assert abs(first.total_variance_.item() - svd(x)[0].sum()) <= 3 * rounding(x) / 63


@pytest.mark.parametrize("swap", [False, True])
def test_merging_parts_that_were_measured_from_far_away(swap: bool, generator: Generator) -> None:
    """The first row of one is far from its others, so that their mean has few digits; the other's is near them."""
    for _ in range(20):
        near, away = torch.randn(2, 30, 4, generator=generator)
        away[0] += 1e4
        parts = (away, near) if swap else (near, away)
        merged, other = (incremental(k=4, oversampling=4, block=30).partial_fit(part) for part in parts)
        assert_within_bound(merged.merge(other), torch.cat(parts))


# The device is never waited for


class Recorder(TorchDispatchMode):
    """Notes the calls, and refuses those that bring a number to the host or one from it."""

    WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "unique", "masked_select", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = [i for a in args if isinstance(a, list | tuple) for i in a if isinstance(i, Tensor)]
        if name in self.WAITS or (name == "index" and any(i.dtype == torch.bool for i in boolean)):
            raise AssertionError(f"{func} would wait for the device")
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shrinkage", [False, True])
@pytest.mark.parametrize("segments", [None, [(0, 30), (40, 20)]], ids=["whole", "segments"])
def test_a_block_makes_the_same_calls_whatever_it_holds_and_never_waits(
    segments: list[tuple[int, int]] | None,
    shrinkage: bool,
    monkeypatch: pytest.MonkeyPatch,
    generator: Generator,
) -> None:
    monkeypatch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)
    x = trajectory(24, 60, generator)
    blocks = [
        x[6:12],
        torch.zeros(6, 60),
        x[5:6].expand(6, 60).contiguous(),
        spoilt(x[6:12], 0, 3, 5),
        torch.full((6, 60), torch.nan),
        1e-30 * x[12:18],
    ]
    calls = []
    for block in blocks:
        pca = incremental(block=6, oversampling=2, segments=segments, shrinkage=shrinkage).partial_fit(x[:6])
        folds = int(pca._method.folds)
        with Recorder() as recorder:
            pca.partial_fit(block)
        assert pca._method.folds == folds + 1
        calls.append(recorder.calls)
    assert len(calls[0]) > 50
    for other in calls[1:]:
        assert other == calls[0]


def test_a_block_leaves_everything_where_it_was(generator: Generator) -> None:
    """As a captured graph would need it: what one block writes is what the next one reads."""
    x = trajectory(24, 60, generator)
    pca = incremental(block=6).partial_fit(x[:7])
    method = pca._method
    names = ("rows", "origin", "sum", "count", "valid", "total", "lost", "rounding")
    places = [getattr(method, name).data_ptr() for name in names]
    pca.partial_fit(x[7:])
    assert method.folds == 4
    assert [getattr(method, name).data_ptr() for name in names] == places


def test_rows_of_a_replay_reach_every_result(generator: Generator) -> None:
    pca = incremental(block=4).partial_fit(trajectory(8, 30, generator))
    before = pca.components_, pca.mean_
    pca._replays = True  # as a captured call sets it, whose replays go past partial_fit
    assert pca._method is not None
    pca._method.append(trajectory(4, 30, generator))
    for old, new in zip(before, (pca.components_, pca.mean_), strict=True):
        assert not torch.equal(old, new)


MEMORY = """
import sys, torch, grokcurv as gc
torch.set_num_threads(1)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
size, k = int(sys.argv[1]), int(sys.argv[2])
gc.StreamingPCA(k, "incremental").partial_fit(torch.randn(100, 1000)).components_  # loads what there is to load
row = torch.randn(size)
open("/proc/self/clear_refs", "w").write("5")  # forgets the peak so far
before = peak()
pca = gc.StreamingPCA(k, "incremental")
for _ in range(pca.block + 3):
    row += 0.1
    row[:1000].normal_()
    pca.partial_fit(row)
pca.components_, pca.explained_variance_, pca.mean_
print(peak() - before, row.nbytes, 2 * (k + pca.oversampling) + pca.block + 2)
"""


@pytest.mark.parametrize(
    ("size", "k"), [(1_000_000, 8), (1_000_000, 32), pytest.param(100_000_000, 4, marks=pytest.mark.long)]
)
def test_memory_of_all_it_keeps(size: int, k: int) -> None:
    """In vectors of P, beyond the row itself: a block and three rows, then everything read."""
    if 50 * 4 * size > available_memory():  # the largest would be killed for memory, or measure the swap
        pytest.skip(f"{size} coordinates need {50 * 4 * size / 2**30:.0f} GiB")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(size), str(k)], capture_output=True, text=True, check=True)
    kept, vector, allowed = map(int, done.stdout.split())
    assert kept <= allowed * vector
