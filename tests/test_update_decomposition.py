"""UpdateDecomposition: the parts of updates, against optimisers written out in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from models import TINY
from test_update_gram import attention, conv, loss_fn, mlp
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.flat import select_segments
from grokcurv.training import TrainConfig
from grokcurv.training.program import Program
from grokcurv.training.run import Training

Norms = dict[str, float]
STEPS = 7


def adamw(
    history: list[tuple[Tensor, Tensor]], lr: float, decay: float, betas: tuple[float, float], eps: float
) -> Norms:
    """Of the last update, from all (theta, g) before it."""
    m = v = torch.zeros_like(history[0][1])
    for _, g in history:
        earlier = betas[0] * m
        m, v = earlier + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    t = len(history)
    c = (1 - betas[0] ** t) * ((v / (1 - betas[1] ** t)).sqrt() + eps)
    theta, g = history[-1]
    parts = {"decay_norm": -lr * decay * theta, "momentum_norm": -lr * earlier / c}
    return norms(parts | {"gradient_part_norm": -lr * (1 - betas[0]) * g / c})


def sgd(
    history: list[tuple[Tensor, Tensor]], lr: float, decay: float, mu: float, dampening: float, nesterov: bool
) -> Norms:
    b = None
    for theta, g in history:
        d = g + decay * theta
        before, k = b, 1.0 if b is None else 1 - dampening
        b = d if b is None else mu * b + k * d
    earlier = torch.zeros_like(g) if before is None or not mu else mu * before
    share = (1 + mu * k if nesterov else k) if mu else 1.0
    parts = {"decay_norm": -lr * share * decay * theta, "momentum_norm": -lr * (mu if nesterov else 1) * earlier}
    return norms(parts | {"gradient_part_norm": -lr * share * g})


def norms(parts: dict[str, Tensor]) -> Norms:
    update = sum(parts.values())
    return {"update_norm": float(update.norm())} | {name: float(part.norm()) for name, part in parts.items()}


OPTIMIZERS: dict[
    str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], Callable[..., Norms], dict[str, Any]]
] = {
    "adamw": (
        torch.optim.AdamW,
        {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.9, 0.98)},
        adamw,
        {"lr": 1e-2, "decay": 0.3, "betas": (0.9, 0.98), "eps": 1e-8},
    ),
    "adam": (torch.optim.Adam, {"lr": 1e-2}, adamw, {"lr": 1e-2, "decay": 0.0, "betas": (0.9, 0.999), "eps": 1e-8}),
    "sgd": (
        torch.optim.SGD,
        {"lr": 0.1, "weight_decay": 0.05},
        sgd,
        {"lr": 0.1, "decay": 0.05, "mu": 0.0, "dampening": 0.0, "nesterov": False},
    ),
    "momentum": (
        torch.optim.SGD,
        {"lr": 0.05, "weight_decay": 0.05, "momentum": 0.9, "dampening": 0.2},
        sgd,
        {"lr": 0.05, "decay": 0.05, "mu": 0.9, "dampening": 0.2, "nesterov": False},
    ),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
        sgd,
        {"lr": 0.05, "decay": 0.01, "mu": 0.8, "dampening": 0.0, "nesterov": True},
    ),
}


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


@pytest.mark.parametrize("make", [mlp, attention, conv])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("attached", [True, False])
def test_parts(name: str, make: Callable[[], tuple[nn.Module, tuple[int, ...]]], attached: bool) -> None:
    kind, options, truth, settings = OPTIMIZERS[name]
    model, shape = make()
    optimizer = kind(model.parameters(), **options)
    batch = torch.randn(24, *shape), torch.randint(4, (24,))
    if attached:
        monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateDecomposition()])
    else:
        monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.UpdateDecomposition(optimizer)])
    history, factors = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        if not attached:
            monitor.step(batch, (batch[0].flip(0), batch[1].flip(0)))
        before = flat(x.grad for x in model.parameters()).norm()
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        gradient = flat(x.grad for x in model.parameters())
        factors.append(float(gradient.norm() / before))
        history.append((flat(model.parameters()), gradient))
        optimizer.step()
    found = monitor.records()
    assert found[list(gc.UpdateDecomposition.columns)].iloc[0].isna().all()
    for step in range(1, STEPS):
        for column, value in truth(history[:step], **settings).items():
            assert found[column][step] == pytest.approx(value, rel=2e-4, abs=1e-7), (step, column)
        if attached:
            assert math.isnan(found["clip_factor"][step])
        else:
            assert found["clip_factor"][step] == pytest.approx(factors[step - 1], rel=2e-4)


def loop(model: nn.Module, shape: tuple[int, ...], optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    batch = torch.randn(24, *shape), torch.randint(4, (24,))
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


def last(monitor: gc.CurvatureMonitor) -> dict[str, float]:
    return dict(monitor.records()[list(gc.UpdateDecomposition.columns)].iloc[-1])


def test_what_is_not_known_is_nan() -> None:
    """Adam's second moment mixes coupled decay with gradients; of RMSprop the average of gradients is another."""
    for kind, known in ((torch.optim.Adam, set()), (torch.optim.NAdam, {"decay_norm"}), (torch.optim.RMSprop, set())):
        model, shape = mlp()
        options = {"decoupled_weight_decay": True} if known else {}
        optimizer = kind(model.parameters(), weight_decay=0.1, **options)
        monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateDecomposition()])
        loop(model, shape, optimizer)
        found = last(monitor)
        assert {name for name, value in found.items() if value == value} == {"update_norm"} | known, kind


