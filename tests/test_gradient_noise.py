"""GradientNoise: unbiased in the models it is for, and that of per-sample gradients in a network."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import truth
from models import stopped_and_whole
from test_anatomy import MODELS, engine_of, made
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine
from grokcurv.measures.gradient_noise import moments, rows_of_batch
from grokcurv.pairs import PairGradients

COLUMNS = list(gc.GradientNoise.columns)


class Given:
    """An engine without a model, and the probe that has it."""

    device, runs = torch.device("cpu"), 1

    def __init__(self, runs: int = 1) -> None:
        self.runs, self.gradients = runs, self

    anywhere = GradientEngine.anywhere


def measure_of(runs: int = 1, **options: Any) -> gc.GradientNoise:
    measure = gc.GradientNoise(**options)
    measure.bind(Given(runs))  # type: ignore[arg-type]
    return measure


def gradients_of(g_a: Tensor, g_b: Tensor, error: float = 0.0) -> PairGradients:
    """Of vectors (K, R, P)."""
    a, b = g_a.norm(dim=-1), g_b.norm(dim=-1)
    return PairGradients(a, b, (g_a * g_b).sum(-1) / (a * b), torch.full_like(a, error))


def batches_of(rows: Sequence[int], runs: int = 1) -> list[Any]:
    """Pairs of batches of so many rows."""
    return [([torch.empty(n)] * runs, [torch.empty(n)] * runs) for n in rows]


def gaussian(
    shape: tuple[int, ...], b: int, mean: Tensor, deviations: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean gradients of two batches of b rows, (K, R, P)."""
    noise = torch.randn(2, *shape, len(mean), generator=generator, dtype=torch.float64)
    return tuple(mean + noise * deviations / math.sqrt(b))


def test_unbiased_and_as_sure_as_it_says(generator: torch.Generator) -> None:
    """500 rows of eight pairs of Gaussian gradients, all at once as runs."""
    mean = torch.randn(30, generator=generator, dtype=torch.float64)
    deviations = 6.0 * torch.rand(30, generator=generator, dtype=torch.float64)
    trace, square = float(deviations.square().sum()), float(mean.square().sum())
    measure = measure_of(500)
    pairs = batches_of([16] * 8, 500)
    row = measure.observe_pairs(pairs, gradients_of(*gaussian((8, 500), 16, mean, deviations, generator)))
    for column, true in ((0, trace), (1, square)):
        found, error = row[:, column], row[:, column + 2]
        assert abs(found.mean() - true) < 4.5 * found.std() / math.sqrt(500)  # seven in a million
        away = (found - true).abs() / error
        assert (away < 3).double().mean() > 0.95  # of Student's t of seven degrees 98 %
        assert (away > 0.5).double().mean() > 0.4  # 63 %
    assert row[:, 5].isnan().all()  # of one row
    for _ in range(19):
        row = measure.observe_pairs(pairs, gradients_of(*gaussian((8, 500), 16, mean, deviations, generator)))
    away = (row[:, 4] - trace / square).abs() / row[:, 5]
    assert (away < 3).double().mean() > 0.95
    assert (away > 0.5).double().mean() > 0.4


def weighted(values: np.ndarray, decay: float) -> float:
    return float(np.average(values, weights=decay ** np.arange(len(values))[::-1]))


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
def test_the_scale_is_the_ratio_of_running_means(decay: float, generator: torch.Generator) -> None:
    measure, traces, squares = measure_of(decay=decay), [], []
    mean, deviations = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for step in range(12):
        g_a, g_b = gaussian((2, 1), 3, mean, deviations, generator)
        if step == 5:
            g_b = g_a  # a pair of one batch: nothing can be told
        row = measure.observe_pairs(batches_of([3, 3]), gradients_of(g_a, g_b))[0]
        if step == 5:
            assert row[:2].isnan().all()
        else:
            traces.append(float(3 * (g_a - g_b).square().sum(-1).mean() / 2))
            squares.append(float((g_a * g_b).sum(-1).mean()))
            assert row[:2].tolist() == pytest.approx([traces[-1], squares[-1]], rel=1e-12)
        t, s = (weighted(np.array(values), decay) for values in (traces, squares))
        assert float(row[4]) == pytest.approx(t / s if s > 0 else math.nan, nan_ok=True)
        weights = decay ** np.arange(len(traces))[::-1]
        count = weights.sum() ** 2 / np.square(weights).sum()
        if count > 1.01 and s > 0:  # the residuals of the ratio, as the delta method has it
            residual = np.average(np.square(np.array(traces) - t / s * np.array(squares)), weights=weights)
            # at equal weights the textbook's: the means' own scatter has no part in a residual whose mean is zero
            assert float(row[5]) == pytest.approx(math.sqrt(residual / (count - 1)) / s, rel=1e-6)
        else:
            assert row[5].isnan()


