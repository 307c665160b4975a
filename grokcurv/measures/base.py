"""What measures share: when the host learns of a verdict, what is too uncertain to be shown, and quantiles."""

from __future__ import annotations

import torch
from torch import Tensor

VERDICT_LAG = 2
"""On an accelerator, after how many more measurements the host learns of a verdict on one."""

CLEAR = (0.01, 0.1)
"""A share or a cosine is NaN when its error may be more than the first number, and more than the second of itself."""


def unclear(value: Tensor, bound: Tensor) -> Tensor:
    """Whether an error may be too large for the value to say anything."""
    absolute, relative = CLEAR
    return bound > (relative * value.abs()).clamp(min=absolute)


def quantiles(values: Tensor, *levels: float, dim: int = 0) -> list[Tensor]:
    """Quantiles over a dimension, linearly interpolated; NaN if any value is."""
    if values.shape[dim] == 1:  # the same at every level; interpolated, infinity is NaN, as it is between others
        only = values.select(dim, 0)
        return [only.lerp(only, 0.0)] * len(levels)
    ordered = values.sort(dim).values
    missing = ordered.select(dim, -1).isnan()  # NaN goes to the end
    found = []
    for level in levels:
        place = level * (values.shape[dim] - 1)
        below = int(place)
        above = min(below + 1, values.shape[dim] - 1)
        found.append(torch.lerp(ordered.select(dim, below), ordered.select(dim, above), place - below))
    return [x.masked_fill(missing, torch.nan) for x in found]
