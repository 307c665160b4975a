"""The cases of ``grokcurv bench`` on a GPU, with what is asked of them.

    python3 benches/on_gpu.py              # prints its table in Markdown, line by line; `make gpu` keeps it
    python3 benches/on_gpu.py --rehearse   # the same cases on the CPU, at small sizes: their times say nothing

A floor is the larger of two times: of the bytes that must be moved at the bandwidth of a copy on the device, and of the
operations that must be done at the rate of a large matrix product, both measured between the rounds of the case.
"""

from __future__ import annotations

import sys

import torch

from grokcurv.bench.check import Result, check
from grokcurv.bench.plan import on_gpu
from grokcurv.bench.table import lines, markdown

BUDGET = 2.0
"""Seconds that the rounds of a case take, about."""

FLOOR = {
    "defect arithmetic, P = 100,000,000": 0.85,
    "Gram matrix, 32 x 32 of 30,000,000": 0.7,
    "32 rows of 30,000,000 rotated to 32": 0.7,
    "32 rows of 30,000,000 rotated to 16": 0.7,
}
"""By case, what share of its time the floor must be."""

FASTER = {
    "defect arithmetic, P = 100,000,000": ("plain torch, the float32 formula", 8.0),
    "whole measurement, 9 pairs, demo's model": ("naive", 5.0),
    "step of a run, 64 as one program, measured at every step": ("one run alone", 30.0),
}
"""By case, beside whom grokcurv must be how many times faster."""


def asked(result: Result) -> list[str]:
    """Whether what is asked for was met, a line each."""
    title, said = result.case.title, []
    if title in FLOOR and result.floor is not None:
        share = 1 / result.floor.ratio.median
        said.append((share >= FLOOR[title], f"{share:.0%} of the floor; asked for: {FLOOR[title]:.0%}"))
    if title in FASTER:
        peer, wanted = FASTER[title]
        times = {outcome.name: outcome.times.median for outcome in result.outcomes if outcome.times is not None}
        ours = min(time for name, time in times.items() if name.startswith("grokcurv"))
        ratio = times[peer] / ours
        said.append((ratio >= wanted, f"{ratio:.1f}x beside {peer}; asked for: {wanted:.0f}x"))
    return [f"* {'met' if met else 'MISSED'}: {title}, {text}" for met, text in said]


def main(rehearsal: bool) -> int:
    device, shrink, budget = ("cpu", 1000, 0.0) if rehearsal else ("cuda", 1, BUDGET)
    results = []
    for case in on_gpu(shrink):
        results.append(check(case, torch.Generator(device).manual_seed(0), budget, {}))
        table = markdown(lines(results[-1:])).splitlines()
        print(*table[2 if len(results) > 1 else 0 :], sep="\n", flush=True)
    print("", *(line for result in results for line in asked(result)), sep="\n")
    return int(any(result.problem or any(outcome.problem for outcome in result.outcomes) for result in results))


if __name__ == "__main__":
    raise SystemExit(main("--rehearse" in sys.argv))
