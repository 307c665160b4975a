"""OptimizerCommutator, against copies of the optimiser that really take both orders of steps in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import TINY
from test_update_gram import attention, conv, loss_fn, mlp
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.gradients import GradientEngine
from grokcurv.steps import read_state
from grokcurv.training import TrainConfig
from grokcurv.training.program import Program
from grokcurv.training.run import Training

COLUMNS = list(gc.OptimizerCommutator.columns)
Make = Callable[[], tuple[nn.Module, tuple[int, ...]]]
Batch = tuple[Tensor, Tensor]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, betas=(0.9, 0.98)),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
}


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def gradient_of(model: nn.Module, batch: Any, loss: Callable[..., Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model, batch), list(model.parameters())))


def widened(batch: Any) -> Any:
    return tuple(x.double() if x.is_floating_point() else x for x in batch)


def truth(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pair: tuple[Any, Any],
    max_norm: float | None = None,
    loss: Callable[..., Tensor] = loss_fn,
) -> dict[str, float]:
    """Both orders, each by a copy of model and optimiser in float64, with the gradients as they come and frozen."""
    pair = widened(pair[0]), widened(pair[1])
    exact = copy.deepcopy(model).double()
    at_theta = [gradient_of(exact, batch, loss) for batch in pair]

    def ends(order: Sequence[int], frozen: bool) -> list[Tensor]:
        twin, its = copy.deepcopy((model, optimizer))
        twin.double()
        its.load_state_dict(its.state_dict())
        points = [flat(twin.parameters())]
        for which in order:
            known = frozen or len(points) == 1
            gradient = at_theta[which] if known else gradient_of(twin, pair[which], loss)
            for parameter, part in zip(twin.parameters(), gradient, strict=True):
                parameter.grad = part.clone()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
            its.step()
            points.append(flat(twin.parameters()))
        return points

    (start, past_a, ab), (_, past_b, ba) = ends((0, 1), False), ends((1, 0), False)
    order = ends((0, 1), True)[-1] - ends((1, 0), True)[-1]
    unit = float((past_a - start).norm() * (past_b - start).norm())
    lengths = {"opt_defect": ab - ba, "opt_order": order, "opt_curvature": ab - ba - order}
    return {name: float(vector.norm()) / unit if unit else math.nan for name, vector in lengths.items()}


def batches(shape: tuple[int, ...], count: int, rows: int = 24) -> list[Batch]:
    return [(torch.randn(rows, *shape), torch.randint(4, (rows,))) for _ in range(count)]


def train(
    make: Make,
    kind: Callable[[Any], torch.optim.Optimizer],
    steps: int = 5,
    max_norm: float | None = None,
    stop: int | None = None,
    beside: Callable[[], list[Any]] = list,
    **options: Any,
) -> tuple[gc.CurvatureMonitor, list[dict[str, float]]]:
    """A loop that is measured, and the truth of each pair; stopped and gone on with at a step."""
    model, shape = make()
    optimizer = kind(model.parameters())

    def fresh() -> gc.CurvatureMonitor:
        measures = [*beside(), gc.OptimizerCommutator(optimizer, max_norm)]
        return gc.CurvatureMonitor(model, loss_fn, measures=measures, **options)

    monitor, wanted = fresh(), []
    for step, pair in enumerate(itertools.pairwise(batches(shape, steps + 1))):
        if step == stop:
            state = monitor.state_dict()
            monitor = fresh()
            monitor.load_state_dict(state)
        optimizer.zero_grad()
        loss_fn(model, pair[0]).backward()
        wanted.append(truth(model, optimizer, pair, max_norm))
        monitor.step(*pair)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return monitor, wanted


def assert_rows(found: pd.DataFrame, wanted: Sequence[dict[str, float]], share: float = 0.02) -> None:
    for (_, row), truths in zip(found.iterrows(), wanted, strict=True):
        assert row["opt_floor"] < share * truths["opt_defect"]
        for name, value in truths.items():
            assert row[name] == pytest.approx(value, abs=row["opt_floor"], rel=1e-6), (row["step"], name)


@pytest.mark.parametrize("make", [mlp, attention, conv])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_are_those_of_both_orders(make: Make, name: str) -> None:
    gradient = "own" if (make is conv) == (name in ("adamw", "sgd")) else "trusted"
    max_norm = 0.3 if gradient == "own" else None
    monitor, wanted = train(make, OPTIMIZERS[name], max_norm=max_norm, gradient=gradient)
    found = monitor.records()[["step", *COLUMNS]]
    assert found.iloc[-1][COLUMNS].isna().all()  # the next step has not come
    # The bias of keys has no gradient but rounding, which Adam makes as long as any other.
    assert_rows(found.iloc[:-1], wanted[:-1], math.inf if make is attention else 0.02)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pairs_of_a_sampler(name: str) -> None:
    """Are complete at once, every second step; the loop clips what the hook of the optimiser sees."""
    model, shape = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    data = batches(shape, 6)
    drawn = iter(data)
    monitor = gc.attach(
        model,
        loss_fn,
        optimizer,
        sampler=lambda: (next(drawn), next(drawn)),
        every=2,
        measures=[gc.OptimizerCommutator(max_norm=0.2)],
    )
    wanted = []
    for step in range(6):
        optimizer.zero_grad()
        loss_fn(model, batches(shape, 1)[0]).backward()
        if step % 2 == 0:
            monitor.detach()
            wanted.append(truth(model, optimizer, (data[step], data[step + 1]), 0.2))
            monitor.follow([optimizer])
        optimizer.step()
    assert_rows(monitor.records(), wanted)


def test_plain_gradient_descent_has_the_commutator_defect() -> None:
    monitor, _ = train(mlp, lambda p: torch.optim.SGD(p, lr=1e-2), eta=1e-2)
    found = monitor.records().iloc[:-1]
    assert np.allclose(found["opt_defect"], found["defect_median"], rtol=1e-4)
    assert (found["opt_order"] <= found["opt_floor"]).all()
    assert np.allclose(found["opt_curvature"], found["opt_defect"], rtol=1e-4)


def test_without_curvature_there_is_order_alone() -> None:
    """A loss that is linear in the parameters."""

    def linear(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch[0]).mul(batch[1][:, None]).mean()

    model = nn.Linear(7, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    monitor = gc.CurvatureMonitor(model, linear, measures=[gc.OptimizerCommutator(optimizer, 0.5)])
    for pair in itertools.pairwise([(torch.randn(9, 7), torch.randn(9)) for _ in range(6)]):
        optimizer.zero_grad()
        linear(model, pair[0]).backward()
        monitor.step(*pair)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    found = monitor.records().iloc[:-1]
    assert (found["opt_curvature"] <= found["opt_floor"]).all()
    assert (found["opt_floor"] < 1e-2 * found["opt_order"]).all()


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_curvature_is_what_hessians_do_through_the_second_update(max_norm: float | None) -> None:
    """``delta - delta_0 = J_AB H_B u_A - J_BA H_A u_B`` to first order in the updates."""
    torch.manual_seed(int(torch.randint(1 << 30, ())))
    model, shape = mlp()
    model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, eps=1e-3)
    pair = [widened(batch) for batch in batches(shape, 2)]
    for batch in map(widened, batches(shape, 20)):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    engine = GradientEngine(model, loss_fn)
    state, theta = read_state([optimizer], engine, max_norm), flat(model.parameters())[None]

    def gradient(theta: Tensor, batch: Batch) -> Tensor:
        return engine.gradient(theta[0], batch, torch.empty_like(theta[0]))[None]

    g = [gradient(theta, batch) for batch in pair]
    (u_a, s_a), (u_b, s_b) = (state.step(theta, each) for each in g)
    terms = []
    for after, step, other, batch in ((s_a, u_a, g[1], pair[1]), (s_b, u_b, g[0], pair[0])):
        product = (gradient(theta + 1e-3 * step, batch) - gradient(theta - 1e-3 * step, batch)) / 2e-3  # H u
        ways = [after.step(theta + step, other + sign * 1e-3 * product)[0] for sign in (1, -1)]
        terms.append((ways[0] - ways[1]) / 2e-3)
    predicted = float((terms[0] - terms[1]).norm() / (u_a.norm() * u_b.norm()))
    monitor = gc.CurvatureMonitor(
        model, loss_fn, sampler=lambda: tuple(pair), measures=[gc.OptimizerCommutator(optimizer, max_norm)]
    )
    monitor.step()
    assert monitor.records()["opt_curvature"][0] == pytest.approx(predicted, rel=1e-3)


def stepped(
    change: Callable[[int, nn.Module, torch.optim.Optimizer], Iterator[None] | None], **options: Any
) -> list[bool]:
    """Which rows are numbers, of a loop in which something is done before a step of the optimiser."""
    model, shape = mlp()
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=1e-2)
    optimizer.add_param_group({"params": [model[2].weight], "lr": 1e-3})
    monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator(optimizer)], **options)
    for step, pair in enumerate(itertools.pairwise(batches(shape, 7))):
        model.zero_grad()
        loss_fn(model, pair[0]).backward()
        if change(step, model, optimizer) == "another batch":
            pair = (tuple(x.clone() for x in pair[0]), batches((5,), 1)[0])
        monitor.step(*pair)
        if change(step, model, optimizer) != "skip":
            optimizer.step()
    found = monitor.records()[COLUMNS]
    assert (found.isna().all(axis=1) | found.notna().all(axis=1)).all()
    return found["opt_defect"].notna().tolist()


@pytest.mark.parametrize("gradient", ["own", "trusted"])
def test_a_pair_that_did_not_come_is_dropped(gradient: str) -> None:
    good = [True] * 5 + [False]
    assert stepped(lambda *_: None, gradient=gradient) == good
    assert stepped(lambda step, *_: "skip" if step == 2 else None, gradient=gradient)[2] is False
    assert stepped(lambda step, *_: "another batch" if step == 2 else None, gradient=gradient)[2] is False

    def unfreeze(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if step == 3 and len(optimizer.param_groups) == 2:
            optimizer.add_param_group({"params": [model[2].bias]})

    assert stepped(unfreeze, gradient=gradient) == [True, True, False, True, True, False]

    def schedule(step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)  # both updates of a pair have that of its first step

    assert stepped(schedule, gradient=gradient) == good


def test_another_clipping_than_it_was_told_is_seen() -> None:
    model, shape = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator(optimizer)])
    for pair in itertools.pairwise(batches(shape, 4)):
        optimizer.zero_grad()
        loss_fn(model, pair[0]).backward()
        monitor.step(*pair)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert monitor.records()["opt_defect"].isna().all()


def test_degenerate_gradients() -> None:
    """Where nothing moves there is no defect; where decay alone does, there is none to see."""
    for decay in (0.0, 0.5):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=decay)
        x = torch.randn(4, 3)
        monitor = gc.CurvatureMonitor(
            model,
            lambda model, batch: 0.0 * model(batch).sum(),
            sampler=lambda x=x: (x, x + 1),
            measures=[gc.OptimizerCommutator(optimizer)],
        )
        monitor.step()
        row = monitor.records()[COLUMNS].iloc[0]
        assert row["opt_defect"] <= row["opt_floor"] if decay else row.isna().all()


def test_the_floor_covers_what_rounding_does() -> None:
    """Of 500 pairs along runs of random learning rates, most of them far from the latest check."""
    within = []
    for run in range(20):
        model, shape = mlp()
        optimizer = list(OPTIMIZERS.values())[run % len(OPTIMIZERS)](model.parameters())
        optimizer.param_groups[0]["lr"] *= 10 ** float(torch.empty(()).uniform_(-2, 1))
        measure = gc.OptimizerCommutator(optimizer)
        measure.bind(gc.CommutatorProbe(model, loss_fn))
        for step in range(25):
            a, b, c = batches(shape, 3)
            row = measure.observe(step, [([a], [b])], True)
            found = dict(zip(COLUMNS, row[0].tolist(), strict=True))
            wanted = truth(model, optimizer, (a, b))
            within.append(all(abs(found[name] - value) <= found["opt_floor"] for name, value in wanted.items()))
            optimizer.zero_grad()
            loss_fn(model, c).backward()
            optimizer.step()
    assert sum(within) >= 0.95 * len(within)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_that_goes_on_has_the_same_rows(stop: int) -> None:
    frames = []
    for at in (None, stop):
        torch.manual_seed(5)
        monitor, _ = train(attention, OPTIMIZERS["adamw"], steps=7, max_norm=0.5, stop=at)
        frames.append(monitor.records().drop(columns="measure_seconds"))
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def test_training_is_left_alone() -> None:
    ends = []
    for measured in (False, True):
        torch.manual_seed(9)
        model, shape = attention()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator(optimizer)])
        for pair in itertools.pairwise(batches(shape, 5)):
            optimizer.zero_grad()
            loss_fn(model, pair[0]).backward()
            if measured:
                monitor.step(*pair)
            optimizer.step()
        states = [x for state in optimizer.state_dict()["state"].values() for x in state.values()]
        ends.append([*model.parameters(), *(x.grad for x in model.parameters()), *states, torch.get_rng_state()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize("settings", [{}, {"successive": True, "pairs": 1, "measure_every": 1}])
def test_each_run_of_a_program_is_measured_as_it_is_alone(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of several optimisers, one of which ends; and what is measured is trained as if it were not."""
    own = [
        {"optimizer": "adamw", "clip": 0.5, "warmup": 9},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "muon"},
    ]
    base = dataclasses.replace(TINY, **{"pca_every": 0, "measure_every": 5} | settings)
    configs = [dataclasses.replace(base, seed=seed, **each) for seed, each in enumerate(own)]

    def trained(configs: Sequence[TrainConfig], measures: Callable[[], list[Any]]) -> Program:
        monkeypatch.setattr("grokcurv.training.measured.named_measures", lambda *_: tuple(measures()))
        program = Program([Training(config) for config in configs])
        program.observe(program.runs)
        for step in range(22):
            if step == 11 and len(program.runs) == 3:
                program.keep([run for run in program.runs if run.config.optimizer != "sgd"])
            assert not program.update()
            assert not program.observe(program.runs)
        return program

    def rows(program: Program) -> dict[str, pd.DataFrame]:
        monitor = program.groups[0].monitor
        return {run.config.optimizer: monitor.records(place) for place, run in enumerate(program.groups[0].runs)}

    together = trained(configs, lambda: [gc.OptimizerCommutator()])
    plain = trained(configs, list)
    assert torch.equal(together.theta, plain.theta)
    for config in configs:
        if config.optimizer in rows(together):
            alone = rows(trained([config], lambda: [gc.OptimizerCommutator()]))[config.optimizer]
            found = rows(together)[config.optimizer]
            assert found["opt_defect"].notna().sum() >= len(found) - 1 > 3
            pd.testing.assert_frame_equal(found[["step", *COLUMNS]], alone[["step", *COLUMNS]], check_exact=True)


