"""The GPU tests and the GPU benches themselves, rehearsed on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    printed = run("benches/on_gpu.py", "--rehearse")
    assert "did not work" not in printed
    assert printed.count(" ms |") > 40
