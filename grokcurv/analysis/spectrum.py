"""In how many directions a trajectory moves, from the variances of its principal components."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Eigenspectrum(NamedTuple):
    """Made by :func:`eigenspectrum`; float64, leading axes as the variances have them."""

    shares: NDArray[np.float64]
    """(..., k) parts of the total variance, in descending order."""
    cumulative: NDArray[np.float64]
    """(..., k) part that the leading components hold together."""
    participation_ratio: NDArray[np.float64]
    """(...) effective rank 1 / sum(shares^2), 1 to k: the large variances decide."""
    entropy_rank: NDArray[np.float64]
    """(...) effective rank exp(-sum(shares log(shares))), never below the participation ratio."""


def eigenspectrum(variances: ArrayLike) -> Eigenspectrum:
    """Shares of the variance, and two effective ranks: k for k equal variances, 1 for a single one.

    The participation ratio is Bell & Dean's (1970), the exponential of the entropy Roy & Vetterli's (*The effective
    rank: a measure of effective dimensionality*, EUSIPCO 2007); they are Hill's (1973) numbers of orders 2 and 1. All
    describe the variances that are given: of a PCA that keeps k components, these k, and the ranks are at most k.
    Nothing is assumed, nothing is tested. NaN where all variances are zero.

    Args:
        variances: (..., k) with k >= 1, in any order and unit, as in ``StreamingPCA.explained_variance_``.

    Raises:
        ValueError: no component, or a variance that is negative, infinite or NaN.
    """
    values = np.asarray(variances, dtype=np.float64)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"variances must have shape (..., k) with at least one component, got {values.shape}")
    if not np.all(np.isfinite(values) & (values >= 0)):
        raise ValueError(f"variances must be finite and not negative, got {values}")
    values = np.sort(values, axis=-1)[..., ::-1]
    with np.errstate(invalid="ignore"):
        shares = values / values.sum(axis=-1, keepdims=True)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    rank = 1 / (shares**2).sum(axis=-1)
    return Eigenspectrum(shares, shares.cumsum(axis=-1), rank, np.exp(-(shares * logarithms).sum(axis=-1)))
