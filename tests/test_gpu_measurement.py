"""Measurements and steps on a GPU: nothing waits for them, and what others capture with a tape, a graph does."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import gpu
import pytest
import torch
from models import PROBLEMS
from test_device import Place, drawn, test_a_captured_block, test_a_captured_measurement, test_a_captured_step
from test_optim import test_captured_steps_of_rows
from torch import Generator

import grokcurv as gc
from grokcurv.device_buffer import DeviceBuffer
from grokcurv.flat import attention_segments

pytestmark = pytest.mark.gpu
__all__ = [
    "test_a_captured_block",
    "test_a_captured_measurement",
    "test_a_captured_step",
    "test_captured_steps_of_rows",
]

PROBLEM = PROBLEMS["tied attention"]
STEPS = 40


@pytest.fixture
def place() -> Place:
    return Place(str(gpu.DEVICE), partial(gpu.capture, warm_up=False), gpu.CAPTURES_RUN, rtol=1e-2)


def test_records_may_be_read_on_another_stream() -> None:
    """Than that which writes them, and is far behind."""
    kept, row = DeviceBuffer(2, gpu.DEVICE), torch.ones(2, dtype=torch.float64, device=gpu.DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for count in (3, 5):
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            for _ in range(count):
                kept.append(row)
        read = kept.read()
    assert read.tolist() == [[1.0, 1.0]] * 8


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_a_measurement_does_not_wait(method: Any, place: Place, generator: Generator) -> None:
    """And it is that of the CPU, within what rounding explains."""
    model = PROBLEM.model()
    pairs = [tuple(PROBLEM.batch(generator) for _ in range(2)) for _ in range(3)]
    wanted = gc.CommutatorProbe(model, PROBLEM.loss_fn, method=method).measure(pairs)
    model = model.to(place.device)
    moved = [tuple({k: v.to(place.device) for k, v in batch.items()} for batch in pair) for pair in pairs]
    probe = gc.CommutatorProbe(model, PROBLEM.loss_fn, method=method, segments=attention_segments(model))
    probe.measure(moved)  # the first admits the model, which asks for numbers
    with gpu.no_synchronisation():
        stats = probe.measure(moved)
    allowed = wanted.noise_floor + stats.noise_floor.cpu() + 1e-6 * wanted.defect
    assert ((stats.defect.cpu() - wanted.defect).abs() <= allowed).all()


@pytest.mark.parametrize("method", ["gram", "incremental", "sketch"])
def test_a_monitored_loop_does_not_wait(method: str, place: Place, generator: Generator) -> None:
    model = PROBLEM.model().to(place.device)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = drawn(place, STEPS, generator)
    pca = gc.StreamingPCA(2, method, segments=attention_segments(model), block=5)
    monitor = gc.CurvatureMonitor(model, PROBLEM.loss_fn, pca=pca, pca_every=1)
    with ExitStack() as once_admitted:
        for step, (batch, following) in enumerate(monitor.lookahead(loader)):
            if step == 1:
                once_admitted.enter_context(gpu.no_synchronisation())
            PROBLEM.loss_fn(model, batch).backward()
            monitor.step(batch, following)
            optimizer.step()
            optimizer.zero_grad()
    found = monitor.records()
    assert found["step"].tolist() == list(range(STEPS - 1))
    assert found["defect_median"][found["reliable"]].notna().all()
    assert found["rho"][5:][found["reliable"][5:]].between(0, 1 + 1e-6).all() or method == "sketch"


def test_a_row_of_nan_is_masked(place: Place, generator: Generator) -> None:
    rows = torch.randn(9, 50, generator=generator).to(place.device)
    rows[4, 7] = torch.nan
    for method in ("gram", "incremental"):
        with gpu.no_synchronisation():
            pca = gc.StreamingPCA(3, method).partial_fit(rows)
        with pytest.raises(ValueError, match="row 4 held NaN"):
            pca.explained_variance_  # noqa: B018
        good = gc.StreamingPCA(3, method).partial_fit(rows[[0, 1, 2, 3, 5, 6, 7, 8]].cpu())
        torch.testing.assert_close(pca.explained_variance_.cpu(), good.explained_variance_, rtol=1e-5, atol=1e-5)
