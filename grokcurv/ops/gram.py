"""Inner products of rows, segment by segment: csrc/include/grokcurv/gram.h."""

from __future__ import annotations

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, Array, check, count_segments, spans_within
from grokcurv.ops._dispatch import TYPES, call, define


def gram(x: Array, y: Array | None = None, *, origin: Array | None = None, segments: Array | None = None) -> Tensor:
    """``(x_i - origin) . (y_j - origin)`` by segment: (S, n, m) float64 from x (n, P), y (m, P) or x, origin (P,) or 0.

    segments (S, 2) int64; without them S = 1 and the sum is over all P. An entry's bits depend on its two rows (and the
    origin) alone, so a Gram matrix grown row by row equals one computed at once; with y = None it is symmetric. A row
    is read once (on a GPU once for every 32 rows of the other side).
    """
    return _gram(x, y, origin, segments)


def _gram_fake(x: Tensor, y: Tensor | None, origin: Tensor | None, segments: Tensor | None) -> Tensor:
    check("x", x, FLOATS, ("n", "P"))
    n, p = x.shape
    if y is not None:
        check("y", y, x.dtype, ("m", p), x)
    if origin is not None:
        check("origin", origin, x.dtype, (p,), x)
    return x.new_empty((count_segments(segments), n, n if y is None else y.shape[0]), dtype=torch.float64)


def _gram_fill(x: Tensor, y: Tensor | None, origin: Tensor | None, segments: Tensor | None, out: Tensor) -> None:
    """Have the kernel write what :func:`gram` returns into ``out``; the arguments have been checked."""
    n, p = x.shape
    segments = spans_within(segments, p)
    call("gram", x, TYPES[x.dtype], n, out.shape[2], p, x, y, origin, segments, len(segments), out)


_gram = define("gram", _gram_fake, _gram_fill)
