"""``grokcurv bench``: what it costs beside what users have today, each speed with its error beside it.

:mod:`~grokcurv.bench.comparison` says what a case is; :mod:`~grokcurv.bench.kernels`,
:mod:`~grokcurv.bench.measurements` and :mod:`~grokcurv.bench.pca` have them, :mod:`~grokcurv.bench.plan` chooses,
:mod:`~grokcurv.bench.check` runs one, :mod:`~grokcurv.bench.driver` all of them.
"""

from grokcurv.bench.driver import run_bench
from grokcurv.bench.result import Bench

__all__ = ["Bench", "run_bench"]
