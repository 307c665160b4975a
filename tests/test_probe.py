"""CommutatorProbe against the definition and against dense Hessians, in float64; and what it must leave alone."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from models import PROBLEMS, Problem, cross_entropy
from torch import Tensor, nn

import grokcurv as gc
from grokcurv import commutator
from grokcurv.flat import Segment, flatten, segments_of

ETA = 1e-2


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return PROBLEMS[request.param]


def draw(problem: Problem, generator: torch.Generator, dtype: torch.dtype = torch.float64):
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    model = problem.model().to(dtype)
    batches = [problem.batch(generator) for _ in range(6)]
    cast = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches]
    return model, list(zip(cast[::2], cast[1::2], strict=True))


def at(model: nn.Module, theta: Tensor) -> nn.Module:
    """A copy of the model with other parameters."""
    return set_to(copy.deepcopy(model), theta)


def set_to(model: nn.Module, theta: Tensor) -> nn.Module:
    nn.utils.vector_to_parameters(theta, [p for p in model.parameters() if p.requires_grad])
    return model


def gradient(problem: Problem, model: nn.Module, theta: Tensor, batch) -> Tensor:
    return gradient_of(problem, at(model, theta), batch)


def gradient_of(problem: Problem, model: nn.Module, batch) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(problem.loss_fn(model, batch), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def end_point(problem: Problem, model: nn.Module, theta: Tensor, eta: float, first, second) -> Tensor:
    theta = theta - eta * gradient(problem, model, theta, first)
    return theta - eta * gradient(problem, model, theta, second)


def hessian(problem: Problem, model: nn.Module, theta: Tensor, batch) -> Tensor:
    """By central differences of gradients: nothing shared with the probe's double backward."""
    step, moved = 1e-5, copy.deepcopy(model)
    columns = []
    for e in torch.eye(len(theta), dtype=theta.dtype):
        forwards, backwards = (gradient_of(problem, set_to(moved, theta + s * e), batch) for s in (step, -step))
        columns.append((forwards - backwards) / (2 * step))
    return torch.stack(columns, 1)