def test_parameters_that_nobody_moves_have_no_parts() -> None:
    model, shape = mlp()
    optimizer = torch.optim.AdamW(model[0].parameters(), weight_decay=0.5)
    monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateDecomposition()])
    loop(model, shape, optimizer)
    assert last(monitor)["decay_norm"] <= 1e-3 * 0.5 * float(flat(model[0].parameters()).norm()) * 1.1


def test_a_step_that_was_skipped_has_no_parts() -> None:
    model, shape = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.UpdateDecomposition(optimizer)])
    batches = [(torch.randn(24, *shape), torch.randint(4, (24,))) for _ in range(5)]
    for step, (batch, following) in enumerate(itertools.pairwise(batches)):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch, following)
        if step != 1:
            optimizer.step()
    assert monitor.records()["update_norm"].isna().tolist() == [True, False, True, False]


def test_a_run_that_goes_on_has_the_same_rows() -> None:
    rows = []
    for stop in (None, 3):
        torch.manual_seed(3)
        model, shape = attention()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateDecomposition()])
        for step in range(6):
            if step == stop:
                state = monitor.state_dict()
                monitor.detach()
                monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateDecomposition()])
                monitor.load_state_dict(state)
            loop(model, shape, optimizer, 1)
        rows.append(monitor.records()[list(gc.UpdateDecomposition.columns)])
    assert rows[0].equals(rows[1])


