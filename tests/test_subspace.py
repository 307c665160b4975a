from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import subspace_angles
from torch import nn

from grokcurv.flat import attention_segments
from grokcurv.pca import StreamingPCA
from grokcurv.subspace import RandomBaseline, Subspace, alignment
from grokcurv.tasks import Transformer


def orthonormal(k: int, p: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(p, k, dtype=torch.float64)).Q.T.to(dtype)


def blocks(dtype: torch.dtype = torch.float64) -> tuple[int, list[tuple[int, torch.Tensor]]]:
    return 31, [(17, orthonormal(3, 9, dtype)), (2, orthonormal(2, 7, dtype)), (26, orthonormal(1, 1, dtype))]


# Construction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "p"), [(0, 5), (0, 0), (1, 1), (3, 17), (6, 6)])
def test_dense_rows(k: int, p: int, dtype: torch.dtype):
    rows = orthonormal(k, p, dtype)
    space = Subspace(rows)
    assert (space.dim, space.size) == (k, p)
    assert space.support == (((0, p),) if k else ())
    assert space.support_size == (p if k else 0)
    assert space.values.dtype == dtype
    assert space.values.shape == (k * p,)
    assert space.rows.tolist() == [[0, p, j * p] for j in range(k)]
    assert torch.equal(space.to_dense(), rows)


def test_blocks_are_stored_on_their_support_only():
    size, parts = blocks()
    space = Subspace.from_blocks(size, parts)
    assert (space.dim, space.size, space.support_size) == (6, 31, 17)
    assert space.support == ((2, 7), (17, 9), (26, 1))
    assert space.values.numel() == 2 * 7 + 3 * 9 + 1
    dense = space.to_dense()
    assert torch.equal(dense[:2, 2:9], parts[1][1])
    assert torch.equal(dense[2:5, 17:26], parts[0][1])
    assert torch.count_nonzero(dense) == space.values.count_nonzero()
    assert torch.allclose(dense @ dense.T, torch.eye(6, dtype=torch.float64), atol=1e-14)


def test_a_block_without_rows_supports_nothing():
    space = Subspace.from_blocks(9, [(0, torch.empty(0, 4)), (5, torch.ones(1, 1))])
    assert space.support == ((5, 1),)
    assert space.dim == 1


