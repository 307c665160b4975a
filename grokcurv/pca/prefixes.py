r"""The leading share of every prefix of a trajectory, from the smaller of two matrices.

Up to as many rows as there are coordinates that is the Gram matrix of the rows, of which a prefix has a leading block;
beyond, the scatter matrix of the coordinates, to which each row adds one of rank one (Welford 1962; Chan, Golub and
LeVeque 1983).

A prefix differs little from the one before. Every :data:`COLD` rows the eigenproblem is solved from nothing; what lies
between begins at that vector and takes the few Lanczos steps that are left to go (Golub and Van Loan, Matrix
Computations, 10.1), each one product with the matrix: of a Gram matrix, which all these prefixes share, a product of
matrices for all of them. A Ritz pair :math:`(\theta, y)` with residual r could be any
eigenpair. That it is the leading one follows from the Frobenius norm: no two eigenvalues of C are larger than
:math:`\sqrt{|C|_F^2 - \theta^2}`, so that one above that is alone there, and off by at most :math:`|r|^2` over the gap
(Parlett, The Symmetric Eigenvalue Problem, 11.7). Where the spectrum is too flat for it, each prefix is solved whole.

What is found for a prefix depends on its own rows alone, to the bit, whatever rows follow and whenever it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from grokcurv import ops
from grokcurv.pca.common import EPSILON, Layout, padded, trace
from grokcurv.pca.rows import Rows

COLD = 32
"""Rows from one prefix that is solved from nothing to the next."""
STEPS = (5, 12)
"""Of Lanczos: when it is first asked whether that is enough, and when it is given up."""
TOLERANCE = 1e-13
"""Relative error of an eigenvalue that is not looked at closer."""


class Prefixes(ABC):
    """The prefixes of S trajectories, each by a matrix about the mean of its rows. They are asked for in order."""

    together = 1
    """So many prefixes, of those between two that are solved whole, are solved at a time."""

    def __init__(self) -> None:
        self._base, self._start = 0, torch.empty(0)  # rows of the latest that was solved whole, and its vectors (S, m)

    @abstractmethod
    def centred(self, size: int) -> Tensor:
        """(S, m, m): the matrix of the first ``size`` rows."""

    @abstractmethod
    def _traces(self, sizes: range) -> Tensor:
        """(S, N): of the matrices of these prefixes."""

    @abstractmethod
    def _norms2(self, sizes: range) -> Tensor:
        """(S, N): bounds on their squared Frobenius norms, rounding included."""

    @abstractmethod
    def _times(self, sizes: range, vectors: Tensor) -> Tensor:
        """Their products (S, N, m) with vectors (S, N, m)."""

    @abstractmethod
    def _first(self, sizes: range) -> Tensor:
        """(S, N, m): vectors to begin at, from the latest that are known."""

    def leading_shares(self, sizes: range) -> list[Tensor]:
        """(S,) for each prefix: largest eigenvalue over trace; NaN where there is no variance."""
        found: list[Tensor] = []
        while sizes:
            base = sizes[0] // COLD * COLD
            if base in (0, sizes[0]):
                some = sizes[:1]
                values = self._whole(some[0])[:, None]
            else:
                some = sizes[: min(self.together, base + COLD - sizes[0])]
                if self._base != base:
                    self._whole(base)
                values = self._lanczos(some)
            found += (values / self._traces(some)).unbind(1)
            sizes = sizes[len(some) :]
        return found

    def _whole(self, size: int) -> Tensor:
        """(S,): leading eigenvalues, from nothing."""
        values, vectors = ops.eigh(self.centred(size), 1)
        self._base, self._start = size, vectors[:, :, 0]
        return values[:, 0]

    def _lanczos(self, sizes: range) -> Tensor:
        """(S, N): leading eigenvalues; those that a few steps do not settle are solved whole."""
        vector, norm2 = self._first(sizes), self._norms2(sizes)
        basis = (vector / _length(vector))[:, :, None]
        tridiagonal = vector.new_zeros(*norm2.shape, STEPS[1], STEPS[1])
        values = torch.full_like(norm2, torch.nan)
        for step in range(STEPS[1]):
            vector = self._times(sizes, basis[:, :, -1])
            along = (basis * vector[:, :, None]).sum(3)
            vector = vector - (along[..., None] * basis).sum(2)
            length = _length(vector)
            tridiagonal[..., step, step] = along[..., -1]
            if step + 1 >= STEPS[0]:
                ritz, weights = ops.eigh(tridiagonal[..., : step + 1, : step + 1].flatten(0, 1).contiguous(), 1)
                theta = ritz[:, 0].view_as(norm2)
                residual = length[..., 0] * weights[:, -1, 0].abs().view_as(norm2)
                gap = theta - residual - (norm2 - theta.square()).clamp_min(0).sqrt()
                enough = (gap > 0) & (residual.square() <= TOLERANCE * theta * gap)
                values = torch.where(values.isnan() & enough, theta, values)
                hopeless = 2 * theta.square() < norm2
                if bool((values.isfinite() | hopeless).all()):
                    break
            if step + 1 < STEPS[1]:
                tridiagonal[..., step, step + 1] = tridiagonal[..., step + 1, step] = length[..., 0]
            basis = torch.cat([basis, (vector / length)[:, :, None]], 2)
        for place, size in enumerate(sizes):
            if (open_ := ~values[:, place].isfinite()).any():
                whole, _ = ops.eigh(self.centred(size)[open_], 1)
                values[open_, place] = whole[:, 0]
        return values


class GramPrefixes(Prefixes):
    """By the leading blocks of Gram matrices (S, n, n).

    Running sums make the result for a prefix independent of the rows that follow it, to the bit; and so do vectors that
    are as long for all prefixes up to the next that is solved whole, with zeros for rows that are not theirs.
    """

    together = COLD - 1

    def __init__(self, gram: Tensor) -> None:
        super().__init__()
        self.gram = gram
        self.row_sums = gram.cumsum(2)
        self.totals = self.row_sums.cumsum(1).diagonal(dim1=1, dim2=2)
        squares = gram.square().cumsum_(2).diagonal(dim1=1, dim2=2)  # of the row that each prefix adds, up to its own
        own = gram.diagonal(dim1=1, dim2=2).square()
        self._squares = (2 * squares - own).cumsum(1)
        self._block = gram[:, :0, :0]  # the leading one of the prefixes in hand, with zeros beyond the last row
        self._known = range(0), torch.empty(0), torch.empty(0)  # what was inside last, and of which prefixes

    def centred(self, size: int) -> Tensor:
        mean, grand = self._means(range(size, size + 1))
        mean = mean[:, 0, :size]
        return self.gram[:, :size, :size] - (mean[:, :, None] + mean[:, None, :]) + grand[:, :, None]

    def _means(self, sizes: range) -> tuple[Tensor, Tensor]:
        """(S, N, m) of the rows of each leading block, and (S, N) of all of it."""
        count, inside = self._inside(sizes)
        last = slice(sizes[0] - 1, sizes[-1])
        # A sum over numbers beside each other has another order than one over numbers apart, as they come from there.
        sums = padded(self.row_sums[:, : inside.shape[1], last].transpose(1, 2).contiguous(), inside.shape[1])
        return sums * inside / count[:, None], self.totals[:, last] / count.square()

    def _inside(self, sizes: range) -> tuple[Tensor, Tensor]:
        """(N,) sizes as numbers, and (N, m): 1 for the rows of each prefix, 0 beyond."""
        if self._known[0] != sizes:
            count = torch.arange(sizes[0], sizes[-1] + 1, dtype=torch.float64, device=self.gram.device)
            width = -(-sizes[-1] // COLD) * COLD
            self._known = sizes, count, (torch.arange(width, device=count.device) < count[:, None]).double()
        return self._known[1:]

    def _traces(self, sizes: range) -> Tensor:
        """(segments, sizes) variance of the first rows, times their number."""
        (mean, grand), (_, inside) = self._means(sizes), self._inside(sizes)
        own = padded(self.gram.diagonal(dim1=1, dim2=2)[:, : inside.shape[1]], inside.shape[1])
        return ((own[:, None] - 2 * mean + grand[..., None]) * inside).sum(2)

    def _norms2(self, sizes: range) -> Tensor:
        (mean, grand), (count, _) = self._means(sizes), self._inside(sizes)
        raw = self._squares[:, sizes[0] - 1 : sizes[-1]]
        return raw - 2 * count * mean.square().sum(2) + (count * grand).square() + 8 * count * EPSILON * raw

    def _first(self, sizes: range) -> Tensor:
        _, inside = self._inside(sizes)
        width = inside.shape[1]
        if self._block.shape[1] != width:
            block = self.gram[:, :width, :width]
            self._block = F.pad(block, (0, width - block.shape[2], 0, width - block.shape[1])).contiguous()
        return self._about_mean(sizes, padded(self._start, width)[:, None] * inside)

    def _times(self, sizes: range, vectors: Tensor) -> Tensor:
        products = [ops.gram(some, block)[0] for some, block in zip(vectors.contiguous(), self._block, strict=True)]
        return self._about_mean(sizes, torch.stack(products))

    def _about_mean(self, sizes: range, vectors: Tensor) -> Tensor:
        """Of vectors (S, N, m), what is inside, about its mean."""
        count, inside = self._inside(sizes)
        vectors = vectors * inside
        return vectors - vectors.sum(2, keepdim=True) / count[:, None] * inside


class PlainPrefixes(GramPrefixes):
    """Those of rows about a point that does not depend on how many there are: of the Gram matrices as they stand."""

    def _means(self, sizes: range) -> tuple[Tensor, Tensor]:
        _, inside = self._inside(sizes)
        return inside.new_zeros(len(self.gram), *inside.shape), inside.new_zeros(len(self.gram), len(sizes))

    def _about_mean(self, sizes: range, vectors: Tensor) -> Tensor:
        return vectors * self._inside(sizes)[1]


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
        """Take in one more row (Welford 1962)."""
        apart = row - self._mean
        weighted = apart * (self._size / (self._size + 1)) ** 0.5  # on both sides, or rounding would not be symmetric
        self._scatter += weighted[:, :, None] * weighted[:, None]
        self._size += 1
        self._mean += apart / self._size

    def _traces(self, sizes: range) -> Tensor:
        return trace(self.centred(sizes[0]))[:, None]

    def _norms2(self, sizes: range) -> Tensor:
        rows = self.centred(sizes[0]).square().sum(2)
        return (rows.sum(1) * (1 + 4 * rows.shape[1] * EPSILON))[:, None]

    def _first(self, sizes: range) -> Tensor:
        return self._start[:, None]

    def _times(self, sizes: range, vectors: Tensor) -> Tensor:
        return (self.centred(sizes[0]) * vectors).sum(2)[:, None]


def _length(vectors: Tensor) -> Tensor:
    """(S, N, 1)."""
    return vectors.square().sum(2, keepdim=True).sqrt()
