"""Kinds of batches and of models that people have, and what surrounds a measurement."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import types
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from truth import METHODS, Truth, assert_same, check, classify, exactly, of, perceptron, points, right, twins

import grokcurv as gc

# ----------------------------------------------------------------------------------------------------- kinds of batches


@dataclasses.dataclass
class Example:
    x: Tensor
    y: Tensor
    weight: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class FrozenExample:
    x: Tensor
    y: Tensor
    names: tuple[str, ...] = ("a", "b")


@dataclasses.dataclass(slots=True)
class SlottedExample:
    x: Tensor
    y: Tensor


class Bag:
    def __init__(self, **members) -> None:
        self.__dict__.update(members)


POOL = {"x": torch.empty(0), "y": torch.empty(0)}


def attributes(model: nn.Module, batch) -> Tensor:
    return classify(model, (batch.x, batch.y))


def entries(model: nn.Module, batch) -> Tensor:
    return classify(model, (batch["x"], batch["y"]))


def arrays(model: nn.Module, batch) -> Tensor:
    x, y = batch
    return classify(model, (torch.from_numpy(x).to(model[0].weight.dtype), torch.from_numpy(y)))


def arrays_in_place(model: nn.Module, batch) -> Tensor:
    batch[0][:] -= batch[0].mean(0)
    batch[0][:] *= 1.5
    return arrays(model, batch)


def of_the_pool(model: nn.Module, batch) -> Tensor:
    return classify(model, (POOL["x"][batch].to(model[0].weight.dtype), POOL["y"][batch]))


def optional(model: nn.Module, batch) -> Tensor:
    x, nothing, (y, also_nothing) = batch
    assert nothing is None
    assert also_nothing is None
    return classify(model, (x, y))


KINDS = {
    "dataclass": (Example, attributes),
    "frozen dataclass": (FrozenExample, attributes),
    "slots": (SlottedExample, attributes),
    "namespace": (lambda x, y: types.SimpleNamespace(x=x, y=y), attributes),
    "object": (lambda x, y: Bag(x=x, y=y, key="a"), attributes),
    "mapping proxy": (lambda x, y: types.MappingProxyType({"x": x, "y": y}), entries),
    "dictionary": (lambda x, y: {"x": x, "y": y, "id": "a", "n": 3}, entries),
    "ordered": (lambda x, y: OrderedDict(x=x, y=y), entries),
    "arrays": (lambda x, y: (x.numpy().copy(), y.numpy().copy()), arrays),
    "None": (lambda x, y: [x, None, (y, None)], optional),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_batches(kind, generator):
    """Whatever the batch is made of, its floats are float64 where the parameters are."""
    build, loss_fn = KINDS[kind]
    model, pairs = of(perceptron, generator), points(generator, 2)
    batches = tuple(build(x.clone(), y.clone()) for x, y in pairs)
    for method in METHODS:
        stats = gc.CommutatorProbe(model, loss_fn, method=method).measure([batches])
        assert stats.reliable
        assert right(float(stats.defect), True, exactly(model).defect(method, *pairs), 0.02)
    for batch, (x, y) in zip(batches, pairs, strict=True):
        assert_same(build(x, y), batch, kind) if kind != "mapping proxy" else assert_same(x, batch["x"], kind)


def test_arrays_that_the_loss_writes_to(generator):
    pairs = [(x.numpy().copy(), y.numpy()) for x, y in points(generator, 2)]
    before, model = copy.deepcopy(pairs), of(perceptron, generator)
    stats = gc.CommutatorProbe(model, arrays_in_place).measure([tuple(pairs)])
    assert_same(before, pairs, "batches")
    assert stats.reliable
    prepared = [(torch.from_numpy((x - x.mean(0)) * 1.5), torch.from_numpy(y)) for x, y in pairs]
    assert right(float(stats.defect), True, exactly(model).difference(*prepared), 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_an_index_into_data_that_everybody_sees(method, generator):
    ((x, y),) = points(generator, 1, size=40)
    POOL.update(x=x, y=y)
    model = of(perceptron, generator)
    a, b = torch.randperm(40, generator=generator)[:16].chunk(2)
    stats = gc.CommutatorProbe(model, of_the_pool, method=method).measure([(a, b)])
    assert stats.reliable
    assert right(float(stats.defect), True, exactly(model).defect(method, (x[a], y[a]), (x[b], y[b])), 0.02)
    assert POOL["x"] is x
    stats = gc.CommutatorProbe(model, of_the_pool, method=method).measure([([0, 3, 5], [7, 8])])
    rows = [(x[i], y[i]) for i in ([0, 3, 5], [7, 8])]
    assert right(float(stats.defect), bool(stats.reliable), exactly(model).defect(method, *rows), 0.02)


# ------------------------------------------------------------------------------------------------------ kinds of models


@pytest.mark.parametrize(
    ("kind", "method"), [("sum", "difference"), ("mean", "difference"), ("tokens", "difference"), ("tokens", "bracket")]
)
def test_sparse_gradients(kind, method, generator):
    def make(sparse: bool = True) -> nn.Module:
        if kind == "tokens":
            first = nn.Sequential(nn.Embedding(12, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 4))
        else:
            first = nn.EmbeddingBag(12, 4, mode=kind, sparse=sparse)
        return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 4))

    batches = [
        (torch.randint(12, (6, 3), generator=generator), torch.randint(3, (6,), generator=generator)) for _ in range(4)
    ]

    def dense(model: nn.Module) -> Truth:
        other = make(sparse=False)
        other.load_state_dict(model.state_dict())
        return exactly(other)

    run = twins(make, classify, batches, truth=dense, method=method)
    run.assert_right(0.02)
    assert run.records["reliable"].all()
    assert next(iter(run.model.parameters())).grad.is_sparse
    assert all(module.sparse for module in run.model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag))


class Recurrent(nn.Module):
    def __init__(self, cell) -> None:
        super().__init__()
        self.cell, self.head = cell(6, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.stack([x, x.cos(), 0.5 * x], 1)
        return self.head(self.cell(steps)[0][:, -1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrences(cell, method, generator):
    run = twins(lambda: Recurrent(cell), classify, points(generator, 3), truth=exactly, method=method)
    run.assert_right(0.02)
    assert run.records["reliable"].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, parametrize.cached])
def test_surroundings(around, method, generator):
    """Neither what is measured nor what is around it changes."""

    def make() -> nn.Module:
        first = nn.Linear(6, 8)
        parametrize.register_parametrization(first, "weight", nn.Softplus())
        return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 4))

    model, pair = of(make, generator), tuple(points(generator, 2))
    truth = exactly(model)
    with around():
        before = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), parametrize._cache_enabled
        stats = gc.CommutatorProbe(model, classify, method=method).measure([pair])
        assert before == (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), parametrize._cache_enabled)
        with contextlib.suppress(RuntimeError):
            model(pair[0][0])
    assert stats.reliable
    assert right(float(stats.defect), True, truth.defect(method, *pair), 0.02)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_parameters_without_a_real_gradient(dtype):
    model = perceptron()
    model[1].register_parameter("odd", nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=dtype.is_complex))
    if dtype.is_complex:
        for make in (gc.CurvatureMonitor, gc.CommutatorProbe):
            with pytest.raises(ValueError, match=r"'1\.odd' must be of a real floating dtype, got torch\.complex64"):
                make(model, classify)
    else:
        gc.CurvatureMonitor(model, classify)  # it cannot be trained, and is part of what the model keeps


def test_a_frozen_complex_parameter_is_no_obstacle(generator):
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = perceptron()
            self.turn = nn.Parameter(torch.tensor(0.6 + 0.8j), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.body((x * self.turn).real)

    class Real(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.turn = body, float(torch.tensor(0.6))

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x * self.turn)

    model, pair = of(Waves, generator), tuple(points(generator, 2))
    for method in METHODS:
        assert check(model, classify, pair, exactly(Real(model.body)), method=method, rtol=0.02).reliable
    assert model.turn.dtype == torch.complex64


@pytest.mark.parametrize("whole", [True, False])
def test_a_script_is_refused(whole):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script = torch.jit.script(nn.Linear(6, 4))
    model = script if whole else nn.Sequential(script, nn.Tanh())
    with pytest.raises(ValueError, match=r"torch\.jit\.ScriptModule.*pass the module that it was made from"):
        gc.CurvatureMonitor(model, classify)


# -------------------------------------------------------------------------------------------------- a batch with itself


@pytest.mark.parametrize("kind", ["the same object", "the same tensors"])
def test_a_batch_and_itself(kind, generator):
    """Said once, however often it is done; training goes on."""
    batches = points(generator, 1)
    model = of(perceptron, generator)
    monitor = gc.CurvatureMonitor(model, classify)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            batch = batches[0]
            model.zero_grad()
            classify(model, batch).backward()
            monitor.step(batch, batch if kind == "the same object" else tuple(list(batch)))
    told = [str(w.message) for w in caught if issubclass(w.category, gc.AdmissionWarning)]
    assert len(told) == 1
    assert "a batch commutes with itself" in told[0]
    assert not monitor.records()["reliable"].any()
    assert [f.check for f in monitor.probe.gradients.admission if not f.passed] == ["batches"]
