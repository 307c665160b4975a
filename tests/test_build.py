"""The build: what it needs, what it links to, and which instruction set it takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from grokcurv import _cpu

ROOT = Path(__file__).parent.parent
CORE = ROOT / "csrc"


def load_core(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from grokcurv import _cpu; print(_cpu.ISA)"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("isa", _cpu.ISAS)
def test_environment_chooses_the_instruction_set(isa: str) -> None:
    result = load_core(GROKCURV_ISA=isa)
    if _cpu.ISAS[isa]:
        assert result.stdout.strip() == isa
    else:
        assert result.returncode != 0
        assert f"GROKCURV_ISA={isa}: this processor lacks x86-64-{isa}" in result.stderr


def test_unknown_instruction_set_is_an_error() -> None:
    result = load_core(GROKCURV_ISA="sse9")
    assert result.returncode != 0
    assert f"GROKCURV_ISA=sse9: compiled for {', '.join(_cpu.ISAS)}" in result.stderr
    assert "docs/building.md" in result.stderr


def test_the_widest_instruction_set_is_the_default() -> None:
    assert load_core(GROKCURV_ISA="").stdout.strip() == [isa for isa, runs in _cpu.ISAS.items() if runs][-1]


def test_building_needs_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[<>=]", requirement)[0] for requirement in project["build-system"]["requires"]}
    assert names == {"setuptools", "cmake", "ninja", "pybind11"}


def test_the_core_includes_nothing_of_torch_or_python() -> None:
    """Pointers and sizes alone; pybind11 in the bindings."""
    for source in sorted(CORE.rglob("*.[ch]*")):
        included = re.findall(r'#include [<"]([^>"]+)[>"]', source.read_text())
        foreign = [path for path in included if path.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))]
        assert not foreign or source.parent.name == "bindings", (source, foreign)
        assert not any(path.startswith(("torch/", "ATen/", "c10/")) for path in foreign)


def test_every_kernel_is_compiled() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for source in sorted([*CORE.rglob("*.cpp"), *CORE.rglob("*.cu")]):
        assert str(source.relative_to(ROOT)) in listed


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) lists what the module links to")
def test_the_module_links_to_openmp_and_not_to_torch() -> None:
    assert _cpu.__file__ is not None
    dynamic = subprocess.run(["readelf", "-d", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert any(name.startswith("libgomp") for name in needed), needed
    assert not any("torch" in name or "c10" in name for name in needed), needed
