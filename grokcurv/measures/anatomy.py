"""What a commutator's bracket is made of: its two Hessian-vector products, and where it points.

The bracket ``H_B g_A - H_A g_B`` is small where its two parts are, and where they are alike. A row has, of each part
and as the median over its pairs, at no gradient more than the commutator's own,

============================  ========================================================================================
``product_norm_a``, ``_b``    ``|H_A g_B|`` and ``|H_B g_A|``, loss squared over theta cubed: how far a step on
                              one batch moves the gradient of the other, by the step's length
``amplification_a``, ``_b``   ``|H_A g_B| / |g_B|`` and ``|H_B g_A| / |g_A|``, loss over theta squared: between
                              zero and the largest eigenvalue of the Hessian, in magnitude
``rayleigh_a``, ``_b``        ``g_B' H_A g_B / |g_B|^2`` and ``g_A' H_B g_A / |g_A|^2``, the same units: the
                              curvature of one batch's loss along the other one's gradient
``bracket_update_cosine``     ``|cos|`` between delta and the update that led to the parameters
``bracket_before_cosine``     ``|cos|`` between delta and that of the row before, of its first pair
============================  ========================================================================================

and of each the bound of its error, ``product_norm_a_error`` and so on. Without signs, because a pair's two batches may
come in either order, which turns delta round; two directions at random have a ``|cos|`` of about ``sqrt(2 / (pi P))``.
In the difference form a product is what a gradient changes by along a step, over eta: to first order in eta it is the
Hessian's. A column alone is NaN where its error may exceed a tenth of it (a Rayleigh quotient's: and a hundredth of the
amplification); the cosines also where delta is not reliable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.commutator import CommutatorStats
from grokcurv.gradients import GradientEngine
from grokcurv.measures.base import quantiles
from grokcurv.pairs import in_quadrature, rows_of
from grokcurv.partition import Partition

PRODUCT_FIELDS = (
    *("product_norm_a", "product_norm_b"),
    *("amplification_a", "amplification_b"),
    *("rayleigh_a", "rayleigh_b"),
)
"""Numbers of each of the two products, which are true whatever became of their difference."""

COSINE_FIELDS = ("bracket_update_cosine", "bracket_before_cosine")
"""Where delta points, beside the update that led to the parameters and beside the bracket of the row before."""

ANATOMY_BOUNDS = {name: f"{name}_error" for name in (*PRODUCT_FIELDS, *COSINE_FIELDS)}
"""Columns, and the one that bounds the error of each."""

ANATOMY_FIELDS = (*ANATOMY_BOUNDS, *ANATOMY_BOUNDS.values())
"""What a measurement records besides, with ``anatomy=True``."""

UNITS = {
    **{name: name for name in PRODUCT_FIELDS[:4]},
    **{f"rayleigh_{batch}": f"amplification_{batch}" for batch in "ab"},
}
"""What the errors of columns with a unit are small, or large, beside: a Rayleigh quotient's beside what it would be if
the product were along its gradient, which is the amplification."""


def products(of: CommutatorStats, floored: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """:data:`PRODUCT_FIELDS` of pairs, and their errors by the names of those columns; one entry each a pair."""
    values: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}
    for batch, length in (("a", of.grad_norm_b), ("b", of.grad_norm_a)):
        norm, error, rayleigh = (
            getattr(of, f"{name}_{batch}") for name in ("product_norm", "product_error", "rayleigh")
        )
        amplification = norm / length
        # A relative error of the gradient changes the quotient by so much again, and once more through its square.
        own, turned = (
            in_quadrature(torch.stack([error / length, of.grad_cosine_error * each]))
            for each in (amplification, amplification + 2.0 * rayleigh.abs())
        )
        found = {"product_norm": (norm, error), "amplification": (amplification, own), "rayleigh": (rayleigh, turned)}
        for name, (value, bound) in found.items():
            values[f"{name}_{batch}"] = value
            # Without a gradient there is no error that could be relative to it.
            errors[ANATOMY_BOUNDS[f"{name}_{batch}"]] = bound.nan_to_num(nan=math.inf) if floored else bound
    return values, errors


class Bracket:
    """The bracket of each run's latest row, and how it lies to the next: one vector of P a run.

    Of several pairs it is that of the first.
    """

    def __init__(self, engine: GradientEngine) -> None:
        self._engine = engine
        self._kept: Tensor | None = None  # (R, P) along the brackets, zero where there is none
        self._error = torch.zeros(0)  # (R,) float64 lengths of the errors of unit vectors along them
        self._next: dict[int, tuple[Tensor, Tensor]] = {}

    def cosine(self, of: CommutatorStats, runs: Sequence[int], share_error: Tensor) -> dict[str, Tensor]:
        """``bracket_before_cosine`` of these runs' rows, (R,) each, and its error.

        What :meth:`advance` makes the row before is kept.
        """
        assert of.delta is not None
        for place, run in enumerate(runs):
            self._next[run] = of.delta[0, place].clone(), of.noise_floor[0, place] / of.defect[0, place]
        if self._kept is None:
            return {}
        cosine = median_cosine(rows_of(self._kept, runs), of.delta, self._engine.partition)
        error = (share_error + rows_of(self._error, runs)).masked_fill(cosine.isnan(), math.nan)
        return {"bracket_before_cosine": cosine, "bracket_before_cosine_error": error}

    def advance(self) -> None:
        """The rows that were seen are the ones before the next."""
        for run, (delta, error) in self._next.items():
            self._at(run, delta)
            self._error[run] = error
        self._next.clear()

    def _at(self, run: int, delta: Tensor) -> None:
        """Keep a run's delta for the next row."""
        if self._kept is None:
            runs = self._engine.runs
            self._kept = delta.new_zeros(runs, len(delta))
            self._error = torch.zeros(runs, dtype=torch.float64, device=delta.device)
        self._kept[run] = delta

    def state_dict(self, run: int) -> dict[str, Tensor]:
        return {} if self._kept is None else {"delta": self._kept[run].clone(), "error": self._error[run].clone()}

    def load_state_dict(self, state: dict[str, Tensor], run: int) -> None:
        """Put a run's kept bracket back."""
        if state:
            self._at(run, state["delta"].to(self._engine.device))
            self._error[run] = state["error"].to(self._engine.device)
        elif self._kept is not None:
            self._kept[run] = 0.0

    def keep(self, runs: list[int]) -> None:
        self._next.clear()
        if self._kept is not None:
            self._kept, self._error = self._kept[runs], self._error[runs]


def median_cosine(v: Tensor, rows: Tensor, partition: Partition) -> Tensor:
    """(R,) float64: of the vectors (R, P) and rows (K, R, P), the median over K of ``|cos|``; NaN where one is zero."""
    size = v.shape[-1]
    spans = torch.tensor([(run * size, size) for run in range(len(v))])
    one, every = v.to(rows.dtype).reshape(1, -1), rows.reshape(len(rows), -1)
    own = torch.stack([ops.gram(row, segments=spans)[:, 0, 0] for row in (one, *every[:, None])], 1)
    inner, own = partition.all_reduce_sum(ops.gram(one, every, segments=spans)[:, 0], own)
    lengths = own.sqrt()
    (median,) = quantiles(inner.abs() / (lengths[:, :1] * lengths[:, 1:]), 0.5, dim=1)
    return median.clamp(max=1.0)
