"""benches/trust.py: its truth beside arithmetic of sixty digits, and the whole study on a few pairs."""

from __future__ import annotations

from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
import trust
from test_scripts import run
from torch import nn
from torch.nn import functional

SMOOTH = ("mlp gelu", "mlp tanh", "mlp bfloat16", "transformer", "conv batch norm", "lstm", "gpt2")


def exact(weight: torch.Tensor, pair: tuple, eta: float | None) -> mpmath.mpf:
    """The defect of soft-max regression by its definition, or the bracket's, in sixty digits."""
    matrix = mpmath.matrix(weight.tolist())
    samples = [[(mpmath.matrix(x), y) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)] for xs, ys in pair]

    def probabilities(w: mpmath.matrix, x: mpmath.matrix) -> mpmath.matrix:
        powers = (w * x).apply(mpmath.exp)
        return powers / mpmath.fsum(powers)

    def gradient(w: mpmath.matrix, batch: list) -> mpmath.matrix:
        total = mpmath.zeros(w.rows, w.cols)
        for x, y in batch:
            p = probabilities(w, x)
            p[y] -= 1
            total += p * x.T / len(batch)
        return total

    def product(w: mpmath.matrix, batch: list, v: mpmath.matrix) -> mpmath.matrix:
        total = mpmath.zeros(w.rows, w.cols)
        for x, _ in batch:
            p, u = probabilities(w, x), v * x
            mean = (p.T * u)[0]
            total += mpmath.matrix([p[i] * (u[i] - mean) for i in range(w.rows)]) * x.T / len(batch)
        return total

    def size(m: mpmath.matrix) -> mpmath.mpf:
        return mpmath.mnorm(m, "f")

    with mpmath.workdps(700):
        g_a, g_b = (gradient(matrix, batch) for batch in samples)
        if eta is None:
            delta = product(matrix, samples[1], g_a) - product(matrix, samples[0], g_b)
            return size(delta) / (size(g_a) * size(g_b))
        step = mpmath.mpf(eta)
        delta = gradient(matrix - step * g_b, samples[0]) - g_a - gradient(matrix - step * g_a, samples[1]) + g_b
        return size(delta) / (step * size(g_a) * size(g_b))


def softmax_regression(margin: float, smooth: bool = True) -> tuple:
    problem = trust.Problem(lambda: nn.Linear(2, 3, bias=False), trust.teacher, smooth=smooth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = problem.build(), torch.randn(4, 2)
    with torch.no_grad():
        y = model(x).argmax(1)
        best, second = model(x).topk(2)[0].T
        # Every sample as far from the border as it is told, so that all of them count.
        x *= (margin / (best - second))[:, None]
    return trust.Truth(problem, model), model.weight.detach(), ((x[:2], y[:2]), (x[2:], y[2:]))


@pytest.mark.parametrize("margin", [1.0, 10.0, 40.0, 300.0, 600.0])
@pytest.mark.parametrize("method", ["difference", "bracket"])
def test_truth_has_its_digits_at_any_margin(margin: float, method: str) -> None:
    truth, weight, pair = softmax_regression(margin)
    found, way = truth(weight.flatten(), pair, method, 1e-3)
    assert way == ("bracket" if method == "bracket" else "definition" if margin < 20 else "integral")
    assert found == pytest.approx(float(exact(weight, pair, 1e-3 if method == "difference" else None)), rel=1e-6)


@pytest.mark.parametrize("smooth", [True, False])
def test_truth_where_the_definition_loses_its_digits(smooth: bool) -> None:
    ways = []
    for margin in range(12, 36):
        truth, weight, pair = softmax_regression(margin, smooth)
        found, way = truth(weight.flatten(), pair, "difference", 1e-3)
        ways.append(way)
        if way != "none":
            assert found == pytest.approx(float(exact(weight, pair, 1e-3)), rel=1e-3)
    assert ways[0] == "definition"
    assert ways[-1] == ("integral" if smooth else "none")


def test_no_truth_where_gradients_underflow() -> None:
    problem = trust.Problem(lambda: nn.Linear(1, 2, bias=False), trust.teacher)
    batch = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    theta = torch.tensor([690.0, 0.0])
    for method in ("difference", "bracket"):
        assert trust.Truth(problem, problem.build())(theta, (batch, batch), method, 1e-3)[1] == "none"


def test_stable_cross_entropy_is_the_cross_entropy(generator: torch.Generator) -> None:
    logits = 5 * torch.randn(50, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (50,), generator=generator)
    torch.testing.assert_close(trust.stable_cross_entropy(logits, labels), functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", SMOOTH)
def test_nothing_of_a_models_truth_is_float32(name: str) -> None:
    """Differences of gradients and integrals of Hessian-vector products agree to far more digits than float32 has."""
    if name == "gpt2":
        pytest.importorskip("transformers")
    (stage,) = trust.stages(name, 0, ("early",))
    truth = trust.Truth(stage.problem, stage.model)
    pair = trust.draw(stage.data, 32, torch.Generator().manual_seed(0))
    theta = nn.utils.parameters_to_vector(stage.model.parameters()).detach()
    first, second = (tuple(map(trust._double, batch)) for batch in pair)
    with trust.in_float64():
        ways = (truth.definition, truth.integral, truth.bracket)
        definition, integral, bracket = (way(theta.double(), first, second, 1e-3) for way in ways)
    assert (definition - integral).norm() < 1e-8 * definition.norm()
    assert (definition - bracket).norm() > 1e-8 * definition.norm()  # so that the integral is one
    batch = pair[0]
    loss = stage.problem.loss_fn(stage.model, batch)
    with trust.in_float64():
        stable = trust.stable_cross_entropy(*stage.problem.logits(truth.model, first)).detach()
    assert float(loss.detach()) == pytest.approx(float(stable), rel=1e-2 if name == "mlp bfloat16" else 1e-5)


@pytest.mark.parametrize(
    "models", [("mlp tanh",), pytest.param((*SMOOTH, "mlp relu"), marks=pytest.mark.long)], ids=len
)
def test_the_study_on_a_few_pairs(models: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "gpt2" in models:
        pytest.importorskip("transformers")
    out = tmp_path / "trust.csv.gz"
    printed = run("trust.py", "--out", out, "--small", "--models", *models)
    trust.main(trust.Options(out=out, tables=True, against=out))
    record = trust.read(out)
    assert set(record["model"]) == set(models)
    assert set(trust.PROBLEMS) == {*SMOOTH, "mlp relu"}
    assert set(record["kind"]) == {"probe", "monitor", "successive"}
    assert not record.duplicated(trust.PLACE).any()
    plain = record[record["model"] == "mlp tanh"]  # a model that every commit measures rightly
    assert plain["truth"].notna().all()
    assert plain["reliable"].any()
    assert (plain["relative"][plain["reliable"]] < 0.1).all()
    assert np.isfinite(plain["noise_floor"]).all()
    assert "(target 99.0%)" in printed
    assert f"{len(record)} pairs in both records, 0 in the other only; 0 with another truth" in capsys.readouterr().out
