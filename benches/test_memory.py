"""The memory that StreamingPCA takes; its speed is a case of ``grokcurv bench``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from grokcurv.bench.check import available_memory

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
def test_peak_memory(note: Callable[[str], None], size: int, k: int, shrink: int) -> None:
    """In vectors of P, beyond the row itself: a block and three rows, then everything read."""
    size //= shrink
    if 50 * 4 * size > available_memory():  # the largest case would be killed for memory, or measure the swap
        pytest.skip(f"{size} coordinates need {50 * 4 * size / 2**30:.0f} GiB")
    done = subprocess.run([sys.executable, "-c", PEAK, str(size), str(k)], capture_output=True, text=True, check=True)
    kept, vector, allowed = map(int, done.stdout.split())
    note(
        f"P = {size}, k = {k}: {kept / 2**30:.2f} GiB = {kept / vector:.1f} vectors of P; "
        f"2 (k + oversampling) + block + 2 = {allowed}"
    )
    assert kept <= allowed * vector or shrink > 1
