"""What a run draws at random, and in which order: independent streams, or those of the paper's code."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grokcurv.modular.config import Rng


class TorchDraws:
    """Independent generators for the split, the weights, the batches, the measurements and the interventions."""

    def __init__(self, seed: int, device: torch.device) -> None:
        root = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (4,), generator=root).tolist()
        self.order = torch.Generator().manual_seed(seeds[0])
        self.weights_seed: int = seeds[1]
        self._training = torch.Generator(device).manual_seed(seeds[2])
        self._measuring = torch.Generator(device).manual_seed(seeds[3])
        # After the others, which it must not move.
        self.intervening_seed = int(torch.randint(2**62, (), generator=root))

    def training(self, n: int, rows: int) -> Tensor:
        return torch.randint(n, (rows,), generator=self._training, device=self._training.device)

    def measuring(self, n: int, rows: int) -> Tensor:
        return torch.randint(n, (rows,), generator=self._measuring, device=self._measuring.device)

    def state_dict(self) -> dict[str, Any]:
        return {"training": self._training.get_state(), "measuring": self._measuring.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._training.set_state(state["training"])
        self._measuring.set_state(state["measuring"])


class PaperDraws:
    """The draws of the paper's code: after the split, weights and batches from streams seeded alike.

    ``RandomState(seed)`` is the stream that ``np.random.seed(seed)`` starts globally. Measurements draw from it too,
    and faithful kicks; other interventions draw from a generator that the paper does not have.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.order = random.Random(seed)
        self.weights_seed = seed
        self.intervening_seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed)))
        self._stream = np.random.RandomState(seed)
        self._device = device

    def training(self, n: int, rows: int) -> Tensor:
        return torch.from_numpy(self._stream.randint(0, n, rows)).to(self._device)

    measuring = training

    def state_dict(self) -> dict[str, Any]:
        state = self._stream.get_state(legacy=False)["state"]
        return {"key": torch.from_numpy(state["key"].astype(np.int64)), "pos": int(state["pos"])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        twister = {"key": state["key"].numpy().astype(np.uint32), "pos": state["pos"]}
        self._stream.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": 0, "gauss": 0.0})


Draws = TorchDraws | PaperDraws


def draws_of(rng: Rng, seed: int, device: torch.device) -> Draws:
    return PaperDraws(seed, device) if rng == "paper" else TorchDraws(seed, device)