def test_batches_of_two_sizes(generator: torch.Generator) -> None:
    """A of 4 rows, B of 12, in each of 2000 draws: E |g_A - g_B|^2 = tr Sigma (1 / 4 + 1 / 12)."""
    g_a, g_b = (gaussian((2000, 1), b, torch.ones(3), torch.ones(3), generator)[0] for b in (4, 12))
    pairs = [([torch.empty(4, 9)], [(torch.empty(12, 9), torch.empty(()))])] * 1999
    pairs.append(([torch.empty(12)], [torch.empty(12)]))
    found = measure_of().observe_pairs(pairs, gradients_of(g_a, g_b))[0]
    assert abs(found[0] - 3.0) < 5 * found[2]
    assert measure_of(rows=2).observe_pairs(pairs, gradients_of(g_a, g_b))[0, 0] == pytest.approx(
        float((g_a - g_b).square().sum(-1).mean())
    )


def test_without_replacement(generator: torch.Generator) -> None:
    """What the docstring says of halves and of subsamples of a data set, over all ways to draw."""
    rows = torch.randn(8, 4, generator=generator, dtype=torch.float64) + 1
    whole, spread = rows.mean(0), rows.var(0).sum()
    options: dict[str, Any] = {"seed": int(torch.randint(1 << 30, (), generator=generator))}
    for sampler, trace, square in (
        (gc.halves(rows, **options), spread, whole.square().sum() - spread / 8),
        (gc.subsample(rows, rows=2, **options), spread * (1 - 2 / 8), whole.square().sum()),
    ):
        g_a, g_b = (
            torch.stack([batch.mean(0) for batch in side])[:, None]
            for side in zip(*(sampler() for _ in range(1500)), strict=True)
        )
        lost = torch.zeros(())
        found = moments(
            gradients_of(g_a, g_b)._replace(cosine_error=lost.expand(1500, 1)),
            (4 if square < whole.square().sum() else 2) / 2,
        )
        # Of 28 pairs of subsamples one is a batch and itself, and NaN: what it would have been belongs to the mean.
        equal = torch.zeros(1500, 1, dtype=torch.float64), (g_a * g_b).sum(-1)
        for estimate, left_out, true in zip(found, equal, (trace, square), strict=True):
            assert (estimate.isnan() <= (g_a == g_b).all(-1)).all()
            estimate = torch.where(estimate.isnan(), left_out, estimate)
            assert abs(estimate.mean() - true) < 5 * estimate.std() / math.sqrt(1500) + 1e-9


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"design": "chain"}, {"strategy": "vmap", "method": "bracket"}], ids=str)
def test_rows_are_those_of_the_gradients(name: str, options: dict[str, Any], generator: torch.Generator) -> None:
    problem = MODELS[name]
    model, batches = made(problem, generator, 4, torch.float32)
    drawn = iter([(batches[0], batches[1]), (batches[2], batches[3])])
    measure = gc.GradientNoise()
    monitor = gc.CurvatureMonitor(
        model, problem.loss_fn, sampler=lambda: next(drawn), pairs=2, measures=[measure], **options
    )
    monitor.step()
    exact = truth.Truth(model, problem.loss_fn)
    g = [exact.gradient(batch) for batch in batches]
    pairs = [(0, 1), (1, 2)] if options.get("design") == "chain" else [(0, 1), (2, 3)]
    traces, squares = (
        np.array([float(of(g[a], g[b])) for a, b in pairs])
        for of in (lambda a, b: 9 * (a - b).square().sum() / 2, lambda a, b: a @ b)
    )
    row = monitor.records()[COLUMNS].iloc[0].to_numpy()
    wanted = [traces.mean(), squares.mean(), traces.std(ddof=1) / 2**0.5, squares.std(ddof=1) / 2**0.5]
    np.testing.assert_allclose(row[:4], wanted, rtol=1e-4, atol=1e-6)
    assert row[4] == pytest.approx(
        traces.mean() / squares.mean() if squares.mean() > 0 else math.nan, 1e-4, nan_ok=True
    )


