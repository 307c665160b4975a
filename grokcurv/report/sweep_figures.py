"""The figures of a sweep's report: what each setting came to, and the records of all runs in one place.

As in ``figures``, call a function, and ``saved``, inside ``with style(theme)``. Shades run from the paper's colour to
one that stands out from it, so that they keep their order in print and under any colour-vision deficiency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, LogNorm, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import NDArray

from grokcurv.analysis import Predictors
from grokcurv.report import figures
from grokcurv.report.figures import LIGHT, NARROW, Theme, axes_at, blank, page_width
from grokcurv.report.format import plain, short

Scale = tuple[Colormap, Normalize]
"""Shades, and what they span."""

CHARACTER = 0.076  # inches, about the mean of the report's type at 9 points
SMALL_CHARACTER = 0.07  # at 8 points
BOLD_CHARACTER = 0.086  # bold, at 9 points
END = 0.06  # of an axis: labels so near to its end do not reach beyond it
FACETS = 12  # as many small panels at most
SIGNALS = 30  # as many columns as signals at most: the best
LINES = 300  # as many lines in one at most: more tell no more, and take long


@dataclass(frozen=True)
class Quantity:
    """What one panel of the phase diagram shows: a column of ``sweep_settings``, and how it looks."""

    column: str
    title: str
    colour: str  # a field of Theme
    says: Callable[[pd.Series], str]
    log: bool = False


QUANTITIES = (
    Quantity("grok_fraction", "grok fraction", "green", lambda row: f"{row['grokked']:.0f}/{row['finished']:.0f}"),
    Quantity("grok_step", "grok step", "green", lambda row: f"{row['grok_step']:,.0f}"),
    Quantity("max_defect", "highest reliable defect", "blue", lambda row: short(row["max_defect"]), log=True),
    Quantity("lead_time", "lead, steps", "purple", lambda row: f"{row['lead_time']:,.0f}"),
)


def arrange(runs: pd.DataFrame, fields: Sequence[str]) -> dict[str, list[Any]]:
    """The fields with their values: those of words before those of numbers; words as planned, numbers ascending."""
    values = {field: list(pd.unique(runs[field])) for field in fields}
    words = {field: there for field, there in values.items() if not _numeric(there)}
    return words | {field: sorted(values[field]) for field in fields if field not in words}


def phase(settings: pd.DataFrame, results: pd.DataFrame, fields: dict[str, list[Any]], theme: Theme) -> Figure:
    """Grok fraction, grok step, defect and lead by setting: maps over two fields or more, dots over one.

    ``settings`` and ``results`` are those of ``grokcurv.analysis``, ``fields`` is what ``arrange`` returned: not empty.
    Fields after the second make blocks of rows. A quantity that no setting has is left out, the fraction never is.
    """
    shown = [quantity for quantity in QUANTITIES if settings[quantity.column].notna().any()] or [QUANTITIES[0]]
    return (_maps if len(fields) > 1 else _dots)(shown, settings, results, fields, theme)


def trajectories(
    runs: pd.DataFrame,
    metrics: pd.DataFrame,
    curvature: pd.DataFrame,
    fields: dict[str, list[Any]],
    theme: Theme,
    *,
    together: bool = False,
) -> Figure:
    """Test accuracy and reliable defect of every run over the steps: a panel by one field, a colour by the next.

    All in one panel if they are to be ``together``, with a colour by the first field.

    An empty table's panels are left out. One at least must have rows, and what has rows a value to draw.
    """
    names = list(fields)
    words = bool(names) and not _numeric(fields[names[0]])
    split = names and not together and (words or len(names) > 1) and len(fields[names[0]]) <= FACETS
    facet = names.pop(0) if split else None
    hue = names[0] if names else None
    values: list[Any] = fields[facet] if facet else [None]
    kinds = [  # a table, its column, the axis' label, a colour where none tells settings apart, the height
        (metrics, "test_acc", "test accuracy", theme.green, 1.05 if facet else 1.8),
        (curvature, "defect_median", "defect D", theme.blue, 1.25 if facet else 2.6),
    ]
    kinds = [kind for kind in kinds if not kind[0].empty]
    columns = 2 if len(values) == 4 or page_width() == NARROW else 3
    columns = min(columns, len(values))
    left, right, across, down = 0.76, 0.12, 0.2, 0.1
    top, title, ticks, bottom = 0.27 if hue else 0.1, 0.3 if facet else 0.1, 0.3, 0.22
    width = (page_width() - left - right - across * (columns - 1)) / columns
    block = title + sum(height + down for *_, height in kinds) - down + ticks
    total = top + math.ceil(len(values) / columns) * block + bottom
    figure = blank(total)

    colours = _colours(fields[hue], theme) if hue else {}
    panels: list[list[Axes]] = []
    for index, value in enumerate(values):
        row, column = divmod(index, columns)
        edge = total - top - row * block - title
        mine = runs if facet is None else runs[runs[facet] == value]
        panel: list[Axes] = []
        panels.append(panel)
        for table, name, label, colour, height in kinds:
            place = (left + column * (width + across), edge - height, width, height)
            axes = axes_at(figure, place, sharex=next(chain(*panels), None))
            panel.append(axes)
            edge -= height + down
            _overlay(axes, table, name, mine.index, mine[hue].map(colours) if hue else colour)
            if name == "test_acc":
                figures.fractions(axes)
                axes.set_yticks([0, 0.5, 1])
            else:
                _defect_axis(axes, table)
            if column:
                axes.tick_params(axis="y", labelleft=False)
            else:
                axes.set_ylabel(label)
                axes.yaxis.set_label_coords(-0.58 / width, 0.5)
        if facet:
            heading = value if isinstance(value, str) else f"{facet} {plain(value)}"
            most = int(width / BOLD_CHARACTER)
            if len(heading) > most:  # what tells values apart is more often at their end
                heading = "…" + heading[1 - most :]
            heading = _label(heading)
            panel[0].set_title(heading, loc="left", fontsize=9, fontweight="bold", pad=4)
    _steps(panels, metrics, curvature)
    figure.text(
        (left + page_width() - right) / 2 / page_width(), 0.07 / total, "training step", ha="center", va="bottom"
    )
    if hue:
        _legend(figure, hue, colours, left, theme)
    return figure


def signals(found: Predictors, theme: Theme) -> Figure:
    """Columns as signals, the best above: how well their scores tell runs that grok, and how long before they do."""
    table = found.table[found.table["auroc"].notna()].head(SIGNALS)
    arrows = {"up": " ↑", "down": " ↓", "mixed": " ↕"}
    labels = [_label(row["column"]) + arrows.get(row["direction"], "") for _, row in table.iterrows()]
    left, right, between, top, bottom, high = 0.2 + CHARACTER * max(map(len, labels)), 0.14, 0.3, 0.3, 0.5, 0.21
    width = (page_width() - left - right - between) / 2
    tall = max(high * len(table) + 0.1, 1.8)
    figure = blank(top + tall + bottom)
    axes, leads = (axes_at(figure, (left + k * (width + between), bottom, width, tall)) for k in range(2))
    leads.sharey(axes)
    at = np.arange(len(table))
    axes.set(xlim=(-0.04, 1.04), ylim=(len(table) - 0.25, -0.75))
    axes.set_yticks(at, labels)
    axes.set_xticks([0, 0.5, 1] if page_width() == NARROW else [0, 0.25, 0.5, 0.75, 1])
    axes.axvline(0.5, color=theme.ink, linewidth=0.9, zorder=1)
    colours = [theme.muted if reference else theme.blue for reference in table["reference"]]
    axes.hlines(at, table["auroc_low"], table["auroc_high"], color=colours, alpha=0.45, linewidth=2.5)
    axes.scatter(table["auroc"], at, color=colours, s=30, zorder=3)
    axes.set_title("AUROC", loc="left", fontsize=9, fontweight="bold", pad=5)
    axes.set_xlabel("chance is 0.5", color=theme.muted)
    alarms = found.alarms.dropna(subset="lead")
    places = alarms["column"].map(dict(zip(table["column"], at, strict=True)))
    shades = [colours[int(place)] if place >= 0 else theme.muted for place in places]
    look: dict[str, Any] = {"alpha": 0.45, "linewidths": 0, "rasterized": len(alarms) > figures.DENSE}
    leads.scatter(alarms["lead"], places, color=shades, s=13, **look)
    leads.scatter(table["lead"], at, color=colours, s=30, zorder=3)
    leads.set_xlim(left=0, right=max(1.0, 1.04 * alarms["lead"][places.notna()].max()) if places.notna().any() else 1)
    leads.tick_params(axis="y", labelleft=False)
    figures.step_ticks(leads, 5)
    leads.set_title("lead", loc="left", fontsize=9, fontweight="bold", pad=5)
    leads.set_xlabel("steps", color=theme.muted)
    for panel in (axes, leads):
        panel.tick_params(axis="y", length=0)
    return figure


def _maps(
    shown: list[Quantity], settings: pd.DataFrame, _: pd.DataFrame, fields: dict[str, list[Any]], theme: Theme
) -> Figure:
    """Rows by the first field, columns by the second, a block of rows for every combination of the others."""
    down, across, *rest = fields
    rows, columns = fields[down], fields[across]
    blocks: list[tuple[Any, pd.DataFrame]] = (
        list(settings.groupby(rest, sort=False, dropna=False)) if rest else [((), settings)]
    )
    blocks.sort(key=lambda block: [fields[name].index(value) for name, value in zip(rest, block[0], strict=True)])
    count = len(blocks) * len(rows)
    head = 0.28 if rest else 0.0  # inches a block's heading takes
    high = min(0.3, max(0.05, 16 / count), 60 / count)  # inches a row
    tall = len(blocks) * head + count * high
    stacked = count > 30  # four narrow maps abreast rather than two wide ones
    abreast = min(len(shown), (4 if stacked else 2) // (1 + (page_width() == NARROW)))

    row_labels, column_labels = list(map(_label, rows)), list(map(_label, columns))
    left = 0.2 + CHARACTER * max(map(len, [*row_labels, down, across]))
    between, right, title = 0.3, 0.08, 0.5 if stacked else 0.3
    width = (page_width() - left - right - between * (abreast - 1)) / abreast
    wide = width / len(columns)
    turned = SMALL_CHARACTER * (max(map(len, column_labels)) + 1) > wide
    below = 0.14 + SMALL_CHARACTER * max(map(len, column_labels)) if turned else 0.24
    lines = math.ceil(len(shown) / abreast)
    panel = title + tall + below
    total = 0.08 + lines * panel + 0.15 * (lines - 1)
    figure = blank(total)

    for index, quantity in enumerate(shown):
        line, place = divmod(index, abreast)
        edge = total - 0.08 - line * (panel + 0.15) - title
        axes = axes_at(figure, (left + place * (width + between), edge - tall, width, tall))
        axes.set_axis_off()
        axes.set(xlim=(0, len(columns)), ylim=(tall / high, 0))
        scale = _scale(quantity, settings, theme)
        _heading(axes, quantity, scale, stacked, theme)
        said = pd.Series([_says(quantity, row) for _, row in settings.iterrows()], index=settings.index)
        fits = high >= 0.15 and SMALL_CHARACTER * said.map(len).max() + 0.06 <= wide
        for number, (key, block) in enumerate(blocks):
            start = number * len(rows) + (number + 1) * head / high
            if rest:
                words = ", ".join(f"{name} {_label(value)}" for name, value in zip(rest, key, strict=True))
                axes.text(0, start - 0.05 / high, words, va="bottom", color=theme.muted, fontsize=8)
            x, y = block[across].map(columns.index), start + block[down].map(rows.index)
            cells = block.assign(x=x, y=y, value=block[quantity.column], said=said if fits else "")
            _cells(axes, cells, (wide, high), scale, theme)
            every = math.ceil(0.15 / high)  # labels that would overlap are left out
            for row, label in list(enumerate(row_labels if place == 0 else ()))[::every]:
                axes.text(-0.09 / wide, start + row + 0.5, label, ha="right", va="center_baseline")
        every = math.ceil(0.13 / wide) if turned else 1
        foot = tall / high + 0.07 / high
        for column, label in list(enumerate(column_labels))[::every]:
            axes.text(column + 0.5, foot, label, ha="center", va="top", fontsize=8, rotation=90 * turned)
        if place == 0:
            axes.text(-0.09 / wide, -0.09 / high, down, ha="right", va="bottom", color=theme.muted)
            axes.text(-0.09 / wide, foot, across, ha="right", va="top", color=theme.muted)
    return figure


def _cells(axes: Axes, cells: pd.DataFrame, size: tuple[float, float], scale: Scale, theme: Theme) -> None:
    """A cell a setting at ``x`` and ``y``, coloured by its ``value``, hatched where runs finished without one."""
    (wide, high), (shades, norm) = size, scale
    gap = np.array((0.01 / wide, 0.01 / high))  # half of the paper between cells, 0.02 inches
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * (1 - 2 * gap) + gap
    places = cells[["x", "y"]].to_numpy(float)[:, None] + corners
    values = cells["value"].to_numpy(float)
    drawn, finished = np.isfinite(values), cells["finished"].to_numpy(float) > 0
    fills = shades(norm(values[drawn]))
    for which, look in (
        (drawn, {"facecolors": fills, "linewidths": 0}),
        (~drawn & finished, {"facecolor": theme.paper, "edgecolor": theme.rule, "linewidths": 0, "hatch": "/////"}),
        (~drawn & ~finished, {"facecolor": "none", "edgecolor": theme.rule, "linewidths": 0.8}),
    ):
        if which.any():
            axes.add_collection(PolyCollection(places[which], **look), autolim=False)
    colours = np.full(len(cells), theme.muted, dtype=object)
    colours[drawn] = [_ink_on(fill) for fill in fills]
    for x, y, text, colour in zip(cells["x"], cells["y"], cells["said"], colours, strict=True):
        if text:
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center_baseline", fontsize=8, color=colour)


def _heading(axes: Axes, quantity: Quantity, scale: Scale, stacked: bool, theme: Theme) -> None:
    """A map's title, and the scale of its colours at the right end of the same line, or ``stacked`` below it."""
    (shades, norm), figure = scale, axes.get_figure(root=True)
    assert figure is not None
    box, (across, total) = axes.get_position(), figure.get_size_inches()
    left, right, y = box.x0 * across, box.x1 * across, box.y1 * total + 0.09
    figure.text(left / across, (y + 0.19 * stacked) / total, quantity.title, va="bottom", fontweight="bold")
    said = "{:.0%}".format if quantity.column == "grok_fraction" else short
    low, high = said(norm.vmin), said(norm.vmax)  # type: ignore[arg-type]
    length, gap = 0.45 if stacked else 0.6, 0.06

    def write(place: float, text: str, side: str) -> float:
        """Writes an end of the scale; returns its width in inches."""
        written = figure.text(place / across, y / total, text, ha=side, va="bottom", fontsize=8, color=theme.muted)
        return float(written.get_window_extent().width / figure.dpi)

    if stacked:
        x = left + write(left, low, "left") + gap
        write(x + length + gap, high, "left")
    else:
        x = right - write(right, high, "right") - gap - length
        write(x - gap, low, "right")
    bar = figure.add_axes((x / across, (y + 0.02) / total, length / across, 0.09 / total))
    bar.set_axis_off()
    bar.imshow(np.linspace(0, 1, 128)[None], aspect="auto", cmap=shades)


