"""Modular addition on the full batch, by Muon for the hidden matrix and AdamW for the rest, kept in a dict.

    python examples/loops/full_batch.py

With the full batch there is no next batch to exchange with this one, and a batch commutes with itself. The pairs are
its two halves, divided anew at every measurement. Muon wants torch 2.9 or later.
"""

from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc

P = 23


class Adder(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(P, width), nn.Linear(2 * width, width), nn.Linear(width, P)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(pairs).flatten(1))))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(steps: int = 40, watch: Any = gc.attach) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    pairs = pairs[torch.randperm(len(pairs))[: len(pairs) // 2]]
    batch = pairs, pairs.sum(1) % P
    model = Adder()
    rest = [parameter for name, parameter in model.named_parameters() if name != "hidden.weight"]
    optimizers = {
        "muon": torch.optim.Muon([model.hidden.weight], lr=0.02, weight_decay=0.1),
        "adamw": torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1),
    }
    monitor = watch(model, loss_fn, optimizers, sampler=gc.halves(batch), every=2)

    for _ in range(steps):
        loss_fn(model, batch).backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
    return model, monitor


def main(steps: int = 40) -> None:
    """Train for so many steps, and print what was measured."""
    print(train(steps)[1].records()[["step", "defect_median", "noise_floor", "reliable"]].to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