def test_difference_is_the_definition(problem, generator):
    model, pairs = draw(problem, generator)
    stats = gc.CommutatorProbe(model, problem.loss_fn, eta=ETA).measure(pairs, keep_delta=True)
    theta = flatten(model)
    for i, (a, b) in enumerate(pairs):
        delta = end_point(problem, model, theta, ETA, a, b) - end_point(problem, model, theta, ETA, b, a)
        g_a, g_b = gradient(problem, model, theta, a), gradient(problem, model, theta, b)
        # theta of order 1 is rounded to 1e-16 in the end points; delta itself is of order eta^2 = 1e-4
        torch.testing.assert_close(stats.delta[i], delta, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(stats.grad_norm_a[i], g_a.norm(), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.grad_norm_b[i], g_b.norm(), rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.grad_cosine[i], g_a @ g_b / (g_a.norm() * g_b.norm()), rtol=1e-11, atol=1e-13)
        defect = delta.norm() / (ETA**2 * g_a.norm() * g_b.norm())
        torch.testing.assert_close(stats.defect[i], defect, rtol=1e-8, atol=0)
        published = delta.norm() / (ETA**2 * g_a.norm() * g_b.norm() + 1e-12)
        torch.testing.assert_close(stats.reference[i], published, rtol=1e-6, atol=0)
    assert stats.delta.shape == (3, sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert stats.reliable.all()


def test_bracket_is_the_lie_bracket_of_dense_hessians(problem, generator):
    model, pairs = draw(problem, generator)
    stats = gc.CommutatorProbe(model, problem.loss_fn, eta=ETA, method="bracket").measure(pairs, keep_delta=True)
    theta = flatten(model)
    a, b = pairs[1]
    g_a, g_b = gradient(problem, model, theta, a), gradient(problem, model, theta, b)
    bracket = hessian(problem, model, theta, b) @ g_a - hessian(problem, model, theta, a) @ g_b
    torch.testing.assert_close(stats.delta[1] / ETA**2, bracket, rtol=1e-5, atol=1e-8)  # differences at step 1e-5
    torch.testing.assert_close(stats.bracket_norm[1], bracket.norm(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.defect[1], bracket.norm() / (g_a.norm() * g_b.norm()), rtol=1e-6, atol=0)
    assert stats.reference.isnan().all()
    assert stats.reliable.all()


def test_difference_is_exactly_the_bracket_for_a_quadratic_loss(generator):
    problem = PROBLEMS["linear"]
    model, pairs = draw(problem, generator)
    probe = gc.CommutatorProbe(model, problem.loss_fn, eta=0.1)
    difference, bracket = probe.measure(pairs), probe.measure(pairs, method="bracket")
    torch.testing.assert_close(difference.defect, bracket.defect, rtol=1e-10, atol=0)


def test_reference_is_the_published_formula_in_float32(problem, generator):
    model, pairs = draw(problem, generator, torch.float32)
    stats = gc.CommutatorProbe(model, problem.loss_fn, eta=ETA, method="published").measure(pairs)
    theta = flatten(model)
    for i, (a, b) in enumerate(pairs):
        delta = end_point(problem, model, theta, ETA, a, b) - end_point(problem, model, theta, ETA, b, a)
        g_a, g_b = gradient(problem, model, theta, a), gradient(problem, model, theta, b)
        published = delta.norm() / ((ETA * g_a).norm() * (ETA * g_b).norm() + 1e-12)
        torch.testing.assert_close(stats.defect[i].float(), published, rtol=1e-5, atol=0)
    difference = gc.CommutatorProbe(model, problem.loss_fn, eta=ETA).measure(pairs)
    assert torch.equal(difference.reference, stats.defect)
    assert (stats.noise_floor > difference.noise_floor).all()


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_float32_errors_lie_below_the_floor(method, generator):
    problem = PROBLEMS["tied attention"]
    inside = []
    for _ in range(12):
        model, pairs = draw(problem, generator, torch.float32)
        stats, plain, exact = (
            gc.CommutatorProbe(m, problem.loss_fn, eta=ETA, method=method, noise_floor=floor).measure(
                pairs, keep_delta=True
            )
            for m, floor in ((model, True), (model, False), (copy.deepcopy(model).double(), True))
        )
        area = exact.eta.square() * exact.grad_norm_a * exact.grad_norm_b
        error, unchecked = ((x.delta.double() - exact.delta).norm(dim=1) / area for x in (stats, plain))
        # All floors follow from how far float32 is off in the pair that is checked, which then is no longer off by it.
        assert (stats.noise_floor <= 100 * unchecked.max()).all()  # a floor of infinity would not do
        inside += (error <= stats.noise_floor).tolist()
    assert sum(inside) >= 0.9 * len(inside)


class Rectifiers(nn.Module):
    """64 units; unit j is zero on row j of ``x``, as nearly as float32 can say: rounding decides whether it is on."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(x.shape[1], 64), nn.Linear(64, 3)
        with torch.no_grad():
            self.first.bias.copy_(-(self.first.weight.double() * x[:64]).sum(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_rounding_does_not_switch_a_rectifier(method, generator):
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    batches = [
        {"x": torch.randn(64, 20, generator=generator), "y": torch.randint(3, (64,), generator=generator)}
        for _ in range(4)
    ]
    model = Rectifiers(batches[3]["x"])
    pairs = list(pairwise(batches))  # only the last has them
    stats, unchecked, exact = (
        gc.CommutatorProbe(m, cross_entropy, method=method, noise_floor=floor).measure(p, keep_delta=True)
        for m, floor, p in (
            (model, True, pairs),
            (model, False, pairs),
            (copy.deepcopy(model).double(), True, [[{**b, "x": b["x"].double()} for b in pair] for pair in pairs]),
        )
    )
    area = exact.eta.square() * exact.grad_norm_a * exact.grad_norm_b
    errors, float32_errors = ((s.delta.double() - exact.delta).norm(dim=1) / area for s in (stats, unchecked))
    assert float32_errors[2] > 10 * stats.noise_floor[2]  # many of the 64 units are switched
    assert (errors <= stats.noise_floor).all()
    assert stats.reliable.all()
    torch.testing.assert_close(stats.defect, exact.defect, rtol=1e-3, atol=0)
    again = gc.CommutatorProbe(model, cross_entropy, method=method)
    other = torch.ones(again.gradients.size)  # is not taken
    assert torch.equal(again.measure(pairs, first_gradient=other, check=False).defect, stats.defect)


def test_a_step_across_a_kink_is_in_the_defect_and_not_in_the_bracket():
    """L_A = theta + max(0, theta), L_B = theta: a step along g_B takes g_A from 2 to 1, and both Hessians are zero."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1e-4)

    def loss_fn(model: nn.Module, rectified: bool) -> Tensor:
        theta = model.weight.sum()
        return theta + theta.relu() if rectified else theta

    for eta, defect in ((1e-2, 50.0), (1e-3, 500.0), (1e-5, 0.0)):  # eta 1 / (eta^2 2); the last does not cross
        stats = gc.commutator_defect(model, loss_fn, True, False, eta=eta)
        torch.testing.assert_close(stats.defect.item(), defect)
        assert bool(stats.reliable) == (defect > 0)
    assert gc.commutator_defect(model, loss_fn, True, False, method="bracket").defect == 0.0


def test_floor_rises_with_a_model_of_fewer_digits(generator):
    problem = PROBLEMS["perceptron"]
    model, pairs = draw(problem, generator)
    floors = {
        dtype: gc.CommutatorProbe(
            model.to(dtype), lambda m, b: cross_entropy(m, {"x": b["x"].to(m[0].weight.dtype), "y": b["y"]})
        )
        .measure(pairs)
        .noise_floor.median()
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    assert 1e3 * floors[torch.float64] < floors[torch.float32] < floors[torch.bfloat16] / 1e3


def test_the_published_formula_errs_by_the_rounding_of_its_end_points(generator):
    """docs/numerics.md: four independent roundings of theta, two of them known exactly."""
    theta = torch.randn(200_000, generator=generator)
    gradients = [0.1 * torch.randn(1, len(theta), generator=generator) for _ in range(4)]
    eta = torch.tensor([ETA], dtype=torch.float64)
    error, q_a, q_b = gc.ops.commutator(*gradients, eta, theta=theta).sums[0, 7:]
    torch.testing.assert_close(error, 2 * (q_a + q_b), rtol=0.03, atol=0)  # statistical: 1 / sqrt(200 000) is 0.002
    ulp = torch.finfo(torch.float32).eps * 2.0 ** theta.abs().log2().floor()
    torch.testing.assert_close(q_a, ulp.double().square().sum() / 12, rtol=0.03, atol=0)


def test_without_a_floor_nothing_is_reliable(generator):
    problem = PROBLEMS["perceptron"]
    model, pairs = draw(problem, generator)
    stats = gc.CommutatorProbe(model, problem.loss_fn, noise_floor=False).measure(pairs)
    assert stats.noise_floor.isnan().all()
    assert not stats.reliable.any()
    assert stats.defect.isfinite().all()


def test_cross_entropy64_keeps_the_gradient_of_a_confident_model():
    logits = torch.tensor([[15.0, 0.0, 0.0]], requires_grad=True)
    rest = 2 * torch.tensor(-15.0, dtype=torch.float64).exp()
    exact = -rest / (1 + rest)
    (grad,) = torch.autograd.grad(gc.cross_entropy64(logits, torch.tensor([0])), logits)
    torch.testing.assert_close(grad[0, 0].double(), exact, rtol=1e-7, atol=0)
    (plain,) = torch.autograd.grad(nn.functional.cross_entropy(logits, torch.tensor([0])), logits)
    assert (plain[0, 0].double() / exact - 1).abs() > 1e-3  # 1 - p is 6e-7, known to 6e-8


def test_basis_and_segments(generator):
    problem = PROBLEMS["tied attention"]
    model, pairs = draw(problem, generator)
    first, *_, last = segments_of(model)
    q = torch.linalg.qr(torch.randn(last.length, 2, dtype=torch.float64, generator=generator)).Q.T
    basis = gc.Subspace.from_blocks(last.stop, [(last.start, q.contiguous())])
    probe = gc.CommutatorProbe(model, problem.loss_fn, eta=ETA, basis=basis, segments=[first, last])
    stats = probe.measure(pairs, keep_delta=True)
    part = stats.delta[:, last.start : last.stop]
    torch.testing.assert_close(stats.coefficients, part @ q.T, rtol=1e-12, atol=1e-18)
    torch.testing.assert_close(stats.parallel, (part @ q.T).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        stats.residual, (stats.delta.square().sum(1) - stats.parallel**2).sqrt(), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(stats.support, part.norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.energies[:, 0], stats.delta[:, : first.stop].square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.energies[:, 1], part.square().sum(1), rtol=1e-12, atol=0)
    probe.basis = None
    assert probe.measure(pairs).parallel is None


def test_auto_step_estimates_the_bracket_whatever_the_gradient(generator):
    problem = PROBLEMS["tied attention"]
    model, pairs = draw(problem, generator)
    for scale in (1e-6, 1.0, 1e3):

        def loss_fn(model: nn.Module, batch, scale: float = scale) -> Tensor:
            return scale * problem.loss_fn(model, batch)

        auto = gc.CommutatorProbe(model, loss_fn, eta="auto").measure(pairs)
        bracket = gc.CommutatorProbe(model, loss_fn, method="bracket").measure(pairs)
        torch.testing.assert_close(auto.defect, bracket.defect, rtol=1e-4, atol=0)
        length = auto.eta * (auto.grad_norm_a * auto.grad_norm_b).sqrt()
        assert (length / flatten(model).norm() < 1e-8).all()


@pytest.mark.parametrize("method", ["difference", "bracket", "published"])
def test_measuring_leaves_everything_alone(problem, method, generator):
    model, pairs = draw(problem, generator, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in (pairs[0][0], pairs[0][1]):
        optimizer.zero_grad()
        problem.loss_fn(model, batch).backward()
        optimizer.step()
    before = copy.deepcopy((model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict()))
    pointers = [p.data_ptr() for p in model.parameters()]
    state = torch.get_rng_state()
    with torch.no_grad():
        gc.CommutatorProbe(model, problem.loss_fn, method=method).measure(pairs)
    after = (model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict())
    torch.testing.assert_close(before, after, rtol=0, atol=0)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


def test_a_loss_with_parameters_of_its_own_is_left_alone(generator):
    model, pairs = draw(PROBLEMS["perceptron"], generator)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, model: nn.Module, batch) -> Tensor:
            return self.scale * cross_entropy(model, batch)

    loss_fn = Scaled()
    gc.CommutatorProbe(model, loss_fn).measure(pairs)
    assert loss_fn.scale.grad is None


def test_dropout_meets_the_same_mask_at_every_point(generator):
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 3)).double()
    batches = PROBLEMS["perceptron"].batch(generator), PROBLEMS["perceptron"].batch(generator)
    pair = tuple({"x": b["x"].double(), "y": b["y"]} for b in batches)
    probe = gc.CommutatorProbe(model, cross_entropy, eta=1e-5)
    difference, bracket = probe.measure([pair]), probe.measure([pair], method="bracket")
    # With unequal masks the difference form would be of order 1 / eta.
    torch.testing.assert_close(difference.defect, bracket.defect, rtol=1e-3, atol=0)
    assert probe.gradients.stochastic
    assert not torch.equal(probe.measure([pair], seed=1).defect, difference.defect)


def test_attention_in_eval_mode_and_compiled_modules(generator):
    problem = PROBLEMS["tied attention"]
    model, pairs = draw(problem, generator)
    expected = gc.CommutatorProbe(model, problem.loss_fn, method="bracket").measure(pairs).defect
    compiled = torch.compile(model.eval(), backend="eager")
    for method in ("bracket", "difference"):
        stats = gc.CommutatorProbe(compiled, problem.loss_fn, method=method, eta=1e-6).measure(pairs)
        torch.testing.assert_close(stats.defect, expected, rtol=1e-4, atol=0)
    assert not model.training


def test_sampler_and_pairs(generator):
    problem = PROBLEMS["perceptron"]
    model, pairs = draw(problem, generator)
    probe = gc.CommutatorProbe(model, problem.loss_fn)
    drawn = iter(pairs)
    stats = probe.measure(lambda: next(drawn), pairs=2)
    assert torch.equal(stats.defect, probe.measure(pairs, pairs=2).defect)
    assert len(stats) == 2
    one_by_one = torch.cat([probe.measure([pair]).defect for pair in pairs])
    assert torch.equal(probe.measure(pairs).defect, one_by_one)
    assert torch.equal(probe.measure(pairs).median(), one_by_one.median())
    assert probe.measure(pairs).quantile(0.0) == one_by_one.min()


def test_known_first_gradient(generator):
    problem = PROBLEMS["perceptron"]
    model, pairs = draw(problem, generator)
    probe = gc.CommutatorProbe(model, problem.loss_fn)
    known = gradient(problem, model, flatten(model), pairs[0][0])
    torch.testing.assert_close(probe.measure(pairs, first_gradient=known).defect, probe.measure(pairs).defect)
    with pytest.raises(ValueError, match=r"first_gradient must have shape \(57,\), got \(3,\)"):
        probe.measure(pairs, first_gradient=known[:3])


def test_commutator_defect_keeps_delta(generator):
    problem = PROBLEMS["perceptron"]
    model, [(a, b), *_] = draw(problem, generator)
    stats = gc.commutator_defect(model, problem.loss_fn, a, b, eta=ETA)
    probe = gc.CommutatorProbe(model, problem.loss_fn, eta=ETA)
    assert torch.equal(stats.delta, probe.measure([(a, b)], keep_delta=True).delta)
    swapped = gc.commutator_defect(model, problem.loss_fn, b, a, eta=ETA)
    assert torch.equal(swapped.delta, -stats.delta)


def test_zero_and_nan_gradients_are_never_a_number(generator):
    model = nn.Linear(2, 1)
    batch = torch.zeros(3, 2)
    stats = gc.commutator_defect(model, lambda m, x: 0.0 * m(x).sum(), batch, batch)
    assert stats.defect.isnan().all()
    assert not stats.reliable.any()
    stats = gc.commutator_defect(model, lambda m, x: m(x).sum() * float("nan"), batch, batch)
    assert stats.defect.isnan().all()
    assert not stats.reliable.any()


def test_bad_input(generator):
    model, loss_fn, batch = nn.Linear(2, 1), lambda m, x: m(x).mean(), torch.ones(3, 2)
    pair = [(batch, batch)]
    with pytest.raises(ValueError, match="method must be one of difference, bracket, published, got 'exact'"):
        gc.CommutatorProbe(model, loss_fn, method="exact")
    with pytest.raises(ValueError, match="method must be one of"):
        gc.CommutatorProbe(model, loss_fn).measure(pair, method="exact")
    for eta in (0.0, -1.0, float("nan"), float("inf"), "large"):
        with pytest.raises(ValueError, match="eta must be a positive number or 'auto'"):
            gc.CommutatorProbe(model, loss_fn, eta=eta)
    with pytest.raises(ValueError, match=r"must return a scalar tensor, got shape \(3, 1\)"):
        gc.CommutatorProbe(model, lambda m, x: m(x)).measure(pair)
    with pytest.raises(ValueError, match="must return a scalar tensor, got float"):
        gc.CommutatorProbe(model, lambda m, x: 1.0).measure(pair)
    with pytest.raises(ValueError, match="does not depend on the model's trainable parameters"):
        gc.CommutatorProbe(model, lambda m, x: x.sum()).measure(pair)
    with pytest.raises(ValueError, match="float64"):
        gc.CommutatorProbe(nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1).double()), loss_fn)
    with pytest.raises(ValueError, match="no trainable parameters"):
        gc.CommutatorProbe(nn.Linear(2, 1).requires_grad_(False), loss_fn)
    with pytest.raises(ValueError, match=r"basis lives in R\^5, the model has P = 3"):
        gc.CommutatorProbe(model, loss_fn, basis=gc.Subspace.random(1, 5, generator))
    with pytest.raises(ValueError, match="past P = 3"):
        gc.CommutatorProbe(model, loss_fn, segments=[Segment("x", 2, 2, (2,))])
    with pytest.raises(ValueError, match="no pair"):
        gc.CommutatorProbe(model, loss_fn).measure([])
    with pytest.raises(ValueError, match="pairs must be given"):
        gc.CommutatorProbe(model, loss_fn).measure(lambda: pair[0])
    with pytest.raises(ValueError, match="pairs must be at least 1"):
        gc.CommutatorProbe(model, loss_fn).measure(pair, pairs=0)


def test_batches_of_any_shape_are_checked_in_float64(generator):
    class Batch(NamedTuple):
        x: Tensor
        rest: list

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model, {"x": batch.x + batch.rest[0]["shift"], "y": batch.rest[1]})

    problem = PROBLEMS["perceptron"]
    model = problem.model()
    draws = [problem.batch(generator) for _ in range(2)]
    batches = [Batch(b["x"], [defaultdict(int, shift=torch.ones(5)), b["y"], "a name"]) for b in draws]
    stats = gc.CommutatorProbe(model, loss_fn).measure([batches])
    assert stats.noise_floor.isfinite().all()
    assert batches[0].x.dtype == torch.float32


