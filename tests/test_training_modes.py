"""How models are trained besides plain float32: what the records are then, against float64 and the plain loop."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from models import PROBLEMS, Batch, Problem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import grokcurv as gc
from grokcurv.flat import flatten, flatten_grad

KEPT = ["step", "defect_median", "noise_floor", "reliable", "method", "grad_norm", "reference_median"]
METHODS = ["difference", "bracket"]


def bfloat16(problem: Problem):
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return problem.loss_fn(model, batch)

    return loss_fn


def double(batch: Batch) -> Batch:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


def exact(problem: Problem, model: nn.Module, pair, method: str = "difference") -> gc.CommutatorStats:
    probe = gc.CommutatorProbe(copy.deepcopy(model).double(), problem.loss_fn, method=method)
    return probe.measure([tuple(map(double, pair))], keep_delta=True)


def error(stats: gc.CommutatorStats, truth: gc.CommutatorStats) -> Tensor:
    """Length of the error of ``delta``, in units of the defect."""
    assert stats.delta is not None
    distance = (stats.delta.double() - truth.delta).norm(dim=1)
    return distance / (truth.eta.square() * truth.grad_norm_a * truth.grad_norm_b)


def draw(name: str, generator: torch.Generator, batches: int = 2):
    problem = PROBLEMS[name]
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    return problem, problem.model(), [problem.batch(generator) for _ in range(batches)]


def run(model: nn.Module, batches, loss_fn, backward=None, **options) -> gc.CurvatureMonitor:
    """A plain loop; ``backward(model, batch, optimizer)`` leaves the gradient."""
    monitor = gc.CurvatureMonitor(model, loss_fn, **{"gradient": "checked"} | options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, following in monitor.lookahead(batches):
        optimizer.zero_grad()
        if backward is None:
            loss_fn(model, batch).backward()
        else:
            backward(model, batch, optimizer)
        monitor.step(batch, following)
        optimizer.step()
    return monitor


def equal(one: gc.CurvatureMonitor, other: gc.CurvatureMonitor) -> None:
    pd.testing.assert_frame_equal(one.records()[KEPT], other.records()[KEPT], check_exact=True)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", ["perceptron", "tied attention"])
def test_under_autocast_the_check_lifts_the_casts(name, generator):
    """What is certified is the function that the loss computes but for the rounding to bfloat16."""
    without = []
    for _ in range(4):
        problem, model, pair = draw(name, generator)
        for method in METHODS:
            truth = exact(problem, model, pair, method)
            probe = gc.CommutatorProbe(model, bfloat16(problem), method=method)
            stats = probe.measure([pair], keep_delta=True)
            assert stats.exact.all()
            assert stats.reliable.all()
            assert error(stats, truth) <= stats.noise_floor
            torch.testing.assert_close(stats.defect, truth.defect, rtol=0.01, atol=0)
            own = gc.CommutatorProbe(model, bfloat16(problem), method=method, noise_floor=False).measure([pair])
            if method == "difference":
                without.append(float(abs(own.defect / truth.defect - 1)))
    assert max(without) > 0.1  # eta |H| is below the roundoff of bfloat16; one pair may come out right by chance


def test_under_autocast_the_monitor_certifies_every_row(generator):
    problem, model, batches = draw("tied attention", generator, 4)
    truths, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = bfloat16(problem)
    monitor = gc.CurvatureMonitor(model, loss_fn)
    for batch, following in monitor.lookahead(batches):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        monitor.step(batch, following)
        if following is not None:
            truths.append(exact(problem, model, (batch, following)).defect.item())
        optimizer.step()
    records = monitor.records()
    assert records["reliable"].all()
    assert set(records["method"]) == {"difference"}
    np.testing.assert_allclose(records["defect_median"], truths, rtol=0.01)


def test_trained_in_bfloat16_and_measured_in_float32(generator):
    """.grad is then another gradient than that of loss_fn, by far more than the rounding of float32."""
    problem, model, batches = draw("tied attention", generator, 7)
    truths = []

    def backward(model, batch, optimizer):
        bfloat16(problem)(model, batch).backward()
        following = next((b for a, b in pairwise(batches) if a is batch), None)
        if following is not None:
            truths.append(exact(problem, model, (batch, following)).defect.item())

    records = run(model, batches, problem.loss_fn, backward, check_every=4).records()
    assert records["reliable"].all()
    assert set(records["method"]) == {"difference"}
    np.testing.assert_allclose(records["defect_median"], truths, rtol=0.01)


def test_a_given_gradient_that_is_another_s_is_not_relied_on(generator):
    problem, model, pair = draw("tied attention", generator)
    bfloat16(problem)(model, pair[0]).backward()
    rough = flatten_grad(model)
    truth = exact(problem, model, pair)
    probe = gc.CommutatorProbe(model, problem.loss_fn)
    checked = probe.measure([pair], first_gradient=rough, keep_delta=True)
    assert checked.reliable.all()  # a check computes the gradient all the same
    distance, own_error, length = probe.errors["given"][0].tolist()
    assert 1e-4 * length < distance < 0.1 * length
    assert own_error < 1e-5 * length
    used = probe.measure([pair], first_gradient=rough, check=False, keep_delta=True)
    assert used.exact.all()  # the distance is among the errors that the check has found: there is doubt
    for stats in (checked, used):
        assert error(stats, truth) < stats.noise_floor
    own = gc.CommutatorProbe(model, problem.loss_fn)
    own.measure([pair])
    assert torch.equal(
        own.measure([pair], first_gradient=rough, check=False).defect, checked.defect
    )  # not compared yet


def test_the_caller_s_autocast_is_left_outside(generator):
    problem, model, batches = draw("tied attention", generator, 5)

    class Under(gc.CurvatureMonitor):
        def step(self, *args):
            with torch.autocast("cpu", torch.bfloat16):
                super().step(*args)
                assert torch.is_autocast_enabled("cpu")

    options = {"pca_every": 1, "alignment": True}
    one = run(copy.deepcopy(model), batches, problem.loss_fn, pca=gc.StreamingPCA(n_components=2), **options)
    under = Under(model, problem.loss_fn, pca=gc.StreamingPCA(n_components=2), **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch, following in under.lookahead(batches):
        optimizer.zero_grad()
        problem.loss_fn(model, batch).backward()
        under.step(batch, following)
        optimizer.step()
    drop = "measure_seconds"
    pd.testing.assert_frame_equal(
        one.records().drop(columns=drop), under.records().drop(columns=drop), check_exact=True
    )


def test_gradscaler(generator):
    problem, model, batches = draw("perceptron", generator, 5)

    def scaled(unscale: bool):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

        def backward(model, batch, optimizer):
            scaler._per_optimizer_states.clear()  # what scaler.update() does at the end of a step
            scaler.scale(problem.loss_fn(model, batch)).backward()
            if unscale:
                scaler.unscale_(optimizer)

        return backward

    with pytest.raises(ValueError, match=r"\|\.grad\| is 4\.1e\+03 times .* GradScaler after scaler\.unscale_"):
        run(copy.deepcopy(model), batches, problem.loss_fn, scaled(False))
    plain = run(copy.deepcopy(model), batches, problem.loss_fn)
    equal(plain, run(model, batches, problem.loss_fn, scaled(True)))  # by a power of two: exact


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_gradient_that_overflowed_is_not_used(at, generator):
    """A GradScaler skips such a step of the optimiser; the loss at theta is as good as any other."""
    problem, model, batches = draw("perceptron", generator, 6)

    def backward(model, batch, optimizer):
        problem.loss_fn(model, batch).backward()
        if batch is batches[at]:
            model[0].weight.grad[0, 0] = float("inf")
            optimizer.step = lambda: delattr(optimizer, "step")

    records = run(model, batches, problem.loss_fn, backward, check_every=2).records()
    assert records["reliable"].all()


# --------------------------------------------------------------------------------------------------------------- kinks


@pytest.mark.parametrize("sampled", [False, True])
def test_rectifiers(sampled, generator):
    """A unit that rounding switches would be an error of percents; .grad, in which one may be, is not used."""
    problem, _, batches = draw("perceptron", generator, 7)
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3))
    pairs, truths = list(pairwise(batches)), []

    def backward(model, batch, optimizer):
        problem.loss_fn(model, batch).backward()
        if batch is not batches[-1] or sampled:
            truths.append(exact(problem, model, pairs[len(truths) % 6]).defect.item())

    options = {"sampler": iter(pairs * 2).__next__} if sampled else {}
    records = run(model, batches, problem.loss_fn, backward, **options).records()
    assert records["reliable"].all()
    assert set(records["method"]) == {"difference"}
    assert len(records) == len(truths)
    np.testing.assert_allclose(records["defect_median"], truths, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- accumulation


def test_accumulated_gradients(generator):
    problem, model, batches = draw("perceptron", generator, 6)
    steps = list(zip(batches[::2], batches[1::2], strict=True))
    whole = [{k: torch.cat([a[k], b[k]]) for k in a} for a, b in steps]

    def mean(model: nn.Module, batches) -> Tensor:
        return torch.stack([problem.loss_fn(model, batch) for batch in batches]).mean()

    def backward(model, batches, optimizer):
        for batch in batches:
            (problem.loss_fn(model, batch) / len(batches)).backward()

    one = run(copy.deepcopy(model), steps, mean, backward).records()
    other = run(copy.deepcopy(model), whole, problem.loss_fn).records()
    np.testing.assert_allclose(one["defect_median"], other["defect_median"], rtol=0.01)
    assert one["reliable"].all()

    def summed(model, batch, optimizer):
        for part in (batch, batch):
            problem.loss_fn(model, part).backward()

    with pytest.raises(ValueError, match="with accumulated gradients give a batch and a loss_fn that stand for all"):
        run(model, batches, problem.loss_fn, summed)


def test_a_gradient_of_other_batches_is_not_used(generator):
    """Of the right size, so that nothing is refused: the monitor looks at the vectors."""
    problem, model, batches = draw("perceptron", generator, 6)

    def backward(model, batch, optimizer):
        problem.loss_fn(model, batches[0]).backward()
        norm = flatten_grad(model).norm()
        optimizer.zero_grad()
        problem.loss_fn(model, batch).backward()
        wanted = flatten_grad(model).norm()
        optimizer.zero_grad()
        (problem.loss_fn(model, batches[0]) * (wanted / norm)).backward()

    records = run(copy.deepcopy(model), batches[1:], problem.loss_fn, backward).records()
    assert records["reliable"].all()
    assert (records["defect_median"] < 100).all()  # with two different gradients on A it would be of order 1 / eta


# ------------------------------------------------------------------------------------------- how the model is evaluated


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["in place", "a layer", "the loss"])
def test_what_is_compiled_runs_uncompiled(kind, method, generator):
    problem, model, batches = draw("perceptron", generator, 3)
    options = {"backend": "aot_eager"}
    expected = gc.CommutatorProbe(copy.deepcopy(model), problem.loss_fn, method=method).measure([batches[:2]])
    loss_fn = problem.loss_fn
    if kind == "in place":
        model.compile(**options)
    elif kind == "a layer":
        model[0] = torch.compile(model[0], **options)
    else:
        loss_fn = torch.compile(problem.loss_fn, **options)
    loss_fn(model, batches[2]).backward()  # compiled
    stats = gc.CommutatorProbe(model, loss_fn, method=method).measure([batches[:2]])
    assert torch.equal(stats.defect, expected.defect)
    assert torch.equal(stats.noise_floor, expected.noise_floor)


class Checkpointed(nn.Module):
    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Tanh(), nn.Linear(32, 6))
        self.head = nn.Linear(6, 3)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing(method, generator):
    """The second forward pass is at the parameters of the first, not at the model's own."""
    problem, _, pair = draw("perceptron", generator)
    plain = Checkpointed(checkpointed=False)
    model = copy.deepcopy(plain)
    model.checkpointed = True
    before = copy.deepcopy(model.state_dict())
    one, other = (
        gc.CommutatorProbe(m, problem.loss_fn, method=method).measure([pair], keep_delta=True) for m in (plain, model)
    )
    assert torch.equal(one.delta, other.delta)
    if method == "bracket":  # its floor is sampled, and the second forward pass takes samples of its own
        torch.testing.assert_close(one.noise_floor, other.noise_floor, rtol=1e-3, atol=0)
    else:
        assert torch.equal(one.noise_floor, other.noise_floor)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class AttentionDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(torch.stack([x, x.sin(), x.square()], 1))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    "model",
    [
        lambda: nn.Sequential(nn.Linear(5, 32), nn.Dropout(0.5), nn.Tanh(), nn.Linear(32, 3)),
        lambda: nn.Sequential(nn.Linear(5, 32), nn.AlphaDropout(0.3), nn.Tanh(), nn.Linear(32, 3)),
        AttentionDropout,
    ],
    ids=["dropout", "alpha dropout", "attention"],
)
def test_the_float64_check_meets_the_masks_of_the_measurement(model, generator):
    problem, _, pair = draw("perceptron", generator)
    model = model()
    difference, bracket = (gc.CommutatorProbe(model, problem.loss_fn, method=m).measure([pair]) for m in METHODS)
    assert difference.reliable.all()
    assert bracket.reliable.all()
    torch.testing.assert_close(difference.defect, bracket.defect, rtol=0.05, atol=0)


