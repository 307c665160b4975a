"""How long a sweep may take, from a few steps of one run of each kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grokcurv.sweep.config import SweepConfig
from grokcurv.training import TrainConfig, train
from grokcurv.training.trainer import SHARED

STEPS = 30
"""That are taken to see how long one is."""

CHECK = 8.0
"""Gradients' time of a check in float64, which every 25th measurement or so makes; the first one of a run does."""


def expected_seconds(config: SweepConfig, workers: int) -> float:
    """An upper bound, roughly: every run to its last step, as fast as ``STEPS`` steps are now, on so many workers.

    Runs that grok end sooner. A measurement counts as its gradients, each of which takes as long as an update.
    """
    known: dict[tuple[object, ...], tuple[float, float]] = {}
    seconds = 0.0
    for run in config.plan.values():
        kind = tuple(getattr(run, name) for name in SHARED)
        if kind not in known:
            known[kind] = seconds_of(run)
        update, evaluation = known[kind]
        seconds += run.steps * (update + evaluation / run.eval_every)
        if run.measure_every:
            gradients = 3 * run.pairs + 1 if run.design == "chain" else 4 * run.pairs
            seconds += update * run.steps / run.measure_every * (gradients + CHECK / max(1.0, 25 / run.measure_every))
    return seconds / max(min(workers, len(config.plan)), 1)


def seconds_of(run: TrainConfig) -> tuple[float, float]:
    """Of an update, and of an evaluation, from :data:`STEPS` steps that are taken now."""
    bare: dict[str, Any] = {
        "intervention": "none",
        "faithful": False,
        "basis_from": "",
        "basis": "causal",
        "successive": False,
        "measures": "",
        "measure_every": 0,
        "pca_every": 0,
    }
    short = replace(run, steps=STEPS, eval_every=STEPS, **bare)
    seconds = train(short).metrics["seconds"].tolist()  # of the first evaluation, and of all steps and another one
    return max(seconds[1] - 2 * seconds[0], 0.0) / STEPS, seconds[0]
