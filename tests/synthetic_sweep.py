"""A sweep that looks real, in memory or as folders: what its runs record follows from their settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import synthetic_run

from grokcurv.runs import Run, open_run

OPS = ("add", "sub", "mul", "x2_y2", "x2_xy_y2", "x3_xy")
NEVER = ("x2_xy_y2", "x3_xy")
ONSETS = {"add": 1800, "sub": 2300, "mul": 1900, "x2_y2": 5400}


@dataclass
class Sweep:
    """The interface of grokcurv.sweep.Sweep."""

    path: Path
    varied: tuple[str, ...]
    runs: pd.DataFrame
    tables: dict[str, pd.DataFrame]

    def run(self, name: str) -> Run:
        return open_run(self.path / "runs" / name)

    def folder(self, name: str) -> Path:
        return self.path / "runs" / name

    def table(self, name: str, columns: object = None) -> pd.DataFrame:
        return self.tables.get(name, pd.DataFrame())


def plan(**varied: tuple[Any, ...]) -> pd.DataFrame:
    """One pending run for every combination, the last field varying fastest."""
    index = pd.MultiIndex.from_product(varied.values(), names=varied)
    runs = index.to_frame(index=False)
    names = ["-".join(map(str, row)) for row in index]
    config = {name: value for name, value in synthetic_run.CONFIG.items() if name not in varied}
    return runs.assign(**config, status="finished", reason="").set_axis(pd.Index(names, name="run"))


def records(runs: pd.DataFrame, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Metrics and curvature of the runs that have started: a rise of the defect, then of the test accuracy."""
    generator = np.random.default_rng(seed)
    metrics, curvature = [], []
    for name, run in runs[runs["status"] != "pending"].iterrows():
        slow = (1e-3 / run["lr"]) ** 0.8 / run["weight_decay"] ** 0.6 * generator.uniform(0.85, 1.2)
        grok = ONSETS.get(run["op"], np.inf) * slow * 1.4
        onset = (grok if np.isfinite(grok) else 6500 * slow) / generator.uniform(1.2, 1.8)
        end = 1000 if run["status"] == "failed" else min(20_000, grok + 1000)
        step = np.arange(0, end + 1, 100)
        rise = 1 / (1 + np.exp(-(step - grok) / (0.02 * grok))) if np.isfinite(grok) else 0 * step
        memorised = 0.3 * (1 - np.exp(-step / 9000)) if run["op"] == "x2_xy_y2" else 0.01
        noise = generator.normal(0, 0.008, len(step))
        accuracy = np.clip(rise + (1 - rise) * memorised + noise, 0, 1)
        metrics.append(pd.DataFrame({"run": name, "step": step, "test_acc": accuracy, "train_acc": 1.0}))
        height = 120 * slow**0.7 if np.isfinite(grok) else 900
        level = 0.4 + height / (1 + np.exp(-(step - onset) / (0.06 * onset)))
        defect = level * np.exp(generator.normal(0, 0.25, len(step)))
        columns = {"step": step, "defect_median": defect, "reliable": defect > 0.2, "method": "difference"}
        curvature.append(pd.DataFrame({"run": name, **columns}))
    tables = {"metrics": metrics, "curvature": curvature}
    return {name: pd.concat(frames, ignore_index=True) for name, frames in tables.items() if frames}


def published(path: Path) -> Sweep:
    """54 runs, 6 operations, 3 learning rates, 3 seeds: two operations never grok, one run failed, two to come."""
    runs = plan(op=OPS, lr=(3e-4, 1e-3, 3e-3), seed=(42, 137, 2024))
    runs.loc["sub-0.003-137", ["status", "reason"]] = ["failed", "loss is not finite at step 1,013"]
    runs.loc[runs.index[-2:], "status"] = "pending"
    return Sweep(path, ("op", "lr", "seed"), runs, records(runs))


def write(sweep: Sweep) -> Path:
    """What of the sweep's folder the report reads besides the object: ``sweep.json``."""
    sweep.path.mkdir(parents=True, exist_ok=True)
    (sweep.path / "sweep.json").write_text(json.dumps({"schema": 1}))
    return sweep.path
