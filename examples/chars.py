"""A character-level transformer learns to add: it knows its sums by heart long before it can do others.

    python examples/chars.py

It reads "37+85=122" a character at a time and is asked for the last three. A sum counts when all three are right.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import tyro
from figure import draw
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import attention_segments

ALPHABET = "0123456789+="
TRAIN_SUMS, BATCH_SUMS, WIDTH, EVERY = 500, 200, 64, 50


class Transformer(nn.Module):
    """Two causal layers; logits of the three characters after the equals sign."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(ALPHABET), WIDTH)
        self.positions = nn.Parameter(torch.randn(8, WIDTH) / WIDTH**0.5)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(ALPHABET))
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).triu(1))

    def forward(self, text: Tensor) -> Tensor:
        read = self.layers(self.characters(text[:, :-1]) + self.positions, mask=self.mask)
        return self.head(read[:, -3:])


def loss_fn(model: nn.Module, text: Tensor) -> Tensor:
    return functional.cross_entropy(model(text).flatten(0, 1), text[:, -3:].flatten())


def accuracy(model: nn.Module, text: Tensor) -> float:
    with torch.no_grad():
        return (model(text).argmax(2) == text[:, -3:]).all(1).float().mean().item()


def study(steps: int) -> tuple[pd.DataFrame, gc.CurvatureMonitor]:
    torch.manual_seed(0)
    sums = [f"{a:02}+{b:02}={a + b:03}" for a in range(100) for b in range(100)]
    text = torch.tensor([[ALPHABET.index(c) for c in line] for line in sums])[torch.randperm(len(sums))]
    train, test = text[:TRAIN_SUMS], text[TRAIN_SUMS : TRAIN_SUMS + 1000]
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1.0, betas=(0.9, 0.98))

    def batches() -> Iterator[Tensor]:
        for _ in range(steps + 1):
            yield train[torch.randint(TRAIN_SUMS, (BATCH_SUMS,))]

    pca = gc.StreamingPCA(n_components=2, segments=attention_segments(model))  # one for each matrix of attention
    monitor = gc.CurvatureMonitor(model, loss_fn, every=EVERY, pca=pca, pca_every=EVERY)
    metrics = []
    for step, (batch, next_batch) in enumerate(monitor.lookahead(batches())):
        if step % EVERY == 0:
            metrics.append((step, accuracy(model, train), accuracy(model, test)))
        loss_fn(model, batch).backward()
        monitor.step(batch, next_batch)  # after backward, before the optimiser
        optimizer.step()
        optimizer.zero_grad()
    return pd.DataFrame(metrics, columns=["step", "train_acc", "test_acc"]), monitor


def main(steps: int = 4000, out: Path = Path("chars.png")) -> None:
    """Train for so many steps, and write the figure to OUT."""
    metrics, monitor = study(steps)
    print(metrics.iloc[:: max(1, len(metrics) // 10)].to_string(index=False))
    draw("Sums, character by character", metrics, monitor.records(), monitor.pca_records(), out)


if __name__ == "__main__":
    tyro.cli(main)
