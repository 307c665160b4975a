"""One run of a program: its data, network and intervention, its records, its folder."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grokcurv.commutator import CommutatorProbe
from grokcurv.interventions import Intervention, Kick, Noise, Part, Projection, Space
from grokcurv.monitor import CurvatureMonitor
from grokcurv.optim import Optimizer
from grokcurv.runs import Run, RunWriter, describe_environment, differences, open_run
from grokcurv.storage import RunError
from grokcurv.subspace import Subspace
from grokcurv.tasks.base import Batch
from grokcurv.training.config import CHANGEABLE, TrainConfig
from grokcurv.training.draws import PaperDraws, intervention_seed, order_of
from grokcurv.training.network import task_of
from grokcurv.training.process import describe_device

if TYPE_CHECKING:
    import pandas as pd

PROGRESS_EVERY = 10
"""Steps between calls of ``on_progress``."""


GROKKED = 0.9
"""Test accuracy from which on a run counts as grokked in the paper (Xu, arXiv 2602.16746): its grok step is the first
evaluation with it. It has settled when it meets the settings' own criterion, and ends some time after that."""

DIVERGED = 1e30
"""Weights from here on count as infinite: sums of squares of them are."""


class Training:
    """A run in progress: all that a checkpoint holds. Its steps are taken by a program, which has its parameters."""

    def __init__(self, config: TrainConfig) -> None:
        if config.rng == "torch":
            raise ValueError(
                "rng 'torch' is that of older versions, whose runs are read and reported, but neither trained nor gone "
                "on with: start anew with rng 'philox'"
            )
        self.config = config
        self.environment = {"device": describe_device(config.device), "threads": torch.get_num_threads()}
        self.writer: RunWriter | None = None
        self.error: RunError | None = None  # what writing to the folder has met
        self._held = contextlib.ExitStack()
        device = torch.device(config.device)
        self.draws = PaperDraws(config.seed, device) if config.rng == "paper" else None
        self.task = task_of(config)
        self.data = self.task.split(order_of(config, self.task.size)).to(device)
        self.model = self.task.model(config.seed).to(device)
        self.monitor: CurvatureMonitor | None = None
        self.place = 0  # among the runs of the monitor
        self._saved_monitor: Mapping[str, Any] | None = None  # its state in a checkpoint, until there is a monitor
        self._tables: dict[str, pd.DataFrame] | None = None  # of a run that has left its monitor
        self.optimizer: Optimizer | None = None  # of the program
        self.optimizer_row = 0  # which of its rows is this run
        self._saved_optimizer: Mapping[str, Tensor] | None = None
        self.intervention = None if config.intervention == "none" else self._make_intervention()
        self.step = 0
        self.streak = 0
        self.grok_step: int | None = None
        self.settled_step: int | None = None
        self.rows: list[dict[str, Any]] = []
        self.defect: float | None = None
        self.saved: int | None = None
        self.started = time.perf_counter()

    def seat(self, theta: Tensor, gradient: Tensor, optimizer: Optimizer, row: int) -> None:
        """Have parameters and their ``.grad`` in these rows (P,) of a program, and be moved by its optimiser."""
        start = 0
        with torch.no_grad():
            for p in self.model.parameters():
                here = slice(start, start + p.numel())
                start = here.stop
                p.data = theta[here].view(p.shape).copy_(p)
                p.grad = gradient[here].view(p.shape)
        self.optimizer, self.optimizer_row = optimizer, row
        if self._saved_optimizer is not None:
            with self._fitting():
                optimizer.load_state_dict(row, self._saved_optimizer)
            self._saved_optimizer = None

    def attach(self, monitor: CurvatureMonitor, place: int = 0) -> None:
        """Be measured by a monitor, as the run of this number; where a checkpoint was loaded, go on as it says."""
        self.monitor, self.place = monitor, place
        if self._saved_monitor is not None:
            with self._fitting():
                monitor.load_state_dict(self._saved_monitor, place)
            self._saved_monitor = None
            if self.writer is not None and self.writer.lacks_tables:
                self._write_tables(self.writer)

    def detach(self) -> None:
        """Leave the monitor, which may be renumbered: what it knows of this run is kept."""
        self._tables, self.monitor = self.tables(), None

    @property
    def fixed_batch(self) -> Batch:
        """For measures of one batch: the first of the training set."""
        rows = self.config.measure_rows
        return self.data.train_pairs[:rows], self.data.train_answers[:rows]

    @property
    def last_step(self) -> int:
        """The step at which the run ends, as far as is known."""
        if self.settled_step is None:
            return self.config.steps
        return min(self.config.steps, self.settled_step + self.config.steps_after_grok)

    def enter(self, out: str | PathLike[str], resume: bool, stack: contextlib.ExitStack) -> None:
        """Take hold of the run's folder until ``stack`` closes, and go back to where the run in it stands."""
        self.writer = RunWriter(
            out,
            asdict(self.config),
            resume=resume,
            environment=self.environment,
            changeable=CHANGEABLE,
            accept=self._go_on,
        )
        self._held = stack.enter_context(contextlib.ExitStack())
        self._held.enter_context(self.writer)

    def _go_on(self, writer: RunWriter) -> None:
        """Go back to where the run in the folder stands; RunError if it cannot be this one."""
        if writer.checkpoint is None:
            return
        with self._fitting():
            self.load_state_dict(writer.checkpoint, writer.read_table("metrics"))
        if self.step > self.last_step:
            raise RunError(f"{writer.path} stands at step {self.step}, and is to end at {self.last_step}")

    def result(self, status: str) -> Run:
        """The run as its folder has it, or as it was kept in memory."""
        if self.writer:
            return open_run(self.writer.path)
        environment = {**describe_environment(), **self.environment}
        return Run(None, asdict(self.config), environment, status=status, tables=self.tables())

    def pause(self, *, failed: bool, interrupted: bool) -> str | None:
        """Between observation and update: write what is due, and let go of the folder at the end; its status then.

        Args:
            failed: the run cannot go on.
            interrupted: a checkpoint is due, wherever the run stands.
        """
        try:
            status = self._failed() if failed else "finished" if self._write(interrupted) else None
            if self.writer is not None and status is not None:
                self.writer.set_status(status)
        except RunError as error:
            self.error, status = error, f"failed: {error}"
            with contextlib.suppress(RunError):  # the first is the one to report
                assert self.writer is not None
                self.writer.set_status(status)
        if status is not None:
            self._held.close()
        return status

    def _write(self, interrupted: bool) -> bool:
        """Write what is due; True at the last step."""
        last = self.step >= self.last_step
        due = last or interrupted or self.step % self.config.checkpoint_every == 0
        if self.writer and self.config.snapshot_every and self.step % self.config.snapshot_every == 0:
            self.writer.write_snapshot(self.step, self.model.state_dict())
        if self.writer and due and self.saved != self.step:
            self._save(self.writer)
        return last

    def _failed(self) -> str:
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
        """The run's tables so far, as its folder has them."""
        import pandas as pd

        if self._tables is not None:
            return self._tables
        tables = {"metrics": pd.DataFrame(self.rows), "curvature": pd.DataFrame(), "pca": pd.DataFrame()}
        if self.monitor is not None:
            tables |= {"curvature": self.monitor.records(self.place), "pca": self.monitor.pca_records(self.place)}
        return tables

    def state_dict(self) -> dict[str, Any]:
        assert self.optimizer is not None
        acted = None if self.intervention is None else self.intervention.state_dict()
        return {
            "step": self.step,
            "streak": self.streak,
            "settled_step": self.settled_step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(self.optimizer_row),
            "draws": {} if self.draws is None else self.draws.state_dict(),
            "monitor": self.monitor.state_dict(self.place) if self.monitor is not None else None,
            "intervention": acted and {**acted, "generator": None},  # which is seeded anew at every step
        }

    def load_state_dict(self, state: Mapping[str, Any], metrics: pd.DataFrame) -> None:
        saved = {name: (tuple(value.shape), value.dtype) for name, value in state["model"].items()}
        own = {name: (tuple(value.shape), value.dtype) for name, value in self.model.state_dict().items()}
        for name, values in differences(saved, own).items():
            raise ValueError(f"{name} is {values}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self._saved_optimizer, self._saved_monitor = state["optimizer"], state["monitor"]
        if self.draws is not None:
            self.draws.load_state_dict(state["draws"])
        if self.intervention is not None:
            self.intervention.load_state_dict(state["intervention"])
        for row in metrics[metrics["step"] <= self.step].to_dict("records"):
            # An evaluation that was made because the run ended there is none of a run that goes on.
            if self._evaluation_due(row["step"]):
                self._note({str(name): value for name, value in row.items()})
        if self.rows[-1]["step"] // self.config.eval_every != self.step // self.config.eval_every:
            raise ValueError(f"it is of step {self.step}, and evaluations end at step {self.rows[-1]['step']}")
        self.started = time.perf_counter() - self.rows[-1]["seconds"]
        self.saved = self.step

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """Around what a checkpoint is read by: RunError where that does not fit this run."""
        try:
            yield
        except RunError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            assert self.writer is not None
            file = self.writer.path / "checkpoint.safetensors"
            raise RunError(f"{file} does not fit these settings, or is of an older version: {error}") from error

    def evaluate_due(self) -> bool:
        """Evaluate if that is due at this step; False if the loss is not finite."""
        if not self._evaluation_due(self.step):
            return True
        self._evaluate()
        return math.isfinite(self.rows[-1]["train_loss"] + self.rows[-1]["test_loss"])

    def note_defect(self) -> None:
        """What progress says of the defect; read where an evaluation has waited for the device anyway."""
        if self.monitor is not None and self._evaluation_due(self.step):
            latest = self.monitor.latest(self.place)
            self.defect = self.defect if latest is None else latest["defect_median"]

    def evaluate_bad(self) -> None:
        """Evaluate weights that are not finite, if no evaluation has met them yet."""
        if self.rows[-1]["step"] != self.step:
            self._evaluate()

    def _evaluation_due(self, step: int) -> bool:
        return step % self.config.eval_every == 0 or step == self.last_step

    def _evaluate(self) -> None:
        """Evaluate the network, and note it as a row of the metrics."""
        beside = {} if self.intervention is None else {"intervention_norm": self.intervention.norm}
        values = [self.task.evaluate(self.model, self.data), *(value[None] for value in beside.values())]
        found = dict(zip((*self.task.columns, *beside), torch.cat(values).tolist(), strict=True))  # all read at once
        done = {} if self.intervention is None else {"interventions": self.intervention.acted}
        moved = {name: found.pop(name) for name in beside}
        risen = min(1.0, (self.step + 1) / self.config.warmup) if self.config.warmup else 1.0
        rate, seconds = self.config.lr * risen, time.perf_counter() - self.started
        self._note({"step": self.step, **found, "learning_rate": rate, "seconds": seconds, **done, **moved})

    def _note(self, row: dict[str, Any]) -> None:
        """Take an evaluation down, and see whether the run has grokked with it."""
        self.rows.append(row)
        self.streak = self.streak + 1 if row["test_acc"] >= self.config.grok_threshold else 0
        if self.grok_step is None and row["test_acc"] >= GROKKED:
            self.grok_step = row["step"]
        if self.settled_step is None and self.streak == self.config.grok_patience:
            self.settled_step = row["step"]

    def intervening(self) -> contextlib.AbstractContextManager[None]:
        """What goes around the optimiser's step."""
        if self.intervention is None or not self.intervention.due(self.step):
            return contextlib.nullcontext()
        self._stream.manual_seed(intervention_seed(self.config, self.step))
        return self.intervention.at(self.step)

    def _kick_pair(self) -> tuple[Batch, Batch]:
        """Two batches of the training set for a kick."""
        n, rows, generator = len(self.data.train_answers), self.config.measure_rows, self._stream
        if self.config.faithful and self.draws is not None:
            index = torch.cat([self.draws.next(n, rows) for _ in range(2)])
        else:
            index = torch.randint(n, (2, rows), generator=generator, device=generator.device)
        first, second = zip(self.data.train_pairs[index], self.data.train_answers[index], strict=True)
        return first, second

    def _make_intervention(self) -> Intervention:
        """The intervention that the settings describe."""
        config = self.config
        self._stream = torch.Generator(config.device).manual_seed(intervention_seed(config, 0, 1))
        space: Space = self._basis_so_far
        if config.basis != "causal":
            space = _basis_from(config, self.model, self._stream)
        schedule = {"start": config.intervene_from, "every": config.intervene_every, "times": config.intervene_times}
        if config.intervention == "noise":
            return Noise(self.model, config.strength, generator=self._stream, space=space, **schedule)
        if config.intervention == "kick":
            return Kick(
                CommutatorProbe(self.model, self.task.measured_loss, eta=config.eta, method=config.method),
                self._kick_pair,
                config.strength,
                direction=config.direction,
                space=space,
                generator=self._stream,
                faithful=config.faithful,
                **schedule,
            )
        of: Part = "gradient" if config.intervention == "project" else "update"
        return Projection(self.model, space, config.strength, of=of, **schedule)

    def _basis_so_far(self) -> Subspace | None:
        bases = () if self.monitor is None else self.monitor.probe.bases
        return bases[self.place] if bases else None

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
        return self.step % PROGRESS_EVERY == 0 or self._evaluation_due(self.step)

    def progress(self, steps_per_second: float) -> dict[str, Any]:
        """What is told of the run while it is trained."""
        return {
            "step": self.step,
            "steps": self.last_step,
            **{name: self.rows[-1][name] for name in ("train_loss", "train_acc", "test_acc")},
            "defect": self.defect,
            "steps_per_second": steps_per_second,
            "grok_step": self.grok_step,
            "settled_step": self.settled_step,
        }


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
