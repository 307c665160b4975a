"""Two gradient steps in both orders, for one neuron of two weights: delta, the defect and the bracket."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor, nn

import grokcurv as gc

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))
ARROWS: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "zorder": 3}


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (torch.tanh(model(batch[0])) - batch[1]).square().mean()


def walk(model: nn.Linear, batches: list[tuple[Tensor, Tensor]], eta: float) -> np.ndarray:
    """(3, 2): the weights at first, after a gradient step on the first batch, and after one on the second."""
    points = [model.weight.detach().clone()]
    for batch in batches:
        model.weight.data -= eta * torch.autograd.grad(loss_fn(model, batch), model.weight)[0]
        points.append(model.weight.detach().clone())
    model.weight.data = points[0].clone()
    return torch.cat(points).numpy()


def main(eta: float = 0.6, out: Path = Path("definitions.png"), points: int = 100) -> dict[str, np.ndarray]:
    """Draw two steps of eta times the gradient, on a map of so many points a side."""
    inputs = 1.5 * torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, b = ((x, torch.tanh(1.5 * x[:, :1] - x[:, 1:])) for x in inputs)  # two batches of six examples of one rule
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[-0.6, -0.9]], dtype=torch.float64)
    ab, ba = walk(model, [a, b], eta), walk(model, [b, a], eta)
    stats = gc.commutator_defect(model, loss_fn, a, b, eta=eta)
    exact = gc.commutator_defect(model, loss_fn, a, b, eta=eta, method="bracket")
    delta, bracket = np.asarray(stats.delta)[0], np.asarray(exact.delta)[0] / eta**2  # of the first pair, and only one
    print(f"by hand: {ab[-1] - ba[-1]}, by grokcurv: {delta}")
    print(f"delta / eta^2: {delta / eta**2}, bracket: {bracket}")
    for each in (eta, eta / 10, eta / 100):
        print(f"eta {each:<5g} defect {gc.commutator_defect(model, loss_fn, a, b, eta=each).defect.item():.4f}")
    print(f"bracket   defect {exact.defect.item():.4f}")

    figure, axes = plt.subplots()
    across, up = np.linspace(-0.75, 0.85, points), np.linspace(-1.5, -0.45, points)
    grid = torch.tensor(np.stack(np.meshgrid(across, up))).flatten(1)
    for (x, y), colour in ((a, "C0"), (b, "C1")):
        losses = (torch.tanh(x @ grid) - y).square().mean(0).view(points, points)
        axes.contour(across, up, losses, levels=14, colors=colour, alpha=0.4, linewidths=0.8)
    axes.set(xlabel="weight 1", ylabel="weight 2", aspect="equal")
    axes.grid(False)
    zoom = axes.inset_axes((0.45, 0.03, 0.53, 0.36), xlim=(0.28, 0.72), ylim=(-0.87, -0.67), xticks=[], yticks=[])
    for panel, width in ((axes, 0.007), (zoom, 0.016)):
        panel.quiver(*ab[:-1].T, *np.diff(ab, axis=0).T, color=["C0", "C1"], width=width, **ARROWS)
        panel.quiver(*ba[:-1].T, *np.diff(ba, axis=0).T, color=["C1", "C0"], width=width, **ARROWS)
        panel.quiver(*ba[-1], *delta, color="black", width=width, **ARROWS)
    zoom.quiver(*ba[-1], *eta**2 * bracket, color="C3", width=0.016, **ARROWS)
    zoom.spines[:].set_visible(True)
    zoom.text(0.5, -0.75, "delta", weight="bold")
    zoom.text(0.33, -0.83, "eta$^2$ bracket", color="C3", weight="bold")
    axes.text(-0.7, -0.97, "start", weight="bold")
    axes.text(-0.56, -0.79, "A", color="C0", weight="bold")
    axes.text(-0.15, -0.74, "then B", color="C1", weight="bold")
    axes.text(-0.3, -1.02, "B", color="C1", weight="bold")
    axes.text(0.17, -0.92, "then A", color="C0", weight="bold")
    axes.set_title(
        "Two gradient steps, on batches A and B, in both orders\n(contours: the loss on A, blue; on B, orange)"
    )
    figure.savefig(out)
    return {"ab": ab, "ba": ba, "delta": delta, "bracket": bracket}


if __name__ == "__main__":
    tyro.cli(main)
