"""What runs draw at random: functions of a seed, a purpose and a step, or the stream of the paper's code."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.draws import Purpose, shuffle
from grokcurv.tasks.base import Order
from grokcurv.training.config import TrainConfig


def order_of(config: TrainConfig, size: int) -> Order:
    """What shuffles so many samples of a run, before they are split."""
    if config.rng == "paper":
        return random.Random(config.seed)
    if config.rng == "torch":  # of older versions, whose folders are still read
        root = torch.Generator().manual_seed(config.seed)
        return torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=root)))
    return shuffle(torch.tensor([config.seed]), Purpose.SPLIT, size)[0]


def intervention_seed(config: TrainConfig, step: int, which: int = 0) -> int:
    """Of the random numbers of an intervention at a step, or of another thing that is drawn for it there."""
    seed, at, bits = torch.tensor([[config.seed], [step], [0]]).unbind()
    return int(ops.draw(seed, Purpose.INTERVENTION, at, bits, which + 1)[0, which])


class PaperDraws:
    """The draws of the paper's code, of one run: after the split, weights and batches from streams seeded alike.

    ``RandomState(seed)`` is the stream that ``np.random.seed(seed)`` starts globally. Measurements draw from it too,
    and faithful kicks.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._stream = np.random.RandomState(seed)
        self._device = device

    def next(self, n: int, rows: int) -> Tensor:
        """(1, rows) int64 below n: the next of the stream."""
        return torch.from_numpy(self._stream.randint(0, n, rows)).to(self._device)[None]

    def following(self, n: int, rows: int) -> Tensor:
        """The same, left to be drawn again."""
        state = self._stream.get_state()
        drawn = self.next(n, rows)
        self._stream.set_state(state)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        state = self._stream.get_state(legacy=False)["state"]
        return {"key": torch.from_numpy(state["key"].astype(np.int64)), "pos": int(state["pos"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        twister = {"key": state["key"].numpy().astype(np.uint32), "pos": state["pos"]}
        self._stream.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": 0, "gauss": 0.0})