def test_a_model_that_cannot_run_in_float64_says_so(generator):
    model = nn.Linear(5, 3)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        if model.weight.dtype == torch.float64:
            raise TypeError("single precision, please")
        return model(batch).square().mean()

    a, b = torch.randn(2, 4, 5, generator=generator)
    probe = gc.CommutatorProbe(model, loss_fn)
    with pytest.warns(gc.AdmissionWarning, match="float64: cannot be evaluated: TypeError: single precision, please"):
        stats = probe.measure([(a, b)])
    assert stats.defect.isfinite().all()
    assert not stats.reliable.any()
    (finding,) = (f for f in probe.gradients.admission if not f.passed)
    assert (finding.check, finding.consequence) == ("float64", "no row is reliable")
    stats = gc.CommutatorProbe(model, loss_fn, noise_floor=False).measure([(a, b)])
    assert stats.defect.isfinite().all()


MEMORY = """
import re, sys, torch
import grokcurv as gc
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # fills what is allocated, so that memory counts before anything is in it
status = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
loss_fn = lambda m, x: m(x).square().mean()
for case in sys.argv[1:]:
    method, check, pairs = case.split(",")
    checked, kinked = check != "unchecked", check == "with kinks"
    width = 384 if checked else 512
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(16)]
    model = torch.nn.Sequential(*layers, *[torch.nn.ReLU()] * kinked)
    batch = torch.randn(2, width)
    small = torch.nn.Linear(2, 2)
    gc.CommutatorProbe(small, loss_fn, method=method).measure([(torch.ones(1, 2), torch.ones(1, 2))])
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    probe = gc.CommutatorProbe(model, loss_fn, method=method, noise_floor=checked)
    probe.measure([(batch, batch + 1)] * int(pairs))
    print((status("VmHWM") - before) / (4 * width * width * 16))
    del layers, model, probe
"""


