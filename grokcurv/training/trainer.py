"""Training of modular arithmetic, measured as it goes, that can be stopped and resumed at any instant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from grokcurv.gradients import Strategy
from grokcurv.runs import Run
from grokcurv.training.config import TrainConfig
from grokcurv.training.measured import MonitorFactory
from grokcurv.training.process import threads_of
from grokcurv.training.program import MEASURED_ALIKE, Program, ProgressOfRuns
from grokcurv.training.run import Training

SHARED = (
    *("p", "architecture", "layers", "d_model", "heads", "d_ff", "activation", "layer_norm", "sequence"),
    *("batch_size", "rng", "float64_logits", "successive", "device", "threads", "compile"),
)
"""Settings in which the runs of an ensemble must agree; all others are each run's own."""

Progress = Callable[[dict[str, Any]], object]


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
            the latest; None before the first), steps_per_second, grok_step (test accuracy 0.9) and
            settled_step (``grok_patience`` evaluations of ``grok_threshold``; None until then).

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
        if out is not None:
            training.enter(out, resume, stack)
        report: ProgressOfRuns | None = on_progress and (lambda _, latest: on_progress(latest))
        (status,) = Program([training], monitor=monitor).train(report)
        if training.error is not None:
            raise training.error
    run = training.result(status)
    if status != "finished":
        raise TrainingError(status.removeprefix("failed: "), run)
    return run


def train_ensemble(
    configs: Sequence[TrainConfig],
    *,
    outs: Sequence[str | PathLike[str]] | None = None,
    resume: bool = False,
    strategy: Strategy = "auto",
    on_progress: ProgressOfRuns | None = None,
    on_end: Callable[[int, str], object] | None = None,
) -> list[Run]:
    """Train several networks of one architecture together; each as :func:`grokcurv.training.train` would alone.

    With ``strategy="loop"`` every run is bitwise what it would be alone, provided that each parameter has a multiple of
    16 numbers (the last one aside), as in all presets: the CPU's matrix products depend on alignment. With ``"vmap"``
    the batched products round differently. Ctrl-C writes a checkpoint of every run and raises KeyboardInterrupt.

    Args:
        configs: the settings. They may differ in operation, seed, optimiser, learning rates, decay, betas, warm-up,
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
            several runs with the paper's draws; with ``vmap``, full batches of different sizes.
    """
    _check(configs, outs, resume)
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads_of(configs[0].threads))
        runs = [Training(config) for config in configs]
        for training, out in zip(runs, outs or (), strict=outs is not None):
            training.enter(out, resume, stack)
        statuses = Program(runs, strategy).train(on_progress, on_end)
    return [training.result(status) for training, status in zip(runs, statuses, strict=True)]


def together(one: TrainConfig, other: TrainConfig) -> bool:
    """Whether two runs are best trained as one program: they share an architecture, and are measured alike."""
    alike = all(getattr(one, name) == getattr(other, name) for name in (*SHARED, *MEASURED_ALIKE))
    return alike and one.rng != "paper"


def _check(configs: Sequence[TrainConfig], outs: Sequence[object] | None, resume: bool) -> None:
    """Raise a ValueError unless these runs can be trained as one program, each with a folder of its own if any has."""
    if not configs:
        raise ValueError("configs must hold at least one run")
    for name in SHARED:
        values = list(dict.fromkeys(getattr(config, name) for config in configs))
        if len(values) > 1:
            raise ValueError(f"the runs of an ensemble must agree in {name}; got {', '.join(map(repr, values))}")
    if configs[0].rng == "paper" and len(configs) > 1:
        raise ValueError(f"rng 'paper' has one stream for one run, which must be alone; got {len(configs)} runs")
    if outs is not None and len(outs) != len(configs):
        raise ValueError(f"outs must hold one folder for each of the {len(configs)} runs; got {len(outs)}")
    if resume and outs is None:
        raise ValueError("resume needs outs, the folders of the runs to go on with")
