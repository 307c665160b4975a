"""bench: cases small enough to check in seconds, what a wrong answer and a missing peer do, and the folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from grokcurv import cli, ops
from grokcurv.bench import check as checking
from grokcurv.bench import kernels, measurements, naive, pca, run_bench, timing
from grokcurv.bench.check import Result, check, peers
from grokcurv.bench.comparison import OURS, PEERS, Case, Comparison, Implementation, relative, worst
from grokcurv.bench.plan import Plan, curve, every_size, make_plan
from grokcurv.bench.result import clock, in_markdown, table_rows
from grokcurv.bench.timing import Times, interleaved
from grokcurv.report.format import seconds
from grokcurv.runs import RunError

NO_PEERS = dict.fromkeys(PEERS, "not asked for")

KERNELS = [
    kernels.perturb(5000),
    kernels.perturb(700, runs=3),
    kernels.defect(5000),
    kernels.rounding_terms(5000),
    kernels.defect_on_basis(40_000),
    kernels.split(5000),
    kernels.filter_(40_000),
    kernels.gram_row(5, 3000),
    kernels.gram_matrix(7, 3000),
    kernels.eigh(20, 3),
    kernels.eigh_prefixes(12),
    kernels.rotate(9, 4, 3000),
    kernels.sketch(2, 64, 5000),
    kernels.draw(3, 5000),
    pca.whole(20, 3000),
    pca.history(20, 3000),
    pca.incremental(40, 3000, 3),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 16, two training steps, and short samples."""
    monkeypatch.setattr(measurements, "ROWS", 16)
    monkeypatch.setattr(measurements, "CHECK_EVERY", 2)
    monkeypatch.setattr(measurements, "COMPARED", 2)
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)


def checked(case: Case, generator: torch.Generator, problems: dict[str, str] = NO_PEERS) -> Result:
    return check(case, generator, 0.0, problems)


def check_timed(result: Result) -> None:
    """Grokcurv and everyone without a problem was timed, and the ratios are those of the rounds."""
    assert not result.problem
    assert result.outcomes[0].name == OURS
    for row in result.outcomes:
        if row.problem:
            continue
        assert len(row.times.samples) == timing.ROUNDS[0]
        np.testing.assert_allclose(
            row.ratio.samples, np.array(row.times.samples) / np.array(result.outcomes[0].times.samples)
        )
    floor = result.floor
    parts = [amount / floor.rates[kind] for kind, amount in floor.work.items() if amount]
    assert parts
    assert max(parts) <= floor.seconds * (1 + 1e-9)  # the median of the larger, the larger of the medians


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_cases(case: Case, generator: torch.Generator, small: None) -> None:
    check_timed(checked(case, generator))


@pytest.mark.parametrize(
    "case",
    [
        measurements.admission(),
        measurements.pair(),
        measurements.whole(2),
        measurements.whole(1, measurements.SHORTER),
        measurements.bracket(2),
        measurements.training(),
        measurements.training(measurements.SHORTER),
        measurements.updates(4),
        measurements.program(2, measured=True),
    ],
    ids=lambda case: case.name,
)
def test_measurements(case: Case, generator: torch.Generator, small: None) -> None:
    result = checked(case, generator)
    check_timed(result)
    if case.name == "step":
        assert {row.errors["weights, distance from the plain loop's"] for row in result.outcomes} == {0.0}
    for row in result.outcomes[1:]:
        if "naive" in row.name or "four gradients" in row.name:  # its error is a number, and not a small one
            assert 1e-7 < next(iter(row.errors.values())) < 1
        elif "bare" in row.name or row.name == "torch.optim":
            assert math.isnan(next(iter(row.errors.values())))


@pytest.mark.parametrize(
    ("needed", "name", "case"),
    [
        ("curvlinops", "curvlinops", measurements.bracket(1)),
        ("sklearn", "scikit-learn PCA", pca.whole(20, 3000)),
        ("sklearn", "scikit-learn IncrementalPCA", pca.incremental(40, 3000, 3)),
        ("torchdr", "TorchDR PCA", pca.whole(20, 3000)),
        ("torchdr", "TorchDR IncrementalPCA", pca.incremental(40, 3000, 3)),
        ("threadpoolctl", "NumPy SVD", pca.whole(20, 3000)),
        ("threadpoolctl", "NumPy SVD of each", pca.history(20, 3000)),
    ],
)
def test_peers(needed: str, name: str, case: Case, generator: torch.Generator, small: None) -> None:
    """They run as they are called here, and answer the same question."""
    pytest.importorskip(needed, reason=f"{PEERS[needed]} is not installed")
    row = next(row for row in checked(case, generator, dict.fromkeys(PEERS, "")).outcomes if row.name == name)
    assert not row.problem
    assert row.times is not None
    assert next(iter(row.errors.values())) < 0.1


