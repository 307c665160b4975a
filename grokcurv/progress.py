"""What the command line shows while it works: something live on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PLAIN_SECONDS = 10.0
"""Seconds between lines of progress where there is no terminal to draw on."""

ROWS = 12
"""Runs of a sweep that are shown, of those under way."""


class _Progress:
    """Shows the latest of what it is called with, which is empty at first."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.title, self.console = title, console or Console(stderr=True)
        self.latest: dict[str, Any] = {}
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

    def __call__(self, latest: dict[str, Any]) -> None:
        self.latest = latest
        if not self.console.is_terminal and time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.print_line()

    def print_line(self) -> None:
        self.printed = time.monotonic()
        with contextlib.suppress(OSError):  # what is being done goes on when nobody reads about it any more
            print(f"{self.pace()}  {self.state()}", file=self.console.file, flush=True)

    def drawing(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Column, Table
        from rich.text import Text

        if not self.latest:
            return Text(f"{self.title}  starting", style="dim")
        columns = Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True)
        row = Table.grid(*columns, padding=(0, 2), expand=True)
        completed, total = self.share()
        bar = ProgressBar(total=total, completed=completed)
        row.add_row(Text(self.title, style="bold"), bar, Text(self.pace()))
        return Group(row, Text(self.state(), style="dim"), *(Text(line, style="dim") for line in self.details()))

    def share(self) -> tuple[int, int]:
        """What is done, and of how much."""
        raise NotImplementedError

    def pace(self) -> str:
        """How far it is, how fast it goes, time left."""
        raise NotImplementedError

    def state(self) -> str:
        """How it goes, in a line."""
        raise NotImplementedError

    def details(self) -> list[str]:
        """Lines that only a terminal has room for."""
        return []


class RunProgress(_Progress):
    """Shows what ``train`` reports."""

    def share(self) -> tuple[int, int]:
        return self.latest["step"], self.latest["steps"]

    def pace(self) -> str:
        """Steps done, steps a second, time left."""
        step, steps, speed = (self.latest[name] for name in ("step", "steps", "steps_per_second"))
        left = f"  {timedelta(seconds=round((steps - step) / speed))} left" if speed else ""
        return f"{step:,}/{steps:,}  {speed:.0f} steps/s{left}"

    def state(self) -> str:
        """Loss, accuracies, defect, and the steps at which it grokked and settled, once they are known."""
        latest = self.latest
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
        return "  ".join(said)


class SweepProgress(_Progress):
    """Shows what ``run_sweep`` reports."""

    def share(self) -> tuple[int, int]:
        return self.latest["finished"] + self.latest["failed"], self.latest["runs"]

    def pace(self) -> str:
        """Runs done, steps a second of all together, time left."""
        done, runs = self.share()
        seconds = self.latest["seconds_left"]
        left = f"  {timedelta(seconds=round(seconds))} left" if seconds is not None else ""
        return f"{done:,}/{runs:,} runs  {self.latest['steps_per_second']:,.0f} steps/s{left}"

    def state(self) -> str:
        """Runs under way and failed, and the workers that died, if any."""
        running, finished, failed = len(self.latest["running"]), self.latest["finished"], self.latest["failed"]
        said = [f"{running:,} running", f"{finished:,} finished", f"{failed:,} failed"]
        if self.latest["deaths"]:
            said.append(f"{self.latest['deaths']:,} workers died")
        return "  ".join(said)

    def details(self) -> list[str]:
        """The runs under way, with their steps and test accuracy."""
        running = self.latest["running"]
        width = max(map(len, running), default=0)
        lines = [
            f"  {run:{width}}  {news['step']:,}/{news['steps']:,}  test {news['test_acc']:.1%}"
            if news
            else f"  {run:{width}}  starting"
            for run, news in list(running.items())[:ROWS]
        ]
        return lines + [f"  and {len(running) - ROWS:,} more"] * (len(running) > ROWS)


class BenchProgress(_Progress):
    """Shows what ``run_bench`` reports."""

    def share(self) -> tuple[int, int]:
        return self.latest["done"], self.latest["cases"]

    def pace(self) -> str:
        """Cases done, and the time so far."""
        done, cases = self.share()
        return f"{done:,}/{cases:,} cases  {timedelta(seconds=round(self.latest['seconds']))}"

    def state(self) -> str:
        """The case under way."""
        return str(self.latest["case"])
