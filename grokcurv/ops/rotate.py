"""Linear combinations of rows, beside them or over them: csrc/include/grokcurv/rotate.h."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, A, Array, check, count_segments, spans_within
from grokcurv.ops._dispatch import TYPES, call, define
from grokcurv.reference import compute_type


def rotate(rows: Array, coefficients: Array, *, segments: Array | None = None) -> Tensor:
    """Linear combinations ``sum_i coefficients[s, j, i] rows[i]`` over each segment s, zero elsewhere.

    rows (m, P), coefficients (S, q, m) float64, segments (S, 2) int64, disjoint; without them S = 1 and all P. Returns
    (q, P), float64 for float64 rows, else float32: float64 terms in the order of the rows, rounded once. On the CPU
    bitwise equal to :func:`grokcurv.reference.rotate`; on a GPU a product is not rounded before it is added. A NaN in
    a row reaches every output, coefficient 0 or not.
    """
    return _rotate(rows, coefficients, segments)


def rotate_(
    rows: A,
    coefficients: Array,
    *,
    segments: Array | None = None,
    mean: Array | None = None,
    weights: Array | None = None,
) -> A:
    """:func:`rotate` written over the first q <= m rows, in their dtype, with no second buffer of P; returns rows.

    With ``mean`` (P,) and ``weights`` (m,), both float64, ``mean += sum_i weights[i] rows[i]`` of the old rows,
    in the same pass. Coordinates outside the segments stay as they are, in the rows and in the mean.
    """
    _rotate_(rows, coefficients, segments, mean, weights)
    return rows


def _check_inputs(rows: Tensor, coefficients: Tensor, segments: Tensor | None) -> None:
    check("rows", rows, FLOATS, ("m", "P"))
    check("coefficients", coefficients, torch.float64, (count_segments(segments), "q", rows.shape[0]), rows)


def _rotate_fake(rows: Tensor, coefficients: Tensor, segments: Tensor | None) -> Tensor:
    _check_inputs(rows, coefficients, segments)
    return rows.new_empty((coefficients.shape[1], rows.shape[1]), dtype=compute_type(rows.dtype))


def _rotate_fill(rows: Tensor, coefficients: Tensor, segments: Tensor | None, out: Tensor) -> None:
    """Have the kernel write what :func:`rotate` returns into ``out``; the arguments have been checked."""
    segments = _disjoint(segments, rows.shape[1])
    if int(segments[:, 1].sum()) < rows.shape[1]:
        out.zero_()
    _call(rows, coefficients, segments, out, None, None)


def _rotate_in_place_fake(
    rows: Tensor, coefficients: Tensor, segments: Tensor | None, mean: Tensor | None, weights: Tensor | None
) -> None:
    _check_inputs(rows, coefficients, segments)
    if coefficients.shape[1] > rows.shape[0]:
        raise ValueError(f"coefficients make {coefficients.shape[1]} rows, which do not fit over {rows.shape[0]}")
    if (mean is None) != (weights is None):
        raise ValueError("mean and weights belong together: pass both or neither")
    if mean is not None and weights is not None:
        check("mean", mean, torch.float64, (rows.shape[1],), rows)
        check("weights", weights, torch.float64, (rows.shape[0],), rows)


def _rotate_in_place_fill(
    rows: Tensor, coefficients: Tensor, segments: Tensor | None, mean: Tensor | None, weights: Tensor | None
) -> None:
    """Have the kernel rotate ``rows`` where they are; the arguments have been checked."""
    _call(rows, coefficients, _disjoint(segments, rows.shape[1]), None, mean, weights)


def _call(rows: Tensor, coefficients: Tensor, segments: Tensor, *targets: Tensor | None) -> None:
    """``targets`` are out, mean and weights."""
    sizes = rows.shape[0], coefficients.shape[1], rows.shape[1]
    call("rotate", rows, TYPES[rows.dtype], *sizes, rows, coefficients, segments, len(segments), *targets)


def _disjoint(segments: Tensor | None, size: int) -> Tensor:
    """The segments, or the one of all coordinates; raises if one leaves them or two share one."""
    segments = spans_within(segments, size)
    spans = sorted((start, start + length, j) for j, (start, length) in enumerate(segments.tolist()) if length)
    for (_, stop, i), (start, _, j) in pairwise(spans):
        if start < stop:
            raise ValueError(f"segments[{i}] and segments[{j}] overlap: make them disjoint")
    return segments


_rotate = define("rotate", _rotate_fake, _rotate_fill)
_rotate_ = define("rotate_", _rotate_in_place_fake, _rotate_in_place_fill, ("rows", "mean"))
