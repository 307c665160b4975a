"""Subspaces of parameter space: projections on an orthonormal basis, and what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from grokcurv import ops
from grokcurv.flat import Segment, attention_segments, flatten
from grokcurv.partition import WHOLE, Partition
from grokcurv.random_subspace import RandomBaseline as RandomBaseline
from grokcurv.reference import compute_type, dense_basis

if TYPE_CHECKING:
    from grokcurv.pca import StreamingPCA

ORTHONORMAL_TOLERANCE = 1000.0
"""How many machine epsilons an inner product of basis rows may be from 0 or 1."""

RANK_TOLERANCE = 1e-10
"""Up to here an eigenvalue of the Gram matrix of unit vectors is zero: vectors that differ by less than 1e-5 of their
length do so by float32 rounding, and the rounding of the float64 sums is far below."""


class Split(NamedTuple):
    """A vector, or N of them, seen from a subspace. float64, on the vector's device."""

    coefficients: Tensor
    """(K,) or (N, K) inner products with the basis rows."""
    parallel: Tensor
    """() or (N,) length of the part inside the subspace."""
    residual: Tensor
    """() or (N,) length of the part outside."""


class Alignment(NamedTuple):
    """A vector seen from K others, which need not be orthogonal. float64, on their device."""

    cosines: Tensor
    """(K,) of its angle with each."""
    share: Tensor
    """() length of its part in their span over its own: 0 to 1."""
    correlations: Tensor
    """(K, K) cosines of the others among themselves."""


def alignment(v: Tensor, rows: Tensor, partition: Partition = WHOLE) -> Alignment:
    """Cosines of ``v`` (P,) with each of ``rows`` (K, P), and the share of its length that lies in their span.

    Of several runs ``v`` is (R, P), ``rows`` is (K, R, P), and what is found has R in front.

    With C the cosines of the rows among themselves and c those with ``v``, the squared share is ``c' C^-1 c``, taken
    over the eigenvectors of C beyond :data:`RANK_TOLERANCE`: dependent rows do no harm. Two passes over the rows, sums
    in float64, no copy, no synchronisation. NaN where ``v`` or a row is zero or holds a NaN. ``partition`` says of
    which coordinates these are the vectors, if not of all.

    Raises:
        ValueError, TypeError: lengths, dtypes or devices that differ, or that the ops do not take.
    """
    size = v.shape[-1]
    one, every = v.reshape(1, -1), rows.reshape(len(rows), -1)
    spans = torch.tensor([(start, size) for start in range(0, one.shape[1], size or 1)] or [(0, 0)])
    sums = ops.gram(every, segments=spans), ops.gram(one, every, segments=spans), ops.gram(one, segments=spans)
    gram, inner, own = partition.all_reduce_sum(*sums)
    lengths = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosines = inner[:, 0] / (lengths * own[:, 0].sqrt())
    correlations = gram / (lengths[:, :, None] * lengths[:, None])
    values, vectors = ops.eigh(correlations, len(rows))
    parts = (vectors * cosines[:, :, None]).sum(1).square() / values
    share = torch.where(values <= RANK_TOLERANCE, 0.0, parts).sum(1).sqrt()
    found = Alignment(cosines, share.clamp(max=1.0), correlations)
    return found if v.ndim == 2 else Alignment(*(part[0] for part in found))


