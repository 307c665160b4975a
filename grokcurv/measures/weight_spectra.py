"""Singular values of weight matrices and of their updates: norms, effective ranks, gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.commutator import CommutatorProbe
from grokcurv.device_buffer import capturing
from grokcurv.flat import Segment, attention_segments, segments_of
from grokcurv.measures.base import Measure, wanted_segments
from grokcurv.measures.update_gram import singular_values
from grokcurv.pairs import PairOfRuns
from grokcurv.partition import WHOLE

OF_MATRICES = ("spectral_norm", "stable_rank", "entropy_rank", "gap")
"""What is said of the singular values of a matrix, in this order."""


class Group(NamedTuple):
    """Matrices whose shorter sides are of one length."""

    side: int
    places: tuple[int, ...]
    """Of each among all matrices."""
    tall: tuple[bool, ...]
    """Whether its shorter side is the columns'."""


class WeightSpectra(Measure):
    """Singular values sigma_1 >= sigma_2 >= ... of weight matrices W, and of their updates.

    =========================  ==================================================================================
    ``parameter_norm``         |theta|, of all parameters
    ``weight_spectral_norm``   sigma_1, in units of theta
    ``weight_stable_rank``     |W|_F^2 / sigma_1^2, from 1 to the rank
    ``weight_entropy_rank``    exp(-sum p log p), p = sigma / sum sigma: the effective rank of Roy & Vetterli
                               (EUSIPCO 2007), from 1 to the rank; the exponential of the spectral entropy
    ``weight_gap``             sigma_1 / sigma_2; infinite where sigma_2 is zero
    ``update_...``             the last four of the update, NaN until there is one
    ``weight_spectra_floor``   u |W|_F, u the unit roundoff, of the largest matrix: what storing W rounds moves all
                               its singular values together, and all those of its update, by no more than that
                               (the root of the sum of squares; Mirsky 1960)
    =========================  ==================================================================================

    Each but the first and the last is the median over the matrices; with ``per_matrix=True`` columns by name follow,
    such as ``weight_gap[layers.0.linear1.weight]``. With f the floor of a matrix its spectral norm is known to f, the
    gap to a part f (1 / sigma_1 + 1 / sigma_2), the stable rank to a part 2 f (1 / |W|_F + 1 / sigma_1), and the
    logarithm of the entropy rank to T log(n - 1) + h(T), T = sqrt(n) f / sum sigma, h the binary entropy (Audenaert
    2007). A sigma below 1e-7 of the greatest counts as zero; of a matrix of zeros all but sigma_1 are NaN.

    The update is that of the last step, ``theta_t - theta_(t-1)``; with ``every`` = E the difference of parameters E
    steps apart, at steps that are multiples of E, and rows between them repeat the latest.

    A step costs no gradient and copies the matrices once; a row takes a product and an eigenvalue problem of the
    shorter side of each matrix, and of each update. Three vectors of all matrices are kept for each run.

    >>> import torch, grokcurv as gc
    >>> model = torch.nn.Linear(4, 3)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.eye(3, 4))
    >>> measure = gc.WeightSpectra()
    >>> monitor = gc.CurvatureMonitor(model, lambda model, batch: model(batch).sum(), measures=[measure])
    >>> monitor.step()
    >>> monitor.records()[["weight_stable_rank", "weight_entropy_rank", "weight_gap"]].round(6).values.tolist()
    [[3.0, 3.0, 1.0]]

    Args:
        segments: patterns of :func:`grokcurv.select_segments`, one or several, or segments; by default the model's
            attention matrices or, where it has none, all weights. What has fewer than two dimensions is left out; of
            more than two the first counts as rows, and all others as columns.
        every: E, in steps.
        per_matrix: record the columns of each matrix too.

    Attributes:
        matrices: the segments, once a monitor has them.

    Raises:
        ValueError: ``every`` below 1; when the monitor is made, segments that match nothing, no matrix among them, or a
            model under ``fully_shard``.
    """

    name = "weight_spectra"

    def __init__(
        self, segments: str | Sequence[str | Segment] | None = None, *, every: int = 1, per_matrix: bool = False
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, in steps; got {every}")
        self._wanted, self.every, self.per_matrix = segments, every, per_matrix
        self._of_each = tuple(f"{kind}_{what}" for kind in ("weight", "update") for what in OF_MATRICES)
        self.columns = ("parameter_norm", *self._of_each, "weight_spectra_floor")

    def bind(self, probe: CommutatorProbe) -> None:
        """Find the matrices in the model; says in a ValueError what is wrong with them."""
        engine = self._engine = probe.gradients
        if engine.partition != WHOLE:
            raise ValueError("WeightSpectra: the model is under fully_shard, and no process has its matrices whole")
        if self._wanted is not None:
            found = wanted_segments(engine.model, self._wanted)
        else:
            try:
                found = attention_segments(engine.model)
            except ValueError:
                found = segments_of(engine.model)
        self.matrices = tuple(segment for segment in found if len(segment.shape) > 1 and segment.length)
        if not self.matrices:
            raise ValueError(f"WeightSpectra: none of {', '.join(s.name for s in found)} is a matrix")
        if self.per_matrix:
            self.columns += tuple(f"{name}[{segment.name}]" for segment in self.matrices for name in self._of_each)
        self._lengths = [segment.length for segment in self.matrices]
        self._groups = _groups(self.matrices)
        self._roundoff = torch.finfo(engine.dtype).eps / 2
        self.size, self._readings = sum(self._lengths), 0
        self._here, self._before, self._now = torch.zeros(
            3, engine.runs, self.size, dtype=engine.dtype, device=engine.device
        )

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """Read the matrices; (R, columns) where it is due. RuntimeError: captured in a CUDA graph."""
        if capturing(self._here.device):
            raise RuntimeError("WeightSpectra counts steps on the host, which a CUDA graph does not ask")
        now = self._now
        if step % self.every == 0:
            self._before, self._here = self._here, self._before
            now = self._engine.thetas_on(self.matrices, self._here)
            self._readings += 1
        if not due:
            return None
        if step % self.every:
            self._engine.thetas_on(self.matrices, now)
        runs = len(now)
        update = self._here - self._before
        found = self._spectra(torch.cat([now, update]))
        lengths, found = found[..., 0], found[..., 1:]
        of_each = torch.cat([found[:runs], found[runs:] if self._readings > 1 else found[runs:] * math.nan], 2)
        floor = self._roundoff * lengths[:runs].amax(1)
        ordered, half = of_each.sort(1).values, len(self.matrices) / 2
        median = (ordered[:, math.ceil(half) - 1] + ordered[:, math.floor(half)]) / 2
        median = median.masked_fill(ordered[:, -1].isnan(), math.nan)  # NaN goes to the end
        columns = [self._engine.theta_norms(range(runs))[:, None], median, floor[:, None]]
        return torch.cat([*columns, of_each.flatten(1)] if self.per_matrix else columns, 1)

    def _spectra(self, vectors: Tensor) -> Tensor:
        """(N, matrices, 1 + those of OF_MATRICES) float64, of the matrices in vectors (N, p); first |W|_F."""
        parts = vectors.split(self._lengths, 1)
        found: dict[int, Tensor] = {}
        for group in self._groups:
            # Side by side, so that one call makes all Gram matrices, of the shorter sides; a row of each is one of x.
            rows = [
                parts[place].view(len(vectors), *self._shape(place)).transpose(1, 2 if tall else 1).movedim(0, 1)
                for place, tall in zip(group.places, group.tall, strict=True)
            ]
            widths = [part.shape[2] for part in rows for _ in range(len(vectors))]
            starts = [sum(widths[:i]) for i in range(len(widths))]
            spans = torch.tensor(list(zip(starts, widths, strict=True)))
            gram = ops.gram(torch.cat([part.flatten(1) for part in rows], 1), segments=spans)
            numbers = describe(singular_values(gram)).unflatten(0, (len(rows), len(vectors)))
            found |= dict(zip(group.places, numbers, strict=True))
        return torch.stack([found[place] for place in range(len(parts))], 1)

    def _shape(self, place: int) -> tuple[int, int]:
        segment = self.matrices[place]
        return segment.shape[0], segment.length // segment.shape[0]

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        return {"readings": self._readings, "here": self._here[run].clone(), "before": self._before[run].clone()}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ValueError if it is of other segments."""
        if state["here"].shape != (self.size,):
            raise ValueError(
                f"WeightSpectra: state has {len(state['here'])} numbers, and the matrices of this measure "
                f"{self.size}: it was saved with other segments"
            )
        self._readings = state["readings"]
        self._here[run] = state["here"].to(self._here)
        self._before[run] = state["before"].to(self._before)

    def keep(self, runs: list[int]) -> None:
        self._here, self._before, self._now = self._here[runs], self._before[runs], self._now[runs]


def describe(sigma: Tensor) -> Tensor:
    """(N, 5) float64: Frobenius norm, and the columns of OF_MATRICES, of singular values (N, n), descending."""
    norm = sigma.square().sum(1).sqrt()
    first = sigma[:, 0]
    second = sigma[:, 1] if sigma.shape[1] > 1 else torch.zeros_like(first)
    entropy = torch.special.entr(sigma / sigma.sum(1, keepdim=True)).sum(1)
    return torch.stack([norm, first, (norm / first).square(), entropy.exp(), first / second], 1)


def _groups(matrices: Sequence[Segment]) -> list[Group]:
    """Matrices by their shorter side, and which of them are taller than wide."""
    found: dict[int, list[tuple[int, bool]]] = {}
    for place, segment in enumerate(matrices):
        rows, columns = segment.shape[0], segment.length // segment.shape[0]
        found.setdefault(min(rows, columns), []).append((place, columns < rows))
    return [Group(side, *map(tuple, zip(*those, strict=True))) for side, those in found.items()]
