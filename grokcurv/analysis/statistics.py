"""Statistics over runs: is an effect there, how does it scale, how large is it beside a control."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from grokcurv.analysis.records import Records, measured, reliable

NEWTON_STEPS = 100  # as many at most, and as many halvings of each
NEWTON_GAIN = 1e-12  # of a logarithm of a likelihood: a step that promises no more is the last


class SignTest(NamedTuple):
    """Made by :func:`sign_test`."""

    positive: int
    negative: int
    ties: int
    """Differences of exactly 0."""
    p_value: float
    """Probability of at least as many positive signs among those that are not ties, were either sign as likely."""


def sign_test(differences: ArrayLike) -> SignTest:
    """Exact one-sided sign test that the median difference is positive.

    Assumes independent differences, under the null each as likely above 0 as below; no shape, no common scale. Ties
    say nothing either way and are dropped (Conover, *Practical Nonparametric Statistics*, 3rd ed. 1999, section 3.4),
    and so are NaN, which is how a lead time that does not exist comes. The p-value is that of Bin(n, 1/2), n the number
    of signs: discrete, so not uniform under the null but valid, ``P(p <= alpha) <= alpha``, and never below 2^-n; 1
    for no sign.

    Args:
        differences: any shape.
    """
    values = np.asarray(differences, dtype=np.float64)
    positive, negative, ties = (int(np.count_nonzero(sign)) for sign in (values > 0, values < 0, values == 0))
    signs = positive + negative
    # Whole numbers up to the one division, so exact for any n.
    p_value = sum(math.comb(signs, k) for k in range(positive, signs + 1)) / 2**signs
    return SignTest(positive, negative, ties, p_value)


class PowerLaw(NamedTuple):
    """``y = prefactor * x ** exponent``; made by :func:`power_law`. float64."""

    exponent: float
    prefactor: float
    """In units of y over units of x to the exponent."""
    low: float
    """Lower end of the 95 % interval of the exponent."""
    high: float


def power_law(
    x: ArrayLike, y: ArrayLike, trials: int = 2000, seed: int = 0, groups: ArrayLike | None = None
) -> PowerLaw:
    """Least squares of log y on log x, with a bootstrap interval of the exponent.

    Assumes that the pairs are independent draws of one population in which E log y is linear in log x; the scatter may
    have any distribution and depend on x. The interval is the percentile interval over ``trials`` resamples of whole
    pairs (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, sections 9.5 and 13.3), right as the number of
    pairs grows and too short for few: over 2000 simulated fits it held the exponent in 66 % with 3 pairs, in 90 to 92 %
    with 6 or 12, in 93 to 94 % with 60. Resamples that drew a single x have no slope and are left out. The same seed
    gives the same interval.

    Pairs that are not independent, such as runs that share their split of the data, go into ``groups``: whole groups
    are then resampled (Davison & Hinkley, *Bootstrap Methods and their Application*, 1997, section 3.8), and groups
    take the place of pairs in all that was said.

    Pairs with a NaN are left out. Exponent and prefactor are NaN when the x left have not two different values, the
    interval also when fewer than three pairs, or groups, are left.

    Args:
        x, y: (n,), positive.
        trials: number of resamples.
        seed: of the resamples.
        groups: (n,) of any labels; None if every pair is one of its own.

    Raises:
        ValueError: shapes differ or are not (n,), a number is infinite or not positive, ``trials`` is below one.
    """
    xs, ys, labels = _logarithms(x, y, groups, trials)
    if xs.size < 2:
        return PowerLaw(math.nan, math.nan, math.nan, math.nan)
    exponent = float(_slope(xs, ys))
    with np.errstate(over="ignore"):  # where x hardly differ, y at x = 1 may be beyond any number: infinite
        prefactor = float(np.exp(ys.mean() - exponent * xs.mean()))
    return PowerLaw(exponent, prefactor, *_interval(lambda rows: _slope(xs[rows], ys[rows]), labels, trials, seed))


class Bend(NamedTuple):
    """How far a cloud on logarithmic axes is from a line; made by :func:`log_log_bend`. float64."""

    value: float
    """Coefficient c of the parabola ``log y = a + b log x + c (log x)^2``: 0 for a power law."""
    low: float
    """Lower end of its 95 % interval."""
    high: float


def log_log_bend(
    x: ArrayLike, y: ArrayLike, trials: int = 2000, seed: int = 0, groups: ArrayLike | None = None
) -> Bend:
    """Whether y is a power of x at all: the second coefficient of a parabola through log y over log x.

    Least squares; an interval that leaves out 0 rejects the power law. Arguments, assumptions, interval and errors are
    those of :func:`power_law`. A power with something taken away, ``y = x - c``, bends downwards.

    All is NaN when the x left have not three different values, the interval also when fewer than three pairs, or
    groups, are left.

    Example:
        >>> steps = np.array([10, 20, 40, 80])
        >>> abs(log_log_bend(steps, steps**1.3).value) < 1e-9, log_log_bend(steps, steps - 9).value < -0.1
        (True, True)
    """
    xs, ys, labels = _logarithms(x, y, groups, trials)

    def bends(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Of ys over what a line in xs leaves of their squares."""
        u = xs[rows] - xs[rows].mean(axis=-1, keepdims=True)
        square = u**2
        left = square - square.mean(axis=-1, keepdims=True) - _slope(u, square)[..., None] * u
        enough = np.count_nonzero(np.diff(np.sort(xs[rows])), axis=-1) > 1
        with np.errstate(invalid="ignore"):
            found = np.divide((left * ys[rows]).sum(axis=-1), (left * left).sum(axis=-1))
        return np.where(enough, found, np.nan)

    if np.unique(xs).size < 3:
        return Bend(math.nan, math.nan, math.nan)
    return Bend(float(bends(np.arange(xs.size))), *_interval(bends, labels, trials, seed))


