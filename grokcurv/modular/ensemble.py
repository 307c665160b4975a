"""Several runs of one architecture as one program.

Their parameters, gradients and moments are the rows of one buffer each. An update computes all gradients together
(:class:`grokcurv.gradients.GradientEngine`) and takes all steps of clipping and AdamW in operations on the whole
buffers; evaluations, measurements, records, checkpoints and folders are each run's own, as if it were alone, and the
gradients that measurements want at one time are computed together too. A run that ends leaves the buffers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from grokcurv.evaluation import LossFn
from grokcurv.flat import flatten
from grokcurv.gradients import Distributed, GradientEngine, Strategy
from grokcurv.modular.config import TrainConfig
from grokcurv.modular.network import Batch
from grokcurv.modular.process import ctrl_c, threads_of
from grokcurv.modular.trainer import Training, default_monitor
from grokcurv.pairs import PairOfRuns
from grokcurv.runs import Run
from grokcurv.storage import RunError

SHARED = (
    "p",
    "architecture",
    "layers",
    "d_model",
    "heads",
    "d_ff",
    "activation",
    "layer_norm",
    "sequence",
    "batch_size",
    "rng",
    "float64_logits",
    "successive",
    "device",
    "threads",
)
"""Settings in which the runs of an ensemble must agree; all others are each run's own."""

MEASURED_ALIKE = (
    "measure_every",
    "measure_rows",
    "pairs",
    "design",
    "method",
    "eta",
    "alignment",
    "pca_every",
)
"""Settings in which runs must agree to be measured together."""

ALIGNMENT = 16
"""Rows of an ensemble's buffers begin at multiples of this many numbers: 64 bytes in float32."""

EPSILON = 1e-8
"""Of AdamW: torch's default, which a run of its own has."""

Progress = Callable[[int, dict[str, Any]], object]


def train_ensemble(
    configs: Sequence[TrainConfig],
    *,
    outs: Sequence[str | PathLike[str]] | None = None,
    resume: bool = False,
    strategy: Strategy = "auto",
    on_progress: Progress | None = None,
    on_end: Callable[[int, str], object] | None = None,
) -> list[Run]:
    """Train several networks of one architecture together; each as :func:`grokcurv.modular.train` would alone.

    With ``strategy="loop"`` every run is bitwise what it would be alone, provided that each parameter has a multiple of
    16 numbers (the last one aside), as in all presets: the CPU's matrix products depend on alignment. With ``"vmap"``
    the batched products round differently. Ctrl-C writes a checkpoint of every run and raises KeyboardInterrupt.

    Args:
        configs: the settings. They may differ in operation, seed, learning rate, weight decay, betas, warm-up,
            clipping, lengths, evaluations and measurements, but not in :data:`SHARED`.
        outs: a run folder for each; without them the runs are kept in memory.
        resume: go on with the runs that are in the folders; they may stand at different steps.
        strategy: ``"loop"``, ``"vmap"``, or ``"auto"``: ``vmap`` on a GPU, where it pays, and ``loop`` elsewhere.
        on_progress: called every few steps with a run's place in ``configs`` and what ``train`` reports.
        on_end: called with a run's place and status when it ends, which may be long before the others do.

    Returns:
        The runs in the order of ``configs``. One whose loss is not finite, or whose disk is full, has a status that
        begins with ``failed``; the others go on.

    Raises:
        RunError: a folder that cannot be opened, as for ``train``.
        ValueError: no settings, settings that differ in what must agree, as many folders as runs wanted and not given;
            with ``vmap``, full batches of different sizes.
    """
    _check(configs, outs, resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads_of(configs[0].threads))
        runs = [Training(config) for config in configs]
        held = {}
        for training, out in zip(runs, outs or (), strict=outs is not None):
            held[training] = stack.enter_context(contextlib.ExitStack())
            training.enter(out, resume, held[training])
        statuses = Ensemble(runs, held, strategy).train(on_progress, on_end)
    return [training.result(statuses[training]) for training in runs]


def _check(configs: Sequence[TrainConfig], outs: Sequence[object] | None, resume: bool) -> None:
    if not configs:
        raise ValueError("configs must hold at least one run")
    for name in SHARED:
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1:
            raise ValueError(f"the runs of an ensemble must agree in {name}; got {', '.join(map(repr, values))}")
    if outs is not None and len(outs) != len(configs):
        raise ValueError(f"outs must hold one folder for each of the {len(configs)} runs; got {len(outs)}")
    if resume and outs is None:
        raise ValueError("resume needs outs, the folders of the runs to go on with")


