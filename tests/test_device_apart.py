"""A device without float64, played by the CPU: what is on it, and what crosses, hangs on the memory of each tensor.

An Apple GPU is one. None is here, and so its rules are: whatever is made of a tensor that is there is there too; there
is no float64; and no operator takes tensors from both sides.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pytest
import torch
from models import PROBLEMS, Attention, Batch, Problem, cross_entropy
from torch import Generator, Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import grokcurv as gc
from grokcurv import gradients
from grokcurv.device import CPU, Device, device_of
from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine
from grokcurv.intercept import Apart
from grokcurv.state import Snapshot

HOME, THERE = "home", "there"


def tensors(*trees: Any) -> list[Tensor]:
    """Those in what an operator takes or returns. torch's own walk through a tree takes longer than the operator."""
    found = []
    for tree in trees:
        if isinstance(tree, Tensor):
            found.append(tree)
        elif isinstance(tree, (tuple, list)):
            found += tensors(*tree)
        elif isinstance(tree, dict):
            found += tensors(*tree.values())
    return found


class Sides(TorchDispatchMode):
    """Knows on which side the memory of each tensor is, and refuses what one device could not do.

    Attributes:
        crossed: which way, and how many numbers, of everything that was moved.
    """

    def __init__(self) -> None:
        super().__init__()
        self._memory: dict[int, tuple[StorageWeakRef, str]] = {}
        self.crossed: list[tuple[str, int]] = []

    def of(self, x: Tensor) -> str | None:
        """None for what nobody knows: memory that nothing was written to."""
        found, side = self._memory.get(x.untyped_storage()._cdata, (None, None))
        return side if found is not None and not found.expired() else None

    def put(self, side: str, *found: Tensor) -> None:
        for x in found:
            storage = x.untyped_storage()
            self._memory[storage._cdata] = StorageWeakRef(storage), side  # which keeps the address from others

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors(args, kwargs)
        sides = {side for x in given if x.dim() and (side := self.of(x))} or {self.of(x) for x in given} - {None}
        assert len(sides) <= 1, f"{func} meets tensors of both sides"
        result = func(*args, **(kwargs or {}))
        for side in sides:
            found = [x for x in (*given, *tensors(result)) if x.dim() or self.of(x) is None]
            assert side == HOME or all(x.dtype != torch.float64 for x in found), f"{func} is in float64"
            self.put(side, *found)
        return result


@dataclass(frozen=True)
class StandIn(Device):
    """The CPU as a device that has no float64."""

    sides: Sides | None = None

    def is_home(self, x: Tensor) -> bool:
        return self.sides.of(x) != THERE

    def move(self, x: Tensor, there: torch.device) -> Tensor:
        side = THERE if self.is_home(x) else HOME
        assert side == HOME or x.dtype != torch.float64
        moved = x.clone()
        self.sides.put(side, moved)
        self.sides.crossed.append((side, x.numel()))
        return moved

    def room(self, x: Tensor, leaf: Tensor) -> Tensor:
        room = super().room(x, leaf)
        self.sides.put(self.sides.of(leaf) or HOME, room)
        return room


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    """Models are on a device without float64, once their tensors were put there."""
    sides = Sides()
    monkeypatch.setattr("grokcurv.evaluation.device_of", lambda device: StandIn(device, False, sides))
    with sides:
        yield sides


# ------------------------------------------------------------------------------------------------------ the same rows


class Dropping(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.encoder.layers[0].dropout.p = 0.2

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.encoder(self.embed(x))[:, 0]))


