"""Running a sweep: which run goes next, what becomes of those that fail or whose worker dies, and how far it all is."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Collection
from os import PathLike
from pathlib import Path
from typing import Any

from grokcurv.storage import News, hold
from grokcurv.sweep.config import SweepConfig
from grokcurv.sweep.engine import LEAVE_SECONDS, Engine, Event, Job
from grokcurv.sweep.folder import Sweep, claim, write_failures
from grokcurv.sweep.local import LocalEngine
from grokcurv.training.process import StopRequest, describe_device

Progress = Callable[[dict[str, Any]], object]

ENGINES = ("local", "ray")

TOGETHER = 64
"""Runs that a worker trains as one program on a GPU."""

DEATHS = 3
"""Deaths of a run's workers in a row, without a new checkpoint in between, after which the run has failed."""

RATE_SECONDS = 30.0
"""The rate is a mean over this long."""

WAIT_SECONDS = 0.1
"""How long to wait for an event before looking for Ctrl-C."""


def run_sweep(
    config: SweepConfig,
    out: str | PathLike[str],
    *,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    gpus_per_run: float = 0.0,
    together: int | None = None,
    retry_failed: bool = False,
    only: Collection[str] | None = None,
    grow: bool = False,
    on_progress: Progress | None = None,
) -> Sweep:
    """Do all the runs of a sweep, or those that are left of it.

    The same call goes on after anything that stopped it. A run whose worker dies goes on from its checkpoint. A run
    that fails stops no other. Ctrl-C has the runs under way write checkpoints and raises KeyboardInterrupt; a second
    one ends them at once.

    Args:
        config: the sweep.
        out: its folder, see :mod:`grokcurv.sweep.folder`.
        engine: ``local``, worker processes on this machine, or ``ray``.
        workers: runs at a time; as many as there are CPUs (with Ray and GPUs: shares of a GPU) if None.
        address: with Ray, the cluster to join; by default one is started on this machine for the time of the sweep.
        gpus_per_run: with Ray, the share of a GPU that a run has.
        together: with local workers, how many runs of one architecture each trains as one program
            (:func:`grokcurv.training.train_ensemble`); if None, 1 on the CPU, and on a GPU 64, with one worker.
        retry_failed: try again the runs that would not be: those whose loss was not finite or whose workers kept
            dying. Others that failed, such as for a full disk, are tried again in any case.
        only: ids of the runs to do, the others being left for another call; all if None.
        grow: the sweep may have more runs than the one in the folder, which keep their ids, and settings of
            :data:`grokcurv.training.config.CHANGEABLE` may be others; runs that are to be longer go on.
        on_progress: called a few times a second with a dict of ``runs``, ``finished``, ``failed`` (numbers of runs),
            ``deaths`` (of workers), ``running`` (what ``train`` reported last, by run; {} before it did),
            ``steps_per_second`` (all runs together) and ``seconds_left`` (None until there is a rate).

    Returns:
        The sweep; what failed, and why, is in ``runs``.

    Raises:
        ValueError: an unknown engine, options that it does not take, a device that is not here, or a run in ``only``
            that the sweep does not have.
        ModuleNotFoundError: Ray is not installed.
        RunError: the folder is held by another driver, holds another sweep or is damaged; workers do not start.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}; got {engine!r}")
    for name, number in (("workers", workers), ("together", together)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1; got {number}")
    if gpus_per_run < 0:
        raise ValueError(f"gpus_per_run must not be negative; got {gpus_per_run}")
    own = {"together": (together, "local"), "address": (address, "ray"), "gpus_per_run": (gpus_per_run or None, "ray")}
    for name, (option, owner) in own.items():
        if option is not None and engine != owner:
            raise ValueError(f"{name} is for the engine {owner!r}; got {option!r} with {engine!r}")
    if engine == "local":  # another machine of a cluster may have other devices than this one
        for device in {config.device for config in config.plan.values()}:
            describe_device(device)
    unknown = next((run for run in only or () if run not in config.plan), None)
    if unknown is not None:
        raise ValueError(f"only must name runs of the sweep; it has no {unknown!r}")
    path = Path(out)
    with hold(path, "run"):
        sweep = claim(path, config, grow=grow)
        states = {str(run): str(state) for run, state in sweep.runs["status"].items()}
        if grow:
            states |= {run: "short" for run, state in states.items() if state == "finished" and sweep.is_short(run)}
        final = {run: why for run, why in sweep.failures.items() if why["final"] and states[run] != "finished"}
        if retry_failed:
            final = {}
        if final != sweep.failures:
            sweep.failures = final
            write_failures(sweep)
        runs = [run for run in sweep.plan if only is None or run in only]
        waiting = [run for run in runs if states[run] != "finished" and run not in final]
        if waiting:
            with _engine(engine, sweep, workers, address, gpus_per_run, together) as started:
                _Driver(sweep, started, runs, waiting, on_progress).run()
    return sweep


def _engine(
    name: str, sweep: Sweep, workers: int | None, address: str | None, gpus_per_run: float, together: int | None
) -> Engine:
    """The engine of this name: processes of this machine, or Ray."""
    if name == "local":
        if any(config.device.startswith("cuda") for config in sweep.plan.values()):
            workers, together = workers or 1, together or TOGETHER
        return LocalEngine(workers, sweep.path / "workers.log", together or 1)
    from grokcurv.sweep.ray import RayEngine

    return RayEngine(list(sweep.plan.values()), workers, address, gpus_per_run)


class _Driver:
    """A sweep under way."""

    def __init__(
        self, sweep: Sweep, engine: Engine, runs: list[str], waiting: list[str], on_progress: Progress | None
    ) -> None:
        self.sweep, self.engine, self.on_progress = sweep, engine, on_progress
        self.runs, self.waiting = runs, deque(waiting)
        self.running: dict[str, dict[str, Any]] = {}
        self.finished = len(runs) - len(waiting) - self._failed()
        self.deaths = 0
        self.deaths_of: dict[str, tuple[int | None, int]] = {}
        """By run: its checkpoint when a worker died last, and the deaths since that checkpoint."""
        self.pace, self.news = _Pace(), News(sweep.path)

    def run(self) -> None:
        """Give runs to the engine until all have ended, or until Ctrl-C and a checkpoint of each."""
        with StopRequest() as stop:
            stopping, deadline = False, math.inf
            while (self.running or (self.waiting and not stopping)) and time.monotonic() < deadline:
                if stop.number is not None and not stopping:
                    stopping, deadline = True, time.monotonic() + LEAVE_SECONDS
                    self.engine.interrupt()
                while self.waiting and not stopping and len(self.running) < self.engine.workers:
                    self._start(self.waiting.popleft())
                for event in self.engine.wait(WAIT_SECONDS):
                    if event.kind == "progress":
                        self.running[event.run] = event.latest or {}
                        self.pace.note(event)
                    else:
                        self._end(event, stopping)
                progress = self._progress()
                self.news.tell(progress)
                if self.on_progress:
                    self.on_progress(progress)
        stop.check()

    def _start(self, run: str) -> None:
        """Give a run to the engine."""
        self.running[run] = {}
        checkpoint = self._checkpoint(run)
        self.deaths_of.setdefault(run, (checkpoint, 0))
        if checkpoint is None:
            self.pace.begin(run)
        self.engine.start(Job(run, self.sweep.plan[run], str(self.sweep.folder(run))))

    def _end(self, event: Event, stopping: bool) -> None:
        """Note how a run ended; one that was cut off waits again, unless its worker has died too often."""
        run = event.run
        del self.running[run]
        self.pace.note(event)
        if event.kind == "finished":
            self.finished += 1
        elif event.kind == "failed":
            self._fail(run, event.reason, event.final)
        elif not stopping:
            if event.kind == "died" and self._died_too_often(run):
                self._fail(run, f"{event.reason}, {DEATHS} times in a row without a new checkpoint", True)
            else:
                self.waiting.appendleft(run)

    def _died_too_often(self, run: str) -> bool:
        """Count a death; whether there were as many in a row without a new checkpoint between them."""
        self.deaths += 1
        checkpoint = self._checkpoint(run)
        before, deaths = self.deaths_of[run]
        self.deaths_of[run] = (checkpoint, deaths + 1 if checkpoint == before else 1)
        return self.deaths_of[run][1] >= DEATHS

    def _fail(self, run: str, reason: str, final: bool) -> None:
        self.sweep.failures[run] = {"reason": reason, "final": final}
        write_failures(self.sweep)

    def _failed(self) -> int:
        return sum(run in self.sweep.failures for run in self.runs)

    def _checkpoint(self, run: str) -> int | None:
        """What tells a run's checkpoint from the one before: its time of writing; None without one."""
        try:
            return (self.sweep.folder(run) / "checkpoint.safetensors").stat().st_mtime_ns
        except OSError:
            return None

    def _progress(self) -> dict[str, Any]:
        """What is told of the sweep: how many runs have ended and how, steps of the others, pace and time left."""
        rate = self.pace.rate()
        left = sum(latest["steps"] - latest["step"] for latest in self.running.values() if latest)
        to_begin = [*self.waiting, *(run for run, latest in self.running.items() if not latest)]
        left += round(sum(self.sweep.plan[run].steps for run in to_begin) * self.pace.share(self.sweep.plan))
        return {
            "runs": len(self.runs),
            "finished": self.finished,
            "failed": self._failed(),
            "deaths": self.deaths,
            "running": dict(self.running),
            "steps_per_second": rate,
            "seconds_left": left / rate if rate else None,
        }


