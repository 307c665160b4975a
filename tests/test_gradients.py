"""GradientEngine: every strategy gives the gradients of plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import PROBLEMS, Problem
from tape import capture
from torch import Tensor, nn

import grokcurv as gc
from grokcurv import gradients
from grokcurv.commutator import FLOOR_MARGIN
from grokcurv.flat import flatten
from grokcurv.gradients import VECTORS, GradientEngine
from grokcurv.tasks import Transformer
from grokcurv.tasks.modular import fast

VMAPPED = [name for name in PROBLEMS if name != "batch norm"]


def direct(problem: Problem, model: nn.Module, theta: Tensor, batch) -> Tensor:
    other = copy.deepcopy(model)
    parameters = [p for p in other.parameters() if p.requires_grad]
    nn.utils.vector_to_parameters(theta, parameters)
    found = torch.autograd.grad(problem.loss_fn(other, batch), parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


def points(model: nn.Module, n: int, generator: torch.Generator) -> Tensor:
    theta = flatten(model)
    return theta + 0.1 * torch.randn(n, len(theta), generator=generator)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("strategy", ["loop", "vmap"])
@pytest.mark.parametrize("name", VMAPPED)
def test_pairwise(name: str, strategy, n: int, generator: torch.Generator) -> None:
    problem = PROBLEMS[name]
    model = problem.model()
    batches = [problem.batch(generator) for _ in range(n)]
    thetas = points(model, n, generator)
    out = torch.full_like(thetas, torch.nan)
    GradientEngine(model, problem.loss_fn, strategy=strategy).gradients(thetas, batches, out, seeds=range(n))
    for theta, batch, row in zip(thetas, batches, out, strict=True):
        torch.testing.assert_close(row, direct(problem, model, theta, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_one_point_for_all_batches(strategy, generator: torch.Generator) -> None:
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    batches = [problem.batch(generator) for _ in range(4)]
    theta = flatten(model)
    out = torch.empty(4, len(theta))
    GradientEngine(model, problem.loss_fn, strategy=strategy).gradients(theta, batches, out, seeds=range(4))
    for batch, row in zip(batches, out, strict=True):
        torch.testing.assert_close(row, direct(problem, model, theta, batch), rtol=1e-5, atol=1e-6)


def test_the_shorter_way_as_one_program(generator: torch.Generator) -> None:
    model = Transformer(11, d_model=16, heads=2, d_ff=24)
    loss = lambda model, batch: nn.functional.cross_entropy(fast.logits(model, batch[0]), batch[1])  # noqa: E731
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    batches = [(draw(11, 20, 2), draw(11, 20)) for _ in range(3)]
    thetas = points(model, 3, generator)
    rows = [
        GradientEngine(model, loss, strategy=s).gradients(thetas, batches, torch.empty_like(thetas), seeds=range(3))
        for s in ("loop", "vmap")
    ]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)


def test_a_probe_measures_the_same_by_either(generator: torch.Generator) -> None:
    problem = PROBLEMS["tied attention"]
    model = problem.model().double()
    pairs = [(problem.batch(generator), problem.batch(generator)) for _ in range(2)]
    loop, batched = (
        gc.CommutatorProbe(model, problem.loss_fn, strategy=s).measure(pairs, keep_delta=True) for s in ("loop", "vmap")
    )
    torch.testing.assert_close(batched.defect, loop.defect, rtol=1e-8, atol=0)
    torch.testing.assert_close(batched.delta, loop.delta, rtol=0, atol=1e-9 * float(loop.delta.abs().max()))


@pytest.mark.parametrize("rough", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("name", ["perceptron", "tied attention"])
def test_a_check_as_one_program_knows_its_directions(name: str, rough: float, generator: torch.Generator) -> None:
    """The steps go along the float32 gradients, and a given one that is off by so much makes the floor as wide."""
    problem = PROBLEMS[name]
    model = problem.model()
    pair = (problem.batch(generator), problem.batch(generator))
    probe = gc.CommutatorProbe(model, problem.loss_fn, strategy="vmap")
    own = direct(problem, model, flatten(model), pair[0])
    first = own * (1 + rough * torch.randn(len(own), generator=generator))
    stats = probe.measure([pair], first_gradient=first, keep_delta=True)
    wide = tuple({key: x.double() if x.is_floating_point() else x for key, x in batch.items()} for batch in pair)
    truth = gc.CommutatorProbe(model.double(), problem.loss_fn).measure([wide], keep_delta=True, check=False)
    unit = truth.eta.square() * truth.grad_norm_a * truth.grad_norm_b
    assert stats.exact.all()
    assert (stats.delta - truth.delta).norm() <= stats.noise_floor * unit
    # What is off by a share is divided by, and stepped along: the floor is the margin times that share of the defect
    # and of the change along the step, and what rounding adds to both.
    theta = flatten(model)
    here, ahead = (direct(problem, model, x, wide[1]) for x in (theta, theta - float(truth.eta) * own.double()))
    change = (ahead - here).norm() * truth.eta / unit
    share = (first - own).norm() / own.norm()
    assert stats.noise_floor < 1e-3 + 1.05 * FLOOR_MARGIN * share * torch.hypot(truth.defect, change)


def test_graphs_are_captured_at_the_second_meeting(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape stands in for the graph: replayed with other parameters and batches it gives their gradients."""
    captured = []

    def record(run, pool):
        captured.append(run)
        return capture(run)[1], pool

    monkeypatch.setattr(gradients, "capture", record)
    monkeypatch.setattr(gradients, "_signature", lambda batch: tuple(x.shape for x in batch.values()))
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    engine = GradientEngine(model, problem.loss_fn)
    engine.strategy = "graph"
    for index in range(5):
        batch = problem.batch(generator)
        theta = points(model, 1, generator)[0]
        out = torch.empty_like(theta)
        engine.gradient(theta, batch, out)
        # A tape, unlike a graph, does not run while it records: the second meeting replays too.
        torch.testing.assert_close(out, direct(problem, model, theta, batch), rtol=1e-5, atol=1e-6)
        assert len(captured) == min(index, 1)
    smaller = {name: x[:4] for name, x in batch.items()}
    engine.gradient(theta, smaller, out)
    assert len(captured) == 1
    engine.gradient(theta, smaller, out)
    assert len(captured) == 2
    torch.testing.assert_close(out, direct(problem, model, theta, smaller), rtol=1e-5, atol=1e-6)


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="strategy 'graph' needs a model on a CUDA device; this one is on cpu"):
        GradientEngine(nn.Linear(2, 1), lambda m, x: m(x).sum(), strategy="graph")


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_a_program_that_does_not_fit_is_several(
    most: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """By bytes: of the vectors, and of what a backward pass keeps, which grows with the batch."""
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    engine, loop = (GradientEngine(model, problem.loss_fn, strategy=strategy) for strategy in ("vmap", "loop"))
    batches = [problem.batch(generator) for _ in range(7)]
    thetas = engine.flatten() + 0.1 * torch.randn(7, engine.size, generator=generator)
    engine.gradients(thetas, batches, torch.empty_like(thetas), seeds=[0] * 7)
    (each,) = engine._kept.values()
    assert each > VECTORS * 4 * engine.size + 4 * sum(x.numel() for x in batches[0].values())
    engine._room = most * each + 1
    sizes: list[int] = []
    program = engine._program
    monkeypatch.setattr(engine, "_program", lambda t, b, out: (sizes.append(len(b)), program(t, b, out))[1])
    found, wanted = torch.empty_like(thetas), torch.empty_like(thetas)
    engine.gradients(thetas, batches, found, seeds=[0] * 7)
    assert sizes == [min(most, 7 - start) for start in range(0, 7, most)]
    loop.gradients(thetas, batches, wanted, seeds=[0] * 7)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_a_compiled_program(generator: torch.Generator) -> None:
    """Compiled once for a shape; the float64 of a check is not."""
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    engine = GradientEngine(model, problem.loss_fn, strategy="vmap", compile=True)
    loop = GradientEngine(model, problem.loss_fn, strategy="loop")
    for dtype in (torch.float32, torch.float32, torch.float64):
        batches = [problem.batch(generator) for _ in range(3)]
        thetas = (engine.flatten() + 0.1 * torch.randn(3, engine.size, generator=generator)).to(dtype)
        found, wanted = torch.empty_like(thetas), torch.empty_like(thetas)
        engine.gradients(thetas, batches, found, seeds=[0] * 3)
        loop.gradients(thetas, batches, wanted, seeds=[0] * 3)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert len(engine._programs) == 1


def test_vmap_says_what_it_wants(generator: torch.Generator) -> None:
    problem = PROBLEMS["perceptron"]
    model = problem.model()
    engine = GradientEngine(model, problem.loss_fn, strategy="vmap")
    batch = problem.batch(generator)
    out = torch.empty(2, engine.size)
    with pytest.raises(ValueError, match="batches made of tensors of the same shapes"):
        engine.gradients(flatten(model), [batch, {k: x[:3] for k, x in batch.items()}], out, seeds=(0, 1))
    dropping = GradientEngine(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)), problem.loss_fn, strategy="vmap")
    with pytest.raises(RuntimeError, match="random"):
        dropping.gradients(flatten(dropping.model), [batch, batch], torch.empty(2, dropping.size), seeds=(0, 1))


