"""How long calls take, side by side: every round times each of them once, so that a machine that drifts is fair."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

SAMPLE = 0.02
"""Seconds that a sample takes at least; short calls are repeated."""

ROUNDS = (3, 25)
"""Fewest and most."""


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


def interleaved(runs: Sequence[Callable[[], object]], budget: float) -> list[Times]:
    """Time calls in rounds that take ``budget`` seconds or so together, forwards and backwards in turn.

    A call before, which warms up and counts for nothing, says how often to repeat it. The garbage collector rests.
    """
    samples: list[list[float]] = [[] for _ in runs]
    with _no_garbage():
        first = [_first(run) for run in runs]
        calls = [max(1, math.ceil(SAMPLE / max(seconds, 1e-7))) for seconds in first]
        a_round = sum(n * seconds for n, seconds in zip(calls, first, strict=True))
        rounds = min(max(int(budget / a_round), ROUNDS[0]), ROUNDS[1])
        for turn in range(rounds):
            order = range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs)))
            for i in order:
                samples[i].append(_seconds(runs[i], calls[i]))
    return [Times(tuple(times), n) for times, n in zip(samples, calls, strict=True)]


def _first(run: Callable[[], object]) -> float:
    """Seconds of a call, of the second where that does not take long: the first may load and allocate."""
    seconds = _seconds(run, 1)
    return seconds if seconds > 25 * SAMPLE else _seconds(run, 1)


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


@contextmanager
def _no_garbage() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
