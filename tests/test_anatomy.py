"""What a bracket is made of, against Hessian-vector products and differences of gradients in float64."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import truth
from models import PROBLEMS, Attention, Problem, cross_entropy, stopped_and_whole
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import grokcurv as gc
from grokcurv import commutator
from grokcurv.commutator import CommutatorStats
from grokcurv.flat import flatten
from grokcurv.gradients import Distributed
from grokcurv.measures.anatomy import ANATOMY_BOUNDS, ANATOMY_FIELDS, PRODUCT_FIELDS, products
from grokcurv.training.measured import RunsEngine

ETA = 1e-3


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4))


def images(generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": torch.randn(9, 1, 4, 4, generator=generator), "y": torch.randint(4, (9,), generator=generator)}


MODELS = {
    "perceptron": PROBLEMS["perceptron"],
    "attention": Problem(Attention, cross_entropy, PROBLEMS["tied attention"].batch),
    "conv": Problem(conv, cross_entropy, images),
}


def made(problem: Problem, generator: torch.Generator, count: int, dtype: torch.dtype = torch.float64):
    """A model, and batches."""
    torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))
    model = problem.model().to(dtype)
    batches = [problem.batch(generator) for _ in range(count)]
    return model, [{k: v.to(dtype) if v.is_floating_point() else v for k, v in b.items()} for b in batches]


class Exact:
    """Gradients and Hessian-vector products of a model in float64, at its own parameters and at others."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        self.model, self.loss_fn = truth.widened(model), loss_fn
        self.parameters, self.theta = list(self.model.parameters()), flatten(self.model)

    def _differentiate(self, of: Tensor, graph: bool) -> Tensor:
        return torch.cat([x.flatten() for x in torch.autograd.grad(of, self.parameters, create_graph=graph)])

    def gradient(self, batch: Any, theta: Tensor | None = None, graph: bool = False) -> Tensor:
        nn.utils.vector_to_parameters(self.theta if theta is None else theta, self.parameters)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return self._differentiate(self.loss_fn(self.model, batch), graph)

    def product(self, batch: Any, direction: Tensor) -> Tensor:
        return self._differentiate(self.gradient(batch, graph=True) @ direction, False)

    def pair(self, a: Any, b: Any, method: str) -> tuple[dict[str, float], Tensor]:
        """The anatomy of a pair by its definition, and the bracket."""
        a, b = truth.widened(a), truth.widened(b)
        g_a, g_b = self.gradient(a), self.gradient(b)
        if method == "bracket":
            on_a, on_b = self.product(a, g_b), self.product(b, g_a)
        else:
            on_a = (g_a - self.gradient(a, self.theta - ETA * g_b)) / ETA
            on_b = (g_b - self.gradient(b, self.theta - ETA * g_a)) / ETA
        found = {
            "product_norm_a": on_a.norm(),
            "product_norm_b": on_b.norm(),
            "amplification_a": on_a.norm() / g_b.norm(),
            "amplification_b": on_b.norm() / g_a.norm(),
            "rayleigh_a": (g_b @ on_a) / (g_b @ g_b),
            "rayleigh_b": (g_a @ on_b) / (g_a @ g_a),
        }
        return {name: float(value) for name, value in found.items()}, on_b - on_a


def cosine(u: Tensor, v: Tensor) -> float:
    return float((u @ v).abs() / (u.norm() * v.norm()))


def walk(
    model: nn.Module, monitor: gc.CurvatureMonitor, steps: int, generator: torch.Generator, at: Callable[..., Any]
) -> None:
    """Steps at random, each in small as training makes them; ``at`` is called before each is measured."""
    for step in range(steps):
        at(step)
        monitor.step()
        theta = flatten(model)
        moved = theta + 0.02 * torch.randn(len(theta), generator=generator, dtype=torch.float64).to(theta)
        nn.utils.vector_to_parameters(moved, model.parameters())


