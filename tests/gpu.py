"""What tests on a GPU share: whether there is one, tensors to and from it, captured calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grokcurv.ops import _dispatch

DEVICE = torch.device("cuda", 0)
CAPTURES_RUN = False
"""Whether what is captured is carried out at once, too: not by a CUDA graph, but in a rehearsal."""


@cache
def problem() -> str | None:
    """Why nothing can run on a GPU here, or None. A kernel that fails there is no such reason: its test must fail."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    try:
        kernels = import_module("grokcurv._cuda")
    except ImportError as error:
        return f"grokcurv._cuda does not load ({error})"
    return _dispatch.cuda_problem(kernels.RUNTIME, kernels.driver())


def name() -> str:
    major, minor = torch.cuda.get_device_capability(DEVICE)
    return f"{torch.cuda.get_device_name(DEVICE)} (sm_{major}{minor})"


def is_table(x: Any) -> bool:
    """Whether an op takes this as a table of indices, which stays on the CPU: its rows say so."""
    return isinstance(x, Tensor) and x.dtype == torch.int64 and x.dim() == 2


def there(x: Any) -> Any:
    """A copy of a tensor on the GPU; tables of indices stay where they are, and so does what is no tensor."""
    if isinstance(x, dict):
        return {key: there(value) for key, value in x.items()}
    return x.to(DEVICE, copy=True) if isinstance(x, Tensor) and not is_table(x) else x


def back(x: Any) -> Any:
    """A tensor, or a tuple of them, on the CPU."""
    if isinstance(x, tuple):
        moved = map(back, x)
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return x.cpu() if isinstance(x, Tensor) else x


def through(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function run on the GPU, for tensors on the CPU: what it writes to is copied back."""

    def call(*args: Any, **options: Any) -> Any:
        given = [*args, *options.values()]
        moved = [there(x) for x in given]
        result = function(*moved[: len(args)], **dict(zip(options, moved[len(args) :], strict=True)))
        for before, after in zip(given, moved, strict=True):
            if isinstance(after, Tensor) and after is not before and not after.is_inference() and after._version > 0:
                before.copy_(after)
        returned = [before for before, after in zip(given, moved, strict=True) if after is result]
        return returned[0] if returned else back(result)

    return call


@contextmanager
def emulator() -> Iterator[None]:
    """Ops on the CPU run the source of the CUDA kernels."""
    emulator, core = import_module("grokcurv._emulator"), _dispatch.core_of
    _dispatch.core_of = lambda device: (
        _dispatch.Core(emulator, 0, nullcontext()) if device.type == "cpu" else core(device)
    )
    try:
        yield
    finally:
        _dispatch.core_of = core


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever makes torch wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run: Callable[[], Any], warm_up: bool = True) -> tuple[Any, Callable[[], None]]:
    """Captures a call in a CUDA graph, after one on another stream to warm up: its result, and what fills it anew."""
    if warm_up:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay
