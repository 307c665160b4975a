"""The figures of a run's report.

Each function takes the run's tables (pandas DataFrames with the run folder's column names) and returns a matplotlib
Figure; call it, and ``saved``, inside ``with style(theme)``. Plotting areas have the same left and right edge in every
figure, so that steps line up down a page. Rows with NaN leave a gap. Colours come from a ``Theme`` and tell apart under
the common colour-vision deficiencies.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, Locator, MaxNLocator, NullLocator, PercentFormatter

from grokcurv.report.measures import Panel

WIDE, NARROW = 8.0, 4.75  # inches of a figure in a window and on a telephone, its type being as large
LEFT, RIGHT = 0.76, 1.24  # inches beside the panels; end labels stand to the right
LABEL_HEIGHT = 0.15  # inches a line of an end label
DECADES_BELOW = 2.5  # how far below the lowest defect the noise floor may pull the axis
STYLES = ("-", "--", ":", "-.")
DENSE = 4000  # points from which on a curve is a picture within the drawing: nobody could zoom into it
ROOM = 0.9  # inches that words between two marks take
MOST_DECADES = 7  # labelled on an axis, about


@dataclass(frozen=True)
class Theme:
    """Colours (hex): of text, rules and background, and of what is drawn."""

    ink: str
    muted: str
    rule: str
    paper: str
    blue: str
    orange: str
    green: str
    purple: str

    def look(self, index: int) -> dict[str, str]:
        """Colour and style of the line of this number: four colours, and then the same in another style."""
        colours = (self.blue, self.orange, self.green, self.purple)
        turn, place = divmod(index, len(colours))
        return {"color": colours[place], "linestyle": STYLES[turn % len(STYLES)]}


LIGHT = Theme("#1f2328", "#656d76", "#e4e7eb", "#ffffff", "#0072b2", "#d55e00", "#008f68", "#b0558a")
DARK = Theme("#e6e8eb", "#9aa4af", "#2b3138", "#14171a", "#56b4e9", "#f28e4b", "#2fc79b", "#d993bd")


def style(theme: Theme, width: float = WIDE) -> AbstractContextManager[None]:
    """Inside this context figures are drawn, and must be saved: so wide, in the theme's colours, the report's type."""
    ink = dict.fromkeys(["axes.labelcolor", "text.color", "xtick.labelcolor", "ytick.labelcolor"], theme.ink)
    muted = dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], theme.muted)
    colours = {**ink, **muted, "axes.facecolor": theme.paper, "grid.color": theme.rule}
    wanted: dict[Any, Any] = {**colours, "figure.figsize": (width, width)}
    return matplotlib.rc_context(wanted, Path(__file__).with_name("report.mplstyle"))


def page_width() -> float:
    """Of the figures of the style at work, in inches."""
    return float(matplotlib.rcParams["figure.figsize"][0])


def grokking(
    metrics: pd.DataFrame, curvature: pd.DataFrame, theme: Theme, *, onset: int | None, grok: int | None
) -> Figure:
    """Accuracy and defect over the same steps, with the onset of the defect and the grok step marked.

    An empty table's panel is left out; at least one must have rows.
    """
    heights = [1.7] * (not metrics.empty) + [2.7] * (not curvature.empty)
    figure, panels = _panels(heights, metrics, curvature)
    if not metrics.empty:
        _accuracy(panels[0], metrics, theme)
    if not curvature.empty:
        _defect(panels[-1], curvature, theme)
    inch = panels[0].get_xlim()[1] / (panels[0].get_position().width * page_width())  # steps in an inch
    if grok is not None:
        _mark(panels, panels[0], grok, f"grok {grok:,}", 0.1, theme.green)
    if onset is not None:
        beside = grok is not None and 0 < grok - onset < ROOM * inch < onset
        _mark(panels, panels[-1], onset, f"onset {onset:,}", 0.93, theme.blue, left=beside)
    if grok is not None and onset is not None:
        for axes in panels:
            axes.axvspan(*sorted((onset, grok)), color=theme.blue, alpha=0.06, linewidth=0, zorder=0)
        if abs(grok - onset) > ROOM * inch:
            middle, lead = (onset + grok) / 2, f"{grok - onset:,} steps"
            across = panels[0].get_xaxis_transform()
            panels[0].text(middle, 0.5, lead, transform=across, ha="center", va="center", color=theme.muted)
    return figure


def pc1(history: pd.DataFrame, theme: Theme) -> Figure:
    """Share of the trajectory's variance on its first principal component, by matrix, one panel a layer."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name in dict.fromkeys(history["matrix"]):
        group, label = matrix_label(name)
        groups.setdefault(group, []).append((name, label))
    figure, panels = _panels([1.75] * len(groups), history)
    for axes, (group, members) in zip(panels, groups.items(), strict=True):
        axes.set_ylim(0, 103)
        axes.yaxis.set_major_formatter(PercentFormatter(100, decimals=0))
        axes.set_ylabel(f"PC1, {group}" if group else "PC1")
        ends = []
        for index, (name, label) in enumerate(members):
            rows = history[history["matrix"] == name].dropna(subset="pc1_percent")
            ends.append(_line(axes, rows, "pc1_percent", _end_label(label), **theme.look(index)))
        _label_ends(axes, ends)
    return figure


