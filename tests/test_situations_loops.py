"""Loops around a measurement: loaders, modes, optimisers and layouts of memory that training uses."""

from __future__ import annotations

import copy
import cProfile
import math
import pstats
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from study import stable_cross_entropy as cross_entropy
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from truth import Truth, assert_same, check, kept, right, train, twins

import grokcurv as gc


def seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 30, (), generator=generator))


def points(generator: torch.Generator, batches: int, size: int = 8):
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(batches)
    ]


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def dropped() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def classify(model: nn.Module, batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def exactly(model: nn.Module) -> Truth:
    return Truth(model, lambda model, batch: cross_entropy(model(batch[0]), batch[1]))


class Augmented(Dataset):
    """Every item is drawn anew, by one or the other library."""

    def __init__(self, generator: torch.Generator, source: str) -> None:
        self.x, self.y = points(generator, 1, size=24)[0]
        self.noise = {"torch": lambda: torch.randn(5), "numpy": lambda: torch.from_numpy(np.random.randn(5)).float()}
        self.noise["random"] = lambda: torch.tensor([random.gauss(0, 1) for _ in range(5)])
        self.source = source

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int):
        return self.x[index] + 0.1 * self.noise[self.source](), self.y[index]


def epochs(model: nn.Module, batches, monitor=None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            classify(model, batch).backward()
            if monitor is not None:
                monitor.step()
            optimizer.step()


def forever(loader):
    while True:
        yield from loader


@pytest.mark.parametrize("make", [perceptron, dropped])
@pytest.mark.parametrize("source", ["torch", "numpy", "random"])
def test_a_sampler_that_reads_the_loader_of_training(source, make, generator):
    """What it shuffles and augments with is no number of training's."""
    data, ends = Augmented(generator, source), []
    for measured in (False, True):
        torch.manual_seed(4)
        random.seed(4)
        np.random.seed(4)
        model, loader = make(), DataLoader(data, 8, shuffle=True)
        drawn, monitor = forever(loader), None
        if measured:
            monitor = gc.CurvatureMonitor(model, classify, sampler=lambda drawn=drawn: (next(drawn), next(drawn)))
        epochs(model, loader, monitor)
        ends.append((kept(model), torch.get_rng_state(), random.getstate(), np.random.get_state()))
    assert_same(ends[0], ends[1], source)
    records = monitor.records()
    assert records["reliable"].all()
    assert records["defect_median"].nunique() == len(records)  # new batches every time


def test_a_loader_that_is_shuffled_with_a_generator_of_its_own(generator):
    """Where it stands is then the sampler's business: training has another loader."""
    data, own, ends = Augmented(generator, "torch"), seed(generator), []
    for measured in (False, True):
        torch.manual_seed(4)
        model = dropped()
        loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(own))
        drawn = forever(DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(own + 1)))
        monitor = gc.CurvatureMonitor(model, classify, sampler=lambda drawn=drawn: (next(drawn), next(drawn)))
        epochs(model, loader, monitor if measured else None)
        ends.append((kept(model), torch.get_rng_state()))
    assert_same(ends[0], ends[1], "model")


