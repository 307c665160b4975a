"""Every op of :mod:`grokcurv.ops` in plain PyTorch: the definition, and the oracle of the tests.

Nothing here is fast and nothing here is compiled. Vectors are rows: N of them stacked are ``(N, P)``, in float32,
float64 or bfloat16; sums are float64. ``C`` names the compute type of a dtype: float64 for float64, float32 for the
other two.

Two shapes describe parts of the P coordinates:

* ``segments`` (S, 2) int64: ``(start, length)`` of each.
* a basis is block-sparse: ``rows`` (K, 3) int64 holds ``(start, length, offset)``; row j is ``values[offset : offset +
  length]`` on ``[start, start + length)`` and zero elsewhere. ``values`` is (nnz,), of type C; or (N, nnz), a row for
  each of N vectors, whose bases differ in their numbers alone.
"""

from __future__ import annotations

from itertools import count
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["difference", "bracket"]

SUMS = ("aa", "bb", "ab", "dd", "ha", "hb")
"""Columns of :attr:`Commutator.sums`, always present."""

THETA_SUMS = ("rr", "re", "qa", "qb")
"""Columns that follow :data:`SUMS` when ``theta`` is given."""


class Commutator(NamedTuple):
    """What one pass over the four gradients yields; see :func:`commutator`."""

    sums: Tensor
    """(N, 6) float64, the columns of :data:`SUMS`; (N, 10) with ``theta``: then those of :data:`THETA_SUMS` too."""
    coefficients: Tensor
    """(N, K) float64: basis . delta."""
    energies: Tensor
    """(N, S) float64: the sum of delta^2 over each segment."""
    delta: Tensor
    """(N, P) of type C if kept, else empty."""


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """C: the type in which single coordinates of ``dtype`` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_basis(values: Tensor, rows: Tensor, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The block-sparse basis as a matrix (K, size) of ``dtype``; N of them, (N, K, size), where values is (N, nnz)."""
    basis = values.new_zeros((*values.shape[:-1], len(rows), size), dtype=dtype)
    for j, (start, length, offset) in enumerate(rows.tolist()):
        basis[..., j, start : start + length] = values[..., offset : offset + length]
    return basis


def perturb(theta: Tensor, directions: Tensor, eta: Tensor) -> Tensor:
    """``theta_i - eta_i d_i`` for N directions.

    theta (N, P), or (P,) for all, and directions (N, P) of one dtype, eta (N,) float64. Returns (N, P): computed in C
    with every operation rounded (eta, product, difference; no fused multiply-add), then rounded to the dtype of theta.
    """
    c = compute_type(theta.dtype)
    return (theta.to(c) - eta.to(c)[:, None] * directions.to(c)).to(theta.dtype)


