"""How well a network does on the whole of both sets, and what its weights have of the solution's waves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from grokcurv.modular.config import TrainConfig
from grokcurv.modular.fourier import FourierShares, embedding_of
from grokcurv.modular.network import forward_of
from grokcurv.modular.tasks import Dataset

EVALUATION_ROWS = 16_384
"""Rows of one forward pass of an evaluation; bounds its memory for large p."""


NAMES = ("train_loss", "train_acc", "test_loss", "test_acc", "weight_norm", "fourier_embedding", "fourier_logits")


@torch.no_grad()
def evaluate(config: TrainConfig, model: nn.Module, data: Dataset, beside: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean losses, accuracies, length of the weights, Fourier shares, and the scalars ``beside``, all read at once."""
    forward, shares = forward_of(config), FourierShares(config.op, config.p, embedding_of(model))

    def score(pairs: Tensor, answers: Tensor) -> Tensor:
        """Mean loss and accuracy over a whole set, (2,) float64 on the device; its logits are added to ``shares``."""
        total = torch.zeros(2, dtype=torch.float64, device=answers.device)
        for x, y in zip(pairs.split(EVALUATION_ROWS), answers.split(EVALUATION_ROWS), strict=True):
            logits = forward(model, x)
            loss = functional.cross_entropy(logits, y, reduction="sum")
            total += torch.stack([loss, (logits.argmax(1) == y).sum()])
            shares.add(logits, y)
        return total / len(answers)

    norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in model.parameters()]
    train, test = score(data.train_pairs, data.train_answers), score(data.test_pairs, data.test_answers)
    values = (train, test, torch.stack(norms).norm()[None], shares.read(), *(value[None] for value in beside.values()))
    return dict(zip((*NAMES, *beside), torch.cat(values).tolist(), strict=True))
