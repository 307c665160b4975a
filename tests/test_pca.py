from __future__ import annotations

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.decomposition import PCA

from grokcurv.flat import Segment
from grokcurv.pca import StreamingPCA

FLOATS = [torch.float32, torch.float64, torch.bfloat16]


def trajectory(n: int, p: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A random walk with drift, far from the origin: rows (n, p)."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(n, p, generator=generator, dtype=torch.float64) + 0.5 * torch.randn(p, generator=generator)
    return (20 * torch.randn(p, generator=generator) + steps.cumsum(0)).to(dtype)


def svd(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Variances and components of the rows, by numpy in float64."""
    rows = x.double().numpy()
    _, s, v = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return s**2 / (len(rows) - 1), v


def shares(x: torch.Tensor) -> np.ndarray:
    """PC1 share of every prefix of at least two rows."""
    out = []
    for t in range(2, len(x) + 1):
        variance, _ = svd(x[:t])
        out.append(variance[0] / variance.sum())
    return np.array(out)


def assert_same(a: StreamingPCA, b: StreamingPCA) -> None:
    """Bitwise, in everything public."""
    assert a.n_samples_seen_ == b.n_samples_seen_
    assert a.n_features_in_ == b.n_features_in_
    for name in ("explained_variance_", "explained_variance_ratio_", "error_bound_", "pc1_history_"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0, equal_nan=True)
    for name in ("components_", "mean_"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)


# Against numpy and scikit-learn


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "p"), [(2, 1), (3, 50), (17, 5), (17, 4097), (31, 1000)])
def test_against_a_float64_svd(n: int, p: int, dtype: torch.dtype):
    x = trajectory(n, p, seed=n + p, dtype=dtype)
    k = min(4, n - 1, p)
    pca = StreamingPCA(n_components=k).partial_fit(x)
    variance, components = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, variance[:k], rtol=1e-11)
    np.testing.assert_allclose(pca.explained_variance_ratio_, variance[:k] / variance.sum(), rtol=1e-11)
    np.testing.assert_allclose(pca.pc1_history_[1:], shares(x), rtol=1e-11)
    output = torch.float64 if dtype == torch.float64 else torch.float32
    assert pca.components_.dtype == pca.mean_.dtype == output
    accuracy = 1e-10 if dtype == torch.float64 else 1e-6
    cosines = np.abs(np.sum(pca.components_.double().numpy() * components[:k], axis=1))
    np.testing.assert_allclose(cosines, 1, atol=accuracy)
    gram = (pca.components_.double() @ pca.components_.double().T).numpy()
    np.testing.assert_allclose(gram, np.eye(k), atol=accuracy)
    np.testing.assert_allclose(pca.mean_, x.double().mean(0), rtol=accuracy, atol=accuracy)
    assert pca.n_samples_seen_ == n
    assert pca.n_features_in_ == p


def test_against_scikit_learn_with_signs():
    x = trajectory(23, 40, dtype=torch.float64)
    ours, theirs = StreamingPCA(n_components=5).partial_fit(x), PCA(n_components=5, svd_solver="full").fit(x.numpy())
    for name in ("explained_variance_", "explained_variance_ratio_", "components_", "mean_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9, atol=1e-12)
    fresh = trajectory(4, 40, seed=1, dtype=torch.float64)
    np.testing.assert_allclose(ours.transform(fresh), theirs.transform(fresh.numpy()), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(ours.transform(fresh[2]), theirs.transform(fresh[2:3].numpy())[0], rtol=1e-9, atol=1e-10)
    assert ours.transform(fresh[:0]).shape == (0, 5)


def test_many_rows_go_beyond_the_dense_solver():
    x = trajectory(150, 60, dtype=torch.float32)
    pca = StreamingPCA(n_components=3).partial_fit(x)
    variance, _ = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, variance[:3], rtol=1e-10)
    np.testing.assert_allclose(pca.pc1_history_[1:], shares(x), rtol=1e-10)


def test_a_spectrum_without_gaps():
    x = torch.randn(160, 400, generator=torch.Generator().manual_seed(3))
    pca = StreamingPCA(n_components=4).partial_fit(x)
    variance, _ = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, variance[:4], rtol=1e-10)
    np.testing.assert_allclose(pca.pc1_history_[1:], shares(x), rtol=1e-9)


def test_small_motion_far_from_the_origin_is_not_lost():
    # The spread is 1e-6 of the distance to the origin: an uncentred float64 Gram would keep four digits.
    generator = torch.Generator().manual_seed(2)
    x = 1e6 + torch.randn(12, 300, generator=generator, dtype=torch.float64)
    pca = StreamingPCA(n_components=2).partial_fit(x)
    variance, _ = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, variance[:2], rtol=1e-12)


def test_the_error_bound_holds_and_is_not_idle():
    for seed in range(5):
        x = trajectory(9, 3000, seed=seed, dtype=torch.float64)
        pca = StreamingPCA(n_components=8).partial_fit(x)
        variance, _ = svd(x)
        errors = np.abs(pca.explained_variance_ratio_.numpy() - variance[:8] / variance.sum())
        assert errors.max() <= pca.error_bound_.item() < 1e-9
    assert StreamingPCA(segments=[(0, 5), (5, 9)]).partial_fit(x).error_bound_.shape == (2,)


# Streaming


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("segments", [None, [(3, 40), (50, 7), (100, 5001)]], ids=["whole", "segments"])
def test_block_boundaries_change_no_bit(segments: list | None, dtype: torch.dtype):
    x = trajectory(19, 5200, dtype=dtype)
    whole = StreamingPCA(n_components=3, segments=segments).partial_fit(x)
    one_by_one = StreamingPCA(n_components=3, segments=segments)
    for row in x:
        one_by_one.partial_fit(row)
    uneven = StreamingPCA(n_components=3, segments=segments)
    for size in (2, 0, 5, 1, 11):
        start = uneven.n_samples_seen_
        uneven.partial_fit(x[start : start + size])
        assert len(uneven.pc1_history_) == start + size  # read in between: each prefix is solved once
    assert_same(whole, one_by_one)
    assert_same(whole, uneven)


def test_threads_change_no_bit():
    x = trajectory(14, 70_001)
    fits = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pca = StreamingPCA(n_components=3).partial_fit(x)
            assert pca.components_.any()
            assert len(pca.pc1_history_) == 14
            fits.append(pca)
    finally:
        torch.set_num_threads(before)
    assert_same(*fits)


def test_history_does_not_depend_on_when_it_is_read():
    x = trajectory(12, 30)
    late, early = StreamingPCA().partial_fit(x), StreamingPCA()
    seen = []
    for row in x:
        seen.append(early.partial_fit(row).pc1_history_)
    assert torch.equal(seen[-1][1:], late.pc1_history_[1:])
    assert all(torch.equal(seen[-1][1 : t + 1], h[1:]) for t, h in enumerate(seen))
    assert seen[0].isnan().all()


def test_rows_are_copied():
    x = trajectory(6, 8)
    pca = StreamingPCA().partial_fit(x)
    want = pca.explained_variance_.clone()
    x.zero_()
    pca.partial_fit(trajectory(6, 8)[:0])
    assert torch.equal(pca.explained_variance_, want)
    assert torch.equal(pca.transform(trajectory(6, 8)).mean(0).abs() < 1e-4, torch.ones(8, dtype=torch.bool))


def test_any_layout_and_graph_of_rows_will_do():
    x = trajectory(7, 10, dtype=torch.float64)
    a = StreamingPCA().partial_fit(x)
    b = StreamingPCA().partial_fit(x.T.contiguous().T.requires_grad_())
    assert_same(a, b)
    assert not b.components_.requires_grad


def test_results_follow_new_rows():
    x = trajectory(9, 11)
    pca = StreamingPCA(n_components=2).partial_fit(x[:5])
    for name in ("components_", "mean_", "explained_variance_", "error_bound_"):
        assert getattr(pca, name) is not None
    assert_same(pca.partial_fit(x[5:]), StreamingPCA(n_components=2).partial_fit(x))


# Segments


def test_segments_are_independent_pcas():
    x = trajectory(13, 90)
    segments = [Segment("b", 40, 21, (3, 7)), (0, 12), (61, 29), (0, 12)]
    pca = StreamingPCA(n_components=3, segments=segments).partial_fit(x)
    assert [s.name for s in pca.segments] == ["b", "0:12", "61:90", "0:12"]
    assert pca.explained_variance_.shape == pca.explained_variance_ratio_.shape == (4, 3)
    assert pca.pc1_history_.shape == (13, 4)
    assert pca.n_features_in_ == 90
    scores = pca.transform(x[:2])
    assert scores.shape == (4, 2, 3)
    assert pca.transform(x[0]).shape == (4, 3)
    for index, segment in enumerate(pca.segments):
        alone = StreamingPCA(n_components=3).partial_fit(x[:, segment.start : segment.stop])
        torch.testing.assert_close(pca.explained_variance_[index], alone.explained_variance_, rtol=1e-12, atol=0)
        torch.testing.assert_close(pca.components_[index], alone.components_)
        torch.testing.assert_close(pca.mean_[index], alone.mean_)
        torch.testing.assert_close(scores[index], alone.transform(x[:2, segment.start : segment.stop]))
        history = pca.pc1_history_[:, index]
        torch.testing.assert_close(history, alone.pc1_history_, rtol=1e-12, atol=0, equal_nan=True)


def test_only_the_segments_are_stored_and_looked_at():
    x = trajectory(4, 1000)
    x[:, 500] = math.nan
    pca = StreamingPCA(segments=[(10, 5), (600, 6)]).partial_fit(x)
    assert pca.state_dict()["rows"].shape == (4, 11)
    assert pca.explained_variance_.isfinite().all()


# Little to analyse


def test_no_rows():
    pca = StreamingPCA()
    assert pca.n_samples_seen_ == 0
    assert pca.pc1_history_.shape == (0,)
    assert StreamingPCA(segments=[(0, 1), (1, 1)]).pc1_history_.shape == (0, 2)
    for name in (
        "components_",
        "explained_variance_",
        "explained_variance_ratio_",
        "mean_",
        "n_features_in_",
        "error_bound_",
    ):
        with pytest.raises(ValueError, match="has seen no rows yet"):
            getattr(pca, name)
    with pytest.raises(ValueError, match="has seen no rows yet"):
        pca.transform(torch.zeros(3))


def test_one_row():
    row = trajectory(1, 6)
    pca = StreamingPCA(n_components=3).partial_fit(row)
    assert pca.explained_variance_.isnan().all()
    assert pca.explained_variance_ratio_.isnan().all()
    assert pca.pc1_history_.isnan().tolist() == [True]
    assert not pca.components_.any()
    assert pca.components_.shape == (3, 6)
    assert torch.equal(pca.mean_, row[0])
    assert not pca.transform(row).any()


def test_two_rows():
    x = torch.tensor([[1.0, 5.0, 2.0], [4.0, 1.0, 2.0]])
    pca = StreamingPCA(n_components=3).partial_fit(x)
    torch.testing.assert_close(
        pca.explained_variance_, torch.tensor([12.5, 0, 0], dtype=torch.float64), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(pca.components_, torch.tensor([[-0.6, 0.8, 0.0], [0, 0, 0], [0, 0, 0]]))
    torch.testing.assert_close(pca.explained_variance_ratio_[0].item(), 1.0, rtol=1e-14, atol=0)
    torch.testing.assert_close(pca.pc1_history_[1].item(), 1.0, rtol=1e-14, atol=0)


def test_constant_rows():
    pca = StreamingPCA(n_components=2).partial_fit(torch.full((5, 4), 0.1))
    assert pca.explained_variance_.tolist() == [0, 0]
    assert pca.explained_variance_ratio_.isnan().all()
    assert pca.pc1_history_.isnan().all()
    assert not pca.components_.any()
    assert torch.equal(pca.mean_, torch.full((4,), 0.1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_repeated_rows_have_the_rank_of_the_different_ones(dtype: torch.dtype):
    three = trajectory(3, 2000, dtype=dtype)
    pca = StreamingPCA(n_components=5).partial_fit(three[[0, 1, 2, 0, 1, 2, 2, 2, 1, 0, 0]])
    assert (pca.explained_variance_ > 0).tolist() == [True, True, False, False, False]
    assert pca.explained_variance_[2:].tolist() == [0, 0, 0]
    assert not pca.components_[2:].any()


def test_more_components_than_coordinates():
    pca = StreamingPCA(n_components=6).partial_fit(trajectory(9, 2))
    assert pca.components_.shape == (6, 2)
    assert (pca.explained_variance_ > 0).sum() == 2
    torch.testing.assert_close(pca.explained_variance_ratio_.sum().item(), 1.0)


def test_an_empty_segment():
    pca = StreamingPCA(n_components=1, segments=[(0, 3), (3, 0)]).partial_fit(trajectory(4, 5))
    assert pca.components_[1].shape == (1, 0)
    assert pca.explained_variance_[1] == 0
    assert pca.pc1_history_[1:].isnan().all(0).tolist() == [False, True]


def test_weak_components_stay_orthonormal():
    # Singular values from 1 down to 1e-6: the squares reach the rounding of the Gram matrix.
    generator = torch.Generator().manual_seed(9)
    left = torch.linalg.qr(torch.randn(8, 5, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(500, 5, generator=generator, dtype=torch.float64)).Q
    x = left * torch.logspace(0, -6, 5, dtype=torch.float64) @ right.T
    pca = StreamingPCA(n_components=5).partial_fit(x)
    assert (pca.explained_variance_ > 0).all()
    gram = pca.components_ @ pca.components_.T
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-13)


def test_peaks_are_positive():
    components = StreamingPCA(n_components=4).partial_fit(trajectory(10, 60)).components_
    peaks = components.gather(1, components.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()


# Saving and merging


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("segments", [None, [(2, 30), (40, 11)]], ids=["whole", "segments"])
@pytest.mark.parametrize("saved_after", [0, 1, 9])
def test_state_survives_a_file_bitwise(tmp_path, saved_after: int, segments: list | None, dtype: torch.dtype):
    x = trajectory(15, 64, dtype=dtype)
    pca = StreamingPCA(n_components=3, segments=segments).partial_fit(x[:saved_after])
    state = pca.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    safetensors.torch.save_file(tensors, tmp_path / "pca.safetensors")
    plain = json.dumps({name: value for name, value in state.items() if name not in tensors})
    pca.partial_fit(x[saved_after:])

    loaded = StreamingPCA(n_components=3, segments=segments)
    loaded.partial_fit(trajectory(3, 64, seed=5))  # whatever it knew is replaced
    assert loaded.components_ is not None
    loaded.load_state_dict(json.loads(plain) | safetensors.torch.load_file(tmp_path / "pca.safetensors"))
    assert loaded.n_samples_seen_ == saved_after
    assert_same(loaded.partial_fit(x[saved_after:]), pca)


def test_a_state_is_a_snapshot():
    x = trajectory(9, 20)
    pca = StreamingPCA(n_components=2).partial_fit(x[:4])
    state = pca.state_dict()
    pca.partial_fit(x[4:])
    twin = StreamingPCA(n_components=2)
    twin.load_state_dict(state)
    assert_same(twin, StreamingPCA(n_components=2).partial_fit(x[:4]))
    twin.partial_fit(-x)
    assert_same(pca, StreamingPCA(n_components=2).partial_fit(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_components": 3}, "n_components 3, this PCA 2"),
        ({"method": "sketch"}, "method 'sketch', this PCA 'gram'"),
        ({"segments": [[0, 4]]}, r"segments \[\[0, 4\]\], this PCA None"),
        ({"n_features": 7}, "state is damaged"),
        ({"rows": torch.zeros(3, 6)}, "state is damaged"),
        ({"gram": torch.zeros(1, 4, 5, dtype=torch.float64)}, "state is damaged"),
        ({"history": torch.zeros(5, 1, dtype=torch.float64)}, "state is damaged"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change: dict, message: str):
    pca = StreamingPCA(n_components=2).partial_fit(trajectory(4, 6))
    want = pca.components_.clone()
    with pytest.raises(ValueError, match=message):
        pca.load_state_dict(pca.state_dict() | change)
    with pytest.raises(ValueError, match="state is damaged: it lacks gram, history, "):
        pca.load_state_dict({"rows": torch.zeros(4, 6)})
    assert torch.equal(pca.components_, want)


@pytest.mark.parametrize("segments", [None, [(0, 9), (12, 20)]], ids=["whole", "segments"])
def test_merging_is_concatenation(segments: list | None):
    x = trajectory(16, 40)

    def fit(rows: torch.Tensor) -> StreamingPCA:
        return StreamingPCA(n_components=3, segments=segments).partial_fit(rows)

    other = fit(x[7:])
    merged = fit(x[:7])
    assert merged.merge(other) is merged
    assert_same(merged, fit(x))
    assert_same(other, fit(x[7:]))
    empty = StreamingPCA(n_components=3, segments=segments)
    assert_same(fit(x[7:]).merge(empty), other)
    assert_same(empty.merge(other), other)
    assert_same(fit(x[:5]).merge(merged), fit(torch.cat([x[:5], x])))
    merged.merge(merged)
    assert_same(merged, fit(torch.cat([x, x])))


def test_what_cannot_be_merged():
    x = trajectory(4, 6)
    pca = StreamingPCA().partial_fit(x)
    with pytest.raises(ValueError, match="different segments"):
        pca.merge(StreamingPCA(segments=[(0, 6)]).partial_fit(x))
    with pytest.raises(ValueError, match="other has 5 coordinates"):
        pca.merge(StreamingPCA().partial_fit(x[:, :5]))
    with pytest.raises(ValueError, match=r"6 coordinates, torch\.float64"):
        pca.merge(StreamingPCA().partial_fit(x.double()))


# Bad input


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_are_not_finite_leave_no_trace(dtype: torch.dtype, value: float):
    x = trajectory(9, 12, dtype=dtype)
    pca, clean = StreamingPCA(n_components=2).partial_fit(x[:4]), StreamingPCA(n_components=2).partial_fit(x[:4])
    bad = x[4:].clone()
    bad[3, 7] = value
    with pytest.raises(ValueError, match="x: row 3 holds NaN or infinity"):
        pca.partial_fit(bad)
    assert_same(pca, clean)
    assert_same(pca.partial_fit(x[4:]), clean.partial_fit(x[4:]))

    first = StreamingPCA(n_components=2)
    with pytest.raises(ValueError, match="x: row 0 holds"):
        first.partial_fit(torch.full((3,), value, dtype=torch.float64))
    assert first.n_samples_seen_ == 0
    assert_same(first.partial_fit(x), StreamingPCA(n_components=2).partial_fit(x))


def test_squares_that_overflow_are_refused():
    with pytest.raises(ValueError, match=r"row 1 holds .* squares overflow"):
        StreamingPCA().partial_fit(torch.tensor([[0.0], [1e200]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(6, dtype=torch.int64), TypeError, r"got torch\.int64"),
        (torch.zeros(6, dtype=torch.float16), TypeError, r"got torch\.float16"),
        (torch.zeros(()), ValueError, r"shape \(P,\) or \(n, P\), got \(\)"),
        (torch.zeros(1, 2, 6), ValueError, "shape"),
        (torch.zeros(5), ValueError, "x has 5 coordinates, .* earlier rows have 6"),
        (torch.zeros(6, dtype=torch.float64), ValueError, r"float64, on cpu; .* torch\.float32, on cpu"),
        (torch.zeros(6, device="meta"), ValueError, "on meta; .* on cpu"),
    ],
)
def test_rows_that_do_not_fit_are_refused(x: torch.Tensor, error: type[Exception], message: str):
    pca = StreamingPCA().partial_fit(trajectory(3, 6))
    with pytest.raises(error, match=message):
        pca.partial_fit(x)
    with pytest.raises(error, match=message):
        pca.transform(x)
    assert pca.n_samples_seen_ == 3


def test_segments_beyond_the_rows_are_refused():
    with pytest.raises(ValueError, match="x has 6 coordinates, but segment '4:7' ends at 7"):
        StreamingPCA(segments=[(0, 2), (4, 3)]).partial_fit(torch.zeros(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"method": "sketch"}, "method must be one of auto, gram, got 'sketch'"),
        ({"segments": []}, "at least one segment"),
        ({"segments": [(-1, 2)]}, "'-1:1' has start -1"),
        ({"segments": [(3, -2)]}, "length -2"),
    ],
)
def test_bad_arguments(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        StreamingPCA(**options)
