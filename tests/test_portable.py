"""The kernels of the CPU by other compilers and for other processors: the same bits.

GCC with OpenMP is what the package is built with here. Clang with libc++ and without OpenMP is what there is on a Mac;
aarch64 is cross-compiled, and run by qemu. Where a compiler is not installed its test is skipped; on Debian:
``apt-get install clang libc++-dev libc++abi-dev libomp-dev g++-aarch64-linux-gnu qemu-user-static``.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted(ROOT.glob("csrc/cpu/*.cpp"))
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
SERIAL = ["-Wno-unknown-pragmas", "-Wno-unused-parameter"]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]


def built(folder: Path, compiler: list[str], isas: tuple[str, ...]) -> Path:
    """The harness, of which every kernel is compiled once for each instruction set."""
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]} here")
    objects = []
    for isa in isas:
        march = [] if isa == "default" else [f"-march=x86-64-{isa}"]
        for source in KERNELS:
            if source.stem == "isa":
                continue
            target = folder / f"{source.stem}-{isa}.o"
            command = [
                *compiler[:1],
                *FLAGS,
                *compiler[1:],
                *INCLUDES,
                *march,
                f"-DGROKCURV_ISA=isa_{isa}",
                "-c",
                source,
                "-o",
                target,
            ]
            subprocess.run(command, check=True)
            objects.append(target)
    harness = folder / "portable"
    sources = [ROOT / "tests/portable.cpp", ROOT / "csrc/cpu/isa.cpp"]
    subprocess.run([*compiler[:1], *FLAGS, *compiler[1:], *INCLUDES, *sources, *objects, "-o", harness], check=True)
    return harness


def lines(command: list[str | Path]) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = lines([built(tmp_path_factory.mktemp("gcc"), ["g++", "-fopenmp"], ("default", "v3", "v4"))])
    assert len(found) > 300
    assert len(set(found)) > 0.9 * len(found)
    return found


@pytest.mark.long
@pytest.mark.parametrize("openmp", [False, True])
def test_clang(openmp: bool, truth: list[str], tmp_path: Path) -> None:
    extra = ["-fopenmp"] if openmp else SERIAL
    harness = built(tmp_path, ["clang++", "-stdlib=libc++", *extra], ("default", "v3", "v4"))
    for isa in ("default", "v3"):
        assert lines(["env", f"GROKCURV_ISA={isa}", harness]) == truth


@pytest.mark.long
def test_aarch64(truth: list[str], tmp_path: Path) -> None:
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no qemu-aarch64 here")
    harness = built(tmp_path, ["aarch64-linux-gnu-g++", "-static", *SERIAL], ("default",))
    assert lines([emulator, harness]) == truth
