"""What an engine is, and what its workers do with a run."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

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


class Engine(Protocol):
    """Runs tasks elsewhere. Leaving it ends the workers: at once after Ctrl-C, else after they wrote checkpoints."""

    workers: int
    """Tasks at a time; the driver starts no more."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

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
    from grokcurv.modular import TrainConfig, TrainingError, train
    from grokcurv.runs import RunError, _holder

    latest: dict[str, Any] | None = None
    reported, stopping = 0.0, False

    def on_progress(news: dict[str, Any]) -> None:
        nonlocal latest, reported, stopping
        latest = news
        if time.monotonic() - reported >= REPORT_SECONDS:
            reported = time.monotonic()
            report(Event(task.run, "progress", latest))
        if not stopping and stop():
            stopping = True
            signal.raise_signal(signal.SIGINT)  # train takes it for Ctrl-C: a checkpoint, then KeyboardInterrupt

    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while _holder(Path(task.folder)) is not None and time.monotonic() < deadline and not stop():
            time.sleep(0.1)
        train(TrainConfig(**task.config), out=task.folder, resume=True, on_progress=on_progress)
    except KeyboardInterrupt:
        return Event(task.run, "interrupted", latest)
    except TrainingError as error:
        return Event(task.run, "failed", latest, str(error), final=True)
    except (RunError, OSError, ValueError) as error:
        return Event(task.run, "failed", latest, str(error))
    except Exception as error:  # whatever it is, it is this run's alone
        return Event(task.run, "failed", latest, f"{type(error).__name__}: {error}")
    return Event(task.run, "finished", latest)
