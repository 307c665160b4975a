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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.pca.common import Layout, Spectrum
from grokcurv.pca.incremental import Incremental

FAILURE = 0.01
"""Probability with which the bound may fail, over the choice of the seed."""


class Sketch:
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
        self.layout, self.size, self.seed = layout, size, seed
        inner = Layout((size,) * len(layout.lengths), layout.device)
        self.short = Incremental(n_components, rank, block, shrinkage, inner, torch.float64)

    @property
    def n_samples_seen(self) -> int:
        return self.short.n_samples_seen

    def append(self, rows: Tensor, valid: Tensor | None = None) -> None:
        self.short.append(self._sketch_rows(rows), valid)

    def drop_masked(self) -> None:
        self.short.drop_masked()

    def forget(self) -> None:
        self.short.forget()

    def merge(self, other: Sketch) -> None:
        self.short.merge(other.short)

    def add_rounding(self, rounding: Tensor) -> None:
        self.short.add_rounding(rounding)

    def spectrum(self) -> Spectrum:
        values, total, bound = self.short.spectrum()
        share = 2 / math.sqrt(FAILURE * self.size)
        worst = share / (1 - share) * total if share < 1 else torch.full_like(total, torch.inf)
        return Spectrum(values, total, bound + worst)

    def standard_errors(self) -> Tensor:
        r"""(S, k): estimate of the standard deviation of each eigenvalue over the choice of the seed.

        An eigenvalue is the sum of M squares, one for each coordinate of its sketched component; their scatter about
        the average measures that of the sum, as if they were independent.
        """
        parts = torch.stack(self.short.layout.split(self.short.components()))
        fourth = parts.double().square().square().sum(2)
        return self.short.spectrum().values * (fourth - 1 / self.size).clamp_min(0).sqrt()

    def components(self) -> Tensor:
        raise ValueError(
            "method='sketch' keeps nothing of length P, so there are no components_ and no mean_; "
            "method='incremental' keeps them, in 2 (n_components + oversampling) + 4 vectors of P or more"
        )

    mean = components

    def scores(self, rows: Tensor) -> Tensor:
        return self.short.scores(self._sketch_rows(rows))

    @property
    def history(self) -> Tensor:
        return self.short.history

    def state_dict(self) -> dict[str, Any]:
        return self.short.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.short.load_state_dict(state)

    def _sketch_rows(self, rows: Tensor) -> Tensor:
        intervals, parts = self.layout.intervals(), self.layout.split(rows)
        sketches = [
            ops.sketch(part.contiguous(), self.size, self.seed, start=start)
            for (start, _), part in zip(intervals, parts, strict=True)
        ]
        return torch.cat(sketches, dim=1)
