"""The numbers of commutators, in one pass over four gradients: csrc/include/grokcurv/commutator.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, Array, check, check_basis, check_row_values, check_spans, check_table
from grokcurv.ops._dispatch import TYPES, call, define, strided
from grokcurv.reference import SUMS, THETA_SUMS, Commutator, Form, compute_type


def commutator(
    g_a: Array,
    g_b: Array,
    a2: Array,
    b2: Array,
    eta: Array,
    *,
    form: Form = "difference",
    theta: Array | None = None,
    values: Array | None = None,
    rows: Array | None = None,
    segments: Array | None = None,
    keep_delta: bool = False,
) -> Commutator:
    """Norms, inner products, coefficients and segment energies of N commutators, in a pass over four gradients (N, P).

    :func:`grokcurv.reference.commutator` defines every number. eta (N,) float64; theta, (P,) for all or (N, P), adds
    the rounding terms (difference form only); values, (nnz,) for all or (N, nnz), float32 (float64 with float64
    vectors), and rows (K, 3) int64 are a block-sparse basis; segments (S, 2) int64. ``delta`` is written out, in
    float32 (float64 with float64 vectors), only if ``keep_delta``.
    """
    return Commutator(*_commutator(g_a, g_b, a2, b2, eta, theta, values, rows, segments, form, keep_delta))


def _commutator_fake(
    g_a: Tensor,
    g_b: Tensor,
    a2: Tensor,
    b2: Tensor,
    eta: Tensor,
    theta: Tensor | None,
    values: Tensor | None,
    rows: Tensor | None,
    segments: Tensor | None,
    form: str,
    keep_delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check("g_a", g_a, FLOATS, ("N", "P"))
    n, p = g_a.shape
    for name, t in (("g_b", g_b), ("a2", a2), ("b2", b2)):
        check(name, t, g_a.dtype, (n, p), g_a)
    check("eta", eta, torch.float64, (n,), g_a)
    if form not in ("difference", "bracket"):
        raise ValueError(f"form must be 'difference' or 'bracket', got {form!r}")
    if theta is not None:
        if form == "bracket":
            raise ValueError("theta belongs to form='difference': the bracket rounds no parameters; pass theta=None")
        check("theta", theta, g_a.dtype, (p,), g_a, rows=n)
    if (values is None) != (rows is None):
        raise ValueError("values and rows make the basis together: pass both or neither")
    if values is not None and rows is not None:
        check_basis(values, rows, g_a)
    if segments is not None:
        check_table("segments", segments, ("S", 2))

    def sums(columns: int) -> Tensor:
        return g_a.new_empty((n, columns), dtype=torch.float64)

    return (
        sums(len(SUMS) + (len(THETA_SUMS) if theta is not None else 0)),
        sums(0 if rows is None else rows.shape[0]),
        sums(0 if segments is None else segments.shape[0]),
        g_a.new_empty((n if keep_delta else 0, p), dtype=compute_type(g_a.dtype)),
    )


def _commutator_fill(*task: Any) -> None:
    """``task`` is what :func:`_commutator_fake` takes, and then what it returns."""
    g_a, g_b, a2, b2, eta, theta, values, rows, segments, form, keep_delta, *outputs = task
    sums, coefficients, energies, delta = outputs
    n, p = g_a.shape
    if values is not None:
        check_row_values(values, rows, p)
    if segments is not None:
        check_spans("segments", segments, p)
    basis = *strided(values), rows, coefficients.shape[1]
    given = g_a, g_b, a2, b2, eta, *strided(theta), *basis, segments, energies.shape[1]
    written = sums, coefficients, energies, delta if keep_delta else None
    call("commutator", g_a, TYPES[g_a.dtype], n, p, form == "bracket", *given, *written)


_commutator = define("commutator", _commutator_fake, _commutator_fill)
