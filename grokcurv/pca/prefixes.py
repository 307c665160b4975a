r"""The leading share of every prefix of a trajectory, from the leading blocks of Gram matrices.

A prefix differs little from the one before. Every :data:`COLD` rows the eigenproblem is solved from nothing; what lies
between begins at that vector and takes the few Lanczos steps that are left to go (Golub and Van Loan, Matrix
Computations, 10.1), each one product with the matrix. A Ritz pair :math:`(\theta, y)` with residual r could be any
eigenpair. That it is the leading one follows from the Frobenius norm: no two eigenvalues of C are larger than
:math:`\sqrt{|C|_F^2 - \theta^2}`, so that one above that is alone there, and off by at most :math:`|r|^2` over the gap
(Parlett, The Symmetric Eigenvalue Problem, 11.7). Where the spectrum is too flat for it, each prefix is solved whole.

What is found for a prefix depends on its own rows alone, to the bit, whatever rows follow and whenever it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.pca.common import EPSILON, trace

COLD = 32
"""Rows from one prefix that is solved from nothing to the next."""
STEPS = (5, 12)
"""Of Lanczos: when it is first asked whether that is enough, and when it is given up."""
TOLERANCE = 1e-13
"""Relative error of an eigenvalue that is not looked at closer."""


class Prefixes:
    """Every leading block of a stack of Gram matrices (S, n, n), about the mean of its rows.

    Running sums make the result for a prefix independent of the rows that follow it, to the bit.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        self.row_sums = gram.cumsum(2)
        self.totals = self.row_sums.cumsum(1).diagonal(dim1=1, dim2=2)
        # As ops.rotate takes rows: the segments side by side.
        self._columns = gram.transpose(0, 1).reshape(gram.shape[1], -1).contiguous()
        squares = gram.square().cumsum_(2).diagonal(dim1=1, dim2=2)  # of the row that each prefix adds, up to its own
        own = gram.diagonal(dim1=1, dim2=2).square()
        self._norms2 = (2 * squares - own).cumsum(1)
        self._base, self._start = 0, gram  # rows of the latest prefix that was solved whole, and its vectors (S, n)

    def centred(self, size: int) -> Tensor:
        """(S, size, size): Gram matrix of the first ``size`` rows about their mean."""
        mean, grand = self._means(size)
        return self.gram[:, :size, :size] - (mean[:, :, None] + mean[:, None, :]) + grand[:, None, None]

    def leading_share(self, size: int) -> Tensor:
        """(S,): largest eigenvalue over trace; NaN where there is no variance."""
        base = size // COLD * COLD
        if base in (0, size):
            centred = self.centred(size)
            values, _ = ops.eigh(centred, 1)
            return values[:, 0] / trace(centred)
        if self._base != base:
            _, vectors = ops.eigh(self.centred(base), 1)
            self._base, self._start = base, vectors[:, :, 0]
        values = self._lanczos(size)
        if not (settled := values.isfinite()).all():
            whole, _ = ops.eigh(self.centred(size)[~settled], 1)
            values[~settled] = whole[:, 0]
        mean, grand = self._means(size)
        diagonal = self.gram[:, :size, :size].diagonal(dim1=1, dim2=2)
        return values / (diagonal - 2 * mean + grand[:, None]).sum(1)

    def _means(self, size: int) -> tuple[Tensor, Tensor]:
        """(S, size) of the rows of the first block of that size, and (S,) of all of it."""
        return self.row_sums[:, :size, size - 1] / size, self.totals[:, size - 1] / size**2

    def _lanczos(self, size: int) -> Tensor:
        """(S,): leading eigenvalues of the first ``size`` rows; NaN for those that are not settled."""
        count, n = self.totals.shape
        spans = torch.tensor([(n * s, size) for s in range(count)])
        norm2 = self._centred_norm2(size)
        vector = _about_mean(torch.nn.functional.pad(self._start, (0, size - self._base)))
        basis = (vector / _length(vector))[:, None]
        tridiagonal = vector.new_zeros(count, STEPS[1], STEPS[1])
        values = vector.new_full((count,), torch.nan)
        for step in range(STEPS[1]):
            product = ops.rotate(self._columns[:size], basis[:, -1:].contiguous(), segments=spans)
            vector = _about_mean(product.view(count, n)[:, :size])
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

    def _centred_norm2(self, size: int) -> Tensor:
        """(S,): a bound on the squared Frobenius norm of a centred block, rounding included."""
        raw, (mean, grand) = self._norms2[:, size - 1], self._means(size)
        return raw - 2 * size * mean.square().sum(1) + (size * grand).square() + 8 * size * EPSILON * raw


def _about_mean(vectors: Tensor) -> Tensor:
    return vectors - vectors.mean(1, keepdim=True)


def _length(vectors: Tensor) -> Tensor:
    """(S, 1)."""
    return vectors.square().sum(1, keepdim=True).sqrt()