def _dots(
    shown: list[Quantity], settings: pd.DataFrame, results: pd.DataFrame, fields: dict[str, list[Any]], theme: Theme
) -> Figure:
    """Over one field: every run a small dot, the median a large one, a line from the lowest to the highest."""
    ((field, values),) = fields.items()
    labels = list(map(_label, values))
    left, right, top, title, between, height = 0.72, 0.1, 0.05, 0.3, 0.75, 1.7
    abreast = min(1 if page_width() == NARROW else 2, len(shown))
    width = (page_width() - left - right - between * (abreast - 1)) / abreast
    turned = SMALL_CHARACTER * (max(map(len, labels)) + 1) > width / len(values)
    below = 0.2 + 0.6 * SMALL_CHARACTER * max(map(len, labels)) if turned else 0.3
    lines = math.ceil(len(shown) / abreast)
    total = top + lines * (title + height + below) + 0.22
    figure = blank(total)
    places = {value: place for place, value in enumerate(values)}
    settings = settings.assign(at=settings[field].map(places)).sort_values("at")
    at = settings["at"]
    finished = results[results["status"] == "finished"]
    for index, quantity in enumerate(shown):
        line, column = divmod(index, abreast)
        edge = total - top - line * (title + height + below) - title
        axes = axes_at(figure, (left + column * (width + between), edge - height, width, height))
        axes.set_title(quantity.title, loc="left", fontsize=9, fontweight="bold", pad=5)
        axes.set_xlim(-0.5, len(values) - 0.5)
        axes.set_xticks(range(len(values)), labels, fontsize=8)
        for label in axes.get_xticklabels() if turned else ():
            label.set(rotation=35, ha="right", rotation_mode="anchor")
        axes.grid(axis="x", visible=False)
        if index + abreast >= len(shown):
            axes.set_xlabel(field, color=theme.muted)
        colour, middle = getattr(theme, quantity.colour), settings[quantity.column]
        if quantity.log:
            figures.log_scale(axes)
        if quantity.column == "grok_fraction":
            axes.vlines(at, settings["grok_low"], settings["grok_high"], color=colour, alpha=0.35, linewidth=2.5)
            figures.fractions(axes)
            axes.set_ylim(-0.04, 1.04)
        else:
            groups = finished.groupby(field)[quantity.column]
            low, high = (settings[field].map(ends) for ends in (groups.min(), groups.max()))
            axes.vlines(at, low, high, color=colour, alpha=0.35, linewidth=2.5)
            dots = {"color": colour, "alpha": 0.6, "markersize": 4, "rasterized": len(finished) > figures.DENSE}
            axes.plot(finished[field].map(places), finished[quantity.column], ".", **dots)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            for _, row in settings[middle.isna() & (settings["finished"] > 0)].iterrows():
                text, where = _says(quantity, row), axes.get_xaxis_transform()
                axes.text(row["at"], 0.04, text, transform=where, ha="center", color=theme.muted, fontsize=8)
        style = "o-" if _numeric(values) else "o"
        axes.plot(at, middle, style, color=colour, markersize=5.5, linewidth=1.1)
        if quantity.log:
            figures.show_decades(axes, 100)
        elif axes.get_ylim()[0] > 0:
            axes.set_ylim(bottom=0)
    return figure