class Normed(nn.Module):
    """A perceptron with running statistics, one of which its loss depends on, and noise of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        noise = 0.1 * torch.randn_like(x) + 0.1 * torch.rand(5, device=x.device)
        return self.layers(x + noise - self.mean)


MODELS: dict[str, Problem] = {
    "transformer": Problem(Attention, cross_entropy, PROBLEMS["tied attention"].batch),
    "dropout": Problem(Dropping, cross_entropy, PROBLEMS["tied attention"].batch),
    "perceptron": PROBLEMS["perceptron"],
    "rectifier": Problem(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), cross_entropy, PROBLEMS["perceptron"].batch
    ),
    "batch norm": Problem(Normed, cross_entropy, PROBLEMS["batch norm"].batch),
    "frozen": PROBLEMS["frozen"],
}

Change = Callable[[int, nn.Module], None]


def trained(
    problem: Problem,
    model: nn.Module,
    batches: list[Batch],
    measured: bool,
    change: Change | None,
    steps: int = 3,
    **options: Any,
) -> gc.CurvatureMonitor | None:
    """The monitor of some steps, or of as many that nobody measures."""
    torch.manual_seed(3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if options.pop("sampled", False):
        draws = iter(batches[6:] * 5)
        options |= {"sampler": lambda: (next(draws), next(draws)), "pairs": 2}
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, **options) if measured else None
    for step in range(steps):
        if change is not None:
            change(step, model)
        problem.loss_fn(model, batches[step]).backward()
        if monitor is not None:
            monitor.step(batches[step], batches[step + 1])
        optimizer.step()
        optimizer.zero_grad()
    return monitor


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Models are on the CPU, and nobody looks at what is called, which takes most of a test's time."""
    with pytest.MonkeyPatch.context() as patch, _disable_current_modes():
        patch.setattr("grokcurv.evaluation.device_of", device_of)
        yield


def assert_alike(
    problem: Problem, sides: Sides, generator: Generator, change: Change | None = None, **options: Any
) -> gc.CurvatureMonitor:
    """The monitor apart from its model, once all that it has found, and training, is as on a CPU, to the bit."""
    plain, batches = problem.model(), [problem.batch(generator) for _ in range(10)]
    there, unmeasured, far = copy.deepcopy(plain), copy.deepcopy(plain), copy.deepcopy(batches)
    sides.put(THERE, *Snapshot([there, far], [problem.loss_fn]).tensors)
    apart = trained(problem, there, far, True, change, **options, pca=gc.StreamingPCA(2), pca_every=1)
    with on_a_cpu():
        trained(problem, unmeasured, batches, False, change, options.get("steps", 3))
        here = trained(problem, plain, batches, True, change, **options, pca=gc.StreamingPCA(2), pca_every=1)
    got, want = (monitor.records().drop(columns="measure_seconds") for monitor in (apart, here))
    pd.testing.assert_frame_equal(got, want, check_exact=True)
    pd.testing.assert_frame_equal(apart.pca_records(), here.pca_records(), check_exact=True)
    for other in (plain, unmeasured):
        assert all(map(torch.equal, there.state_dict().values(), other.state_dict().values()))
    assert {side for side, _ in sides.crossed} == {HOME, THERE}
    return apart


WAYS: dict[str, dict[str, Any]] = {
    "successive": {"method": "difference"},
    "sampled": {"method": "difference", "sampled": True, "steps": 2},
    "bracket": {"method": "bracket", "sampled": True, "steps": 2},
}
USUAL = {
    *(("perceptron", "successive"), ("dropout", "sampled"), ("rectifier", "sampled")),
    *(("transformer", "bracket"), ("batch norm", "bracket"), ("frozen", "bracket")),
}
"""In every run of the tests: each model and each way, and attention and noise differentiated twice."""


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) in USUAL else pytest.mark.long)
        for name, way in itertools.product(MODELS, WAYS)
    ],
)
def test_rows_are_those_on_a_cpu(name: str, way: str, sides: Sides, generator: Generator) -> None:
    monitor = assert_alike(MODELS[name], sides, generator, **WAYS[way], check_every=2)
    assert monitor.records()["reliable"].all()
    assert all(finding.passed for finding in monitor.probe.gradients.admission)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perceptron", {"gradient": "checked", "check_every": 1}),
        ("perceptron", {"alignment": True, "sampled": True, "design": "chain"}),
        ("transformer", {"strategy": "vmap", "check_every": 2}),
        ("perceptron", {"method": "published"}),
        ("perceptron", {"noise_floor": False}),
        ("perceptron", {"eta": "auto"}),
    ],
    ids=str,
)
def test_settings(name: str, options: dict[str, Any], sides: Sides, generator: Generator) -> None:
    assert_alike(MODELS[name], sides, generator, **options)


