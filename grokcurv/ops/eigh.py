"""Leading eigenpairs of small symmetric matrices: csrc/include/grokcurv/eigh.h."""

from __future__ import annotations

import torch
from torch import Tensor

from grokcurv.ops._arguments import Array, check
from grokcurv.ops._dispatch import call, define


def eigh(a: Array, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of symmetric a (B, n, n) float64: values (B, k), descending, and vectors (B, n, k).

    Only the upper triangles are read. Of each vector the entry of largest magnitude is positive. Householder
    reflections make a matrix tridiagonal; then, on a GPU or for k <= n / 4, multisection finds the k values and inverse
    iteration their vectors. On the CPU implicit QL solves for all where k is larger, or should a residual stay above
    rounding. Values and ``|a v - w v|`` are right to a few ``n eps |a|``, vectors orthonormal to a few ``n eps``. A
    matrix with a NaN or an infinity yields NaN and harms no other.
    """
    return _eigh(a, k)


def _eigh_fake(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    check("a", a, torch.float64, ("B", "n", "n"))
    batch, n, m = a.shape
    if n != m:
        raise ValueError(f"a must have shape (B, n, n), got {tuple(a.shape)}")
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in 0..n = {n}, got {k}")
    return a.new_empty((batch, k)), a.new_empty((batch, n, k))


def _eigh_fill(a: Tensor, k: int, values: Tensor, vectors: Tensor) -> None:
    call("eigh", a, *a.shape[:2], k, a, values, vectors)


_eigh = define("eigh", _eigh_fake, _eigh_fill)
