"""The engine of a Ray cluster: a task of Ray Core for each run, on processes that Ray starts and uses again.

Progress, and the wish to stop, pass through an actor. The folder of the sweep has to be the same on all machines.
"""

from __future__ import annotations

import contextlib
import os
from types import TracebackType
from typing import Any, Self

from grokcurv.modular.config import TrainConfig
from grokcurv.runs import RunError
from grokcurv.sweep.engine import Event, Task, execute


class RayEngine:
    """Runs as tasks of Ray.

    Args:
        configs: the settings of all runs, from which follows what one needs.
        workers: runs at a time; as many as the cluster has room for if None.
        address: of the cluster to join; one is started on this machine, and ended, if None.
        gpus_per_run: the share of a GPU that a run has.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ValueError: runs on a GPU of which none has a share.
        RunError: on entering, when the cluster cannot be joined or has no machine that is large enough for a run.
    """

    def __init__(
        self, configs: list[TrainConfig], workers: int | None, address: str | None, gpus_per_run: float
    ) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("engine 'ray' needs Ray: pip install 'grokcurv[ray]'", name="ray") from error
        if not gpus_per_run and any(config.device.startswith("cuda") for config in configs):
            raise ValueError("gpus_per_run must be above 0 for runs whose device is cuda; got 0")
        self._ray: Any = ray
        self.workers = workers or 1
        self._workers, self._address = workers, address
        self._needs = {"num_cpus": max(1, *(config.threads for config in configs)), "num_gpus": gpus_per_run}
        self._tasks: dict[Any, Task] = {}
        self._stopping = False

    def __enter__(self) -> Self:
        cpus, gpus = self._needs["num_cpus"], self._needs["num_gpus"]
        self._mine = not self._ray.is_initialized()
        if self._mine:
            here: dict[str, Any] = {"address": self._address}
            if self._address is None:
                here = {"address": "local", "num_cpus": cpus * (self._workers or len(os.sched_getaffinity(0)))}
            try:
                self._ray.init(**here, include_dashboard=False, log_to_driver=False, logging_level="warning")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise RunError(f"cannot join the Ray cluster {self._address or 'of this machine'}: {error}") from error
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(
            int(min(have.get("CPU", 0) // cpus, have.get("GPU", 0) // gpus if gpus else have.get("CPU", 0)))
            for have in machines
        )
        if not room:
            self._leave()
            raise RunError(f"no machine of the Ray cluster has the {cpus} CPUs and {gpus:g} GPUs that a run needs")
        self.workers = self._workers or room
        # The actor comes back, empty, if its process dies; calls to it are then made again.
        actor = self._ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Mailbox)
        self._mailbox = actor.remote()
        # The driver decides what is tried again.
        self._execute = self._ray.remote(max_retries=0, **self._needs)(_execute)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            while self._tasks:
                self.wait(1.0)
        for future in self._tasks:
            self._ray.cancel(future, force=True)
        self._leave()

    def start(self, task: Task) -> None:
        self._tasks[self._execute.remote(task, self._mailbox)] = task

    def wait(self, seconds: float) -> list[Event]:
        ready, _ = self._ray.wait(list(self._tasks), timeout=seconds) if self._tasks else ([], [])
        events: list[Event] = self._ray.get(self._mailbox.take.remote(self._stopping))
        running = {task.run for task in self._tasks.values()}
        events = [event for event in events if event.run in running]
        for future in ready:
            task = self._tasks.pop(future)
            try:
                events.append(self._ray.get(future))
            except self._ray.exceptions.RayError as error:
                events.append(Event(task.run, "died", reason=f"its Ray worker ended ({_summary(error)})"))
        return events

    def interrupt(self) -> None:
        self._stopping = True
        for future, task in list(self._tasks.items()):
            if task.run not in ...:
                self._ray.cancel(future)

    def _leave(self) -> None:
        if self._mine:
            self._ray.shutdown()


def _summary(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


class _Mailbox:
    """Holds the latest progress of each run for the driver, and the driver's wish to stop for the runs."""

    def __init__(self) -> None:
        self._latest: dict[str, Event] = {}
        self._stopping = False

    def report(self, event: Event) -> None:
        self._latest[event.run] = event

    def stopping(self) -> bool:
        return self._stopping

    def take(self, stopping: bool) -> list[Event]:
        self._stopping = stopping
        events = list(self._latest.values())
        self._latest.clear()
        return events


def _execute(task: Task, mailbox: Any) -> Event:
    """A run on a worker of Ray's."""
    import time

    import ray

    asked, answer = 0.0, False

    def stop() -> bool:
        nonlocal asked, answer
        ...

    return execute(task, lambda event: mailbox.report.remote(event), stop)
