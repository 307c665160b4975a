"""The page of a bench."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from grokcurv.bench.check import Result
from grokcurv.bench.figures import LABELS, costs
from grokcurv.bench.result import Bench
from grokcurv.bench.table import COLUMNS, Line, clock, lines
from grokcurv.report.format import duration
from grokcurv.report.page import Drawing, draw_twice, write_page


class BenchSummary:
    """The words and numbers of the page."""

    title = "What it costs, beside what there is"
    columns = COLUMNS
    key_numbers = ()
    """The table has them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @property
    def subtitle(self) -> list[str]:
        processor, threads = self.bench.environment["processor"], self.bench.environment["threads"]
        return [str(processor), f"{threads} thread{'s' * (threads != 1)}", f"took {duration(self.bench.seconds)}"]

    @property
    def missing(self) -> list[str]:
        """What is wrong, and what was left out, a sentence each."""
        return [f"Wrong: {said}" for said in self.bench.wrong] + self.bench.left_out

    @property
    def table(self) -> list[Line]:
        return lines(self.bench.results)

    def heading(self, drawing: Drawing) -> str:
        """Of a figure."""
        return f"Against {LABELS[drawing.name]}"

    @property
    def facts(self) -> list[tuple[str, Mapping[str, Any]]]:
        plain = {name: value for name, value in self.bench.environment.items() if not isinstance(value, Mapping)}
        return [("Environment", {**plain, **self.bench.environment["packages"]}), ("Peers", self.bench.peers)]


def write(bench: Bench) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into the folder; the page's path."""
    return write_page(bench.path, "bench.html", BenchSummary(bench), list(_drawings(bench)))


def _drawings(bench: Bench) -> Iterator[Drawing]:
    for axis in LABELS:
        curves = [(curve, points) for curve, points in bench.curves if curve.axis == axis and _drawable(points)]
        if curves:
            alt = " ".join(f"{curve.title}: {'; '.join(_ends(points))}." for curve, points in curves)
            yield draw_twice(axis, alt, partial(costs, axis, curves))


def _drawable(points: tuple[tuple[int, Result], ...]) -> bool:
    return any(outcome.times for _, result in points for outcome in result.outcomes)


def _ends(points: tuple[tuple[int, Result], ...]) -> list[str]:
    """The implementations' times at the largest size that was timed."""
    size, result = next((s, r) for s, r in reversed(points) if any(outcome.times for outcome in r.outcomes))
    return [f"{outcome.name} {clock(outcome.times)} at {size:,}" for outcome in result.outcomes if outcome.times]
