"""What random integers are drawn for, and random orders, of many runs at once and without a state."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from grokcurv import ops


class Purpose(IntEnum):
    """What numbers are for: the ``purpose`` of :func:`grokcurv.ops.draw`, each with random numbers of its own.

    A member keeps its number: another one would give every run other batches. A sketch draws for 0 and 1.
    """

    SPLIT = 2
    """Which samples are trained on."""
    TRAINING = 3
    """Batches that are trained on."""
    MEASUREMENT = 4
    """Batches that are measured with."""
    INTERVENTION = 5
    """What interventions choose at random."""
    HESSIAN = 6
    """Probes of a Hessian."""


def shuffle(seeds: Tensor, purpose: int, n: int) -> Tensor:
    """A random order of range(n) for each run: (R, n) int64, from seeds (R,) int64, on their device.

    It is the stable argsort of 64-bit draws of step 0. Orders are equally likely but for draws that coincide, which a
    run of n has with a probability of at most ``n^2 / 2**65`` (a sum over pairs): 6e-13 for n = 4704.

    Raises:
        ValueError: n is negative or above 2**33, or what :func:`grokcurv.ops.draw` raises for seeds and purpose.
    """
    if not 0 <= n <= 2**33:
        raise ValueError(f"n must lie in 0..2**33, got {n}")
    zeros = torch.zeros_like(seeds)
    return ops.draw(seeds, purpose, zeros, zeros, n).argsort(dim=1, stable=True)
