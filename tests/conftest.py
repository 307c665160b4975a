"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

# One thread in each worker, and in the processes that tests start; those that are about threads say how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gpu
import pytest
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grokcurv.report.figures import Theme


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random numbers in every run; a failure prints the seed, and GROKCURV_TEST_SEED repeats it."""
    seed = int(os.environ.get("GROKCURV_TEST_SEED") or secrets.randbits(31))
    print(f"GROKCURV_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have each figure in one theme and width of four, and the other width is laid out: in a third of the time.

    For tests that are about something else on the page.
    """
    from grokcurv.report.figures import DARK, LIGHT, NARROW, WIDE, saved, style
    from grokcurv.report.page import Drawing

    def draw_all(name: str, alt: str, draw: Callable[[Theme], Figure]) -> Drawing:
        with style(DARK, NARROW):
            draw(DARK).draw_without_rendering()
        with style(LIGHT, WIDE):
            return Drawing(name, alt, saved(draw(LIGHT), LIGHT, "png"), *[b""] * 4)

    for user in ("report", "reproduce"):
        monkeypatch.setattr(f"grokcurv.{user}.page.draw_all", draw_all)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked gpu where none can run."""
    problem = gpu.problem()
    for item in items if problem else ():
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=problem))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests ran on a GPU and on which; how many did not, and why. Never nothing."""
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "when")]
    mine = [report for report in reports if "gpu" in getattr(report, "keywords", ())]  # also of another worker's
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in mine if report.skipped)
    ran = {report.nodeid for report in mine if report.when == "call" and not report.skipped}
    if ran:
        terminalreporter.write_line(f"GPU tests: {len(ran)} ran on {gpu.name()}")
    for reason, count in skipped.items():
        terminalreporter.write_line(f"GPU tests: {count} did not run: {reason}")
