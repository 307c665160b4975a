"""StreamingPCA: what holds for every method. What one of them promises beyond that is in test_pca_<method>.py."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from grokcurv.flat import Segment
from grokcurv.pca import StreamingPCA
from grokcurv.runs import pack, unpack

FLOATS = [torch.float32, torch.float64, torch.bfloat16]
SEGMENTS = [(3, 40), (50, 7), (60, 0), (60, 30)]
METHODS: dict[str, dict[str, Any]] = {
    "gram": {"method": "gram"},
    "incremental": {"method": "incremental"},
    "shrinkage": {"method": "incremental", "shrinkage": True},
    "sketch-64": {"method": "sketch", "sketch_size": 64},
    "sketch-4096": {"method": "sketch", "sketch_size": 4096},
    "auto": {},
}
every_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
whole_and_segments = pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "segments"])
every_kind = pytest.mark.parametrize(
    ("segments", "dtype"), [(None, FLOATS[0]), (SEGMENTS, FLOATS[1]), (SEGMENTS, FLOATS[2])], ids=["32", "64", "16"]
)


def make(options: dict[str, Any], k: int = 3, **more: Any) -> StreamingPCA:
    """With a small basis and buffer, so that a few rows fill them more than once."""
    return StreamingPCA(k, **({"oversampling": 2, "block": 5} | options | more))


def trajectory(n: int, p: int, generator: Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random walk with drift, far from the origin: rows (n, p)."""
    steps = torch.randn(n, p, generator=generator, dtype=torch.float64) + 0.5 * torch.randn(p, generator=generator)
    return (20 * torch.randn(p, generator=generator) + steps.cumsum(0)).to(dtype)


