"""The commutator op: sums, coefficients, energies and delta against their definition."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, OWNERS, basis, gamma, gradients, numbers, on_basis, sample_inputs, spans
from torch import Tensor

from grokcurv import ops, reference
from grokcurv.reference import SUMS, THETA_SUMS

FLOAT64 = torch.float64
SIZES = (1, 7, 8, 9, 4095, 4096, 4097, 10_001)


def assert_equals_definition(**inputs: Tensor) -> None:
    """delta to the bit: its coordinates are computed alike. Sums of P numbers in two orders: within 2 gamma(P + 1)."""
    result = ops.commutator(**inputs)
    expected = reference.commutator(**inputs)
    bound = 2 * gamma(inputs["g_a"].shape[1] + 1)
    assert torch.equal(result.delta, expected.delta)

    magnitudes = expected.sums.clone()  # all are sums of squares but one
    magnitudes[:, SUMS.index("ab")] = (inputs["g_a"].double() * inputs["g_b"].double()).abs().sum(-1)
    assert_within(result.sums, expected.sums, bound * magnitudes)
    assert_within(result.energies, expected.energies, bound * expected.energies)
    if inputs.get("values") is not None:
        delta = reference.commutator(**{**inputs, "keep_delta": True}).delta.double().abs() * (1 + 2**-23)
        dense = reference.dense_basis(inputs["values"], inputs["rows"], delta.shape[1])
        assert_within(result.coefficients, expected.coefficients, bound * on_basis(delta, dense.abs()))


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    assert ((got - wanted).abs() <= bound).all(), ((got - wanted).abs() / bound).max()


def test_samples(generator: torch.Generator) -> None:
    for inputs in sample_inputs("commutator", generator):
        assert_equals_definition(**inputs)


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_around_chunks(
    dtype: torch.dtype, size: int, owners: tuple[int, ...], generator: torch.Generator
) -> None:
    inputs = gradients(3, size, dtype, generator)
    options = {
        **basis(7, size, dtype, generator, owners),
        "segments": spans(6, size, generator),
        "theta": numbers((*owners, size), dtype, generator),
        "keep_delta": True,
    }
    assert_equals_definition(**inputs, **options)
    del options["theta"]
    assert_equals_definition(**inputs, **options, form="bracket")


def test_whole_numbers_give_exact_sums(generator: torch.Generator) -> None:
    """Small integers and eta a power of two: nothing rounds, so every sum is known exactly, in Python's integers."""
    size, eta = 9001, 0.5
    g_a, g_b, a2, b2 = (torch.randint(-9, 10, (1, size), generator=generator) for _ in range(4))
    delta = (a2 - g_a) - (b2 - g_b)
    inputs = {"g_a": g_a.float(), "g_b": g_b.float(), "a2": a2.float(), "b2": b2.float()}
    vectors = [(g_a, g_a), (g_b, g_b), (g_a, g_b), (delta, delta), (a2 - g_a, a2 - g_a), (b2 - g_b, b2 - g_b)]
    expected = [sum(int(x) * int(y) for x, y in zip(u[0], v[0], strict=True)) for u, v in vectors]
    expected[SUMS.index("dd")] *= eta**2

    segments = torch.tensor([[0, size], [4000, 200], [5, 0]])
    result = ops.commutator(**inputs, eta=torch.tensor([eta], dtype=FLOAT64), segments=segments)
    assert result.sums[0].tolist() == expected
    energies = [eta**2 * int(delta[0, start : start + length].square().sum()) for start, length in segments.tolist()]
    assert result.energies[0].tolist() == energies


