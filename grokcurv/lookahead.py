"""Each batch of a loader with the one after it, while training sees what it would see without anybody looking ahead.

A loader may draw from the generators that training draws from, and it may hand out the same memory again and again.
So the batch after this one is fetched early only where that moves no generator that everybody sees; elsewhere its
place is taken by an :class:`Upcoming`, which fetches it once the training step has drawn. And a batch of which the
memory was refilled meanwhile is given to training as it was.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, RandomSampler

from grokcurv.evaluation import same_numbers, streams
from grokcurv.state import Snapshot, stand_ins

END = object()
"""What comes after the last batch."""

REMEMBERED = 2
"""Of so many batches, given to training last, there are copies: a trainer may fetch one ahead of what it trains."""


class Later:
    """Stands where a batch is expected that is fetched, or made ready, only if somebody measures.

    A loop that moves or converts what it is given does so with :meth:`then`.

    >>> Later(lambda: [1, 2]).then(sum).take()
    3

    Args:
        get: returns the batch, or None if there is none; called at most once.
    """

    def __init__(self, get: Callable[[], Any]) -> None:
        self._get = functools.cache(get)

    def take(self) -> Any:
        """The batch, or None if there is none: nothing is to be measured then."""
        return self._get()

    def then(self, prepare: Callable[[Any], Any]) -> Later:
        """The batch that ``prepare`` makes of this one, as late."""
        return Later(functools.partial(self._prepared, prepare))

    def _prepared(self, prepare: Callable[[Any], Any]) -> Any:
        batch = self.take()
        return None if batch is None else prepare(batch)

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(
            "this batch is not there yet: its loader draws from a generator that training draws from too, and it is "
            "fetched by step(batch, next_batch); what is to be done with it before goes into next_batch.then(function)"
        )


class Upcoming(Later):
    """The batch that comes next in a loader that draws from generators that training draws from too.

    Taken after the backward pass, it draws what it would draw when the loop goes on. The generators are put back until
    then: what is drawn in between, and after a loop that is left here, is what would be drawn without it.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(self._early)
        self._source = source
        self._batch: Any = None
        self._before: dict[str, Any] | None = None  # where the generators were, if the batch was fetched early
        self._after: dict[str, Any] = {}
        self._settled = False

    def _early(self) -> Any:
        """Fetch the batch now and put the generators back; None if there is no further one or none may be fetched."""
        if not self._settled:
            if self._source.withheld:
                return None
            self._before = self._source.streams.positions()
            self._batch = self._source.fetch()
            self._after = self._source.streams.positions()
            self._source.streams.move_to(self._before)
        return None if self._batch is END else self._batch

    def _prepared(self, prepare: Callable[[Any], Any]) -> Any:
        """As there, with the generators where they will stand when the batch is prepared for training."""
        batch = self.take()
        if batch is None or self._before is None or self._settled:
            return None if batch is None else prepare(batch)
        self._source.streams.move_to(self._after)
        try:
            return prepare(batch)
        finally:
            self._source.streams.move_to(self._before)

    def settle(self) -> Any:
        """The batch, or :data:`END`, now that the loop goes on; the generators go where the fetching leaves them."""
        if self._before is None:
            self._batch = self._source.fetch()
        elif not self._source.move_on(self._before, self._after):
            self._source.withhold(
                "something was drawn between step() and the end of the loop's body, so that a batch drawn at step() is "
                "not the one that would have come: from here on nothing is measured on this loader's batches; call "
                "step() after the last draw, or give the monitor a sampler"
            )
        self._settled = True
        return self._batch


