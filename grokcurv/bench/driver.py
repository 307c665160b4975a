"""From a plan to a folder: run the cases, write numbers, tables and figures."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grokcurv.bench.contest import PEERS, Case
from grokcurv.bench.judge import Floor, Result, available_memory, judge, peers
from grokcurv.bench.plan import Curve, Plan, make_plan
from grokcurv.bench.table import lines, markdown, rich_table
from grokcurv.bench.timing import Times
from grokcurv.runs import describe_environment
from grokcurv.storage import RunError, write_atomically

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
"""Version of ``bench.json``."""

Progress = Callable[[dict[str, Any]], object]


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
        cases = [f"{r.case.title}: {r.problem}" for r in self.everything() if r.problem and not r.rows]
        missing = [f"{package}: {said}" for package, said in self.peers.items() if not said[:1].isdigit()]
        failed = [
            f"{r.case.title}, {row.name}: {row.problem}"
            for r in self.everything()
            for row in r.rows
            if row.problem.startswith("failed")
        ]
        return missing + cases + failed

    def everything(self) -> list[Result]:
        """All results, those of curves too, each once."""
        found = {r.case.title: r for r in self.results}
        for _, points in self.curves:
            found |= {r.case.title: r for _, r in points}
        return list(found.values())


def run_bench(
    quick: bool = False,
    out: str | os.PathLike[str] | None = None,
    threads: int = 1,
    cases: Collection[str] | None = None,
    seed: int = 0,
    *,
    plan: Plan | None = None,
    on_progress: Progress | None = None,
) -> Bench:
    """Measure what grokcurv costs beside what there is today, and write a folder about it.

    Every contender's answer is compared with float64 truth before anything is timed; one of grokcurv's that is wrong is
    not timed. Then the contenders take turns. Peers that are not installed are named as such.

    Args:
        quick: smaller sizes, ten minutes at most on one core.
        out: the folder; ``runs/bench`` or ``runs/bench-quick`` if None. What is in it is replaced.
        threads: of torch and of the BLAS of NumPy and SciPy.
        cases: names of cases; all if None.
        seed: of the inputs.
        plan: instead of that of ``quick``.
        on_progress: called with ``case``, ``done``, ``cases`` and ``seconds``.

    Raises:
        ValueError: an unknown case, or threads below one.
        RunError: a folder that cannot be written.
    """
    plan = plan or make_plan(quick)
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    known = list(dict.fromkeys(case.name for case in _cases(plan)))
    for name in cases or ():
        if name not in known:
            raise ValueError(f"cases must be among {', '.join(known)}; got {name!r}")
    path = Path(out) if out is not None else Path("runs") / ("bench-quick" if quick else "bench")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write into {path}: {error.strerror}") from error

    began, problems = time.monotonic(), peers()
    environment = {
        **describe_environment(),
        "threads": threads,
        "memory_free_gib": round(available_memory() / 2**30, 1),
        "quick": quick,
        "seed": seed,
    }
    in_table = {case.title for case in plan.table}
    wanted = {case.title: case for case in _cases(plan) if cases is None or case.name in cases}
    found: dict[str, Result] = {}
    with _threads(threads):
        for title, case in wanted.items():
            if on_progress is not None:
                seconds = time.monotonic() - began
                on_progress({"case": title, "done": len(found), "cases": len(wanted), "seconds": seconds})
            budget = plan.budget if title in in_table else plan.budget / 2
            found[title] = judge(case, torch.Generator().manual_seed(seed), budget, problems)

    from grokcurv.bench.page import write

    results = tuple(found[case.title] for case in plan.table if case.title in found)
    curves = tuple(
        (one, tuple((size, found[case.title]) for size, case in one.points))
        for one in plan.curves
        if all(case.title in found for _, case in one.points)
    )
    taking_part = {package: problems[name] or metadata.version(package) for name, package in PEERS.items()}
    bench = Bench(
        path, path / "report.html", environment, results, curves, taking_part, round(time.monotonic() - began, 1)
    )
    write_atomically(path / "bench.json", json.dumps(_plain(bench), indent=1, allow_nan=False).encode())
    write_atomically(path / "table.md", markdown(lines(results)).encode())
    write(bench)
    return bench


def _cases(plan: Plan) -> Iterator[Case]:
    yield from plan.table
    for one in plan.curves:
        yield from (case for _, case in one.points)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads for torch, and, where threadpoolctl is there, for every BLAS and OpenMP that is loaded."""
    before = torch.get_num_threads()
    try:
        from threadpoolctl import threadpool_limits

        limits: contextlib.AbstractContextManager[Any] = threadpool_limits(count)
    except ImportError:
        limits = contextlib.nullcontext()
    with limits:
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


# ----------------------------------------------------------------------------------------------------------------- JSON


def _plain(bench: Bench) -> dict[str, Any]:
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
                "name": row.name,
                "note": row.note,
                "problem": row.problem,
                "seconds": _plain_times(row.times),
                "ratio": _plain_times(row.ratio),
                "errors": {name: _number(value) for name, value in row.errors.items()},
            }
            for row in result.rows
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
