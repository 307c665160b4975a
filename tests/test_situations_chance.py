"""Parameters that change after a measurement was set up, and models that draw at random."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from truth import METHODS, Truth, classify, exactly, of, perceptron, points, right, train, twins

import grokcurv as gc

# ----------------------------------------------------------------------------------------------- parameters that change


@pytest.mark.parametrize("by", ["the probe", "a sampler", "the monitor"])
@pytest.mark.parametrize("kind", ["frozen", "unfrozen", "added", "removed", "another shape"])
def test_parameters_that_change_after_the_beginning(kind, by, generator):
    model, (a, b) = of(perceptron, generator), points(generator, 2)
    model[0].bias.requires_grad_(kind != "unfrozen")
    if by == "the probe":
        measure = functools.partial(gc.CommutatorProbe(model, classify).measure, [(a, b)])
    elif by == "a sampler":
        measure = gc.CurvatureMonitor(model, classify, sampler=lambda: (a, b)).step
    else:
        measure = functools.partial(gc.CurvatureMonitor(model, classify).step, a, b)
    name = "0.bias"
    if kind in ("frozen", "unfrozen"):
        model[0].bias.requires_grad_(kind == "unfrozen")
    elif kind == "added":
        model[1].register_parameter("slope", nn.Parameter(torch.ones(())))
        name = "1.slope"
    elif kind == "removed":
        model[0].bias = None
    else:
        model[2], name = nn.Linear(10, 5), "2.weight"
    classify(model, a).backward()
    with pytest.raises(ValueError, match=f"parameter '{name}'"):
        measure()
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_another_type_after_the_beginning(generator):
    model, pair = of(perceptron, generator), tuple(points(generator, 2))
    probe = gc.CommutatorProbe(model, classify)
    model[2].double()
    with pytest.raises(ValueError, match=r"parameter '2.weight' is now torch.float64"):
        probe.measure([pair])


@pytest.mark.parametrize("kind", ["another object", "another order", "another module"])
def test_the_same_parameters_registered_anew(kind, generator):
    model, batches = of(perceptron, generator), points(generator, 2)
    probe = gc.CommutatorProbe(model, classify)
    probe.measure([tuple(batches)])
    with torch.no_grad():
        if kind == "another object":
            model[2].weight = nn.Parameter(model[2].weight * 1.5)
        elif kind == "another order":
            last_comes_first(model)
        else:
            model[2] = nn.Linear(10, 4)
    stats = probe.measure([tuple(batches)])
    assert stats.reliable
    assert right(float(stats.defect), True, Truth(model, classify).difference(*batches), 0.02)


def last_comes_first(model: nn.Module) -> None:
    """Weight and bias of the last layer change places."""
    weight = model[2].weight
    del model[2].weight
    model[2].weight = weight


@pytest.mark.parametrize("at", [3, 7])
def test_a_monitor_whose_parameters_change_places(at, generator):
    """The flat ``.grad`` keeps the order of the beginning, or is not used."""

    def reorder(step: int, model: nn.Module) -> None:
        if step == at:
            last_comes_first(model)

    options = {"truth": exactly, "after_backward": reorder, "check_every": 5}
    train(perceptron, classify, points(generator, 10), **options).assert_right(0.05)


# --------------------------------------------------------------------------------------------------------------- chance


class Shallow(nn.Module):
    """Leaves out one of two layers now and then."""

    def __init__(self, chance) -> None:
        super().__init__()
        self.first, self.layers, self.head = nn.Linear(6, 8), nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), None
        self.head = nn.Linear(8, 4)
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for layer in self.layers:
            if self.chance() < 0.5:
                h = h + 2.0 * torch.tanh(layer(h))
        return self.head(h)


class TorchChance:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self) -> float:
        return float(torch.rand((), generator=self.generator))


class NumpyChance:
    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __call__(self) -> float:
        return self.generator.random()


class PythonChance(NumpyChance):
    def __init__(self) -> None:
        self.generator = random.Random(3)


class OldNumpyChance(NumpyChance):
    def __init__(self) -> None:
        self.generator = np.random.RandomState(3)

    def __call__(self) -> float:
        return self.generator.random_sample()


CHANCES = {
    "random": lambda: random.random,
    "numpy": lambda: np.random.rand,
    "torch": lambda: lambda: float(torch.rand(())),
    "own torch": TorchChance,
    "own numpy": NumpyChance,
    "own random": PythonChance,
    "own old numpy": OldNumpyChance,
}


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "difference") for name in CHANCES), ("torch", "bracket"), ("own torch", "bracket")],
)
def test_layers_left_out_at_random(name, method, generator):
    """One draw for all evaluations of a batch: the row is the truth of some choice of layers for each of the two."""

    class Fixed(nn.Module):
        def __init__(self, model: Shallow) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, layers) -> Tensor:
            h = self.model.first(x)
            for layer, there in zip(self.model.layers, layers, strict=True):
                h = h + 2.0 * torch.tanh(layer(h)) * there
            return self.model.head(h)

    batches = points(generator, 3)
    run = twins(lambda: Shallow(CHANCES[name]()), classify, batches, method=method)
    assert run.records["reliable"].all()
    pair = (batches[0], batches[1])
    stats = gc.CommutatorProbe(run.model, classify, method=method).measure([pair])
    run.model.chance = None
    truth = Truth(Fixed(run.model), lambda model, batch: functional.cross_entropy(model(batch[0], batch[2]), batch[1]))
    choices = [(float(i), float(j)) for i in (0, 1) for j in (0, 1)]
    truths = [truth.defect(method, (*pair[0], one), (*pair[1], other)) for one in choices for other in choices]
    assert any(right(float(stats.defect), True, truth, 0.02) for truth in truths)


class Noisy(nn.Module):
    """Draws in ``drawn``, or where that is None in the type of its input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.drawn = kind, None
        self.encode, self.decode = nn.Linear(6, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encode(x))
        mean, spread = h.chunk(2, -1)
        given = torch.empty(mean.shape, dtype=self.drawn or mean.dtype)
        if self.kind == "randn_like":
            noise = torch.randn_like(given)
        elif self.kind == "rand":
            noise = (0.6 + torch.rand(len(x), 1, dtype=given.dtype)).floor()
        elif self.kind == "rand_like":
            noise = (torch.rand_like(given) > 0.4) * 2.0
        elif self.kind == "bernoulli_":
            noise = given.bernoulli_(0.7)
        elif self.kind == "normal_":
            noise = given.normal_(0.0, 0.5)
        else:
            noise = torch.randperm(mean.shape[1]).sub(1.5)
        return self.decode(mean + noise.to(h.dtype) * (spread / 2).exp())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["randn_like", "rand", "rand_like", "bernoulli_", "normal_", "randperm"])
def test_noise_made_in_the_forward_pass(kind, method, generator):
    """The float64 evaluation meets the numbers that float32 has drawn."""

    def truth(model: Noisy) -> Truth:
        exact = Truth(model, classify)
        exact.model.drawn = torch.float32
        return exact

    run = twins(lambda: Noisy(kind), classify, points(generator, 4), truth=truth, method=method)
    run.assert_right(0.02)
    assert run.records["reliable"].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_slopes_that_a_rectifier_draws(training, method, generator):
    """They are written to where the backward pass finds them, in float64 too."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8), nn.RReLU(), nn.Linear(8, 8), nn.RReLU(inplace=True), nn.Linear(8, 4)
        ).train(training)

    run = twins(make, classify, points(generator, 6), truth=lambda model: Truth(model, classify), method=method)
    run.assert_right(0.02)
    assert run.records["reliable"].all()
