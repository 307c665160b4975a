"""A trainer of one run of a task, or of many at once, that measures as it goes."""

from grokcurv.training.config import PRESETS, TrainConfig
from grokcurv.training.network import build_model, load_model
from grokcurv.training.replays import replay_run
from grokcurv.training.trainer import TrainingError, train, train_ensemble

__all__ = [
    "PRESETS",
    "TrainConfig",
    "TrainingError",
    "build_model",
    "load_model",
    "replay_run",
    "train",
    "train_ensemble",
]
