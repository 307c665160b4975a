"""`make gpu`: what it makes of the output of its tools, and that it goes on, stops in time and writes its record."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from types import ModuleType

import pytest
import record_gpu


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(record_gpu, "BUILD", tmp_path)
    monkeypatch.setattr(record_gpu, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("GROKCURV_RECORD", str(tmp_path / "records"))
    return record_gpu


BANNER = "========= COMPUTE-SANITIZER\n"
RAN = "9 passed, 90 deselected in 12.30s\nGPU tests: 9 ran on NVIDIA H100 (sm_90)\n"
FAILED = "1 failed, 8 passed in 12.30s\nGPU tests: 9 ran on NVIDIA H100 (sm_90)\n"
SKIPPED = "9 skipped in 1.30s\nGPU tests: 9 did not run: torch finds no CUDA device\n"
NO_ERROR = "========= ERROR SUMMARY: 0 errors\n"
NO_HAZARD = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
HAZARD = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
INVALID = "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 3 errors\n"
NOT_STARTED = "========= Error: Target application terminated before first instrumented API call\n"
REFUSED = "========= Error: Internal Sanitizer Error: device not supported\n"


@pytest.mark.parametrize(
    ("output", "code", "state"),
    [
        (BANNER + RAN + NO_ERROR, 0, "clean"),
        (BANNER + RAN + NO_HAZARD, 0, "clean"),
        (BANNER + RAN + HAZARD, 0, "ERRORS FOUND"),
        (BANNER + FAILED + INVALID, 1, "ERRORS FOUND"),
        (BANNER + INVALID, 1, "ERRORS FOUND"),  # and Python died of it
        (BANNER + INVALID, None, "ERRORS FOUND"),
        (BANNER + FAILED + NO_ERROR, 1, "ERRORS FOUND"),  # results were wrong
        (BANNER + NO_ERROR, 0, "no verdict"),  # nothing ran under it
        (BANNER + SKIPPED + NO_ERROR, 0, "no verdict"),
        (BANNER + RAN, 0, "no verdict"),
        (BANNER + NOT_STARTED + NO_ERROR, 0, "no verdict"),
        (BANNER + REFUSED + FAILED + "========= ERROR SUMMARY: 1 error\n", 1, "no verdict"),
        (BANNER + REFUSED + SKIPPED + NO_ERROR, 0, "no verdict"),
        (BANNER, None, "out of time"),
        ("No such file or directory: 'compute-sanitizer'", 127, "no verdict"),
    ],
)
def test_verdicts_of_a_sanitizer(script: ModuleType, output: str, code: int | None, state: str) -> None:
    outcome = script.verdict(script.Done(output, code))
    assert outcome.state == state
    assert output.splitlines()[-1] in outcome.text


@pytest.mark.parametrize(
    ("output", "code", "state"),
    [
        (RAN, 0, "passed"),
        (SKIPPED, 0, "DID NOT RUN"),
        ("FAILED tests/test_gpu.py::test_x\n" + FAILED, 1, "FAILED"),
        ("..", None, "FAILED"),
    ],
)
@pytest.mark.parametrize("where", ["every process", "one"])
def test_gpu_tests_that_did_not_run_have_not_passed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, code: int | None, state: str, where: str
) -> None:
    """Nor have those of one process, if it crashed; the others still count."""

    def execute(name: str, *_: object) -> object:
        bad = where == "every process" or name == "gpu-tests-gram"
        return script.Done(output, code) if bad else script.Done(RAN, 0)

    monkeypatch.setattr(script, "execute", execute)
    outcome = script.gpu_tests(1.0)
    assert outcome.state == state
    assert ("* gram: passed" in outcome.text) == (state == "passed")
    if state != "passed":
        assert output.splitlines()[-1] in outcome.text
    if where == "one":
        ran = len(script.PROCESSES) * 9 if state == "passed" else (len(script.PROCESSES) - 1) * 9
        assert f"{ran + 9 * (state == 'FAILED' and code == 1)} ran." in outcome.text


@pytest.mark.parametrize(
    ("output", "code", "state"),
    [
        ("| a row |\n* met: it\n", 0, "passed"),
        ("| a row |\nno CUDA device\n", 1, "DID NOT RUN"),
        ("| a row |\nTraceback\nRuntimeError: unspecified launch failure\n", 1, "FAILED"),
        ("| a row |\n", None, "OUT OF TIME"),
    ],
)
def test_rows_that_were_measured_are_kept(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, code: int | None, state: str
) -> None:
    monkeypatch.setattr(script, "execute", lambda *arguments: script.Done(output, code))
    outcome = script.bench("kernels", 1.0)
    assert (outcome.state, outcome.text.splitlines()[0]) == (state, "| a row |")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the path")
def test_the_probe_of_tensor_cores_gets_as_far_as_a_device(script: ModuleType) -> None:
    assert script.tensor_cores(120.0).state in ("DID NOT RUN", "passed")


PROFILE = """
  grokcurv::cuda::kernel<GramRange>(GramRange) (1, 1, 1)x(128, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Section: GPU Speed Of Light Throughput
    ----------------------- ----------- ------------
    Metric Name             Metric Unit Metric Value
    ----------------------- ----------- ------------
    DRAM Frequency                  Ghz         2.60
    Memory Throughput                 %        71.05
    Elapsed Cycles                cycle    1,234,567
    Threads                                      128
"""


@pytest.mark.parametrize(
    ("output", "code", "state"),
    [
        (PROFILE, 0, "profiled"),
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n", 1, "no verdict"),
        ("==WARNING== No kernels were profiled.\n", 0, "no verdict"),
        ("", None, "out of time"),
    ],
)
def test_a_profile(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, code: int | None, state: str
) -> None:
    monkeypatch.setattr(script, "execute", lambda *arguments: script.Done(output, code))
    outcome = script.profile("GramRange", 1.0)
    assert outcome.state == state
    if state == "profiled":
        assert outcome.text.splitlines()[2:] == [
            "| DRAM Frequency | Ghz | 2.60 |",
            "| Memory Throughput | % | 71.05 |",
            "| Elapsed Cycles | cycle | 1,234,567 |",
            "| Threads |  | 128 |",
        ]


def test_a_command_that_takes_too_long_is_ended_with_its_children(script: ModuleType) -> None:
    start = time.monotonic()
    done = script.execute("slow", ["sh", "-c", "echo begun; sleep 60 & wait"], 0.5)
    assert (done.code, done.output) == (None, "begun\n")
    assert time.monotonic() - start < 10


def test_every_step_is_recorded_and_gets_its_time(script: ModuleType) -> None:
    limits, written = {}, {}
    records = script.BUILD / "records"

    def course(*steps: tuple[str, float, str]) -> object:
        def step(name: str, least: float, state: str) -> object:
            def run(limit: float) -> object:
                limits[name] = limit
                written[name] = next(records.glob("gpu-*.md")).read_text()
                script.execute(name, ["echo", f"printed by {name}"], 5.0)
                return script.Outcome(state, "said")

            return script.Step(name, least, run)

        return script.Course("gpu", 400.0, [step(*one) for one in steps])

    assert script.main(course(("build", 60, "passed"), ("a", 100, "FAILED"), ("b", 80, "clean"))) == 1
    assert [round(limit) for limit in limits.values()] == [220, 320, 400]
    (file,) = records.glob("gpu-*.md")
    record = file.read_text()
    for text in (
        "| device, driver, memory | ",
        "| torch | ",
        "| a | FAILED | 0 |",
        "## Build: passed",
        "## B: clean\n\nsaid",
    ):
        assert text in record
    # Whatever ends it, what was there before is written down, and what was not.
    assert "| build | passed | 0 |\n| a | not yet | |\n| b | not yet | |" in written["a"]
    assert "=== a\nprinted by a\n" in file.with_suffix(".log").read_text()

    assert script.main(course(("build", 60, "FAILED"), ("c", 100, "passed"))) == 1
    assert "| c | not run | 0 |" in file.read_text()
    assert "c" not in limits

    assert script.main(course(("d", 60, "passed"), ("e", 100, "no verdict"))) == 0


def test_steps_have_time_for_what_they_need(script: ModuleType) -> None:
    for course, most in ((script.MEASURE, 300), (script.CHECK, 240)):
        assert sum(step.least for step in course.steps) <= course.seconds < most
