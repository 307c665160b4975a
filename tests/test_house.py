"""Rooms: imports point downwards and go in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grokcurv

HOUSE = Path(grokcurv.__file__).parent

FLOORS: tuple[tuple[str, ...], ...] = (
    ("reference", "flat", "partition", "device", "device_buffer", "storage", "progress", "random_subspace", "losses"),
    ("ops",),
    ("state", "intercept", "evaluation", "gradients", "admission", "pca", "subspace", "optim", "draws"),
    ("pairs", "checks", "commutator", "bracket_scores", "hessian", "steps", "measures", "samplers", "lookahead"),
    ("loggers", "budget", "monitor", "attachment", "checkpoints", "replays", "interventions", "runs"),
    ("tasks", "training", "modular", "integrations"),
    ("sweep", "analysis", "upstream"),
    ("report", "reproduce", "bench", "doctor"),
    ("cli", "__main__"),
)
"""From the ground up; a room imports from its own floor and those below."""


CORES = ("_cpu", "_cuda", "_emulator")


def modules() -> dict[str, Path]:
    """By dotted name, the files of the package."""
    found = {}
    for path in HOUSE.rglob("*.py"):
        parts = ("grokcurv", *path.relative_to(HOUSE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, wherever in it, for its types alone too; cores are no modules."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom) and node.module in known:
            inner = [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in CORES]
            yield from (name if name in known else node.module for name in inner)


def imports() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def test_imports_go_in_no_circle() -> None:
    list(TopologicalSorter(imports()).static_order())  # raises CycleError, which names the circle


def test_imports_point_downwards() -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    rooms = {name: name.split(".")[1] for name in modules() if name != "grokcurv"}
    assert set(rooms.values()) == set(floor)
    for name, wanted in imports().items():
        for other in wanted - {"grokcurv"} if name != "grokcurv" else ():
            assert floor[rooms[other]] <= floor[rooms[name]], f"{name} imports {other}"
    assert not [name for name, wanted in imports().items() if "grokcurv" in wanted]  # whose front is for users
