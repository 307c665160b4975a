"""The basis of a trajectory, and the parts of a commutator inside and outside it, for one neuron of two weights."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor, nn

import grokcurv as gc

plt.style.use(Path(__file__).with_name("gallery.mplstyle"))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (torch.tanh(model(batch[0])) - batch[1]).square().mean()


def main(steps: int = 20, eta: float = 0.6, out: Path = Path("rho.png")) -> dict[str, np.ndarray]:
    """Train on the two batches in turn, and measure their commutator where that has led."""
    inputs = 1.5 * torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batches = [(x, torch.tanh(1.5 * x[:, :1] - x[:, 1:])) for x in inputs]  # of six examples of one rule
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[-1.2, -0.6]], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    path = [model.weight.detach().clone()]
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batches[step % 2]).backward()
        optimizer.step()
        path.append(model.weight.detach().clone())

    pca = gc.StreamingPCA(n_components=1).partial_fit(torch.cat(path))
    basis = gc.Subspace.from_pca(pca)
    stats = gc.commutator_defect(model, loss_fn, *batches, eta=eta)
    delta = torch.as_tensor(stats.delta)[0]  # of the first pair, and only one
    _, parallel, residual = basis.split(delta)
    print(f"PC1 holds {float(pca.explained_variance_ratio_[0]):.1%} of the variance of the trajectory")
    print(f"|delta| {delta.norm():.4f}: {parallel:.4f} inside the basis, {residual:.4f} outside")
    print(f"rho = {residual / delta.norm():.4f}")

    points, inside = torch.cat(path).numpy(), basis.filter_(delta.clone(), 1.0).numpy()
    outside = delta.numpy() - inside
    figure, axes = plt.subplots()
    axes.set(xlim=(-1.25, 0.15), ylim=(-1.05, -0.05), aspect="equal", xlabel="weight 1", ylabel="weight 2")
    axes.set_title("A commutator and the path of training")
    axes.plot(*points.T, "o-", color="C4", label="trajectory, step by step")
    middle = points.mean(0)
    axes.axline(middle, middle + basis.to_dense()[0].numpy(), color="C2", linestyle="--", label="basis: its PC1")
    for tail, arrow, colour, label in (
        (points[-1], delta.numpy(), "black", "delta"),
        (points[-1], inside, "C2", "delta inside the basis"),
        (points[-1] + inside, outside, "C1", "delta outside: rho of its length"),
    ):
        axes.quiver(
            *tail, *arrow, color=colour, label=label, angles="xy", scale_units="xy", scale=1, width=0.007, zorder=3
        )
    axes.legend(loc="upper left")
    figure.savefig(out)
    return {"trajectory": points, "delta": delta.numpy(), "inside": inside, "outside": outside}


if __name__ == "__main__":
    tyro.cli(main)