class Ensemble:
    """Runs in progress: one program that trains them, and one for each group of them that is measured alike.

    Args:
        runs: as their folders, or their beginnings, have them.
        held: for those with a folder what lets go of it.
        strategy: of the gradients.
    """

    def __init__(
        self, runs: Sequence[Training], held: Mapping[Training, contextlib.ExitStack], strategy: Strategy
    ) -> None:
        first = runs[0]
        self.runs, self.held, self.active = runs, held, list(runs)
        if strategy == "auto":
            strategy = "vmap" if torch.device(first.config.device).type == "cuda" else "loop"
        self.engine = GradientEngine(first.model, first.loss, strategy=strategy)
        if strategy == "vmap" and len({run.config.batch_size or run.config.train_rows for run in runs}) > 1:
            raise ValueError("strategy 'vmap' needs batches of one size: full batches of these runs differ in theirs")
        alike: dict[Any, list[Training]] = {}
        for run in runs:
            settings = tuple(getattr(run.config, name) for name in MEASURED_ALIKE)
            alike.setdefault((settings, run.step, bool(run.rows)), []).append(run)
        self.groups = [Group(group, strategy) for group in alike.values() if group[0].config.measure_every]

    def train(self, on_progress: Progress | None, on_end: Callable[[int, str], object] | None) -> dict[Training, str]:
        """Go on until every run has ended; their statuses."""
        statuses: dict[Training, str] = {}
        place = {run: index for index, run in enumerate(self.runs)}
        starts = {run: run.step for run in self.runs}
        began = time.perf_counter()

        def end(run: Training, status: str) -> None:
            statuses[run] = status
            self.active.remove(run)
            for group in self.groups:
                group.leave(run)
            if run in self.held:
                with contextlib.suppress(RunError):  # of a full disk, whose runs say so when they are read
                    assert run.writer is not None
                    run.writer.set_status(status)
                self.held[run].close()
            if on_end:
                on_end(place[run], status)

        with ctrl_c() as interrupted:
            buffers = Buffers(self.active)
            bad = self.observe([run for run in self.runs if not run.rows], buffers)
            while True:
                for run in list(self.active):
                    try:
                        status = run.failed() if run in bad else "finished" if run.pause(False) else None
                    except RunError as error:
                        status = f"failed: {error}"
                    if status is not None:
                        end(run, status)
                if interrupted.is_set():
                    self._interrupt()
                if not self.active:
                    return statuses
                if buffers.runs != self.active:
                    buffers = Buffers(self.active)
                bad = self.update(buffers)
                well = [run for run in self.active if run not in bad]
                for run in well:
                    run.step += 1
                bad |= self.observe(well, buffers)
                for run in self.active if on_progress else ():
                    if run.progress_due and on_progress:
                        on_progress(place[run], run.progress((run.step - starts[run]) / (time.perf_counter() - began)))

    def update(self, buffers: Buffers) -> set[Training]:
        """Take one step of every run; those that a measurement has found not finite stay, and are returned."""
        batches = {run: run.training_batch() for run in buffers.runs}
        seeds = range(len(batches))
        self.engine.gradients(buffers.theta, list(batches.values()), buffers.gradient, seeds=seeds)
        bad: set[Training] = set()
        for group in self.groups:
            if group.looks_ahead:
                bad |= group.measure(buffers, batches)
        buffers.clip()
        with contextlib.ExitStack() as around:
            for run in buffers.runs:
                if run not in bad:
                    around.enter_context(run.intervening())
            buffers.step()
        return bad

    def observe(self, runs: Sequence[Training], buffers: Buffers) -> set[Training]:
        """Evaluate and measure what is due of these runs; those that cannot go on."""
        bad = {run for run in runs if not run.evaluate_due()}
        for group in self.groups:
            for run in bad:
                group.leave(run)
            if not group.looks_ahead and group.runs and group.runs[0] in runs:
                bad |= group.measure(buffers)
        for run in runs:
            run.note_defect()
        return bad

    def _interrupt(self) -> None:
        for run in self.active:
            with contextlib.suppress(KeyboardInterrupt):
                run.pause(True)
        raise KeyboardInterrupt


class Group:
    """Runs that stand at one step and are measured alike, and the monitor that measures them together."""

    def __init__(self, runs: Sequence[Training], strategy: Strategy) -> None:
        self.runs = list(runs)
        first = runs[0]

        def engine(loss: LossFn, strategy: Strategy) -> RunsEngine:
            return RunsEngine(first.model, loss, strategy, len(runs))

        def draw() -> PairOfRuns:
            pairs = [run.measurement_pair() for run in self.runs]
            return [a for a, _ in pairs], [b for _, b in pairs]

        monitor = default_monitor(first.config, first.model, draw, Distributed(engine), len(runs), strategy)
        assert monitor is not None
        assert isinstance(monitor.probe.gradients, RunsEngine)
        self.monitor, self.engine = monitor, monitor.probe.gradients
        self.looks_ahead = monitor.sampler is None
        for place, run in enumerate(runs):
            run.attach(monitor, place)

    def measure(self, buffers: Buffers, batches: Mapping[Training, Batch] | None = None) -> set[Training]:
        """Have the monitor do what is due; the runs that had to leave since their weights are not finite."""
        self.engine.adopt(buffers.theta, buffers.gradient, [buffers.runs.index(run) for run in self.runs])
        bad = {run for run in self.runs if self.monitor.feeds and not run.finite()}
        for run in bad:
            run.evaluate_bad()
            self.leave(run)
        if self.runs and batches is not None:
            self.monitor.step([batches[run] for run in self.runs], [run.peek() for run in self.runs])
        elif self.runs:
            self.monitor.step()
        return bad

    def leave(self, run: Training) -> None:
        """Go on without a run."""
        if run not in self.runs:
            return
        run.detach()
        left = [place for place, other in enumerate(self.runs) if other is not run]
        self.runs.remove(run)
        if left:
            self.monitor.keep(left)
            self.engine.keep(left)
        for place, other in enumerate(self.runs):
            other.place = (place,)


