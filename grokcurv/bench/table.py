"""The table in print: a line on speed for each peer of a case, and below it one on accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grokcurv.bench.check import Floor, Outcome, Result
from grokcurv.bench.timing import Times
from grokcurv.report.format import seconds, significant

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("case, and error of what", "grokcurv", "beside it", "its time, and error", "ratio", "floor", "over floor")

UNITS = (("bytes", 1e6, "MB"), ("flops_float32", 1e9, "Gflop"), ("flops_float64", 1e9, "Gflop64"))
"""Of each kind of work."""


@dataclass(frozen=True)
class Line:
    """A line: ``cells`` of :data:`COLUMNS`, about speed or about accuracy."""

    cells: tuple[str, ...]
    accuracy: bool = False
    first: bool = False
    """Of a case."""


def lines(results: Sequence[Result]) -> list[Line]:
    """Of all cases; one that was left out has a line that says why."""
    return [line for result in results for line in _of(result)]


def _of(result: Result) -> Iterator[Line]:
    if not result.outcomes or result.wrong:
        yield Line((result.case.title, result.problem, *[""] * 5), first=True)
        return
    ours, *others = result.outcomes
    # Only the first line of a case has what all of them share.
    left = result.case.title, clock(ours.times)
    right = must(result.floor), factor(result.floor.ratio if result.floor else None)
    for index, outcome in enumerate(others):
        name = outcome.name + (f" ({outcome.note})" if outcome.note else "")
        cells = (name, clock(outcome.times) or outcome.problem, factor(outcome.ratio))
        yield Line((*left, *cells, *right), first=index == 0)
        left = right = ("", "")
        if not outcome.problem:
            yield Line((quantities(ours), errors(ours), "", errors(outcome), "", "", ""), accuracy=True)


def quantities(outcome: Outcome) -> str:
    return "; ".join(outcome.errors)


def errors(outcome: Outcome) -> str:
    return "; ".join(
        "none" if math.isnan(value) else f"{value:.1e}" if value else "0" for value in outcome.errors.values()
    )


def clock(times: Times | None) -> str:
    """Median, and half the distance between the quartiles in per cent of it."""
    if times is None:
        return ""
    low, high = times.spread
    return f"{seconds(times.median)} ± {50 * (high - low) / times.median:.0f} %"


def factor(ratio: Times | None) -> str:
    return "" if ratio is None else f"{significant(ratio.median)}x"


def must(floor: Floor | None) -> str:
    """What must be done, and the time that takes."""
    if floor is None:
        return ""
    known = [f"{significant(floor.work[name] / scale)} {unit}" for name, scale, unit in UNITS if floor.work[name]]
    return f"{', '.join(known)}: {seconds(floor.seconds)}"


def markdown(rows: Sequence[Line]) -> str:
    """As a table of a Markdown file: below each time, in its cell and in italics, the error."""
    table = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for line in rows:
        if line.accuracy:
            cells = zip(table[-1], line.cells, strict=True)
            table[-1] = [f"{above}<br>*{cell}*" if above and cell else above for above, cell in cells]
        else:
            table.append(list(line.cells))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def rich_table(rows: Sequence[Line]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in zip(COLUMNS, ("left", "right", "left", "right", "right", "right", "right"), strict=True):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for line in rows:
        if line.first and table.row_count:
            table.add_row()
        table.add_row(*(Text(cell, style="dim" if line.accuracy else "") for cell in line.cells))
    return table
