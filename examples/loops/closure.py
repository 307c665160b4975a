"""LBFGS, which calls a closure as often as it likes within a step.

python examples/loops/closure.py
"""

from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def train(steps: int = 40, watch: Any = gc.attach) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))
    points = torch.randn(128, 2)
    batch = points, torch.sin(2 * points[:, :1]) * points[:, 1:]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.3, max_iter=4)
    monitor = watch(model, loss_fn, optimizer, sampler=gc.halves(batch))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, monitor


def main(steps: int = 40) -> None:
    """Train for so many steps, and print what was measured."""
    print(train(steps)[1].records()[["step", "defect_median", "noise_floor", "reliable"]].to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
