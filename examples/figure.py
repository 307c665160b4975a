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
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    top.set_ylabel("accuracy")

    middle.plot(curvature["step"], curvature["defect_median"], color=BLUE, label="defect")
    middle.plot(curvature["step"], curvature["noise_floor"], color=GREY, linestyle=":", label="noise floor")
    left_out = curvature[~curvature["reliable"]]
    if len(left_out):
        middle.plot(left_out["step"], left_out["noise_floor"], "x", color=ORANGE, label="not reliable: left out")
    middle.set_yscale("log")
    middle.set_ylabel("commutator defect\n(1 / $\\theta$)")

    matrices = pca.pivot(index="step", columns="matrix", values="pc1_percent")
    if matrices.shape[1] > 1:
        bottom.plot(matrices, color=GREY, linewidth=0.8)
    bottom.plot(matrices.mean(axis=1), color=BLUE, label="PC1 of the trajectory so far")
    bottom.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
    bottom.set_ylabel("share of variance")
    bottom.set_xlabel("training step")
    last = max(1, metrics["step"].iloc[-1])
    bottom.set_xscale("symlog", linthresh=max(1, metrics["step"].iloc[:2].max()), linscale=0.3)
    bottom.set_xlim(0, last)
    bottom.set_xticks([0, *(tick for tick in (100, 1000, 10_000) if tick <= last)])
    for axes in (top, middle, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    figure.savefig(out, dpi=100)
    plt.close(figure)
