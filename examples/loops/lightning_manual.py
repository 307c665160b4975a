"""Lightning with manual optimisation: two optimisers, stepped in training_step.

pip install "grokcurv[lightning]"
python examples/loops/lightning_manual.py
"""

from typing import Any

import torch
import tyro
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import grokcurv as gc


def loss_fn(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


class Classifier(LightningModule):
    def __init__(self, data: TensorDataset, watch: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body, self.head = nn.Linear(6, 24), nn.Linear(24, 3)
        self.data, self.watch = data, watch

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        body = torch.optim.SGD(self.body.parameters(), lr=0.1, momentum=0.9)
        return [body, torch.optim.AdamW(self.head.parameters(), lr=1e-2)]

    def on_train_start(self) -> None:
        sampler = gc.subsample(self.data.tensors, rows=32)
        self.monitor = self.watch(self, loss_fn, self.optimizers(), sampler=sampler, every=2)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.manual_backward(loss_fn(self, batch))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()


def train(steps: int = 40, watch: Any = gc.attach) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    points = torch.randn(128, 6)
    data = TensorDataset(points, points[:, :3].argmax(1))
    module = Classifier(data, watch)
    # Lightning counts a step for each optimiser.
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_steps=2 * steps, max_epochs=-1, accelerator="cpu", **quiet)
    trainer.fit(module, DataLoader(data, 32, shuffle=True))
    return module, module.monitor


def main(steps: int = 40) -> None:
    """Train for so many steps, and print what was measured."""
    print(train(steps)[1].records()[["step", "defect_median", "noise_floor", "reliable"]].to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main)
