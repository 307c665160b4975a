"""Each kernel beside torch arithmetic written from its definition and beside its memory floor; one thread, one run.

The floor is the time that the bytes a kernel must move take at the bandwidth of `torch.dot`, measured beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from clock import fastest
from torch import Tensor

from grokcurv import ops

FLOAT64 = torch.float64
LARGE = 30_000_000
DEMO = 290_401
ETA = torch.tensor([1e-3], dtype=FLOAT64)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Comparison:
    """Times a kernel with pytest-benchmark, what it is compared with beside it, and notes the ratios."""

    def __init__(self, benchmark: Callable[..., None], note: Callable[[str], None]) -> None:
        self.benchmark, self.note = benchmark, note

    def __call__(self, kernel: Callable[[], object], naive: Callable[[], object], moved: int) -> tuple[float, float]:
        """The ratios naive / kernel and floor / kernel, where `moved` bytes make the floor."""
        self.benchmark.pedantic(kernel, rounds=5, warmup_rounds=1)
        x = torch.ones(LARGE)
        floor = fastest(lambda: torch.dot(x, x)) / x.nbytes * moved
        fused, plain = fastest(kernel), fastest(naive, rounds=2)
        self.note(
            f"kernel {fused * 1e3:8.2f} ms   torch {plain * 1e3:8.2f} ms = {plain / fused:5.1f}x   "
            f"floor {floor * 1e3:7.2f} ms ({moved / 1e6:.0f} MB) = {floor / fused:4.0%}"
        )
        return plain / fused, floor / fused


@pytest.fixture
def compare(benchmark: Callable[..., None], note: Callable[[str], None]) -> Comparison:
    return Comparison(benchmark, note)


def vectors(count: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, size, generator=generator) for _ in range(count)]


def block_basis(size: int, length: int = 128 * 128, count: int = 16) -> dict[str, Tensor]:
    """As the execution basis of the demo's model: pairs of directions, each living on one 128 x 128 matrix."""
    starts = torch.arange(count // 2).repeat_interleave(2) * length % (size - length)
    rows = torch.stack([starts, torch.full((count,), length), torch.arange(count) * length], dim=1)
    return {"values": torch.randn(count * length) / length**0.5, "rows": rows}


def test_perturb(compare: Comparison) -> None:
    theta, direction, out = torch.randn(LARGE), *vectors(2, LARGE)
    compare(
        lambda: ops.perturb(theta, direction, ETA, out=out),
        lambda: torch.sub(theta, 1e-3 * direction, out=out),
        moved=3 * theta.nbytes,
    )


def test_commutator(benchmark: Callable[..., None], note: Callable[[str], None], compare: Comparison) -> None:
    """The sums alone, beside the definition in tensor arithmetic and beside two `torch.dot` of the same vectors."""
    g_a, g_b, a2, b2 = vectors(4, LARGE)
    theta, eta = torch.randn(LARGE), 1e-3

    def naive() -> Tensor:
        theta_ab = theta - eta * g_a[0] - eta * b2[0]
        theta_ba = theta - eta * g_b[0] - eta * a2[0]
        delta = theta_ab - theta_ba
        return delta.norm() / ((eta * g_a[0]).norm() * (eta * g_b[0]).norm())

    def kernel() -> object:
        return ops.commutator(g_a, g_b, a2, b2, ETA)

    times_faster, _ = compare(kernel, naive, moved=4 * theta.nbytes)
    dots = fastest(lambda: (torch.dot(g_a[0], g_b[0]), torch.dot(a2[0], b2[0])))
    share = dots / fastest(kernel)
    note(f"{share:.0%} of the read bandwidth of two torch.dot over the same vectors")
    assert times_faster >= 10
    assert share >= 0.7


def test_commutator_with_theta(compare: Comparison) -> None:
    """The rounding terms too; the definition forms them in float64."""
    g_a, g_b, a2, b2 = vectors(4, DEMO)
    theta, step = torch.randn(DEMO), ETA[0]

    def naive() -> list[Tensor]:
        r = ((theta - 1e-3 * g_a) - 1e-3 * b2) - ((theta - 1e-3 * g_b) - 1e-3 * a2)
        change_a, change_b = a2.double() - g_a.double(), b2.double() - g_b.double()
        delta = step * (change_a - change_b)
        q = [(theta - 1e-3 * g).double() - (theta.double() - step * g.double()) for g in (g_a, g_b)]
        terms = [g_a.double(), g_b.double(), delta, change_a, change_b, r.double(), r.double() - delta, *q]
        return [x.square().sum() for x in terms]

    compare(lambda: ops.commutator(g_a, g_b, a2, b2, ETA, theta=theta), naive, moved=5 * theta.nbytes)


def test_commutator_on_a_basis(compare: Comparison) -> None:
    """Coefficients on 16 directions that live on matrices; the definition multiplies by a dense basis."""
    g_a, g_b, a2, b2 = vectors(4, DEMO)
    basis = block_basis(DEMO)
    dense = torch.zeros(16, DEMO)
    for row, (start, length, offset) in zip(dense, basis["rows"].tolist(), strict=True):
        row[start : start + length] = basis["values"][offset : offset + length]

    def naive() -> tuple[Tensor, Tensor]:
        delta = 1e-3 * ((a2[0] - g_a[0]) - (b2[0] - g_b[0]))
        return delta.norm(), dense @ delta

    compare(
        lambda: ops.commutator(g_a, g_b, a2, b2, ETA, **basis), naive, moved=4 * g_a.nbytes + basis["values"].nbytes
    )


def test_subspace_split(compare: Comparison) -> None:
    (v,) = vectors(1, LARGE)
    basis = {
        "values": torch.randn(4 * LARGE // 8),
        "rows": torch.tensor([[j * LARGE // 8, LARGE // 8, j * LARGE // 8] for j in range(4)]),
    }
    parts = basis["values"].view(4, -1)

    def naive() -> tuple[Tensor, Tensor]:
        return v.double().square().sum(), (v.view(8, -1)[:4].double() * parts.double()).sum(-1)

    compare(lambda: ops.subspace_split(v, **basis), naive, moved=v.nbytes + basis["values"].nbytes)


def test_subspace_filter(compare: Comparison) -> None:
    """Reads g twice (coefficients, then the new coordinates), writes it once."""
    (g,) = vectors(1, DEMO)
    basis = block_basis(DEMO)
    dense = torch.zeros(16, DEMO, dtype=FLOAT64)
    for row, (start, length, offset) in zip(dense, basis["rows"].tolist(), strict=True):
        row[start : start + length] = basis["values"][offset : offset + length]

    def naive() -> None:
        x = g[0].double()
        g[0] = 0.5 * x + 0.5 * (dense.T @ (dense @ x))

    compare(
        lambda: ops.subspace_filter_(g, **basis, strength=0.5), naive, moved=3 * g.nbytes + 2 * basis["values"].nbytes
    )


def test_gram_row(compare: Comparison) -> None:
    """One more row against 60, as the streaming PCA adds it; the definition is a float64 product."""
    rows, origin = torch.randn(60, 8 * 128 * 128), torch.randn(8 * 128 * 128)
    new = rows[-1:]
    compare(
        lambda: ops.gram(new, rows, origin=origin),
        lambda: (new.double() - origin.double()) @ (rows.double() - origin.double()).T,
        moved=rows.nbytes,
    )


@pytest.mark.parametrize(("n", "size"), [(60, 8 * 128 * 128), (300, 128 * 128), (48, DEMO)])
def test_gram_matrix(compare: Comparison, n: int, size: int) -> None:
    rows, origin = torch.randn(n, size), torch.randn(size)

    def naive() -> Tensor:
        x = rows.double() - origin.double()
        return x @ x.T

    compare(lambda: ops.gram(rows, origin=origin), naive, moved=rows.nbytes)


@pytest.mark.parametrize(("n", "k"), [(48, 48), (60, 8), (60, 60), (128, 16), (300, 8)])
def test_eigh(compare: Comparison, n: int, k: int) -> None:
    """Leading pairs of eight matrices, beside LAPACK, which finds all of them."""
    x = torch.randn(8, n, n, dtype=FLOAT64) * torch.arange(1, n + 1, dtype=FLOAT64).reciprocal()
    a = x @ x.mT
    compare(lambda: ops.eigh(a, k), lambda: torch.linalg.eigh(a), moved=a.nbytes)


def test_eigh_of_every_prefix(compare: Comparison) -> None:
    """The leading pair of the first 2, 3, ... 300 rows, as the history of the first component asks for it."""
    x = torch.randn(300, 1000, dtype=FLOAT64).cumsum(0)
    x -= x.mean(0)
    gram = x @ x.T
    prefixes = [gram[:n, :n].contiguous()[None] for n in range(2, 301)]

    def run(solve: Callable[[Tensor], object]) -> None:
        for a in prefixes:
            solve(a)

    compare(lambda: run(lambda a: ops.eigh(a, 1)), lambda: run(torch.linalg.eigh), sum(a.nbytes for a in prefixes))


@pytest.mark.parametrize(("m", "q"), [(48, 16), (24, 12)])
def test_rotate(compare: Comparison, note: Callable[[str], None], m: int, q: int) -> None:
    """In place, beside a float64 product of rows that are float64 already, which needs a second buffer."""
    rows = torch.randn(m, DEMO)
    coefficients = torch.linalg.qr(torch.randn(m, q, dtype=FLOAT64)).Q.mT[None].contiguous()
    wide, out = rows.double(), torch.empty(q, DEMO, dtype=FLOAT64)
    compare(
        lambda: ops.rotate_(rows, coefficients),
        lambda: torch.matmul(coefficients[0], wide, out=out),
        moved=(m + q) * DEMO * rows.element_size(),
    )
    rate = 2 * m * q * DEMO / fastest(lambda: ops.rotate_(rows, coefficients))
    note(f"{rate / 1e9:.0f} Gflop/s")


@pytest.mark.parametrize("size", [4096, 65536])
@pytest.mark.parametrize("n", [1, 8])
def test_sketch(compare: Comparison, n: int, size: int) -> None:
    """Beside an index_add_ with places and signs stored, 12 bytes a coordinate."""
    x = torch.randn(n, LARGE // n)
    places = torch.randint(0, size, (x.shape[1],))
    signs = torch.randint(0, 2, (x.shape[1],)).float() * 2 - 1

    def naive() -> Tensor:
        return torch.zeros(n, size).index_add_(1, places, signs * x)

    compare(lambda: ops.sketch(x, size, 1), naive, moved=x.nbytes)
