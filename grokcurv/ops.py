"""The native ops, registered as ``torch.ops.grokcurv.*``: checks, one call, and what ``torch.compile`` needs to know.

:mod:`grokcurv.reference` defines each op; shapes and names are the same here. What holds for all of them:

* Vectors are float32, float64 or bfloat16; sums are float64. N, P, K and S may be 0.
* An argument is a tensor or any other :class:`Array`, whose memory is then used where it lies. Results are tensors;
  what an op writes into, ``out`` or in place, is returned as the object that was given.
* Every tensor is contiguous, on one device and requires no gradient (the ops have no derivative); outputs overlap no
  input. Anything else is a ``TypeError`` or ``ValueError`` that names the argument.
* Tables of indices (``segments``, ``rows``) are on the CPU wherever the vectors are: so they are checked before the
  launch, and a GPU is never waited for.
* Results are bitwise the same for any number of threads, any instruction set and any batching of the N vectors; on
  GPUs from run to run and for any GPU. Between CPU and GPU the order of sums differs.
* On a GPU work goes to the current stream; memory comes from torch's allocator; nothing waits, so that all of it can be
  captured in a CUDA graph.

Each op is written twice below: ``_<op>_fake`` checks what tensors say of themselves and allocates the outputs (all that
tracing needs), ``_<op>_run`` checks the values of tables too and has a core, ``_cpu`` or ``_cuda``, fill them in.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from grokcurv.reference import SUMS, THETA_SUMS, Commutator, Form, compute_type

try:
    from grokcurv import _cpu
except ImportError as error:
    raise ImportError(
        "grokcurv._cpu, the compiled core, does not load; docs/building.md says how to build it"
    ) from error

__all__ = [
    "Array",
    "commutator",
    "eigh",
    "gram",
    "perturb",
    "rotate",
    "rotate_",
    "sketch",
    "subspace_filter_",
    "subspace_split",
]

_TYPES = {torch.float32: _cpu.FLOAT32, torch.float64: _cpu.FLOAT64, torch.bfloat16: _cpu.BFLOAT16}
_FLOATS = tuple(_TYPES)

_library = torch.library.Library("grokcurv", "DEF")


class Array(Protocol):
    """A torch tensor, a NumPy array, or what else speaks DLPack: JAX, Arrow, CuPy."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


A = TypeVar("A", bound=Array)


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"grokcurv::{name}", fake, lib=_library)
    return cast(Callable[..., Any], getattr(torch.ops.grokcurv, name).default)


# -------------------------------------------------------------------------------------------------------------- perturb


@overload
def perturb(theta: Array, directions: Array, eta: Array, *, out: None = None) -> Tensor: ...
@overload
def perturb(theta: Array, directions: Array, eta: Array, *, out: A) -> A: ...
def perturb(theta: Array, directions: Array, eta: Array, *, out: Array | None = None) -> Array:
    """``theta - eta_i d_i`` for N directions, reading theta once: theta (P,), directions (N, P), eta (N,) float64.

    Returns (N, P) in the dtype of theta, bitwise equal to :func:`grokcurv.reference.perturb`; ``out``, if given,
    filled.
    """
    inputs = _tensor("theta", theta), _tensor("directions", directions), _tensor("eta", eta)
    if out is None:
        return cast(Tensor, _perturb(*inputs))
    _perturb_out(*inputs, _writable("out", out))
    return out


def _perturb_fake(theta: Tensor, directions: Tensor, eta: Tensor) -> Tensor:
    _check("theta", theta, _FLOATS, ("P",))
    _check("directions", directions, theta.dtype, ("N", theta.shape[0]), theta)
    _check("eta", eta, torch.float64, (directions.shape[0],), theta)
    return torch.empty_like(directions)


def _perturb_run(theta: Tensor, directions: Tensor, eta: Tensor) -> Tensor:
    out = _perturb_fake(theta, directions, eta)
    _call("perturb", theta, _TYPES[theta.dtype], *directions.shape, theta, directions, eta, out)
    return out


def _perturb_out_fake(theta: Tensor, directions: Tensor, eta: Tensor, out: Tensor) -> None:
    _perturb_fake(theta, directions, eta)
    _check("out", out, theta.dtype, tuple(directions.shape), theta)


