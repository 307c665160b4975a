"""Training on modular arithmetic: the tasks, the networks, and a trainer that measures as it goes."""

from grokcurv.modular.config import PRESETS, TrainConfig
from grokcurv.modular.model import MLP, Transformer
from grokcurv.modular.network import build_model, load_model
from grokcurv.modular.tasks import OPERATIONS, Dataset, Operation, split, table
from grokcurv.modular.trainer import TrainingError, train, train_ensemble

__all__ = [
    "MLP",
    "OPERATIONS",
    "PRESETS",
    "Dataset",
    "Operation",
    "TrainConfig",
    "TrainingError",
    "Transformer",
    "build_model",
    "load_model",
    "split",
    "table",
    "train",
    "train_ensemble",
]
