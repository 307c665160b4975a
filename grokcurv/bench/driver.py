"""From a plan to a folder: run the cases, write numbers, tables and figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grokcurv.bench.check import Result, available_memory, check, peers
from grokcurv.bench.comparison import PEERS, Case
from grokcurv.bench.plan import Plan, make_plan
from grokcurv.bench.result import Bench, as_json
from grokcurv.bench.table import lines, markdown
from grokcurv.bench.timing import threads as limited
from grokcurv.runs import describe_environment
from grokcurv.storage import RunError, write_atomically

Progress = Callable[[dict[str, Any]], object]


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

    Every implementation's answer is compared with float64 truth before anything is timed; one of grokcurv's that is
    wrong is not timed. Then the implementations take turns. Peers that are not installed are named as such.

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
    with limited(threads):
        for title, case in wanted.items():
            if on_progress is not None:
                seconds = time.monotonic() - began
                on_progress({"case": title, "done": len(found), "cases": len(wanted), "seconds": seconds})
            budget = plan.budget if title in in_table else plan.budget / 2
            found[title] = check(case, torch.Generator().manual_seed(seed), budget, problems)

    from grokcurv.bench.page import write  # and matplotlib with it

    results = tuple(found[case.title] for case in plan.table if case.title in found)
    curves = tuple(
        (one, tuple((size, found[case.title]) for size, case in one.points))
        for one in plan.curves
        if all(case.title in found for _, case in one.points)
    )
    taking_part = {package: problems[name] or metadata.version(package) for name, package in PEERS.items()}
    taken = round(time.monotonic() - began, 1)
    bench = Bench(path, path / "report.html", environment, results, curves, taking_part, taken)
    write_atomically(path / "bench.json", as_json(bench).encode())
    write_atomically(path / "table.md", markdown(lines(results)).encode())
    write(bench)
    return bench


def _cases(plan: Plan) -> Iterator[Case]:
    yield from plan.table
    for one in plan.curves:
        yield from (case for _, case in one.points)