@pytest.mark.parametrize("strategy", ["loop", "vmap"])
def test_shapes_must_agree(strategy, generator: torch.Generator) -> None:
    problem = PROBLEMS["perceptron"]
    engine = GradientEngine(problem.model(), problem.loss_fn, strategy=strategy)
    batch, theta = problem.batch(generator), flatten(engine.model)
    for thetas, rows, seeds in ((theta[:-1], 2, 2), (theta.expand(3, -1), 2, 2), (theta, 3, 2), (theta, 2, 1)):
        with pytest.raises(ValueError, match="thetas, batches, out and seeds must agree"):
            engine.gradients(thetas, [batch, batch], torch.empty(rows, engine.size), seeds=range(seeds))


def test_unknown_strategy() -> None:
    with pytest.raises(ValueError, match="strategy must be one of auto, loop, vmap, graph; got 'jit'"):
        gc.CommutatorProbe(nn.Linear(2, 1), lambda m, x: m(x).sum(), strategy="jit")


@pytest.mark.parametrize(
    ("layer", "kinked"),
    [
        *((layer, False) for layer in (nn.GELU(), nn.Tanh(), nn.SiLU(), nn.Softplus(), nn.LayerNorm(8), nn.Softmax(1))),
        *((layer, True) for layer in (nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.ReLU6())),
        *((layer, True) for layer in (nn.Hardtanh(), nn.Hardswish(), nn.Softshrink(), nn.MaxPool1d(2), nn.SELU())),
        (nn.TransformerEncoderLayer(8, 2, 8, activation="gelu"), False),
        (nn.TransformerEncoderLayer(8, 2, 8, activation="relu"), True),
    ],
    ids=str,
)
def test_kinks_of_modules(layer: nn.Module, kinked: bool, generator: torch.Generator) -> None:
    batch = torch.randn(4, 8, generator=generator)
    engine = GradientEngine(nn.Sequential(nn.Linear(8, 8), layer), lambda model, x: model(x).square().sum())
    assert engine.is_nonsmooth(batch) is kinked


