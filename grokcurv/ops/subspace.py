"""Vectors split by, and filtered through, a block-sparse basis: csrc/include/grokcurv/subspace.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grokcurv.ops._arguments import (
    FLOATS,
    A,
    Array,
    as_number,
    as_tensor,
    as_writable,
    check,
    check_apart,
    check_basis,
    check_row_values,
)
from grokcurv.ops._dispatch import TYPES, bump_version, call, define, strided


def subspace_split(v: Array, values: Array, rows: Array) -> tuple[Tensor, Tensor]:
    """``|v_i|^2`` (N,) and the coefficients ``b_j . v_i`` (N, K), float64, of v (N, P) on a block-sparse basis.

    Its values are (nnz,) for all vectors, or (N, nnz); its rows (K, 3) they share.
    """
    return _subspace_split(as_tensor("v", v), as_tensor("values", values), as_tensor("rows", rows))


def _subspace_split_fake(v: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    check("v", v, FLOATS, ("N", "P"))
    check_basis(values, rows, v)
    n = v.shape[0]
    return v.new_empty((n,), dtype=torch.float64), v.new_empty((n, rows.shape[0]), dtype=torch.float64)


def _subspace_split_run(v: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    norm2, coefficients = _subspace_split_fake(v, values, rows)
    (n, p), k = v.shape, len(rows)
    check_row_values(values, rows, p)
    call("subspace_split", v, TYPES[v.dtype], n, p, v, *strided(values), rows, k, norm2, coefficients)
    return norm2, coefficients


def subspace_filter_(g: A, values: Array, rows: Array, strength: float) -> A:
    """``g <- g_par + (1 - strength) g_perp`` in place, for g (N, P) and an orthonormal block-sparse basis; returns g.

    Its values are (nnz,) for all vectors, or (N, nnz); its rows (K, 3) they share. Coefficients and the new coordinates
    are formed in float64 and rounded once, to the dtype of g.
    """
    basis = as_tensor("values", values), as_tensor("rows", rows)
    _subspace_filter_(as_writable("g", g), *basis, as_number("strength", strength))
    return g


def _subspace_filter_fake(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> None:
    check("g", g, FLOATS, ("N", "P"))
    check_basis(values, rows, g)
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")


def _subspace_filter_run(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> None:
    _subspace_filter_fake(g, values, rows, strength)
    check_apart("g", g, values=values, rows=rows)
    _, coefficients = _subspace_split_run(g, values, rows)
    basis = *strided(values), rows, len(rows)
    call("subspace_filter", g, TYPES[g.dtype], *g.shape, g, *basis, coefficients, strength)
    bump_version(g)


_subspace_split = define("subspace_split", _subspace_split_run, _subspace_split_fake)
_subspace_filter_ = define("subspace_filter_", _subspace_filter_run, _subspace_filter_fake, ("g",))
