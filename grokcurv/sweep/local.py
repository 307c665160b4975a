"""The engine of one machine: worker processes of one thread each, started when needed and used for many runs.

The driver sends a worker groups of jobs over a connection, and the worker sends events back. None instead of a group,
or the end of the connection, which is what a driver leaves behind when it is killed, means: write a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from multiprocessing import connection
from pathlib import Path
from typing import BinaryIO

from grokcurv.storage import RunError, open_file
from grokcurv.sweep.engine import LEAVE_SECONDS, Event, Job, execute
from grokcurv.training.trainer import together

READY = Event("", "progress")
"""What a worker says when it has loaded everything."""

MAX_STARTUP_FAILURES = 3
"""Workers in a row that may die before they are ready."""


class LocalEngine(contextlib.AbstractContextManager["LocalEngine"]):
    """Worker processes on this machine.

    Args:
        workers: how many at most; the CPUs this process may use if None.
        together: how many runs of one architecture a worker does at a time, as one program.
        log: file that takes what the workers print.

    Raises:
        RunError: in :meth:`wait`, when workers die before they can do anything.
    """

    def __init__(self, workers: int | None, log: Path, together: int = 1) -> None:
        self.processes = workers or len(os.sched_getaffinity(0))
        self.together = together
        self.workers = self.processes * together
        self.log = log
        self._jobs: deque[Job] = deque()
        self._dropped: list[Event] = []  # of jobs that no worker had yet, when all were interrupted
        self._crew: list[_Worker] = []
        self._deaths_at_birth = 0

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.interrupt()
        for worker in self._crew:
            if kind is not None and issubclass(kind, KeyboardInterrupt):
                worker.process.kill()
            try:
                worker.process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def start(self, job: Job) -> None:
        self._jobs.append(job)
        self._assign()

    def wait(self, seconds: float) -> list[Event]:
        events, self._dropped = self._dropped, []
        patience = 0.0 if events else seconds
        while speaking := connection.wait([worker.connection for worker in self._crew], patience):
            patience = 0.0
            for worker in [worker for worker in self._crew if worker.connection in speaking]:
                events += self._hear(worker)
        return events

    def interrupt(self) -> None:
        for worker in self._crew:
            worker.leave()
        self._dropped += [Event(job.run, "interrupted") for job in self._jobs]
        self._jobs.clear()

    def _hear(self, worker: _Worker) -> list[Event]:
        """What the driver is to know of what a worker says next."""
        try:
            event: Event = worker.connection.recv()
        except (EOFError, OSError):  # it is dead, or was killed while it spoke
            return self._reap(worker)
        if event == READY:
            worker.ready, self._deaths_at_birth = True, 0
        elif event.kind != "progress":
            worker.jobs = [job for job in worker.jobs if job.run != event.run]
        self._assign()
        return [] if event == READY else [event]

    def _reap(self, worker: _Worker) -> list[Event]:
        """Remove a worker process that has ended; the jobs that it had have died with it."""
        self._crew.remove(worker)
        worker.connection.close()
        code = worker.process.wait()
        if not worker.ready and not worker.left:
            self._deaths_at_birth += 1
            if self._deaths_at_birth >= MAX_STARTUP_FAILURES:
                raise RunError(f"worker processes do not start (exit status {code}): {self.log} says more")
        self._assign()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return [Event(job.run, "died", reason=f"its worker process {how}") for job in worker.jobs]

    def _assign(self) -> None:
        """Give jobs to workers that are free; start workers while there are too few."""
        for worker in self._crew:
            if self._jobs and worker.ready and not worker.jobs:
                worker.give(self._group())
        unready = sum(not worker.ready for worker in self._crew)
        wanted = -(-len(self._jobs) // self.together)
        for _ in range(min(wanted - unready, self.processes - len(self._crew))):
            self._crew.append(_Worker(self.log))

    def _group(self) -> list[Job]:
        """The first job and those further ones that can be done together with it."""
        first = self._jobs.popleft()
        alike = [job for job in self._jobs if together(first.config, job.config)]
        group = [first, *alike[: self.together - 1]]
        self._jobs = deque(job for job in self._jobs if job not in group)
        return group


class _Worker:
    """The driver's end of a worker process."""

    def __init__(self, log: Path) -> None:
        self.ready, self.left = False, False
        self.jobs: list[Job] = []
        self.connection, theirs = connection.Pipe()
        # It imports what this process imports, wherever that came from.
        imported = [path or os.getcwd() for path in sys.path]
        with theirs, contextlib.ExitStack() as stack:
            printed: BinaryIO | int = subprocess.DEVNULL
            with contextlib.suppress(OSError):  # a full disk is the runs' to report
                printed = stack.enter_context(open_file(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from grokcurv.sweep.local import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(imported)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a terminal's Ctrl-C goes to the driver alone
            )

    def give(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self._send(jobs)

    def leave(self) -> None:
        self.left = True
        self._send(None)

    def _send(self, message: list[Job] | None) -> None:
        with contextlib.suppress(OSError):  # it is dead: who listens to it finds out too
            self.connection.send(message)


def serve(descriptor: int) -> None:
    """A worker process from beginning to end; the connection to its driver has this number."""
    driver = connection.Connection(descriptor)

    def report(event: Event) -> None:
        with contextlib.suppress(OSError):  # the driver is dead: poll finds out too
            driver.send(event)

    report(READY)
    with contextlib.suppress(EOFError, OSError):
        while jobs := driver.recv():
            execute(jobs, report, driver.poll)  # while it is at work, whatever comes means that it is to end
    os._exit(0)  # nothing is left to write