def _perturb_out_run(theta: Tensor, directions: Tensor, eta: Tensor, out: Tensor) -> None:
    _perturb_out_fake(theta, directions, eta, out)
    _check_apart("out", out, theta=theta, directions=directions, eta=eta)
    _call("perturb", theta, _TYPES[theta.dtype], *directions.shape, theta, directions, eta, out)
    _bump_version(out)


# ----------------------------------------------------------------------------------------------------------- commutator


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

    :func:`grokcurv.reference.commutator` defines every number. eta (N,) float64; theta (P,) adds the rounding terms
    (difference form only); values (float32, or float64 with float64 vectors) and rows (K, 3) int64 are a block-sparse
    basis; segments (S, 2) int64. ``delta`` is written out, in float32 (float64 with float64 vectors), only if
    ``keep_delta``.
    """
    outputs = _commutator(
        *(_tensor("g_a", g_a), _tensor("g_b", g_b), _tensor("a2", a2), _tensor("b2", b2), _tensor("eta", eta)),
        *(_optional("theta", theta), _optional("values", values), _optional("rows", rows)),
        _optional("segments", segments),
        str(form),
        bool(keep_delta),
    )
    return Commutator(*outputs)


_CommutatorTensors = tuple[Tensor, Tensor, Tensor, Tensor]


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
) -> _CommutatorTensors:
    _check("g_a", g_a, _FLOATS, ("N", "P"))
    n, p = g_a.shape
    for name, t in (("g_b", g_b), ("a2", a2), ("b2", b2)):
        _check(name, t, g_a.dtype, (n, p), g_a)
    _check("eta", eta, torch.float64, (n,), g_a)
    if form not in ("difference", "bracket"):
        raise ValueError(f"form must be 'difference' or 'bracket', got {form!r}")
    if theta is not None:
        if form == "bracket":
            raise ValueError("theta belongs to form='difference': the bracket rounds no parameters; pass theta=None")
        _check("theta", theta, g_a.dtype, (p,), g_a)
    if (values is None) != (rows is None):
        raise ValueError("values and rows make the basis together: pass both or neither")
    if values is not None and rows is not None:
        _check_basis(values, rows, g_a)
    if segments is not None:
        _check_table("segments", segments, ("S", 2))

    def sums(columns: int) -> Tensor:
        return g_a.new_empty((n, columns), dtype=torch.float64)

    return (
        sums(len(SUMS) + (len(THETA_SUMS) if theta is not None else 0)),
        sums(0 if rows is None else rows.shape[0]),
        sums(0 if segments is None else segments.shape[0]),
        g_a.new_empty((n if keep_delta else 0, p), dtype=compute_type(g_a.dtype)),
    )


def _commutator_run(
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
) -> _CommutatorTensors:
    outputs = _commutator_fake(g_a, g_b, a2, b2, eta, theta, values, rows, segments, form, keep_delta)
    sums, coefficients, energies, delta = outputs
    n, p = g_a.shape
    if values is not None and rows is not None:
        _check_row_values(values, rows, p)
    if segments is not None:
        _check_spans("segments", segments, p)
    _call(
        "commutator",
        g_a,
        _TYPES[g_a.dtype],
        n,
        p,
        form == "bracket",
        *(g_a, g_b, a2, b2, eta, theta),
        *(values, rows, coefficients.shape[1]),
        *(segments, energies.shape[1]),
        *(sums, coefficients, energies, delta if keep_delta else None),
    )
    return outputs


# ------------------------------------------------------------------------------------------------------------- subspace


def subspace_split(v: Array, values: Array, rows: Array) -> tuple[Tensor, Tensor]:
    """``|v_i|^2`` (N,) and the coefficients ``b_j . v_i`` (N, K), float64, of v (N, P) on a block-sparse basis."""
    result = _subspace_split(_tensor("v", v), _tensor("values", values), _tensor("rows", rows))
    return cast(tuple[Tensor, Tensor], result)


def _subspace_split_fake(v: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    _check("v", v, _FLOATS, ("N", "P"))
    _check_basis(values, rows, v)
    n = v.shape[0]
    return v.new_empty((n,), dtype=torch.float64), v.new_empty((n, rows.shape[0]), dtype=torch.float64)


def _subspace_split_run(v: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    norm2, coefficients = _subspace_split_fake(v, values, rows)
    (n, p), k = v.shape, len(rows)
    _check_row_values(values, rows, p)
    _call("subspace_split", v, _TYPES[v.dtype], n, p, v, values, rows, k, norm2, coefficients)
    return norm2, coefficients


def subspace_filter_(g: A, values: Array, rows: Array, strength: float) -> A:
    """``g <- g_par + (1 - strength) g_perp`` in place, for g (N, P) and an orthonormal block-sparse basis; returns g.

    Coefficients and the new coordinates are formed in float64 and rounded once, to the dtype of g.
    """
    _subspace_filter_(
        *(_writable("g", g), _tensor("values", values), _tensor("rows", rows), _number("strength", strength))
    )
    return g


def _subspace_filter_fake(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> None:
    _check("g", g, _FLOATS, ("N", "P"))
    _check_basis(values, rows, g)
    if not math.isfinite(strength):
        raise ValueError(f"strength must be finite, got {strength}")


def _subspace_filter_run(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> None:
    _subspace_filter_fake(g, values, rows, strength)
    _check_apart("g", g, values=values, rows=rows)
    _, coefficients = _subspace_split_run(g, values, rows)
    _call("subspace_filter", g, _TYPES[g.dtype], *g.shape, g, values, rows, len(rows), coefficients, strength)
    _bump_version(g)


# ----------------------------------------------------------------------------------------------------------------- gram


def gram(x: Array, y: Array | None = None, *, origin: Array | None = None, segments: Array | None = None) -> Tensor:
    """``(x_i - origin) . (y_j - origin)`` by segment: (S, n, m) float64 from x (n, P), y (m, P) or x, origin (P,) or 0.

    segments (S, 2) int64; without them S = 1 and the sum is over all P. An entry's bits depend on its two rows (and the
    origin) alone, so a Gram matrix grown row by row equals one computed at once; with y = None it is symmetric. A row
    is read once (on a GPU once for every 32 rows of the other side).
    """
    result = _gram(_tensor("x", x), _optional("y", y), _optional("origin", origin), _optional("segments", segments))
    return cast(Tensor, result)


def _gram_fake(x: Tensor, y: Tensor | None, origin: Tensor | None, segments: Tensor | None) -> Tensor:
    _check("x", x, _FLOATS, ("n", "P"))
    n, p = x.shape
    if y is not None:
        _check("y", y, x.dtype, ("m", p), x)
    if origin is not None:
        _check("origin", origin, x.dtype, (p,), x)
    if segments is not None:
        _check_table("segments", segments, ("S", 2))
    count = 1 if segments is None else segments.shape[0]
    return x.new_empty((count, n, n if y is None else y.shape[0]), dtype=torch.float64)


def _gram_run(x: Tensor, y: Tensor | None, origin: Tensor | None, segments: Tensor | None) -> Tensor:
    out = _gram_fake(x, y, origin, segments)
    n, p = x.shape
    if segments is None:
        segments = torch.tensor([[0, p]])
    else:
        _check_spans("segments", segments, p)
    _call("gram", x, _TYPES[x.dtype], n, out.shape[2], p, x, y, origin, segments, len(segments), out)
    return out


# ----------------------------------------------------------------------------------------------------------------- eigh


def eigh(a: Array, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of symmetric a (B, n, n) float64: values (B, k), descending, and vectors (B, n, k).

    Only the upper triangles are read. Of each vector the entry of largest magnitude is positive. Householder
    reflections make a matrix tridiagonal; then implicit QL solves all of it or, for k <= n / 4, multisection finds the
    k values and inverse iteration their vectors (QL again, should a residual stay above rounding). Values and
    ``|a v - w v|`` are right to a few ``n eps |a|``, vectors orthonormal to a few ``n eps``. A matrix with a NaN or an
    infinity yields NaN and harms no other.
    """
    return cast(tuple[Tensor, Tensor], _eigh(_tensor("a", a), _integer("k", k)))


