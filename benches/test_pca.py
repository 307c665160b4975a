"""StreamingPCA beside what people use today: NumPy's SVD, scikit-learn's IncrementalPCA; one thread, one run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from clock import fastest
from sklearn.decomposition import IncrementalPCA
from test_kernels import DEMO, one_thread  # noqa: F401
from torch import Tensor

import grokcurv as gc

Note = Callable[[str], None]


def walk(rows: int, size: int) -> Tensor:
    """A trajectory (rows, size): a random walk with drift, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    drift = torch.randn(size, generator=generator)
    x = torch.empty(rows, size)
    place = 20 * torch.randn(size, generator=generator)
    for row in x:
        place += torch.randn(size, generator=generator) + 0.3 * drift
        row.copy_(place)
    return x


def svd_variances(x: Tensor) -> np.ndarray:
    """Variances along all components of the rows, in float64."""
    rows = x.double().numpy()
    return np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2 / (len(rows) - 1)


def centred_svd(x: np.ndarray) -> np.ndarray:
    """What a script does: the rows about their mean, and NumPy's SVD."""
    return np.linalg.svd(x - x.mean(0), full_matrices=False)[1]


def test_prefix_history(note: Note) -> None:
    """300 rows of one 128 x 128 matrix: PC1 % of every prefix, and of the whole."""
    x = walk(300, 128 * 128)
    rows = x.numpy()

    def whole() -> gc.StreamingPCA:
        pca = gc.StreamingPCA(n_components=2, method="gram").partial_fit(x)
        assert pca.explained_variance_ratio_[0] > 0
        return pca

    def history() -> Tensor:
        return whole().pc1_history_

    ten = range(30, 301, 30)
    sampled = {size: fastest(lambda size=size: centred_svd(rows[:size]), rounds=1) for size in ten}
    # Between the sampled prefixes by straight lines; those below the first cost nothing.
    naive_history = float(np.interp(np.arange(2, 301), list(ten), list(sampled.values()), left=0.0).sum())
    once, every = fastest(whole, rounds=3), fastest(history, rounds=2)
    one = sampled[300]
    note(f"final answer {once * 1e3:.0f} ms, one centred NumPy SVD {one * 1e3:.0f} ms = {one / once:.1f}x")
    note(f"every prefix {every:.2f} s, one SVD per prefix {naive_history:.1f} s = {naive_history / every:.0f}x")
    assert one >= 8 * once
    assert naive_history >= 40 * every


def test_incremental(note: Note) -> None:
    """400 rows of the demo's whole model, 8 components, row by row."""
    k, x = 8, walk(400, DEMO)
    truth = svd_variances(x)[:k]

    def ours() -> gc.StreamingPCA:
        pca = gc.StreamingPCA(n_components=k, method="incremental")
        for row in x:
            pca.partial_fit(row)
        return pca

    def theirs() -> IncrementalPCA:
        pca = IncrementalPCA(n_components=k, batch_size=3 * k)
        return pca.fit(x.numpy())

    pca, reference = ours(), theirs()
    variances = (pca.explained_variance_.numpy(), reference.explained_variance_)
    errors = [np.abs(variance - truth).max() / truth[0] for variance in variances]
    mine, scikit = fastest(ours, rounds=2), fastest(theirs, rounds=1)
    note(f"{mine:.2f} s, scikit-learn {scikit:.2f} s = {scikit / mine:.1f}x; errors {errors[0]:.1e}, {errors[1]:.1e}")

    # What must be moved for a block of b rows: each row read, with the first, and stored; the basis and the block read
    # for the Gram matrix; both read, the basis and the sum written for the rotation. And what must be computed.
    rank, block, vector = k + pca.oversampling, pca.block, 4 * DEMO
    rows = rank + 1 + block
    moved = (3 * block + rows + rows + rank + 4) * vector
    flops = (rows * (rows + 1) + 2 * rank * rows) * DEMO
    source = torch.ones(moved // 8)
    target = torch.empty_like(source)
    copying, row = fastest(lambda: target.copy_(source)) / block, mine / len(x)
    note(
        f"a row {row * 1e3:.2f} ms: {moved / block / 1e6:.1f} MB, copied in {copying * 1e3:.2f} ms = "
        f"{row / copying:.1f}x; {flops / block / 1e6:.1f} Mflop in float64, {flops / block / row / 1e9:.0f} Gflop/s"
    )
    assert scikit >= 8 * mine
    assert errors[0] <= errors[1]


def available() -> int:
    """Bytes of memory that are free, or can be made so."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


PEAK = """
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


@pytest.mark.parametrize(("size", "k"), [(4_000_000, 8), (4_000_000, 32), (100_000_000, 4)])
def test_peak_memory(note: Note, size: int, k: int) -> None:
    """In vectors of P, beyond the row itself: a block and three rows, then everything read."""
    if 50 * 4 * size > available():  # the largest case would be killed for memory, or measure the swap
        pytest.skip(f"{size} coordinates need {50 * 4 * size / 2**30:.0f} GiB")
    done = subprocess.run([sys.executable, "-c", PEAK, str(size), str(k)], capture_output=True, text=True, check=True)
    kept, vector, allowed = map(int, done.stdout.split())
    note(
        f"P = {size}, k = {k}: {kept / 2**30:.2f} GiB = {kept / vector:.1f} vectors of P; "
        f"2 (k + oversampling) + block + 2 = {allowed}"
    )
    assert kept <= allowed * vector
