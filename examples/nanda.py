"""Modular addition in a transformer of one layer, full batch, no LayerNorm (Nanda et al., arXiv 2301.05217).

    python examples/nanda.py

The network learns to add by adding angles: shares of its weights and of its logits move to a few frequencies while the
test accuracy still sleeps. The trainer of grokcurv.training has the settings as a preset and records both shares. A
modulus of 59 fits in minutes on one core, and shows little of the sleep; --p 113 --steps 14000 is the original.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro
from figure import draw

from grokcurv.runs import Run
from grokcurv.training import PRESETS, TrainConfig, train


def config(p: int, steps: int) -> TrainConfig:
    fraction = 0.3 if p >= 100 else 0.5  # a small table needs a larger share of it to be understood at all
    settings: dict[str, Any] = {
        "train_fraction": fraction,
        "eval_every": 50,
        "measure_every": 50,
        "pca_every": 50,
        "pairs": 1,
    }
    # The bracket: a rectifier's difference form is mostly the kinks that the step crosses.
    return replace(PRESETS["nanda"], p=p, steps=steps, seed=0, threads=1, method="bracket", **settings)


def study(steps: int, p: int = 59) -> Run:
    return train(config(p, steps))


def main(steps: int = 2000, out: Path = Path("nanda.png"), p: int = 59) -> None:
    """Train for so many steps, and write the figure to OUT."""
    run = study(steps, p)
    columns = ["step", "train_acc", "test_acc", "weight_norm", "fourier_embedding", "fourier_logits"]
    print(run.metrics[columns].iloc[:: max(1, len(run.metrics) // 10)].to_string(index=False))
    draw(f"Addition modulo {p} in one layer", run.metrics, run.curvature, run.pca_history, out)


if __name__ == "__main__":
    tyro.cli(main)
