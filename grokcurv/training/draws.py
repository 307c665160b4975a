"""What runs draw at random: functions of a seed, a purpose and a step, or the stream of the paper's code."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
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


class PhiloxDraws:
    """Batches of R runs, each a function of the run's seed and of the step (:func:`grokcurv.ops.draw`).

    Whether a run is measured, and with which others it is trained, changes nothing, and there is no state to keep.
    """

    stateless = True

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=device)

    def training(self, steps: Tensor, n: Tensor, rows: int, *, following: bool = False) -> Tensor:
        """(R, rows) int64 below n (R,): the rows of the batches of these steps (R,), or of the ``following`` ones."""
        return ops.draw(self._seeds, Purpose.TRAINING, steps + 1 if following else steps, n, rows)

    def measuring(self, steps: Tensor, n: Tensor, rows: int) -> Tensor:
        """(R, rows) int64 below n: what is measured with at these steps; fewer rows are the beginning of more."""
        return ops.draw(self._seeds, Purpose.MEASUREMENT, steps, n, rows)


class PaperDraws:
    """The draws of the paper's code, of one run: after the split, weights and batches from streams seeded alike.

    ``RandomState(seed)`` is the stream that ``np.random.seed(seed)`` starts globally. Measurements draw from it too,
    and faithful kicks.
    """

    stateless = False

    def __init__(self, seed: int, device: torch.device) -> None:
        self._stream = np.random.RandomState(seed)
        self._device = device

    def training(self, steps: Tensor, n: Tensor, rows: int, *, following: bool = False) -> Tensor:
        """As :class:`PhiloxDraws`, whatever the step is; what follows is left to be drawn again."""
        state = self._stream.get_state()
        drawn = self.measuring(steps, n, rows)
        if following:
            self._stream.set_state(state)
        return drawn

    def measuring(self, steps: Tensor, n: Tensor, rows: int) -> Tensor:
        """The next of the stream."""
        return torch.from_numpy(self._stream.randint(0, int(n), rows)).to(self._device)[None]

    def state_dict(self) -> dict[str, Any]:
        state = self._stream.get_state(legacy=False)["state"]
        return {"key": torch.from_numpy(state["key"].astype(np.int64)), "pos": int(state["pos"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        twister = {"key": state["key"].numpy().astype(np.uint32), "pos": state["pos"]}
        self._stream.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": 0, "gauss": 0.0})
