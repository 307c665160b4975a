"""What an engine is, and what its workers do with a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from grokcurv.storage import RunError, holder
from grokcurv.training import TrainConfig, TrainingError, train, train_ensemble

REPORT_SECONDS = 0.5
"""Seconds between two reports of a run under way."""

LEAVE_SECONDS = 60.0
"""How long workers may take to write their checkpoints and end."""

PATIENCE_SECONDS = 60.0
"""How long to wait for a worker of a driver that died to let go of a run."""


@dataclass(frozen=True)
class Task:
    """A run to do, in words that any process understands."""

    run: str
    """Its id."""
    config: dict[str, Any]
    """The settings."""
    folder: str
    """Where it goes, or goes on."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a run."""

    run: str
    kind: Literal["progress", "finished", "failed", "interrupted", "died"]
    """All but ``progress`` end the task; ``died`` is said by the engine: the process that had the run is no more."""
    latest: dict[str, Any] | None = None
    """What ``train`` reported last."""
    reason: str = ""
    """Why it failed or died."""
    final: bool = False
    """Whether it would fail in the same way again."""


class Engine(AbstractContextManager["Engine"], Protocol):
    """Runs tasks elsewhere. Leaving it ends the workers: at once after Ctrl-C, else after they wrote checkpoints."""

    workers: int
    """Tasks at a time; the driver starts no more."""

    def start(self, task: Task) -> None: ...

    def wait(self, seconds: float) -> list[Event]:
        """What happened since the last call; waits for something to happen, but not longer than ``seconds``."""
        ...

    def interrupt(self) -> None:
        """Have every task write its checkpoint and end; :meth:`wait` tells when they have. Nothing starts after it."""
        ...


def execute(task: Task, report: Callable[[Event], object], stop: Callable[[], bool]) -> Event:
    """Do a run, or go on with it, in the main thread of a worker; how it ended.

    Args:
        report: is told of the progress.
        stop: whether to write a checkpoint and end, asked every few steps.
    """
    watch = _Watch([task], report, stop)
    try:
        watch.wait_for_folders()
        train(TrainConfig(**task.config), out=task.folder, resume=True, on_progress=partial(watch.progress, 0))
    except TrainingError as error:
        return Event(task.run, "failed", watch.latest[0], str(error), final=True)
    except BaseException as error:
        return _stopped(task, watch.latest[0], error)
    return Event(task.run, "finished", watch.latest[0])


def execute_together(tasks: Sequence[Task], report: Callable[[Event], object], stop: Callable[[], bool]) -> None:
    """:func:`execute` for runs of one architecture, as one program; ``report`` is told how each ended, too."""
    watch = _Watch(tasks, report, stop)
    running = dict(enumerate(tasks))

    def on_end(place: int, status: str) -> None:
        task, latest = running.pop(place), watch.latest[place]
        if status == "finished":
            report(Event(task.run, "finished", latest))
        else:
            # Weights that are not finite would be so again; a disk need not be full again.
            final = "cannot write" not in status
            report(Event(task.run, "failed", latest, status.removeprefix("failed: "), final))

    try:
        watch.wait_for_folders()
        train_ensemble(
            [TrainConfig(**task.config) for task in tasks],
            outs=[task.folder for task in tasks],
            resume=True,
            on_progress=watch.progress,
            on_end=on_end,
        )
    except BaseException as error:
        for place, task in running.items():
            report(_stopped(task, watch.latest[place], error))


class _Watch:
    """Passes on how runs go, and has them stop when they should."""

    def __init__(self, tasks: Sequence[Task], report: Callable[[Event], object], stop: Callable[[], bool]) -> None:
        self.tasks, self.report, self.stop = tasks, report, stop
        self.latest: list[dict[str, Any] | None] = [None] * len(tasks)
        self._reported = [0.0] * len(tasks)
        self._stopping = False

    def wait_for_folders(self) -> None:
        """Wait, within reason, for writers that a driver left behind."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for task in self.tasks:
            while holder(Path(task.folder)) is not None and time.monotonic() < deadline and not self.stop():
                time.sleep(0.1)

    def progress(self, place: int, latest: dict[str, Any]) -> None:
        self.latest[place] = latest
        if time.monotonic() - self._reported[place] >= REPORT_SECONDS:
            self._reported[place] = time.monotonic()
            self.report(Event(self.tasks[place].run, "progress", latest))
        if not self._stopping and self.stop():
            self._stopping = True
            signal.raise_signal(signal.SIGINT)  # train takes it for Ctrl-C: a checkpoint, then KeyboardInterrupt


def _stopped(task: Task, latest: dict[str, Any] | None, error: BaseException) -> Event:
    """What an exception that ended a run means for it."""
    if isinstance(error, KeyboardInterrupt):
        return Event(task.run, "interrupted", latest)
    if isinstance(error, RunError | OSError | ValueError):
        return Event(task.run, "failed", latest, str(error))
    if isinstance(error, Exception):  # whatever it is, it is this run's alone
        return Event(task.run, "failed", latest, f"{type(error).__name__}: {error}")
    raise error