class _Pace:
    """How fast the sweep goes, from the steps of its runs."""

    def __init__(self) -> None:
        self._steps = 0
        self._last: dict[str, int] = {}
        self._history = deque([(time.monotonic(), 0)])
        self._lengths: dict[str, int] = {}

    def begin(self, run: str) -> None:
        """A run starts from step 0; of one that goes on, its first news tell from where."""
        self._last[run] = 0

    def note(self, event: Event) -> None:
        """Count the steps that the event tells of."""
        if event.latest:
            step = event.latest["step"]
            self._steps += step - self._last.get(event.run, step)
            self._last[event.run] = step
            if event.kind == "finished":
                self._lengths[event.run] = step
        if event.kind != "progress":  # if it goes on, it may be from an earlier step
            self._last.pop(event.run, None)
        self._history.append((time.monotonic(), self._steps))
        while len(self._history) > 2 and self._history[-1][0] - self._history[1][0] > RATE_SECONDS:
            self._history.popleft()

    def rate(self) -> float:
        """Steps a second, lately."""
        began, steps = self._history[0]
        return (self._steps - steps) / max(time.monotonic() - began, 1e-9)

    def share(self, plan: dict[str, Any]) -> float:
        """Share of their steps that runs took, as they end some time after they grok; 1 until one has finished."""
        return statistics.fmean([steps / max(plan[run].steps, 1) for run, steps in self._lengths.items()] or [1.0])