class Source:
    """Fetches batches, and sees what fetching does.

    Args:
        loader: anything that can be iterated.
        device: of the model; if it is a GPU, its generator is watched too.

    Attributes:
        streams: the generators that everybody sees.
        draws: whether a fetch has moved one of them.
        withheld: whether no batch may be fetched before the loop goes on.
        error: what the loader has raised.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.draws = self.withheld = False
        self.in_memory = type(loader) in (list, tuple)  # there is nothing that a fetch could do
        self._shuffles = _draws_a_seed(loader)
        self.streams = streams(device)
        self.error: Exception | None = None
        self._iterator = iter(loader)

    def move_on(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
        """Put those generators there that a fetch has moved; False if one of them has been drawn from since."""
        free = True
        for name, stream in self.streams.items():
            old, new = before[name], after[name]
            untouched = stream.stands_at(old)
            position = stream.read()
            stream.write(new)
            if stream.stands_at(old):  # the fetch did not move it
                stream.write(position)
            elif not untouched:
                stream.write(position)
                free = False
        return free

    def fetch(self) -> Any:
        """The next batch, or :data:`END`; an error of the loader is kept until training has had all before it."""
        before = {} if self.in_memory else self.streams.positions()
        try:
            batch = next(self._iterator, END)
        except Exception as error:
            self.error, batch = error, END
        moved = self.streams.moved(before)
        if moved and self._shuffles:
            moved = self.streams.moved(before | {"torch": _after_a_seed(before["torch"])})
        self._shuffles = False
        self.draws = self.draws or bool(moved)
        return batch

    def withhold(self, why: str) -> None:
        """Fetch nothing early from now on."""
        if not self.withheld:
            warnings.warn(why, stacklevel=4)
        self.withheld = True


class Kept:
    """A batch, and a copy of it as it is now.

    Attributes:
        batch: the batch itself.
        copy: the copy, with tensors of its own; None if the batch holds something that cannot be copied.
    """

    def __init__(self, batch: Any) -> None:
        self.batch = batch
        self._tensors = Snapshot([batch]).tensors
        self._versions = list(map(version, self._tensors))
        self.copy = copied(batch, self._tensors)

    @property
    def complete(self) -> bool:
        """Whether the copy could be made."""
        return self.copy is not None or self.batch is None

    def changed(self) -> bool:
        """Whether the batch is no longer what it was.

        What is not on a CPU is not looked at, which would wait for it: it counts as changed if torch has written there.
        """
        now = Snapshot([self.batch])
        if not self.complete or len(now.tensors) != len(self._tensors):
            return True
        kept = Snapshot([self.copy])
        pairs = zip(now.tensors, kept.tensors, self._tensors, self._versions, strict=True)
        return (
            now.signature()[1] != kept.signature()[1]
            or any(_differ(tensor, was, at is not tensor or version(tensor) != v) for tensor, was, at, v in pairs)
            or not _same_arrays(self.batch, self.copy)
        )

    def is_like(self, batch: Any) -> bool:
        """Whether the copy can take the place of the batch: a loop may have moved or converted its tensors since."""
        kinds = [[(t.device, t.dtype) for t in Snapshot([x]).tensors] for x in (batch, self.copy)]
        return self.copy is not None and kinds[0] == kinds[1]


class Memory:
    """Copies of the batches that training was given last."""

    def __init__(self) -> None:
        self._kept: deque[Kept] = deque(maxlen=REMEMBERED)

    def keep(self, batch: Any) -> Kept:
        """Copy a batch that training is about to see."""
        self._kept.append(Kept(batch))
        return self._kept[-1]

    def find(self, batch: Any) -> Kept | None:
        """What was kept of this very object."""
        return next((kept for kept in reversed(self._kept) if kept.batch is batch), None)


def with_next(loader: Iterable[Any], device: torch.device, memory: Memory) -> Iterator[tuple[Any, Any]]:
    """Each batch of ``loader`` with the one after it, or with an :class:`Upcoming`; the last one may come with None.

    Args:
        loader: anything that can be iterated.
        device: of the model.
        memory: gets a copy of each batch before training has it.
    """
    return _with_next(Source(loader, device), memory)  # the loader is asked for its iterator now, as in a plain loop


def _with_next(source: Source, memory: Memory) -> Iterator[tuple[Any, Any]]:
    """Each batch with the one that follows it, which is None after the last."""
    batch = source.fetch()
    while batch is not END:
        kept = memory.keep(batch)
        if not kept.complete and not source.in_memory:
            source.withhold(
                "the loader's batches cannot be copied, and so it cannot be seen whether fetching one changes the one "
                "before: nothing is measured on them; give the monitor a sampler"
            )
        if source.draws or source.withheld:
            upcoming = Upcoming(source)
            yield batch, upcoming
            batch = upcoming.settle()
            continue
        following = source.fetch()
        if not source.in_memory and kept.changed():
            batch = memory.keep(kept.copy).batch
        yield batch, None if following is END else following
        batch = following
    if source.error is not None:
        raise source.error


def copied(batch: Any, tensors: Sequence[Tensor] | None = None) -> Any:
    """A copy with tensors of its own, whatever the batch is made of; None if a part of it cannot be copied.

    Args:
        batch: what a loader gives.
        tensors: those in it, if they are known.
    """
    tensors = Snapshot([batch]).tensors if tensors is None else tensors
    memo = dict(zip(map(id, tensors), stand_ins(tensors), strict=True))
    try:
        return copy.deepcopy(batch, memo)
    except Exception:  # of any kind: objects that forbid it say so in ways of their own
        return None


def version(tensor: Tensor) -> int:
    """How often torch has written to a tensor, as far as it counts that."""
    return 0 if tensor.is_inference() else tensor._version


def _draws_a_seed(loader: Iterable[Any]) -> bool:
    """Whether the first batch, and no other, takes a seed for the order from torch's generator."""
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    return type(sampler) is RandomSampler and sampler.generator is None and not sampler.replacement


def _after_a_seed(state: Tensor) -> Tensor:
    """Where torch's generator stands once a seed was taken as a RandomSampler takes it."""
    generator = torch.Generator()
    generator.set_state(state)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator.get_state()


def _differ(now: Tensor, was: Tensor, written: bool) -> bool:
    """Whether a tensor holds other numbers than it did; where that cannot be seen, whether it was written to."""
    unseen = now.device.type != "cpu" or now.layout != torch.strided or now.is_nested
    return written if unseen else not same_numbers(now, was)


def _same_arrays(one: Any, other: Any) -> bool:
    ours, theirs = ([x for x in tree_leaves(batch) if isinstance(x, np.ndarray)] for batch in (one, other))
    return len(ours) == len(theirs) and all(a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True))
