"""The task and the network that a run's settings describe."""

from __future__ import annotations

from torch import nn

from grokcurv.runs import Run
from grokcurv.storage import RunError
from grokcurv.tasks.base import Task
from grokcurv.tasks.modular.task import ModularArithmetic
from grokcurv.training.config import TrainConfig


def task_of(config: TrainConfig) -> Task:
    """What a run learns."""
    return ModularArithmetic(config)


def build_model(config: TrainConfig, seed: int | None = None) -> nn.Module:
    """The network of ``config`` on the CPU, its weights drawn from ``torch.manual_seed(seed)`` (default: the config's).

    The global generator is left as it was.
    """
    return task_of(config).model(config.seed if seed is None else seed)


def load_model(run: Run, step: int | None = None) -> nn.Module:
    """The network of a run folder, on the CPU: at its latest checkpoint, or at a step among its snapshots.

    Raises:
        RunError: there is no such checkpoint or snapshot, it is damaged, or the settings are not those of its network.
    """
    weights = run.checkpoint() if step is None else {"model": run.snapshot(step)}
    try:
        model = build_model(TrainConfig(**run.config))
        model.load_state_dict(weights["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{run.path}: its settings and its weights are not those of one network: {error}") from error
    return model