class RunsEngine(GradientEngine):
    """Gradients of several runs of one network, whose parameters are rows of :class:`Buffers`."""

    shared = True

    def __init__(self, model: nn.Module, loss_fn: LossFn, strategy: Strategy, runs: int) -> None:
        self.runs = runs
        super().__init__(model, loss_fn, strategy=strategy)
        self._rows: list[int] = []

    def adopt(self, theta: Tensor, gradient: Tensor, rows: list[int]) -> None:
        """Find the parameters, and the gradients that training leaves, in these rows of two buffers (R, P)."""
        self._theta, self._gradient, self._rows = theta, gradient, rows

    def keep(self, runs: list[int]) -> None:
        self.runs, self._rows = len(runs), [self._rows[run] for run in runs if self._rows]

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
        rows = [self._rows[run] for run in runs]
        together = rows == list(range(rows[0], rows[0] + len(rows)))
        return buffer[rows[0] : rows[0] + len(rows)] if together else buffer[rows]


class Buffers:
    """Parameters, gradients and AdamW's moments of several runs, a row each of four buffers (R, P).

    Each run's parameters, ``.grad`` and optimiser state are views of its rows, so that evaluations, measurements and
    checkpoints find them where they always are.
    """

    def __init__(self, runs: Sequence[Training]) -> None:
        self.runs = list(runs)
        size = flatten(runs[0].model).numel()
        first = next(runs[0].model.parameters())
        # Four memories: autograd would take a gradient written beside its parameters for a change of these.
        # Rows begin where memory of their own would: the CPU's matrix products depend on their factors' alignment.
        stride = -(-size // ALIGNMENT) * ALIGNMENT
        new = (first.detach().new_zeros(len(runs), stride)[:, :size] for _ in range(4))
        self.theta, self.gradient, self.mean, self.square = new
        self._norms: list[Tensor] = []
        self._steps: list[Tensor] = []
        for row, run in enumerate(runs):
            flatten(run.model, self.theta[row])
            state = run.optimizer.state
            parameters = list(run.model.parameters())
            count = state[parameters[0]]["step"].clone() if state else torch.tensor(0.0)
            start = 0
            for p in parameters:
                there = slice(start, start + p.numel())
                start = there.stop
                mean, square = (buffer[row, there].view(p.shape) for buffer in (self.mean, self.square))
                if state.get(p):
                    mean.copy_(state[p]["exp_avg"])
                    square.copy_(state[p]["exp_avg_sq"])
                state[p] = {"step": count, "exp_avg": mean, "exp_avg_sq": square}
                p.data = self.theta[row, there].view(p.shape)
                p.grad = self.gradient[row, there].view(p.shape)
                self._norms.append(p.grad)
            self._steps.append(count)

    def clip(self) -> None:
        """Each run's gradient to its largest norm, as ``torch.nn.utils.clip_grad_norm_`` does."""
        largest = [run.config.clip for run in self.runs]
        if any(largest):
            norms = torch.stack(torch._foreach_norm(self._norms)).view(len(self.runs), -1)
            total = torch.stack([torch.linalg.vector_norm(row) for row in norms])
            scale = (total[:, None] + 1e-6).reciprocal() * self._column([limit or torch.inf for limit in largest])
            self.gradient.mul_(scale.clamp(max=1.0))

    @torch.no_grad()
    def step(self) -> None:
        """One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101), in the order of torch's operations."""
        groups = [run.optimizer.param_groups[0] for run in self.runs]
        for count in self._steps:
            count += 1
        counts = [int(count) for count in self._steps]
        lr, decay = ([group[name] for group in groups] for name in ("lr", "weight_decay"))
        betas = [group["betas"] for group in groups]
        self.theta.mul_(self._column([1 - a * b for a, b in zip(lr, decay, strict=True)]))
        self.mean.lerp_(self.gradient, self._column([1 - beta for beta, _ in betas]))
        shares = self._column([1 - beta for _, beta in betas])
        self.square.mul_(self._column([beta for _, beta in betas])).addcmul_(shares * self.gradient, self.gradient)
        roots = [(1 - beta**n) ** 0.5 for (_, beta), n in zip(betas, counts, strict=True)]
        lengths = [-a / (1 - beta**n) for a, (beta, _), n in zip(lr, betas, counts, strict=True)]
        below = (self.square.sqrt() / self._column(roots)).add_(EPSILON)
        self.theta.addcdiv_(self._column(lengths) * self.mean, below)

    def _column(self, values: Sequence[float]) -> Tensor:
        """(R, 1) in the parameters' dtype, rounded as a Python number is when it meets a tensor."""
        return torch.tensor(values, dtype=torch.float64).to(self.theta)[:, None]
