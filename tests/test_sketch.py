"""sketch: its definition, its moments, and shards that add up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from cases import DTYPES, gamma, numbers

from grokcurv import ops, reference

FLOAT64 = torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("p", "size", "start"),
    [
        (1, 64, 0),
        (3, 64, 63),
        (127, 128, 1),
        (300, 1024, 5),
        (1000, 64, 2**35 + 127),
        (5003, 128, 2**40 + 77),
        (3001, 4096, 4095),
        (500, 2**20, 2**61 - 100),
    ],
)
def test_definition(dtype: torch.dtype, p: int, size: int, start: int, generator: torch.Generator) -> None:
    """Bitwise: below 65536 coordinates there is one range, whose sums take them in their order."""
    x = numbers((3, p), dtype, generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    assert torch.equal(ops.sketch(x, size, seed, start=start), reference.sketch(x, size, seed, start=start))


@pytest.mark.parametrize("start", [0, 70_001, 2**50 + 3])
def test_several_ranges_add_up(start: int, generator: torch.Generator) -> None:
    """Shards, of any length, have sketches that add up to that of the whole, by their definition up to rounding."""
    x = numbers((2, 300_000), torch.float64, generator)
    ends = [0, *torch.randint(0, 300_001, (5,), generator=generator).sort().values.tolist(), 300_000]
    shards = [ops.sketch(x[:, a:b].contiguous(), 64, 9, start=start + a) for a, b in pairwise(ends)]
    whole, parts = ops.sketch(x, 64, 9, start=start), torch.stack(shards).sum(0)
    assert ((whole - parts).abs() <= 2 * gamma(x.shape[1] // 64 + 2) * x.abs().sum(1, keepdim=True)).all()


def test_whole_numbers_are_exact(generator: torch.Generator) -> None:
    """Many ranges and shards, to the bit."""
    x = torch.randint(-99, 100, (2, 5_000_000), generator=generator).float()
    cut = 3_333_333
    first, second = x[:, :cut].contiguous(), x[:, cut:].contiguous()
    for size in (64, 4096):
        parts = ops.sketch(first, size, 1) + ops.sketch(second, size, 1, start=cut)
        assert torch.equal(ops.sketch(x, size, 1), parts)


def test_a_vector_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    x = numbers((4, 200_001), torch.float32, generator)
    together = ops.sketch(x, 128, 3, start=11)
    for i in range(4):
        assert torch.equal(ops.sketch(x[i : i + 1], 128, 3, start=11)[0], together[i])


def test_a_coordinate_goes_to_one_place_with_one_sign() -> None:
    omega = ops.sketch(torch.eye(640, dtype=FLOAT64), 64, 4)
    assert torch.equal(omega.abs().sum(1), torch.ones(640, dtype=FLOAT64))
    places = omega.abs().argmax(1).view(10, 64)
    assert torch.equal(places.sort(dim=1).values, torch.arange(64).expand(10, 64))  # no collision within a block


def test_moments() -> None:
    """Mean and variance of inner products over seeds, within five standard errors of what the proof says."""
    generator = torch.Generator().manual_seed(0)
    p, size, seeds = 500, 64, 4000
    x, y = torch.randn(2, p, generator=generator, dtype=FLOAT64)
    y = y + 0.5 * x
    z = torch.stack([ops.sketch(torch.stack([x, y]), size, seed) for seed in range(seeds)])
    error = (z[:, 0] * z[:, 1]).sum(-1) - x @ y
    square = error.square()

    block = torch.arange(p) // size
    pairs = (torch.outer(x, y) + torch.outer(y, x)).square() * (block[:, None] != block)
    expected = pairs.sum() / 2 / size
    assert expected <= ((x @ x) * (y @ y) + (x @ y) ** 2) / size
    assert error.mean().abs() <= 5 * error.std() / seeds**0.5
    assert (square.mean() - expected).abs() <= 5 * square.std() / seeds**0.5


@pytest.mark.parametrize("start", [0, 2**45])
def test_signs_and_shifts_are_uniform(start: int) -> None:
    """The sum of all signs, and the places of first coordinates of blocks."""
    p = 2**20
    signs = ops.sketch(torch.ones(1, p), 64, 2, start=start)
    assert signs.sum().abs() <= 5 * p**0.5
    firsts = torch.zeros(1, p)
    firsts[0, ::64] = 1
    squares = ops.sketch(firsts, 64, 2, start=start).square().sum() / (p / 64)  # mean 1, variance 2 / 64
    assert (squares - 1).abs() <= 5 * (2 / 64) ** 0.5


def test_seeds_differ(generator: torch.Generator) -> None:
    x = numbers((1, 100), torch.float32, generator)
    sketches = [ops.sketch(x, 64, seed) for seed in (0, 1, 2**32, 2**63 - 1)]
    assert len({tuple(z.flatten().tolist()) for z in sketches}) == 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_the_sketch(dtype: torch.dtype, value: float) -> None:
    x = torch.ones(2, 1000, dtype=dtype)
    x[1, 777] = value
    z = ops.sketch(x, 64, 8)
    assert z[0].isfinite().all()
    assert (~z[1].isfinite()).sum() == 1
    assert z[1].isnan().any() == (value != value)


@pytest.mark.parametrize(("n", "p"), [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_sketch(n: int, p: int) -> None:
    assert torch.equal(ops.sketch(torch.ones(n, p), 64, 0, start=100), torch.zeros(n, 64, dtype=FLOAT64))
