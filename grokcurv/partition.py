"""Which part of a model's P coordinates a process has: all of them, unless the model is sharded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grokcurv.flat import Segment


@dataclass(frozen=True)
class Partition:
    """Which of a model's P coordinates a process has, and how what it found in them becomes true of all P.

    Here it has all of them. Where it has a shard, its vectors hold those alone, and what is found is exchanged with
    the other processes (:mod:`grokcurv.integrations.sharded`).
    """

    def local_part(self, segment: Segment) -> Segment:
        """What is here of an interval of R^P, placed in the vectors here."""
        return segment

    def all_reduce_sum(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """Sums over the coordinates here, float64, completed to sums over all."""
        return sums

    def norm(self, *parts: Tensor) -> Tensor:
        """() float64: length of the vector that consists of these parts."""
        norms = [torch.linalg.vector_norm(part) for part in parts]
        whole: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        return whole.to(torch.float64)

    def norms(self, rows: Tensor) -> Tensor:
        """(..., N) float64: lengths of vectors (..., N, P)."""
        norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        return norms.to(torch.float64)

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Elementwise, the greatest number that any process found."""
        return values

    def all_reduce_and(self, flags: Tensor) -> Tensor:
        """bool, elementwise: whether all processes found it so."""
        return flags


WHOLE = Partition()
