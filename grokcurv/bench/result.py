"""What a bench has found: as a table in print, for its page, and for ``bench.json``.

The table has a row for each peer of a case, its times, and below them how accurate they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from grokcurv.bench.check import Floor, Outcome, Result
from grokcurv.bench.plan import AXES, Curve, Plan
from grokcurv.bench.timing import Times
from grokcurv.report.format import count, duration, seconds, significant
from grokcurv.report.summary import flat

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
"""Version of ``bench.json``."""

COLUMNS = ("case, and error of what", "grokcurv", "beside it", "its time, and error", "ratio", "floor", "over floor")

UNITS = {"bytes": (1e6, "MB"), "flops_float32": (1e9, "Gflop"), "flops_float64": (1e9, "Gflop64")}
"""Of each kind of work."""


class Row(NamedTuple):
    """Cells of :data:`COLUMNS`; those on accuracy stand below those on speed, and may all be empty."""

    speed: tuple[str, ...]
    accuracy: tuple[str, ...] = ("",) * len(COLUMNS)


def table_rows(results: Iterable[Result]) -> list[Row]:
    """Of all cases; one that was left out has a row that says why."""
    rows = []
    for result in results:
        if not result.outcomes or result.wrong:
            rows.append(Row((result.case.title, result.problem, *[""] * 5)))
            continue
        ours, *others = result.outcomes
        # Only the first row of a case has what all of them share.
        left, right = (result.case.title, clock(ours.times)), ("", "")
        said = "; ".join(ours.errors), errors(ours)
        if floor := result.floor:
            work = [f"{significant(n / UNITS[kind][0])} {UNITS[kind][1]}" for kind, n in floor.work.items() if n]
            right = f"{', '.join(work)}: {seconds(floor.seconds)}", factor(floor.ratio)
        for other in others:
            name = other.name + (f" ({other.note})" if other.note else "")
            speed = (*left, name, clock(other.times) or other.problem, factor(other.ratio), *right)
            theirs = "" if other.problem else errors(other)
            rows.append(Row(speed, (*said, "", theirs, "", "", "")))
            left = right = said = ("", "")
    return rows


IDLE = 0.5
"""Load beyond that of the bench itself that counts as none."""


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
        pairs = zip(speed, accuracy, strict=True)
        table.append(tuple(f"{above}<br>*{below}*" if below else above for above, below in pairs))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        path: the folder.
        environment: versions of grokcurv and its peers, machine, threads, memory that was free, and the machine's load
            (processes that run or wait, over a minute) before the bench and at its end.
        plan: what was to be measured.
        found: what became of each case that was chosen, by its title.
        peers: by package, its version, or why it did not take part.
        seconds: that it all took.
    """

    path: Path
    environment: Mapping[str, Any]
    plan: Plan
    found: Mapping[str, Result]
    peers: Mapping[str, str]
    seconds: float

    title = "What it costs, beside what there is"
    columns, axes = COLUMNS, AXES
    key_numbers = ()
    """Of the page: none, for the table has them."""

    @property
    def page(self) -> Path:
        return self.path / "report.html"

    @property
    def results(self) -> list[Result]:
        """Of the cases of the table, in order."""
        return [self.found[case.title] for case in self.plan.table if case.title in self.found]

    @property
    def curves(self) -> list[Curve]:
        return [curve for curve in self.plan.curves if all(case.title in self.found for _, case in curve.points)]

    @property
    def rows(self) -> list[Row]:
        return table_rows(self.results)

    def table(self) -> Table:
        """The table, for a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in (COLUMNS[0], "beside it") else "right")
        for speed, accuracy in self.rows:
            if speed[0] and table.row_count:  # an empty line between two cases
                table.add_row()
            table.add_row(*map(Text, speed))
            if any(accuracy):
                table.add_row(*map(Text, accuracy), style="dim")
        return table

    @property
    def wrong(self) -> list[str]:
        """What is wrong with grokcurv's own answers, a sentence each."""
        return [f"{title}: {result.problem}" for title, result in self.found.items() if result.wrong]

    @property
    def left_out(self) -> list[str]:
        """What was not measured, and why, a sentence each."""
        said = [f"{package}: {version}" for package, version in self.peers.items() if not version[:1].isdigit()]
        said += [f"{title}: {result.problem}" for title, result in self.found.items() if not result.outcomes]
        outcomes = [(title, outcome) for title, result in self.found.items() for outcome in result.outcomes]
        return said + [f"{title}, {one.name}: {one.problem}" for title, one in outcomes if one.failed]

    @property
    def load(self) -> str:
        """Of the machine, in words, and whether others had a part in it."""
        before, after = (self.environment[name] for name in ("load before", "load after"))
        busy = before > IDLE or after > self.environment["threads"] + IDLE
        said = f"load {before:.1f} before, {after:.1f} at the end"
        return f"{said}: the machine was busy, and times are longer and less even than they should be" if busy else said

    @property
    def subtitle(self) -> list[str]:
        threads = count(self.environment["threads"], "thread")
        load, _, _ = self.load.partition(":")
        return [str(self.environment["processor"]), threads, f"took {duration(self.seconds)}", load]

    @property
    def missing(self) -> list[str]:
        """What is wrong, and what was left out, a sentence each."""
        busy = [f"{self.load[0].upper()}{self.load[1:]}."] if ":" in self.load else []
        return [f"Wrong: {said}" for said in self.wrong] + busy + self.left_out

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("Environment", dict(flat(self.environment))), ("Peers", self.peers)]

    def as_json(self) -> str:
        """``bench.json``; NaN is null."""
        saved = {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "peers": dict(self.peers),
            "seconds": self.seconds,
            "table": [result.case.title for result in self.results],
            "curves": self.curves,
            "cases": list(self.found.values()),
        }
        return json.dumps(saved, indent=1, allow_nan=False, default=_plain)


def _plain(value: Curve | Result | Outcome | Floor | Times) -> dict[str, Any]:
    """As JSON has it; what is in it may be another of these."""
    match value:
        case Curve():
            return {**vars(value), "points": [[size, case.title] for size, case in value.points]}
        case Result():
            named = {"case": value.case.name, "title": value.case.title, "problem": value.problem, "wrong": value.wrong}
            return {**named, "floor": value.floor, "contenders": value.outcomes}
        case Outcome():
            errors = {name: error if math.isfinite(error) else None for name, error in value.errors.items()}
            named = {"name": value.name, "note": value.note, "problem": value.problem}
            return {**named, "seconds": value.times, "ratio": value.ratio, "errors": errors}
        case Floor():
            rates = {f"{name}_per_second": value.rates.get(name) for name in value.work}
            return {**value.work, **rates, "seconds": value.seconds, "grokcurv_over_floor": value.ratio}
    low, high = value.spread
    return {"median": value.median, "low": low, "high": high, "rounds": len(value.samples), "calls": value.calls}
