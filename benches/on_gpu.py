"""The CUDA kernels beside the bytes and the arithmetic they cannot avoid, and beside plain PyTorch on the same GPU.

    python3 benches/on_gpu.py              # prints tables in Markdown, line by line; `make gpu` keeps them
    python3 benches/on_gpu.py --rehearse   # the same code on the CPU, at small sizes: its times say nothing

Times are the GPU's own: events around calls that were queued while a kernel kept it busy, so that it never waits for
Python. They are medians over calls whose inputs take turns, more than the cache holds, fresh random numbers in each
run. The floor of a kernel is the larger of two times: of the bytes that it must move at the bandwidth of a copy on the
device, and of its float64 operations at the rate of a large matrix product, both measured first in the same run. A
kernel is timed only once its result agrees with float64 arithmetic.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

import grokcurv as gc
from grokcurv import ops, reference
from grokcurv.bench import naive
from grokcurv.flat import attention_segments, flatten
from grokcurv.modular import TrainConfig, Transformer
from grokcurv.modular.ensemble import Ensemble, Rows
from grokcurv.modular.trainer import Training

REHEARSAL = "--rehearse" in sys.argv
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
SCALE = 1000 if REHEARSAL else 1
LARGE = 100_000_000 // SCALE
WIDE = 30_000_000 // SCALE
"""Of a row among many."""
DEMO = 290_401 // SCALE
"""The demo's model."""
CACHE = 256 * 2**20 // SCALE
"""Bytes after which a cache has forgotten the first."""
BUSY = 40_000_000
"""Clock cycles, 20 ms or so: longer than it takes to queue the calls of a measurement."""
FLOAT64 = torch.float64

Run = Callable[[], object]


@dataclass
class Case:
    name: str
    runs: list[Run]
    """Alike, each on inputs of its own."""
    plain: list[Run]
    check: Run
    """Raises if a result is wrong."""
    moved: int = 0
    """Bytes that must be read or written; 0: no floor is known."""
    flops: int = 0
    """Operations in float64; a fused multiply-add is two."""
    share: float = 0.0
    """Of the floor in the time: what is asked for."""
    faster: float = 0.0
    """How many times, than plain PyTorch: what is asked for."""


def seconds(runs: list[Run], rounds: int = 20) -> float:
    """The median time of a call."""
    turns = cycle(runs)
    for _ in range(3):
        next(turns)()
    if REHEARSAL:
        start = time.perf_counter()
        next(turns)()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY)
    events[0].record()
    for event in events[1:]:
        next(turns)()
        event.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in pairwise(events)) / 1e3


# ----------------------------------------------------------------------------------------------------------- ceilings


@dataclass
class Ceilings:
    bandwidth: float
    """Bytes a second, read and written, of a copy."""
    rate: float
    """Float64 operations a second of a matrix product."""


def ceilings() -> Ceilings:
    source = numbers(2**28 // SCALE)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds([lambda: target.copy_(source)])
    n = 8192 // (8 if REHEARSAL else 1)
    a, b = numbers(2, n, n, dtype=FLOAT64)
    product = torch.empty_like(a)
    rate = 2 * n**3 / seconds([lambda: torch.mm(a, b, out=product)], rounds=5)
    row(f"copy on the device, {source.nbytes / 2**20:.0f} MiB", f"{bandwidth / 1e12:.3f} TB/s read and written")
    row(f"float64 matrix product, {n} x {n}", f"{rate / 1e12:.1f} Tflop/s")
    try:
        vector = f"{vector_rate() / 1e12:.1f} Tflop/s"
    except Exception as error:  # torch calls its compiler of such kernels experimental; no floor is made of this
        vector = f"not measured: {type(error).__name__}"
    row("float64 fused multiply-adds on registers", vector)
    return Ceilings(bandwidth, rate)


def vector_rate() -> float:
    """Without tensor cores: chains of multiply-adds, one for each of many numbers."""
    steps = 4096
    source = (
        f"template <typename T> T chain(T x, T y) {{ for (int i = 0; i < {steps}; ++i) x = fma(x, y, y); return x; }}"
    )
    chain = torch.cuda.jiterator._create_jit_fn(source)
    x, y = numbers(2, 2**22, dtype=FLOAT64) / 8
    return 2 * steps * x.numel() / seconds([lambda: chain(x, y)], rounds=5)


# ------------------------------------------------------------------------------------------------------------ kernels


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def step_size() -> Tensor:
    return torch.full((1,), 1e-3, dtype=FLOAT64, device=DEVICE)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * wanted.abs().max().item())