def geometry(curvature: pd.DataFrame, theme: Theme) -> Figure:
    """Where the commutator points: its share on the execution subspace against chance, and its share outside."""
    figure, (top, bottom) = _panels([2.4, 1.2], curvature)
    top.set_ylabel("share inside / chance")
    top.axhline(1, color=theme.ink, linewidth=0.9)
    ends = [
        _line(top, curvature, "exec_random_ratio", "against all\nparameters", color=theme.blue),
        _line(top, curvature, "exec_matched_ratio", "against its\nsupport", color=theme.orange),
        (1.0, "chance", theme.ink),
    ]
    top.set_ylim(bottom=0)
    top.set_ylim(top=max(top.get_ylim()[1], 1.5))
    _label_ends(top, ends)
    bottom.set_ylim(0, 1.08)
    bottom.set_ylabel(r"$\rho$")
    end = _line(bottom, curvature, "rho", r"$\rho$", color=theme.purple)
    _label_ends(bottom, [end and (end[0], rf"$\rho$ = {end[0]:.4f}", end[2])])
    return figure


def fourier(metrics: pd.DataFrame, theme: Theme, *, grok: int | None) -> Figure:
    """Accuracy, and below it the shares of the embedding and of the logits on the key frequencies."""
    figure, panels = _panels([1.3, 1.9], metrics)
    _accuracy(panels[0], metrics, theme)
    fractions(panels[1])
    panels[1].set_ylabel("share of energy")
    _lines(panels[1], metrics, fourier_embedding=("embedding", theme.blue), fourier_logits=("logits", theme.orange))
    if grok is not None:
        _mark(panels, panels[1], grok, f"grok {grok:,}", 0.07, theme.green)
    return figure


def dynamics(metrics: pd.DataFrame, curvature: pd.DataFrame, theme: Theme) -> Figure:
    """Losses, and the norms of the gradient and of the bracket, on logarithmic axes."""
    norms = _has(curvature, "grad_norm") or _has(curvature, "bracket_norm")
    figure, panels = _panels([2.0, 2.0] if norms else [2.0], metrics, curvature)
    log_scale(panels[0])
    panels[0].set_ylabel("loss (nats)")
    _lines(panels[0], metrics, train_loss=("train", theme.muted), test_loss=("test", theme.green))
    if norms:
        log_scale(panels[1])
        panels[1].set_ylabel("norm")
        _lines(panels[1], curvature, grad_norm=("gradient", theme.blue), bracket_norm=("bracket", theme.purple))
    return figure


def panels_of(curvature: pd.DataFrame, panels: Sequence[Panel], theme: Theme) -> Figure:
    """Panels of a measure, each with its lines over the steps."""
    figure, stacked = _panels([2.0 if panel is panels[0] else 1.3 for panel in panels], curvature)
    for axes, panel in zip(stacked, panels, strict=True):
        axes.set_ylabel(panel.ylabel)
        if panel.log:
            log_scale(axes)
        if math.isfinite(panel.level):
            axes.axhline(panel.level, color=theme.ink, linewidth=0.9)
        looks = {column: theme.look(index) for index, column in enumerate(panel.columns)}
        _label_ends(axes, [_line(axes, curvature, column, panel.columns[column], **looks[column]) for column in looks])
        if panel.log and _has(curvature, panel.floor):
            bottom = axes.get_ylim()[0]
            axes.fill_between(
                curvature["step"], bottom, curvature[panel.floor], color=theme.muted, alpha=0.3, linewidth=0
            )
            axes.set_ylim(bottom=bottom)
    return figure


def matrix_label(name: str) -> tuple[str, str]:
    """(layer, matrix) of a parameter's name: W_Q, W_K, W_V, W_O of attention in a numbered layer, else ("", name).

    >>> matrix_label("encoder.layers.1.self_attn.q_proj_weight")
    ('layer 1', 'W_Q')
    """
    found = re.fullmatch(r"(?:.*\.)?(\d+)\..*?(q|k|v|o|out)_proj[._]weight", name)
    return (f"layer {found[1]}", f"W_{found[2][0].upper()}") if found else ("", name)


def spread(middles: list[float], heights: list[float]) -> list[float]:
    """Move labels apart: the middles, ascending, of boxes of these heights, none of which overlaps another.

    Their places are the nearest to the ``middles`` that were wanted, by least squares.
    """
    from scipy.optimize import isotonic_regression

    gaps = [(low + high) / 2 for low, high in pairwise(heights)]
    offsets = np.cumsum([0.0, *gaps])[: len(middles)]
    # Less the offsets the places need only ascend.
    places: list[float] = (isotonic_regression(np.subtract(middles, offsets)).x + offsets).tolist()
    return places


def blank(height: float) -> Figure:
    """An empty figure of the pages' width; ``height`` in inches."""
    figure = Figure(figsize=(page_width(), height))
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, place: tuple[float, float, float, float], sharex: Axes | None = None) -> Axes:
    """Axes at (left, bottom, width, height) in inches."""
    left, bottom, width, height = place
    across, total = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / total, width / across, height / total), sharex=sharex)


def stack(
    heights: Sequence[float], *, left: float, right: float, top: float, between: float
) -> tuple[Figure, list[Axes]]:
    """Panels one above the other over one axis of whole numbers, which is labelled below the last; all in inches."""
    bottom = 0.5
    total = top + bottom + sum(heights) + between * (len(heights) - 1)
    figure = blank(total)
    across = page_width()
    edges = {"left": left / across, "right": 1 - right / across, "bottom": bottom / total, "top": 1 - top / total}
    grid = {**edges, "hspace": between / fmean(heights), "height_ratios": heights}
    panels: list[Axes] = list(figure.subplots(len(heights), sharex=True, squeeze=False, gridspec_kw=grid)[:, 0])
    for axes in panels:
        step_ticks(axes, 8)
    return figure, panels


def legend(
    figure: Figure, items: Iterable[tuple[str, Any]], place: tuple[float, float], columns: int, **look: Any
) -> Legend:
    """What is drawn, by its label, at a place in inches from the upper left corner."""
    labels, handles = zip(*items, strict=True)
    anchor = (place[0] / figure.get_figwidth(), 1 - place[1] / figure.get_figheight())
    look |= {"bbox_to_anchor": anchor, "ncols": columns, "frameon": False, "borderaxespad": 0}
    written: Legend = figure.legend(handles, labels, loc="upper left", **look)
    return written


def saved(figure: Figure, theme: Theme, kind: str) -> bytes:
    """The figure as a file: ``svg``, or ``png`` of 200 dots an inch."""
    buffer = io.BytesIO()
    nameless = {"png": {"Software": None}, "svg": {"Creator": None, "Date": None}}[kind]
    figure.savefig(buffer, format=kind, dpi=200, facecolor=theme.paper, metadata=nameless)
    return buffer.getvalue()


End = tuple[float, str, str]  # height of a line's last point (data units), its label, its colour


def _panels(heights: list[float], *tables: pd.DataFrame) -> tuple[Figure, list[Axes]]:
    """Panels of the given heights (inches), one above the other, over all the steps of the tables."""
    figure, panels = stack(heights, left=LEFT, right=RIGHT, top=0.12, between=0.22)
    last = max((float(table["step"].max()) for table in tables if len(table)), default=0)
    panels[0].set_xlim(0, max(last, 1) * 1.01)
    panels[-1].set_xlabel("training step")
    figure.align_ylabels(panels)
    return figure, panels


def _accuracy(axes: Axes, metrics: pd.DataFrame, theme: Theme) -> None:
    fractions(axes)
    axes.set_ylabel("accuracy")
    _lines(axes, metrics, train_acc=("train", theme.muted), test_acc=("test", theme.green))


