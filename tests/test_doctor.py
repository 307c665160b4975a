"""doctor: facts about the build, and a self-test that can fail."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from grokcurv import _cpu, doctor, ops


def test_report_says_what_was_built() -> None:
    facts = doctor.report()
    assert facts["build"]["instruction set"] == _cpu.ISA
    assert facts["build"]["instruction sets"].keys() == _cpu.ISAS.keys()
    assert "-ffp-contract=off" in facts["build"]["flags"]
    # A build from PyPI says which CUDA it is for in one of the two alone.
    assert facts["packages"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["machine"]["threads"] == torch.get_num_threads()
    assert "extension" in facts["cuda"]
    assert facts["self_test"] == dict.fromkeys(doctor.SELF_TESTS, "ok")


def test_cuda_kernels_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(COMPILER="NVIDIA 13.0", ARCHITECTURES="sm_80, sm_90", RUNTIME=13000, driver=lambda: 0)
    monkeypatch.setitem(sys.modules, "grokcurv._cuda", core)
    facts = doctor.report()["cuda"]
    assert facts["extension"] == "NVIDIA 13.0 for sm_80, sm_90"
    assert "no NVIDIA driver" in facts["driver"]
    core.driver = lambda: 13010
    assert doctor.report()["cuda"]["driver"] == "good for CUDA 13.1"
    monkeypatch.setitem(sys.modules, "grokcurv._cuda", None)
    assert "not built" in doctor.report()["cuda"]["extension"]


def test_one_openmp_runtime_is_loaded() -> None:
    """The kernels share torch's; a second one would start threads of its own. Other packages may bring theirs here."""
    code = "from grokcurv import doctor; print(*doctor.report()['build']['OpenMP runtimes loaded'], sep='\\n')"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(printed.splitlines()) == 1


def test_main_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    for text in ("machine", "packages", "self test", _cpu.COMPILER, "default (runs"):
        assert text in printed


def test_a_wrong_op_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = ops.gram
    monkeypatch.setattr(ops, "gram", lambda *args, **options: right(*args, **options) + 1e-6)
    monkeypatch.setattr(ops, "perturb", lambda theta, directions, eta: theta - directions)
    assert doctor.main() == 1
    outcomes = doctor.report()["self_test"]
    assert {name for name, outcome in outcomes.items() if outcome != "ok"} == {"gram", "perturb"}
    assert "FAILED: AssertionError" in capsys.readouterr().out


def test_a_package_that_is_missing_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert doctor.report()["packages"]["no-such-package"] == "not installed"
