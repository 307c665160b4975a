"""Numbers that are written down on the device where they arise, and read when somebody asks: nobody waits before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CAPACITY = 1 << 14
"""Rows that an accelerator holds until they are read."""

DRAIN = 1 << 10
"""After so many rows they are sent to the host, which goes on meanwhile."""


def is_asynchronous(device: torch.device) -> bool:
    """Whether to look at a number there would mean to wait for the device."""
    return device.type != "cpu"


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph instead of being carried out."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def copy_to_host_async(t: Tensor) -> Callable[[], Tensor]:
    """A copy of ``t`` as it is now, on its way to pinned memory of the host; call what is returned to wait for it."""
    if t.device.type != "cuda":
        copied = t.detach().clone()
        return lambda: copied
    # Only to pinned memory does the copy run beside what is launched next; the event says when it has arrived, and only
    # who calls the result waits for it.
    copied = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
    copied.copy_(t.detach(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> Tensor:
        arrived.synchronize()
        return copied

    return wait


class DeviceBuffer:
    """Rows of ``width`` float64 numbers.

    On an accelerator they go to a ring of :data:`CAPACITY` rows at a place that the device counts, so that each replay
    of a captured :meth:`append` adds a row of its own.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.width, self.device = width, device
        self._read = [torch.empty(0, width, dtype=torch.float64)]
        self._drains = 0
        if is_asynchronous(device):
            self._rows = torch.zeros(CAPACITY, width, dtype=torch.float64, device=device)
            self._filled = torch.zeros(1, dtype=torch.int64, device=device)
            self._sent: list[tuple[Callable[[], Tensor], Callable[[], Tensor]]] = []
            self._stream: torch.cuda.Stream | None = None  # on which a row was written last, but for replays

    def append(self, row: Tensor) -> None:
        """Add a row (width,), float64 on the device."""
        if not is_asynchronous(self.device):
            self._read.append(row[None])
            return
        if self.device.type == "cuda" and not capturing(self.device):
            self._stream = torch.cuda.current_stream(self.device)
        # The place is counted on the device: a captured append is replayed without the host, and a count of the host's
        # would write every replay to the same row.
        self._rows.index_copy_(0, self._filled % CAPACITY, row[None])
        self._filled += 1

    def drain(self) -> None:
        """Send what there is to the host now and then, which goes on meanwhile; once for each row, outside a capture.

        That is long before the ring is full, and reading later finds most rows on the host.
        """
        self._drains += 1
        if self._drains % DRAIN == 0 and is_asynchronous(self.device):
            self._send()

    def read(self) -> Tensor:
        """All rows so far, (n, width) float64 on the host; waits for the device.

        Raises:
            RuntimeError: a captured graph was replayed more than :data:`CAPACITY` times between two readings, and rows
                were overwritten. The next reading gives those that are left.
        """
        self._receive()
        self._read = [torch.cat(self._read)]
        return self._read[0]

    def last(self) -> Tensor | None:
        """The latest row, or None; waits, and raises, as :meth:`read` does."""
        self._receive()
        return next((rows[-1] for rows in reversed(self._read) if len(rows)), None)

    def _receive(self) -> None:
        """Wait for all rows that the device has written, and keep them on the host."""
        if not is_asynchronous(self.device):
            return
        self._send()
        sent, self._sent = self._sent, []
        lost = 0
        # Where more rows came than the ring holds, the oldest were overwritten and the place of the next one is where
        # the oldest that is left begins.
        for ring, filled in sent:
            count = int(filled())
            lost += max(0, count - CAPACITY)
            rows = torch.roll(ring(), -(count % CAPACITY), 0) if count > CAPACITY else ring()[:count]
            self._read.append(rows.clone())
        if lost:
            raise RuntimeError(
                f"{lost} records were overwritten: read them at least every {CAPACITY} replays of a captured step"
            )

    def _send(self) -> None:
        """Begin to copy the ring to the host, and empty it."""
        # Whoever reads may do so on another stream than that which writes: after what was written, and before what will
        # be. Replays are ordered where they and the reading are on one stream.
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._sent.append((copy_to_host_async(self._rows), copy_to_host_async(self._filled)))
        self._filled.zero_()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
