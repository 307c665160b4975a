"""StreamingPCA, method gram: exact, with the whole history; rows in pages, in memory or on disk, rounded or not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from test_pca import FLOATS, assert_same, assert_within_bound, bits, results, svd, trajectory
from torch import Generator, Tensor

from grokcurv import ops
from grokcurv.pca import StreamingPCA
from grokcurv.pca.common import Layout
from grokcurv.pca.prefixes import GramPrefixes, Prefixes, ScatterPrefixes
from grokcurv.pca.rows import Rows


def gram(k: int = 3, **options: Any) -> StreamingPCA:
    return StreamingPCA(k, "gram", **options)


def shares(x: Tensor) -> np.ndarray:
    """PC1 share of every prefix of at least two rows; NaN where nothing varies."""
    found = [svd(x[:t])[0] for t in range(2, len(x) + 1)]
    return np.array([variance[0] / (variance.sum() or np.nan) for variance in found])


# Exactness


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "p"), [(2, 1), (3, 50), (17, 5), (17, 4097), (31, 1000)])
def test_against_a_float64_svd(n: int, p: int, dtype: torch.dtype, generator: Generator) -> None:
    x = trajectory(n, p, generator, dtype)
    while (x == x[0]).all():  # rows that a narrow type makes alike have a test of their own
        x = trajectory(n, p, generator, dtype)
    k = min(4, n - 1, p)
    pca = gram(k).partial_fit(x)
    variance, components = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, variance[:k], rtol=1e-11)
    np.testing.assert_allclose(pca.explained_variance_ratio_, variance[:k] / variance.sum(), rtol=1e-11)
    np.testing.assert_allclose(pca.total_variance_, variance.sum(), rtol=1e-11)
    np.testing.assert_allclose(pca.pc1_history_[1:], shares(x), rtol=1e-11)
    accuracy = 1e-10 if dtype == torch.float64 else 1e-6
    cosines = np.abs(np.sum(pca.components_.double().numpy() * components[:k], axis=1))
    np.testing.assert_allclose(cosines, 1, atol=accuracy)
    products = (pca.components_.double() @ pca.components_.double().T).numpy()
    np.testing.assert_allclose(products, np.eye(k), atol=accuracy)
    np.testing.assert_allclose(pca.mean_, x.double().mean(0), rtol=accuracy, atol=accuracy)
    np.testing.assert_allclose(pca.step_norms_, x.double().diff(dim=0).norm(dim=1), rtol=1e-10)
    assert not pca.error_estimate_.any()


def test_against_scikit_learn_with_signs(generator: Generator) -> None:
    x = trajectory(23, 40, generator, torch.float64)
    ours, theirs = gram(5).partial_fit(x), PCA(n_components=5, svd_solver="full").fit(x.numpy())
    for name in ("explained_variance_", "explained_variance_ratio_", "components_", "mean_"):
        # The gaps between the five variances may be a hundredth of the largest.
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-7, atol=1e-9)
    fresh = trajectory(4, 40, generator, torch.float64)
    np.testing.assert_allclose(ours.transform(fresh), theirs.transform(fresh.numpy()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("spectrum", ["decaying", "flat"])
def test_many_rows_go_beyond_the_dense_solver_and_a_page(spectrum: str, generator: Generator) -> None:
    x = trajectory(150, 60, generator) if spectrum == "decaying" else torch.randn(150, 400, generator=generator)
    pca = gram(4).partial_fit(x)
    assert len(pca.state_dict()["state"]["rows"]) == 3
    variance, _ = svd(x)
    np.testing.assert_allclose(pca.explained_variance_, variance[:4], rtol=1e-10)
    np.testing.assert_allclose(pca.pc1_history_[1:], shares(x), rtol=1e-9)


# More rows than coordinates


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("segments", [None, [(0, 9), (9, 4), (13, 0), (20, 3)]], ids=["whole", "segments"])
def test_more_rows_than_coordinates(
    segments: list[tuple[int, int]] | None, dtype: torch.dtype, generator: Generator
) -> None:
    """The scatter matrix is solved, and nobody can tell."""
    x = trajectory(40, 23, generator, dtype)
    pca = gram(5, segments=segments).partial_fit(x)
    assert pca._method.narrow
    assert pca._method.solution[2].shape[1] == (23 if segments is None else 9)
    assert_within_bound(pca, x, segments)
    for i, (start, length) in enumerate(segments or [(0, 23)]):
        part, k = x[:, start : start + length], min(5, length)
        if not length:
            continue
        variance, axes = svd(part)
        mine = pca.explained_variance_ if segments is None else pca.explained_variance_[i]
        np.testing.assert_allclose(mine[:k], variance[:k], rtol=1e-10)
        assert not mine[k:].any()
        components = pca.components_ if segments is None else pca.components_[i]
        cosines = np.abs(np.sum(components[:k].double().numpy() * axes[:k], axis=1))
        np.testing.assert_allclose(cosines, 1, atol=1e-9 if dtype == torch.float64 else 1e-6)
        assert not components[k:].any()
        peaks = components[:k].gather(1, components[:k].abs().argmax(1, keepdim=True))
        assert (peaks > 0).all()
        history = pca.pc1_history_ if segments is None else pca.pc1_history_[:, i]
        np.testing.assert_allclose(history[1:], shares(part), rtol=1e-10)


@pytest.mark.parametrize("stored", [None, torch.bfloat16], ids=str)
def test_more_rows_than_coordinates_in_runs_and_pages(
    stored: torch.dtype | None, tmp_path: Path, generator: Generator
) -> None:
    x = torch.stack([trajectory(90, 12, generator) for _ in range(3)])
    options = {"segments": [(0, 5), (6, 6)], "store_dtype": stored}
    many = gram(runs=3, **options)
    for rows in x.split([3, 1, 60, 26], dim=1):
        many.partial_fit(rows)
        many.explained_variance_  # noqa: B018
    for run, one in enumerate([gram(scratch=tmp_path, **options).partial_fit(rows) for rows in x]):
        mine, its = results(many), results(one)
        assert one._method.narrow
        for name, value in its.items():
            if name != "n":
                got = mine[name][run]
                assert torch.equal(got.nan_to_num(torch.pi), value.nan_to_num(torch.pi)), name
        assert_within_bound(one, x[run], options["segments"])


def test_many_equal_rows_of_few_coordinates(generator: Generator) -> None:
    x = torch.randn(4, generator=generator).expand(20, 4)
    pca = gram().partial_fit(x)
    assert not pca.explained_variance_.any()
    assert not pca.components_.any()
    assert pca.pc1_history_.isnan().all()
    x = x.clone()
    x[:, 2] += torch.randn(20, generator=generator)
    pca = gram().partial_fit(x)
    assert (pca.explained_variance_ > 0).tolist() == [True, False, False]
    assert pca.components_[0].abs().tolist() == [0, 0, 1, 0]


def test_masked_rows_are_not_in_the_scatter(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    x = trajectory(30, 6, generator)
    broken = x.clone()
    broken[[0, 7, 29]] = torch.nan
    good = x[[i for i in range(30) if i not in (0, 7, 29)]]
    monkeypatch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)
    pca = gram().partial_fit(broken)
    ((_, blind),) = pca.leading_blocks(3)  # without a look at what is masked
    monkeypatch.undo()
    want = gram().partial_fit(good)
    torch.testing.assert_close(blind, want.components_, rtol=1e-5, atol=1e-5)


# Prefixes


def prefixes_of(x: Tensor, side: str) -> Prefixes:
    """Of x (S, n, p), about the first row; Gram matrices number by number, since bits of a product depend on n."""
    rows = x - x[:, :1]
    if side == "gram":
        gram = rows.new_zeros(len(x), x.shape[1], x.shape[1])
        for column in rows.unbind(2):
            gram += column[:, :, None] * column[:, None, :]
        return GramPrefixes(gram)
    layout = Layout((x.shape[2],) * len(x), x.device)
    packed = Rows(layout.size, x.dtype, x.device, None)
    packed.append(x.transpose(0, 1).flatten(1))
    return ScatterPrefixes(packed, packed[0], layout)


def prefix_shares(x: Tensor, side: str) -> Tensor:
    """(n, S) of x (S, n, p)."""
    prefixes = prefixes_of(x, side)
    return torch.stack(prefixes.leading_shares(range(1, x.shape[1] + 1)))


def crossing(n: int, p: int, generator: Generator) -> Tensor:
    """Rows along one axis, and from the middle on, farther, along another: the second overtakes the first."""
    x = 0.01 * torch.randn(n, p, generator=generator, dtype=torch.float64)
    t = torch.arange(n, dtype=torch.float64)
    x[:, 0] += torch.cos(t)
    x[:, 1] += torch.where(t >= n // 2, 1.5 * torch.sin(0.7 * t), 0.0)
    return x


KINDS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "walk": lambda n, p, g: trajectory(n, p, g, torch.float64),
    "flat": lambda n, p, g: torch.randn(n, p, generator=g, dtype=torch.float64),
    "crossing": crossing,
    "one direction": lambda n, p, g: torch.randn(n, 1, generator=g) * torch.randn(p, generator=g).double(),
    "few distinct": lambda n, p, g: trajectory(3, p, g, torch.float64)[torch.randint(3, (n,), generator=g)],
    "late": lambda n, p, g: trajectory(n, p, g, torch.float64) * (torch.arange(n)[:, None] > 45),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "p"), [("gram", 40), ("scatter", 40), ("scatter", 7)])
def test_prefixes_of_every_kind_of_trajectory(side: str, p: int, kind: str, generator: Generator) -> None:
    for n in (31, 32, 33, 64, 101):
        x = torch.stack([KINDS[kind](n, p, generator) for _ in range(2)])
        found = prefix_shares(x, side)
        for want, got in zip([shares(one) for one in x], found[1:].T, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-11)


@pytest.mark.parametrize("side", ["gram", "scatter"])
def test_a_prefix_is_that_of_its_own_rows_to_the_bit(side: str, generator: Generator) -> None:
    """Whatever rows follow, whatever prefixes were asked for before, and whoever is solved beside it."""
    x = torch.stack([KINDS[kind](101, 40, generator) for kind in KINDS])
    whole = prefix_shares(x, side)
    for n in (33, 47, 70, 96, 100):
        (last,) = prefixes_of(x[:, :n], side).leading_shares(range(n, n + 1))
        assert last.nan_to_num(7).equal(whole[n - 1].nan_to_num(7))
        for run in range(len(x)):
            *_, alone = prefixes_of(x[run : run + 1, :n], side).leading_shares(range(n - n % 5, n + 1))
            assert alone.nan_to_num(7).equal(whole[n - 1, run : run + 1].nan_to_num(7))


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the eigenproblems that are solved from nothing, but those of Lanczos."""
    sizes: list[int] = []
    eigh = ops.eigh
    monkeypatch.setattr(ops, "eigh", lambda a, k: sizes.append(a.shape[-1]) or eigh(a, k))
    return sizes


