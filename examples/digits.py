"""Grokking of handwritten digits: a network that starts with weights eight times too large memorises long before it
understands (Liu, Michaud and Tegmark, "Omnigrok", arXiv 2210.01117).

    python examples/digits.py

The loop is plain PyTorch. What grokcurv adds is a monitor before it, and one line in it.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import tyro
from figure import draw
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc

Batch = tuple[Tensor, Tensor]
TRAIN_ROWS, BATCH_ROWS, WIDTH, SCALE, EVERY = 200, 200, 200, 8.0, 100


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    images, digits = batch
    return functional.mse_loss(model(images), functional.one_hot(digits, 10).float())


def accuracy(model: nn.Module, batch: Batch) -> float:
    images, digits = batch
    with torch.no_grad():
        return (model(images).argmax(1) == digits).float().mean().item()


def study(steps: int) -> tuple[pd.DataFrame, gc.CurvatureMonitor]:
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    images, digits = torch.tensor(data.data / 16).float()[order], torch.tensor(data.target)[order]
    train, test = (images[:TRAIN_ROWS], digits[:TRAIN_ROWS]), (images[TRAIN_ROWS:], digits[TRAIN_ROWS:])

    hidden = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(WIDTH, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

    def batches() -> Iterator[Batch]:
        for _ in range(steps + 1):
            rows = torch.randint(TRAIN_ROWS, (BATCH_ROWS,))
            yield train[0][rows], train[1][rows]

    pca = gc.StreamingPCA(n_components=2)
    # The bracket: a rectifier's difference form is mostly the kinks that the step crosses.
    monitor = gc.CurvatureMonitor(model, loss_fn, method="bracket", every=EVERY, pca=pca, pca_every=EVERY)
    metrics = []
    for step, (batch, next_batch) in enumerate(monitor.lookahead(batches())):
        if step % EVERY == 0:
            metrics.append((step, accuracy(model, train), accuracy(model, test)))
        loss_fn(model, batch).backward()
        monitor.step(batch, next_batch)  # this batch against the next one
        optimizer.step()
        optimizer.zero_grad()
    return pd.DataFrame(metrics, columns=["step", "train_acc", "test_acc"]), monitor


def main(steps: int = 20_000, out: Path = Path("digits.png")) -> None:
    """Train for so many steps, and write the figure to OUT."""
    metrics, monitor = study(steps)
    print(metrics.iloc[:: max(1, len(metrics) // 10)].to_string(index=False))
    draw("Digits from large weights", metrics, monitor.records(), monitor.pca_records(), out)


if __name__ == "__main__":
    tyro.cli(main)
