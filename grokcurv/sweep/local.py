"""The engine of one machine: worker processes of one thread each, started when needed and used for many runs.

A worker reads groups of tasks from its standard input, a JSON line each, and writes events to its standard output. The
end of its input, which is also what a driver leaves behind when it is killed, means: write a checkpoint and end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from grokcurv.storage import RunError
from grokcurv.sweep.engine import LEAVE_SECONDS, Event, Task, execute, execute_together
from grokcurv.training import TrainConfig
from grokcurv.training.trainer import together

READY = Event("", "progress")
"""What a worker says when it has loaded everything."""

MAX_STARTUP_FAILURES = 3
"""Workers in a row that may die before they are ready."""

Events = queue.Queue[tuple["_Worker | None", Event | None]]
"""What workers say, with who says it: None for a task that no worker had. An event that is None is a worker's death."""


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
        self._events: Events = queue.Queue()
        self._tasks: deque[Task] = deque()
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

    def start(self, task: Task) -> None:
        self._tasks.append(task)
        self._assign()

    def wait(self, seconds: float) -> list[Event]:
        events = []
        with contextlib.suppress(queue.Empty):
            events += self._take(*self._events.get(timeout=seconds))
            while True:
                events += self._take(*self._events.get_nowait())
        return events

    def interrupt(self) -> None:
        for worker in self._crew:
            worker.leave()
        while self._tasks:
            self._events.put((None, Event(self._tasks.popleft().run, "interrupted")))

    def _take(self, worker: _Worker | None, event: Event | None) -> list[Event]:
        """What the driver is to know of a worker's event."""
        if worker is None:
            return [event] if event else []
        if event is None:
            return self._reap(worker)
        if event == READY:
            worker.ready, self._deaths_at_birth = True, 0
        elif event.kind != "progress":
            worker.tasks = [task for task in worker.tasks if task.run != event.run]
        self._assign()
        return [] if event == READY else [event]

    def _reap(self, worker: _Worker) -> list[Event]:
        self._crew.remove(worker)
        code, left = worker.process.wait(), worker.left
        worker.leave()
        if not worker.ready and not left:
            self._deaths_at_birth += 1
            if self._deaths_at_birth >= MAX_STARTUP_FAILURES:
                raise RunError(f"worker processes do not start (exit status {code}): {self.log} says more")
        self._assign()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return [Event(task.run, "died", reason=f"its worker process {how}") for task in worker.tasks]

    def _assign(self) -> None:
        """Give tasks to workers that are free; start workers while there are too few."""
        for worker in self._crew:
            if self._tasks and worker.ready and not worker.tasks:
                worker.give(self._group())
        unready = sum(not worker.ready for worker in self._crew)
        wanted = -(-len(self._tasks) // self.together)
        for _ in range(min(wanted - unready, self.processes - len(self._crew))):
            self._crew.append(_Worker(self._events, self.log))

    def _group(self) -> list[Task]:
        """The first task and those further ones that can be done together with it."""
        first = self._tasks.popleft()
        config = TrainConfig(**first.config)
        alike = [task for task in self._tasks if together(config, TrainConfig(**task.config))]
        group = [first, *alike[: self.together - 1]]
        self._tasks = deque(task for task in self._tasks if task not in group)
        return group


class _Worker:
    """The driver's end of a worker process."""

    def __init__(self, events: Events, log: Path) -> None:
        self.ready, self.left = False, False
        self.tasks: list[Task] = []
        self._events = events
        # It imports what this process imports, wherever that came from.
        imported = [path or os.getcwd() for path in sys.path]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(imported)}
        with _open_log(log) as printed:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from grokcurv.sweep.local import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=environment,
                start_new_session=True,  # a terminal's Ctrl-C goes to the driver alone
            )
        assert self.process.stdin is not None
        self._input = self.process.stdin
        threading.Thread(target=self._listen, daemon=True).start()

    def give(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        with contextlib.suppress(BrokenPipeError):  # it is dead: _listen finds out too
            self._input.write(json.dumps([asdict(task) for task in tasks]).encode() + b"\n")
            self._input.flush()

    def leave(self) -> None:
        self.left = True
        with contextlib.suppress(BrokenPipeError):
            self._input.close()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout, contextlib.suppress(ValueError):  # half a line, from a worker killed while it spoke
            for line in self.process.stdout:
                self._events.put((self, Event(**json.loads(line))))
        self._events.put((self, None))


def _open_log(path: Path) -> BinaryIO:
    try:
        return path.open("ab")
    except OSError:  # a full disk is the runs' to report
        return open(os.devnull, "ab")


def serve() -> None:
    """A worker process from beginning to end."""
    # Events alone go to the standard output: what anything else prints there goes where errors go.
    event_stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    groups: queue.SimpleQueue[list[dict[str, Any]] | None] = queue.SimpleQueue()
    stop = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            groups.put(json.loads(line))
        stop.set()
        groups.put(None)

    def report(event: Event) -> None:
        with contextlib.suppress(BrokenPipeError):  # the driver is dead: listen finds out too
            event_stream.write(json.dumps(asdict(event)) + "\n")
            event_stream.flush()

    threading.Thread(target=listen, daemon=True).start()
    report(READY)
    while (group := groups.get()) is not None and not stop.is_set():
        tasks = [Task(**task) for task in group]
        if len(tasks) > 1:
            execute_together(tasks, report, stop.is_set)
        else:
            report(execute(tasks[0], report, stop.is_set))
    os._exit(0)  # nothing is left to write; the listening thread holds standard input
