"""WeightSpectra: singular values of weights and of their updates, against NumPy's decomposition in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fed import Rows, attention, conv, loss_fn, mlp
from torch import Tensor, nn

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.measures.weight_spectra import OF_MATRICES, describe

COLUMNS = list(gc.WeightSpectra().columns)
MAKES = pytest.mark.parametrize("make", [mlp, attention, conv])


def truth(matrix: np.ndarray) -> dict[str, float]:
    """By the definitions."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    shares = sigma / sigma.sum()
    return {
        "spectral_norm": sigma[0],
        "stable_rank": np.linalg.norm(matrix) ** 2 / sigma[0] ** 2,
        "entropy_rank": math.exp(-(shares * np.log(shares)).sum()),
        "gap": sigma[0] / sigma[1],
    }


def matrix_of(segment: gc.Segment, theta: Tensor) -> np.ndarray:
    return segment.of(theta.double()).reshape(segment.shape[0], -1).numpy()


@MAKES
@pytest.mark.parametrize("steps_of_update", [1, 3])
def test_rows_are_those_of_the_matrices(make: Any, steps_of_update: int) -> None:
    measure = gc.WeightSpectra(every=steps_of_update, per_matrix=True)
    thetas = torch.randn(8, 2, len(flatten(make()[0]))).cumsum(0)
    rows = Rows(make, 2, measure, every=2).feed(thetas)
    assert len(measure.matrices) == {mlp: 2, attention: 4, conv: 2}[make]
    for run in range(2):
        found = rows.numbers(run)
        assert found["step"].tolist() == [0, 2, 4, 6]
        for _, row in found.iterrows():
            step = int(row["step"])
            latest = step - step % steps_of_update
            vectors = {"weight": thetas[step, run]}
            if latest:
                vectors["update"] = thetas[latest, run].double() - thetas[latest - steps_of_update, run].double()
            else:
                assert row.filter(like="update").isna().all()
            for kind, vector in vectors.items():
                each = [truth(matrix_of(segment, vector)) for segment in measure.matrices]
                for name in OF_MATRICES:
                    values = [one[name] for one in each]
                    assert row[f"{kind}_{name}"] == pytest.approx(np.median(values), rel=2e-6)
                    named = [row[f"{kind}_{name}[{segment.name}]"] for segment in measure.matrices]
                    assert named == pytest.approx(values, rel=2e-6)
            lengths = [np.linalg.norm(matrix_of(segment, thetas[step, run])) for segment in measure.matrices]
            assert row["parameter_norm"] == pytest.approx(float(thetas[step, run].double().norm()), rel=1e-6)
            assert row["weight_spectra_floor"] == pytest.approx(2**-24 * max(lengths), rel=1e-6)


@MAKES
def test_runs_together_are_each_alone_and_go_on_elsewhere(make: Any) -> None:
    thetas = torch.randn(9, 3, len(flatten(make()[0]))).cumsum(0)
    many = Rows(make, 3, gc.WeightSpectra(every=2, per_matrix=True)).feed(thetas[:5])
    other = Rows(make, 2, gc.WeightSpectra(every=2, per_matrix=True)).feed(thetas[:3, :2])
    for place, run in enumerate((2, 0)):
        other.monitor.load_state_dict(many.monitor.state_dict(run), place)
    many.feed(thetas[5:])
    other.feed(thetas[5:, [2, 0]])
    for run in range(3):
        alone = Rows(make, 1, gc.WeightSpectra(every=2, per_matrix=True)).feed(thetas[:, run : run + 1])
        pd.testing.assert_frame_equal(many.numbers(run), alone.numbers(), check_exact=True)
        if run != 1:
            pd.testing.assert_frame_equal(other.numbers((2, 0).index(run)), alone.numbers(), check_exact=True)
    many.monitor.keep([1])
    many.monitor.probe.gradients.keep([1])
    many.feed(thetas[4:6])
    alone = Rows(make, 1, gc.WeightSpectra(every=2, per_matrix=True)).feed(thetas[[*range(9), 4, 5], 1:2])
    pd.testing.assert_frame_equal(many.numbers(), alone.numbers(), check_exact=True)


@MAKES
def test_training_is_what_it_is_without(make: Any) -> None:
    def trained(measured: bool) -> list[Any]:
        torch.manual_seed(3)
        model, shape = make()
        model = nn.Sequential(model, nn.Dropout(0.2), nn.BatchNorm1d(4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.WeightSpectra()]) if measured else None
        for _ in range(5):
            optimizer.zero_grad()
            loss_fn(model, (torch.randn(8, *shape), torch.randint(4, (8,)))).backward()
            optimizer.step()
        if monitor is not None:
            assert monitor.records()[COLUMNS].iloc[1:].notna().all(axis=None)
            monitor.detach()
        moments = [x for state in optimizer.state.values() for x in state.values()]
        grads = [p.grad for p in model.parameters()]
        return [*model.state_dict().values(), *grads, *moments, torch.random.get_rng_state()]

    assert all(map(torch.equal, trained(True), trained(False)))


