"""Evidence that looks real: runs in memory of which every number follows from what is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import synthetic_run
import torch

from grokcurv.reproduce.claims import answer
from grokcurv.reproduce.evidence import AlignmentTest, Arithmetic, Evidence, Snapshot, Trial
from grokcurv.reproduce.page import Reproduction
from grokcurv.reproduce.plan import CLAIMS
from grokcurv.runs import Run
from grokcurv.subspace import Subspace
from grokcurv.training import TrainConfig

SIZE, SUPPORT = 2000, 400


def records(
    *,
    steps: int,
    onset: float = math.inf,
    grok: float = math.inf,
    level: float = 300.0,
    reference: float = 1.0,
    reliable: bool = True,
    spread: float = 1.0,
    fall: float = 20.0,
    every: int = 100,
) -> dict[str, pd.DataFrame]:
    """A run whose defect rises from 0.5 to ``level`` at ``onset`` and whose test accuracy rises at ``grok``.

    The float32 formula gives ``reference`` times the defect, from 1 on. ``spread`` tells runs apart in figures. The gap
    of the update Gram matrix falls by ``fall`` until the accuracy rises, or to the end.
    """
    step = np.arange(0, steps + 1, every)
    defect = np.where(step >= onset, level, 0.5)
    rho = 1 - 2e-5 * spread * (1 + step / steps)
    left = np.clip(1 - step / min(grok, steps), 0, 1)
    metrics = {
        "step": step,
        "train_acc": np.where(step >= 200, 1.0, 0.1),
        "test_acc": np.where(step >= grok, 0.99, 0.05),
    }
    curvature = {
        "step": step,
        "defect_median": defect if reliable else np.nan,
        "reliable": reliable,
        "reference_median": np.maximum(1.0, reference * defect),
        "rho": np.where(step > 0, rho, np.nan),
        "exec_matched_ratio": np.where(step >= grok, 0.8, 1.3),
        "step_alignment_ratio": 8.0,
        "g23": np.where(step >= 1000, fall**left, np.nan),
        "gap_ratio": np.where(step >= 1000, 1.4, np.nan),
    }
    pca = [
        pd.DataFrame({"step": step, "matrix": matrix, "pc1_percent": 70 * spread**-0.2 + 30 * np.exp(-step / 500)})
        for matrix in synthetic_run.MATRICES
    ]
    return {"metrics": pd.DataFrame(metrics), "curvature": pd.DataFrame(curvature), "pca": pd.concat(pca)}


@cache
def snapshot(trustworthy: float = 2.0, published: float = 2.0, seed: int = 0) -> Snapshot:
    """Commutators whose part in the support lies inside each basis about so many times as much as chance has it."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.linalg.qr(torch.randn(SUPPORT, 16, generator=generator)).Q.T.contiguous()
    bases = {k: Subspace.from_blocks(SIZE, [(100, blocks[:k])]) for k in (1, 3, 8)}

    def deltas(times: float) -> torch.Tensor:
        delta = torch.randn(60, SIZE, generator=generator)
        inside = bases[8].split(delta).coefficients.float() @ blocks[:8]
        delta[:, 100 : 100 + SUPPORT] += (times - 1) * inside
        return delta

    displacement = torch.randn(SIZE, generator=generator)
    return Snapshot(deltas(trustworthy), deltas(published), displacement, bases[8], bases)


def walks(percent: float = 71.0, p_value: float = 0.005) -> pd.DataFrame:
    matrices = synthetic_run.MATRICES
    spread = np.linspace(-4, 4, len(matrices))
    columns = {"matrix": matrices, "pc1_percent": percent + spread, "walk_percent": 62.0}
    return pd.DataFrame({**columns, "z": (percent - 62) / 2, "p_value": p_value})


