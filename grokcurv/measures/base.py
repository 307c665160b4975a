"""What a measure is, and what measures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grokcurv.flat import Segment, select_segments

if TYPE_CHECKING:
    from grokcurv.commutator import CommutatorProbe
    from grokcurv.measures.training_gradient import TrainingGradient
    from grokcurv.pairs import PairGradients, PairOfRuns
    from grokcurv.steps import OptimizerRow

CLEAR = (0.01, 0.1)
"""A share or a cosine is NaN when its error may be more than the first number, and more than the second of itself."""


class Measure:
    """What a :class:`grokcurv.CurvatureMonitor` records beside its commutators: some numbers a row.

    A measure belongs to one monitor. It is called at every step, for it may need to see every one, and has a row where
    the monitor has one.

    >>> import grokcurv as gc
    >>> class LargestParameter(Measure):
    ...     name, columns = "largest_parameter", ("largest_parameter",)
    ...     def bind(self, probe):
    ...         self.engine = probe.gradients
    ...     def observe(self, step, pairs, due):
    ...         thetas = self.engine.thetas(range(self.engine.runs))
    ...         return thetas.abs().amax(1, keepdim=True).double() if due else None
    >>> model = nn.Linear(3, 2)
    >>> monitor = gc.CurvatureMonitor(model, lambda model, x: model(x).sum(), measures=[LargestParameter()])
    >>> monitor.step()
    >>> monitor.last["largest_parameter"] == max(x.abs().max().item() for x in model.parameters())
    True

    Attributes:
        name: under which the monitor says what it took.
        columns: what it records, each a number.
        needs_pairs: whether it cannot be had without pairs of batches.
        capturable: whether it is right in a captured step too, which is replayed without the host: it remembers
            nothing there.
        from_pairs: whether its numbers come from the commutator's own gradients, in :meth:`observe_pairs`, and stand
            among the commutator's columns.
    """

    name: str
    columns: tuple[str, ...]
    needs_pairs = from_pairs = capturable = False

    def follow(self, optimizers: Sequence[Optimizer | OptimizerRow]) -> None:
        """Learn of the loop's optimisers, before ``bind``, where somebody knows them.

        In the trainer of many runs: of each run's row in an optimiser of rows, whenever that is another.
        """

    def follow_training(self, gradient: TrainingGradient) -> None:
        """Learn, before ``bind``, that pairs are training's batches of a step and of the next, and of its ``.grad``."""

    def bind(self, probe: CommutatorProbe) -> None:
        """Learn of the model, before training starts; what cannot be measured of it is an error here."""

    def observe(self, step: int, pairs: Sequence[PairOfRuns], due: bool) -> Tensor | None:
        """See the parameters before the update of ``step``.

        Returns (R, columns) float64 on the device, where it is ``due``: what is known at this step of each run.
        """
        raise NotImplementedError  # each measure has its own; there is nothing that all could do

    @property
    def pending(self) -> bool:
        """Whether the row that was observed last is completed at the next step, by :meth:`complete`."""
        return False

    def complete(self, batches: Sequence[Any]) -> Tensor | None:
        """The row (R, columns) of the step before, as it is known now, before this step is observed; None if no more is
        known of it.

        Args:
            batches: what the runs have been trained on in this step; empty where that is not known.
        """
        return None

    def observe_pairs(self, pairs: Sequence[PairOfRuns], gradients: PairGradients) -> Tensor:
        """(R, columns) float64 on the device, of the pairs of a row and what was found of their gradients.

        Called once a row, after the commutators are measured, of a measure that is ``from_pairs``.
        """
        raise NotImplementedError  # only measures that say they are ``from_pairs`` have it

    def state_dict(self, run: int = 0) -> dict[str, Any]:
        """What a run needs to go on in another process: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], run: int = 0) -> None:
        """Restore :meth:`state_dict`."""

    def keep(self, runs: list[int]) -> None:
        """Go on with these runs alone, in this order."""


def wanted_segments(model: nn.Module, wanted: str | Sequence[str | Segment]) -> tuple[Segment, ...]:
    """Those that patterns of :func:`grokcurv.select_segments` match, and those that are given; ValueError as there."""
    several = [wanted] if isinstance(wanted, str) else list(wanted)
    patterns = [each for each in several if isinstance(each, str)]
    found = select_segments(model, *patterns) if patterns else ()
    return (*found, *(each for each in several if isinstance(each, Segment)))


def unclear(value: Tensor, bound: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """Whether an error may be too large for the value to say anything; ``unit`` is the size of a large value."""
    absolute, relative = CLEAR
    return bound > (relative * value.abs()).clamp(min=absolute * unit)


def quantiles(values: Tensor, *levels: float, dim: int = 0) -> list[Tensor]:
    """Quantiles over a dimension, linearly interpolated; NaN if any value is."""
    if values.shape[dim] == 1:  # the same at every level; interpolated, infinity is NaN, as it is between others
        only = values.select(dim, 0)
        return [only.lerp(only, 0.0)] * len(levels)
    ordered = values.sort(dim).values
    missing = ordered.select(dim, -1).isnan()  # NaN goes to the end
    found = []
    for level in levels:
        place = level * (values.shape[dim] - 1)
        below = int(place)
        above = min(below + 1, values.shape[dim] - 1)
        found.append(torch.lerp(ordered.select(dim, below), ordered.select(dim, above), place - below))
    return [x.masked_fill(missing, torch.nan) for x in found]
