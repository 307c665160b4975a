"""Whether the gradient that training leaves in ``.grad`` may stand for that of ``loss_fn``."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grokcurv.checks import GIVEN
from grokcurv.commutator import CommutatorProbe, CommutatorStats
from grokcurv.device_buffer import capturing, copy_to_host_async, is_asynchronous
from grokcurv.pairs import rows_of

VERDICT_LAG = 2
"""On an accelerator, after how many more measurements the host learns of a verdict on one."""

GRADIENT_TOLERANCE = 0.05
"""Relative difference between the norm of ``.grad`` and that of the measured gradient beyond which they are two."""

GRADIENT_MARGIN = 5.0
"""How many times further from float64 ``.grad`` may be than the monitor's own gradients are."""

CONFIRMATIONS = 2
"""So many checks must have found ``.grad`` right before it is used."""

Gradient = Literal["checked", "trusted", "own"]

OWN, USED, CONFIRMED, REFUTED = range(4)
"""What a row has to do with ``.grad``: nothing; it rests on it; or it was a check that found it right, or wrong."""


class TrainingGradient:
    """What is known of ``.grad``: offered to measurements as their first gradient, and judged by their checks.

    Where training has computed the gradients on the next batches with it, they come with it, as the second.

    Args:
        probe: of R runs.
        use: as ``gradient`` of :class:`grokcurv.CurvatureMonitor`; several runs know no ``"checked"``.
    """

    def __init__(self, probe: CommutatorProbe, use: Gradient) -> None:
        self.probe, self.use = probe, use
        self._ratio: Tensor | None = None  # (R,) of the lengths of .grad and of the gradient, at the first check
        self._confirmations = 0  # checks that have found .grad right
        self._distrusted = False  # since one has found it wrong
        self._verdicts: deque[Callable[[], Tensor]] = deque()

    def offered(self, runs: list[int], check: bool) -> tuple[Tensor, ...]:
        """(R, P) ``.grad`` and what comes with it, if it stands for that of ``loss_fn``, or is to be compared with it.

        Not for models that draw at random, whose masks were others.
        """
        engine = self.probe.gradients
        while len(self._verdicts) >= VERDICT_LAG and not capturing(engine.device):
            self._take_verdict(bool(self._verdicts.popleft()().all()))
        if self.use == "own" or self._distrusted:
            return ()
        # At a check .grad is always looked at. Between checks it stands in for a gradient only where the trainer
        # vouches for it, or where checks have found it right so often that a chance agreement is out of the question.
        if engine.stochastic or not (self.use == "trusted" or check or self._confirmations >= CONFIRMATIONS):
            return ()
        gradients = engine.training_gradients(runs)
        # One that overflowed, of a step that a GradScaler will skip, says nothing of the loss.
        if not is_asynchronous(engine.device) and not math.isfinite(gradients.sum(dtype=torch.float64)):
            return ()
        following = engine.next_gradients(runs)
        return (gradients,) if following is None else (gradients, following)

    def judge(self, known: Sequence[Tensor], stats: CommutatorStats, runs: list[int], check: bool) -> Tensor:
        """(R,) what these rows have to do with ``.grad``; a check that finds it wrong is the end of its use."""
        own, engine = torch.full_like(stats.noise_floor[: len(runs)], OWN), self.probe.gradients
        exactly = engine.traits.nonsmooth and engine.dtype != torch.float64 and self.probe.noise_floor
        if not known or exactly or engine.stochastic:
            return own  # the probe has not used it
        waits = is_asynchronous(engine.device)
        if GIVEN not in self.probe.errors or not (check if waits else bool(stats.exact[: len(runs)].all())):
            return own if self.use == "trusted" else own + USED
        distance, error, length = rows_of(self.probe.errors[GIVEN], runs).T
        # The yardstick is the probe's own rounding at the same parameters: a .grad further off than that is of another
        # loss, batch or mask.
        right = (distance <= GRADIENT_MARGIN * error) | ~(distance < math.inf)
        if self._ratio is None:  # late in training rounding alone may make a gradient longer or shorter
            self._ratio = torch.where(right, 1.0, engine.partition.norms(known[0]) / length)
            if not waits:
                self.refuse_another()
        if not capturing(engine.device):
            if waits:
                self._verdicts.append(copy_to_host_async(right))
            else:
                self._take_verdict(bool(right.all()))
        return torch.where(right, own + CONFIRMED, own + REFUTED)

    @staticmethod
    def unused(gradient: Tensor) -> Tensor:
        """What :meth:`judge` says, for rows that have been measured again without ``.grad``."""
        return torch.where(gradient == USED, gradient * OWN, gradient)

    def _take_verdict(self, right: bool) -> None:
        """After a check of ``.grad``: once it was found wrong it is not used any more."""
        self._confirmations += right
        if right or self._distrusted or self.use == "trusted":
            return
        self._distrusted = True
        self.probe.gradients.note(
            ".grad",
            False,
            ".grad is further from the gradient of loss_fn on the batch given to step() than rounding explains",
            "the monitor computes its own from here on; rows that used it since the last good check are NaN",
        )

    def refuse_another(self) -> None:
        """ValueError if ``.grad`` was of another length than the gradient when they were first compared."""
        engine = self.probe.gradients
        if self._ratio is None or engine.stochastic or engine.evaluator.stateful:
            return  # a state that training's forward pass has changed, or other masks, make other gradients
        for ratio in self._ratio.tolist():
            if math.isfinite(ratio) and abs(ratio - 1.0) > GRADIENT_TOLERANCE:
                raise ValueError(
                    f"|.grad| is {ratio:.3g} times the norm of the gradient of loss_fn on the batch given to step(); "
                    "call step() after backward and before clipping, with the same loss; with a GradScaler after "
                    "scaler.unscale_(optimizer); with accumulated gradients give a batch and a loss_fn that stand for "
                    "all of them. Or give the monitor a sampler"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"confirmations": self._confirmations, "distrusted": self._distrusted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._confirmations, self._distrusted = state["confirmations"], state["distrusted"]
        self._verdicts.clear()
