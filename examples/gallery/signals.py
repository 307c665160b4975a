"""Which signal predicts grokking: every column of a small sweep as an alarm, by one rule for all."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from grokcurv.analysis import predictors
from grokcurv.sweep import SweepConfig, run_sweep

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = {"p": 31, "train_fraction": 0.7, "layers": 1, "d_model": 32, "heads": 2, "d_ff": 64, "batch_size": 128}
MEASURES = "update_gram,update_decomposition,weight_spectra,gradient_noise"
GRID: dict[str, list[Any]] = {"op": ["x2_y2", "x3_xy", "add", "sub", "mul", "x2_xy_y2"], "seed": [0, 1]}


def main(steps: int = 2500, threshold: float = 0.9, out: Path = Path("signals.png")) -> pd.DataFrame:
    """Train four operations that grok and two that do not; THRESHOLD is the test accuracy that counts as grokked."""
    settings = NETWORK | {"lr": 3e-3, "steps": steps, "steps_after_grok": 0, "eval_every": 25, "measures": MEASURES}
    every = {"measure_every": 10, "update_every": 10, "check_every": 100, "pairs": 1}
    with TemporaryDirectory() as folder:
        sweep = run_sweep(SweepConfig(run=settings | every, grid=GRID), folder, workers=1)
        found = predictors(sweep, threshold=threshold)
    table = found.table[found.table["auroc"].notna()].head(16).reset_index(drop=True)
    columns = ["column", "direction", "hits", "grokked", "false_alarms", "never", "lead", "auroc"]
    print(table[columns].to_string(index=False), *found.notes, sep="\n")

    figure, (left, right) = plt.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for reference, colour, label in ((False, "C0", "of the measures"), (True, "C1", "of the evaluations")):
        rows = table[table["reference"] == reference]
        left.hlines(rows.index, rows["auroc_low"], rows["auroc_high"], color=colour, linewidth=1)
        left.plot(rows["auroc"], rows.index, "o", color=colour)
        right.hlines(rows.index, rows["lead_min"], rows["lead_max"], color=colour, linewidth=1)
        right.plot(rows["lead"], rows.index, "o", color=colour, label=label)
    left.axvline(0.5, color="C4", linewidth=1)
    left.set(xlabel="AUROC", yticks=range(len(table)))
    left.set_yticklabels(table["column"], fontsize=8)
    left.invert_yaxis()
    right.set(xlabel="lead (steps)")
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(out)
    return table


if __name__ == "__main__":
    tyro.cli(main)
