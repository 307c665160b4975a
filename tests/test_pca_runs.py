"""StreamingPCA of several runs: each is what it is alone, in as many operators for any number of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_pca import bits, every_dtype, every_kind, every_method, make, results, trajectory, whole_and_segments
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import grokcurv as gc
from grokcurv.commutator import CommutatorProbe
from grokcurv.gradients import Distributed, GradientEngine
from grokcurv.measures.trajectory import Trajectory
from grokcurv.pca import StreamingPCA
from grokcurv.subspace import Subspace

R = 3


def walks(n: int, p: int, generator: Generator, dtype: torch.dtype = torch.float32, runs: int = R) -> Tensor:
    """(R, n, p)."""
    return torch.stack([trajectory(n, p, generator, dtype) for _ in range(runs)])


def alone(x: Tensor, options: dict[str, Any], **more: Any) -> list[StreamingPCA]:
    return [make(options, **more).partial_fit(rows) for rows in x]


def run_of(pca: StreamingPCA, run: int) -> StreamingPCA:
    """A PCA of this run alone."""
    names = ("n_components", "method", "segments", "oversampling", "block", "shrinkage", "sketch_size", "store_dtype")
    one = StreamingPCA(**{name: getattr(pca, name) for name in names})
    one.load_state_dict(pca.state_dict(run))
    return one


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(torch.pi), b.nan_to_num(torch.pi))


def assert_those(many: StreamingPCA, ones: Sequence[StreamingPCA]) -> None:
    """Bitwise, in everything public and in the states."""
    got = results(many)
    assert many.runs == len(ones)
    for run, one in enumerate(ones):
        wanted = results(one)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert same(got[name] if name == "n" else got[name][run], value), (name, run)
        assert bits(run_of(many, run)) == bits(one)


@whole_and_segments
@every_dtype
@every_method
def test_every_run_is_bitwise_what_it_is_alone(
    options: dict[str, Any], dtype: torch.dtype, segments: Any, generator: Generator
) -> None:
    x = walks(13, 97, generator, dtype)
    many, ones = make(options, segments=segments, runs=R), alone(x, options, segments=segments)
    rows = torch.empty(R, 112, dtype=dtype)[:, :97]  # of a buffer whose rows begin further apart than they are long
    for row in range(8):
        many.partial_fit(rows.copy_(x[:, row]))
    many.partial_fit(x[:, 8:])
    assert_those(many, ones)
    for one, few, scores, last in zip(ones, x, many.transform(x), many.transform(x[:, 5]), strict=True):
        assert same(scores, one.transform(few))
        assert same(last, one.transform(few[5]))
    if many.method_ == "gram":
        assert same(many.rows_, torch.stack([one.rows_ for one in ones]))
    if many.method_ != "sketch":
        both = Subspace.from_pca(many, 2)
        v = torch.randn(R, 97, generator=generator)
        for run, one in enumerate(ones):
            basis = Subspace.from_pca(one, 2)
            assert torch.equal(both.rows, basis.rows)
            assert both.of(run).values.data_ptr() == both.values[run].data_ptr()
            assert same(both.of(run).to_dense(), basis.to_dense())
            assert same(both.of([run, 0]).values[0], basis.values)
            assert same(both.to(torch.float32).split(v).coefficients[run], basis.to(torch.float32).split(v[run])[0])


def test_pages_are_those_of_a_run_alone(monkeypatch: pytest.MonkeyPatch, generator: Generator, tmp_path: Path) -> None:
    monkeypatch.setattr("grokcurv.pca.rows.PAGE_BYTES", 3 * 80 * 4)
    x = walks(8, 80, generator)
    options = {"method": "gram", "scratch": tmp_path}
    assert_those(make(options, runs=R).partial_fit(x), alone(x, options))


def test_each_run_may_use_the_memory_that_one_may(generator: Generator) -> None:
    x = walks(40, 60, generator)
    many, ones = make({}, memory_limit=40_000, runs=R), alone(x[:, :1], {}, memory_limit=40_000)
    many.partial_fit(x[:, :1])
    for row in range(1, 40):
        many.partial_fit(x[:, row])
        for run, one in enumerate(ones):
            one.partial_fit(x[run, row])
            assert (many.method_, many.reason_) == (one.method_, one.reason_)
    assert many.method_ == "incremental"
    assert_those(many, ones)


@every_kind
@every_method
def test_states_are_those_of_one_run(
    options: dict[str, Any], segments: Any, dtype: torch.dtype, generator: Generator
) -> None:
    x = walks(14, 97, generator, dtype)
    ones = alone(x[:, :7], options, segments=segments)
    assert ones[1].pc1_history_.shape[0] == 7  # of which the state then has more than the others'
    many = make(options, segments=segments, runs=R)
    for run, one in enumerate(ones):
        many.load_state_dict(one.state_dict(), run)
    assert_those(many, ones)
    many.partial_fit(x[:, 7:])
    for one, rows in zip(ones, x, strict=True):
        one.partial_fit(rows[7:])
    assert_those(many, ones)
    for run, one in enumerate(ones):
        state = many.state_dict(run)
        for value in state["state"].values():
            for tensor in value if isinstance(value, list) else [value]:
                assert not isinstance(tensor, Tensor) or tensor.untyped_storage().nbytes() == tensor.nbytes
        assert bits(run_of(many, run).partial_fit(x[0])) == bits(one.partial_fit(x[0]))


@every_method
def test_some_runs_go_on(options: dict[str, Any], generator: Generator) -> None:
    x = walks(14, 60, generator)
    many, ones = make(options, runs=R).partial_fit(x[:, :8]), alone(x, options)
    many.keep([2, 0])
    assert_those(many.partial_fit(x[[2, 0], 8:]), [ones[2], ones[0]])
    many.keep([1])
    assert many.runs == 1
    assert bits(many) == bits(ones[0])
    assert bits(many.partial_fit(x[0])) == bits(ones[0].partial_fit(x[0]))


@every_method
def test_merged_runs(options: dict[str, Any], generator: Generator) -> None:
    x = walks(14, 60, generator)
    many, more = make(options, runs=R).partial_fit(x[:, :8]), make(options, runs=R).partial_fit(x[:, 8:])
    ones = [one.merge(other) for one, other in zip(alone(x[:, :8], options), alone(x[:, 8:], options), strict=True)]
    assert_those(many.merge(more), ones)
    assert_those(many.merge(many), [one.merge(one) for one in ones])
    with pytest.raises(ValueError, match="other has 1 runs, this PCA 3"):
        many.merge(ones[0])


@every_method
def test_only_runs_that_were_fed_alike_go_on_together(options: dict[str, Any], generator: Generator) -> None:
    x = walks(9, 60, generator)
    many, one = make(options, runs=R).partial_fit(x[:, :8]), make(options).partial_fit(x[0])
    before = [bits(run_of(many, run)) for run in range(R)]
    with pytest.raises(ValueError, match="state is damaged"):
        many.load_state_dict({**one.state_dict(), "state": None}, 1)
    assert [bits(run_of(many, run)) for run in range(R)] == before
    many.load_state_dict(one.state_dict(), 1)
    for ask in (
        lambda: many.partial_fit(x[:, 8]),
        lambda: many.explained_variance_,
        lambda: many.pc1_history_,
        lambda: many.n_samples_seen_,
        lambda: many.merge(many),
        lambda: make(options, runs=R).merge(many),
        lambda: Subspace.from_pca(many),
    ):
        with pytest.raises(ValueError, match="fed 8, 9, 8 rows: only runs that were fed alike go on together"):
            ask()
    assert [bits(run_of(many, run)) for run in range(R)] == [before[0], bits(one), before[2]]
    many.keep([0, 2])
    assert_those(many.partial_fit(x[[0, 2], 8]), alone(x[[0, 2]], options))


@every_method
def test_a_run_that_is_not_finite(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    x = walks(9, 60, generator)
    bad = x.clone()
    bad[1, 4, 7] = math.nan
    many, ones = make(options, runs=R).partial_fit(x[:, :3]), alone(x, options)
    with pytest.raises(ValueError, match="x: row 1 of run 1 holds NaN"):
        many.partial_fit(bad[:, 3:])
    assert_those(many.partial_fit(x[:, 3:]), ones)
    for module in ("streaming", "gram"):
        monkeypatch.setattr(f"grokcurv.pca.{module}.is_asynchronous", lambda device: True)
    for more in ({}, {"store_dtype": torch.bfloat16}):
        many = make(options | more, runs=R).partial_fit(x[:, :3]).partial_fit(bad[:, 3:])
        assert many.explained_variance_[1].isnan().all()
        if many.method_ != "sketch":
            assert Subspace.from_pca(many).values[1].isnan().all()
        many.keep([0, 2])
        assert_those(many, [one for run, one in enumerate(alone(x, options | more)) if run != 1])


def test_directions_that_one_run_has_and_another_has_not(generator: Generator) -> None:
    x = walks(3, 60, generator, runs=2)
    x[1, :, :30] = 1.0
    many = StreamingPCA(2, segments=[(0, 30), (30, 30)], runs=2).partial_fit(x)
    basis = Subspace.from_pca(many)
    assert basis.dim == 4
    assert torch.equal(basis.of(1).to_dense()[:2], torch.zeros(2, 60))
    assert torch.equal(basis.of(0).to_dense(), Subspace.from_pca(run_of(many, 0)).to_dense())


@pytest.mark.parametrize("shape", [(60,), (2, 60), (3, 4, 5, 60), (4, 3, 60)], ids=str)
def test_shapes_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(3, P\) or \(3, n, P\), got"):
        StreamingPCA(runs=3).partial_fit(torch.zeros(shape))


def test_settings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="runs must be at least 1, got 0"):
        StreamingPCA(runs=0)
    with pytest.raises(ValueError, match="pca must have runs=1, as many as the model has; got 2"):
        gc.CurvatureMonitor(nn.Linear(2, 1), lambda model, x: model(x).sum(), pca=StreamingPCA(runs=2))


class Runs(GradientEngine):
    """Parameters of R runs, in a buffer with room between its rows."""

    shared = True

    def __init__(self, model: nn.Module, loss_fn: Any, strategy: Any, runs: int) -> None:
        self.runs = runs
        super().__init__(model, loss_fn, strategy=strategy)
        self.rows = torch.randn(runs, self.size + 8)[:, : self.size]

    def thetas(self, runs: Sequence[int], out: Tensor | None = None) -> Tensor:
        return self.rows


class Operators(TorchDispatchMode):
    """Notes the operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:basis. the PCA keeps a sketch")
@whole_and_segments
@every_method
def test_feeds_and_bases_are_as_many_operators_for_any_number_of_runs(options: dict[str, Any], segments: Any) -> None:
    calls = []
    for runs in (2, 4):
        model = nn.Linear(96, 1)
        engine = Distributed(lambda loss, strategy, m=model, r=runs: Runs(m, loss, strategy, r))
        probe = CommutatorProbe(engine, lambda model, x: model(x).mean())
        trajectory = Trajectory(probe, make(options, segments=segments, runs=runs))
        with Operators() as operators:
            for step in range(7):
                probe.gradients.rows += torch.randn_like(probe.gradients.rows)
                trajectory.feed(torch.tensor(step))
                trajectory.update_basis()
        assert len(probe.bases) == (0 if options.get("method") == "sketch" else runs)
        calls.append(operators.names)
    assert calls[0] == calls[1]
