"""Small models of three kinds, and runs whose parameters are set from outside: for the tests of measures."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.gradients import Distributed
from grokcurv.measures.base import Measure
from grokcurv.training.measured import RunsEngine


def conv() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4)), (1, 4, 4)


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)), (5,)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


def attention() -> tuple[nn.Module, tuple[int, ...]]:
    return Attention(), (3, 8)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


class Rows:
    """Runs whose parameters are set, and a monitor of them."""

    def __init__(self, make: Any, runs: int, measure: Measure, **options: Any) -> None:
        self.model, _ = make()
        self.theta = torch.empty(runs, len(flatten(self.model)))

        def engine(loss: Any, strategy: Any) -> RunsEngine:
            found = RunsEngine(self.model, loss, strategy, False, runs)
            found.adopt(list(range(runs)), self.theta, torch.zeros_like(self.theta))
            return found

        self.monitor = gc.CurvatureMonitor(Distributed(engine), loss_fn, measures=[measure], **options)

    def feed(self, thetas: Tensor) -> Rows:
        for theta in thetas:
            self.theta.copy_(theta)
            self.monitor.step()
        return self

    def numbers(self, run: int = 0) -> pd.DataFrame:
        return self.monitor.records(run).drop(columns="measure_seconds")
