"""What a run asks of its process: a device, threads, and an end at a signal that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch


def describe_device(name: str) -> str:
    """A device's name, with that of the GPU; a ValueError if torch has no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        torch.Generator(device)  # "meta" has none
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one that torch has here; got {name!r} ({error})") from error
    return f"{name} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else name


@contextlib.contextmanager
def threads_of(number: int) -> Iterator[None]:
    """Within it torch uses this number of threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stopped(KeyboardInterrupt):
    """What Ctrl-C means, or ``number``, another signal that asks a process to end."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Whether a signal has asked for an end, and which.

    The first one is noted: Ctrl-C, SIGTERM (Slurm, ``docker stop``), or SIGHUP (a terminal that was closed). The second
    acts as ever.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other one hears signals
            for number in self.SIGNALS:
                before = signal.getsignal(number)
                if before is not None and (before != signal.SIG_IGN or number == signal.SIGINT):  # nohup ignores SIGHUP
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()

    def check(self) -> None:
        """Raise :class:`Stopped` if there was one."""
        if self.number is not None:
            raise Stopped(self.number)
