"""CurvatureMonitor: what it records, when, and that training does not notice."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from models import PROBLEMS, cross_entropy, cross_entropy64, stopped_and_whole
from torch import nn

import grokcurv as gc
from grokcurv import checks, commutator
from grokcurv.flat import attention_segments, flatten
from grokcurv.monitor import ALIGNMENT_FIELDS, FIELDS
from grokcurv.subspace import RandomBaseline

COLUMNS = ["step", *FIELDS[:4], "method", *FIELDS[4:], "measure_seconds"]


def attention_run(
    generator: torch.Generator, steps: int = 7, *, sampler: bool = True, measured: bool = True, **options
):
    """Train the small transformer for a few steps; returns (model, monitor or None, optimiser)."""
    problem = PROBLEMS["tied attention"]
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    torch.manual_seed(5)
    model = problem.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = [problem.batch(generator) for _ in range(steps)]
    monitor = None
    if measured:
        options = {"pca": gc.StreamingPCA(n_components=2, segments=attention_segments(model)), "pca_every": 1} | options
        drawn = (lambda: (problem.batch(generator), problem.batch(generator))) if sampler else None
        monitor = gc.CurvatureMonitor(model, problem.loss_fn, sampler=drawn, **options)
    for batch, following in zip(loader, [*loader[1:], None], strict=True):
        problem.loss_fn(model, batch).backward()
        if monitor is not None:
            monitor.step(batch, following)
        optimizer.step()
        optimizer.zero_grad()
    return model, monitor, optimizer


def test_records(generator):
    model, monitor, _ = attention_run(generator, every=2, pairs=3)
    records = monitor.records()
    assert list(records.columns) == COLUMNS
    assert records["step"].tolist() == [0, 2, 4, 6]
    assert records["step"].dtype == np.int64
    assert records["reliable"].dtype == bool
    assert set(records["method"]) <= {"difference", "bracket"}
    assert (records["defect_p25"] <= records["defect_median"]).all()
    assert (records["defect_median"] <= records["defect_p75"]).all()
    assert (records["noise_floor"] < records["defect_median"] / 10).all()
    # The basis needs three rows of the trajectory, stored at steps 0, 1, 2.
    assert records["rho"].isna().tolist() == [True, False, False, False]
    np.testing.assert_allclose(records["rho"] ** 2 + records["exec_fraction"] ** 2, [np.nan, 1, 1, 1], rtol=0.3)
    assert records["attention_fraction"].between(0, 1).all()
    assert (records["measure_seconds"] > 0).all()
    history = monitor.pca_records()
    assert list(history.columns) == ["step", "matrix", "pc1_percent"]
    assert sorted(set(history["step"])) == list(range(7))
    assert set(history["matrix"]) == {s.name for s in attention_segments(model)}
    last = monitor.last
    assert list(last) == ["step", "method", *FIELDS, "measure_seconds"]
    assert last["defect_median"] == records["defect_median"].iloc[-1]


def test_a_state_writes_out_no_row(generator):
    """Records are tensors, so that what is saved as text does not grow with their number."""
    states = [attention_run(generator, every=1, pairs=1, steps=steps)[1].state_dict() for steps in (8, 12)]
    few, many = (json.dumps(without_tensors(state)) for state in states)
    assert len(states[1]["rows"]) == len(states[0]["rows"]) + 4
    assert len(many) <= len(few) + 4  # numbers of steps have more digits


def without_tensors(value):
    if isinstance(value, dict):
        return {name: without_tensors(part) for name, part in value.items()}
    if isinstance(value, list | tuple) and not any(isinstance(part, torch.Tensor) for part in value):
        return list(map(without_tensors, value))
    return value if isinstance(value, str | float | int | bool) else None


def test_rows_that_an_older_version_wrote_out_are_read(generator):
    _, monitor, _ = attention_run(generator, every=1, pairs=1)
    state, records = monitor.state_dict(), monitor.records()
    names = [state["methods"][place] for place in state.pop("row_methods").tolist()]
    del state["methods"]
    for name in ("row_steps", "row_seconds", "row_gradients", "pca_steps"):
        state[name] = state[name].tolist()
    _, other, _ = attention_run(generator, every=1, pairs=1, steps=1)
    other.load_state_dict({**state, "row_methods": names})
    pd.testing.assert_frame_equal(other.records(), records, check_exact=True)
    pd.testing.assert_frame_equal(other.pca_records(), monitor.pca_records(), check_exact=True)


def test_a_row_is_the_probe_s_measurement(generator):
    problem = PROBLEMS["tied attention"]
    torch.manual_seed(3)
    model = problem.model()
    pairs = [(problem.batch(generator), problem.batch(generator)) for _ in range(4)]
    drawn = iter(pairs)
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, pairs=4, sampler=lambda: next(drawn))
    monitor.step()
    stats = gc.CommutatorProbe(model, problem.loss_fn).measure(pairs)
    row = monitor.records().iloc[0]
    assert row["method"] == "difference"
    assert row["defect_median"] == stats.median().item()
    assert row["defect_p25"] == stats.quantile(0.25).item()
    assert row["reference_p75"] == torch.quantile(stats.reference, 0.75).item()
    assert row["grad_cosine"] == torch.quantile(stats.grad_cosine, 0.5).item()
    assert np.isnan(row["rho"])


@pytest.mark.parametrize("margin", [3.0, 1e2, 3e2, 1e3])
def test_a_share_is_nan_where_its_error_is_too_wide(margin, generator, monkeypatch):
    """More than 0.01 and a tenth of it, for a share and for its ratio to what chance would give alike."""
    monkeypatch.setattr(commutator, "FLOOR_MARGIN", margin)
    problem = PROBLEMS["tied attention"]
    one = gc.StreamingPCA(n_components=2, segments=attention_segments(problem.model())[:1])
    model, monitor, _ = attention_run(generator, check_every=1, pca=one)
    pair = problem.batch(generator), problem.batch(generator)
    monitor.sampler = lambda: pair
    monitor.step()
    row, basis = monitor.records().iloc[-1], monitor.probe.bases[0]
    stats = gc.CommutatorProbe(model, problem.loss_fn, basis=basis).measure([pair])
    delta = (stats.parallel.square() + stats.residual.square()).sqrt().item()
    error = (stats.noise_floor / stats.defect).item()
    inside, support = stats.parallel.item() / delta, stats.support.item() / delta
    assert row["reliable"] == (error <= 0.1)
    shares = {
        "exec_fraction": (inside, 1.0, error),
        "exec_random_ratio": (inside, basis.random_baseline("full").mean, error),
        "exec_matched_ratio": (
            inside / support,
            basis.random_baseline("matched").mean,
            error * (1 + inside / support) / support,
        ),
    }
    for name, (share, chance, bound) in shares.items():
        clear = row["reliable"] and bound <= max(0.01, 0.1 * share)
        np.testing.assert_allclose(row[name], share / chance if clear else np.nan, rtol=1e-5, err_msg=name)


def test_training_does_not_notice(generator):
    state = generator.get_state()
    runs = []
    for measured in (True, False):
        generator.set_state(state)
        model, _, optimizer = attention_run(generator, measured=measured)
        runs.append((model.state_dict(), optimizer.state_dict()))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


def test_successive_steps_use_the_training_gradient(generator):
    _, monitor, _ = attention_run(generator, sampler=False, gradient="trusted")
    records = monitor.records()
    assert records["step"].tolist() == [0, 1, 2, 3, 4, 5]  # the last batch has no next one
    calls = []
    gradient = monitor.probe.gradients.gradient
    problem = PROBLEMS["tied attention"]
    a, b = problem.batch(generator), problem.batch(generator)
    model = monitor.probe.gradients.model
    problem.loss_fn(model, a).backward()
    monitor.probe.noise_floor = False
    monitor.probe.gradients.gradient = lambda *args, **kw: calls.append(args) or gradient(*args, **kw)
    monitor.commutator.falls_back = False  # no repetition as a bracket
    monitor.step(a, b)
    assert len(calls) == 3
    monitor.probe.gradients.gradient = gradient
    expected = gc.CommutatorProbe(model, problem.loss_fn).measure([(a, b)])
    assert monitor.records()["reference_median"].iloc[-1] == expected.reference.item()


def test_a_gradient_that_is_not_the_loss_s_is_refused(generator):
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    a, b = problem.batch(generator), problem.batch(generator)
    (3 * problem.loss_fn(model, a)).backward()
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, gradient="checked")
    with pytest.raises(ValueError, match=r"\|\.grad\| is 3 times the norm of the gradient of loss_fn"):
        monitor.step(a, b)


def checked_run(generator, wrong=()):
    """A run whose ``.grad`` is off by 3 % at some steps; returns the monitor, what a logger got when, and live rows."""
    problem = PROBLEMS["perceptron"]
    torch.manual_seed(7)
    model, logged = problem.model(), []

    class Log:
        def log(self, record, /, *, step):
            logged.append((step, record["reliable"], monitor.steps))

    monitor = gc.CurvatureMonitor(model, problem.loss_fn, gradient="checked", check_every=4, loggers=[Log()])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    a, b = problem.batch(generator), problem.batch(generator)
    live = []
    for step in range(13):
        optimizer.zero_grad()
        problem.loss_fn(model, a).backward()
        for parameter in model.parameters():
            parameter.grad *= 0.97 if step in wrong else 1.0
        monitor.step(a, b)
        live.append(monitor.last["reliable"])
        optimizer.step()
    return monitor, logged, live


def test_rows_that_rest_on_grad_wait_for_the_next_check(generator):
    monitor, logged, live = checked_run(generator)
    used = [step for step in range(13) if not live[step]]
    assert used == [5, 6, 7, 9, 10, 11]  # after two checks, at 0 and 4, and never a check itself
    assert monitor.records()["reliable"].all()  # the check at 12 has confirmed the last of them
    assert [step for step, _, _ in logged] == list(range(13))
    assert all(reliable for _, reliable, _ in logged)
    assert [at for step, _, at in logged if step in used] == [8, 8, 8, 12, 12, 12]


def test_a_check_that_fails_withdraws_what_rests_on_grad(generator):
    with pytest.warns(gc.AdmissionWarning, match="the monitor computes its own from here on"):
        monitor, logged, _ = checked_run(generator, wrong=(8,))
    records = monitor.records()
    assert records["reliable"].tolist() == [step not in (5, 6, 7) for step in range(13)]
    assert records["defect_median"].isna().tolist() == [step in (5, 6, 7) for step in range(13)]
    assert [reliable for _, reliable, _ in logged] == records["reliable"].tolist()
    again = gc.CurvatureMonitor(monitor.probe.gradients.model, PROBLEMS["perceptron"].loss_fn, gradient="checked")
    again.load_state_dict(monitor.state_dict())
    pd.testing.assert_frame_equal(again.records(), records)


def test_dropout_recomputes_the_first_gradient(generator):
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 3))
    problem = PROBLEMS["perceptron"]
    monitor = gc.CurvatureMonitor(model, problem.loss_fn)
    for batch, following in monitor.lookahead([problem.batch(generator) for _ in range(4)]):
        model.zero_grad()
        problem.loss_fn(model, batch).backward()
        monitor.step(batch, following)
    records = monitor.records()
    assert len(records) == 3
    assert (records["defect_median"] < 100).all()  # unequal masks would give about 1 / eta


def test_lookahead():
    monitor = gc.CurvatureMonitor(nn.Linear(1, 1), lambda m, x: m(x).sum())
    assert list(monitor.lookahead([])) == []
    assert list(monitor.lookahead([1])) == [(1, None)]
    assert list(monitor.lookahead(iter([1, 2, 3]))) == [(1, 2), (2, 3), (3, None)]


def confident(generator: torch.Generator):
    """A perceptron so sure of itself that the float32 cross-entropy has lost its gradient's digits."""
    problem = PROBLEMS["perceptron"]
    torch.manual_seed(1)
    model = problem.model()
    batch = problem.batch(generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        problem.loss_fn(model, batch).backward()
        optimizer.step()
    return model, batch


def test_an_unreliable_difference_is_repeated_as_a_bracket(generator):
    model, batch = confident(generator)
    other = {"x": batch["x"] + 0.1, "y": batch["y"]}
    monitor = gc.CurvatureMonitor(model, cross_entropy64, sampler=lambda: (batch, other), eta=1e-6)
    monitor.step()
    row = monitor.records().iloc[0]
    double = [{"x": b["x"].double(), "y": b["y"]} for b in (batch, other)]
    exact_model = copy.deepcopy(model).double()
    exact = gc.commutator_defect(exact_model, cross_entropy64, *double, method="bracket").defect.item()
    assert row["method"] == "bracket"
    assert row["reliable"]
    np.testing.assert_allclose(row["defect_median"], exact, rtol=1e-3)
    assert abs(row["reference_median"] / exact - 1) > 0.5  # the published formula sees theta not move at all


def test_what_nothing_can_vouch_for_is_nan(generator):
    model, batch = confident(generator)
    monitor = gc.CurvatureMonitor(model.bfloat16(), lambda m, b: cross_entropy(m, b), sampler=lambda: (batch, batch))
    batch["x"] = batch["x"].bfloat16()
    monitor.step()
    row = monitor.records().iloc[0]
    assert row["method"] == "bracket"
    assert not row["reliable"]
    assert row[["defect_median", "defect_p25", "defect_p75", "bracket_norm", "rho"]].isna().all()
    assert row[["noise_floor", "grad_norm"]].notna().all()


def test_state_dict_goes_on_where_it_stopped(generator):
    problem = PROBLEMS["tied attention"]
    torch.manual_seed(2)
    model = problem.model()

    def new(batches) -> gc.CurvatureMonitor:
        pca = gc.StreamingPCA(n_components=2, segments=attention_segments(model))
        drawn = iter(batches)
        return gc.CurvatureMonitor(
            model, problem.loss_fn, every=2, pca=pca, pca_every=1, sampler=lambda: (next(drawn), next(drawn))
        )

    batches = [problem.batch(generator) for _ in range(12)]
    trajectory = [flatten(model)]
    for _ in range(11):
        trajectory.append(trajectory[-1] + 0.01 * torch.randn(len(trajectory[0]), generator=generator))
    whole, first, second = new(batches), new(batches[:6]), new(batches[6:])
    state = None
    for step, theta in enumerate(trajectory):
        nn.utils.vector_to_parameters(theta, model.parameters())
        whole.step()
        if step < 5:
            first.step()
        elif step == 5:
            state = first.state_dict()
            second.load_state_dict(copy.deepcopy(state))
        if step >= 5:
            second.step()
    drop = "measure_seconds"
    pd.testing.assert_frame_equal(
        whole.records().drop(columns=drop), second.records().drop(columns=drop), check_exact=True
    )
    pd.testing.assert_frame_equal(whole.pca_records(), second.pca_records(), check_exact=True)
    with pytest.raises(ValueError, match="saved with a pca and the monitor has none"):
        gc.CurvatureMonitor(model, problem.loss_fn).load_state_dict(state)


def test_empty_monitor_has_empty_records():
    monitor = gc.CurvatureMonitor(nn.Linear(1, 1), lambda m, x: m(x).sum())
    assert monitor.last is None
    assert list(monitor.records().columns) == COLUMNS
    assert len(monitor.records()) == 0
    assert len(monitor.pca_records()) == 0
    monitor.load_state_dict(monitor.state_dict())
    assert len(monitor.records()) == 0


def test_loggers_get_every_record(generator):
    class Collect:
        def __init__(self) -> None:
            self.seen: list[tuple[int, dict]] = []

        def log(self, record, step):
            self.seen.append((step, record))

        def close(self):
            pass

    logger = Collect()
    _, monitor, _ = attention_run(generator, every=3, loggers=[logger])
    assert [step for step, _ in logger.seen] == [0, 3, 6]
    assert logger.seen[-1][1]["defect_median"] == monitor.records()["defect_median"].iloc[-1]


def test_bad_input(generator):
    model, loss_fn = nn.Linear(1, 1), lambda m, x: m(x).sum()
    for name in ("every", "pairs", "pca_every"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            gc.CurvatureMonitor(model, loss_fn, **{name: 0})
    with pytest.raises(ValueError, match="pairs=2 needs a sampler"):
        gc.CurvatureMonitor(model, loss_fn, pairs=2)
    with pytest.raises(ValueError, match="needs the batch and the next one"):
        gc.CurvatureMonitor(model, loss_fn).step()


def test_reliability_is_ten_times_the_floor():
    assert commutator.RELIABLE_RATIO == 10


def test_the_check_behind_the_floor_is_shared_by_nearby_steps(generator):
    problem = PROBLEMS["tied attention"]
    torch.manual_seed(4)
    model = problem.model()
    batches = [problem.batch(generator) for _ in range(8)]
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, check_every=3)
    gradient, exact = monitor.probe.gradients.gradient, []

    def spy(theta, batch, out, **options):
        if theta.dtype == torch.float64:
            exact.append(monitor.steps)
        return gradient(theta, batch, out, **options)

    monitor.probe.gradients.gradient = spy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, following in monitor.lookahead(batches):
        optimizer.zero_grad()
        problem.loss_fn(model, batch).backward()
        monitor.step(batch, following)
        optimizer.step()
        if monitor.steps == 6:
            errors = monitor.probe.errors["difference"].clone()
    assert exact == [0, 0, 0, 0, 3, 3, 3, 3, 6, 6, 6, 6]  # all four gradients
    records = monitor.records()
    assert records["reliable"].all()
    assert len(set(records["noise_floor"])) == len(records)  # the sizes of the gradients are always the step's own
    assert not torch.equal(errors, monitor.probe.errors["difference"])


def test_a_floor_from_an_earlier_check_is_the_earlier_error_over_the_new_gradients(generator):
    problem = PROBLEMS["perceptron"]
    torch.manual_seed(6)
    model = problem.model()
    pairs = [[(problem.batch(generator), problem.batch(generator))] for _ in range(2)]
    probe = gc.CommutatorProbe(model, problem.loss_fn)
    probe.measure(pairs[0])
    (absolute, relative), (past_absolute, past_relative) = probe.errors["difference"][0].tolist()
    stats = probe.measure(pairs[1], check=False, keep_delta=True)
    assert not stats.exact
    a, b = stats.grad_norm_a.item(), stats.grad_norm_b.item()
    at_theta = [checks.STALE_MARGIN * max(absolute, relative * size) for size in (a, b)]
    past = [checks.STALE_MARGIN * max(past_absolute, past_relative * size) for size in (a, b)]
    vectors = np.linalg.norm([*at_theta, *past]) / (1e-3 * a * b)
    lengths = stats.defect.item() * np.hypot(at_theta[0] / a, at_theta[1] / b)
    # The directions of the steps are wrong by as much, but what they do to the differences is not known from outside.
    least = commutator.FLOOR_MARGIN * np.hypot(vectors, lengths)
    assert least * (1 - 1e-3) <= stats.noise_floor.item() <= 1.1 * least


def test_without_an_earlier_check_one_is_made(generator):
    problem = PROBLEMS["perceptron"]
    pairs = [(problem.batch(generator), problem.batch(generator))]
    probe = gc.CommutatorProbe(problem.model(), problem.loss_fn)
    assert probe.measure(pairs, check=False).noise_floor.isfinite().all()
    assert probe.measure(pairs, check=False, method="bracket").noise_floor.isfinite().all()


@pytest.mark.parametrize(("pairs", "drawn"), [(1, 1), (2, 2), (4, 3), (5, 3)])
def test_a_chain_draws_one_batch_more_than_pairs(generator, pairs, drawn):
    problem = PROBLEMS["perceptron"]
    batches = [(problem.batch(generator), problem.batch(generator)) for _ in range(drawn)]
    left = iter(batches)
    model = problem.model()
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, pairs=pairs, design="chain", sampler=lambda: next(left))
    monitor.step()
    assert next(left, None) is None
    flat = [batch for pair in batches for batch in pair]
    stats = gc.CommutatorProbe(model, problem.loss_fn).measure(list(pairwise(flat))[:pairs], design="chain")
    assert monitor.records()["defect_median"].item() == stats.median().item()


