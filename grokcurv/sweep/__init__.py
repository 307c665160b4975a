"""Sweeps: many runs from one file, over worker processes or a Ray cluster, that survive whatever happens to them.

>>> from grokcurv.sweep import SweepConfig, open_sweep, run_sweep
>>> sweep = run_sweep(SweepConfig.from_toml("sweep.toml"), "runs/lr")  # doctest: +SKIP
>>> sweep.runs, sweep.table("metrics")  # doctest: +SKIP
"""

from grokcurv.sweep.config import Random, SweepConfig
from grokcurv.sweep.driver import run_sweep
from grokcurv.sweep.folder import Sweep, open_sweep

__all__ = ["Random", "Sweep", "SweepConfig", "open_sweep", "run_sweep"]
