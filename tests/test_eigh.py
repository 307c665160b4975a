"""eigh: residuals, orthogonality and agreement with LAPACK, by QL and by multisection with inverse iteration."""

from __future__ import annotations

import pytest
import torch
from cases import UNIT
from torch import Tensor

from grokcurv import ops, reference

FLOAT64 = torch.float64
ALL = [(1, 1), (2, 2), (3, 1), (8, 8), (9, 3), (17, 17), (40, 11), (129, 129)]
FEW = [(4, 1), (16, 4), (33, 8), (41, 1), (63, 9), (96, 24), (97, 2), (257, 3)]
"""(n, k): up to n / 4 pairs are few."""


def gram_matrices(batch: int, n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Positive semidefinite, with the falling spectrum of a trajectory."""
    scales = torch.arange(1, rank + 1, dtype=FLOAT64).reciprocal()
    x = torch.randn(batch, n, rank, generator=generator, dtype=FLOAT64) * scales
    return x @ x.mT


def assert_leading_pairs(a: Tensor, k: int) -> None:
    """|A v - w v| <= tol |A|, orthonormal vectors, eigenvalues as far from LAPACK's at most (Weyl).

    Each of n reflections and each of some n rotations in a row rounds a few times: errors of c n in units of rounding,
    with c of 5 seen on a thousand matrices made to be difficult, and 20 allowed.
    """
    values, vectors = ops.eigh(a, k)
    tolerance = 20 * a.shape[1] * UNIT
    norm = torch.linalg.matrix_norm(a, 2)
    residual = torch.linalg.vector_norm(a @ vectors - vectors * values[:, None], dim=1)
    assert (residual <= tolerance * norm[:, None]).all(), (residual / norm[:, None]).max()
    assert (vectors.mT @ vectors - torch.eye(k, dtype=FLOAT64)).abs().max() <= tolerance
    assert ((values - reference.eigh(a, k)[0]).abs() <= tolerance * norm[:, None]).all()
    assert (values.diff() <= 0).all()
    largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def with_spectrum(spectrum: Tensor, generator: torch.Generator) -> Tensor:
    """(1, n, n): these eigenvalues, in a random basis."""
    n = len(spectrum)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=FLOAT64)).Q
    a: Tensor = (q * spectrum) @ q.T
    return (a + a.T)[None] / 2


@pytest.mark.parametrize(("n", "k"), ALL + FEW)
def test_random_matrices(n: int, k: int, generator: torch.Generator) -> None:
    assert_leading_pairs(gram_matrices(3, n, n + 2, generator), k)
    x = torch.randn(2, n, n, generator=generator, dtype=FLOAT64)
    assert_leading_pairs(x + x.mT, k)  # eigenvalues of either sign


@pytest.mark.parametrize("n", [30, 200])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_below_the_number_of_pairs(n: int, rank: int, generator: torch.Generator) -> None:
    a = gram_matrices(2, n, rank, generator)
    assert_leading_pairs(a, 5)
    assert_leading_pairs(a, n)


@pytest.mark.parametrize("n", [20, 160])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_equal_eigenvalues(n: int, k: int, generator: torch.Generator) -> None:
    spectrum = torch.cat([torch.tensor([3.0, 3.0, 3.0, 2.0, 2.0]), torch.linspace(0.1, 0.0, n - 5)]).double()
    assert_leading_pairs(with_spectrum(spectrum, generator), k)
    assert_leading_pairs(with_spectrum(torch.ones(n, dtype=FLOAT64), generator), k)


@pytest.mark.parametrize("n", [24, 120])
@pytest.mark.parametrize("spread", [1e-15, 1e-13, 1e-10, 1e-6])
def test_crowded_eigenvalues(n: int, spread: float, generator: torch.Generator) -> None:
    """Where inverse iteration cannot tell them apart, QL takes over."""
    offsets = torch.randn(n, generator=generator, dtype=FLOAT64)
    for k in (1, n // 4, n):
        assert_leading_pairs(with_spectrum(1 + spread * offsets, generator), k)


@pytest.mark.parametrize("k", [1, 13, 36, 147])
def test_glued_wilkinson_matrices(k: int) -> None:
    """Tridiagonal already; pairs of eigenvalues that agree to all digits, seven times, though no entry is small."""
    block = torch.diag((torch.arange(21, dtype=FLOAT64) - 10).abs())
    a = torch.block_diag(*[block] * 7) + torch.diag(torch.ones(146, dtype=FLOAT64), 1)
    glue = torch.arange(20, 146, 21)
    a[glue, glue + 1] = 1e-14
    assert_leading_pairs((a.triu() + a.triu(1).T)[None], k)


@pytest.mark.parametrize("decades", [20, 300])
@pytest.mark.parametrize("upwards", [False, True])
def test_graded_matrices(decades: int, upwards: bool, generator: torch.Generator) -> None:
    """Entries that fall by many decades, beyond where squares underflow."""
    n = 60
    scales = 10.0 ** (-torch.arange(n, dtype=FLOAT64) * decades / 2 / n)
    x = torch.randn(n, n, generator=generator, dtype=FLOAT64)
    a = (x + x.T) * scales * scales[:, None]
    for k in (1, 15, n):
        assert_leading_pairs((a.flip(0, 1) if upwards else a)[None].contiguous(), k)


@pytest.mark.parametrize("k", [1, 10, 40])
def test_entries_whose_squares_underflow(k: int, generator: torch.Generator) -> None:
    x = torch.randn(40, 40, generator=generator, dtype=FLOAT64)
    a = 1e-162 * (x + x.T)
    a[0, 0] = 1.0
    assert_leading_pairs(a[None], k)
    assert_leading_pairs(torch.diag(x[0])[None], k)


@pytest.mark.parametrize("n", [7, 50])
def test_few_and_all_agree(n: int, generator: torch.Generator) -> None:
    a = gram_matrices(3, n, n, generator)
    all_values, all_vectors = ops.eigh(a, n)
    values, vectors = ops.eigh(a, 1)
    norm = torch.linalg.matrix_norm(a, 2)
    assert ((values[:, 0] - all_values[:, 0]).abs() <= 20 * n * UNIT * norm).all()
    torch.testing.assert_close(vectors[:, :, 0], all_vectors[:, :, 0], rtol=0, atol=1e-10)


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


def test_a_negative_definite_matrix(generator: torch.Generator) -> None:
    """The eigenvalues of largest magnitude are the lowest here; they must not pass for the leading ones."""
    assert_leading_pairs(-gram_matrices(1, 100, 100, generator), 2)


def test_strong_negative_eigenvalues_do_not_hide_the_leading_ones(generator: torch.Generator) -> None:
    spectrum = torch.zeros(150, dtype=FLOAT64)
    spectrum[:5] = torch.tensor([-10.0, 3.0, -4.0, 2.0, 1.0])
    assert_leading_pairs(with_spectrum(spectrum, generator), 3)


@pytest.mark.parametrize(("batch", "n", "k"), [(0, 3, 2), (2, 0, 0), (2, 3, 0), (1, 150, 0)])
def test_nothing_asked(batch: int, n: int, k: int) -> None:
    values, vectors = ops.eigh(torch.ones(batch, n, n, dtype=FLOAT64), k)
    assert values.shape == (batch, k)
    assert vectors.shape == (batch, n, k)