@pytest.mark.parametrize(
    "loss",
    [lambda y: y.abs().sum(), lambda y: y.max(), lambda y: torch.where(y > 0, y, 0).sum(), lambda y: y.clamp(0).sum()],
)
def test_kinks_of_losses(loss: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    batch = torch.randn(4, 8, generator=generator)
    engine = GradientEngine(nn.Linear(8, 2), lambda model, x: loss(model(x)))
    assert engine.is_nonsmooth(batch)


def test_looking_for_kinks_leaves_everything_alone(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not GradientEngine(model, lambda m, x: m(x).sum()).is_nonsmooth(torch.randn(4, 8, generator=generator))
    torch.testing.assert_close(before, model.state_dict(), rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_is_looked_at_once_while_sessions_are_held(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """And anew afterwards, for training goes on; nor does one that is refused leave it open."""
    problem = PROBLEMS["tied attention"]
    model = problem.model()
    engine = GradientEngine(model, problem.loss_fn)
    theta, batch, looks = flatten(model), problem.batch(generator), list[None]()
    look = engine.evaluator._look
    monkeypatch.setattr(engine.evaluator, "_look", lambda: looks.append(None) or look())

    def twice() -> Tensor:
        first, second = (engine.gradient(theta, batch, torch.empty_like(theta)) for _ in range(2))
        return torch.testing.assert_close(first, second, rtol=0, atol=0) or first

    apart = twice()
    assert len(looks) == 2
    with engine.evaluator.held(), engine.evaluator.held():
        assert torch.equal(twice(), apart)
        assert len(looks) == 3
    with engine.evaluator.held():
        pass
    with pytest.raises(RuntimeError, match="no"), engine.evaluator.held(), engine.evaluator.session():
        raise RuntimeError("no")
    twice()
    assert len(looks) == 6
    model.register_parameter("late", nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="'late' was unfrozen or added"), engine.evaluator.held():
        engine.evaluator.parameters()
