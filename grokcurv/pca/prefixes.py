r"""The leading share of every prefix of a trajectory, from the smaller of two matrices.

Up to as many rows as there are coordinates that is the Gram matrix of the rows, of which a prefix has a leading block;
beyond, the scatter matrix of the coordinates, to which each row adds one of rank one (Welford 1962; Chan, Golub and
LeVeque 1983).

A prefix differs little from the one before. Every :data:`COLD` rows the eigenproblem is solved from nothing; what lies
between begins at that vector and takes the few Lanczos steps that are left to go (Golub and Van Loan, Matrix
Computations, 10.1), each one product with the matrix. A Ritz pair :math:`(\theta, y)` with residual r could be any
eigenpair. That it is the leading one follows from the Frobenius norm: no two eigenvalues of C are larger than
:math:`\sqrt{|C|_F^2 - \theta^2}`, so that one above that is alone there, and off by at most :math:`|r|^2` over the gap
(Parlett, The Symmetric Eigenvalue Problem, 11.7). Where the spectrum is too flat for it, each prefix is solved whole.

What is found for a prefix depends on its own rows alone, to the bit, whatever rows follow and whenever it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.pca.common import EPSILON, Layout, trace
from grokcurv.pca.rows import Rows

COLD = 32
"""Rows from one prefix that is solved from nothing to the next."""
STEPS = (5, 12)
"""Of Lanczos: when it is first asked whether that is enough, and when it is given up."""
TOLERANCE = 1e-13
"""Relative error of an eigenvalue that is not looked at closer."""


class Prefixes(ABC):
    """The prefixes of S trajectories, each by a matrix about the mean of its rows. They are asked for in order."""

    def __init__(self) -> None:
        self._base, self._start = 0, torch.empty(0)  # rows of the latest that was solved whole, and its vectors (S, m)

    @abstractmethod
    def centred(self, size: int) -> Tensor:
        """(S, m, m): the matrix of the first ``size`` rows."""

    @abstractmethod
    def _trace(self, size: int) -> Tensor:
        """(S,): of that matrix."""

    @abstractmethod
    def _norm2(self, size: int) -> Tensor:
        """(S,): a bound on its squared Frobenius norm, rounding included."""

    @abstractmethod
    def _times(self, size: int, vectors: Tensor) -> Tensor:
        """Its products (S, m) with vectors (S, m)."""

    def _first(self, size: int) -> Tensor:
        """(S, m): vectors to begin at, from the latest that are known."""
        return self._start

    def leading_share(self, size: int) -> Tensor:
        """(S,): largest eigenvalue over trace; NaN where there is no variance."""
        base = size // COLD * COLD
        if base in (0, size):
            return self._whole(size) / self._trace(size)
        if self._base != base:
            self._whole(base)
        values = self._lanczos(size)
        if not (settled := values.isfinite()).all():
            whole, _ = ops.eigh(self.centred(size)[~settled], 1)
            values[~settled] = whole[:, 0]
        return values / self._trace(size)

    def _whole(self, size: int) -> Tensor:
        """(S,): leading eigenvalues, from nothing."""
        values, vectors = ops.eigh(self.centred(size), 1)
        self._base, self._start = size, vectors[:, :, 0]
        return values[:, 0]

    def _lanczos(self, size: int) -> Tensor:
        """(S,): leading eigenvalues; NaN for those that are not settled."""
        vector, norm2 = self._first(size), self._norm2(size)
        basis = (vector / _length(vector))[:, None]
        tridiagonal = vector.new_zeros(len(vector), STEPS[1], STEPS[1])
        values = vector.new_full((len(vector),), torch.nan)
        for step in range(STEPS[1]):
            vector = self._times(size, basis[:, -1])
            along = (basis * vector[:, None]).sum(2)
            vector = vector - (along[:, :, None] * basis).sum(1)
            length = _length(vector)
            tridiagonal[:, step, step] = along[:, -1]
            if step + 1 >= STEPS[0]:
                ritz, weights = ops.eigh(tridiagonal[:, : step + 1, : step + 1].contiguous(), 1)
                theta, residual = ritz[:, 0], length[:, 0] * weights[:, -1, 0].abs()
                gap = theta - residual - (norm2 - theta.square()).clamp_min(0).sqrt()
                enough = (gap > 0) & (residual.square() <= TOLERANCE * theta * gap)
                values = torch.where(values.isnan() & enough, theta, values)
                hopeless = 2 * theta.square() < norm2
                if bool((values.isfinite() | hopeless).all()):
                    break
            if step + 1 < STEPS[1]:
                tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = length[:, 0]
            basis = torch.cat([basis, (vector / length)[:, None]], 1)
        return values


class GramPrefixes(Prefixes):
    """By the leading blocks of Gram matrices (S, n, n).

    Running sums make the result for a prefix independent of the rows that follow it, to the bit.
    """

    def __init__(self, gram: Tensor) -> None:
        super().__init__()
        self.gram = gram
        self.row_sums = gram.cumsum(2)
        self.totals = self.row_sums.cumsum(1).diagonal(dim1=1, dim2=2)
        squares = gram.square().cumsum_(2).diagonal(dim1=1, dim2=2)  # of the row that each prefix adds, up to its own
        own = gram.diagonal(dim1=1, dim2=2).square()
        self._norms2 = (2 * squares - own).cumsum(1)

    def centred(self, size: int) -> Tensor:
        mean, grand = self._means(size)
        return self.gram[:, :size, :size] - (mean[:, :, None] + mean[:, None, :]) + grand[:, None, None]

    def _means(self, size: int) -> tuple[Tensor, Tensor]:
        """(S, size) of the rows of the first block of that size, and (S,) of all of it."""
        return self.row_sums[:, :size, size - 1] / size, self.totals[:, size - 1] / size**2

    def _trace(self, size: int) -> Tensor:
        mean, grand = self._means(size)
        return (self.gram[:, :size, :size].diagonal(dim1=1, dim2=2) - 2 * mean + grand[:, None]).sum(1)

    def _norm2(self, size: int) -> Tensor:
        raw, (mean, grand) = self._norms2[:, size - 1], self._means(size)
        return raw - 2 * size * mean.square().sum(1) + (size * grand).square() + 8 * size * EPSILON * raw

    def _first(self, size: int) -> Tensor:
        return _about_mean(torch.nn.functional.pad(self._start, (0, size - self._base)))

    def _times(self, size: int, vectors: Tensor) -> Tensor:
        return _about_mean((self.gram[:, :size, :size] * vectors[:, None]).sum(2))


class ScatterPrefixes(Prefixes):
    """By the scatter matrices of coordinates about the mean, each from the one before.

    Args:
        rows: of the trajectories, which may become more.
        origin: (L,), what is to be subtracted from each.
        layout: of a row; m is the longest segment's length, and the coordinates that others lack are zero.
    """

    def __init__(self, rows: Rows, origin: Tensor | None, layout: Layout) -> None:
        super().__init__()
        self._rows, self._origin = rows, origin
        count, m = len(layout.lengths), max(layout.lengths)
        places = [torch.arange(s * m, s * m + length) for s, length in enumerate(layout.lengths)]
        self._places = torch.cat(places).to(layout.device)
        self._size = 0
        self._mean = torch.zeros(count, m, dtype=torch.float64, device=layout.device)
        self._scatter = self._mean.new_zeros(count, m, m)

    def centred(self, size: int) -> Tensor:
        while self._size < size:
            row = self._rows[self._size].double()
            if self._origin is not None:
                row = row - self._origin.double()
            self._add(torch.zeros_like(self._mean).view(-1).index_copy_(0, self._places, row).view_as(self._mean))
        return self._scatter

    def _add(self, row: Tensor) -> None:
        apart = row - self._mean
        weighted = apart * (self._size / (self._size + 1)) ** 0.5  # on both sides, or rounding would not be symmetric
        self._scatter += weighted[:, :, None] * weighted[:, None]
        self._size += 1
        self._mean += apart / self._size

    def _trace(self, size: int) -> Tensor:
        return trace(self.centred(size))

    def _norm2(self, size: int) -> Tensor:
        rows = self.centred(size).square().sum(2)
        return rows.sum(1) * (1 + 4 * rows.shape[1] * EPSILON)

    def _times(self, size: int, vectors: Tensor) -> Tensor:
        return (self.centred(size) * vectors[:, None]).sum(2)


def _about_mean(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(1, keepdim=True)


def _length(vectors: Tensor) -> Tensor:
    """(S, 1)."""
    return vectors.square().sum(1, keepdim=True).sqrt()
