"""gram: bounds, exactness on whole numbers, and bits that depend on two rows alone."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, gamma, numbers, sample_inputs, spans
from torch import Tensor

from grokcurv import ops, reference

SIZES = (1, 7, 8, 9, 255, 256, 257, 2049, 5001, 8191, 8193)
"""Around eight lanes, a block, a slab and a range."""


def assert_equals_definition(x: Tensor, y: Tensor | None = None, **options: Tensor) -> None:
    result, expected = ops.gram(x, y, **options), reference.gram(x, y, **options)
    shift = options.get("origin", x.new_zeros(x.shape[1])).double()
    left = (x.double() - shift).abs()
    right = left if y is None else (y.double() - shift).abs()
    magnitude = reference.gram(left, right, segments=options.get("segments"))
    assert ((result - expected).abs() <= 2 * gamma(x.shape[1] + 1) * magnitude).all()


def test_samples(generator: torch.Generator) -> None:
    for inputs in sample_inputs("gram", generator):
        assert_equals_definition(**inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_blocks_and_tiles(dtype: torch.dtype, size: int, generator: torch.Generator) -> None:
    x, y = numbers((5, size), dtype, generator), numbers((9, size), dtype, generator)
    origin, segments = numbers((size,), dtype, generator), spans(4, size, generator)
    assert_equals_definition(x)
    assert_equals_definition(x, y, origin=origin, segments=segments)
    assert_equals_definition(x[:3], y, origin=origin, segments=segments)


def test_whole_numbers_are_exact(generator: torch.Generator) -> None:
    x = torch.randint(-99, 100, (7, 5003), generator=generator)
    assert torch.equal(ops.gram(x.float())[0].long(), x @ x.T)
    origin = x[3]
    centred = x - origin
    assert torch.equal(ops.gram(x.float(), origin=origin.float())[0].long(), centred @ centred.T)


def test_an_entry_depends_on_its_two_rows_alone(generator: torch.Generator) -> None:
    """So a Gram matrix grown row by row, in any blocks, is the one computed at once."""
    x, origin = numbers((11, 3001), torch.float32, generator), numbers((3001,), torch.float32, generator)
    segments = spans(3, 3001, generator)
    options = {"origin": origin, "segments": segments}
    whole = ops.gram(x, **options)
    assert torch.equal(whole, whole.mT)
    for i in range(11):
        assert torch.equal(ops.gram(x[i : i + 1], x, **options)[:, 0], whole[:, i])
    assert torch.equal(ops.gram(x[2:9], x[5:], **options), whole[:, 2:9, 5:])
    for (start, length), part in zip(segments.tolist(), whole, strict=True):
        inside = x[:, start : start + length].contiguous()
        assert torch.equal(ops.gram(inside, origin=origin[start : start + length].contiguous())[0], part)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [False, True])
def test_few_rows_and_many_are_summed_alike(dtype: torch.dtype, shift: bool, generator: torch.Generator) -> None:
    """Up to four rows are kept while the others stream; more make tiles. Over two ranges and a tail."""
    size = 2 * 8192 + 301
    x = numbers((9, size), dtype, generator)
    options = {"origin": numbers((size,), dtype, generator)} if shift else {}
    whole = ops.gram(x, **options)
    for count in range(1, 9):
        assert torch.equal(ops.gram(x[:count], **options), whole[:, :count, :count])
        assert torch.equal(ops.gram(x[:count], x, **options), whole[:, :count])
        assert torch.equal(ops.gram(x, x[-count:], **options), whole[:, :, -count:])


def test_nan_stays_in_its_row(generator: torch.Generator) -> None:
    x = numbers((6, 700), torch.float32, generator)
    x[4, 699] = torch.nan
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[4], expected[:, 4] = True, True
    assert torch.equal(ops.gram(x)[0].isnan(), expected)


@pytest.mark.parametrize(("n", "m", "size"), [(0, 3, 5), (3, 0, 5), (2, 2, 0)])
def test_nothing_to_sum(n: int, m: int, size: int) -> None:
    assert torch.equal(ops.gram(torch.ones(n, size), torch.ones(m, size)), torch.zeros(1, n, m, dtype=torch.float64))
    none = torch.zeros((0, 2), dtype=torch.int64)
    assert ops.gram(torch.ones(n, size), segments=none).shape == (0, n, n)
