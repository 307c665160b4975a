"""Sweeps: many runs from one file, over worker processes or a Ray cluster, that survive whatever happens to them.

``run_sweep(SweepConfig.from_toml("sweep.toml"), "runs/lr")`` does all of one. Here its runs are done one by one, each
into the folder where the sweep finds it:

>>> from grokcurv.sweep import SweepConfig, open_sweep, run_sweep
>>> from grokcurv.training import train
>>> small = {"p": 7, "d_model": 8, "d_ff": 8, "heads": 2, "batch_size": 8, "steps": 2}
>>> sweep = run_sweep(SweepConfig(run=small, grid={"lr": [1e-3, 1e-2]}), "runs/lr", only=[])
>>> list(sweep.plan)
['0000-lr0.001', '0001-lr0.01']
>>> for run, config in sweep.plan.items():
...     result = train(config, out=sweep.folder(run))
>>> open_sweep("runs/lr").runs["status"].tolist()
['finished', 'finished']
>>> sweep.table("metrics").groupby("run")["step"].max().tolist()
[2, 2]
"""

from grokcurv.sweep.config import Random, SweepConfig
from grokcurv.sweep.driver import run_sweep
from grokcurv.sweep.folder import Sweep, open_sweep

__all__ = ["Random", "Sweep", "SweepConfig", "open_sweep", "run_sweep"]
