"""Samplers: where a :class:`grokcurv.CurvatureMonitor` gets its pairs from, if not from the training loop.

>>> x, y = torch.randn(100, 3), torch.arange(100)
>>> sampler = subsample((x, y), rows=8)
>>> (x_a, y_a), (x_b, y_b) = sampler()
>>> bool((x_a == x[y_a]).all()), x_b.shape
(True, torch.Size([8, 3]))

They have generators of their own: none that training can draw from is touched.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from grokcurv.commutator import Pair
from grokcurv.evaluation import isolated
from grokcurv.lookahead import copied
from grokcurv.state import LARGE, Snapshot, stand_ins, standing_in


def subsample(tensors: Any, rows: int, seed: int = 0) -> RowSampler:
    """Draws pairs of batches of ``rows`` rows each, no row twice in a batch.

    Args:
        tensors: a tensor, or tuples, lists and dicts of tensors, with as many rows each.
        rows: of each batch.
        seed: of the draws.

    Raises:
        ValueError: no tensors, unlike numbers of rows, or fewer than ``rows``.
    """
    count = _rows(tensors)
    if not 1 <= rows <= count:
        raise ValueError(f"rows must be between 1 and the {count} rows of the tensors, got {rows}")
    return RowSampler(tensors, lambda g: [torch.randperm(count, generator=g)[:rows] for _ in range(2)], seed)


def halves(batch: Any, seed: int = 0) -> RowSampler:
    """Draws the two halves of a full batch, divided anew each time; of an odd number of rows the second has one more.

    Args:
        batch: a tensor, or tuples, lists and dicts of tensors, with as many rows each.
        seed: of the draws.

    Raises:
        ValueError: no tensors, unlike numbers of rows, or fewer than two.
    """
    count = _rows(batch)
    if count < 2:
        raise ValueError(f"batch must have two rows or more to be halved, got {count}")
    return RowSampler(batch, lambda g: torch.randperm(count, generator=g).tensor_split([count // 2]), seed)


def from_loader(loader: Iterable[Any], seed: int = 0) -> LoaderSampler:
    """Draws the batches of a loader, two at a time, in passes of its own.

    The loader may be the one that training goes through: its order, its generators, the state of its data set and those
    generators that everybody sees stay as they are. A ``DataLoader`` is gone through in this process, whatever its
    number of workers.

    Args:
        loader: anything that can be iterated again and again.
        seed: of what the loader draws, its order for one.

    Raises:
        ValueError: the loader can be gone through only once; or, when it is drawn from, it is empty.
    """
    return LoaderSampler(loader, seed)


class RowSampler:
    """A function that draws pairs of rows; :func:`subsample` and :func:`halves` make it.

    What a measurement gets depends on ``seed``, on the step at which it is made and on what was drawn at that step
    before. Without a monitor to tell the step, that is the number of the draw.

    >>> sampler = subsample(torch.arange(100), rows=4)
    >>> before = sampler.state_dict()
    >>> a, b = sampler()
    >>> sampler.load_state_dict(before)
    >>> torch.equal(sampler()[0], a)
    True
    """

    def __init__(self, tensors: Any, two: Callable[[torch.Generator], Sequence[Tensor]], seed: int) -> None:
        self._tensors, self._two, self._seed = tensors, two, seed
        self._step = self._drawn = 0

    def at(self, step: int) -> None:
        """Draw what belongs to a step from now on; the monitor calls this."""
        self._step, self._drawn = step, 0

    def __call__(self) -> Pair:
        """A pair of batches."""
        generator = torch.Generator().manual_seed(_seed_of(self._seed, self._step, self._drawn))
        self._drawn += 1
        one, other = map(self._take, self._two(generator))
        return one, other

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"step": self._step, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another one stood."""
        self._step, self._drawn = state["step"], state["drawn"]

    def _take(self, rows: Tensor) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor[rows.to(tensor.device)], self._tensors)


