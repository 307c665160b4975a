"""subspace_split and subspace_filter_ against their definitions and their algebra."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, OWNERS, basis, gamma, numbers, on_basis, orthonormal_basis, sample_inputs
from torch import Tensor

from grokcurv import ops, reference

SIZES = (4, 7, 8, 9, 4095, 4096, 4097, 10_001)


def assert_split(v: Tensor, values: Tensor, rows: Tensor) -> None:
    norm2, coefficients = ops.subspace_split(v, values, rows)
    wanted_norm2, wanted = reference.subspace_split(v, values, rows)
    bound = 2 * gamma(v.shape[1])
    assert ((norm2 - wanted_norm2).abs() <= bound * wanted_norm2).all()
    magnitude = on_basis(v.double().abs(), reference.dense_basis(values, rows, v.shape[1]).abs())
    assert ((coefficients - wanted).abs() <= bound * magnitude).all()


def test_split_samples(generator: torch.Generator) -> None:
    for inputs in sample_inputs("subspace_split", generator):
        assert_split(**inputs)


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_split_sizes_around_chunks(
    dtype: torch.dtype, size: int, owners: tuple[int, ...], generator: torch.Generator
) -> None:
    assert_split(numbers((3, size), dtype, generator), **basis(7, size, dtype, generator, owners))


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_filter(
    dtype: torch.dtype, size: int, strength: float, owners: tuple[int, ...], generator: torch.Generator
) -> None:
    """Float64 arithmetic, then one rounding, which two nearby numbers may take to neighbours: half an ulp each."""
    g, space = numbers((3, size), dtype, generator), orthonormal_basis(size, dtype, generator, owners)
    wanted = reference.subspace_filter(g, **space, strength=strength).double()
    dense = reference.dense_basis(**space, size=size).abs()
    x = g.double().abs()
    terms = (1 - strength) * x + strength * on_basis(on_basis(x, dense), dense.mT)
    bound = 2 * gamma(size + 8) * terms + torch.finfo(dtype).eps * wanted.abs()
    assert ((ops.subspace_filter_(g, **space, strength=strength).double() - wanted).abs() <= bound).all()


def test_filter_with_strength_0_keeps_the_bits(generator: torch.Generator) -> None:
    g, space = numbers((2, 5001), torch.float32, generator), orthonormal_basis(5001, torch.float32, generator)
    before = g.clone()
    ops.subspace_filter_(g, **space, strength=0.0)
    assert torch.equal(g, before)


def test_filter_with_strength_1_is_a_projection(generator: torch.Generator) -> None:
    """Its second application changes nothing but by rounding, and what it removed is orthogonal to the basis."""
    size = 5001
    g, space = (
        torch.randn(2, size, generator=generator, dtype=torch.float64),
        orthonormal_basis(size, torch.float64, generator),
    )
    before = g.clone()
    once = ops.subspace_filter_(g, **space, strength=1.0).clone()
    twice = ops.subspace_filter_(g, **space, strength=1.0)
    tolerance = 20 * gamma(size) * before.norm()
    assert (once - twice).abs().max() <= tolerance
    assert ops.subspace_split(before - once, **space)[1].abs().max() <= tolerance


def test_no_rows(generator: torch.Generator) -> None:
    g = numbers((2, 100), torch.float32, generator)
    none = {"values": torch.zeros(0), "rows": torch.zeros((0, 3), dtype=torch.int64)}
    norm2, coefficients = ops.subspace_split(g, **none)
    assert coefficients.shape == (2, 0)
    assert torch.allclose(norm2, g.double().square().sum(-1), rtol=1e-14)
    assert torch.equal(ops.subspace_filter_(g.clone(), **none, strength=0.75), 0.25 * g)


def test_nan_stays_in_its_vector_and_outside_a_basis_that_misses_it(generator: torch.Generator) -> None:
    v = numbers((3, 5000), torch.float32, generator)
    values, rows = torch.ones(10), torch.tensor([[0, 10, 0], [4990, 10, 0]])
    clean = ops.subspace_split(v, values, rows)
    v[1, 4995] = torch.nan
    norm2, coefficients = ops.subspace_split(v, values, rows)
    assert norm2.isnan().tolist() == [False, True, False]
    assert coefficients.isnan().tolist() == [[False, False], [False, True], [False, False]]
    assert torch.equal(coefficients[1, 0], clean[1][1, 0])