def test_a_row_is_completed_beside_those_of_other_measures() -> None:
    """Of which some stand among the commutator's columns, and some before its own."""
    monitor, wanted = train(mlp, OPTIMIZERS["adamw"], beside=lambda: [gc.GradientNoise(), gc.UpdateGram(3, "*")])
    found = monitor.records()
    assert_rows(found[["step", *COLUMNS]].iloc[:-1], wanted[:-1])
    assert found["gradient_noise_trace"].gt(0).all()
    assert found["g23"].notna().tolist() == [False] * 3 + [True] * (len(found) - 3)


def test_loggers_get_rows_when_they_are_complete() -> None:
    class Kept:
        def __init__(self) -> None:
            self.rows: list[dict[str, Any]] = []

        def log(self, record: dict[str, Any], step: int) -> None:
            self.rows.append(record)

    logger = Kept()
    monitor, _ = train(mlp, OPTIMIZERS["adamw"], loggers=[logger])
    found = monitor.records()
    assert [row["step"] for row in logger.rows] == found["step"].tolist()[:-1]
    assert [row["opt_defect"] for row in logger.rows] == found["opt_defect"].tolist()[:-1]
    assert monitor.last is not None
    assert math.isnan(monitor.last["opt_defect"])


def test_captured_steps_refuse_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shape = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator(optimizer)])
    monkeypatch.setattr("grokcurv.monitor.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="optimizer_commutator: a measure that remembers"):
        monitor.step(*batches(shape, 2))


def test_bad_input() -> None:
    model, _ = mlp()
    for options, words in (
        ({"max_norm": 0.0}, "max_norm must be positive, got 0"),
        ({"check_every": 0}, "check_every"),
    ):
        with pytest.raises(ValueError, match=words):
            gc.OptimizerCommutator(**options)
    with pytest.raises(ValueError, match="OptimizerCommutator: no optimiser is known; pass optimizer="):
        gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator()])
    with pytest.raises(ValueError, match=r"OptimizerCommutator: optimizer: RMSprop is not understood.*can be had"):
        gc.CurvatureMonitor(model, loss_fn, measures=[gc.OptimizerCommutator(torch.optim.RMSprop(model.parameters()))])
