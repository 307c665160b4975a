"""Interventions against their definitions in plain float64, in loops of one's own and through the trainer."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import PROBLEMS, TINY, Problem
from torch import Tensor, nn
from torch.func import functional_call

from grokcurv import CommutatorProbe, FlatParameters, Subspace
from grokcurv.flat import flatten, flatten_grad
from grokcurv.interventions import Intervention, Kick, Noise, Projection
from grokcurv.report import write_report
from grokcurv.runs import Run, open_run
from grokcurv.training import TrainConfig, load_model, train, train_ensemble
from grokcurv.training.draws import intervention_seed

DOCS = Path(__file__).parents[1] / "docs" / "interventions.md"
UNIT = 2.0**-24
"""Unit roundoff of float32."""
ETA = 1e-3

Make = Callable[[nn.Module, Problem, torch.Generator], Intervention]


def space_of(model: nn.Module, generator: torch.Generator, k: int = 2) -> Subspace:
    """Block-sparse, on part of the coordinates: a third of them in the middle, and the last few."""
    size = len(flatten(model))
    rows = [torch.randn(length, n, dtype=torch.float64, generator=generator) for n, length in ((k, size // 3), (1, 4))]
    starts = (size // 4, size - 4)
    blocks = [(start, torch.linalg.qr(block).Q.T.float()) for start, block in zip(starts, rows, strict=True)]
    return Subspace.from_blocks(size, blocks)


def filtered(space: Subspace, v: Tensor, strength: float) -> Tensor:
    """The definition, dense."""
    basis = space.to_dense().double()
    parallel = (v @ basis.T) @ basis
    return parallel + (1 - strength) * (v - parallel)


def pairs_of(problem: Problem, generator: torch.Generator) -> Callable[[], tuple[Any, Any]]:
    return lambda: (problem.batch(generator), problem.batch(generator))


def probe_of(model: nn.Module, problem: Problem, **settings: Any) -> CommutatorProbe:
    return CommutatorProbe(model, problem.loss_fn, eta=ETA, **settings)


KINDS: dict[str, Make] = {
    "gradient": lambda m, p, g: Projection(m, space_of(m, g), 0.7),
    "update": lambda m, p, g: Projection(m, space_of(m, g), 0.7, of="update"),
    "kick": lambda m, p, g: Kick(probe_of(m, p), pairs_of(p, g), 3.0, space=space_of(m, g), generator=g),
    "random kick": lambda m, p, g: Kick(
        probe_of(m, p), pairs_of(p, g), 3.0, direction="random", space=space_of(m, g), generator=g
    ),
    "noise": lambda m, p, g: Noise(m, 0.2, generator=g, space=space_of(m, g)),
}


def backward(model: nn.Module, problem: Problem, batch: Any) -> None:
    model.zero_grad()
    problem.loss_fn(model, batch).backward()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=1.0)


def fork(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


# One step against the definition


@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_optimiser_sees_the_filtered_gradient_and_nobody_else(name: str, strength: float, generator) -> None:
    problem = PROBLEMS[name]
    model = problem.model()
    space = space_of(model, generator)
    backward(model, problem, problem.batch(generator))
    measured = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    g = flatten_grad(model)
    projection = Projection(model, space, strength)
    with projection.at(0):
        want = filtered(space, g.double(), strength)
        seen = [
            torch.full_like(p, math.nan) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad
        ]
        there = torch.cat([part.flatten() for part in seen])
        has_one = ~there.isnan()
        assert ((there - want).abs() <= UNIT * want.abs() + 1e-14 * g.double().norm())[has_one].all()
    for p, before in zip(model.parameters(), measured, strict=True):
        assert (p.grad is None) == (before is None)
        assert before is None or p.grad.equal(before)
    outside = g - filtered(space, g.double(), 1.0)
    assert float(projection.norm) == pytest.approx(strength * float(outside.norm()), rel=1e-5)
    assert projection.acted == 1


def test_the_gradient_is_put_back_when_the_optimiser_fails(generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    backward(model, problem, problem.batch(generator))
    before = flatten_grad(model)
    projection = Projection(model, space_of(model, generator))

    def fail() -> None:
        with projection.at(0):
            assert not flatten_grad(model).equal(before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert flatten_grad(model).equal(before)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_the_whole_step_is_filtered(strength: float, generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    space = space_of(model, generator)
    plain = copy.deepcopy(model)
    batch = problem.batch(generator)
    optimizers = [adamw(m) for m in (model, plain)]
    projection = Projection(model, space, strength, of="update")
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        backward(m, problem, batch)
        before = flatten(m)
        with projection.at(0) if m is model else torch.enable_grad():
            optimizer.step()
    want = before.double() + filtered(space, flatten(plain).double() - before, strength)
    assert ((flatten(model) - want).abs() <= UNIT * want.abs() * (1 + 1e-6)).all()
    assert str(optimizers[0].state_dict()) == str(optimizers[1].state_dict())


def commutator(model: nn.Module, problem: Problem, a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """``theta_AB - theta_BA`` and g_A in float64, from the paper's definition."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    model = copy.deepcopy(model).double()

    def gradient(theta: Tensor, batch: Any) -> Tensor:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        theta = theta.requires_grad_()
        parts = [part.view(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]

        def loss(m: nn.Module, b: Any) -> Tensor:
            return problem.loss_fn(lambda x: functional_call(m, dict(zip(names, parts, strict=True)), (x,)), b)

        return torch.autograd.grad(loss(model, batch), theta)[0]

    theta = flatten(model)
    g_a, g_b = gradient(theta.clone(), a), gradient(theta.clone(), b)
    past_a, past_b = theta - ETA * g_a, theta - ETA * g_b
    delta = past_a - ETA * gradient(past_a.clone(), b) - (past_b - ETA * gradient(past_b.clone(), a))
    return delta.detach(), g_a


@pytest.mark.parametrize("with_space", [True, False])
@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_a_kick_along_the_commutator(method: str, with_space: bool, generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    a, b = problem.batch(generator), problem.batch(generator)
    space = space_of(model, generator) if with_space else None
    delta, g_a = commutator(model, problem, a, b)
    along = delta if space is None else delta - filtered(space, delta, 1.0)
    before = flatten(model)
    kick = Kick(probe_of(model, problem, method=method), lambda: (a, b), 50.0, space=space)
    with kick.at(0):
        pass
    want = before + 50.0 * ETA * g_a.norm() * along / along.norm()
    # Rounding of theta, and what method and float32 leave between the two deltas: a few parts in 10^3 of the kick.
    assert (flatten(model) - want).norm() <= UNIT * want.norm() + 0.02 * kick.norm
    assert float(kick.norm) == pytest.approx(50.0 * ETA * float(g_a.norm()), rel=1e-5)
    assert kick.acted == 1


def test_a_random_kick_is_as_long_and_orthogonal_to_both(generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model().double()
    a, b = ({**batch, "x": batch["x"].double()} for batch in pairs_of(problem, generator)())
    space = space_of(model, generator)
    delta, g_a = commutator(model, problem, a, b)
    pushes = []
    for _ in range(2):
        before = flatten(model)
        m = copy.deepcopy(model)
        probe = probe_of(m, problem)
        kick = Kick(probe, lambda: (a, b), 7.0, direction="random", space=space, generator=fork(generator))
        with kick.at(0):
            pass
        pushes.append(flatten(m) - before)
    for push in pushes:
        assert float(push.norm()) == pytest.approx(7.0 * ETA * float(g_a.norm()), rel=1e-9)
        assert space.split(push).parallel <= 1e-6 * push.norm()  # a float32 basis
        outside = delta - filtered(space, delta, 1.0)
        assert abs(push @ outside) <= 1e-5 * push.norm() * outside.norm()
    assert not pushes[0].equal(pushes[1])


@pytest.mark.parametrize("with_space", [True, False])
def test_noise_is_as_long_as_asked_and_outside_the_space(with_space: bool, generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model().double()
    space = space_of(model, generator) if with_space else None
    before = flatten(model)
    seed = fork(generator)
    drawn = torch.randn(len(before), dtype=torch.float64, generator=seed.clone_state())
    noise = Noise(model, 0.3, generator=seed, space=space)
    with noise.at(0):
        pass
    outside = drawn if space is None else drawn - filtered(space, drawn, 1.0)
    torch.testing.assert_close(flatten(model) - before, 0.3 * outside / outside.norm(), rtol=1e-9, atol=1e-12)
    assert noise.norm == 0.3


def test_a_faithful_kick_leaves_the_published_gradient(generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    a, b = problem.batch(generator), problem.batch(generator)
    backward(model, problem, problem.batch(generator))
    theta = flatten(model)
    engine = probe_of(model, problem).gradients
    g_b = engine.gradient(theta, b, torch.empty_like(theta))
    wanted = engine.gradient(theta - ETA * g_b, a, torch.empty_like(theta))
    kick = Kick(probe_of(model, problem), lambda: (a, b), 20.0, faithful=True, times=1)
    with kick.at(0):
        torch.testing.assert_close(flatten_grad(model), wanted, rtol=1e-4, atol=1e-7)
        assert float((flatten(model) - theta).norm()) == pytest.approx(float(kick.norm), rel=1e-3)
        kicked = flatten(model)
    assert flatten(model).equal(kicked)
    torch.testing.assert_close(flatten_grad(model), wanted, rtol=1e-4, atol=1e-7)


# In a loop


def trained(
    problem: Problem, make: Make | None, generator: torch.Generator, steps: int = 10, flat: bool = False
) -> tuple[list[Tensor], Intervention | None]:
    """theta before every step and at the end; every ``.grad`` is what it was before the step."""
    model = problem.model()
    state = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=state) / 3)
    if flat:
        FlatParameters(model)
    optimizer = adamw(model)
    intervention = make(model, problem, generator) if make else None
    batches = torch.Generator().manual_seed(2)
    thetas = [flatten(model)]
    for step in range(steps):
        optimizer.zero_grad()
        problem.loss_fn(model, problem.batch(batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        measured = flatten_grad(model)
        if intervention is None:
            optimizer.step()
        else:
            with intervention.at(step):
                optimizer.step()
        assert flatten_grad(model).equal(measured)
        thetas.append(flatten(model))
    return thetas, intervention


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_grad_stays_bitwise_what_it_was_and_theta_does_not(kind: str, flat: bool, generator) -> None:
    thetas, intervention = trained(PROBLEMS["tied attention"], KINDS[kind], generator, flat=flat)
    plain, _ = trained(PROBLEMS["tied attention"], None, generator)
    assert intervention is not None
    assert intervention.acted == 10
    assert thetas[0].equal(plain[0])
    assert not thetas[1].equal(plain[1])


@pytest.mark.parametrize("strength", [0.0, 1e-30])
@pytest.mark.parametrize("kind", KINDS)
def test_strength_0_is_bitwise_none_and_nearly_0_too(kind: str, strength: float, generator) -> None:
    def make(model: nn.Module, problem: Problem, g: torch.Generator) -> Intervention:
        made = KINDS[kind](model, problem, g)
        made.strength = strength
        return made

    thetas, intervention = trained(PROBLEMS["perceptron"], make, generator)
    plain, _ = trained(PROBLEMS["perceptron"], None, generator)
    assert all(map(torch.equal, thetas, plain))
    assert intervention is not None
    assert intervention.acted == (10 if strength else 0)


def test_projecting_the_whole_step_stays_in_the_span_and_projecting_the_gradient_does_not(generator) -> None:
    problem = PROBLEMS["tied attention"]
    spaces: list[Subspace] = []

    def make(of: str) -> Make:
        def made(model: nn.Module, problem: Problem, g: torch.Generator) -> Intervention:
            spaces.append(space_of(model, g))
            return Projection(model, spaces[-1], 1.0, of=of)

        return made

    steps = 100
    outside = []
    for of in ("update", "gradient"):
        thetas, _ = trained(problem, make(of), generator, steps)
        moved = thetas[-1].double() - thetas[0].double()
        q = torch.linalg.qr(spaces[-1].to_dense().double().T).Q
        outside.append((moved - q @ (q.T @ moved)).norm())
        # Each step rounds theta once, by at most u |theta_i| where it moves at all.
        bound = UNIT * sum(theta.double().norm() for theta in thetas[1:])
        assert moved.norm() > 1000 * bound
        if of == "update":
            assert outside[0] <= bound
            covered = spaces[-1].to_dense().abs().sum(0) > 0
            assert thetas[-1][~covered].equal(thetas[0][~covered])
    assert outside[1] > 1000 * bound


def test_the_space_of_everything_changes_nothing(generator) -> None:
    def make(model: nn.Module, problem: Problem, g: torch.Generator) -> Intervention:
        return Projection(model, Subspace(torch.eye(len(flatten(model)))), 1.0)

    thetas, intervention = trained(PROBLEMS["perceptron"], make, generator)
    plain, _ = trained(PROBLEMS["perceptron"], None, generator)
    assert all(map(torch.equal, thetas, plain))
    assert intervention is not None
    assert intervention.acted == 10


def test_schedule(generator) -> None:
    model = nn.Linear(3, 2)
    noise = Noise(model, 1.0, generator=generator, start=4, every=3, times=3)
    acted = []
    for step in range(20):
        before = flatten(model)
        with noise.at(step):
            pass
        if not flatten(model).equal(before):
            acted.append(step)
    assert acted == [4, 7, 10]
    assert noise.acted == 3


def test_a_causal_space_is_asked_for_every_time(generator) -> None:
    model = nn.Linear(3, 2)
    size = len(flatten(model))
    spaces: list[Subspace | None] = [None, None, Subspace(torch.eye(size)[:1]), Subspace(torch.eye(size)[1:2])]
    now: list[Subspace | None] = [None]
    projection = Projection(model, lambda: now[0], of="update", times=2)
    moved = []
    for step, now[0] in enumerate([*spaces, None]):
        before = flatten(model)
        with projection.at(step), torch.no_grad():
            for p in model.parameters():
                p += 1.0
        moved.append((flatten(model) - before).nonzero().flatten().tolist())
    everything = list(range(size))
    assert moved == [everything, everything, [0], [1], everything]
    assert projection.acted == 2


def test_what_rounding_drowns_gives_no_kick(generator) -> None:
    """A loss that is linear in the parameters has no commutator."""
    model = nn.Linear(3, 1, bias=False)
    batch = torch.randn(5, 3, generator=generator)
    pair = lambda: (batch[:2], batch[2:])  # noqa: E731
    before = flatten(model)
    for noise_floor in (True, False):
        kick = Kick(CommutatorProbe(model, lambda m, x: m(x).sum(), noise_floor=noise_floor), pair, 5.0)
        with kick.at(0):
            pass
        assert flatten(model).equal(before)
        assert kick.acted == (0 if noise_floor else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_state(kind: str) -> None:
    """Three steps, a checkpoint, three more: as six in a row."""
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    start = copy.deepcopy(model.state_dict())

    def steps(intervention: Intervention, numbers: range) -> None:
        batches = torch.Generator().manual_seed(3)
        for step in numbers:
            backward(model, problem, problem.batch(batches))
            with intervention.at(step), torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    def new() -> Intervention:
        intervention = KINDS[kind](model, problem, torch.Generator().manual_seed(5))
        intervention.times = 5
        return intervention

    whole = new()
    steps(whole, range(3))
    steps(whole, range(3, 6))
    want = flatten(model)
    model.load_state_dict(start)
    first, second = new(), new()
    steps(first, range(3))
    second.load_state_dict(first.state_dict())
    steps(second, range(3, 6))
    assert flatten(model).equal(want)
    assert second.acted == whole.acted == 5
    assert second.norm == whole.norm


def test_arguments_that_cannot_be(generator) -> None:
    model = nn.Linear(3, 2)
    size = len(flatten(model))
    space = Subspace(torch.eye(size)[:2])
    probe = CommutatorProbe(model, lambda m, x: m(x).square().sum())
    auto = CommutatorProbe(model, lambda m, x: m(x).square().sum(), eta="auto")
    for message, make in {
        r"strength of a projection must lie in \[0, 1\]; got 1.5": lambda: Projection(model, space, 1.5),
        r"strength of a projection must lie in \[0, 1\]; got nan": lambda: Projection(model, space, math.nan),
        "strength must be a number, not negative; got -1": lambda: Noise(model, -1, generator=generator),
        "strength must be a number, not negative; got inf": lambda: Kick(probe, tuple, math.inf),
        "of must be 'gradient' or 'update'; got 'step'": lambda: Projection(model, space, of="step"),
        "direction must be 'commutator' or 'random'; got 'up'": lambda: Kick(probe, tuple, 1, direction="up"),
        "direction 'random' needs a generator": lambda: Kick(probe, tuple, 1, direction="random"),
        "faithful kicks need a probe whose eta is a number": lambda: Kick(auto, tuple, 1, faithful=True),
        "every must be at least 1; got 0": lambda: Projection(model, space, every=0),
        "start must be at least 0; got -1": lambda: Projection(model, space, start=-1),
        f"space lives in R\\^9, the model has P = {size} parameters": lambda: Projection(model, Subspace(torch.eye(9))),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


def test_the_loop_in_the_docs(generator, capsys) -> None:
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    names = {
        "model": model,
        "loss_fn": problem.loss_fn,
        "loader": [problem.batch(generator) for _ in range(30)],
        "optimizer": adamw(model),
    }
    exec(block, names)
    assert names["projection"].acted == 10
    assert capsys.readouterr().out.startswith("10 0.")


def test_the_docs_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", DOCS.read_text()):
        assert (DOCS.parent / target).exists(), target


# Through the trainer

RUN = dataclasses.replace(TINY, pairs=1, intervene_from=15)
SETTINGS: dict[str, dict[str, Any]] = {
    "project": {"intervention": "project", "strength": 0.5},
    "penalty": {"intervention": "project", "strength": 1.0, "intervene_every": 4},
    "project-update": {"intervention": "project-update", "strength": 1.0},
    "kick": {"intervention": "kick", "strength": 5.0, "intervene_every": 5},
    "one kick": {"intervention": "kick", "strength": 5.0, "intervene_times": 1, "direction": "random"},
    "faithful kick": {"intervention": "kick", "strength": 5.0, "intervene_times": 1, "faithful": True},
    "noise": {"intervention": "noise", "strength": 0.1, "intervene_every": 7},
}
ACTED = {"project": 25, "penalty": 7, "project-update": 25, "kick": 5, "one kick": 1, "faithful kick": 1, "noise": 4}
NEW = ["interventions", "intervention_norm"]


def changed(base: TrainConfig = RUN, **values: Any) -> TrainConfig:
    return dataclasses.replace(base, **values)


def rows(run: Any, name: str = "metrics") -> pd.DataFrame:
    return getattr(run, name).drop(columns=["seconds", "measure_seconds"], errors="ignore")


def assert_same(one: Any, other: Any, beside: list[str] | None = None) -> None:
    for name in ("metrics", "curvature", "pca_history"):
        a, b = (rows(run, name).drop(columns=beside or [], errors="ignore") for run in (one, other))
        pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True), check_exact=True)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "run"
    train(RUN, out=folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Run]:
    """The run without, by ``rng``."""
    return {rng: train(changed(rng=rng), out=tmp_path_factory.mktemp("plain") / rng) for rng in ("philox", "paper")}


@pytest.mark.parametrize("rng", ["philox", "paper"])
@pytest.mark.parametrize("name", SETTINGS)
def test_they_act_when_they_should(name: str, rng: str, plain: dict[str, Run]) -> None:
    without = plain[rng].metrics
    run = train(changed(rng=rng, **SETTINGS[name]))
    assert list(run.metrics.columns) == [*without.columns, *NEW]
    before, after = run.metrics["step"] <= 15, run.metrics["step"] > 15
    pd.testing.assert_frame_equal(rows(run)[before].drop(columns=NEW), rows(plain[rng])[before], check_exact=True)
    assert (run.metrics["weight_norm"] != without["weight_norm"])[after].all()
    assert run.metrics["interventions"][before].eq(0).all()
    assert run.metrics["intervention_norm"][before].isna().all()
    assert run.metrics["interventions"].iloc[-1] == ACTED[name]
    assert run.metrics["intervention_norm"][after].gt(0).all()


@pytest.mark.parametrize(
    ("name", "strength", "rng"),
    [
        (name, strength, rng)
        for name in SETTINGS
        for strength in (0.0, 1e-30)
        for rng in ("philox", "paper")
        if (name, strength) != ("faithful kick", 1e-30)
    ],
)
def test_strength_0_runs_bitwise_as_without(
    tmp_path: Path, name: str, strength: float, rng: str, plain: dict[str, Run]
) -> None:
    """And so does nearly 0, at which everything happens and rounding takes it away."""
    config = changed(rng=rng, **{**SETTINGS[name], "strength": strength}, checkpoint_every=1000)
    run = train(config, out=tmp_path)
    assert_same(run, plain[rng], beside=NEW)
    assert run.metrics["interventions"].iloc[-1] == (ACTED[name] if strength else 0)
    a, b = run.checkpoint(), plain[rng].checkpoint()
    for part in ("model", "optimizer", "draws"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def test_in_an_ensemble_each_is_what_it_is_alone(oracle: Path) -> None:
    configs = [changed(**SETTINGS[name], seed=seed) for seed, name in enumerate(SETTINGS)]
    configs += [changed(**{**SETTINGS[name], "strength": 0.0}, seed=9) for name in ("project-update", "kick")]
    configs += [changed(**SETTINGS["project"], basis=basis, basis_from=str(oracle)) for basis in ("oracle", "matched")]
    configs += [changed(seed=9)]
    runs = train_ensemble(configs)
    for config, run in zip(configs, runs, strict=True):
        assert_same(run, train(config))
        if config.seed == 9:
            assert_same(run, runs[-1], beside=NEW)


@pytest.mark.parametrize("name", SETTINGS)
def test_interrupted_and_resumed_is_never_interrupted(tmp_path: Path, name: str, oracle: Path) -> None:
    basis = {"basis": "matched", "basis_from": str(oracle)} if name in ("project", "noise") else {}
    config = changed(**SETTINGS[name], **basis, checkpoint_every=1000)

    def press(latest: dict[str, Any]) -> None:
        if latest["step"] in (10, 20, 30):
            os.kill(os.getpid(), signal.SIGINT)

    whole = train(config, out=tmp_path / "whole")
    for resume in (False, True, True):
        with pytest.raises(KeyboardInterrupt):
            train(config, out=tmp_path / "parts", resume=resume, on_progress=press)
    parts = train(config, out=tmp_path / "parts", resume=True)
    assert_same(parts, whole)
    a, b = parts.checkpoint(), whole.checkpoint()
    for part in ("model", "optimizer", "draws"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert a["intervention"]["acted"] == b["intervention"]["acted"] == ACTED[name]


@pytest.mark.parametrize("rng", ["philox", "paper"])
def test_only_the_published_kick_moves_the_training_stream(tmp_path: Path, rng: str) -> None:
    states = []
    for name in ("none", "kick", "faithful"):
        kind = {"intervention": name} if name == "none" else {**SETTINGS["kick"], "faithful": name == "faithful"}
        run = train(changed(rng=rng, measure_every=0, **kind), out=tmp_path / name)
        states.append({key: torch.as_tensor(value).tolist() for key, value in run.checkpoint()["draws"].items()})
    assert states[0] == states[1]
    assert (states[0] == states[2]) == (rng == "philox")


@pytest.mark.parametrize("basis", ["oracle", "random", "matched"])
def test_bases_of_a_finished_run(tmp_path: Path, oracle: Path, basis: str) -> None:
    settings = {"intervention": "project-update", "strength": 1.0, "basis": basis, "basis_from": str(oracle)}
    run = train(changed(**settings), out=tmp_path / "run")
    assert run.metrics["interventions"].iloc[-1] == 25
    train(changed(steps=15), out=tmp_path / "before")
    start, end = (load_model(open_run(tmp_path / folder)) for folder in ("before", "run"))
    both = zip(start.named_parameters(), end.parameters(), strict=True)
    moved = {name for (name, p), q in both if not p.equal(q)}
    attention = {name for name in moved if re.search(r"self_attn\.(in_proj_|out_proj\.)weight", name)}
    assert attention
    assert (moved == attention) == (basis != "random")
    span = open_run(oracle).basis()
    size = sum(p.numel() for p in start.parameters())
    assert span["size"] == size
    change = flatten(end).double() - flatten(start)
    inside = Subspace.from_table(**span).split(change).parallel / change.norm()
    assert (inside > 0.999) == (basis == "oracle")


def test_an_mlp_is_projected_on_what_all_its_weights_did() -> None:
    run = train(changed(architecture="mlp", intervention="project-update", strength=1.0))
    assert run.metrics["interventions"].iloc[-1] == 25


def test_a_causal_basis_that_comes_late() -> None:
    """Rows at steps 0, 15 and 30: there is no basis before the third."""
    run = train(changed(intervention="project", strength=1.0, pca_every=15))
    assert run.metrics["interventions"].tolist() == [0, 0, 0, 0, 10]


def test_no_basis_there(tmp_path: Path, oracle: Path) -> None:
    settings = {"intervention": "project", "strength": 1.0, "basis": "oracle"}
    with pytest.raises(ValueError, match=r"basis_from: .*nowhere holds no run"):
        train(changed(**settings, basis_from=str(tmp_path / "nowhere")))
    train(changed(measure_every=0), out=tmp_path / "bare")
    with pytest.raises(ValueError, match=r"basis_from: .*bare holds no execution basis \(basis\.safetensors\)"):
        train(changed(**settings, basis_from=str(tmp_path / "bare")))
    size = open_run(oracle).basis()["size"]
    with pytest.raises(ValueError, match=rf"basis_from: the basis of .*run lives in R\^{size}, this network has \d+"):
        train(changed(**settings, d_ff=32, basis_from=str(oracle)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"intervention": "push"}, "intervention must be one of 'none', 'project', .* got 'push'"),
        ({"direction": "up"}, "direction must be one of 'commutator', 'random'; got 'up'"),
        ({"basis": "pca"}, "basis must be one of 'oracle', .* got 'pca'"),
        ({"intervention": "project", "strength": 1.1}, r"strength of a projection must lie in \[0, 1\]; got 1.1"),
        ({"intervention": "project-update", "strength": -0.1}, "strength must be a number, not negative; got -0.1"),
        ({"intervention": "kick", "strength": -1.0}, "strength must be a number, not negative; got -1.0"),
        ({"intervention": "noise", "strength": math.inf}, "strength must be a number, not negative; got inf"),
        ({"intervention": "project", "basis": "oracle"}, "basis 'oracle' needs basis_from"),
        ({"intervention": "noise", "basis": "matched"}, "basis 'matched' needs basis_from"),
        ({"intervention": "project", "pca_every": 0}, "basis 'causal' .* got 10 and 0"),
        ({"intervention": "project", "measure_every": 0}, "basis 'causal' .* got 0 and 5"),
        ({"faithful": True}, "faithful is for intervention 'kick'; got 'none'"),
        ({"intervention": "noise", "faithful": True}, "faithful is for intervention 'kick'; got 'noise'"),
        ({"intervene_every": 0}, "intervene_every must be at least 1; got 0"),
        ({"intervene_from": -1}, "intervene_from must be at least 0; got -1"),
        ({"intervene_times": -1}, "intervene_times must be at least 0; got -1"),
    ],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(**values)


def test_what_is_drawn_for_an_intervention_is_of_its_seed_and_step() -> None:
    config = changed(seed=3)
    drawn = [intervention_seed(config, step, which) for step in (0, 1, 2) for which in (0, 1)]
    assert drawn == [intervention_seed(config, step, which) for step in (0, 1, 2) for which in (0, 1)]
    assert len({*drawn, *(intervention_seed(changed(seed=4), step) for step in (0, 1, 2))}) == 9


@pytest.mark.usefixtures("drawn_once")
def test_folders_from_before_there_were_interventions_open(tmp_path: Path) -> None:
    train(RUN, out=tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for name in [name for name in content["config"] if re.match("interven|strength|direction|basis|faithful", name)]:
        del content["config"][name]
    assert len(dataclasses.fields(TrainConfig)) - len(content["config"]) == 9
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load_model(open_run(tmp_path)) is not None
    assert write_report(tmp_path).exists()


@pytest.mark.usefixtures("drawn_once")
def test_the_report_says_that_there_was_an_intervention(tmp_path: Path) -> None:
    train(changed(intervention="noise", strength=0.25, intervene_every=10), out=tmp_path)
    assert "noise at strength 0.25, causal basis" in write_report(tmp_path).read_text()