def test_sums_against_exact_summation(generator: torch.Generator) -> None:
    """The bound of the kernel's own order: chunk / 8 additions in a lane, 3 to fold the lanes, one a chunk."""
    size = 3 * 4096 + 5
    inputs = gradients(1, size, torch.float32, generator)
    g_a, g_b = inputs["g_a"][0].double(), inputs["g_b"][0].double()
    result = ops.commutator(**inputs).sums[0]
    bound = gamma(4096 // 8 + 3 + 4)  # products of float32 numbers are exact in float64
    for name, x, y in (("aa", g_a, g_a), ("bb", g_b, g_b), ("ab", g_a, g_b)):
        exact = math.fsum((x * y).tolist())
        assert abs(result[SUMS.index(name)].item() - exact) <= bound * math.fsum((x * y).abs().tolist())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_terms_are_those_of_torch(dtype: torch.dtype, generator: torch.Generator) -> None:
    """`rr` and `re` are what the direct formula gives when PyTorch evaluates it in the dtype of the vectors."""
    eta, size = 1e-3, 2001
    inputs = gradients(1, size, dtype, generator)
    theta = numbers((size,), dtype, generator)
    g_a, g_b, a2, b2 = (inputs[name][0] for name in ("g_a", "g_b", "a2", "b2"))
    r = ((theta - eta * g_a) - eta * b2) - ((theta - eta * g_b) - eta * a2)

    inputs["eta"] = torch.tensor([eta], dtype=FLOAT64)
    result = ops.commutator(**inputs, theta=theta, keep_delta=True)
    sums = dict(zip(SUMS + THETA_SUMS, result.sums[0], strict=True))
    step = torch.tensor(eta, dtype=FLOAT64)
    delta = step * ((a2.double() - g_a.double()) - (b2.double() - g_b.double()))
    assert_within(sums["rr"], r.double().square().sum(), 2 * gamma(size + 1) * sums["rr"])
    assert_within(sums["re"], (r.double() - delta).square().sum(), 2 * gamma(size + 1) * sums["re"])

    stored = ops.perturb(theta, inputs["g_a"], inputs["eta"])[0].double()
    q_a = stored - (theta.double() - step * g_a.double())
    assert_within(sums["qa"], q_a.square().sum(), 2 * gamma(size + 1) * sums["qa"])
    assert (sums["qa"] > 0) == (dtype != FLOAT64)


def test_no_cancellation_where_the_direct_formula_drowns(generator: torch.Generator) -> None:
    """delta of order 1e-10 beside theta of order 1: the direct float32 formula gives mere rounding.

    A coordinate is then off by a unit in the last place u with probability |delta| / u, so |r - delta|^2 is some
    hundred times |delta|^2 on average, with a relative scatter of a seventh for this many coordinates.
    """
    size = 65537
    small = torch.randn(2, size, generator=generator, dtype=FLOAT64) * 1e-7
    g = torch.randn(2, size, generator=generator, dtype=FLOAT64) * 1e-2
    g_a, g_b, a2, b2 = (x[None].float() for x in (g[0], g[1], g[0] + small[0], g[1] + small[1]))
    eta = torch.tensor([1e-3], dtype=FLOAT64)
    exact = eta * ((a2.double() - g_a.double()) - (b2.double() - g_b.double()))
    theta = torch.randn(size, generator=generator)
    result = ops.commutator(g_a, g_b, a2, b2, eta, theta=theta)
    assert math.isclose(result.sums[0, SUMS.index("dd")].item(), exact.square().sum().item(), rel_tol=1e-12)
    assert result.sums[0, len(SUMS) + THETA_SUMS.index("re")] > 20 * exact.square().sum()


def test_segments_share_out_the_energy(generator: torch.Generator) -> None:
    size = 12_345
    cuts = torch.tensor([0, 1, 4096, 4100, 9999, size])
    segments = torch.stack([cuts[:-1], cuts.diff()], dim=1)
    result = ops.commutator(**gradients(2, size, torch.float32, generator), segments=segments)
    total = result.sums[:, SUMS.index("dd")]
    assert_within(result.energies.sum(-1), total, 2 * gamma(size) * total)


def test_coordinate_vectors_read_delta_off(generator: torch.Generator) -> None:
    size, places = 9000, torch.tensor([0, 4095, 4096, 8999])
    rows = torch.stack([places, torch.ones_like(places), torch.zeros_like(places)], dim=1)
    inputs = gradients(2, size, FLOAT64, generator)
    result = ops.commutator(**inputs, values=torch.ones(1, dtype=FLOAT64), rows=rows, keep_delta=True)
    assert torch.equal(result.coefficients, result.delta[:, places])


def test_a_basis_row_may_be_dense(generator: torch.Generator) -> None:
    """A row stored on all coordinates gives what the same row gives when only its support is stored."""
    size, start, length = 9001, 3000, 2500
    inputs = gradients(2, size, FLOAT64, generator)
    block = numbers((length,), FLOAT64, generator)
    dense = torch.zeros(size, dtype=FLOAT64)
    dense[start : start + length] = block
    sparse = ops.commutator(**inputs, values=block, rows=torch.tensor([[start, length, 0]]), keep_delta=True)
    full = ops.commutator(**inputs, values=dense, rows=torch.tensor([[0, size, 0]]))
    magnitude = sparse.delta.abs() @ dense.abs()
    assert_within(sparse.coefficients[:, 0], full.coefficients[:, 0], 2 * gamma(length) * magnitude)


def test_without_keep_delta_none_is_made(generator: torch.Generator) -> None:
    assert ops.commutator(**gradients(2, 9, torch.float32, generator)).delta.numel() == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_bad_vector_harms_no_other(poison: float, generator: torch.Generator) -> None:
    inputs = gradients(3, 5000, torch.float32, generator)
    clean = ops.commutator(**inputs)
    inputs["a2"][1, 4999] = poison
    result = ops.commutator(**inputs)
    assert torch.equal(result.sums[[0, 2]], clean.sums[[0, 2]])
    assert not result.sums[1, [SUMS.index("dd"), SUMS.index("ha")]].isfinite().any()
    assert torch.equal(result.sums[1, :3], clean.sums[1, :3])  # g_a and g_b are untouched


def test_nan_in_one_theta_or_basis_harms_no_other(generator: torch.Generator) -> None:
    """And of its own vector no more than is worked out from it."""
    inputs = gradients(3, 5000, torch.float32, generator)
    options = {"theta": numbers((3, 5000), torch.float32, generator), **basis(4, 5000, torch.float32, generator, (3,))}
    clean = ops.commutator(**inputs, **options)
    for name in ("theta", "values"):
        options[name] = options[name].clone()
        options[name][1] = torch.nan
    result = ops.commutator(**inputs, **options)
    bad = torch.zeros(10, dtype=torch.bool)
    bad[len(SUMS) :] = True
    assert torch.equal(result.sums[[0, 2]], clean.sums[[0, 2]])
    assert torch.equal(result.sums[1].isnan(), bad)
    assert torch.equal(result.sums[1, ~bad], clean.sums[1, ~bad])
    assert torch.equal(result.coefficients[[0, 2]], clean.coefficients[[0, 2]])
    assert torch.equal(result.coefficients[1].isnan(), options["rows"][:, 1] > 0)
