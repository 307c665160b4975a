"""What was published, in one place, and what a number is here.

The numbers are those of Xu, arXiv 2602.16746 (2026), and of the results saved beside its code (the public repository
``skydancerosel/grokking-integrability``), restated. Where several runs, layers or settings are summed up in one number,
the comment says how.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from grokcurv.analysis import wilson

SOURCE = "Xu, arXiv 2602.16746 (2026)"


@dataclass(frozen=True)
class Number:
    """A number with the interval it comes with; NaN where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    count: int = 0
    """How many runs or measurements it is made of."""

    @property
    def known(self) -> bool:
        """Whether there is anything."""
        return not all(map(math.isnan, (self.value, self.low, self.high)))

    @classmethod
    def over(cls, values: Iterable[float]) -> Number:
        """Median of the finite values, and their range."""
        kept = np.asarray(list(values), dtype=np.float64)
        kept = kept[np.isfinite(kept)]
        if not kept.size:
            return cls()
        return cls(float(np.median(kept)), float(kept.min()), float(kept.max()), kept.size)

    @classmethod
    def share(cls, successes: int, trials: int) -> Number:
        """A fraction with its 95 % Wilson interval."""
        if not trials:
            return cls()
        fraction, low, high = wilson(successes, trials)
        return cls(float(fraction), float(low), float(high), trials)


def between(low: float, high: float) -> Number:
    """A range that was published without its middle."""
    return Number(math.nan, low, high)


GROK_STEPS: dict[tuple[str, float], int] = {
    **dict.fromkeys([(op, 1e-4) for op in ("add", "sub", "mul", "x2_y2")], 34_000),
    ("add", 1e-3): 2900,
    ("sub", 1e-3): 3400,
    ("mul", 1e-3): 2600,
    ("x2_y2", 1e-3): 1900,
}
"""By operation and learning rate, the step at which the test accuracy passes 0.9: mean of three seeds, rounded."""

# Mean over the matrices of both layers of the four operations that grok, with the range over matrices; and mean over
# the matrices of one layer: the operations that do not grok, and all at weight decay 0.
PC1_PERCENT = {"grokking": Number(71.7, 68.0, 83.0, 12), "never": between(42.4, 48.8), "control": between(56.0, 69.0)}
RHO = Number(1.0, 0.9995, 1.0, 36)  # printed as 1.000
EXEC_RANDOM = {"memorisation": between(1.8, 2.9), "post-grok": between(0.0, 1.0)}
CONTROL_RATIO = between(10.0, 1000.0)
LEAD_TIME = Number(math.nan, 600.0, 1600.0, 12)
LED = Number(1.0, count=12)
LEAD_EXPONENT = Number(1.3)
SETTLED = {1e-4: Number(34_000.0), 1e-3: Number(3000.0), 1e-2: between(500.0, 9900.0)}
MAX_DEFECT = {1e-4: between(3.7e3, 4.3e4), 1e-3: between(52.0, 4500.0), 1e-2: between(15.0, 122.0)}
ALIGNMENT = {1e-2: between(1.4, 2.1), 1e-3: between(0.57, 2.2), 1e-4: between(0.18, 0.86)}  # fastest first
SUPPRESSED = Number(0.0, count=12)
SUPPRESSION_DELAY = between(600.0, 800.0)  # at strength 0.75
RANDOM_DELAY = between(0.0, 50.0)  # up to strength 0.75
KICKED = Number(1.0, count=27)
# Of a later paper of the same author, on the rolling Gram matrix of ten updates of 100 steps each.
GAP_FELL = {"grokking": Number(1.0, count=18), "control": Number(1 / 18, count=18)}
GAP_FALL = between(8.0, 111.0)  # of runs that grok
GAP_RATIO = {"grokking": Number(1.39, 1.31, 1.47), "control": Number(2.51, 1.95, 3.07)}  # mean and standard deviation
SLOW_GROK_STEP = Number(570_000.0)
