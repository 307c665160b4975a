"""`make gpu`: what it makes of the output of its tools, and that it goes on, stops in time and writes its record."""

from __future__ import annotations

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
        ("..", None, "OUT OF TIME"),
    ],
)
def test_gpu_tests_that_did_not_run_have_not_passed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, output: str, code: int | None, state: str
) -> None:
    monkeypatch.setattr(script, "execute", lambda *arguments: script.Done(output, code))
    outcome = script.gpu_tests(1.0)
    assert outcome.state == state
    assert output.splitlines()[-1] in outcome.text


def test_a_command_that_takes_too_long_is_ended_with_its_children(script: ModuleType) -> None:
    start = time.monotonic()
    done = script.execute("slow", ["sh", "-c", "echo begun; sleep 60 & wait"], 0.5)
    assert (done.code, done.output) == (None, "begun\n")
    assert time.monotonic() - start < 10


def test_every_step_is_recorded_and_gets_its_time(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {}

    def step(name: str, least: float, state: str) -> object:
        return script.Step(name, least, lambda limit: limits.setdefault(name, limit) and script.Outcome(state, "said"))

    monkeypatch.setattr(
        script, "STEPS", [step("build", 60, "passed"), step("a", 100, "FAILED"), step("b", 80, "clean")]
    )
    assert script.main() == 1
    assert [round(limit) for limit in limits.values()] == [script.ALL - 180, script.ALL - 80, script.ALL]
    (file,) = (script.BUILD / "records").glob("gpu-*.md")
    record = file.read_text()
    for text in (
        "| device, driver, memory | ",
        "| torch | ",
        "| a | FAILED | 0 |",
        "## Build: passed",
        "## B: clean\n\nsaid",
    ):
        assert text in record

    monkeypatch.setattr(script, "STEPS", [step("build", 60, "FAILED"), step("c", 100, "passed")])
    assert script.main() == 1
    assert "| c | not run | 0 |" in file.read_text()
    assert "c" not in limits

    monkeypatch.setattr(script, "STEPS", [step("d", 60, "passed"), step("e", 100, "no verdict")])
    assert script.main() == 0
