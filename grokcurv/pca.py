r"""Principal components of a trajectory that grows one row at a time.

With n rows of P coordinates and n far below P, everything follows from the n x n Gram matrix of the rows. Its entries
are float64 sums taken about the first row, :math:`G_{ij} = (x_i - x_0) \cdot (x_j - x_0)`, so that a trajectory which
moves little beside its distance from the origin loses nothing. With :math:`J = I - 11^T / n`, the eigenpairs
:math:`(\lambda_j, v_j)` of :math:`J G J` give the variances :math:`\lambda_j / (n - 1)` and the components
:math:`X^T v_j / \sqrt{\lambda_j}` of the centred rows X (the method of snapshots, Sirovich 1987). A new row costs one
pass over the rows, and the leading blocks of G hold the whole history: the PCA of every prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.flat import Segment

METHODS = ("auto", "gram")

EPSILON = torch.finfo(torch.float64).eps

EIGH_TOLERANCE = 1e-12
"""Relative to the largest: how closely :func:`grokcurv.ops.eigh` settles an eigenvalue."""

COLUMNS = 1 << 15
"""Coordinates combined at a time, to stay in the cache."""


class StreamingPCA:
    """PCA of rows that arrive one by one or in blocks; scikit-learn's names and meanings.

    ``method="gram"`` (the only one, and what ``"auto"`` means) keeps every row and is exact: results are those of a
    PCA in float64 of the rows as given, up to :attr:`error_bound_`, and how the caller cuts the rows into blocks does
    not change a bit of them. n rows of P coordinates take ``n P`` numbers of the rows' dtype and ``8 S n^2`` bytes,
    both with room to grow; a row costs ``2 n P`` flops.

    Right answers where there is little to analyse: fewer than ``n_components`` directions with variance: the rest have
    variance 0 and are rows of zeros. One row: variances and shares are NaN (0 / 0, as in scikit-learn). Constant rows:
    variances are 0, shares NaN. A variance that cannot be told from rounding is 0.

    Args:
        n_components: directions kept, at least 1.
        method: ``"auto"`` or ``"gram"``.
        segments: intervals of the coordinates, as :class:`grokcurv.Segment` or ``(start, length)``; each gets a PCA of
            its own, and only these coordinates are stored. S is their number; without segments there is one PCA of
            all coordinates, and the attributes lose their S.

    Attributes:
        segments: tuple of :class:`grokcurv.Segment`, or None.
        n_samples_seen_: n.

    Raises:
        ValueError: an unknown method, fewer than one component, an empty or impossible list of segments.
    """

    def __init__(
        self,
        n_components: int = 8,
        method: str = "auto",
        segments: Sequence[Segment | tuple[int, int]] | None = None,
    ) -> None:
        if n_components < 1:
            raise ValueError(f"n_components must be at least 1, got {n_components}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.n_components = n_components
        self.method = "gram"
        self.segments = None if segments is None else _named(segments)
        self.n_samples_seen_ = 0
        # Both have room to grow: only the first n_samples_seen_ rows (and columns) count.
        count = len(self._packed_spans(0))
        self._rows = torch.empty(0, 0)
        self._gram = torch.empty(count, 0, 0, dtype=torch.float64)
        self._history = torch.empty(0, count, dtype=torch.float64)
        self._features = 0

    def partial_fit(self, x: Tensor) -> StreamingPCA:
        """Add one row (P,) or several (n, P), and return the PCA itself.

        Rows are stored in their own dtype: float32, float64 or bfloat16. That they are finite is read back from the
        device.

        Raises:
            TypeError: another dtype.
            ValueError: a shape, dtype or device unlike that of earlier rows, segments that reach beyond P, or a row
                with NaN or infinity, whose number is given. The PCA is then what it was.
        """
        self._append(self._pack(x), x.shape[-1])
        return self

    def merge(self, other: StreamingPCA) -> StreamingPCA:
        """Add the rows of another PCA after one's own, and return the PCA itself; ``other`` stays as it is.

        Raises:
            ValueError: other segments, or rows of another length, dtype or device.
        """
        if _spans(self.segments) != _spans(other.segments):
            raise ValueError("other has different segments")
        if other.n_samples_seen_:
            if self.n_samples_seen_:
                self._check_alike("other", other._rows, other._features)
            self._append(other._rows[: other.n_samples_seen_], other._features)
        return self

    @property
    def n_features_in_(self) -> int:
        """P."""
        self._check_fitted()
        return self._features

    @property
    def explained_variance_(self) -> Tensor:
        """(k,) or (S, k) float64: variance along each component, descending, with n - 1 in the denominator."""
        return self._shaped(self._spectrum[0] / (self.n_samples_seen_ - 1))

    @property
    def explained_variance_ratio_(self) -> Tensor:
        """(k,) or (S, k) float64: its share of the total variance; 1 means 100 %."""
        values, total, _ = self._spectrum
        return self._shaped(values / total[:, None])

    @property
    def components_(self) -> Any:
        """(k, P), or a list of (k, length): orthonormal rows, in the rows' dtype but at least float32.

        Accumulated in float64 and then rounded. The entry of largest magnitude in each is positive, as in
        scikit-learn.
        """
        return self._components if self.segments is not None else self._components[0]

    @property
    def mean_(self) -> Any:
        """(P,), or a list of (length,): the mean row, in the dtype of the components."""
        return self._means if self.segments is not None else self._means[0]

    @property
    def error_bound_(self) -> Tensor:
        """() or (S,) float64: how far any ``explained_variance_ratio_`` can be from exact arithmetic on the same rows.

        A worst case to first order: it holds for every order of summation. Typical errors are smaller by the square
        root of the number of coordinates.
        """
        n, total = self.n_samples_seen_, self._spectrum[1]
        lengths = torch.tensor([length for _, length in self._packed_spans()], device=total.device)
        # Each entry of G is off by at most (length + 2) eps/2 times |x_i - x_0| |x_j - x_0|, so G by that times its
        # trace in norm; centring adds four terms of at most (2n + 6) eps/2. An eigenvalue moves by at most the norm
        # of the error (Weyl) and the total by as much, hence twice; then what is rounded down to zero, and the solver.
        worst = (lengths + 8 * n + 26) * EPSILON * self._raw_trace() + self._rank_floor()
        return self._shaped(worst / total + EIGH_TOLERANCE)

    @property
    def pc1_history_(self) -> Tensor:
        """(n,) or (n, S) float64: the first component's share of the variance of the first 1, 2, ... n rows.

        The first is NaN, since one row has no variance. Every prefix is solved once, at the first reading.
        """
        done, n = len(self._history), self.n_samples_seen_
        if done < n:
            gram = self._gram[:, :n, :n]
            prefixes = _Prefixes(gram)
            shares = [prefixes.leading_share(size) for size in range(done + 1, n + 1)]
            self._history = torch.cat([self._history.to(gram.device), torch.stack(shares)])
        return self._history if self.segments is not None else self._history.view(n)

    def transform(self, x: Tensor) -> Tensor:
        """Coordinates of the rows ``x`` (P,) or (n, P) along the components, about the mean.

        Returns:
            float64: (k,) or (n, k); with segments (S, k) or (S, n, k).

        Raises:
            ValueError, TypeError: as for :meth:`partial_fit`, or no rows seen yet.
        """
        self._check_fitted()
        parts = torch.split(self._pack(x), [length for _, length in self._packed_spans()], dim=1)
        scores = []
        for part, mean, components in zip(parts, self._means, self._components, strict=True):
            scores.append(ops.gram(part.double() - mean.double(), components.double())[0])
        stacked = torch.stack(scores)
        return self._shaped(stacked[:, 0] if x.dim() == 1 else stacked)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as tensors and plain values; the rows are not copied."""
        n = self.n_samples_seen_
        return {
            "method": self.method,
            "n_components": self.n_components,
            "segments": _spans(self.segments),
            "n_features": self._features,
            "rows": self._rows[:n],
            "gram": self._gram[:, :n, :n].contiguous(),
            "history": self._history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; what follows is then bitwise what would have followed there.

        Raises:
            ValueError: the state is of a PCA with other arguments, or its parts are missing or do not fit together.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"state is damaged: it lacks {', '.join(sorted(missing))}")
        own = {"method": self.method, "n_components": self.n_components, "segments": _spans(self.segments)}
        for name, value in own.items():
            if state[name] != value:
                raise ValueError(f"state has {name} {state[name]!r}, this PCA {value!r}")
        rows, gram, history = state["rows"], state["gram"], state["history"]
        n = len(rows)
        lengths = [length for _, length in self._packed_spans(state["n_features"])]
        count, width = len(lengths), sum(lengths) if n else 0
        if rows.shape != (n, width) or gram.shape != (count, n, n) or history.shape[1:] != (count,) or len(history) > n:
            raise ValueError(
                f"state is damaged: rows {tuple(rows.shape)}, gram {tuple(gram.shape)}, history {tuple(history.shape)} "
                f"do not fit {count} segments of {width} coordinates"
            )
        self._rows, self._gram, self._history = rows, gram, history
        self.n_samples_seen_, self._features = n, state["n_features"]
        self._forget()

    # Rows

    def _pack(self, x: Tensor) -> Tensor:
        """The stored coordinates of ``x``, (n, L)."""
        if x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise TypeError(f"x must be float32, float64 or bfloat16, got {x.dtype}")
        if x.dim() not in (1, 2):
            raise ValueError(f"x must have shape (P,) or (n, P), got {tuple(x.shape)}")
        if self.n_samples_seen_:
            self._check_alike("x", x, x.shape[-1])
        rows = x.detach().reshape(-1, x.shape[-1])
        if self.segments is None:
            return rows.contiguous()
        last = max(self.segments, key=lambda s: s.stop)
        if last.stop > x.shape[-1]:
            raise ValueError(f"x has {x.shape[-1]} coordinates, but segment {last.name!r} ends at {last.stop}")
        return torch.cat([rows[:, s.start : s.stop] for s in self.segments], dim=1)

    def _check_alike(self, name: str, rows: Tensor, features: int) -> None:
        got, wanted = (features, rows.dtype, rows.device), (self._features, self._rows.dtype, self._rows.device)
        if got != wanted:
            raise ValueError(
                f"{name} has {got[0]} coordinates, {got[1]}, on {got[2]}; "
                f"earlier rows have {wanted[0]} coordinates, {wanted[1]}, on {wanted[2]}"
            )

    def _append(self, rows: Tensor, features: int) -> None:
        """Store packed rows and extend the Gram matrix. Nothing below ``n_samples_seen_`` is written to."""
        old, new = self.n_samples_seen_, self.n_samples_seen_ + len(rows)
        if new == old:
            return
        spans = self._packed_spans(features)
        self._reserve(new, rows, len(spans))
        self._rows[old:new] = rows
        table = torch.tensor(spans, dtype=torch.int64, device=rows.device)
        block = ops.gram(self._rows[old:new], self._rows[:new], origin=self._rows[0], segments=table)
        finite = block[:, :, old:].diagonal(dim1=1, dim2=2).isfinite().all(0)
        if not finite.all():
            number = int(finite.logical_not().nonzero()[0])
            raise ValueError(f"x: row {number} holds NaN or infinity, or numbers whose squares overflow")
        self._gram[:, old:new, :new] = block
        self._gram[:, :old, old:new] = block[:, :, :old].transpose(1, 2)
        self.n_samples_seen_, self._features = new, features
        self._forget()

    def _reserve(self, size: int, rows: Tensor, count: int) -> None:
        """Room for ``size`` rows like ``rows``; doubles, so that a row is moved once on average."""
        old = self.n_samples_seen_
        if old and size <= len(self._rows):
            return
        capacity = max(size, 2 * old)
        store = rows.new_empty(capacity, rows.shape[1])
        gram = rows.new_empty(count, capacity, capacity, dtype=torch.float64)
        if old:
            store[:old] = self._rows[:old]
            gram[:, :old, :old] = self._gram[:, :old, :old]
        self._rows, self._gram = store, gram

    def _packed_spans(self, features: int | None = None) -> list[tuple[int, int]]:
        """Start and length of each segment among the stored coordinates."""
        if self.segments is None:
            return [(0, self._features if features is None else features)]
        spans, start = [], 0
        for segment in self.segments:
            spans.append((start, segment.length))
            start += segment.length
        return spans

    def _forget(self) -> None:
        for name in ("_spectrum", "_components", "_means"):
            self.__dict__.pop(name, None)

    def _check_fitted(self) -> None:
        if not self.n_samples_seen_:
            raise ValueError("this StreamingPCA has seen no rows yet: call partial_fit first")

    # What follows from them

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """Leading eigenvalues (S, k) of the centred Gram matrices, their traces (S,), and eigenvectors (S, n, k)."""
        self._check_fitted()
        n = self.n_samples_seen_
        centred = _Prefixes(self._gram[:, :n, :n]).centred(n)
        values, vectors = ops.eigh(centred, min(self.n_components, n))
        values = torch.where(values <= self._rank_floor()[:, None], 0.0, values)
        missing = self.n_components - values.shape[1]
        pad = torch.nn.functional.pad
        return pad(values, (0, missing)), _trace(centred), pad(vectors, (0, missing))

    def _raw_trace(self) -> Tensor:
        """(S,): the sum of ``|x_i - x_0|^2``, to which the rounding of G is proportional."""
        n = self.n_samples_seen_
        return _trace(self._gram[:, :n, :n])

    def _rank_floor(self) -> Tensor:
        """(S,): an eigenvalue below this is rounding: errors of a sum grow like a random walk; n of them; a margin."""
        roots = [max(self.n_samples_seen_, length**0.5) for _, length in self._packed_spans()]
        trace = self._raw_trace()
        return 4 * EPSILON * torch.tensor(roots, dtype=torch.float64, device=trace.device) * trace

    @cached_property
    def _components(self) -> list[Tensor]:
        values, _, vectors = self._spectrum
        scale = torch.where(values == 0, 0.0, values.rsqrt())
        weights = (vectors - vectors.mean(1, keepdim=True)) * scale[:, None, :]
        return [
            _with_positive_peak(_orthonormalised(part)).to(self._output_dtype)
            for part in self._combinations(weights.transpose(1, 2))
        ]

    @cached_property
    def _means(self) -> list[Tensor]:
        self._check_fitted()
        n, count = self.n_samples_seen_, len(self._packed_spans())
        weights = torch.full((count, 1, n), 1 / n, dtype=torch.float64, device=self._rows.device)
        origins = torch.split(self._rows[0], [length for _, length in self._packed_spans()])
        parts = zip(origins, self._combinations(weights), strict=True)
        return [(origin + part[0]).to(self._output_dtype) for origin, part in parts]

    def _combinations(self, weights: Tensor) -> list[Tensor]:
        """For each segment the float64 sums over t of ``weights[s, j, t] (x_t - x_0)``: (k, length) each.

        Row by row with elementwise operations, whose bits no number of threads can change.
        """
        results = []
        for (start, length), weight in zip(self._packed_spans(), weights, strict=True):
            total = weight.new_zeros(weight.shape[0], length)
            for left in range(0, length, COLUMNS):
                part = total[:, left : left + COLUMNS]
                rows = self._rows[: self.n_samples_seen_, start + left : start + left + part.shape[1]]
                origin = rows[0].double()
                for row, w in zip(rows, weight.T, strict=True):
                    part += w[:, None] * (row.double() - origin)
            results.append(total)
        return results

    @property
    def _output_dtype(self) -> torch.dtype:
        return torch.float64 if self._rows.dtype == torch.float64 else torch.float32

    def _shaped(self, per_segment: Tensor) -> Tensor:
        return per_segment if self.segments is not None else per_segment[0]


