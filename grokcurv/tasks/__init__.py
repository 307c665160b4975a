"""What the trainer can learn: :class:`Task`, and the tasks that there are, of which modular arithmetic is the first."""

from grokcurv.tasks.base import Batch, Dataset, Task
from grokcurv.tasks.modular.model import MLP, Transformer
from grokcurv.tasks.modular.operations import OPERATIONS, Operation, split, table
from grokcurv.tasks.modular.task import ModularArithmetic

__all__ = [
    "MLP",
    "OPERATIONS",
    "Batch",
    "Dataset",
    "ModularArithmetic",
    "Operation",
    "Task",
    "Transformer",
    "split",
    "table",
]
