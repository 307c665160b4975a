"""The defect of a network that is sure of its answers: by the published float32 formula, and held against float64."""

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import tyro

from grokcurv.training import TrainConfig, train

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = TrainConfig(
    p=31, train_fraction=0.6, layers=1, d_model=64, d_ff=128, batch_size=256, weight_decay=0.0, seed=0, threads=1
)


def main(steps: int = 1500, out: Path = Path("rounding.png")) -> pd.DataFrame:
    """Train a transformer for so many steps without weight decay: it memorises, and its gradients vanish."""
    rows = train(replace(NETWORK, steps=steps, measure_every=50, pairs=3)).curvature
    columns = ["step", "grad_norm", "reference_median", "defect_median", "noise_floor", "method", "reliable"]
    print(rows[columns].iloc[::3].to_string(index=False))

    figure, axes = plt.subplots()
    published = rows["reference_median"].where(rows["reference_median"] > 0)  # a logarithm has no place for zeros
    axes.plot(rows["step"], published, "o-", color="C1", label="published formula, float32")
    zeros = rows["step"][rows["reference_median"] == 0]
    axes.plot(zeros, zeros * 0 + rows["noise_floor"].min() / 3, "v", color="C1", label="the same: exactly zero")
    axes.plot(rows["step"], rows["defect_median"], color="C0", label="defect")
    brackets = rows[rows["method"] == "bracket"]
    axes.plot(brackets["step"], brackets["defect_median"], "o", color="C0", mfc="white", label="defect, by the bracket")
    axes.plot(rows["step"], rows["noise_floor"], color="C4", linestyle=":", label="noise floor of the defect")
    axes.set(yscale="log", xlabel="training step", ylabel="defect (1 / $\\theta$)")
    axes.set_title("Transformer, addition modulo 31, no weight decay")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(out)
    return rows


if __name__ == "__main__":
    tyro.cli(main)
