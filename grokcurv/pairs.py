"""Pairs of batches that are evaluated together, and what the kernel makes of their gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grokcurv.reference import SUMS, Form

REFERENCE_GUARD = 1e-12
"""Added to the denominator by the published float32 formula, and by nothing else here."""

Pair = tuple[Any, Any]
Sampler = Callable[[], Pair]

PairOfRuns = tuple[Sequence[Any], Sequence[Any]]
"""The first batches of a pair, one for each run, and the second ones."""


def in_quadrature(errors: Tensor) -> Tensor:
    """The square root of the sum of the rows' squares: (n, ...) to (...).

    Written as operations that each round in one way: a hypot or a norm of torch rounds a number by where it stands in
    its tensor, and a run is to give among others what it gives alone.
    """
    total, *others = errors.square().unbind()
    for square in others:
        total = total + square
    return total.sqrt()


def rows_of(table: Tensor, runs: Sequence[int]) -> Tensor:
    """Those of some runs, and if these are all, the table itself.

    Not by an index: its numbers would go to the device, which a captured measurement may not ask for.
    """
    return table if len(runs) == len(table) else torch.stack([table[run] for run in runs])


class PairGradients(NamedTuple):
    """What a measurement of K pairs of R runs finds of their gradients, (K, R) float64 each."""

    norm_a: Tensor
    """Length of the gradient on the first batch."""
    norm_b: Tensor
    cosine: Tensor
    """Of the angle between the two."""
    cosine_error: Tensor
    """What rounding may have changed of it, and of either length in proportion."""


class NumberedPair(NamedTuple):
    """A pair of batches of every run, its number, and the seeds of the batches' randomness."""

    number: int
    batches: PairOfRuns
    seeds: tuple[int, int]


@dataclass
class Pairs:
    """K pairs of batches of R runs that are evaluated together: vector ``k R + r`` is that of pair k of run r.

    Attributes:
        segments: (S, 2) int64, or None.
        runs: the runs, by their numbers in the engine.
        chained: whether each pair begins with the batch that the one before ended with.
        work: (4, K R, P): the gradients on A and on B, and those past a step, or products.
        scratch: memory for a point and, unless in brackets, one past a step; or for one of them in float64.
        begun: how many of the first pairs' gradients at theta are in ``work`` already, the first or both.
        given: how many of them training has given.
    """

    form: Form
    segments: Tensor | None
    runs: tuple[int, ...]
    those: list[NumberedPair]
    chained: bool
    work: Tensor
    scratch: Tensor
    begun: int = 0
    given: int = 0

    def __len__(self) -> int:
        return self.work.shape[1]

    @property
    def theta(self) -> Tensor:
        """(P,) where the parameters of one run go; the next use of the scratch in float64 overwrites it."""
        return self.scratch[0, : self.work.shape[2]]

    @property
    def past(self) -> Tensor:
        """(1, P) where a point past a step goes."""
        return self.scratch[1:2, : self.work.shape[2]]

    @property
    def point(self) -> Tensor:
        """(P,) float64, in the memory of everything else in the scratch."""
        return self.scratch.view(-1).view(torch.float64)[: self.work.shape[2]]

    @property
    def ends(self) -> Tensor:
        """(R, P) the gradients on the batches that ended the last pairs."""
        return self.work[1, -len(self.runs) :]

    def batches(self, which: int) -> list[Any]:
        """Those on A, or on B, of all vectors."""
        return [batch for pair in self.those for batch in pair.batches[which]]

    def seeds(self, which: int) -> list[int]:
        return [pair.seeds[which] for pair in self.those for _ in self.runs]

    def pair(self, v: int) -> Pair:
        """The two batches of one vector."""
        k, r = divmod(v, len(self.runs))
        a, b = self.those[k].batches
        return a[r], b[r]

    def wanted(self, index: int) -> slice:
        """For which vectors this one of their four is to be computed: not where it is that of another, or there."""
        runs, linked = len(self.runs), index == 0 and self.chained and self.form != "bracket"
        return slice(runs if index < self.begun else 0, runs if linked else len(self))

    def part(self, start: int, stop: int) -> Pairs:
        """Some vectors alone: of one pair, or whole pairs."""
        k, r = divmod(start, len(self.runs))
        here = slice(r, r + stop - start)
        those = [
            pair._replace(batches=(pair.batches[0][here], pair.batches[1][here]))
            for pair in self.those[k : -(-stop // len(self.runs))]
        ]
        begun, given = (self.begun, self.given) if k == 0 else (0, 0)
        work = self.work[:, start:stop]
        return replace(self, runs=self.runs[here], those=those, work=work, begun=begun, given=given)

    def unknown(self, value: float, *columns: int) -> Tensor:
        """(4, N) or (4, N, columns) float64: an entry for each of all vectors."""
        return torch.full((4, len(self), *columns), value, dtype=torch.float64, device=self.work.device)


@dataclass
class Sums:
    """What :func:`grokcurv.ops.commutator` makes of N pairs, completed to sums over all coordinates."""

    eta: Tensor
    sums: Tensor
    coefficients: Tensor
    energies: Tensor
    delta: Tensor | None
    inner: Tensor | None = None
    """(2, N) the third vector's inner products with the second, and the fourth's with the first, where asked for."""

    @cached_property
    def lengths(self) -> Tensor:
        """(10, N), or (6, N): the roots of the sums: lengths of the gradients on A and on B, then, third, no length at
        all, of delta, and of the changes of both gradients along the step (of the products in a bracket)."""
        return self.sums.sqrt().T

    @cached_property
    def area(self) -> Tensor:
        """(N,) ``|g_A| |g_B|``."""
        return (self.sums[:, 0] * self.sums[:, 1]).sqrt()

    @cached_property
    def unit(self) -> Tensor:
        """(N,) the length of a delta whose defect is one."""
        return self.eta.square() * self.area

    @cached_property
    def published(self) -> Tensor:
        """(N,) the defect by the published float32 formula; NaN in a bracket."""
        if len(self.lengths) == len(SUMS):
            return torch.full_like(self.unit, math.nan)
        return self.lengths[6] / (self.unit + REFERENCE_GUARD)
