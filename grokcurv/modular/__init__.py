"""Where ``grokcurv.training`` and ``grokcurv.tasks`` were: names and modules can still be imported from here."""

import sys
from importlib import import_module

from grokcurv.tasks import MLP, OPERATIONS, Dataset, Operation, Transformer, split, table
from grokcurv.training import PRESETS, TrainConfig, TrainingError, build_model, load_model, train, train_ensemble

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

_MOVED = {
    **{name: f"grokcurv.tasks.modular.{name}" for name in ("fast", "fourier", "model")},
    **{name: f"grokcurv.training.{name}" for name in ("config", "draws", "network", "process", "trainer")},
    "tasks": "grokcurv.tasks.modular.operations",
}
for _old, _new in _MOVED.items():
    globals()[_old] = sys.modules[f"{__name__}.{_old}"] = import_module(_new)
