"""Modular arithmetic as a task: its network, the way it is run, its loss, and how well it does on both sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from grokcurv.flat import Segment, attention_segments, select_segments
from grokcurv.losses import cross_entropy64
from grokcurv.tasks.base import Batch, Dataset, Order
from grokcurv.tasks.modular import fast
from grokcurv.tasks.modular.fourier import FourierShares, embedding_of
from grokcurv.tasks.modular.model import MLP, Transformer
from grokcurv.tasks.modular.operations import check_operation, split

if TYPE_CHECKING:
    from grokcurv.training.config import TrainConfig

EVALUATION_ROWS = 16_384
"""Rows of one forward pass of an evaluation; bounds its memory for large p."""


class ModularArithmetic:
    """``a op b`` modulo p, learned by a transformer or an MLP: a :class:`grokcurv.tasks.Task`, by a run's settings.

    >>> import random
    >>> from grokcurv.training import TrainConfig
    >>> config = TrainConfig(op="add", p=7, train_fraction=0.5, batch_size=8, d_model=8, d_ff=8, heads=2)
    >>> task = ModularArithmetic(config)
    >>> data = task.split(random.Random(0))
    >>> len(data.train_pairs), len(data.test_pairs), bool((data.test_pairs.sum(1) % 7 == data.test_answers).all())
    (24, 25, True)
    >>> task.evaluate(task.model(seed=0), data).shape == (len(task.columns),)
    True
    """

    columns: tuple[str, ...] = (
        *("train_loss", "train_acc", "test_loss", "test_acc"),
        *("weight_norm", "fourier_embedding", "fourier_logits"),
    )

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.size = check_operation(config.op, config.p).size(config.p)
        # A transformer runs by the shorter way, unless published digits are to be met.
        self.logits: Callable[[Any, Tensor], Tensor] = lambda model, pairs: model(pairs)
        if config.architecture == "transformer" and config.rng != "paper":
            self.logits = fast.logits

    def split(self, order: Order) -> Dataset:
        return split(self.config.op, self.config.p, self.config.train_fraction, order)

    def model(self, seed: int) -> nn.Module:
        """The network on the CPU; the global generator is left as it was."""
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if config.architecture == "mlp":
                return MLP(config.p, layers=config.layers, width=config.d_model)
            return Transformer(
                config.p,
                layers=config.layers,
                d_model=config.d_model,
                heads=config.heads,
                d_ff=config.d_ff,
                activation=config.activation,
                layer_norm=config.layer_norm,
                sequence=config.sequence,
            )

    def matrices(self, model: nn.Module) -> tuple[Segment, ...]:
        """Those between the embeddings, or the one-hot numbers, and the head."""
        names = "encoder.*weight" if self.config.architecture == "transformer" else "hidden.*"
        return tuple(segment for segment in select_segments(model, names) if len(segment.shape) == 2)

    def followed(self, model: nn.Module) -> tuple[Segment, ...] | None:
        """The attention matrices, where there are some."""
        return attention_segments(model) if self.config.architecture == "transformer" else None

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy of (pairs, answers)."""
        if self.config.float64_logits:
            return self.measured_loss(model, batch)
        return functional.cross_entropy(self.logits(model, batch[0]), batch[1])

    def measured_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy64(self.logits(model, batch[0]), batch[1])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, data: Dataset) -> Tensor:
        """Mean losses and accuracies, length of the weights, and Fourier shares."""
        shares = FourierShares(self.config.op, self.config.p, embedding_of(model))

        def score(pairs: Tensor, answers: Tensor) -> Tensor:
            """Mean loss and accuracy over a whole set, (2,) float64; its logits are added to ``shares``."""
            total = torch.zeros(2, dtype=torch.float64, device=answers.device)
            for x, y in zip(pairs.split(EVALUATION_ROWS), answers.split(EVALUATION_ROWS), strict=True):
                logits = self.logits(model, x)
                loss = functional.cross_entropy(logits, y, reduction="sum")
                total += torch.stack([loss, (logits.argmax(1) == y).sum()])
                shares.add(logits, y)
            return total / len(answers)

        norms = [torch.linalg.vector_norm(p, dtype=torch.float64) for p in model.parameters()]
        train, test = score(data.train_pairs, data.train_answers), score(data.test_pairs, data.test_answers)
        return torch.cat([train, test, torch.stack(norms).norm()[None], shares.read()])
