"""rotate and rotate_: bitwise their definition, over tails, tiles and segments."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, UNIT, define, disjoint_spans, gamma, numbers, run, sample_inputs
from torch import Tensor

from grokcurv import ops, reference

SIZES = (1, 7, 8, 9, 15, 16, 17, 300, 5001)
COUNTS = ((1, 1), (3, 2), (7, 7), (9, 8), (20, 13), (48, 16), (131, 71))
"""(m, q): below, at and above the tiles of every instruction set."""


def assert_is_definition(op: str, inputs: dict[str, Tensor]) -> None:
    for got, wanted in zip(run(op, inputs), define(op, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ["rotate", "rotate_"])
def test_samples(op: str, generator: torch.Generator) -> None:
    for inputs in sample_inputs(op, generator):
        assert_is_definition(op, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_blocks(dtype: torch.dtype, size: int, generator: torch.Generator) -> None:
    rows, coefficients = numbers((6, size), dtype, generator), numbers((4, 5, 6), torch.float64, generator)
    inputs = {"rows": rows, "coefficients": coefficients, "segments": disjoint_spans(size, generator)}
    assert_is_definition("rotate", inputs)
    mean, weights = numbers((size,), torch.float64, generator), numbers((6,), torch.float64, generator)
    assert_is_definition("rotate_", {**inputs, "mean": mean, "weights": weights})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "q"), COUNTS)
def test_counts_around_tiles(dtype: torch.dtype, m: int, q: int, generator: torch.Generator) -> None:
    inputs = {"rows": numbers((m, 203), dtype, generator), "coefficients": numbers((1, q, m), torch.float64, generator)}
    assert_is_definition("rotate", inputs)
    assert_is_definition("rotate_", inputs)


def test_definition_is_a_matrix_product(generator: torch.Generator) -> None:
    rows, coefficients = numbers((20, 500), torch.float64, generator), numbers((1, 6, 20), torch.float64, generator)
    result, product = ops.rotate(rows, coefficients), coefficients[0] @ rows
    assert ((result - product).abs() <= 2 * gamma(21) * (coefficients[0].abs() @ rows.abs())).all()


def test_an_orthogonal_rotation_and_its_inverse(generator: torch.Generator) -> None:
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q[None].contiguous()
    rows = torch.randn(12, 1001, generator=generator, dtype=torch.float64)
    before = rows.clone()
    ops.rotate_(ops.rotate_(rows, q), q.mT.contiguous())
    assert (rows - before).norm() <= 200 * 12 * UNIT * before.norm()


def test_mean_of_the_old_rows(generator: torch.Generator) -> None:
    rows = torch.randint(-99, 100, (5, 33), generator=generator).float()
    mean = torch.zeros(33, dtype=torch.float64)
    expected = rows.double().sum(0)
    zero = torch.zeros((1, 5, 5), dtype=torch.float64)
    ops.rotate_(rows, zero, mean=mean, weights=torch.ones(5, dtype=torch.float64))
    assert torch.equal(mean, expected)
    assert not rows.any()


def test_outside_of_the_segments(generator: torch.Generator) -> None:
    rows, segments = numbers((4, 50), torch.float32, generator), torch.tensor([[30, 7], [5, 10]])
    rows[:, 40] = torch.nan
    coefficients = numbers((2, 3, 4), torch.float64, generator)
    outside = torch.ones(50, dtype=torch.bool)
    outside[30:37], outside[5:15] = False, False
    assert not ops.rotate(rows, coefficients, segments=segments)[:, outside].any()
    copy, mean = rows.clone(), torch.zeros(50, dtype=torch.float64)
    weights = torch.ones(4, dtype=torch.float64)
    ops.rotate_(copy, coefficients, segments=segments, mean=mean, weights=weights)
    torch.testing.assert_close(copy[:, outside], rows[:, outside], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(copy[3].nan_to_num(), rows[3].nan_to_num())
    assert not mean[outside].any()
    assert mean[~outside].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_times_0_are_nan(dtype: torch.dtype, value: float) -> None:
    rows = torch.ones(3, 20, dtype=dtype)
    rows[2, 18] = value
    coefficients = torch.tensor([[[1.0, 1, 0], [1, 1, 1]]], dtype=torch.float64)
    result = ops.rotate(rows, coefficients)
    assert result[0, 18].isnan()
    torch.testing.assert_close(result[1, 18].item(), value, equal_nan=True)
    assert torch.equal(result[:, :18], torch.tensor([[2.0], [3.0]], dtype=result.dtype).expand(2, 18))


@pytest.mark.parametrize(("m", "q", "size"), [(0, 0, 5), (3, 0, 5), (3, 2, 0)])
def test_little_to_combine(m: int, q: int, size: int) -> None:
    rows, coefficients = torch.ones(m, size), torch.ones((1, q, m), dtype=torch.float64)
    assert ops.rotate(rows, coefficients).shape == (q, size)
    assert torch.equal(ops.rotate_(rows.clone(), coefficients)[q:], rows[q:])


def test_no_rows_make_zeros() -> None:
    assert torch.equal(ops.rotate(torch.ones(0, 5), torch.ones((1, 2, 0), dtype=torch.float64)), torch.zeros(2, 5))


def test_no_segments_make_zeros() -> None:
    none = torch.zeros((0, 2), dtype=torch.int64)
    rows, coefficients = torch.ones(3, 5), torch.ones((0, 2, 3), dtype=torch.float64)
    assert torch.equal(ops.rotate(rows, coefficients, segments=none), torch.zeros(2, 5))
    assert torch.equal(reference.rotate(rows, coefficients, segments=none), torch.zeros(2, 5))
    assert torch.equal(ops.rotate_(rows, coefficients, segments=none), torch.ones(3, 5))
