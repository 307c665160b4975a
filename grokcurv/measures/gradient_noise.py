"""How far gradients of batches scatter, and the batch size at which that stops to matter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from grokcurv.commutator import CommutatorProbe
from grokcurv.gradients import GradientEngine
from grokcurv.measures.base import CLEAR, Measure, unclear
from grokcurv.pairs import PairGradients, PairOfRuns
from grokcurv.state import Snapshot

SUMMING = 4.0 * torch.finfo(torch.float64).eps
"""Of ``|g_A - g_B|^2``, taken from three sums in float64, relative to ``|g_A|^2 + |g_B|^2``."""


class GradientNoise(Measure):
    """The trace of the gradients' covariance, their mean's squared length, and the simple noise scale (McCandlish et
    al., arXiv 1812.06162), from the gradients that the commutators are measured with: no gradient more.

    With Sigma the covariance of one sample's gradient, G its mean and g_A, g_B gradients of the mean loss over two
    independent batches of b rows, ``E |g_A - g_B|^2 = 2 tr Sigma / b`` and ``E <g_A, g_B> = |G|^2``. A row has

    ================================  ================================================================================
    ``gradient_noise_trace``          tr Sigma = b ``|g_A - g_B|^2`` / 2, the mean over the row's pairs, in units of
                                      loss^2 / theta^2
    ``gradient_square``               ``|G|^2 = <g_A, g_B>``, likewise and in the same units; the estimate may be
                                      negative
    ``gradient_noise_trace_stderr``,  standard errors of these two means: the scatter of the pairs over the root of
    ``gradient_square_stderr``        their number; NaN of one pair
    ``gradient_noise_scale``          the mean of tr Sigma over that of ``|G|^2``, both over the rows so far,
                                      exponential with ``decay``; in rows of a batch. NaN where the mean of ``|G|^2``
                                      is not positive
    ``gradient_noise_scale_stderr``   its standard error from the scatter of the rows, taken to be independent, to
                                      first order; NaN of one row. Where training changes the two quantities over the
                                      rows of the mean, that change is in it
    ================================  ================================================================================

    A row whose trace rounding may have changed by more than a tenth is NaN, and adds nothing to the means: so are rows
    of two batches that are one, as in training on the full batch, whose gradients do not scatter. ``monitor.admission``
    says it of batches that are one and the same object.

    Independent batches drawn with replacement make G and Sigma those of the data set. Rows drawn without replacement
    within each batch, as :func:`grokcurv.subsample` draws them, lessen the trace by the share of the data set that a
    batch has. Of two batches without a row in common (:func:`grokcurv.halves`, two batches of one epoch) the trace is
    that of the data set's N rows, with the divisor N - 1, and ``gradient_square`` is ``|G|^2`` less tr Sigma / N:
    unbiased for the distribution that the rows come from, not for the rows themselves. With ``design="chain"``
    neighbouring pairs share a batch: the means stay right, their standard errors are somewhat too small.

    Both formulas ask for a loss that is the mean over the rows of its batch. What couples rows, as batch normalisation
    does, or draws at random, as dropout does, is part of the scatter. Where ``.grad`` serves as g_A (``gradient=``),
    rows on which the next check finds it wrong are NaN, while what they added to the means of later rows stays.

    Args:
        decay: of a row's weight in the means with each row after it, between 0 and 1; 1 for means over all rows.
        rows: b, where it is not the first dimension of the first tensor in a batch; of a model on several processes
            that of all of them together.

    Raises:
        ValueError: a decay beyond [0, 1], ``rows`` below one; when the monitor is made, a model on several processes
            without ``rows``; at a measurement, a batch without a tensor that has rows.

    Example:
        >>> import torch, grokcurv as gc
        >>> model = torch.nn.Linear(3, 1)
        >>> x = torch.randn(256, 3)
        >>> loss_fn = lambda model, x: (model(x)[:, 0] - x[:, 0]).square().mean()
        >>> sampler = gc.subsample(x, rows=16)
        >>> monitor = gc.CurvatureMonitor(model, loss_fn, sampler=sampler, pairs=4, measures=[gc.GradientNoise()])
        >>> monitor.step()
        >>> monitor.last["gradient_noise_trace"] > 0
        True
    """

    name = "gradient_noise"
    columns = (
        *("gradient_noise_trace", "gradient_square"),
        *("gradient_noise_trace_stderr", "gradient_square_stderr"),
        *("gradient_noise_scale", "gradient_noise_scale_stderr"),
    )
    needs_pairs = from_pairs = True

    def __init__(self, decay: float = 0.99, rows: int | None = None) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        if rows is not None and rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        self.decay, self.rows = decay, rows

    def bind(self, probe: CommutatorProbe) -> None:
        """ValueError for a model on several processes, of whose batches one process sees a part, without ``rows``."""
        engine = probe.gradients
        if self.rows is None and type(engine).anywhere is not GradientEngine.anywhere:
            raise ValueError(
                "GradientNoise: a model on several processes averages its gradient over the batches of all of them: "
                "pass rows, their number of rows together"
            )
        # Of each run: the weights' sum and that of their squares, and sums over rows, so weighted, of the trace, of the
        # square, and of their products.
        self._sums = torch.zeros(engine.runs, 7, dtype=torch.float64, device=engine.device)
        self._fade = torch.full((7,), self.decay, dtype=torch.float64, device=engine.device)
        self._fade[1] = self.decay**2

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> None:
        """Nothing: the pairs are not measured yet."""

    def observe_pairs(self, pairs: Sequence[PairOfRuns], gradients: PairGradients) -> Tensor:
        """(R, columns) of the pairs of a row, and the means that it has become a part of."""
        trace, square = moments(gradients, self._shares(pairs, gradients.norm_a))
        row = [_mean(trace), _mean(square)]
        known = row[0].isfinite() & row[1].isfinite()
        one = torch.ones_like(row[0])
        t, s = (torch.where(known, x, 0.0) for x in row)
        terms = torch.stack([one, one, t, s, t * t, t * s, s * s], 1)
        self._sums.copy_(torch.where(known[:, None], self._sums * self._fade + terms, self._sums))
        return torch.stack([*row, *map(_standard_error, (trace, square)), *_ratio(self._sums)], 1)

    def _shares(self, pairs: Sequence[PairOfRuns], like: Tensor) -> Tensor | float:
        """What makes tr Sigma of ``|g_A - g_B|^2``: b / 2, or (K, R) such factors where batches differ in size."""
        if self.rows is not None:
            return self.rows / 2
        batches = [two for firsts, seconds in pairs for two in zip(firsts, seconds, strict=True)]
        shares = [1.0 / sum(1.0 / rows_of_batch(batch) for batch in two) for two in batches]
        if len(set(shares)) == 1:
            return shares[0]
        # Filled in on the device: a copy from the host would be waited for.
        return torch.stack([like.new_full((), share) for share in shares]).view_as(like)

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        return {"decay": self.decay, "sums": self._sums[run].clone()}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ValueError if it is of another decay."""
        if state["decay"] != self.decay:
            raise ValueError(f"GradientNoise: state was saved with decay={state['decay']}, this has {self.decay}")
        self._sums[run] = state["sums"].to(self._sums)

    def keep(self, runs: list[int]) -> None:
        self._sums = self._sums[runs]


