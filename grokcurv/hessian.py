"""Edges of a Hessian's spectrum, and its trace, from products of it with vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from grokcurv import ops
from grokcurv.device_buffer import is_asynchronous
from grokcurv.draws import Purpose
from grokcurv.evaluation import LossFn
from grokcurv.gradients import PIECE, GradientEngine, Multiply

Which = Literal["largest", "smallest"]

BROKEN = 10.0
"""So many roundoffs of the matrix make a new direction none."""

CANCELLED = 0.7
"""A vector that orthogonalisation leaves less of than this is orthogonalised once more (Daniel et al., Math. Comp. 30,
1976)."""

PROBES = 64
"""Vectors that a draw of P words gives."""

BLOCK = 16
"""Vectors for which there is room at first."""

STEP = 3e-4
"""Of the length of the parameters, that of the steps of a second difference in float64."""


@dataclass(frozen=True)
class Edges:
    """Eigenpairs at one end of the spectrum; :func:`hessian_edges`.

    Attributes:
        values: (k,) float64, from the farthest inwards: Rayleigh quotients, in units of the loss over theta squared.
        vectors: (k, P) of length one, in the order of the flat parameters.
        residuals: (k,) float64, ``|H v - lambda v|``: an eigenvalue of H, as its products are rounded, lies no further
            from the value.
        products: Hessian-vector products that this took.
        converged: whether all values were found to be as near as was asked for.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace; :func:`hessian_trace`.

    Attributes:
        value: in units of the loss over theta squared.
        stderr: its standard error, from the scatter of the probes; NaN of one.
        products: Hessian-vector products that this took, none where losses were enough.
    """

    value: float
    stderr: float
    products: int


def hessian_edges(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    k: int = 1,
    tol: float = 1e-4,
    *,
    which: Which = "largest",
    max_products: int = 500,
    seed: int = 0,
) -> Edges:
    """The k farthest eigenvalues at one end of the spectrum of the Hessian of ``loss_fn(model, batch)``.

    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
    >>> edges = hessian_edges(model, loss_fn, torch.diag(torch.tensor([3.0, 2.0, 1.0])), k=2)
    >>> [round(value, 4) for value in edges.values.tolist()]  # the Hessian is 2 x'x / 3
    [6.0, 2.6667]

    Lanczos' method with full reorthogonalisation (Golub & Van Loan, Matrix Computations, 4th ed., section 10.3). It
    ends when each value is known to ``tol`` of itself: a Ritz value whose residual is r, and whose nearest neighbour is
    a gap away, errs by no more than min(r, r^2 / gap) (Parlett, The Symmetric Eigenvalue Problem, section 11.7). Of an
    eigenvalue that occurs several times more than one is found only where the others' directions are exhausted.

    It takes a product an iteration and k more for the residuals, one gradient's graph
    (:meth:`grokcurv.gradients.GradientEngine.hessian`) and memory for a vector of P an iteration. The model is left as
    it was; what it draws at random comes from ``seed``, as the vector to start from.

    Raises:
        ValueError: k is not in 1..P, ``tol`` is not positive, ``max_products`` is below 1, another ``which``; a model
            without second derivatives.
    """
    engine = GradientEngine(model, loss_fn)
    if not 1 <= k <= engine.size:
        raise ValueError(f"k must lie in 1..P = {engine.size}, got {k}")
    if not tol > 0 or max_products < 1:
        raise ValueError(f"tol must be positive and max_products at least 1; got {tol} and {max_products}")
    if which not in get_args(Which):
        raise ValueError(f"which must be one of {', '.join(get_args(Which))}, got {which!r}")
    engine.admit(batch, exact=False)
    _require_second_derivatives(engine, batch)
    sign = 1.0 if which == "largest" else -1.0

    def solve(multiply: Multiply) -> Edges:
        krylov = Lanczos(multiply, random_vector(engine, seed), min(max(max_products, k), engine.size))
        converged = False
        while not (krylov.full or converged):
            krylov.extend()
            converged = krylov.size > k and krylov.converged(k, tol, sign)
        _, vectors, _ = krylov.edge(k, sign)
        products = torch.stack([multiply(v) for v in vectors])
        values, residuals = quotients(vectors, products)
        order = (sign * values).argsort(descending=True)
        exhausted = krylov.size == engine.size
        count = krylov.size + k
        return Edges(values[order], vectors[order], residuals[order], count, converged or exhausted)

    return engine.hessian(engine.flatten(), batch, solve, seed=seed)


def hessian_trace(model: nn.Module, loss_fn: LossFn, batch: Any, probes: int = 32, *, seed: int = 0) -> Trace:
    """The trace of the Hessian of ``loss_fn(model, batch)``, with its standard error.

    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> loss_fn = lambda model, x: (model(x) ** 2).mean()
    >>> trace = hessian_trace(model, loss_fn, torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> round(trace.value, 5), round(trace.stderr, 5)  # the Hessian is diagonal, of which each probe finds the trace
    (9.33333, 0.0)

    Hutchinson's estimator (Commun. Stat. Simul. 19, 1990): the mean of ``z' H z`` over vectors z of signs drawn at
    random, whose variance is twice the sum of squares off the diagonal. :func:`curvature` says how each is found: two
    losses in float64 where the loss is smooth, about half the time of a product. The model is left as it was; what it
    draws at random comes from ``seed``, as the probes do.

    Raises:
        ValueError: ``probes`` is below 1; a model that is not smooth and has no second derivatives either.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    engine = GradientEngine(model, loss_fn)
    engine.admit(batch)
    if not has_smooth_loss(engine):
        _require_second_derivatives(engine, batch)
    found = curvature(engine, engine.flatten(), batch, signs(engine, probes, seed, 0), seed)
    products = 0 if has_smooth_loss(engine) else probes
    return Trace(float(found.mean()), float(found.std() / probes**0.5) if probes > 1 else math.nan, products)


def has_smooth_loss(engine: GradientEngine) -> bool:
    """Whether curvature may be had from losses in float64, of the structure that was admitted last."""
    return engine.checked and engine.certifies and engine.traits.exact and not engine.traits.nonsmooth


def curvature(engine: GradientEngine, theta: Tensor, batch: Any, directions: Sequence[Tensor], seed: int = 0) -> Tensor:
    """(n,) float64: ``v' H v`` at ``theta`` (P,) of each of n vectors (P,).

    Where the loss is smooth it is a second difference of losses in float64, ``(L(theta + h v) - 2 L(theta) + L(theta -
    h v)) / h^2``, with h |v| = 3e-4 of the length of theta: then its relative error, rounding over h^2 and the fourth
    derivative times it, is some 1e-7 of the curvature of a usual direction, and it takes two forward passes. Elsewhere
    it is from products.
    """
    if not directions:
        return theta.new_zeros(0, dtype=torch.float64)
    if not has_smooth_loss(engine):
        return engine.hessian(
            theta, batch, lambda multiply: torch.stack([_dot(v, multiply(v)) for v in directions]), seed=seed
        )
    wide = theta.to(torch.float64)
    here = engine.loss(wide, batch, seed=seed)
    length, found = STEP * _norm(wide).clamp(min=1.0), []
    for v in directions:
        move = v.to(torch.float64)
        h = length / _norm(move)
        there, back = (engine.loss(torch.add(wide, side * h * move), batch, seed=seed) for side in (1.0, -1.0))
        found.append(((there - here) + (back - here)) / h.square())
    return torch.stack(found)


def _require_second_derivatives(engine: GradientEngine, batch: Any) -> None:
    """Raise a ValueError for a model whose second derivatives are not true ones."""
    if not engine.has_true_brackets(batch):
        why = next((f.detail for f in engine.admission if f.check == "second derivative"), "there are none")
        raise ValueError(f"model has no true second derivatives, and so no Hessian: {why}")


class Lanczos:
    """An orthonormal basis of a Krylov space, grown by a product at a time, and the matrix on it, which is tridiagonal.

    Where a space is exhausted another one begins, orthogonal to it, so that no more is missing in the end than there is
    room for. On an accelerator nothing waits.

    >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    >>> krylov = Lanczos(lambda v: matrix @ v, torch.ones(3), limit=3)
    >>> while not krylov.full:
    ...     krylov.extend()
    >>> krylov.edge(2)[0].round(decimals=5).tolist()
    [3.0, 2.0]

    Args:
        multiply: the product with a symmetric matrix.
        start: (P,) the vector to start from, of any length but zero.
        limit: of the dimension, at most P.

    Attributes:
        size: how many vectors there are whose product is known.
        basis: (at least size, P).
        alpha: (limit,) float64: their Rayleigh quotients.
        beta: (limit,) float64: what of the product of a vector is new, which is along the next one.
    """

    def __init__(self, multiply: Multiply, start: Tensor, limit: int) -> None:
        self._multiply, self.limit, self.size = multiply, limit, 0
        self.basis = start.new_empty(min(limit, BLOCK), len(start))
        self.alpha, self.beta = (torch.zeros(limit, dtype=torch.float64, device=start.device) for _ in range(2))
        self._spare, self._scale = start, self.alpha.new_zeros(())
        self._waits = is_asynchronous(start.device)
        if limit:
            self.basis[0] = start / start.norm()

    @property
    def full(self) -> bool:
        return self.size == self.limit

    def extend(self) -> None:
        """Multiply the latest vector, and make the next of what is new in it."""
        at, latest = self.size, self.basis[self.size]
        product = self._multiply(latest)
        self.alpha[at] = alpha = _dot(latest, product)
        rest = product - alpha.to(product.dtype) * latest
        if at:
            rest -= self.beta[at - 1].to(rest.dtype) * self.basis[at - 1]
        rest, length = self._orthogonalised(rest, self.basis[: at + 1])
        self.beta[at], self.size = length, at + 1
        self._scale = torch.maximum(self._scale, torch.maximum(alpha.abs(), length))
        if self.full:
            return
        if self.size == len(self.basis):
            room = min(self.limit, 2 * len(self.basis)) - len(self.basis)
            self.basis = torch.cat([self.basis, self.basis.new_empty(room, self.basis.shape[1])])
        broken = length <= BROKEN * torch.finfo(rest.dtype).eps * self._scale
        following = rest / length.to(rest.dtype)
        if self._waits or bool(broken):
            fresh, size = self._orthogonalised(self._spare.roll(self.size), self.basis[: self.size], twice=True)
            following = torch.where(broken, fresh / size.to(fresh.dtype), following)
            self.beta[at] = torch.where(broken, 0.0, length)
        self.basis[self.size] = following

    def _orthogonalised(self, x: Tensor, basis: Tensor, twice: bool = False) -> tuple[Tensor, Tensor]:
        """The part of x that is orthogonal to the basis, and its length."""
        before = _norm(x)
        x = torch.addmv(x, basis.T, basis @ x, alpha=-1.0)
        length = _norm(x)
        if twice or self._waits or bool(length < CANCELLED * before):
            x = torch.addmv(x, basis.T, basis @ x, alpha=-1.0)
            length = _norm(x)
        return x, length

    def _ritz(self, k: int, sign: float) -> tuple[Tensor, Tensor, Tensor]:
        """(k,) Ritz values of the matrix times the sign, descending, (k, size) what their vectors are on the basis, and
        (k,) the lengths of their residuals."""
        alpha, beta = self.alpha[: self.size], self.beta[: self.size - 1]
        matrix = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
        values, vectors = (x[0] for x in ops.eigh(sign * matrix[None], k))
        return values, vectors.T, self.beta[self.size - 1] * vectors[-1].abs()

    def edge(self, k: int, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(k,) float64 values at an end, the farthest first, (k, P) vectors of length one, and (k,) residuals."""
        values, on_basis, residuals = self._ritz(k, sign)
        vectors = on_basis.to(self.basis.dtype) @ self.basis[: self.size]
        return sign * values, vectors / vectors.norm(dim=1, keepdim=True), residuals

    def converged(self, k: int, tol: float, sign: float) -> bool:
        """Whether the k farthest values are known to ``tol`` of themselves; waits for the device."""
        values, _, residuals = self._ritz(min(k + 1, self.size), sign)
        apart = values.diff().abs()
        gaps = torch.minimum(apart, torch.cat([apart.new_full((1,), torch.inf), apart[:-1]]))[:k]
        residuals, values = residuals[:k], values[:k].abs()
        # The square counts where the neighbour is known to be another one.
        errors = torch.where(residuals < gaps / 2, residuals.square() / gaps, residuals)
        least = torch.finfo(self.basis.dtype).eps * self._scale
        return bool((errors <= tol * values + least).all())


def quotients(vectors: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """(k,) Rayleigh quotients and (k,) residuals ``|A v - lambda v| / |v|``, float64, of vectors and products (k, P).

    The residual is formed in float64, number by number, so that it says what these vectors are, and not how they are
    multiplied.
    """
    pieces = list(zip(vectors.split(PIECE, 1), products.split(PIECE, 1), strict=True))
    square, inner = vectors.new_zeros(2, len(vectors), dtype=torch.float64)
    for v, p in pieces:
        square, inner = square + v.double().square().sum(1), inner + (v.double() * p.double()).sum(1)
    values, rest = inner / square, torch.zeros_like(square)
    for v, p in pieces:
        rest = rest + (p.double() - values[:, None] * v.double()).square().sum(1)
    return values, (rest / square).sqrt()


def random_vector(engine: GradientEngine, seed: int) -> Tensor:
    """(P,) uniform on [-1, 1): the same for a seed on every device."""
    words = _words(engine, seed, 0)
    return (words.to(torch.float64) * 2.0**-63).to(engine.dtype)


def signs(engine: GradientEngine, count: int, seed: int, step: int) -> list[Tensor]:
    """So many vectors (P,) of random signs: the same for a seed and a step on every device."""
    found: list[Tensor] = []
    for number in range(count):
        if number % PROBES == 0:
            words = _words(engine, seed + 1 + number // PROBES, step)
        found.append(((words >> (number % PROBES)) & 1).to(engine.dtype).mul_(2.0).sub_(1.0))
    return found


def _words(engine: GradientEngine, seed: int, step: int) -> Tensor:
    """(P,) int64, all bits random."""
    key, at, all_bits = (torch.full((1,), x, dtype=torch.int64, device=engine.device) for x in (seed, step, 0))
    return ops.draw(key, Purpose.HESSIAN, at, all_bits, engine.size)[0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """() float64, of pieces that are summed in their own dtype."""
    found = [torch.dot(x, y) for x, y in zip(a.split(PIECE), b.split(PIECE), strict=True)]
    return torch.stack(found).sum(dtype=torch.float64)


def _norm(x: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return length
