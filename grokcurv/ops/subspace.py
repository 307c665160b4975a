"""Vectors split by, and filtered through, a block-sparse basis: csrc/include/grokcurv/subspace.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, A, Array, check, check_basis, check_row_values
from grokcurv.ops._dispatch import TYPES, call, define, strided


def subspace_split(v: Array, values: Array, rows: Array) -> tuple[Tensor, Tensor]:
    """``|v_i|^2`` (N,) and the coefficients ``b_j . v_i`` (N, K), float64, of v (N, P) on a block-sparse basis.

    Its values are (nnz,) for all vectors, or (N, nnz); its rows (K, 3) they share.
    """
    return _subspace_split(v, values, rows)


def _subspace_split_fake(v: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    check("v", v, FLOATS, ("N", "P"))
    check_basis(values, rows, v)
    n = v.shape[0]
    return v.new_empty((n,), dtype=torch.float64), v.new_empty((n, rows.shape[0]), dtype=torch.float64)


def _subspace_split_fill(v: Tensor, values: Tensor, rows: Tensor, norm2: Tensor | None, coefficients: Tensor) -> None:
    """Have the kernel write what :func:`subspace_split` returns; the arguments have been checked."""
    check_row_values(values, rows, v.shape[1])
    basis = *strided(values), rows, rows.shape[0]
    call("subspace_split", v, TYPES[v.dtype], *v.shape, v, *basis, norm2, coefficients)


def subspace_filter_(g: A, values: Array, rows: Array, strength: float) -> A:
    """``g <- g_par + (1 - strength) g_perp`` in place, for g (N, P) and an orthonormal block-sparse basis; returns g.

    Its values are (nnz,) for all vectors, or (N, nnz); its rows (K, 3) they share. Coefficients and the new coordinates
    are formed in float64 and rounded once, to the dtype of g.
    """
    _subspace_filter_(g, values, rows, strength)
    return g


def _subspace_filter_fake(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> None:
    check("g", g, FLOATS, ("N", "P"))
    check_basis(values, rows, g)
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")


def _subspace_filter_fill(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> None:
    """Have the kernel filter ``g`` where it is; the arguments have been checked."""
    coefficients = g.new_empty((g.shape[0], rows.shape[0]), dtype=torch.float64)
    _subspace_split_fill(g, values, rows, None, coefficients)
    basis = *strided(values), rows, rows.shape[0]
    call("subspace_filter", g, TYPES[g.dtype], *g.shape, g, *basis, coefficients, strength)


_subspace_split = define("subspace_split", _subspace_split_fake, _subspace_split_fill)
_subspace_filter_ = define("subspace_filter_", _subspace_filter_fake, _subspace_filter_fill, ("g",))
