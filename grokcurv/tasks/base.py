"""What a task is: samples, a network, a loss and an evaluation."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from grokcurv.flat import Segment

Batch = tuple[Tensor, Tensor]
"""Samples and their answers."""

Order = random.Random | torch.Generator | Tensor
"""What shuffles samples, or (n,) int64, the order itself."""


@dataclass(frozen=True)
class Dataset:
    """Samples (n, ...) and answers (n,), int64, of the training and of the test set; pairs in modular arithmetic."""

    train_pairs: Tensor
    train_answers: Tensor
    test_pairs: Tensor
    test_answers: Tensor

    def to(self, device: torch.device | str) -> Dataset:
        return Dataset(*(tensor.to(device) for tensor in vars(self).values()))


class Task(Protocol):
    """What runs learn. Everything is a function of what it is given: a task draws nothing and remembers nothing.

    Attributes:
        size: samples, before they are split.
        columns: names of what :meth:`evaluate` finds; ``train_loss``, ``train_acc``, ``test_loss`` and ``test_acc`` are
            among them.
    """

    size: int
    columns: tuple[str, ...]

    def split(self, order: Order) -> Dataset:
        """The samples in this order, cut into a training and a test set, on the CPU."""

    def model(self, seed: int) -> nn.Module:
        """The network on the CPU, its weights drawn from ``torch.manual_seed(seed)``."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar that is trained on; :func:`torch.func.functional_call` may have put other weights in."""

    def measured_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same from float64 logits: of measurements on batches of their own."""

    def evaluate(self, model: nn.Module, data: Dataset) -> Tensor:
        """(columns,) float64 on the device, of both sets whole."""

    def matrices(self, model: nn.Module) -> tuple[Segment, ...]:
        """Where in the flat parameter vector the 2-D weights are that Muon trains; AdamW trains all others."""

    def followed(self, model: nn.Module) -> tuple[Segment, ...] | None:
        """The weights whose trajectories have a PCA each; None: all of them one."""
