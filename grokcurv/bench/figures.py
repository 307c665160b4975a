"""Cost against size, on logarithmic axes: a panel a curve, a line an implementation, the floor in grey.

As in :mod:`grokcurv.report.figures`, call it, and ``saved``, inside ``with style(theme)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from grokcurv.bench.check import Result
from grokcurv.bench.comparison import OURS
from grokcurv.bench.plan import AXES, Curve
from grokcurv.bench.result import clock
from grokcurv.bench.timing import Times
from grokcurv.report.figures import NARROW, Theme, axes_at, blank, log_scale, page_width
from grokcurv.report.format import compact, seconds
from grokcurv.report.page import Drawing, draw_all

HEIGHT, BOTTOM, TOP = 2.9, 0.5, 0.35  # inches
LEFT, BETWEEN, RIGHT = 0.75, 0.75, 0.15

Timed = dict[str, dict[int, Times]]
"""Times by implementation and size."""


def drawings(curves: Sequence[Curve], found: Mapping[str, Result]) -> Iterator[Drawing]:
    """A figure an axis; a curve of which nothing was timed has no panel."""
    for axis in AXES:
        timed = [(curve, _timed(curve, found)) for curve in curves if curve.axis == axis]
        panels = [(curve, by_name) for curve, by_name in timed if by_name]
        if panels:
            alt = " ".join(f"{curve.title}: {'; '.join(_ends(by_name))}." for curve, by_name in panels)
            yield draw_all(axis, alt, partial(costs, panels, found))


def _timed(curve: Curve, found: Mapping[str, Result]) -> Timed:
    """Times along a curve: of each name, by size."""
    by_name: Timed = {}
    for size, case in curve.points:
        for outcome in found[case.title].outcomes:
            if outcome.times is not None:
                by_name.setdefault(outcome.name, {})[size] = outcome.times
    return by_name


def _ends(by_name: Timed) -> list[str]:
    """The implementations' times at the largest size that was timed."""
    largest = max(size for times in by_name.values() for size in times)
    return [f"{name} {clock(times[largest])} at {largest:,}" for name, times in by_name.items() if largest in times]


def costs(panels: Sequence[tuple[Curve, Timed]], found: Mapping[str, Result], theme: Theme) -> Figure:
    """The curves over one axis."""
    abreast, high = 1 if page_width() == NARROW else len(panels), HEIGHT + BOTTOM + TOP
    lines = math.ceil(len(panels) / abreast)
    figure = blank(lines * high)
    width = (page_width() - LEFT - RIGHT - BETWEEN * (abreast - 1)) / abreast
    for index, (curve, by_name) in enumerate(panels):
        line, place = divmod(index, abreast)
        edge = (lines - 1 - line) * high + BOTTOM
        axes = axes_at(figure, (LEFT + place * (width + BETWEEN), edge, width, HEIGHT))
        log_scale(axes, both=True)
        colours = iter((theme.orange, theme.green, theme.purple, theme.muted, theme.ink))
        for name, known in by_name.items():
            colour, order = (theme.blue, 3) if name == OURS else (next(colours), 2)
            lows, highs = zip(*(times.spread for times in known.values()), strict=True)
            medians = [times.median for times in known.values()]
            axes.plot([*known], medians, color=colour, marker="o", markersize=3.5, label=name, zorder=order)
            axes.fill_between([*known], lows, highs, color=colour, alpha=0.2, linewidth=0)
        floors = {size: floor.seconds for size, case in curve.points if (floor := found[case.title].floor)}
        if floors:
            axes.plot([*floors], [*floors.values()], color=theme.muted, linestyle=":", linewidth=1.3, label="floor")
        low, high = axes.get_ylim()
        rows = len(axes.get_legend_handles_labels()[1])
        axes.set_ylim(low, high * (high / low) ** (0.06 * rows))
        axes.legend(loc="upper left", frameon=False, fontsize=7.5, labelspacing=0.25, borderaxespad=0.2)
        axes.set_title(curve.title, loc="left", fontsize=9)
        axes.set(xlabel=AXES[curve.axis], xticks=[size for size, _ in curve.points])
        axes.xaxis.set_major_formatter(lambda size, _: compact(size))
        axes.yaxis.set_major_formatter(lambda value, _: seconds(value).replace(".00", ""))
    return figure
