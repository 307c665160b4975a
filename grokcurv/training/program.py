"""Runs of one architecture as one program, R of them, one or many.

Their parameters, gradients and moments are the rows of a buffer each. A step draws all batches together, takes all
gradients (as one batched program with ``vmap``, one run after the other with ``loop``), measures what is due, and moves
all rows by the same few operations (:mod:`grokcurv.optim`). Evaluations, interventions, records, checkpoints and
folders are each run's own (:mod:`grokcurv.training.run`), as if it were alone. A run that ends leaves the buffers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine, Strategy
from grokcurv.optim import SGD, AdamW, Muon, Optimizer
from grokcurv.training.batches import Batches
from grokcurv.training.captured import Launcher
from grokcurv.training.measured import Group, Guest, Measured, MonitorFactory
from grokcurv.training.process import StopRequest
from grokcurv.training.run import Training

MEASURED_ALIKE = (
    *("measure_every", "measure_rows", "pairs", "design", "method", "eta", "alignment", "pca_every", "check_every"),
    *("anatomy", "measures", "update_window", "update_every"),
)
"""Settings in which runs must agree to be measured together."""

ALIGNMENT = 16
"""Rows of a program's buffers begin at multiples of this many numbers: 64 bytes in float32."""

ProgressOfRuns = Callable[[int, dict[str, Any]], object]


