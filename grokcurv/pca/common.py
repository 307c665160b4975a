"""What the methods of a streaming PCA share: the stored coordinates, the check of rows, the finish of a basis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.partition import WHOLE, Partition

EPSILON = torch.finfo(torch.float64).eps

EIGH_TOLERANCE = 1e-12
"""Relative to the largest: how closely :func:`grokcurv.ops.eigh` settles an eigenvalue."""

LARGEST = {torch.float64: 1e150, torch.float32: 1e30, torch.bfloat16: 1e30}
"""Coordinates beyond this are refused: sums of them, or of their squares in float64, could overflow."""


@dataclass(frozen=True)
class Layout:
    """The stored coordinates of a row: segments one behind the other, each with a PCA of its own.

    Of R runs those of each run, one behind the other: then S is R times the number of a run's segments.
    """

    lengths: tuple[int, ...]
    device: torch.device
    partition: Partition = WHOLE
    runs: int = 1

    @property
    def size(self) -> int:
        """L, the number of stored coordinates."""
        return sum(self.lengths)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Start and length of each segment."""
        return zip(accumulate(self.lengths, initial=0), self.lengths, strict=False)

    @cached_property
    def spans(self) -> Tensor:
        """(S, 2) int64 on the CPU, as the ops take them."""
        return torch.tensor(list(self.intervals()), dtype=torch.int64).reshape(-1, 2)

    @cached_property
    def sizes(self) -> Tensor:
        """(S,) float64: the lengths, of whole segments where here are parts of them."""
        sizes = torch.tensor(self.lengths, dtype=torch.float64)
        if self.device.type == "cuda":
            sizes = sizes.pin_memory()  # from elsewhere the copy would be waited for
        (sizes,) = self.partition.all_reduce_sum(sizes.to(self.device, non_blocking=True))
        return sizes

    def split(self, rows: Tensor) -> list[Tensor]:
        """(..., L) by segment of a run: (..., R, length) each."""
        lengths = self.lengths[: len(self.lengths) // self.runs]
        return list(torch.split(rows.view(*rows.shape[:-1], self.runs, sum(lengths)), list(lengths), dim=-1))

    def gram(self, x: Tensor, y: Tensor | None = None, *, origin: Tensor | None = None) -> Tensor:
        """:func:`grokcurv.ops.gram` by segment."""
        (gram,) = self.partition.all_reduce_sum(ops.gram(x, y, origin=origin, segments=self.spans))
        return gram

    def orthonormal_(self, rows: Tensor) -> Tensor:
        """Make rows (k, L), orthonormal by segment but for rounding, or zero, so in place, with their peaks positive.

        Gram-Schmidt in two passes over the rows: the coefficients follow from their Gram matrix. The entry of largest
        magnitude of each row becomes positive, as in scikit-learn.
        """
        gram = self.gram(rows)
        rotation = torch.zeros_like(gram)
        for j in range(len(rows)):
            row = torch.zeros_like(rotation[:, j])
            row[:, j] = 1.0
            for i in range(j):
                row -= (rotation[:, i] * gram[:, j]).sum(1, keepdim=True) * rotation[:, i]
            norm2 = (row[:, :, None] * gram * row[:, None, :]).sum((1, 2))
            rotation[:, j] = row * torch.where(norm2 > 0, norm2.rsqrt(), 0.0)[:, None]
        ops.rotate_(rows, rotation, segments=self.spans)
        parts = self.split(rows)
        ends = [
            torch.stack([-part.amin(-1), part.amax(-1)]) if part.shape[-1] else part.new_zeros(2, *part.shape[:-1])
            for part in parts
        ]
        down, up = self.partition.all_reduce_max(torch.stack(ends, -1))
        for part, sign in zip(parts, torch.where(down > up, -1.0, 1.0).unbind(-1), strict=True):
            part *= sign[..., None]
        return rows

    def finite(self, rows: Tensor) -> Tensor:
        """(n,) bool: which rows hold neither NaN nor infinity nor a number beyond :data:`LARGEST`."""
        if not rows.shape[1]:
            here = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        else:  # torch.aminmax would take ten times as long over the rows of a matrix
            here = torch.maximum(rows.amax(1), -rows.amin(1)) < LARGEST[rows.dtype]
        return self.partition.all_reduce_and(here)


class Spectrum(NamedTuple):
    """What is known of the scatter matrix of each segment: n - 1 times its covariance."""

    values: Tensor
    """(S, k) leading eigenvalues, descending."""
    total: Tensor
    """(S,) trace."""
    bound: Tensor
    """(S,) how far an eigenvalue can be from that of the rows as given."""


class Method(Protocol):
    """A way to keep the PCA of packed rows (n, L). Reading changes nothing that is kept."""

    layout: Layout
    side_by_side: ClassVar[Mapping[str, int]]
    """Of a state what belongs to one run each, and the dimension along which; runs that go on together share the
    rest."""

    @property
    def n_samples_seen(self) -> int: ...

    @property
    def history(self) -> Tensor:
        """(n, S) float64: share of the first component in the first 1, 2, ... n rows; NaN where it is not known."""

    @property
    def history_bound(self) -> Tensor:
        """(n, S) float64: how far each of them can be off; 0 where it is exact but for rounding."""

    def append(self, rows: Tensor, valid: Tensor | None = None) -> None:
        """Add rows; if ``valid`` (n,) bool is given, only those it marks: the others are masked."""

    def drop_masked(self) -> None:
        """Take out masked rows that are still held; waits for the device."""

    def forget(self) -> None:
        """Drop what was worked out from rows before: a replay may have added some."""

    def merge(self, other: Any) -> None:
        """Add the rows of ``other``, which has the same settings and has seen some."""

    def spectrum(self) -> Spectrum: ...

    def components(self) -> Tensor:
        """(k, L) orthonormal by segment, zero where there is no variance; float64 for float64 rows, else float32."""

    def mean(self) -> Tensor:
        """(L,) of the dtype of the components."""

    def scores(self, rows: Tensor) -> Tensor:
        """(S, n, k) float64: coordinates of packed rows along the components, about the mean."""
        mean = self.mean()
        return self.layout.gram(rows.to(mean.dtype) - mean, self.components())

    def state_dict(self) -> dict[str, Any]:
        """Of all runs; its tensors are those at work."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def check_state(state: Mapping[str, Any], wanted: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raises unless the state holds tensors of these shapes and dtypes."""
    for name, (shape, dtype) in wanted.items():
        value = state.get(name)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
            got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"state is damaged: {name} must be {shape} {dtype}, got {got}")