def _eigh_fake(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    _check("a", a, torch.float64, ("B", "n", "n"))
    batch, n, m = a.shape
    if n != m:
        raise ValueError(f"a must have shape (B, n, n), got {tuple(a.shape)}")
    if not 0 <= k <= n:
        raise ValueError(f"k must lie in 0..n = {n}, got {k}")
    return a.new_empty((batch, k)), a.new_empty((batch, n, k))


def _eigh_run(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, vectors = _eigh_fake(a, k)
    batch, n, _ = a.shape
    _call("eigh", a, batch, n, k, a, values, vectors)
    return values, vectors


# --------------------------------------------------------------------------------------------------------------- rotate


def rotate(rows: Array, coefficients: Array, *, segments: Array | None = None) -> Tensor:
    """Linear combinations ``sum_i coefficients[s, j, i] rows[i]`` over each segment s, zero elsewhere.

    rows (m, P), coefficients (S, q, m) float64, segments (S, 2) int64, disjoint; without them S = 1 and all P. Returns
    (q, P), float64 for float64 rows, else float32: float64 terms in the order of the rows, rounded once. On the CPU
    bitwise equal to :func:`grokcurv.reference.rotate`; on a GPU a product is not rounded before it is added. A NaN in
    a row reaches every output, coefficient 0 or not.
    """
    result = _rotate(_tensor("rows", rows), _tensor("coefficients", coefficients), _optional("segments", segments))
    return cast(Tensor, result)


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
    _rotate_(
        *(_writable("rows", rows), _tensor("coefficients", coefficients), _optional("segments", segments)),
        *(None if mean is None else _writable("mean", mean), _optional("weights", weights)),
    )
    return rows


def _rotate_fake(rows: Tensor, coefficients: Tensor, segments: Tensor | None) -> Tensor:
    _check("rows", rows, _FLOATS, ("m", "P"))
    m, p = rows.shape
    if segments is not None:
        _check_table("segments", segments, ("S", 2))
    count = 1 if segments is None else segments.shape[0]
    _check("coefficients", coefficients, torch.float64, (count, "q", m), rows)
    return rows.new_empty((coefficients.shape[1], p), dtype=compute_type(rows.dtype))


def _rotate_run(rows: Tensor, coefficients: Tensor, segments: Tensor | None) -> Tensor:
    out = _rotate_fake(rows, coefficients, segments)
    segments = _disjoint(segments, rows.shape[1])
    if int(segments[:, 1].sum()) < rows.shape[1]:
        out.zero_()
    _call_rotate(rows, coefficients, segments, out, None, None)
    return out


def _rotate_in_place_fake(
    rows: Tensor, coefficients: Tensor, segments: Tensor | None, mean: Tensor | None, weights: Tensor | None
) -> None:
    _rotate_fake(rows, coefficients, segments)
    if coefficients.shape[1] > rows.shape[0]:
        raise ValueError(f"coefficients make {coefficients.shape[1]} rows, which do not fit over {rows.shape[0]}")
    if (mean is None) != (weights is None):
        raise ValueError("mean and weights belong together: pass both or neither")
    if mean is not None and weights is not None:
        _check("mean", mean, torch.float64, (rows.shape[1],), rows)
        _check("weights", weights, torch.float64, (rows.shape[0],), rows)


def _rotate_in_place_run(
    rows: Tensor, coefficients: Tensor, segments: Tensor | None, mean: Tensor | None, weights: Tensor | None
) -> None:
    _rotate_in_place_fake(rows, coefficients, segments, mean, weights)
    inputs = {"coefficients": coefficients, "segments": segments, "weights": weights}
    given = {name: t for name, t in inputs.items() if t is not None}
    _check_apart("rows", rows, **given)
    if mean is not None:
        _check_apart("mean", mean, rows=rows, **given)
    _call_rotate(rows, coefficients, _disjoint(segments, rows.shape[1]), None, mean, weights)
    _bump_version(rows)
    if mean is not None:
        _bump_version(mean)


def _call_rotate(
    rows: Tensor,
    coefficients: Tensor,
    segments: Tensor,
    out: Tensor | None,
    mean: Tensor | None,
    weights: Tensor | None,
) -> None:
    m, p = rows.shape
    _call(
        "rotate",
        rows,
        *(_TYPES[rows.dtype], m, coefficients.shape[1], p),
        *(rows, coefficients, segments, len(segments), out, mean, weights),
    )


def _disjoint(segments: Tensor | None, size: int) -> Tensor:
    """The segments, or the one of all coordinates; raises if one leaves them or two share one."""
    if segments is None:
        return torch.tensor([[0, size]])
    _check_spans("segments", segments, size)
    spans = sorted((start, start + length, j) for j, (start, length) in enumerate(segments.tolist()) if length)
    for (_, stop, i), (start, _, j) in pairwise(spans):
        if start < stop:
            raise ValueError(f"segments[{i}] and segments[{j}] overlap: make them disjoint")
    return segments


# --------------------------------------------------------------------------------------------------------------- sketch


def sketch(x: Array, size: int, seed: int, *, start: int = 0) -> Tensor:
    """A random projection of x (n, P) onto ``size`` dimensions that nearly keeps inner products: (n, size) float64.

    A count sketch: :func:`grokcurv.reference.sketch` defines it and bounds its error. size is a power of two, 64 to
    2**20; seed, 0 to 2**63 - 1, is all that is stored of the projection. ``start``, 0 to 2**62 - 1, is the number of
    the first coordinate: the sketches of shards that begin where they do in the whole add up to its sketch.
    """
    scalars = _integer("size", size), _integer("seed", seed), _integer("start", start)
    return cast(Tensor, _sketch(_tensor("x", x), *scalars))


def _sketch_fake(x: Tensor, size: int, seed: int, start: int) -> Tensor:
    _check("x", x, _FLOATS, ("n", "P"))
    if not 64 <= size <= 2**20 or size & (size - 1):
        raise ValueError(f"size must be a power of two from 64 to 2**20, got {size}")
    if seed < 0:
        raise ValueError(f"seed must lie in 0..2**63 - 1, got {seed}")
    if not 0 <= start < 2**62:
        raise ValueError(f"start must lie in 0..2**62 - 1, got {start}")
    return x.new_empty((x.shape[0], size), dtype=torch.float64)


def _sketch_run(x: Tensor, size: int, seed: int, start: int) -> Tensor:
    out = _sketch_fake(x, size, seed, start)
    n, p = x.shape
    _call("sketch", x, _TYPES[x.dtype], n, p, size, seed, start, x, out)
    return out


# ------------------------------------------------------------------------------------------------------------ arguments


def _tensor(name: str, x: Array) -> Tensor:
    """``x``, or a tensor of its memory; raises TypeError if it is no array or one that torch cannot share.

    What torch would refuse before an op is reached, or pass on to it without its derivative, is refused here.
    """
    if isinstance(x, Tensor):
        if x.layout is not torch.strided or x.is_nested or x.is_quantized:
            raise TypeError(f"{name} must be a dense tensor, got one that is sparse, nested or quantized")
        _check_no_grad(name, x)
        return x
    if not hasattr(x, "__dlpack__"):
        raise TypeError(f"{name} must be a tensor, a NumPy array or another with __dlpack__, got {type(x).__name__}")
    if isinstance(x, np.ndarray) and not x.flags.c_contiguous:  # a negative stride would end the process in torch 2.13
        raise ValueError(f"{name} must be contiguous, got strides {x.strides}: pass np.ascontiguousarray({name})")
    try:
        return torch.utils.dlpack.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} is a {type(x).__name__} whose memory torch cannot share: {error}") from error


def _optional(name: str, x: Array | None) -> Tensor | None:
    return None if x is None else _tensor(name, x)


def _writable(name: str, x: Array) -> Tensor:
    """As :func:`_tensor`, for what is written to. NumPy says whether it may be; the DLPack protocol need not."""
    if not isinstance(x, Tensor):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} is written to: it must be a tensor or a NumPy array, got {type(x).__name__}")
        if not x.flags.writeable:
            raise ValueError(f"{name} is written to, but it is a read-only NumPy array: pass {name}.copy()")
    return _tensor(name, x)