@pytest.mark.parametrize("method", ["difference", "bracket"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("perceptron", {}),
        ("conv", {"strategy": "vmap", "design": "chain"}),
        ("attention", {"every": 2, "alignment": True}),
    ],
)
def test_rows_are_those_of_dense_products(
    name: str, method: str, options: dict[str, Any], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commutator, "TOGETHER", 0 if "every" in options else commutator.TOGETHER)  # streamed
    problem = MODELS[name]
    model, batches = made(problem, generator, 40)
    drawn, given = iter(batches), []

    def sampler() -> tuple[Any, Any]:
        given.append((next(drawn), next(drawn)))
        return given[-1]

    monitor = gc.CurvatureMonitor(
        model, problem.loss_fn, pairs=3, sampler=sampler, eta=ETA, method=method, anatomy=True, **options
    )
    rows, before, last = [], None, None
    every = options.get("every", 1)

    def at(step: int) -> None:
        nonlocal before, last
        here = flatten(model)
        if step % every == 0:
            rows.append((Exact(model, problem.loss_fn), None if last is None else here - last))
        last = here

    walk(model, monitor, 4, generator, at)
    records = monitor.records()
    assert set(ANATOMY_FIELDS) <= set(records.columns)
    chained = options.get("design") == "chain"
    for index, (exact, step) in enumerate(rows):
        pairs = given[index * (2 if chained else 3) :][: 2 if chained else 3]
        if chained:
            flat = [batch for pair in pairs for batch in pair]
            pairs = [(flat[i], flat[i + 1]) for i in range(3)]
        found, brackets = zip(*(exact.pair(a, b, method) for a, b in pairs), strict=True)
        row = records.iloc[index]
        assert row["reliable"]
        for column in PRODUCT_FIELDS:
            median = float(np.median([one[column] for one in found]))
            # 1e-16 of a gradient, over eta, in products of about its size
            assert row[column] == pytest.approx(median, rel=1e-7, abs=1e-9), column
            assert row[f"{column}_error"] < 1e-6
        for column, beside in (("bracket_update_cosine", step), ("bracket_before_cosine", before)):
            if beside is None:
                assert np.isnan(row[column])
                continue
            assert row[column] == pytest.approx(np.median([cosine(one, beside) for one in brackets]), rel=1e-6)
            assert row[f"{column}_error"] < 1e-6
        before = brackets[0]


@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_errors_cover_what_rounding_does(method: str, generator: torch.Generator) -> None:
    """Float32 beside the same in float64, of 250 pairs by each method."""
    outside, narrow, draws = dict.fromkeys(PRODUCT_FIELDS, 0), dict.fromkeys(PRODUCT_FIELDS, 0), 0
    for name, models, count in (("perceptron", 4, 45), ("conv", 1, 45), ("attention", 1, 25)):
        for _ in range(models):
            problem = MODELS[name]
            model, batches = made(problem, generator, count + 1, torch.float32)
            pairs = list(itertools.pairwise(batches))
            probe = gc.CommutatorProbe(model, problem.loss_fn, method=method, eta=ETA, anatomy=True)
            values, errors = products(probe.measure(pairs), True)
            exact = Exact(model, problem.loss_fn)
            wanted = [exact.pair(*pair, method)[0] for pair in pairs]
            for column in PRODUCT_FIELDS:
                error = errors[ANATOMY_BOUNDS[column]]
                size = torch.tensor([one[column.replace("rayleigh", "amplification")] for one in wanted])
                away = (values[column] - torch.tensor([one[column] for one in wanted], dtype=torch.float64)).abs()
                outside[column] += int((away > error).sum())
                narrow[column] += int((error < 0.1 * size).sum())
            draws += count
    assert draws == 250
    assert max(outside.values()) <= 0.05 * draws, outside
    assert min(narrow.values()) >= 0.9 * draws, narrow  # a bound of infinity would not do


def test_the_difference_goes_to_the_products(generator: torch.Generator) -> None:
    problem = MODELS["attention"]
    model, (a, b) = made(problem, generator, 2)
    exact, _ = Exact(model, problem.loss_fn).pair(a, b, "bracket")
    away = []
    for eta in (1e-3, 1e-4):
        stats = gc.CommutatorProbe(model, problem.loss_fn, eta=eta, anatomy=True).measure([(a, b)])
        away.append([abs(float(getattr(stats, name)) - exact[name]) for name in ("product_norm_a", "rayleigh_b")])
    assert all(later < 0.2 * sooner for sooner, later in zip(*away, strict=True))


