"""Operators seen, widened, shaken and given draws of their own on their way to the kernels."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grokcurv.intercept import SHAKEN, PrivateDraws, Seen, Widened, shake_, unseen


def wide(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 30, (), generator=generator))


# -------------------------------------------------------------------------------------------------------------- widened

LOWERED = {
    "float": lambda x: x.float() * 3,
    "half and back": lambda x: x.half().sin().double(),
    "to another's": lambda x: x.to(torch.ones(1)),
    "softmax": lambda x: x.softmax(-1, dtype=torch.float32),
    "log_softmax": lambda x: functional.log_softmax(x, -1, dtype=torch.bfloat16),
    "sum": lambda x: x.sum(1, dtype=torch.float32),
    "cumsum": lambda x: x.cumsum(1, dtype=torch.float32),
    "factories": lambda x: x * torch.full((5,), 1 / 3) + torch.arange(5) / 7 + torch.linspace(0, 1, 5),
    "like": lambda x: x + torch.ones_like(x, dtype=torch.float32) / 3,
    "new": lambda x: x + x.new_full((5,), 1 / 3, dtype=torch.float16),
    "literals": lambda x: x @ torch.tensor([0.5, 0.25, 0.1, 3.0, 1.0]),
    "in place": lambda x: torch.zeros(4, 5).add_(x),
    "into a part": lambda x: torch.zeros(6, 5).index_copy(0, torch.arange(4), x.float()),
    "whole numbers": lambda x: x * (x > 0).float() + torch.arange(5).float(),
    "division of whole numbers": lambda x: x * (torch.arange(1, 6) / torch.tensor(7)),
    "one hot": lambda x: functional.one_hot(torch.arange(5)).float() @ x.T,
    "joined": lambda x: torch.cat([x, torch.ones(1, 5)]),
    "chosen": lambda x: torch.where(x > 0, x.float(), torch.zeros(())),
    "matrix product": lambda x: x.float() @ torch.ones(5, 2),
    "attention": lambda x: functional.scaled_dot_product_attention(*[x.float()[None, None]] * 3),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x.bfloat16(), x.bfloat16()),
    "linear": lambda x: functional.linear(x, torch.ones(2, 5), torch.zeros(2)),
    "autocast": lambda x: _autocast(x),
}
"""Literals are rounded before anybody sees them: those here have few digits."""

ROUNDED = ("factories", "new", "division of whole numbers")
"""Where a float is made of whole numbers, that is done in the model's own precision, and widened."""


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return functional.linear(x.float(), torch.ones(2, 5))


@pytest.mark.parametrize("kind", LOWERED)
def test_fewer_bits_are_lifted(kind, generator):
    """As if the default type were float64, and every type that is asked for too."""
    x = wide(4, 5, generator=generator)
    with Widened(torch.float32) as mode:
        got = LOWERED[kind](x)
    assert got.dtype == torch.float64
    assert mode.lifted
    assert not mode.remained
    rtol, atol = (1e-6, 1e-6) if kind in ROUNDED else (1e-12, 1e-14)
    torch.testing.assert_close(got, _exact(kind, x), rtol=rtol, atol=atol)


def _exact(kind: str, x: Tensor) -> Tensor:
    whole = torch.arange(5, dtype=torch.float64)
    return {
        "float": lambda: x * 3,
        "half and back": x.sin,
        "to another's": lambda: x,
        "softmax": lambda: x.softmax(-1),
        "log_softmax": lambda: x.log_softmax(-1),
        "sum": lambda: x.sum(1),
        "cumsum": lambda: x.cumsum(1),
        "factories": lambda: x + whole * 0 + x * (1 / 3 - 1) + whole / 7 + whole / 4,
        "like": lambda: x + 1 / 3,
        "new": lambda: x + 1 / 3,
        "literals": lambda: x @ torch.tensor([0.5, 0.25, 0.1, 3.0, 1.0]).double(),
        "in place": lambda: x,
        "into a part": lambda: torch.cat([x, x.new_zeros(2, 5)]),
        "whole numbers": lambda: x.clamp(min=0) + whole,
        "division of whole numbers": lambda: x * ((whole + 1) / 7),
        "one hot": lambda: x.T,
        "joined": lambda: torch.cat([x, x.new_ones(1, 5)]),
        "chosen": lambda: x.clamp(min=0),
        "matrix product": lambda: x @ x.new_ones(5, 2),
        "attention": lambda: ((x @ x.T) / math.sqrt(5)).softmax(-1)[None, None] @ x,
        "einsum": lambda: x @ x.T,
        "linear": lambda: x @ x.new_ones(5, 2),
        "autocast": lambda: x @ x.new_ones(5, 2),
    }[kind]()


def test_what_is_in_float64_is_left_alone(generator):
    model, x = nn.Linear(5, 2).double(), wide(3, 5, generator=generator)
    with Widened(torch.float32) as mode:
        got = model(x).tanh().sum()
    assert torch.equal(got, model(x).tanh().sum())
    assert not mode.lifted | mode.remained


