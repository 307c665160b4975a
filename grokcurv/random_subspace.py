"""The random-subspace null: how much of a vector a subspace catches that knows nothing of it.

With one dimension it is the null of an alignment: what the line of one vector catches of another is ``|cos|`` of the
angle between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class RandomBaseline:
    r"""Distribution of ``|proj v| / |v|`` for a fixed ``v`` in R^M and a uniformly random K-dimensional subspace.

    By rotation invariance the subspace may be fixed and ``v`` random: ``|proj v|^2 / |v|^2`` is the share of K among M
    squared standard normals, so it is :math:`\mathrm{Beta}(K/2, (M-K)/2)`. Exact for every M, and for every ``v`` that
    was chosen without the subspace (Muirhead, *Aspects of Multivariate Statistical Theory*, 1982, section 1.5).

    >>> baseline = RandomBaseline(dim=8, size=100_000)
    >>> round(baseline.mean * 100_000**0.5, 2)  # near the root of K
    2.74

    Args:
        dim: K.
        size: M, at least K.
    """

    dim: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.dim <= self.size:
            raise ValueError(f"dim must lie in 0..size = {self.size}, got {self.dim}")

    @property
    def mean(self) -> float:
        r"""Mean of ``|proj v| / |v|``: :math:`\Gamma((K+1)/2)\Gamma(M/2) / (\Gamma(K/2)\Gamma((M+1)/2))`.

        About ``sqrt(K / M)``, and never above it.
        """
        if self.dim in (0, self.size):
            return float(self.dim > 0)
        return _gamma_half_step(self.dim / 2) / _gamma_half_step(self.size / 2)

    def quantile(self, q: Any) -> Any:
        """The value of ``|proj v| / |v|`` below which a share ``q`` of random subspaces stays; number or array."""
        from scipy.special import betaincinv

        q = np.asarray(q, dtype=np.float64)
        if np.any((q < 0) | (q > 1)):
            raise ValueError(f"q must lie in 0..1, got {q}")
        if self.dim in (0, self.size):
            return np.full_like(q, self.mean)[()]
        return np.sqrt(betaincinv(self.dim / 2, (self.size - self.dim) / 2, q))[()]

    def p_value(self, fraction: Any) -> Any:
        """Probability that a random subspace catches at least ``fraction`` = ``|proj v| / |v|``; number or array.

        A fraction that rounding has put above 1 counts as 1; NaN gives NaN.
        """
        from scipy.special import betaincc

        fraction = np.asarray(fraction, dtype=np.float64)
        if np.any((fraction < 0) | (fraction > 1 + 1e-3)):
            raise ValueError(f"fraction must lie in 0..1, got {fraction}")
        fraction = np.minimum(fraction, 1.0)
        if self.dim in (0, self.size):
            return np.where(np.isnan(fraction), np.nan, (fraction <= self.mean).astype(np.float64))[()]
        return betaincc(self.dim / 2, (self.size - self.dim) / 2, np.square(fraction))[()]


def alignment_p_value(mean: float, correlations: ArrayLike, size: int, trials: int = 9999, seed: int = 0) -> float:
    r"""Probability that a random direction of R^P has at least this mean ``|cos|`` with K given vectors.

    Several vectors that are alike are little more than one: how far chance carries a mean over them follows from the
    angles between them. With R the cosines of the vectors among themselves, those of a uniformly random direction are
    :math:`L w / \sqrt{|w|^2 + q}`, with :math:`L L' = R`, w of as many standard normals as R has rank r, and q
    from :math:`\chi^2_{P-r}`: drawn exactly, at a cost that does not grow with P. Counting the direction itself among
    the draws makes the test valid for any number of them, and ``1 / (1 + trials)`` the least answer (Phipson & Smyth
    2010). The null is a direction chosen without the vectors; it says nothing of one that was not.

    Args:
        mean: of the K values of ``|cos|``, 0 to 1; NaN gives NaN.
        correlations: (K, K), R.
        size: P, at least the rank of R.
        trials: number of draws.
        seed: of the draws.

    Raises:
        ValueError: ``mean`` outside 0..1; ``correlations`` not square, not finite, or of a rank above P; no trials.
    """
    r = np.asarray(correlations, dtype=np.float64)
    if r.ndim != 2 or r.shape[0] != r.shape[1] or not r.size or not np.isfinite(r).all():
        raise ValueError(f"correlations must be finite, of shape (K, K); got {r.shape}")
    if mean < 0 or mean > 1 + 1e-3:
        raise ValueError(f"mean must lie in 0..1, got {mean}")
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    if math.isnan(mean):
        return math.nan
    values, vectors = np.linalg.eigh(r)
    kept = values > 1e-10 * values[-1]
    rank = int(kept.sum())
    if rank > size:
        raise ValueError(f"correlations of rank {rank} are not those of vectors in R^{size}")
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((trials, rank))
    rest = rng.chisquare(size - rank, trials) if size > rank else np.zeros(trials)
    cosines = w @ (vectors[:, kept] * np.sqrt(values[kept])).T / np.sqrt(np.square(w).sum(1) + rest)[:, None]
    return float((1 + np.sum(np.abs(cosines).mean(1) >= mean)) / (1 + trials))


def _gamma_half_step(x: float) -> float:
    """Gamma(x + 1/2) / Gamma(x), to full precision: from lgamma, or its asymptotic series where lgamma cancels."""
    if x < 100:
        return math.exp(math.lgamma(x + 0.5) - math.lgamma(x))
    y = 1 / x
    return math.sqrt(x) * (1 - y / 8 + y**2 / 128 + 5 * y**3 / 1024 - 21 * y**4 / 32768 - 399 * y**5 / 262144)
