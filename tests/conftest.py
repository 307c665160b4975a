"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import secrets
from collections import Counter

import gpu
import pytest
import torch


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh random numbers in every run; a failure prints the seed, and GROKCURV_TEST_SEED repeats it."""
    seed = int(os.environ.get("GROKCURV_TEST_SEED") or secrets.randbits(31))
    print(f"GROKCURV_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


_GPU_TESTS = pytest.StashKey[set[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked gpu where none can run."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_GPU_TESTS] = {item.nodeid for item in marked}
    problem = gpu.problem()
    for item in marked if problem else ():
        item.add_marker(pytest.mark.skip(reason=problem))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How many tests ran on a GPU and on which; how many did not, and why. Never nothing."""
    marked = config.stash.get(_GPU_TESTS, set())
    reports = [report for kind in terminalreporter.stats.values() for report in kind if hasattr(report, "when")]
    mine = [report for report in reports if report.nodeid in marked]
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in mine if report.skipped)
    ran = {report.nodeid for report in mine if report.when == "call" and not report.skipped}
    if ran:
        terminalreporter.write_line(f"GPU tests: {len(ran)} ran on {gpu.name()}")
    for reason, count in skipped.items():
        terminalreporter.write_line(f"GPU tests: {count} did not run: {reason}")
