"""DistributedDataParallel: each rank has all P coordinates, and gradients are averaged by one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from grokcurv.admission import Traits
from grokcurv.device_buffer import is_asynchronous
from grokcurv.evaluation import LossFn
from grokcurv.gradients import GradientEngine, Strategy, deliver_whole


def seed_of_rank(seed: int) -> int:
    """The seed of this rank: masks differ between ranks, as samples do."""
    return seed * dist.get_world_size() + dist.get_rank()


class _ElsewhereError(RuntimeError):
    """Another rank has failed."""


class ReplicatedEngine(GradientEngine):
    """Gradients averaged over the ranks of a DistributedDataParallel; vectors are (P,), the same on each.

    On a CPU an evaluation that fails on one rank raises on all. On an accelerator to know of it would mean to wait.
    """

    def __init__(self, model: DistributedDataParallel, loss_fn: LossFn, strategy: Strategy) -> None:
        super().__init__(model.module, loss_fn, strategy=strategy)
        self._group = model.process_group

    def gradient(
        self,
        theta: Tensor,
        batch: Any,
        out: Tensor,
        *,
        seed: int = 0,
        found: Tensor | None = None,
        keep: bool = False,
        shake: torch.Generator | None = None,
    ) -> Tensor:
        """As there; a gradient in float64 is averaged before it is rounded, in memory for all of it."""
        whole = torch.empty_like(theta)
        with self._together():
            mode = self._mode(theta.dtype, shake)
            self._one(theta, batch, whole, seed_of_rank(seed), mode=mode)
        deliver_whole(self._average_(whole), out, found, keep=keep)
        return out

    def product(
        self,
        theta: Tensor,
        batch: Any,
        direction: Tensor,
        gradient: Tensor | None,
        product: Tensor,
        seed: int = 0,
        *,
        found: Tensor | None = None,
        keep: bool = False,
        shake: torch.Generator | None = None,
    ) -> None:
        first, second = (torch.empty_like(theta) for _ in range(2))
        with self._together():
            super().product(theta, batch, direction, first, second, seed_of_rank(seed), shake=shake)
        for index, (whole, out) in enumerate(((first, gradient), (second, product))):
            self._average_(whole)
            if out is not None:
                deliver_whole(whole, out, None if found is None else found[index - 2], keep=keep)

    def has_true_brackets(self, batch: Any, *, seed: int = 0) -> bool:
        return True

    def _admitted(self, batch: Any, seed: int, exact: bool, brackets: bool) -> Traits:
        with self._together():
            nonsmooth = self._has_kinks(batch, seed_of_rank(seed))
        return Traits(nonsmooth=self.anywhere(nonsmooth))

    def _batched(self, thetas: Tensor, batches: Sequence[Any], out: Tensor) -> Tensor:
        with self._together():
            super()._batched(thetas, batches, out)
        return self._average_(out)

    def _average_(self, vectors: Tensor) -> Tensor:
        dist.all_reduce(vectors, group=self._group)
        return vectors.div_(self._group.size())

    def anywhere(self, flag: bool) -> bool:
        flags = torch.tensor([flag], dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        return bool(flags)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raises on all ranks if any does here, none of which would otherwise come to where the others wait."""
        error: Exception | None = None
        try:
            yield
        except _ElsewhereError:
            raise
        except Exception as raised:
            if is_asynchronous(self.device):
                raise
            error = raised
        if not is_asynchronous(self.device) and self.anywhere(error is not None):
            raise error or _ElsewhereError("the model could not be evaluated on another rank, whose error says why")