def _label(value: Any) -> str:
    """A setting's value as matplotlib draws it: a pair of dollar signs would mean mathematics."""
    return plain(value).replace("$", r"\$")


def _numeric(values: list[Any]) -> bool:
    return all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def _says(quantity: Quantity, row: pd.Series) -> str:
    """A cell's text: the value, or why there is none."""
    if np.isfinite(row[quantity.column]):
        return quantity.says(row)
    if not row["finished"]:
        return ""
    return "none" if row["grokked"] or quantity.column == "max_defect" else "never"


def _scale(quantity: Quantity, settings: pd.DataFrame, theme: Theme) -> Scale:
    """A quantity's shades and what they span; below zero, where a lead has fallen behind, the other way in orange."""
    values = settings[quantity.column].to_numpy(dtype=float)
    values = values[np.isfinite(values) & ((values > 0) | (not quantity.log))]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    colour = getattr(theme, quantity.colour)
    if quantity.column == "grok_fraction":
        return _shades(theme, colour), Normalize(0, 1)
    if quantity.log:
        return _shades(theme, colour), LogNorm(low, high if high > low else 2 * low)
    if low < 0:
        reach = max(-low, high)
        below, above = _shades(theme, theme.orange), _shades(theme, colour)
        both = [*below(np.linspace(1, 0, 64)), *above(np.linspace(0, 1, 64))]
        return LinearSegmentedColormap.from_list("lead", both), Normalize(-reach, reach)
    return _shades(theme, colour), Normalize(min(low, 0.0) if quantity.column == "lead_time" else low, high or 1.0)


