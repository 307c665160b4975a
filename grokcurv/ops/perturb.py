"""Points past steps from parameter vectors: csrc/include/grokcurv/perturb.h."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from grokcurv.ops._arguments import FLOATS, A, Array, check
from grokcurv.ops._dispatch import TYPES, call, define, strided


@overload
def perturb(theta: Array, directions: Array, eta: Array, *, out: None = None) -> Tensor: ...
@overload
def perturb(theta: Array, directions: Array, eta: Array, *, out: A) -> A: ...
def perturb(theta: Array, directions: Array, eta: Array, *, out: Array | None = None) -> Array:
    """Parameters after a step along each of N directions, ``theta_i - eta_i d_i``, in one pass over memory.

    theta (N, P), directions (N, P), eta (N,) float64. theta (P,) is the same for all, and read once. Returns (N, P) in
    the dtype of theta, bitwise equal to :func:`grokcurv.reference.perturb`; ``out``, if given, filled.
    """
    if out is None:
        return _perturb(theta, directions, eta)
    _perturb_out(theta, directions, eta, out)
    return out


def _check_inputs(theta: Tensor, directions: Tensor, eta: Tensor) -> None:
    check("theta", theta, FLOATS, ("P",), rows="N")
    check("directions", directions, theta.dtype, ("N", theta.shape[-1]), theta)
    n, p = directions.shape
    if theta.dim() == 2:
        check("theta", theta, FLOATS, (p,), rows=n)
    check("eta", eta, torch.float64, (n,), theta)


def _perturb_fake(theta: Tensor, directions: Tensor, eta: Tensor) -> Tensor:
    _check_inputs(theta, directions, eta)
    return torch.empty_like(directions)


def _perturb_out_fake(theta: Tensor, directions: Tensor, eta: Tensor, out: Tensor) -> None:
    _check_inputs(theta, directions, eta)
    check("out", out, theta.dtype, tuple(directions.shape), theta)


def _fill(theta: Tensor, directions: Tensor, eta: Tensor, out: Tensor) -> None:
    call("perturb", theta, TYPES[theta.dtype], *directions.shape, *strided(theta), directions, eta, out)


_perturb = define("perturb", _perturb_fake, _fill)
_perturb_out = define("perturb_out", _perturb_out_fake, _fill, ("out",))
