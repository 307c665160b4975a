r"""What the Gram matrix of updates looks like when updates have no direction: noise, and noise under momentum.

Gaps between the singular values of the last W updates look like structure, and rows without any have them too.
:class:`grokcurv.UpdateGram` is to be set beside two nulls, both with rows as long as those that were seen:

===============  ======================================================================================================
``independent``  the directions of the W updates are independent and uniform
``momentum``     each is an average of independent ones, :math:`m_t = \beta m_{t-1} + (1 - \beta) g_t`, which alone
                 spreads sigma: with beta = 0.9 and W = 10, sigma_1 / sigma_10 is 11.6
===============  ======================================================================================================

Neither needs a vector of length p. The Gram matrix of W normal rows is :math:`L L^T` with L Bartlett's factor (1933,
see :mod:`grokcurv.analysis.random_walk`), and averages of rows are a linear map F of theirs: :math:`F L L^T F^T`, where
:math:`F F^T` holds the covariances of the averages, :math:`\beta^{|i - j|}` for steps that follow each other long after
the first.

Both are isotropic: p coordinates of one variance. An optimiser whose steps differ from one coordinate to the next moves
in fewer dimensions than p, and Adam's do; then a null of p rows is too narrow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from grokcurv.analysis.random_walk import bartlett
from grokcurv.analysis.records import Records, columns
from grokcurv.measures.update_gram import UpdateGram, singular_values, spectrum

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

BANDS = ("sigma_1", "g23", "gap_ratio", "rotation_1", "r90")
"""Of what :func:`update_gram_bands` gives quantiles."""


@dataclass(frozen=True, eq=False)
class UpdateGramNull:
    """Distribution of what :class:`grokcurv.UpdateGram` records, over updates without a direction of their own.

    Made by :func:`update_gram_null`.

    Attributes:
        values: by column (``sigma_1`` to ``sigma_W`` too, but not the floor) a number for each trial, (trials,).
    """

    values: Mapping[str, Array] = field(repr=False)

    def quantile(self, column: str, q: ArrayLike) -> Any:
        """The number below which a part ``q`` (0 to 1) of the null stays; NaN if it is of any trial; number or array.

        Raises:
            ValueError: ``q`` outside 0..1, or no such column.
        """
        q = np.asarray(q, dtype=np.float64)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"q must lie in 0..1, got {q}")
        return np.quantile(self._of(column), q, method="inverted_cdf")[()]  # of infinite ones too

    def p_value(self, column: str, value: ArrayLike) -> Any:
        """Probability of at least this value, ``(1 + #{null >= value}) / (1 + trials)`` (Phipson & Smyth 2010).

        Number or array; NaN gives NaN. ValueError: no such column.
        """
        null, value = np.sort(self._of(column)), np.asarray(value, dtype=np.float64)
        p = (1 + null.size - np.searchsorted(null, value, side="left")) / (1 + null.size)
        return np.where(np.isnan(value), np.nan, p)[()]

    def _of(self, column: str) -> Array:
        """The draws of a column."""
        if column not in self.values:
            raise ValueError(f"column must be one of {', '.join(self.values)}; got {column!r}")
        return self.values[column]


def update_gram_null(
    lengths: ArrayLike, size: int, *, momentum: float = 0.0, every: int = 1, trials: int = 1000, seed: int = 0
) -> UpdateGramNull:
    """What the Gram matrix of updates is where they have no direction but what momentum gives them.

    >>> import grokcurv.analysis as analysis
    >>> noise = analysis.update_gram_null([1.0] * 10, 131_072)
    >>> slow = analysis.update_gram_null([1.0] * 10, 131_072, momentum=0.9)
    >>> bool(noise.quantile("sigma_1", 0.99) < 1.02), bool(slow.quantile("sigma_1", 0.01) > 2.6)
    (True, True)

    Time and memory do not grow with ``size``. The same seed gives the same sample, up to rounding.

    Args:
        lengths: (W,) of the updates, from the oldest to the newest; W >= 3.
        size: p, how many coordinates an update has (``UpdateGram.size``).
        momentum: 0 for independent rows, else beta: beta_1 of Adam, mu of SGD, 0 <= beta < 1. The filter is taken to
            have run for long: see the first 1 / (1 - beta) steps with care.
        every: so many steps of the optimiser are one update.
        trials: sets of updates that are drawn.
        seed: of them.

    Raises:
        ValueError: fewer than three lengths, a length that is not a number from 0 on, only zeros; beta outside [0, 1);
            ``size``, ``every`` or ``trials`` below one.
    """
    norms = np.asarray(lengths, dtype=np.float64)
    if norms.ndim != 1 or norms.size < 3:
        raise ValueError(f"lengths must have shape (W,) with W >= 3, got {norms.shape}")
    if not np.all(np.isfinite(norms) & (norms >= 0)) or not norms.any():
        raise ValueError(f"lengths must be finite, not negative and not all zero, got {norms}")
    return _null(norms, _cosines(norms.size, size, momentum, every, trials, seed))


def update_gram_bands(
    records: Records,
    size: int,
    *,
    momentum: float,
    every: int = 1,
    levels: Sequence[float] = (0.025, 0.5, 0.975),
    trials: int = 400,
    seed: int = 0,
) -> pd.DataFrame:
    """Beside each record of ``UpdateGram(window, spectrum=True)``, the noise edge and what both nulls would give.

    A row for each record in which the window is full: ``step``; ``noise_edge``, of :func:`noise_edge`; ``above_edge``,
    how many sigma lie beyond it; and for each of :data:`BANDS` and each level the quantile under both nulls, such as
    ``gap_ratio_independent_0.5`` and ``gap_ratio_momentum_0.975``. Both are drawn once for all records, so that bands
    do not jitter from one record to the next.

    Args:
        records: with ``step``, ``sigma_1`` to ``sigma_W`` and ``length_1`` to ``length_W``.
        size: p, how many coordinates an update has (``UpdateGram.size``).
        momentum: beta_1 of the optimiser.
        every, trials, seed: as for :func:`update_gram_null`; ``every`` as for :class:`grokcurv.UpdateGram`.
        levels: of the quantiles.

    Raises:
        ValueError: a column is missing (was the measure made with ``spectrum=True``?), or as there.
    """
    import pandas as pd

    window = 0
    while f"sigma_{window + 1}" in records:
        window += 1
    if window < 3:
        raise ValueError("records have no sigma_1, sigma_2, sigma_3: make the measure with UpdateGram(spectrum=True)")
    names = [f"{kind}_{j + 1}" for kind in ("sigma", "length") for j in range(window)]
    steps, *numbers = columns(records, "step", *names)
    sigma, lengths = np.split(np.stack(numbers, 1), 2, axis=1)
    full = np.isfinite(steps) & np.isfinite(lengths).all(1) & np.isfinite(sigma).all(1) & (lengths > 0).any(1)
    betas = {"independent": 0.0, "momentum": momentum}
    drawn = {name: _cosines(window, size, beta, every, trials, seed) for name, beta in betas.items()}
    edges = noise_edge(sigma[full], size)
    rows = []
    for step, row, edge, own in zip(steps[full], lengths[full], edges, sigma[full], strict=True):
        found = {"step": int(step), "noise_edge": edge, "above_edge": int((own > edge).sum())}
        for name, cosines in drawn.items():
            null = _null(row, cosines)
            for column in BANDS:
                values = zip(levels, null.quantile(column, levels), strict=True)
                found |= {f"{column}_{name}_{level:g}": value for level, value in values}
        rows.append(found)
    return pd.DataFrame(rows)


def noise_edge(sigma: ArrayLike, size: int) -> Any:
    r"""Where the largest singular value of W rows of noise lies: :math:`\nu (\sqrt p + \sqrt W)`, number or array.

    The noise's variance nu^2 is told by the smaller half of sigma, that has no signal in it. The literature divides its
    mean square by p. But the smaller half of noise is itself below p, by some :math:`\sqrt{W / p}` of it, which is as
    much as the edge is above: with W = 10 and p = 131 072 the largest sigma of pure noise is then beyond the edge in 98
    of 100 draws. Here the divisor is the mean square of the smaller half of pure noise, from 2000 draws, and it is
    beyond the edge in 14 of 100, as it is in 12 where nu is known (Geman 1980; Johnstone 2001). The edge is that of
    independent rows of one length: where they differ, or momentum averages them, :func:`update_gram_null` tells.

    Args:
        sigma: (..., W) in any order, W >= 2.
        size: p >= 1.

    Returns:
        (...) float64; NaN where the smaller half of noise would be zero, p being so small.

    Raises:
        ValueError: fewer than two sigma, or ``size`` below one.
    """
    values, size = np.asarray(sigma, dtype=np.float64), operator.index(size)
    if values.ndim == 0 or values.shape[-1] < 2:
        raise ValueError(f"sigma must have shape (..., W) with W >= 2, got {values.shape}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    window, values = values.shape[-1], np.sort(values, axis=-1)
    rng = np.random.default_rng(0)
    factors = np.stack([bartlett(window, size, rng) for _ in range(2000)])
    noise = np.linalg.eigvalsh(factors @ factors.swapaxes(1, 2))[:, : window // 2]
    unit = noise.mean() if size > window - window // 2 else np.nan
    nu = np.sqrt((values[..., : window // 2] ** 2).mean(-1) / unit)
    return (nu * (math.sqrt(size) + math.sqrt(window)))[()]


def _cosines(window: int, size: int, momentum: float, every: int, trials: int, seed: int) -> Array:
    """(trials, W, W): inner products of the directions of W updates."""
    size, every, trials = operator.index(size), operator.index(every), operator.index(trials)
    for name, value in {"size": size, "every": every, "trials": trials}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
    rng = np.random.default_rng(seed)
    factors = np.stack([bartlett(window, size, rng) for _ in range(trials)])
    rows = np.linalg.cholesky(_covariance(window, momentum, every)) @ factors
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    return rows @ rows.swapaxes(1, 2)


def _covariance(window: int, beta: float, every: int) -> Array:
    """(W, W): of updates that are sums of ``every`` averages each, in units of an average's variance.

    Of averages with covariances beta^|i - j|, two sums that are k > 0 sums apart have ``beta^((k - 1) every + 1) S^2``,
    S the sum of beta^j for j below ``every``.
    """
    powers = beta ** np.arange(every)
    own = every + 2 * ((every - np.arange(1, every)) * powers[1:]).sum()
    apart = np.abs(np.subtract.outer(np.arange(window), np.arange(window)))
    covariance: Array = np.where(apart == 0, own, beta ** (np.maximum(apart - 1, 0) * every + 1.0) * powers.sum() ** 2)
    return covariance


def _null(norms: Array, cosines: Array) -> UpdateGramNull:
    """What :class:`UpdateGram` would say of updates of these norms (n,), with these cosines (draws, n, n)."""
    gram = torch.from_numpy(norms[:, None] * cosines * norms)
    numbers = torch.cat([singular_values(gram), spectrum(gram)], 1).numpy()
    names = [*(f"sigma_{j + 1}" for j in range(norms.size)), *UpdateGram.columns[:-1]]
    return UpdateGramNull(dict(zip(names, numbers.T, strict=True)))
