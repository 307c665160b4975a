"""What is compared: cases, and in each the implementations that answer the same question about the same input."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

OURS = "grokcurv"

PEERS = {
    "curvlinops": "curvlinops-for-pytorch",
    "hessian_eigenthings": "hessian-eigenthings",
    "pyhessian": "pyhessian",
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "torchdr": "torchdr",
}
"""What implementations import that grokcurv does not need, and the package that brings it."""


@dataclass(frozen=True)
class Implementation:
    """One way to the answer.

    Attributes:
        name: as the tables have it.
        run: one call, which is timed.
        result: what is checked, if not what ``run`` returns.
        note: in what it differs: it approximates, does less, or does more.
        needs: keys of :data:`PEERS`; imported by ``run`` itself.
        times: how often the time of a call counts, where a call does a part, or a multiple, of the work.
    """

    name: str
    run: Callable[[], Any]
    result: Callable[[], Any] | None = None
    note: str = ""
    needs: tuple[str, ...] = ()
    times: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """A case with its input drawn.

    Attributes:
        implementations: grokcurv first.
        errors: by name of the quantity, how far a result is from float64 truth; a result of None is no answer, and NaN
            off.
        tolerance: of grokcurv's error in the first quantity; beyond it the case is wrong, and is not timed.
        moved: bytes that must be read or written.
        flops, flops64: operations that must be done, in float32 and in float64; a fused multiply-add is two.
    """

    implementations: tuple[Implementation, ...]
    errors: Mapping[str, Callable[[Any], float]]
    tolerance: float
    moved: int = 0
    flops: int = 0
    flops64: int = 0

    @property
    def work(self) -> dict[str, int]:
        """What must be done, as ``bench.json`` calls it."""
        return {"bytes": self.moved, "flops_float32": self.flops, "flops_float64": self.flops64}


@dataclass(frozen=True)
class Case:
    """A question at one size.

    Attributes:
        name: short, the same at every size.
        title: with the size, in words.
        memory: bytes that the input and the hungriest implementation take, about.
        build: draws the input from a generator, and works out the truth.
    """

    name: str
    title: str
    memory: int
    build: Callable[[torch.Generator], Comparison]


def relative(got: Any, truth: Any) -> float:
    """``|got - truth| / |truth|`` in float64, over all tensors of a result together."""
    x, y = (torch.cat([part.double().flatten() for part in tree_leaves(result)]) for result in (got, truth))
    return float((x - y).norm() / y.norm())


def worst(got: Tensor, truth: Tensor) -> float:
    """Largest relative difference of single numbers, on the device of the truth, which is float64."""
    return float(((got.to(truth) - truth) / truth).abs().max())