def commutator(
    g_a: Tensor,
    g_b: Tensor,
    a2: Tensor,
    b2: Tensor,
    eta: Tensor,
    *,
    form: Form = "difference",
    theta: Tensor | None = None,
    values: Tensor | None = None,
    rows: Tensor | None = None,
    segments: Tensor | None = None,
    keep_delta: bool = False,
) -> Commutator:
    """The commutator of two gradient steps, from gradients (N, P) and step sizes eta (N,) float64.

    With ``g_a = g_A(theta)`` and ``g_b = g_B(theta)``:

    * ``form="difference"``: ``a2 = g_A(theta - eta g_b)``, ``b2 = g_B(theta - eta g_a)`` and
      ``delta = eta ((a2 - g_a) - (b2 - g_b))``, which is ``theta_AB - theta_BA`` without the cancellation in theta.
    * ``form="bracket"``: ``a2 = H_A g_b``, ``b2 = H_B g_a`` (Hessian-vector products) and ``delta = eta^2 (b2 - a2)``.

    Sums over the P coordinates: ``aa = |g_a|^2``, ``bb = |g_b|^2``, ``ab = g_a . g_b``, ``dd = |delta|^2``; ``ha = |a2
    - g_a|^2`` and ``hb = |b2 - g_b|^2`` (difference) or ``ha = |a2|^2`` and ``hb = |b2|^2`` (bracket).

    ``theta`` (N, P), or (P,) for all, with the difference form only, adds what rounding did. Let ``<.>`` round every
    operation to the inputs' dtype:

    * ``r = <<theta - eta g_a> - eta b2> - <<theta - eta g_b> - eta a2>``: the commutator as the direct formula computes
      it; ``rr = |r|^2`` and ``re = |r - delta|^2``.
    * ``qa = |perturb(theta, g_a) - (theta - eta g_a)|^2``, the rounding of the stored parameters, likewise ``qb``
      (zero for float64: no wider type measures it).
    """
    x = [t.double() for t in (g_a, g_b, a2, b2)]
    step = eta[:, None]
    if form == "difference":
        change_a, change_b = x[2] - x[0], x[3] - x[1]
        delta = step * (change_a - change_b)
    else:
        change_a, change_b = x[2], x[3]
        delta = step * step * (change_b - change_a)

    vectors = [(x[0], x[0]), (x[1], x[1]), (x[0], x[1]), (delta, delta), (change_a, change_a), (change_b, change_b)]
    if theta is not None:
        difference = _direct(theta, g_a, b2, eta) - _direct(theta, g_b, a2, eta)
        r = difference.to(theta.dtype).double()
        q_a, q_b = (perturb(theta, g, eta).double() - (theta.double() - step * g.double()) for g in (g_a, g_b))
        vectors += [(r, r), (r - delta, r - delta), (q_a, q_a), (q_b, q_b)]
    sums = torch.stack([(u * v).sum(-1) for u, v in vectors], dim=-1)

    coefficients = delta.new_zeros((len(delta), 0))
    if values is not None and rows is not None:
        _, coefficients = subspace_split(delta, values, rows)
    energies = delta.new_zeros((len(delta), 0))
    if segments is not None:
        parts = [delta[:, start : start + length].square().sum(-1) for start, length in segments.tolist()]
        energies = torch.stack(parts, dim=-1) if parts else energies
    kept = delta if keep_delta else delta[:0]
    return Commutator(sums, coefficients, energies, kept.to(compute_type(g_a.dtype)))


def _direct(theta: Tensor, first: Tensor, second: Tensor, eta: Tensor) -> Tensor:
    """``<<theta - eta first> - eta second>``, as PyTorch rounds it operation by operation, returned in C."""
    c = compute_type(theta.dtype)
    point = theta.to(c)
    for gradient in (first, second):
        product = (eta.to(c)[:, None] * gradient.to(c)).to(theta.dtype)
        point = (point - product.to(c)).to(theta.dtype).to(c)
    return point


