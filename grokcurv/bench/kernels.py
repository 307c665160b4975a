"""The kernels beside torch arithmetic written from their definitions; truth is float64 throughout.

Inputs are drawn, and everything is computed, on the generator's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from grokcurv import ops, reference
from grokcurv.bench import naive
from grokcurv.bench.comparison import OURS, Case, Comparison, Implementation, relative, worst

ETA = 1e-3
DEFECT = 50.0
"""Of the synthetic gradients, which have length one; the demo's model begins near it."""
WEIGHT = 0.05
"""Size of the synthetic parameters, as those of a layer of width 400 at initialisation."""
PLAIN = "plain torch"
FLOAT64 = f"{PLAIN}, float64"
DENSE = f"{PLAIN}, a dense basis"
CHUNK = 1 << 20

REWRITTEN = "rows widened before, result in a second buffer"

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Op = Callable[..., reference.Commutator]


def pair(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], note: str = "") -> tuple[Implementation, ...]:
    """A kernel, and the one other way to its answer."""
    return Implementation(OURS, ours), Implementation(name, theirs, note=note)


def in_place(name: str, op: Callable[[Tensor], Tensor], x: Tensor) -> Implementation:
    """Of an op that writes over its argument: timed on one copy again and again, checked on a fresh one."""
    return Implementation(name, partial(op, x.clone()), lambda: op(x.clone()))


def perturb(size: int, runs: int = 1) -> Case:
    """``theta - eta d``; of several runs, each has its own of both."""

    def build(generator: Generator) -> Comparison:
        theta, directions = normal(generator, runs, size), normal(generator, runs, size)
        eta, out = step(generator).repeat(runs), torch.empty_like(directions)
        truth = theta.double() - ETA * directions.double()
        ours = partial(ops.perturb, theta, directions, eta, out=out)
        both = pair(PLAIN, ours, lambda: torch.sub(theta, ETA * directions, out=out))
        errors = {"vector, relative error": lambda got: relative(got, truth)}
        return Comparison(both, errors, tolerance=1e-6, moved=3 * theta.nbytes)

    of = f" of {runs} runs" if runs > 1 else ""
    return Case("perturb", f"perturbed parameters{of}, P = {size:,}", 36 * runs * size, build)


def defect(size: int) -> Case:
    """D from four gradients, as the definition has it: two end points, subtracted."""

    def build(generator: Generator) -> Comparison:
        theta, vectors = gradients(generator, size)
        g_a, g_b, a2, b2 = (x[0] for x in vectors)
        truth, ours = defect64(g_a, g_b, a2, b2), partial(ops.commutator, *vectors, step(generator))
        direct = partial(naive.defect, theta, g_a, g_b, a2, b2, ETA)
        plain = Implementation(f"{PLAIN}, the float32 formula", direct, lambda: direct()[0])
        both = Implementation(OURS, ours, lambda: defect_of(ours().sums)), plain
        errors = {"defect, relative error": lambda got: abs(float(got) / truth - 1)}
        return Comparison(both, errors, tolerance=1e-5, moved=4 * theta.nbytes, flops64=16 * size)

    return Case("defect", f"defect arithmetic, P = {size:,}", 44 * size, build)


def rounding_terms(size: int) -> Case:
    """The sums behind defect and noise floor, with what rounding did to the direct formula."""

    def build(generator: Generator) -> Comparison:
        theta, vectors = gradients(generator, size)
        eta = step(generator)

        def sums(op: Op) -> Tensor:
            return op(*vectors, eta, theta=theta).sums[0]

        truth = sums(reference.commutator)
        errors = {"ten sums, largest relative error": lambda got: worst(got, truth)}
        both = pair(FLOAT64, partial(sums, ops.commutator), partial(sums, reference.commutator))
        return Comparison(both, errors, tolerance=1e-5, moved=5 * theta.nbytes, flops64=31 * size)

    return Case("rounding-terms", f"defect and rounding terms, P = {size:,}", 140 * size, build)


