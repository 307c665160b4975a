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

import pytest

from grokcurv import cli
from grokcurv.report import page
from grokcurv.sweep import SweepConfig, run_sweep
from grokcurv.training import TrainConfig, train

SECONDS = 5
"""How long a command may take."""

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

RUN_FILES = (
    *("config.json", "environment.json", "status.json", "metrics.parquet", "curvature.parquet", "pca.parquet"),
    *("checkpoint.safetensors", "basis.safetensors", "snapshots", "snapshots/000000002.safetensors", ".lock"),
    *("report.html", "figures", "figures/grokking.png"),
)
SWEEP_FILES = (
    *("sweep.json", "failures.json", "workers.log", ".lock", "runs", "runs/0000-lr0.001"),
    *("runs/0000-lr0.001/config.json", "runs/0000-lr0.001/checkpoint.safetensors", "runs/0000-lr0.001/.lock"),
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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run and a sweep that are whole, with pages."""
    folder = tmp_path_factory.mktemp("sound")
    train(CONFIG, out=folder / "run")
    settings = {name: value for name, value in dataclasses.asdict(CONFIG).items() if name != "lr"}
    run_sweep(SweepConfig(run=settings, grid={"lr": [1e-3, 1e-2]}), folder / "sweep", workers=1)
    for name in ("run", "sweep"):
        assert cli.main(["report", str(folder / name)]) == 0
        (folder / name / "figures").mkdir(exist_ok=True)
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

    for name, drawn in (("draw", "grokking"), ("draw_sweep", "phase")):
        monkeypatch.setattr(page, name, lambda _, drawn=drawn: [page.Drawing(drawn, "", b"png", b"png")])
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


def hostile() -> list[tuple[str, str, str]]:
    places = [("run", name) for name in RUN_FILES] + [("sweep", name) for name in SWEEP_FILES]
    return [(what, name, kind) for what, name in places for kind in KINDS]


@pytest.mark.parametrize(("what", "name", "kind"), hostile(), ids=map(" ".join, hostile()))
def test_a_hostile_folder(
    what: str,
    name: str,
    kind: str,
    sound: dict[str, Path],
    outside: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "ours"
    shutil.copytree(sound[what], folder, symlinks=True)
    spoil(folder, name, kind, outside)
    command(["report", str(folder)], name, capsys)
    assert command(["report", str(folder), "--out", str(tmp_path / "page")], name, capsys) in (0, 2)
    if what == "run":
        command(["train", "--resume", "--steps", "6", "--out", str(folder)], name, capsys)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            settings = {k: v for k, v in dataclasses.asdict(CONFIG).items() if k != "lr"}
            lines = ["[run]", *(f"{k} = {json.dumps(v)}" for k, v in settings.items()), "[grid]", "lr = [1e-3, 1e-2]"]
            Path("ours.toml").write_text("\n".join(lines))
            command(["sweep", "ours.toml", "--out", str(folder), "--workers", "1"], name, capsys)