def _shades(theme: Theme, colour: str) -> Colormap:
    """From nearly the paper's colour over ``colour`` towards the ink's."""
    paper, middle, ink = (np.array(to_rgb(name)) for name in (theme.paper, colour, theme.ink))
    ends = (0.86 * paper + 0.14 * middle, 0.4 * middle + 0.6 * ink)
    return LinearSegmentedColormap.from_list("shades", [ends[0], middle, ends[1]])


def _colours(values: list[Any], theme: Theme) -> dict[Any, Any]:
    """A colour for each value: the theme's own for a few words, in order from blue over purple to orange for others."""
    if not _numeric(values) and len(values) <= 4:
        return {value: theme.look(index)["color"] for index, value in enumerate(values)}
    ramp = LinearSegmentedColormap.from_list("ramp", [theme.blue, theme.purple, theme.orange])
    return dict(zip(values, ramp(np.linspace(0, 1, len(values))), strict=True))


def _legend(figure: Figure, field: str, colours: dict[Any, Any], left: float, theme: Theme) -> None:
    """The field's name and its values, or of many values the first, the middle and the last."""
    items = list(colours.items())
    if len(items) > (4 if page_width() == NARROW else 8):
        items = [items[0], items[len(items) // 2], items[-1]]
    drawn = [(_label(value), Line2D([], [], color=colour, linewidth=2.5)) for value, colour in items]
    drawn.insert(0, (field, Line2D([], [], color="none")))
    look = {"handlelength": 1.4, "handletextpad": 0.5, "columnspacing": 1.4}
    written = figures.legend(figure, drawn, (left - 0.4, 0.02), len(drawn), **look)
    written.get_texts()[0].set_color(theme.muted)


def _overlay(axes: Axes, table: pd.DataFrame, name: str, runs: pd.Index, colour: str | pd.Series) -> None:
    """One thin line a run, thinner and fainter the more there are; untrusted defects leave a gap."""
    shuffled = np.random.default_rng(0).permutation(len(runs))  # no setting lies above all the others
    chosen = runs[np.sort(shuffled[:LINES])]
    rows = table[table["run"].isin(chosen)].sort_values(["run", "step"], kind="stable")
    if rows.empty:
        return
    values = rows[name].to_numpy(dtype=float)
    if name == "defect_median":
        values = np.where(rows["reliable"].astype(bool) & (values > 0), values, np.nan)
    points = np.column_stack([rows["step"].to_numpy(dtype=float), values])
    owners = rows["run"].to_numpy()
    starts = np.flatnonzero(owners[1:] != owners[:-1]) + 1
    lines: list[NDArray[np.float64]] = np.split(points, starts)
    colours = np.array([to_rgb(colour if isinstance(colour, str) else colour[own]) for own in owners[[0, *starts]]])
    shuffled = np.random.default_rng(0).permutation(len(lines))
    axes.add_collection(
        LineCollection(
            [lines[index] for index in shuffled],
            colors=colours[shuffled],
            linewidths=1.1 if len(lines) < 50 else 0.7,
            alpha=float(np.clip(8 / len(lines), 0.12, 0.9)),
            capstyle="round",
            rasterized=len(points) > figures.DENSE,
        )
    )


def _defect_axis(axes: Axes, curvature: pd.DataFrame) -> None:
    """Logarithmic, over the reliable defects of all runs and a decade at least."""
    trusted = curvature["defect_median"][curvature["reliable"].astype(bool)]
    low, high = trusted[trusted > 0].min(), trusted[trusted < np.inf].max()
    figures.log_scale(axes)
    axes.set_ylim(low / 1.5, max(high * 1.5, 10 * low))


def _steps(panels: list[list[Axes]], *tables: pd.DataFrame) -> None:
    """The shared axis of steps: logarithmic where that shows more, as runs that grok may end far sooner than others."""
    steps = np.concatenate([table["step"].to_numpy(dtype=float) for table in tables if len(table)])
    first, last = steps[steps > 0].min(initial=np.inf), max(steps.max(), 1)
    axes = panels[0][0]
    axes.set_xlim(0, last * 1.03)
    figures.step_ticks(axes, 4)
    if last >= 20 * first:
        axes.set_xscale("log")
        axes.set_xlim(first, last * 1.03)
        axes.xaxis.set_major_locator(figures.LogTicks())
    for panel in panels:
        for axes in panel:
            axes.tick_params(axis="x", labelbottom=axes is panel[-1])
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_locator(NullLocator())
        _keep_labels_apart(panel[-1])


def _keep_labels_apart(axes: Axes) -> None:
    """Labels at the ends of the axis of steps stay within it, since another panel's may begin there; those that would
    then touch the next one are left out."""
    left, right = axes.transScale.transform([(edge, 1.0) for edge in axes.get_xlim()])[:, 0]
    width = axes.get_position().width * page_width()
    edge = math.inf
    for step, label in reversed(list(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True))):
        place = (axes.transScale.transform((step, 1.0))[0] - left) / (right - left)
        if 0 <= place <= 1:
            side, before = ("left", 0.0) if place < END else ("right", 1.0) if place > 1 - END else ("center", 0.5)
            size = CHARACTER * len(f"{step:,.0f}")
            begin = place * width - before * size
            label.set(horizontalalignment=side, visible=begin + size < edge)
            edge = begin if label.get_visible() else edge


def _ink_on(fill: Any) -> str:
    """The light theme's ink or paper, whichever has the higher contrast (WCAG) to a colour."""

    def luminance(colour: Any) -> float:
        parts = np.array(to_rgb(colour))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722)) + 0.05

    # Contrast is a ratio, so the two are even where the fill is their geometric mean.
    dark = luminance(fill) ** 2 < luminance(LIGHT.ink) * luminance(LIGHT.paper)
    return LIGHT.paper if dark else LIGHT.ink