def defect_on_basis(size: int) -> Case:
    """The defect's length, and its coefficients on 16 directions that live on matrices, as the demo's basis."""

    def build(generator: Generator) -> Comparison:
        _, vectors = gradients(generator, size)
        values, rows, dense = block_basis(generator, size)
        g_a, g_b, a2, b2 = (x[0] for x in vectors)
        eta = step(generator)

        def answer(op: Op) -> tuple[Tensor, Tensor]:
            out = op(*vectors, eta, values=values, rows=rows)
            return out.sums[0, 3].sqrt(), out.coefficients[0]

        def plain() -> tuple[Tensor, Tensor]:
            delta = ETA * ((a2 - g_a) - (b2 - g_b))
            return delta.norm(), dense @ delta

        truth = answer(reference.commutator)
        errors = {"length and coefficients, relative error": lambda got: relative(got, truth)}
        moved, flops = 16 * size + values.nbytes, 16 * size + 2 * values.numel()
        both = pair(DENSE, lambda: answer(ops.commutator), plain)
        return Comparison(both, errors, tolerance=1e-6, moved=moved, flops64=flops)

    return Case("defect-on-basis", f"defect on 16 directions, P = {size:,}", 64 * 4 * size, build)


def split(size: int) -> Case:
    """A vector's length, and its coefficients on four directions of an eighth of its coordinates each."""

    def build(generator: Generator) -> Comparison:
        v, length = normal(generator, 1, size), size // 8
        values = normal(generator, 4 * length)
        rows = torch.tensor([[j * length, length, j * length] for j in range(4)])

        def plain() -> tuple[Tensor, Tensor]:
            x = v[0].double()
            return (x * x).sum(), (x[: 4 * length] * values.double()).view(4, -1).sum(-1)

        truth = plain()
        errors = {"length and coefficients, relative error": lambda got: relative(got, truth)}
        moved, flops = v.nbytes + values.nbytes, 2 * (size + values.numel())
        both = pair(FLOAT64, lambda: ops.subspace_split(v, values, rows), plain)
        return Comparison(both, errors, tolerance=1e-12, moved=moved, flops64=flops)

    return Case("split", f"split by a subspace, P = {size:,}", 30 * size, build)


def filter_(size: int) -> Case:
    """Most of a vector outside 16 directions kept, in place: reads it twice, writes it once."""
    strength = 1e-3  # what is repeated for the clock must not wear the vector away

    def build(generator: Generator) -> Comparison:
        g = normal(generator, 1, size)
        values, rows, dense = block_basis(generator, size)
        wide = dense.double()
        truth = reference.subspace_filter(g.double(), values=values, rows=rows, strength=strength)

        def plain(g: Tensor) -> Tensor:
            x = g[0].double()
            g[0] = (1 - strength) * x + strength * (wide.T @ (wide @ x))
            return g

        def ours(g: Tensor) -> Tensor:
            return ops.subspace_filter_(g, values, rows, strength)

        errors = {"vector, relative error": lambda got: relative(got, truth)}
        moved, flops = 3 * g.nbytes + 2 * values.nbytes, 3 * size + 4 * values.numel()
        both = in_place(OURS, ours, g), in_place(DENSE, plain, g)
        return Comparison(both, errors, tolerance=1e-6, moved=moved, flops64=flops)

    return Case("filter", f"filtered gradient, P = {size:,}", 200 * size, build)


def gram_row(n: int, size: int) -> Case:
    """One more row against those there are, as a streaming PCA adds it."""
    return _gram("gram-row", f"one row beside {n}", n, size, 2 * n * size, lambda rows: (rows[-1:], rows))


def gram_matrix(n: int, size: int) -> Case:
    return _gram("gram-matrix", f"{n} x {n}", n, size, n * (n + 1) * size, lambda rows: (rows,))


