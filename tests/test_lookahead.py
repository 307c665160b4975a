"""A measured loop beside its unmeasured twin, bit for bit, over loaders that make it hard to look ahead."""

from __future__ import annotations

import dataclasses
import random
import threading
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import grokcurv as gc
from grokcurv.lookahead import Later

STEPS = 3


@dataclasses.dataclass
class Drawn:
    x: Tensor
    y: Tensor


class Noise(nn.Module):
    """Takes of all three visible generators in training."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + 0.1 * random.random() + 0.1 * float(np.random.rand()))


def network(drops: bool = False) -> nn.Module:
    torch.manual_seed(3)
    between = [nn.Dropout(0.3), Noise()] if drops else []
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *between, nn.Linear(6, 3))


def parts(batch):
    if isinstance(batch, Drawn):
        return batch.x, batch.y
    return (batch["in"]["x"], batch["y"]) if isinstance(batch, dict) else batch


def loss_fn(model: nn.Module, batch) -> Tensor:
    x, y = parts(batch)
    x = torch.as_tensor(x).to(next(model.parameters()).dtype)
    return functional.cross_entropy(model(x), torch.as_tensor(y))


def train(make_loader, *, measured: bool, drops: bool = False, loss=loss_fn, after=None):
    """Weights, where the generators end, and the monitor."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    model, loader = network(drops), make_loader()
    torch.manual_seed(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    monitor = gc.CurvatureMonitor(model, loss) if measured else None
    for _ in range(2):
        for given in monitor.lookahead(loader) if monitor else loader:
            batch, *following = given if monitor else (given,)
            loss(model, batch).backward()
            if monitor:
                monitor.step(batch, *following)
            if after:
                after()
            optimizer.step()
            optimizer.zero_grad()
    ends = [torch.get_rng_state(), torch.rand(3), torch.tensor([random.random(), float(np.random.rand())])]
    return [*model.state_dict().values(), *ends], monitor


def alike(make_loader, **settings) -> gc.CurvatureMonitor:
    plain, _ = train(make_loader, measured=False, **settings)
    seen, monitor = train(make_loader, measured=True, **settings)
    assert all(map(torch.equal, plain, seen))
    return monitor


def numbers(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)


class Augmented(Dataset):
    """Draws as it is read, from one of the visible generators."""

    def __init__(self, draw) -> None:
        self.draw, (self.x, self.y) = draw, map(torch.cat, zip(*map(numbers, range(STEPS)), strict=True))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int):
        return self.x[index] + 0.1 * self.draw(), self.y[index]


def from_permutations():
    x, y = map(torch.cat, zip(*map(numbers, range(STEPS)), strict=True))

    class Loader:
        def __iter__(self):
            order = torch.randperm(len(y))
            yield from ((x[rows], y[rows]) for rows in order.split(8))

    return Loader()


DRAWING = {
    "torch": lambda: DataLoader(Augmented(lambda: torch.randn(4)), 8, shuffle=True),
    "random": lambda: DataLoader(Augmented(random.random), 8),
    "numpy": lambda: DataLoader(Augmented(lambda: np.float32(np.random.rand())), 8),
    "permutation": from_permutations,
}


@pytest.mark.parametrize(("name", "drops"), [*((name, True) for name in DRAWING), ("torch", False)])
def test_a_loader_that_draws(name, drops):
    monitor = alike(DRAWING[name], drops=drops)
    assert monitor.records()["step"].tolist() == [0, 1, 3, 4]


def test_a_shuffled_loader_gives_the_batches_themselves():
    monitor = gc.CurvatureMonitor(network(), loss_fn)
    loader = DataLoader(Augmented(lambda: 0.0), 8, shuffle=True)
    given = list(monitor.lookahead(loader))
    assert len(given) == STEPS
    for (_, following), (batch, _) in pairwise(given):
        assert following is batch
    assert given[-1][1] is None
    alike(lambda: DataLoader(Augmented(lambda: 0.0), 8, shuffle=True), drops=True)


def test_a_batch_that_is_not_there_yet():
    monitor = gc.CurvatureMonitor(network(), loss_fn)
    torch.manual_seed(0)
    pairs = monitor.lookahead(DRAWING["torch"]())
    (x, _), later = next(pairs)
    assert isinstance(later, Later)
    with pytest.raises(TypeError, match=r"is not there yet.*next_batch\.then"):
        _ = [part for part in later]
    before = torch.get_rng_state()
    drawn = []
    noisy = later.then(lambda batch: drawn.append(torch.rand(2)) or batch).take()
    assert torch.equal(torch.get_rng_state(), before)  # until the loop goes on
    batch, _ = next(pairs)
    assert batch is noisy
    assert torch.equal(drawn[0], torch.rand(2))  # what the preparation for training draws
    assert not torch.equal(x, batch[0])