def test_float32_bases_of_size_pass():
    generator = torch.Generator().manual_seed(0)
    assert Subspace.random(16, 50_000, generator).dim == 16
    Subspace(torch.linalg.qr(torch.randn(50_000, 16)).Q.T)  # orthonormalised in float32


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.ones(3), ValueError, r"shape \(K, P\), got \(3,\)"),
        (torch.eye(3, dtype=torch.bfloat16), TypeError, "float32 or float64, got torch.bfloat16"),
        (torch.eye(3, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.eye(3)[:, :2], ValueError, "3 rows of length 2 cannot"),
        (torch.ones(2, 4) / 2, ValueError, "off by 1"),
        (1.001 * torch.eye(3), ValueError, "off by 0.002"),
        (torch.eye(3, dtype=torch.float64) * (1 + 1e-12), ValueError, "must be orthonormal"),
        (torch.full((1, 2), math.nan), ValueError, "off by nan"),
        (torch.tensor([[math.inf, 0.0]]), ValueError, "must be orthonormal"),
    ],
)
def test_what_is_not_a_basis_is_refused(rows: torch.Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        Subspace(rows)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "at least one"),
        ([(0, torch.eye(3)), (2, torch.eye(2))], r"disjoint and lie in 0\.\.8; one spans 2\.\.4"),
        ([(-1, torch.eye(2))], "disjoint and lie in"),
        ([(6, torch.eye(3))], r"one spans 6\.\.9"),
        ([(0, torch.eye(2)), (4, torch.eye(2).double())], "one dtype and one device"),
        ([(0, torch.eye(2)), (4, torch.ones(2))], r"shape \(k, length\)"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(parts: list, message: str):
    with pytest.raises(ValueError, match=message):
        Subspace.from_blocks(8, parts)


def test_random_needs_room_and_repeats_with_its_generator():
    with pytest.raises(ValueError, match=r"dim must lie in 0\.\.3, got 4|dim must lie in 0\.\.size = 3, got 4"):
        Subspace.random(4, 3, torch.Generator())
    a, b = (Subspace.random(2, 9, torch.Generator().manual_seed(5), torch.float64) for _ in range(2))
    assert torch.equal(a.values, b.values)
    assert Subspace.random(0, 4, torch.Generator()).dim == 0
    assert Subspace.random(4, 4, torch.Generator()).dim == 4


def test_from_a_table():
    space = Subspace.from_blocks(*blocks(torch.float32))
    again = Subspace.from_table(space.size, space.values, space.rows)
    assert torch.equal(again.values, space.values)
    assert torch.equal(again.rows, space.rows)
    assert again.support == space.support
    # Components without variance are rows of zeros, as an accelerator leaves them.
    rows = torch.cat([space.rows, torch.tensor([[9, 3, len(space.values)]])])
    assert Subspace.from_table(31, torch.cat([space.values, torch.zeros(3)]), rows).dim == space.dim
    assert Subspace.from_table(5, torch.empty(0), torch.empty(0, 3, dtype=torch.int64)).dim == 0


def test_a_random_subspace_like_another():
    size, parts = blocks(torch.float32)
    space = Subspace.from_blocks(size, parts)
    like, other = (space.random_like(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(like.rows, space.rows)
    assert like.values.dtype == torch.float32
    assert not torch.equal(like.values, other.values)
    assert torch.equal(like.values, space.random_like(torch.Generator().manual_seed(0)).values)
    assert Subspace(torch.empty(0, 4)).random_like(torch.Generator()).dim == 0


def test_a_random_subspace_like_another_is_uniform_on_each_interval():
    space = Subspace.from_blocks(20, [(3, orthonormal(2, 6)), (12, orthonormal(1, 5))])
    generator = torch.Generator().manual_seed(11)
    v = torch.zeros(20, dtype=torch.float64)
    v[3:9] = torch.randn(6, generator=generator, dtype=torch.float64)
    caught = [float(space.random_like(generator).split(v).parallel / v.norm()) for _ in range(1000)]
    assert stats.kstest(caught, lambda f: 1 - RandomBaseline(2, 6).p_value(f)).pvalue > 1e-3


def test_to_another_dtype():
    space = Subspace.from_blocks(*blocks())
    single = space.to(torch.float32)
    assert single.values.dtype == torch.float32
    assert single.support == space.support
    assert torch.allclose(single.to_dense().double(), space.to_dense(), atol=1e-7)
    assert "dim=6, size=31, support_size=17" in repr(space)


# From a PCA


def test_from_a_pca_over_all_coordinates():
    pca = StreamingPCA(n_components=4).partial_fit(torch.randn(9, 12, dtype=torch.float64))
    assert torch.equal(Subspace.from_pca(pca).to_dense(), pca.components_)
    two = Subspace.from_pca(pca, n_components=2)
    assert torch.equal(two.to_dense(), pca.components_[:2])
    assert Subspace.from_pca(pca, n_components=0).dim == 0
    wide = Subspace.from_pca(pca, n_components=1, size=20)
    assert wide.size == 20
    assert wide.support == ((0, 12),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_a_pca_over_segments(dtype: torch.dtype):
    pca = StreamingPCA(n_components=3, segments=[(10, 6), (1, 4)]).partial_fit(torch.randn(8, 20).to(dtype))
    space = Subspace.from_pca(pca, n_components=2)
    assert (space.dim, space.size, space.support) == (4, 20, ((1, 4), (10, 6)))
    assert torch.equal(space.to_dense()[:2, 1:5], pca.components_[1][:2])
    assert torch.equal(space.to_dense()[2:, 10:16], pca.components_[0][:2])


def test_components_without_variance_are_left_out():
    x = torch.zeros(5, 6)
    x[:, 1] = torch.arange(5)  # varies in the first segment, along one direction
    space = Subspace.from_pca(StreamingPCA(n_components=2, segments=[(0, 3), (3, 3)]).partial_fit(x))
    assert space.dim == 1
    assert space.support == ((0, 3),)


def test_from_a_pca_checks_its_arguments():
    pca = StreamingPCA(n_components=2)
    with pytest.raises(ValueError, match="no rows"):
        Subspace.from_pca(pca)
    pca.partial_fit(torch.randn(4, 5))
    with pytest.raises(ValueError, match=r"n_components must lie in 0\.\.2"):
        Subspace.from_pca(pca, n_components=3)
    with pytest.raises(ValueError, match=r"lie in 0\.\.4"):
        Subspace.from_pca(pca, size=4)


# Split and filter


@pytest.mark.parametrize("n", [None, 0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.float64])
def test_split_against_dense_float64(dtype: torch.dtype, basis_dtype: torch.dtype, n: int | None):
    space = Subspace.from_blocks(*blocks(basis_dtype))
    v = torch.randn(31) if n is None else torch.randn(n, 31)
    v = v.to(dtype)
    dense = space.to_dense().double()
    coefficients = v.double() @ dense.T
    parallel = coefficients @ dense
    split = space.split(v)
    assert all(part.dtype == torch.float64 for part in split)
    assert torch.allclose(split.coefficients, coefficients, atol=1e-6 if basis_dtype != dtype else 1e-12)
    assert torch.allclose(split.parallel, parallel.norm(dim=-1), atol=1e-5)
    assert torch.allclose(split.residual, (v.double() - parallel).norm(dim=-1), atol=1e-5)
    assert split.parallel.shape == v.shape[:-1]


def test_split_inside_and_outside_the_subspace():
    space = Subspace(orthonormal(3, 40))
    dense = space.to_dense()
    v = torch.randn(40, dtype=torch.float64)
    inside = (v @ dense.T) @ dense
    assert space.split(inside).residual <= 1e-6 * inside.norm()
    assert space.split(v - inside).parallel <= 1e-13 * v.norm()
    assert space.split(torch.zeros(40)).residual == 0


def test_split_with_nothing_to_project_on():
    v = torch.randn(2, 7)
    split = Subspace(torch.empty(0, 7)).split(v)
    assert split.coefficients.shape == (2, 0)
    assert not split.parallel.any()
    assert torch.allclose(split.residual, v.double().norm(dim=1))


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_filter_in_place(dtype: torch.dtype, strength: float):
    space = Subspace.from_blocks(*blocks(torch.float64)).to(torch.float64 if dtype == torch.float64 else torch.float32)
    g = torch.randn(2, 31).to(dtype)
    dense = space.to_dense().double()
    parallel = (g.double() @ dense.T) @ dense
    want = parallel + (1 - strength) * (g.double() - parallel)
    one = g[0].clone()
    assert space.filter_(one, strength) is one
    assert space.filter_(g, strength) is g
    assert torch.equal(one, g[0])
    assert torch.allclose(g.double(), want, atol=4 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)


def test_wrong_vectors_are_refused():
    space = Subspace(torch.eye(3))
    for use in (space.split, lambda v: space.filter_(v, 0.5)):
        with pytest.raises(ValueError, match=r"must have shape \(3,\) or \(N, 3\), got \(4,\)"):
            use(torch.zeros(4))
        with pytest.raises(ValueError, match="must have shape"):
            use(torch.zeros(1, 1, 3))
        with pytest.raises(TypeError, match="int64"):
            use(torch.zeros(3, dtype=torch.int64))
        with pytest.raises(ValueError, match="contiguous"):
            use(torch.zeros(3, 3).T)
        with pytest.raises(ValueError, match="requires grad"):
            use(torch.zeros(3, requires_grad=True))
    with pytest.raises(ValueError, match="strength must be finite"):
        space.filter_(torch.zeros(3), math.nan)


# Random baselines


def test_baselines_of_a_subspace():
    space = Subspace.from_blocks(*blocks())
    assert space.random_baseline() == RandomBaseline(6, 31)
    assert space.random_baseline("matched") == RandomBaseline(6, 17)
    with pytest.raises(ValueError, match="support must be"):
        space.random_baseline("some")


def test_matched_baseline_against_random_vectors():
    space = Subspace.from_blocks(*blocks())
    v = torch.randn(4000, 31, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    on_support = torch.cat([v[:, start : start + length] for start, length in space.support], dim=1).norm(dim=1)
    fractions = (space.split(v).parallel / on_support).numpy()
    baseline = space.random_baseline("matched")
    assert stats.kstest(fractions, lambda f: 1 - baseline.p_value(f)).pvalue > 1e-3


# Alignment


def by_qr(v: torch.Tensor, rows: torch.Tensor) -> float:
    basis = torch.linalg.qr(rows.double().T).Q
    return ((basis.T @ v.double()).norm() / v.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "p"), [(1, 1), (1, 9), (5, 70_001), (7, 8), (12, 333)])
def test_alignment_by_definition(k: int, p: int, dtype: torch.dtype, generator: torch.Generator):
    v = torch.randn(p, generator=generator, dtype=dtype)
    rows = torch.randn(k, p, generator=generator, dtype=dtype) * torch.logspace(-9, 3, k, dtype=dtype)[:, None]
    found = alignment(v, rows)
    wanted = torch.cosine_similarity(v.double()[None], rows.double(), eps=0)
    torch.testing.assert_close(found.cosines, wanted, rtol=1e-10, atol=1e-14)
    assert found.share.item() == pytest.approx(by_qr(v, rows), rel=1e-8)


def test_alignment_with_dependent_rows(generator: torch.Generator):
    v, rows = torch.randn(50, generator=generator), torch.randn(3, 50, generator=generator)
    mixed = torch.randn(6, 3, generator=generator) @ rows  # of rank 3, but for rounding in float32
    assert alignment(v, mixed).share.item() == pytest.approx(by_qr(v, rows), rel=1e-3)
    assert alignment(v, torch.randn(60, 50, generator=generator)).share.item() == pytest.approx(1, abs=1e-6)
    inside = alignment((rows.double().T @ torch.ones(3, dtype=torch.float64)), rows.double())
    assert 1 - 1e-12 < inside.share.item() <= 1


@pytest.mark.parametrize(("runs", "k", "p"), [(1, 3, 20), (3, 1, 9), (4, 5, 4099)])
def test_alignment_of_several_runs_is_that_of_each(runs: int, k: int, p: int, generator: torch.Generator):
    v, rows = torch.randn(runs, p, generator=generator), torch.randn(k, runs, p, generator=generator)
    rows[0, 0] = torch.nan
    for run, found in enumerate(zip(*alignment(v, rows), strict=True)):
        torch.testing.assert_close(
            found, tuple(alignment(v[run], rows[:, run].contiguous())), rtol=0, atol=0, equal_nan=True
        )


def test_alignment_of_nothing_is_nan(generator: torch.Generator):
    v, rows = torch.randn(9, generator=generator), torch.randn(3, 9, generator=generator)
    assert alignment(torch.zeros(9), rows).share.isnan()
    for bad in (0.0, torch.nan, torch.inf):
        changed = rows.clone()
        changed[1] = bad
        found = alignment(v, changed)
        assert found.share.isnan()
        assert found.cosines.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="must have shape"):
        alignment(v[:4], rows)


# From singular vectors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_from_singular_vectors(dtype: torch.dtype):
    model = Transformer(11, layers=2, d_model=16, heads=4, d_ff=8).to(dtype)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.self_attn.in_proj_weight.normal_()
    space = Subspace.from_singular_vectors(model, k=3)
    assert space.dim == 24
    assert space.size == sum(p.numel() for p in model.parameters())
    assert space.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dense = space.to_dense().double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(dense @ dense.T, torch.eye(24, dtype=torch.float64), rtol=0, atol=tolerance)
    wanted, outside = [], torch.ones(space.size, dtype=torch.bool)
    for layer in model.encoder.layers:
        attention = layer.self_attn
        for matrix in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
            left, _, right = torch.linalg.svd(matrix.detach().double())
            wanted.append(torch.stack([torch.outer(left[:, i], right[i]).flatten() for i in range(3)]))
    for segment, rows in zip(attention_segments(model), wanted, strict=True):
        there = slice(segment.start, segment.stop)
        outside[there] = False
        found = dense[:, there]
        found = found[found.abs().sum(1) > 0]
        torch.testing.assert_close(found.T @ found, rows.T @ rows, rtol=0, atol=tolerance)
        torch.testing.assert_close(found, rows, rtol=0, atol=tolerance)  # a direction has no free sign
    assert not dense[:, outside].any()


def test_singular_vectors_of_projections_that_are_not_fused():
    model = nn.MultiheadAttention(6, 2, kdim=4, vdim=5)
    model.q_proj_weight.requires_grad_(False)
    space = Subspace.from_singular_vectors(model, k=4)
    assert space.dim == 12
    assert [length for _, length in space.support] == [24, 30, 36]


def test_singular_vectors_that_are_not_there():
    model = Transformer(5, layers=1, d_model=8, heads=2, d_ff=8)
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1, got {k}"):
            Subspace.from_singular_vectors(model, k)
    assert Subspace.from_singular_vectors(model, 8).dim == 32
    with pytest.raises(ValueError, match=r"rank of encoder\.layers\.0\.self_attn\.q_proj_weight, which is 8; got 9"):
        Subspace.from_singular_vectors(model, 9)
    with torch.no_grad():
        weight = model.encoder.layers[0].self_attn.out_proj.weight
        weight.copy_(torch.outer(torch.arange(8.0), torch.ones(8)))
    with pytest.raises(ValueError, match=r"rank of encoder\.layers\.0\.self_attn\.out_proj\.weight, which is 1; got 2"):
        Subspace.from_singular_vectors(model, 2)
    with pytest.raises(ValueError, match=r"no nn\.MultiheadAttention"):
        Subspace.from_singular_vectors(nn.Linear(3, 3))


# Principal angles


def tilted(angles: torch.Tensor, dim: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal rows (k, P) and (dim, P) whose principal angles are these, by construction."""
    k = len(angles)
    frame = orthonormal(2 * k + dim - k, size)
    near, away, rest = frame[:k], frame[k : 2 * k], frame[2 * k :]
    other = torch.cat([near * angles.cos()[:, None] + away * angles.sin()[:, None], rest])
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    return torch.linalg.qr(torch.randn(k, k, dtype=torch.float64)).Q @ near, rotation @ other


def test_principal_angles_are_right_to_rounding_however_small():
    for _ in range(30):
        k = int(torch.randint(1, 7, ()))
        angles = (10 ** torch.empty(k, dtype=torch.float64).uniform_(-15, 0.19)).clamp(max=math.pi / 2).sort().values
        angles[int(torch.randint(k, ()))] = 0.0
        angles = angles.sort().values
        a, b = map(Subspace, tilted(angles, k + int(torch.randint(0, 4, ())), 60))
        for found in (a.principal_angles(b), b.principal_angles(a)):
            assert found.dtype == torch.float64
            # Orthonormal rows are so to a few roundings of unit vectors, and each product adds as much.
            assert (found - angles).abs().max() < 100 * torch.finfo(torch.float64).eps
        assert a.principal_angles(a).max() < 100 * torch.finfo(torch.float64).eps


def test_principal_angles_against_scipy_on_segments_and_float32():
    size, parts = blocks(torch.float32)
    space, other = Subspace.from_blocks(size, parts), Subspace(orthonormal(4, size, torch.float32))
    shifted = Subspace.from_blocks(
        size, [(0, orthonormal(2, 12, torch.float32)), (20, orthonormal(3, 11, torch.float32))]
    )
    for a, b in ((space, other), (other, space), (space, shifted), (shifted, space)):
        found = a.principal_angles(b)
        truth = subspace_angles(a.to_dense().double().numpy().T, b.to_dense().double().numpy().T)[::-1]
        assert found.tolist() == pytest.approx(truth.tolist(), abs=1e-7)
        assert found.shape == (min(a.dim, b.dim),)
    apart = Subspace.from_blocks(size, [(0, orthonormal(1, 2, torch.float32))])
    assert apart.principal_angles(space).tolist() == [math.pi / 2]
    assert Subspace(torch.empty(0, size)).principal_angles(space).shape == (0,)


def test_principal_angles_of_runs_with_rows_of_zeros():
    x = torch.randn(3, 6, 40)
    x[1, :, 20:] = 1.0
    pcas = [
        StreamingPCA(2, segments=[(0, 20), (20, 20)], runs=3).partial_fit(rows)
        for rows in (x, x + torch.randn(3, 6, 40))
    ]
    a, b = map(Subspace.from_pca, pcas)
    found = a.principal_angles(b)
    assert found.shape == (3, 4)
    for run in range(3):
        assert torch.equal(found[run], a.of(run).principal_angles(b.of(run)))
        one = a.of(run).to_dense().double().numpy()
        truth = subspace_angles(one[np.abs(one).any(1)].T, b.of(run).to_dense().double().numpy().T)[::-1]
        assert found[run, : len(truth)].tolist() == pytest.approx(truth.tolist(), abs=1e-6)
        assert found[run, len(truth) :].tolist() == [math.pi / 2] * (4 - len(truth))
    assert torch.allclose(a.principal_angles(b.of(0))[1], a.of(1).principal_angles(b.of(0)))


def test_principal_angles_of_what_does_not_fit():
    space = Subspace(torch.eye(2, 5))
    with pytest.raises(ValueError, match=r"other must be a subspace of R\^5, as this one is; got one of R\^6"):
        space.principal_angles(Subspace(torch.eye(2, 6)))
    two, three = (Subspace.from_pca(StreamingPCA(1, runs=n).partial_fit(torch.randn(n, 4, 5))) for n in (2, 3))
    with pytest.raises(ValueError, match="other must be of 2 runs, as this subspace is, or one for all; got 3"):
        two.principal_angles(three)
