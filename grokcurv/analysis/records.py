"""Records, and how the functions of this package read a column of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Records: TypeAlias = "pd.DataFrame | Mapping[str, Iterable[float]]"


def columns(records: Records, *names: str) -> list[NDArray[np.float64]]:
    """The columns as float64 arrays (n,), rows as they come; ValueError when one is missing or lengths differ."""
    for name in names:
        if name not in records:
            raise ValueError(f"records has no column {name!r}; it has {', '.join(map(repr, records)) or 'none'}")
    arrays = [np.asarray(records[name], dtype=np.float64) for name in names]
    first = arrays[0]
    for name, values in zip(names, arrays, strict=True):
        if first.ndim != 1 or values.shape != first.shape:
            raise ValueError(
                f"records: {names[0]!r} has shape {first.shape}, {name!r} has {values.shape}; wanted equal lengths"
            )
    return arrays


def measured(records: Records, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``step`` and the column ``name``, in order of steps, without the rows in which either is not finite."""
    steps, values = columns(records, "step", name)
    kept = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[kept], values[kept]
    order = np.argsort(steps, kind="stable")
    return steps[order], values[order]


def reliable(records: Records, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As :func:`measured`, of the rows whose ``reliable`` is true; of all rows where there is no such column."""
    if "reliable" not in records:
        return measured(records, name)
    steps, values, trusted = columns(records, "step", name, "reliable")
    return measured({"step": steps, name: np.where(trusted == 1, values, np.nan)}, name)
