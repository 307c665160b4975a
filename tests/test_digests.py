"""Nothing that is computed has changed by a bit since the digests were written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STORED = Path(__file__).parent / "data/digests.json"


@pytest.fixture(scope="module")
def computed() -> dict[str, str]:
    """In a process of its own, whose random numbers, threads and default dtype are nobody else's."""
    command = [sys.executable, str(Path(__file__).parent / "digests.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", ["kernels", "kernels_of_runs", "pca", "run", "monitored", "sweep"])
def test_bits_are_those_that_were_stored(computed: dict[str, str], name: str) -> None:
    stored = json.loads(STORED.read_text())
    assert stored.keys() == computed.keys()
    if not name.startswith("kernels") and (stored["torch"], stored["torchs"]) != (
        computed["torch"],
        computed["torchs"],
    ):
        pytest.skip("torch computes other bits here than where the digests were written")
    assert computed[name] == stored[name]
