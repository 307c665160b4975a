"""A budget: measurements that take no more than a share of the time of training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from grokcurv.commutator import Method
from grokcurv.device_buffer import is_asynchronous
from grokcurv.measures.commutator import Commutator, Plan
from grokcurv.pairs import PairOfRuns

STEPS = 5
"""Steps of training that are timed before the first measurement that must be earned."""

FIELDS = ("interval", "dropped")
"""What a row records under a budget: steps since the row before, NaN in the first, and how many of them were due by
``every`` and could not be afforded."""


class Budget:
    """Says which steps are measured, so that measurements take at most a share of the time of training.

    What a measurement takes, and a step of training, is timed once, when the model is admitted, and frozen. From then
    on a step earns ``share`` of what it takes, and a measurement is made when half of its price has been earned: what
    was spent is never further from what was earned than half a row. One that turns out to need more (a bracket) pays
    that too, and the next one comes later. So which steps are measured depends
    on the frozen prices and on what the rows were, on no clock: a run that is resumed from a state measures the steps
    that an undisturbed one does. What admission takes is not counted.

    A loop that does nothing but measure earns nothing after its first row:

    >>> import torch, grokcurv as gc
    >>> loss_fn = lambda model, x: model(x).square().mean()
    >>> sampler = gc.halves(torch.randn(8, 3))
    >>> monitor = gc.CurvatureMonitor(torch.nn.Linear(3, 1), loss_fn, sampler=sampler, budget=0.05)
    >>> for _ in range(20):
    ...     monitor.step()
    >>> len(monitor.records())
    1

    Args:
        share: of the time of training; 0.05 is a twentieth.
        commutator: what is measured.

    Attributes:
        prices: seconds of each kind of work, by the method, and by the names of measures; empty until they were timed.
        step: seconds of a step of training; NaN until :data:`STEPS` of them have been timed.
        credit: seconds that have been earned and not spent; below zero after a row that took more than was foreseen.

    Raises:
        ValueError: a share that is not positive and finite.
    """

    def __init__(self, share: float, commutator: Commutator) -> None:
        if not 0.0 < share < math.inf:
            raise ValueError(f"budget must be a positive share of the time of training, such as 0.05; got {share}")
        self.share = share
        self.prices: dict[str, float] = {}
        self.step, self.credit = math.nan, 0.0
        self._commutator = commutator
        self._timed: list[float] = []
        self._latest, self._dropped = math.nan, 0  # the step of the latest row, and what was dropped since

    # --------------------------------------------------------------------------------------------------- what is known

    def trained(self, seconds: float) -> None:
        """A step of training took so long."""
        if self.prices and math.isnan(self.step):
            self._timed.append(seconds)
            if len(self._timed) == STEPS:
                self.step = median(self._timed)

    def price(self, pairs: Sequence[PairOfRuns], step: int, others: Mapping[str, float]) -> None:
        """Time what a row can be made of, on the pairs of the first, and forget what is found.

        ``others`` are the seconds of what is not repeated here: measures, and feeding the PCA.
        """
        probe = self._commutator.probe

        def took(method: Method, check: bool) -> float:
            self.synchronize()
            begun = time.perf_counter()
            options: dict[str, Any] = {"design": self._commutator.design, "keep_delta": self._commutator.looks_back}
            probe.measure_runs(pairs, method=method, check=check, seed=step, **options)
            self.synchronize()
            return time.perf_counter() - begun

        # The first row was a checked one. Where nobody waits for a device, that was not timed.
        checked = self._commutator.seconds.get((probe.method, True))
        if checked is None or is_asynchronous(probe.gradients.device):
            checked = took(probe.method, True)
        plain = (took(probe.method, False) + took(probe.method, False)) / 2
        self.prices = {**others, _kind(probe.method, True): checked, _kind(probe.method, False): plain}
        if self._commutator.falls_back and probe.gradients.has_true_brackets(pairs[0][0][0], seed=2 * step):
            # In this order: what has never been checked would be, whatever is asked for.
            for check in (True, False):
                self.prices[_kind("bracket", check)] = took("bracket", check)

    def synchronize(self) -> None:
        """Wait for the device while something is timed, and not afterwards."""
        device = self._commutator.probe.gradients.device
        if is_asynchronous(device) and math.isnan(self.step):
            torch.cuda.synchronize(device)

    # ------------------------------------------------------------------------------------------------- what it decides

    def affords(self, step: int) -> bool:
        """Whether half of a row at this step has been earned; before prices are known, it is free."""
        if not self.prices:
            return True
        return not math.isnan(self.step) and self.credit >= self._sum(self._commutator.foresee(step)) / 2

    def fields(self, step: int, like: Tensor) -> tuple[Tensor, ...]:
        """:data:`FIELDS` of a row at this step."""
        return torch.tensor([[step - self._latest], [self._dropped]]).to(like).expand(2, len(like)).unbind()

    def settle(self, step: int, due: bool, plan: Plan, found: Tensor | None) -> None:
        """Count a step of training, and take what a row at it came to, if there was one."""
        if found is not None:
            self._latest, self._dropped = step, 0
            if self.prices:
                self.credit -= self._sum(self._commutator.carried_out(step, plan, found))
        elif due:
            self._dropped += 1
        if not math.isnan(self.step):
            self.credit += self.share * self.step

    def pay(self, kind: str) -> None:
        """Take the price of something that is done whatever is measured."""
        self.credit -= self.prices.get(kind, 0.0)

    def _sum(self, plan: Plan) -> float:
        """The price of a row: of each run's measurement, and of the measures beside it."""
        dearest, runs = max(self.prices.values()), self._commutator.probe.gradients.runs
        # What the first pairs did not show, and was not timed, counts as the dearest of what was.
        rows = sum(self.prices.get(_kind(method, check), dearest) * len(which) / runs for method, check, which in plan)
        return rows + sum(price for kind, price in self.prices.items() if kind.startswith("measure "))

    def state_dict(self) -> dict[str, Any]:
        """Prices, credit and times; the share is the caller's."""
        row = {"latest": self._latest, "dropped": self._dropped}
        return {
            "prices": dict(self.prices),
            "step": self.step,
            "credit": self.credit,
            "timed": list(self._timed),
            **row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prices, self._timed = dict(state["prices"]), list(state["timed"])
        self.step, self.credit = state["step"], state["credit"]
        self._latest, self._dropped = state["latest"], state["dropped"]


def _kind(method: Method, check: bool) -> str:
    return f"{method}, checked" if check else method