def test_modes_that_are_switched_between_steps(generator):
    """Batch statistics in one, running ones in the other: another structure, looked at when it is met."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    def switch(step: int, model: nn.Module) -> None:
        model.train(step % 4 < 2)
        model.zero_grad()
        classify(model, batches[step]).backward()

    batches = points(generator, 9)
    run = twins(make, classify, batches, truth=exactly, after_backward=switch, check_every=4)
    run.assert_right(0.05)
    assert run.records["reliable"][[0, 4]].all()


def test_batches_of_many_sizes(generator):
    batches = [points(generator, 1, size=size)[0] for size in (8, 1, 3, 30, 2, 8, 1, 1, 16)]
    run = twins(perceptron, classify, batches, truth=exactly, check_every=3)
    run.assert_right(0.05)


def flattened() -> nn.Module:
    """All parameters are views of one buffer, as fused optimisers lay them out."""
    model = perceptron()
    parameters = list(model.parameters())
    model.flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(parameters, model.flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return model


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_parameters_that_share_one_buffer(method, generator):
    run = twins(flattened, classify, points(generator, 4), method=method, truth=lambda m: exactly(m))
    run.assert_right(0.02)
    assert run.records["reliable"].all()
    assert all(p.untyped_storage().data_ptr() == run.model.flat.data_ptr() for p in run.model.parameters())


def transposed() -> nn.Module:
    model = perceptron()
    model[0].weight.data = model[0].weight.data.T.contiguous().T
    model[2].weight = nn.Parameter(torch.randn(3, 16)[:, ::2])
    return model


def test_parameters_with_strides(generator):
    run = twins(transposed, classify, points(generator, 4), truth=exactly)
    run.assert_right(0.02)
    assert run.records["reliable"].all()
    assert run.model[2].weight.stride() == (16, 2)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True),
    ],
    ids=["Adam", "AdamW", "SGD", "RMSprop"],
)
def test_optimisers(optimizer, generator):
    run = twins(perceptron, classify, points(generator, 5), truth=exactly, optimizer=optimizer)
    run.assert_right(0.02)
    assert run.records["reliable"].all()


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_loss_that_is_not_quite_a_scalar(shape, generator):
    model, pair = perceptron(), tuple(points(generator, 2))
    assert check(model, lambda m, b: classify(m, b).reshape(shape), pair, exactly(model), rtol=0.02).reliable


@pytest.mark.parametrize("what", ["two numbers", "a number", "a constant", "nothing"])
def test_what_is_no_loss_is_refused(what, generator):
    values = {
        "two numbers": lambda m, b: m(b[0])[0, :2],
        "a number": lambda m, b: classify(m, b).item(),
        "a constant": lambda m, b: classify(m, b).detach(),
        "nothing": lambda m, b: None,
    }
    model, pair = perceptron(), tuple(points(generator, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="loss_fn"):
        gc.CommutatorProbe(model, values[what]).measure([pair])
    assert_same(before, model.state_dict(), "model")


def test_an_error_in_the_middle_leaves_all_as_it_was(generator):
    """The loss of the second batch cannot be computed."""
    model, (a, b) = dropped(), points(generator, 2)
    broken = (b[0], b[1][:-1])
    before, batches, drawn = copy.deepcopy(kept(model)), copy.deepcopy((a, broken)), torch.get_rng_state()
    probe = gc.CommutatorProbe(model, classify)
    with pytest.raises(ValueError, match="batch_size"):
        probe.measure([(a, broken)])
    assert_same(before, kept(model), "model")
    assert_same(batches, (a, broken), "batches")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert probe.measure([(a, b)]).reliable


@pytest.mark.parametrize("design", ["independent", "chain"])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_confident_pairs_in_every_design(strategy, design, generator):
    """A large batch, of small ones the first in line, and then of others the model is far more certain."""
    model = perceptron()
    with torch.no_grad():
        model[2].weight *= 8.0
    batches = [(x, model(x).argmax(1)) for x, _ in points(generator, 6, size=2)]
    batches = [(x * scale, y) for (x, y), scale in zip(batches, (0.1, 0.1, 1.0, 3.0, 3.0, 3.0), strict=True)]
    pairs = list(pairwise(batches)) if design == "chain" else list(zip(batches[::2], batches[1::2], strict=True))
    truth = exactly(model)
    stats = gc.CommutatorProbe(model, classify, strategy=strategy).measure(pairs, design=design)
    for pair, defect, reliable in zip(pairs, stats.defect.tolist(), stats.reliable.tolist(), strict=True):
        assert right(defect, reliable, truth.difference(*pair))


@pytest.mark.parametrize("kind", ["again", "elsewhere"])
def test_a_run_that_is_resumed(kind, generator):
    """Rows after a restart are those of a run that was never stopped."""
    batches = points(generator, 9)
    whole = train(perceptron, classify, batches, check_every=3).records
    first = train(perceptron, classify, batches[:5], check_every=3)
    model = first.model if kind == "again" else copy.deepcopy(first.model)
    monitor = gc.CurvatureMonitor(model, classify, check_every=3)
    monitor.load_state_dict(first.monitor.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, following in pairwise(batches[4:]):
        optimizer.zero_grad()
        classify(model, batch).backward()
        monitor.step(batch, following)
        optimizer.step()
    records = monitor.records()
    np.testing.assert_allclose(records["defect_median"], whole["defect_median"], rtol=1e-3)
    assert list(records["reliable"]) == list(whole["reliable"])


def drawing(generator: torch.Generator):
    for _ in range(5):
        yield torch.randn(8, 5), torch.randint(3, (8,))


def reusing(generator: torch.Generator):
    """One piece of memory, filled again and again, as loaders do that pin or decode into it."""
    x, y = torch.empty(8, 5), torch.empty(8, dtype=torch.long)
    for _ in range(5):
        x.normal_(generator=generator)
        y.copy_(torch.randint(3, (8,), generator=generator))
        yield x, y


@pytest.mark.parametrize(
    ("loader", "make"),
    [
        (drawing, perceptron),
        pytest.param(drawing, dropped),
        pytest.param(reusing, perceptron),
    ],
)
@pytest.mark.filterwarnings("ignore::grokcurv.AdmissionWarning")
def test_looking_ahead(loader, make, generator):
    """The next batch is fetched before this one's step, which training does not notice."""
    start, ends = seed(generator), []
    for measured in (False, True):
        torch.manual_seed(4)
        model = make()
        monitor, optimizer = gc.CurvatureMonitor(model, classify), torch.optim.SGD(model.parameters(), lr=0.1)
        batches = loader(torch.Generator().manual_seed(start))
        for batch, following in monitor.lookahead(batches) if measured else ((batch, None) for batch in batches):
            optimizer.zero_grad()
            classify(model, batch).backward()
            if measured:
                monitor.step(batch, following)
            optimizer.step()
        ends.append(kept(model))
    assert_same(ends[0], ends[1], "model")


def test_a_profiler_looks_on_for_a_while(generator):
    """What it holds keeps the tensors where they are: those steps are not measured, and training goes on."""
    held: list[object] = []

    def hold(step: int, model: nn.Module) -> None:
        held[:] = [torch._C._WeakTensorRef(p) for p in model.parameters()] if step in (2, 3) else []

    options = {"after_backward": hold, "check_every": 3}
    with pytest.warns(gc.AdmissionWarning, match=r"references: .* torch.profiler .*no step is measured meanwhile"):
        run = twins(perceptron, classify, points(generator, 8), **options)
    assert run.records["step"].tolist() == [0, 1, 4, 5, 6]
    assert run.records["reliable"].all()
    model, pair = perceptron(), points(generator, 2)
    held.append(torch._C._WeakTensorRef(model[0].weight))
    with pytest.raises(RuntimeError, match=r"torch\.profiler"):
        gc.commutator_defect(model, classify, *pair)


def test_python_s_profiler_goes_on(generator):
    """Who draws is seen by a function of its kind, for a moment; a training that is profiled is none the wiser."""
    model, pair = perceptron(), points(generator, 2)
    with cProfile.Profile() as profile:
        gc.commutator_defect(model, classify, *pair)
        math.hypot(3.0, 4.0)
    names = {name for _, _, name in pstats.Stats(profile).stats}
    assert any("hypot" in name for name in names)  # which is called when all is over
