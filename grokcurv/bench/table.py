"""The table in print: a row for each peer of a case, its times, and below them how accurate they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from grokcurv.bench.check import Outcome, Result
from grokcurv.bench.timing import Times
from grokcurv.report.format import seconds, significant

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("case, and error of what", "grokcurv", "beside it", "its time, and error", "ratio", "floor", "over floor")

UNITS = {"bytes": (1e6, "MB"), "flops_float32": (1e9, "Gflop"), "flops_float64": (1e9, "Gflop64")}
"""Of each kind of work."""


class Row(NamedTuple):
    """Cells of :data:`COLUMNS`; those on accuracy stand below those on speed, and there may be none."""

    speed: tuple[str, ...]
    accuracy: tuple[str, ...] = ()


def table_rows(results: Sequence[Result]) -> list[Row]:
    """Of all cases; one that was left out has a row that says why."""
    return [row for result in results for row in _rows(result)]


def _rows(result: Result) -> Iterator[Row]:
    if not result.outcomes or result.wrong:
        yield Row((result.case.title, result.problem, *[""] * 5))
        return
    ours, *others = result.outcomes
    # Only the first row of a case has what all of them share.
    left, right = (result.case.title, clock(ours.times)), ("", "")
    if floor := result.floor:
        known = [f"{significant(floor.work[name] / s)} {unit}" for name, (s, unit) in UNITS.items() if floor.work[name]]
        right = f"{', '.join(known)}: {seconds(floor.seconds)}", factor(floor.ratio)
    for other in others:
        name = other.name + (f" ({other.note})" if other.note else "")
        speed = (*left, name, clock(other.times) or other.problem, factor(other.ratio), *right)
        accuracy = () if other.problem else ("; ".join(ours.errors), errors(ours), "", errors(other), "", "", "")
        yield Row(speed, accuracy)
        left = right = ("", "")


def errors(outcome: Outcome) -> str:
    values = outcome.errors.values()
    return "; ".join("none" if math.isnan(value) else f"{value:.1e}" if value else "0" for value in values)


def clock(times: Times | None) -> str:
    """Median, and half the distance between the quartiles in per cent of it."""
    if times is None:
        return ""
    low, high = times.spread
    return f"{seconds(times.median)} ± {50 * (high - low) / times.median:.0f} %"


def factor(ratio: Times | None) -> str:
    return "" if ratio is None else f"{significant(ratio.median)}x"


def in_markdown(rows: Sequence[Row]) -> str:
    """As a table of a Markdown file: below each time, in its cell and in italics, the error."""
    table = [COLUMNS, ("---",) * len(COLUMNS)]
    for speed, accuracy in rows:
        pairs = zip(speed, accuracy or [""] * len(speed), strict=True)
        table.append(tuple(f"{above}<br>*{below}*" if above and below else above for above, below in pairs))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def for_terminal(rows: Sequence[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in (COLUMNS[0], "beside it") else "right")
    for speed, accuracy in rows:
        if speed[0] and table.row_count:  # an empty line between two cases
            table.add_row()
        table.add_row(*map(Text, speed))
        if accuracy:
            table.add_row(*map(Text, accuracy), style="dim")
    return table
