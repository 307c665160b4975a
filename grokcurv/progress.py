"""What the command line shows while it works: something live on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Latest = dict[str, Any]
"""What was reported last."""

PLAIN_SECONDS = 10.0
"""Seconds between lines of progress where there is no terminal to draw on."""

ROWS = 12
"""Runs of a sweep that are shown, of those under way."""


class Shown(NamedTuple):
    """How far something is, and what is said of it."""

    completed: int
    total: int | None
    """None while nobody knows."""
    pace: str
    """How far it is, how fast it goes, time left."""
    state: str
    """How it goes, in a line."""
    details: tuple[str, ...] = ()
    """Lines that only a terminal has room for."""


class Progress:
    """Shows the latest of what it is called with, as ``describe`` puts it; nothing at first."""

    def __init__(self, describe: Callable[[Latest], Shown], title: str, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.describe, self.title, self.console = describe, title, console or Console(stderr=True)
        self.latest: Latest = {}
        self.printed = time.monotonic()
        self.live = Live(console=self.console, get_renderable=self.drawing, refresh_per_second=4)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()
        elif self.latest:
            self.print_line()

    def __call__(self, latest: Latest) -> None:
        self.latest = latest
        if not self.console.is_terminal and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.print_line()

    def print_line(self) -> None:
        """Print how far it is as one line, where no bar can be drawn."""
        self.printed = time.monotonic()
        shown = self.describe(self.latest)
        with contextlib.suppress(OSError):  # what is being done goes on when nobody reads about it any more
            print(f"{shown.pace}  {shown.state}", file=self.console.file, flush=True)

    def drawing(self) -> RenderableType:
        """What is shown: a bar with its pace, and below it what is being done."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        if not self.latest:
            return Text(f"{self.title}  starting", style="dim")
        shown = self.describe(self.latest)
        columns = Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True)
        row = Table.grid(*columns, padding=(0, 2), expand=True)
        bar = ProgressBar(total=shown.total, completed=shown.completed)
        row.add_row(Text(self.title, style="bold"), bar, Text(shown.pace))
        return Group(row, *(Text(line, style="dim") for line in (shown.state, *shown.details)))


def _time_left(seconds: float) -> str:
    return f"  {timedelta(seconds=round(seconds))} left"


def of_run(latest: Latest) -> Shown:
    """One run's progress in words, from the dict that ``train`` gives to ``on_progress``.

    Pace: steps done, steps a second, time left. State: loss, accuracies, defect, and where it grokked and settled, each
    once it is known.
    """
    step, steps, speed = (latest[name] for name in ("step", "steps", "steps_per_second"))
    left = _time_left((steps - step) / speed) if speed else ""
    said = [
        f"loss {latest['train_loss']:.3g}",
        f"train {latest['train_acc']:.1%}",
        f"test {latest['test_acc']:.1%}",
    ]
    if latest["defect"] is not None:
        said.append(f"defect {latest['defect']:.3g}")
    if latest["grok_step"] is not None:
        settled = "not yet" if latest["settled_step"] is None else f"at {latest['settled_step']:,}"
        said.append(f"grokked at {latest['grok_step']:,}, settled {settled}")
    return Shown(step, steps, f"{step:,}/{steps:,}  {speed:.0f} steps/s{left}", "  ".join(said))


def of_sweep(latest: Latest) -> Shown:
    """What ``run_sweep`` reports: runs done, failed and under way, these with their steps and test accuracy."""
    running, finished, failed, runs = (latest[name] for name in ("running", "finished", "failed", "runs"))
    done, seconds = finished + failed, latest["seconds_left"]
    left = "" if seconds is None else _time_left(seconds)
    pace = f"{done:,}/{runs:,} runs  {latest['steps_per_second']:,.0f} steps/s{left}"
    state = f"{len(running):,} running  {finished:,} finished  {failed:,} failed"
    if latest["deaths"]:
        state += f"  {latest['deaths']:,} workers died"
    width = max(map(len, running), default=0)
    lines = []
    for run, news in list(running.items())[:ROWS]:
        how = f"{news['step']:,}/{news['steps']:,}  test {news['test_acc']:.1%}" if news else "starting"
        lines.append(f"  {run:{width}}  {how}")
    if len(running) > ROWS:
        lines.append(f"  and {len(running) - ROWS:,} more")
    return Shown(done, runs, pace, state, tuple(lines))


def of_bench(latest: Latest) -> Shown:
    """What ``run_bench`` reports: cases done, the time so far, and the case under way."""
    done, cases, seconds = (latest[name] for name in ("done", "cases", "seconds"))
    pace = f"{done:,}/{cases:,} cases  {timedelta(seconds=round(seconds))}"
    return Shown(done, cases, pace, str(latest["case"]))


def of_replay(latest: Latest) -> Shown:
    """What ``replay`` reports: checkpoints done and left out, and the latest row."""
    done, total, row = (latest[name] for name in ("done", "total", "row"))
    said = [f"step {latest['step']:,}"]
    if row is not None:
        said += [f"defect {row['defect_median']:.3g}", f"floor {row['noise_floor']:.2g}"]
    if latest["skipped"]:
        said.append(f"{latest['skipped']:,} left out")
    return Shown(done, total, f"{done:,}" + (f"/{total:,}" if total else "") + " checkpoints", "  ".join(said))


RunProgress, SweepProgress, BenchProgress, ReplayProgress = (
    partial(Progress, of) for of in (of_run, of_sweep, of_bench, of_replay)
)