@pytest.mark.parametrize("plain", [False, True])
def test_gradients_of_long_vectors(
    plain: bool, sides: Sides, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of theta to the device, and one of the gradient back; no more."""
    monkeypatch.setattr(gradients, "SHORT", 0)
    problem = MODELS["perceptron"]
    assert_alike(problem, sides, generator)
    model, batch = problem.model(), problem.batch(generator)
    sides.put(THERE, *model.parameters(), *batch.values())
    engine = GradientEngine(model, problem.loss_fn)
    engine.admit(batch)
    engine.traits.plain = plain
    theta = engine.flatten()
    sides.crossed.clear()
    found = engine.gradient(theta, batch, torch.empty_like(theta))
    assert sides.crossed == [(THERE, len(theta)), (HOME, len(theta))]
    problem.loss_fn(model, batch).backward()
    assert torch.equal(found, engine.flatten_grad())


# ------------------------------------------------------------------------------------------------- what float64 follows


class Weighted:
    """A loss that holds tensors: in its closure, and as what it makes anew."""

    def __init__(self, generator: Generator) -> None:
        self.weights = torch.rand(7, generator=generator)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], self.weights)


class Remembering(nn.Module):
    """As little as has parameters, a buffer that it writes to in training, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.head = nn.Embedding(7, 3), nn.Dropout(0.3), nn.Linear(3, 7)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.to(self.mean.dtype).mean().expand(3), 0.1)
        return self.head(self.drop(torch.tanh(self.embed(x).sum(1) - self.mean)))


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_float64_follows_what_changes(
    method: Any, sides: Sides, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loss holds, changed in place and exchanged; buffers; modes of modules; parameters that others move."""
    monkeypatch.setattr("grokcurv.evaluation.LARGE", 0)  # tensors that would be watched are copied where they cross
    loss = Weighted(generator)
    weights = loss.weights.clone()

    def change(step: int, model: nn.Module) -> None:
        if step == 0:
            loss.weights = weights * 1.0
        if step == 1:
            loss.weights.mul_(torch.linspace(0.5, 2.0, 7))
        if step == 2:
            loss.weights = loss.weights.flip(0)
            model.eval()
        if step == 3:
            model.train()
            with torch.no_grad():
                model.embed.weight.mul_(1.5)

    sides.put(THERE, weights)
    problem = Problem(Remembering, lambda model, batch: loss(model, batch), MODELS["dropout"].batch)
    plain, batches = problem.model(), [problem.batch(generator) for _ in range(10)]
    there, far = copy.deepcopy(plain), copy.deepcopy(batches)
    sides.put(THERE, *Snapshot([there, far]).tensors)
    apart = trained(problem, there, far, True, change, steps=4, method=method, check_every=1)
    with on_a_cpu():
        here = trained(problem, plain, batches, True, change, steps=4, method=method, check_every=1)
    got, want = (monitor.records().drop(columns="measure_seconds") for monitor in (apart, here))
    pd.testing.assert_frame_equal(got, want, check_exact=True)
    assert got["reliable"].all()


def test_a_model_that_is_another_on_the_cpu(sides: Sides, generator: Generator) -> None:
    """Where float64 would be of another function, nothing is called reliable, and a finding says why."""
    problem = MODELS["perceptron"]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        there = sides.of(batch["x"]) == THERE
        return cross_entropy(model, batch) * (1.0 if there else 1.001)

    model, batches = problem.model(), [problem.batch(generator) for _ in range(6)]
    sides.put(THERE, *Snapshot([model, batches]).tensors)
    with pytest.warns(gc.AdmissionWarning, match="the model or the loss is another there; no row is reliable"):
        monitor = trained(Problem(problem.model, loss_fn, problem.batch), model, batches, True, None)
    assert not monitor.records()["reliable"].any()
    assert [finding.check for finding in monitor.probe.gradients.admission if not finding.passed] == ["device"]


def test_a_tensor_that_nobody_finds(sides: Sides, generator: Generator) -> None:
    """It stays on the device, where the float64 evaluation cannot meet it: no row is reliable, and training goes on."""
    problem, hidden = MODELS["perceptron"], threading.local()
    hidden.weights = torch.rand(3, generator=generator)

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], hidden.weights)

    model, batches = problem.model(), [problem.batch(generator) for _ in range(6)]
    sides.put(THERE, hidden.weights, *Snapshot([model, batches]).tensors)
    with pytest.warns(gc.AdmissionWarning, match="float64: cannot be evaluated: .*; no row is reliable"):
        monitor = trained(Problem(problem.model, loss_fn, problem.batch), model, batches, True, None)
    assert not monitor.records()["reliable"].any()


# ---------------------------------------------------------------------------------------------------------- two devices


def test_an_evaluation_on_another_device_than_the_models(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """The model is where there are no numbers; with those of a vector on the CPU it is evaluated there."""
    monkeypatch.setattr("grokcurv.evaluation.device_of", lambda device: Device(device, has_float64=False))

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + torch.ones(5, device=self.where)) + torch.eye(3, 3).to(self.where)[0]

    problem, model = MODELS["perceptron"], Placed()
    batch, theta = problem.batch(generator), flatten(model).double()
    found = {}
    for name in ("cpu", "meta"):
        model.to(name).where = torch.device(name)
        engine = GradientEngine(model, cross_entropy)
        found[name] = engine.gradient(theta, batch, torch.empty_like(theta))
        assert all(p.device.type == name and p.dtype == torch.float32 for p in model.parameters())
    assert found["cpu"].norm() > 0
    assert torch.equal(found["cpu"], found["meta"])


def test_what_is_drawn_there_is_drawn_on_the_cpu() -> None:
    place = Device(torch.device("meta"), has_float64=False)
    draws = [
        lambda: torch.rand(3, device="meta"),
        lambda: torch.rand(3),
        lambda: torch.empty(3, device="meta").bernoulli_(0.5),
        lambda: torch.rand_like(torch.empty(3, device="meta")),
    ]
    for draw in draws:
        before = torch.get_rng_state()

        class Moving(type(place)):
            def move(self, x: Tensor, there: torch.device) -> Tensor:
                return torch.empty_like(x, device=there)  # the other way there is nothing to copy

        with Apart(Moving(place.model, False), at_home=False):
            drawn = draw()
        assert not torch.equal(before, torch.get_rng_state())
        assert drawn.device.type == ("cpu" if draw is draws[1] else "meta")
        with Apart(place, at_home=True):
            assert torch.zeros(3, device="meta").device == CPU


def test_devices() -> None:
    x = torch.ones(3)
    for kind in ("cpu", "cuda", "meta"):
        place = device_of(torch.device(kind))
        assert place.has_float64
        assert place.home == place.model
        assert place.bring(x) is place.send(x) is place.beside(x, x) is place.room(x, x) is x
        assert place.bring_all([x])[0] is x
    apple = device_of(torch.device("mps", 0))
    assert not apple.has_float64
    assert apple.home == CPU
    assert apple.send(x.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"model must be on a CPU, on a CUDA device or .* \(mps\), got .* 'xpu:0'"):
        device_of(torch.device("xpu", 0))
