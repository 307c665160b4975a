"""Several runs of one architecture as one program.

Their parameters, gradients and moments are the rows of one buffer each. An update computes all gradients together
(:class:`grokcurv.gradients.GradientEngine`) and takes all steps of clipping and AdamW in operations on the whole
buffers; evaluations, measurements, records, checkpoints and folders are each run's own, as if it were alone, and the
gradients that measurements want at one time are computed together too. A run that ends leaves the buffers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from grokcurv.flat import flatten
from grokcurv.gradients import GradientEngine, Strategy, carry_out
from grokcurv.modular.config import TrainConfig
from grokcurv.modular.process import ctrl_c, threads_of
from grokcurv.modular.trainer import Training
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
        ensemble = Ensemble([Training(config, None) for config in configs], strategy)
        for training, out in zip(ensemble.runs, outs or (), strict=outs is not None):
            held = ensemble.held[training] = stack.enter_context(contextlib.ExitStack())
            training.enter(out, resume, held)
        statuses = ensemble.train(on_progress, on_end)
    return [training.result(statuses[training]) for training in ensemble.runs]


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
    """Runs in progress."""

    def __init__(self, runs: Sequence[Training], strategy: Strategy) -> None:
        first = runs[0]
        self.runs = list(runs)
        self.held: dict[Training, contextlib.ExitStack] = {}
        if strategy == "auto":
            strategy = "vmap" if torch.device(first.config.device).type == "cuda" else "loop"
        self.engine = GradientEngine(first.model, first.loss, strategy=strategy)
        if strategy == "vmap" and len({run.config.batch_size or run.config.train_rows for run in runs}) > 1:
            raise ValueError("strategy 'vmap' needs batches of one size: full batches of these runs differ in theirs")
        for run in runs:
            if run.monitor is not None:
                run.monitor.probe.gradients.use(self.engine.strategy)
        # What the monitors measure is the same loss, that of the first that has one.
        self.measuring = next((run.monitor.probe.gradients for run in runs if run.monitor is not None), None)

    def train(self, on_progress: Progress | None, on_end: Callable[[int, str], object] | None) -> dict[Training, str]:
        """Go on until every run has ended; their statuses."""
        statuses: dict[Training, str] = {}
        place = {run: index for index, run in enumerate(self.runs)}
        starts = {run: run.step for run in self.runs}
        began = time.perf_counter()

        def end(run: Training, status: str) -> None:
            statuses[run] = status
            if run in self.held:
                with contextlib.suppress(RunError):  # of a full disk, whose runs say so when they are read
                    assert run.writer is not None
                    run.writer.set_status(status)
                self.held[run].close()
            if on_end:
                on_end(place[run], status)

        with ctrl_c() as interrupted:
            new = [run for run in self.runs if not run.rows]
            bad = self._unhealthy(new, [run.observing() for run in new])
            active = list(self.runs)
            buffers: Buffers | None = None
            while True:
                for run in list(active):
                    try:
                        status = run.failed() if run in bad else "finished" if run.pause(False) else None
                    except RunError as error:
                        status = f"failed: {error}"
                    if status is not None:
                        end(run, status)
                        active.remove(run)
                if interrupted.is_set():
                    self._interrupt(active)
                if not active:
                    return statuses
                if buffers is None or buffers.runs != active:
                    buffers = Buffers(active)
                bad = self.update(buffers)
                well = [run for run in active if run not in bad]
                for run in well:
                    run.step += 1
                bad |= self._unhealthy(well, [run.observing() for run in well])
                for run in active if on_progress else ():
                    if run.progress_due and on_progress:
                        on_progress(place[run], run.progress((run.step - starts[run]) / (time.perf_counter() - began)))

    def update(self, buffers: Buffers) -> set[Training]:
        """Take one step of every run; those that a measurement has found not finite stay, and are returned."""
        batches = [run.training_batch() for run in buffers.runs]
        self.engine.gradients(buffers.theta, batches, buffers.gradient, seeds=range(len(batches)))
        bad = self._unhealthy(
            buffers.runs, [run.looking_ahead(batch) for run, batch in zip(buffers.runs, batches, strict=True)]
        )
        buffers.clip()
        with contextlib.ExitStack() as around:
            for run in buffers.runs:
                if run not in bad:
                    around.enter_context(run.intervening())
            buffers.step()
        return bad

    def _unhealthy(self, runs: Sequence[Training], works: Sequence[Any]) -> set[Training]:
        healthy = carry_out(self.measuring, works)
        return {run for run, well in zip(runs, healthy, strict=True) if not well}

    def _interrupt(self, runs: Sequence[Training]) -> None:
        for run in runs:
            with contextlib.suppress(KeyboardInterrupt):
                run.pause(True)
        raise KeyboardInterrupt


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
