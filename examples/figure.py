"""The figure that the studies in this folder share."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import PercentFormatter

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#656d76"


def draw(title: str, metrics: pd.DataFrame, curvature: pd.DataFrame, pca: pd.DataFrame, out: Path) -> None:
    """Accuracy, commutator defect and PC1 % over training steps, to a PNG file.

    metrics has columns step, train_acc, test_acc; curvature is ``monitor.records()``, pca ``monitor.pca_records()``.
    """
    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(7, 6.5), sharex=True, layout="constrained")
    top.set_title(title, loc="left")
    top.plot(metrics["step"], metrics["train_acc"], color=GREY, label="train")
    top.plot(metrics["step"], metrics["test_acc"], color=BLUE, label="test")
    top.yaxis.set_major_formatter(PercentFormatter(1))
    top.set_ylabel("accuracy")

    good, bad = curvature[curvature["reliable"]], curvature[~curvature["reliable"]]
    middle.plot(curvature["step"], curvature["defect_median"], color=BLUE, label="defect")
    middle.plot(curvature["step"], curvature["noise_floor"], color=GREY, linestyle=":", label="noise floor")
    bracket = good[good["method"] == "bracket"]
    middle.plot(bracket["step"], bracket["defect_median"], ".", color=ORANGE, label="measured as the exact bracket")
    middle.plot(bad["step"], bad["noise_floor"], "x", color=ORANGE, label="nothing reliable")
    middle.set_yscale("log")
    middle.set_ylabel("commutator defect\n(1 / loss)")

    for _, one in pca.groupby("matrix"):
        bottom.plot(one["step"], one["pc1_percent"], color=GREY, linewidth=0.8)
    mean = pca.groupby("step")["pc1_percent"].mean()
    bottom.plot(mean.index, mean, color=BLUE, label="PC1 of the trajectory so far")
    bottom.yaxis.set_major_formatter(PercentFormatter(100))
    bottom.set_ylabel("share of variance")
    bottom.set_xlabel("training step")
    bottom.set_xscale("symlog", linthresh=100)
    bottom.set_xlim(0, metrics["step"].max())
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)