class Subspace:
    """The span of K orthonormal rows in R^P; or R of them, of one shape, in one tensor.

    A row is kept on the interval where it may differ from zero, so that a basis which lives on a few parameters costs
    as much memory and time as those. :attr:`values` and :attr:`rows` are the form that :mod:`grokcurv.ops` takes: row j
    is ``values[offset : offset + length]`` from coordinate ``start`` on, with ``(start, length, offset) = rows[j]``.

    >>> space = Subspace(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    >>> split = space.split(torch.tensor([3.0, 4.0, 12.0]))
    >>> split.parallel.item(), split.residual.item()
    (5.0, 12.0)

    Args:
        rows: (K, P) float32 or float64, K <= P; kept, not copied, if contiguous. See also :meth:`from_blocks`,
            :meth:`from_pca`, :meth:`from_singular_vectors`, :meth:`random`.

    Attributes:
        values: (n,), the dtype of the basis; (R, n) where :meth:`from_pca` made it of R runs. Vectors to split or to
            filter are then (R, P), one for each.
        rows: (K, 3) int64 on the CPU, wherever the values are.
        size: P.
        support: the disjoint intervals ``(start, length)`` on which the basis lives, in order.

    Raises:
        TypeError: neither float32 nor float64.
        ValueError: not two-dimensional, K > P, not finite, or not orthonormal within 1000 machine epsilons.
    """

    def __init__(self, rows: Tensor) -> None:
        if rows.dim() != 2:
            raise ValueError(f"rows must have shape (K, P), got {tuple(rows.shape)}")
        self._set(rows.shape[1], [(0, rows)])

    @classmethod
    def from_blocks(cls, size: int, blocks: Iterable[tuple[int, Tensor]]) -> Subspace:
        """A basis of rows that live on disjoint intervals.

        Args:
            size: P.
            blocks: at least one ``(start, rows)``; ``rows`` (k, length), orthonormal, are basis rows that are zero
                outside coordinates ``start`` to ``start + length - 1``. All of one dtype, on one device.

        Raises:
            ValueError, TypeError: as for the class; no block, blocks that overlap or leave 0..P.
        """
        space = cls.__new__(cls)
        space._set(size, list(blocks))
        return space

    @classmethod
    def from_pca(cls, pca: StreamingPCA, n_components: int | None = None, size: int | None = None) -> Subspace:
        """The leading components of a fitted PCA, of every segment if it has segments.

        Components without variance are left out, so K can be less than the number asked for. On an accelerator they
        stay, as rows of zeros, since nobody waits to see which those are; and of several runs where another has some.

        Args:
            pca: a fitted :class:`grokcurv.StreamingPCA`, of one run or several.
            n_components: how many per segment; all that the PCA keeps by default.
            size: P; by default the length of the vectors the PCA has seen.

        Raises:
            ValueError: the PCA has seen no row, keeps fewer components than asked for, or reaches beyond ``size``.
        """
        k = pca.n_components if n_components is None else n_components
        if not 0 <= k <= pca.n_components:
            raise ValueError(f"n_components must lie in 0..{pca.n_components}, which is what pca keeps; got {k}")
        space, blocks = cls.__new__(cls), pca.leading_blocks(k)
        space._set(pca.n_features_in_ if size is None else size, _side_by_side(blocks), check=False)
        if any(segment.pieces for segment, _ in blocks):
            space.support = _joined(i for segment, rows in blocks if rows.shape[-2] for i in segment.intervals)
        return space

    @classmethod
    def from_singular_vectors(cls, model: nn.Module, k: int = 3) -> Subspace:
        """The leading ``k`` singular directions of each W_Q, W_K, W_V and W_O, as the weights are now.

        A direction is ``u_i v_i'``, the matrix of a left and a right singular vector, as a unit row on the coordinates
        of its W; it has no free sign, and is as unique as its singular value is simple. The random-subspace control of
        Xu (arXiv 2602.16746) takes these with k = 3, 24 rows for two layers, where the paper's text has the principal
        directions of the trajectory (:meth:`from_pca`). By float64 singular value decompositions, rounded once.

        Args:
            model: with at least one ``nn.MultiheadAttention``; frozen projections are left out.
            k: directions per matrix, at least 1.

        Raises:
            ValueError: ``k`` is below 1 or beyond the numerical rank of a matrix, or the model has no trainable
                attention projection.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        theta, blocks = flatten(model), []
        dtype = compute_type(theta.dtype)
        for segment in attention_segments(model):
            matrix = segment.of(theta).view(segment.shape).to(torch.float64)
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            rank = int((values > max(matrix.shape) * torch.finfo(dtype).eps * values[0]).sum())
            if k > rank:
                raise ValueError(f"k must be at most the rank of {segment.name}, which is {rank}; got {k}")
            rows = left.mT[:k, :, None] * right[:k, None]
            blocks.append((segment, rows.flatten(1).to(dtype)))
        return cls.from_blocks(len(theta), _side_by_side(blocks))

    @classmethod
    def random(cls, dim: int, size: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Subspace:
        """A uniformly distributed subspace of ``dim`` dimensions in R^size, on the generator's device.

        It is the span of standard normal vectors (float64, orthonormalised by QR): 16 K P bytes at the peak. For
        the distribution of a projection on such a subspace, :meth:`random_baseline` needs no basis at all.

        Raises:
            ValueError: unless 0 <= dim <= size.
        """
        if not 0 <= dim <= size:
            raise ValueError(f"dim must lie in 0..size = {size}, got {dim}")
        normal = torch.randn(size, dim, dtype=torch.float64, device=generator.device, generator=generator)
        return cls(torch.linalg.qr(normal).Q.T.to(dtype))

    @classmethod
    def from_table(cls, size: int, values: Tensor, rows: Tensor) -> Subspace:
        """The subspace whose :attr:`size`, :attr:`values` and :attr:`rows` these are, as a run folder keeps them.

        Rows of zeros, which :meth:`from_pca` leaves in on an accelerator, are left out.

        Raises:
            ValueError, TypeError: as for :meth:`from_blocks`.
        """
        blocks: dict[tuple[int, int], list[Tensor]] = {}
        for start, length, offset in rows.tolist():
            row = values[offset : offset + length]
            if row.any():
                blocks.setdefault((start, length), []).append(row)
        parts = [(start, torch.stack(block)) for (start, _), block in blocks.items()]
        return cls.from_blocks(size, parts or [(0, values.new_empty(0, 0))])

    def random_like(self, generator: torch.Generator) -> Subspace:
        """A random subspace matched to this one: on each interval of its support as many random directions.

        Drawn interval by interval, so that it differs from this one by its directions alone: not by how many of them
        fall to which parameters, and not by what it costs. On the generator's device.
        """
        counts = Counter((start, length) for start, length, _ in self.rows.tolist())
        parts = [
            (start, Subspace.random(k, length, generator, self.values.dtype).to_dense())
            for (start, length), k in counts.items()
        ]
        return Subspace.from_blocks(self.size, parts or [(0, self.values.new_empty(0, 0))])

    def _set(self, size: int, blocks: list[tuple[int, Tensor]], check: bool = True) -> None:
        """Store blocks (start, rows) one after another, with a table of where each row is."""
        if not blocks:
            raise ValueError("blocks must hold at least one (start, rows)")
        blocks = sorted(((start, rows.detach().contiguous()) for start, rows in blocks), key=lambda block: block[0])
        first, stop = blocks[0][1], 0
        table, offset = [], 0
        for start, rows in blocks:
            if check and rows.dim() != 2:
                raise ValueError(f"rows must have shape (k, length), got {tuple(rows.shape)}")
            _check_block(start, rows, first, stop, size)
            if check:
                _check_orthonormal(rows)
            count, length = rows.shape[-2:]
            stop = start + length
            table += [(start, length, offset + index * length) for index in range(count)]
            offset += count * length
        self.values = torch.cat([rows.flatten(-2) for _, rows in blocks], -1) if len(blocks) > 1 else first.flatten(-2)
        self.rows = torch.tensor(table, dtype=torch.int64).reshape(-1, 3)
        self.size = size
        self.support = tuple((start, rows.shape[-1]) for start, rows in blocks if rows.shape[-2])

    @property
    def dim(self) -> int:
        """K."""
        return self.rows.shape[0]

    @property
    def scattered(self) -> bool:
        """Whether the support is more intervals than there are rows, as that of columns of matrices is."""
        return len(self.support) > self.dim

    @property
    def support_size(self) -> int:
        """Number of coordinates on which the basis lives."""
        return sum(length for _, length in self.support)

    def to_dense(self) -> Tensor:
        """The basis as a matrix (K, P); of R runs (R, K, P)."""
        return dense_basis(self.values, self.rows, self.size, self.values.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Subspace:
        """The same subspace in another floating dtype or on another device; arguments as for ``Tensor.to``."""
        return self._with(self.values.to(*args, **kwargs))

    def of(self, runs: int | Sequence[int]) -> Subspace:
        """Of those of R runs that of one, which shares their memory, or those of some; what is one for all stays so."""
        return self if self.values.dim() == 1 else self._with(self.values[runs])

    def _with(self, values: Tensor) -> Subspace:
        """The same rows with other values."""
        space = Subspace.__new__(Subspace)
        space.values, space.rows, space.size, space.support = values, self.rows, self.size, self.support
        return space

    def split(self, v: Tensor) -> Split:
        """Coefficients of ``v`` (P,) or (N, P) on the basis, and the lengths of its parts inside and outside.

        One pass over ``v``, sums in float64, no synchronisation. The residual comes from Pythagoras: it is exact to
        about the basis's own orthonormality error relative to ``|v|^2``, so of a vector inside the subspace of a
        float32 basis some 1e-4 ``|v|`` may remain.

        Raises:
            ValueError, TypeError: ``v`` has another length, device or dtype than the ops take.
        """
        vectors = self._vectors("v", v)
        norm2, coefficients = ops.subspace_split(vectors, self.values.to(compute_type(v.dtype)), self.rows)
        parallel2 = coefficients.square().sum(1)
        split = Split(coefficients, parallel2.sqrt(), (norm2 - parallel2).clamp_min(0).sqrt())
        return Split(*(part[0] for part in split)) if v.dim() == 1 else split

    def filter_(self, g: Tensor, strength: float) -> Tensor:
        """In place ``g <- g_par + (1 - strength) g_perp`` for ``g`` (P,) or (N, P); returns ``g``.

        ``strength`` 1 projects on the subspace, 0 changes nothing.

        Raises:
            ValueError, TypeError: ``g`` has another length, device or dtype than the ops take; ``strength`` is not
                finite.
        """
        ops.subspace_filter_(self._vectors("g", g), self.values.to(compute_type(g.dtype)), self.rows, strength)
        return g

    def principal_angles(self, other: Subspace) -> Tensor:
        """Angles between this subspace and another, ascending, in radians; 0 where they share a direction.

        Björck and Golub's (Numerical methods for computing angles between linear subspaces, 1973): with Q and Q' the
        orthonormal rows, those beyond 45 degrees are the arc cosines of the singular values of Q Q'^T, those below the
        arc sines of the singular values of what is outside the other subspace, ``Q' - (Q' Q^T) Q``: an arc cosine near
        1 would be right to the root of the rounding alone. Computed in float64, of rows that are made orthonormal
        there; a basis that is stored in float32 is itself some 1e-7 radians from the one that it was rounded from. The
        components of several segments are one subspace here. A row of zeros is orthogonal to everything.

        >>> import torch, grokcurv as gc
        >>> plane, tilted = torch.eye(3)[:2], torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
        >>> gc.Subspace(plane).principal_angles(gc.Subspace(tilted)).cos()
        tensor([1.0000, 0.6000], dtype=torch.float64)

        Returns:
            (k,) float64, k the lesser dimension; (R, k) of R runs, where either of the two may be one for all.

        Raises:
            ValueError: the other has another size, is on another device, or of other runs.
        """
        if other.size != self.size:
            raise ValueError(f"other must be a subspace of R^{self.size}, as this one is; got one of R^{other.size}")
        if other.values.device != self.values.device:
            raise ValueError(f"other must be on {self.values.device}, as this subspace is; got {other.values.device}")
        runs = [len(space.values) for space in (self, other) if space.values.dim() == 2]
        if len(set(runs)) > 1:
            raise ValueError(f"other must be of {runs[0]} runs, as this subspace is, or one for all; got {runs[1]}")
        # Only where one of them lives: coordinates that both leave out have no part in any inner product.
        few, many = sorted((self, other), key=lambda space: space.dim)
        places = _joined((*few.support, *many.support))
        q, r = (space._packed(places) for space in (few, many))
        cosines = q @ r.mT
        across = torch.linalg.svdvals(cosines).clamp(max=1.0)
        # Ascending, as the angles are: the largest cosine belongs to the smallest sine.
        absent = (q.square().sum(-1) == 0).double().diag_embed()
        outside = torch.linalg.svdvals(torch.cat([q - cosines @ r, absent], -1)).flip(-1).clamp(max=1.0)
        return torch.where(across.square() >= 0.5, outside.asin(), across.acos())

    def _packed(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """(..., K, n) float64: rows on these intervals, that hold all of the support, side by side, orthonormal."""
        starts = list(accumulate((length for _, length in places), initial=0))
        rows = self.values.new_zeros(*self.values.shape[:-1], self.dim, starts.pop(), dtype=torch.float64)
        for j, (start, length, offset) in enumerate(self.rows.tolist()):
            for (begin, count), at in zip(places, starts, strict=True):
                first, last = max(start, begin), min(start + length, begin + count)
                if first < last:
                    here = self.values[..., offset + first - start : offset + last - start]
                    rows[..., j, at + first - begin : at + last - begin] = here
        # Newton and Schulz's iteration squares the rows' distance from orthonormality, and leaves zeros alone.
        for _ in range(2):
            rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
        return rows

    def random_baseline(self, support: Literal["full", "matched"] = "full") -> RandomBaseline:
        """What a uniformly random subspace of the same dimension catches of a fixed vector.

        Args:
            support: ``"full"``: random in R^P, to set beside ``|proj v| / |v|``. ``"matched"``: random among the
                subspaces that live on the same coordinates as this one, to set beside ``|proj v| / |v_S|`` with
                ``v_S`` the part of ``v`` on those.
        """
        if support not in ("full", "matched"):
            raise ValueError(f"support must be 'full' or 'matched', got {support!r}")
        return RandomBaseline(self.dim, self.size if support == "full" else self.support_size)

    def __repr__(self) -> str:
        return f"Subspace(dim={self.dim}, size={self.size}, support_size={self.support_size}, {self.values.dtype})"

    def _vectors(self, name: str, v: Tensor) -> Tensor:
        """``v`` as (N, P)."""
        if v.dim() not in (1, 2) or v.shape[-1] != self.size:
            raise ValueError(f"{name} must have shape ({self.size},) or (N, {self.size}), got {tuple(v.shape)}")
        return v[None] if v.dim() == 1 else v


def _side_by_side(blocks: list[tuple[Segment, Tensor]]) -> list[tuple[int, Tensor]]:
    """Rows on segments as rows on disjoint intervals: segments that reach into each other share one.

    Rows of a segment in pieces have zeros between them.
    """
    blocks = sorted(blocks, key=lambda block: block[0].start)
    stops = accumulate((segment.stop for segment, _ in blocks), max)
    begins = [i for i, before in enumerate((0, *stops)) if i < len(blocks) and blocks[i][0].start >= before]
    together = [blocks[i:j] for i, j in pairwise((*begins, len(blocks)))]
    return [
        _spread(those) if len(those) > 1 or those[0][0].pieces else (those[0][0].start, those[0][1])
        for those in together
    ]


def _joined(intervals: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The intervals in order, those that touch or overlap as one."""
    joined: list[tuple[int, int]] = []
    for start, length in sorted(intervals):
        if joined and sum(joined[-1]) >= start:
            first = joined[-1][0]
            joined[-1] = (first, max(sum(joined[-1]), start + length) - first)
        else:
            joined.append((start, length))
    return tuple(joined)