class LoaderSampler:
    """A function that draws pairs from a loader; :func:`from_loader` makes it.

    Each batch depends on ``seed``, on the number of the pass and on its place in it. :meth:`state_dict` says how many
    passes there were and how far the present one is; going on from there means going through that pass again.

    >>> sampler = from_loader([torch.zeros(2), torch.ones(2), torch.ones(2)])
    >>> sampler()
    (tensor([0., 0.]), tensor([1., 1.]))
    >>> sampler.state_dict()
    {'pass': 0, 'place': 2}
    """

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(
                f"loader must be something that can be iterated again and again, got a {type(loader).__name__}, which "
                "can be gone through once, and would lack what was drawn from it"
            )
        self._loader, shared = _own(loader)
        self._shared = _parts(shared)
        self._all = self._shared + _parts([self._loader])
        self._seed = seed
        self._pass = self._place = 0
        self._batches: Iterator[Any] | None = None

    def __call__(self) -> Pair:
        """A pair of batches, each with tensors of its own."""
        return self._next(), self._next()

    def state_dict(self) -> dict[str, int]:
        """Where it stands."""
        return {"pass": self._pass, "place": self._place}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another one of the same loader stood."""
        self._pass, self._place = state["pass"], 0
        self._batches = None
        while self._place < state["place"]:
            self._fetch()

    def _next(self) -> Any:
        """The next batch, of the next pass where this one has ended."""
        found = self._fetch()
        if not found:
            empty = self._place == 0
            self._pass, self._place, self._batches = self._pass + 1, 0, None
            if empty or not (found := self._fetch()):
                raise ValueError("loader gave no batch: there is nothing to draw from")
        return found[0]

    def _fetch(self) -> list[Any]:
        """The next batch of this pass; an empty list at its end."""
        with self._apart(_seed_of(self._seed, self._pass, self._place)):
            if self._batches is None:
                self._batches = iter(self._loader)
                if self._batches is self._loader:
                    raise ValueError("loader is its own iterator: drawing from it would move the one of training")
            self._place += 1
            for batch in self._batches:
                mine = copied(batch)
                return [batch if mine is None else mine]
            self._place -= 1
            return []

    @contextmanager
    def _apart(self, seed: int) -> Iterator[None]:
        """Whatever the loader draws comes from ``seed``, and what it changes in itself is put back."""
        drawing, shared = Snapshot(self._all), Snapshot(self._shared)
        small = [x for x in shared.tensors if x.numel() <= LARGE and type(x) is Tensor and not x.is_inference()]
        with isolated(seed):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            drawing.seed_generators(seed)
            try:
                with standing_in(small, stand_ins(small)):
                    yield
            finally:
                shared.restore()
                drawing.restore_generators()


def _rows(tensors: Any) -> int:
    """How many rows each of the tensors has."""
    leaves = [leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor)]
    counts = sorted({len(leaf) if leaf.dim() else 0 for leaf in leaves})
    if len(counts) != 1 or counts[0] == 0:
        raise ValueError(f"tensors must have rows, as many each, got {counts or 'no tensor'}")
    return counts[0]


def _seed_of(*numbers: int) -> int:
    """One seed for several numbers, different where they are."""
    return int(np.random.SeedSequence([number % 2**64 for number in numbers]).generate_state(1, np.uint64)[0]) >> 1


def _own(loader: Iterable[Any]) -> tuple[Iterable[Any], list[Any]]:
    """A loader like this one with an order and a place of its own, and what the two of them share."""
    if type(loader) in (list, tuple):
        return loader, []
    if not isinstance(loader, DataLoader):
        mine = _twin(loader)
        return mine, [loader] if mine is loader else []
    twin = copy.copy(loader)
    here = {"_iterator": None, "num_workers": 0, "prefetch_factor": None, "persistent_workers": False, "timeout": 0}
    vars(twin).update(here | {"_DataLoader__multiprocessing_context": None})
    # A data set that is gone through has a place in it; one with an index is large more often.
    data = _twin(loader.dataset) if isinstance(loader.dataset, IterableDataset) else loader.dataset
    names = ("sampler", "batch_sampler", "generator")
    order = _twin({name: getattr(loader, name) for name in names}, {id(loader.dataset): data})
    vars(twin).update(order | {"dataset": data})
    shared = [loader.collate_fn, *([data] if data is loader.dataset else [])]
    return twin, shared + [order[name] for name in names if order[name] is getattr(loader, name)]


def _twin(thing: Any, memo: Mapping[int, Any] | None = None) -> Any:
    """A deep copy that shares large tensors, and what is in ``memo``; the thing itself if it cannot be copied."""
    known = {id(tensor): tensor for tensor in Snapshot([thing]).tensors if tensor.numel() > LARGE}
    try:
        return copy.deepcopy(thing, known | dict(memo or {}))
    except Exception:  # of any kind: objects that forbid it say so in ways of their own
        return thing


def _parts(things: list[Any]) -> list[Any]:
    """The things, and what the loaders and data sets of torch hold, into which a snapshot does not look."""
    parts: list[Any] = []
    stack = list(things)
    while stack:
        part = stack.pop()
        if part is None or any(part is seen for seen in parts):
            continue
        parts.append(part)
        if type(part).__module__.startswith("torch.utils.data"):
            stack.extend(vars(part).values())
    return parts