def alone(model: nn.Module, loss_fn: Any, batches: Sequence[Any], **options: Any) -> gc.CurvatureMonitor:
    drawn = iter(batches)
    return gc.CurvatureMonitor(
        model, loss_fn, sampler=lambda: (next(drawn), next(drawn)), measures=[gc.GradientNoise(0.8)], **options
    )


def test_a_row_that_is_repeated_counts_once(generator: torch.Generator) -> None:
    """Gradients of 1e-6 drown in a difference, and the bracket takes the row."""
    problem = MODELS["perceptron"]
    model, batches = made(problem, generator, 8, torch.float32)
    monitors = [
        alone(model, lambda model, batch: 1e-6 * problem.loss_fn(model, batch), batches, method=method)
        for method in ("difference", "bracket")
    ]
    for monitor in monitors:
        for _ in range(4):
            monitor.step()
    repeated, plain = (monitor.records() for monitor in monitors)
    assert repeated["method"].tolist() == ["bracket"] * 4
    np.testing.assert_allclose(repeated[COLUMNS], plain[COLUMNS], rtol=1e-5)
    weights = [float(monitor.measures[0]._sums[0, 0]) for monitor in monitors]
    assert weights == pytest.approx([1 + 0.8 + 0.64 + 0.512] * 2)


