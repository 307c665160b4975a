"""What measures share: when the host learns of a verdict, what is too uncertain to be shown, and quantiles."""

from __future__ import annotations

import torch
from torch import Tensor

VERDICT_LAG = 2
"""On an accelerator, after how many more measurements the host learns of a verdict on one."""

CLEAR = (0.01, 0.1)
"""A share or a cosine is NaN when its error may be more than the first number, and more than the second of itself."""


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