def svd(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Variances and components of the rows, by numpy in float64."""
    rows = (x.double() - x[0].double()).numpy()  # float32 rows lose nothing, and the mean is small beside them
    _, s, v = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return s**2 / (len(rows) - 1), v


def variances(x: Tensor, k: int) -> np.ndarray:
    """The k leading ones, zeros where there are fewer."""
    return np.pad(svd(x)[0], (0, k))[:k]


def parts(x: Tensor, segments: list[tuple[int, int]] | None) -> list[Tensor]:
    return [x] if segments is None else [x[:, start : start + length] for start, length in segments]


def assert_within_bound(pca: StreamingPCA, x: Tensor, segments: list[tuple[int, int]] | None = None) -> None:
    """Every variance is as far as ``error_bound_`` from that of the rows x at most."""
    assert pca.n_samples_seen_ == len(x)
    values, bounds = pca.explained_variance_.view(-1, pca.n_components), pca.error_bound_.view(-1)
    for part, value, bound in zip(parts(x, segments), values, bounds, strict=True):
        errors = np.abs(value.numpy() - variances(part, pca.n_components))
        assert (errors <= bound.item()).all(), (errors / bound.item(), pca)


def results(pca: StreamingPCA) -> dict[str, Tensor]:
    """Everything public that there is."""
    names = ["explained_variance_", "explained_variance_ratio_", "total_variance_", "pc1_history_"]
    names += ["pc1_history_bound_", "error_bound_", "error_estimate_"]
    found = {name: getattr(pca, name) for name in names}
    found["n"] = torch.tensor([pca.n_samples_seen_, pca.n_features_in_])
    if pca.method_ == "gram":
        found["step_norms_"] = pca.step_norms_
    if pca.method_ != "sketch":
        for name in ("components_", "mean_"):
            value = getattr(pca, name)
            pieces = value if isinstance(value, list) else [value]
            found |= {f"{name}[{i}]": piece for i, piece in enumerate(pieces)}
    return found


def assert_same(a: StreamingPCA, b: StreamingPCA) -> None:
    """Bitwise, in everything public."""
    mine, theirs = results(a), results(b)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value.nan_to_num(torch.pi), theirs[name].nan_to_num(torch.pi)), name


def bits(pca: StreamingPCA) -> list[Any]:
    """The whole state, to compare bitwise."""

    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, Tensor):
            yield value.dtype, value.shape, value.reshape(-1).view(torch.uint8).numpy().tobytes()
        elif isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield key
                yield from leaves(item)
        else:
            yield value

    return list(leaves(pca.state_dict()))


# Shapes


@every_dtype
@every_method
def test_shapes_and_types(options: dict[str, Any], dtype: torch.dtype, generator: Generator) -> None:
    x = trajectory(12, 90, generator, dtype)
    pca = make(options).partial_fit(x)
    assert (pca.n_samples_seen_, pca.n_features_in_) == (12, 90)
    shapes = {
        "explained_variance_": (3,),
        "explained_variance_ratio_": (3,),
        "error_estimate_": (3,),
        "total_variance_": (),
        "error_bound_": (),
        "pc1_history_": (12,),
    }
    for name, shape in shapes.items():
        assert (getattr(pca, name).shape, getattr(pca, name).dtype) == (shape, torch.float64), name
    assert pca.error_kind_ == ("probability 0.99" if pca.method_ == "sketch" else "guaranteed")
    assert pca.transform(x).shape == (12, 3)
    assert pca.transform(x[0]).shape == (3,)
    assert pca.transform(x[:0]).shape == (0, 3)
    assert pca.transform(x).dtype == torch.float64
    if pca.method_ != "sketch":
        output = torch.float64 if dtype == torch.float64 else torch.float32
        assert (pca.components_.shape, pca.components_.dtype) == ((3, 90), output)
        assert (pca.mean_.shape, pca.mean_.dtype) == ((90,), output)


@every_method
def test_shapes_with_segments(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(12, 90, generator)
    pca = make(options, segments=[Segment("b", *SEGMENTS[0], (5, 8)), *SEGMENTS[1:]]).partial_fit(x)
    assert pca.segments is not None
    assert [s.name for s in pca.segments] == ["b", "50:57", "60:60", "60:90"]
    assert (pca.n_samples_seen_, pca.n_features_in_) == (12, 90)
    shapes = {
        "explained_variance_": (4, 3),
        "explained_variance_ratio_": (4, 3),
        "error_estimate_": (4, 3),
        "total_variance_": (4,),
        "error_bound_": (4,),
        "pc1_history_": (12, 4),
    }
    for name, shape in shapes.items():
        assert (getattr(pca, name).shape, getattr(pca, name).dtype) == (shape, torch.float64), name
    assert pca.transform(x).shape == (4, 12, 3)
    assert pca.transform(x[0]).shape == (4, 3)
    if pca.method_ != "sketch":
        assert [c.shape for c in pca.components_] == [(3, length) for _, length in SEGMENTS]
        assert [m.shape for m in pca.mean_] == [(length,) for _, length in SEGMENTS]


@every_method
def test_segments_are_independent_pcas(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(13, 90, generator, torch.float64)
    segments = [(50, 7), (60, 0), (3, 40), (10, 12), (50, 7)]  # in any order; they may overlap
    pca = make(options, segments=segments).partial_fit(x)
    assert_within_bound(pca, x, segments)
    if pca.method_ == "sketch":
        return  # a segment alone meets other random numbers
    for index, (start, length) in enumerate(segments):
        if not length:
            continue
        part = x[:, start : start + length]
        alone = make(options).partial_fit(part)
        torch.testing.assert_close(pca.explained_variance_[index], alone.explained_variance_, rtol=1e-11, atol=0)
        torch.testing.assert_close(pca.components_[index], alone.components_, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(pca.mean_[index], alone.mean_, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(pca.pc1_history_[:, index], alone.pc1_history_, rtol=1e-11, atol=0, equal_nan=True)


@every_method
def test_only_the_segments_are_stored_and_looked_at(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(4, 1000, generator)
    x[:, 500] = math.nan
    pca = make(options, segments=[(10, 5), (600, 6)]).partial_fit(x)
    assert pca.explained_variance_.isfinite().all()
    if pca.method_ != "sketch":
        rows = pca.state_dict()["state"]["rows"]
        assert torch.cat(list(rows)).numel() % 11 == 0


# Little to analyse


@every_method
def test_no_rows(options: dict[str, Any], generator: Generator) -> None:
    pca = make(options)
    assert pca.n_samples_seen_ == 0
    assert pca.method_ is None
    assert pca.pc1_history_.shape == (0,)
    assert make(options, segments=[(0, 1), (1, 1)]).pc1_history_.shape == (0, 2)
    pca.partial_fit(trajectory(3, 5, generator)[:0])
    names = ["components_", "mean_", "explained_variance_", "explained_variance_ratio_", "total_variance_"]
    names += ["error_bound_", "error_kind_", "error_estimate_", "n_features_in_", "step_norms_"]
    for name in names:
        with pytest.raises(ValueError, match="has seen no rows yet"):
            getattr(pca, name)
    with pytest.raises(ValueError, match="has seen no rows yet"):
        pca.transform(torch.zeros(3))
    assert pca.partial_fit(trajectory(3, 7, generator)).n_features_in_ == 7  # no rows of 5 have been seen


@every_method
def test_one_row(options: dict[str, Any], generator: Generator) -> None:
    row = trajectory(1, 6, generator)
    pca = make(options).partial_fit(row)
    assert pca.explained_variance_.isnan().all()
    assert pca.explained_variance_ratio_.isnan().all()
    assert pca.total_variance_.isnan()
    assert pca.pc1_history_.isnan().tolist() == [True]
    assert not pca.transform(row).any()
    if pca.method_ != "sketch":
        assert torch.equal(pca.components_, torch.zeros(3, 6))
        assert torch.equal(pca.mean_, row[0])


@every_method
def test_two_rows(options: dict[str, Any]) -> None:
    x = torch.tensor([[1.0, 5.0, 2.0], [4.0, 1.0, 2.0]])
    pca = make(options).partial_fit(x)
    torch.testing.assert_close(pca.explained_variance_ratio_[0].item(), 1.0, rtol=1e-12, atol=0)
    assert pca.explained_variance_[1:].tolist() == [0, 0]
    if pca.method_ != "sketch":
        torch.testing.assert_close(pca.explained_variance_[0].item(), 12.5, rtol=1e-12, atol=0)
        torch.testing.assert_close(pca.components_, torch.tensor([[-0.6, 0.8, 0.0], [0, 0, 0], [0, 0, 0]]))
        torch.testing.assert_close(pca.mean_, torch.tensor([2.5, 3.0, 2.0]), rtol=1e-7, atol=0)


@every_method
@pytest.mark.parametrize("n", [3, 8])
def test_constant_rows(n: int, options: dict[str, Any]) -> None:
    pca = make(options).partial_fit(torch.full((n, 4), 0.1))
    assert pca.explained_variance_.tolist() == [0, 0, 0]
    assert pca.explained_variance_ratio_.isnan().all()
    assert pca.total_variance_ == 0
    assert pca.pc1_history_.isnan().all()
    if pca.method_ != "sketch":
        assert not pca.components_.any()
        assert torch.equal(pca.mean_, torch.full((4,), 0.1))


@every_method
def test_fewer_rows_than_components(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(4, 50, generator)
    pca = make(options, k=6).partial_fit(x)
    assert (pca.explained_variance_ > 0).tolist() == [True, True, True, False, False, False]
    assert_within_bound(pca, x)
    torch.testing.assert_close(pca.explained_variance_ratio_.sum().item(), 1.0, rtol=1e-6, atol=0)


@every_dtype
@every_method
def test_repeated_rows_have_the_rank_of_the_different_ones(
    options: dict[str, Any], dtype: torch.dtype, generator: Generator
) -> None:
    three = trajectory(3, 2000, generator, dtype)
    pca = make(options, k=5).partial_fit(three[[0, 1, 2, 0, 1, 2, 2, 2, 1, 0, 0]])
    assert (pca.explained_variance_ > 0).tolist() == [True, True, False, False, False]
    assert pca.explained_variance_[2:].tolist() == [0, 0, 0]
    if pca.method_ != "sketch":
        assert not pca.components_[2:].any()


@every_method
@pytest.mark.parametrize("p", [1, 2])
def test_more_components_than_coordinates(p: int, options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(9, p, generator)
    pca = make(options, k=6).partial_fit(x)
    assert (pca.explained_variance_ > 0).sum() == p
    assert pca.n_features_in_ == p
    assert_within_bound(pca, x)
    torch.testing.assert_close(pca.explained_variance_ratio_.sum().item(), 1.0, rtol=1e-6, atol=0)
    if pca.method_ != "sketch":
        assert pca.components_.shape == (6, p)


@every_method
def test_rows_of_no_coordinates(options: dict[str, Any]) -> None:
    pca = make(options).partial_fit(torch.zeros(8, 0))
    assert pca.explained_variance_.tolist() == [0, 0, 0]
    assert (pca.n_samples_seen_, pca.n_features_in_) == (8, 0)


@every_method
def test_an_empty_segment(options: dict[str, Any], generator: Generator) -> None:
    pca = make(options, k=1, segments=[(0, 3), (3, 0)]).partial_fit(trajectory(7, 5, generator))
    assert pca.explained_variance_[1] == pca.total_variance_[1] == 0
    assert pca.explained_variance_[0] > 0
    assert pca.explained_variance_ratio_.isnan().tolist() == [[False], [True]]
    assert pca.pc1_history_[:, 1].isnan().all()
    if pca.method_ != "sketch":
        assert pca.components_[1].shape == (1, 0)


@every_method
def test_numbers_at_the_ends_of_float32(options: dict[str, Any], generator: Generator) -> None:
    """Their squares are far inside float64: the answer is scaled, or for the largest numbers refused."""
    x = torch.randn(13, 50, generator=generator).clamp(-3, 3)
    want = make(options).partial_fit(x)
    for scale in (2.0**-90, 2.0**60, 2.0**126):
        try:
            pca = make(options).partial_fit(x * scale)
        except ValueError:
            assert scale > 2.0**100
            continue
        torch.testing.assert_close(pca.explained_variance_, want.explained_variance_ * scale**2, rtol=1e-12, atol=0)


# Components


@pytest.mark.parametrize("options", [METHODS["gram"], METHODS["incremental"]], ids=["gram", "incremental"])
def test_weak_components_stay_orthonormal(options: dict[str, Any], generator: Generator) -> None:
    """Singular values from 1 down to 1e-6: the squares reach the rounding of the Gram matrix."""
    left = torch.linalg.qr(torch.randn(8, 5, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(500, 5, generator=generator, dtype=torch.float64)).Q
    x = left * torch.logspace(0, -6, 5, dtype=torch.float64) @ right.T
    pca = make(options, k=5).partial_fit(x)
    assert (pca.explained_variance_[:4] > 0).all()
    rows = pca.components_[pca.explained_variance_ > 0]
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["gram", "incremental", "shrinkage", "auto"])
def test_components_are_orthonormal_with_positive_peaks(name: str, generator: Generator) -> None:
    components = make(METHODS[name]).partial_fit(trajectory(23, 60, generator)).components_
    torch.testing.assert_close(components.double() @ components.double().T, torch.eye(3).double(), rtol=0, atol=1e-6)
    peaks = components.gather(1, components.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()


@every_method
def test_transform_is_along_the_components_about_the_mean(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(12, 60, generator, torch.float64)
    pca = make(options).partial_fit(x)
    fresh = trajectory(4, 60, generator, torch.float64)
    scores = pca.transform(fresh)
    torch.testing.assert_close(pca.transform(fresh[2]), scores[2], rtol=0, atol=0)
    if pca.method_ != "sketch":
        torch.testing.assert_close(scores, (fresh - pca.mean_) @ pca.components_.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pca.transform(x).mean(0), torch.zeros(3).double(), rtol=0, atol=1e-11)


# Streaming


@every_kind
@every_method
def test_block_boundaries_and_reading_change_no_bit(
    options: dict[str, Any], segments: list[tuple[int, int]] | None, dtype: torch.dtype, generator: Generator
) -> None:
    x = trajectory(19, 4200, generator, dtype)
    whole = make(options, segments=segments).partial_fit(x)
    one_by_one = make(options, segments=segments)
    for row in x:
        one_by_one.partial_fit(row)
    uneven = make(options, segments=segments)
    for size in (2, 0, 5, 1, 11):
        start = uneven.n_samples_seen_
        uneven.partial_fit(x[start : start + size])
        results(uneven)
        uneven.transform(x[0])
    assert_same(whole, one_by_one)
    assert_same(whole, uneven)
    assert bits(whole) == bits(uneven)


@pytest.mark.parametrize("name", ["gram", "shrinkage", "sketch-4096"])
def test_threads_change_no_bit(name: str, generator: Generator) -> None:
    x, options = trajectory(14, 30_001, generator), METHODS[name]
    fits = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pca = make(options).partial_fit(x)
            results(pca)
            fits.append(pca)
    finally:
        torch.set_num_threads(before)
    assert_same(*fits)
    assert bits(fits[0]) == bits(fits[1])


@pytest.mark.parametrize("length", [30, 5])
@every_method
def test_history_does_not_depend_on_when_it_is_read(options: dict[str, Any], length: int, generator: Generator) -> None:
    x = trajectory(12, length, generator)
    late, early = make(options).partial_fit(x), make(options)
    seen = [early.partial_fit(row).pc1_history_.clone() for row in x]
    torch.testing.assert_close(seen[-1], late.pc1_history_, rtol=0, atol=0, equal_nan=True)
    for t, history in enumerate(seen):
        torch.testing.assert_close(history, late.pc1_history_[: t + 1], rtol=0, atol=0, equal_nan=True)
    known = late.pc1_history_.isfinite()
    if late.method_ == "gram":
        assert known.tolist() == [False] + 11 * [True]
    else:
        assert known.nonzero()[:, 0].tolist() == [4, 9]  # a block is five rows


@every_method
def test_rows_are_copied(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(6, 8, generator)
    same = make(options).partial_fit(x)
    pca = make(options).partial_fit(mine := x.clone())
    mine.zero_()
    assert_same(pca, same)


@every_method
def test_any_layout_and_graph_of_rows_will_do(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(7, 10, generator, dtype=torch.float64)
    a = make(options).partial_fit(x)
    b = make(options).partial_fit(x.T.contiguous().T.requires_grad_())
    assert_same(a, b)
    assert not any(value.requires_grad for value in results(b).values())


@every_method
def test_results_follow_new_rows(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(9, 11, generator)
    pca = make(options).partial_fit(x[:7])
    results(pca)
    assert_same(pca.partial_fit(x[7:]), make(options).partial_fit(x))
    assert_within_bound(pca, x)


# Saving


@every_kind
@every_method
def test_state_survives_a_file_bitwise(
    tmp_path: Path,
    options: dict[str, Any],
    segments: list[tuple[int, int]] | None,
    dtype: torch.dtype,
    generator: Generator,
) -> None:
    x = trajectory(15, 90, generator, dtype)
    other = make(options, segments=segments).partial_fit(trajectory(3, 90, generator))
    for saved_after in (0, 1, 5, 9):  # no rows; one in the buffer; a full one; one beside a basis
        pca = make(options, segments=segments).partial_fit(x[:saved_after])
        (tmp_path / "pca").write_bytes(pack(pca.state_dict()))
        saved = bits(pca)
        pca.partial_fit(x[saved_after:])
        loaded = copy.copy(other)  # whatever it knew is replaced
        loaded.load_state_dict(unpack((tmp_path / "pca").read_bytes()))
        assert loaded.n_samples_seen_ == saved_after
        assert bits(loaded) == saved
        assert_same(loaded.partial_fit(x[saved_after:]), pca)


@every_method
def test_a_state_is_a_snapshot(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(14, 20, generator)
    pca = make(options).partial_fit(x[:4])
    state = pca.state_dict()
    pca.partial_fit(x[4:])
    twin = make(options)
    twin.load_state_dict(state)
    assert_same(twin, make(options).partial_fit(x[:4]))
    twin.partial_fit(-x)
    assert_same(pca, make(options).partial_fit(x))
    again = make(options)
    again.load_state_dict(state)
    assert_same(again, make(options).partial_fit(x[:4]))


def damaged(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """States like this one that cannot be right, and what is wrong with them."""
    for name in state:
        yield f"no {name}", {key: value for key, value in state.items() if key != name}
    yield "no method", state | {"method_": None}
    yield "no rows of a method", state | {"state": None}
    yield "unknown method", state | {"method_": "fourier"}
    yield "unknown dtype", state | {"dtype": "torch.int8"}
    inner = state["state"]
    for name, value in inner.items():
        yield f"no state/{name}", state | {"state": {key: v for key, v in inner.items() if key != name}}
        if isinstance(value, Tensor):
            longer = torch.zeros([size + 1 for size in value.shape] or [1], dtype=value.dtype)
            yield f"shape of state/{name}", state | {"state": inner | {name: longer}}
            yield f"type of state/{name}", state | {"state": inner | {name: value.half()}}


@every_method
def test_a_damaged_state_is_refused(options: dict[str, Any], generator: Generator) -> None:
    pca = make(options).partial_fit(trajectory(8, 16, generator))
    other = make(options).partial_fit(trajectory(9, 16, generator)).state_dict()
    before, mine, accepted = bits(pca), pack(pca.state_dict()), []
    for what, state in damaged(other):
        try:
            pca.load_state_dict(state)
        except Exception as error:
            if not (isinstance(error, ValueError) and "state is damaged" in str(error)):
                accepted.append(f"{what}: {error!r}")
        else:
            accepted.append(what)
            pca = make(options)
            pca.load_state_dict(unpack(mine))
        assert bits(pca) == before, what
    assert not accepted, accepted


@pytest.mark.parametrize("name", ["gram", "incremental"])
def test_a_state_of_rows_of_another_length_is_refused(name: str, generator: Generator) -> None:
    pca = make(METHODS[name]).partial_fit(trajectory(8, 16, generator))
    with pytest.raises(ValueError, match="state is damaged"):
        pca.load_state_dict(pca.state_dict() | {"n_features": 17})


DIFFERENT: dict[str, Any] = {
    "n_components": 4,
    "method": "incremental",
    "segments": [(0, 4)],
    "oversampling": 3,
    "block": 6,
    "shrinkage": True,
    "store_dtype": torch.bfloat16,
    "sketch_size": 128,
    "seed": 1,
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_settings_are_refused(name: str, generator: Generator) -> None:
    x = trajectory(4, 6, generator)
    pca = make({}).partial_fit(x)
    options = {name: DIFFERENT[name]}
    other = StreamingPCA(**({"n_components": 3, "oversampling": 2, "block": 5} | options)).partial_fit(x)
    before = bits(pca)
    with pytest.raises(ValueError, match=f"other has a different {name}: "):
        pca.merge(other)
    with pytest.raises(ValueError, match=f"state has {name} .*, this PCA "):
        pca.load_state_dict(other.state_dict())
    assert bits(pca) == before


def test_memory_limit_and_scratch_may_differ(tmp_path: Path, generator: Generator) -> None:
    x = trajectory(8, 6, generator)
    pca = make({}).partial_fit(x[:4])
    pca.merge(make({}, memory_limit=10**6, scratch=tmp_path).partial_fit(x[4:]))
    assert_same(pca, make({}).partial_fit(x))


# Merging


@every_kind
@every_method
def test_merging_is_concatenation(
    options: dict[str, Any], segments: list[tuple[int, int]] | None, dtype: torch.dtype, generator: Generator
) -> None:
    x = trajectory(24, 90, generator, dtype)

    def fit(rows: Tensor) -> StreamingPCA:
        return make(options, segments=segments).partial_fit(rows)

    for cut in (3, 5, 12, 22):  # a buffer alone, a full one, and a basis on either side or both
        other = fit(x[cut:])
        merged, before = fit(x[:cut]), bits(other)
        assert merged.merge(other) is merged
        assert bits(other) == before
        assert_within_bound(merged, x, segments)
        total = [svd(part)[0].sum() for part in parts(x, segments)]
        if merged.method_ != "sketch":
            # Rounding alone, whatever was cut off: a unit of float32 of the distances from the first row.
            far = [float((part.double() - part[:1].double()).square().sum()) for part in parts(x, segments)]
            errors = np.abs(merged.total_variance_.view(-1).numpy() - total)
            np.testing.assert_array_less(errors, 1e-6 * np.array(far) + 1e-12)
            means = merged.mean_ if segments is not None else [merged.mean_]
            for mean, part in zip(means, parts(x, segments), strict=True):
                torch.testing.assert_close(mean.double(), part.double().mean(0), rtol=1e-6, atol=1e-5)
        if merged.method_ == "gram":
            assert_same(merged, fit(x))
        more = trajectory(7, 90, generator, dtype)
        assert_within_bound(merged.partial_fit(more), torch.cat([x, more]), segments)


@every_method
def test_merging_with_nothing_and_with_itself(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(12, 40, generator)
    pca = make(options).partial_fit(x)
    before = bits(pca)
    assert bits(pca.merge(make(options))) == before
    empty = make(options)
    assert_within_bound(empty.merge(pca), x)
    assert bits(pca) == before
    assert_within_bound(empty.partial_fit(x), torch.cat([x, x]))
    assert make(options).merge(make(options)).n_samples_seen_ == 0
    assert_within_bound(pca.merge(pca), torch.cat([x, x]))
    if pca.method_ == "gram":
        assert_same(pca, make(options).partial_fit(torch.cat([x, x])))


@every_method
def test_rows_that_cannot_be_merged(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(8, 6, generator)
    pca = make(options).partial_fit(x)
    before = bits(pca)
    with pytest.raises(ValueError, match="other has 5 coordinates"):
        pca.merge(make(options).partial_fit(x[:, :5]))
    with pytest.raises(ValueError, match=r"6 coordinates, torch\.float64"):
        pca.merge(make(options).partial_fit(x.double()))
    assert bits(pca) == before


# Auto

LIMIT = 200_000
"""Bytes: some thirty rows of 1000 coordinates beside what incremental takes."""


def state_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return sum(state_bytes(value) for value in values)


def test_auto_goes_from_gram_to_incremental(generator: Generator) -> None:
    x = trajectory(60, 1000, generator)
    pca, gram = make({}, memory_limit=LIMIT), make(METHODS["gram"])
    assert repr(pca) == "StreamingPCA(n_components=3, method_=None, reason_='no rows yet')"
    methods = []
    for t, row in enumerate(x, 1):
        methods.append(pca.partial_fit(row).method_)
        assert f"method_={pca.method_!r}, reason_={pca.reason_!r}" in repr(pca)
        assert state_bytes(pca.state_dict()) <= LIMIT
        if t > 1:
            assert_within_bound(pca, x[:t])
        if methods[-1] == "gram":
            assert_same(pca, gram.partial_fit(row))
            assert "memory_limit = 0.000186 GiB" in pca.reason_
        else:
            assert "rows would take" in pca.reason_
            assert "beyond memory_limit = 0.000186 GiB" in pca.reason_
    switch = methods.index("incremental")
    assert 20 < switch < 40
    assert methods == switch * ["gram"] + (60 - switch) * ["incremental"]
    assert_same(pca, make({}, memory_limit=LIMIT).partial_fit(x))
    assert_those_but_the_history(pca, make(METHODS["incremental"]).partial_fit(x))
    assert_history_of_both(pca, x, switch)


def assert_those_but_the_history(a: StreamingPCA, b: StreamingPCA) -> None:
    mine, theirs = results(a), results(b)
    for found in (mine, theirs):
        del found["pc1_history_"], found["pc1_history_bound_"]
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def assert_history_of_both(pca: StreamingPCA, x: Tensor, kept: int) -> None:
    """That of the rows that were kept, and after it that of incremental."""
    for name in ("pc1_history_", "pc1_history_bound_"):
        exact, later = (getattr(make(METHODS[method]).partial_fit(x), name) for method in ("gram", "incremental"))
        want = torch.cat([exact[:kept], later[kept:]])
        torch.testing.assert_close(getattr(pca, name), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cut", [[1] * 30, [30], [12, 18], [13, 17], [5, 20, 5]], ids=str)
def test_auto_keeps_so_many_rows_and_no_more(
    cut: list[int], monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    monkeypatch.setattr("grokcurv.pca.streaming.MOST_ROWS", 12)
    x = trajectory(30, 40, generator)
    pca, start = make({}), 0
    for count in cut:
        start += count
        pca.partial_fit(x[start - count : start])
        assert pca.method_ == ("gram" if start <= 12 else "incremental")
    assert pca.reason_ == "more than 12 rows would take too long to solve exactly"
    assert_within_bound(pca, x)
    assert_those_but_the_history(pca, make(METHODS["incremental"]).partial_fit(x))
    assert_history_of_both(pca, x, 12)


def test_auto_keeps_five_hundred_rows(generator: Generator) -> None:
    x = trajectory(501, 3, generator)
    pca = make({}).partial_fit(x[:500])
    assert pca.method_ == "gram"
    assert pca.partial_fit(x[500]).method_ == "incremental"


@pytest.mark.parametrize("length", [40, 5])
@pytest.mark.parametrize("read", [0, 7, 12, 20])
def test_the_history_of_kept_rows_outlives_them(
    read: int, length: int, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    """Whenever it is asked for, and through saved states; of several runs, for each."""
    monkeypatch.setattr("grokcurv.pca.streaming.MOST_ROWS", 12)
    x = torch.stack([trajectory(30, length, generator), trajectory(30, length, generator)], 1)
    pca, alone = make({}, runs=2), [make({}), make({})]
    for t, rows in enumerate(x):
        if t == read:
            pca.pc1_history_  # noqa: B018
            states = [pca.state_dict(run) for run in range(2)]
            pca = make({}, runs=2)
            for run, state in enumerate(states):
                pca.load_state_dict(unpack(pack(state)), run)
        pca.partial_fit(rows)
        for run, one in enumerate(alone):
            one.partial_fit(rows[run])
    for run, one in enumerate(alone):
        assert_history_of_both(one, x[:, run], 12)
        for name in ("pc1_history_", "pc1_history_bound_"):
            mine, its = getattr(pca, name)[run], getattr(one, name)
            torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("length", [40, 5])
def test_masked_rows_are_not_in_the_history_of_kept_ones(
    length: int, monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    monkeypatch.setattr("grokcurv.pca.streaming.MOST_ROWS", 12)
    x = trajectory(30, length, generator)
    broken = x.clone()
    broken[[3, 11, 20]] = torch.inf
    monkeypatch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)
    pca = make({}).partial_fit(broken)
    with pytest.raises(ValueError, match="row 3 held NaN or infinity"):
        pca.pc1_history_  # noqa: B018
    assert pca.method_ == "incremental"
    good = x[[i for i in range(30) if i not in (3, 11, 20)]]
    assert len(pca.pc1_history_) == 27
    exact = make(METHODS["gram"]).partial_fit(good).pc1_history_
    torch.testing.assert_close(pca.pc1_history_[:10], exact[:10], rtol=1e-12, atol=0, equal_nan=True)


def test_a_state_that_knows_of_no_bounds_is_read(generator: Generator) -> None:
    """Older versions kept none."""
    x = trajectory(20, 40, generator)
    pca, state = make(METHODS["incremental"]), make(METHODS["incremental"]).partial_fit(x[:13]).state_dict()
    del state["state"]["bounds"], state["state"]["exact"]
    pca.load_state_dict(state)
    pca.partial_fit(x[13:])
    assert pca.pc1_history_bound_[:14].isnan().all()
    assert_those_but_the_history(pca, make(METHODS["incremental"]).partial_fit(x))


@pytest.mark.parametrize("options", [METHODS["incremental"], METHODS["shrinkage"]], ids=["incremental", "shrinkage"])
def test_a_share_of_the_history_is_within_its_bound(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(40, 60, generator) + 5 * torch.randn(40, 60, generator=generator)
    pca = make(options).partial_fit(x)
    history, bounds = pca.pc1_history_, pca.pc1_history_bound_
    known = history.isfinite()
    assert known.equal(bounds.isfinite())
    assert known.sum() == 8
    for t in known.nonzero()[:, 0].tolist():
        variance, _ = svd(x[: t + 1])
        assert abs(variance[0] / variance.sum() - history[t]) <= bounds[t]
    assert bounds[known].max() > 1e-3  # something was cut off


def test_auto_logs_what_it_does(generator: Generator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "grokcurv")
    pca = make({}, memory_limit=LIMIT)
    for row in trajectory(40, 1000, generator):
        pca.partial_fit(row)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("StreamingPCA works by gram: exact, and the rows are within memory_limit")
    assert second == f"StreamingPCA works by incremental: {pca.reason_}"


@whole_and_segments
def test_auto_can_be_saved_on_either_side_of_the_switch(
    segments: list[tuple[int, int]] | None, generator: Generator
) -> None:
    x = trajectory(60, 1000, generator)
    limit = LIMIT if segments is None else LIMIT // 8
    whole = make({}, memory_limit=limit, segments=segments).partial_fit(x)
    assert whole.method_ == "incremental"
    for saved_after in (1, 20, 50):
        pca = make({}, memory_limit=limit, segments=segments).partial_fit(x[:saved_after])
        loaded = make({}, memory_limit=limit, segments=segments)
        loaded.load_state_dict(unpack(pack(pca.state_dict())))
        assert (loaded.method_, loaded.reason_) == (pca.method_, pca.reason_)
        assert_same(loaded.partial_fit(x[saved_after:]), whole)


def test_auto_takes_sketch_where_nothing_else_fits(generator: Generator) -> None:
    x = trajectory(12, 1000, generator)
    pca = make({}, memory_limit=50_000, sketch_size=1024).partial_fit(x)
    assert pca.method_ == "sketch"
    assert "incremental would take 5.22e-05 GiB, beyond memory_limit = 4.66e-05 GiB" in pca.reason_
    assert_within_bound(pca, x)
    assert_same(pca, make({"method": "sketch"}, sketch_size=1024).partial_fit(x))


@pytest.mark.parametrize("counts", [(10, 50), (50, 10), (20, 20), (50, 50), (0, 50)], ids=str)
def test_auto_merges_whatever_the_others_method(counts: tuple[int, int], generator: Generator) -> None:
    x = trajectory(sum(counts), 1000, generator)
    mine, other = (make({}, memory_limit=LIMIT).partial_fit(rows) for rows in x.split(counts))
    before = bits(other)
    assert_within_bound(mine.merge(other), x)
    assert mine.method_ == "incremental"
    assert mine.reason_
    assert bits(other) == before
    more = trajectory(7, 1000, generator)
    assert_within_bound(mine.partial_fit(more), torch.cat([x, more]))


@pytest.mark.parametrize("limits", [(0, 10**9), (0, LIMIT), (10**9, 0), (LIMIT, 0)], ids=str)
def test_a_sketch_and_another_method_merge_or_say_why_not(limits: tuple[int, int], generator: Generator) -> None:
    """A sketch cannot become rows; rows can be sketched, what incremental has kept of them cannot."""
    x = trajectory(60, 1000, generator)
    options = [{"memory_limit": limit, "sketch_size": 4096} for limit in limits]
    mine, other = (make(o).partial_fit(rows) for o, rows in zip(options, x.split([10, 50]), strict=True))
    assert {mine.method_, other.method_} > {"sketch"}
    before = bits(mine), bits(other)
    try:
        mine.merge(other)
    except ValueError as error:
        assert "sketch" in str(error)  # noqa: PT017
        assert (bits(mine), bits(other)) == before
    else:
        assert_within_bound(mine, x)
        assert mine.method_ == "sketch"


@pytest.mark.parametrize("switch", ["rows", "merge"])
def test_auto_remembers_what_store_dtype_has_rounded(switch: str, generator: Generator) -> None:
    """bfloat16 differences do not become exact by going over to incremental."""
    x = trajectory(60, 1000, generator)
    options = {"store_dtype": torch.bfloat16, "oversampling": 61}  # the basis loses nothing
    pca = make(options, memory_limit=400_000).partial_fit(x[:20])
    assert pca.method_ == "gram"
    if switch == "rows":
        pca.memory_limit = 0
        pca.partial_fit(x[20:])
    else:
        pca.merge(make(options, memory_limit=300_000).partial_fit(x[20:]))
    assert pca.method_ == "incremental"
    assert_within_bound(pca, x)


# Bad input


@every_dtype
@every_method
def test_rows_that_are_not_finite_leave_no_trace(
    options: dict[str, Any], dtype: torch.dtype, generator: Generator
) -> None:
    x = trajectory(13, 12, generator, dtype)
    pca, first = make(options).partial_fit(x[:4]), make(options)
    before = bits(pca)
    for value in (math.nan, math.inf, -math.inf):
        bad = x[4:].clone()
        bad[3, 7] = bad[6, 1] = value
        with pytest.raises(ValueError, match="x: row 3 holds NaN or infinity"):
            pca.partial_fit(bad)
        assert bits(pca) == before
        with pytest.raises(ValueError, match="x: row 0 holds"):
            first.partial_fit(torch.full((3,), value, dtype=torch.float64))
    assert_same(pca.partial_fit(x[4:]), make(options).partial_fit(x))
    assert first.n_samples_seen_ == 0
    assert first.method_ is None
    assert_same(first.partial_fit(x), make(options).partial_fit(x))


@every_method
def test_squares_that_overflow_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"row 1 holds .* squares overflow"):
        make(options).partial_fit(torch.tensor([[0.0], [1e200]], dtype=torch.float64))
    largest = torch.tensor([[0.0], [9e149]], dtype=torch.float64)
    assert make(options).partial_fit(largest).explained_variance_.isfinite().all()


@pytest.mark.parametrize("name", ["gram", "incremental", "sketch-64"])
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
    ids=["int64", "float16", "scalar", "3-dimensional", "length", "dtype", "device"],
)
def test_rows_that_do_not_fit_are_refused(
    x: Tensor, error: type[Exception], message: str, name: str, generator: Generator
) -> None:
    pca = make(METHODS[name]).partial_fit(trajectory(3, 6, generator))
    before = bits(pca)
    with pytest.raises(error, match=message):
        pca.partial_fit(x)
    with pytest.raises(error, match=message):
        pca.transform(x)
    assert bits(pca) == before


@every_method
def test_segments_beyond_the_rows_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="x has 6 coordinates, but segment '4:7' ends at 7"):
        make(options, segments=[(0, 2), (4, 3)]).partial_fit(torch.zeros(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be at least 1, got 0"),
        ({"method": "svd"}, "method must be one of auto, gram, incremental, sketch, got 'svd'"),
        ({"segments": []}, "at least one segment"),
        ({"segments": [(-1, 2)]}, "'-1:1' has start -1"),
        ({"segments": [(3, -2)]}, "length -2"),
        ({"memory_limit": -1}, "memory_limit must be at least 0, got -1"),
        ({"oversampling": -1}, "oversampling must be at least 0, got -1"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"store_dtype": torch.float16}, r"store_dtype must be float32, float64 or bfloat16, got torch\.float16"),
        ({"sketch_size": 32}, "sketch_size must be at least 64, got 32"),
        ({"sketch_size": 100}, r"sketch_size must be a power of two up to 2\*\*20, got 100"),
        ({"sketch_size": 2**21}, r"up to 2\*\*20, got 2097152"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamingPCA(**options)


# Masking, as on an accelerator


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat the CPU as a device for which nobody waits."""
    monkeypatch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)


