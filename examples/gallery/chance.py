"""Is a trajectory more than a random walk, and its basis more than any other subspace?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from torch import Tensor, nn

import grokcurv as gc
from grokcurv import analysis
from grokcurv.training import TrainConfig, build_model, train

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
NETWORK = TrainConfig(
    p=31, train_fraction=0.6, layers=1, d_model=64, d_ff=128, batch_size=256, weight_decay=2.0, seed=0, threads=1
)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return gc.cross_entropy64(model(batch[0]), batch[1])


def main(steps: int = 3000, every: int = 50, walks: int = 200, out: Path = Path("chance.png")) -> dict[str, Any]:
    """Train, and at every so many steps set the path so far beside random walks of steps as long as its own."""
    pca = gc.StreamingPCA(n_components=2, segments=gc.attention_segments(build_model(NETWORK)))

    def watch(model: nn.Module, sampler: Callable[[], Any]) -> gc.CurvatureMonitor:
        return gc.CurvatureMonitor(model, loss_fn, sampler=sampler, every=every, pairs=3, pca=pca, pca_every=every)

    rows = train(replace(NETWORK, steps=steps), watch).curvature
    at, ratio = rows["step"][2:], rows["exec_matched_ratio"]  # with three rows there is a path to speak of
    shares, norms = 100 * pca.pc1_history_[2:].numpy(), pca.step_norms_.numpy()
    chance = np.zeros_like(shares)
    for row, column in np.ndindex(*shares.shape):
        chance[row, column] = 100 * analysis.random_walk_pc1(norms[: row + 2, column], 64 * 64, trials=walks).mean
    random = gc.Subspace.from_pca(pca).random_baseline("matched")
    low, high = random.quantile([0.025, 0.975]) / random.mean

    figure, (top, bottom) = plt.subplots(2, sharex=True)
    for column, name in enumerate(("W_Q", "W_K", "W_V", "W_O")):
        print(f"{name}: {shares[-1, column]:.1f} % of the variance on PC1, of random walks {chance[-1, column]:.1f} %")
        top.plot(at, shares[:, column], color=f"C{column}", label=name)
        top.plot(at, chance[:, column], color=f"C{column}", linestyle=":")
    print(f"share inside the basis over chance: {ratio.min():.2f} to {ratio.max():.2f}")
    print(f"95 % of random subspaces: {low:.2f} to {high:.2f}")
    top.set(ylabel="variance on PC1 (%)", title="solid: the trajectory so far; dotted: random walks")
    bottom.axhspan(low, high, color="C4", alpha=0.2, label="95 % of random subspaces")
    bottom.axhline(1, color="C4", linestyle=":")
    bottom.plot(rows["step"], ratio, "o-", label="execution basis, median of 3 pairs")
    bottom.set(xlabel="training step", ylabel="commutator inside,\nover chance", ylim=0)
    for axes in (top, bottom):
        axes.legend(ncols=4)
    figure.savefig(out)
    return {"shares": shares, "chance": chance, "ratio": ratio.to_numpy()}


if __name__ == "__main__":
    tyro.cli(main)