class Program:
    """Runs in progress: one program that trains them, and one for each group of them that is measured alike.

    Args:
        runs: as their folders, or their beginnings, have them.
        strategy: of the gradients; ``"auto"`` is ``vmap`` for several runs on a GPU.
        monitor: of a run that is alone, instead of the one that its settings describe.
    """

    def __init__(
        self, runs: Sequence[Training], strategy: Strategy = "auto", monitor: MonitorFactory | None = None
    ) -> None:
        first, on_gpu = runs[0], torch.device(runs[0].config.device).type == "cuda"
        if strategy == "auto" and len(runs) > 1:
            strategy = "vmap" if on_gpu else "loop"
        if strategy == "vmap" and len({run.config.batch_size or run.config.train_rows for run in runs}) > 1:
            raise ValueError("strategy 'vmap' needs batches of one size: full batches of these runs differ in theirs")
        self.all = list(runs)
        # Runs of one optimiser stand together: its rows are a block of the buffers.
        self.runs = sorted(runs, key=lambda run: run.config.optimizer)
        self.batched = None
        if strategy == "vmap":
            self.batched = GradientEngine(first.model, first.task.loss, strategy=strategy, compile=first.config.compile)
        alike: dict[Any, list[Training]] = {}
        for run in self.runs:
            settings = tuple(getattr(run.config, name) for name in MEASURED_ALIKE)
            alike.setdefault((settings, run.step, bool(run.rows)), []).append(run)
        measured = [group for group in alike.values() if group[0].config.measure_every]
        self.groups: list[Measured] = (
            [Guest(first, monitor)] if monitor is not None else [Group(group, strategy) for group in measured]
        )
        self.launcher = Launcher(self.batched is not None and on_gpu and not any(run.intervention for run in runs))
        self.theta, self.gradient, *self.ahead = self._buffers()
        blocks = groupby(range(len(self.runs)), lambda row: self.runs[row].config.optimizer)
        self.optimizers = [self._optimizer(list(rows)) for _, rows in blocks]
        self._seat()

    def train(
        self, on_progress: ProgressOfRuns | None = None, on_end: Callable[[int, str], object] | None = None
    ) -> list[str]:
        """Go on until every run has ended; their statuses.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed and some run has not ended; a checkpoint of each is written.
        """
        statuses: dict[Training, str] = {}
        place = {run: index for index, run in enumerate(self.all)}
        starts = {run: run.step for run in self.all}
        began = time.perf_counter()
        with StopRequest() as stop:
            bad = self.observe([run for run in self.runs if not run.rows])
            while True:
                pressed = stop.number is not None
                for run in self.runs:
                    status = run.pause(failed=run in bad, interrupted=pressed)
                    if status is not None:
                        statuses[run] = status
                        if on_end:
                            on_end(place[run], status)
                if statuses.keys() & set(self.runs):
                    self.keep([run for run in self.runs if run not in statuses])
                if not self.runs:
                    return [statuses[run] for run in self.all]
                if pressed:
                    stop.check()
                bad = self.update()
                bad |= self.observe([run for run in self.runs if run not in bad])
                for run in self.runs:
                    if run.progress_due and (on_progress or run.writer):
                        news = run.progress((run.step - starts[run]) / (time.perf_counter() - began))
                        if run.writer:
                            run.writer.news.tell(news)
                        if on_progress:
                            on_progress(place[run], news)

    def update(self) -> set[Training]:
        """Take one step of every run; those that a measurement has found not finite, which end here."""
        bad = self._measured([group for group in self.groups if group.looks_ahead], "step", self._step)
        for run in self.runs:
            run.step += run not in bad
        return bad

    def _step(self) -> list[Tensor | None]:
        """What the device does in a step, and what the groups that look ahead have found."""
        batches, looking = self.batches.training(), [group for group in self.groups if group.looks_ahead]
        following = self.batches.training(following=True) if any(group.plan for group in looking) else []
        if self.batched is None:
            self.gradient.zero_()
            for run, batch in zip(self.runs, batches, strict=True):
                run.task.loss(run.model, batch).backward()
        else:  # where that is measured, the gradients on the batches that follow too
            both, out = batches + following, [self.gradient, *self.ahead] if following else self.gradient
            self.batched.gradients(self.theta, both, out, seeds=range(len(both)))
        found = [group.launch((batches, following)) for group in looking]
        for optimizer in self.optimizers:
            optimizer.clip()
        with contextlib.ExitStack() as around:
            for run in self.runs:
                if run.intervention is not None and not any(run in group.bad for group in looking):
                    around.enter_context(run.intervening())
            for optimizer in self.optimizers:
                optimizer.step()
        for batches_of in {id(x): x for x in (self.batches, *(group.batches for group in self.groups))}.values():
            batches_of.steps.add_(1)
        return found

    def observe(self, runs: Sequence[Training]) -> set[Training]:
        """Evaluate and measure what is due of these runs; those that cannot go on."""
        bad = {run for run in runs if not run.evaluate_due()}
        self._leave(bad)
        for group in self.groups:
            if not group.looks_ahead and group.runs and group.runs[0] in runs:
                bad |= self._measured([group], group)
        for run in runs:
            run.note_defect()
        return bad

    def _measured(
        self, groups: Sequence[Measured], what: Hashable, launch: Callable[[], list[Tensor | None]] | None = None
    ) -> set[Training]:
        """Have groups measured by what is launched, or with batches that they draw; runs found not to be finite.

        It is launched by a graph, where there is one that has measured them as they are to be measured now.
        """
        launch = launch or (lambda: [group.launch() for group in groups])
        for group in groups:
            group.prepare()
        self._leave({run for group in groups for run in group.bad})
        capturable = all(group.capturable for group in groups)
        found = self.launcher((what, *(group.kind for group in groups)), launch) if capturable else launch()
        for group, one in zip(groups, found, strict=True):
            group.advance(one)
        return {run for group in groups for run in group.bad}

    def _leave(self, ended: set[Training]) -> None:
        """No group has these runs any more."""
        for group in self.groups:
            for run in ended & set(group.runs):
                group.leave(run)
        if ended:
            self.launcher.forget()

    def keep(self, runs: Sequence[Training]) -> None:
        """Go on with these runs alone, in the order that they have."""
        self._leave(set(self.runs) - set(runs))
        self.groups = [group for group in self.groups if group.runs]
        self.runs = list(runs)
        self.theta, self.gradient, *self.ahead = self._buffers()
        self.optimizers = [one for one in self.optimizers if any(run.optimizer is one for run in runs)]
        start = 0
        for optimizer in self.optimizers:
            rows = [run.optimizer_row for run in runs if run.optimizer is optimizer]
            here = slice(start, start + len(rows))
            start = here.stop
            optimizer.keep(rows, self.theta[here], self.gradient[here])
        self._seat()

    def _seat(self) -> None:
        """Have every run, and every group of them, find its rows."""
        if not self.runs:
            return
        self.launcher.forget()
        self.batches = Batches(self.runs)
        places = [(optimizer, place) for optimizer in self.optimizers for place in range(len(optimizer.theta))]
        for row, (run, place) in enumerate(zip(self.runs, places, strict=True)):
            run.seat(self.theta[row], self.gradient[row], *place)
        for group in self.groups:
            group.adopt(self.runs, self.batches, self.theta, self.gradient, *self.ahead)

    def _buffers(self) -> list[Tensor]:
        """Parameters and gradients, (R, P) each; and, if both are taken together, gradients on the next batches."""
        first = next(self.all[0].model.parameters())
        size = flatten(self.all[0].model).numel()
        # Memories of their own: autograd would take a gradient written beside its parameters for a change of these.
        # Rows begin where theirs would: the CPU's matrix products depend on their factors' alignment.
        stride = -(-size // ALIGNMENT) * ALIGNMENT
        count = 3 if self.batched is not None and any(group.looks_ahead for group in self.groups) else 2
        return [first.detach().new_zeros(len(self.runs), stride)[:, :size] for _ in range(count)]

    def _optimizer(self, rows: list[int]) -> Optimizer:
        """That of some rows, which stand together."""
        first, configs = self.runs[rows[0]], [self.runs[row].config for row in rows]
        here = slice(rows[0], rows[-1] + 1)
        theta, gradient = self.theta[here], self.gradient[here]

        def each(*names: str) -> dict[str, Any]:
            return {name: [getattr(config, name) for config in configs] for name in names}

        settings = each("lr", "weight_decay", "warmup")
        if any(config.clip for config in configs):
            settings["max_norm"] = [config.clip or torch.inf for config in configs]
        if first.config.optimizer == "sgd":
            return SGD(theta, gradient, **settings, **each("momentum", "nesterov"))
        settings["betas"] = [(config.beta1, config.beta2) for config in configs]
        if first.config.optimizer == "adamw":
            return AdamW(theta, gradient, **settings)
        matrices = first.task.matrices(first.model)
        return Muon(theta, gradient, matrices, **settings, **each("momentum", "nesterov", "adamw_lr"))