@pytest.mark.parametrize(("side", "sizes"), [("gram", [32, 64, 96, 128]), ("scatter", [40] * 4)])
def test_prefixes_of_a_trajectory_are_not_solved_from_nothing(
    side: str, sizes: list[int], solved: list[int], generator: Generator
) -> None:
    prefixes = prefixes_of(trajectory(128, 40, generator, torch.float64)[None], side)
    prefixes.leading_shares(range(32, 129))
    assert [size for size in solved if size >= 32] == sizes


def test_the_history_of_short_rows_never_takes_the_larger_side(solved: list[int], generator: Generator) -> None:
    x = trajectory(130, 40, generator, torch.float64)
    pca = gram()
    for rows in x.split([20, 25, 1, 54, 30]):
        history = pca.partial_fit(rows).pc1_history_
    assert max(solved) == 40
    np.testing.assert_allclose(history[1:], shares(x), rtol=1e-11)
    assert history.nan_to_num(7).equal(gram().partial_fit(x).pc1_history_.nan_to_num(7))
    later = gram()
    later.load_state_dict(gram().partial_fit(x[:70]).state_dict())
    assert later.partial_fit(x[70:]).pc1_history_.nan_to_num(7).equal(history.nan_to_num(7))


def test_the_history_of_short_rows_some_of_them_masked(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    """Read before and after; a row that is left out leaves no trace."""
    x = trajectory(90, 5, generator)
    broken = x.clone()
    broken[[50, 71]] = torch.nan
    want = gram().partial_fit(x[[i for i in range(90) if i not in (50, 71)]]).pc1_history_
    monkeypatch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)
    pca = gram().partial_fit(broken[:48])
    pca.pc1_history_  # noqa: B018
    pca.partial_fit(broken[48:])
    with pytest.raises(ValueError, match=r"row 50 held .* and 1 more after it"):
        pca.pc1_history_  # noqa: B018
    torch.testing.assert_close(pca.pc1_history_, want, rtol=1e-12, atol=0, equal_nan=True)


