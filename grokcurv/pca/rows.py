"""The rows of a trajectory, kept in pages: in memory or in a scratch file, and never moved when more arrive."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np
import torch
from torch import Tensor

PAGE_BYTES = 1 << 26
PAGE_ROWS = 64


class Rows:
    """Rows of ``size`` numbers in pages of up to 64 rows or 64 MiB, whichever is less, but at least one row.

    With several runs in a row 64 MiB for each, so that it has the pages, and the order of sums over them, of one run.

    Args:
        size: length of a row.
        dtype, device: of the rows.
        scratch: a folder; the pages are then memory-mapped from a nameless file in it, which is gone when the process
            is. Disk is reserved page by page: a full one is an ``OSError``, and the rows are then what they were.
        runs: how many runs share a row.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, scratch: str | None, runs: int = 1) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.row_bytes = size * dtype.itemsize
        self.page_rows = max(1, min(PAGE_ROWS, PAGE_BYTES // max(1, self.row_bytes // runs)))
        self._pages: list[Tensor] = []
        self._count = 0
        self._file: IO[bytes] | None = None
        if scratch is not None:
            if device.type != "cpu":
                raise ValueError(f"scratch holds rows of CPU tensors, got rows on {device}")
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 (it lives as long as the pages)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Tensor:
        page, row = divmod(number, self.page_rows)
        return self._pages[page][row]

    def pages(self) -> Iterator[tuple[int, Tensor]]:
        """The number of the first row of each page, and the page (n_i, size), in order."""
        for start, page in zip(range(0, self._count, self.page_rows), self._pages, strict=False):
            yield start, page[: self._count - start]

    def reserve(self, count: int) -> None:
        """Room for so many rows in all."""
        while len(self._pages) * self.page_rows < count:
            self._pages.append(self._new_page())

    def append(self, rows: Tensor) -> None:
        self.reserve(self._count + len(rows))
        while len(rows):
            page, row = divmod(self._count, self.page_rows)
            taken = min(len(rows), self.page_rows - row)
            self._pages[page][row : row + taken] = rows[:taken]
            self._count += taken
            rows = rows[taken:]

    def keep(self, numbers: list[int]) -> None:
        """Drop all rows but these, which ascend."""
        for to, number in enumerate(numbers if self._pages else ()):
            self[to].copy_(self[number])
        self._count = len(numbers)

    def release(self) -> None:
        """Give their memory back; how many there are is still known."""
        self._pages, self._file = [], None

    def _new_page(self) -> Tensor:
        """Room for more rows: in memory, or mapped from the scratch file."""
        shape = (self.page_rows, self.size)
        if self._file is None or not self.row_bytes:
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        start, length = len(self._pages) * self.page_rows * self.row_bytes, self.page_rows * self.row_bytes
        os.posix_fallocate(self._file.fileno(), start, length)  # or a full disk would be a SIGBUS later
        mapped = np.memmap(self._file, np.uint8, "r+", offset=start, shape=(length,))
        return torch.from_numpy(mapped).view(self.dtype).view(shape)