def _integer(name: str, x: int) -> int:
    """``x`` as an int64: torch's own complaint would be a RuntimeError."""
    if not isinstance(x, int | torch.SymInt):
        try:
            x = operator.index(x)
        except TypeError as error:
            raise TypeError(f"{name} must be an integer, got {x!r}") from error
    if not -(2**63) <= x < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {x}")
    return x


def _number(name: str, x: float) -> float:
    """``x`` as a float64."""
    if not hasattr(x, "__float__"):
        raise TypeError(f"{name} must be a number, got {x!r}")
    try:
        return float(x)
    except (OverflowError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{name} must be a number, got {x!r:.60}: {error}") from error


# --------------------------------------------------------------------------------------------------------------- checks


def _check(
    name: str,
    t: Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int | str, ...],
    beside: Tensor | None = None,
) -> None:
    """Raises unless ``t`` has one of the dtypes, the shape (a letter is any size) and the device of ``beside``."""
    wanted = dtype if isinstance(dtype, tuple) else (dtype,)
    if t.dtype not in wanted:
        raise TypeError(f"{name} must be {' or '.join(map(_short, wanted))}, got {_short(t.dtype)}")
    if t.dim() != len(shape) or any(n != m for n, m in zip(t.shape, shape, strict=True) if not isinstance(m, str)):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {tuple(t.shape)}")
    if beside is not None and t.device != beside.device:
        raise ValueError(f"{name} must be on {beside.device} like the other tensors, got {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {t.stride()}: pass {name}.contiguous()")
    _check_no_grad(name, t)