def test_small_motion_far_from_the_origin_is_not_lost(generator: Generator) -> None:
    """The spread is 1e-6 of the distance to the origin: an uncentred float64 Gram would keep four digits."""
    x = 1e6 + torch.randn(12, 300, generator=generator, dtype=torch.float64)
    pca = gram(2).partial_fit(x)
    np.testing.assert_allclose(pca.explained_variance_, svd(x)[0][:2], rtol=1e-12)


@pytest.mark.parametrize("power", [-40, 7])
def test_a_scale_that_is_a_power_of_two_changes_no_digit(power: int, generator: Generator) -> None:
    x = trajectory(9, 200, generator)
    pca, scaled = gram().partial_fit(x), gram().partial_fit(x * 2.0**power)
    assert torch.equal(scaled.explained_variance_, pca.explained_variance_ * 4.0**power)
    assert torch.equal(scaled.error_bound_, pca.error_bound_ * 4.0**power)
    assert torch.equal(scaled.components_, pca.components_)


def test_the_error_bound_holds_and_is_not_idle(generator: Generator) -> None:
    for dtype in FLOATS:
        x = trajectory(9, 3000, generator, dtype)
        pca = gram(8).partial_fit(x)
        assert_within_bound(pca, x)
        # (L / 2 + 4 n + ...) eps: about 1500 eps, of the squared distances from the first row.
        far = (x.double() - x[0].double()).square().sum() / 8
        assert 1500 * 2.2e-16 * far < pca.error_bound_ < 2000 * 2.3e-16 * far + 2e-12 * pca.explained_variance_[0]
    parts = [(0, 5), (5, 9)]
    assert_within_bound(gram(segments=parts).partial_fit(x), x, parts)


