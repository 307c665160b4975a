"""attach: loops that are measured without a change to them, within a budget."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional

import grokcurv as gc
from grokcurv import budget as budget_module
from grokcurv.commutator import CommutatorProbe
from grokcurv.gradients import GradientEngine
from grokcurv.measures.base import Measure

LOOPS = Path(__file__).parents[1] / "examples" / "loops"
NEEDED = {"hooked_transformer": "transformer_lens", "lightning_manual": "lightning"}
STEPS = 6


def loop(name: str) -> ModuleType:
    """A script of examples/loops."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    if name == "full_batch" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon before 2.9")
    spec = importlib.util.spec_from_file_location(name, LOOPS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(model: nn.Module, loss_fn: Any, optimizer: Any, **options: Any) -> gc.CurvatureMonitor:
    """A monitor whose step() is called before the first optimiser's, as somebody who edits the loop would call it."""
    monitor = gc.CurvatureMonitor(model, loss_fn, **options)
    several = list(optimizer.values()) if isinstance(optimizer, Mapping) else optimizer
    first = several[0] if isinstance(several, list) else several
    first = getattr(first, "optimizer", first)
    step = first.step

    def measured_step(*args: Any, **kwargs: Any) -> Any:
        monitor.step()
        return step(*args, **kwargs)

    first.step = measured_step
    return monitor


def records(monitor: gc.CurvatureMonitor) -> pd.DataFrame:
    return monitor.records().drop(columns="measure_seconds")


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("name", sorted(path.stem for path in LOOPS.glob("*.py")))
def test_a_loop_of_the_examples(name: str) -> None:
    train = loop(name).train
    model, monitor = train(STEPS)
    other, stepped = train(STEPS, by_hand)
    plain, _ = train(STEPS, lambda *_, **__: None)
    assert monitor.steps == STEPS
    pd.testing.assert_frame_equal(records(monitor), records(stepped), check_exact=True)
    assert records(monitor)["reliable"].any()
    for one, two, three in zip(weights(model), weights(other), weights(plain), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


class Problem:
    """A small network, and what trains it."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        self.batch = torch.randn(32, 3), torch.randint(2, (32,))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    @staticmethod
    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def attach(self, **options: Any) -> gc.CurvatureMonitor:
        options = {"sampler": gc.halves(self.batch)} | options
        return gc.attach(self.model, self.loss_fn, self.optimizer, **options)

    def step(self, after: Callable[[], None] = lambda: None) -> None:
        self.optimizer.zero_grad()
        self.loss_fn(self.model, self.batch).backward()
        after()
        self.optimizer.step()


def test_the_end_of_a_with_block_detaches() -> None:
    problem = Problem()
    with problem.attach() as monitor:
        problem.step()
    problem.step()
    assert monitor.steps == 1
    assert not problem.optimizer._optimizer_step_pre_hooks
    monitor.detach()
    other = problem.attach(every=2)
    for _ in range(3):
        problem.step()
    assert (monitor.steps, other.steps, len(other.records())) == (1, 3, 2)


def test_of_several_optimisers_the_one_that_steps_first_is_counted() -> None:
    problem = Problem()
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (problem.model[0], problem.model[2]))
    seen = []
    monitor = gc.attach(
        problem.model, problem.loss_fn, {"second": second, "first": first}, sampler=gc.halves(problem.batch)
    )
    for _ in range(3):
        problem.loss_fn(problem.model, problem.batch).backward()
        seen.append(weights(problem.model))
        first.step()
        second.step()
    twin = gc.CurvatureMonitor(problem.model, problem.loss_fn, sampler=gc.halves(problem.batch))
    for theta in seen:
        for parameter, value in zip(problem.model.parameters(), theta, strict=True):
            parameter.data.copy_(value)
        twin.step()
    pd.testing.assert_frame_equal(records(monitor), records(twin), check_exact=True)


def test_a_step_that_a_scaler_skips_is_none() -> None:
    problem = Problem()
    monitor = problem.attach()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for number in range(4):
        problem.optimizer.zero_grad()
        scaler.scale(problem.loss_fn(problem.model, problem.batch)).backward()
        if number == 1:
            problem.model[0].weight.grad[0, 0] = math.inf
        scaler.step(problem.optimizer)
        scaler.update()
    assert monitor.steps == 3


def test_grad_is_not_used() -> None:
    def measured(clip: float) -> pd.DataFrame:
        problem = Problem()
        problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)
        monitor = problem.attach()
        for _ in range(3):
            problem.step(lambda: nn.utils.clip_grad_norm_(problem.model.parameters(), clip))
        return records(monitor)

    pd.testing.assert_frame_equal(measured(1e-3), measured(1e3), check_exact=True)


@pytest.mark.parametrize("kind", ["rows", "loader"])
def test_a_state_goes_on(kind: str) -> None:
    def sampler(problem: Problem) -> Any:
        if kind == "rows":
            return gc.subsample(problem.batch, rows=7)
        return gc.from_loader(list(zip(*(tensor.split(9) for tensor in problem.batch), strict=True)))

    whole, halved = Problem(), Problem()
    monitor, before = whole.attach(sampler=sampler(whole)), halved.attach(sampler=sampler(halved))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        halved.step()
    before.detach()
    after = halved.attach(sampler=sampler(halved))
    after.load_state_dict(before.state_dict())
    for _ in range(3):
        halved.step()
    pd.testing.assert_frame_equal(records(monitor), records(after), check_exact=True)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer.*NoneType"),
        ({"optimizer": []}, ValueError, "optimizer: none"),
        ({"optimizer": {"a": 3}}, TypeError, "got int"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0)},
            ValueError,
            "no parameter of the model",
        ),
        ({"sampler": None}, ValueError, r"the commutator.*gc\.subsample.*gc\.halves.*gc\.from_loader"),
        ({"every": 0}, ValueError, "every must be at least 1"),
        ({"budget": 0.0}, ValueError, "budget must be a positive share.*got 0.0"),
        ({"budget": math.nan}, ValueError, "budget must be"),
        ({"unknown": 1}, TypeError, "unknown"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], said: str) -> None:
    problem = Problem()
    given = {"optimizer": problem.optimizer, "sampler": gc.halves(problem.batch)} | change
    with pytest.raises(error, match=said):
        gc.attach(problem.model, problem.loss_fn, **given)
    assert not problem.optimizer._optimizer_step_pre_hooks


class Length(Measure):
    """A measure of one's own: the length of the parameters, and how many steps it has seen."""

    name, columns = "length", ("theta_norm", "seen")

    def bind(self, probe: CommutatorProbe) -> None:
        self.engine, self.seen = probe.gradients, 0

    def observe(self, step: int, pairs: Any, due: bool) -> torch.Tensor | None:
        self.seen += 1
        norm = self.engine.flatten().double().norm()
        return torch.stack([norm, torch.tensor(float(self.seen))])[None].double() if due else None

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        self.seen = state["seen"]


@pytest.mark.parametrize("sampled", [True, False])
def test_a_measure_of_one_s_own(sampled: bool) -> None:
    """With a sampler beside the commutators, without one alone; and it goes on from a state."""
    problem, norms = Problem(), []
    sampler = gc.halves(problem.batch) if sampled else None
    monitor = problem.attach(measures=[Length()], sampler=sampler, every=2)
    for number in range(6):
        if number == 3:
            state = monitor.state_dict()
            monitor.detach()
            monitor = problem.attach(measures=[Length()], sampler=sampler, every=2)
            monitor.load_state_dict(state)
        norms.append(torch.cat([w.flatten() for w in weights(problem.model)]).double().norm().item())
        problem.step()
    found = monitor.records()
    np.testing.assert_allclose(found["theta_norm"], norms[::2], rtol=1e-12)
    assert found["seen"].tolist() == [1, 3, 5]
    assert found["reliable"].tolist() == [sampled] * 3
    assert found["defect_median"].isna().tolist() == [not sampled] * 3
    assert monitor.cost["length"] > 0
    assert ("commutator" in monitor.cost) == sampled
    with pytest.raises(ValueError, match="measures"):
        problem.attach(measures=[Length(), Length()])
    with pytest.raises(ValueError, match="theta_norm"):
        problem.attach(sampler=gc.halves(problem.batch)).load_state_dict(state)


class Clock:
    """Time that passes where work is done: a second for a step of training, some for measurements."""

    COSTS: Mapping[tuple[str, bool], float] = {
        **dict.fromkeys([("difference", False)], 3.1),
        ("difference", True): 12.8,
        ("bracket", False): 5.0,
        ("bracket", True): 15.0,
    }

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.measured = 0.0, []
        measure = CommutatorProbe.measure_runs

        def timed(probe: CommutatorProbe, *args: Any, method: str, check: bool, **options: Any) -> Any:
            found = measure(probe, *args, method=method, check=check, **options)
            self.measured.append((method, check))
            self.now += self.COSTS[method, check]
            return found

        monkeypatch.setattr(CommutatorProbe, "measure_runs", timed)
        monkeypatch.setattr(budget_module.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("budget", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("every", [1, 4])
def test_a_budget_is_kept(budget: float, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, problem = Clock(monkeypatch), Problem()
    problem.optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e-3)
    monitor, spent, admission = problem.attach(budget=budget, every=every), [], 0
    most = Clock.COSTS["difference", True]

    def train() -> None:
        clock.now += 1.0

    for step in range(200):
        problem.step(train)
        if step == 0:
            admission = len(clock.measured)
        spent = [Clock.COSTS[kind] for kind in clock.measured[admission:]]
        if step % 10 == 9:  # at no time half a row more than was earned
            assert sum(spent) <= budget * (step + 1) + most / 2 + 1e-9
    found = monitor.records()
    assert sum(spent) >= budget * (200 - 6 - every) - most / 2 or found["dropped"].iloc[3:].eq(0).all()
    steps = found["step"].to_numpy()
    assert (steps % every == 0).all()
    assert math.isnan(found["interval"].iloc[0])
    assert found["interval"].iloc[1:].tolist() == np.diff(steps).tolist()
    assert found["dropped"].tolist() == [0, *(np.diff(steps) / every - 1)]
    assert monitor.cost["training"] == pytest.approx(199)
    assert monitor.cost["commutator"] == pytest.approx(sum(spent))
    assert monitor.cost["admission"] == pytest.approx(sum(Clock.COSTS[kind] for kind in clock.measured[:admission]))


def test_what_is_known_is_not_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row is the price of a checked one, and the float64 gradient of admission serves both of its looks."""
    clock, problem = Clock(monkeypatch), Problem()
    exact = []
    streamed = GradientEngine._streamed

    def counted(engine: GradientEngine, theta: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        exact.append(theta.dtype == torch.float64)
        streamed(engine, theta, *args, **kwargs)

    monkeypatch.setattr(GradientEngine, "_streamed", counted)
    monitor = problem.attach(budget=0.5)
    problem.step()
    rows = [("difference", True), *[("difference", False)] * 2, ("bracket", True), ("bracket", False)]
    assert clock.measured == rows
    prices = {f"{method}, checked" if check else method: price for (method, check), price in Clock.COSTS.items()}
    assert monitor.budget.prices == pytest.approx(prices | {"trajectory": 0.0})
    # Two at admission, four in the check of the first row, one in that of the bracket, whose products are no gradients.
    assert sum(exact) == 7
    assert [finding.check for finding in monitor.probe.gradients.admission] == [
        *("gradient", "repeat", "float64", "second derivative")
    ]


def test_a_resumed_budget_measures_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, problem = Clock(monkeypatch), Problem()
    generator = np.random.default_rng()

    def train() -> None:
        clock.now += generator.uniform(0.5, 1.5)

    monitor = problem.attach(budget=0.4)
    for _ in range(int(generator.integers(2, 60))):  # sometimes before a step of training has been timed
        problem.step(train)
    state = monitor.state_dict()
    model, optimizer = (x.state_dict() for x in (problem.model, problem.optimizer))
    model = {name: value.clone() for name, value in model.items()}
    optimizer = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, optimizer)
    if not math.isnan(monitor.budget.step):
        for _ in range(90):
            problem.step(train)
        other = Problem(seed=1)
        other.batch = problem.batch
        other.model.load_state_dict(model)
        other.optimizer.load_state_dict(optimizer)
        again = other.attach(budget=0.4)
        again.load_state_dict(state)
        for _ in range(90):
            other.step(train)
        pd.testing.assert_frame_equal(records(monitor), records(again), check_exact=True)
        assert monitor.budget.state_dict() == again.budget.state_dict()
    with pytest.raises(ValueError, match="a budget"):
        problem.attach().load_state_dict(state)


def test_a_bracket_is_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that the difference form loses takes a bracket too, and the next one comes later."""
    clock, problem = Clock(monkeypatch), Problem()
    monitor = problem.attach(budget=0.5, eta=1e-9)  # a step so short that all digits drown

    def train() -> None:
        clock.now += 1.0

    problem.step(train)
    admission = len(clock.measured)
    for _ in range(199):
        problem.step(train)
    found = monitor.records()
    assert (found["method"] == "bracket").all()
    rows = clock.measured[admission:]
    spent = sum(Clock.COSTS[kind] for kind in rows)
    assert len([method for method, _ in rows if method == "bracket"]) == len(found) - 1
    # What is not foreseen of a row, its bracket, may be spent beyond the half of it that had to be earned.
    assert spent <= 0.5 * 200 + Clock.COSTS["difference", True] / 2 + Clock.COSTS["bracket", True]
    assert monitor.cost["commutator"] == pytest.approx(spent)


def test_the_page_of_measures_runs() -> None:
    page = (LOOPS.parents[1] / "docs" / "measures.md").read_text()
    attached, *others, own = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    problem = Problem()
    names: dict[str, Any] = {
        "gc": gc,
        "torch": torch,
        "model": problem.model,
        "loss_fn": problem.loss_fn,
        "optimizer": problem.optimizer,
        "loader": [problem.batch] * 8,
        **dict(zip("xy", (torch.cat([part] * 4) for part in problem.batch), strict=True)),
    }
    exec(attached, names)
    assert names["monitor"].records()["g23"].notna().tolist() == [False] * 5 + [True] * 3
    for block in others:
        exec(block, dict(names))
    exec(own, names)
    with problem.attach(measures=[names["WeightNorm"]()]) as monitor:
        problem.step()
    assert monitor.records()["weight_norm"].item() > 0