def test_training_with_masks_and_running_statistics_does_not_notice(generator):
    problem, _, batches = draw("perceptron", generator, 6)
    start = Checkpointed(checkpointed=True)
    results = []
    for measured in (True, False):
        model = copy.deepcopy(start)
        torch.manual_seed(11)
        optimizer = torch.optim.AdamW(model.parameters())
        monitor = gc.CurvatureMonitor(model, problem.loss_fn) if measured else None
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            optimizer.zero_grad()
            problem.loss_fn(model, batch).backward()
            if monitor is not None:
                monitor.step(batch, following)
            optimizer.step()
        results.append((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
        if monitor is not None:
            assert monitor.records()["reliable"].all()
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_ties_and_frozen_parts_in_a_run(generator):
    for name in ("tied attention", "frozen"):
        problem, model, batches = draw(name, generator, 4)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        monitor = run(model, batches, problem.loss_fn, pca=gc.StreamingPCA(n_components=2), pca_every=1)
        assert monitor.records()["reliable"].all()
        assert monitor.pca.components_.shape == (2, size) == (2, len(flatten(model)))
        for n, before in frozen.items():
            assert torch.equal(dict(model.named_parameters())[n], before)


def test_data_parallel_is_refused(generator):
    problem, model, _ = draw("perceptron", generator)
    for spread in (nn.DataParallel(model), nn.Sequential(nn.DataParallel(model))):
        with pytest.raises(ValueError, match=r"DataParallel.*pass model\.module.*or train with DistributedDataPar"):
            gc.CurvatureMonitor(spread, problem.loss_fn)