@pytest.mark.parametrize("make", [mlp, attention, conv])
def test_angles_and_shares(make: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> None:
    """Of the vectors themselves, formed in float64 by the definition of AdamW."""
    model, shape = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.3)
    size = flat(model.parameters()).numel()
    basis = gc.Subspace(torch.linalg.qr(torch.randn(size, 3))[0].T.contiguous())
    wanted = select_segments(model, "*weight")
    measure = gc.UpdateDecomposition(optimizer, cosines=True, segments="*weight", basis=basis)
    monitor = gc.CurvatureMonitor(model, loss_fn, measures=[measure])
    batch = torch.randn(24, *shape), torch.randint(4, (24,))
    m, v = torch.zeros(size).double(), torch.zeros(size).double()
    truths: dict[str, float] = {}
    for t in range(1, 5):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch, (batch[0].flip(0), batch[1].flip(0)))
        theta, g = flat(model.parameters()), flat(x.grad for x in model.parameters())
        if t > 1:
            row = monitor.records().iloc[-1]
            for name, value in truths.items():
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, t)
        earlier, m, v = 0.9 * m, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        scale = -1e-2 / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        parts = {"decay": -3e-3 * theta, "momentum": scale * earlier, "gradient_part": scale * 0.1 * g}
        cosine = torch.nn.CosineSimilarity(0, 0.0)
        truths = {
            "decay_momentum_cosine": float(cosine(parts["decay"], parts["momentum"])),
            "decay_gradient_cosine": float(cosine(parts["decay"], parts["gradient_part"])),
            "momentum_gradient_cosine": float(cosine(parts["momentum"], parts["gradient_part"])),
        }
        for name, part in ({"update": sum(parts.values())} | parts).items():
            on = sum(float(segment.of(part[None]).square().sum()) for segment in wanted)
            truths[f"{name}_segment_share"] = on / float(part.square().sum()) if part.any() else math.nan
            inside = (basis.to_dense().double() @ part).square().sum()
            truths[f"{name}_basis_share"] = float(inside / part.square().sum()) if part.any() else math.nan
        truths = {name: value for name, value in truths.items() if t > 1 or "momentum" not in name}
        optimizer.step()


@pytest.mark.parametrize("settings", [{}, {"successive": True, "pairs": 1, "measure_every": 1}])
def test_each_run_of_a_program_has_the_parts_it_has_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of several optimisers, one of which ends; and AdamW's parts add up to what it did."""
    own = [
        {"optimizer": "adamw", "clip": 0.5, "warmup": 9},
        {"optimizer": "muon"},
        {"optimizer": "sgd", "momentum": 0.9},
    ]
    base = dataclasses.replace(TINY, **{"pca_every": 0, "measure_every": 5} | settings)
    configs = [dataclasses.replace(base, seed=seed, **each) for seed, each in enumerate(own)]

    def trained(configs: list[TrainConfig], **options: Any) -> Program:
        made = lambda *_: (gc.UpdateDecomposition(**options),)  # noqa: E731
        monkeypatch.setattr("grokcurv.training.measured.named_measures", made)
        program = Program([Training(config) for config in configs])
        program.observe(program.runs)
        for step in range(21):
            if step == 11 and len(program.runs) == 3:
                program.keep([run for run in program.runs if run.config.optimizer != "muon"])
            assert not program.update()
            assert not program.observe(program.runs)
        return program

    def rows(program: Program) -> dict[str, pd.DataFrame]:
        group = program.groups[0]
        found = {run.config.optimizer: group.monitor.records(place) for place, run in enumerate(group.runs)}
        return {name: frame[["step", *group.monitor.measures[0].columns]] for name, frame in found.items()}

    together = rows(trained(configs))
    for config in (configs[0], configs[2]):
        name = config.optimizer
        alone = rows(trained([config], cosines=True))[name]
        pd.testing.assert_frame_equal(together[name], alone[together[name].columns], check_exact=True)
        last = alone.iloc[-1]
        a, b, c = (last[f"{part}_norm"] for part in ("decay", "momentum", "gradient_part"))
        ab, ac, bc = (last[f"{pair}_cosine"] for pair in ("decay_momentum", "decay_gradient", "momentum_gradient"))
        ab, ac = (0.0, 0.0) if name == "sgd" and not a else (ab, ac)
        whole = math.sqrt(a * a + b * b + c * c + 2 * (a * b * ab + a * c * ac + b * c * bc))
        assert whole == pytest.approx(last["update_norm"], rel=1e-3)
        assert math.isnan(last["clip_factor"]) == (not settings)
        assert not settings or last["clip_factor"] <= 1.0 + 1e-5


def test_no_optimiser_is_an_error() -> None:
    model, _ = mlp()
    with pytest.raises(ValueError, match="UpdateDecomposition: no optimiser is known"):
        gc.CurvatureMonitor(model, loss_fn, measures=[gc.UpdateDecomposition()])