def test_step_norms_by_segment(generator: Generator) -> None:
    x = trajectory(9, 50, generator)
    norms = gram(segments=[(0, 20), (30, 5)]).partial_fit(x).step_norms_
    assert norms.shape == (8, 2)
    steps = x.double().diff(dim=0)
    np.testing.assert_allclose(norms[:, 0], steps[:, :20].norm(dim=1), rtol=1e-10)
    np.testing.assert_allclose(norms[:, 1], steps[:, 30:35].norm(dim=1), rtol=1e-10)


@pytest.mark.parametrize("method", ["incremental", "sketch"])
def test_other_methods_have_no_step_norms(method: str, generator: Generator) -> None:
    pca = StreamingPCA(2, method).partial_fit(trajectory(4, 8, generator))
    with pytest.raises(ValueError, match=f"step_norms_ needs method='gram', this PCA works by '{method}'"):
        pca.step_norms_  # noqa: B018


# Pages and the scratch file


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grokcurv.pca.rows.PAGE_ROWS", 4)


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("segments", [None, [(3, 40), (50, 0), (50, 70)]], ids=["whole", "segments"])
def test_a_scratch_file_changes_no_bit(
    tmp_path: Path, segments: list[tuple[int, int]] | None, dtype: torch.dtype, generator: Generator
) -> None:
    x = trajectory(18, 123, generator, dtype)
    for stored in (None, torch.bfloat16):
        want = gram(segments=segments, store_dtype=stored).partial_fit(x)
        pca = gram(segments=segments, store_dtype=stored, scratch=tmp_path)
        for rows in (x[:3], x[3:4], x[4:9], x[9:18]):
            pca.partial_fit(rows)
            results(pca)
        assert [len(page) for page in pca.state_dict()["state"]["rows"]] == [4, 4, 4, 4, 2]
        assert_same(pca, want)
        assert bits(pca)[-3:] == bits(want)[-3:]
        assert not list(tmp_path.iterdir())  # nameless