def test_at_most_six_vectors_of_memory():
    most = {
        **{("difference", "unchecked", pairs): 6.0 + 2 / 16 for pairs in (1, 3)},
        **{("bracket", "unchecked", pairs): 6.0 + 2 / 16 for pairs in (1, 3)},
        # One layer's own gradient in float64, and its distance.
        **{("difference", check, 1): 6.0 + 8 / 16 for check in ("checked", "with kinks")},
        # Each layer's product has two parts, which autograd adds at the end.
        **{("bracket", check, pairs): 8.0 + 8 / 16 for check, pairs in (("checked", 1), ("with kinks", 2))},
    }
    command = [sys.executable, "-c", MEMORY, *(",".join(map(str, case)) for case in most)]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory goes back
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | at_once)
    for (case, limit), found in zip(most.items(), done.stdout.split(), strict=True):
        # One layer's own gradient (a sixteenth of P) is in flight while autograd adds it to the flat buffer.
        assert 4.0 < float(found) <= limit, case


def test_a_chain_shares_the_gradients_between_its_pairs(generator):
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    batches = [problem.batch(generator) for _ in range(5)]
    chain = list(pairwise(batches))
    probe = gc.CommutatorProbe(model, problem.loss_fn, noise_floor=False)
    calls = []
    gradient = probe.gradients.gradient
    probe.gradients.gradient = lambda *args, **options: calls.append(args) or gradient(*args, **options)
    shared = probe.measure(chain, design="chain", keep_delta=True)
    assert len(calls) == 3 * len(chain) + 1
    apart = probe.measure(chain, keep_delta=True)
    assert len(calls) == 7 * len(chain) + 1
    assert torch.equal(shared.delta, apart.delta)
    assert torch.equal(shared.defect, apart.defect)


