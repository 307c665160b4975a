"""The random-subspace null: how much of a vector a subspace catches that knows nothing of it.

With one dimension it is the null of an alignment: what the line of one vector catches of another is ``|cos|`` of the
angle between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RandomBaseline:
    r"""Distribution of ``|proj v| / |v|`` for a fixed ``v`` in R^M and a uniformly random K-dimensional subspace.

    By rotation invariance the subspace may be fixed and ``v`` random: ``|proj v|^2 / |v|^2`` is the share of K among M
    squared standard normals, so it is :math:`\mathrm{Beta}(K/2, (M-K)/2)`. Exact for every M, and for every ``v`` that
    was chosen without the subspace (Muirhead, *Aspects of Multivariate Statistical Theory*, 1982, section 1.5).

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


def _gamma_half_step(x: float) -> float:
    """Gamma(x + 1/2) / Gamma(x), to full precision: from lgamma, or its asymptotic series where lgamma cancels."""
    if x < 100:
        return math.exp(math.lgamma(x + 0.5) - math.lgamma(x))
    y = 1 / x
    return math.sqrt(x) * (1 - y / 8 + y**2 / 128 + 5 * y**3 / 1024 - 21 * y**4 / 32768 - 399 * y**5 / 262144)
