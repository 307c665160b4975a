"""What the studies share: batches, losses, shares of measurements that are right, tables, counts of operators."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DOCS = Path(__file__).parents[1] / "docs"

Batch = tuple[Tensor, Tensor]
Pair = tuple[Batch, Batch]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def take(data: Batch, index: Tensor) -> Batch:
    """The samples of an index (n,)."""
    return data[0][index], data[1][index]


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def stable_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy, every derivative of which has its digits however confident the model is.

    With t the largest logit of a sample, the loss is ``log1p(sum over j != t of exp(z_j - z_t)) + z_t - z_y``: nothing
    is subtracted from one, neither here nor in what autograd makes of it. Where y is t, the last two terms are told to
    have no derivative: 1 - 1 would take the digits of the sum along.
    """
    top = logits.detach().argmax(1, keepdim=True)
    behind = logits - logits.gather(1, top)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(1, top, False)
    tail = behind[others].unflatten(0, (len(logits), -1)).exp().sum(1).log1p()
    wrong = labels[:, None] != top
    return (tail - (behind.gather(1, labels[:, None]) * wrong)[:, 0]).mean()


def shares(rows: pd.DataFrame) -> dict[str, Any]:
    """How right measurements are, of which the truth is known: relative errors of the reliable ones, and floors.

    Args:
        rows: with ``reliable``, the ``relative`` error of the defect, and the ``error`` to which ``noise_floor`` is a
            bound; where one of these two is not finite, the floor says nothing.
    """
    reliable = rows[rows["reliable"]]
    finite = np.isfinite(rows["noise_floor"]) & np.isfinite(rows["error"])
    below = rows["error"] <= rows["noise_floor"]
    return {
        "reliable": len(reliable),
        "within 1 %": (reliable["relative"] <= 0.01).mean(),
        "within 10 %": (reliable["relative"] <= 0.1).mean(),
        "worst": reliable["relative"].max(),
        "below floor": below[finite & rows["reliable"]].mean(),
        "below floor, of all": below[finite].mean(),
    }


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """In Markdown."""
    header = list(titles)
    lines = ["|".join(f" {cell} " if cell != "" else " " for cell in line) for line in (header, *rows)]
    lines.insert(1, "|".join(["---"] * len(header)))
    return "\n".join(f"|{line}|" for line in lines)


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched while it is entered, and the bytes that they read and write.

    An operator counts unless it is a view: unless its schema returns an alias that is not written. It is a launch
    unless it does no more than allocate; bytes are those of all inputs and outputs of every launch, each once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.count += 1
            if "empty" not in func.__name__:
                tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
                self.launches += 1
                self.bytes += sum(x.nbytes for x in tensors.values())
        return result
