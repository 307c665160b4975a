"""pytest -p rehearsal tests/test_gpu*.py: the GPU tests where there is no GPU, so that they work on the day.

Tensors stay on the CPU, the emulator runs the source of the CUDA kernels, and what streams, graphs and devices add
is left out: a captured call goes on tape. So are the tests of the kernels, which need no rehearsal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu
import pytest
import tape
import torch

NEEDS_A_GPU = (
    "test_the_first_call_of_an_op_may_be_in_a_capture",
    "test_a_wait_is_noticed",
    "test_vectors_left_on_the_cpu_are_refused",
    "test_tables_on_the_gpu_are_refused",
    "test_devices_other_than_the_current_one",
    "test_a_captured_measurement",  # these three take long here, and are on tape in test_device.py
    "test_a_captured_step",
    "test_a_captured_block",
)


class Nothing:
    """Does nothing, whatever it is asked."""

    def __call__(self, *args: Any, **options: Any) -> Nothing:
        return self

    def __getattr__(self, name: str) -> Nothing:
        return self

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: object) -> None: ...


def capture(run: Callable[[], Any], warm_up: bool = True) -> tuple[Any, Callable[[], None]]:
    if warm_up:
        run()
    return tape.capture(run)


def pytest_configure(config: pytest.Config) -> None:
    gpu.DEVICE = torch.device("cpu")
    gpu.problem = lambda: None
    gpu.name = lambda: "no GPU, but the emulator in its place"
    gpu.capture = capture
    gpu.CAPTURES_RUN = True
    for name in ("Stream", "stream", "current_stream", "_sleep", "synchronize", "set_sync_debug_mode", "empty_cache"):
        setattr(torch.cuda, name, Nothing())
    torch.cuda.device_count = lambda: 1
    torch.cuda.mem_get_info = lambda device: (2**60, 2**60)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if item.cls is None and item.originalname not in NEEDS_A_GPU]
    for module in {item.module for item in items}:
        if module.__name__ == "test_gpu":
            module.SHAPES, module.SMALL = ((2, 13), (1, 1), (0, 5)), ((2, 9),)
            module.MANY, module.LONG = 3, 20_000
        else:
            module.STEPS = 7


@pytest.fixture(autouse=True)
def on_the_emulator() -> Iterator[None]:
    with gpu.emulator(), tape.patched("is_asynchronous", lambda device: True):
        yield
