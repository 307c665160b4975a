"""What an engine is, and what its workers do with a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from grokcurv.storage import RunError, holder
from grokcurv.training import TrainConfig, train_ensemble

REPORT_SECONDS = 0.5
"""Seconds between two reports of a run under way."""

LEAVE_SECONDS = 30.0
"""How long workers may take to write their checkpoints and end."""

PATIENCE_SECONDS = 60.0
"""How long to wait for a worker of a driver that died to let go of a run."""


@dataclass(frozen=True)
class Job:
    """A run to do."""

    run: str
    """Its id."""
    config: TrainConfig
    """The settings."""
    folder: str
    """Where it goes, or goes on."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run."""

    run: str
    kind: Literal["progress", "finished", "failed", "interrupted", "died"]
    """All but ``progress`` end the job; ``died`` is said by the engine: the process that had the run is no more."""
    latest: dict[str, Any] | None = None
    """What ``train`` reported last."""
    reason: str = ""
    """Why it failed or died."""
    final: bool = False
    """Whether it would fail in the same way again."""


class Engine(AbstractContextManager["Engine"], Protocol):
    """Runs jobs elsewhere. Leaving it ends the workers: at once after Ctrl-C, else after they wrote checkpoints."""

    workers: int
    """Tasks at a time; the driver starts no more."""

    def start(self, job: Job) -> None: ...

    def wait(self, seconds: float) -> list[Event]:
        """What happened since the last call; waits for something to happen, but not longer than ``seconds``."""

    def interrupt(self) -> None:
        """Have every job write its checkpoint and end; :meth:`wait` tells when they have. Nothing starts after it."""


def execute(jobs: Sequence[Job], report: Callable[[Event], object], stop: Callable[[], bool]) -> None:
    """Do runs of one architecture, or go on with them, as one program in the main thread of a worker.

    Args:
        jobs: one or several.
        report: is told of the progress, and how each run ended.
        stop: whether to write checkpoints and end, asked every few steps.
    """
    latest: list[dict[str, Any] | None] = [None] * len(jobs)
    reported = [0.0] * len(jobs)
    running = dict(enumerate(jobs))
    stopping = False

    def on_progress(place: int, news: dict[str, Any]) -> None:
        nonlocal stopping
        latest[place] = news
        if time.monotonic() - reported[place] >= REPORT_SECONDS:
            reported[place] = time.monotonic()
            report(Event(jobs[place].run, "progress", news))
        if not stopping and stop():
            stopping = True
            signal.raise_signal(signal.SIGINT)  # what trains takes it for Ctrl-C: a checkpoint, then KeyboardInterrupt

    def on_end(place: int, status: str) -> None:
        run = running.pop(place).run
        if status == "finished":
            report(Event(run, "finished", latest[place]))
        else:
            # Weights that are not finite would be so again; a disk need not be full again.
            final = "cannot write" not in status
            report(Event(run, "failed", latest[place], status.removeprefix("failed: "), final))

    try:
        _wait_for_folders(jobs, stop)
        configs, folders = [job.config for job in jobs], [job.folder for job in jobs]
        train_ensemble(configs, outs=folders, resume=True, on_progress=on_progress, on_end=on_end)
    except BaseException as error:
        for place, job in running.items():
            report(_stopped(job, latest[place], error))


def _wait_for_folders(jobs: Sequence[Job], stop: Callable[[], bool]) -> None:
    """Wait, within reason, for writers that a driver left behind."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    for job in jobs:
        while holder(Path(job.folder)) is not None and time.monotonic() < deadline and not stop():
            time.sleep(0.1)  # nobody is told when a lock is let go


def _stopped(job: Job, latest: dict[str, Any] | None, error: BaseException) -> Event:
    """What an exception that ended a run means for it."""
    if isinstance(error, KeyboardInterrupt):
        return Event(job.run, "interrupted", latest)
    if isinstance(error, RunError | OSError | ValueError):
        return Event(job.run, "failed", latest, str(error))
    if isinstance(error, Exception):  # whatever it is, it is this run's alone
        return Event(job.run, "failed", latest, f"{type(error).__name__}: {error}")
    raise error