def moments(gradients: PairGradients, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """(K, R) tr Sigma and ``|G|^2`` of each pair; NaN where rounding may have made them."""
    norm_a, norm_b, cosine, error = gradients
    area, squares = norm_a * norm_b, norm_a.square() + norm_b.square()
    inner = torch.where(area == 0, 0.0, cosine * area)
    distance = (squares - 2.0 * inner).clamp_min(0.0)
    # The error bounds that of either gradient, relative to its length; nobody vouches for what has none.
    off = torch.where(error.isnan(), 0.0, error) * torch.maximum(norm_a, norm_b)
    bound = 2.0 * distance.sqrt() * off + off.square() + SUMMING * squares
    lost = ~(bound <= CLEAR[1] * distance)
    return (
        (share * distance).masked_fill(lost, math.nan),
        inner.masked_fill(lost | unclear(cosine, error), math.nan),
    )


def rows_of_batch(batch: Any) -> int:
    """The first dimension of the first tensor in a batch that has one."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)] or Snapshot([batch]).tensors
    for tensor in leaves:
        if tensor.dim():
            return len(tensor)
    raise ValueError("GradientNoise: batch must hold a tensor with a row for each sample; pass rows, their number")


def _mean(values: Tensor) -> Tensor:
    """(R,) over the pairs (K, R), one after the other: a reduction's order would depend on how many runs there are."""
    return reduce(torch.add, values.unbind()) / len(values)


def _standard_error(values: Tensor) -> Tensor:
    """(R,) of the mean over the pairs (K, R)."""
    count = len(values)
    if count == 1:
        return torch.full_like(values[0], math.nan)
    return (_mean((values - _mean(values)).square()) / (count - 1)).sqrt()


def _ratio(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) the ratio of the two weighted means, and its standard error by the delta method."""
    weight, squares, *totals = sums.unbind(1)
    t, s, tt, ts, ss = (total / weight for total in totals)
    scale = (t / s).masked_fill(~(s > 0), math.nan)
    count = weight.square() / squares  # of rows alike that would scatter the mean as much
    variance = (tt - t * t) / (t * t) + (ss - s * s) / (s * s) - 2.0 * (ts - t * s) / (t * s)
    error = scale.abs() * (variance.clamp_min(0.0) / (count - 1.0)).sqrt()
    return scale, error.masked_fill(~(count > 1.0 + 1e-6), math.nan)
