"""The trainer of modular arithmetic: one run, measured as it goes, that can be stopped and resumed at any instant."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grokcurv.commutator import CommutatorProbe
from grokcurv.flat import attention_segments
from grokcurv.gradients import Distributed, Strategy
from grokcurv.interventions import Intervention, Kick, Noise, Part, Projection, Space
from grokcurv.modular.config import TrainConfig
from grokcurv.modular.draws import draws_of
from grokcurv.modular.evaluation import evaluate
from grokcurv.modular.network import Batch, build_model, training_loss
from grokcurv.modular.process import ctrl_c, describe_device, threads_of
from grokcurv.modular.tasks import split
from grokcurv.monitor import CurvatureMonitor
from grokcurv.pca import StreamingPCA
from grokcurv.runs import Run, RunWriter, describe_environment, open_run
from grokcurv.storage import RunError
from grokcurv.subspace import Subspace

if TYPE_CHECKING:
    import pandas as pd

Sampler = Callable[[], tuple[Batch, Batch]]
MonitorFactory = Callable[[nn.Module, Sampler], CurvatureMonitor]
Progress = Callable[[dict[str, Any]], object]

PROGRESS_EVERY = 10
"""Steps between calls of ``on_progress``."""


DIVERGED = 1e30
"""Weights from here on count as infinite: sums of squares of them are."""


class TrainingError(RuntimeError):
    """The loss was not finite at an evaluation, or the weights were too large to be measured.

    ``run`` is what there is of the run.
    """

    def __init__(self, message: str, run: Run) -> None:
        super().__init__(message)
        self.run = run


def train(
    config: TrainConfig,
    monitor: MonitorFactory | None = None,
    *,
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Run:
    """Train one network, measuring the curvature on the way.

    At step 0 and every ``eval_every`` steps both sets are evaluated; then the monitor measures, if it is due; then a
    snapshot and a checkpoint are written, if they are due; then comes the update. Ctrl-C ends the step, writes a
    checkpoint and raises KeyboardInterrupt. The random generators the caller sees are left as they were.

    Args:
        config: the settings.
        monitor: ``monitor(model, sampler)`` returning a :class:`grokcurv.CurvatureMonitor` to use instead of the one
            that ``config`` describes; ``sampler()`` draws a pair of measurement batches ``(pairs, answers)``.
        out: the run folder, see :mod:`grokcurv.runs`; without it the run is kept in memory.
        resume: go on with the run in ``out``, if there is one. It ends bitwise equal to one never stopped.
        on_progress: called every few steps with a dict of step, steps, train_loss, train_acc, test_acc, defect (each
            the latest; None before the first), steps_per_second and grok_step (None until then).

    Returns:
        The run; its metrics, curvature and PCA history are DataFrames.

    Raises:
        TrainingError: the loss is NaN or infinite at an evaluation, or a weight beyond 1e30 at a measurement.
            The last good checkpoint is kept.
        RunError: the folder is held by another process, damaged, or holds another run; the disk is full.
        ValueError: ``resume`` without ``out``; an unknown or absent device; ``basis_from`` without a basis for this
            network.
    """
    if resume and out is None:
        raise ValueError("resume needs out, the folder of the run to go on with")
    if monitor is not None and not callable(monitor):
        raise TypeError(f"monitor must be a function (model, sampler) -> monitor; got {type(monitor).__name__}")
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads_of(config.threads))
        training = Training(config)
        build = monitor or partial(default_monitor, config)
        training.attach(build(training.model, training.measurement_pair))
        if out is not None:
            training.enter(out, resume, stack)
        status = training.run(on_progress)
        if training.writer:
            training.writer.set_status(status)
    run = training.result(status)
    if status != "finished":
        raise TrainingError(status.removeprefix("failed: "), run)
    return run


class Training:
    """A run in progress: all that a checkpoint holds, and how to take one step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.environment = {"device": describe_device(config.device), "threads": torch.get_num_threads()}
        self.writer: RunWriter | None = None
        device = torch.device(config.device)
        self.draws = draws_of(config.rng, config.seed, device)
        self.data = split(config.op, config.p, config.train_fraction, self.draws.order).to(device)
        self.model = build_model(config, self.draws.weights_seed).to(device)
        self.loss = training_loss(config)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )
        self.monitor: CurvatureMonitor | None = None
        self.place: tuple[int, ...] = ()  # among the runs of a monitor that has several
        self._saved_monitor: Mapping[str, Any] | None = None  # its state in a checkpoint, until there is a monitor
        self._tables: dict[str, pd.DataFrame] | None = None  # of a run that has left its monitor
        self._intervention_stream = torch.Generator(device).manual_seed(self.draws.intervening_seed)
        self.intervention = self._make_intervention()
        self.step = 0
        self.streak = 0
        self.grok_step: int | None = None
        self.rows: list[dict[str, Any]] = []
        self.defect: float | None = None
        self.saved: int | None = None
        self.started = time.perf_counter()

    def attach(self, monitor: CurvatureMonitor | None, *place: int) -> None:
        """Be measured by a monitor, as the run of this number; where a checkpoint was loaded, go on as it says."""
        self.monitor, self.place = monitor, place
        if monitor is not None and self._saved_monitor is not None:
            monitor.load_state_dict(self._saved_monitor, *place)
            self._saved_monitor = None

    def detach(self) -> None:
        """Leave the monitor, which may be renumbered: what it knows of this run is kept."""
        self._tables, self.monitor = self.tables(), None

    @property
    def last_step(self) -> int:
        if self.grok_step is None:
            return self.config.steps
        return min(self.config.steps, self.grok_step + self.config.steps_after_grok)

    def enter(self, out: str | PathLike[str], resume: bool, stack: contextlib.ExitStack) -> None:
        """Take hold of the run's folder until ``stack`` closes, and go back to where the run in it stands."""
        writer = RunWriter(out, asdict(self.config), resume=resume, environment=self.environment)
        self.writer = stack.enter_context(writer)
        checkpoint = writer.read_checkpoint()
        if checkpoint is not None:
            writer.drop_after(checkpoint["step"])
            metrics = writer.read_table("metrics")
            if metrics.empty:
                raise RunError(f"{writer.path} has a checkpoint, but its metrics.parquet is missing")
            self.load_state_dict(checkpoint, metrics)

    def result(self, status: str) -> Run:
        """The run as its folder has it, or as it was kept in memory."""
        if self.writer:
            return open_run(self.writer.path)
        environment = {**describe_environment(), **self.environment}
        return Run(None, asdict(self.config), environment, status=status, tables=self.tables())

    def run(self, on_progress: Progress | None) -> str:
        """Go on to the end; the status."""
        first, began = self.step, time.perf_counter()
        with ctrl_c() as interrupted:
            healthy = bool(self.rows) or self.observe()
            while healthy:
                if self.pause(interrupted.is_set()):
                    return "finished"
                healthy = self.update()
                if not healthy:
                    break
                self.step += 1
                healthy = self.observe()
                if on_progress and self.progress_due:
                    on_progress(self.progress((self.step - first) / (time.perf_counter() - began)))
        return self.failed()

    def pause(self, interrupted: bool) -> bool:
        """Between observation and update: write what is due; True if this was the last step.

        Raises:
            KeyboardInterrupt: ``interrupted``, once the checkpoint is written.
        """
        last = self.step >= self.last_step
        due = last or interrupted or self.step % self.config.checkpoint_every == 0
        if self.writer and self.config.snapshot_every and self.step % self.config.snapshot_every == 0:
            self.writer.write_snapshot(self.step, self.model.state_dict())
        if self.writer and due and self.saved != self.step:
            self._save(self.writer)
        if interrupted:
            raise KeyboardInterrupt
        return last

    def failed(self) -> str:
        """The status of a run that cannot go on; its tables are written."""
        if self.writer:
            self._write_tables(self.writer)
        loss = self.rows[-1]["train_loss"] + self.rows[-1]["test_loss"]
        kept = "" if self.saved is None else f"; the last good checkpoint, of step {self.saved}, is kept"
        if math.isfinite(loss):
            what = f"a weight is beyond {DIVERGED:.0e}"
        else:
            what = f"loss is {'NaN' if math.isnan(loss) else 'infinite'}"
        return f"failed: {what} at step {self.step}{kept}"

    def tables(self) -> dict[str, pd.DataFrame]:
        import pandas as pd

        if self._tables is not None:
            return self._tables
        tables = {"metrics": pd.DataFrame(self.rows), "curvature": pd.DataFrame(), "pca": pd.DataFrame()}
        if self.monitor is not None:
            tables |= {"curvature": self.monitor.records(*self.place), "pca": self.monitor.pca_records(*self.place)}
        return tables

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "streak": self.streak,
            "grok_step": self.grok_step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.state_dict(),
            "monitor": self.monitor.state_dict(*self.place) if self.monitor is not None else None,
            "intervention": self.intervention.state_dict() if self.intervention is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], metrics: pd.DataFrame) -> None:
        self.step, self.streak, self.grok_step = state["step"], state["streak"], state["grok_step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.load_state_dict(state["draws"])
        self._saved_monitor = state["monitor"]
        self.attach(self.monitor, *self.place)
        if self.intervention is not None:
            self.intervention.load_state_dict(state["intervention"])
        self.rows = [{str(name): value for name, value in row.items()} for row in metrics.to_dict("records")]
        self.started = time.perf_counter() - self.rows[-1]["seconds"]
        self.saved = self.step

    def observe(self) -> bool:
        """Evaluate and measure what is due at this step; False if the loss is not finite."""
        well = self.evaluate_due()
        if well and self.monitor is not None and self.monitor.sampler is not None:
            well = self._measure()
        self.note_defect()
        return well

    def evaluate_due(self) -> bool:
        """Set the learning rate, and evaluate if that is due at this step; False if the loss is not finite."""
        self._warm_up()
        if not self._evaluation_due():
            return True
        self._evaluate()
        return math.isfinite(self.rows[-1]["train_loss"] + self.rows[-1]["test_loss"])

    def note_defect(self) -> None:
        """What progress says of the defect; read where an evaluation has waited for the device anyway."""
        if self.monitor is not None and self._evaluation_due():
            latest = self.monitor.latest(*self.place) if self.place else self.monitor.last
            self.defect = self.defect if latest is None else latest["defect_median"]

    def _measure(self, *batches: Batch) -> bool:
        """Have the monitor do what is due; False if it met weights that are not finite."""
        assert self.monitor is not None
        try:
            self.monitor.step(*batches)
        except ValueError:
            if self.finite():
                raise
            self.evaluate_bad()
            return False
        return True

    def evaluate_bad(self) -> None:
        """Evaluate weights that are not finite, if no evaluation has met them yet."""
        if self.rows[-1]["step"] != self.step:
            self._evaluate()

    def _evaluation_due(self) -> bool:
        return self.step % self.config.eval_every == 0 or self.step == self.last_step

    def _evaluate(self) -> None:
        beside = {} if self.intervention is None else {"intervention_norm": self.intervention.norm}
        found = evaluate(self.config, self.model, self.data, beside)
        done = {} if self.intervention is None else {"interventions": self.intervention.acted}
        moved = {name: found.pop(name) for name in beside}
        rate, seconds = self.optimizer.param_groups[0]["lr"], time.perf_counter() - self.started
        self.rows.append({"step": self.step, **found, "learning_rate": rate, "seconds": seconds, **done, **moved})
        self.streak = self.streak + 1 if found["test_acc"] >= self.config.grok_threshold else 0
        if self.grok_step is None and self.streak == self.config.grok_patience:
            self.grok_step = self.step

    def update(self) -> bool:
        """Take one step; False, and no step, if the monitor meets weights that are not finite."""
        batch = self.training_batch()
        self.optimizer.zero_grad()
        self.loss(self.model, batch).backward()
        if not self.look_ahead(batch):
            return False
        if self.config.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        with self.intervening():
            self.optimizer.step()
        return True

    def intervening(self) -> contextlib.AbstractContextManager[None]:
        """What goes around the optimiser's step."""
        return self.intervention.at(self.step) if self.intervention is not None else contextlib.nullcontext()

    def _warm_up(self) -> None:
        """Set the learning rate of the update that takes this step to the next."""
        if self.step < self.config.warmup:
            self.optimizer.param_groups[0]["lr"] = self.config.lr * (self.step + 1) / self.config.warmup
        elif self.step == self.config.warmup:
            self.optimizer.param_groups[0]["lr"] = self.config.lr

    def look_ahead(self, batch: Batch) -> bool:
        """Measure ``batch``, whose gradient is in ``.grad``, against the next one, if that is what is measured."""
        if self.monitor is None or self.monitor.sampler is not None:
            return True
        return self._measure(batch, self.peek())

    def training_batch(self) -> Batch:
        if self.config.batch_size == 0:
            return self.data.train_pairs, self.data.train_answers
        return self._rows_of(self.draws.training(len(self.data.train_answers), self.config.batch_size))

    def peek(self) -> Batch:
        """The next training batch, left to be drawn again."""
        state = self.draws.state_dict()
        batch = self.training_batch()
        self.draws.load_state_dict(state)
        return batch

    def measurement_pair(self) -> tuple[Batch, Batch]:
        n, rows = len(self.data.train_answers), self.config.measure_rows
        first = self._rows_of(self.draws.measuring(n, rows))
        return first, self._rows_of(self.draws.measuring(n, rows))

    def _kick_pair(self) -> tuple[Batch, Batch]:
        if self.config.faithful and self.config.rng == "paper":
            return self.measurement_pair()
        shape = (2, self.config.measure_rows)
        generator = self._intervention_stream
        index = torch.randint(len(self.data.train_answers), shape, generator=generator, device=generator.device)
        return self._rows_of(index[0]), self._rows_of(index[1])

    def _make_intervention(self) -> Intervention | None:
        config = self.config
        if config.intervention == "none":
            return None
        space: Space = self._basis_so_far
        if config.basis != "causal":
            space = _basis_from(config, self.model, self._intervention_stream)
        schedule = {"start": config.intervene_from, "every": config.intervene_every, "times": config.intervene_times}
        if config.intervention == "noise":
            return Noise(self.model, config.strength, generator=self._intervention_stream, space=space, **schedule)
        if config.intervention == "kick":
            loss = training_loss(replace(config, float64_logits=True))
            return Kick(
                CommutatorProbe(self.model, loss, eta=config.eta, method=config.method),
                self._kick_pair,
                config.strength,
                direction=config.direction,
                space=space,
                generator=self._intervention_stream,
                faithful=config.faithful,
                **schedule,
            )
        of: Part = "gradient" if config.intervention == "project" else "update"
        return Projection(self.model, space, config.strength, of=of, **schedule)

    def _basis_so_far(self) -> Subspace | None:
        if self.monitor is None or not self.place:
            return None if self.monitor is None else self.monitor.probe.basis
        bases = self.monitor.probe.bases
        return bases[self.place[0]] if bases else None

    def _rows_of(self, index: Tensor) -> Batch:
        return self.data.train_pairs[index], self.data.train_answers[index]

    def _save(self, writer: RunWriter) -> None:
        """Tables first, then the checkpoint; no checkpoint of weights that are not finite."""
        self._write_tables(writer)
        if (basis := self._basis_so_far()) is not None:
            writer.write_basis({"values": basis.values, "rows": basis.rows, "size": basis.size})
        if self.finite():
            writer.write_checkpoint(self.state_dict())
            self.saved = self.step

    def finite(self) -> bool:
        return all(bool((p.abs() < DIVERGED).all()) for p in self.model.parameters())

    def _write_tables(self, writer: RunWriter) -> None:
        for name, frame in self.tables().items():
            writer.write_table(name, frame)

    @property
    def progress_due(self) -> bool:
        return self.step % PROGRESS_EVERY == 0 or self._evaluation_due()

    def progress(self, steps_per_second: float) -> dict[str, Any]:
        row = self.rows[-1]
        return {
            "step": self.step,
            "steps": self.last_step,
            "train_loss": row["train_loss"],
            "train_acc": row["train_acc"],
            "test_acc": row["test_acc"],
            "defect": self.defect,
            "steps_per_second": steps_per_second,
            "grok_step": self.grok_step,
        }


def default_monitor(
    config: TrainConfig,
    network: nn.Module,
    sampler: Callable[[], tuple[Any, Any]],
    model: Distributed | None = None,
    runs: int = 1,
    strategy: Strategy = "auto",
) -> CurvatureMonitor | None:
    """The monitor ``config`` describes: PCA over the attention matrices, or over everything where there are none.

    Of several runs: ``model`` says where their parameters are.
    """
    if not config.measure_every:
        return None
    segments = attention_segments(network) if config.architecture == "transformer" else None
    return CurvatureMonitor(
        model or network,
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


def _basis_from(config: TrainConfig, model: nn.Module, generator: torch.Generator) -> Subspace:
    """The basis of the run in ``config.basis_from``, or a random one in its image."""
    try:
        oracle = Subspace.from_table(**open_run(config.basis_from).basis())
    except RunError as error:
        raise ValueError(f"basis_from: {error}") from error
    size = sum(p.numel() for p in model.parameters())
    if oracle.size != size:
        raise ValueError(
            f"basis_from: the basis of {config.basis_from} lives in R^{oracle.size}, this network has {size} parameters"
        )
    if config.basis == "random":
        return Subspace.random(oracle.dim, oracle.size, generator)
    return oracle.random_like(generator) if config.basis == "matched" else oracle
