"""The defect at steps of different lengths, for a ReLU network and for one with tanh, beside the exact bracket."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor, nn

import grokcurv as gc

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main(lengths: int = 31, out: Path = Path("kinks.png")) -> pd.DataFrame:
    """Measure one pair of batches with so many etas from 1e-6 to 1."""
    torch.manual_seed(0)
    inputs = torch.randn(2, 64, 20, dtype=torch.float64)
    teacher = torch.randn(20, 5, dtype=torch.float64)
    a, b = ((x, (x @ teacher).argmax(1)) for x in inputs)
    etas = np.logspace(-6, 0, lengths)
    found = pd.DataFrame(index=pd.Index(etas, name="eta"))
    figure, axes = plt.subplots()
    for kind, colour in ((nn.ReLU, "C1"), (nn.Tanh, "C0")):
        torch.manual_seed(1)  # the same weights for both
        model = nn.Sequential(nn.Linear(20, 128), kind(), nn.Linear(128, 5)).double()
        name = kind.__name__
        found[name] = [gc.commutator_defect(model, loss_fn, a, b, eta=eta).defect.item() for eta in etas]
        bracket = gc.commutator_defect(model, loss_fn, a, b, method="bracket").defect.item()
        print(f"{name}: bracket {bracket:.4f}; difference {found[name].min():.4f} to {found[name].max():.4f}")
        axes.plot(etas, found[name], "o-", color=colour, label=f"{name}: difference form")
        axes.axhline(bracket, color=colour, linestyle="--", label=f"{name}: exact bracket")
    axes.set(xscale="log", ylim=0, xlabel="eta (step over gradient)", ylabel="defect (1 / $\\theta$)")
    axes.legend()
    figure.savefig(out)
    return found


if __name__ == "__main__":
    tyro.cli(main)
