"""StreamingPCA in a window, about another point than the mean, of rows of length one: against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grokcurv.pca import StreamingPCA
from grokcurv.pca.streaming import REFERENCES

OPTIONS = [
    {"reference": reference, "normalize": normalize, "window": window}
    for reference in REFERENCES
    for normalize in (False, True)
    for window in (None, 5)
    if not (normalize and reference == "mean")
]
every_kind = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))


def seen(rows: np.ndarray, reference: str, normalize: bool, window: int | None) -> np.ndarray:
    """The rows whose PCA it is, about what they are about."""
    first, rows = rows[0], rows[-window:] if window else rows
    rows = rows - {"mean": rows.mean(0), "first": first, "none": 0.0}[reference]
    if normalize:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return rows


def truth(rows: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Variances, components, and the total."""
    kept = seen(rows, **options)
    divisor = len(kept) - (options["reference"] == "mean")
    _, sigma, vectors = np.linalg.svd(kept, full_matrices=False)
    return sigma**2 / divisor, vectors, float((kept**2).sum() / divisor)


def walk(n: int, p: int, far: float = 3.0) -> Tensor:
    return (torch.randn(n, p).cumsum(0) + far * torch.randn(p)).float()


@every_kind
@pytest.mark.parametrize(("n", "size"), [(12, 30), (3, 30), (14, 4)])
def test_against_the_definition(options: dict[str, Any], n: int, size: int) -> None:
    x, k = walk(n, size), 3
    pca = StreamingPCA(k, **options)
    for part in x.split([1, n - 2, 1]):
        pca.partial_fit(part)
    assert pca.method_ == "gram"
    variances, vectors, total = truth(x.double().numpy(), **options)
    count = min(k, len(variances))
    bound = float(pca.error_bound_) + 1e-12 * total
    assert np.abs(pca.explained_variance_[:count].numpy() - variances[:count]).max() <= bound
    assert float(pca.total_variance_) == pytest.approx(total, rel=1e-9)
    assert bound < 1e-9 * total
    components = pca.components_.double().numpy()
    here = [j for j in range(count) if variances[j] > 1e-3 * variances[0]]
    for j in here:
        apart = min(abs(variances[j] - variances[i]) for i in range(len(variances)) if i != j) / variances[0]
        assert abs(components[j] @ vectors[j]) == pytest.approx(1.0, abs=1e-6 / min(1.0, apart))
    own = seen(x.double().numpy(), **options)
    window = options["window"] or n
    np.testing.assert_allclose(pca.transform(x[-window:]).numpy(), own @ components.T, atol=1e-5 * np.abs(own).max())


@every_kind
def test_history_is_of_each_row_s_own_rows(options: dict[str, Any]) -> None:
    x = walk(70, 9)
    pca = StreamingPCA(2, **options)
    for part in x.split(9):
        pca.partial_fit(part)
    for last, share in enumerate(pca.pc1_history_.tolist()):
        variances, _, total = truth(x[: last + 1].double().numpy(), **options) if last else (np.zeros(1), None, 0.0)
        if last == 0:
            kept = seen(x[:1].double().numpy(), **options)
            assert share == 1.0 if kept.any() else np.isnan(share)
            continue
        assert share == pytest.approx(variances[0] / total, rel=1e-9)
    assert len(pca.pc1_history_) == 70
    assert pca.n_samples_seen_ == (options["window"] or 70)


@every_kind
def test_blocks_runs_segments_and_states_change_no_bit(options: dict[str, Any]) -> None:
    x, segments = torch.stack([walk(11, 24) for _ in range(3)]), [(3, 8), (12, 12)]
    many = StreamingPCA(2, segments=segments, runs=3, **options).partial_fit(x[:, :4])
    saved = many.state_dict(1)
    for t in range(4, 11):
        many.partial_fit(x[:, t])
    for run in range(3):
        alone = StreamingPCA(2, segments=segments, **options)
        if run == 1:
            alone.load_state_dict(saved)
        for part in x[run, 4 if run == 1 else 0 :].split(3):
            alone.partial_fit(part)
        assert torch.equal(many.explained_variance_[run], alone.explained_variance_)
        assert torch.equal(many.pc1_history_[run].nan_to_num(7), alone.pc1_history_.nan_to_num(7))
        assert all(torch.equal(a[run], b) for a, b in zip(many.components_, alone.components_, strict=True))
        assert torch.equal(many.transform(x[:, 2])[run], alone.transform(x[run, 2]))
    one = StreamingPCA(2, **options).partial_fit(x[0])
    state = one.state_dict()
    rows = one.rows_
    one.partial_fit(x[1])
    again = StreamingPCA(2, **options)
    again.load_state_dict(state)
    assert torch.equal(again.rows_[: len(rows)], rows)


@pytest.mark.parametrize("reference", REFERENCES)
def test_narrow_stores(reference: str) -> None:
    """Differences in bfloat16: within the bound, which knows what was rounded."""
    x = walk(9, 40, far=20.0)
    pca = StreamingPCA(2, reference=reference, window=6, store_dtype=torch.bfloat16).partial_fit(x)
    variances, vectors, _ = truth(x.double().numpy(), reference=reference, normalize=False, window=6)
    error = np.abs(pca.explained_variance_.numpy() - variances[:2]).max()
    assert 0 < error <= float(pca.error_bound_)
    assert abs(pca.components_[0].double().numpy() @ vectors[0]) == pytest.approx(1.0, abs=1e-4)


def test_a_long_window_and_one_row() -> None:
    x = walk(7, 5)
    plain, wide = StreamingPCA(2, "gram").partial_fit(x), StreamingPCA(2, window=100).partial_fit(x)
    np.testing.assert_allclose(wide.explained_variance_, plain.explained_variance_, rtol=1e-10)
    np.testing.assert_allclose(wide.pc1_history_, plain.pc1_history_, rtol=1e-10)
    last = StreamingPCA(1, window=1, reference="none").partial_fit(x)
    assert float(last.explained_variance_) == pytest.approx(float(x[-1].double().square().sum()))
    assert last.explained_variance_ratio_.tolist() == [pytest.approx(1.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "incremental", "window": 5}, "need the rows, which method='gram' keeps; got method='incremental'"),
        ({"method": "sketch", "reference": "none"}, "which method='gram' keeps; got method='sketch'"),
        ({"reference": "median"}, "reference must be one of mean, first, none, got 'median'"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"normalize": True}, "normalize=True needs reference='first' or 'none'"),
        ({"normalize": True, "reference": "first", "store_dtype": torch.bfloat16}, "leave store_dtype out"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingPCA(**options)


def test_states_and_pcas_that_do_not_fit() -> None:
    x = walk(4, 6)
    first = StreamingPCA(2, reference="first").partial_fit(x)
    with pytest.raises(ValueError, match="state has reference 'first', this PCA 'mean'"):
        StreamingPCA(2).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="a PCA with a window cannot be merged"):
        StreamingPCA(2, window=3).merge(StreamingPCA(2, window=3).partial_fit(x))
    old = StreamingPCA(2).partial_fit(x).state_dict()
    for name in ("window", "reference", "normalize"):
        del old[name]
    again = StreamingPCA(2)
    again.load_state_dict(old)
    assert torch.equal(again.components_, StreamingPCA(2).partial_fit(x).components_)
    both = (
        StreamingPCA(2, reference="first")
        .partial_fit(x[:2])
        .merge(StreamingPCA(2, reference="first").partial_fit(x[2:]))
    )
    assert torch.equal(both.components_, first.components_)
