"""What a bench has found, and how ``bench.json`` says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grokcurv.bench.check import Floor, Result
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
        found = {r.case.title: r for r in self.results}
        for _, points in self.curves:
            found |= {r.case.title: r for _, r in points}
        return list(found.values())


def plain(bench: Bench) -> dict[str, Any]:
    """As JSON has it; NaN is null."""
    return {
        "schema": SCHEMA,
        "environment": dict(bench.environment),
        "peers": dict(bench.peers),
        "seconds": bench.seconds,
        "table": [result.case.title for result in bench.results],
        "curves": [
            {"axis": one.axis, "title": one.title, "points": [[size, r.case.title] for size, r in points]}
            for one, points in bench.curves
        ],
        "cases": [_plain_result(result) for result in bench.everything()],
    }


def _plain_result(result: Result) -> dict[str, Any]:
    return {
        "case": result.case.name,
        "title": result.case.title,
        "problem": result.problem,
        "wrong": result.wrong,
        "floor": _plain_floor(result.floor),
        "contenders": [
            {
                "name": outcome.name,
                "note": outcome.note,
                "problem": outcome.problem,
                "seconds": _plain_times(outcome.times),
                "ratio": _plain_times(outcome.ratio),
                "errors": {name: _number(value) for name, value in outcome.errors.items()},
            }
            for outcome in result.outcomes
        ],
    }


def _plain_floor(floor: Floor | None) -> dict[str, Any] | None:
    if floor is None:
        return None
    return {
        "bytes": floor.moved,
        "flops_float32": floor.flops,
        "flops_float64": floor.flops64,
        "bytes_per_second": _number(floor.read_rate),
        "flops_float32_per_second": _number(floor.rate),
        "flops_float64_per_second": _number(floor.rate64),
        "seconds": floor.seconds,
        "grokcurv_over_floor": _plain_times(floor.ratio),
    }


def _plain_times(times: Times | None) -> dict[str, Any] | None:
    if times is None:
        return None
    low, high = times.spread
    return {"median": times.median, "low": low, "high": high, "rounds": len(times.samples), "calls": times.calls}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
