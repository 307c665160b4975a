"""A phase diagram: when a network groks, by weight decay and share of the data, from a sweep of sixteen small runs."""

from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from grokcurv import analysis
from grokcurv.sweep import SweepConfig, run_sweep

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = {"p": 23, "layers": 1, "d_model": 32, "heads": 2, "d_ff": 64, "batch_size": 128, "lr": 3e-3, "seed": 0}
GRID = {"weight_decay": [0.4, 0.7, 1.0, 1.5], "train_fraction": [0.5, 0.6, 0.7, 0.8]}


def main(steps: int = 2500, threshold: float = 0.9, out: Path = Path("phases.png")) -> pd.DataFrame:
    """Do the runs of the grid, for so many steps at most; THRESHOLD is the test accuracy that counts as grokked."""
    settings = {"steps": steps, "steps_after_grok": 0, "eval_every": 25, "measure_every": 0}
    with TemporaryDirectory() as folder:
        sweep = run_sweep(SweepConfig(run=NETWORK | settings, grid=GRID), folder, workers=1)
        results = analysis.sweep_results(sweep.runs, sweep.table("metrics"), sweep.table("curvature"), threshold)
    table = results.pivot(index="train_fraction", columns="weight_decay", values="grok_step")
    print(table.to_string())

    figure, axes = plt.subplots()
    image = axes.imshow(table, origin="lower", cmap="viridis_r", aspect="auto")
    for number, (grok, accuracy) in enumerate(results[["grok_step", "test_acc"]].to_numpy(float)):
        x, y = divmod(number, len(table))  # the last field of the grid varies fastest
        text = f"{grok:.0f}" if grok >= 0 else f"not yet\n({accuracy:.0%})"
        axes.text(x, y, text, ha="center", va="center", bbox={"color": "white", "alpha": 0.7, "pad": 2})
    axes.set_xticks(range(table.shape[1]), [str(x) for x in table.columns])
    axes.set_yticks(range(table.shape[0]), [f"{y:.0%}" for y in table.index])
    axes.set(xlabel="weight decay", ylabel="share of the pairs that train")
    axes.grid(False)
    figure.colorbar(image, label="grok step")
    figure.savefig(out)
    return results


if __name__ == "__main__":
    tyro.cli(main)
