"""Optimisers over rows: each run against torch's optimiser of one, and against itself alone, bit for bit.

Gradients are drawn beforehand and depend on no parameter, so that no rounding feeds the next step's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import tape
import torch
from test_device import Place
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grokcurv.flat import Segment, segments_of, select_segments
from grokcurv.optim import ADJUSTMENTS, SGD, AdamW, Muon, Optimizer, orthogonalize, row_norms

STEPS = 100
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""Unit roundoff."""

SHAPES = ((7, 5), (11,), (3, 4))
"""Of the parameters of a run: 58 numbers."""

LAYER = nn.TransformerEncoderLayer(8, 2, 20)
SIZE = sum(p.numel() for p in LAYER.parameters())
MATRICES = select_segments(LAYER, "*in_proj_weight", "*out_proj.weight", "linear?.weight")
"""Of the layer: (24, 8), which is three matrices, (8, 8), (20, 8) and (8, 20)."""

COMMON = {
    "lr": [1e-2, 1e-3, 3e-3, 1e-2, 0.0],
    "weight_decay": [0.0, 0.1, 1.0, 0.01, 0.5],
    "warmup": [0, 7, 1, 200, 0],
    "max_norm": [math.inf, 1.0, 0.01, 5.0, 1e3],
}
ADAMW = {**COMMON, "betas": [[0.9, 0.999], [0.9, 0.98], [0.0, 0.95], [0.8, 0.9], [0.95, 0.9]]}
DESCENT = {"momentum": [0.9, 0.0, 0.5, 0.9, 0.95], "nesterov": [True, False, False, False, True]}
MUON = {**ADAMW, **DESCENT, "adamw_lr": [1e-3, 1e-2, 3e-3, 1e-2, 1e-3]}
RUNS = 5

Make = Callable[..., Optimizer]
KINDS: dict[str, tuple[Make, dict[str, Any]]] = {
    "AdamW": (AdamW, ADAMW),
    "SGD": (SGD, {**COMMON, **DESCENT}),
    "Muon": (lambda theta, gradient, **settings: Muon(theta, gradient, MATRICES, **settings), MUON),
}
"""By name, what makes an optimiser of rows of the layer, and settings of five runs."""

every_kind = pytest.mark.parametrize("kind", KINDS)
both_types = pytest.mark.parametrize("dtype", UNIT, ids=str)