def censored_power_law(
    x: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    trials: int = 200,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> PowerLaw:
    """A power law in y of which only bounds are known: what was seen between two looks, or had not come by the last.

    Maximum likelihood of ``log y = log prefactor + exponent log x + e``, e normal and independent of x, where y is
    known to lie between ``low`` and ``high``: a Tobit model with bounds for each pair, in survival analysis the
    accelerated failure time model with log-normal times and interval censoring (Kalbfleisch & Prentice, *The
    Statistical Analysis of Failure Time Data*, 2nd ed. 2002, chapter 3). Bounds must not depend on y beyond what they
    say. There is one maximum: the likelihood's logarithm is concave in the line and 1, all over the scatter (Burridge
    1981). Where lines pass between all bounds the scatter is zero and any of them is as good. The interval is that of
    :func:`power_law`, from fewer resamples: with 100 of them it held the exponent in 94 % of 400 simulated samples of
    40 pairs, a quarter of them cut off.

    Pairs with a NaN are left out. All is NaN when the x left have not two different values or no pair has both
    bounds, the interval also when fewer than three pairs, or groups, are left.

    Args:
        x: (n,), positive.
        low: (n,) bounds of y from below, 0 if there is none.
        high: (n,) bounds of y from above, infinite if there is none.
        trials: number of resamples.
        seed: of the resamples.
        groups: (n,) of any labels; None if every pair is one of its own.

    Raises:
        ValueError: shapes differ or are not (n,), an x is infinite or not positive, not ``0 <= low < high``,
            ``trials`` is below one.

    Example:
        >>> law = censored_power_law([1, 2, 4, 8], low=[0.9, 1.7, 3.5, 7], high=[1.2, 2.2, 4.5, float("inf")])
        >>> 0.9 < law.exponent < 1.1
        True
    """
    xs, lows, highs, labels = _columns({"x": x, "low": low, "high": high}, groups, trials)
    kept = ~(np.isnan(xs) | np.isnan(lows) | np.isnan(highs) | (np.equal(lows, 0) & np.isposinf(highs)))
    xs, lows, highs, labels = xs[kept], lows[kept], highs[kept], labels[kept]
    if not np.all(np.isfinite(xs) & (xs > 0)):
        raise ValueError(f"x must be finite and positive, got {xs}")
    if not np.all((lows >= 0) & (lows < highs)):
        raise ValueError(f"low must be at least 0 and below high, got {lows} and {highs}")
    xs = np.log(xs)
    with np.errstate(divide="ignore"):
        lows, highs = np.log(lows), np.log(highs)

    if np.unique(xs).size < 2:
        return PowerLaw(math.nan, math.nan, math.nan, math.nan)

    def fit(rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """(2, m) exponents and logarithms of the prefactors of (m, k) rows, NaN where they determine none."""
        whole = np.isfinite(lows) & np.isfinite(highs)
        enough = whole[rows].any(axis=-1) & (np.ptp(xs[rows], axis=-1) > 0)
        found = np.full((2, len(rows)), np.nan)
        found[:, enough] = _most_likely(*(column[rows[enough]] for column in (xs, lows, highs)))
        return found

    (exponent,), (constant,) = fit(np.arange(xs.size)[None])
    ends = _interval(lambda resamples: fit(resamples)[0], labels, trials, seed)
    return PowerLaw(float(exponent), math.exp(constant), *ends)


class ControlRatio(NamedTuple):
    """Defects of a run over those of its control, step by step; made by :func:`control_ratio`."""

    median: float
    minimum: float
    maximum: float
    reliable: int
    """Steps at which both defects can be trusted: these alone enter."""
    steps: int
    """Steps that both measured."""


def control_ratio(run: Records, control: Records, column: str = "defect_median") -> ControlRatio:
    """How many times larger the defect of a run is than that of its control at the same step.

    Describes and tests nothing: the steps of one pair of runs are no independent sample. A defect can be trusted where
    its row is ``reliable``, if there is that column, and where it is not 0, which is what rounding leaves of a defect
    it has swallowed. The steps of a run that ended early, or that measured at other steps, do not count. The numbers
    are NaN where no step is left.

    Args:
        run, control: ``step``, ``column`` and, if rows are to be judged, ``reliable``; the control of arXiv 2602.16746
            is the same run at weight decay 0.
        column: ``defect_median``, or ``reference_median`` for the published arithmetic. ``reliable`` judges the former
            alone: without that column every row counts.

    Raises:
        ValueError: a column is missing, or lengths differ.
    """
    steps = np.intersect1d(measured(run, column)[0], measured(control, column)[0]).size
    (ours, above), (theirs, below) = reliable(run, column), reliable(control, column)
    _, at, beside = np.intersect1d(ours, theirs, return_indices=True)
    above, below = above[at], below[beside]
    both = (above > 0) & (below > 0)
    ratios = above[both] / below[both]
    if not ratios.size:
        return ControlRatio(math.nan, math.nan, math.nan, 0, steps)
    return ControlRatio(float(np.median(ratios)), float(ratios.min()), float(ratios.max()), ratios.size, steps)


def wilson(successes: ArrayLike, trials: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    """Fractions and their 95 % Wilson score intervals: (fraction, low, high), each of the arguments' shape.

    Assumes independent trials of one probability (Wilson 1927). NaN where there was no trial.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    trials = np.asarray(trials, dtype=np.float64)
    count = np.where(trials > 0, trials, np.nan)
    fraction = np.asarray(successes) / count
    centre = (fraction + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    # The ends are exact where all trials agree; rounding would miss them.
    return fraction, np.where(fraction == 0, 0, centre - half), np.where(fraction == 1, 1, centre + half)


def clopper_pearson(successes: ArrayLike, trials: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    """Fractions and their exact 95 % intervals: (fraction, low, high), each of the arguments' shape.

    Assumes independent trials of one probability, which the interval then holds in 95 % at least, however few there
    are (Clopper & Pearson 1934). NaN where there was no trial.

    Example:
        >>> fraction, low, high = clopper_pearson(0, 12)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.000 to 0.265
    """
    from scipy.special import betaincinv

    hits, trials = np.broadcast_arrays(np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    count = np.where(trials > 0, trials, np.nan)
    fraction = hits / count
    # The ends of a beta distribution with a shape of 0 are limits that the function does not have.
    low = betaincinv(np.maximum(hits, 1), count - np.maximum(hits, 1) + 1, 0.025)
    high = betaincinv(np.minimum(hits, count - 1) + 1, np.maximum(count - hits, 1), 0.975)
    return fraction, np.where(fraction == 0, 0, low), np.where(fraction == 1, 1, high)


def _logarithms(
    x: ArrayLike, y: ArrayLike, groups: ArrayLike | None, trials: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[Any]]:
    """Of the pairs without NaN, and their labels."""
    xs, ys, labels = _columns({"x": x, "y": y}, groups, trials)
    kept = ~(np.isnan(xs) | np.isnan(ys))
    xs, ys, labels = xs[kept], ys[kept], labels[kept]
    for name, values in {"x": xs, "y": ys}.items():
        if not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"{name} must be finite and positive, got {values}")
    return np.log(xs), np.log(ys), labels


def _columns(columns: dict[str, ArrayLike], groups: ArrayLike | None, trials: int) -> tuple[NDArray[Any], ...]:
    """The columns in float64 and the labels of their rows, once all are (n,)."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    first = next(iter(arrays.values()))
    labels = np.arange(first.size) if groups is None else np.asarray(groups)
    shapes = [array.shape for array in arrays.values()]
    if first.ndim != 1 or any(shape != first.shape for shape in shapes):
        raise ValueError(f"{_and(list(columns))} must have one shape (n,), got {_and(list(map(str, shapes)))}")
    if labels.shape != first.shape:
        raise ValueError(f"groups must have the shape {first.shape} of {next(iter(columns))}, got {labels.shape}")
    if operator.index(trials) < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    return (*arrays.values(), labels)


def _and(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _interval(
    fit: Callable[[NDArray[np.intp]], NDArray[np.float64]], labels: NDArray[Any], trials: int, seed: int
) -> tuple[float, float]:
    """The percentile interval of a fit over resamples of whole groups of rows, from three groups on.

    Args:
        fit: from (m, k) rows of m resamples their (m,) fits, NaN where there is none.
    """
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if len(groups) < 3:
        return math.nan, math.nan
    draws = np.random.default_rng(seed).integers(len(groups), size=(trials, len(groups)))
    sizes = np.array([len(rows) for rows in groups])[draws].sum(axis=1)
    alike = (draws[sizes == size] for size in np.unique(sizes))  # so many rows each, to be fitted at once
    fits = [fit(np.stack([np.concatenate([groups[i] for i in draw]) for draw in some])) for some in alike]
    slopes = np.concatenate(fits)
    slopes = slopes[np.isfinite(slopes)]
    low, high = np.quantile(slopes, [0.025, 0.975]) if slopes.size else (math.nan, math.nan)
    return float(low), float(high)


def _most_likely(x: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes and constants (2, m) of lines about which normal variables are known to lie between bounds (m, n).

    By Newton's method, for all m at once, in parameters in which the logarithm of the likelihood is concave (Burridge
    1981): constant and slope over the scatter, and one over the scatter.
    """
    from scipy.special import log_ndtr

    ends = np.stack([low, high])
    known = np.isfinite(ends)
    # Centred, and x of length one, so that the three parameters are of one size and hardly depend on each other.
    middle, length = x.mean(axis=-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    centre = np.where(known, ends, 0.0).sum(axis=(0, 2)) / known.sum(axis=(0, 2))
    x = (x - middle) / length
    values = np.where(known, ends - centre[:, None], 0.0)
    design = np.stack([-np.ones_like(values), np.stack([-x, -x]), values], axis=-1)

    def likelihood(parameters: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """Its logarithm (m,), the gradient of that (m, 3), and minus its Hessian (m, 3, 3)."""
        at = (design @ parameters[:, :, None])[..., 0]
        z = np.where(known, at, ends)
        # Of the two tails the lower one, where a difference of probabilities keeps its digits. A step too far may find
        # none left, and is taken back.
        below, above = log_ndtr(np.where(z[0] > 0, -z[::-1], z))
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            chance = above + np.log1p(-np.exp(below - above))
            density = np.where(known, np.exp(-(at**2) / 2 - chance) / math.sqrt(2 * math.pi), 0.0)
            density[0] *= -1
            inner = (density[..., None] * design).sum(axis=0)
            bent = np.einsum("emn,emni,emnj->mij", at * density, design, design)
        return chance.sum(axis=-1), inner.sum(axis=1), bent + np.einsum("mni,mnj->mij", inner, inner)

    # From least squares through the middles, and through the bound where there is one.
    points = values.sum(axis=0) / known.sum(axis=0)
    slope = _slope(x, points)
    start = points.mean(axis=-1) - slope * x.mean(axis=-1)
    sharpness = 1 / np.maximum((points - start[:, None] - slope[:, None] * x).std(axis=-1), 0.01)
    parameters = np.stack([start * sharpness, slope * sharpness, sharpness], axis=-1)
    value, gradient, curved = likelihood(parameters)
    for _ in range(NEWTON_STEPS):
        # A hair on the diagonal: what no bound says anything of stays as it is.
        ridge = 1e-10 * np.trace(curved, axis1=1, axis2=2) + np.finfo(float).tiny
        step = np.linalg.solve(curved + ridge[:, None, None] * np.eye(3), gradient[..., None])[..., 0]
        gain = (gradient * step).sum(axis=-1)
        moving = gain > NEWTON_GAIN
        if not moving.any():
            break
        step[~moving] = 0.0
        for _ in range(NEWTON_STEPS):
            found = likelihood(parameters + step)
            bad = ~(found[0] >= value + 1e-4 * (gradient * step).sum(axis=-1))
            if not bad.any():
                break
            step[bad] /= 2
        parameters = parameters + step
        value, gradient, curved = found
    start, slope, sharpness = parameters.T
    slope = slope / sharpness / length[:, 0]
    return np.stack([slope, centre + start / sharpness - slope * middle[:, 0]])


def _slope(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares slopes along the last axis; NaN where all x are equal."""
    x = x - x[..., :1]  # equal x become exact zeros, which their mean need not leave
    x = x - x.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        slopes: NDArray[np.float64] = np.divide((x * y).sum(axis=-1), (x * x).sum(axis=-1))
    return slopes
