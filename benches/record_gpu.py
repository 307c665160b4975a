"""`make gpu`: builds, tests and measures the CUDA kernels on this machine, and writes a record of what came of it.

Asks for a GPU, nvcc, CMake and Ninja, and in the python3 that runs it PyTorch, pybind11 and pytest; for no network and
no virtual environment. All it makes is in build/gpu, and the record, gpu-<date>.md, in the folder GROKCURV_RECORD or in
docs/measurements. A step that fails or runs out of time is written down and the next one begins; the exit status says
whether one failed.

GROKCURV_CUDA_ARCH, such as 90, is the architecture to build for where there is no device to ask; GROKCURV_COMMIT is the
commit to name where there is no git to ask.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/gpu"
PACKAGE = BUILD / "package"
TOOLKIT = Path("/usr/local/cuda")
PATH = os.pathsep.join([os.environ.get("PATH", ""), str(TOOLKIT / "bin"), str(TOOLKIT / "compute-sanitizer")])
ALL = 470.0
"""Seconds that everything may take together."""
GPU_TESTS = ROOT / "tests/test_gpu.py"
RAN = re.compile(r"^GPU tests: \d+ ran on .*$", re.M)


class Done(NamedTuple):
    """A command that has run; ``code`` is None if it ran out of time."""

    output: str
    code: int | None

    @property
    def state(self) -> str:
        return "out of time" if self.code is None else "FAILED" if self.code else "passed"


class Outcome(NamedTuple):
    """What came of a step: a state, in capitals if something is wrong, and the Markdown of its section."""

    state: str
    text: str


class Step(NamedTuple):
    """Something to do in so many seconds, of which those before leave it ``least``."""

    name: str
    least: float
    run: Callable[[float], Outcome]


# ------------------------------------------------------------------------------------------------------------ commands


def execute(name: str, command: list[str | Path], limit: float, **environment: str) -> Done:
    """Runs it in the built package, so that no other grokcurv is found; keeps what it prints, however it ends."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{name}.txt"
    with log.open("w") as file:
        done = subprocess.run(
            ["timeout", "--signal=KILL", str(max(limit, 1.0)), *command],  # kills all that it started, and itself
            cwd=PACKAGE,
            env={**os.environ, "PATH": PATH, "PYTHONPATH": str(PACKAGE), **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return Done(log.read_text(errors="replace"), None if done.returncode == -signal.SIGKILL else done.returncode)


def pytest(*arguments: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-q", *arguments]


def tail(output: str, lines: int = 40) -> str:
    return "\n".join(["```", *output.rstrip().splitlines()[-lines:], "```"])


# --------------------------------------------------------------------------------------------------------------- steps


def build(limit: float) -> Outcome:
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "grokcurv", PACKAGE / "grokcurv", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    metadata = PACKAGE / f"grokcurv-{version}.dist-info/METADATA"  # where the package looks up its own version
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: grokcurv\nVersion: {version}\n")
    configure: list[str | Path] = [
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DGROKCURV_CUDA=ON", "-DGROKCURV_EMULATOR=ON", f"-DGROKCURV_CUDA_ARCH={architecture()}"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE / 'grokcurv'}",
    ]
    start = time.monotonic()
    done = execute("configure", configure, limit)
    if done.code == 0:
        done = execute("build", ["cmake", "--build", BUILD], limit - (time.monotonic() - start))
    if done.code == 0:
        return Outcome("passed", f"for sm_{architecture()}")
    return Outcome(done.state.upper(), tail(done.output))


def architecture() -> str:
    if torch.cuda.is_available():
        return "{}{}".format(*torch.cuda.get_device_capability())
    return os.environ.get("GROKCURV_CUDA_ARCH", "90")


def gpu_tests(limit: float) -> Outcome:
    """Tests that found no GPU have not passed."""
    done = execute("gpu-tests", pytest(GPU_TESTS, ROOT / "tests/test_gpu_measurement.py"), limit)
    if done.code == 0 and RAN.search(done.output):
        return Outcome("passed", tail(done.output, 2))
    return Outcome("DID NOT RUN" if done.code == 0 else done.state.upper(), tail(done.output))


def sanitizer(tool: str, limit: float) -> Outcome:
    """A few samples of each op under one of compute-sanitizer's tools."""
    command = [
        *("compute-sanitizer", "--tool", tool, "--target-processes", "all", "--kernel-name", "kns=grokcurv"),
        *(("--report-api-errors", "no") if tool == "memcheck" else ()),  # torch asks for things that may be refused
        *pytest(GPU_TESTS, "-k", "test_a_few_small_samples"),
    ]
    # Memory of its own for every tensor: an access beyond its end is beyond all.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
    return verdict(execute(tool, command, limit, **uncached))


REFUSAL = re.compile(
    r"^=+ .*(?:Internal Sanitizer Error|Unable to|[Nn]ot supported|[Pp]ermission|[Uu]nrecogni[sz]ed|unknown option"
    r"|terminated before first instrumented|No attachable process|Failed to)",
    re.M,
)
EVIDENCE = re.compile(r"^=+ .*(?:Invalid __\w+__|[Rr]ace reported|hazard at|Barrier error)", re.M)


def verdict(done: Done) -> Outcome:
    """Of a tool that a host refuses neither a clean summary counts nor a test that fails for want of a device."""
    found = [int(count) for count in re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) ", done.output, re.M)]
    ran, refused = RAN.search(done.output), REFUSAL.search(done.output)
    if EVIDENCE.search(done.output) or (not refused and (any(found) or (ran and done.code))):
        return Outcome("ERRORS FOUND", tail(done.output, 100))
    if done.code == 0 and ran and found and not refused:
        return Outcome("clean", tail(done.output, 3))
    return Outcome("out of time" if done.code is None else "no verdict", tail(done.output, 10))


def benches(limit: float) -> Outcome:
    done = execute("benches", [sys.executable, ROOT / "benches/all_cases.py", "cuda"], limit)
    found = "\n".join(line for line in done.output.splitlines() if line.startswith(("|", "*")) or not line)
    return Outcome(done.state, found if done.code == 0 else f"{found}\n\n{tail(done.output, 15)}")


STEPS = (
    Step("build", 60, build),
    Step("GPU tests", 100, gpu_tests),
    *(Step(tool, 40, partial(sanitizer, tool)) for tool in ("memcheck", "racecheck", "synccheck")),
    Step("benches", 120, benches),
)

# -------------------------------------------------------------------------------------------------------------- record


def printed(*command: str) -> str:
    """What a command prints; nothing if it does not work here."""
    done = execute("facts", [*command], 30)
    return "" if done.code != 0 else done.output.strip()


def facts() -> dict[str, str]:
    device = printed("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    release = re.search(r"release (\S+),", printed("nvcc", "--version"))
    commit = printed("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {
        "device, driver, memory": device or "none",
        "nvcc": release[1] if release else "none",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "Python": platform.python_version(),
        "grokcurv": f"commit {commit or os.environ.get('GROKCURV_COMMIT', 'unknown')}",
    }


def main() -> int:
    end, left = time.monotonic() + ALL, sum(step.least for step in STEPS)
    states, rows, sections = {}, [], []
    for step in STEPS:
        begun, left = time.monotonic(), left - step.least
        limit = end - begun - left
        print(f"{step.name}, {limit:.0f} s at most ...", flush=True)
        built = states.get("build", "passed") == "passed"
        outcome = step.run(limit) if built else Outcome("not run", "There is no build to run.")
        states[step.name] = outcome.state
        rows.append(f"| {step.name} | {outcome.state} | {time.monotonic() - begun:.0f} |")
        sections.append(f"\n## {step.name[0].upper()}{step.name[1:]}: {outcome.state}\n\n{outcome.text.strip()}")
    known = [f"| {name} | {value} |" for name, value in facts().items()]
    head = [f"# GPU run, {date.today()}", "", "Written by `make gpu`.", "", "| | |", "|---|---|", *known, ""]
    text = "\n".join([*head, "| step | outcome | seconds |", "|---|---|---|", *rows, *sections, ""])
    folder = Path(os.environ.get("GROKCURV_RECORD") or ROOT / "docs/measurements")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu-{date.today()}.md"
    file.write_text(text)
    print(text, f"Record: {file}", sep="\n")
    return int(any(state.isupper() for state in states.values()))


if __name__ == "__main__":
    raise SystemExit(main())
