"""The engine of a Ray cluster: a task of Ray Core for each run, on processes that Ray starts and uses again.

Progress passes through an actor. The folder of the sweep has to be the same on all machines.
"""

from __future__ import annotations

import os
from typing import Any, Self

from grokcurv.storage import RunError
from grokcurv.sweep.engine import LEAVE_SECONDS, Event, Job, execute
from grokcurv.training.config import TrainConfig


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
        self._jobs: dict[Any, Job] = {}

    def __enter__(self) -> Self:
        cpus, gpus = self._needs["num_cpus"], self._needs["num_gpus"]
        self._mine = not self._ray.is_initialized()
        if self._mine:
            here: dict[str, Any] = {"address": self._address}
            if self._address is None:
                os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster for one sweep reports to nobody
                here = {"address": "local", "num_cpus": cpus * (self._workers or len(os.sched_getaffinity(0)))}
            try:
                self._ray.init(**here, include_dashboard=False, log_to_driver=False, logging_level="warning")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise RunError(f"cannot join the Ray cluster {self._address or 'of this machine'}: {error}") from error
        needs = {"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(int(min(have.get(name, 0) // number for name, number in needs.items())) for have in machines)
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        at_once = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.interrupt(force=at_once)
        if self._jobs and not at_once:
            self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=LEAVE_SECONDS)
        self._leave()

    def start(self, job: Job) -> None:
        self._jobs[self._execute.remote(job, self._mailbox)] = job

    def wait(self, seconds: float) -> list[Event]:
        ended, _ = self._ray.wait(list(self._jobs), timeout=seconds) if self._jobs else ([], [])
        running = {job.run for job in self._jobs.values()}
        events = [event for event in self._ray.get(self._mailbox.take.remote()) if event.run in running]
        for future in ended:
            job = self._jobs.pop(future)
            try:
                events.append(self._ray.get(future))
            except self._ray.exceptions.TaskCancelledError:
                events.append(Event(job.run, "interrupted"))
            except self._ray.exceptions.RayTaskError as error:  # it cannot even begin: grokcurv is not there, say
                events.append(Event(job.run, "failed", reason=str(error.cause)))
            except self._ray.exceptions.RayError as error:
                said = str(error).strip().partition("\n")[0]
                events.append(Event(job.run, "died", reason=f"its Ray worker ended ({type(error).__name__}: {said})"))
        return events

    def interrupt(self, force: bool = False) -> None:
        for future in self._jobs:  # to a run under way this is Ctrl-C, which train knows what to do with
            self._ray.cancel(future, force=force)

    def _leave(self) -> None:
        if self._mine:
            self._ray.shutdown()


class _Mailbox:
    """Holds the latest news of each run until the driver takes them."""

    def __init__(self) -> None:
        self._latest: dict[str, Event] = {}

    def report(self, event: Event) -> None:
        self._latest[event.run] = event

    def take(self) -> list[Event]:
        latest = list(self._latest.values())
        self._latest.clear()
        return latest


def _execute(job: Job, mailbox: Any) -> Event:
    """A run in a worker of Ray's, which stops it by what looks like Ctrl-C; how it ended."""
    ended: list[Event] = []
    execute(
        [job],
        lambda event: (mailbox.report.remote if event.kind == "progress" else ended.append)(event),
        lambda: False,
    )
    return ended[0]