class _Prefixes:
    """Double centring of every leading block of a stack of Gram matrices (S, n, n).

    Running sums make the result for a prefix independent of the rows that follow it, to the bit.
    """

    def __init__(self, gram: Tensor) -> None:
        self.gram = gram
        self.row_sums = gram.cumsum(2)
        self.totals = self.row_sums.cumsum(1).diagonal(dim1=1, dim2=2)

    def centred(self, size: int) -> Tensor:
        """(S, size, size): Gram matrix of the first ``size`` rows about their mean."""
        mean = self.row_sums[:, :size, size - 1] / size
        grand = self.totals[:, size - 1] / size**2
        return self.gram[:, :size, :size] - (mean[:, :, None] + mean[:, None, :]) + grand[:, None, None]

    def leading_share(self, size: int) -> Tensor:
        """(S,): largest eigenvalue over trace; NaN where there is no variance."""
        centred = self.centred(size)
        values, _ = ops.eigh(centred, 1)
        return values[:, 0] / _trace(centred)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def _orthonormalised(rows: Tensor) -> Tensor:
    """Gram-Schmidt in place (k, length): rows that are orthonormal but for the rounding of a small eigenvalue."""
    for j in range(len(rows)):
        row = rows[j : j + 1]
        for coefficient, earlier in zip(ops.gram(row, rows[:j])[0, 0], rows, strict=False):
            row -= coefficient * earlier
        norm = ops.gram(row)[0, 0, 0].sqrt()
        row *= torch.where(norm == 0, 0.0, 1 / norm)
    return rows


def _with_positive_peak(rows: Tensor) -> Tensor:
    """Turn rows (k, length) so that the entry of largest magnitude is positive."""
    if rows.shape[1]:
        peak = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        rows *= torch.where(peak < 0, -1.0, 1.0)
    return rows


def _named(segments: Sequence[Segment | tuple[int, int]]) -> tuple[Segment, ...]:
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


def _spans(segments: tuple[Segment, ...] | None) -> list[list[int]] | None:
    return None if segments is None else [[s.start, s.length] for s in segments]
