"""How long calls take, side by side: every round times each of them once, so that a machine that drifts is fair.

On a GPU a call that returns before it has run is timed by the device: calls are queued while a kernel keeps it busy, so
that it never waits for Python, and each finds a cache that holds nothing of it. A call that keeps the host takes what
the wall clock says, its waits included.
"""

from __future__ import annotations

import math
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch

from grokcurv.training.process import threads_of

CPU = torch.device("cpu")

SAMPLE = 0.02
"""Seconds that a sample takes at least; short calls are repeated."""

ROUNDS = (3, 25)
"""Fewest and most."""

QUEUED = 20
"""Calls that are queued on a GPU at most."""

BUSY = 40_000_000
"""Clock cycles of a GPU, 20 ms or so: longer than it takes to queue as many calls that keep the host for SHORT."""

SHORT = 5e-4
"""Seconds."""

CACHE = 256 << 20
"""Bytes after whose writing a GPU's cache holds nothing else."""

Clock = Callable[[Callable[[], object], int], float]
"""Seconds of a call, by so many of them."""


@dataclass(frozen=True)
class Times:
    """Seconds a call, by round."""

    samples: tuple[float, ...]
    calls: int
    """In a sample."""

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(low), float(high)

    def over(self, other: Times) -> Times:
        """Ratios to the sample of the same round."""
        return Times(tuple(x / y for x, y in zip(self.samples, other.samples, strict=True)), self.calls)

    def scaled(self, factor: float) -> Times:
        return Times(tuple(factor * x for x in self.samples), self.calls)


def interleaved(runs: Sequence[Callable[[], object]], budget: float, device: torch.device = CPU) -> list[Times]:
    """Time calls in rounds that take ``budget`` seconds or so together, forwards and backwards in turn.

    Calls before, which warm up and count for nothing, say how often to repeat each. The garbage collector rests.
    """
    samples: list[list[float]] = [[] for _ in runs]
    clocks, first = zip(*(_first(run, device) for run in runs), strict=True)
    calls = [max(1, math.ceil(SAMPLE / max(seconds, 1e-7))) for seconds in first]
    calls = [min(n, QUEUED) if clock is not _wall else n for n, clock in zip(calls, clocks, strict=True)]
    a_round = sum(n * seconds for n, seconds in zip(calls, first, strict=True))
    for turn in range(min(max(int(budget / a_round), ROUNDS[0]), ROUNDS[1])):
        for i in range(len(runs))[:: (-1) ** turn]:
            samples[i].append(clocks[i](runs[i], calls[i]))
    return [Times(tuple(times), n) for times, n in zip(samples, calls, strict=True)]


def _first(run: Callable[[], object], device: torch.device) -> tuple[Clock, float]:
    """What times the call, and its seconds, of the second where that does not take long: the first may load."""
    if device.type == "cuda":
        _on_wall(run, 1)
        clock = _on_device if _wall(run, 1) < SHORT else _on_wall
        return clock, clock(run, 1)
    seconds = _wall(run, 1)
    return _wall, seconds if seconds > 25 * SAMPLE else _wall(run, 1)


def _wall(run: Callable[[], object], calls: int) -> float:
    """The mean; timeit keeps the garbage collector off meanwhile."""
    return timeit.timeit(run, number=calls, timer=time.perf_counter) / calls


def _on_wall(run: Callable[[], object], calls: int) -> float:
    """Of calls to the GPU, until it has done what they asked for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    _wall(run, calls)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _on_device(run: Callable[[], object], calls: int) -> float:
    """By the GPU's own clock, each call alone."""
    scratch = torch.empty(CACHE, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]

    def queue() -> None:
        torch.cuda._sleep(BUSY)
        for start, stop in events:
            scratch.zero_()
            start.record()
            run()
            stop.record()

    _wall(queue, 1)  # no garbage is collected in it
    torch.cuda.synchronize()
    milliseconds = float(sum(start.elapsed_time(stop) for start, stop in events))
    return milliseconds / 1e3 / calls


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch, and, where threadpoolctl is there, for every BLAS and OpenMP that is loaded."""
    with ExitStack() as stack:
        with suppress(ImportError):
            from threadpoolctl import threadpool_limits

            stack.enter_context(threadpool_limits(count))
        stack.enter_context(threads_of(count))
        yield
