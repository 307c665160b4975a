"""How long a call takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def fastest(run: Callable[[], object], rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
