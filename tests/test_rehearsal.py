"""The GPU tests and the GPU benches themselves, rehearsed on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from on_gpu import FASTER, FLOOR

from grokcurv.bench.plan import on_gpu

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


def test_gpu_benches() -> None:
    titles = [case.title for case in on_gpu(1000)]
    printed = run("benches/on_gpu.py", "--rehearse")
    for title in titles:
        assert f"| {title}<br>" in printed
    times = re.findall(r"\d (?:us|ms|s) ± \d+ %<br>", printed)
    assert len(times) > 40
    asked = FLOOR.keys() | FASTER.keys()
    assert asked <= {case.title for case in on_gpu()}
