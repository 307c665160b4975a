"""The figures of a reproduction: lines over the steps, numbers with their intervals, a law on logarithmic axes.

As in :mod:`grokcurv.report.figures`, call a function, and ``saved``, inside ``with style(theme)``. In all of them blue
is what can be trusted, orange the published arithmetic, grey what was published.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from grokcurv.report.figures import NARROW, Theme, axes_at, blank, legend, log_scale, page_width, plot, stack
from grokcurv.reproduce.evidence import Arithmetic
from grokcurv.reproduce.findings import Finding
from grokcurv.reproduce.published import Number

ARITHMETICS: dict[Arithmetic, tuple[str, str]] = {
    "published": ("orange", "float32 formula"),
    "trustworthy": ("blue", "trustworthy"),
}
"""Colour and name of each."""
SAID = [said for _, said in ARITHMETICS.values()]
BENEATH = 2.8  # points: the float32 formula shows beneath what can be trusted where both agree
LEFT, RIGHT = 0.8, 0.15  # inches beside the panels
LEGEND_ROW = 0.2  # inches
WORDS = 34  # characters a line beside a forest


@dataclass(frozen=True)
class Line:
    """A line of a panel."""

    x: Any
    y: Any
    label: str
    """In the legend; '' leaves it out."""
    colour: str | int
    """A field of the theme, or a number that stands for a colour and a style."""
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """Lines over one horizontal axis."""

    lines: Sequence[Line]
    ylabel: str
    log: bool = False
    level: float = math.nan
    """A value to mark by a black line."""
    band: Number = Number()  # noqa: RUF009 - immutable
    """What was published of it, in grey."""
    height: float = 2.4
    """Inches."""


def lines(panels: Sequence[Panel], theme: Theme, *, xlabel: str = "training step") -> Figure:
    """Panels one above the other over the same horizontal axis, each line named once, above."""
    labels = dict.fromkeys(line.label for panel in panels for line in panel.lines if line.label)
    heights = [panel.height for panel in panels]
    figure, stacked = stack(heights, left=LEFT, right=RIGHT, top=_legend_height(labels), between=0.2)
    drawn: dict[str, Any] = {}
    for panel, axes in zip(panels, stacked, strict=True):
        if panel.log:
            log_scale(axes)
        if math.isfinite(panel.band.low):
            axes.axhspan(panel.band.low, panel.band.high, color=theme.muted, alpha=0.18, linewidth=0)
        if math.isfinite(panel.level):
            axes.axhline(panel.level, color=theme.ink, linewidth=0.9)
        for line in panel.lines:
            look = theme.look(line.colour) if isinstance(line.colour, int) else {"color": getattr(theme, line.colour)}
            width = BENEATH if line.colour == ARITHMETICS["published"][0] else 1.3
            handle = plot(axes, line.x, line.y, **{"linestyle": line.style, "linewidth": width, **look})
            if line.label:
                drawn.setdefault(line.label, handle)
        axes.set_ylabel(panel.ylabel)
        axes.yaxis.set_label_coords(-0.62 / (page_width() - LEFT - RIGHT), 0.5)
    axes.set_xlabel(xlabel)
    _legend(figure, drawn)
    return figure


def forest(findings: Sequence[Finding], theme: Theme, *, xlabel: str, zero: float) -> Figure:
    """A row a finding: the published range, and both of our numbers with their intervals; a black line at ``zero``."""
    findings = [finding for finding in findings if any(number.known for number in finding.here)]
    narrow = page_width() == NARROW
    words = [textwrap.fill(finding.quantity, WORDS // (1 + narrow)) for finding in findings]
    heights = [0.2 + 0.15 * (1 + text.count("\n")) for text in words]
    left, top, bottom = 1.5 if narrow else 2.75, _legend_height(SAID), 0.5
    total = top + bottom + sum(heights)
    figure = blank(total)
    axes = axes_at(figure, (left, bottom, page_width() - left - RIGHT, sum(heights)))
    axes.set_ylim(sum(heights), 0)
    axes.axvline(zero, color=theme.ink, linewidth=0.9)
    centres, handles = np.cumsum(heights) - np.divide(heights, 2), {}
    for finding, centre in zip(findings, centres, strict=True):
        past, height = finding.published, [centre - 0.13, centre + 0.13]
        if math.isfinite(past.low):
            axes.fill_betweenx(height, past.low, past.high, color=theme.muted, alpha=0.25, linewidth=0)
        elif math.isfinite(past.value):
            axes.plot([past.value] * 2, height, color=theme.muted, linewidth=3, alpha=0.5)
        for (colour, said), number, shift in zip(ARITHMETICS.values(), finding.here, (-0.06, 0.06), strict=True):
            if not math.isfinite(number.value):
                continue
            (handle,) = axes.plot(number.value, centre + shift, "o", color=getattr(theme, colour), markersize=4.5)
            axes.plot([number.low, number.high], [centre + shift] * 2, color=getattr(theme, colour), linewidth=1.5)
            handles[said] = handle
    axes.set_yticks(centres, words)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)
    _legend(figure, handles)
    return figure


def scatter(
    points: Mapping[Arithmetic, Sequence[tuple[float, float]]],
    laws: Mapping[Arithmetic, Any],
    onset: float,
    theme: Theme,
) -> Figure:
    """Lead against grok step by arithmetic, on logarithmic axes, with the fitted power laws and, dotted, the lead of an
    onset that is the same for all."""
    figure, (axes,) = stack([3.4], left=LEFT, right=RIGHT, top=_legend_height([*SAID, "constant"]), between=0)
    log_scale(axes, both=True)
    known = np.array([point for found in points.values() for point in found])
    (left, low), (right, high) = known.min(axis=0) / 1.4, known.max(axis=0) * 1.4
    axes.set(xlim=(left, right), ylim=(low, high))
    handles = {}
    for name, found in points.items():
        if not found:
            continue
        colour, said = ARITHMETICS[name]
        x, y = np.array(found).T
        (handle,) = axes.plot(x, y, "o", color=getattr(theme, colour), markersize=5, alpha=0.8)
        law = laws[name]
        if math.isfinite(law.exponent):
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, law.prefactor * ends**law.exponent, color=getattr(theme, colour), linewidth=1.2)
            said += f", exponent {law.exponent:.2f}"
        handles[said] = handle
    if math.isfinite(onset):
        steps = np.geomspace(max(left, onset * 1.001), right, 400)
        (handle,) = axes.plot(steps, steps - onset, ":", color=theme.muted, linewidth=1.2)
        handles[f"onset at step {onset:,.0f}"] = handle
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("grok step")
    axes.set_ylabel("lead, steps")
    _legend(figure, handles)
    return figure


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """What is drawn, by its label, at the top; nothing where nothing is."""
    if handles:
        look = {"fontsize": 8, "handlelength": 2.2, "labelspacing": 0.25, "borderpad": 0}
        legend(figure, handles.items(), (0.16, 0.03), _legend_columns(handles), **look)


def _legend_columns(labels: Collection[str]) -> int:
    """How many columns of labels have room on the page."""
    if page_width() > NARROW:
        return 3
    return 1 if max(map(len, labels)) > 24 else 2


def _legend_height(labels: Collection[str]) -> float:
    """Inches that it takes, with the edge above it."""
    return 0.1 + (LEGEND_ROW * math.ceil(len(labels) / _legend_columns(labels)) if labels else 0)
