"""`make gpu` and `make gpu-check`: build, test and measure the CUDA kernels here, and record what came of it.

    python3 benches/record_gpu.py          # builds, measures, tests: what tells the most, first
    python3 benches/record_gpu.py check    # with that build: sanitizers, a profiler, how tensor cores round

Asks for a GPU, nvcc, CMake and Ninja, and in the python3 that runs it PyTorch, pybind11 and pytest; for no network and
no virtual environment. The build is in build/gpu. The record, gpu-<date>.md or gpu-check-<date>.md, and all that was
printed, in a .log of that name, are in the folder GROKCURV_RECORD or in docs/measurements; both are written after every
step. A step that fails or runs out of time is written down and the next one begins; the exit status says whether one
failed.

GROKCURV_CUDA_ARCH, such as 90, is the architecture to build for where there is no device to ask; GROKCURV_COMMIT is the
commit to name where git knows none, or another.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
GPU_TESTS = ROOT / "tests/test_gpu.py"
RAN = re.compile(r"^GPU tests: (\d+) ran on .*$", re.M)
NO_DEVICE = re.compile(r"no (?:CUDA )?device|built without CUDA", re.I)


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


class Course(NamedTuple):
    """Steps, the seconds that they may take together, and what a record of them is called."""

    name: str
    seconds: float
    steps: Sequence[Step]


# ------------------------------------------------------------------------------------------------------------ commands


def execute(name: str, command: list[str | Path], limit: float, **environment: str) -> Done:
    """Runs it in the built package, so that no other grokcurv is found; keeps what it prints, however it ends.

    That goes to a file, not through a pipe, which what the command has started could hold open for ever.
    """
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


OPS = ("perturb", "commutator", "subspace", "gram", "rotate", "eigh", "sketch", "draw")
"""Words that single out an op's tests."""
LARGE = "2_to_the_31 or long_vector"
PROCESSES = {
    **{op: (GPU_TESTS, "-k", f"{op} and not ({LARGE})") for op in OPS},
    "all ops": (GPU_TESTS, "-k", f"not ({' or '.join([*OPS, LARGE])})"),
    "measurement": (ROOT / "tests/test_gpu_measurement.py",),
    "large": (GPU_TESTS, "-k", LARGE),
}
"""The GPU tests, by the process that they share: a kernel that crashes takes along the tests that come after it."""
AT_ONCE = max(2, (os.cpu_count() or 2) // 2)
"""Each computes on the host too, what its numbers should be."""


def gpu_tests(limit: float) -> Outcome:
    """Tests that found no GPU have not passed."""
    end = time.monotonic() + limit

    def run(name: str) -> Done:
        return execute(f"gpu-tests-{name.replace(' ', '-')}", pytest(*PROCESSES[name]), end - time.monotonic())

    *small, large = PROCESSES
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = dict(zip(small, pool.map(run, small), strict=True))
    done[large] = run(large)  # wants the memory for itself
    states = {name: one.state for name, one in done.items()}
    states |= {name: "did not run" for name, one in done.items() if one.code == 0 and not RAN.search(one.output)}
    bad = [name for name, state in states.items() if state != "passed"]
    ran = sum(int(found[1]) for one in done.values() if (found := RAN.search(one.output)))
    lines = [f"{ran} ran.", *(f"* {name}: {state}" for name, state in states.items())]
    lines += [f"\n{name}:\n\n{tail(done[name].output)}" for name in bad]
    unseen = all(states[name] == "did not run" for name in bad)
    state = "passed" if not bad else "DID NOT RUN" if unseen else "FAILED"
    return Outcome(state, "\n".join(lines))


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


def bench(part: str, limit: float) -> Outcome:
    """Some cases of `grokcurv bench`; the lines that are there, even if time runs out."""
    done = execute(part, [sys.executable, ROOT / "benches/all_cases.py", "cuda", "--part", part], limit)
    found = "\n".join(line for line in done.output.splitlines() if line.startswith(("|", "*")) or not line)
    if done.code == 0:
        return Outcome("passed", found)
    return Outcome(without_device(done), f"{found}\n\n{tail(done.output, 15)}")


def without_device(done: Done) -> str:
    """The state of what has not passed: it may have had nothing to run on."""
    return "DID NOT RUN" if done.code and NO_DEVICE.search(done.output) else done.state.upper()


PROFILED = {
    "CommutatorRange": "defect arithmetic, P = 100,000,000",
    "GramRange": "Gram matrix, 32 x 32 of 30,000,000",
    "RotateColumns": "32 rows of 30,000,000 rotated to 32",
}
"""Kernels, and cases that launch them."""
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")


def profile(kernel: str, limit: float) -> Outcome:
    """One launch under Nsight Compute, at the clocks that there are; where that may not count, there is no verdict."""
    command = [
        *("ncu", "--clock-control", "none", "--launch-count", "1"),
        *("--kernel-name-base", "demangled", "--kernel-name", f"regex:{kernel}"),
        *(word for section in SECTIONS for word in ("--section", section)),
        *(sys.executable, ROOT / "benches/all_cases.py", "cuda", "--once", "--only", PROFILED[kernel]),
    ]
    done = execute(f"profile-{kernel}", command, limit)
    rows = re.findall(r"^ {4}(\S.*?)  +(\S+)? +([\d.,]+)$", done.output, re.M)
    if done.code == 0 and rows:
        table = ["| | | |", "|---|---|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
        return Outcome("profiled", "\n".join(table))
    return Outcome("out of time" if done.code is None else "no verdict", tail(done.output, 10))


def tensor_cores(limit: float) -> Outcome:
    """In which order float64 tensor cores round, as a probe of its own finds."""
    program = BUILD / "tensor_cores"
    arguments = ["-std=c++20", f"-arch=sm_{architecture()}", "-o", program, ROOT / "benches/tensor_cores.cu"]
    done = execute("tensor-cores-build", ["nvcc", *arguments], limit)
    if done.code == 0:
        done = execute("tensor-cores", [program], limit)
    return Outcome("passed" if done.code == 0 else without_device(done), tail(done.output))


def build_is_there(limit: float) -> Outcome:
    core = list(PACKAGE.glob("grokcurv/_cuda*.so"))
    return Outcome("there", f"{core[0].name}") if core else Outcome("MISSING", "`make gpu` makes it.")


MEASURE = Course(
    "gpu",
    290.0,
    (
        Step("build", 60, build),
        Step("ceilings", 10, partial(bench, "ceilings")),
        Step("kernels", 60, partial(bench, "kernels")),
        Step("GPU tests", 70, gpu_tests),
        Step("measurement", 20, partial(bench, "measurement")),
        Step("programs", 40, partial(bench, "programs")),
    ),
)
CHECK = Course(
    "gpu-check",
    230.0,
    (
        Step("build", 1, build_is_there),
        *(Step(tool, 40, partial(sanitizer, tool)) for tool in ("memcheck", "racecheck", "synccheck")),
        *(Step(f"profile of {kernel}", 20, partial(profile, kernel)) for kernel in PROFILED),
        Step("tensor cores", 15, tensor_cores),
    ),
)

# -------------------------------------------------------------------------------------------------------------- record


def printed(*command: str) -> str:
    """What a command prints; nothing if it does not work here."""
    done = execute("facts", [*command], 30)
    return "" if done.code != 0 else done.output.strip()


def facts() -> dict[str, str]:
    device = printed("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    release = re.search(r"release (\S+),", printed("nvcc", "--version"))
    commit = os.environ.get("GROKCURV_COMMIT") or printed("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return {
        "device, driver, memory": device or "none",
        "nvcc": release[1] if release else "none",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "Python": platform.python_version(),
        "grokcurv": f"commit {commit or 'unknown'}",
    }


class Record:
    """What is known of a course so far, on the disk after every step."""

    def __init__(self, course: Course) -> None:
        self.course = course
        folder = Path(os.environ.get("GROKCURV_RECORD") or ROOT / "docs/measurements")
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{course.name}-{date.today()}.md"
        self.rows: list[str] = []
        self.sections: list[str] = []
        known = [f"| {name} | {value} |" for name, value in facts().items()]
        title = f"# {course.name.replace('-', ' ').replace('gpu', 'GPU')}, {date.today()}"
        self.head = [title, "", f"Written by `make {course.name}`.", "", "| | |", "|---|---|", *known, ""]
        self.write()

    def add(self, step: Step, outcome: Outcome, seconds: float) -> None:
        self.rows.append(f"| {step.name} | {outcome.state} | {seconds:.0f} |")
        title = step.name[0].upper() + step.name[1:]
        self.sections.append(f"\n## {title}: {outcome.state}\n\n{outcome.text.strip()}")
        self.write()

    def write(self) -> None:
        rest = [f"| {step.name} | not yet | |" for step in self.course.steps[len(self.rows) :]]
        table = ["| step | outcome | seconds |", "|---|---|---|", *self.rows, *rest]
        self.text = "\n".join([*self.head, *table, *self.sections, ""])
        self.file.write_text(self.text)
        logs = sorted(BUILD.glob("*.txt"), key=lambda log: log.stat().st_mtime)
        printed = (f"=== {log.stem}\n{log.read_text(errors='replace')}\n" for log in logs)
        self.file.with_suffix(".log").write_text("".join(printed))


def main(course: Course = MEASURE) -> int:
    for log in BUILD.glob("*.txt"):
        log.unlink()
    end, left = time.monotonic() + course.seconds, sum(step.least for step in course.steps)
    record, states, built = Record(course), [], True
    for step in course.steps:
        begun, left = time.monotonic(), left - step.least
        limit = end - begun - left
        print(f"{step.name}, {limit:.0f} s at most ...", flush=True)
        outcome = step.run(limit) if built else Outcome("not run", "There is no build to run.")
        built = built and not (step.name == "build" and outcome.state.isupper())
        states.append(outcome.state)
        record.add(step, outcome, time.monotonic() - begun)
    print(record.text, f"Record: {record.file}", sep="\n")
    return int(any(state.isupper() for state in states))


if __name__ == "__main__":
    raise SystemExit(main(CHECK if sys.argv[1:] == ["check"] else MEASURE))
