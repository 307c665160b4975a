"""What models, losses and batches keep: a measured run is bitwise the run that nobody measured."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import random
import threading
import time
import types
import warnings
from collections import OrderedDict, UserDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from truth import (
    METHODS,
    Truth,
    assert_same,
    check,
    classify,
    exactly,
    kept,
    of,
    perceptron,
    points,
    right,
    train,
    twins,
)

import grokcurv as gc

# ----------------------------------------------------------------------------------------- one object in several places


class Repeated(nn.Module):
    """One block, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh())] * 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class Renamed(nn.Module):
    """Parts of a network that have a second name, and a parameter that is in a plain list besides."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))
        self.features, self.norm = self.net[0], self.net[1]
        self.listed = [self.net[3].weight]

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[2](self.norm(self.features(x)))
        return functional.linear(h, self.listed[0], self.net[3].bias)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Repeated, Renamed])
def test_one_object_in_several_places(kind, method, generator):
    run = twins(kind, classify, points(generator, 4), truth=exactly, method=method)
    run.assert_right(0.02)
    assert run.records["reliable"].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"max_norm": 0.8}, {"max_norm": 1.5, "norm_type": 1.0}], ids=str)
def test_an_embedding_that_renormalises_itself(options, method, generator):
    """It writes to its weight in the forward pass: every evaluation has a vector of its own."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(20, 4, **options), nn.Flatten(), nn.Tanh(), nn.Linear(12, 4))

    batches = [
        (torch.randint(20, (6, 3), generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(4)
    ]
    truth = exactly if method == "difference" else None  # renormalising in place, a Hessian is of what then is there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        run = twins(make, classify, batches, truth=truth, method=method)
        twins(make, classify, batches, sampler=lambda: (copy.copy(batches[0]), copy.copy(batches[1])), method=method)
    if truth:
        run.assert_right(0.02)


class Teacher(nn.Module):
    """A copy of the encoder, which follows it in every forward pass, by one of several ways to write that."""

    def __init__(self, how: str, width: int = 6, equal: bool = True) -> None:
        super().__init__()
        self.student, self.teacher, self.how = nn.Linear(6, width), nn.Linear(6, width), how
        if equal:
            self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    @torch.no_grad()
    def follow(self) -> None:
        for own, other in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if self.how == "data":
                own.data = own.data * 0.7 + other.data * 0.3
            elif self.how == "lerp":
                own.lerp_(other, 0.3)
            else:
                own.copy_(0.7 * own + 0.3 * other)

    def forward(self, x: Tensor) -> Tensor:
        self.follow()
        return (torch.tanh(self.student(x)) @ torch.tanh(self.teacher(x * 0.9)).T)[:, :4]


@pytest.mark.parametrize("how", ["data", "lerp", "copy"])
def test_a_teacher_that_follows_in_the_forward_pass(how, generator):
    run = twins(lambda: Teacher(how), classify, points(generator, 5), truth=exactly)
    run.assert_right(0.02)
    assert run.records["reliable"].all()


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("how", ["data", "lerp"])
def test_a_teacher_with_large_tensors(how, equal, generator):
    """Large tensors get a copy only when they are known to change: that is seen at the first evaluation."""
    batches = points(generator, 4, size=6)
    run = twins(lambda: Teacher(how, 14_000, equal), classify, batches, optimizer=slow)
    assert run.records["reliable"].any()


def slow(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-4)


class Late(nn.Module):
    """A large buffer, or attribute, which nothing touches for the first steps."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.calls, self.kind = perceptron(), 0, kind
        memory = torch.zeros(70_000)
        if kind == "buffer":
            self.register_buffer("memory", memory)
        else:
            self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.calls += 1
        if self.calls > 3:
            if self.kind == "replaced":
                self.memory = self.memory + 1.0
            else:
                self.memory[:4] += y.detach().mean(0)
        return y + self.memory[:4]


@pytest.mark.parametrize("kind", ["buffer", "attribute", "replaced"])
def test_a_large_tensor_that_changes_only_later(kind, generator):
    """Training goes on, and either the tensor is as training left it, or an error says which one is not."""
    batches = points(generator, 7)
    plain = train(lambda: Late(kind), classify, batches, measured=False)
    told = pytest.raises(RuntimeError, match="an evaluation changed 'memory'")
    with contextlib.nullcontext() if kind == "replaced" else told:
        run = train(lambda: Late(kind), classify, batches)
        assert_same(kept(plain.model), kept(run.model), "model")


# ------------------------------------------------------------------------------------------ batches that are written to


class InPlace(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.body, self.how = perceptron(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "normalised":
            x = x.sub_(0.2).div_(0.7)
        elif self.how == "masked":
            x[:, 0] = 0.0
            x.mul_(1.1)
        else:
            x.unsqueeze_(0).squeeze_(0).clamp_(-1.0, 1.0)
        return self.body(x)


@pytest.mark.parametrize("how", ["normalised", "masked", "clamped"])
def test_batches_that_the_model_writes_to(how, generator):
    """The second time round, training too would meet another batch: of what the batch was then the row is."""
    batches = points(generator, 5)
    extra = points(generator, 2)
    before = copy.deepcopy(extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        twins(lambda: InPlace(how), classify, batches)
        run = twins(lambda: InPlace(how), classify, batches, sampler=lambda: tuple(extra))
    assert_same(before, extra, "sampled")
    run.model.train()
    assert check(run.model, classify, tuple(extra), rtol=0.02).reliable


class Drained(nn.Module):
    """A loss that takes its batch apart: a dictionary from which it pops, a list that it sorts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()


def popping(model: nn.Module, batch) -> Tensor:
    batch = batch if "inputs" in batch else {**batch}
    x = batch.pop("inputs")
    batch["parts"].reverse()
    batch["seen"] = True
    return functional.cross_entropy(model.body(x), batch["parts"][0])


def test_a_batch_that_the_loss_takes_apart(generator):
    batches = [{"inputs": x, "parts": [y, y]} for x, y in points(generator, 2)]
    model = of(Drained, generator)
    before = copy.deepcopy(batches)
    stats = gc.CommutatorProbe(model, popping).measure([tuple(batches)])
    assert_same(before, batches, "batches")
    pair = tuple((b["inputs"], b["parts"][0]) for b in batches)
    assert right(float(stats.defect), True, exactly(model.body).difference(*pair), 0.02)


# ------------------------------------------------------------------------------------------- what grows as it is called


@dataclasses.dataclass
class Statistics:
    count: int = 0
    sums: list = dataclasses.field(default_factory=list)


class Slotted:
    __slots__ = ("last", "total")

    def __init__(self) -> None:
        self.total, self.last = 0.0, None


class Keeper(nn.Module):
    """Keeps one kind of thing from call to call, and mostly uses it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.kind = perceptron(), kind
        if kind == "counter":
            self.calls = 0
        elif kind in ("average", "reassigned average"):
            self.average = torch.zeros(4)
        elif kind == "buffer":
            self.register_buffer("average", torch.zeros(4))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        elif kind == "deque":
            self.recent = deque(maxlen=2)
        elif kind == "cache":
            self.cache = {}
        elif kind == "ordered":
            self.cache = OrderedDict()
        elif kind == "default":
            self.cache = defaultdict(list)
        elif kind == "set":
            self.sizes = set()
        elif kind == "dataclass":
            self.statistics = Statistics()
        elif kind == "slots":
            self.statistics = Slotted()
        elif kind in ("namespace", "user dictionary"):
            self.statistics = types.SimpleNamespace(data={"n": 0}) if kind == "namespace" else UserDict(n=0)
        elif kind == "array":
            self.average = np.zeros(4)
        elif kind == "nested":
            self.state = {"layers": [{"mean": torch.zeros(4)}, ({"n": 0},)]}
        elif kind == "queue":
            self.register_buffer("queue", torch.zeros(4, 4))
            self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        now = y.detach().mean(0)
        if self.kind == "counter":
            self.calls += 1
            return y * (1.0 + 0.1 * self.calls)
        if self.kind in ("average", "buffer"):
            self.average.mul_(0.8).add_(0.2 * now)
            if self.kind == "buffer":
                self.calls += 1
            return y - self.average
        if self.kind == "reassigned average":
            self.average = 0.8 * self.average + 0.2 * now
            return y - self.average
        if self.kind == "deque":
            self.recent.append(now)
            return y - torch.stack(list(self.recent)).mean(0)
        if self.kind in ("cache", "ordered"):
            self.cache[len(self.cache)] = now
            return y - self.cache[0].to(y.dtype)
        if self.kind == "default":
            self.cache[len(x)].append(now)
            return y + 0.1 * len(self.cache[len(x)])
        if self.kind == "set":
            self.sizes.add((len(x), len(self.sizes)))
            return y * (1.0 + 0.1 * len(self.sizes))
        if self.kind == "dataclass":
            self.statistics.count += 1
            self.statistics.sums.append(float(now.sum()))
            return y + 0.1 * self.statistics.count
        if self.kind == "slots":
            self.statistics.total += 1.0
            self.statistics.last = now
            return y * (1.0 + 0.1 * self.statistics.total)
        if self.kind in ("namespace", "user dictionary"):
            self.statistics.data["n"] += 1
            return y * (1.0 + 0.1 * self.statistics.data["n"])
        if self.kind == "array":
            self.average += 0.2 * (now.double().numpy() - self.average)
            return y - torch.from_numpy(self.average).to(y.dtype)
        if self.kind == "nested":
            self.state["layers"][0]["mean"] += 0.2 * now.to(self.state["layers"][0]["mean"].dtype)
            self.state["layers"][1][0]["n"] += 1
            return y - self.state["layers"][0]["mean"].to(y.dtype) * self.state["layers"][1][0]["n"]
        self.queue[int(self.pointer)] = now
        self.pointer[0] = (self.pointer[0] + 1) % 4
        return y - self.queue.mean(0)


KEEPERS = [
    *("counter", "average", "reassigned average", "buffer", "deque", "cache", "ordered", "default", "set"),
    *("dataclass", "slots", "array", "nested", "queue"),
    *("namespace", "user dictionary"),
]


@pytest.mark.parametrize("kind", KEEPERS)
def test_what_a_model_keeps_from_call_to_call(kind, generator):
    """Every evaluation begins with what training has now, which a copy of the model has too.

    A mean of this batch that is detached makes gradients that are not those of any loss: there is then no bracket.
    """
    batches = points(generator, 4)
    run = twins(lambda: Keeper(kind), classify, batches)
    truth = exactly(run.model)
    assert check(run.model, classify, tuple(batches[:2]), truth, rtol=0.02).reliable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        stats = check(run.model, classify, tuple(batches[:2]), truth, method="bracket", rtol=0.02)
    assert stats.reliable or kind not in ("counter", "default", "set", "dataclass", "slots")
    assert_same(batches, run.batches, "batches")


class Numbered(nn.Module):
    """Takes its numbers from an iterator that it holds."""

    def __init__(self, numbers) -> None:
        super().__init__()
        self.body, self.numbers, self.latest = perceptron(), numbers, None

    def forward(self, x: Tensor) -> Tensor:
        self.latest = next(self.numbers)
        return self.body(x)


@pytest.mark.parametrize("numbers", [itertools.count, lambda: itertools.cycle([3, 1, 4]), lambda: iter([*range(99)])])
def test_an_iterator_that_a_model_holds(numbers, generator):
    twins(lambda: Numbered(numbers()), classify, points(generator, 4))


CALLS = 0


def counted(model: nn.Module, batch) -> Tensor:
    global CALLS
    CALLS += 1
    return classify(model, batch)


def test_a_global_counter_that_the_loss_assigns(generator):
    global CALLS
    counts = []
    for measured in (False, True):
        CALLS = 0
        train(perceptron, counted, points(generator, 4), measured=measured)
        counts.append(CALLS)
    assert counts == [3, 3]


HISTORY: dict[str, list[float]] = {"loss": []}


def logged(model: nn.Module, batch) -> Tensor:
    loss = classify(model, batch)
    HISTORY["loss"].append(loss.item())
    return loss * (1.0 + 0.1 * len(HISTORY["loss"]))


def test_a_global_history_that_the_loss_writes(generator):
    histories, batches = [], points(generator, 4)
    for measured in (False, True):
        HISTORY["loss"].clear()
        train(perceptron, logged, batches, measured=measured)
        histories.append(list(HISTORY["loss"]))
    assert histories[0] == histories[1]


class Objective:
    """A loss that is an object with a state of its own: a running mean of what it was."""

    def __init__(self) -> None:
        self.mean, self.calls = torch.zeros(()), 0

    def __call__(self, model: nn.Module, batch) -> Tensor:
        loss = classify(model, batch)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss + loss.square() * self.mean

    def method(self, model: nn.Module, batch) -> Tensor:
        return self(model, batch)


@pytest.mark.parametrize("how", ["object", "method", "partial", "closure", "cell"])
def test_a_loss_with_a_state_of_its_own(how, generator):
    batches, ends = points(generator, 4), []
    for measured in (False, True):
        objective = Objective()
        count = 0

        def cell(model: nn.Module, batch) -> Tensor:
            nonlocal count
            count += 1
            return objective(model, batch)  # noqa: B023

        loss_fn = {
            "object": objective,
            "method": objective.method,
            "partial": functools.partial(Objective.__call__, objective),
            "closure": lambda model, batch: objective(model, batch),  # noqa: B023
            "cell": cell,
        }[how]
        run = train(perceptron, loss_fn, batches, measured=measured)
        ends.append((vars(objective), count, kept(run.model)))
    assert_same(ends[0], ends[1], how)


def note(found: list, parameter: nn.Parameter) -> None:
    found.append(parameter.grad.norm().item())


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "parameter", "accumulated"])
def test_hooks_that_collect(kind, generator):
    """Calls of an evaluation leave no trace in a list that a closure holds; hooks of parameters are not called."""
    batches, collected = points(generator, 4), []
    for measured in (False, True):
        found: list = []

        def make(found=found) -> nn.Module:
            model = perceptron()
            if kind == "forward":
                model[0].register_forward_hook(lambda module, given, out: found.append(out.detach().sum().item()))
            elif kind == "pre":
                model[2].register_forward_pre_hook(lambda module, given: found.append(given[0].dtype))
            elif kind == "backward":
                model[2].register_full_backward_hook(lambda module, given, out: found.append(out[0].norm().item()))
            elif kind == "parameter":
                model[0].weight.register_hook(lambda grad: found.append(grad.norm().item()))
            else:
                model[0].weight.register_post_accumulate_grad_hook(functools.partial(note, found))
            return model

        run = train(make, classify, batches, measured=measured, truth=None)
        collected.append((list(found), [p.detach() for p in run.model.parameters()]))
        assert len(found) == 3
    assert_same(collected[0], collected[1], kind)


def test_a_hook_that_changes_the_gradient_is_training_s_own(generator):
    """It stays where it is; the gradient of the loss is what is measured."""

    def make() -> nn.Module:
        model = perceptron()
        model[0].weight.register_hook(lambda grad: grad.clone())
        return model

    assert twins(make, classify, points(generator, 4)).records["reliable"].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, parametrizations.weight_norm], ids=["hook", "parametrisation"])
def test_weight_norm(norm, method, generator):
    """The old one leaves the weight of the latest forward pass, with its graph, in an attribute."""

    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), norm(nn.Linear(8, 4)))

    def spelled_out(model: nn.Module, batch) -> Tensor:
        """The kernel's second derivative is wrong in some versions of PyTorch."""
        x = batch[0]
        for layer, activation in ((model[0], torch.tanh), (model[2], lambda x: x)):
            held = layer.parametrizations.weight if hasattr(layer, "parametrizations") else None
            g, v = (held.original0, held.original1) if held else (layer.weight_g, layer.weight_v)
            x = activation(functional.linear(x, v * (g / v.norm(dim=1, keepdim=True)), layer.bias))
        return functional.cross_entropy(x, batch[1])

    batches = points(generator, 4)
    model = of(make, generator)
    for layer in (model[0], model[2]):
        if not hasattr(layer, "parametrizations"):
            layer.weight = layer.weight.detach()  # or it cannot be copied
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gc.AdmissionWarning)
        stats = check(model, classify, tuple(batches[:2]), Truth(model, spelled_out), method=method, rtol=0.02)
        assert stats.reliable or method == "bracket"
        twins(make, classify, batches, method=method)


def test_a_graph_that_is_alive_while_it_is_measured(generator):
    """A loss of before the measurement can be differentiated after it."""
    model, batches = of(Renamed, generator), points(generator, 3)
    twin = copy.deepcopy(model)
    expected = torch.autograd.grad(classify(twin, batches[2]), list(twin.parameters()))
    loss = classify(model, batches[2])
    gc.CommutatorProbe(model, classify).measure([tuple(batches[:2])])
    gc.CommutatorProbe(model, classify, method="bracket").measure([tuple(batches[:2])])
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- threads


def test_two_threads_measure_one_model(generator):
    model, pair = of(perceptron, generator), points(generator, 2)
    truth, found, errors = exactly(model).difference(*pair), [], []
    before = copy.deepcopy(model.state_dict())

    def work() -> None:
        try:
            for _ in range(4):
                stats = gc.commutator_defect(model, classify, *pair)
                found.append((float(stats.defect), bool(stats.reliable)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 8
    assert all(right(defect, True, truth, 0.02) for defect, _ in found)
    assert_same(before, model.state_dict(), "model")


@pytest.mark.parametrize("source", ["torch", "random"])
def test_a_thread_that_draws_meanwhile(source, generator):
    """A loader's thread gets the numbers that it would get, of a model that takes none."""
    model, pair = of(perceptron, generator), tuple(points(generator, 2))
    probe = gc.CommutatorProbe(model, classify)
    draw = {"torch": lambda: float(torch.rand(())), "random": random.random}[source]
    found = []
    for measured in (False, True):
        torch.manual_seed(5)
        random.seed(5)
        drawn: list[float] = []

        def work(drawn=drawn) -> None:
            for _ in range(60):
                drawn.append(draw())
                time.sleep(1e-3)

        thread = threading.Thread(target=work)
        thread.start()
        while measured and thread.is_alive():
            probe.measure([pair])
        thread.join()
        found.append(drawn)
    assert found[0] == found[1]