def test_what_cannot_be_lifted_is_said(generator):
    """A reinterpretation of bits, and what is written to memory of fewer bits."""
    x, narrow = wide(4, generator=generator), torch.zeros(4)
    with Widened(torch.float32) as mode:
        narrow.copy_(x)
    assert mode.remained == {"copy_"}
    assert narrow.dtype == torch.float32


def test_derivatives_are_those_of_float64(generator):
    """Once and twice, though the model rounds on its way."""
    x = wide(3, 4, generator=generator).requires_grad_()

    def through(x: Tensor) -> Tensor:
        return (torch.tanh(x.float()).bfloat16() * torch.sigmoid(x.half())).float().pow(2).sum()

    def exact(x: Tensor) -> Tensor:
        return (torch.tanh(x) * torch.sigmoid(x)).pow(2).sum()

    results = []
    for function, mode in ((through, Widened(torch.float32)), (exact, Widened(torch.float32))):
        with mode:
            (first,) = torch.autograd.grad(function(x), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((first.detach(), second))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_vmap_of_gradients(generator):
    points, x = wide(3, 4, generator=generator), wide(4, generator=generator)

    def loss(theta: Tensor) -> Tensor:
        return (theta.float() * x).tanh().sum() * torch.full((), 0.5)

    with Widened(torch.float32) as mode:
        got = torch.func.vmap(torch.func.grad(loss))(points)
    assert got.dtype == torch.float64
    assert not mode.remained
    torch.testing.assert_close(got, 0.5 * x * (1.0 - (points * x).tanh().square()), rtol=1e-12, atol=1e-15)


DRAWS = {
    "rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "default rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.4)),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.4),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 2),
    "normal_": lambda x: x.clone().normal_(1.0, 0.5),
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "normal": lambda x: torch.normal(torch.zeros_like(x), 2.0),
    "randperm": lambda x: torch.randperm(7),
    "randint": lambda x: torch.randint(9, x.shape),
    "multinomial": lambda x: torch.multinomial(torch.ones_like(x), 3),
    "own generator": lambda x: torch.rand(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3)),
    "dropout of ones": lambda x: functional.dropout(torch.ones_like(x), 0.5),
    "alpha dropout of ones": lambda x: functional.alpha_dropout(torch.ones_like(x), 0.5, training=True),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_those_of_the_narrow_evaluation(kind, generator):
    start, x = seed(generator), wide(4, 5, generator=generator)
    torch.manual_seed(start)
    narrow = DRAWS[kind](x.float())
    after = torch.get_rng_state()
    torch.manual_seed(start)
    with Widened(torch.float32):
        got = DRAWS[kind](x)
    assert got.dtype == (torch.float64 if narrow.is_floating_point() else narrow.dtype)
    torch.testing.assert_close(got, narrow.to(got.dtype), rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_keeps_float64_s_digits(p, generator):
    start, x = seed(generator), wide(6, 5, generator=generator).requires_grad_()
    torch.manual_seed(start)
    mask = functional.dropout(torch.ones(6, 5), p) != 0
    torch.manual_seed(start)
    with Widened(torch.float32):
        got = functional.dropout(x, p)
        got.sum().backward()
    scale = mask.double() / (1.0 - p) if p < 1.0 else torch.zeros(6, 5, dtype=torch.float64)
    torch.testing.assert_close(got, x * scale, rtol=1e-15, atol=0)
    torch.testing.assert_close(x.grad, scale, rtol=1e-15, atol=0)


# --------------------------------------------------------------------------------------------------------------- shaken


def test_shaking_is_rounding_s_size_and_repeatable(generator):
    x, start = wide(50, 50, generator=generator), seed(generator)
    found = []
    for _ in range(2):
        with Widened(torch.float32, torch.Generator().manual_seed(start)):
            found.append(x.exp())
    assert torch.equal(found[0], found[1])
    relative = (found[0] / x.exp() - 1).abs().max()
    assert torch.finfo(torch.float64).eps < relative < 4 * torch.finfo(torch.float64).eps


def test_factors_are_as_likely_as_those_of_a_uniform_number(generator):
    """Eight random bits choose among seven factors as a number of 53 bits, rounded, does."""
    eps = torch.finfo(torch.float64).eps
    every = (torch.arange(256, dtype=torch.float64) - 127.5) * (SHAKEN / 256.0 * eps)
    factors, weights = (1.0 + every).unique(return_counts=True)
    assert [float(x - 1.0) / eps for x in factors] == [-2.0, -1.5, -1.0, -0.5, 0.0, 1.0, 2.0]
    # Of [-2, 2] eps what is nearest to each of them, in 256ths: half as wide below one, where numbers are denser.
    assert weights.tolist() == [16, 32, 32, 32, 48, 64, 32]
    n = 1 << 20
    found = shake_(torch.ones(1, n, dtype=torch.float64).T, generator)
    assert found.shape == (n, 1)
    counts = torch.stack([(found == x).sum() for x in factors])
    assert counts.sum() == n
    expected = weights / 256.0 * n
    assert ((counts - expected).square() / expected).sum() < 40.0  # chi square of six degrees: one time in 2 million
    halves = found.view(-1, 8)[:, :7] != found.view(-1, 8)[:, 1:]  # neighbours of one draw are independent
    assert abs(halves.double().mean() - (1.0 - (weights / 256.0).square().sum())) < 0.004
    for shape in ((), (0,), (3, 5)):
        assert shake_(torch.ones(shape, dtype=torch.float64), generator).shape == shape


def test_arguments_and_views_are_not_shaken(generator):
    x = wide(6, 4, generator=generator)
    before = x.clone()
    with Widened(torch.float32, torch.Generator().manual_seed(0)):
        view = x.view(-1)[3:9].reshape(2, 3).T
        x.sin()
    assert torch.equal(x, before)
    assert torch.equal(view, before.view(-1)[3:9].reshape(2, 3).T)


@pytest.mark.parametrize("margin", [10.0, 25.0, 32.0, 40.0])
@pytest.mark.parametrize("spelled", ["cross_entropy", "log_softmax", "softmax", "logsumexp"])
def test_shaking_reveals_what_a_certain_class_has_lost(spelled, margin, generator):
    """p - 1 is a difference of nearly equal numbers, also where one kernel does it all."""
    logits = wide(3, 4, generator=generator)
    logits[:, 0] = logits[:, 1:].amax(1) + margin
    y = torch.zeros(3, dtype=torch.long)

    def gradient(shake: torch.Generator | None) -> Tensor:
        x = logits.clone().requires_grad_()
        with Widened(torch.float32, shake):
            if spelled == "cross_entropy":
                loss = functional.cross_entropy(x, y)
            elif spelled == "log_softmax":
                loss = functional.nll_loss(x.log_softmax(-1), y)
            elif spelled == "softmax":
                loss = functional.nll_loss(x.softmax(-1).log(), y)
            else:
                loss = (x.logsumexp(-1) - x[:, 0]).mean()
            loss.backward()
        return x.grad

    x = logits.clone().requires_grad_()
    torch.log1p((x[:, 1:] - x[:, :1]).exp().sum(1)).mean().backward()
    error = (gradient(None) - x.grad).norm()
    moved = max((gradient(torch.Generator().manual_seed(seed(generator))) - gradient(None)).norm() for _ in range(3))
    assert error <= 10.0 * moved  # what is lost shows
    assert moved <= 1e-13  # and it is rounding that shows: of numbers of the size of one


# -------------------------------------------------------------------------------------------------------- seen, private


def test_seen_names_what_meets_floats(generator):
    x = wide(3, 3, generator=generator)
    with Seen() as seen:
        torch.arange(3) + 1
        x.clone().mul_(2).relu()
    assert seen.names >= {"clone", "mul", "relu"}
    assert "arange" not in seen.names
    assert "add" not in seen.names
    assert not seen.draws


@pytest.mark.parametrize("draw", ["global", "own", "dropout"])
def test_seen_tells_draws_from_torch_s_own_generator(draw):
    own = torch.Generator().manual_seed(0)
    with Seen() as seen:
        if draw == "dropout":
            functional.dropout(torch.ones(3), 0.5)
        else:
            torch.rand(3, generator=own if draw == "own" else None)
    assert seen.draws == (draw != "own")


def test_seen_in_the_backward_pass():
    x = torch.ones(3).requires_grad_()
    with Seen() as seen:
        x.tanh().sum().backward()
    assert "tanh_backward" in seen.names


def test_unseen(generator):
    x = wide(3, generator=generator)
    with Widened(torch.float32) as mode:
        with unseen():
            assert x.float().dtype == torch.float32
            with unseen():
                pass
            assert x.float().dtype == torch.float32
        assert x.float().dtype == torch.float64
    assert mode.lifted == {"_to_copy"}


def test_private_draws(generator):
    """Seeded there, and nobody else's generator moves."""
    start = seed(generator)
    before, python = torch.get_rng_state(), random.getstate()

    def draws() -> list[Tensor]:
        own = torch.Generator().manual_seed(7)
        return [
            torch.rand(3),
            torch.randn(2, 2),
            torch.randint(9, (4,)),
            torch.randperm(5),
            torch.empty(3).normal_(),
            torch.bernoulli(torch.full((5,), 0.5)),
            torch.multinomial(torch.ones(5), 2),
            torch.rand(2, generator=own),
        ]

    found = []
    for value in (start, start, start + 1):
        with PrivateDraws(value):
            found.append(draws())
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][-1], torch.rand(2, generator=torch.Generator().manual_seed(7)))


def test_private_draws_take_turns():
    """One generator for all that is drawn inside."""
    with PrivateDraws(3):
        first, second = torch.rand(4), torch.rand(4)
    expected = torch.Generator().manual_seed(3)
    assert torch.equal(first, torch.rand(4, generator=expected))
    assert torch.equal(second, torch.rand(4, generator=expected))