# ------------------------------------------------------------------------------------------------------------ alignment


def share_by_qr(v: torch.Tensor, rows: torch.Tensor) -> float:
    basis = torch.linalg.qr(rows.double().T).Q
    return ((basis.T @ v.double()).norm() / v.double().norm()).item()


@pytest.mark.parametrize("every", [1, 2, 3])
def test_alignment_is_that_of_the_last_step(generator, every):
    problem = PROBLEMS["tied attention"]
    torch.manual_seed(8)
    model = problem.model()
    batches = [(problem.batch(generator), problem.batch(generator)) for _ in range(40)]
    drawn, expected = iter(batches), iter(batches)
    options = {"every": every, "pairs": 3, "check_every": 1}
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, sampler=lambda: next(drawn), alignment=True, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wanted, before = [], None
    for step in range(7):
        optimizer.zero_grad()
        problem.loss_fn(model, problem.batch(generator)).backward()
        monitor.step()
        theta = flatten(model)
        if step % every == 0:
            delta = (
                gc.CommutatorProbe(model, problem.loss_fn)
                .measure([next(expected) for _ in range(3)], keep_delta=True)
                .delta
            )
            if before is not None:
                moved = theta.double() - before.double()
                cosines = torch.cosine_similarity(moved[None], delta.double())
                wanted.append((cosines.abs().mean().item(), share_by_qr(moved, delta)))
        before = theta
        optimizer.step()
    records = monitor.records()
    assert list(records.columns) == [*COLUMNS[:-1], *ALIGNMENT_FIELDS, "measure_seconds"]
    assert records["reliable"].all()
    assert records.loc[0, list(ALIGNMENT_FIELDS)].isna().all()
    np.testing.assert_allclose(records[["step_alignment", "step_share"]][1:], wanted, rtol=1e-6)
    size = len(before)
    for name, dim in (("step_alignment", 1), ("step_share", 3)):
        np.testing.assert_allclose(records[f"{name}_ratio"], records[name] / RandomBaseline(dim, size).mean)
    assert monitor.last["step_share"] == records["step_share"].iloc[-1]