def trial(settings: Mapping[str, Any], *, status: str = "finished", reason: str = "", **asked: Any) -> Trial:
    """A run of these settings; ``asked`` goes to :func:`records`, the cached properties of a trial are its own."""
    own = {name: asked.pop(name) for name in ("snapshot", "alignments", "walks") if name in asked}
    config = TrainConfig(threads=1, **settings)
    run = None
    if status != "pending":
        run = Run(None, asdict(config), {}, status=status, tables=records(**{"steps": 4000, **asked}))
    made = Trial(f"runs/{config.op}-{config.seed}", config, status, reason, run)
    made.__dict__.update({"snapshot": snapshot(), "alignments": alignments_of(1.0), "walks": walks(), **own})
    return made


def alignments_of(trustworthy: float, published: float | None = None) -> dict[Arithmetic, tuple[AlignmentTest, ...]]:
    """Three displacements between checkpoints whose alignment is about this many times chance."""

    def three(ratio: float) -> tuple[AlignmentTest, ...]:
        return tuple(AlignmentTest(ratio * factor, 0.5 if ratio < 1.5 else 0.01) for factor in (0.9, 1.0, 1.1))

    return {"published": three(trustworthy if published is None else published), "trustworthy": three(trustworthy)}


def risen(grok: float) -> float:
    """The onset of a run whose lead follows the published law."""
    return grok - 0.05 * grok**1.24  # a little below 1.3, for an onset is seen late


def trials() -> dict[str, list[Trial]]:
    """Runs of which every claim holds in both arithmetics, the slow regime aside, which has none."""
    grokking = {("add", 42): 2900, ("add", 137): 3100, ("sub", 42): 3400, ("mul", 42): 2600, ("x2_y2", 42): 1900}
    at = {"basis": "oracle", "basis_from": "somewhere", "measure_every": 0}

    def intervened(grok: float = 2900, **settings: Any) -> Trial:
        return trial({**at, **settings}, steps=6000, grok=grok)

    return {
        "grokking": [
            trial(
                {"op": op, "seed": seed},
                onset=risen(grok),
                grok=grok,
                spread=1 + 0.3 * index,
                snapshot=snapshot(seed=index),
            )
            for index, ((op, seed), grok) in enumerate(grokking.items())
        ],
        "never": [trial({"op": op}, walks=walks(45.0, 0.9), spread=4.0) for op in ("x2_xy_y2", "x3_xy")],
        "control": [
            trial({"op": op, "weight_decay": 0.0}, level=2.0, onset=1000, spread=3.0, fall=1.0, walks=walks(62.0, 0.5))
            for op in ("add", "mul")
        ],
        "rates": [
            trial(
                {"lr": 1e-4},
                steps=40_000,
                onset=risen(34_000),
                grok=34_000,
                alignments=alignments_of(0.5),
                every=200,
            ),
            *(
                trial({"op": op, "lr": 1e-2}, onset=risen(grok), grok=grok, alignments=alignments_of(1.8))
                for op, grok in (("add", 900), ("mul", 1000))
            ),
        ],
        "regimes": [
            trial({"seed": seed, "batch_size": 256}, onset=risen(grok), grok=grok)
            for seed, grok in enumerate(range(2300, 3300, 200))
        ],
        "suppression": [
            intervened(intervention="project", strength=0.75, grok=3600),
            intervened(intervention="project", strength=1.0, grok=math.inf),
            intervened(intervention="project-update", strength=1.0, grok=math.inf),
        ],
        "random-basis": [
            intervened(intervention="project", strength=0.5, basis=basis) for basis in ("random", "matched")
        ],
        "kicks": [
            intervened(intervention="kick", strength=100.0, intervene_every=50, faithful=faithful)
            for faithful in (False, True)
        ],
    }


def page(folder: Path, of: Mapping[str, list[Trial]] | None = None) -> Path:
    evidence = Evidence(trials() if of is None else of)
    folder.mkdir(parents=True, exist_ok=True)
    answers = tuple(answer(claim, evidence) for claim in CLAIMS)
    reproduction = Reproduction(folder, "quick", answers, {"slow-regime": 32_000.0}, {}, {})
    reproduction.write()
    return reproduction.page