def of_run(method: Method, run: int) -> dict[str, Any]:
    """What one run has of a method's state, copied, but for the rows where there is only one run."""
    runs = method.layout.runs

    def part(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return value if runs == 1 else [part(name, page) for page in value]
        if isinstance(value, Tensor):
            dim = method.side_by_side.get(name)
            return (value if dim is None else value.chunk(runs, dim)[run]).clone()
        return value

    return {name: part(name, value) for name, value in method.state_dict().items()}


def fed_alike(states: Sequence[Mapping[str, Any]], dims: Mapping[str, int]) -> bool:
    """Whether the runs of these states of PCAs can go on together: they share all that is not one run's alone."""
    # Rows are as many as the other parts say, and a history may have been read of some of the runs.
    apart = {"state", "reason_", "rows", "history"}
    shared = [
        {
            name: value.shape if name in dims else value.tolist() if isinstance(value, Tensor) else value
            for name, value in {**state, **(state["state"] or {})}.items()
            if name not in apart
        }
        for state in states
    ]
    return all(one == shared[0] for one in shared)


def joined(states: Sequence[Mapping[str, Any]], dims: Mapping[str, int]) -> dict[str, Any]:
    """One state of a method for runs that were fed alike, from that of each."""

    def beside(parts: Sequence[Any], dim: int) -> Any:
        if isinstance(parts[0], list):
            return [beside(pages, dim) for pages in zip(*parts, strict=True)]
        known = min(map(len, parts))  # a history may have been read of some of the runs
        return torch.cat([part[:known] for part in parts], dim)

    return {**states[0], **{name: beside([state[name] for state in states], dim) for name, dim in dims.items()}}


def trace(matrices: Tensor) -> Tensor:
    """(S,) of (S, n, n)."""
    return matrices.diagonal(dim1=1, dim2=2).sum(1)


def padded(values: Tensor, size: int) -> Tensor:
    """``values`` with zeros behind in the last dimension, up to ``size``."""
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))
