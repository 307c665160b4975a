"""UpdateGram: the rolling Gram matrix of updates, against singular values of the updates themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import flatten
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


def conv() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)), (1, 4, 4)


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)), (5,)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def attention() -> tuple[nn.Module, tuple[int, ...]]:
    return Attention(), (3, 8)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


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


def test_the_floor_covers_what_storing_rounds() -> None:
    """Of 500 draws of updates that are added to parameters in float32, beside the same in float64."""
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    within = []
    for _ in range(500):
        theta = torch.randn(40, generator=generator).float()
        steps = 10 ** float(torch.empty(()).uniform_(-7, -1, generator=generator))
        updates = steps * torch.randn(6, 40, generator=generator, dtype=torch.float64)
        stored, here = [], theta
        for update in updates:
            moved = (here.double() + update).float()
            stored.append((moved - here).double())
            here = moved
        exact, found = torch.linalg.svdvals(updates), torch.linalg.svdvals(torch.stack(stored))
        floor = math.sqrt(6) * 2**-24 * here.double().norm()
        within.append(bool(((exact - found).abs() <= floor * (1 + 1e-6)).all()))
    assert sum(within) >= 0.95 * 500


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
    with pytest.raises(ValueError, match=r"'nothing' matches none of 0\.weight"):
        gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateGram(5, "nothing")])
