"""What runs are trained on and measured with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grokcurv import ops
from grokcurv.draws import Purpose
from grokcurv.tasks.base import Batch
from grokcurv.training.run import Training


class Batches:
    """What R runs are trained on, and measured with, at their present steps; drawn together.

    Batches are functions of a run's seed and of the step: whether it is measured, and with which others it is trained,
    changes nothing, and there is no state to keep. But for a run with the paper's draws, which is alone.

    Attributes:
        steps: (R,) int64, where the runs stand.
    """

    def __init__(self, runs: Sequence[Training]) -> None:
        self.runs, config, device = list(runs), runs[0].config, torch.device(runs[0].config.device)
        self.steps = torch.tensor([run.step for run in runs], device=device)
        self._paper, self._seeds = runs[0].draws, torch.tensor([run.config.seed for run in runs], device=device)
        self._whole = [(run.data.train_pairs, run.data.train_answers) for run in runs]
        together = (torch.cat(parts) if len(runs) > 1 else parts[0] for parts in zip(*self._whole, strict=True))
        self._pairs, self._answers = together
        self._sizes = torch.tensor([len(answers) for _, answers in self._whole], device=device)
        self._starts = (self._sizes.cumsum(0) - self._sizes)[:, None]
        self._rows, self._measured = config.batch_size, config.measure_rows

    def training(self, *, following: bool = False) -> list[Batch]:
        """The batches of this step, or of the one after it; R of them."""
        if not self._rows:
            return self._whole
        if self._paper is None:
            steps = self.steps + 1 if following else self.steps
            drawn = ops.draw(self._seeds, Purpose.TRAINING, steps, self._sizes, self._rows)
        else:
            draw = self._paper.following if following else self._paper.next
            drawn = draw(len(self._answers), self._rows)
        return self._take(drawn, self._rows)[0]

    def measuring(self, count: int, drawn: int) -> list[list[Batch]]:
        """``count`` batches of each run, R of them each, beyond those that were drawn at this step before.

        Fewer are the beginning of more; of the paper's stream they are the next.
        """
        if self._paper is not None:
            return self._take(self._paper.next(len(self._answers), count * self._measured), self._measured)
        index = ops.draw(self._seeds, Purpose.MEASUREMENT, self.steps, self._sizes, (drawn + count) * self._measured)
        return self._take(index[:, drawn * self._measured :], self._measured)

    def _take(self, index: Tensor, rows: int) -> list[list[Batch]]:
        """Batches of so many rows, each of which R runs have one, of all that are drawn (R, n)."""
        index = index + self._starts
        parts = self._pairs[index].split(rows, 1), self._answers[index].split(rows, 1)
        return [list(zip(pairs, answers, strict=True)) for pairs, answers in zip(*parts, strict=True)]