def subspace_split(v: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``|v_i|^2`` (N,) and the coefficients ``b_j . v_i`` (N, K), float64, of vectors v (N, P)."""
    x = v.double()
    return x.square().sum(-1), (dense_basis(values, rows, v.shape[1]) @ x[..., None])[..., 0]


def subspace_filter(g: Tensor, values: Tensor, rows: Tensor, strength: float) -> Tensor:
    """``g_par + (1 - s) g_perp = (1 - s) g + s sum_j (b_j . g) b_j``, in the dtype of g (N, P), for orthonormal b."""
    _, coefficients = subspace_split(g, values, rows)
    inside = (dense_basis(values, rows, g.shape[1]).mT @ coefficients[..., None])[..., 0]
    return ((1 - strength) * g.double() + strength * inside).to(g.dtype)


def gram(x: Tensor, y: Tensor | None = None, *, origin: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """``(x_i - origin) . (y_j - origin)`` by segment: (S, n, m) float64 from x (n, P), y (m, P) or x, origin (P,) or 0.

    Without segments S = 1 and the sum is over all P.
    """
    shift = 0.0 if origin is None else origin.double()
    left = x.double() - shift
    right = left if y is None else y.double() - shift
    if segments is None:
        return (left @ right.T)[None]
    parts = [left[:, s : s + n] @ right[:, s : s + n].T for s, n in segments.tolist()]
    return torch.stack(parts) if parts else left.new_zeros((0, len(left), len(right)))


def eigh(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of symmetric a (B, n, n) float64: values (B, k), descending, and vectors (B, n, k).

    Of each vector the entry of largest magnitude is positive (the first such, if several). A matrix with a NaN or an
    infinity yields NaN.
    """
    values, vectors = a.new_full((len(a), k), torch.nan), a.new_full((len(a), a.shape[1], k), torch.nan)
    for item, value, vector in zip(a, values, vectors, strict=True):
        if item.isfinite().all() and k:
            w, v = torch.linalg.eigh(item)
            value.copy_(w.flip(0)[:k])
            leading = v.flip(1)[:, :k]
            largest = leading.gather(0, leading.abs().argmax(0, keepdim=True))
            vector.copy_(leading * largest.sign())
    return values, vectors


def rotate(rows: Tensor, coefficients: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """Linear combinations ``out[j] = sum_i coefficients[s, j, i] rows[i]`` over each segment s, zero elsewhere.

    rows (m, P), coefficients (S, q, m) float64, segments (S, 2) disjoint; without them S = 1 and all P. Returns (q, P)
    of type C: products and sums in float64 in the order of the rows, from zero, rounded once.
    """
    x = rows.double()
    out = x.new_zeros((coefficients.shape[1], x.shape[1]))
    for (start, length), block in zip(_spans(segments, x.shape[1]), coefficients, strict=True):
        for i in range(len(x)):
            out[:, start : start + length] += block[:, i : i + 1] * x[i, start : start + length]
    return out.to(compute_type(rows.dtype))


def rotate_(
    rows: Tensor,
    coefficients: Tensor,
    *,
    segments: Tensor | None = None,
    mean: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """:func:`rotate` written over the first q <= m rows (m, P), in their dtype; returns rows.

    With ``mean`` (P,) and ``weights`` (m,), both float64, ``mean += sum_i weights[i] rows[i]`` of the old rows.
    Coordinates outside the segments stay as they are.
    """
    result = rotate(rows.double(), coefficients, segments=segments).to(rows.dtype)
    for start, length in _spans(segments, rows.shape[1]):
        part = slice(start, start + length)
        if mean is not None and weights is not None:
            mean[part] += rotate(rows[:, part].double(), weights[None, None])[0]
        rows[: len(result), part] = result[:, part]
    return rows


def sketch(x: Tensor, size: int, seed: int, *, start: int = 0) -> Tensor:
    """A count sketch ``z_i = Omega x_i`` of vectors x (n, P) with nothing of Omega stored: (n, size) float64.

    Coordinate ``c = start + p`` lies in block ``c // size``. It is added, times a random sign ``s_c``, to ``z[h(c)]``
    with ``h(c) = (c + shift of the block) % size``; signs are independent, shifts independent and uniform. They are the
    words of ``philox((i low, i high, 0, purpose), (seed low, seed high))``: for purpose 0, bit k of the 128, the lowest
    of the first word first, says that coordinate ``128 i + k`` is negated; for purpose 1, word k modulo size is the
    shift of block ``4 i + k``. As c is counted from ``start``, shards of a vector have sketches that add up to that of
    the whole. size is a power of two, 64 to 2**20.

    Inner products are right on average, and their variance is that of any count sketch (Charikar, Chen and
    Farach-Colton 2002; Weinberger et al. 2009)::

        E <Omega x, Omega y>                =  <x, y>
        E (<Omega x, Omega y> - <x, y>)^2  <=  (|x|^2 |y|^2 + <x, y>^2) / size

    For ``<Omega x, Omega y>`` is the sum over c, d of ``s_c s_d x_c y_d [h(c) = h(d)]``. Its terms with c = d make up
    ``<x, y>``; the others have mean 0. In the square of their sum, the mean of a product of terms is 0 unless both
    have the same pair {c, d}: what is left is the sum over pairs of ``Pr(h(c) = h(d)) (x_c y_d + x_d y_c)^2``. The
    probability is 0 within a block and 1/size between blocks, where the difference of two shifts is uniform. No term
    is negative, so it is at most the sum over all c and d of ``(x_c^2 y_d^2 + x_c y_c x_d y_d) / size``.
    """
    c = torch.arange(x.shape[1]) + start
    words = _words(c // 128, 0, seed)[torch.arange(len(c)), c % 128 // 32]
    shifts = _words(c // size // 4, 1, seed)[torch.arange(len(c)), c // size % 4]
    signs = 1.0 - 2.0 * (words >> c % 32 & 1)
    out = x.new_zeros((len(x), size), dtype=torch.float64)
    for z, row in zip(out, x.double(), strict=True):
        z.index_add_(0, (c + shifts) % size, signs * row)
    return out


def _words(indices: Tensor, purpose: int, seed: int) -> Tensor:
    """The four words (len, 4) of each counter."""
    key = (seed % 2**32, seed >> 32)
    different, which = indices.unique(return_inverse=True)
    words = [philox((i % 2**32, i >> 32, 0, purpose), key) for i in different.tolist()]
    return torch.tensor(words, dtype=torch.int64).reshape(-1, 4)[which]


def draw(seeds: Tensor, purpose: int, steps: Tensor, n: Tensor, rows: int) -> Tensor:
    """Random integers without a state: (R, rows) int64, entry (r, i) uniform on [0, n_r), or 64 bits where n_r is 0.

    seeds (R,) int64 of any bits, purpose in [0, 2**32), steps (R,) int64 in [0, 2**32), n (R,) int64 in [0, 2**32]. An
    entry is a function of r's own numbers, the purpose and i alone. Its attempts 0, 1, ... are ``w``, word ``i % 4`` of
    ``philox((i // 4, attempt, step, purpose), (seed low, seed high))``. The first with ``w n mod 2**32 >= 2**32 mod n``
    counts, and is worth ``w n // 2**32`` (Lemire, Fast random integer generation in an interval, ACM TOMACS 29, 2019).

    So every number is equally likely: the w that are worth v have products ``w n`` in ``[v 2**32, (v + 1) 2**32)``, in
    steps of n. What is left of that range without its first ``2**32 mod n`` numbers is as long as ``2**32 // n`` such
    steps, so it has that many products wherever they begin.

    n = 0 stands for 2**64, as an int64 of the same bits: words ``2 (i % 2)``, low, and ``2 (i % 2) + 1``, high, of
    counter ``(i // 2, 0, step, purpose)``.
    """
    runs = zip(seeds.tolist(), steps.tolist(), n.tolist(), strict=True)
    entries = [[_entry(i, seed % 2**64, purpose, step, below) for i in range(rows)] for seed, step, below in runs]
    return torch.tensor(entries, dtype=torch.int64, device=seeds.device).reshape(len(seeds), rows)


def _entry(i: int, seed: int, purpose: int, step: int, n: int) -> int:
    """Entry i of what :func:`draw` returns, for one run."""
    key = (seed % 2**32, seed >> 32)
    if n == 0:
        words = philox((i // 2, 0, step, purpose), key)
        value = words[2 * (i % 2)] + (words[2 * (i % 2) + 1] << 32)
        return value if value < 2**63 else value - 2**64
    for attempt in count():
        product = philox((i // 4, attempt, step, purpose), key)[i % 4] * n
        if product % 2**32 >= 2**32 % n:
            break
    return product >> 32


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, four random 32-bit words from a counter and a key (Salmon, Moraes, Dror and Shaw 2011)."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def _spans(segments: Tensor | None, size: int) -> list[list[int]]:
    """(start, length) of each segment, or of the one that is all coordinates."""
    return [[0, size]] if segments is None else segments.tolist()
