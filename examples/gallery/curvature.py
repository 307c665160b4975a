"""The commutator defect of a network that groks, beside its accuracy."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from grokcurv import analysis
from grokcurv.training import TrainConfig, train

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = TrainConfig(
    p=31, train_fraction=0.6, layers=1, d_model=64, d_ff=128, batch_size=256, weight_decay=2.0, seed=0, threads=1
)


def main(steps: int = 4000, out: Path = Path("curvature.png")) -> pd.DataFrame:
    """Train a transformer to add modulo 31, for so many steps at most."""
    run = train(replace(NETWORK, steps=steps, steps_after_grok=500, eval_every=50, measure_every=50, pairs=3))
    rows = run.records()
    onset, grok, lead = analysis.onset_step(rows), analysis.grok_step(rows), analysis.lead_time(rows)
    print(rows[["step", "train_acc", "test_acc", "defect_median", "noise_floor"]].iloc[::10].to_string(index=False))
    print(f"onset {onset}, grokked {grok}, lead {lead}; reliable rows {rows['reliable'].mean():.0%}")

    figure, (top, bottom) = plt.subplots(2, sharex=True, height_ratios=(2, 3))
    top.plot(rows["step"], rows["train_acc"], color="C4", label="train")
    top.plot(rows["step"], rows["test_acc"], color="C0", label="test")
    top.yaxis.set_major_formatter("{x:.0%}")
    top.set_ylabel("accuracy")
    bottom.plot(rows["step"], rows["defect_median"], color="C0", label="defect: median of 3 pairs, and quartiles")
    bottom.fill_between(rows["step"], rows["defect_p25"], rows["defect_p75"], color="C0", alpha=0.2, linewidth=0)
    bottom.plot(rows["step"], rows["noise_floor"], color="C4", linestyle=":", label="its noise floor")
    bottom.set(yscale="log", xlabel="training step", ylabel="defect (1 / $\\theta$)")
    for axes in (top, bottom):
        for step, name, colour in ((onset, "onset of the defect", "C2"), (grok, "grok step", "C1")):
            if step is not None:
                axes.axvline(step, color=colour, linestyle="--", label=name if axes is top else None)
        axes.legend()
    figure.savefig(out)
    return rows


if __name__ == "__main__":
    tyro.cli(main)
