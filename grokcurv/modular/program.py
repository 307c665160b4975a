"""Runs of one architecture as one program, R of them, one or many.

Their parameters, gradients and moments are the rows of a buffer each. A step draws all batches together, takes all
gradients (as one batched program with ``vmap``, one run after the other with ``loop``), measures what is due, and moves
all rows by the same few operations (:mod:`grokcurv.optim`). Evaluations, interventions, records, checkpoints and
folders are each run's own (:mod:`grokcurv.modular.run`), as if it were alone. A run that ends leaves the buffers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from grokcurv.evaluation import LossFn
from grokcurv.flat import attention_segments, flatten
from grokcurv.gradients import Distributed, GradientEngine, Strategy
from grokcurv.modular.config import TrainConfig
from grokcurv.modular.draws import PhiloxDraws
from grokcurv.modular.network import Batch, matrices, training_loss
from grokcurv.modular.process import ctrl_c
from grokcurv.modular.run import Training
from grokcurv.monitor import CurvatureMonitor
from grokcurv.optim import SGD, AdamW, Muon, Optimizer
from grokcurv.pairs import Pair, PairOfRuns
from grokcurv.pca import StreamingPCA

MEASURED_ALIKE = ("measure_every", "measure_rows", "pairs", "design", "method", "eta", "alignment", "pca_every")
"""Settings in which runs must agree to be measured together."""

ALIGNMENT = 16
"""Rows of a program's buffers begin at multiples of this many numbers: 64 bytes in float32."""