def _gram(name: str, what: str, n: int, size: int, flops: int, of: Callable[[Tensor], tuple[Tensor, ...]]) -> Case:
    def build(generator: Generator) -> Comparison:
        rows, origin = normal(generator, n, size), normal(generator, size)
        ours, plain = (partial(op, *of(rows), origin=origin) for op in (ops.gram, reference.gram))
        truth = plain()
        errors = {"inner products, relative error": lambda got: relative(got, truth)}
        return Comparison(pair(FLOAT64, ours, plain), errors, tolerance=1e-12, moved=rows.nbytes, flops64=flops)

    return Case(name, f"Gram matrix, {what} of {size:,}", 24 * n * size, build)


def eigh(n: int, k: int, batch: int = 8) -> Case:
    """Leading pairs of several matrices, beside LAPACK, which finds all of them."""

    def build(generator: Generator) -> Comparison:
        x = normal(generator, batch, n, n).double() / torch.arange(1, n + 1, device=generator.device)
        return _eigenpairs([x @ x.mT], k)

    return Case("eigh", f"eigenproblem, {k} pairs of {batch} matrices of {n}", 40 * n * n * batch, build)


def eigh_prefixes(n: int) -> Case:
    """The leading pair of the first 2, 3, ... n rows, as the history of the first component asks for it."""

    def build(generator: Generator) -> Comparison:
        x = normal(generator, n, 1000).double().cumsum(0)
        x -= x.mean(0)
        gram = x @ x.T
        return _eigenpairs([gram[:m, :m].contiguous()[None] for m in range(2, n + 1)], 1)

    return Case("eigh-prefixes", f"leading pair of every prefix of {n}", 24 * n**3, build)


def _eigenpairs(batches: list[Tensor], k: int) -> Comparison:
    def ours() -> list[tuple[Tensor, Tensor]]:
        return [ops.eigh(a, k) for a in batches]

    def residual(got: Any) -> float:
        """``|A V - V L| / |A|``, the largest."""
        known = [(a, a @ v - v * values[:, None]) for a, (values, v) in zip(batches, got, strict=True)]
        return max(float((off.norm(dim=(1, 2)) / a.norm(dim=(1, 2))).max()) for a, off in known)

    note = "all pairs" if k < batches[-1].shape[1] else ""
    both = pair("torch.linalg.eigh", ours, lambda: [*map(torch.linalg.eigh, batches)], note)
    errors, moved = {"residual, relative, worst": residual}, sum(a.nbytes for a in batches)
    return Comparison(both, errors, tolerance=1e-9, moved=moved)


def rotate(m: int, q: int, size: int) -> Case:
    """In place, beside a float64 product of rows that are float64 already, which needs a second buffer."""

    def build(generator: Generator) -> Comparison:
        rows, square = normal(generator, m, size), normal(generator, m, m).double()
        coefficients = torch.linalg.qr(square).Q[None, :q].contiguous()
        wide = rows.double()
        truth, out = coefficients[0] @ wide, wide.new_empty(q, size)

        def ours(rows: Tensor) -> Tensor:
            return ops.rotate_(rows, coefficients)[:q]

        plain = Implementation(FLOAT64, partial(torch.matmul, coefficients[0], wide, out=out), note=REWRITTEN)
        both = in_place(OURS, ours, rows), plain
        errors = {"rows, relative error": lambda got: relative(got, truth)}
        moved, flops = (m + q) * size * rows.element_size(), 2 * m * q * size
        return Comparison(both, errors, tolerance=1e-6, moved=moved, flops64=flops)

    return Case("rotate", f"{m} rows of {size:,} rotated to {q}", (16 * m + 32 * q) * size, build)


