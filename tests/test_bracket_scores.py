"""bracket_scores: against products in float64, and against training in both orders."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from models import OnceDifferentiable
from test_anatomy import MODELS, Exact, made
from torch import Tensor, nn
from truth import assert_same, kept, widened

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine


def scores_of(model: nn.Module, loss_fn: Any, sources: list[Any], target: Any, w: Tensor | None) -> Tensor:
    """By the definition, in float64."""
    exact, rows = Exact(model, loss_fn), []
    target = widened(target)
    g_t = exact.gradient(target)
    for batch in map(widened, sources):
        g = exact.gradient(batch)
        bracket = exact.product(target, g) - exact.product(batch, g_t)
        rows.append(bracket.norm() if w is None else bracket @ w.double())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_dense_products(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    problem = MODELS[name]
    model, (target, *sources) = made(problem, generator, 5, dtype)
    w = torch.randn(len(flatten(model)), generator=generator)
    for along in (w.to(dtype), None):
        found = gc.bracket_scores(model, problem.loss_fn, sources, target, along=along)
        wanted = scores_of(model, problem.loss_fn, sources, target, along)
        assert found.scores.dtype == found.errors.dtype == torch.float64
        assert len(found) == 4
        assert ((found.scores - wanted).abs() <= found.errors + 1e-14).all()
        limit = 1e-3 if dtype == torch.float32 else 1e-11
        size = wanted.abs().max() if along is None else wanted.norm() + w.norm()
        assert (found.errors < limit * size).all()


def test_errors_cover_what_rounding_does(generator: torch.Generator) -> None:
    """500 float32 scores, half of them along a direction."""
    problem, outside, tight = MODELS["perceptron"], 0, 0
    for along in (True, False):
        for _ in range(2):
            model, (target, *sources) = made(problem, generator, 126, torch.float32)
            w = torch.randn(len(flatten(model)), generator=generator) if along else None
            found = gc.bracket_scores(model, problem.loss_fn, sources, target, along=w)
            away = (found.scores - scores_of(model, problem.loss_fn, sources, target, w)).abs()
            outside += int((away > found.errors).sum())
            tight += int((found.errors < 1e-3 * found.scores.abs().max()).sum())
    assert outside <= 25
    assert tight >= 450


def test_the_score_is_what_the_order_changes(generator: torch.Generator) -> None:
    """Two SGD steps in either order, and a loss that is held out."""
    problem = MODELS["attention"]
    model, (source, target, held_out) = made(problem, generator, 3)
    eta, ends = 1e-5, []
    for order in ((source, target), (target, source)):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=eta)
        for batch in order:
            optimizer.zero_grad()
            problem.loss_fn(trained, batch).backward()
            optimizer.step()
        ends.append(float(problem.loss_fn(trained, held_out).detach()))
    w = Exact(model, problem.loss_fn).gradient(held_out)
    (score,) = gc.bracket_scores(model, problem.loss_fn, [source], target, along=w).scores
    assert (ends[0] - ends[1]) / eta**2 == pytest.approx(float(score), rel=0.02, abs=1e-4)


@pytest.mark.parametrize("along", [True, False])
def test_what_it_costs(along: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, counts = MODELS["perceptron"], Counter[tuple[str, bool]]()
    model, (target, *sources) = made(problem, generator, 7, torch.float32)
    w = torch.ones(len(flatten(model))) if along else None
    admitting = False
    admit = GradientEngine.admit

    def quietly(*args: Any, **options: Any) -> Any:
        nonlocal admitting
        admitting = True
        try:
            return admit(*args, **options)
        finally:
            admitting = False

    monkeypatch.setattr(GradientEngine, "admit", quietly)
    for name in ("product", "gradient"):
        plain = getattr(GradientEngine, name)

        def counted(
            engine: Any, theta: Tensor, *args: Any, name: str = name, plain: Any = plain, **options: Any
        ) -> Any:
            counts[name, theta.dtype == torch.float32] += not admitting
            return plain(engine, theta, *args, **options)

        monkeypatch.setattr(GradientEngine, name, counted)
    gc.bracket_scores(model, problem.loss_fn, sources, target, along=w)
    assert counts["product", True] == (7 if along else 12)
    assert counts["gradient", True] == (0 if along else 1)
    assert counts["product", False] == 2  # in float64: the target, along or along a source, and the first source


def test_the_model_is_left_as_it_was(generator: torch.Generator) -> None:
    problem = MODELS["attention"]
    model, (target, *sources) = made(problem, generator, 4, torch.float32)
    model.append = nn.Dropout(0.5)  # is not used, and draws nothing
    problem.loss_fn(model, target).backward()
    before, state = copy.deepcopy(kept(model)), torch.get_rng_state()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    gc.bracket_scores(model, problem.loss_fn, sources, target)
    assert_same(before, kept(model), "model")
    assert torch.equal(state, torch.get_rng_state())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_dropout_meets_a_batch_with_one_mask(generator: torch.Generator) -> None:
    model = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 3))
    problem = MODELS["perceptron"]
    target, source = problem.batch(generator), problem.batch(generator)
    one, same, other = (
        gc.bracket_scores(model, problem.loss_fn, [source], target, seed=seed).scores for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_kinks_and_flat_losses(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    rectified = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    target, *sources = (problem.batch(generator) for _ in range(4))
    found = gc.bracket_scores(rectified, problem.loss_fn, sources, target)
    wanted = scores_of(rectified, problem.loss_fn, sources, target, None)
    assert ((found.scores - wanted).abs() <= found.errors).all()
    assert (found.errors < 1e-4 * wanted).all()
    own = gc.bracket_scores(rectified, problem.loss_fn, [target], target)
    assert own.scores[0] <= own.errors[0]
    linear, x = nn.Linear(5, 1), torch.randn(6, 5, generator=generator)
    flat = gc.bracket_scores(linear, lambda model, batch: model(batch).mean(), [x, 2 * x], -x, along=torch.ones(6))
    assert flat.scores.tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore::grokcurv.AdmissionWarning")
def test_bad_input(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    model, (target, source) = made(problem, generator, 2, torch.float32)
    size = len(flatten(model))
    with pytest.raises(ValueError, match="sources must hold at least one batch, got none"):
        gc.bracket_scores(model, problem.loss_fn, iter(()), target)
    for wrong in (torch.zeros(size + 1), torch.zeros(1, size), torch.zeros(size, dtype=torch.int64)):
        with pytest.raises(ValueError, match=rf"along must be of shape \({size},\)"):
            gc.bracket_scores(model, problem.loss_fn, [source], target, along=wrong)
    with pytest.raises(ValueError, match="along must be finite"):
        gc.bracket_scores(model, problem.loss_fn, [source], target, along=torch.full((size,), torch.nan))
    with pytest.raises(ValueError, match="bracket_scores: model has no true second derivatives"):
        gc.bracket_scores(
            model,
            lambda m, batch: OnceDifferentiable.apply(m(batch["x"])).mean(),
            [source],
            target,
            along=torch.ones(size),
        )