def test_a_chain_s_masks_belong_to_its_batches(generator):
    """With dropout, too, one evaluation at theta serves both pairs: the gradients are those of one mask per batch."""
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Tanh(), nn.Linear(64, 3))
    problem = PROBLEMS["perceptron"]
    chain = list(pairwise([problem.batch(generator) for _ in range(4)]))
    stats = gc.CommutatorProbe(model, problem.loss_fn).measure(chain, design="chain")
    assert (stats.defect < 100).all()  # unequal masks would give about 1 / eta
    assert torch.equal(stats.grad_norm_a[1:], stats.grad_norm_b[:-1])


def test_a_chain_has_no_gap(generator):
    problem = PROBLEMS["perceptron"]
    pairs = [(problem.batch(generator), problem.batch(generator)) for _ in range(2)]
    probe = gc.CommutatorProbe(problem.model(), problem.loss_fn)
    with pytest.raises(ValueError, match="pair 1 of a chain must begin with the batch that ended pair 0"):
        probe.measure(pairs, design="chain")
    with pytest.raises(ValueError, match="design must be one of independent, chain, got 'star'"):
        probe.measure(pairs, design="star")


@pytest.mark.parametrize("design", ["independent", "chain"])
@pytest.mark.parametrize("method", ["difference", "bracket", "published"])
def test_pairs_together_are_what_they_are_one_by_one(generator, monkeypatch, method, design):
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    batches = [problem.batch(generator) for _ in range(6)]
    pairs = list(pairwise(batches))
    probe = gc.CommutatorProbe(model, problem.loss_fn, method=method, noise_floor=False)
    together = probe.measure(pairs, design=design, keep_delta=True)
    monkeypatch.setattr(commutator, "TOGETHER", 0)
    alone = probe.measure(pairs, design=design, keep_delta=True)
    for name, value in vars(together).items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, getattr(alone, name), rtol=0, atol=0, equal_nan=True)