def test_pages_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch, generator: Generator) -> None:
    x = trajectory(18, 123, generator, torch.float64)
    want = results(gram().partial_fit(x))
    monkeypatch.setattr("grokcurv.pca.rows.PAGE_ROWS", 4)
    for name, value in results(gram().partial_fit(x)).items():
        if name.startswith(("components_", "mean_")):
            torch.testing.assert_close(value, want[name], rtol=1e-12, atol=1e-13)
        else:
            torch.testing.assert_close(value, want[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("small_pages")
def test_a_scratch_file_can_be_saved_merged_and_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    x = trajectory(18, 30, generator)
    pca = gram(scratch=tmp_path)
    pca.load_state_dict(gram().partial_fit(x[:7]).state_dict())
    pca.merge(gram(scratch=tmp_path).partial_fit(x[7:13])).partial_fit(x[13:])
    assert_same(pca, gram().partial_fit(x))
    monkeypatch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)
    broken = x.clone()
    broken[[1, 6, 16], 5] = torch.nan
    masked = gram(scratch=tmp_path).partial_fit(broken)
    with pytest.raises(ValueError, match=r"row 1 held .* and 2 more after it"):
        masked.mean_  # noqa: B018
    assert_same(masked, gram().partial_fit(x[[i for i in range(18) if i not in (1, 6, 16)]]))


@pytest.mark.parametrize("first", [0, 5], ids=["first row", "later"])
@pytest.mark.usefixtures("small_pages")
def test_a_full_disk_is_an_error_that_leaves_no_trace(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    x = trajectory(17, 30, generator)
    pca = gram(scratch=tmp_path).partial_fit(x[:first])
    before = bits(pca)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(OSError, match="No space left"):
            pca.partial_fit(x[first:])
        assert pca.n_samples_seen_ == first
        assert bits(pca) == before
        if first:
            assert_same(pca, gram().partial_fit(x[:first]))
            pca.partial_fit(x[first : first + 2])  # there is room left on the page
        else:
            with pytest.raises(ValueError, match="has seen no rows yet"):
                pca.explained_variance_  # noqa: B018
    pca.partial_fit(x[pca.n_samples_seen_ :])
    assert_same(pca, gram().partial_fit(x))


@pytest.mark.usefixtures("small_pages")
def test_a_full_disk_on_a_merge_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    x = trajectory(17, 30, generator)
    pca, other = gram(scratch=tmp_path).partial_fit(x[:5]), gram().partial_fit(x[5:])
    before, reserve, pages = bits(pca), os.posix_fallocate, []

    def room_for_one(file: int, start: int, length: int) -> None:
        pages.append(start)
        (reserve if len(pages) == 1 else no_room)(file, start, length)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", room_for_one)
        with pytest.raises(OSError, match="No space left"):
            pca.merge(other)
    assert bits(pca) == before
    assert_same(pca.merge(other), gram().partial_fit(x))


def no_room(*_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_missing_folder_is_an_error(tmp_path: Path, generator: Generator) -> None:
    x = trajectory(4, 8, generator)
    pca = gram(scratch=tmp_path / "missing")
    with pytest.raises(OSError, match="missing"):
        pca.partial_fit(x)
    assert pca.n_samples_seen_ == 0
    (tmp_path / "missing").mkdir()
    assert_same(pca.partial_fit(x), gram().partial_fit(x))


# Rounded rows


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rounded_differences_are_within_their_bound(
    dtype: torch.dtype, stored: torch.dtype, generator: Generator
) -> None:
    for scale in (1.0, 1e-3):  # of the distance from the origin
        x = trajectory(25, 400, generator, torch.float64)
        x = (x[0] + scale * (x - x[0])).to(dtype)
        pca = gram(k=5, store_dtype=stored).partial_fit(x)
        assert {page.dtype for page in pca.state_dict()["state"]["rows"]} == {stored}
        assert_within_bound(pca, x)
        unit = torch.finfo(stored).eps / 2
        far = float((x.double() - x[0].double()).square().sum()) / 24
        assert pca.error_bound_ < (2.1 * unit + 1e-7) * far  # not idle
        mean = x.double().mean(0)
        farthest = float((x.double() - x[0].double()).abs().max())
        rounding = 25 * 2.0**-53 if dtype == torch.float64 else 2.0**-24
        atol = 1.01 * unit * farthest + 2 * rounding * (farthest + float(x.double().abs().max()))
        torch.testing.assert_close(pca.mean_.double(), mean, rtol=0, atol=atol)


def test_wide_storage_of_narrow_rows_loses_what_the_bound_says(generator: Generator) -> None:
    """Differences of float32 rows have more digits than a float32 when the first row is much larger or smaller."""
    for _ in range(20):
        x = torch.randn(6, 3, generator=generator)
        x[0] *= 1e6
        assert_within_bound(gram(k=2, store_dtype=torch.float64).partial_fit(x), x)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_differences_beyond_the_stored_type_are_refused(stored: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1e100, 1.0]], dtype=torch.float64)
    pca = gram(k=1, store_dtype=stored).partial_fit(x[:2])
    with pytest.raises(ValueError, match="row 0"):
        pca.partial_fit(x[2:])
    torch.testing.assert_close(pca.explained_variance_.item(), 1.0, rtol=1e-14, atol=0)


def test_merged_rounded_rows_are_within_their_bound() -> None:
    """The other's first row is far from the rest, so that these were rounded as much larger numbers than they are."""
    near = torch.tensor([10.51, -10.51]).repeat(100)[:, None]  # 200 away, these are rounded to 11 and -11
    mine, other = torch.zeros(1, 1), torch.cat([torch.tensor([[200.0]]), near])
    pca = gram(k=1, store_dtype=torch.bfloat16).partial_fit(mine)
    pca.merge(gram(k=1, store_dtype=torch.bfloat16).partial_fit(other))
    assert_within_bound(pca, torch.cat([mine, other]))


def test_rounded_rows_can_be_saved(generator: Generator) -> None:
    x = trajectory(12, 40, generator)
    pca = gram(store_dtype=torch.bfloat16).partial_fit(x[:7])
    twin = gram(store_dtype=torch.bfloat16)
    twin.load_state_dict(pca.state_dict())
    assert_same(twin.partial_fit(x[7:]), pca.partial_fit(x[7:]))
