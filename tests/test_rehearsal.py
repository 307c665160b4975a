"""The GPU tests and the GPU benches themselves, rehearsed on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from all_cases import TARGETS
from test_scripts import run as in_this_process

from grokcurv.bench import measurements, timing
from grokcurv.bench.plan import every_size

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_tests() -> None:
    pytest.importorskip("grokcurv._emulator", reason="grokcurv._emulator was not built: set GROKCURV_EMULATOR=ON")
    printed = run("-m", "pytest", "-p", "rehearsal", "tests/test_gpu.py", "tests/test_gpu_measurement.py")
    assert re.search(r"GPU tests: \d+ ran on no GPU, but the emulator in its place", printed)


def test_gpu_benches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "ROWS", 16)  # of a batch
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)
    titles = [case.title for case in every_size("cuda", 1000)]
    printed = in_this_process("all_cases.py", "cuda", "--shrink", "1000")
    for title in titles:
        assert f"| {title}<br>" in printed
    times = re.findall(r"\d (?:us|ms|s) ± \d+ %<br>", printed)
    assert len(times) > 40
    for device, targets in TARGETS.items():
        assert {target.title for target in targets} <= {case.title for case in every_size(device)}
