"""The CUDA kernels where there is no GPU: what ptxas makes of them, what the extension needs, how it is refused."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from ctypes.util import find_library
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import cases
import machine_code
import pytest
import torch

from grokcurv.ops import _dispatch

ROOT = Path(__file__).parent.parent
CORE = ROOT / "csrc"
NVCC = os.environ.get("CUDACXX") or shutil.which("nvcc")
REGISTERS = 65536
"""Of a multiprocessor, on every architecture since sm_60."""

# ------------------------------------------------------------------------------------------------------ what ptxas says


class Kernel(NamedTuple):
    """An entry of the machine code for one architecture."""

    name: str
    architecture: str
    stack: int
    local: int
    registers: int
    threads: int
    resident: int


@pytest.fixture(scope="module")
def kernels(extension: ModuleType) -> list[Kernel]:
    """Of the module that was built, as its machine code says; the launch bounds are in its PTX."""
    if problem := machine_code.missing():
        pytest.skip(f"{problem}: what ptxas made of the CUDA kernels was not looked at")
    bounds = {}
    ptx = machine_code.said("cuobjdump", "-ptx", machine_code.module())
    for name, attributes in re.findall(r"^\.visible \.entry (\w+)\(.*?^\)(.*?)^\{", ptx, re.DOTALL | re.MULTILINE):
        threads = re.findall(r"\.maxntid (\d+)", attributes)[0]
        bounds[name] = int(threads), int(re.findall(r"\.minnctapersm (\d+)", attributes)[0])
    report = machine_code.said("cuobjdump", "-res-usage", machine_code.module())
    found = []
    for section in report.split("Fatbin elf code:")[1:]:
        architecture = re.findall(r"^arch = (\w+)", section, re.MULTILINE)[0]
        usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
        for name, registers, stack, local in re.findall(usage, section):
            found.append(Kernel(name, architecture, int(stack), int(local), int(registers), *bounds[name]))
    assert {kernel.name for kernel in found} == bounds.keys()
    return found


def test_every_block_algorithm_is_compiled_for_every_architecture(kernels: list[Kernel], extension: ModuleType) -> None:
    """Those are the structs that state a number of threads."""
    architectures = {kernel.architecture for kernel in kernels}
    assert architectures == set(extension.ARCHITECTURES.split(", "))
    assert architectures >= {"sm_80", "sm_90"} or "GROKCURV_CUDA_ARCH" in os.environ
    stated = set()
    for path in (CORE / "block").glob("*.h"):
        for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", path.read_text(), re.DOTALL | re.MULTILINE):
            if re.search(r"static constexpr int threads = ", body):
                stated.add(f"{len(name)}{name}")  # as in a mangled name
    assert len(stated) >= 12
    for architecture in architectures:
        names = [kernel.name for kernel in kernels if kernel.architecture == architecture]
        assert {name for name in stated if not any(f"5block{name}" in mangled for mangled in names)} == set()


def test_every_kernel_of_every_source_is_preloaded(kernels: list[Kernel], extension: ModuleType) -> None:
    """One that several sources have is there once for each, and is loaded for each."""
    assert Counter(kernel.architecture for kernel in kernels)[kernels[0].architecture] == extension.KERNELS


def test_registers_do_without_the_stack(kernels: list[Kernel]) -> None:
    """Nothing is spilled, and no array is indexed in memory: both would be there, or in local memory."""
    assert [kernel for kernel in kernels if kernel.stack or kernel.local] == []


def test_nothing_is_fused_but_what_says_so(kernels: list[Kernel]) -> None:
    options = re.findall(r"^ptxasOptions = (.*)$", machine_code.said("cuobjdump", "-ptx", machine_code.module()), re.M)
    assert len(options) == len(list(CORE.rglob("*.cu")))
    assert all("--fmad false" in each for each in options)
    assert "set(CMAKE_CUDA_STANDARD 20)" in (ROOT / "CMakeLists.txt").read_text()


def test_registers_suffice_for_the_blocks_that_are_to_be_resident(kernels: list[Kernel]) -> None:
    """A warp takes them in units of 256."""
    for kernel in kernels:
        a_warp = -(-32 * kernel.registers // 256) * 256
        assert kernel.resident * kernel.threads // 32 * a_warp <= REGISTERS, kernel


# -------------------------------------------------------------------------------------------------------- the extension


@pytest.fixture(scope="module")
def extension() -> ModuleType:
    try:
        return import_module("grokcurv._cuda")
    except ModuleNotFoundError:
        assert NVCC is None or "GROKCURV_CUDA=OFF" in os.environ.get("CMAKE_ARGS", ""), "there is an nvcc, but no _cuda"
        pytest.skip("no nvcc on the path, so grokcurv._cuda was not built")


@pytest.mark.skipif(
    find_library("cuda") is not None, reason="there is an NVIDIA driver: tests/test_gpu.py goes further"
)
def test_it_loads_without_a_driver_and_says_so(extension: ModuleType) -> None:
    assert extension.driver() == 0
    with pytest.raises(RuntimeError, match=r"tensors on cuda:0: .* needs a driver .*there is no NVIDIA driver here"):
        _dispatch.cuda_core(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="loading a kernel: "):
        extension.preload()


def test_it_knows_what_it_was_built_with(extension: ModuleType) -> None:
    assert f"NVIDIA {extension.RUNTIME // 1000}.{extension.RUNTIME % 1000 // 10}." in extension.COMPILER
    assert tuple(_dispatch.TYPES.values()) == (extension.FLOAT32, extension.FLOAT64, extension.BFLOAT16)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) lists what the module links to")
def test_it_links_to_nothing_of_cuda_or_torch(extension: ModuleType) -> None:
    assert extension.__file__ is not None
    dynamic = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    assert any(name.startswith("libc.") for name in needed)
    assert not any(part in name for name in needed for part in ("cuda", "torch", "c10", "gomp")), needed


def test_every_source_has_machine_code_for_all_architectures_and_ptx_for_those_to_come(extension: ModuleType) -> None:
    assert extension.__file__ is not None
    architectures = [int(name.removeprefix("sm_")) for name in extension.ARCHITECTURES.split(", ")]
    expected = {("machine code", architecture) for architecture in architectures} | {("PTX", architectures[-1])}
    assert fat_binaries(Path(extension.__file__).read_bytes()) == Counter(
        dict.fromkeys(expected, len(list((CORE / "cuda").glob("*.cu"))))
    )


def fat_binaries(module: bytes) -> Counter[tuple[str, int]]:
    """What a module has for GPUs: NVIDIA's fat binaries, each a header and entries with a header of their own."""
    found: Counter[tuple[str, int]] = Counter()
    for magic in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), module):
        (size,) = struct.unpack_from("<Q", module, magic.end())
        entry = magic.end() + 8
        stop = entry + size
        while entry < stop:
            kind, _, header, length = struct.unpack_from("<HHIQ", module, entry)
            (architecture,) = struct.unpack_from("<I", module, entry + 28)
            found[{1: "PTX", 2: "machine code"}[kind], architecture] += 1
            entry += header + length
    return found


