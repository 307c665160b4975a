r"""The block incremental method: a weighted basis and a buffer of new rows, whatever the number of rows.

Kept are r rows B with :math:`B^T B` near the scatter :math:`S = \sum_t (x_t - \mu)(x_t - \mu)^T` of the n rows so far,
their sum, and a buffer of up to b new rows. A full buffer of m rows is folded into B:

* With Y the new rows about the old mean, the scatter grows by :math:`Y^T (I - 11^T / (n + m)) Y`, mean's move included.
  As :math:`I - 11^T / (n + m) = A^2` for :math:`A = I - \alpha 11^T`, :math:`\alpha = (1 - \sqrt{n / (n + m)}) / m`,
  the rows Z made of B and A Y have :math:`Z^T Z = B^T B + Y^T A^2 Y`. Nothing of length P is needed for the mean.
* With V the leading r eigenvectors of the small matrix :math:`Z Z^T`, the new B is :math:`V^T Z`, in place.

What is cut off, :math:`E = Z^T Z - B^T B`, is positive semidefinite; its norm is the eigenvalue r + 1 of
:math:`Z Z^T`. So eigenvalues only ever lose, and the sum of these norms over the folds bounds how much, as does the sum
of the traces: a certificate that is measured, whatever the rows were (block incremental SVD: Brand 2006; with the mean:
Ross et al. 2008). Shrinkage lowers all eigenvalues by the one cut off (frequent directions: Ghashami et al. 2016); then
the bound is known beforehand too: at most the variance outside the leading j directions over r + 1 - j, for every j.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.pca.common import EIGH_TOLERANCE, EPSILON, Layout, Method, Spectrum, check_state, trace
from grokcurv.pca.gram import Gram
from grokcurv.reference import compute_type

TENSORS = ("origin", "sum", "count", "valid", "total", "lost", "rounding")
"""Of a state those that are attributes of the same name, shape and dtype."""

MARKS = 1 << 14
"""Entries of :attr:`Incremental.history` that are kept, the latest; fewer for more than 63 segments of a run."""


class Fold(NamedTuple):
    """What the basis and the rows behind it come to."""

    values: Tensor
    """(S, r + 1) leading eigenvalues of the scatter, descending."""
    rotation: Tensor
    """(S, r + 1, m): row j makes the eigenvector j, times the root of its eigenvalue, from the m rows."""
    trace: Tensor
    """(S,) of what the eigenvalues belong to."""
    total: Tensor
    """(S,) trace of the scatter of all rows given, whatever was cut off earlier."""
    rounding: Tensor
    """(S,) bound on what rounding has moved an eigenvalue by, so far."""
    floor: Tensor
    """(S,) an eigenvalue below this is rounding."""


class Incremental(Method):
    """The PCA of any number of rows in the memory of r + b + 1 of them, the first one and a sum in float64.

    All that depends on the rows lives in tensors that stay where they are, the number of rows too. So a block of b rows
    makes the same calls on the same memory whatever it holds, and never waits for the device: from the second block on
    it can be captured in a CUDA graph.
    """

    side_by_side: ClassVar = {
        **{"rows": 1, "origin": 0, "sum": 0, "total": 0, "lost": 1, "rounding": 0},
        **{"history": 1, "bounds": 1, "exact": 1},
    }

    def __init__(
        self, n_components: int, rank: int, block: int, shrinkage: bool, layout: Layout, dtype: torch.dtype
    ) -> None:
        self.n_components, self.rank, self.block, self.shrinkage = n_components, rank, block, shrinkage
        self.layout, self.dtype = layout, compute_type(dtype)
        count = len(layout.lengths)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=layout.device)

        # The basis, the mean of what is folded into it, and the buffer; all but the basis about the first row.
        self.rows = zeros(rank + 1 + block, layout.size, dtype=self.dtype)
        self.origin = zeros(layout.size, dtype=self.dtype)
        self.sum = zeros(layout.size)
        self.count = zeros()  # rows folded
        self.valid = zeros(block)  # of the buffer's rows: 1, or 0 for one that was masked
        self.appended = self.pending = 0  # rows taken in, masked ones too; of these in the buffer
        self.begun = False  # whether there was a fold
        self.folds = zeros()
        self.total = zeros(count)
        self.lost = zeros(2, count)  # sums over the folds: largest eigenvalue cut off, and all of them
        self.rounding = zeros(count)
        # A ring of the shares of the first component, of how far they may be off, and of the numbers of rows after
        # which they were taken.
        self.marked = zeros(1, dtype=torch.int64)
        self.marks = zeros(min(MARKS, max(1 << 10, (1 << 20) // (count // layout.runs + 1))))
        self.shares, self.bounds = zeros(len(self.marks), count), zeros(len(self.marks), count)
        self.earlier: Gram | None = None  # what had the first rows, until its history is asked for
        self.exact = zeros(0, count)  # that history

    @property
    def n_samples_seen(self) -> int:
        return int(self.count + self.valid[: self.pending].sum())

    def append(self, rows: Tensor, valid: Tensor | None = None) -> None:
        if valid is None:
            if not self.appended and len(rows):
                self.origin.copy_(rows[0])
        elif not self.begun and len(rows):
            first = valid.any() & (self.valid[: self.pending].sum() == 0)
            row = rows.index_select(0, valid.int().argmax()[None])[0]
            self.origin.copy_(torch.where(first, row, self.origin))
        start = 0
        while start < len(rows):
            stop = min(len(rows), start + self.block - self.pending)
            places = self._buffer[self.pending : self.pending + stop - start]
            counts = self.valid[self.pending : self.pending + stop - start]
            torch.sub(rows[start:stop], self.origin, out=places)
            if valid is None:
                counts.fill_(1)
            else:
                places.masked_fill_(valid[start:stop, None].logical_not(), 0.0)
                counts.copy_(valid[start:stop])
            self._took(stop - start)
            start = stop

    def follow(self, gram: Gram) -> None:
        """Take the rows of a method that has kept them, what rounding has done to them, and its history."""
        for rows, valid in gram.given():
            self.append(rows, valid)
        self.rounding += gram.rounding()
        self.forget()
        if self.appended == len(gram.rows):
            self.earlier = gram.past()

    def drop_masked(self) -> None:
        """None are held: they are zeros of no weight."""
        if self.earlier is not None:
            self.earlier.drop_masked()

    def merge(self, other: Incremental) -> None:
        if not self.appended:
            self.origin.copy_(other.origin)
            self.earlier, self.exact = other.earlier, other.exact
        if other.begun:
            self._flush()
            self._merge_folded(other)
        shift = other.origin.double() - self.origin
        for row, counts in zip(other._buffer[: other.pending], other.valid, strict=False):
            self._buffer[self.pending].copy_((row.double() + shift) * counts)
            self.valid[self.pending].copy_(counts)
            self._took(1)

    def spectrum(self) -> Spectrum:
        fold = self.fold
        values = fold.values[:, : self.n_components]
        values = torch.where(values <= fold.floor[:, None], 0.0, values)
        return Spectrum(values, fold.total, self.lost.amin(0).clamp_min(0) + fold.rounding)

    def components(self) -> Tensor:
        values = self.spectrum().values
        scale = torch.where(values == 0, 0.0, values.rsqrt())
        rotation = (self.fold.rotation[:, : self.n_components] * scale[:, :, None]).contiguous()
        return self.layout.orthonormal_(ops.rotate(self._used, rotation, segments=self.layout.spans))

    def mean(self) -> Tensor:
        total = self.sum.clone()
        weights = torch.nn.functional.pad(self.valid[: self.pending], (self.rank + 1, 0))
        none = weights.new_empty(len(self.layout.lengths), 0, len(weights))
        ops.rotate_(self._used, none, segments=self.layout.spans, mean=total, weights=weights)
        return total.div_(self.count + weights.sum()).add_(self.origin).to(self.dtype)

    @property
    def history(self) -> Tensor:
        """(n, S): known for rows that were kept, and later where a block ended; NaN elsewhere."""
        return self._by_rows(self.shares, self._exact())

    @property
    def history_bound(self) -> Tensor:
        return self._by_rows(self.bounds, torch.zeros_like(self._exact()))

    def _by_rows(self, ring: Tensor, exact: Tensor) -> Tensor:
        """What the ring remembers of numbers of rows, in their order; NaN between them."""
        history = self.shares.new_full((self.n_samples_seen, ring.shape[1]), torch.nan)
        marks, values = self._in_order(self.marks), self._in_order(ring)
        for count, value in zip(marks.tolist(), values, strict=True):
            if count:
                history[int(count) - 1] = value
        history[: len(exact)] = exact
        return history

    def _exact(self) -> Tensor:
        if self.earlier is not None:
            self.exact, self.earlier = self.earlier.history, None
        return self.exact

    def _in_order(self, ring: Tensor) -> Tensor:
        """What is in a ring, the oldest first."""
        marked, size = int(self.marked), len(ring)
        return ring[:marked] if marked <= size else torch.roll(ring, -(marked % size), 0)

    @cached_property
    def fold(self) -> Fold:
        """The basis with the rows now in the buffer; kept until something is added."""
        return self._fold(self.valid[: self.pending])

    # State

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` goes on from, bitwise: basis, rows that wait in the buffer, counts and history.

        Of all runs together. Its tensors are those at work and no copies.
        """
        numbers = {"appended": self.appended, "pending": self.pending, "folds": int(self.folds)}
        tensors = {name: getattr(self, name) for name in TENSORS}
        rings = {name: self._in_order(ring) for name, ring in self._rings.items()}
        return {"rows": self._used, **tensors, **numbers, **rings, "exact": self._exact()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        numbers = {name: state.get(name) for name in ("appended", "pending", "folds")}
        if any(type(value) is not int or value < 0 for value in numbers.values()):
            raise ValueError(f"state is damaged: {numbers}")
        pending = state["pending"]
        if not {"bounds", "exact"} & state.keys():  # of an older version, which had neither
            lost = torch.full_like(state["history"], torch.nan) if isinstance(state.get("history"), Tensor) else None
            state = {**state, "bounds": lost, "exact": self.exact}
        marks, exact = (
            value.shape[0] if isinstance(value, Tensor) and value.dim() else 0
            for value in (state.get("marks"), state.get("exact"))
        )
        own: dict[str, Tensor] = {name: getattr(self, name) for name in TENSORS}
        wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()} | {
            "rows": ((self.rank + 1 + pending, self.layout.size), self.dtype),
            **{name: ((marks, *ring.shape[1:]), torch.float64) for name, ring in self._rings.items()},
            "exact": ((exact, len(self.layout.lengths)), torch.float64),
        }
        check_state(state, wanted)
        if pending >= self.block:
            raise ValueError(f"state is damaged: {pending} rows pending in a block of {self.block}")
        if marks > len(self.marks):
            raise ValueError(f"state is damaged: {marks} marks, but {len(self.marks)} are kept")
        self._used_of(pending).copy_(state["rows"])
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self.appended, self.pending, self.begun = state["appended"], pending, state["folds"] > 0
        self.folds.fill_(state["folds"])
        self.marked.fill_(marks)
        for name, ring in self._rings.items():
            ring[:marks] = state[name]
        self.earlier, self.exact = None, state["exact"]

    @property
    def _rings(self) -> dict[str, Tensor]:
        """By name in a state."""
        return {"marks": self.marks, "history": self.shares, "bounds": self.bounds}

    # Folding

    @property
    def _buffer(self) -> Tensor:
        return self.rows[self.rank + 1 :]

    def _used_of(self, pending: int) -> Tensor:
        return self.rows[: self.rank + 1 + pending]

    @property
    def _used(self) -> Tensor:
        return self._used_of(self.pending)

    def _took(self, count: int) -> None:
        """The next places of the buffer have been filled."""
        self.appended += count
        self.pending += count
        self.forget()
        if self.pending == self.block:
            self._flush()

    def forget(self) -> None:
        self.__dict__.pop("fold", None)

    def _flush(self) -> None:
        """Fold the buffer into the basis."""
        if not self.pending:
            return
        valid = self.valid[: self.pending]
        fold = self.fold
        kept = self._replace_basis(fold, valid)
        self.count += valid.sum()
        self.total.copy_(fold.total)
        self.rounding.copy_(fold.rounding)
        self.valid.zero_()
        self.pending = 0
        self._set_mean()
        self._mark(kept)

    def _fold(self, valid: Tensor, centred: bool = True) -> Fold:
        """Of the basis and the first rows of the buffer; these are parts of a scatter themselves if not ``centred``."""
        basis, rows = self.rank, self._used_of(len(valid))
        gram = ops.gram(rows, segments=self.layout.spans)
        raw, energy = trace(gram), gram[:, basis, basis]
        among = torch.nn.functional.pad(valid, (basis + 1, 0))
        added = valid.sum()
        count = self.count + added if centred else self.count
        alpha = torch.zeros_like(count)
        if centred:
            mean = gram[:, basis]
            gram = gram - (among[:, None] * mean[:, None, :] + mean[:, :, None] * among)
            gram = gram + energy[:, None, None] * (among[:, None] * among)
            alpha = (1 - (self.count / count.clamp_min(1)).sqrt()) / added.clamp_min(1)
            sums = (gram * among).sum(2)
            twice = alpha * (sums * among).sum(1)[:, None, None] * among[:, None] * among
            gram = gram - alpha * (sums[:, :, None] * among + among[:, None] * sums[:, None, :] - twice)
        gram[:, basis].zero_()
        gram[:, :, basis].zero_()

        values, vectors = ops.eigh(gram, basis + 1)
        rotation = vectors.transpose(1, 2)
        share = (rotation * among).sum(2, keepdim=True)
        rotation = rotation - alpha * share * among
        rotation[:, :, basis].copy_((alpha * added - 1) * share[:, :, 0] if centred else torch.zeros_like(alpha))

        grown = (gram.diagonal(dim1=1, dim2=2) * among).sum(1)
        unit = torch.finfo(self.dtype).eps / 2
        given = (raw - energy).clamp_min(0)
        # Rows rounded on arrival, the mean rounded twice, rows of the basis rounded at the end; then sums and solver.
        error = 2 * unit * (given * grown).sqrt() + (4 * unit + count * EPSILON) * (energy * added * grown).sqrt()
        error = error + 2 * unit * values[:, :basis].clamp_min(0).sum(1)
        sizes = self.layout.sizes
        error = error + 2 * (sizes + 4) * EPSILON * raw + EIGH_TOLERANCE * raw
        # Of directions that hold nothing: sums err like random walks, rows of the basis by a unit each.
        floor = 4 * (EPSILON * sizes.sqrt().clamp_min(len(rows)) + (self.folds + 1) * unit**2) * raw
        return Fold(values, rotation, trace(gram), self.total + grown, self.rounding + error, floor)

    def _replace_basis(self, fold: Fold, valid: Tensor) -> Tensor:
        """Write the leading part of a fold over the basis, and add the rows of the buffer to the sum; its values."""
        used = self._used_of(len(valid))
        rotation = fold.rotation[:, : self.rank]
        kept, cut = fold.values[:, : self.rank], fold.values[:, self.rank].clamp_min(0)
        if self.shrinkage:
            lowered = (kept - cut[:, None]).clamp_min(0)
            rotation = rotation * torch.where(lowered > 0, lowered / kept, 0.0).sqrt()[:, :, None]
            kept = lowered
        self.lost += torch.stack([cut, (fold.trace - kept.sum(1)).clamp_min(0)])
        weights = torch.nn.functional.pad(valid, (self.rank + 1, 0))
        ops.rotate_(used, rotation.contiguous(), segments=self.layout.spans, mean=self.sum, weights=weights)
        self.folds += 1
        self.begun = True
        return kept

    def _set_mean(self) -> None:
        self.rows[self.rank].copy_(self.sum)
        self.rows[self.rank] /= self.count.clamp_min(1)

    def _mark(self, values: Tensor) -> None:
        """The basis is new, with these eigenvalues."""
        place = self.marked % len(self.marks)
        self.marks.index_copy_(0, place, self.count[None])
        self.shares.index_copy_(0, place, (values[:, 0] / self.total)[None])
        off = self.lost.amin(0).clamp_min(0) + self.rounding
        self.bounds.index_copy_(0, place, (off / self.total)[None])
        self.marked += 1
        self.forget()

    def _merge_folded(self, other: Incremental) -> None:
        """Add what the other has folded: its basis, and the outer product of the difference of the means."""
        between = self.count * other.count / (self.count + other.count).clamp_min(1)
        shift = other.origin.double() - self.origin
        apart = other.rows[self.rank] + shift - self.rows[self.rank]
        parts = [*other.rows[: self.rank], (apart * between.sqrt()).to(self.dtype)]
        for start in range(0, len(parts), self.block):
            part = parts[start : start + self.block]
            for place, row in zip(self._buffer, part, strict=False):
                place.copy_(row)
            fold = self._fold(self.valid.new_ones(len(part)), centred=False)
            self._replace_basis(fold, self.valid.new_zeros(len(part)))
            self.rounding.copy_(fold.rounding)
        self.total += other.total + between * ops.gram(apart[None], segments=self.layout.spans)[:, 0, 0]
        self.lost += other.lost
        self.rounding += other.rounding
        self.sum += other.sum + other.count * shift
        self.count += other.count
        self._set_mean()
        self.appended += other.appended - other.pending
        self.forget()
        self._mark(self.fold.values)
