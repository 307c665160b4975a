"""Random integers without a state: csrc/include/grokcurv/draw.h."""

from __future__ import annotations

import torch
from torch import Tensor

from grokcurv.ops._arguments import Array, check
from grokcurv.ops._dispatch import call, define


def draw(seeds: Array, purpose: int, steps: Array, n: Array, rows: int) -> Tensor:
    """Random integers that are a function of seed, purpose, step and place alone: (R, rows) int64.

    Entry (r, i) is uniform on [0, n_r), exactly: :func:`grokcurv.reference.draw` defines it. So runs do not depend on
    one another, a step can be drawn again, and fewer rows are the beginning of more.

    Args:
        seeds: (R,) int64, any bits: the run's key of Philox4x32-10.
        purpose: what the numbers are for, 0 to 2**32 - 1; of different purposes they are independent. A sketch of the
            same seed uses 0 and 1.
        steps: (R,) int64, 0 to 2**32 - 1; of different steps they are independent, too.
        n: (R,) int64, 0 to 2**32; 0 stands for 2**64, all bits of an int64.
        rows: 0 to 2**33.

    The three tensors are on one device. A GPU's are not looked at by the host, so that a captured CUDA graph draws for
    the steps that they hold when it is replayed: there a number out of its range is no error, and what is drawn for
    that run is not specified.
    """
    return _draw(seeds, purpose, steps, n, rows)


def _draw_fake(seeds: Tensor, purpose: int, steps: Tensor, n: Tensor, rows: int) -> Tensor:
    check("seeds", seeds, torch.int64, ("R",))
    for name, x in (("steps", steps), ("n", n)):
        check(name, x, torch.int64, (seeds.shape[0],), seeds)
    if not 0 <= purpose < 2**32:
        raise ValueError(f"purpose must lie in 0..2**32 - 1, got {purpose}")
    if not 0 <= rows <= 2**33:
        raise ValueError(f"rows must lie in 0..2**33, got {rows}")
    return seeds.new_empty((seeds.shape[0], rows))


def _draw_fill(seeds: Tensor, purpose: int, steps: Tensor, n: Tensor, rows: int, out: Tensor) -> None:
    """Have the kernel write what :func:`draw` returns into ``out``; the arguments have been checked."""
    if seeds.device.type == "cpu":
        for name, x, most in (("steps", steps, 2**32 - 1), ("n", n, 2**32)):
            for r, value in enumerate(x.tolist()):
                if not 0 <= value <= most:
                    raise ValueError(f"{name}[{r}] must lie in 0..{most}, got {value}")
    call("draw", seeds, *out.shape, purpose, seeds, steps, n, out)


_draw = define("draw", _draw_fake, _draw_fill)
