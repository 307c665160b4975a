"""One case: every implementation's answer is checked first, and then all are timed beside their floor, in turns."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from grokcurv.bench.comparison import PEERS, Case, Comparison, Implementation
from grokcurv.bench.timing import CPU, Times, interleaved

LARGEST_READ = 512 << 20
"""Bytes; a floor of more is scaled from that, and on a GPU any floor."""
SQUARE = {"cpu": 512, "cuda": 8192}
"""Side of the matrices whose product says how fast arithmetic can be."""
CACHE_LINE = 64
GIB = 1 << 30


@dataclass
class Outcome:
    """One implementation.

    Attributes:
        errors: by quantity, against float64 truth; NaN where it has no answer.
        times: seconds; None if it was not timed.
        ratio: of its time to grokcurv's, round by round.
        problem: why there is nothing, or nothing but errors.
    """

    name: str
    note: str
    errors: dict[str, float] = field(default_factory=dict)
    times: Times | None = None
    ratio: Times | None = None
    problem: str = ""

    @property
    def failed(self) -> bool:
        """Whether it raised, where others are merely not installed."""
        return self.problem.startswith("failed")


@dataclass(frozen=True)
class Floor:
    """What the case must do, and how long that takes at the rates measured between its rounds.

    Attributes:
        work: that of the :class:`grokcurv.bench.comparison.Comparison`.
        rates: a second, of each kind of work there is: bytes of ``torch.dot`` over as many bytes, on a GPU of a large
            copy, read and written; operations of a matrix product in float32 and in float64.
        seconds: the longer of the times that the bytes and the operations take.
        ratio: grokcurv's time over it, round by round.
    """

    work: Mapping[str, int]
    rates: Mapping[str, float]
    seconds: float
    ratio: Times


@dataclass
class Result:
    """What became of a case.

    Attributes:
        outcomes: the implementations, grokcurv first; empty if the case was left out.
        problem: why it was left out, or what is wrong with grokcurv's answer.
        wrong: whether it is.
    """

    case: Case
    outcomes: list[Outcome] = field(default_factory=list)
    floor: Floor | None = None
    problem: str = ""
    wrong: bool = False

    @property
    def failed(self) -> bool:
        return self.wrong or any(outcome.failed for outcome in self.outcomes)


def peers() -> dict[str, str]:
    """By import name, '' for a peer that can be imported (and now is), or why it cannot."""
    problems = {}
    for name, package in PEERS.items():
        try:
            import_module(name)
            problems[name] = ""
        except Exception as error:  # a peer that does not get along with this torch is no reason to stop
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            problems[name] = f"not installed: pip install {package}" if missing else f"{package}: {error}"
    return problems


def available_memory(device: torch.device = CPU) -> int:
    """Bytes that are free or can be made so: of a GPU, or of the machine or the control group if that has less."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except OSError:  # no control group
        return free


def check(case: Case, generator: torch.Generator, budget: float, problems: Mapping[str, str]) -> Result:
    """Draw the input, check, and time what was checked right.

    Args:
        case: what to do.
        generator: of the input, on whose device everything runs.
        budget: seconds that the timed rounds take, about.
        problems: of :func:`peers`.
    """
    free = available_memory(generator.device)
    if case.memory > free:
        return Result(case, problem=f"needs {case.memory / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are free")
    try:
        comparison = case.build(generator)
        outcomes = [_answer(one, comparison, problems) for one in comparison.implementations]
        ours = outcomes[0]
        if ours.problem:
            return Result(case, outcomes, problem=ours.problem, wrong=True)
        quantity, error = next(iter(ours.errors.items()))
        if not error <= comparison.tolerance:
            said = f"{quantity} of grokcurv is {error:.2g}, beyond {comparison.tolerance:.2g}: not timed"
            return Result(case, outcomes, problem=said, wrong=True)
        return Result(case, outcomes, _time(comparison, outcomes, budget, generator.device))
    except (torch.OutOfMemoryError, MemoryError) as error:  # a guess of what it takes was too low: the next may fit
        return Result(case, problem=f"failed: out of memory: {str(error).partition(chr(10))[0]}", wrong=True)
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # nothing, where there is no GPU


def _answer(one: Implementation, comparison: Comparison, problems: Mapping[str, str]) -> Outcome:
    outcome = Outcome(one.name, one.note, problem=next(filter(None, map(problems.__getitem__, one.needs)), ""))
    if not outcome.problem:
        try:
            got = (one.result or one.run)()
            outcome.errors = {n: math.nan if got is None else error(got) for n, error in comparison.errors.items()}
        except Exception as error:
            outcome.problem = f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return outcome


def _time(comparison: Comparison, outcomes: list[Outcome], budget: float, device: torch.device) -> Floor | None:
    """Fill in times and ratios; the floor, if one is known."""
    fit = [pair for pair in zip(comparison.implementations, outcomes, strict=True) if not pair[1].problem]
    floors = list(yardsticks(comparison.work, device))
    timed = [*(one for one, _ in fit), *floors]
    calls = interleaved([one.run for one in timed], budget, device)
    ours, *_ = times = [call.scaled(one.times) for one, call in zip(timed, calls, strict=True)]
    for (_, outcome), seconds in zip(fit, times, strict=False):
        outcome.times, outcome.ratio = seconds, seconds.over(ours)
    if not floors:
        return None
    # The seconds of what must be done, by kind and round.
    parts = times[len(fit) :]
    floor = Times(tuple(map(max, zip(*(part.samples for part in parts), strict=True))), 1)
    rates = {one.name: comparison.work[one.name] / part.median for one, part in zip(floors, parts, strict=True)}
    return Floor(comparison.work, rates, floor.median, ours.over(floor))


def yardsticks(work: Mapping[str, int], device: torch.device) -> Iterator[Implementation]:
    """For each kind of work there is, what does some of it."""
    gpu, side = device.type == "cuda", SQUARE[device.type]
    if work["bytes"]:
        # torch.dot reads two vectors of whole cache lines: beside one that begins within a line it takes ten times as
        # long.
        most = LARGEST_READ if gpu else min(work["bytes"], LARGEST_READ)
        read = max(1, most // (2 * CACHE_LINE)) * 2 * CACHE_LINE
        x, y = torch.ones(read // 4, device=device).chunk(2)
        call = partial(y.copy_, x) if gpu else partial(torch.dot, x, y)
        yield Implementation("bytes", call, times=work["bytes"] / read)
    for name, dtype in (("flops_float32", torch.float32), ("flops_float64", torch.float64)):
        if work[name]:
            a, out = torch.ones(2, side, side, dtype=dtype, device=device)
            yield Implementation(name, partial(torch.mm, a, a, out=out), times=work[name] / (2 * side**3))
