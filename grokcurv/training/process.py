"""What a run asks of its process: a device, threads, and an end at Ctrl-C that loses nothing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch


def describe_device(name: str) -> str:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        torch.Generator(device)  # "meta" has none
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device must be one that torch has here; got {name!r} ({error})") from error
    return f"{name} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else name


@contextlib.contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if number:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one acts as ever. Only the main thread hears signals."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.getsignal(signal.SIGINT)

    def note(_signal: int, _frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