# ------------------------------------------------------------------------------------------------ how tensors get there


@pytest.fixture
def no_cores() -> Iterator[None]:
    """That of a test is not kept for the next."""
    _dispatch.cuda_core.cache_clear()
    yield
    _dispatch.cuda_core.cache_clear()


@pytest.mark.parametrize(
    ("runtime", "driver", "problem"),
    [
        (13000, 0, "built with CUDA 13.0, which needs a driver for CUDA 13 .*, and there is no NVIDIA driver here"),
        (13000, 12080, "which needs a driver for CUDA 13 .* the driver here is good for CUDA 12.8"),
        (13000, 13000, None),
        (13010, 13000, None),  # versions of one major number run beside each other
        (13000, 14020, None),
    ],
)
def test_which_drivers_will_do(runtime: int, driver: int, problem: str | None) -> None:
    found = _dispatch.cuda_problem(runtime, driver)
    assert found is None if problem is None else re.search(problem, found or "")


def test_cuda_tensors_never_go_to_the_cpu(monkeypatch: pytest.MonkeyPatch, no_cores: None) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(_dispatch, "import_module", missing)
    message = r"tensors on cuda:3 need the extension grokcurv\._cuda, .*docs/building\.md.*\.cpu\(\)"
    with pytest.raises(RuntimeError, match=message):
        _dispatch.core_of(torch.device("cuda", 3))
    for op in cases.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"grokcurv::{op}", "CUDA")


def test_kernels_are_loaded_once_for_each_device(monkeypatch: pytest.MonkeyPatch, no_cores: None) -> None:
    """Before the first call: a capture must not be the first to need one."""
    loaded: list[Any] = []
    device: list[Any] = []
    core = SimpleNamespace(RUNTIME=13000, driver=lambda: 13000, preload=lambda: loaded.append(device[-1]))
    monkeypatch.setattr(_dispatch, "import_module", {"grokcurv._cuda": core}.__getitem__)
    monkeypatch.setattr(torch.cuda, "device", lambda at: nullcontext(device.append(at)))
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for at in (first, second, first):
        assert _dispatch.cuda_core(at) is core
    assert loaded == [first, second]
