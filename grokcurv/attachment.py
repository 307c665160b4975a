"""Curvature of a training loop that is not touched: a monitor that steps with the optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from grokcurv.evaluation import LossFn
from grokcurv.gradients import Model
from grokcurv.measures.base import Measure
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pairs import Sampler

Optimizers = Optimizer | Iterable[Optimizer] | Mapping[str, Optimizer]


def attach(
    model: Model,
    loss_fn: LossFn,
    optimizer: Optimizers,
    *,
    sampler: Sampler | None = None,
    measures: Iterable[Measure] = (),
    every: int = 1,
    budget: float | None = None,
    **options: Any,
) -> AttachedMonitor:
    """Measure a training loop from its optimiser's hooks, without a change to the loop.

    >>> import torch
    >>> import grokcurv as gc
    >>> model, x, y = torch.nn.Linear(3, 2), torch.randn(64, 3), torch.randint(2, (64,))
    >>> loss_fn = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> with attach(model, loss_fn, optimizer, sampler=gc.halves((x, y))) as monitor:
    ...     for _ in range(3):
    ...         loss_fn(model, (x, y)).backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> monitor.records().step.tolist()
    [0, 1, 2]

    The parameters are measured before the update of a step. Pairs come from ``sampler``; ``.grad``, which may be
    scaled, accumulated or clipped by then, is not used. A step is a call of the optimiser's ``step``, whatever its
    closure does; of several optimisers, a call of that which steps first. A step that a ``GradScaler`` skips is none.

    Args:
        model, loss_fn, every: as for :class:`grokcurv.CurvatureMonitor`.
        optimizer: a ``torch.optim.Optimizer``, or several in a list or a dict. Those that ``accelerate`` or Lightning
            have wrapped are unwrapped.
        sampler: a function of no arguments that draws ``(batch_a, batch_b)``: :func:`grokcurv.subsample`,
            :func:`grokcurv.halves`, :func:`grokcurv.from_loader`, or one's own. Its state, if it has a ``state_dict``,
            goes into the monitor's. Without one there are no commutators, and the ``measures`` must do without pairs.
        measures: what is recorded besides.
        budget: the share of the time of training that measurements may take, 0.05 for a twentieth: the steps are
            chosen by it, among those that ``every`` names. See :class:`grokcurv.budget.Budget`.
        options: all others of :class:`grokcurv.CurvatureMonitor`.

    Returns:
        The monitor, which :meth:`AttachedMonitor.detach` takes off again, as does the end of a ``with`` block.

    Raises:
        TypeError: an ``optimizer`` that is none of these.
        ValueError: no optimiser, one that holds no parameter of the model, a measure that needs a sampler; and what the
            monitor raises.
    """
    measures, optimizers = require_pairs(sampler, measures), _optimizers(optimizer)
    for measure in measures:
        measure.follow(optimizers)
    monitor = AttachedMonitor(model, loss_fn, sampler=sampler, measures=measures, every=every, budget=budget, **options)
    known = {id(parameter) for parameter in monitor.probe.gradients.model.parameters()}
    for each in optimizers:
        if not any(id(parameter) in known for group in each.param_groups for parameter in group["params"]):
            raise ValueError(f"optimizer: a {type(each).__name__} among them holds no parameter of the model")
    monitor.follow(optimizers)
    return monitor


class AttachedMonitor(CurvatureMonitor):
    """A :class:`grokcurv.CurvatureMonitor` that steps before the optimisers do; :func:`attach` makes it.

    >>> import torch, grokcurv as gc
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss_fn = lambda model, x: model(x).square().mean()
    >>> monitor = gc.attach(model, loss_fn, optimizer, sampler=gc.halves(torch.randn(8, 3)))
    >>> optimizer.step()
    >>> monitor.detach()
    >>> optimizer.step()
    >>> len(monitor.records())
    1
    """

    _hooks: tuple[RemovableHandle, ...] = ()
    _first: Optimizer | None = None  # of several optimisers, that whose steps are counted

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Step whenever the one of them does that steps first."""
        self.detach()
        self._hooks = tuple(each.register_step_pre_hook(self._before_update) for each in optimizers)

    def detach(self) -> None:
        """Measure no further step; what was recorded stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._first = (), None

    def _before_update(self, optimizer: Optimizer, *_: Any) -> None:
        """Measure before the step of the optimiser that steps first in each training step."""
        self._first = self._first or optimizer
        if optimizer is self._first:
            self.step()

    def __enter__(self) -> AttachedMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.detach()

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """As of any monitor, and where the sampler stands, if it says so."""
        sampler: Any = self.sampler
        return super().state_dict(run) | {"sampler": sampler.state_dict() if hasattr(sampler, "state_dict") else None}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`, or that of a monitor that was stepped by hand."""
        super().load_state_dict(state, run)
        sampler: Any = self.sampler
        if state.get("sampler") is not None and hasattr(sampler, "load_state_dict"):
            sampler.load_state_dict(state["sampler"])


def require_pairs(sampler: Sampler | None, measures: Iterable[Measure]) -> tuple[Measure, ...]:
    """The measures; ValueError if some need pairs and there is no sampler, or if there is nothing to measure."""
    measures = tuple(measures)
    if sampler is None and (not measures or any(measure.needs_pairs for measure in measures)):
        needing = [measure.name for measure in measures if measure.needs_pairs] or ["the commutator"]
        raise ValueError(
            f"{', '.join(needing)}: pairs of batches are needed, and only a sampler has them. Pass sampler="
            "gc.subsample((x, y), rows=512) or gc.halves((x, y)) for tensors, gc.from_loader(loader) for a loader, "
            "or a function that returns (batch_a, batch_b)"
        )
    return measures


def _optimizers(given: Any) -> list[Optimizer]:
    """The optimisers themselves, in the order given."""
    if isinstance(given, Mapping):
        given = list(given.values())
    several = list(given) if isinstance(given, Iterable) else [given]
    # accelerate and Lightning wrap one in another that is called instead and calls its step.
    found = [inner if isinstance(inner := getattr(each, "optimizer", each), Optimizer) else each for each in several]
    for each in found:
        if not isinstance(each, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, or a list or dict of them; got {type(each).__name__}"
            )
    if not found:
        raise ValueError("optimizer: none was given")
    return found