def test_draws_after_the_step_end_the_rows():
    plain, _ = train(from_permutations, measured=False, after=lambda: torch.rand(1))
    seen, _ = train(from_permutations, measured=True, after=lambda: torch.rand(1))
    assert all(map(torch.equal, plain, seen))  # the batches themselves draw nothing
    with pytest.warns(UserWarning, match="from here on nothing is measured"):
        _, monitor = train(DRAWING["torch"], measured=True, after=lambda: torch.rand(1))
    assert monitor.records()["step"].tolist() == [0, STEPS]
    alike(DRAWING["random"], after=lambda: torch.rand(1))


def refilled(kind: str, draws: bool = False):
    """A loader whose batches lie in the same memory, one after the other."""

    class Loader:
        def __iter__(self):
            x, y = torch.empty(8, 4), torch.empty(8, dtype=torch.long)
            batch = {
                "tuple": (x, y),
                "dict": {"in": {"x": x}, "y": y},
                "dataclass": Drawn(x, y),
                "arrays": (x.numpy(), y.numpy()),
                "new tensors": {"in": {}, "y": y},
            }[kind]
            for index in range(STEPS):
                new, labels = numbers(index)
                new = new + (0.1 * torch.randn(8, 4) if draws else 0.0)
                if kind == "new tensors":
                    batch["in"]["x"], batch["y"] = new, labels
                else:
                    x.numpy()[...], y.numpy()[...] = new.numpy(), labels.numpy()
                yield batch

    return Loader


@pytest.fixture(scope="module")
def fresh() -> list[float]:
    """The defects where each batch has memory of its own."""
    return alike(lambda: list(map(numbers, range(STEPS)))).records()["defect_median"].tolist()


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "arrays", "new tensors"])
def test_a_loader_that_refills_its_batch(kind, fresh):
    records = alike(refilled(kind)).records()
    assert records["defect_median"].tolist() == fresh
    assert records["reliable"].all()


@pytest.mark.parametrize("kind", ["tuple", "new tensors"])
def test_a_loader_that_draws_and_refills(kind):
    records = alike(refilled(kind, draws=True), drops=True).records()
    assert len(records) == 2 * (STEPS - 1)
    assert records["reliable"].all()


def normalising(model: nn.Module, batch) -> Tensor:
    return loss_fn(model, (batch[0].sub_(0.5).div_(0.25), batch[1]))


def test_a_loss_that_writes_to_its_batch():
    monitor = alike(lambda: [numbers(index) for index in range(STEPS)], loss=normalising)
    records = monitor.records()
    assert len(records) == 2 * (STEPS - 1)
    given = [numbers(index) for index in range(STEPS)]
    truth = gc.commutator_defect(network(), normalising, given[0], given[1]).defect.item()
    np.testing.assert_allclose(records["defect_median"][0], truth, rtol=1e-3)
    bare = gc.CurvatureMonitor(network(), normalising)
    normalising(bare.probe.gradients.model, given[0]).backward()
    with pytest.warns(UserWarning, match="loss_fn writes to its batch"):
        bare.step(*given[:2])
    assert len(bare.records()) == 0
    assert bare.steps == 1


def test_a_loop_that_converts_its_batches_in_place():
    model = network()
    monitor = gc.CurvatureMonitor(model, loss_fn)
    wide = [{"in": {"x": x.double()}, "y": y} for x, y in map(numbers, range(3))]
    for batch, following in monitor.lookahead(wide):
        for given in filter(None, (batch, following)):
            given["in"]["x"] = given["in"]["x"].float()
        loss_fn(model, batch).backward()
        monitor.step(batch, following)
        model.zero_grad()
    assert monitor.records()["reliable"].tolist() == [True, True]


def test_batches_that_cannot_be_copied():
    def loader():
        return ((*numbers(index), threading.Lock()) for index in range(3))

    monitor = gc.CurvatureMonitor(network(), lambda model, batch: loss_fn(model, batch[:2]))
    pairs = monitor.lookahead(loader())
    with pytest.warns(UserWarning, match="cannot be copied"):
        monitor.step(*next(pairs))
    for batch, following in pairs:
        monitor.step(batch, following)
    assert monitor.steps == 3
    assert len(monitor.records()) == 0


def test_an_error_of_the_loader_comes_when_it_would():
    def breaking():
        yield from map(numbers, range(2))
        raise OSError("no more")

    pairs = gc.CurvatureMonitor(network(), loss_fn).lookahead(breaking())
    seen = [next(pairs), next(pairs)]
    assert seen[0][1] is seen[1][0]
    assert seen[1][1] is None
    with pytest.raises(OSError, match="no more"):
        next(pairs)


def test_nothing_warns_about_plain_lists():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        alike(lambda: list(map(numbers, range(STEPS))))
