"""Samplers: what they draw, what they leave alone, and that a draw can be had again."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from test_lookahead import DRAWING, Augmented, loss_fn, network, numbers
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import grokcurv as gc


def rows(count: int = 12) -> dict[str, torch.Tensor]:
    return {"x": torch.arange(3.0 * count).view(count, 3), "y": torch.arange(count)}


def same(one, other) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_subsamples_are_rows_without_replacement():
    sampler = gc.subsample(rows(), 7, seed=2)
    drawn = [sampler() for _ in range(20)]
    for batch in (batch for pair in drawn for batch in pair):
        assert len(batch["y"].unique()) == 7
        assert torch.equal(batch["x"], rows()["x"][batch["y"]])
    assert len({tuple(batch["y"].tolist()) for pair in drawn for batch in pair}) == 40


def test_halves_are_all_of_the_batch():
    sampler = gc.halves(rows(9))
    drawn = [sampler() for _ in range(3)]
    for one, other in drawn:
        assert (len(one["y"]), len(other["y"])) == (4, 5)
        assert sorted(torch.cat([one["y"], other["y"]]).tolist()) == list(range(9))
    assert not torch.equal(drawn[0][1]["y"], drawn[1][1]["y"])


@pytest.mark.parametrize("make", [lambda x, seed: gc.subsample(x, 4, seed), gc.halves])
def test_draws_belong_to_a_step(make):
    x = torch.arange(10)
    sampler, again, other = make(x, 1), make(x, 1), make(x, 2)
    run = []
    for step in (0, 5):
        sampler.at(step)
        run.append([sampler(), sampler()])
    again.at(5)
    assert same(again(), run[1][0])
    state = again.state_dict()
    assert same(again(), run[1][1])
    again.load_state_dict(state)
    assert same(again(), run[1][1])
    other.at(5)
    assert not same(other(), run[1][0])


def test_what_cannot_be_drawn_is_said():
    for make, message in (
        (lambda: gc.subsample(torch.zeros(3, 1), 4), r"rows must be between 1 and the 3 rows"),
        (lambda: gc.subsample((torch.zeros(3), torch.zeros(4)), 2), r"as many each, got \[3, 4\]"),
        (lambda: gc.subsample("words", 2), "got no tensor"),
        (lambda: gc.halves(torch.zeros(1)), "must have two rows"),
        (lambda: gc.from_loader(iter([1])), "again and again"),
        (lambda: gc.from_loader([])(), "gave no batch"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_replay_draws_what_the_run_drew():
    x, y = numbers(0)
    whole = gc.CurvatureMonitor(network(), loss_fn, sampler=gc.subsample((x, y), 5), pairs=2)
    for _ in range(3):
        whole.step()
    resumed = gc.CurvatureMonitor(network(), loss_fn, sampler=gc.subsample((x, y), 5), pairs=2)
    resumed.step()
    state = resumed.state_dict()
    resumed = gc.CurvatureMonitor(network(), loss_fn, sampler=gc.subsample((x, y), 5), pairs=2)
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.step()
    assert resumed.records()["defect_median"].tolist() == whole.records()["defect_median"].tolist()


class Stateful(IterableDataset):
    """A stream with a place in it, a generator of its own and a batch that it refills."""

    def __init__(self) -> None:
        self.place, self.rng, self.out = 0, np.random.default_rng(4), torch.empty(4)

    def __iter__(self):
        self.place = 0
        while self.place < 40:
            x, y = numbers(self.place)
            self.place += 1
            self.out.copy_(x[0] + float(self.rng.random()))
            yield self.out.clone(), y[0]


class Rereading(Augmented):
    """Counts its readings, and draws from a generator of its own."""

    def __init__(self) -> None:
        self.own, self.readings = torch.Generator().manual_seed(1), 0
        super().__init__(lambda: torch.randn((), generator=self.own))

    def __getitem__(self, index: int):
        self.readings += 1
        x, y = super().__getitem__(index)
        return x * (1.0 + 0.01 * self.readings), y


class Refilling:
    """A loader with its place in an attribute and its batch always in the same memory."""

    def __init__(self) -> None:
        self.x, self.y, self.place = torch.empty(8, 4), torch.empty(8, dtype=torch.long), 0

    def __iter__(self):
        self.place = 0
        while self.place < 4:
            x, y = numbers(self.place)
            self.place += 1
            self.x.copy_(x), self.y.copy_(y)
            yield self.x, self.y


def with_generator(**settings):
    generator = torch.Generator().manual_seed(8)
    return DataLoader(TensorDataset(*numbers(1)), 2, shuffle=True, generator=generator, **settings)


LOADERS = {
    "list": lambda: [numbers(index) for index in range(3)],
    "shuffled": lambda: DataLoader(TensorDataset(*numbers(0)), 2, shuffle=True),
    "its own generator": with_generator,
    "workers": lambda: with_generator(num_workers=1, persistent_workers=True),
    "stream": lambda: DataLoader(Stateful(), 8),
    "counting": lambda: DataLoader(Rereading(), 8),
    "refilling": Refilling,
    **DRAWING,
}


def forever(loader):
    while True:
        yield from loader


def train(make_loader, make_sampler):
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(5)
    model, loader = network(drops=True), make_loader()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sampler = make_sampler(loader)
    monitor = gc.CurvatureMonitor(model, loss_fn, sampler=sampler, every=3) if sampler else None
    for _ in range(2):
        for batch in loader:
            loss_fn(model, batch).backward()
            if monitor:
                monitor.step()
            optimizer.step()
            optimizer.zero_grad()
    ends = [torch.get_rng_state(), torch.tensor([random.random(), float(np.random.rand())])]
    return [*model.state_dict().values(), *ends], monitor


@pytest.mark.parametrize("name", LOADERS)
def test_training_s_own_loader_may_be_drawn_from(name):
    plain, _ = train(LOADERS[name], lambda loader: None)
    seen, monitor = train(LOADERS[name], gc.from_loader)
    assert all(map(torch.equal, plain, seen))
    assert len(monitor.records()) > 0


@pytest.mark.parametrize("name", DRAWING)
def test_a_lambda_over_a_loader_of_its_own(name):
    def lazily(_):
        batches = forever(LOADERS[name]())
        return lambda: (next(batches), next(batches))

    plain, _ = train(LOADERS[name], lambda loader: None)
    seen, _ = train(LOADERS[name], lazily)
    assert all(map(torch.equal, plain, seen))


@pytest.mark.parametrize("name", [name for name in LOADERS if name != "workers"])
def test_a_loader_s_batches_come_again(name):
    sampler = gc.from_loader(LOADERS[name](), seed=3)
    for _ in range(2):
        sampler()
    state = sampler.state_dict()
    expected = [sampler() for _ in range(3)]
    torch.rand(1), random.random(), np.random.rand()  # of no influence
    other = gc.from_loader(LOADERS[name](), seed=3)
    other.load_state_dict(state)
    assert all(same(one, again) for one, again in zip(expected, [other() for _ in range(3)], strict=True))


def test_a_pass_of_a_loader_is_all_of_it():
    x = torch.arange(8)
    sampler = gc.from_loader(DataLoader(TensorDataset(x), 2, shuffle=True))
    passes = [torch.cat([b for pair in (sampler(), sampler()) for (b,) in pair]) for _ in range(2)]
    assert all(sorted(drawn.tolist()) == x.tolist() for drawn in passes)
    assert not torch.equal(*passes)


def test_a_refilled_batch_is_drawn_as_it_was():
    sampler = gc.from_loader(Refilling())
    assert same(sampler(), (numbers(0), numbers(1)))
    assert same(sampler(), (numbers(2), numbers(3)))
    assert same(sampler(), (numbers(0), numbers(1)))