def test_floors_cover_what_storing_rounds() -> None:
    """Of 500 draws: weights and their updates in float32, beside those in float64; each column by its formula."""
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))
    n, m = 5, 9
    measure = gc.WeightSpectra(segments="weight")
    rows = Rows(lambda: (nn.Linear(m, n), None), 500, measure)
    scales = 10 ** torch.empty(500, 1, dtype=torch.float64).uniform_(-6.5, 0, generator=generator)
    before = torch.randn(500, n * m + n, generator=generator).double()  # numbers of float32
    after = before + scales * torch.randn(500, n * m + n, generator=generator, dtype=torch.float64)
    rows.feed(before.float()[None])
    rows.theta.copy_(after)
    found = measure.observe(1, [], True)
    assert found is not None
    within: dict[str, list[bool]] = {}
    for run in range(500):
        row = dict(zip(COLUMNS, found[run].tolist(), strict=True))
        f = row["weight_spectra_floor"]
        for kind, vector in (("weight", after[run]), ("update", after[run] - before[run])):
            matrix = vector[: n * m].view(n, m).numpy()
            exact, sigma = truth(matrix), np.linalg.svd(matrix, compute_uv=False)
            share = min(math.sqrt(n) * f / sigma.sum(), 1 - 1 / n)
            fannes = share * math.log(n - 1) - share * math.log(share) - (1 - share) * math.log1p(-share)
            bounds = {
                "spectral_norm": f,
                "stable_rank": 2 * f * (1 / np.linalg.norm(matrix) + 1 / sigma[0]) * exact["stable_rank"],
                "entropy_rank": math.expm1(fannes) * exact["entropy_rank"],
                "gap": f * (1 / sigma[0] + 1 / sigma[1]) * exact["gap"],
            }
            for name, bound in bounds.items():
                # Beside the rounding of what is stored there is that of float64's sums.
                near = abs(row[f"{kind}_{name}"] - exact[name]) <= bound * (1 + 1e-3) + 1e-12 * exact[name]
                within.setdefault(f"{kind}_{name}", []).append(near)
    assert min(map(np.mean, within.values())) >= 0.95, {name: np.mean(of) for name, of in within.items()}


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (3, 3)])
def test_degenerate_matrices(shape: tuple[int, int]) -> None:
    """Zero, of rank one, orthogonal, without an update, and no number."""
    rows, columns = shape
    make = lambda: (nn.Linear(columns, rows, bias=False), None)  # noqa: E731
    one = torch.outer(torch.randn(rows).abs() + 1, torch.randn(columns).abs() + 1)
    found = Rows(make, 1, gc.WeightSpectra()).feed(torch.stack([torch.zeros(shape), one, one]).view(3, 1, -1)).numbers()
    zero, ranked, still = (found.iloc[i] for i in range(3))
    for row, kind in ((zero, "weight"), (still, "update")):
        assert row[f"{kind}_spectral_norm"] == 0
        assert all(math.isnan(row[f"{kind}_{name}"]) for name in OF_MATRICES[1:])
    for kind in ("weight", "update"):
        assert ranked[f"{kind}_spectral_norm"] == pytest.approx(float(one.double().norm()), rel=1e-9)
        if 1 in shape:
            assert ranked[f"{kind}_gap"] == math.inf
        assert ranked[f"{kind}_stable_rank"] == pytest.approx(1.0)
        assert ranked[f"{kind}_entropy_rank"] == pytest.approx(1.0, abs=1e-5)
    bad = torch.full((1, 1, rows * columns), math.nan)
    assert Rows(make, 1, gc.WeightSpectra()).feed(bad).numbers()[COLUMNS].isna().all(axis=None)


def test_medians_of_infinite_gaps() -> None:
    numbers = describe(torch.tensor([[2.0, 0.0], [2.0, 1.0], [2.0, 2.0]], dtype=torch.float64))
    assert numbers[:, 4].tolist() == [math.inf, 2.0, 1.0]
    assert numbers[:, 3].tolist() == pytest.approx([1.0, math.exp(math.log(3) - 2 * math.log(2) / 3), 2.0])
    make = lambda: (nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)), None)  # noqa: E731
    assert Rows(make, 1, gc.WeightSpectra()).feed(torch.randn(1, 1, 4)).numbers()["weight_gap"].tolist() == [math.inf]


def test_which_matrices() -> None:
    def chosen(make: Any, **options: Any) -> list[str]:
        measure = gc.WeightSpectra(**options)
        Rows(make, 1, measure)
        return [segment.name for segment in measure.matrices]

    parts = [f"attention.{each}" for each in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")]
    assert chosen(attention) == parts
    assert chosen(attention, segments="*") == ["attention.in_proj_weight", parts[-1], "head.weight"]
    assert chosen(conv) == ["0.weight", "3.weight"]
    assert chosen(conv, segments=["0.*", gc.Segment("some", 3, 6, (2, 3))]) == ["0.weight", "some"]


def test_bad_input() -> None:
    model, _ = mlp()

    def monitor(**options: Any) -> gc.CurvatureMonitor:
        return gc.CurvatureMonitor(model, loss_fn, measures=[gc.WeightSpectra(**options)])

    with pytest.raises(ValueError, match="every must be at least 1, in steps; got 0"):
        gc.WeightSpectra(every=0)
    with pytest.raises(ValueError, match=r"WeightSpectra: none of 0\.bias, 2\.bias is a matrix"):
        monitor(segments="*bias")
    with pytest.raises(ValueError, match=r"'nothing' matches none of 0\.weight"):
        monitor(segments="nothing")
    state = monitor().state_dict()
    with pytest.raises(ValueError, match="state has 81 numbers, and the matrices of this measure 36"):
        monitor(segments="2.*").load_state_dict(state)
