"""From a plan to a folder: run the cases, write numbers, tables and figures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from grokcurv.bench.check import GIB, Result, available_memory, check, peers
from grokcurv.bench.comparison import PEERS
from grokcurv.bench.figures import drawings
from grokcurv.bench.plan import Plan, make_plan
from grokcurv.bench.result import Bench, in_markdown
from grokcurv.bench.timing import threads as limited
from grokcurv.report.page import write_page
from grokcurv.runs import describe_environment
from grokcurv.storage import make_folder, write_atomically

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
    planned = {case.title: case for case in (*plan.table, *(case for one in plan.curves for _, case in one.points))}
    known = list(dict.fromkeys(case.name for case in planned.values()))
    for name in cases or ():
        if name not in known:
            raise ValueError(f"cases must be among {', '.join(known)}; got {name!r}")
    path = Path(out) if out is not None else Path("runs") / ("bench-quick" if quick else "bench")
    make_folder(path, parents=True)

    began, problems, (load, *_) = time.monotonic(), peers(), os.getloadavg()
    settings = describe_environment() | {
        "threads": threads,
        "memory_free_gib": round(available_memory() / GIB, 1),
        "quick": quick,
        "seed": seed,
        "load before": round(load, 2),
    }
    in_table = {case.title for case in plan.table}
    wanted = {title: case for title, case in planned.items() if cases is None or case.name in cases}
    found: dict[str, Result] = {}
    with limited(threads):
        for title, case in wanted.items():
            if on_progress is not None:
                seconds = time.monotonic() - began
                on_progress({"case": title, "done": len(found), "cases": len(wanted), "seconds": seconds})
            budget = plan.budget if title in in_table else plan.budget / 2
            found[title] = check(case, torch.Generator().manual_seed(seed), budget, problems)

    settings["load after"] = round(os.getloadavg()[0], 2)
    taking_part = {package: problems[name] or metadata.version(package) for name, package in PEERS.items()}
    bench = Bench(path, settings, plan, found, taking_part, round(time.monotonic() - began, 1))
    write_atomically(path / "bench.json", bench.as_json().encode())
    write_atomically(path / "table.md", in_markdown(bench.rows).encode())
    write_page(path, "bench.html", bench, list(drawings(bench.curves, found)))
    return bench
