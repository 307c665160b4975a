"""StreamingPCA: invariants of every method over random shapes, types, segments, blocks and settings."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pca import FLOATS, assert_same, assert_within_bound, parts, variances
from test_pca_incremental import rounding
from torch import Tensor

from grokcurv.pca import StreamingPCA
from grokcurv.runs import pack, unpack

few = settings(
    derandomize=True, max_examples=30, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)


class Case(NamedTuple):
    x: Tensor
    segments: list[tuple[int, int]] | None
    options: dict[str, Any]

    def make(self) -> StreamingPCA:
        return StreamingPCA(segments=self.segments, **self.options)

    def cuts(self, draw: st.DrawFn, count: int) -> list[Tensor]:
        ends = sorted(draw(st.integers(0, len(self.x))) for _ in range(count))
        return list(torch.tensor_split(self.x, ends))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n, p = draw(st.integers(1, 40)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    decay, drift = draw(st.sampled_from([1.0, 0.8, 0.3])), draw(st.sampled_from([0.0, 1.0]))
    x = torch.randn(n, p, generator=generator, dtype=torch.float64) * decay ** torch.arange(p)
    x = x + drift * x.cumsum(0) + draw(st.sampled_from([0.0, 1.0, 1e3])) * torch.randn(p, generator=generator)
    if draw(st.booleans()):
        x = x[torch.randint(0, n, (n,), generator=generator)]  # some rows twice
    x = (x * draw(st.sampled_from([1.0, 1e-6, 1e6]))).to(draw(st.sampled_from(FLOATS)))
    segments = None
    if draw(st.booleans()):
        ends = sorted(draw(st.integers(0, p)) for _ in range(2 * draw(st.integers(1, 3))))
        segments = [(start, stop - start) for start, stop in zip(ends[::2], ends[1::2], strict=True)]
    options = {
        "n_components": draw(st.integers(1, 5)),
        "method": draw(st.sampled_from(["gram", "incremental", "sketch", "auto"])),
        "memory_limit": draw(st.sampled_from([10**9, 20_000])),  # auto: gram, or what comes after it
        "oversampling": draw(st.integers(0, 6)),
        "block": draw(st.integers(1, 12)),
        "shrinkage": draw(st.booleans()),
        "sketch_size": draw(st.sampled_from([1024, 4096])),
    }
    if options["method"] == "gram":
        options["store_dtype"] = draw(st.sampled_from([None, torch.bfloat16]))
    return Case(x, segments, options)


def assert_consistent(pca: StreamingPCA, case: Case) -> None:
    """All that must hold of a PCA of the rows."""
    k = pca.n_components
    assert_within_bound(pca, case.x, case.segments)
    values, totals = pca.explained_variance_.view(-1, k), pca.total_variance_.view(-1)
    ratios, bounds = pca.explained_variance_ratio_.view(-1, k), pca.error_bound_.view(-1)
    rows = [torch.zeros(0)] if pca.method_ == "sketch" else pca.components_
    means = [torch.zeros(0)] if pca.method_ == "sketch" else pca.mean_
    if case.segments is None and pca.method_ != "sketch":
        rows, means = [rows], [means]
    assert (values >= 0).all()
    assert (values.diff(dim=1) <= 0).all()
    for s, part in enumerate(parts(case.x, case.segments)):
        slack = 1e-9 * totals[s].item() if pca.method_ == "sketch" else 3 * rounding(part) / (len(part) - 1)
        assert values[s].sum() <= totals[s] + slack + (k * bounds[s] if "store_dtype" in case.options else 0)
        assert ratios[s].isnan().all() == (totals[s] == 0)
        if totals[s] > 0:
            torch.testing.assert_close(ratios[s], values[s] / totals[s], rtol=1e-14, atol=0)
        if pca.method_ == "sketch":
            continue
        exact = float(variances(part, part.shape[1]).sum())
        assert abs(totals[s].item() - exact) <= slack + k * bounds[s].item() * ("store_dtype" in case.options)
        there = (values[s] > 0).double().diag()
        torch.testing.assert_close(rows[s].double() @ rows[s].double().T, there, rtol=0, atol=1e-5)
        unit = 2.0**-8 if case.options.get("store_dtype") == torch.bfloat16 else 2.0**-24
        far = (part.double() - part[:1].double()).abs().amax(0)
        error = (means[s].double() - part.double().mean(0)).abs()
        assert (error <= 1.01 * unit * far + 2.0**-24 * 1.01 * part.double().mean(0).abs() + 1e-14 * far).all()


@few
@given(st.data(), cases())
def test_invariants_however_the_rows_are_cut(data: st.DataObject, case: Case) -> None:
    pca, whole = case.make(), case.make().partial_fit(case.x)
    for rows in case.cuts(data.draw, 3):
        pca.partial_fit(rows)
        if len(rows) and data.draw(st.booleans()):
            assert pca.explained_variance_ is not None
    assert_same(pca, whole)
    if len(case.x) > 1:
        assert_consistent(pca, case)


@few
@given(st.data(), cases())
def test_a_state_goes_on_where_it_was(data: st.DataObject, case: Case) -> None:
    before, after = case.cuts(data.draw, 1)
    pca, loaded = case.make().partial_fit(before), case.make()
    loaded.load_state_dict(unpack(pack(pca.state_dict())))
    assert_same(loaded.partial_fit(after), pca.partial_fit(after))


@few
@given(st.data(), cases())
def test_merged_parts_are_within_their_bound(data: st.DataObject, case: Case) -> None:
    first, *others = (case.make().partial_fit(rows) for rows in case.cuts(data.draw, 2))
    for other in others:
        try:
            first.merge(other)
        except ValueError as error:  # auto, on either side of its limit: a sketch and rows
            assert "sketch" in str(error)  # noqa: PT017
            return
    if len(case.x) > 1:
        assert_consistent(first, case)


@few
@given(cases(), st.integers(-60, 60))
def test_a_scale_that_is_a_power_of_two_changes_no_digit(case: Case, power: int) -> None:
    scale = 2.0**power
    if len(case.x) < 2 or (case.x.double() * scale).abs().max() > 1e30:
        return
    x = case.x * scale
    if not torch.equal(x / scale, case.x) or (x[x != 0].abs() < 1e-30).any():
        return  # too small for the type
    pca, scaled = case.make().partial_fit(case.x), case.make().partial_fit(x)
    np.testing.assert_array_equal(scaled.explained_variance_, pca.explained_variance_ * scale**2)
    if pca.method_ != "sketch":
        same = zip(pca.components_, scaled.components_, strict=True)
        assert all(torch.equal(a, b) for a, b in same)


@pytest.mark.parametrize("method", ["gram", "incremental", "sketch"])
@few
@given(case=cases())
def test_rows_moved_by_a_constant_have_the_same_variances(method: str, case: Case) -> None:
    """In float64, where the move rounds little."""
    if len(case.x) < 2:
        return
    case = Case(case.x.double(), case.segments, case.options | {"method": method, "store_dtype": None})
    pca, moved = case.make().partial_fit(case.x), case.make().partial_fit(case.x + case.x[-1])
    slack = [32 * rounding(part) / (len(part) - 1) for part in parts(torch.cat([case.x, -case.x]), case.segments)]
    limit = torch.tensor(slack)[:, None] * len(case.x) + 1e-11 * pca.explained_variance_.view(len(slack), -1)[:, :1]
    difference = (pca.explained_variance_ - moved.explained_variance_).view(len(slack), -1).abs()
    assert (difference <= limit).all()
