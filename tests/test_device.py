"""What a GPU demands of the measurement, tried without one: that nobody waits for it, and that it can be captured.

Tensors on the meta device hold no data, so whoever looks at a number fails; a tape stands in for a CUDA graph. Where
there is a GPU, tests/test_gpu_measurement.py runs the captured ones there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch
from models import PROBLEMS, Batch
from tape import Tape, capture, patched, tensors
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import grokcurv as gc
from grokcurv import device_buffer
from grokcurv.flat import attention_segments, flatten
from grokcurv.monitor import FIELDS

PROBLEM = PROBLEMS["tied attention"]


def on(device: str, batch: Batch) -> Batch:
    return {name: x.to(device) for name, x in batch.items()}


@pytest.fixture
def accelerator() -> Iterator[None]:
    """The CPU is a device that nobody waits for."""
    with patched("is_asynchronous", lambda device: True):
        yield


class OnDevice(TorchDispatchMode):
    """Refuses copies between the CPU and the device, but for those that nobody waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copies = func.overloadpacket.__name__ in ("_to_copy", "copy_", "lift_fresh", "_copy_from")
        waits = copies and not (kwargs or {}).get("non_blocking", False)
        devices = {x.device.type for x in tensors((args, kwargs, result))}
        assert not waits or len(devices) == 1, f"{func} copies between {devices}"
        return result


# --------------------------------------------------------------------------------------------------------- nobody waits


@pytest.mark.parametrize("method", ["difference", "bracket", "published"])
def test_a_measurement_looks_at_no_number(method: Any, generator: Generator) -> None:
    model = PROBLEM.model().to("meta")
    basis = gc.Subspace.random(3, flatten(model).numel(), generator).to("meta")
    probe = gc.CommutatorProbe(model, PROBLEM.loss_fn, method=method, basis=basis, segments=attention_segments(model))
    pairs = [(on("meta", PROBLEM.batch(generator)), on("meta", PROBLEM.batch(generator))) for _ in range(3)]
    with OnDevice():
        stats = probe.measure(pairs, keep_delta=True)
    assert stats.defect.shape == stats.median().expand(3).shape == (3,)
    assert all(x.device.type == "meta" for x in vars(stats).values() if isinstance(x, Tensor))


