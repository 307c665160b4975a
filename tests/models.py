"""Small models, losses and batches on which the probe is checked against dense mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.training import TrainConfig

Batch = dict[str, Tensor]


class OnceDifferentiable(torch.autograd.Function):
    """A square whose derivative cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def stopped_and_whole(
    new: Callable[[int], gc.CurvatureMonitor], model: nn.Module, trajectory: list[Tensor], cut: int
) -> tuple[gc.CurvatureMonitor, gc.CurvatureMonitor, dict[str, Any]]:
    """Monitors of a trajectory: one that goes on at a step with the state of another, and one of all of it; that state.

    ``new`` makes one that begins at a step.
    """
    whole, first, second, state = new(0), new(0), new(cut), dict[str, Any]()
    for step, theta in enumerate(trajectory):
        nn.utils.vector_to_parameters(theta, model.parameters())
        whole.step()
        if step == cut:
            state = first.state_dict()
            second.load_state_dict(state)
            first.step()  # the state is a copy
        (first if step < cut else second).step()
    return second, whole, state


TINY = TrainConfig(
    p=7,
    layers=1,
    d_model=16,
    heads=2,
    d_ff=16,
    batch_size=16,
    steps=40,
    eval_every=10,
    pairs=2,
    measure_every=10,
    pca_every=5,
    checkpoint_every=10,
    threads=1,
)
"""A run of a second or so."""


class Attention(nn.Module):
    """An embedding, one encoder layer, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x))[:, 0])


class Frozen(nn.Module):
    """A perceptron whose first layer is frozen, with a parameter that the loss never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6).requires_grad_(False)
        self.second = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch["x"]), batch["y"])


def cross_entropy64(model: nn.Module, batch: Batch) -> Tensor:
    return gc.cross_entropy64(model(batch["x"]), batch["y"])


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"])[..., 0] - batch["y"]).square().mean()


@dataclass(frozen=True)
class Problem:
    """A model, a loss and a way to draw batches."""

    model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batch: Callable[[torch.Generator], Batch]


def _classes(width: int, classes: int) -> Callable[[torch.Generator], Batch]:
    def draw(generator: torch.Generator) -> Batch:
        x = torch.randn(9, width, generator=generator)
        return {"x": x, "y": torch.randint(classes, (9,), generator=generator)}

    return draw


def _tokens(generator: torch.Generator) -> Batch:
    x = torch.randint(7, (9, 3), generator=generator)
    return {"x": x, "y": x.sum(1) % 7}


def _regression(generator: torch.Generator) -> Batch:
    x = torch.randn(9, 6, generator=generator)
    return {"x": x, "y": x.sin().sum(1)}


PROBLEMS = {
    "linear": Problem(lambda: nn.Linear(6, 1), squared_error, _regression),
    "perceptron": Problem(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), cross_entropy, _classes(5, 3)
    ),
    "batch norm": Problem(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        cross_entropy,
        _classes(5, 3),
    ),
    "frozen": Problem(Frozen, cross_entropy, _classes(5, 3)),
    "tied attention": Problem(Attention, cross_entropy64, _tokens),
}