def test_three_runs_are_what_each_is_alone(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    models = [made(problem, generator, 0, torch.float32)[0] for _ in range(3)]
    batches = [made(problem, generator, 3, torch.float32)[1] for _ in range(8)]

    def measured(runs: list[int]) -> gc.CurvatureMonitor:
        monitor = alone(
            engine_of([models[run] for run in runs]), problem.loss_fn, [[draw[run] for run in runs] for draw in batches]
        )
        for _ in range(4):
            monitor.step()
        return monitor

    together = measured([0, 1, 2])
    for run in range(3):
        frames = [m.records(r)[COLUMNS] for m, r in ((together, run), (measured([run]), 0))]
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    together.keep([2, 0])
    torch.testing.assert_close(together.measures[0]._sums[1], measured([0]).measures[0]._sums[0], rtol=0, atol=0)


@pytest.mark.parametrize("cut", [1, 3])
def test_a_state_goes_on(cut: int, generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    model, batches = made(problem, generator, 10, torch.float32)
    trajectory = [torch.randn(len(flatten(model)), generator=generator) for _ in range(5)]
    second, whole, state = stopped_and_whole(
        lambda start: alone(model, problem.loss_fn, batches[2 * start :]), model, trajectory, cut
    )
    frames = [monitor.records().drop(columns="measure_seconds") for monitor in (whole, second)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    other = gc.CurvatureMonitor(model, problem.loss_fn, measures=[gc.GradientNoise(0.5)])
    with pytest.raises(ValueError, match=r"saved with decay=0\.8, this has 0\.5"):
        other.load_state_dict(state)


def test_training_is_what_it_is_unmeasured(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    batches = [problem.batch(generator) for _ in range(6)]
    run = truth.train(problem.model, problem.loss_fn, batches, measures=[gc.GradientNoise()])
    plain = truth.train(problem.model, problem.loss_fn, batches, measured=False)
    truth.assert_same(truth.kept(plain.model), truth.kept(run.model), "model")
    truth.assert_same(plain.generators, run.generators, "generators")
    bare = truth.train(problem.model, problem.loss_fn, batches).monitor.records().drop(columns="measure_seconds")
    records = run.monitor.records()
    pd.testing.assert_frame_equal(records[bare.columns], bare, check_exact=True)
    assert records["gradient_noise_trace"].notna().all()


def test_a_gradient_found_wrong_takes_its_rows(generator: torch.Generator) -> None:
    """The second check finds a .grad of twice the length; rows since the last good one are NaN, others' are not."""
    problem = MODELS["perceptron"]
    batches = [problem.batch(generator) for _ in range(12)]

    def double(step: int, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad *= 2.0 if step > 7 else 1.0

    with warnings.catch_warnings(action="ignore", category=gc.AdmissionWarning):
        run = truth.train(
            problem.model,
            problem.loss_fn,
            batches,
            gradient="checked",
            check_every=3,
            after_backward=double,
            measures=[gc.UpdateGram(3, "*"), gc.GradientNoise()],
        )
    records = run.monitor.records()
    refuted = records["gradient_noise_trace"].isna()
    assert 0 < refuted.sum() < 4
    assert records.loc[refuted, "defect_median"].isna().all()
    assert records["g23"].notna().tolist() == [False] * 3 + [True] * 8


def test_degenerate_gradients() -> None:
    """Batches that are one, none at all, one against the other, and what rounding may have made."""
    u, v, nothing = torch.eye(3, dtype=torch.float64)[0], torch.eye(3, dtype=torch.float64)[1], torch.zeros(3).double()

    def row(a: Tensor, b: Tensor, error: float = 0.0) -> list[float]:
        return (
            measure_of().observe_pairs(batches_of([2]), gradients_of(a[None, None], b[None, None], error))[0].tolist()
        )

    for error in (0.0, 1e-7, math.nan, math.inf):
        assert all(map(math.isnan, row(u, u, error)))
    assert all(map(math.isnan, row(u, u * (1 + 1e-9), 1e-7)))
    assert row(u, v)[:2] == [2.0, 0.0]
    assert math.isnan(row(u, v)[4])  # the scale: a square of zero
    assert row(u, -v - u)[:2] == pytest.approx([5.0, -1.0])
    assert math.isnan(row(u, -v - u)[4])
    assert row(nothing, nothing)[:2] == [0.0, 0.0]
    assert row(u, nothing)[:2] == [1.0, 0.0]
    assert all(map(math.isnan, row(u, v * math.nan)))
    assert all(map(math.isnan, row(u, v * math.inf)))


def test_the_full_batch_has_no_noise(generator: torch.Generator) -> None:
    problem = MODELS["perceptron"]
    model, (batch,) = made(problem, generator, 1, torch.float32)
    monitor = gc.CurvatureMonitor(model, problem.loss_fn, measures=[gc.GradientNoise()])
    with pytest.warns(gc.AdmissionWarning, match="one and the same"):
        monitor.step(batch, batch)
    order = torch.randperm(9, generator=generator)
    monitor.step(batch, {key: value[order] for key, value in batch.items()})  # differs by rounding alone
    assert monitor.records()[COLUMNS].isna().all(axis=None)


def test_rows_of_batches_and_bad_input(generator: torch.Generator) -> None:
    assert rows_of_batch({"scale": torch.tensor(2.0), "x": torch.empty(7, 2)}) == 7
    with pytest.raises(ValueError, match="pass rows"):
        rows_of_batch(("a", 3, torch.tensor(1.0)))
    with pytest.raises(ValueError, match=r"decay must be between 0 and 1, got 1\.5"):
        gc.GradientNoise(1.5)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        gc.GradientNoise(rows=0)

    class Several(Given):
        def anywhere(self, flag: bool) -> bool:
            return flag

    with pytest.raises(ValueError, match="several processes"):
        gc.GradientNoise().bind(Several())  # type: ignore[arg-type]
    gc.GradientNoise(rows=64).bind(Several())  # type: ignore[arg-type]
    model, _ = made(MODELS["perceptron"], generator, 0)
    with pytest.raises(ValueError, match="gradient_noise: pairs of batches are needed"):
        gc.attach(
            model, MODELS["perceptron"].loss_fn, torch.optim.SGD(model.parameters()), measures=[gc.GradientNoise()]
        )