@pytest.mark.parametrize("sampler", [False, True])
@pytest.mark.parametrize("method", ["gram", "incremental", "sketch"])
def test_a_monitored_loop_looks_at_no_number(
    method: str, sampler: bool, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    monkeypatch.setattr("grokcurv.measures.commutator.VERDICT_LAG", 100)  # there is no verdict to read
    model = PROBLEM.model().to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    loader = [on("meta", PROBLEM.batch(generator)) for _ in range(6)]
    draws = iter(loader * 4)
    monitor = gc.CurvatureMonitor(
        model,
        PROBLEM.loss_fn,
        pca=gc.StreamingPCA(2, method, segments=attention_segments(model), block=2, oversampling=1),
        pca_every=1,
        pairs=2 if sampler else 1,
        sampler=(lambda: (next(draws), next(draws))) if sampler else None,
        alignment=True,
    )
    with OnDevice():
        for batch, following in monitor.lookahead(loader):
            PROBLEM.loss_fn(model, batch).backward()
            monitor.step(batch, following)
            optimizer.step()
            optimizer.zero_grad()


def test_gram_goes_over_to_incremental_without_a_look() -> None:
    pca = gc.StreamingPCA(2, memory_limit=140_000)
    for _ in range(40):
        pca.partial_fit(torch.empty(1000, device="meta"))
    assert pca.method_ == "incremental"


# ------------------------------------------------------------------------------------------------ captured and replayed


@dataclass
class Place:
    """Where captured calls are tried."""

    device: str
    capture: Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
    captures_run: bool = True
    """Whether what is captured is carried out at once, too."""
    rtol: float = 0.0
    """Of what a model computes there, from one call to the next."""


@pytest.fixture
def place() -> Iterator[Place]:
    with patched("is_asynchronous", lambda device: True):
        yield Place("cpu", capture)


def drawn(place: Place, count: int, generator: Generator) -> list[Batch]:
    return [on(place.device, PROBLEM.batch(generator)) for _ in range(count)]


def renew(model: nn.Module, batches: list[Batch], generator: Generator) -> None:
    """Other numbers in the same memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
        for batch in batches:
            for name, x in PROBLEM.batch(generator).items():
                batch[name].copy_(x)


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_a_captured_measurement(method: Any, place: Place, generator: Generator) -> None:
    model = PROBLEM.model().to(place.device)
    batches = drawn(place, 6, generator)
    pairs = list(zip(batches[::2], batches[1::2], strict=True))
    basis = gc.Subspace.random(3, flatten(model).numel(), generator)
    probe = gc.CommutatorProbe(model, PROBLEM.loss_fn, method=method, basis=basis, segments=attention_segments(model))
    probe.measure(pairs)
    captured, replay = place.capture(lambda: probe.measure(pairs))
    for _ in range(2):
        renew(model, batches, generator)
        replay()
        eager = probe.measure(pairs)
        for name, value in vars(eager).items():
            if isinstance(value, Tensor) and (place.rtol == 0 or name != "noise_floor"):
                torch.testing.assert_close(
                    getattr(captured, name), value, rtol=place.rtol, atol=place.rtol, equal_nan=True
                )


def test_a_measurement_comes_before_a_capture(generator: Generator) -> None:
    probe = gc.CommutatorProbe(PROBLEM.model(), PROBLEM.loss_fn)
    with pytest.raises(RuntimeError, match="measure once before the capture"), Tape():
        probe.measure([(PROBLEM.batch(generator), PROBLEM.batch(generator))])


def test_a_model_that_draws_at_random_is_not_captured(generator: Generator) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 1))
    pair = tuple({"x": torch.randn(4, 5, generator=generator), "y": torch.zeros(4)} for _ in range(2))
    probe = gc.CommutatorProbe(model, lambda model, batch: (model(batch["x"])[:, 0] - batch["y"]).square().mean())
    probe.measure([pair])
    with pytest.raises(RuntimeError, match="draws at random"), Tape():
        probe.measure([pair])


def walk(n: int, size: int, generator: Generator) -> Tensor:
    """Steps of falling size, so that there is a spectrum."""
    scales = torch.arange(1, size + 1).reciprocal()
    return (torch.randn(n, size, generator=generator) * scales).cumsum(0)


@pytest.mark.parametrize("method", ["incremental", "sketch"])
@pytest.mark.parametrize("segments", [None, [(0, 40), (50, 30)]], ids=["whole", "segments"])
def test_a_captured_block(method: str, segments: Any, place: Place, generator: Generator) -> None:
    """Replayed, it leaves the PCA where calls would have: results, history, masked rows, state."""
    x = walk(48, 90, generator).to(place.device)
    x[40, 3] = torch.nan
    options: dict[str, Any] = {"segments": segments, "block": 6, "oversampling": 3, "sketch_size": 64}
    captured, eager = (gc.StreamingPCA(3, method, **options).partial_fit(x[:12]) for _ in range(2))
    rows = x[12:18].clone()
    captured.partial_fit(rows)
    eager.partial_fit(x[12:18])
    rows.copy_(x[18:24])
    _, replay = place.capture(lambda: captured.partial_fit(rows))
    if not place.captures_run:
        replay()
    eager.partial_fit(x[18:24])
    for start in range(24, 48, 6):
        rows.copy_(x[start : start + 6])
        replay()
        eager.partial_fit(x[start : start + 6])
        if start == 24:  # what was read is not remembered
            torch.testing.assert_close(captured.explained_variance_, eager.explained_variance_, rtol=0, atol=0)
    for pca in (captured, eager):
        with pytest.raises(ValueError, match="row 40 held NaN"):
            pca.explained_variance_  # noqa: B018
    assert captured.n_samples_seen_ == eager.n_samples_seen_ == 47
    names = ["explained_variance_", "total_variance_", "error_bound_", "pc1_history_"]
    for name in [*names, *(["components_", "mean_"] if method == "incremental" else [])]:
        for got, want in zip(tensors(getattr(captured, name)), tensors(getattr(eager, name)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert captured.state_dict()["rows_taken"] == eager.state_dict()["rows_taken"] == 48


@pytest.mark.usefixtures("accelerator")
def test_what_cannot_be_captured_is_refused(generator: Generator) -> None:
    x = walk(30, 20, generator)
    exact = gc.StreamingPCA(2, "gram").partial_fit(x[:10])
    with pytest.raises(RuntimeError, match=r"needs method='incremental' or 'sketch'.*works by 'gram'"), Tape():
        exact.partial_fit(x[10:])
    pca = gc.StreamingPCA(2, "incremental", block=6)
    with pytest.raises(RuntimeError, match="works by None"), Tape():
        pca.partial_fit(x[:6])
    pca.partial_fit(x[:5])
    with pytest.raises(RuntimeError, match=r"whole blocks of 6 rows.*6 rows with 5 pending after 5"), Tape():
        pca.partial_fit(x[5:11])
    pca.partial_fit(x[5:6])
    with pytest.raises(RuntimeError, match="got 5 rows with 0 pending"), Tape():
        pca.partial_fit(x[6:11])


def test_a_captured_step(place: Place, generator: Generator) -> None:
    """Replays add records and count as steps; the basis follows the PCA that is fed between them."""
    batches = drawn(place, 4, generator)
    model = PROBLEM.model().to(place.device)

    def new_monitor() -> gc.CurvatureMonitor:
        pca = gc.StreamingPCA(2, "incremental", segments=attention_segments(model), block=3)
        pairs = iter([tuple(batches[:2]), tuple(batches[2:])] * 100)
        return gc.CurvatureMonitor(
            model,
            PROBLEM.loss_fn,
            pairs=2,
            pca=pca,
            pca_every=1,
            check_every=1,  # as a captured step does
            sampler=lambda: next(pairs),
        )

    captured, eager = new_monitor(), new_monitor()
    for _ in range(4):
        renew(model, batches, generator)
        captured.step()
        eager.step()
    _, replay = place.capture(captured.step)
    if not place.captures_run:
        replay()
    eager.pca_every = 10**6
    eager.step()
    for step in range(5, 12):
        renew(model, batches, generator)
        if step % 2:
            captured.feed()
            eager.feed()
        replay()
        eager.step()
    assert captured.steps == eager.steps == 12
    got, want = captured.records(), eager.records()
    assert got["step"].tolist() == list(range(12))
    assert got["measure_seconds"].isna().tolist() == [False] * 4 + [True] * 8
    apart = ["measure_seconds", *(["noise_floor"] if place.rtol else [])]
    pd.testing.assert_frame_equal(got.drop(columns=apart), want.drop(columns=apart), rtol=place.rtol, atol=place.rtol)
    assert captured.pca_records().equals(eager.pca_records())


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.usefixtures("accelerator")
def test_records_are_sent_to_the_host_in_parts(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    monkeypatch.setattr("grokcurv.device_buffer.DRAIN", 7)
    monkeypatch.setattr("grokcurv.device_buffer.CAPACITY", 8)
    rows = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    kept = device_buffer.DeviceBuffer(3, torch.device("cpu"))
    assert kept.last() is None
    assert kept.read().shape == (0, 3)
    for number, row in enumerate(rows):
        kept.append(row)
        kept.drain()
        if number == 16:
            assert torch.equal(kept.read(), rows[:17])
        if number % 5 == 0:
            assert torch.equal(kept.last(), row)
    assert torch.equal(kept.read(), rows)
    kept.append(rows[0])
    assert torch.equal(kept.read(), torch.cat([rows, rows[:1]]))


@pytest.mark.usefixtures("accelerator")
def test_records_that_were_overwritten_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokcurv.device_buffer.CAPACITY", 8)
    row = torch.zeros(2, dtype=torch.float64)
    kept = device_buffer.DeviceBuffer(2, torch.device("cpu"))
    with Tape() as tape:
        kept.append(row)
    for number in range(1, 11):
        row.fill_(number)
        tape.replay()
    with pytest.raises(RuntimeError, match="3 records were overwritten: read them at least every 8 replays"):
        kept.read()
    assert kept.read()[:, 0].tolist() == list(range(3, 11))


@pytest.mark.usefixtures("accelerator")
def test_an_unreliable_row_is_nan_and_after_two_more_the_bracket_is_measured(
    monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    model = PROBLEM.model()
    batches = [PROBLEM.batch(generator) for _ in range(9)]
    monitor = gc.CurvatureMonitor(model, PROBLEM.loss_fn)
    ratio = "grokcurv.commutator.RELIABLE_RATIO"

    def go_on(monitor: gc.CurvatureMonitor, count: int) -> None:
        for _ in range(count):
            model.zero_grad()
            PROBLEM.loss_fn(model, batches[monitor.steps]).backward()
            monkeypatch.setattr(ratio, 1e9 if monitor.steps == 2 else 10.0)
            monitor.step(batches[monitor.steps], batches[monitor.steps + 1])

    go_on(monitor, 3)
    resumed = gc.CurvatureMonitor(model, PROBLEM.loss_fn)
    resumed.load_state_dict(monitor.state_dict())
    go_on(monitor, 5)
    go_on(resumed, 5)
    found = monitor.records()
    assert found["method"].tolist() == ["difference"] * 4 + ["bracket"] * 4
    assert found["reliable"].tolist() == [True, True, False] + [True] * 5
    assert found["defect_median"].isna().tolist() == [False, False, True] + [False] * 5
    assert set(FIELDS) < set(found.columns)
    assert resumed.records().drop(columns="measure_seconds").equals(found.drop(columns="measure_seconds"))


@pytest.mark.usefixtures("accelerator")
def test_alignment_cannot_be_captured(generator: Generator) -> None:
    model, batches = PROBLEM.model(), [PROBLEM.batch(generator) for _ in range(2)]
    monitor = gc.CurvatureMonitor(model, PROBLEM.loss_fn, sampler=lambda: tuple(batches), alignment=True)
    monitor.step()
    with pytest.raises(RuntimeError, match="capture a monitor with alignment=False"), Tape():
        monitor.step()
    assert monitor.steps == 1
