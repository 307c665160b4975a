r"""The random-walk null: how much variance the first principal component of a walk without any direction holds.

PC1 shares look high by nature: in many dimensions a long walk of equally long steps puts :math:`6 / \pi^2`, 61 %, of
its variance on PC1 (Antognini & Sohl-Dickstein, *PCA of high dimensional random walks with comparison to neural network
training*, NeurIPS 2018). Whether a trajectory is more than that is a question for the distribution of the share
over walks whose steps are as long as its own.

That distribution needs no walk in R^P. The share depends on the inner products of the steps alone, and those are drawn
exactly: for n independent normal rows X = L Q in R^P, with Q orthonormal, Bartlett's decomposition (1933) says that
the lower-triangular L has independent entries, :math:`L_{ii} \sim \chi_{P-i}` (i from 0) and standard normals below.
Rows of X divided by their lengths are uniform directions, and L holds their coordinates in an orthonormal basis.
With more steps than dimensions L has P columns, and whole rows of normals from row P on.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class RandomWalkNull:
    """Distribution of the PC1 share over random walks, from a sample; made by :func:`random_walk_pc1`.

    Args:
        samples: (trials,) float64, ascending: a share (0 to 1) for each walk.
    """

    samples: NDArray[np.float64] = field(repr=False)

    @property
    def mean(self) -> float:
        """Mean share; its standard error is ``std / sqrt(trials)``."""
        return float(self.samples.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the share, with trials - 1 in the denominator; NaN for one trial."""
        return float(self.samples.std(ddof=1)) if self.samples.size > 1 else float("nan")

    def quantile(self, q: Any) -> Any:
        """The share below which a part ``q`` (0 to 1) of the walks stays; number or array."""
        q = np.asarray(q, dtype=np.float64)
        if not np.all((q >= 0) & (q <= 1)):
            raise ValueError(f"q must lie in 0..1, got {q}")
        return np.quantile(self.samples, q)[()]

    def z_score(self, share: Any) -> Any:
        """``(share - mean) / std``; number or array.

        Infinite or NaN where all walks have one share: in one dimension, or when one step alone is not zero.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.divide(_shares(share) - self.mean, self.std)[()]

    def p_value(self, share: Any) -> Any:
        """Probability that a random walk has at least this PC1 share: ``(1 + #{null >= share}) / (1 + trials)``.

        Number or array. Counting the trajectory itself among the walks makes the test valid for any number of trials
        and ``1 / (1 + trials)`` the least answer (Phipson & Smyth 2010). NaN gives NaN.
        """
        share = _shares(share)
        below = np.searchsorted(self.samples, share, side="left")
        p = (1 + self.samples.size - below) / (1 + self.samples.size)
        return np.where(np.isnan(share), np.nan, p)[()]


def random_walk_pc1(step_norms: ArrayLike, size: int, trials: int = 1000, seed: int = 0) -> RandomWalkNull:
    """PC1 share of walks whose steps have the given lengths and independent, uniformly random directions.

    The share is that of the first component in the variance of the T positions about their mean, as in
    ``StreamingPCA.explained_variance_ratio_``. Time and memory do not grow with ``size`` beyond T: a trial takes
    O(T^3) time and O(T^2) memory, 5 ms for T = 300 on one thread. The same seed gives the same sample, up to rounding.

    Args:
        step_norms: (T - 1,) lengths of the steps, in order; zeros are allowed, and only the ratios matter.
        size: P, the dimensions of the space the walk lives in.
        trials: number of walks.
        seed: of the walks.

    Raises:
        ValueError: fewer than two steps, a length that is negative, infinite or NaN, only zeros, or ``size`` or
            ``trials`` below one.
    """
    norms = np.asarray(step_norms, dtype=np.float64)
    if norms.ndim != 1 or norms.size < 2:
        raise ValueError(f"step_norms must have shape (T - 1,) with at least two steps, got {norms.shape}")
    if not np.all(np.isfinite(norms) & (norms >= 0)):
        raise ValueError(f"step_norms must be finite and not negative, got {norms}")
    if not norms.any():
        raise ValueError("step_norms are all zero: such a walk has no variance")
    size, trials = operator.index(size), operator.index(trials)
    for name, value in {"size": size, "trials": trials}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    norms = norms / norms.max()
    rng = np.random.default_rng(seed)
    samples = np.sort([_leading_share(_centred_walk(norms, size, rng)) for _ in range(trials)])
    samples.flags.writeable = False
    return RandomWalkNull(samples)


def _directions(count: int, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, min(count, size)): independent uniform unit vectors of R^size, in the basis of Bartlett's factor."""
    factor = bartlett(count, size, rng)
    factor /= np.linalg.norm(factor, axis=1, keepdims=True)
    return factor


def bartlett(count: int, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(count, min(count, size)): independent standard normal vectors of R^size, in an orthonormal basis of their own.

    Of a plain matrix of normals this has the inner products, at no cost that grows with the size.
    """
    width = min(count, size)
    factor = np.tril(rng.standard_normal((count, width)), -1)
    np.fill_diagonal(factor, np.sqrt(rng.chisquare(size - np.arange(width))))
    return factor


def _centred_walk(norms: NDArray[np.float64], size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(T, k): the positions of one walk about their mean, in an orthonormal basis of the space its steps span."""
    moves = np.flatnonzero(norms)
    directions = _directions(moves.size, size, rng)
    positions = np.zeros((norms.size + 1, directions.shape[1]))
    positions[moves + 1] = norms[moves, None] * directions
    np.cumsum(positions, axis=0, out=positions)
    positions -= positions.mean(axis=0)
    return positions


def _leading_share(centred: NDArray[np.float64]) -> float:
    """Largest eigenvalue over trace of the covariance of centred rows (T, k), k < T."""
    from scipy.linalg import eigh

    scatter = centred.T @ centred
    last = len(scatter) - 1
    largest = eigh(scatter, eigvals_only=True, subset_by_index=[last, last], check_finite=False)
    return min(float(largest[0] / np.trace(scatter)), 1.0)


def _shares(share: Any) -> NDArray[np.float64]:
    """Shares as an array; one that rounding has put above 1 counts as 1."""
    values = np.asarray(share, dtype=np.float64)
    if np.any((values < 0) | (values > 1 + 1e-3)):
        raise ValueError(f"share must lie in 0..1, got {values}")
    return np.minimum(values, 1.0)
