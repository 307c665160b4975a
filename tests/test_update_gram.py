"""UpdateGram: the rolling Gram matrix of updates, against singular values of the updates themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fed import Rows, attention, conv, loss_fn, mlp
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine
from grokcurv.measures.update_gram import spectrum


def truth(updates: np.ndarray) -> dict[str, float]:
    """By the definitions, from a singular value decomposition in float64."""
    window = len(updates)
    sigma = np.linalg.svd(updates, compute_uv=False)
    ratio = sigma[:-1] / sigma[1:]
    half = window // 2
    old, new = (np.linalg.svd(part, full_matrices=False)[2] for part in (updates[:half], updates[window - half :]))
    share = np.cumsum(sigma**2) / np.sum(sigma**2)
    return {
        "g23": sigma[1] ** 2 - sigma[2] ** 2,
        "k_star": float(np.argmax(ratio) + 1),
        "k_star_weighted": float(np.argmax(sigma[:-1] / sigma.sum() * ratio) + 1),
        "gap_ratio": ratio.max(),
        "rotation_1": abs(old[0] @ new[0]),
        "rotation_2": abs(old[1] @ new[1]) if half > 1 else math.nan,
        "r90": float(np.argmax(share >= 0.9) + 1),
    }


def train(
    make: Callable[[], tuple[nn.Module, tuple[int, ...]]],
    measure: gc.UpdateGram,
    steps: int,
    lr: float = 0.05,
    state_at: int | None = None,
    **options: Any,
) -> tuple[list[Tensor], gc.CurvatureMonitor]:
    """The parameters before each step, and the monitor; stopped and gone on with at a step."""
    torch.manual_seed(int(torch.randint(1 << 30, ())))
    model, shape = make()
    batch = torch.randn(24, *shape), torch.randint(4, (24,))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    monitor = gc.attach(model, loss_fn, optimizer, measures=[measure], **options)
    thetas = []
    for step in range(steps):
        if step == state_at:
            state = monitor.state_dict()
            monitor.detach()
            again = gc.UpdateGram(measure.window, segments=measure._wanted)
            monitor = gc.attach(model, loss_fn, optimizer, measures=[again], **options)
            monitor.load_state_dict(state)
        thetas.append(flatten(model))
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return thetas, monitor


@pytest.mark.parametrize("make", [mlp, attention, conv])
@pytest.mark.parametrize("window", [3, 4, 10])
def test_rows_are_those_of_the_updates(make: Any, window: int) -> None:
    thetas, monitor = train(make, gc.UpdateGram(window, segments="*"), 18, state_at=7, every=3)
    updates = torch.stack(thetas).diff(dim=0).double().numpy()
    found = monitor.records()
    assert found["step"].tolist() == list(range(0, 18, 3))
    for _, row in found.iterrows():
        step = int(row["step"])
        if step < window:
            assert row[list(gc.UpdateGram.columns)].isna().all()
            continue
        for name, value in truth(updates[step - window : step]).items():
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True), (name, step)
        length = thetas[step].double().norm().item()
        assert row["update_gram_floor"] == pytest.approx(math.sqrt(window) * 2**-24 * length, rel=1e-6)


def test_attention_matrices_are_the_default() -> None:
    measure = gc.UpdateGram(4)
    thetas, monitor = train(attention, measure, 8)
    kept = torch.cat([segment.of(torch.stack(thetas)) for segment in measure.segments], 1)
    updates = kept.diff(dim=0).double().numpy()
    row = monitor.records().iloc[-1]
    assert row["g23"] == pytest.approx(truth(updates[3:7])["g23"], rel=1e-6)
    assert measure.size == 4 * 64


@pytest.mark.parametrize("kind", ["still", "equal", "two", "one that moves"])
def test_degenerate_updates(kind: str) -> None:
    """What has no direction is NaN; directions that are not there have no ratio."""
    rows = {
        "still": torch.zeros(6, 20),
        "equal": torch.randn(1, 20).expand(6, 20),
        "two": torch.randn(6, 2) @ torch.randn(2, 20),
        "one that moves": torch.cat([torch.zeros(5, 20), torch.randn(1, 20)]),
    }[kind].double()
    g23, k, weighted, ratio, first, second, r90 = spectrum((rows @ rows.T)[None])[0].tolist()
    if kind == "still":
        assert math.isnan(g23 + k + ratio + r90 + first)
        return
    dimensions = 2 if kind == "two" else 1
    assert (k, weighted, ratio) == (dimensions, dimensions, math.inf)
    assert r90 <= dimensions
    sigma = torch.linalg.svdvals(rows)
    assert g23 == pytest.approx(float(sigma[1] ** 2 - sigma[2] ** 2), abs=1e-12 * float(sigma[0] ** 2))
    if kind == "equal":
        assert first == pytest.approx(1.0)
    assert math.isnan(second) == (dimensions == 1)
    assert math.isnan(first) == (kind == "one that moves")


@pytest.mark.parametrize("along", ["one rounded after the other", "each rounded from float64"])
def test_the_floor_covers_what_storing_rounds(along: str) -> None:
    """Of 500 draws of updates of parameters in float32, beside the same in float64: every sigma, and g23."""
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    within = []
    for _ in range(500):
        theta = torch.randn(40, generator=generator).float()
        steps = 10 ** float(torch.empty(()).uniform_(-7, -1, generator=generator))
        updates = steps * torch.randn(6, 40, generator=generator, dtype=torch.float64)
        points = [theta.double()]
        for update in updates:
            points.append(points[-1] + update)
            if along == "one rounded after the other":
                points[-1] = points[-1].float().double()
        stored = torch.stack(points).float().double().diff(dim=0)
        exact, found = torch.linalg.svdvals(updates), torch.linalg.svdvals(stored)
        floor = math.sqrt(6) * 2**-24 * points[-1].norm() * (1 + 1e-6)
        gaps = [sigma[1] ** 2 - sigma[2] ** 2 for sigma in (exact, found)]
        gap_floor = 2 * (found[1] + found[2]) * floor
        within.append([bool(((exact - found).abs() <= floor).all()), bool((gaps[0] - gaps[1]).abs() <= gap_floor)])
    assert np.mean(within, 0).min() >= 0.95


@pytest.mark.parametrize("make", [mlp, attention, conv])
def test_runs_together_are_each_alone(make: Any) -> None:
    """To the bit, also after one has left and the others have gone on elsewhere."""
    size = len(flatten(make()[0]))
    thetas = torch.randn(12, 3, size).cumsum(0)
    segments = None if make is attention else ["*weight"]
    new = lambda: gc.UpdateGram(4, segments, spectrum=True)  # noqa: E731
    many, left = Rows(make, 3, new()), Rows(make, 2, new())
    many.feed(thetas[:7])
    left.feed(thetas[:3, :2])
    for place, run in enumerate((2, 0)):
        left.monitor.load_state_dict(many.monitor.state_dict(run), place)
    many.feed(thetas[7:])
    left.feed(thetas[7:, [2, 0]])
    for run in range(3):
        alone = Rows(make, 1, new())
        alone.feed(thetas[:, run : run + 1])
        pd.testing.assert_frame_equal(many.numbers(run), alone.numbers(), check_exact=True)
        if run != 1:
            pd.testing.assert_frame_equal(left.numbers((2, 0).index(run)), alone.numbers(), check_exact=True)


def test_runs_that_are_kept_go_on() -> None:
    thetas = torch.randn(9, 3, len(flatten(mlp()[0]))).cumsum(0)
    many, alone = Rows(mlp, 3, gc.UpdateGram(3, "*")), Rows(mlp, 1, gc.UpdateGram(3, "*"))
    many.feed(thetas[:5])
    many.monitor.keep([2])
    many.monitor.probe.gradients.keep([2])
    many.feed(thetas[5:])
    alone.feed(thetas[:, 2:])
    pd.testing.assert_frame_equal(many.numbers(), alone.numbers(), check_exact=True)


@pytest.mark.parametrize("make", [mlp, attention, conv])
def test_training_is_what_it_is_without(make: Any) -> None:
    def trained(measured: bool) -> list[Any]:
        torch.manual_seed(3)
        model, shape = make()
        model = nn.Sequential(model, nn.Dropout(0.2), nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        measures = [gc.UpdateGram(3, "*", spectrum=True)]
        monitor = gc.attach(model, loss_fn, optimizer, measures=measures) if measured else None
        for _ in range(6):
            optimizer.zero_grad()
            loss_fn(model, (torch.randn(8, *shape), torch.randint(4, (8,)))).backward()
            optimizer.step()
        if monitor is not None:
            monitor.detach()
        moments = [x for state in optimizer.state.values() for x in state.values()]
        grads = [p.grad for p in model.parameters()]
        return [*model.state_dict().values(), *grads, *moments, torch.random.get_rng_state()]

    assert all(map(torch.equal, trained(True), trained(False)))


@pytest.mark.parametrize("kind", ["frozen by a zero gradient", "one update", "equal updates", "more than were taken"])
def test_degenerate_training(kind: str) -> None:
    steps, p = 7, len(flatten(mlp()[0]))
    thetas = torch.randn(1, 1, p).repeat(steps, 1, 1)
    if kind == "one update":
        thetas[-1] += torch.randn(1, p)
    if kind == "equal updates":  # of powers of two, or rounding would make them differ
        thetas = (torch.randint(-8, 8, (1, p)) / 8.0) * torch.arange(1, steps + 1)[:, None, None]
    rows = Rows(mlp, 1, gc.UpdateGram(20 if kind == "more than were taken" else 3, "*", spectrum=True))
    rows.feed(thetas)
    row = rows.numbers().iloc[-1]
    if kind == "more than were taken":
        assert rows.numbers()[list(rows.monitor.measures[0].columns)].isna().all(axis=None)
        return
    assert row["sigma_2"] == row["sigma_3"] == 0
    length = 0.0 if kind.startswith("frozen") else float(thetas[-1].sub(thetas[-2]).double().norm())
    assert row["length_3"] == pytest.approx(length, rel=1e-12)
    times = {"one update": 1, "equal updates": 3}.get(kind, 0)
    assert row["sigma_1"] == pytest.approx(math.sqrt(times) * length, rel=1e-12)
    assert math.isnan(row["k_star"]) if times == 0 else row["k_star"] == 1


def test_the_spectrum_is_that_of_the_updates() -> None:
    thetas = torch.randn(9, 1, len(flatten(conv()[0]))).cumsum(0)
    rows = Rows(conv, 1, gc.UpdateGram(5, "*", spectrum=True))
    rows.feed(thetas)
    updates = thetas[3:, 0].diff(dim=0).double().numpy()
    found = rows.numbers().iloc[-1]
    sigma, lengths = np.linalg.svd(updates, compute_uv=False), np.linalg.norm(updates, axis=1)
    np.testing.assert_allclose(found[[f"sigma_{j}" for j in range(1, 6)]].astype(float), sigma, rtol=1e-9)
    np.testing.assert_allclose(found[[f"length_{j}" for j in range(1, 6)]].astype(float), lengths, rtol=1e-12)


def test_parameters_on_segments() -> None:
    """Parts in any order, in pieces, across parameters, none, and frozen parameters between."""
    model, _ = attention()
    model.attention.out_proj.bias.requires_grad_(False)
    engine = GradientEngine(model, loss_fn)
    (matrix,) = gc.select_segments(model, "attention.in_proj_weight[:, 2:5]")
    across = gc.Segment("across", 150, 130, (130,))
    for segments in ([matrix, across], [across, matrix], [gc.Segment("none", 4, 0, (0,))], engine.segments):
        wanted = torch.cat([segment.of(flatten(model)) for segment in segments])
        out = torch.full((1, len(wanted)), math.nan)
        assert torch.equal(engine.thetas_on(segments, out)[0], wanted)


@pytest.mark.parametrize("at", [2, 9])
def test_a_state_goes_on(at: int) -> None:
    torch.manual_seed(11)
    _, whole = train(mlp, gc.UpdateGram(5, "*"), 16)
    torch.manual_seed(11)
    _, stopped = train(mlp, gc.UpdateGram(5, "*"), 16, state_at=at)
    frames = [monitor.records().drop(columns="measure_seconds") for monitor in (whole, stopped)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    other, _ = mlp()
    again = gc.attach(other, loss_fn, torch.optim.SGD(other.parameters(), lr=0.1), measures=[gc.UpdateGram(6, "*")])
    with pytest.raises(ValueError, match="another window"):
        again.load_state_dict(whole.state_dict())


def test_bad_input() -> None:
    model, _ = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"window must be at least 3.*got 2"):
        gc.UpdateGram(2)
    with pytest.raises(ValueError, match=r"UpdateGram: model has no nn\.MultiheadAttention.*segments='\*'"):
        gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateGram(5)])
    with pytest.raises(MemoryError, match=r"window=10{12} keeps 10{11}2 vectors.* 376\d{12} bytes, and cpu"):
        gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateGram(10**12, "*")])
    with pytest.raises(ValueError, match=r"'nothing' matches none of 0\.weight"):
        gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateGram(5, "nothing")])
