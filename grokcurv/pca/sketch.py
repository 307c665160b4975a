r"""The sketching method: nothing of length P is kept.

Every row is multiplied by one random M x P matrix :math:`\Omega` as it arrives (:func:`grokcurv.ops.sketch`), drawn
anew from a counter-based generator each time, and the short rows :math:`\Omega x` go to the incremental method. Their
Gram matrix is that of the rows but for chance: for fixed vectors

.. math:: E (\Omega x \cdot \Omega y - x \cdot y)^2 \le (|x|^2 |y|^2 + (x \cdot y)^2) / M,

the second-moment property of a count sketch (Charikar et al. 2002; Kane & Nelson 2014). Summed over the entries of the
centred Gram matrix G, the mean square error in Frobenius norm is at most :math:`2 \mathrm{tr}(G)^2 / M`, that of the
trace at most :math:`2 |G|_F^2 / M`. By Markov's inequality, with probability :math:`1 - \delta` neither is off by more
than :math:`\eta \mathrm{tr}(G)`, :math:`\eta = 2 / \sqrt{\delta M}`, and then no eigenvalue is (Weyl).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.pca.common import Layout, Spectrum
from grokcurv.pca.incremental import Incremental

FAILURE = 0.01
"""Probability with which the bound may fail, over the choice of the seed."""


class Sketch(Incremental):
    """The incremental PCA of rows that were shortened at random, M coordinates for each segment."""

    def __init__(
        self,
        n_components: int,
        rank: int,
        block: int,
        shrinkage: bool,
        layout: Layout,
        size: int,
        seed: int,
    ) -> None:
        short = Layout((size,) * len(layout.lengths), layout.device, runs=layout.runs)
        super().__init__(n_components, rank, block, shrinkage, short, torch.float64)
        self.packed, self.size, self.seed = layout, size, seed

    def append(self, rows: Tensor, valid: Tensor | None = None) -> None:
        super().append(self._sketch_rows(rows), valid)

    def spectrum(self) -> Spectrum:
        values, total, bound = super().spectrum()
        worst = self._distortion * total if self._distortion < math.inf else torch.full_like(total, math.inf)
        return Spectrum(values, total, bound + worst)

    @property
    def history_bound(self) -> Tensor:
        return super().history_bound + 2 * self._distortion  # of the eigenvalue and of the total variance

    @property
    def _distortion(self) -> float:
        """How far a sum of squares can be off beside the total of the sketches."""
        share = 2 / math.sqrt(FAILURE * self.size)
        return share / (1 - share) if share < 1 else math.inf

    def standard_errors(self) -> Tensor:
        r"""(S, k): estimate of the standard deviation of each eigenvalue over the choice of the seed.

        An eigenvalue is the sum of M squares, one for each coordinate of its sketched component; their scatter about
        the average measures that of the sum, as if they were independent.
        """
        parts = torch.stack(super().components().split(self.size, dim=1))
        fourth = parts.double().square().square().sum(2)
        return self.spectrum().values * (fourth - 1 / self.size).clamp_min(0).sqrt()

    def components(self) -> Tensor:
        raise ValueError(
            "method='sketch' keeps nothing of length P, so there are no components_ and no mean_; "
            "method='incremental' keeps them, in 2 (n_components + oversampling) + 4 vectors of P or more"
        )

    mean = components

    def scores(self, rows: Tensor) -> Tensor:
        return self.layout.gram(self._sketch_rows(rows) - super().mean(), super().components())

    def _sketch_rows(self, rows: Tensor) -> Tensor:
        """(n, S M) of packed rows (n, L)."""
        # zip ends with the segments of the first run, with whose random numbers those of the others are multiplied.
        sketches = [
            ops.sketch(part.flatten(0, 1).contiguous(), self.size, self.seed, start=start)
            for (start, _), part in zip(self.packed.intervals(), self.packed.split(rows), strict=False)
        ]
        return torch.cat(sketches, dim=1).view(len(rows), self.layout.size)
