"""An engine of sweeps for tests that are not about engines: it starts no process, each of which would load torch."""

from __future__ import annotations

import contextlib
from collections import deque

from grokcurv.sweep.engine import Event, Job, execute


class Here(contextlib.AbstractContextManager["Here"]):
    """Does the runs one after the other in this process, as a worker does them in its own."""

    workers = 1

    def __init__(self, *_: object) -> None:
        self._jobs: deque[Job] = deque()

    def __exit__(self, *_: object) -> None: ...

    def start(self, job: Job) -> None:
        self._jobs.append(job)

    def wait(self, seconds: float) -> list[Event]:
        events: list[Event] = []
        if self._jobs:
            execute([self._jobs.popleft()], events.append, lambda: False)
        return events

    def interrupt(self) -> None:
        """Runs are done within :meth:`wait`: between two calls none is under way, and what waits does not begin."""
        self._jobs.clear()