def rows(runs: int, size: int, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
    """(runs, size) at a stride that is a multiple of 16 numbers; what lies between is in nobody's sum."""
    stride = -(-size // 16) * 16
    return torch.full((runs, stride), torch.nan, dtype=dtype, device=device)[:, :size].zero_()


def normal(shape: Sequence[int], generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator)


def made(kind: str, theta: Tensor, runs: Sequence[int] = range(RUNS)) -> Optimizer:
    """An optimiser of such of the five runs, on rows that begin at theta."""
    make, settings = KINDS[kind]
    own = rows(*theta.shape, theta.dtype, theta.device).copy_(theta)
    chosen = {name: [values[run % RUNS] for run in runs] for name, values in settings.items()}
    return make(own, torch.zeros_like(own), **chosen)


def take(optimizer: Optimizer, gradients: Tensor) -> None:
    """A step along each of the gradients (steps, R, P)."""
    for gradient in gradients:
        optimizer.gradient.copy_(gradient)
        optimizer.clip()
        optimizer.step()


@contextmanager
def using(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def setting(values: dict[str, Any], run: int) -> dict[str, Any]:
    return {name: tuple(x[run]) if name == "betas" else x[run] for name, x in values.items()}


def train_alone(optimizer: torch.optim.Optimizer, gradients: Tensor, values: dict[str, Any]) -> None:
    """A run as torch takes it: one optimiser, whose warm-up and clipping are the loop's."""
    (group,) = optimizer.param_groups
    for step, gradient in enumerate(gradients):
        parts = gradient.split([p.numel() for p in group["params"]])
        for p, part in zip(group["params"], parts, strict=True):
            p.grad = part.view(p.shape).clone()
        nn.utils.clip_grad_norm_(group["params"], values["max_norm"])
        group["lr"] = values["lr"] * min(1.0, (step + 1) / values["warmup"]) if values["warmup"] else values["lr"]
        optimizer.step()


def parameters_of(row: Tensor, shapes: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    parts = row.split([math.prod(shape) for shape in shapes])
    return [nn.Parameter(part.clone().view(*shape)) for part, shape in zip(parts, shapes, strict=True)]


# --------------------------------------------------------------------------------------------------- torch's optimisers


@both_types
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_each_run_is_that_of_torch(kind: str, dtype: torch.dtype, generator: Generator) -> None:
    """Within what may be rounded differently.

    A step rounds theta three times. Its own length, below 10 lr, has the roundings of the averages, three for each step
    that they reach back, 20 of the first moment and 100 of the second, and of the norm, one for each coordinate: less
    than 3000 lr together, where no gradient is beyond 20 times the root of its second moment.
    """
    make, settings = KINDS[kind]
    size = sum(map(math.prod, SHAPES))
    start, gradients = normal((RUNS, size), generator, dtype), normal((STEPS, RUNS, size), generator, dtype)
    theta = rows(RUNS, size, dtype).copy_(start)
    take(make(theta, rows(RUNS, size, dtype), **settings), gradients)
    for run in range(RUNS):
        values, parameters = setting(settings, run), parameters_of(start[run], SHAPES)
        own = {name: x for name, x in values.items() if name not in ("warmup", "max_norm")}
        train_alone(getattr(torch.optim, kind)(parameters, **own), gradients[:, run], values)
        wanted = torch.cat([p.detach().flatten() for p in parameters])
        bound = STEPS * UNIT[dtype] * (3 * max(start[run].abs().max(), wanted.abs().max()) + 3000 * values["lr"])
        assert (theta[run] - wanted).abs().max() <= bound, run
        assert values["lr"] == 0 or (theta[run] - start[run]).abs().max() > 100 * UNIT[torch.float32]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_of_muon_a_step_is_that_of_torch(generator: Generator) -> None:
    """Which orthogonalises in bfloat16; matrices four times as long as wide are told from those that are not."""
    shapes = ((16, 64), (64, 16), (16, 64))
    size = sum(map(math.prod, shapes))
    starts = [sum(map(math.prod, shapes[:index])) for index in range(len(shapes))]
    segments = [Segment(str(s), s, math.prod(shape), shape) for s, shape in zip(starts, shapes, strict=True)]
    for adjust in (*ADJUSTMENTS, None):
        theta, gradient = (rows(2, size).copy_(normal((2, size), generator)) for _ in range(2))
        start = theta.clone()
        same = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
        chosen = {} if adjust is None else {"adjust_lr_fn": adjust}
        Muon(theta, gradient, segments, **same, **chosen).step()
        for run in range(2):
            parameters = parameters_of(start[run], shapes)
            train_alone(
                torch.optim.Muon(parameters, **same, **chosen),
                gradient[run : run + 1],
                {"max_norm": math.inf, "warmup": 0, **same},
            )
            for p, s in zip(parameters, segments, strict=True):
                before, after = (x[run, s.start : s.stop].view(s.shape) for x in (start, theta))
                assert (after - p).norm() <= 0.05 * (p - before).norm(), (adjust, s)


def plain_orthogonalize(matrix: Tensor) -> Tensor:
    x = matrix / max(float(matrix.norm()), 1e-7)
    x = x.T if len(x) > len(x.T) else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if len(matrix) > len(matrix.T) else x


def plain_muon(start: Tensor, gradients: Tensor, values: dict[str, Any]) -> Tensor:
    """One run, matrix by matrix, and the rest by torch.optim.AdamW."""
    theta, clipped = start.clone(), []
    for gradient in gradients:
        scale = min(1.0, values["max_norm"] / (float(gradient.norm()) + 1e-6))
        clipped.append(gradient * scale)
    chosen = torch.zeros(SIZE, dtype=torch.bool)
    for segment in MATRICES:
        chosen[segment.start : segment.stop] = True
        parts = 3 if segment.name.endswith("in_proj_weight") else 1
        length, shape = segment.length // parts, (segment.shape[0] // parts, segment.shape[1])
        for part in range(parts):
            there = slice(segment.start + part * length, segment.start + (part + 1) * length)
            w, buffer = theta[there].view(shape), theta.new_zeros(shape)
            for step, gradient in enumerate(clipped):
                g, mu = gradient[there].view(shape), values["momentum"]
                lr = values["lr"] * min(1.0, (step + 1) / max(values["warmup"], 1))
                buffer = mu * buffer + (1 - mu) * g
                update = mu * buffer + (1 - mu) * g if values["nesterov"] else buffer
                ratio = math.sqrt(max(1.0, shape[0] / shape[1]))
                w.copy_((1 - lr * values["weight_decay"]) * w - lr * ratio * plain_orthogonalize(update))
    others = [nn.Parameter(start[~chosen].clone())]
    adamw = torch.optim.AdamW(others, betas=values["betas"], weight_decay=values["weight_decay"])
    train_alone(
        adamw,
        torch.stack(clipped)[:, ~chosen],
        {"lr": values["adamw_lr"], "warmup": values["warmup"], "max_norm": math.inf},
    )
    theta[~chosen] = others[0].detach()
    return theta


def test_muon_is_a_plain_loop_over_matrices(generator: Generator) -> None:
    """In float64 within its roundings, and in float32 as near to that as the plain loop in float32 is.

    A step of the iteration has a slope of 4 at most, in any direction, and for A <= B singular values up to 1.2; its
    products, of F-norms up to ``1.5 A``, round to within ``18 (A B + A A)`` units. Five steps in a row: 341 times that.
    """
    start = normal((RUNS, SIZE), generator, torch.float64).float()
    gradients = normal((STEPS, RUNS, SIZE), generator, torch.float64).float()
    found = {dtype: made("Muon", start.to(dtype)) for dtype in UNIT}
    for dtype, optimizer in found.items():
        take(optimizer, gradients.to(dtype))
    errors = {"rows": 0.0, "plain": 0.0}
    for run in range(RUNS):
        values = setting(MUON, run)
        wanted = plain_muon(start[run].double(), gradients[:, run].double(), values)
        slack = 341 * 18 * (8 * 20 + 8 * 8) * math.sqrt(20 / 8) * values["lr"] + 3000 * values["adamw_lr"]
        bound = STEPS * UNIT[torch.float64] * (3 * wanted.abs().max() + slack)
        assert (found[torch.float64].theta[run] - wanted).abs().max() <= bound, run
        plain = plain_muon(start[run], gradients[:, run], values)
        for name, theta in (("rows", found[torch.float32].theta[run]), ("plain", plain)):
            errors[name] = max(errors[name], float((theta - wanted).abs().max()))
    assert errors["rows"] <= 5 * errors["plain"], errors


@both_types
def test_orthogonalized_matrices(dtype: torch.dtype, generator: Generator) -> None:
    for a, b in ((1, 1), (1, 7), (5, 5), (33, 17), (16, 50)):
        left, right = (torch.linalg.qr(normal((4, n, n), generator, torch.float64)).Q for n in (a, b))
        k = min(a, b)
        values = torch.rand(4, k, dtype=torch.float64, generator=generator) * 0.9 + 0.1
        matrices = (left[:, :, :k] * values[:, None]) @ right[:, :, :k].mT
        found = orthogonalize(matrices.to(dtype))
        assert found.shape == matrices.shape
        for one, matrix in zip(found, matrices.to(dtype), strict=True):
            assert torch.equal(orthogonalize(matrix[None].clone())[0], one), "its place in memory changes a matrix"
        inner = left[:, :, :k].mT @ found.double() @ right[:, :, :k]
        kept = inner.diagonal(dim1=1, dim2=2)
        assert 0.68 <= kept.min() <= kept.max() <= 1.21
        # What is not on the diagonal is rounding, of the products and of the factors.
        assert (inner - torch.diag_embed(kept)).abs().max() <= 341 * 36 * a * b * UNIT[dtype]
    assert not orthogonalize(torch.zeros(2, 3, 4, dtype=dtype)).any()
    assert orthogonalize(torch.zeros(0, 3, 4, dtype=dtype)).shape == (0, 3, 4)


# ------------------------------------------------------------------------------------------------------ every run alone


@both_types
@every_kind
def test_each_run_is_bitwise_what_it_is_alone(kind: str, dtype: torch.dtype, generator: Generator) -> None:
    """Seventeen runs are more than the CPU's vectors hold, and one is left over."""
    runs, steps = 17, 10
    start, gradients = normal((runs, SIZE), generator, dtype), normal((steps, runs, SIZE), generator, dtype)
    together = made(kind, start, range(runs))
    take(together, gradients)
    for run in range(runs):
        alone = made(kind, start[run : run + 1], [run])
        take(alone, gradients[:, run : run + 1])
        assert torch.equal(together.theta[run], alone.theta[0]), run
        for name, value in alone.state_dict(0).items():
            assert torch.equal(together.state_dict(run)[name], value), (run, name)


def test_every_power_of_betas_is_what_it_is_alone(generator: Generator) -> None:
    """Single powers and those in the CPU's vectors differ in one of fifty; where moments are new, so do the steps."""
    runs = 600
    betas = 1 - 0.2 * torch.rand(runs, 2, dtype=torch.float64, generator=generator)
    counts = torch.randint(40, (runs,), generator=generator).double()
    gradient = torch.ones(runs, 1, dtype=torch.float64)

    def stepped(there: slice) -> Tensor:
        optimizer = AdamW(torch.zeros_like(gradient[there]), gradient[there], lr=1.0, betas=betas[there])
        optimizer.count.copy_(counts[there])
        optimizer.step()
        return optimizer.theta

    assert torch.equal(stepped(slice(runs)), torch.cat([stepped(slice(run, run + 1)) for run in range(runs)]))


@pytest.mark.parametrize("make", [AdamW, SGD])
def test_threads_change_no_bits(make: Any, generator: Generator) -> None:
    """Where one thread ends and the next begins, the CPU's vectors do too."""
    start, gradients = normal((3, 40_003), generator), normal((3, 3, 40_003), generator)
    found = []
    for threads in (1, 2):
        optimizer = make(start.clone(), torch.zeros_like(start), weight_decay=0.1, max_norm=1.0)
        with using(threads):
            take(optimizer, gradients)
        found.append(optimizer.theta)
    assert torch.equal(*found)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8193, 70_001])
def test_lengths_of_rows(size: int, threads: int, generator: Generator) -> None:
    """Equal bits in any company and on any number of threads; a sum of n squares rounds n + 1 times."""
    x = rows(3, size).copy_(normal((3, size), generator))
    with using(threads):
        found, alone = row_norms(x), torch.cat([row_norms(x[run : run + 1]) for run in range(3)])
    exact = torch.tensor([math.sqrt(math.fsum(v * v for v in row)) for row in x.tolist()], dtype=torch.float64)
    assert torch.equal(found, alone)
    assert torch.equal(found, row_norms(x))
    torch.testing.assert_close(found, exact, rtol=(min(size, 4096) + 1) * UNIT[torch.float32], atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@every_kind
def test_what_is_not_finite_stays_in_its_run(kind: str, bad: float, generator: Generator) -> None:
    start, gradients = normal((RUNS, SIZE), generator), normal((5, RUNS, SIZE), generator)
    healthy, ill = made(kind, start), made(kind, start)
    take(healthy, gradients)
    gradients[2, 1, 70] = bad
    take(ill, gradients)
    others = [0, 2, 3, 4]
    assert torch.equal(ill.theta[others], healthy.theta[others])
    assert not torch.equal(ill.theta[1], healthy.theta[1])


def test_without_a_limit_a_gradient_is_left_alone(generator: Generator) -> None:
    gradient = normal((4, 9), generator)
    gradient[1, 3], gradient[2, 4], gradient[3, 5] = torch.nan, torch.inf, torch.nan
    before = gradient.clone()
    optimizer = AdamW(torch.zeros(4, 9), gradient, max_norm=[math.inf, math.inf, math.inf, 1.0])
    optimizer.clip()
    torch.testing.assert_close(gradient[:3], before[:3], rtol=0, atol=0, equal_nan=True)
    assert gradient[3].isnan().all()
    AdamW(torch.zeros(4, 9), gradient.copy_(before)).clip()
    torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)


def test_the_warm_up(generator: Generator) -> None:
    optimizer = SGD(torch.zeros(3, 4), torch.ones(3, 4), lr=[1.0, 2.0, 4.0], warmup=[0, 1, 4])
    moved = []
    for _ in range(6):
        before = optimizer.theta.clone()
        optimizer.step()
        moved.append((before - optimizer.theta)[:, 0].tolist())
    assert torch.tensor(moved).T.tolist() == [[1.0] * 6, [2.0] * 6, [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]]


def test_optimisers_of_one_program(generator: Generator) -> None:
    """A block of rows for each kind; then some runs end, and the others close up in the same memory."""
    blocks = {"AdamW": slice(0, 3), "SGD": slice(3, 5), "Muon": slice(5, 9)}
    start, gradients = normal((9, SIZE), generator), normal((6, 9, SIZE), generator)
    theta, gradient = rows(9, SIZE).copy_(start), rows(9, SIZE)
    program, alone = {}, {}
    for kind, there in blocks.items():
        make, settings = KINDS[kind]
        own = {name: (values * 2)[there] for name, values in settings.items()}
        program[kind] = make(theta[there], gradient[there], **own)
        alone[kind] = make(start[there].clone(), torch.zeros_like(start[there]), **own)
    for g in gradients[:3]:
        gradient.copy_(g)
        for optimizer in program.values():
            optimizer.clip()
            optimizer.step()
    for kind, there in blocks.items():
        take(alone[kind], gradients[:3, there])
    kept, place = {"AdamW": [2, 0], "SGD": [1], "Muon": [0, 1, 3]}, 0
    for kind, runs in kept.items():
        there = slice(place, place + len(runs))
        program[kind].keep(runs, theta[there], gradient[there])
        place = there.stop
    going_on = [blocks[kind].start + run for kind, runs in kept.items() for run in runs]
    for g in gradients[3:]:
        gradient[:place] = g[going_on]
        for optimizer in program.values():
            optimizer.clip()
            optimizer.step()
    for kind, there in blocks.items():
        take(alone[kind], gradients[3:, there])
    assert torch.equal(theta[:place], torch.cat([alone[kind].theta[runs] for kind, runs in kept.items()]))


@every_kind
def test_a_checkpoint_goes_on_in_any_row(kind: str, generator: Generator) -> None:
    start, gradients = normal((RUNS, SIZE), generator), normal((6, RUNS, SIZE), generator)
    whole = made(kind, start)
    take(whole, gradients[:3])
    run, other = 1, made(kind, whole.theta[:3], [4, 0, 1])
    state = whole.state_dict(run)
    assert state["count"] == 3
    other.load_state_dict(2, state)
    other.theta[2] = whole.theta[run]
    state["count"].fill_(-1)  # a copy
    take(whole, gradients[3:])
    take(other, gradients[3:, [0, 0, run]])
    assert torch.equal(other.theta[2], whole.theta[run])
    assert other.count.tolist() == [3, 3, 6]


# --------------------------------------------------------------------------------------------------- what a GPU demands


class Operators(TorchDispatchMode):
    """Counts operators that are no views, on the meta device: no number can be looked at, no tensor comes in."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "lift_fresh"), func
        assert {x.device.type for x in tape.tensors((args, kwargs, result))} == {"meta"}, func
        self.count += not func.is_view
        return result


@every_kind
def test_a_step_stays_on_the_device_and_is_as_many_operators_for_any_number_of_runs(kind: str) -> None:
    counts = set()
    for runs in (1, 4, 16):
        optimizer = made(kind, torch.empty(runs, SIZE, device="meta"), range(runs))
        with Operators() as operators:
            optimizer.clip()
            optimizer.step()
        counts.add(operators.count)
    assert len(counts) == 1
    assert 10 < counts.pop() < 160


@pytest.fixture
def place() -> Place:
    return Place("cpu", tape.capture, captures_run=True, rtol=0.0)


@every_kind
def test_captured_steps_of_rows(kind: str, place: Place, generator: Generator) -> None:
    """Replays count, warm up, and follow settings that are changed in place."""
    start = normal((RUNS, SIZE), generator).to(place.device)
    gradients = normal((8, RUNS, SIZE), generator).to(place.device)
    captured, eager = made(kind, start), made(kind, start)
    take(captured, gradients[:1])

    def advance() -> None:
        captured.clip()
        captured.step()

    captured.gradient.copy_(gradients[1])
    _, replay = place.capture(advance)
    if not place.captures_run:
        replay()
    take(eager, gradients[:2])
    for gradient in gradients[2:]:
        for optimizer in (captured, eager):
            optimizer.lr.mul_(1.5)
            optimizer.gradient.copy_(gradient)
        replay()
        eager.clip()
        eager.step()
    assert captured.count.tolist() == [8] * RUNS
    torch.testing.assert_close(captured.theta, eager.theta, rtol=place.rtol, atol=place.rtol)


# --------------------------------------------------------------------------------------------------------- odd requests


@every_kind
def test_no_runs(kind: str) -> None:
    optimizer = KINDS[kind][0](rows(0, SIZE), rows(0, SIZE), max_norm=1.0)
    take(optimizer, torch.zeros(2, 0, SIZE))
    assert optimizer.count.tolist() == []


def test_muon_of_everything_and_of_nothing(generator: Generator) -> None:
    gradient = normal((2, 12), generator)
    thetas = torch.zeros(3, 2, 12)
    Muon(thetas[0], gradient, [Segment("w", 0, 12, (3, 4)), Segment("empty", 12, 0, (0, 4))], lr=1.0).step()
    Muon(thetas[1], gradient, [], adamw_lr=0.5, weight_decay=0.25).step()
    AdamW(thetas[2], gradient, lr=0.5, weight_decay=0.25).step()
    wanted = torch.stack([-plain_orthogonalize(g.view(3, 4)).flatten() for g in gradient])
    torch.testing.assert_close(thetas[0], wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(thetas[1], thetas[2])


def test_rows_of_any_strides(generator: Generator) -> None:
    start, gradients = normal((RUNS, SIZE), generator), normal((3, RUNS, SIZE), generator)
    for kind, (make, settings) in KINDS.items():
        wanted = made(kind, start)
        take(wanted, gradients)
        theta = start.T.contiguous().T
        take(make(theta, torch.zeros_like(theta), **settings), gradients)
        torch.testing.assert_close(theta, wanted.theta, rtol=1e-5, atol=1e-6)


WEIGHT = Segment("w", 0, 6, (2, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number, not negative; got \[-1.0\]"),
        ({"lr": [1e-3, math.nan]}, r"lr must be a number, not negative; got \[nan\]"),
        ({"lr": [1e-3] * 3}, r"lr must have shape \(\) or \(2,\); got \(3,\)"),
        ({"betas": [0.9, 1.0]}, r"betas must lie in \[0, 1\); got \[1.0\]"),
        ({"betas": 0.9}, r"betas must have shape \(2,\) or \(2, 2\); got \(\)"),
        ({"max_norm": 0.0}, r"max_norm must be positive, inf where there is no limit; got \[0.0\]"),
        ({"warmup": math.inf}, r"warmup must be a number, not negative; got \[inf\]"),
        ({"weight_decay": -0.5}, "weight_decay must be a number, not negative"),
        ({"nesterov": 2}, r"nesterov must be true or false; got \[2.0\]"),
        ({"momentum": [0.5, -0.5]}, r"momentum must lie in \[0, 1\); got \[-0.5\]"),
        ({"adamw_lr": -1.0}, "adamw_lr must be a number, not negative"),
        ({"adjust_lr_fn": "mine"}, "adjust_lr_fn must be one of original, match_rms_adamw; got 'mine'"),
        ({"segments": [Segment("b", 0, 6, (6,))]}, "segments must be matrices, of a shape of two numbers; got .*'b'"),
        ({"segments": [Segment("w", 0, 6, (2, 4))]}, "segments must be matrices"),
        ({"segments": [WEIGHT, Segment("v", 5, 4, (2, 2))]}, r"must be disjoint and lie in 0..10; got .*'v'"),
        ({"segments": [Segment("v", 8, 4, (2, 2))]}, r"must be disjoint and lie in 0..10; got .*'v'"),
        ({"theta": torch.zeros(10)}, r"theta must have shape \(R, P\); got \(10,\)"),
        ({"gradient": torch.zeros(2, 9)}, r"gradient must have shape \(2, 10\), torch.float32, cpu; got \(2, 9\)"),
        ({"gradient": torch.zeros(2, 10).double()}, "gradient must have .*; got .*float64"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    given = {"theta": torch.zeros(2, 10), "gradient": torch.zeros(2, 10), "segments": [WEIGHT]}
    with pytest.raises(ValueError, match=message):
        Muon(**{**given, **settings})


def test_other_refusals() -> None:
    theta, gradient = torch.zeros(2, 10), torch.zeros(2, 10)
    with pytest.raises(TypeError, match=r"theta must be float32 or float64; got torch.bfloat16"):
        AdamW(theta.bfloat16(), gradient.bfloat16())
    with pytest.raises(TypeError, match="lr must be a number, or one for each run; got 'fast'"):
        AdamW(theta, gradient, lr="fast")
    optimizer = AdamW(theta, gradient)
    for runs in ([2], [0, -1]):
        with pytest.raises(ValueError, match=r"runs must lie in 0..1; got"):
            optimizer.keep(runs, theta[: len(runs)], gradient[: len(runs)])
    with pytest.raises(ValueError, match=r"theta must have shape \(1, 10\)"):
        optimizer.keep([1], theta, gradient)
    with pytest.raises(ValueError, match="state must hold count, exp_avg, exp_avg_sq; got count, momentum_buffer"):
        optimizer.load_state_dict(0, SGD(theta, gradient).state_dict(0))
    with pytest.raises(ValueError, match=r"state: exp_avg must have shape \(10,\); got \(9,\)"):
        optimizer.load_state_dict(0, AdamW(theta[:, 1:], gradient[:, 1:]).state_dict(0))


def test_the_matrices_of_a_fused_projection_are_three() -> None:
    size = sum(s.length for s in segments_of(LAYER))
    apart = select_segments(LAYER, "*.?_proj_weight", "*out_proj.weight", "linear?.weight")
    assert len(apart) == len(MATRICES) + 2
    gradient, thetas = torch.randn(1, size), torch.zeros(2, 1, size)
    for theta, segments in zip(thetas, (MATRICES, apart), strict=True):
        Muon(theta, gradient, segments, lr=1.0).step()
    assert torch.equal(*thetas)
