"""Runs that are measured together, and the monitor that does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from grokcurv.evaluation import LossFn
from grokcurv.gradients import Distributed, GradientEngine, Strategy
from grokcurv.measures import Given, named_measures
from grokcurv.measures.commutator import Plan
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pairs import Pair, PairOfRuns, rows_of
from grokcurv.pca import StreamingPCA
from grokcurv.training.batches import Batches
from grokcurv.training.run import Training

MonitorFactory = Callable[[nn.Module, Callable[[], Pair]], CurvatureMonitor]


class Measured:
    """Runs that stand at one step and are measured by one monitor.

    Attributes:
        runs: those that have not ended.
        plan: how this step measures them; empty where it does not.
        bad: those that this step has found to have weights that are not finite.
    """

    monitor: CurvatureMonitor
    capturable = False
    plan: Plan = ()

    def __init__(self, runs: Sequence[Training]) -> None:
        self.runs, self.batches = list(runs), Batches(runs)
        self.bad: set[Training] = set()
        self._at, self._drawn = -1, 0
        self._waiting: list[PairOfRuns] = []

    @property
    def looks_ahead(self) -> bool:
        """Whether this step's batch is measured against the next one."""
        return self.monitor.sampler is None

    @property
    def kind(self) -> Hashable:
        """What steps must share to launch the same."""
        return self.plan, bool(self.plan) and self.monitor.probe.basis is None

    def adopt(self, runs: Sequence[Training], batches: Batches, *buffers: Tensor) -> None:
        """Find the runs' rows in a program."""
        self.places = [runs.index(run) for run in self.runs]
        self.batches = batches if self.runs == runs else Batches(self.runs)

    def draw(self) -> PairOfRuns:
        """A pair of measurement batches of each run; those of a step are drawn together, where that takes nothing."""
        config, step = self.batches.runs[0].config, self.batches.runs[0].step
        if self._at != step:
            self._at, self._drawn, self._waiting = step, 0, []
        if not self._waiting:
            count = 1 if config.rng == "paper" else config.pairs  # a stream gives what is asked for, and no more
            drawn = iter(self.batches.measuring(2 * count, 2 * self._drawn))
            self._waiting = list(zip(drawn, drawn, strict=True))
            self._drawn += count
        return self._waiting.pop(0)

    def prepare(self) -> None:
        """Do what the host does before a step, and leave runs whose weights are not finite."""

    def launch(self, pair: PairOfRuns | None = None) -> Tensor | None:
        """Do what the device does: measure the program's batches against those that follow, or what is drawn."""
        raise NotImplementedError  # groups and guests call their monitors in ways of their own

    def advance(self, found: Tensor | None) -> None:
        """Do what the host does with what was found."""

    def leave(self, run: Training) -> None:
        """Go on without a run."""
        run.detach()
        self.runs.remove(run)


class Guest(Measured):
    """A run that is alone, with a monitor that somebody else has made."""

    def __init__(self, run: Training, monitor: MonitorFactory) -> None:
        super().__init__([run])
        self.monitor = monitor(run.model, self._draw_alone)
        run.attach(self.monitor)

    def launch(self, pair: PairOfRuns | None = None) -> None:
        try:
            if pair is None:
                self.monitor.step()
            else:
                self.monitor.step(pair[0][0], self.batches.training(following=True)[0])
        except ValueError:
            (run,) = self.runs
            if run.finite():
                raise
            run.evaluate_bad()
            self.bad = {run}

    def _draw_alone(self) -> Pair:
        (first,), (second,) = self.draw()
        return first, second


