"""DistributedDataParallel: each rank has all P coordinates, and gradients are averaged by one all-reduce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from grokcurv.admission import Traits
from grokcurv.device_buffer import is_asynchronous
from grokcurv.evaluation import Check, LossFn
from grokcurv.gradients import GradientEngine, Multiply, Strategy, deliver

T = TypeVar("T")


def seed_of_rank(seed: int) -> int:
    """The seed of this rank: masks differ between ranks, as samples do."""
    return seed * dist.get_world_size() + dist.get_rank()


class ReplicatedEngine(GradientEngine):
    """Gradients averaged over the ranks of a DistributedDataParallel; vectors are (P,), the same on each.

    On a CPU an evaluation that fails on one rank raises on all. On an accelerator to know of it would mean to wait.
    """

    def __init__(self, model: DistributedDataParallel, loss_fn: LossFn, strategy: Strategy) -> None:
        # The wrapped module, not the wrapper, whose forward pass would make its buckets ready for a backward pass of
        # training's. But the wrapper's group: measured gradients are averaged over the very ranks that training's are.
        super().__init__(model.module, loss_fn, strategy=strategy)
        self._group = model.process_group

    def gradient(self, theta: Tensor, batch: Any, out: Tensor, *, seed: int = 0, check: Check | None = None) -> Tensor:
        """As there; a gradient in float64 is averaged before it is rounded, in memory for all of it."""
        # Never part by part, as a single process may: what is compared with `out`, and rounded to it, must be the mean,
        # and that is known only when all of this rank's gradient is there. A memory of its own also keeps `out` as it
        # was, which is wanted for the comparison, and where the check keeps it: that of a caller who only compares.
        whole = torch.empty_like(theta)
        with self._together():
            mode = self._mode(theta.dtype, check)
            self.whole_gradient(theta, batch, whole, seed_of_rank(seed), mode=mode)
        # After the all-reduce each rank holds the same bits, so what follows needs no exchange: every rank computes the
        # same norms from them, and so decides alike.
        deliver(self._average_(whole), out, check)
        return out

    def product(
        self,
        theta: Tensor,
        batch: Any,
        direction: Tensor,
        gradient: Tensor | None,
        product: Tensor,
        seed: int = 0,
        check: Check | None = None,
    ) -> None:
        """As in one process, of the mean of all ranks' losses."""
        # The mean of the products is the product of the mean loss's Hessian, because the direction is the same on all
        # ranks. The gradient is averaged even where nobody has asked for it, so that every call is the same two
        # collectives.
        first, second = (torch.empty_like(theta) for _ in range(2))
        shaken = check and replace(check, found=torch.empty_like(check.found), keep=False)  # the means are compared
        with self._together():
            super().product(theta, batch, direction, first, second, seed_of_rank(seed), shaken)
        for index, (whole, out) in enumerate(((first, gradient), (second, product))):
            self._average_(whole)
            if out is not None:
                # From the end, since the check is of one vector alone where there is no gradient to compare.
                deliver(whole, out, check and check.of(index - 2))

    def hessian(self, theta: Tensor, batch: Any, use: Callable[[Multiply], T], *, seed: int = 0) -> T:
        """As there, but that each product is made anew: one all-reduce of P for it, and one for a gradient."""

        def multiply(direction: Tensor) -> Tensor:
            out = torch.empty_like(theta)
            self.product(theta, batch, direction, None, out, seed)
            return out

        return use(multiply)

    def loss(self, theta: Tensor, batch: Any, *, seed: int = 0) -> Tensor:
        """The mean of all ranks' losses at theta."""
        with self._together():
            own = super().loss(theta, batch, seed=seed_of_rank(seed))
        return self._average_(own)

    def has_true_brackets(self, batch: Any, *, seed: int = 0) -> bool:
        # True on every rank for every model, and taken on trust: of the checks of admission, which are made for the
        # gradients of one process, only that for kinks is made here.
        return True

    def _admitted(self, batch: Any, seed: int, exact: bool, brackets: bool) -> Traits:
        """As in one process, with one answer for all ranks."""
        # Traits decide in which precision later gradients are taken, and so the dtype of their all-reduces: the ranks
        # must have the same ones, although each looks at a batch of its own.
        with self._together():
            # True for a rank whose own operators have a kink: a branch of the model may be taken on one rank alone.
            nonsmooth = self._has_kinks(batch, seed_of_rank(seed))
        # True on all ranks as soon as it is on one: the mean of gradients jumps where any of them does.
        return Traits(nonsmooth=self.anywhere(nonsmooth))

    def _batched(self, thetas: Tensor, batches: Sequence[Any], out: Tensor | None = None) -> Tensor:
        """Means over all ranks of the gradients of N batches."""
        # One collective for all N gradients, where the loop makes one for each.
        with self._together():
            found = super()._batched(thetas, batches, out)
        return self._average_(found)

    def _average_(self, vectors: Tensor) -> Tensor:
        """Put the mean over all ranks in place of the vectors."""
        # Summed and then divided, since gloo knows no average; in the vectors' own dtype, whatever hook of training's
        # compresses what its buckets exchange.
        dist.all_reduce(vectors, group=self._group)
        return vectors.div_(self._group.size())

    def anywhere(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        # `flag` is true for this rank alone; what is returned is true for all, if it was for any. It is read at once,
        # which on an accelerator waits for the device.
        flags = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return bool(flags)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raises on all ranks if any does here, none of which would otherwise come to where the others wait."""
        # Collectives are matched by their order. A rank that leaves between two of them would let the others wait in
        # the next until the process group's timeout, or pair its own next one with another of theirs.
        if is_asynchronous(self.device):
            yield  # To ask the others would make each evaluation wait for the device: an error stays where it arose.
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        # True on all ranks if one has failed. Asked by those that succeeded too: they cannot know of it otherwise.
        if self.anywhere(error is not None):
            raise error or RuntimeError("the model could not be evaluated on another rank, whose error says why")
