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
    said = subprocess.run(
        [sys.executable, "-m", "grokcurv", "train", "--steps", "0"],
        env=os.environ | {"GROKCURV_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()  # one, without a traceback
    assert line.startswith("grokcurv: grokcurv._cpu, the compiled core, does not load (GROKCURV_ISA=sse9: compiled for")
    assert line.endswith("docs/building.md says how to build it")


def test_the_widest_instruction_set_is_the_default() -> None:
    assert load_core(GROKCURV_ISA="").stdout.strip() == [isa for isa, runs in _cpu.ISAS.items() if runs][-1]


def test_building_needs_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    names = {re.split(r"[<>=]", requirement)[0] for requirement in project["build-system"]["requires"]}
    assert names == {"setuptools", "cmake", "ninja", "pybind11"}


STAND_IN = """\
#!{python}
import shutil, sys
targets = [word.partition("=")[2] for word in sys.argv if word.startswith("-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=")]
for target in targets:
    shutil.copy({core!r}, target)
"""
"""A cmake that hands over the core of this package instead of compiling one."""


@pytest.mark.parametrize("core", ["ready", pytest.param("compiled", marks=pytest.mark.long)])
def test_a_wheel_works_in_a_fresh_environment(core: str, tmp_path: Path) -> None:
    """From a source distribution: nothing that is needed lies outside of either."""
    import setuptools

    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__}; pyproject.toml asks for 77")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CMAKE"))}
    environment["CMAKE_ARGS"] = "-DGROKCURV_CUDA=OFF"
    tools = [str(Path(sys.executable).parent), *os.environ["PATH"].split(os.pathsep)]
    if core == "ready":
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "cmake").write_text(STAND_IN.format(python=sys.executable, core=_cpu.__file__))
        (tmp_path / "bin" / "cmake").chmod(0o755)
        tools.insert(0, str(tmp_path / "bin"))
    environment["PATH"] = os.pathsep.join(tools)

    def run(*command: object, cwd: Path = tmp_path) -> str:
        words = list(map(str, command))
        done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    ignored = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "__pycache__", "docs", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    build = "from setuptools.build_meta import build_sdist; build_sdist('..')"
    run(sys.executable, "-c", build, cwd=tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    offline = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    (source,) = tmp_path.glob("grokcurv-*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", *offline, "--no-build-isolation", source)
    (wheel,) = tmp_path.glob("grokcurv-*.whl")

    fresh = tmp_path / "fresh"
    run(sys.executable, "-m", "venv", "--without-pip", fresh)
    python = fresh / "bin" / "python"
    (packages,) = fresh.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]  # torch and others, but no editable install
    (packages / "dependencies.pth").write_text("\n".join(ours))
    run(sys.executable, "-m", "pip", "--python", python, "install", *offline, wheel)
    installed = packages / "grokcurv"
    assert run(python, "-c", "import grokcurv; print(grokcurv.__path__[0])").strip() == str(installed)
    assert "self test" in run(fresh / "bin" / "grokcurv", "doctor")
    run(
        fresh / "bin" / "grokcurv",
        "train",
        "--p",
        5,
        "--batch-size",
        0,
        "--steps",
        1,
        "--measure-every",
        0,
        "--out",
        "run",
    )
    assert run(fresh / "bin" / "grokcurv", "report", "run").strip() == "run/report.html"
    assert (installed / "py.typed").is_file()


def test_importing_takes_torch_and_numpy_alone() -> None:
    """Whatever else a function needs is imported where it is used: pandas and scipy.stats cost a second."""
    code = """\
import sys, torch
before = set(sys.modules)
import grokcurv
names = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
names = {name for name in names if "cython" not in name}  # which numpy.random puts there
assert names <= {"grokcurv", "numpy"}, names
assert not {"pandas", "scipy", "matplotlib", "ray", "pyarrow"} & set(sys.modules), "torch has brought them"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_core_includes_nothing_of_torch_or_python() -> None:
    """Pointers and sizes alone; pybind11 in the bindings."""
    for source in sorted(CORE.rglob("*.[ch]*")):
        included = re.findall(r'#include [<"]([^>"]+)[>"]', source.read_text())
        foreign = [path for path in included if path.startswith(("torch/", "ATen/", "c10/", "Python.h", "pybind11/"))]
        assert not foreign or source.parent.name == "bindings", (source, foreign)
        assert not any(path.startswith(("torch/", "ATen/", "c10/")) for path in foreign)


def test_openmp_is_asked_in_one_place() -> None:
    """Which knows of compilers without it."""
    asks = [
        path.name for path in (*CORE.rglob("*.cpp"), *CORE.rglob("*.h")) if re.search(r"\bomp_|<omp", path.read_text())
    ]
    assert asks == ["threads.h"]


def test_every_kernel_is_compiled() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for source in sorted([*CORE.rglob("*.cpp"), *CORE.rglob("*.cu")]):
        assert str(source.relative_to(ROOT)) in listed


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) lists what the module links to")
def test_the_module_links_to_openmp_and_not_to_torch() -> None:
    assert _cpu.__file__ is not None
    dynamic = subprocess.run(["readelf", "-d", _cpu.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    runtimes = [name for name in needed if re.match("lib(gomp|omp|iomp)", name)]
    assert bool(runtimes) == bool(_cpu.OPENMP), needed  # a compiler without OpenMP makes kernels of one thread
    assert not any("torch" in name or "c10" in name for name in needed), needed
