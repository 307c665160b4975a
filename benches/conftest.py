"""Prints the ratios that benches note, side by side, after the timings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

_notes: list[tuple[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    said = "by how much P is smaller: then answers must be right, and nothing is asked of times and memory"
    parser.addoption("--shrink", type=int, default=1, help=said)


@pytest.fixture
def shrink(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--shrink"))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Keeps one line for the table at the end."""
    return lambda text: _notes.append((request.node.name, text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _notes:
        terminalreporter.section("ratios")
        for name, text in _notes:
            terminalreporter.write_line(f"{name:<44} {text}")
