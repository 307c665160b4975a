"""eigh: residuals, orthogonality and agreement with LAPACK, by rotations and by iteration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grokcurv import ops, reference

FLOAT64 = torch.float64
JACOBI = [(1, 1), (2, 2), (3, 1), (17, 17), (40, 1), (96, 8), (129, 129)]
ITERATION = [(41, 1), (97, 8), (257, 3)]


def gram_matrices(batch: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Positive semidefinite, with the falling spectrum of a trajectory."""
    scales = torch.arange(1, rank + 1, dtype=FLOAT64).reciprocal()
    x = torch.randn(batch, n, rank, generator=generator, dtype=FLOAT64) * scales
    return x @ x.mT


def assert_leading_pairs(a: Tensor, k: int, tolerance: float) -> None:
    """|A v - w v| <= tol |A|, orthonormal vectors, eigenvalues as far from LAPACK's at most (Weyl)."""
    values, vectors = ops.eigh(a, k)
    norm = torch.linalg.matrix_norm(a, 2)
    residual = torch.linalg.vector_norm(a @ vectors - vectors * values[:, None], dim=1)
    assert (residual <= tolerance * norm[:, None]).all(), (residual / norm[:, None]).max()
    assert (vectors.mT @ vectors - torch.eye(k, dtype=FLOAT64)).abs().max() <= 1e-12
    assert ((values - reference.eigh(a, k)[0]).abs() <= tolerance * norm[:, None]).all()
    assert (values.diff() <= 0).all()
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize(("n", "k"), JACOBI)
def test_jacobi(n: int, k: int, generator: torch.Generator) -> None:
    """n sweeps' worth of rotations, each rounding a few times: 1e-13 is generous for n <= 129."""
    assert_leading_pairs(gram_matrices(3, n, n + 2, generator), k, 1e-13)
    x = torch.randn(2, n, n, generator=generator, dtype=FLOAT64)
    assert_leading_pairs(x + x.mT, k, 1e-13)  # eigenvalues of either sign


@pytest.mark.parametrize(("n", "k"), ITERATION)
def test_subspace_iteration(n: int, k: int, generator: torch.Generator) -> None:
    assert_leading_pairs(gram_matrices(2, n, n, generator), k, 1.01e-12)


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_below_the_number_of_pairs(n: int, rank: int, generator: torch.Generator) -> None:
    a = gram_matrices(2, n, rank, generator)
    assert_leading_pairs(a, 5, 1.01e-12)


@pytest.mark.parametrize("n", [20, 160])
def test_equal_eigenvalues(n: int, generator: torch.Generator) -> None:
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=FLOAT64)).Q
    spectrum = torch.cat([torch.tensor([3.0, 3.0, 3.0, 2.0, 2.0]), torch.linspace(0.1, 0.0, n - 5)]).double()
    a = (q * spectrum) @ q.T
    assert_leading_pairs(((a + a.T) / 2)[None], 4, 1.01e-12)


@pytest.mark.parametrize("n", [12, 200])
@pytest.mark.parametrize("exponent", [-1060, -400, 400, 990])
def test_scale_does_not_matter(n: int, exponent: int, generator: torch.Generator) -> None:
    """Powers of two move through without a rounding, to the last of them that float64 holds in full."""
    a = gram_matrices(1, n, 4, generator)
    values, vectors = ops.eigh(a, 2)
    scaled_values, scaled_vectors = ops.eigh(a * 2.0**exponent, 2)
    if exponent > -1000:
        assert torch.equal(scaled_vectors, vectors)
        assert torch.equal(scaled_values, values * 2.0**exponent)
    else:  # subnormal numbers have few bits left
        assert scaled_vectors.isfinite().all()


def test_only_the_upper_triangle_is_read(generator: torch.Generator) -> None:
    for n in (20, 150):
        a = gram_matrices(1, n, n, generator)
        for got, wanted in zip(ops.eigh(a.triu(), 3), ops.eigh(a, 3), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("n", [10, 150])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_yields_nan_and_harms_no_other(n: int, poison: float, generator: torch.Generator) -> None:
    a = gram_matrices(3, n, n, generator)
    values, vectors = ops.eigh(a, 2)
    a[1, 2, 7] = poison
    got_values, got_vectors = ops.eigh(a, 2)
    assert got_values[1].isnan().all()
    assert got_vectors[1].isnan().all()
    assert torch.equal(got_values[[0, 2]], values[[0, 2]])
    assert torch.equal(got_vectors[[0, 2]], vectors[[0, 2]])


def test_a_spectrum_too_dense_for_the_iteration(generator: torch.Generator) -> None:
    """140 eigenvalues within 1e-6 of each other: rotations take over."""
    q = torch.linalg.qr(torch.randn(140, 140, generator=generator, dtype=FLOAT64)).Q
    a = (q * torch.linspace(1.0, 1.0 - 1e-6, 140, dtype=FLOAT64)) @ q.T
    assert_leading_pairs(((a + a.T) / 2)[None], 2, 1.01e-12)


def test_a_negative_definite_matrix(generator: torch.Generator) -> None:
    """The iteration finds the lowest eigenvalues, those of largest magnitude; they must not pass for the highest."""
    assert_leading_pairs(-gram_matrices(1, 100, 100, generator), 2, 1.01e-12)


def test_strong_negative_eigenvalues_do_not_hide_the_leading_ones(generator: torch.Generator) -> None:
    q = torch.linalg.qr(torch.randn(150, 150, generator=generator, dtype=FLOAT64)).Q
    spectrum = torch.zeros(150, dtype=FLOAT64)
    spectrum[:5] = torch.tensor([-10.0, 3.0, -4.0, 2.0, 1.0])
    a = (q * spectrum) @ q.T
    assert_leading_pairs(((a + a.T) / 2)[None], 3, 1.01e-12)


@pytest.mark.parametrize(("batch", "n", "k"), [(0, 3, 2), (2, 0, 0), (2, 3, 0), (1, 150, 0)])
def test_nothing_asked(batch: int, n: int, k: int) -> None:
    values, vectors = ops.eigh(torch.ones(batch, n, n, dtype=FLOAT64), k)
    assert values.shape == (batch, k)
    assert vectors.shape == (batch, n, k)
