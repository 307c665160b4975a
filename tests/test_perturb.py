"""perturb: theta - eta_i d_i, to the bit."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, OWNERS, numbers, sample_inputs, step_sizes

from grokcurv import ops, reference

SIZES = (1, 7, 8, 9, 4095, 4096, 4097, 10_001)


def test_equals_its_definition(generator: torch.Generator) -> None:
    for inputs in sample_inputs("perturb", generator):
        assert torch.equal(ops.perturb(**inputs), reference.perturb(**inputs))


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_chunks(
    dtype: torch.dtype, size: int, owners: tuple[int, ...], generator: torch.Generator
) -> None:
    theta, directions = numbers((*owners, size), dtype, generator), numbers((3, size), dtype, generator)
    eta, out = step_sizes(3, generator), torch.empty_like(directions)
    ops.perturb(theta, directions, eta, out=out)
    assert torch.equal(out, reference.perturb(theta, directions, eta))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_expression_in_torch(dtype: torch.dtype, generator: torch.Generator) -> None:
    """So a probe stores the very parameters that `theta - eta * g` would give."""
    theta, directions = numbers((2, 1001), dtype, generator), numbers((2, 1001), dtype, generator)
    eta = torch.tensor([1e-3, 0.3], dtype=torch.float64)
    shared, own = ops.perturb(theta[1], directions, eta), ops.perturb(theta, directions, eta)
    for i, step in enumerate(eta.tolist()):
        assert torch.equal(shared[i], theta[1] - step * directions[i])
        assert torch.equal(own[i], theta[i] - step * directions[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_infinity_and_overflow_stay_where_they_are(dtype: torch.dtype) -> None:
    inf, nan, large = torch.inf, torch.nan, torch.finfo(dtype).max
    theta = torch.tensor([1.0, nan, inf, large, 0.0, -0.0], dtype=dtype)
    directions = torch.tensor([[inf, 1.0, inf, -large, nan, 0.0]], dtype=dtype)
    expected = torch.tensor([[-inf, nan, nan, inf, nan, -0.0]], dtype=dtype)
    result = ops.perturb(theta, directions, torch.ones(1, dtype=torch.float64))
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(0.0), expected.nan_to_num(0.0))
    assert torch.signbit(result[0, -1])


def test_nan_in_one_theta_harms_no_other(generator: torch.Generator) -> None:
    theta, directions = numbers((3, 4099), torch.float32, generator), numbers((3, 4099), torch.float32, generator)
    theta[1] = torch.nan
    result = ops.perturb(theta, directions, step_sizes(3, generator))
    assert result.isnan().sum(1).tolist() == [0, 4099, 0]