def engine_of(models: Sequence[nn.Module]) -> Distributed:
    def engine(loss_fn: Any, strategy: Any) -> RunsEngine:
        made = RunsEngine(models[0], loss_fn, strategy, False, len(models))
        made.adopt(range(len(models)), torch.stack([flatten(model) for model in models]), torch.empty(0))
        return made

    return Distributed(engine)


@pytest.mark.parametrize(("strategy", "dtype"), [("loop", torch.float32), ("vmap", torch.float64)], ids=str)
def test_three_runs_are_what_each_is_alone(strategy: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    models = [made(problem, generator, 0, dtype)[0] for _ in range(3)]
    batches = [[made(problem, generator, 3, dtype)[1] for _ in range(4)] for _ in range(3)]  # step, draw, run
    step = torch.randn(3, len(flatten(models[0])), generator=generator).to(dtype) * 0.02

    def measured(runs: list[int]) -> gc.CurvatureMonitor:
        drawn = iter([[draw[run] for run in runs] for one in batches for draw in one])
        monitor = gc.CurvatureMonitor(
            engine_of([models[run] for run in runs]),
            problem.loss_fn,
            sampler=lambda: (next(drawn), next(drawn)),
            pairs=2,
            anatomy=True,
            strategy=strategy,
        )
        for _ in range(3):
            monitor.step()
            monitor.probe.gradients._theta += step[runs]
        return monitor

    together = measured([0, 1, 2])
    for run in range(3):
        frames = [m.records(r).drop(columns="measure_seconds") for m, r in ((together, run), (measured([run]), 0))]
        assert frames[0]["bracket_before_cosine"].isna()[0]
        if strategy == "loop":
            pd.testing.assert_frame_equal(*frames, check_exact=True)
            continue
        columns = [*PRODUCT_FIELDS, "bracket_before_cosine"]  # a batched product of other size rounds differently
        np.testing.assert_allclose(*(frame[columns] for frame in frames), rtol=1e-6, atol=1e-8)
        assert frames[0][columns][1:].notna().all(axis=None)
    kept = measured([0, 1, 2])
    kept.probe.gradients.keep([2, 0])
    kept.keep([2, 0])
    assert torch.equal(kept.commutator._bracket._kept[1], together.commutator._bracket._kept[0])


@pytest.mark.parametrize("cut", [1, 4])
def test_a_state_goes_on(cut: int, generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    model, batches = made(problem, generator, 14, torch.float32)
    trajectory = [torch.randn(len(flatten(model)), generator=generator) for _ in range(7)]

    def new(start: int) -> gc.CurvatureMonitor:
        drawn = iter(batches[2 * start :])
        return gc.CurvatureMonitor(model, problem.loss_fn, sampler=lambda: (next(drawn), next(drawn)), anatomy=True)

    second, whole, state = stopped_and_whole(new, model, trajectory, cut)
    frames = [monitor.records().drop(columns="measure_seconds") for monitor in (whole, second)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert frames[0]["bracket_before_cosine"].notna().sum() == 6
    with pytest.raises(ValueError, match="saved with other measures"):
        gc.CurvatureMonitor(model, problem.loss_fn).load_state_dict(state)


def test_training_is_what_it_is_unmeasured(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    batches = [problem.batch(generator) for _ in range(6)]
    run = truth.twins(problem.model, problem.loss_fn, batches, anatomy=True, gradient="checked", check_every=2)
    plain = truth.train(problem.model, problem.loss_fn, batches, gradient="checked", check_every=2)
    both = [one.monitor.records().drop(columns="measure_seconds") for one in (run, plain)]
    pd.testing.assert_frame_equal(both[0][both[1].columns], both[1], check_exact=True)


def test_degenerate_pairs(generator: torch.Generator) -> None:
    """What has no direction, or is not known, is NaN; a product that is zero is zero."""
    model = nn.Linear(3, 1, bias=False).double()

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:  # a Hessian of zero, unless the first number is two
        x = model(batch[:, 1:])
        return (x.square() if batch[0, 0] == 2 else x).mean() * (batch[0, 0] != 0)

    draws = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    kinds = zip(draws, (1.0, 2.0, 0.0), strict=True)
    flat, steep, none = (nn.functional.pad(x, (1, 0), value=kind) for x, kind in kinds)
    pairs = [(steep, steep), (flat, steep), (flat, flat), (none, steep), (none, none), (steep, steep * math.nan)]
    drawn = iter(pairs)
    monitor = gc.CurvatureMonitor(
        model, loss_fn, sampler=lambda: next(drawn), anatomy=True, method="bracket", check_every=1
    )
    with warnings.catch_warnings(action="ignore", category=gc.AdmissionWarning):
        for _ in pairs:
            monitor.step()
    records = monitor.records()
    same, straight, zero, absent, nothing, broken = (row for _, row in records.iterrows())
    assert same["product_norm_a"] == same["product_norm_b"] > 0  # though the bracket is zero
    assert np.isnan(same["bracket_norm"])
    assert (straight["product_norm_a"], straight["rayleigh_a"]) == (0.0, 0.0)
    assert straight["product_norm_b"] > 0
    assert (zero["product_norm_a"], zero["product_norm_b"]) == (0.0, 0.0)
    assert records["bracket_before_cosine"].isna().all()
    assert records["bracket_update_cosine"].isna().all()  # the parameters stand still
    for row in (absent, nothing):
        assert np.isnan(row[["amplification_b", "rayleigh_b"]].astype(float)).all()
    assert np.isnan(broken[["product_norm_a", *PRODUCT_FIELDS[2:]]].astype(float)).all()


def test_a_row_that_is_repeated_is_the_row_before_once(generator: torch.Generator) -> None:
    """Gradients of 1e-6 drown in a difference: the bracket takes the row, and is what the next row is set beside."""
    problem = MODELS["perceptron"]
    model, batches = made(problem, generator, 6, torch.float32)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return 1e-6 * problem.loss_fn(model, batch)

    def records(method: str) -> tuple[pd.DataFrame, Tensor]:
        drawn = iter(batches)
        options: dict[str, Any] = {"sampler": lambda: (next(drawn), next(drawn)), "method": method, "anatomy": True}
        monitor = gc.CurvatureMonitor(model, loss_fn, **options)
        for _ in range(3):
            monitor.step()
        return monitor.records(), monitor.commutator._bracket._kept

    (repeated, kept), (plain, wanted) = records("difference"), records("bracket")
    assert repeated["method"].tolist() == ["bracket"] * 3
    columns = [name for name in ANATOMY_FIELDS if not name.endswith("error")]
    np.testing.assert_allclose(repeated[columns], plain[columns], rtol=1e-5)
    assert torch.equal(kept, wanted)


def test_without_a_floor_there_are_numbers_and_no_errors(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    model, batches = made(problem, generator, 2, torch.float32)
    monitor = gc.CurvatureMonitor(
        model, problem.loss_fn, sampler=lambda: tuple(batches), anatomy=True, noise_floor=False
    )
    monitor.step()
    row = monitor.last
    assert all(np.isfinite(row[name]) and np.isnan(row[f"{name}_error"]) for name in PRODUCT_FIELDS)


def test_the_probe_says_it_when_asked(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    model, batches = made(problem, generator, 2)
    plain, stats = (
        gc.CommutatorProbe(model, problem.loss_fn, anatomy=asked).measure([tuple(batches)]) for asked in (False, True)
    )
    assert isinstance(stats, CommutatorStats)
    assert plain.product_norm_a is plain.rayleigh_b is plain.product_error_a is None
    assert torch.equal(plain.defect, stats.defect)
    assert stats.product_norm_a.dtype == torch.float64
    assert stats.rayleigh_a.shape == (1,)