def test_alignment_of_successive_steps(generator):
    """The measurement stands between backward and the optimiser; the step is still the one that led there."""
    options = {"sampler": False, "check_every": 1}
    _, plain, _ = attention_run(torch.Generator().manual_seed(3), **options)
    model, monitor, _ = attention_run(torch.Generator().manual_seed(3), alignment=True, **options)
    one, other = plain.records(), monitor.records()
    kept = [name for name in COLUMNS if name != "measure_seconds"]
    pd.testing.assert_frame_equal(one[kept], other[kept], check_exact=True)
    assert other["step_alignment"].isna().tolist() == [True] + [False] * 5
    np.testing.assert_allclose(other["step_share"], other["step_alignment"])  # one pair
    # The optimiser has moved once since the last call, which had no next batch and kept the parameters.
    problem = PROBLEMS["tied attention"]
    a, b = problem.batch(generator), problem.batch(generator)
    stats = gc.CommutatorProbe(model, problem.loss_fn).measure([(a, b)], keep_delta=True)
    before = monitor.state_dict()["before"]
    model.zero_grad()
    problem.loss_fn(model, a).backward()
    monitor.step(a, b)
    cosine = torch.cosine_similarity(flatten(model).double() - before.double(), stats.delta[0].double(), dim=0)
    np.testing.assert_allclose(monitor.records()["step_alignment"].iloc[-1], abs(cosine.item()), rtol=1e-6)


