from __future__ import annotations

import copy
import logging
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grokcurv.device_buffer import capturing, is_asynchronous
from grokcurv.flat import Segment
from grokcurv.partition import WHOLE, Partition
from grokcurv.pca.common import Layout, Method, Spectrum, fed_alike, joined, of_run
from grokcurv.pca.gram import About, Gram
from grokcurv.pca.incremental import Incremental
from grokcurv.pca.sketch import FAILURE, Sketch
from grokcurv.reference import compute_type

METHODS = ("auto", "gram", "incremental", "sketch")
REFERENCES = ("mean", "first", "none")
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16)}
GIB = 1 << 30

MOST_ROWS = 500
"""Rows that ``"auto"`` keeps at most: the exact solution takes time that grows with their cube."""

log = logging.getLogger(__name__)


class StreamingPCA:
    """PCA of rows that arrive one by one or in blocks; scikit-learn's names and meanings.

    ``method="gram"`` keeps every row and is exact. ``"incremental"`` keeps r + b + 4 vectors, however many rows come: a
    basis of r = ``n_components + oversampling`` directions and b = ``block`` rows; it is as good as the basis holds the
    variance, and says how good that is. ``"sketch"`` keeps as many vectors of ``sketch_size`` numbers: variances and
    scores, right within a bound of known probability, but no components. ``"auto"`` begins with ``gram``, goes over to
    ``incremental`` before the rows outgrow ``memory_limit`` or are more than 500, and takes ``sketch`` where even that
    would be too much; :attr:`method_` and :attr:`reason_` say where it is and why. docs/pca.md has the costs and bounds
    of each.

    How the caller cuts the rows into blocks does not change a bit of any result; neither does the number of threads,
    nor what is read in between.

    Right answers where there is little to analyse: fewer than ``n_components`` directions with variance: the rest have
    variance 0 and are rows of zeros. One row: variances and shares are NaN (0 / 0, as in scikit-learn). Constant rows:
    variances are 0, shares NaN. A variance that cannot be told from rounding is 0.

    The vectors of R ``runs`` are fed together, and each run's components are its own: bitwise what they are where it is
    fed alone, with as many calls of the kernels for all runs as for one. Every attribute below that is a tensor, or a
    list of them, then has R in front of its shape. Runs that are fed together have seen as many rows each.

    >>> import torch, grokcurv as gc
    >>> rows = torch.randn(20, 1) * torch.randn(50) + 0.5  # along a line
    >>> pca = gc.StreamingPCA(n_components=2)
    >>> for row in rows:
    ...     _ = pca.partial_fit(row[None])
    >>> pca.explained_variance_ratio_.round(decimals=5).tolist()
    [1.0, 0.0]
    >>> round(float(pca.explained_variance_[0] / rows.var(0).sum()), 4)
    1.0

    Args:
        n_components: k, directions kept, at least 1.
        method: ``"auto"``, ``"gram"``, ``"incremental"`` or ``"sketch"``.
        segments: intervals of the coordinates, as :class:`grokcurv.Segment` or ``(start, length)``; each gets a PCA of
            its own, and only these coordinates are stored. S is their number; without segments there is one PCA of
            all coordinates, and the attributes lose their S.
        memory_limit: bytes that ``"auto"`` may keep of each run.
        oversampling: directions beyond k in the basis of ``incremental`` and ``sketch``: their accuracy comes from it.
        block: rows they gather before they update the basis; about 2 r by default.
        shrinkage: lower all eigenvalues by the one cut off (frequent directions). Variances lose more, but what they
            can lose is known beforehand, for any rows in any order.
        store_dtype: type in which ``gram`` stores differences from the first row; by default it stores the rows.
        scratch: a folder with room for a nameless file in which ``gram`` stores the rows; by default in memory.
        sketch_size: M, a power of two from 64 to 2**20; the bound of ``sketch`` is about ``20 / sqrt(M)`` of the total
            variance.
        seed: of the sketch, the same for every run.
        window: W: rows that are older than the last W are forgotten; ``n_samples_seen_`` counts those that are left.
        reference: what rows are about. ``"mean"``: their mean, as in scikit-learn. ``"first"``: the first row ever fed,
            theta_0, in a window too. ``"none"``: the origin. About the last two, variances are mean squares, with n in
            the denominator.
        normalize: make each row of length one, about its reference, in each segment (a row at the reference is left
            out); the reference must not be the mean, which would move with every row.
        runs: R, how many trajectories are fed together.

    ``window``, ``reference`` and ``normalize`` are the same rows' Gram matrix seen in other ways, and need ``gram``:
    ``"auto"`` then stays with it.

    Attributes:
        segments: tuple of :class:`grokcurv.Segment`, or None.
        method_: the method at work; None before the first row.
        reason_: why it was chosen.

    Raises:
        ValueError: an unknown method, an option out of its range, an empty or impossible list of segments.
    """

    partition: Partition = WHOLE

    def __init__(
        self,
        n_components: int = 8,
        method: str = "auto",
        segments: Sequence[Segment | tuple[int, int]] | None = None,
        *,
        memory_limit: int = 4 * GIB,
        oversampling: int = 8,
        block: int | None = None,
        shrinkage: bool = False,
        store_dtype: torch.dtype | None = None,
        scratch: str | os.PathLike[str] | None = None,
        sketch_size: int = 1 << 16,
        seed: int = 0,
        window: int | None = None,
        reference: str = "mean",
        normalize: bool = False,
        runs: int = 1,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if store_dtype is not None and store_dtype not in DTYPES.values():
            raise ValueError(f"store_dtype must be float32, float64 or bfloat16, got {store_dtype}")
        self.n_components, self.method = n_components, method
        self.segments = None if segments is None else _named(segments)
        self.memory_limit, self.oversampling, self.shrinkage = memory_limit, oversampling, shrinkage
        self.block = _default_block(n_components + oversampling) if block is None else block
        self.store_dtype = store_dtype
        self.scratch = None if scratch is None else os.fspath(scratch)
        self.sketch_size, self.seed, self.runs = sketch_size, seed, runs
        self.window, self.reference, self.normalize = window, reference, normalize
        self._check_about()
        least = {"n_components": 1, "memory_limit": 0, "oversampling": 0, "block": 1, "sketch_size": 64, "seed": 0}
        for name, value in {**least, "runs": 1}.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if sketch_size & (sketch_size - 1) or sketch_size > 1 << 20:
            raise ValueError(f"sketch_size must be a power of two up to 2**20, got {sketch_size}")
        self.method_: str | None = None
        self.reason_ = "no rows yet"
        self._method: Method | None = None
        self._results: dict[str, Any] = {}
        self._layout = Layout((), torch.device("cpu"), self.partition)
        self._dtype = torch.float32
        self._features = 0
        self._rows_taken = 0  # masked ones too, without those of replays
        # On an accelerator: number of the first masked row, how many there are, and how many rows were taken.
        self._counts: Tensor | None = None
        self._replays = False  # whether rows may arrive without a call, by replays of a captured one
        self._apart: list[dict[str, Any]] = []  # the states of runs that were loaded and cannot be fed together

    @property
    def _about(self) -> About:
        return About(self.reference, self.normalize, self.window)

    def _check_about(self) -> None:
        """Raise a ValueError unless reference, window, normalize, method and store_dtype go together."""
        if self.reference not in REFERENCES:
            raise ValueError(f"reference must be one of {', '.join(REFERENCES)}, got {self.reference!r}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.method not in ("auto", "gram") and not self._about.plain:
            raise ValueError(
                f"window, reference and normalize need the rows, which method='gram' keeps; got method={self.method!r}"
            )
        if self.normalize and self.reference == "mean":
            raise ValueError("normalize=True needs reference='first' or 'none': the mean moves with every row")
        if self.normalize and self.store_dtype is not None:
            raise ValueError("normalize=True takes rows as they are given: leave store_dtype out")

    def partial_fit(self, x: Tensor) -> StreamingPCA:
        """Add one row (P,) or several (n, P), of several runs (R, P) or (R, n, P), and return the PCA itself.

        Rows are float32, float64 or bfloat16. On the CPU a row with NaN or infinity is refused. On an accelerator that
        would mean to wait for it: there the row is masked, which means left out of everything, and the next result
        that is read raises with its number, once. Of several runs no row is masked there: what follows of a run with
        such a row is NaN, and of the others what it would be, until :meth:`keep` leaves that run out.

        A call can be captured in a CUDA graph, and replayed with new rows in the memory of ``x``, once a first block
        has been folded: with ``incremental`` or ``sketch``, ``x`` being whole blocks of :attr:`block` rows, and none
        pending from before.

        Raises:
            RuntimeError: in a capture, a call that cannot be captured.
            TypeError: another dtype.
            ValueError: a shape, dtype or device unlike that of earlier rows, segments that reach beyond P, or (on the
                CPU) a row with NaN, infinity or numbers beyond 1e30 (float64: 1e150), whose number is given; runs
                whose loaded states differ in the number of their rows, or in how they came to them. The PCA is then
                what it was.
            OSError: no room for the rows in ``scratch``.
        """
        self._raise_if_apart()
        rows = self._pack(x)
        valid = self._layout.finite(rows.view(len(rows) * self.runs, rows.shape[1] // self.runs))
        asynchronous = is_asynchronous(rows.device)
        if not asynchronous and not valid.all():
            number, run = divmod(int(valid.logical_not().nonzero()[0]), self.runs)
            whose = f" of run {run}" if self.runs > 1 else ""
            raise ValueError(f"x: row {number}{whose} holds NaN or infinity, or numbers whose squares overflow")
        masks = asynchronous and self.runs == 1
        if len(rows):
            if capturing(rows.device):
                self._check_capture(len(rows))
            with self._all_or_nothing():
                self._append(rows, valid if masks else None, x.shape[-1])
            if masks:
                self._count_masked(valid)
            self._rows_taken += len(rows)
            self._forget()
        return self

    def leading_blocks(self, k: int) -> list[tuple[Segment, Tensor]]:
        """What :meth:`grokcurv.Subspace.from_pca` is made of: each segment, and k leading components of it.

        On the CPU those without variance (in any run) are left out. On an accelerator to look would mean to wait: there
        they are rows of zeros, and masked rows are not reported. Of several runs the components are (R, k, length).
        """
        method = self._method or self._fitted()
        segments = self.segments or (Segment("all", 0, self._features, (self._features,)),)
        if is_asynchronous(self._layout.device):
            kept = [k] * len(segments)
        else:
            kept = (self._spectrum.values[:, :k] > 0).sum(1).view(self.runs, -1).amax(0).tolist()
        components = map(self._by_run, self._layout.split(method.components()))
        return [(segment, rows[..., :n, :]) for segment, rows, n in zip(segments, components, kept, strict=True)]

    def merge(self, other: StreamingPCA) -> StreamingPCA:
        """Add the rows of another PCA after one's own, and return the PCA itself; ``other`` stays as it is.

        With ``gram`` the result is that of all rows in one PCA, to the bit; otherwise within its bound.

        Raises:
            ValueError: ``other`` has other settings or runs, or rows of another length, dtype or device; or a window.
        """
        for pca in (self, other):
            pca._raise_if_apart()
        if self.window is not None:
            raise ValueError("a PCA with a window cannot be merged: what it has forgotten is no row of the result")
        if other.runs != self.runs:
            raise ValueError(f"other has {other.runs} runs, this PCA {self.runs}")
        for name, value in self._settings().items():
            if other._settings()[name] != value:
                raise ValueError(f"other has a different {name}: {other._settings()[name]!r}, this PCA {value!r}")
        if other._method is None:
            return self
        other._raise_if_masked()
        if self._method is not None:
            self._check_alike("other", other._features, other._dtype, other._layout.device)
        if other is self:
            other = copy.copy(self)
            other.keep(list(range(self.runs)))  # has rows of its own then
        theirs = other._method
        with self._all_or_nothing():
            if self._method is None:
                self._features, self._dtype, self._layout = other._features, other._dtype, other._layout
                self._begin(other.method_, f"as the PCA merged into this one: {other.reason_}")
            mine = self._method
            assert mine is not None
            if isinstance(mine, Gram) and not isinstance(theirs, Gram):
                mine = self._leave(other.method_, f"as the PCA merged into this one: {other.reason_}")
            elif self._outgrown(other._taken()):
                mine = self._leave("incremental", self._reason_to_leave)
            if isinstance(theirs, Gram) and isinstance(mine, Incremental):
                mine.follow(theirs)
            elif type(mine) is type(theirs):
                mine.merge(theirs)
            else:
                raise ValueError(
                    f"other works by {other.method_!r}, this PCA by {self.method_!r}: neither becomes the other"
                )
        self._rows_taken += other._taken()
        if self._counts is not None:
            self._counts[2] += other._taken()
        self._forget()
        return self

    @property
    def n_features_in_(self) -> int:
        """P."""
        self._fitted()
        return self._features

    @property
    def n_samples_seen_(self) -> int:
        """n, without masked rows; of several runs, in each."""
        self._raise_if_apart()
        return 0 if self._method is None else self._method.n_samples_seen

    @property
    def _divisor(self) -> int:
        return self.n_samples_seen_ - (self.reference == "mean")

    @property
    def explained_variance_(self) -> Tensor:
        """(k,) or (S, k) float64: variance along each component, descending, with n - 1 in the denominator."""
        return self._shaped(self._spectrum.values / self._divisor)

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """(k,) or (S, k) float64: its share of the total variance; 1 means 100 %."""
        return self._shaped(self._spectrum.values / self._spectrum.total[:, None])

    @property
    def total_variance_(self) -> Tensor:
        """() or (S,) float64: the variance of all rows in all directions; an estimate with ``sketch``."""
        return self._shaped(self._spectrum.total / self._divisor)

    @property
    def error_bound_(self) -> Tensor:
        """() or (S,) float64, in the units of ``explained_variance_``: how far any of its entries can be from that of
        the rows as given, in exact arithmetic.

        So the components hold at least the sum of ``explained_variance_`` less k times this, and no k directions hold
        more than the sum plus k times this: the residual is within 2 k times this of the least. :attr:`error_kind_`
        says what stands behind it.
        """
        return self._shaped(self._spectrum.bound / self._divisor)

    @property
    def error_kind_(self) -> str:
        """``"guaranteed"``, or with ``sketch`` ``"probability 0.99"``: it holds for so many of all seeds."""
        return f"probability {1 - FAILURE}" if isinstance(self._fitted(), Sketch) else "guaranteed"

    @property
    def error_estimate_(self) -> Tensor:
        """(k,) or (S, k) float64: the standard error of each ``explained_variance_`` over the seeds of a sketch.

        Estimated from the sketch itself; no guarantee, but what to expect, where the bound is a worst case. The other
        methods have no chance in them: 0.
        """
        method = self._fitted()
        if not isinstance(method, Sketch):
            return torch.zeros_like(self.explained_variance_)
        return self._shaped(method.standard_errors() / (self.n_samples_seen_ - 1))

    @property
    def components_(self) -> Any:
        """(k, P), or a list of (k, length): orthonormal rows, in the rows' dtype but at least float32.

        Accumulated in float64 and then rounded. The entry of largest magnitude in each is positive, as in
        scikit-learn.

        Raises:
            ValueError: ``sketch`` has none; or no rows seen yet.
        """
        return self._by_segment(self._result("components"))

    @property
    def mean_(self) -> Any:
        """(P,), or a list of (length,): the mean row, in the dtype of the components.

        Raises:
            ValueError: as for the components.
        """
        return self._by_segment(self._result("mean"))

    @property
    def pc1_history_(self) -> Tensor:
        """(n,) or (n, S) float64: the first component's share of the variance of the first 1, 2, ... n rows.

        The first is NaN, since one row has no variance. With ``incremental`` and ``sketch`` it is known where a block
        ended, and NaN elsewhere; ``"auto"`` knows it of the rows that it kept at first, too. With a ``window`` each is
        that of the last W rows at the time, and is found when the row comes; else every prefix is solved once, at the
        first reading. About another ``reference`` than the mean it is a share of the mean square.
        """
        return self._over_rows("history")

    @property
    def pc1_history_bound_(self) -> Tensor:
        """(n,) or (n, S) float64: how far entries of :attr:`pc1_history_` can be from those of the rows as stored.

        0 where they are exact but for rounding, which is about 1e-12; with ``sketch`` as :attr:`error_kind_` says.
        """
        return self._over_rows("history_bound")

    @property
    def step_norms_(self) -> Tensor:
        """(n - 1,) or (n - 1, S) float64: distances between successive rows; ``gram`` only.

        Raises:
            ValueError: another method, or no rows seen yet.
        """
        return self._shaped(self._gram_for("step_norms_").step_norms(), dim=1)

    @property
    def rows_(self) -> Tensor:
        """(n, L): a copy of the rows, the segments of each side by side, in the rows' dtype; ``gram`` only.

        As they were given, but for what ``store_dtype`` has rounded.

        Raises:
            ValueError: another method, or no rows seen yet.
        """
        rows = torch.cat([rows for rows, _ in self._gram_for("rows_").given()])
        return self._by_run(rows.unflatten(1, (self.runs, -1)))

    def transform(self, x: Tensor) -> Tensor:
        """Coordinates of the rows ``x`` along the components, about the reference, of length one if
        ``normalize``; ``x`` is as for :meth:`partial_fit`.

        Returns:
            float64: (k,) or (n, k); with segments (S, k) or (S, n, k).

        Raises:
            ValueError, TypeError: as for :meth:`partial_fit`, or no rows seen yet.
        """
        scores = self._fitted().scores(self._pack(x))
        return self._shaped(scores[:, 0] if x.dim() == 1 + (self.runs > 1) else scores)

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """Everything needed to go on, as tensors and plain values; of several runs, with this one alone.

        The rows that ``gram`` keeps of a single run are not copied.
        """
        if self._apart:
            return self._apart[run]
        self._raise_if_masked()
        return {
            **self._settings(),
            "method_": self.method_,
            "reason_": self.reason_,
            "n_features": self._features,
            "dtype": str(self._dtype),
            "rows_taken": self._taken(),
            "state": None if self._method is None else of_run(self._method, run),
        }

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Take over what :meth:`state_dict` gave; what follows is then bitwise what would have followed there.

        Of several runs, for one of them. Until all have been fed alike they can be saved and loaded, and nothing else.

        Raises:
            ValueError: the state is of a PCA with other settings, or its parts are missing or do not fit together. The
                PCA is then what it was.
        """
        if self.runs > 1:
            alone = copy.copy(self)
            alone.runs, alone._method, alone._apart = 1, None, []
            alone.load_state_dict(state)
            self._go_on_with([alone.state_dict() if r == run else self.state_dict(r) for r in range(self.runs)])
            return
        if state.keys().isdisjoint(About._fields):  # older versions had nothing else
            state = {**About()._asdict(), **state}
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state is damaged: it lacks {', '.join(sorted(missing))}")
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"state has {name} {state[name]!r}, this PCA {value!r}")
        self._take_over(state)

    def keep(self, runs: Sequence[int]) -> None:
        """Of several runs go on with these alone, in this order."""
        states = [self.state_dict(run) for run in runs]
        self.runs = len(states)
        self._go_on_with(states)

    def _go_on_with(self, states: list[dict[str, Any]]) -> None:
        """Be the runs of these states: one PCA of them, if they were fed alike."""
        first, parts = states[0], [state["state"] for state in states]
        dims = (Gram if first["method_"] == "gram" else Incremental).side_by_side
        if not fed_alike(states, dims):
            self._method, self._apart = None, states
            return
        self._take_over({**first, "state": None if parts[0] is None else joined(parts, dims)})
        self._apart = []

    def _take_over(self, state: Mapping[str, Any]) -> None:
        """Be the PCA of this state; if it is damaged, raise a ValueError and stay as before."""
        name, parts = state["method_"], state["state"]
        if (parts is None) != (name is None) or name not in (None, *METHODS[1:]) or state["dtype"] not in DTYPES:
            raise ValueError(f"state is damaged: method_ {name!r}, dtype {state['dtype']!r}")
        method, layout, dtype = None, self._layout, DTYPES[state["dtype"]]
        if parts is not None:
            if not isinstance(parts.get("history"), Tensor):
                raise ValueError("state is damaged: its method lacks history")
            layout = self._new_layout(state["n_features"], parts["history"].device)
            if max((s.stop for s in self.segments or ()), default=0) > state["n_features"]:
                raise ValueError(f"state is damaged: segments reach beyond n_features = {state['n_features']}")
            method = self._new_method(name, layout, dtype)
            method.load_state_dict(parts)
        self._method, self._layout, self._dtype = method, layout, dtype
        self.method_, self.reason_ = name, state["reason_"]
        self._features, self._rows_taken, self._counts = state["n_features"], state["rows_taken"], None
        self._forget()

    def __repr__(self) -> str:
        return f"StreamingPCA(n_components={self.n_components}, method_={self.method_!r}, reason_={self.reason_!r})"

    # The method

    def _append(self, rows: Tensor, valid: Tensor | None, features: int) -> None:
        """Give rows to the method at work; those before the one with which "auto" leaves ``gram`` are still kept."""
        method = self._method or self._first_method(features, rows)
        if self._outgrown(len(rows)):
            early = max(0, self._kept_rows - self._rows_taken)
            parts = [
                (rows[part], None if valid is None else valid[part]) for part in (slice(early), slice(early, None))
            ]
            method, (rows, valid) = self._leave("incremental", self._reason_to_leave, *parts[0]), parts[1]
        method.append(rows, valid)

    def _first_method(self, features: int, like: Tensor) -> Method:
        """The one to begin with, for rows like ``like``."""
        self._features, self._dtype = features, like.dtype
        self._layout = self._new_layout(features, like.device)
        if self.method != "auto":
            return self._begin(self.method, "it was asked for")
        if not self._about.plain:
            return self._begin("gram", "window, reference and normalize need the rows")
        if self._incremental_bytes() > self.memory_limit:
            return self._begin("sketch", f"incremental would take {_gib(self._incremental_bytes())}, {self._limit()}")
        return self._begin("gram", f"exact, and the rows are within memory_limit = {_gib(self.memory_limit)} so far")

    def _outgrown(self, count: int) -> bool:
        """Whether "auto" must not keep so many rows more."""
        leaves = self.method == "auto" and self._about.plain and isinstance(self._method, Gram)
        return leaves and self._rows_taken + count > self._kept_rows

    @property
    def _kept_rows(self) -> int:
        """How many "auto" keeps at most."""
        room = self.memory_limit - self._incremental_bytes()  # both are there, while it goes over
        return bisect_right(range(MOST_ROWS + 1), room, key=self._gram_bytes) - 1

    @property
    def _reason_to_leave(self) -> str:
        """In words why method='auto' cannot go on by ``gram``."""
        rows = self._kept_rows + 1
        if rows > MOST_ROWS:
            return f"more than {MOST_ROWS} rows would take too long to solve exactly"
        need = self._gram_bytes(rows) + self._incremental_bytes()
        return f"{rows} rows would take {_gib(need)} with what follows them, {self._limit()}"

    def _begin(self, name: str | None, reason: str) -> Method:
        """Go on by this method, and log why."""
        assert name is not None
        self._method = self._new_method(name, self._layout, self._dtype)
        self.method_, self.reason_ = name, reason
        log.info("StreamingPCA works by %s: %s", name, reason)
        return self._method

    def _leave(self, name: str | None, reason: str, *last: Any) -> Method:
        """Go over from ``gram``, which takes the ``last`` rows before, to a method that keeps none."""
        gram, following = self._method, self._begin(name, reason)  # which may fail for want of memory
        assert isinstance(gram, Gram)
        assert isinstance(following, Incremental)
        if last and len(last[0]):
            gram.append(*last)
        following.follow(gram)
        return following

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A method that fails has changed nothing of its own; this is for what was chosen before."""
        names = ("_method", "method_", "reason_", "_layout", "_dtype", "_features")
        before = {name: getattr(self, name) for name in names}
        try:
            yield
        except BaseException:
            self.__dict__.update(before)
            raise

    def _new_method(self, name: str, layout: Layout, dtype: torch.dtype) -> Method:
        """A method that has seen no rows."""
        rank = self.n_components + self.oversampling
        if name == "gram":
            return Gram(self.n_components, layout, dtype, self.store_dtype, self.scratch, self._about)
        if name == "incremental":
            return Incremental(self.n_components, rank, self.block, self.shrinkage, layout, dtype)
        return Sketch(self.n_components, rank, self.block, self.shrinkage, layout, self.sketch_size, self.seed)

    def _new_layout(self, features: int, device: torch.device) -> Layout:
        lengths = (features,) if self.segments is None else tuple(s.length for s in self.segments)
        return Layout(lengths * self.runs, device, self.partition, self.runs)

    def _gram_bytes(self, rows: int) -> int:
        """Of each run, as those of :meth:`_incremental_bytes`."""
        stored = 0 if self.scratch is not None else (self.store_dtype or self._dtype).itemsize
        whole = rows * self._layout.size * stored + 8 * len(self._layout.lengths) * (2 * rows) ** 2
        return whole // self.runs

    def _incremental_bytes(self) -> int:
        vectors = self.n_components + self.oversampling + self.block + 2
        return self._layout.size // self.runs * (vectors * compute_type(self._dtype).itemsize + 8)

    def _limit(self) -> str:
        return f"beyond memory_limit = {_gib(self.memory_limit)}"

    # Rows

    def _pack(self, x: Tensor) -> Tensor:
        """The stored coordinates of ``x``, (n, L), those of the runs side by side."""
        if x.dtype not in DTYPES.values():
            raise TypeError(f"x must be float32, float64 or bfloat16, got {x.dtype}")
        several = self.runs > 1
        if x.dim() not in (1 + several, 2 + several) or (several and len(x) != self.runs):
            wanted = f"({self.runs}, P) or ({self.runs}, n, P)" if several else "(P,) or (n, P)"
            raise ValueError(f"x must have shape {wanted}, got {tuple(x.shape)}")
        if self._method is not None:
            self._check_alike("x", x.shape[-1], x.dtype, x.device)
        rows = x.detach() if several else x.detach()[None]
        rows = rows[:, None] if rows.dim() == 2 else rows
        if self.segments is not None:
            last = max(self.segments, key=lambda s: s.stop)
            if last.stop > x.shape[-1]:
                raise ValueError(f"x has {x.shape[-1]} coordinates, but segment {last.name!r} ends at {last.stop}")
            rows = torch.cat([s.of(rows) for s in self.segments], dim=-1)
        return rows.transpose(0, 1).flatten(1).contiguous()

    def _check_alike(self, name: str, features: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise a ValueError unless rows are of the length, dtype and device of earlier ones."""
        got, wanted = (features, dtype, device), (self._features, self._dtype, self._layout.device)
        if got != wanted:
            raise ValueError(
                f"{name} has {got[0]} coordinates, {got[1]}, on {got[2]}; "
                f"earlier rows have {wanted[0]} coordinates, {wanted[1]}, on {wanted[2]}"
            )

    def _count_masked(self, valid: Tensor) -> None:
        """Note the masked rows among the next ones, without waiting for the device."""
        if self._counts is None:
            self._counts = torch.zeros(3, dtype=torch.int64, device=valid.device)
            self._counts[2].fill_(self._rows_taken)
        first, masked, taken = self._counts
        bad = valid.logical_not()
        first.copy_(torch.where((masked == 0) & bad.any(), taken + bad.int().argmax(), first))
        masked += bad.sum()
        taken += len(valid)

    def _taken(self) -> int:
        """Rows taken so far, masked ones and those of replays too; waits for the device."""
        return self._rows_taken if self._counts is None else int(self._counts[2])

    def _raise_if_apart(self) -> None:
        """Raise a ValueError if the runs were not fed alike."""
        if self._apart:
            taken = ", ".join(str(state["rows_taken"]) for state in self._apart)
            raise ValueError(f"the runs were fed {taken} rows: only runs that were fed alike go on together")

    def _raise_if_masked(self) -> None:
        """Raise a ValueError if rows were left out, since the last call, because they were not finite."""
        self._raise_if_apart()
        if self._counts is None:
            return
        first, count, _ = self._counts.tolist()
        self._counts[:2].zero_()
        assert self._method is not None
        self._method.drop_masked()
        if count:
            self._forget()
            raise ValueError(
                f"x: row {first} held NaN or infinity, or numbers whose squares overflow, and was left out"
                + (f", and {count - 1} more after it" if count > 1 else "")
            )

    def _check_capture(self, count: int) -> None:
        """Raises unless a call with ``count`` rows does the same to the same memory whenever it is replayed."""
        method = self._method
        if not isinstance(method, Incremental):
            raise RuntimeError(
                "a captured partial_fit needs method='incremental' or 'sketch', and rows before the capture; "
                f"this PCA works by {self.method_!r}"
            )
        if not method.begun or method.pending or count % self.block:
            raise RuntimeError(
                f"a captured partial_fit takes whole blocks of {self.block} rows after a first block, none pending; "
                f"got {count} rows with {method.pending} pending after {method.appended}"
            )
        self._replays = True

    # Results

    def _fitted(self) -> Method:
        """The method at work, with all rows taken in; a ValueError if there are none."""
        self._raise_if_masked()
        if self._replays:
            self._forget()
        if self._method is None or not self._method.n_samples_seen:
            raise ValueError("this StreamingPCA has seen no rows yet: call partial_fit first")
        return self._method

    def _gram_for(self, name: str) -> Gram:
        """The method, for the attribute of this name, which only the rows themselves can tell."""
        method = self._fitted()
        if not isinstance(method, Gram):
            raise ValueError(f"{name} needs method='gram', this PCA works by {self.method_!r}")
        return method

    def _over_rows(self, name: str) -> Tensor:
        """What the method says under this name of each prefix of the rows; nothing before the first."""
        self._raise_if_masked()
        if self._method is None:
            count = self.runs * len(self.segments or (None,))
            return self._shaped(torch.empty(0, count, dtype=torch.float64), dim=1)
        return self._shaped(getattr(self._method, name), dim=1)

    def _result(self, name: str) -> Any:
        """What the method says under this name; kept until rows are added, or may have been by a replay."""
        method = self._fitted()
        if name not in self._results:
            self._results[name] = getattr(method, name)()
        return self._results[name]

    @property
    def _spectrum(self) -> Spectrum:
        spectrum: Spectrum = self._result("spectrum")
        return spectrum

    def _forget(self) -> None:
        """Drop results of earlier rows."""
        self._results = {}
        if self._replays and self._method is not None:
            self._method.forget()

    def _shaped(self, per_segment: Tensor, dim: int = 0) -> Tensor:
        """The numbers of all segments, which ``dim`` counts; without segments those of the one there is."""
        by_run: Tensor = per_segment.unflatten(dim, (self.runs, -1)).movedim(dim, 0)
        by_run = by_run if self.segments is not None else by_run.select(dim + 1, 0)
        return by_run if self.runs > 1 else by_run[0]

    def _by_segment(self, rows: Tensor) -> Any:
        parts = [self._by_run(part) for part in self._layout.split(rows)]
        return parts if self.segments is not None else parts[0]

    def _by_run(self, rows: Tensor) -> Tensor:
        """(R, ..., length) of (..., R, length); of one run without R."""
        return rows.movedim(-2, 0) if self.runs > 1 else rows.squeeze(-2)

    # Settings

    def _settings(self) -> dict[str, Any]:
        """What makes results, as plain values."""
        names = ("n_components", "method", "oversampling", "block", "shrinkage", "sketch_size", "seed", *About._fields)
        return {name: getattr(self, name) for name in names} | {
            "segments": None if self.segments is None else [_written(s) for s in self.segments],
            "store_dtype": None if self.store_dtype is None else str(self.store_dtype),
        }


def _default_block(rank: int) -> int:
    """About 2 r, where Gram matrix and rotation cost least together; the kernel takes all rows in fours."""
    return -(-3 * rank // 4) * 4 - rank - 1


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB"


def _written(segment: Segment) -> list[Any]:
    """A segment's place, as plain values: where it starts, its length and, unless it is one interval, its pieces."""
    return [segment.start, segment.length, *([[*map(list, segment.pieces)]] if segment.pieces else ())]


def _named(segments: Sequence[Segment | tuple[int, int]]) -> tuple[Segment, ...]:
    """Segments with names; one given as (start, length) is named by its ends."""
    named = []
    for segment in segments:
        if not isinstance(segment, Segment):
            start, length = segment
            segment = Segment(f"{start}:{start + length}", start, length, (length,))
        if segment.start < 0 or segment.length < 0:
            raise ValueError(f"segments: {segment.name!r} has start {segment.start} and length {segment.length}")
        named.append(segment)
    if not named:
        raise ValueError("segments must be None or hold at least one segment")
    return tuple(named)
