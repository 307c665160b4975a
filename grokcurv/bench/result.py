"""What a bench has found: for the terminal, for its page, and for ``bench.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokcurv.bench.check import Floor, Outcome, Result
from grokcurv.bench.plan import AXES, Curve, Plan
from grokcurv.bench.table import COLUMNS, Row, for_terminal, table_rows
from grokcurv.bench.timing import Times
from grokcurv.report.format import count, duration
from grokcurv.report.summary import flat

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
"""Version of ``bench.json``."""


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        path: the folder.
        environment: versions of grokcurv and its peers, machine, threads, memory that was free.
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
        return for_terminal(self.rows)

    @property
    def wrong(self) -> list[str]:
        """What is wrong with grokcurv's own answers, a sentence each."""
        return [f"{title}: {result.problem}" for title, result in self.found.items() if result.wrong]

    @property
    def left_out(self) -> list[str]:
        """What was not measured, and why, a sentence each."""
        missing = [f"{package}: {said}" for package, said in self.peers.items() if not said[:1].isdigit()]
        cases = [f"{title}: {result.problem}" for title, result in self.found.items() if not result.outcomes]
        failed = [
            f"{title}, {outcome.name}: {outcome.problem}"
            for title, result in self.found.items()
            for outcome in result.outcomes
            if outcome.failed
        ]
        return missing + cases + failed

    @property
    def subtitle(self) -> list[str]:
        threads = count(self.environment["threads"], "thread")
        return [str(self.environment["processor"]), threads, f"took {duration(self.seconds)}"]

    @property
    def missing(self) -> list[str]:
        """What is wrong, and what was left out, a sentence each."""
        return [f"Wrong: {said}" for said in self.wrong] + self.left_out

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        return [("Environment", dict(flat(self.environment))), ("Peers", self.peers)]

    def as_json(self) -> str:
        """``bench.json``; NaN is null."""
        curves = [
            {"axis": curve.axis, "title": curve.title, "points": [[size, case.title] for size, case in curve.points]}
            for curve in self.curves
        ]
        saved = {
            "schema": SCHEMA,
            "environment": dict(self.environment),
            "peers": dict(self.peers),
            "seconds": self.seconds,
            "table": [result.case.title for result in self.results],
            "curves": curves,
            "cases": list(self.found.values()),
        }
        return json.dumps(saved, indent=1, allow_nan=False, default=_plain)


def _plain(value: Result | Outcome | Floor | Times) -> dict[str, Any]:
    """As JSON has it; what is in it may be another of these."""
    match value:
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