def spoilt(x: Tensor, *numbers: int) -> Tensor:
    """With a NaN or an infinity in these rows."""
    x = x.clone()
    for place, number in enumerate(numbers):
        x[number, place % x.shape[1]] = (math.nan, math.inf, -math.inf)[place % 3]
    return x


def good(x: Tensor, *numbers: int) -> Tensor:
    """Without these rows."""
    return x[[i for i in range(len(x)) if i not in numbers]]


def assert_complains_once(pca: StreamingPCA, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pca.explained_variance_  # noqa: B018
    results(pca)


@every_dtype
@every_method
def test_masking_nothing_changes_no_bit(options: dict[str, Any], dtype: torch.dtype, generator: Generator) -> None:
    x = trajectory(13, 40, generator, dtype)
    want = make(options).partial_fit(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grokcurv.pca.streaming.is_asynchronous", lambda device: True)
        assert_same(make(options).partial_fit(x[:7]).partial_fit(x[7:]), want)


@pytest.mark.usefixtures("masks")
@whole_and_segments
@every_method
@pytest.mark.parametrize("bad", [(2, 6, 11), (0,), (0, 1, 2, 3, 4, 5), (12,)], ids=str)
def test_masked_rows_are_left_out(
    bad: tuple[int, ...],
    options: dict[str, Any],
    segments: list[tuple[int, int]] | None,
    generator: Generator,
) -> None:
    x = trajectory(13, 90, generator)
    broken = spoilt(x, *bad)
    if segments is not None:
        broken[list(bad), 3] = math.nan  # within a segment
    pca = make(options, segments=segments).partial_fit(broken[:4]).partial_fit(broken[4:])
    rest = f", and {len(bad) - 1} more after it" if len(bad) > 1 else "left out$"
    assert_complains_once(pca, f"row {bad[0]} held NaN or infinity, .*{rest}")
    assert_within_bound(pca, good(x, *bad), segments)
    if pca.method_ == "gram" and bad[0] > 0:  # the first row is the same
        assert_same(pca, make(options, segments=segments).partial_fit(good(x, *bad)))
    assert_within_bound(pca.partial_fit(x), torch.cat([good(x, *bad), x]), segments)
    pca.partial_fit(broken)
    assert_complains_once(pca, f"row {13 + 13 + bad[0]} held")


@pytest.mark.usefixtures("masks")
@every_method
def test_the_history_has_an_entry_for_every_row_that_counts(options: dict[str, Any], generator: Generator) -> None:
    pca = make(options).partial_fit(spoilt(trajectory(13, 40, generator), 2, 6))
    assert_complains_once(pca, "row 2 held")
    assert len(pca.pc1_history_) == pca.n_samples_seen_ == 11


@pytest.mark.usefixtures("masks")
@every_method
def test_masked_rows_do_not_count_even_before_they_are_reported(options: dict[str, Any], generator: Generator) -> None:
    pca = make(options).partial_fit(spoilt(trajectory(13, 40, generator), 2, 6))
    assert pca.n_samples_seen_ == 11


@pytest.mark.usefixtures("masks")
@every_method
def test_every_row_masked(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(7, 40, generator)
    pca = make(options).partial_fit(torch.full((7, 40), math.nan))
    with pytest.raises(ValueError, match=r"row 0 held NaN .* and 6 more after it"):
        pca.explained_variance_  # noqa: B018
    assert pca.n_samples_seen_ == 0
    loaded = make(options)
    loaded.load_state_dict(unpack(pack(pca.state_dict())))
    for twin in (pca, loaded):
        with pytest.raises(ValueError, match="has seen no rows yet"):
            twin.explained_variance_  # noqa: B018
        assert_within_bound(twin.partial_fit(x), x)


@pytest.mark.usefixtures("masks")
@every_method
def test_every_reading_complains(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(8, 40, generator)
    readings = [
        lambda pca: pca.components_,
        lambda pca: pca.mean_,
        lambda pca: pca.pc1_history_,
        lambda pca: pca.error_bound_,
        lambda pca: pca.transform(x),
        lambda pca: pca.state_dict(),
        lambda pca: make(options).merge(pca),
    ]
    for read in readings:
        pca = make(options).partial_fit(spoilt(x, 3))
        with pytest.raises(ValueError, match="row 3 held"):
            read(pca)
        assert_within_bound(pca, good(x, 3))


@pytest.mark.usefixtures("masks")
@every_method
def test_masking_after_a_state_was_loaded(options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(14, 40, generator)
    pca = make(options)
    pca.load_state_dict(make(options).partial_fit(x[:7]).state_dict())
    pca.partial_fit(spoilt(x[7:], 1))
    assert_complains_once(pca, "row 8 held")
    assert_within_bound(pca, good(x, 8))


@pytest.mark.usefixtures("masks")
@every_method
@pytest.mark.parametrize("bad", [3, 17], ids=["before", "after"])
def test_masking_before_and_after_a_merge(bad: int, options: dict[str, Any], generator: Generator) -> None:
    x = trajectory(21, 40, generator)
    broken = spoilt(x, bad)
    pca = make(options).partial_fit(broken[:7])
    pca.merge(make(options).partial_fit(x[7:14])).partial_fit(broken[14:])
    assert_complains_once(pca, f"row {bad} held")
    assert_within_bound(pca, good(x, bad))


@pytest.mark.usefixtures("masks")
def test_masking_as_auto_goes_over(generator: Generator) -> None:
    x = trajectory(60, 1000, generator)
    for bad in ((5,), (40,), (5, 40)):
        pca = make({}, memory_limit=LIMIT)
        for row in spoilt(x, *bad):
            pca.partial_fit(row)
        assert pca.method_ == "incremental"
        assert_complains_once(pca, f"row {bad[0]} held")
        assert_within_bound(pca, good(x, *bad))
    loaded = make({}, memory_limit=LIMIT)
    loaded.load_state_dict(make({}, memory_limit=LIMIT).partial_fit(x[:15]).state_dict())
    for row in x[15:]:
        loaded.partial_fit(row)
    assert loaded.method_ == "incremental"
    assert_within_bound(loaded, x)
