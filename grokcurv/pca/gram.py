r"""The exact method: all rows are kept, and their Gram matrix.

With n rows of L coordinates and n far below L, everything follows from the n x n Gram matrix of the rows. Its entries
are float64 sums taken about the first row, :math:`G_{ij} = (x_i - x_0) \cdot (x_j - x_0)`, so that a trajectory which
moves little beside its distance from the origin loses nothing. With :math:`J = I - 11^T / n`, the eigenpairs
:math:`(\lambda_j, v_j)` of :math:`J G J` give the scatter's eigenvalues and its components :math:`X^T v_j /
\sqrt{\lambda_j}` (the method of snapshots, Sirovich 1987). A new row costs one pass over the rows, and the leading
blocks of G hold the whole history: the PCA of every prefix.

About the first row the matrix is G itself; about the origin it is :math:`G_{ij} + a_i + a_j + |x_0|^2` with :math:`a_i
= (x_i - x_0) \cdot x_0`. Rows of length one divide it by their lengths on both sides. A window drops rows and columns.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.device_buffer import is_asynchronous
from grokcurv.partition import WHOLE
from grokcurv.pca.common import EIGH_TOLERANCE, EPSILON, Layout, Method, Spectrum, check_state, padded, trace
from grokcurv.pca.prefixes import GramPrefixes, PlainPrefixes, ScatterPrefixes
from grokcurv.pca.rows import Rows
from grokcurv.reference import compute_type


class About(NamedTuple):
    """Of what rows the PCA is: as :class:`grokcurv.StreamingPCA` has it."""

    reference: str = "mean"
    normalize: bool = False
    window: int | None = None

    @property
    def plain(self) -> bool:
        """Whether it is that of all rows about their mean."""
        return self == MEAN


MEAN = About()


class Gram(Method):
    """The PCA of rows that are kept; ``stored`` is their type in the store.

    Where that is narrower than the rows' own, differences from the first row are stored, not the rows themselves: they
    are smaller, and so is the rounding.
    """

    side_by_side: ClassVar = {"rows": 1, "origin": 0, "gram": 0, "rounded": 0, "history": 1}

    def __init__(
        self,
        n_components: int,
        layout: Layout,
        dtype: torch.dtype,
        stored: torch.dtype | None,
        scratch: str | None,
        about: About = MEAN,
    ) -> None:
        self.n_components, self.layout, self.dtype, self.about = n_components, layout, dtype, about
        self.rows = Rows(layout.size, stored or dtype, layout.device, scratch, layout.runs)
        self.origin = torch.zeros(layout.size, dtype=dtype, device=layout.device)
        # Has room to grow: only the leading n x n block counts.
        self.gram = torch.empty(len(layout.lengths), 0, 0, dtype=torch.float64, device=layout.device)
        self.shares = torch.empty(0, len(layout.lengths), dtype=torch.float64, device=layout.device)
        self.rounded = self.gram.new_zeros(len(layout.lengths))  # squared distances of stored rows from those given
        self.flags: Tensor | None = None  # (n,) bool, on an accelerator: rows that are not masked

    @property
    def n_samples_seen(self) -> int:
        return len(self.rows) if self.flags is None else int(self.flags.sum())

    def append(self, rows: Tensor, valid: Tensor | None = None) -> None:
        old, new = len(self.rows), len(self.rows) + len(rows)
        if valid is not None:
            rows = torch.where(valid[:, None], rows, 0.0)
        origin = self.origin if old else rows[0].clone()
        errors = self.gram.new_empty(len(self.rounded), 0)
        if self._differences:
            exact = rows.double() - origin.double()
            rows = exact.to(self.rows.dtype)
            held = self.layout.finite(rows)
            if valid is not None:
                valid = valid & held
                rows = torch.where(valid[:, None], rows, 0.0)
            elif not is_asynchronous(rows.device) and not held.all():
                number = int(held.logical_not().nonzero()[0])
                raise ValueError(f"x: row {number} is too far from the first one for store_dtype={self.rows.dtype}")
            errors = self.layout.gram(exact - rows.double()).diagonal(dim1=1, dim2=2)
        self.rows.reserve(new)
        self._reserve(new)
        self.rows.append(rows)
        self.origin = origin
        for error in errors.T:  # one by one, so that it does not matter how the caller cuts the rows
            self.rounded = self.rounded + error
        if valid is not None or self.flags is not None:
            parts = [(self.flags, old), (valid, len(rows))]
            every = [torch.ones(n, dtype=torch.bool, device=rows.device) if t is None else t for t, n in parts]
            self.flags = torch.cat(every)
        shift = None if self._differences else self.origin
        for start, page in self.rows.pages():
            stop, first = start + len(page), max(old, start)  # pairs among the new rows once
            if first == start:
                self.gram[:, start:stop, start:stop] = self.layout.gram(page, origin=shift)
                first = stop
            block = self.layout.gram(rows[first - old :], page, origin=shift)
            self.gram[:, first:new, start:stop] = block
            self.gram[:, start:stop, first:new] = block.transpose(1, 2)
        self.forget()
        if self.about.window is not None:
            self._slide(self.about.window, old)

    def _slide(self, window: int, old: int) -> None:
        """Note the share of each new row's window, and forget rows that are older than the last one."""
        matrices, n, shares = self._matrices(), len(self.rows), []
        for last in range(old, n):
            here = slice(max(0, last + 1 - window), last + 1)
            block = self._about_mean(matrices[:, here, here], None if self.flags is None else self.flags[here])
            shares.append(ops.eigh(block.contiguous(), 1)[0][:, 0] / trace(block))
        self.shares = torch.cat([self.shares, torch.stack(shares)])
        gone = n - window
        if gone > 0:
            self.rows.keep(list(range(gone, n)))
            self.gram = self.gram[:, gone:n, gone:n].clone()
            self.flags = None if self.flags is None else self.flags[gone:]
        self.forget()

    def merge(self, other: Gram) -> None:
        self.rows.reserve(len(self.rows) + len(other.rows))  # all or nothing, where disk may be short
        before = self.rounded
        for rows, flags in other.given():
            self.append(rows, flags)
        # Rows that were rounded there and here are off by both.
        self.rounded = before + ((self.rounded - before).sqrt() + other.rounded.sqrt()).square()

    def given(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The rows, (n_i, L) at a time, as they were given, but for what :meth:`rounding` says; and their flags."""
        for start, page in list(self.rows.pages()):
            flags = None if self.flags is None else self.flags[start : start + len(page)]
            yield (page.double() + self.origin).to(self.dtype) if self._differences else page, flags

    def rounding(self) -> Tensor:
        """(S,): how far an eigenvalue can be off because rows were rounded when they were stored."""
        return 2 * (self.rounded * trace(self._matrices())).sqrt() + self.rounded

    def drop_masked(self) -> None:
        if self.flags is None:
            return
        index = self.flags.nonzero()[:, 0]
        self.flags = None
        self.forget()
        if len(index) < len(self.rows):
            self.rows.keep(index.tolist())
            self.gram = self.gram[:, index][:, :, index]
            if self.about.window is None:
                self.shares = self.shares[:0]
            self.__dict__.pop("_scatters", None)

    def forget(self) -> None:
        """Drop eigenvectors and sums worked out from the rows so far: they are computed anew when next asked for."""
        for name in ("solution", "_along"):
            self.__dict__.pop(name, None)

    # What follows from them

    @property
    def raw(self) -> Tensor:
        """(S, n, n): the Gram matrices about the first row."""
        n = len(self.rows)
        return self.gram[:, :n, :n]

    @property
    def narrow(self) -> bool:
        """Whether there are more rows than any segment has coordinates; not where those are on several processes."""
        return len(self.rows) > self._most_wide

    @cached_property
    def solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """Leading eigenvalues (S, k), traces (S,), and eigenvectors (S, m, k) of what is smaller.

        That is the centred Gram matrices, m = n, or if :attr:`narrow` the scatter matrices of the coordinates, where m
        is the longest segment's length, and the coordinates that others lack are zero.
        """
        centred = self._scatter() if self.narrow else self._centred()
        k = min(self.n_components, centred.shape[1])
        values, vectors = ops.eigh(centred, k)
        values = torch.where(values <= self._rank_floor()[:, None], 0.0, values)
        return padded(values, self.n_components), trace(centred), padded(vectors, self.n_components)

    def spectrum(self) -> Spectrum:
        values, total, _ = self.solution
        n, lengths = len(self.rows), self.layout.sizes
        # About another point, or of rows of another length, the same with what _scale says in place of its trace.
        # Each entry of G is off by at most (length + 2) eps/2 times |x_i - x_0| |x_j - x_0|, so G by that times its
        # trace in norm; centring adds four terms of at most (2n + 6) eps/2. Sums over n rows that were centred before
        # are off by less. An eigenvalue moves by at most the norm of the error (Weyl); then what is rounded down to
        # zero, and the solver.
        worst = (0.5 * lengths + 4 * n + 13) * EPSILON * self._scale() + self._rank_floor()
        return Spectrum(values, total, worst + EIGH_TOLERANCE * values[:, 0] + self.rounding())

    def components(self) -> Tensor:
        values, _, vectors = self.solution
        if self.narrow:
            axes = torch.where(values[:, None] > 0, vectors, 0.0).transpose(1, 2)
            parts = [axis[:, :length] for axis, length in zip(axes, self.layout.lengths, strict=True)]
            return self.layout.orthonormal_(torch.cat(parts, 1).to(compute_type(self.dtype)))
        scale = torch.where(values == 0, 0.0, values.rsqrt())
        if self.about.reference != "mean":
            weights = (vectors * self._weights()[:, :, None] * scale[:, None, :]).transpose(1, 2).contiguous()
            # The stored rows are about the origin or about the first one, as the PCA is, or else that one is missing.
            missing = {"none": 1.0, "first": 0.0}[self.about.reference] - (0.0 if self._differences else 1.0)
            first = ops.rotate(
                self.origin.double()[None], missing * weights.sum(2, keepdim=True), segments=self.layout.spans
            )
            return self.layout.orthonormal_((self._combination(weights) + first).to(compute_type(self.dtype)))
        if self.flags is None:
            weights = (vectors - vectors.mean(1, keepdim=True)) * scale[:, None, :]
        else:
            share = self._shares_of_rows()[:, None]
            weights = (vectors - (share * vectors).sum(1, keepdim=True)) * (share > 0) * scale[:, None, :]
        rows = self._combination(weights.transpose(1, 2).contiguous()).to(compute_type(self.dtype))
        return self.layout.orthonormal_(rows)

    def mean(self) -> Tensor:
        n, count = len(self.rows), len(self.layout.lengths)
        mean = self._combination(self._shares_of_rows().expand(count, 1, n).contiguous())[0]
        if self._differences:
            mean += self.origin
        return mean.to(compute_type(self.dtype))

    def reference(self) -> Tensor:
        """(L,) of the dtype of the components: what rows are about."""
        if self.about.reference == "mean":
            return self.mean()
        origin = self.origin.to(compute_type(self.dtype))
        return origin if self.about.reference == "first" else torch.zeros_like(origin)

    def scores(self, rows: Tensor) -> Tensor:
        reference = self.reference()
        apart = rows.to(reference.dtype) - reference
        scores = self.layout.gram(apart, self.components())
        if not self.about.normalize:
            return scores
        lengths = self.layout.gram(apart).diagonal(dim1=1, dim2=2).sqrt()
        return torch.where(lengths[:, :, None] > 0, scores / lengths[:, :, None], 0.0)

    @property
    def history(self) -> Tensor:
        """(n, S); the first is NaN, since one row has no variance. Every prefix is solved once, when first read."""
        done, n = len(self.shares), len(self.rows)
        if self.about.window is not None:
            return self.shares  # of each row's own window, as it came
        if done < n:
            wide = range(done + 1, min(n, self._most_wide) + 1)
            narrow = range(max(done, self._most_wide) + 1, n + 1)
            new = []
            if wide:
                kind = GramPrefixes if self.about.reference == "mean" else PlainPrefixes
                prefixes = kind(self._matrices()[:, : wide[-1], : wide[-1]])
                new += prefixes.leading_shares(wide)
            if narrow:
                new += self._scatters.leading_shares(narrow)
            self.shares = torch.cat([self.shares, torch.stack(new)])
        return self.shares

    @cached_property
    def _scatters(self) -> ScatterPrefixes:
        """Of the prefixes read so far; rows that come later are added when theirs are."""
        return ScatterPrefixes(self.rows, None if self._differences else self.origin, self.layout)

    @property
    def history_bound(self) -> Tensor:
        """(n, S): zeros, as prefixes are exact but for rounding."""
        return torch.zeros_like(self.history)

    def past(self) -> Gram:
        """What can still tell the history: only where rows are short and many it takes the rows themselves."""
        other = copy.copy(self)
        other.rows, other.gram = copy.copy(self.rows), self.raw.clone()
        if not self.narrow:
            other.rows.release()
        return other

    def step_norms(self) -> Tensor:
        """(n - 1, S): ``|x_t - x_{t-1}|``."""
        squares = self.raw.diagonal(dim1=1, dim2=2)
        neighbours = self.raw.diagonal(offset=1, dim1=1, dim2=2)
        return (squares[:, 1:] + squares[:, :-1] - 2 * neighbours).clamp_min(0).sqrt().T

    # State

    def state_dict(self) -> dict[str, Any]:
        return {
            # In a window rows move, and what is saved must not.
            "rows": [page if self.about.window is None else page.clone() for _, page in self.rows.pages()],
            "origin": self.origin,
            "gram": self.raw,
            "rounded": self.rounded,
            "history": self.shares,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pages, shares, count = state.get("rows"), state.get("history"), len(self.layout.lengths)
        if not isinstance(pages, list) or not isinstance(shares, Tensor):
            raise ValueError(f"state is damaged: it lacks {'history' if isinstance(pages, list) else 'rows'}")
        for page in pages:
            check_state({"rows": page}, {"rows": ((len(page), self.layout.size), self.rows.dtype)})
        n, float64 = sum(len(page) for page in pages), torch.float64
        wanted = {
            "origin": ((self.layout.size,), self.dtype),
            "gram": ((count, n, n), float64),
            "rounded": ((count,), float64),
            "history": ((min(n, len(shares)) if self.about.window is None else len(shares), count), float64),
        }
        check_state(state, wanted)
        for page in pages:
            self.rows.append(page)
        self.origin, self.gram, self.rounded, self.shares = state["origin"], state["gram"], state["rounded"], shares

    # Helpers

    @property
    def _most_wide(self) -> int:
        """So many rows have a Gram matrix no larger than the scatter matrix of a segment's coordinates."""
        longest = max(self.layout.lengths)
        return longest if longest and self.layout.partition == WHOLE and self.about.plain else sys.maxsize

    @property
    def _differences(self) -> bool:
        return self.rows.dtype != self.dtype

    def _reserve(self, size: int) -> None:
        """Room in the Gram matrix; doubles, so that an entry is moved once on average."""
        old = len(self.rows)
        if size > self.gram.shape[1]:
            capacity = max(size, 2 * old)
            gram = self.gram.new_empty(len(self.gram), capacity, capacity)
            gram[:, :old, :old] = self.gram[:, :old, :old]
            self.gram = gram

    def _shares_of_rows(self) -> Tensor:
        """(n,) float64: the weight of each row in the mean; 0 for masked ones."""
        if self.flags is None:
            return self.gram.new_full((len(self.rows),), 1 / len(self.rows))
        return self.flags.double() / self.flags.sum().clamp_min(1)

    @cached_property
    def _along(self) -> tuple[Tensor, Tensor]:
        """(S, n) inner products of ``x_i - x_0`` with x_0, and (S, 1) of x_0 with itself."""
        zero = torch.zeros_like(self.origin)[None]
        if self._differences:
            first = self.origin.double()[None]
            parts = [self.layout.gram(page.double(), first) for _, page in self.rows.pages()]
        else:
            parts = [-self.layout.gram(page, zero, origin=self.origin) for _, page in self.rows.pages()]
        return torch.cat(parts, 1)[:, :, 0], self.layout.gram(zero, origin=self.origin)[:, 0]

    def _about_reference(self) -> Tensor:
        """(S, n, n): the Gram matrices about a reference that is no mean."""
        if self.about.reference != "none":
            return self.raw
        along, own = self._along
        return self.raw + (along[:, :, None] + along[:, None, :]) + own[:, :, None]

    def _weights(self) -> Tensor:
        """(S, n): what each row is multiplied with: 0 where it is masked or has no length to be divided by."""
        lengths = self._about_reference().diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        weights = torch.where(lengths > 0, 1 / lengths, 0.0) if self.about.normalize else torch.ones_like(lengths)
        return weights if self.flags is None else weights * self.flags

    def _matrices(self) -> Tensor:
        """(S, n, n): the Gram matrices of the rows whose PCA this is, but for the mean."""
        if self.about.reference == "mean":
            return self.raw
        weights = self._weights()
        return self._about_reference() * weights[:, :, None] * weights[:, None, :]

    def _scale(self) -> Tensor:
        """(S,): a trace such that entries of the matrices are off by no more than those of G relative to its own.

        About the origin a term is a sum of four products, each with a factor of at most ``|x_i - x_0| + |x_0|``;
        lengths are off by half as much as their squares, and divide from both sides.
        """
        lengths = self.raw.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
        if self.about.reference == "none":
            lengths = lengths + self._along[1].sqrt()
        return (1 + self.about.normalize) * (lengths * self._weights()).square().sum(1)

    def _centred(self) -> Tensor:
        """(S, n, n): the Gram matrices about the reference, zero where a row is masked."""
        return self._about_mean(self._matrices(), self.flags)

    def _about_mean(self, matrices: Tensor, flags: Tensor | None) -> Tensor:
        """Matrices of some rows about the mean of those that are not masked; as they are, if that is not wanted."""
        if self.about.reference != "mean":
            return matrices
        if flags is None:
            return GramPrefixes(matrices).centred(matrices.shape[1])
        share, both = flags.double() / flags.sum().clamp_min(1), flags[:, None] & flags
        mean = matrices @ share
        grand = (mean @ share)[:, None, None]
        return torch.where(both, matrices - (mean[:, :, None] + mean[:, None, :]) + grand, 0.0)

    def _scatter(self) -> Tensor:
        """(S, m, m): the scatter matrices of the coordinates, zero for those that a segment lacks; masked rows out."""
        rows = torch.cat([page for _, page in self.rows.pages()]).double()
        if not self._differences:
            rows = rows - self.origin.double()
        weights, count, m = self._shares_of_rows(), len(rows), max(self.layout.lengths)
        # A mean whose bits do not depend on what stands beside a coordinate.
        mean = ops.rotate(
            rows, weights.expand(len(self.layout.lengths), 1, count).contiguous(), segments=self.layout.spans
        )
        rows = torch.where(weights[:, None] > 0, rows - mean, 0.0)
        columns = [
            torch.nn.functional.pad(part.T, (0, 0, 0, m - part.shape[1]))
            for part in rows.split(list(self.layout.lengths), 1)
        ]
        spans = torch.tensor([(count * s, count) for s in range(len(columns))])
        return ops.gram(torch.cat(columns, 1), segments=spans)

    def _rank_floor(self) -> Tensor:
        """(S,): an eigenvalue below this is rounding: errors of a sum grow like a random walk; n of them; a margin."""
        return 4 * EPSILON * self.layout.sizes.sqrt().clamp_min(len(self.rows)) * self._scale()

    def _combination(self, weights: Tensor) -> Tensor:
        """(q, L) float64: the sums over t of ``weights[s, j, t] x_t``, or of the differences that are stored."""
        total = self.gram.new_zeros(weights.shape[1], self.layout.size)
        for start, page in self.rows.pages():
            part = weights[:, :, start : start + len(page)].contiguous()
            total += ops.rotate(page.double(), part, segments=self.layout.spans)
        return total