class Group(Measured):
    """Runs that their settings describe as measured alike."""

    def __init__(self, runs: Sequence[Training], strategy: Strategy) -> None:
        super().__init__(runs)
        first, config, task = runs[0], runs[0].config, runs[0].task
        pca = StreamingPCA(segments=task.followed(first.model), runs=len(runs)) if config.pca_every else None

        given = Given(config.update_window, config.update_every, [run.fixed_batch for run in runs])
        measures = named_measures(config.measures, given)

        def engine(loss: LossFn, strategy: Strategy) -> RunsEngine:
            self.engine = RunsEngine(first.model, loss, strategy, config.compile, len(runs))
            return self.engine

        self.monitor = CurvatureMonitor(
            Distributed(engine),
            task.loss if config.successive else task.measured_loss,
            every=config.measure_every,
            pairs=config.pairs,
            pca=pca,
            pca_every=config.pca_every or 1,
            sampler=None if config.successive else self.draw,
            design=config.design,
            check_every=config.check_every,
            alignment=config.alignment,
            anatomy=config.anatomy,
            method=config.method,
            eta=config.eta,
            strategy=strategy,
            gradient="trusted",  # it is that of this very loss, before clipping
            measures=measures,
        )
        self.capturable = not (config.alignment or config.anatomy) and all(measure.capturable for measure in measures)
        for place, run in enumerate(runs):
            run.attach(self.monitor, place)

    def adopt(self, runs: Sequence[Training], batches: Batches, *buffers: Tensor) -> None:
        super().adopt(runs, batches, *buffers)
        self.engine.adopt(self.places, *buffers)
        self._follow()

    def _follow(self) -> None:
        """Have the measures learn which rows of optimisers the runs are."""
        rows = [(run.optimizer, run.optimizer_row) for run in self.runs if run.optimizer is not None]
        for measure in self.monitor.measures:
            measure.follow(rows)

    def prepare(self) -> None:
        """Take out runs whose weights are not finite, feed the PCA, and plan the row."""
        self.bad = {run for run in self.runs if self.monitor.feeds and not run.finite()}
        for run in self.bad:
            run.evaluate_bad()
            self.leave(run)
        if self.runs and self.monitor.feeds:
            self.monitor.feed()
        self.plan = self.monitor.plan() if self.runs else ()

    def launch(self, pair: PairOfRuns | None = None) -> Tensor | None:
        start = time.perf_counter()
        pairs: list[PairOfRuns] = []
        met = [] if pair is None else [pair[0][place] for place in self.places]
        if self.plan and pair is not None:
            pairs = [(met, [pair[1][place] for place in self.places])]
        elif self.plan:
            self._at = -1  # what a capture has drawn that failed was never there
            pairs = self.monitor.draw()
        return self.monitor.launch(pairs, self.plan, start, met=met) if self.runs else None

    def advance(self, found: Tensor | None) -> None:
        if self.runs:
            self.monitor.advance(found)

    def leave(self, run: Training) -> None:
        place = self.runs.index(run)
        super().leave(run)
        self.places.pop(place)
        if not self.runs:
            return
        self.batches = Batches(self.runs)
        self.monitor.keep([other for other in range(len(self.runs) + 1) if other != place])
        self.engine.keep(self.places)
        self._follow()
        for number, other in enumerate(self.runs):
            other.place = number


class RunsEngine(GradientEngine):
    """Gradients of several runs of one network, whose parameters are rows of a program's buffers."""

    shared = True

    def __init__(self, model: nn.Module, loss_fn: LossFn, strategy: Strategy, compile: bool, runs: int) -> None:
        self.runs = runs
        super().__init__(model, loss_fn, strategy=strategy, compile=compile)

    def adopt(self, rows: Sequence[int], theta: Tensor, gradient: Tensor, ahead: Tensor | None = None) -> None:
        """Find the parameters, and the gradients that training leaves, in these rows of buffers (R, P).

        ``ahead`` has those on the next batches, whenever such a pair is measured.
        """
        self._theta, self._gradient, self._ahead = theta, gradient, ahead
        self.keep(rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with the runs in these rows alone."""
        self.runs = len(rows)
        together = list(rows) == list(range(rows[0], rows[-1] + 1))
        self._here = slice(rows[0], rows[-1] + 1) if together else torch.tensor(rows, device=self._theta.device)

    def thetas(self, runs: Sequence[int], out: Tensor | None = None) -> Tensor:
        theta = self._of(self._theta, runs)
        if out is None:
            return theta
        return out.copy_(theta[0])[None] if len(runs) == 1 else theta.to(out.dtype)

    def _values(self, numbers: set[int]) -> dict[int, Tensor]:
        theta = self._of(self._theta, range(self.runs))
        return {number: theta[:, self.segments[number].start : self.segments[number].stop] for number in numbers}

    def theta_norms(self, runs: Sequence[int]) -> Tensor:
        return self.partition.norms(self._of(self._theta, runs))

    def training_gradients(self, runs: Sequence[int]) -> Tensor:
        return self._of(self._gradient, runs)

    def next_gradients(self, runs: Sequence[int]) -> Tensor | None:
        return None if self._ahead is None else self._of(self._ahead, runs)

    def _of(self, buffer: Tensor, runs: Sequence[int]) -> Tensor:
        """Rows of some runs; where they stand together, without a copy."""
        return rows_of(buffer[self._here], runs)
