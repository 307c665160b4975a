"""What a run's page shows of each measure: the panels and words of measures.toml."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd


@dataclass(frozen=True)
class Panel:
    """Columns over the steps, on one axis."""

    ylabel: str
    columns: Mapping[str, str]
    """By column, the label at its line's end."""
    log: bool = False
    floor: str = ""
    """A column drawn in grey beneath the lines."""
    level: float = math.nan
    """A value to mark by a black line."""


@dataclass(frozen=True)
class Figured:
    """The figure of a measure."""

    title: str
    caption: str
    panels: tuple[Panel, ...]


_SAID = tomllib.loads(Path(__file__).with_name("measures.toml").read_text(encoding="utf-8"))

FIGURED = {
    name: Figured(said["title"], said["caption"], tuple(Panel(**panel) for panel in said["panels"]))
    for name, said in _SAID.items()
}
"""By the name of a measure."""

COLUMNS = tuple(x for one in FIGURED.values() for panel in one.panels for x in (*panel.columns, panel.floor) if x)
"""All that is drawn."""


def figured(curvature: pd.DataFrame) -> Iterator[tuple[str, Figured]]:
    """The measures of which a run has anything, with those of their panels that show something."""
    for name, figure in FIGURED.items():
        known = curvature.reindex(columns=[column for panel in figure.panels for column in panel.columns]).notna().any()
        panels = tuple(panel for panel in figure.panels if known[[*panel.columns]].any())
        if panels:
            yield name, replace(figure, panels=panels)
