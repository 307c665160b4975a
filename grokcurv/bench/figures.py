"""Cost against size, on logarithmic axes: two panels side by side, a line a implementation, the floor in grey.

As in :mod:`grokcurv.report.figures`, call it, and ``png``, inside ``with style(theme)``.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from grokcurv.bench.check import Result
from grokcurv.bench.comparison import OURS
from grokcurv.bench.plan import Curve
from grokcurv.bench.timing import Times
from grokcurv.report.figures import WIDTH, Theme, axes_at, blank, log_scale
from grokcurv.report.format import compact, seconds

LABELS = {"P": "parameters P", "K": "pairs of batches K", "T": "rows of the trajectory T"}
HEIGHT, BOTTOM, TOP = 2.9, 0.5, 0.35  # inches
LEFT, BETWEEN, RIGHT = 0.75, 0.75, 0.15
Points = Sequence[tuple[int, Result]]


def costs(axis: str, curves: Sequence[tuple[Curve, Points]], theme: Theme) -> Figure:
    """The curves over one axis."""
    figure = blank(HEIGHT + BOTTOM + TOP)
    width = (WIDTH - LEFT - RIGHT - BETWEEN * (len(curves) - 1)) / len(curves)
    for index, (curve, points) in enumerate(curves):
        axes = axes_at(figure, (LEFT + index * (width + BETWEEN), BOTTOM, width, HEIGHT))
        log_scale(axes)
        axes.set_xscale("log")
        by_name: dict[str, list[tuple[int, Times]]] = {}
        for size, result in points:
            for outcome in result.outcomes:
                if outcome.times is not None:
                    by_name.setdefault(outcome.name, []).append((size, outcome.times))
        colours = iter((theme.orange, theme.green, theme.purple, theme.muted, theme.ink))
        for name, known in by_name.items():
            ours = name == OURS
            colour = theme.blue if ours else next(colours)
            sizes, medians = zip(*((size, times.median) for size, times in known), strict=True)
            lows, highs = zip(*(times.spread for _, times in known), strict=True)
            axes.plot(sizes, medians, color=colour, marker="o", markersize=3.5, label=name, zorder=3 if ours else 2)
            axes.fill_between(sizes, lows, highs, color=colour, alpha=0.2, linewidth=0)
        floors = [(size, result.floor.seconds) for size, result in points if result.floor is not None]
        if floors:
            axes.plot(*zip(*floors, strict=True), color=theme.muted, linestyle=":", linewidth=1.3, label="floor")
        low, high = axes.get_ylim()
        rows = len(axes.get_legend_handles_labels()[1])
        axes.set_ylim(low, high * (high / low) ** (0.06 * rows))
        axes.legend(loc="upper left", frameon=False, fontsize=7.5, labelspacing=0.25, borderaxespad=0.2)
        axes.set_title(curve.title, loc="left", fontsize=9)
        axes.set_xlabel(LABELS[axis])
        axes.set_xticks([size for size, _ in points])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: compact(size)))
        axes.yaxis.set_major_locator(LogLocator(numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value).replace(".00", "")))
        axes.tick_params(length=3)
        axes.tick_params(which="minor", length=0)
    return figure