def in_turns(moved: int, make: Callable[[], tuple[Run, Run]]) -> tuple[list[Run], list[Run]]:
    """As many pairs of a kernel and its plain version, on inputs of their own, as fill the cache."""
    made = [make() for _ in range(max(1, CACHE // moved))]
    return [kernel for kernel, _ in made], [plain for _, plain in made]


def block_basis(p: int) -> dict[str, Tensor]:
    """Sixteen rows in pairs, like the execution basis of the demo: each pair on an eighth of the coordinates."""
    length = p // 8
    starts = torch.arange(8).repeat_interleave(2) * length
    rows = torch.stack([starts, torch.full((16,), length), torch.arange(16) * length], dim=1)
    return {"values": numbers(16 * length) / length**0.5, "rows": rows}


def perturb(p: int) -> Case:
    moved, eta = 3 * 4 * p, step_size()

    def make() -> tuple[Run, Run]:
        theta, directions, out = numbers(p), numbers(1, p), numbers(1, p)
        return (
            lambda: ops.perturb(theta, directions, eta, out=out),
            lambda: torch.sub(theta, 1e-3 * directions, out=out),
        )

    def check() -> None:
        theta, directions = numbers(p), numbers(1, p)
        close(ops.perturb(theta, directions, eta), reference.perturb(theta, directions, eta), 0.0)

    return Case(f"perturb, P = {p:,}", *in_turns(moved, make), check, moved)


def commutator(p: int, theta: bool = False, basis: bool = False, **asked: float) -> Case:
    eta, step = step_size(), 1e-3
    space = block_basis(p) if basis else {}
    dense = reference.dense_basis(**space, size=p).float() if basis else None
    point = numbers(p)
    options = {**space, "theta": point if theta else None}

    def make() -> tuple[Run, Run]:
        gradients = [numbers(1, p) for _ in range(4)]
        g_a, g_b, a2, b2 = (x[0] for x in gradients)

        def direct() -> Tensor:
            """As the formula reads, and as the published code has it."""
            theta_ab = point - step * g_a - step * b2
            theta_ba = point - step * g_b - step * a2
            delta = theta_ab - theta_ba
            return delta.norm() / ((step * g_a).norm() * (step * g_b).norm())

        def with_basis() -> tuple[Tensor, Tensor]:
            delta = step * ((a2 - g_a) - (b2 - g_b))
            return delta.norm(), dense @ delta

        def rounding_terms() -> Tensor:
            return reference.commutator(*gradients, eta, theta=point).sums

        plain = rounding_terms if theta else with_basis if basis else direct
        return lambda: ops.commutator(*gradients, eta, **options), plain

    def check() -> None:
        gradients = [numbers(1, p) for _ in range(4)]
        got, wanted = (module.commutator(*gradients, eta, **options) for module in (ops, reference))
        for column, truth in zip(got.sums[0], wanted.sums[0], strict=True):
            close(column, truth)
        if basis:
            close(got.coefficients, wanted.coefficients)

    moved = (5 if theta else 4) * 4 * p + sum(x.nbytes for x in space.values())
    flops = (31 if theta else 16) * p + 2 * (len(space["values"]) if basis else 0)
    name = f"commutator, P = {p:,}" + (", rounding terms" if theta else "") + (", basis of 16" if basis else "")
    return Case(name, *in_turns(moved, make), check, moved, flops, **asked)


def subspace_split(p: int) -> Case:
    space = block_basis(p)
    parts = space["values"].view(8, 2, -1)
    moved = 4 * p + space["values"].nbytes

    def make() -> tuple[Run, Run]:
        v = numbers(1, p)
        inside = v[0, : 8 * (p // 8)].view(8, -1, 1)
        return (
            lambda: ops.subspace_split(v, **space),
            lambda: (v.double().square().sum(), parts.double() @ inside.double()),
        )

    def check() -> None:
        v = numbers(1, p)
        for got, wanted in zip(ops.subspace_split(v, **space), reference.subspace_split(v, **space), strict=True):
            close(got, wanted)

    return Case(
        f"subspace_split on 16 rows, P = {p:,}", *in_turns(moved, make), check, moved, 2 * (p + len(space["values"]))
    )


def subspace_filter(p: int) -> Case:
    """Reads g twice, for the coefficients and for the new coordinates."""
    space = block_basis(p)
    parts = space["values"].view(8, 2, -1)
    moved = 3 * 4 * p + 2 * space["values"].nbytes

    def make() -> tuple[Run, Run]:
        g = numbers(1, p)
        inside = g[0, : 8 * (p // 8)].view(8, -1, 1)

        def plain() -> None:
            along = parts.mT.double() @ (parts.double() @ inside.double())
            g.mul_(0.5)
            inside.add_(along, alpha=0.5)

        return lambda: ops.subspace_filter_(g, **space, strength=0.5), plain

    def check() -> None:
        g = numbers(1, p)
        wanted = reference.subspace_filter(g, **space, strength=0.5)
        close(ops.subspace_filter_(g, **space, strength=0.5), wanted, 1e-6)

    flops = 3 * p + 4 * len(space["values"])
    return Case(f"subspace_filter_ on 16 rows, P = {p:,}", *in_turns(moved, make), check, moved, flops)


def gram(n: int, m: int | None, p: int, **asked: float) -> Case:
    """n rows among themselves, or beside m others."""
    x, y = numbers(n, p), None if m is None else numbers(m, p)

    def plain() -> Tensor:
        wide = x.double()
        return wide @ (wide if y is None else y.double()).T

    pairs = n * (n + 1) // 2 if m is None else n * m
    moved = (n + (m or 0)) * p * 4
    name = f"gram, {n} x {n if m is None else m} rows, P = {p:,}"
    return Case(
        name,
        [lambda: ops.gram(x, y)],
        [plain],
        lambda: close(ops.gram(x, y)[0], plain()),
        moved,
        2 * pairs * p,
        **asked,
    )


def rotate(m: int, q: int, p: int, **asked: float) -> Case:
    """In place; the rotation is orthogonal, so that rows keep their size however often it is done."""
    rows = numbers(m, p)
    rotation = torch.linalg.qr(numbers(m, m, dtype=FLOAT64)).Q[None, :q].contiguous()

    def plain() -> Tensor:
        return torch.matmul(rotation[0], rows.double()).float()

    def check() -> None:
        wanted = plain()
        close(ops.rotate(rows, rotation), wanted, 1e-6)

    return Case(
        f"rotate_, {m} rows to {q}, P = {p:,}",
        [lambda: ops.rotate_(rows, rotation)],
        [plain],
        check,
        (m + q) * p * 4,
        2 * m * q * p,
        **asked,
    )


def eigh(batch: int, n: int) -> Case:
    x = numbers(batch, n, n, dtype=FLOAT64) * torch.arange(1, n + 1, device=DEVICE).reciprocal()
    a = x @ x.mT

    def check() -> None:
        values, vectors = ops.eigh(a, n)
        close(a @ vectors, vectors * values[:, None], 1e-12)
        close(values.flip(1), torch.linalg.eigvalsh(a), 1e-12)

    return Case(
        f"eigh, {batch} of {n} x {n}, all pairs", [lambda: ops.eigh(a, n)], [lambda: torch.linalg.eigh(a)], check
    )


def sketch(p: int, size: int) -> Case:
    x = numbers(1, p)
    places = torch.randint(size, (p,), device=DEVICE)
    signs = torch.randint(2, (p,), device=DEVICE).float() * 2 - 1

    def plain() -> Tensor:
        """With the places and the signs stored, 12 bytes a coordinate."""
        return torch.zeros(1, size, device=DEVICE).index_add_(1, places, signs * x)

    def check() -> None:
        close(ops.sketch(x, size, 7).cpu(), ops.sketch(x.cpu(), size, 7), 1e-12)

    moved = x.nbytes + 8 * size
    return Case(f"sketch to {size}, P = {p:,}", [lambda: ops.sketch(x, size, 7)], [plain], check, moved, p)


def cases() -> Iterator[Callable[[], Case]]:
    """Each made when its turn comes, so that its memory is free again for the next."""
    for p in (LARGE, DEMO):
        yield lambda p=p: perturb(p)
        yield lambda p=p: commutator(p, **({"share": 0.85, "faster": 8.0} if p == LARGE else {}))
        yield lambda p=p: commutator(p, theta=True)
        yield lambda p=p: commutator(p, basis=True)
        yield lambda p=p: subspace_split(p)
        yield lambda p=p: subspace_filter(p)
    yield lambda: gram(32, None, WIDE, share=0.7)
    yield lambda: gram(1, 64, WIDE)
    yield lambda: gram(48, None, DEMO)
    yield lambda: rotate(32, 32, WIDE, share=0.7)
    yield lambda: rotate(32, 16, WIDE, share=0.7)
    yield lambda: rotate(48, 16, DEMO)
    for batch, n in ((8, 48), (64, 128), (1, 450 if not REHEARSAL else 150)):
        yield lambda batch=batch, n=n: eigh(batch, n)
    yield lambda: sketch(LARGE, 65536)


def measure(case: Case, ceiling: Ceilings) -> None:
    """Prints the row of a case."""
    case.check()
    fused, plain = seconds(case.runs), seconds(case.plain)
    times = f"{plain / fused:.1f}x"
    if not case.moved:
        row(case.name, milliseconds(fused), "", "", "", "", milliseconds(plain), times, "")
        return
    floors = {"bytes": case.moved / ceiling.bandwidth, "flops": case.flops / ceiling.rate}
    by, floor = max(floors.items(), key=lambda item: item[1])
    asked = [
        f"{'met' if got >= wanted else 'MISSED'}: {text}"
        for got, wanted, text in (
            (floor / fused, case.share, f"{case.share:.0%} of the floor"),
            (plain / fused, case.faster, f"{case.faster:.0f}x"),
        )
        if wanted
    ]
    row(
        *(case.name, milliseconds(fused), f"{case.moved / 1e6:,.1f}", f"{case.flops / 1e9:,.2f}"),
        *(f"{milliseconds(floor)} ({by})", f"{floor / fused:.0%}", milliseconds(plain), times, "; ".join(asked)),
    )


# -------------------------------------------------------------------------------------------------- whole measurement


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def wall(run: Run, rounds: int = 5) -> float:
    """The median time of a call, its waits included."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        if not REHEARSAL:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def whole_measurement(pairs: int) -> None:
    """The demo's model: K pairs and an execution basis of 16 rows. Wall-clock time of the whole, with its waits."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from gpu import capture

    def draw() -> tuple[Tensor, Tensor]:
        return torch.randint(97, (512, 2), device=DEVICE), torch.randint(97, (512,), device=DEVICE)

    model = Transformer().to(DEVICE)
    size = flatten(model).numel()
    blocks = [(s.start, torch.linalg.qr(numbers(s.length, 2)).Q.T) for s in attention_segments(model)]
    basis = gc.Subspace.from_blocks(size, blocks)
    held, fresh = ([(draw(), draw()) for _ in range(pairs)] for _ in range(2))
    dense = basis.to_dense().T.contiguous()
    probe = gc.CommutatorProbe(model, loss_fn, basis=basis)

    plain = wall(lambda: naive.measure(model, loss_fn, held, dense, 1e-3), 3)
    row("naive, eager", milliseconds(plain), "")

    def eager() -> str:
        took = wall(lambda: probe.measure(held))
        return f"{milliseconds(took)} | {plain / took:.1f}x"

    def captured() -> str:
        stats, replay = capture(lambda: probe.measure(held))
        for into, source in zip(held, fresh, strict=True):
            for a, b in zip(into, source, strict=True):
                for x, y in zip(a, b, strict=True):
                    x.copy_(y)
        replay()
        close(stats.defect, probe.measure(fresh).defect, 1e-3)
        took = wall(replay)
        return f"{milliseconds(took)} | {plain / took:.1f}x, {'met' if plain / took >= 5 else 'MISSED'}: 5x"

    print(f"| ours, eager | {attempt(eager)} |", flush=True)
    if not REHEARSAL:
        print(f"| ours, captured and replayed with new batches | {attempt(captured)} |", flush=True)


def ensembles(sizes: tuple[int, ...]) -> None:
    """Model-steps a second of R runs of the demo's model as one program, eager; and the share of float32 products.

    The floor is the time of the gradients' 1.10 Gflop a run (four times as much with a measurement of successive steps)
    at the rate of a large float32 matrix product.
    """
    n = 8192 // (16 if REHEARSAL else 1)
    a, b = numbers(2, n, n)
    rate = 2 * n**3 / seconds([lambda: torch.mm(a, b)], rounds=5)
    row(f"float32 matrix product, {n} x {n}", f"{rate / 1e12:.1f} Tflop/s", "", "")
    config = TrainConfig(device=str(DEVICE), successive=True, pairs=1, measure_every=1, pca_every=0)
    alone = None
    for size in sizes:
        for measured in (False, True):
            configs = [replace(config, seed=seed, measure_every=int(measured)) for seed in range(size)]

            def steps(configs: list[TrainConfig] = configs, measured: bool = measured) -> str:
                nonlocal alone
                runs = [Training(config, None) for config in configs]
                strategy = "vmap" if len(runs) > 1 else "loop"
                together, rows = Ensemble(runs, strategy), Rows(runs)

                def step() -> None:
                    together.update(rows)
                    for run in runs:
                        run.step += 1

                step()
                pace = len(runs) / wall(step)
                alone = alone or pace
                share = pace * (4 if measured else 1) * 1.10e9 / rate
                asked = ""
                if measured and len(runs) == 64:
                    asked = f", {'met' if pace >= 30 * alone else 'MISSED'}: 30x"
                return f"{pace:,.0f} | {100 * share:.0f} % | {pace / alone:.1f}x{asked}"

            print(
                f"| R = {size}, {'measured at every step' if measured else 'unmeasured'} | {attempt(steps)} |",
                flush=True,
            )


# ------------------------------------------------------------------------------------------------------------- tables


def milliseconds(s: float) -> str:
    return f"{s * 1e3:.3g} ms"


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def header(*cells: str) -> None:
    print()
    row(*cells)
    row(*("---" for _ in cells))


_failed: list[str] = []


def attempt(run: Callable[[], str | None]) -> str:
    """What it returns, or why it did not."""
    try:
        return run() or ""
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        _failed.append(text)
        return f"did not work: {text[:200]}"


def main() -> int:
    header("ceiling", "measured" if not REHEARSAL else "rehearsed on the CPU")
    ceiling = ceilings()
    columns = ("time", "MB", "Gflop", "floor", "floor / time", "plain PyTorch", "ratio", "asked for")
    header("kernel", *columns)
    for make in cases():
        failure = attempt(lambda make=make: measure(make(), ceiling))
        if failure:
            print(f"| {failure} |", flush=True)
        if not REHEARSAL:
            torch.cuda.empty_cache()
    pairs = 1 if REHEARSAL else 9
    header(f"whole measurement of the demo's model, K = {pairs}", "time", "faster than naive")
    failure = attempt(lambda: whole_measurement(pairs))
    if failure:
        print(f"| {failure} |", flush=True)
    header("training of the demo's model", "model-steps a second", "of float32 products", "of the first")
    failure = attempt(lambda: ensembles((1, 2) if REHEARSAL else (1, 16, 64, 256)))
    if failure:
        print(f"| {failure} |", flush=True)
    return 1 if _failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
