"""Hessian edges, trace and curvature, against the dense Hessian in float64."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from models import Attention, OnceDifferentiable
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

import grokcurv as gc
from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine
from grokcurv.hessian import Lanczos, curvature, signs
from grokcurv.training.measured import RunsEngine

Batch = tuple[Tensor, Tensor]


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), torch.randn(24, 5)


def conv() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 4)), torch.randn(24, 1, 3, 3)


def transformer() -> tuple[nn.Module, Tensor]:
    return Attention(), torch.randint(7, (9, 3))


def rectified() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(24, 5)


MODELS = [mlp, transformer, conv]


def drawn(make: Callable[[], tuple[nn.Module, Tensor]]) -> tuple[nn.Module, Batch]:
    model, x = make()
    return model, (x, torch.randint(4, (len(x),)))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def dense(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] = loss_fn) -> Tensor:
    """(P, P) float64: a row of the Hessian for each coordinate, by autograd alone."""
    exact = copy.deepcopy(model).double()
    wide = tuple(x.double() if x.is_floating_point() else x for x in batch)
    parameters = list(exact.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        grads = torch.autograd.grad(loss(exact, wide), parameters, create_graph=True)
        flat = parameters_to_vector(grads)
        if not flat.requires_grad:
            return torch.zeros(len(flat), len(flat), dtype=torch.float64)
        options: dict[str, Any] = {"is_grads_batched": True, "allow_unused": True, "materialize_grads": True}
        rows = torch.autograd.grad(flat, parameters, torch.eye(len(flat)).to(flat), **options)
    return torch.cat([row.flatten(1) for row in rows], 1)


def preconditioned(model: nn.Module, hessian: Tensor, optimizer: torch.optim.Adam) -> float:
    states = [optimizer.state[p] for p in model.parameters()]
    beta, eps = optimizer.defaults["betas"][1], optimizer.defaults["eps"]
    root = torch.cat([(s["exp_avg_sq"].double() / (1 - beta ** float(s["step"]))).sqrt().flatten() for s in states])
    scale = (root + eps).rsqrt()
    return float(torch.linalg.eigvalsh(scale[:, None] * hessian * scale)[-1])


# ------------------------------------------------------------------------------------------------------ linear algebra


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_edges_are_those_of_the_dense_hessian(make: Any, which: Any) -> None:
    model, batch = drawn(make)
    before = flatten(model)
    truth = torch.linalg.eigvalsh(dense(model, batch))
    wanted = truth[-3:].flip(0) if which == "largest" else truth[:3]
    found = gc.hessian_edges(model, loss_fn, batch, k=3, tol=1e-4, which=which)
    assert found.converged
    # An eigenvalue that occurs twice may be met once: each value is one of the truth's, and the first the very edge.
    rounding = 1e-5 * truth.abs().max()
    assert abs(found.values[0] - wanted[0]) <= 1e-4 * wanted[0].abs() + rounding
    nearest = (found.values[:, None] - truth).abs().amin(1)
    assert (nearest <= found.residuals + rounding).all()
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(3), atol=1e-4)
    assert torch.equal(flatten(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_lanczos_finds_all_of_what_repeats() -> None:
    """Exhausted spaces are followed by others: of a projection all eigenvalues are met, however often they occur."""
    matrix = torch.diag(torch.tensor([2.0] * 4 + [0.0] * 5 + [-1.0] * 3, dtype=torch.float64))
    turned = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    matrix = turned @ matrix @ turned.T
    krylov = Lanczos(lambda v: matrix @ v, torch.randn(12, dtype=torch.float64), 12)
    while not krylov.full:
        krylov.extend()
    assert torch.allclose(krylov.edge(12)[0], torch.linalg.eigvalsh(matrix).flip(0), atol=1e-12)
    assert torch.allclose(krylov.basis @ krylov.basis.T, torch.eye(12, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("make", [*MODELS, rectified])
def test_curvature_and_trace(make: Any) -> None:
    """By losses where the model is smooth, by products where it is not."""
    model, batch = drawn(make)
    hessian = dense(model, batch)
    engine = GradientEngine(model, loss_fn)
    engine.admit(batch)
    probes = signs(engine, 70, seed=int(torch.randint(1000, ())), step=3)
    assert all(set(z.tolist()) == {-1.0, 1.0} for z in probes)
    assert not any(torch.equal(probes[0], z) for z in probes[1:])
    found = curvature(engine, engine.flatten(), batch, probes[:5])
    for z, value in zip(probes, found, strict=False):
        z = z.double()
        assert abs(value - z @ hessian @ z) <= 1e-5 * hessian.norm() * len(z)
    trace = gc.hessian_trace(model, loss_fn, batch, probes=200)
    assert trace.products == (200 if make is rectified else 0)
    spread = (2 * (hessian.square().sum() - hessian.diagonal().square().sum()) / 200).sqrt()
    assert abs(trace.value - hessian.trace()) < 5 * spread
    assert trace.stderr == pytest.approx(float(spread), rel=0.4)


@pytest.mark.parametrize("make", [mlp, rectified])
def test_a_kept_graph_gives_the_products(make: Any) -> None:
    model, batch = drawn(make)
    engine = GradientEngine(model, loss_fn)
    theta, hessian = engine.flatten(), dense(model, batch)
    directions = torch.randn(3, engine.size)
    found = engine.hessian(theta, batch, lambda multiply: torch.stack([multiply(v) for v in directions]))
    assert torch.allclose(found.double(), directions.double() @ hessian, atol=1e-5 * float(hessian.norm()))
    assert not found.requires_grad


def crooked_loss(model: nn.Module, batch: Batch) -> Tensor:
    return OnceDifferentiable.apply(model(batch[0])).mean()


def test_bad_input() -> None:
    model, batch = drawn(mlp)
    size = len(flatten(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=rf"k must lie in 1..P = {size}, got {size + 1}"):
        gc.hessian_edges(model, loss_fn, batch, k=size + 1)
    with pytest.raises(ValueError, match="tol must be positive"):
        gc.hessian_edges(model, loss_fn, batch, tol=0.0)
    with pytest.raises(ValueError, match="which must be one of largest, smallest, got 'both'"):
        gc.hessian_edges(model, loss_fn, batch, which="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="probes must be at least 1"):
        gc.hessian_trace(model, loss_fn, batch, probes=0)
    with pytest.warns(gc.AdmissionWarning), pytest.raises(ValueError, match="no true second derivatives"):
        gc.hessian_edges(model, crooked_loss, batch)
    for settings, text in (
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"probes": -1}, "probes must be at least 0, got -1"),
        ({"ends": "smallest"}, "ends must be one of both, largest, got 'smallest'"),
        ({"along": torch.zeros(3)}, r"along must be a Subspace or vectors \(n, P\), got shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=text):
            gc.HessianEdges(batch, **settings)  # type: ignore[arg-type]
    for settings, text in (
        ({"k": size + 1}, f"HessianEdges: k must be at most P = {size}, got {size + 1}"),
        ({"along": torch.zeros(1, 3)}, f"along must have vectors of P = {size}, got 3"),
        ({"preconditioned": True}, "HessianEdges: optimizer: SGD has no .*; without preconditioned=True .* its trace"),
    ):
        with pytest.raises(ValueError, match=text):
            gc.attach(model, loss_fn, optimizer, measures=[gc.HessianEdges(batch, **settings)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no optimiser is known"):
        gc.CurvatureMonitor(model, loss_fn, measures=[gc.HessianEdges(batch, preconditioned=True)])


# -------------------------------------------------------------------------------------------------------- the measure


def train(
    make: Any, steps: int, seed: int, state_at: int | None = None, measured: bool = True, **settings: Any
) -> tuple[list[dict[str, Any]], gc.CurvatureMonitor | None, list[Tensor]]:
    """What is true at each step, the monitor, and the parameters before each; stopped and gone on with at a step."""
    torch.manual_seed(seed)
    model, batch = drawn(make)
    fixed, optimizer = drawn_like(batch), torch.optim.AdamW(model.parameters(), lr=0.002)
    along = torch.randn(2, len(flatten(model)))

    def attached() -> gc.CurvatureMonitor:
        return gc.attach(model, loss_fn, optimizer, measures=[gc.HessianEdges(fixed, along=along, **settings)])

    monitor = attached() if measured else None
    truth, thetas = [], []
    for step in range(steps):
        if step == state_at and monitor is not None:
            state = monitor.state_dict()
            monitor.detach()
            monitor = attached()
            monitor.load_state_dict(state)
        thetas.append(flatten(model))
        truth.append({"hessian": dense(model, fixed) if measured and state_at is None else torch.empty(0)})
        truth[-1]["sharpness"] = math.nan
        if optimizer.state and measured and state_at is None:
            truth[-1]["sharpness"] = preconditioned(model, truth[-1]["hessian"], optimizer)
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return [{**row, "along": along} for row in truth], monitor, thetas


def drawn_like(batch: Batch) -> Batch:
    x = torch.randn_like(batch[0]) if batch[0].is_floating_point() else torch.randint(7, batch[0].shape)
    return x, torch.randint(4, (len(x),))


@pytest.mark.parametrize("make", MODELS)
def test_rows_are_those_of_the_dense_hessian(make: Any) -> None:
    settings: dict[str, Any] = {"k": 2, "lanczos_every": 4, "probes": 20, "check_every": 1}
    truth, monitor, _ = train(make, 8, seed=int(torch.randint(1 << 30, ())), **settings)
    assert monitor is not None
    rows = monitor.records()
    for step, row in rows.iterrows():
        exact = truth[step]  # type: ignore[call-overload]
        hessian = exact["hessian"]
        values = torch.linalg.eigvalsh(hessian)
        rounding = 1e-12 * float(values.abs().max())  # of the truth: that of the row is in its residual
        for name in ("lambda_max", "lambda_min", "lambda_max_2", "lambda_min_2"):
            assert float((values - row[name]).abs().min()) <= row[f"{name}_residual"] + rounding, (step, name)
        lanczos = step % 4 == 0  # type: ignore[operator]
        assert row["gap_checked"] == step - step % 4  # type: ignore[operator]
        # At a Lanczos run the edge itself is found; in between it is followed.
        near = 1e-4 if lanczos else 0.1
        assert row["lambda_max"] == pytest.approx(float(values[-1]), rel=near)
        assert row["lambda_min"] == pytest.approx(float(values[0]), rel=3 * near, abs=1e-2 * float(values[-1]))
        assert abs(row["trace"] - float(hessian.trace())) < 6 * row["trace_stderr"]
        for place, v in enumerate(exact["along"].double()):
            along = row[f"curvature_{place + 1}"]
            assert along == pytest.approx(float(v @ hessian @ v), rel=1e-4, abs=1e-5 * float(v @ v * hessian.norm()))
        if step == 0:
            assert math.isnan(row["sharpness_preconditioned"])
        else:
            assert row["sharpness_preconditioned"] == pytest.approx(exact["sharpness"], rel=1e-3 if step < 4 else 0.2)
        assert row["stability_threshold"] == pytest.approx(38 / 0.002)


def test_rows_far_apart_find_the_edge_again() -> None:
    """By twelve products from what was followed, which by then may be far from it.

    From a random vector k products come on average within 0.103 (ln(P (k - 1)^4) / (k - 1))^2 of the spectrum's width
    of its edge, whatever the spectrum is (Kuczynski & Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, theorem 3.2).
    """
    model, batch = drawn(mlp)
    optimizer, truth = torch.optim.AdamW(model.parameters(), lr=0.05), list[Tensor]()
    edges = gc.HessianEdges(batch, probes=0, preconditioned=False, check_every=1)
    with gc.attach(model, loss_fn, optimizer, every=15, measures=[edges]) as monitor:
        for step in range(46):
            if step % 15 == 0:
                truth.append(torch.linalg.eigvalsh(dense(model, batch)))
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    rows = monitor.records()
    assert rows["gap_checked"].tolist() == [0.0] * 4  # by sixty
    for name, end in (("lambda_max", -1), ("lambda_min", 0)):
        short = []
        for (_, row), values in zip(rows.iterrows(), truth, strict=True):
            width = float(values[-1] - values[0])
            assert float((values - row[name]).abs().min()) <= row[f"{name}_residual"] + 1e-12 * width
            short.append(abs(row[name] - float(values[end])) / width)
        assert short[0] < 1e-6  # sixty products of sixty-four dimensions
        assert statistics.median(short) < 0.02
        assert name == "lambda_min" or max(short) < 0.02  # the smallest has near neighbours, the largest has none
        assert statistics.mean(short[1:]) < 0.103 * (math.log(len(values) * 11**4) / 11) ** 2


@pytest.mark.parametrize("at", [1, 7])
def test_a_killed_run_goes_on_bitwise(at: int) -> None:
    options: dict[str, Any] = {"k": 2, "lanczos_every": 5, "check_every": 3, "probes": 2}
    _, whole, thetas = train(mlp, 9, 5, **options)
    _, stopped, _ = train(mlp, 9, 5, state_at=at, **options)
    _, _, unmeasured = train(mlp, 9, 5, measured=False)
    assert whole is not None
    assert stopped is not None
    frames = [monitor.records().drop(columns="measure_seconds") for monitor in (whole, stopped)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(thetas, unmeasured, strict=True))
    model, batch = drawn(conv)
    other = gc.CurvatureMonitor(
        model, loss_fn, measures=[gc.HessianEdges(batch, k=2, along=torch.zeros(2, len(flatten(model))))]
    )
    with pytest.raises(ValueError, match="other settings"):
        other.load_state_dict(whole.state_dict())


@pytest.mark.parametrize("one_each", [False, True])
def test_runs_together_are_runs_alone(one_each: bool) -> None:
    """Three runs, one of which leaves, each beside a monitor of its own; with a batch for all, and one for each."""
    model, batch = drawn(mlp)
    thetas = torch.stack([flatten(drawn(mlp)[0]) for _ in range(3)])
    fixed = [drawn_like(batch) for _ in range(3)] if one_each else [batch] * 3
    updates = 0.01 * torch.randn(4, *thetas.shape)
    settings: dict[str, Any] = {"lanczos_every": 3, "check_every": 2, "probes": 3, "k": 2}

    def measured(rows: list[int], batch: Any) -> list[Tensor]:
        engine = RunsEngine(model, loss_fn, "loop", False, len(rows))
        buffer = thetas[rows].clone()
        engine.adopt(range(len(rows)), buffer, torch.zeros_like(buffer))
        measure = gc.HessianEdges(batch, **settings)
        probe = type("Probe", (), {"gradients": engine})
        measure.bind(probe)  # type: ignore[arg-type]
        found = []
        for step, update in enumerate(updates):
            if step == 3 and len(rows) == 3:
                engine.keep([0, 2])
                measure.keep([0, 2])
            values = measure.observe(step, (), True)
            assert values is not None
            found.append(values)
            buffer += update[rows]
        return found

    together = measured([0, 1, 2], fixed if one_each else batch)
    alone = [measured([run], [fixed[run]] if one_each else batch) for run in range(3)]
    for step, rows in enumerate(together):
        expected = torch.cat([alone[run][step] for run in ([0, 2] if step == 3 else [0, 1, 2])])
        assert torch.equal(rows.nan_to_num(-7.0), expected.nan_to_num(-7.0))


def linear_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0]).sum() / 7


def saddle_loss(model: nn.Module, batch: Batch) -> Tensor:
    (weight,) = model.parameters()
    return (weight * torch.arange(1.0, 5.0).to(weight.dtype) * weight).sum() / 2


@pytest.mark.parametrize("case", ["linear", "saddle", "one parameter"])
def test_degenerate_hessians(case: str) -> None:
    """H = 0; a gradient that is zero; P = 1 and k = P."""
    model = nn.Linear(1 if case == "one parameter" else 4, 1, bias=False)
    nn.init.zeros_(model.weight)
    loss = linear_loss if case == "linear" else saddle_loss
    if case == "one parameter":
        loss = lambda model, batch: 1.5 * model.weight.square().sum()  # noqa: E731
    batch = torch.randn(8, model.in_features), torch.zeros(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    k = 1 if case == "one parameter" else 2
    with gc.attach(model, loss, optimizer, measures=[gc.HessianEdges(batch, k=k, preconditioned=False)]) as monitor:
        for _ in range(4):
            optimizer.step()
    truth = {"linear": (0.0, 0.0, 0.0), "saddle": (4.0, 1.0, 10.0), "one parameter": (3.0, 3.0, 3.0)}[case]
    rows = monitor.records()
    found = rows[["lambda_max", "lambda_min", "trace"]].to_numpy()
    assert abs(found - truth).max() < 1e-5
    assert rows[["lambda_max_residual", "lambda_min_residual"]].to_numpy().max() < 1e-5
    if k == 2:
        assert rows["lambda_max_2"].to_list() == pytest.approx([0.0 if case == "linear" else 3.0] * 4, abs=1e-5)


def test_another_optimiser_and_no_second_derivatives() -> None:
    model, batch = drawn(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(gc.AdmissionWarning, match="SGD has no .* sharpness_preconditioned is NaN"):
        monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.HessianEdges(batch)])
    monitor.step()
    row = monitor.records().iloc[0]
    assert math.isnan(row["sharpness_preconditioned"])
    assert math.isfinite(row["lambda_max"] + row["lambda_min"] + row["trace"])
    monitor = gc.CurvatureMonitor(
        model, crooked_loss, measures=[gc.HessianEdges(batch), gc.UpdateGram(3, "*")], sampler=lambda: (batch, batch)
    )
    with pytest.warns(gc.AdmissionWarning, match="HessianEdges: .*no true second derivatives"):
        monitor.step()
    monitor.step()
    rows = monitor.records()
    assert rows[["lambda_max", "lambda_min", "lambda_max_residual"]].isna().all(axis=None)
    assert rows["trace"].notna().all()  # of a smooth loss, which needs no second derivative
    assert rows["update_gram_floor"].isna().all()


def test_residuals_cover_the_errors() -> None:
    """Of 500 draws of a quadratic loss whose Hessian is known, at vectors that are anywhere but converged."""
    covered = []
    for draw in range(25):
        torch.manual_seed(1000 + draw)
        matrix = torch.randn(6, 6, dtype=torch.float64)
        matrix = (matrix + matrix.T).float() * 10.0 ** float(torch.empty(()).uniform_(-4, 4))
        model = nn.Linear(6, 1, bias=False)

        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            return (model.weight[0] @ batch @ model.weight[0]) / 2

        values = torch.linalg.eigvalsh(matrix.double())
        measure = gc.HessianEdges(matrix, probes=0, lanczos_steps=2, check_every=1, preconditioned=False)
        monitor = gc.CurvatureMonitor(model, loss, measures=[measure])
        for _ in range(10):
            monitor.step()
        for _, row in monitor.records().iterrows():
            for name in ("lambda_max", "lambda_min"):
                covered.append(float((values - row[name]).abs().min()) <= row[f"{name}_residual"])
    assert len(covered) == 500
    assert sum(covered) >= 0.95 * len(covered)


def test_a_converged_residual_covers_rounding() -> None:
    """Where Lanczos has left nothing but rounding, e is what covers it: in float32, and in float64, whose own rounding
    is sampled."""
    covered = []
    for dtype in (torch.float32, torch.float64):
        for draw in range(5):
            torch.manual_seed(draw)
            model, (x, y) = drawn(mlp)
            model, batch = model.to(dtype), (x.to(dtype), y)
            monitor = gc.CurvatureMonitor(
                model, loss_fn, measures=[gc.HessianEdges(batch, probes=0, lanczos_steps=40, preconditioned=False)]
            )
            monitor.step()
            row, values = monitor.records().iloc[0], torch.linalg.eigvalsh(dense(model, batch))
            assert row["lambda_max_residual"] < 1e-4 * row["lambda_max"]
            for name, edge in (("lambda_max", values[-1]), ("lambda_min", values[0])):
                covered.append(abs(float(edge) - row[name]) <= row[f"{name}_residual"] + 1e-15)
    assert sum(covered) >= 0.95 * len(covered)