def _defect(axes: Axes, curvature: pd.DataFrame, theme: Theme) -> None:
    """Median defect with its quartiles and noise floor, brackets marked, beside the float32 formula."""
    axes.set_ylabel("defect D")
    log_scale(axes)
    step = curvature["step"]
    ends = [_line(axes, curvature, "reference_median", "float32\nformula", color=theme.orange, linewidth=1.1)]
    band: dict[str, Any] = {"linewidth": 0, "rasterized": len(step) > DENSE}
    axes.fill_between(step, curvature["defect_p25"], curvature["defect_p75"], color=theme.blue, alpha=0.25, **band)
    ends.append(_line(axes, curvature, "defect_median", "defect", color=theme.blue))
    if _has(curvature, "noise_floor"):
        lowest = _lowest(curvature, "defect_p25", "reference_median")
        bottom = min(lowest, max(_lowest(curvature, "noise_floor"), lowest / 10**DECADES_BELOW)) / 2
        axes.set_ylim(bottom=bottom)
        axes.fill_between(step, bottom, curvature["noise_floor"], color=theme.muted, alpha=0.3, **band)
        floor = curvature["noise_floor"].dropna().iloc[-1]
        ends.append((float(floor), "noise floor", theme.muted))
    rows = curvature[curvature["method"] == "bracket"]
    if _has(rows, "defect_median"):
        axes.plot(
            rows["step"],
            rows["defect_median"],
            "o",
            color=theme.blue,
            markerfacecolor=theme.paper,
            markersize=4.5,
            label="measured by the exact bracket",
        )
        axes.legend(loc="best", framealpha=0.8, facecolor=theme.paper, edgecolor="none", handletextpad=0.3)
    _label_ends(axes, ends)