def _check_no_grad(name: str, t: Tensor) -> None:
    if t.requires_grad:
        raise ValueError(f"{name} requires grad, but the op has no derivative: pass {name}.detach()")
    if forward_ad.unpack_dual(t).tangent is not None:
        raise ValueError(f"{name} carries a tangent, but the op has no derivative")


def _check_table(name: str, t: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raises unless ``t`` is a table of indices: int64, of this shape, on the CPU."""
    if t.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, wherever the vectors are; got {t.device}: pass {name}.cpu()")
    _check(name, t, torch.int64, shape)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_basis(values: Tensor, rows: Tensor, vectors: Tensor) -> None:
    _check("values", values, compute_type(vectors.dtype), ("nnz",), vectors)
    _check_table("rows", rows, ("K", 3))


def _check_row_values(values: Tensor, rows: Tensor, size: int) -> None:
    _check_spans("rows", rows, size)
    for j, (_, length, offset) in enumerate(rows.tolist()):
        if not 0 <= offset <= values.numel() - length:
            raise ValueError(
                f"rows[{j}] reads values[{offset}:{offset + length}], but there are {values.numel()} values"
            )


def _check_spans(name: str, spans: Tensor, size: int) -> None:
    """Raises unless every (start, length, ...) lies inside ``size`` coordinates. No sum of two numbers can overflow."""
    for j, (start, length, *_) in enumerate(spans.tolist()):
        if start < 0 or not 0 <= length <= size - start:
            raise ValueError(f"{name}[{j}] has start {start} and length {length}, which does not lie within P = {size}")


def _check_apart(name: str, out: Tensor, **inputs: Tensor) -> None:
    """Raises if ``out`` shares memory with an input. All are contiguous, so each is one range of bytes."""
    start, stop = out.data_ptr(), out.data_ptr() + out.nbytes
    for other, t in inputs.items():
        if start < t.data_ptr() + t.nbytes and t.data_ptr() < stop:
            raise ValueError(f"{name} overlaps {other} in memory: pass a tensor of its own")


def _bump_version(t: Tensor) -> None:
    if not t.is_inference():
        torch.autograd.graph.increment_version(t)


class _Core(NamedTuple):
    """What carries out kernels on a device."""

    kernels: Any
    """``grokcurv._cpu`` or ``grokcurv._cuda``."""
    where: int
    """The number of threads, or the address of a stream."""
    guard: AbstractContextManager[Any]
    """In which they are called."""


def _core(device: torch.device) -> _Core:
    if device.type == "cpu":
        return _Core(_cpu, torch.get_num_threads(), nullcontext())
    return _Core(_cuda(device), torch.cuda.current_stream(device).cuda_stream, torch.cuda.device(device))


@cache
def _cuda(device: torch.device) -> Any:
    """The CUDA core, once it is known to run on ``device`` and has loaded its kernels there."""
    try:
        kernels = import_module("grokcurv._cuda")
    except ImportError as error:
        raise RuntimeError(
            f"tensors on {device} need the extension grokcurv._cuda, which was not built here: install the CUDA "
            "toolkit (nvcc) and build anew (docs/building.md), or move the tensors to the CPU with .cpu()"
        ) from error
    problem = cuda_problem(kernels.RUNTIME, kernels.driver())
    if problem:
        raise RuntimeError(f"tensors on {device}: {problem}")
    with torch.cuda.device(device):
        kernels.preload()
    return kernels


def cuda_problem(runtime: int, driver: int) -> str | None:
    """Why kernels built with CUDA ``runtime`` (13000 is 13.0) cannot run with a driver good for ``driver``, or None."""
    if runtime // 1000 <= driver // 1000:
        return None
    wanted = (
        f"grokcurv._cuda was built with CUDA {cuda_version(runtime)}, which needs a driver for CUDA {runtime // 1000}"
    )
    found = f"the driver here is good for CUDA {cuda_version(driver)}" if driver else "there is no NVIDIA driver here"
    return f"{wanted} (13: 580 or later), and {found}"


def cuda_version(number: int) -> str:
    """13.0 for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _call(kernel: str, beside: Tensor, *args: Tensor | float | None) -> None:
    """Calls a kernel where ``beside`` is, with tensors as addresses (None as the null address)."""
    core = _core(beside.device)
    addresses = [0 if a is None else _address(a) if isinstance(a, Tensor) else a for a in args]
    workspace = []

    def allocate(doubles: int) -> int:
        workspace.append(torch.empty(doubles, dtype=torch.float64, device=beside.device))
        return workspace[0].data_ptr()

    with core.guard:
        getattr(core.kernels, kernel)(allocate, core.where, *addresses)


_anywhere = torch.empty(1)


def _address(tensor: Tensor) -> int:
    """Never null: torch gives an empty tensor the null address, which to a kernel would mean that it is absent."""
    return tensor.data_ptr() or _anywhere.data_ptr()


_perturb = _define(
    "perturb(Tensor theta, Tensor directions, Tensor eta) -> Tensor",
    _perturb_run,
    _perturb_fake,
)
_perturb_out = _define(
    "perturb_out(Tensor theta, Tensor directions, Tensor eta, Tensor(a!) out) -> ()",
    _perturb_out_run,
    _perturb_out_fake,
)
_commutator = _define(
    "commutator(Tensor g_a, Tensor g_b, Tensor a2, Tensor b2, Tensor eta, Tensor? theta, Tensor? values, Tensor? rows, "
    "Tensor? segments, str form, bool keep_delta) -> (Tensor, Tensor, Tensor, Tensor)",
    _commutator_run,
    _commutator_fake,
)
_subspace_split = _define(
    "subspace_split(Tensor v, Tensor values, Tensor rows) -> (Tensor, Tensor)",
    _subspace_split_run,
    _subspace_split_fake,
)
_subspace_filter_ = _define(
    "subspace_filter_(Tensor(a!) g, Tensor values, Tensor rows, float strength) -> ()",
    _subspace_filter_run,
    _subspace_filter_fake,
)
_gram = _define(
    "gram(Tensor x, Tensor? y, Tensor? origin, Tensor? segments) -> Tensor",
    _gram_run,
    _gram_fake,
)
_eigh = _define(
    "eigh(Tensor a, int k) -> (Tensor, Tensor)",
    _eigh_run,
    _eigh_fake,
)
_rotate = _define(
    "rotate(Tensor rows, Tensor coefficients, Tensor? segments) -> Tensor",
    _rotate_run,
    _rotate_fake,
)
_rotate_ = _define(
    "rotate_(Tensor(a!) rows, Tensor coefficients, Tensor? segments, Tensor(b!)? mean, Tensor? weights) -> ()",
    _rotate_in_place_run,
    _rotate_in_place_fake,
)
_sketch = _define(
    "sketch(Tensor x, int size, int seed, int start) -> Tensor",
    _sketch_run,
    _sketch_fake,
)
