"""Steps of optimisers as functions, against copies of the optimisers that really step, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grokcurv import optim
from grokcurv.flat import Segment
from grokcurv.gradients import GradientEngine
from grokcurv.steps import read_state

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, betas=(0.9, 0.98)),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, betas=(0.5, 0.6), maximize=True),
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2, dtype=torch.float64), foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.2, weight_decay=0.05, maximize=True),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01),
}


def model_of(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6, bias=False), nn.Tanh(), nn.Linear(6, 4)).to(dtype)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])[None]


def fill(model: nn.Module) -> Tensor:
    """A gradient of random lengths, in place; (1, P) what it is."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 10 ** float(torch.empty(()).uniform_(-3, 1))
    return flat(x.grad for x in model.parameters())


def two_steps(make: Callable[[nn.Module], list[torch.optim.Optimizer]], max_norm: float | None = None) -> None:
    """Both updates of two steps from a state that training has led to, by the function and by a copy that steps."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6)):
        model = model_of(dtype)
        optimizers = make(model)
        for taken in range(4):
            engine = GradientEngine(model, loss_fn)
            state = read_state(optimizers, engine, max_norm)
            kept = state.clone()
            twin, twins = copy.deepcopy((model, optimizers))
            theta, wide = flat(model.parameters()), twin.double()
            for each in twins:  # its moments in float64
                each.load_state_dict(each.state_dict())
            points = [theta]
            for _ in range(2):
                gradient = fill(twin)
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(wide.parameters(), max_norm)
                for each in twins:
                    each.step()
                points.append(flat(wide.parameters()))
                update, state = state.step(points[-2].to(dtype), gradient.to(dtype))
                truth = points[-1] - points[-2]
                assert update.dtype == dtype
                assert float((update - truth).norm()) <= tolerance * float(truth.norm()), (dtype, taken)
            fill(model)
            for each in optimizers:
                each.step()
            again, _ = kept.step(theta.to(dtype), flat(x.grad for x in model.parameters()).to(dtype))
            moved = flat(model.parameters()) - theta
            assert max_norm or float((again - moved).norm()) <= 1e-5 * float(moved.norm())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_a_step_is_what_the_optimiser_does(name: str, max_norm: float | None) -> None:
    two_steps(lambda model: [OPTIMIZERS[name](model.parameters())], max_norm)


def test_groups_and_several_optimisers() -> None:
    def make(model: nn.Module) -> list[torch.optim.Optimizer]:
        first, second, third = (list(model[i].parameters()) for i in (0, 2, 4))
        groups = [{"params": first[1:] + third[:1], "weight_decay": 0.5, "lr": 0.02}, {"params": first[:1]}]
        return [torch.optim.AdamW(groups, lr=1e-2), torch.optim.SGD(second, lr=0.1, momentum=0.5)]

    two_steps(make)


def test_parameters_that_nobody_moves() -> None:
    model = model_of(torch.float64)
    optimizer = torch.optim.AdamW([*model[0].parameters(), *model[4].parameters()], weight_decay=0.5)
    fill(model)
    model[4].bias.grad = None
    theta, gradient = flat(model.parameters()), torch.randn(1, sum(x.numel() for x in model.parameters())).double()
    for _ in range(2):
        update, _ = read_state([optimizer], GradientEngine(model, loss_fn)).step(theta, gradient)
        assert update[0, :54].all()
        assert not update[0, 54:108].any()
        assert update[0, 108:132].all()
        assert not update[0, 132:].any()
        optimizer.step()


def test_parameters_that_have_taken_fewer_steps() -> None:
    model, late = model_of(torch.float64), []

    def make(_: nn.Module) -> list[torch.optim.Optimizer]:
        return [optimizer]

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        fill(model)
        if step == 1:
            model[0].bias.grad = None
        optimizer.step()
    theta, gradient = flat(model.parameters()), fill(model)
    late, _ = read_state(make(model), GradientEngine(model, loss_fn)).step(theta, gradient)
    optimizer.step()
    moved = flat(model.parameters()) - theta
    assert float((late - moved).norm()) <= 1e-12 * float(moved.norm())


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon() -> None:
    """torch orthogonalises in bfloat16, so that an update is its own to 8 bits; decay and momentum are exact."""
    model = model_of(torch.float32)
    matrices = [x for x in model.parameters() if x.ndim == 2]
    others = [x for x in model.parameters() if x.ndim == 1]
    optimizers = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")]
    optimizers += [torch.optim.SGD(others, lr=0.1)]
    for _ in range(3):
        theta, gradient = flat(model.parameters()), fill(model)
        update, _ = read_state(optimizers, GradientEngine(model, loss_fn)).step(theta.float(), gradient.float())
        for each in optimizers:
            each.step()
        moved = flat(model.parameters()) - theta
        assert float((update - moved).norm()) <= 0.05 * float(moved.norm())


def rows(kind: str, count: int, size: int, dtype: torch.dtype) -> optim.Optimizer:
    torch.manual_seed(count)
    theta, gradient = torch.randn(2, count, size, dtype=torch.float64).to(dtype).unbind(0)
    theta, gradient = theta.clone(), gradient.clone()
    several: dict[str, Any] = {"lr": torch.rand(count).tolist(), "weight_decay": torch.rand(count).tolist()}
    several |= {"warmup": [0, 10, 3][:count], "max_norm": [0.5, math.inf, 3.0][:count]}
    if kind == "sgd":
        return optim.SGD(theta, gradient, momentum=[0.9, 0.0, 0.5][:count], nesterov=[0, 1, 1][:count], **several)
    if kind == "adamw":
        return optim.AdamW(theta, gradient, betas=[(0.9, 0.98), (0.5, 0.9), (0.8, 0.8)][:count], **several)
    segments = [Segment("a", 3, 12, (3, 4)), Segment("b", 20, 6, (2, 3)), Segment("c", 26, 12, (3, 4))]
    return optim.Muon(theta, gradient, segments, nesterov=[1, 0, 1][:count], adamw_lr=0.1, **several)


def test_rows_of_several_optimisers() -> None:
    """Runs in any rows, each as its optimiser moves it; and nothing of the optimisers is written."""
    size, dtype = 45, torch.float64
    model = nn.Linear(size, 1, bias=False).to(dtype)
    kinds = ["adamw", "muon", "sgd"]
    optimizers = {kind: rows(kind, 3, size, dtype) for kind in kinds}
    where = [("adamw", 0), ("adamw", 2), ("muon", 1), ("muon", 2), ("sgd", 2), ("sgd", 0)]
    engine = GradientEngine(model, lambda model, x: model(x).sum())
    engine.runs = len(where)
    for _ in range(3):
        before = copy.deepcopy({kind: vars(each) for kind, each in optimizers.items()})
        state = read_state([(optimizers[kind], row) for kind, row in where], engine)
        theta, gradient = (
            torch.stack([getattr(optimizers[k], name)[r] for k, r in where]) for name in ("theta", "gradient")
        )
        update, after = state.step(theta, gradient)
        for kind, each in optimizers.items():
            for name, value in vars(each).items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, before[kind][name]), (kind, name)
        for each in optimizers.values():
            each.clip()
            each.step()
        there = torch.stack([optimizers[k].theta[r] for k, r in where])
        moved = there - theta
        assert bool(((update - moved).norm(dim=1) <= 1e-12 * moved.norm(dim=1)).all())
        for each in optimizers.values():
            each.gradient.copy_(torch.randn_like(each.gradient))
        gradient = torch.stack([optimizers[k].gradient[r] for k, r in where])
        update, _ = after.step(there, gradient)
        now, _ = read_state([(optimizers[kind], row) for kind, row in where], engine).step(there, gradient)
        assert float((update - now).norm()) <= 1e-12 * float(now.norm())


def test_preconditioner_and_threshold() -> None:
    model = model_of(torch.float64)
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-3)
    engine = GradientEngine(model, loss_fn)
    assert read_state([optimizer], engine).preconditioner()[0, :108].isnan().all()
    squares = torch.zeros(1, 108, dtype=torch.float64)
    for step in range(1, 4):
        gradient = fill(model)
        squares = 0.9 * squares + 0.1 * gradient[:, :108] ** 2
        optimizer.step()
        found = read_state([optimizer], engine)
        truth = (squares / (1 - 0.9**step)).sqrt() + 1e-3
        assert torch.allclose(found.preconditioner()[:, :108], truth, rtol=1e-12)
        assert found.preconditioner()[:, 108:].isinf().all()
        assert found.stability_threshold().tolist() == pytest.approx([3.6 / (0.2 * 0.1)])
    sgd = read_state([torch.optim.SGD(model.parameters())], engine)
    for what in (sgd.preconditioner, sgd.stability_threshold):
        with pytest.raises(ValueError, match=r"optimizer: SGD has no .*Adam and AdamW have one"):
            what()


def test_thresholds_of_rows_follow_the_warm_up() -> None:
    optimizer = rows("adamw", 3, 45, torch.float32)
    engine = GradientEngine(nn.Linear(45, 1, bias=False), lambda model, x: model(x).sum())
    engine.runs = 3
    lr, beta = optimizer.lr * torch.tensor([1.0, 0.1, 1 / 3]), torch.tensor([0.9, 0.5, 0.8])
    found = read_state([(optimizer, row) for row in range(3)], engine).stability_threshold()
    assert found.tolist() == pytest.approx(((2 + 2 * beta) / ((1 - beta) * lr)).tolist())


def test_what_is_not_understood_is_named() -> None:
    class Own(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            """Nothing."""

    model = model_of(torch.float32)
    for kind in (torch.optim.RMSprop, torch.optim.NAdam, Own):
        with pytest.raises(ValueError, match=f"{kind.__name__} is not understood; AdamW, Adam, SGD and Muon are"):
            read_state([kind(model.parameters())], GradientEngine(model, loss_fn))