MonitorFactory = Callable[[nn.Module, Callable[[], Pair]], CurvatureMonitor]
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
        first = runs[0]
        if strategy == "auto" and len(runs) > 1:
            strategy = "vmap" if torch.device(first.config.device).type == "cuda" else "loop"
        if strategy == "vmap" and len({run.config.batch_size or run.config.train_rows for run in runs}) > 1:
            raise ValueError("strategy 'vmap' needs batches of one size: full batches of these runs differ in theirs")
        self.all = list(runs)
        # Runs of one optimiser stand together: its rows are a block of the buffers.
        self.runs = sorted(runs, key=lambda run: run.config.optimizer)
        self.batched = GradientEngine(first.model, first.loss, strategy=strategy) if strategy == "vmap" else None
        alike: dict[Any, list[Training]] = {}
        for run in self.runs:
            settings = tuple(getattr(run.config, name) for name in MEASURED_ALIKE)
            alike.setdefault((settings, run.step, bool(run.rows)), []).append(run)
        measured = [group for group in alike.values() if monitor or group[0].config.measure_every]
        self.groups = [Group(group, strategy, monitor) for group in measured]
        self.theta, self.gradient = self._buffers()
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
        with ctrl_c() as interrupted:
            bad = self.observe([run for run in self.runs if not run.rows])
            while True:
                pressed = interrupted.is_set()
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
                    raise KeyboardInterrupt
                bad = self.update()
                bad |= self.observe([run for run in self.runs if run not in bad])
                for run in self.runs if on_progress else ():
                    if run.progress_due and on_progress:
                        on_progress(place[run], run.progress((run.step - starts[run]) / (time.perf_counter() - began)))

    def update(self) -> set[Training]:
        """Take one step of every run; those that a measurement has found not finite, which end here."""
        batches = self.batches.training()
        if self.batched is not None:
            self.batched.gradients(self.theta, batches, self.gradient, seeds=range(len(batches)))
        else:
            self.gradient.zero_()
            for run, batch in zip(self.runs, batches, strict=True):
                run.loss(run.model, batch).backward()
        bad: set[Training] = set()
        for group in self.groups:
            if group.looks_ahead:
                bad |= group.measure(batches)
        for optimizer in self.optimizers:
            optimizer.clip()
        with contextlib.ExitStack() as around:
            for run in self.runs:
                if run not in bad and run.intervention is not None:
                    around.enter_context(run.intervening())
            for optimizer in self.optimizers:
                optimizer.step()
        for batches_of in {id(x): x for x in (self.batches, *(group.batches for group in self.groups))}.values():
            batches_of.steps.add_(1)
        for run in self.runs:
            run.step += run not in bad
        return bad

    def observe(self, runs: Sequence[Training]) -> set[Training]:
        """Evaluate and measure what is due of these runs; those that cannot go on."""
        bad = {run for run in runs if not run.evaluate_due()}
        for group in self.groups:
            for run in bad:
                group.leave(run)
            if not group.looks_ahead and group.runs and group.runs[0] in runs:
                bad |= group.measure()
        for run in runs:
            run.note_defect()
        return bad

    def keep(self, runs: Sequence[Training]) -> None:
        """Go on with these runs alone, in the order that they have."""
        for run in self.runs:
            for group in self.groups if run not in runs else ():
                group.leave(run)
        self.groups = [group for group in self.groups if group.runs]
        left, self.runs = self.runs, list(runs)
        self.theta, self.gradient = self._buffers()
        start, row, optimizers = 0, 0, []
        for optimizer in self.optimizers:
            block = left[start : start + len(optimizer.theta)]
            start += len(block)
            places = [place for place, run in enumerate(block) if run in runs]
            here = slice(row, row + len(places))
            row = here.stop
            if places:
                optimizer.keep(places, self.theta[here], self.gradient[here])
                optimizers.append(optimizer)
        self.optimizers = optimizers
        self._seat()

    def _seat(self) -> None:
        """Have every run, and every group of them, find its rows."""
        if not self.runs:
            return
        self.batches = Batches(self.runs)
        row = 0
        for optimizer in self.optimizers:
            for place in range(len(optimizer.theta)):
                self.runs[row].seat(self.theta[row], self.gradient[row], optimizer, place)
                row += 1
        for group in self.groups:
            group.adopt(self)

    def _buffers(self) -> tuple[Tensor, Tensor]:
        """Parameters and gradients, (R, P) each."""
        first = next(self.all[0].model.parameters())
        size = flatten(self.all[0].model).numel()
        # Two memories: autograd would take a gradient written beside its parameters for a change of these. Rows begin
        # where memory of their own would: the CPU's matrix products depend on their factors' alignment.
        stride = -(-size // ALIGNMENT) * ALIGNMENT
        theta, gradient = (first.detach().new_zeros(len(self.runs), stride)[:, :size] for _ in range(2))
        return theta, gradient

    def _optimizer(self, rows: list[int]) -> Optimizer:
        """That of some rows, which stand together."""
        configs = [self.runs[row].config for row in rows]
        here = slice(rows[0], rows[-1] + 1)
        names = {"lr": "lr", "weight_decay": "weight_decay", "warmup": "warmup"}
        momentum = {"momentum": "momentum", "nesterov": "nesterov"}
        kind = configs[0].optimizer
        if kind != "adamw":
            names |= momentum
        if kind == "muon":
            names |= {"adamw_lr": "adamw_lr"}
        settings: dict[str, Any] = {name: [getattr(c, of) for c in configs] for name, of in names.items()}
        if any(config.clip for config in configs):
            settings["max_norm"] = [config.clip or torch.inf for config in configs]
        if kind != "sgd":
            settings["betas"] = [(config.beta1, config.beta2) for config in configs]
        theta, gradient = self.theta[here], self.gradient[here]
        if kind == "muon":
            return Muon(theta, gradient, matrices(configs[0], self.runs[rows[0]].model), **settings)
        return (SGD if kind == "sgd" else AdamW)(theta, gradient, **settings)


class Batches:
    """What R runs are trained on, and measured with, at their present steps; drawn together.

    Attributes:
        steps: (R,) int64, where the runs stand.
    """

    def __init__(self, runs: Sequence[Training]) -> None:
        self.runs, config, device = list(runs), runs[0].config, torch.device(runs[0].config.device)
        self.steps = torch.tensor([run.step for run in runs], device=device)
        self._draws = runs[0].draws or PhiloxDraws([run.config.seed for run in runs], device)
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
        return self._take(self._draws.training(self.steps, self._sizes, self._rows, following=following))

    def measuring(self, count: int, drawn: int) -> list[list[Batch]]:
        """``count`` batches of each run, R of them each, beyond those that were drawn at this step before."""
        if not self._draws.stateless:
            drawn = 0
        index = self._draws.measuring(self.steps, self._sizes, (drawn + count) * self._measured)
        return [self._take(rows) for rows in index.split(self._measured, 1)[drawn:]]

    @property
    def ahead(self) -> bool:
        """Whether batches may be drawn that nobody asks for."""
        return self._draws.stateless

    def _take(self, index: Tensor) -> list[Batch]:
        index = index + self._starts
        return list(zip(self._pairs[index], self._answers[index], strict=True))


class Group:
    """Runs that stand at one step and are measured alike, and the monitor that measures them together."""

    def __init__(self, runs: Sequence[Training], strategy: Strategy, monitor: MonitorFactory | None) -> None:
        self.runs, first = list(runs), runs[0]
        self.batches = Batches(runs)
        self.engine: RunsEngine | None = None
        self._at, self._drawn = -1, 0
        self._waiting: list[PairOfRuns] = []
        if monitor is not None:
            self.monitor = monitor(first.model, self.draw_alone)
            first.attach(self.monitor)
        else:
            model = Distributed(self._engine)
            self.monitor = default_monitor(first.config, first.model, self.draw, model, len(runs), strategy)
            for place, run in enumerate(runs):
                run.attach(self.monitor, place)

    @property
    def looks_ahead(self) -> bool:
        """Whether this step's batch is measured against the next one."""
        return self.monitor.sampler is None

    def adopt(self, program: Program) -> None:
        """Find the runs' rows in a program."""
        self._places = [program.runs.index(run) for run in self.runs]
        self.batches = program.batches if self.runs == program.runs else Batches(self.runs)
        if self.engine is not None:
            self.engine.adopt(program.theta, program.gradient, self._places)

    def draw(self) -> PairOfRuns:
        """A pair of measurement batches of each run; those of a step are drawn together, where that takes nothing."""
        config, step = self.batches.runs[0].config, self.batches.runs[0].step
        if self._at != step:
            self._at, self._drawn, self._waiting = step, 0, []
        if not self._waiting:
            count = config.pairs if self.batches.ahead else 1
            drawn = iter(self.batches.measuring(2 * count, 2 * self._drawn))
            self._waiting = list(zip(drawn, drawn, strict=True))
            self._drawn += count
        return self._waiting.pop(0)

    def draw_alone(self) -> Pair:
        """The same, of a run that is alone."""
        (first,), (second,) = self.draw()
        return first, second

    def measure(self, batches: Sequence[Batch] | None = None) -> set[Training]:
        """Have the monitor do what is due; the runs that had to leave since their weights are not finite."""
        if self.engine is None:
            return self._measure_alone(batches)
        bad = {run for run in self.runs if self.monitor.feeds and not run.finite()}
        for run in bad:
            run.evaluate_bad()
            self.leave(run)
        if self.runs and batches is not None:
            following = self.batches.training(following=True)
            self.monitor.step([batches[place] for place in self._places], following)
        elif self.runs:
            self.monitor.step()
        return bad

    def _measure_alone(self, batches: Sequence[Batch] | None) -> set[Training]:
        """Have a monitor that somebody has made do what it does."""
        try:
            if batches is None:
                self.monitor.step()
            else:
                self.monitor.step(batches[0], self.batches.training(following=True)[0])
        except ValueError:
            (run,) = self.runs
            if run.finite():
                raise
            run.evaluate_bad()
            return {run}
        return set()

    def leave(self, run: Training) -> None:
        """Go on without a run."""
        if run not in self.runs:
            return
        run.detach()
        left = [place for place, other in enumerate(self.runs) if other is not run]
        self.runs.remove(run)
        if not left:
            return
        self._places = [self._places[place] for place in left]
        self.batches = Batches(self.runs)
        self.monitor.keep(left)
        if self.engine is not None:
            self.engine.keep(left)
        for place, other in enumerate(self.runs):
            other.place = (place,)

    def _engine(self, loss: LossFn, strategy: Strategy) -> RunsEngine:
        self.engine = RunsEngine(self.runs[0].model, loss, strategy, len(self.runs))
        return self.engine


class RunsEngine(GradientEngine):
    """Gradients of several runs of one network, whose parameters are rows of a program's buffers."""

    shared = True

    def __init__(self, model: nn.Module, loss_fn: LossFn, strategy: Strategy, runs: int) -> None:
        self.runs = runs
        super().__init__(model, loss_fn, strategy=strategy)

    def adopt(self, theta: Tensor, gradient: Tensor, rows: Sequence[int]) -> None:
        """Find the parameters, and the gradients that training leaves, in these rows of two buffers (R, P)."""
        together = list(rows) == list(range(rows[0], rows[-1] + 1))
        self._here = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=theta.device)
        self._theta, self._gradient = theta, gradient

    def keep(self, runs: list[int]) -> None:
        """Go on with some of the runs; until :meth:`adopt` says otherwise their rows are where they were."""
        here = self._here
        rows = range(here.start, here.stop) if isinstance(here, slice) else here.tolist()
        self.runs = len(runs)
        self.adopt(self._theta, self._gradient, [rows[run] for run in runs])

    def thetas(self, runs: Sequence[int], out: Tensor | None = None) -> Tensor:
        theta = self._of(self._theta, runs)
        if out is None:
            return theta
        return out.copy_(theta[0])[None] if len(runs) == 1 else theta.to(out.dtype)

    def theta_norms(self, runs: Sequence[int]) -> Tensor:
        return self.partition.norms(self._of(self._theta, runs))

    def training_gradients(self, runs: Sequence[int]) -> Tensor:
        return self._of(self._gradient, runs)

    def _of(self, buffer: Tensor, runs: Sequence[int]) -> Tensor:
        """Rows of some runs; where they stand together, without a copy."""
        rows = buffer[self._here]
        return rows if len(runs) == self.runs else rows[list(runs)]


def default_monitor(
    config: TrainConfig,
    network: nn.Module,
    sampler: Callable[[], Any],
    model: Distributed,
    runs: int,
    strategy: Strategy,
) -> CurvatureMonitor:
    """The monitor that settings describe: PCA over the attention matrices, or over everything where there are none.

    ``model`` says where the parameters of its runs are.
    """
    segments = attention_segments(network) if config.architecture == "transformer" else None
    return CurvatureMonitor(
        model,
        training_loss(config if config.successive else replace(config, float64_logits=True)),
        every=config.measure_every,
        pairs=config.pairs,
        pca=StreamingPCA(segments=segments, runs=runs) if config.pca_every else None,
        pca_every=config.pca_every or 1,
        sampler=None if config.successive else sampler,
        design=config.design,
        alignment=config.alignment,
        method=config.method,
        eta=config.eta,
        strategy=strategy,
        gradient="trusted",  # it is that of this very loss, before clipping
    )
