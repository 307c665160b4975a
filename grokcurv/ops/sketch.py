"""A random projection that keeps inner products: csrc/include/grokcurv/sketch.h."""

from __future__ import annotations

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, Array, check
from grokcurv.ops._dispatch import TYPES, call, define


def sketch(x: Array, size: int, seed: int, *, start: int = 0) -> Tensor:
    """A random projection of x (n, P) onto ``size`` dimensions that nearly keeps inner products: (n, size) float64.

    A count sketch: :func:`grokcurv.reference.sketch` defines it and bounds its error. size is a power of two, 64 to
    2**20; seed, 0 to 2**63 - 1, is all that is stored of the projection. ``start``, 0 to 2**62 - 1, is the number of
    the first coordinate: the sketches of shards that begin where they do in the whole add up to its sketch.
    """
    return _sketch(x, size, seed, start)


def _sketch_fake(x: Tensor, size: int, seed: int, start: int) -> Tensor:
    check("x", x, FLOATS, ("n", "P"))
    if not 64 <= size <= 2**20 or size & (size - 1):
        raise ValueError(f"size must be a power of two from 64 to 2**20, got {size}")
    if seed < 0:
        raise ValueError(f"seed must lie in 0..2**63 - 1, got {seed}")
    if not 0 <= start < 2**62:
        raise ValueError(f"start must lie in 0..2**62 - 1, got {start}")
    return x.new_empty((x.shape[0], size), dtype=torch.float64)


def _sketch_fill(x: Tensor, size: int, seed: int, start: int, out: Tensor) -> None:
    call("sketch", x, TYPES[x.dtype], *x.shape, size, seed, start, x, out)


_sketch = define("sketch", _sketch_fake, _sketch_fill)
