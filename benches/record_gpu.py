"""`make gpu`: builds, tests and measures the CUDA kernels on this machine, and writes a record of what came of it.

Asks for a GPU, nvcc, CMake and Ninja, and in the python3 that runs it PyTorch, pybind11, pytest and pytest-benchmark;
for no network and no virtual environment. All it makes is in build/gpu, and the record, gpu-<date>.md, in the folder
GROKCURV_RECORD or in docs/measurements. A step that fails or runs out of time is written down and the next one begins;
the exit status says whether the build, a test, a bench's result or a sanitizer's verdict was wrong.

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
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build/gpu"
PACKAGE = BUILD / "package"
TOOLKIT = Path("/usr/local/cuda")
ALL = 470.0
"""Seconds that everything may take together."""
KERNEL_TESTS = ("perturb", "commutator_op", "subspace_op", "gram", "eigh", "rotate", "sketch", "ops")
SANITIZERS = ("memcheck", "racecheck", "synccheck")


@dataclass
class Done:
    """A command that has run."""

    output: str
    code: int | None
    """None: it ran out of time."""


@dataclass
class Outcome:
    state: str
    """passed or clean; FAILED or ERRORS FOUND; out of time, no verdict or not run."""
    text: str
    """Markdown."""

    @property
    def wrong(self) -> bool:
        return self.state.isupper()


@dataclass
class Step:
    name: str
    least: float
    """Seconds that are left for it by those before."""
    run: Callable[[float], Outcome]
    """Given how many seconds it may take."""


# ------------------------------------------------------------------------------------------------------------ commands


def environment(**more: str) -> dict[str, str]:
    tools = [str(TOOLKIT / "bin"), str(TOOLKIT / "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *tools])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE), **more}


def execute(name: str, command: list[str | Path], limit: float, **more: str) -> Done:
    """Runs it in the built package, so that no other grokcurv is found; keeps what it prints, however it ends."""
    log = BUILD / "logs" / f"{name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    PACKAGE.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                command,
                cwd=PACKAGE,
                env=environment(**more),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Done(str(error), 127)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
            code = None
    return Done(log.read_text(errors="replace"), code)


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
    start = time.monotonic()
    configure: list[str | Path] = [
        *("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DGROKCURV_CUDA=ON", "-DGROKCURV_EMULATOR=ON", f"-DGROKCURV_CUDA_ARCH={architecture()}"),
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={PACKAGE / 'grokcurv'}",
    ]
    done = execute("configure", configure, limit)
    if done.code == 0:
        done = execute("build", ["cmake", "--build", BUILD], limit - (time.monotonic() - start))
    if done.code != 0:
        return Outcome("FAILED" if done.code is not None else "OUT OF TIME", tail(done.output))
    return Outcome("passed", f"for sm_{architecture()}")


def architecture() -> str:
    if torch.cuda.is_available():
        return "{}{}".format(*torch.cuda.get_device_capability())
    return os.environ.get("GROKCURV_CUDA_ARCH", "90")


def gpu_tests(limit: float) -> Outcome:
    done = execute("gpu-tests", pytest(ROOT / "tests/test_gpu.py", ROOT / "tests/test_gpu_measurement.py"), limit)
    outcome = tests_outcome(done)
    if outcome.state == "passed" and not re.search(r"^GPU tests: \d+ ran on ", done.output, re.M):
        outcome.state = "DID NOT RUN"
    return outcome


def kernel_tests(limit: float) -> Outcome:
    files = [ROOT / f"tests/test_{name}.py" for name in KERNEL_TESTS]
    return tests_outcome(execute("kernel-tests", pytest(*files), limit))


def tests_outcome(done: Done) -> Outcome:
    """What pytest says at the end: how many passed, where GPU tests ran or why not, and what failed."""
    counts = re.findall(r"^\d+ (?:passed|failed|skipped|errors?|deselected).* in .*s.*$", done.output, re.M)[-1:]
    said = re.findall(r"^GPU tests: .*$", done.output, re.M)
    failures = re.findall(r"^(?:FAILED|ERROR) .*$", done.output, re.M)[:30]
    text = "\n".join(f"* {line}" for line in counts + said + failures)
    if done.code == 0:
        return Outcome("passed", text)
    return Outcome("FAILED" if done.code is not None else "OUT OF TIME", f"{text}\n\n{tail(done.output)}")


def sanitizer(tool: str) -> Callable[[float], Outcome]:
    def run(limit: float) -> Outcome:
        command = [
            *("compute-sanitizer", "--tool", tool, "--target-processes", "all", "--kernel-name", "kns=grokcurv"),
            *(("--report-api-errors", "no") if tool == "memcheck" else ()),  # torch asks for things that may be refused
            *pytest(ROOT / "tests/test_gpu.py", "-k", "test_a_few_small_samples"),
        ]
        # Memory of its own for every tensor: an access beyond its end is beyond all.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        return sanitizer_outcome(execute(tool, command, limit, **uncached))

    return run


REFUSAL = re.compile(
    r"^=+ .*(?:Internal Sanitizer Error|Unable to|[Nn]ot supported|[Pp]ermission|[Uu]nrecogni[sz]ed|unknown option"
    r"|terminated before first instrumented|No attachable process|Failed to).*$",
    re.M,
)
EVIDENCE = re.compile(r"^=+ .*(?:Invalid __\w+__|[Rr]ace reported|hazard at|Barrier error).*$", re.M)


def sanitizer_outcome(done: Done) -> Outcome:
    """A clean summary counts only where tests ran under the tool: one that was refused may print it too."""
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: (\d+) .*)$", done.output, re.M)
    said = "; ".join(text for text, _ in summaries)
    complaints = [match[0] for match in REFUSAL.finditer(done.output)]
    counted = any(int(count) for _, count in summaries)
    ran = re.search(r"^GPU tests: \d+ ran on ", done.output, re.M)
    failed = re.search(r"^\d+ (?:failed|errors?)\b", done.output, re.M)
    if EVIDENCE.search(done.output) or (not complaints and (counted or (ran and failed))):
        return Outcome("ERRORS FOUND", f"{said}\n\n{tail(done.output, 100)}")
    if done.code is None:
        return Outcome("out of time", tail(done.output, 10))
    if complaints or not ran or not summaries:
        return Outcome("no verdict", tail("\n".join(complaints) or done.output, 10))
    return Outcome("clean", said)


def benches(limit: float) -> Outcome:
    done = execute("benches", [sys.executable, ROOT / "benches/on_gpu.py"], limit)
    tables = "\n".join(line for line in done.output.splitlines() if line.startswith("|") or not line)
    if done.code == 0:
        return Outcome("passed", tables)
    return Outcome("FAILED" if done.code is not None else "out of time", f"{tables}\n\n{tail(done.output, 15)}")


STEPS = (
    Step("build", 60, build),
    Step("GPU tests", 100, gpu_tests),
    Step("tests of the kernels on the CPU", 40, kernel_tests),
    *(Step(tool, 40, sanitizer(tool)) for tool in SANITIZERS),
    Step("benches", 80, benches),
)

# -------------------------------------------------------------------------------------------------------------- record


def printed(*command: str) -> str | None:
    """What a command prints, or None if it does not work here."""
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def facts() -> dict[str, str]:
    device = "none"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        device = f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {memory}"
    nvcc = re.search(r"release (\S+),", printed("nvcc", "--version") or "")
    changed = bool(printed("git", "status", "--porcelain", "--untracked-files=no"))
    commit = printed("git", "rev-parse", "--short", "HEAD") or os.environ.get("GROKCURV_COMMIT", "unknown")
    return {
        "device": device,
        "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
        "nvcc": nvcc[1] if nvcc else "none",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "Python": platform.python_version(),
        "grokcurv": f"commit {commit}" + (", with changes that are not committed" if changed else ""),
    }


def record(known: dict[str, str], outcomes: dict[str, Outcome], took: dict[str, float]) -> str:
    lines = [f"# GPU run, {date.today()}", "", "Written by `make gpu`.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in known.items()]
    lines += ["", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {outcome.state} | {took[name]:.0f} |" for name, outcome in outcomes.items()]
    for name, outcome in outcomes.items():
        lines += ["", f"## {name[0].upper()}{name[1:]}: {outcome.state}", "", outcome.text.strip("\n")]
    return "\n".join(lines) + "\n"


def main() -> int:
    start = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    took: dict[str, float] = {}
    known = facts()
    for number, step in enumerate(STEPS):
        begun = time.monotonic()
        limit = ALL - (begun - start) - sum(later.least for later in STEPS[number + 1 :])
        print(f"{step.name}, {limit:.0f} s at most ...", flush=True)
        if "build" in outcomes and outcomes["build"].wrong:
            outcomes[step.name] = Outcome("not run", "There is no build to run.")
        else:
            outcomes[step.name] = step.run(limit)
        took[step.name] = time.monotonic() - begun
    text = record(known, outcomes, took)
    folder = Path(os.environ.get("GROKCURV_RECORD") or ROOT / "docs/measurements")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu-{date.today()}.md"
    file.write_text(text)
    print(text, f"Record: {file}", sep="\n")
    return 1 if any(outcome.wrong for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
