"""Inner products of rows, segment by segment: csrc/include/grokcurv/gram.h."""

from __future__ import annotations

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, Array, as_optional, as_tensor, check, check_table, spans_within
from grokcurv.ops._dispatch import TYPES, call, define


def gram(x: Array, y: Array | None = None, *, origin: Array | None = None, segments: Array | None = None) -> Tensor:
    """``(x_i - origin) . (y_j - origin)`` by segment: (S, n, m) float64 from x (n, P), y (m, P) or x, origin (P,) or 0.

    segments (S, 2) int64; without them S = 1 and the sum is over all P. An entry's bits depend on its two rows (and the
    origin) alone, so a Gram matrix grown row by row equals one computed at once; with y = None it is symmetric. A row
    is read once (on a GPU once for every 32 rows of the other side).
    """
    optional = [as_optional(name, t) for name, t in (("y", y), ("origin", origin), ("segments", segments))]
    return _gram(as_tensor("x", x), *optional)


def _gram_fake(x: Tensor, y: Tensor | None, origin: Tensor | None, segments: Tensor | None) -> Tensor:
    check("x", x, FLOATS, ("n", "P"))
    n, p = x.shape
    if y is not None:
        check("y", y, x.dtype, ("m", p), x)
    if origin is not None:
        check("origin", origin, x.dtype, (p,), x)
    if segments is not None:
        check_table("segments", segments, ("S", 2))
    count = 1 if segments is None else segments.shape[0]
    return x.new_empty((count, n, n if y is None else y.shape[0]), dtype=torch.float64)


def _gram_run(x: Tensor, y: Tensor | None, origin: Tensor | None, segments: Tensor | None) -> Tensor:
    out = _gram_fake(x, y, origin, segments)
    n, p = x.shape
    segments = spans_within(segments, p)
    call("gram", x, TYPES[x.dtype], n, out.shape[2], p, x, y, origin, segments, len(segments), out)
    return out


_gram = define("gram", _gram_run, _gram_fake)