# ---------------------------------------------------------------------------------------------------------------- truth


def test_truth_of_the_defect(generator: torch.Generator) -> None:
    """In slices as in one piece, and of the size that is promised."""
    _, vectors = kernels.gradients(generator, kernels.CHUNK + 77)
    g_a, g_b, a2, b2 = (x[0].double() for x in vectors)
    delta = kernels.ETA * ((a2 - g_a) - (b2 - g_b))
    whole = float(delta.norm() / (kernels.ETA**2 * g_a.norm() * g_b.norm()))
    assert kernels.defect64(*(x[0] for x in vectors)) == pytest.approx(whole, rel=1e-12)
    assert whole == pytest.approx(kernels.DEFECT, rel=0.1)


def test_truth_of_the_pca(generator: torch.Generator) -> None:
    """No error for NumPy's float64 SVD; a known angle and a known error for what is off by those."""
    x = pca.walk(generator, 15, 500)
    rows = x.double().numpy()
    _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    errors = pca.errors_against(x, 2)
    variances, components = values[:2] ** 2 / 14, torch.from_numpy(vectors)
    exact = pca.Answer(variances, components[:2])
    assert errors["variances, error over the first"](exact) < 1e-12
    assert errors["components, degrees"](exact) < 1e-4
    turn = math.radians(3)
    turned = torch.stack([math.cos(turn) * components[0] + math.sin(turn) * components[5], components[1]])
    off = pca.Answer(variances + np.array([0, 0.1 * variances[0]]), turned)
    assert errors["variances, error over the first"](off) == pytest.approx(0.1)
    assert errors["components, degrees"](off) == pytest.approx(3, rel=1e-6)


def test_truth_of_the_bracket(generator: torch.Generator, small: None) -> None:
    """A central difference of float64 gradients."""
    model, (pair,), _ = measurements.demo(generator, 1)
    exact = measurements.in_float64(model)
    loss_fn = measurements.loss(measurements.MODULE)
    theta = torch.nn.utils.parameters_to_vector(exact.parameters()).detach().clone()

    def product(batch: Any, direction: torch.Tensor) -> torch.Tensor:
        ends = []
        for sign in (1, -1):
            torch.nn.utils.vector_to_parameters(theta + sign * 1e-5 * direction, exact.parameters())
            ends.append(naive.gradient(exact, loss_fn, batch))
        torch.nn.utils.vector_to_parameters(theta, exact.parameters())
        return (ends[0] - ends[1]) / 2e-5

    g_a, g_b = (naive.gradient(exact, loss_fn, batch) for batch in pair)
    want = product(pair[1], g_a) - product(pair[0], g_b)
    assert relative(measurements.bracket_by_autograd(exact, pair), want) < 1e-6


def test_errors() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative([torch.tensor(3.0), torch.tensor([4.5])], truth) == pytest.approx(0.1)
    assert worst(torch.tensor([3.3, 4.0]), truth) == pytest.approx(0.1)


# --------------------------------------------------------------------------------------------------------------- timing


def test_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only calls move: medians, repeats and turns are theirs."""
    now, order = 0.0, []

    def call(name: str, lasts: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += lasts
            order.append(name)

        return run

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    short, long = interleaved([call("a", 0.006), call("b", 1.0)], budget=5.0)
    assert (short.calls, long.calls) == (4, 1)
    assert short.median == pytest.approx(0.006)
    assert long.over(short).median == pytest.approx(1 / 0.006)
    assert "".join(order) == "aab" + "aaaab" + "baaaa" + "aaaab" + "baaaa"


class Stream:
    """A GPU's: what is launched runs one after the other, while the host goes on."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, lasts: float) -> None:
        self.host += 1e-5
        self.device = max(self.device, self.host) + lasts

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(elapsed_time=lambda stop: 1e3 * (stop.at - event.at))
        event.record = lambda: setattr(event, "at", max(self.device, self.host))
        return event