def _mark(
    panels: list[Axes], where: Axes, step: int, text: str, height: float, colour: str, left: bool = False
) -> None:
    """A dashed line at a step through all panels, named in one of them on the side with room."""
    for axes in panels:
        axes.axvline(step, color=colour, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    left = left or step > 0.8 * where.get_xlim()[1]
    where.annotate(
        text,
        (step, height),
        xycoords=where.get_xaxis_transform(),
        xytext=(-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color=colour,
    )


def _has(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(np.isfinite(table[name].to_numpy(dtype=float)).any())


def _lowest(table: pd.DataFrame, *names: str) -> float:
    """Lowest positive finite value of the columns; 1 when there is none."""
    values = [value for name in names if name in table for value in table[name] if 0 < value < np.inf]
    return float(min(values, default=1.0))


def _lines(axes: Axes, table: pd.DataFrame, **columns: tuple[str, str]) -> None:
    """Draw columns over the steps, each with its label and its colour, and write the labels beside their ends."""
    _label_ends(axes, [_line(axes, table, name, label, color=colour) for name, (label, colour) in columns.items()])


def _line(axes: Axes, table: pd.DataFrame, name: str, label: str, color: str, **style: Any) -> End | None:
    """Draw a column over the steps, if it holds anything, and return its end for ``_label_ends``."""
    if not _has(table, name):
        return None
    drawn = plot(axes, table["step"], table[name], color=color, **style)
    values = np.asarray(drawn.get_ydata())
    measured = values[np.isfinite(values)]
    return (float(measured[-1]), label, color) if measured.size else None


def plot(axes: Axes, x: Any, y: Any, **style: Any) -> Line2D:
    """Draw numbers as a line with gaps: at NaN, and on a logarithmic axis at what is not positive."""
    values = np.asarray(y, dtype=np.float64)
    if axes.get_yscale() == "log":
        values = np.where(values > 0, values, np.nan)
    marker = "." if np.isfinite(values).sum() < 25 else ""  # a value between two gaps has no line
    (line,) = axes.plot(x, values, **{"marker": marker, "rasterized": len(values) > DENSE, **style})
    return line


def _end_label(label: str) -> str:
    """W_Q with its index lowered; another name without ``.weight``, cut at the left to fit beside the panel."""
    if re.fullmatch("W_[QKVO]", label):
        return f"${label}$"
    name = label.removesuffix(".weight")
    return (name if len(name) <= 16 else "…" + name[-15:]).replace("$", r"\$")


def log_scale(axes: Axes, both: bool = False) -> None:
    """A logarithmic vertical axis, or ``both`` axes, of which three values at least are labelled."""
    axes.set_yscale("log", nonpositive="mask")
    if both:
        axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis) if both else (axes.yaxis,):
        axis.set_major_locator(LogTicks())
        axis.set_major_formatter(LogLabels())
        axis.set_minor_locator(NullLocator())


class LogTicks(Locator):
    """Powers of ten; where there are fewer than three, also round numbers between them, of as few digits as it takes.

    (Matplotlib's own locator is content with one.)
    """

    def __call__(self) -> list[float]:
        assert self.axis is not None
        return self.tick_values(*self.axis.get_view_interval())

    def tick_values(self, vmin: float, vmax: float) -> list[float]:
        """Powers of ten; where the axis has fewer than three, the roundest numbers of which it has three."""
        low, high = sorted((vmin, vmax))
        if not 0 < low < high < np.inf:
            return [value for value in (low, high) if 0 < value < np.inf]
        first, last = np.ceil(np.log10(low) - 1e-9), np.floor(np.log10(high) + 1e-9)
        if last - first >= 2:
            apart = max(1, min(round((last - first) / (MOST_DECADES - 1)), (last - first) // 2))
            return [float(10.0**power) for power in np.arange(first, last + 1, apart)]
        powers = 10.0 ** np.arange(first - 1, last + 1)[:, None]
        rows = [(powers * digits).ravel() for digits in ((1, 3), (1, 2, 5), np.arange(1, 10))]
        rows += [np.asarray(MaxNLocator(most).tick_values(low, high)) for most in (4, 6, 8)]
        for ticks in rows:
            here = ticks[(ticks >= low * (1 - 1e-9)) & (ticks <= high * (1 + 1e-9))]
            if len(here) >= 3:
                break
        return [float(tick) for tick in here]


class LogLabels(Formatter):
    """Powers of ten as such where all ticks are, and numbers otherwise."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        """As powers of ten if all are, else with as many digits as tell them apart."""
        powers = np.log10(values)
        if len(powers) > 2 and np.allclose(powers, np.round(powers), atol=1e-6):
            return [f"$10^{{{round(power)}}}$" for power in powers]
        near = 0.01 * np.diff(values).min(initial=max(values, default=1))
        digits = next((n for n in range(1, 16) if all(abs(float(f"{x:.{n}g}") - x) <= near for x in values)), 16)
        if min(values, default=1) >= 1e-4 and max(values, default=1) < 1e6:
            return [np.format_float_positional(float(f"{value:.{digits}g}"), trim="-") for value in values]
        parts = [f"{value:.{digits - 1}e}".split("e") for value in values]
        return [rf"${mantissa} \times 10^{{{int(power)}}}$" for mantissa, power in parts]


def show_decades(axes: Axes, least: float) -> None:
    """Show two decades, which alone are labelled, where a logarithmic axis spans less than a factor."""
    low, high = axes.get_ylim()
    if high < least * low:
        axes.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high)))


def fractions(axes: Axes) -> None:
    """A vertical axis from 0 to 100 %."""
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def step_ticks(axes: Axes, most: int) -> None:
    """At most so many steps of the horizontal axis are labelled, by round numbers with their thousands separated.

    On a narrow figure fewer.
    """
    most = round(most * (0.5 if page_width() < WIDE else 1))
    axes.xaxis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _label_ends(axes: Axes, ends: Iterable[End | None]) -> None:
    """Write each label beside its line's end, moved apart where they would overlap."""
    axes.get_ylim()  # settles the axis, which autoscales lazily
    if axes.get_yscale() == "log":
        show_decades(axes, 10)
    labels = []
    for height, text, colour in filter(None, ends):
        _, y = axes.transAxes.inverted().transform(axes.transData.transform((0, height)))
        labels.append((float(np.clip(y, 0, 1)), text, colour))
    labels.sort(key=lambda label: label[0])
    panel = axes.bbox.height / axes.figure.dpi  # inches
    heights = [LABEL_HEIGHT / panel * (1 + text.count("\n")) for _, text, _ in labels]
    for y, (_, text, colour) in zip(spread([y for y, _, _ in labels], heights), labels, strict=True):
        axes.text(1.012, y, text, color=colour, transform=axes.transAxes, va="center", linespacing=1.05)
