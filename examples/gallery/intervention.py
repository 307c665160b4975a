"""Training left alone, pushed along its commutators, and kept inside the directions that it has taken before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from grokcurv import analysis
from grokcurv.training import TrainConfig, train

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = TrainConfig(
    p=31, train_fraction=0.7, layers=1, d_model=64, d_ff=128, batch_size=256, weight_decay=2.0, threads=1
)
KICK: dict[str, Any] = {"intervention": "kick", "strength": 100, "intervene_every": 50}
INTERVENTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "kick along the commutator": KICK,
    "kick at random, as long": KICK | {"direction": "random"},
    "update kept inside the basis": {"intervention": "project-update", "strength": 1.0},
}


def main(steps: int = 3000, start: int = 500, out: Path = Path("intervention.png")) -> dict[str, pd.DataFrame]:
    """Train four networks for so many steps at most, equal until the step START."""
    base = replace(NETWORK, steps=steps, steps_after_grok=300, eval_every=50, measure_every=50, pca_every=25, pairs=1)
    figure, (top, bottom) = plt.subplots(2, sharex=True)
    found = {}
    for name, settings in INTERVENTIONS.items():
        rows = found[name] = train(replace(base, intervene_from=start, **settings)).records()
        grok, last = analysis.grok_step(rows), rows["test_acc"].iloc[-1]
        print(f"{name}: grokked at {grok}, test accuracy {last:.1%} at the end")
        top.plot(rows["step"], rows["test_acc"], label=name)
        bottom.plot(rows["step"], rows["defect_median"])
    top.yaxis.set_major_formatter("{x:.0%}")
    top.set_ylabel("test accuracy")
    bottom.set(yscale="log", xlabel="training step", ylabel="defect (1 / $\\theta$)")
    for axes in (top, bottom):
        axes.axvline(start, color="C4", linestyle=":")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(out)
    return found


if __name__ == "__main__":
    tyro.cli(main)
