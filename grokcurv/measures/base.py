"""What a measure is: numbers of a training step, for all runs at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

VERDICT_LAG = 2
"""On an accelerator, after how many more measurements the host learns of a verdict on one."""

CLEAR = (0.01, 0.1)
"""A share or a cosine is NaN when its error may be more than the first number, and more than the second of itself."""


class Measure(Protocol):
    """Numbers of a step of R runs: what ``observe`` of each measure returns is a row (R, columns), float64, NaN where
    there is no number that could be trusted. Nothing is read by the host on the way.

    Attributes:
        columns: their names.
        cost: gradients that one observation of a run takes, float64 checks aside.
    """

    columns: tuple[str, ...]

    @property
    def cost(self) -> float: ...

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """What a checkpoint of one run needs of it."""

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`."""

    def keep(self, runs: list[int]) -> None:
        """Go on with these runs alone, renumbered in this order."""


def clear(value: Tensor, bound: Tensor) -> Tensor:
    """The value, or NaN where its error may be too large to say anything."""
    absolute, relative = CLEAR
    return torch.where((bound > absolute) & (bound > relative * value.abs()), torch.nan, value)


def quantiles(values: Tensor, *levels: float, dim: int = 0) -> list[Tensor]:
    """Quantiles over a dimension, linearly interpolated; NaN if any value is."""
    ordered = values.sort(dim).values
    missing = values.isnan().any(dim)
    found = []
    for level in levels:
        place = level * (values.shape[dim] - 1)
        below = int(place)
        above = min(below + 1, values.shape[dim] - 1)
        found.append(torch.lerp(ordered.select(dim, below), ordered.select(dim, above), place - below))
    return [x.masked_fill(missing, torch.nan) for x in found]
