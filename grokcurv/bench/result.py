"""What a bench has found, and how ``bench.json`` says it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokcurv.bench.check import Floor, Outcome, Result
from grokcurv.bench.plan import Curve
from grokcurv.bench.table import lines, rich_table
from grokcurv.bench.timing import Times

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
"""Version of ``bench.json``."""


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        path: the folder.
        page: ``report.html`` in it.
        environment: versions of grokcurv and its peers, machine, threads, memory that was free.
        results: of the cases of the table, in order.
        curves: each with the results of its points, by size.
        peers: by package, its version, or why it did not take part.
        seconds: that it all took.
    """

    path: Path
    page: Path
    environment: Mapping[str, Any]
    results: tuple[Result, ...]
    curves: tuple[tuple[Curve, tuple[tuple[int, Result], ...]], ...]
    peers: Mapping[str, str]
    seconds: float

    def table(self) -> Table:
        """The table, for a terminal."""
        return rich_table(lines(self.results))

    @property
    def wrong(self) -> list[str]:
        """What is wrong with grokcurv's own answers, a sentence each."""
        return [f"{r.case.title}: {r.problem}" for r in self.everything() if r.wrong]

    @property
    def left_out(self) -> list[str]:
        """What was not measured, and why, a sentence each."""
        cases = [f"{r.case.title}: {r.problem}" for r in self.everything() if r.problem and not r.outcomes]
        missing = [f"{package}: {said}" for package, said in self.peers.items() if not said[:1].isdigit()]
        failed = [
            f"{r.case.title}, {outcome.name}: {outcome.problem}"
            for r in self.everything()
            for outcome in r.outcomes
            if outcome.problem.startswith("failed")
        ]
        return missing + cases + failed

    def everything(self) -> list[Result]:
        """All results, those of curves too, each once."""
        on_curves = [r for _, points in self.curves for _, r in points]
        return list({r.case.title: r for r in [*self.results, *on_curves]}.values())


def as_json(bench: Bench) -> str:
    """``bench.json``; NaN is null."""
    saved = {
        "schema": SCHEMA,
        "environment": dict(bench.environment),
        "peers": dict(bench.peers),
        "seconds": bench.seconds,
        "table": [result.case.title for result in bench.results],
        "curves": [
            {"axis": one.axis, "title": one.title, "points": [[size, r.case.title] for size, r in points]}
            for one, points in bench.curves
        ],
        "cases": bench.everything(),
    }
    return json.dumps(saved, indent=1, allow_nan=False, default=_plain)


def _plain(value: Result | Outcome | Floor | Times) -> dict[str, Any]:
    """As JSON has it; what is in it may be another of these."""
    match value:
        case Result():
            return {
                "case": value.case.name,
                "title": value.case.title,
                "problem": value.problem,
                "wrong": value.wrong,
                "floor": value.floor,
                "contenders": value.outcomes,
            }
        case Outcome():
            return {
                "name": value.name,
                "note": value.note,
                "problem": value.problem,
                "seconds": value.times,
                "ratio": value.ratio,
                "errors": {name: error if math.isfinite(error) else None for name, error in value.errors.items()},
            }
        case Floor():
            rates = {f"{name}_per_second": value.rates.get(name) for name in value.work}
            return {**value.work, **rates, "seconds": value.seconds, "grokcurv_over_floor": value.ratio}
    low, high = value.spread
    return {"median": value.median, "low": low, "high": high, "rounds": len(value.samples), "calls": value.calls}