def sketch(n: int, size: int, length: int) -> Case:
    """Beside an ``index_add_`` with places and signs stored, 12 bytes a coordinate."""

    def build(generator: Generator) -> Comparison:
        x = normal(generator, n, length)
        places = torch.randint(size, (length,), generator=generator, device=generator.device)
        signs = normal(generator, length).sign()
        truth = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()

        def plain() -> Tensor:
            return x.new_zeros(n, size).index_add_(1, places, signs * x)

        def error(got: Tensor) -> float:
            return worst(got.double().square().sum(1), truth)

        both = pair(f"{PLAIN}, index_add_", lambda: ops.sketch(x, size, 1), plain, "stores 12 bytes a coordinate")
        errors, tolerance = {"squared length, relative error (both approximate)": error}, 6 * math.sqrt(2 / size)
        return Comparison(both, errors, tolerance, moved=x.nbytes + 8 * n * size, flops64=n * length)

    return Case("sketch", f"sketch of {n} x {length:,} into {size:,}", (20 + 12 * n) * length, build)


def draw(runs: int, rows: int, n: int = 4704) -> Case:
    """A batch of every run, beside one generator for all of them, which has a state."""

    def build(generator: Generator) -> Comparison:
        seeds = torch.arange(runs, device=generator.device)
        steps, below = torch.zeros_like(seeds), torch.full_like(seeds, n)

        def plain() -> Tensor:
            return torch.randint(n, (runs, rows), generator=generator, device=generator.device)

        def error(got: Tensor) -> float:
            """Chi-squared has mean n - 1 and variance 2 (n - 1) where all n are equally likely."""
            expected = got.numel() / n
            uneven = (got.flatten().bincount(minlength=n) - expected).square().sum() / expected
            return abs(float(uneven) - (n - 1)) / math.sqrt(2 * (n - 1))

        ours, note = partial(ops.draw, seeds, 3, steps, below, rows), "one generator, which has a state"
        errors = {"chi-squared of how often each came, off its mean in standard deviations": error}
        return Comparison(pair("torch.randint", ours, plain, note), errors, tolerance=6.0, moved=8 * runs * rows)

    return Case("draw", f"{runs} x {rows:,} integers below {n:,}", 32 * runs * rows, build)


# --------------------------------------------------------------------------------------------------------------- inputs


def step(on: Generator | Tensor) -> Tensor:
    """Eta, on the device of that."""
    return torch.tensor([ETA], dtype=torch.float64, device=on.device)


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def gradients(generator: Generator, size: int) -> tuple[Tensor, Four]:
    """Parameters (P,), and g_A, g_B, g_A past B, g_B past A, (1, P) each, whose defect is :data:`DEFECT` or so."""
    g_a, g_b, a2, b2 = (normal(generator, 1, size).div_(math.sqrt(size)) for _ in range(4))
    change = DEFECT * ETA / math.sqrt(2)
    return normal(generator, size).mul_(WEIGHT), (g_a, g_b, a2.mul_(change).add_(g_a), b2.mul_(change).add_(g_b))


def block_basis(generator: Generator, size: int, count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of directions that live on one 128 x 128 matrix each: as the ops take them, and as a matrix (count, P)."""
    length = min(128 * 128, size // 2)
    starts = torch.arange(count // 2).repeat_interleave(2) * length % (size - length)
    rows = torch.stack([starts, torch.full((count,), length), torch.arange(count) * length], dim=1)
    values = normal(generator, count * length) / length**0.5
    return values, rows, reference.dense_basis(values, rows, size, values.dtype)


# ---------------------------------------------------------------------------------------------------------------- truth


def defect64(*gradients: Tensor) -> float:
    """D in float64, from the four as they are stored, never all of them widened at once."""
    chunks = zip(*(gradient[None].split(CHUNK, 1) for gradient in gradients), strict=True)
    return defect_of(torch.cat([reference.commutator(a, b, a2, b2, step(a)).sums for a, b, a2, b2 in chunks]))


def defect_of(sums: Tensor) -> float:
    """D from the sums of :func:`grokcurv.reference.commutator` over parts of the coordinates, a row each."""
    aa, bb, _, dd, *_ = sums.sum(0).tolist()
    return math.sqrt(dd / (aa * bb)) / ETA**2