def test_times_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short kernel takes what it takes on the device; a call that waits takes what the host sees."""
    stream = Stream()
    scratch = SimpleNamespace(zero_=lambda: stream.launch(1e-4))
    cuda = SimpleNamespace(
        synchronize=stream.synchronize, Event=stream.event, _sleep=lambda cycles: stream.launch(cycles / 2e9)
    )
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: stream.host))
    fake = SimpleNamespace(cuda=cuda, empty=lambda *size, **options: scratch, uint8=torch.uint8)
    monkeypatch.setattr(timing, "torch", fake)

    def waiting() -> None:
        stream.launch(2e-3)
        stream.synchronize()
        stream.host += 1e-3

    runs = [lambda: stream.launch(3e-6), lambda: stream.launch(4e-2), waiting]
    kernel, long, waited = interleaved(runs, 1.0, torch.device("cuda"))
    assert kernel.median == pytest.approx(3e-6, rel=1e-6)
    assert kernel.calls == timing.QUEUED
    assert long.median == pytest.approx(4e-2)
    assert waited.median == pytest.approx(3.01e-3, rel=1e-3)


def test_spread() -> None:
    times = Times((1.0, 2.0, 3.0, 4.0, 5.0), 1)
    assert times.spread == (2.0, 4.0)
    assert clock(times) == "3.00 s ± 33 %"
    said = [seconds(x) for x in (1.23e-8, 1e-3, 0.0999, 0.9999, 1234.5)]
    assert said == ["0.0123 us", "1.00 ms", "99.9 ms", "1.00 s", "1,234 s"]


# ---------------------------------------------------------------------------------------------------- what may go wrong


def comparison(ours: float = 1.0, peer: Callable[[], Any] = lambda: 1.5, needs: tuple[str, ...] = ()) -> Case:
    """Truth is one, and one thousandth off is allowed."""

    def build(_: torch.Generator) -> Comparison:
        implementations = (
            Implementation(OURS, lambda: ours),
            Implementation("peer", peer, note="approximate", needs=needs),
        )
        return Comparison(implementations, {"number, error": lambda got: abs(got - 1.0)}, tolerance=1e-3, moved=4000)

    return Case("comparison", "a comparison", 0, build)


@pytest.mark.parametrize("ours", [1.01, math.nan])
def test_a_wrong_answer_is_not_timed(ours: float, generator: torch.Generator) -> None:
    result = checked(comparison(ours), generator)
    assert result.wrong
    assert result.outcomes[0].times is None
    assert "number, error of grokcurv is" in result.problem
    (row,) = table_rows([result])
    assert "not timed" in row.speed[1]


def test_a_kernel_that_is_wrong_is_found(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.gram
    monkeypatch.setattr(ops, "gram", lambda *args, **options: right(*args, **options) * (1 + 1e-9))
    assert checked(kernels.gram_matrix(7, 3000), generator).wrong


def test_a_peer_that_fails_or_is_missing_is_said_to(generator: torch.Generator) -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel\nand more")

    result = checked(comparison(peer=fail), generator)
    assert result.outcomes[1].problem == "failed: RuntimeError: no such kernel"
    missing = checked(comparison(needs=("torchdr",)), generator, {**NO_PEERS, "torchdr": "not installed"})
    assert missing.outcomes[1].problem == "not installed"
    (row,) = table_rows([missing])
    assert row.speed[2:4] == ("peer (approximate)", "not installed")
    assert row.speed[1] == clock(missing.outcomes[0].times)


def test_peers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "PEERS", {"json": "a-package", "no_such_module": "no-such-package"})
    assert peers() == {"json": "", "no_such_module": "not installed: pip install no-such-package"}


def test_a_case_without_room_is_left_out(generator: torch.Generator) -> None:
    result = checked(Case("large", "a large comparison", 1 << 60, comparison().build), generator)
    assert not result.outcomes
    assert result.problem.startswith("needs 1073741824.0 GiB of memory")


# --------------------------------------------------------------------------------------------------------------- folder


def plan() -> Plan:
    return Plan(
        (
            kernels.defect(3000),
            comparison(needs=("torchdr",)),
            Case("large", "a large comparison", 1 << 60, comparison().build),
        ),
        (
            curve("P", "defect arithmetic", (3000, 6000), kernels.defect),
            curve("K", "brackets", (1,), lambda k: comparison(needs=("torchdr",))),
            curve("T", "rows", (10, 20), lambda n: kernels.gram_matrix(n, 2000)),
        ),
        budget=0.0,
    )


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {**dict.fromkeys(PEERS, ""), "torchdr": "not installed: pip install torchdr"}
    monkeypatch.setattr("grokcurv.bench.driver.peers", lambda: absent)
    monkeypatch.setattr("grokcurv.bench.driver.metadata", SimpleNamespace(version=lambda package: "1.2"))
    threads, news = torch.get_num_threads(), []
    loads = iter([0.2, 1.3])
    monkeypatch.setattr(os, "getloadavg", lambda: (next(loads), 5.0, 5.0))
    bench = run_bench(out=tmp_path / "bench", plan=plan(), on_progress=news.append)
    assert torch.get_num_threads() == threads
    assert not bench.wrong
    assert [said["case"] for said in news] == [*bench.found]
    assert any(said.startswith("torchdr: not installed") for said in bench.left_out)
    assert any(said.startswith("a large comparison: needs") for said in bench.left_out)

    assert bench.load == "load 0.2 before, 1.3 at the end"
    saved = json.loads((tmp_path / "bench/bench.json").read_text())
    assert (saved["environment"]["load before"], saved["environment"]["load after"]) == (0.2, 1.3)
    assert saved["environment"]["threads"] == 1
    assert saved["environment"]["packages"]["torch"] == torch.__version__
    assert saved["peers"]["curvlinops-for-pytorch"] == "1.2"
    assert saved["peers"]["torchdr"].startswith("not installed")
    by_title = {case["title"]: case for case in saved["cases"]}
    point = by_title[saved["curves"][0]["points"][1][1]]
    assert point["title"] == "defect arithmetic, P = 6,000"
    assert point["floor"]["bytes"] == 4 * 4 * 6000
    ours = point["contenders"][0]
    assert ours["seconds"]["low"] <= ours["seconds"]["median"] <= ours["seconds"]["high"]
    assert ours["errors"]["defect, relative error"] < 1e-10

    # A case's own error, and what it is of, are said once, however many stand beside it.
    said = [row for row in bench.rows if row.accuracy[1]]
    assert [row.speed[0] for row in said] == [result.case.title for result in bench.results if result.outcomes]
    assert all(row.accuracy[0] for row in said)
    assert sum(bool(row.accuracy[0]) for row in bench.rows) == len(said)

    table = (tmp_path / "bench/table.md").read_text()
    assert table == in_markdown(bench.rows)
    assert {row.count("|") for row in table.splitlines()} == {8}
    title, ours, peer, its, *_ = table.splitlines()[2].strip("| ").split(" | ")
    assert title == "defect arithmetic, P = 3,000<br>*defect, relative error*"
    assert re.fullmatch(r"[\d.]+ us ± \d+ %<br>\*\d\.\de-\d\d\*", ours)
    assert peer == "plain torch, the float32 formula"
    assert re.fullmatch(r"[\d.]+ us ± \d+ %<br>\*\d\.\de-\d\d\*", its)
    page = (tmp_path / "bench/report.html").read_text()
    assert page.count("<img ") == 3
    assert "not installed: pip install torchdr" in page
    for axis in "PKT":
        assert (tmp_path / f"bench/figures/{axis}.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cases must be among .*pca-history.*; got 'pcs'"):
        run_bench(out=tmp_path, cases=["pcs"])
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        run_bench(out=tmp_path, threads=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write into"):
        run_bench(out=tmp_path / "file")


@pytest.mark.parametrize("loads", [(0.6, 1.0), (0.0, 1.6)])
def test_a_bench_on_a_busy_machine_says_so(
    loads: tuple[float, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = iter(loads)
    monkeypatch.setattr(os, "getloadavg", lambda: (next(read), 0.0, 0.0))
    bench = run_bench(out=tmp_path, plan=Plan((comparison(1.0),), (), 0.0))
    said = f"oad {loads[0]} before, {loads[1]} at the end: the machine was busy"
    assert said in bench.load
    assert said in (tmp_path / "report.html").read_text()


def test_plans() -> None:
    """Names do not depend on the size, titles tell cases apart, and the quick plan, a part, fits into 8 GiB."""
    quick, full = make_plan(quick=True), make_plan(quick=False)
    # Those of the Hessian that take minutes would not fit into the ten that the quick bench promises.
    assert [case.name for case in full.table] == [*(case.name for case in quick.table), "trace", "edge", "trace"]
    assert max(size for one in full.curves if one.axis == "P" for size, _ in one.points) == 100_000_000
    for device in ("cpu", "cuda"):
        titles = [case.title for case in every_size(device)]
        assert len(set(titles)) == len(titles)
    assert all(case.memory < 8 << 30 for case in quick.table)
    assert {one.axis for one in quick.curves} == {"P", "K", "T"}


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def small_plan(quick: bool) -> Plan:
        asked.append(quick)
        return plan()

    monkeypatch.setattr("grokcurv.bench.driver.make_plan", small_plan)
    assert cli.main(["bench", "--quick", "--out", str(tmp_path), "--cases", "defect"]) == 0
    said = capsys.readouterr().out
    assert "defect arithmetic" in said
    assert said.endswith(f"{tmp_path / 'report.html'}\n")
    assert cli.main(["bench", "--cases", "no-such-case"]) == 2
    assert asked == [True, False]
    assert "cases must be among" in capsys.readouterr().err
    monkeypatch.setattr("grokcurv.bench.driver.make_plan", lambda quick: Plan((comparison(2.0),), (), 0.0))
    assert cli.main(["bench", "--out", str(tmp_path)]) == 1
    assert "WRONG: a comparison" in capsys.readouterr().out
