from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from grokcurv import storage
from grokcurv.runs import Run, RunError, RunWriter, open_run, pack, unpack, write_atomically

CONFIG = {"op": "add", "lr": 1e-3, "layers": 2, "layer_norm": True, "note": None}


def same(a: object, b: object) -> bool:
    """Equal in structure, types and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def nested_state() -> dict[str, object]:
    shared = torch.randn(4, 6)
    return {
        "step": 12345678901234567890,
        "none": None,
        "flag": True,
        "float": 0.1 + 0.2,
        "nan": math.nan,
        "text": 'é "quoted" / path',
        "empty": [{}, [], ()],
        "betas": (0.9, 0.98),
        "model": {"a.weight": shared, "a.transposed": shared.T, "a.view": shared[1:3, ::2]},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {"step": torch.tensor(4.0)}}},
        "list": [torch.zeros(0, 3), torch.tensor([True, False]), torch.arange(3, dtype=torch.uint8)],
        "clash/a": torch.ones(1),
        "clash": {"a": torch.zeros(2)},
        "half": torch.randn(5, dtype=torch.float64).to(torch.bfloat16),
    }


def test_pack_keeps_structure_types_and_bits() -> None:
    state = nested_state()
    assert same(unpack(pack(state)), state)


def test_pack_refuses_what_would_need_pickle() -> None:
    with pytest.raises(TypeError, match=r"inner/key is a ndarray"):
        pack({"inner": {"key": np.zeros(3)}})


def test_unpack_sees_every_flipped_bit_and_every_truncation() -> None:
    data = pack({"x": torch.randn(7), "name": "value"})
    generator = np.random.default_rng()
    for position in generator.integers(0, len(data), 200):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(generator.integers(8))
        with pytest.raises(ValueError, match=r"not a packed state|checksum|schema version"):
            unpack(bytes(damaged))
    for length in (0, 4, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="not a packed state"):
            unpack(data[:length])
    tail = bytearray(data)
    tail[-1] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        unpack(bytes(tail))


def test_unpack_refuses_another_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "SCHEMA", 99)
    data = pack({"x": 1})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="schema version is 99"):
        unpack(data)


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    metrics = pd.DataFrame({"step": [0, 100], "test_acc": [0.1, math.pi], "label": ["a", "b"]})
    curvature = pd.DataFrame({"step": [0, 50], "defect_median": [0.2, math.nan], "reliable": [True, False]})
    state = nested_state()
    with RunWriter(tmp_path / "deep" / "run", CONFIG, environment={"device": "cpu"}) as writer:
        writer.write_table("metrics", metrics)
        writer.write_table("curvature", curvature)
        writer.write_checkpoint(state)
        writer.write_basis({"values": torch.ones(3)})
        assert open_run(writer.path).status == "running"
        writer.set_status("finished")
    run = open_run(tmp_path / "deep" / "run")
    assert run.config == CONFIG
    assert run.environment["device"] == "cpu"
    assert run.environment["packages"]["torch"] == torch.__version__
    assert run.status == "finished"
    pd.testing.assert_frame_equal(run.metrics, metrics)
    pd.testing.assert_frame_equal(run.curvature, curvature)
    assert run.pca_history.empty
    assert same(run.checkpoint(), state)
    assert run.records()["step"].tolist() == [0, 50, 100]
    assert run.records()["test_acc"].isna().tolist() == [False, True, False]
    written = {"config.json", "environment.json", "status.json", "metrics.parquet", "curvature.parquet"}
    written |= {"checkpoint.safetensors", "basis.safetensors", ".lock"}
    assert {p.name for p in run.path.iterdir()} == written
    assert all(json.loads(p.read_text())["schema"] == 1 for p in run.path.glob("*.json"))


def test_snapshots(tmp_path: Path) -> None:
    weights = {step: {"w": torch.full((3,), float(step)), "b": torch.zeros(0)} for step in (1000, 0, 20)}
    with RunWriter(tmp_path, CONFIG) as writer:
        assert open_run(tmp_path).snapshots == []
        for step, state in weights.items():
            writer.write_snapshot(step, state)
        kept = (tmp_path / "snapshots" / "000000020.safetensors").stat().st_mtime_ns
        writer.write_snapshot(20, weights[20])  # again, as after a crash
    run = open_run(tmp_path)
    assert run.snapshots == [0, 20, 1000]
    assert all(same(run.snapshot(step), state) for step, state in weights.items())
    assert (tmp_path / "snapshots" / "000000020.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(RunError, match=r"000000007\.safetensors is missing"):
        run.snapshot(7)
    (tmp_path / "snapshots" / ".000000021.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "snapshots" / "000000020.safetensors").write_bytes(b"half")
    with RunWriter(tmp_path, CONFIG, resume=True):
        assert len(list((tmp_path / "snapshots").iterdir())) == 3
    with pytest.raises(RunError, match=r"000000020\.safetensors is missing or damaged"):
        run.snapshot(20)
    assert Run(None, CONFIG, {}).snapshots == []
    with pytest.raises(RunError, match="in memory"):
        Run(None, CONFIG, {}).snapshot(0)


def test_snapshots_where_none_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "snapshots").write_bytes(b"")
    with pytest.raises(RunError, match="snapshots cannot be used: it must be a folder"), RunWriter(tmp_path, CONFIG):
        pass


def test_a_run_in_memory() -> None:
    metrics = pd.DataFrame({"step": [0], "test_acc": [0.5]})
    run = Run(None, CONFIG, {}, status="finished", tables={"metrics": metrics, "curvature": pd.DataFrame()})
    assert run.status == "finished"
    pd.testing.assert_frame_equal(run.records(), metrics)
    with pytest.raises(RunError, match="in memory"):
        run.checkpoint()
    with pytest.raises(RunError, match="no pca"):
        run.pca_history  # noqa: B018


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run"):
        open_run(tmp_path)


def test_another_configuration_names_the_fields(tmp_path: Path) -> None:
    with RunWriter(tmp_path, CONFIG):
        pass
    other = {**CONFIG, "lr": 1e-2, "new": 1}
    for resume in (False, True):
        with (
            pytest.raises(RunError, match=r"lr \(0.001 there, 0.01 here\), new \('missing' there, 1 here\)"),
            RunWriter(tmp_path, other, resume=resume),
        ):
            pass
    with (
        pytest.raises(RunError, match="by an older version, without new, newer: it is read"),
        RunWriter(tmp_path, {**CONFIG, "new": 1, "newer": 2}, resume=True),
    ):
        pass
    assert open_run(tmp_path).config == CONFIG


def test_the_same_configuration_needs_resume(tmp_path: Path) -> None:
    with RunWriter(tmp_path, CONFIG) as writer:
        writer.write_checkpoint({"step": 3})
    with pytest.raises(RunError, match="already holds this run"), RunWriter(tmp_path, CONFIG):
        pass
    with RunWriter(tmp_path, CONFIG, resume=True) as writer:
        assert writer.checkpoint == {"step": 3}


def test_resume_drops_rows_past_the_checkpoint(tmp_path: Path) -> None:
    metrics = pd.DataFrame({"step": [0, 10, 20], "x": [1.0, math.nan, 3.0], "label": ["a", None, "c"]})
    pca = pd.DataFrame({"step": [0, 0, 30], "matrix": ["q", "k", "q"]})
    with RunWriter(tmp_path, CONFIG) as writer:
        for step in (10, 30):
            for name, table in {"metrics": metrics, "pca": pca}.items():
                writer.write_table(name, table[table["step"] <= step])
            if step == 10:
                writer.write_checkpoint({"step": step})
    with RunWriter(tmp_path, CONFIG, resume=True) as writer:
        assert writer.checkpoint == {"step": 10}
        assert writer.read_table("metrics")["step"].tolist() == [0, 10]
        assert writer.read_table("pca")["matrix"].tolist() == ["q", "k"]
        assert writer.read_table("curvature").empty


def test_one_writer(tmp_path: Path) -> None:
    with (
        RunWriter(tmp_path, CONFIG) as first,
        pytest.raises(RunError, match=f"is being written by process {os.getpid()}"),
        RunWriter(first.path, CONFIG, resume=True),
    ):
        pass
    with RunWriter(tmp_path, CONFIG, resume=True):
        pass


def test_a_killed_writer_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from grokcurv.runs import RunWriter\n"
        "with RunWriter(sys.argv[1], {'op': 'add'}): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-P", "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with (
            pytest.raises(RunError, match=f"process {child.pid}$"),
            RunWriter(tmp_path, {"op": "add"}, resume=True),
        ):
            pass
        assert open_run(tmp_path).status == "running"
    finally:
        child.kill()
        child.wait()
    (tmp_path / ".metrics.parquet.tmp").write_bytes(b"half a file")
    assert open_run(tmp_path).status == "interrupted"
    with RunWriter(tmp_path, {"op": "add"}, resume=True):
        assert not list(tmp_path.glob(".*.tmp"))


def test_leaving_by_an_exception_sets_the_status(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunWriter(tmp_path, CONFIG):
        1 / 0  # noqa: B018
    assert open_run(tmp_path).status == "failed: division by zero"
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path, CONFIG, resume=True):
        raise KeyboardInterrupt
    assert open_run(tmp_path).status == "interrupted"


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.parquet", "checkpoint.safetensors"])
@pytest.mark.parametrize("damage", [b"", b"{", b"garbage" * 100])
def test_damage_is_a_clear_error(tmp_path: Path, name: str, damage: bytes) -> None:
    with RunWriter(tmp_path, CONFIG) as writer:
        writer.write_table("metrics", pd.DataFrame({"step": [0]}))
        writer.write_checkpoint({"step": 0, "x": torch.ones(3)})
    (tmp_path / name).write_bytes(damage)

    def read() -> None:
        run = open_run(tmp_path)
        run.metrics  # noqa: B018
        run.checkpoint()

    with pytest.raises(RunError, match=rf"{name} is (missing or )?damaged"):
        read()


def test_a_later_schema_is_a_clear_error(tmp_path: Path) -> None:
    with RunWriter(tmp_path, CONFIG):
        pass
    (tmp_path / "config.json").write_text(json.dumps({"schema": 2, "config": CONFIG}))
    with pytest.raises(RunError, match="its schema version is 2, this grokcurv reads 1"):
        open_run(tmp_path)


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write into"), RunWriter(tmp_path / "file", CONFIG):
        pass


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"x\.json: No space left on device \(3 bytes to write\)"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    try:
        with RunWriter(tmp_path / "run", CONFIG) as writer:
            writer.write_checkpoint({"step": 0, "x": torch.ones(10)})
        with (
            pytest.raises(RunError, match="No space left on device"),
            RunWriter(tmp_path / "run", CONFIG, resume=True) as writer,
        ):
            writer.write_checkpoint({"step": 1, "x": torch.ones(100_000)})
        run = open_run(tmp_path / "run")
        assert run.checkpoint()["x"].equal(torch.ones(10))
        assert run.status.startswith("failed: cannot write")
        assert not list(run.path.glob(".*.tmp"))
    finally:
        for _ in range(20):
            if subprocess.run(["umount", str(tmp_path)], check=False, capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
