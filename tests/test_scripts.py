"""What regenerates tables and figures, each script at small size: none can rot unseen."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from all_cases import Target, judged

from grokcurv.bench import measurements, timing
from grokcurv.bench.check import Floor, Outcome, Result
from grokcurv.bench.comparison import Case
from grokcurv.bench.plan import every_size
from grokcurv.bench.timing import Times

ROOT = Path(__file__).parents[1]
BENCHES = ROOT / "benches"


def run(script: str, *arguments: str | Path) -> str:
    """What it printed, with one thread: in this process, since torch takes longer to import than what most measure."""
    threads, printed = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", [script, *map(str, arguments)])
            runpy.run_path(str(BENCHES / script), run_name="__main__")
    except SystemExit as done:
        if done.code:
            raise AssertionError(printed.getvalue()) from done
    finally:
        torch.set_num_threads(threads)
    return printed.getvalue()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 16, and short samples."""
    monkeypatch.setattr(measurements, "ROWS", 16)
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)


def test_trajectory(tmp_path: Path) -> None:
    for folder in ("measurements", "images"):
        (tmp_path / folder).mkdir()
    run("trajectory.py", "--docs", tmp_path, "--steps", "30")
    table = pd.read_csv(tmp_path / "measurements/pca.csv")
    assert set(table["method"]) == {"gram", "gram, bfloat16", "incremental", "incremental, shrinkage", "sketch"}
    assert (table["pc1_error_points"] <= table["bound_points"] + 1e-3).all()
    assert (tmp_path / "images/pca.png").read_bytes().startswith(b"\x89PNG")


def test_numerics(tmp_path: Path) -> None:
    small = ("--ops", "add", "--pairs", "2", "--rows", "32", "--last", "0")
    printed = run("numerics.py", *small, "--out", tmp_path / "numerics.csv")
    record = pd.read_csv(tmp_path / "numerics.csv")
    assert len(record) == 8  # two pairs, losses and weight decays
    assert ((record["difference"] / record["difference_exact"] - 1).abs() < 0.1).all()
    assert "| errors below the floor, `bracket` | 100.0% | 100.0% |" in printed


@pytest.mark.usefixtures("small")
def test_cost_model() -> None:
    printed = run("cost_model.py", "--rounds", "1")
    assert printed.count("|") == 6 * 8  # of its table


def test_measures() -> None:
    printed = run("measures.py", "--seconds", "0.1", "--only", "Gram", "OptimizerCommutator(), the shorter")
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines()[1:]]
    assert [name.partition("(")[0] for name, *_ in rows] == ["`UpdateGram", "`UpdateGram", "`OptimizerCommutator"]
    assert [float(gradients) for *_, gradients in rows[:2]] == [0, 0]
    assert 1 < float(rows[2][2]) <= 2  # two gradients by the shorter way


def test_operators_of_a_step_are_few_and_as_many_for_any_number_of_runs() -> None:
    printed = run("operators.py", "--runs", "1", "2", "5", "--p", "7", "--d-model", "16")
    one, few, many = (list(map(int, line.split()))[1:] for line in printed.splitlines()[1:])
    assert few == many
    (_, alone, _), (_, measured, checked) = one, few
    assert alone <= 760
    assert measured <= 700
    assert checked <= 1000


def test_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process: transformers takes longer to import than the networks to measure."""
    pytest.importorskip("transformers")
    import gpt2

    threads = torch.get_num_threads()
    try:
        gpt2.main("whole", tiny=True, length=8, steps=5)
        gpt2.main("budget", tiny=True, length=8, steps=60, share=1.0)
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "training is bitwise the unmeasured one: True" in printed
    assert re.search(r"PCA by gram; rho at the last step [01]\.\d+", printed)
    assert "resumed half-way it measured the same steps: True" in printed


def test_sweep_throughput(tmp_path: Path) -> None:
    settings = {"p": 7, "d_model": 8, "d_ff": 8, "heads": 2, "batch_size": 8, "steps": 10, "measure_every": 5}
    text = "\n".join(f"{name} = {value}" for name, value in settings.items())
    (tmp_path / "small.toml").write_text(f"[run]\n{text}\n[grid]\nseed = [0, 1]\n")
    printed = run("sweep_throughput.py", tmp_path / "small.toml", tmp_path / "sweep", "--part", "5")
    assert "sweep: 2 runs, 20 steps" in printed
    assert "ratio of runs an hour" in printed


@pytest.mark.usefixtures("small")
def test_bench() -> None:
    """`make bench` but for the whole measurements, which test_bench.py has at small size."""
    slow = ("model", "trainer", "prefix", "program", "PCA")
    chosen = [case.title for case in every_size("cpu", 1000) if not any(word in case.title for word in slow)]
    printed = run("all_cases.py", "--shrink", "1000", "--only", *chosen)
    assert len(chosen) > 20
    for title in chosen:
        assert f"| {title}<br>" in printed


def test_what_is_asked_for_is_met_or_missed() -> None:
    """Of a peer, of the floor, and of the error; who was not timed is not judged."""

    def outcome(name: str, seconds: float, error: float) -> Outcome:
        return Outcome(name, "", {"quantity": error}, Times((seconds,), 1))

    result = Result(Case("case", "title", 0, lambda generator: None))
    result.outcomes = [
        outcome("grokcurv", 2.0, 1e-6),
        outcome("grokcurv, replayed", 1.0, 1e-6),
        outcome("peer", 6, 1e-5),
    ]
    result.floor = Floor({}, {}, 0.8, Times((0.4,), 1))
    targets = [("peer", 6), ("peer", 6.1), ("the floor", 0.8), ("the floor", 0.9), ("peer", 2, 10), ("peer", 2, 10.1)]
    verdicts = [judged(Target("title", *target), result) for target in targets]
    assert [met for met, _ in verdicts] == [True, False] * 3
    assert verdicts[1][1] == "* MISSED: title, 6x the speed of peer; asked for: 6.1x"
    assert judged(Target("title", "absent", 1), result) is None


def test_instructions() -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("no valgrind here; apt-get install valgrind")
    printed = run("instructions.py", "--shrink", "1000", "--only", "perturbed parameters")
    (row,) = (line.split("|") for line in printed.splitlines() if "perturbed" in line)
    assert 0 < float(row[3]) < 20


def make(*arguments: str) -> str:
    done = subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"make {target}")
def test_what_make_runs_is_there(target: str) -> None:
    """Every file of ours that a command names."""
    named = re.findall(r"(?<![\w/.-])(?:benches|tests|csrc)/[\w/.-]*\w", make("--dry-run", "--always-make", target))
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.long
def test_make_sanitize() -> None:
    """The sanitized build, and the tests of its smallest kernel."""
    assert " passed" in make("sanitize", "KERNEL_TESTS=tests/test_perturb.py")


def test_make_check() -> None:
    for module in ("ruff", "mypy", "clang_format"):
        pytest.importorskip(module, reason=f"no {module} here; pip install 'grokcurv[dev]'")
    make("check", f"BIN={Path(sys.executable).parent}", "--assume-old=.venv/ready")


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHES.glob("*.py")))
def test_every_script_is_in_a_test(script: str) -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    name = script.removesuffix(".py")
    used = any(way in tests for way in (script, f"import {name}\n", f"from {name} import"))
    assert used