def test_alignment_is_nan_without_a_step_or_a_trustworthy_delta(generator):
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    a, b = problem.batch(generator), problem.batch(generator)
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, sampler=lambda: (a, b), alignment=True, check_every=1)
    monitor.step()
    monitor.step()  # nothing moved
    with torch.no_grad():
        model[0].weight += 0.01
    monitor.step()
    monitor.probe.noise_floor = False  # nothing vouches for anything
    monitor.probe.errors.clear()
    with torch.no_grad():
        model[0].weight += 0.01
    monitor.step()
    records = monitor.records()
    assert records["reliable"].tolist() == [True, True, True, False]
    for name in ALIGNMENT_FIELDS:
        assert records[name].isna().tolist() == [True, True, False, True]


@pytest.mark.parametrize(("every", "cut"), [(1, 4), (3, 4), (3, 5)])
def test_alignment_resumes_bitwise(generator, every, cut):
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    batches = [problem.batch(generator) for _ in range(30)]
    size = len(flatten(model))
    trajectory = [torch.randn(size, generator=generator) for _ in range(9)]

    def new(start: int) -> gc.CurvatureMonitor:
        drawn = iter(batches[2 * -(-start // every) :])
        return gc.CurvatureMonitor(
            model, problem.loss_fn, every=every, sampler=lambda: (next(drawn), next(drawn)), alignment=True
        )

    second, whole, state = stopped_and_whole(new, model, trajectory, cut)
    drop = "measure_seconds"
    pd.testing.assert_frame_equal(
        whole.records().drop(columns=drop), second.records().drop(columns=drop), check_exact=True
    )
    assert second.records()["step_share"].notna().sum() == len(second.records()) - 1
    for one, other in ((state, False), (gc.CurvatureMonitor(model, problem.loss_fn).state_dict(), True)):
        with pytest.raises(ValueError, match="saved with alignment and the monitor has none"):
            gc.CurvatureMonitor(model, problem.loss_fn, alignment=other).load_state_dict(one)
