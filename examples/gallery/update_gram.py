"""The Gram matrix of the last ten updates, of a network that groks and of one that does not."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from grokcurv.training import TrainConfig, train

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = TrainConfig(p=31, train_fraction=0.6, layers=1, d_model=64, d_ff=128, batch_size=256, seed=0, threads=1)


def main(steps: int = 3500, out: Path = Path("update_gram.png")) -> dict[str, pd.DataFrame]:
    """Train with weight decay 2 and without any, for so many steps."""
    base = replace(NETWORK, steps=steps, eval_every=25, measure_every=25, pairs=1)
    figure, (top, middle, bottom) = plt.subplots(3, sharex=True)
    found = {}
    for decay, colour in ((2.0, "C0"), (0.0, "C1")):
        config = replace(base, weight_decay=decay, measures="update_gram", update_window=10)
        rows = found[f"weight decay {decay:g}"] = train(config).records()
        columns = ["step", "test_acc", "g23", "gap_ratio", "r90", "update_gram_floor"]
        print(f"weight decay {decay:g}\n{rows[columns].iloc[::20].to_string(index=False)}")
        top.plot(rows["step"], rows["test_acc"], color=colour, label=f"weight decay {decay:g}")
        middle.plot(rows["step"], rows["g23"], color=colour, linewidth=1)
        bottom.plot(rows["step"], rows["gap_ratio"], color=colour, linewidth=1)
    top.yaxis.set_major_formatter("{x:.0%}")
    top.set_ylabel("test accuracy")
    middle.set(yscale="log", ylabel="g23 (weight$^2$)")
    bottom.set(ylim=0, ylabel="gap ratio", xlabel="training step")
    top.legend()
    figure.savefig(out)
    return found


if __name__ == "__main__":
    tyro.cli(main)
