"""The Gram matrix of the last updates: how many directions training moves along, and how fast they turn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.commutator import CommutatorProbe
from grokcurv.device_buffer import capturing
from grokcurv.flat import Segment, attention_segments
from grokcurv.measures.base import Measure, wanted_segments
from grokcurv.pairs import PairOfRuns
from grokcurv.partition import WHOLE

VARIANCE = 0.9
"""The share of the variance for which ``r90`` counts components."""


class UpdateGram(Measure):
    """Singular values of the last W updates, not centred (Xu, the spectral edge of the rolling Gram matrix).

    With X (W, p) the updates ``theta_t - theta_(t-1)`` that led to the parameters at a step, on some segments, and
    sigma_1 >= ... >= sigma_W its singular values, a row has

    ======================  =====================================================================================
    ``g23``                 sigma_2^2 - sigma_3^2, in units of theta^2
    ``k_star``              the j < W for which sigma_j / sigma_(j+1) is greatest, from 1 on
    ``k_star_weighted``     the same for (sigma_j / sum sigma) (sigma_j / sigma_(j+1))
    ``gap_ratio``           sigma_k* / sigma_(k*+1)
    ``rotation_1``, ``_2``  |<v_j, w_j>|, v_j and w_j the leading right singular vectors of the older and of the newer
                            W // 2 updates: 1 where a direction stays
    ``r90``                 how many components have 90 % of the sum of sigma^2
    ``update_gram_floor``   sqrt(W) u |theta|, u the unit roundoff: by Weyl's inequality no sigma is further than that
                            from what it would be if the parameters had been stored without rounding; so ``g23`` is
                            known to 2 (sigma_2 + sigma_3) times it
    ======================  =====================================================================================

    all NaN until there were W updates. With ``every`` = E an update is the difference of parameters E steps apart, at
    steps that are multiples of E, and rows between them repeat what the latest W such updates gave (Xu's have E = 100).
    A sigma below 1e-7 of the greatest is zero to the arithmetic of a Gram matrix (float64, of products), and counts as
    zero; of two zeros there is no ratio.

    With ``spectrum=True`` a row also has ``sigma_1`` to ``sigma_W`` and the lengths of the updates ``length_1`` to
    ``length_W``, the newest last, in units of theta: what :func:`grokcurv.analysis.update_gram_bands` sets beside
    updates without a direction, with and without momentum.

    An update costs no gradient: it reads the W vectors of p once. W + 2 vectors of p are kept for each run.

    >>> import torch, grokcurv as gc
    >>> model = torch.nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss_fn = lambda model, batch: model(batch).square().mean()
    >>> monitor = gc.attach(model, loss_fn, optimizer, measures=[gc.UpdateGram(3, "*")])
    >>> for _ in range(5):
    ...     loss_fn(model, torch.randn(8, 4)).backward()
    ...     optimizer.step()
    >>> monitor.records()["g23"].isna().tolist()
    [True, True, True, False, False]

    Args:
        window: W, at least 3; of fewer than 4 there is no ``rotation_2``.
        every: E, in steps.
        segments: patterns of :func:`grokcurv.select_segments`, one or several, or segments; the model's attention
            matrices by default.
        spectrum: record sigma and the lengths too.

    Attributes:
        size: p, once a monitor has it.

    Raises:
        ValueError: a window below 3, or ``every`` below 1; when the monitor is made, segments that match nothing, a
            model without attention and no ``segments``, or one under ``fully_shard``.
        MemoryError: when the monitor is made, a window that does not fit the memory that there is.
    """

    name = "update_gram"
    columns: tuple[str, ...] = (
        *("g23", "k_star", "k_star_weighted", "gap_ratio"),
        *("rotation_1", "rotation_2", "r90", "update_gram_floor"),
    )

    def __init__(
        self,
        window: int,
        segments: str | Sequence[str | Segment] | None = None,
        *,
        every: int = 1,
        spectrum: bool = False,
    ) -> None:
        if window < 3:
            raise ValueError(f"window must be at least 3, as sigma_3 is asked for; got {window}")
        if every < 1:
            raise ValueError(f"every must be at least 1, in steps; got {every}")
        self.window, self.every, self._wanted, self._spectrum = window, every, segments, spectrum
        if spectrum:
            self.columns += tuple(f"{kind}_{j + 1}" for kind in ("sigma", "length") for j in range(window))

    def bind(self, probe: CommutatorProbe) -> None:
        """Find the segments in the model; says in a ValueError what is wrong with them."""
        engine, wanted = probe.gradients, self._wanted
        if wanted is None:
            try:
                self.segments = attention_segments(engine.model)
            except ValueError as error:
                raise ValueError(f"UpdateGram: {error}; or pass segments='*' for all parameters") from error
        else:
            self.segments = wanted_segments(engine.model, wanted)
        if engine.partition != WHOLE:
            raise ValueError("UpdateGram: the model is under fully_shard, and no process has its updates whole")
        self._engine, runs = engine, engine.runs
        self.size = sum(segment.length for segment in self.segments)
        self._roundoff = torch.finfo(engine.dtype).eps / 2
        self._check_memory()
        options: dict[str, Any] = {"dtype": engine.dtype, "device": engine.device}
        self._updates = torch.zeros(self.window, runs * self.size, **options)
        self._here, self._spare = torch.zeros(2, runs * self.size, **options)
        self._seen = False  # whether there are parameters of a step before, in _here
        self._count = 0
        self._gram = torch.zeros(runs, self.window, self.window, dtype=torch.float64, device=engine.device)
        self._spans = torch.tensor([(run * self.size, self.size) for run in range(runs)])
        _halves(self.window, engine.device)  # goes to the device here, and in no step

    def _check_memory(self) -> None:
        """Raise a MemoryError if the device has no room for the window."""
        engine = self._engine
        need = (self.window + 2) * engine.runs * self.size * engine.dtype.itemsize
        free = engine.place.free_memory()
        if need > free:
            whose = f" of each of {engine.runs} runs" if engine.runs > 1 else ""
            raise MemoryError(
                f"UpdateGram: window={self.window} keeps {self.window + 2} vectors of {self.size} numbers{whose}, "
                f"{need} bytes, and {engine.device} has {free}: take a shorter window, or fewer segments"
            )

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """Take the update that led here; (R, columns) where it is due. RuntimeError: captured in a CUDA graph."""
        if capturing(self._gram.device):
            raise RuntimeError("UpdateGram counts updates on the host, which a CUDA graph does not ask")
        if step % self.every == 0:
            self._take()
        if not due:
            return None
        if self._count < self.window:
            return self._gram.new_full((len(self._gram), len(self.columns)), math.nan)
        oldest = self._count % self.window
        gram = self._gram.roll((-oldest, -oldest), (1, 2))
        lengths = self._engine.partition.norms(self._here.view(-1, self.size))
        floor = math.sqrt(self.window) * self._roundoff * lengths
        found = [spectrum(gram), floor[:, None]]
        if self._spectrum:
            found += [singular_values(gram), gram.diagonal(dim1=1, dim2=2).sqrt()]
        return torch.cat(found, 1)

    def _take(self) -> None:
        """Put the update from the parameters taken last into the window."""
        before, here = self._here, self._spare
        self._engine.thetas_on(self.segments, here.view(-1, self.size))
        self._here, self._spare = here, before
        if self._seen:
            place = self._count % self.window
            torch.sub(here, before, out=self._updates[place])
            row = ops.gram(self._updates[place][None], self._updates, segments=self._spans)[:, 0]
            self._gram[:, place], self._gram[:, :, place] = row, row
            self._count += 1
        self._seen = True

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        here = slice(run * self.size, (run + 1) * self.size)
        return {
            "count": self._count,
            "before": self._here[here].clone() if self._seen else None,
            "updates": self._updates[:, here].clone(),
            "gram": self._gram[run].clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`; ValueError if it is of another window or other segments."""
        if state["updates"].shape != (self.window, self.size):
            raise ValueError(
                f"UpdateGram: state has updates of shape {tuple(state['updates'].shape)}, and this measure has "
                f"{(self.window, self.size)}: it was saved with another window or other segments"
            )
        here = slice(run * self.size, (run + 1) * self.size)
        self._count = state["count"]
        self._updates[:, here] = state["updates"].to(self._updates)
        self._gram[run] = state["gram"].to(self._gram)
        self._seen = state["before"] is not None
        if self._seen:
            self._here[here] = state["before"].to(self._here)

    def keep(self, runs: list[int]) -> None:
        def kept(rows: Tensor) -> Tensor:
            by_run: Tensor = rows.unflatten(-1, (-1, self.size))
            return by_run[..., runs, :].flatten(-2)

        self._updates, self._here, self._gram = kept(self._updates), kept(self._here), self._gram[runs]
        self._spare = torch.empty_like(self._here)
        self._spans = self._spans[: len(runs)]


def spectrum(gram: Tensor) -> Tensor:
    """(R, 7) float64: the columns of :class:`UpdateGram` but for the floor, of Gram matrices (R, W, W) of updates from
    the oldest to the newest."""
    runs, window = gram.shape[:2]
    # All updates, the older half alone, the newer half alone: what is masked adds zeros to a spectrum, and no more.
    every = (gram * _halves(window, gram.device)[:, None]).flatten(0, 1)
    (sigma, old, new), vectors = (x.unflatten(0, (3, runs)) for x in _singular(every, window))
    squares = sigma.square()
    variance = squares.cumsum(1)
    ratio = sigma[:, :-1] / sigma[:, 1:]  # NaN where both are zero
    # Without the division by the sum, which no maximum over j depends on.
    best = torch.stack([ratio, ratio * sigma[:, :-1]]).nan_to_num(-1.0, math.inf).argmax(2)
    # <v_j, w_j>, of which v_j = X' u_j / sigma_j.
    inner = (vectors[1, :, :, :2] * (gram @ vectors[2, :, :, :2])).sum(1).abs()
    lengths = old[:, :2] * new[:, :2]
    rotation = torch.where(lengths > 0, inner / lengths, math.nan)
    numbers = [
        squares[:, 1] - squares[:, 2],
        *(best + 1.0),
        ratio.gather(1, best[0, :, None])[:, 0],
        *rotation.unbind(1),
        (variance < VARIANCE * variance[:, -1:]).sum(1) + 1.0,
    ]
    return torch.stack(numbers, 1).masked_fill(~(sigma[:, :1] > 0), math.nan)


@cache
def _halves(window: int, device: torch.device) -> Tensor:
    """(3, W, W): 1 for pairs of all updates, of the older half, of the newer half; 0 elsewhere."""
    masks = torch.zeros(3, window, window, dtype=torch.float64)
    half = window // 2
    masks[0], masks[1, :half, :half], masks[2, window - half :, window - half :] = 1.0, 1.0, 1.0
    return masks.to(device)


def singular_values(gram: Tensor) -> Tensor:
    """(R, W) float64, descending: those of rows with the Gram matrices (R, W, W)."""
    return _singular(gram, gram.shape[1])[0]


def _singular(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading singular values (R, count) of rows with these Gram matrices, and left vectors (R, n, count)."""
    values, vectors = ops.eigh(gram.contiguous(), count)
    negligible = values[:, :1] * gram.shape[1] * torch.finfo(torch.float64).eps
    return torch.where(values <= negligible, 0.0, values).sqrt(), vectors
