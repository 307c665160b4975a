"""Folders of a saboteur: whatever stands where a file of ours should be, nothing outside changes and nothing hangs.

Every file of a run and of a sweep is replaced by every kind of thing that can be there, and the folder is reported and
gone on with. A command ends well, or with one line that names the file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grokcurv import cli
from grokcurv.report import page
from grokcurv.sweep import SweepConfig, run_sweep
from grokcurv.training import TrainConfig, train

SECONDS = 5
"""How long a command may take before it counts as hanging; on an idle machine the slowest takes one."""

CONFIG = TrainConfig(
    p=11,
    layers=1,
    d_model=16,
    heads=2,
    d_ff=16,
    batch_size=16,
    steps=4,
    eval_every=2,
    pairs=1,
    measure_every=2,
    pca_every=1,
    checkpoint_every=2,
    snapshot_every=2,
    threads=1,
)

SETTINGS = "\n".join(
    f"{name} = {json.dumps(value)}" for name, value in dataclasses.asdict(CONFIG).items() if name != "lr"
)
SWEEP = f"[run]\n{SETTINGS}\n[grid]\nlr = [1e-3, 1e-2]"
FIRST = "0000-lr0.001"

RUN_FILES = (
    *("config.json", "environment.json", "status.json", "metrics.parquet", "curvature.parquet", "pca.parquet"),
    *("checkpoint.safetensors", "basis.safetensors", "snapshots", "snapshots/000000002.safetensors", ".lock"),
    *("report.html", "figures", "figures/grokking.png"),
)
SWEEP_FILES = (
    *("sweep.json", "failures.json", "workers.log", ".lock", "runs", f"runs/{FIRST}"),
    *(f"runs/{FIRST}/config.json", f"runs/{FIRST}/checkpoint.safetensors", f"runs/{FIRST}/.lock"),
    *("report.html", "figures", "figures/phase.png"),
)


def _link(place: Path, target: Path) -> None:
    place.symlink_to(target)


def _cut(place: Path, kept: bytes) -> None:
    place.write_bytes(kept[: len(kept) // 2])


def _socket(place: Path) -> None:
    here = os.getcwd()
    os.chdir(place.parent)  # its path may be too long for one
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.name)
    finally:
        os.chdir(here)


KINDS: dict[str, Callable[[Path, Path, bytes], object]] = {
    "link to a file": lambda place, outside, kept: _link(place, outside / "file"),
    "link to a folder": lambda place, outside, kept: _link(place, outside / "folder"),
    "link to what could be made": lambda place, outside, kept: _link(place, outside / "new"),
    "link to itself": lambda place, outside, kept: _link(place, place),
    "pipe": lambda place, outside, kept: os.mkfifo(place),
    "socket": lambda place, outside, kept: _socket(place),
    "device": lambda place, outside, kept: os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, 5)),  # endless zeros
    "folder": lambda place, outside, kept: place.mkdir(),
    "empty": lambda place, outside, kept: place.write_bytes(b""),
    "half": lambda place, outside, kept: _cut(place, kept),
    "other type": lambda place, outside, kept: place.write_text(json.dumps({"schema": 1, place.stem: [None, 1e999]})),
    "nothing": lambda place, outside, kept: None,
}


def without_drawing(patch: pytest.MonkeyPatch) -> None:
    """Pages have a figure of which nothing was drawn."""
    for name, drawn in (("draw", "grokking"), ("draw_sweep", "phase")):
        patch.setattr(page, name, lambda _, drawn=drawn: [page.Drawing(drawn, "", *[b"png"] * 5)])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run and a sweep that are whole, with pages."""
    folder = tmp_path_factory.mktemp("sound")
    train(CONFIG, out=folder / "run")
    (folder / "ours.toml").write_text(SWEEP)
    run_sweep(SweepConfig.from_toml(folder / "ours.toml"), folder / "sweep", workers=1)
    with pytest.MonkeyPatch.context() as patch:
        without_drawing(patch)
        for name in ("run", "sweep"):
            assert cli.main(["report", str(folder / name)]) == 0
    (folder / "sweep" / "failures.json").write_text('{"schema": 1, "failures": {}}')
    return {"run": folder / "run", "sweep": folder / "sweep"}


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that belongs to somebody else; it is as it was in the end."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    for place in (folder / "file", folder / "folder" / "grokking.png", folder / "folder" / ".precious.tmp"):
        place.write_text("precious")
    before = _state(folder)
    yield folder
    assert _state(folder) == before


def _state(folder: Path) -> dict[str, object]:
    found = {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}
    return found | {f"{path}:": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def in_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that takes too long is interrupted by an error that nobody expects. Figures are not drawn."""

    def late(*_: object) -> None:
        raise AssertionError(f"still at work after {SECONDS} seconds")

    without_drawing(monkeypatch)
    before = signal.signal(signal.SIGALRM, late)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def spoil(folder: Path, name: str, kind: str, outside: Path) -> None:
    place = folder / name
    kept = place.read_bytes() if place.is_file() else b""
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    KINDS[kind](place, outside, kept)


def command(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> int:
    """The status; what a refusal says has one line, and names the file."""
    signal.alarm(SECONDS)
    status = cli.main(arguments)
    signal.alarm(0)
    said = capsys.readouterr().err
    assert status in (0, 2), said
    if status:
        (line,) = [line for line in said.splitlines() if line.startswith("grokcurv: ")]
        assert Path(name).name in line, line
    return status


def hostile() -> list[Any]:
    """All that can stand everywhere; in an ordinary test run every file and every kind has its turn, and no more."""
    places = [("run", name) for name in RUN_FILES] + [("sweep", name) for name in SWEEP_FILES]
    return [
        pytest.param(what, name, kind, id=f"{what} {name} {kind}", marks=[pytest.mark.long] if (i + j) % 6 else [])
        for i, (what, name) in enumerate(places)
        for j, kind in enumerate(KINDS)
    ]


@pytest.mark.parametrize(("what", "name", "kind"), hostile())
def test_a_hostile_folder(
    what: str,
    name: str,
    kind: str,
    sound: dict[str, Path],
    outside: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "ours"
    shutil.copytree(sound[what], folder, symlinks=True)
    spoil(folder, name, kind, outside)
    command(["report", str(folder)], name, capsys)
    command(["report", str(folder), "--out", str(tmp_path / "page")], name, capsys)
    if what == "run":
        command(["train", "--resume", "--steps", "6", "--out", str(folder)], name, capsys)
    elif name not in ("runs", f"runs/{FIRST}") or kind not in ("folder", "nothing"):  # runs that are not there are made
        monkeypatch.chdir(tmp_path)
        Path("ours.toml").write_text(SWEEP)
        command(["sweep", "ours.toml", "--out", str(folder), "--workers", "1"], name, capsys)