def _spread(blocks: list[tuple[Segment, Tensor]]) -> tuple[int, Tensor]:
    """Rows (..., k, length) on segments, as rows on the one interval that holds them all."""
    start, stop = blocks[0][0].start, max(segment.stop for segment, _ in blocks)
    *runs, _, _ = blocks[0][1].shape
    every = blocks[0][1].new_zeros(*runs, sum(rows.shape[-2] for _, rows in blocks), stop - start)
    first = 0
    for segment, rows in blocks:
        own = every[..., first : first + rows.shape[-2], :]
        done = 0
        for begin, length in segment.intervals:
            own[..., begin - start : begin - start + length] = rows[..., done : done + length]
            done += length
        first += rows.shape[-2]
    return start, every


def _check_block(start: int, rows: Tensor, first: Tensor, stop: int, size: int) -> None:
    """``first`` is the first block's rows, ``stop`` where the block before this one ends."""
    if rows.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"rows must be float32 or float64, got {rows.dtype}")
    if rows.dtype != first.dtype or rows.device != first.device:
        raise ValueError(
            "blocks must have one dtype and one device, "
            f"got {first.dtype} on {first.device} and {rows.dtype} on {rows.device}"
        )
    length = rows.shape[-1]
    if start < stop or start + length > size:
        raise ValueError(f"blocks must be disjoint and lie in 0..{size}; one spans {start}..{start + length}")


def _check_orthonormal(rows: Tensor) -> None:
    """Raise a ValueError unless rows (k, length) are orthonormal, up to rounding."""
    k, length = rows.shape
    if k > length:
        raise ValueError(f"rows: {k} rows of length {length} cannot be orthonormal")
    tolerance = ORTHONORMAL_TOLERANCE * torch.finfo(rows.dtype).eps
    gram = ops.gram(rows)[0]
    # Of no rows there is no maximum; a NaN is beyond any tolerance.
    error = (gram - torch.eye(k, dtype=gram.dtype, device=gram.device)).abs().amax().item() if k else 0.0
    if not error <= tolerance:
        raise ValueError(f"rows must be orthonormal: inner products are off by {error:.2g}, beyond {tolerance:.2g}")
