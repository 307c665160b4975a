"""Modular arithmetic as tensors: the table of an operation modulo p, split into a training and a test set."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grokcurv.tasks.base import Dataset, Order


@dataclass(frozen=True)
class Operation:
    """A binary operation modulo p on int64 tensors."""

    formula: str
    apply: Callable[[Tensor, Tensor, int], Tensor]
    nonzero_a: bool = False
    nonzero_b: bool = False
    prime: bool = False
    """Whether the operation is defined for prime p alone."""

    def size(self, p: int) -> int:
        """Number of pairs in the table."""
        return (p - self.nonzero_a) * (p - self.nonzero_b)


def _divide(a: Tensor, b: Tensor, p: int) -> Tensor:
    inverse = torch.tensor([0] + [pow(i, -1, p) for i in range(1, p)])
    return a * inverse[b] % p


OPERATIONS: dict[str, Operation] = {
    "add": Operation("a + b", lambda a, b, p: (a + b) % p),
    "sub": Operation("a - b", lambda a, b, p: (a - b) % p),
    "mul": Operation("a * b, a and b not 0", lambda a, b, p: a * b % p, nonzero_a=True, nonzero_b=True),
    "x2_y2": Operation("a^2 + b^2", lambda a, b, p: (a**2 + b**2) % p),
    "x2_xy_y2": Operation("a^2 + a b + b^2", lambda a, b, p: (a**2 + a * b + b**2) % p),
    "x3_xy": Operation("a^3 + a b", lambda a, b, p: (a**3 + a * b) % p),
    "div": Operation("a / b, b not 0, p prime", _divide, nonzero_b=True, prime=True),
}
"""The six operations of the paper (Xu, arXiv 2602.16746, section 2), and division."""

LARGEST_P = 4096
"""The whole table lives in memory: p^2 rows."""


def check_operation(op: str, p: int) -> Operation:
    """The operation named ``op``, if it is defined modulo ``p``; otherwise a ValueError saying why not."""
    if op not in OPERATIONS:
        raise ValueError(f"op must be one of {', '.join(OPERATIONS)}; got {op!r}")
    if not 2 <= p <= LARGEST_P:
        raise ValueError(f"p must lie between 2 and {LARGEST_P}; got {p}")
    if OPERATIONS[op].prime and any(p % divisor == 0 for divisor in range(2, int(p**0.5) + 1)):
        raise ValueError(f"p must be prime for op {op!r}, because every b but 0 needs an inverse; got {p}")
    return OPERATIONS[op]


def table(op: str, p: int) -> tuple[Tensor, Tensor]:
    """All pairs of the operation in lexicographic order, (n, 2), and their answers, (n,); int64 on the CPU.

    Raises:
        ValueError: an unknown operation, or one that is not defined modulo ``p``.
    """
    operation = check_operation(op, p)
    a = torch.arange(int(operation.nonzero_a), p)
    b = torch.arange(int(operation.nonzero_b), p)
    pairs = torch.cartesian_prod(a, b)
    return pairs, operation.apply(pairs[:, 0], pairs[:, 1], p)


def split(op: str, p: int, train_fraction: float, order: Order) -> Dataset:
    """Shuffle the table and cut it: the first ``int(train_fraction * n)`` rows train, the others test.

    Args:
        order: what shuffles, or (n,) int64, the order itself. ``random.Random(seed)`` gives the paper's split for that
            seed.

    Raises:
        ValueError: as :func:`table`, or a fraction that leaves one of the sets empty.
    """
    pairs, answers = table(op, p)
    n = len(pairs)
    n_train = train_size(n, train_fraction)
    if isinstance(order, random.Random):
        rows = list(range(n))
        order.shuffle(rows)
        index = torch.tensor(rows)
    elif isinstance(order, torch.Generator):
        index = torch.randperm(n, generator=order)
    else:
        index = order
    train, test = index[:n_train], index[n_train:]
    return Dataset(pairs[train], answers[train], pairs[test], answers[test])


def train_size(n: int, train_fraction: float) -> int:
    """Rows of the training set out of ``n``; ValueError if that leaves the training or the test set empty."""
    n_train = int(train_fraction * n) if 0 < train_fraction < 1 else 0
    if not 0 < n_train < n:
        raise ValueError(f"train_fraction must leave both sets some of the {n} pairs; got {train_fraction}")
    return n_train
