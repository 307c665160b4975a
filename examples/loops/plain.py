"""A plain loop over a loader.

python examples/loops/plain.py
"""

from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import grokcurv as gc


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def train(steps: int = 40, watch: Any = gc.attach) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    points = torch.randn(256, 8)
    data = TensorDataset(points, points[:, :4].argmax(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    monitor = watch(model, loss_fn, optimizer, sampler=gc.from_loader(DataLoader(data, 32, shuffle=True)), every=2)

    done = 0
    while done < steps:
        for batch in DataLoader(data, 32, shuffle=True):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if done == steps:
                break
    return model, monitor


def main(steps: int = 40) -> None:
    """Train for so many steps, and print what was measured."""
    print(train(steps)[1].records()[["step", "defect_median", "noise_floor", "reliable"]].to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
