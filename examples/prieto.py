"""Modular addition in a multilayer perceptron without biases, full batch (Prieto et al., arXiv 2501.04697).

    python examples/prieto.py --remedy none

Without a remedy, they find, the weights grow along themselves until float32 cannot tell the soft-max from a one: the
gradient vanishes, and nothing is learned any more ("softmax collapse"). Weight decay is the old remedy; theirs takes
from each gradient its part along the weights, and the network generalises without delay.
"""

from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from figure import draw
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.tasks import MLP

Batch = tuple[Tensor, Tensor]
Remedy = Literal["none", "decay", "orthogonal"]
WIDTH, EVERY, MEASURED_ROWS = 200, 25, 512


def loss64(model: nn.Module, batch: Batch) -> Tensor:
    """What is measured: the loss of training, its last digits kept."""
    pairs, answers = batch
    return gc.cross_entropy64(model(pairs), answers)


def accuracy(model: nn.Module, batch: Batch) -> float:
    pairs, answers = batch
    with torch.no_grad():
        return (model(pairs).argmax(1) == answers).float().mean().item()


@torch.no_grad()
def orthogonalise(model: nn.Module) -> None:
    """Each matrix's gradient without its part along the matrix, as long as it was."""
    for weight in model.parameters():
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        across = gradient - (weight * gradient).sum() / weight.square().sum() * weight
        weight.grad = across * (gradient.norm() / across.norm().clamp_min(1e-30))


def study(steps: int, remedy: Remedy = "decay", p: int = 59) -> tuple[pd.DataFrame, gc.CurvatureMonitor]:
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))[torch.randperm(p * p)]
    answers, half = pairs.sum(1) % p, p * p // 2
    train, test = (pairs[:half], answers[:half]), (pairs[half:], answers[half:])
    model = MLP(p, width=WIDTH)
    decay = 0.3 if remedy == "decay" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=decay, betas=(0.9, 0.99))

    generator = torch.Generator().manual_seed(0)

    def sampler() -> tuple[Batch, Batch]:  # training uses the full batch: a measurement draws two of its own
        a, b = torch.randint(half, (2, MEASURED_ROWS), generator=generator)
        return (train[0][a], train[1][a]), (train[0][b], train[1][b])

    pca = gc.StreamingPCA(n_components=2)
    # The bracket: a rectifier's difference form is mostly the kinks that the step crosses.
    monitor = gc.CurvatureMonitor(
        model, loss64, method="bracket", sampler=sampler, every=EVERY, pca=pca, pca_every=EVERY
    )
    metrics = []
    for step in range(steps + 1):
        loss = functional.cross_entropy(model(train[0]), train[1])
        loss.backward()
        if step % EVERY == 0:
            metrics.append((step, loss.item(), accuracy(model, train), accuracy(model, test)))
        monitor.step()
        if remedy == "orthogonal":
            orthogonalise(model)
        optimizer.step()
        optimizer.zero_grad()
    return pd.DataFrame(metrics, columns=["step", "loss", "train_acc", "test_acc"]), monitor


def main(steps: int = 2000, out: Path = Path("prieto.png"), remedy: Remedy = "decay", p: int = 59) -> None:
    """Train for so many steps, and write the figure to OUT."""
    metrics, monitor = study(steps, remedy, p)
    print(metrics.iloc[:: max(1, len(metrics) // 10)].to_string(index=False))
    title = f"Perceptron, modulo {p}, remedy: {remedy}"
    draw(title, metrics, monitor.records(), monitor.pca_records(), out)


if __name__ == "__main__":
    tyro.cli(main)
