"""What holds for every op on a GPU. Without one, tests/rehearsal.py runs this file with the emulator in its place.

The classes at the end are the tests of the kernels under tests/, their tensors sent to the GPU and back.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cases
import gpu
import pytest
import test_commutator_op
import test_draw
import test_eigh
import test_gram
import test_perturb
import test_rotate
import test_sketch
import test_subspace_op
import torch
from cases import Inputs
from gpu import is_table, there
from test_ops import assert_same_bits, raw_arguments
from torch import Generator, Tensor

from grokcurv import ops, reference

pytestmark = pytest.mark.gpu

SHAPES = (*cases.SHAPES, (2, 8192))
"""The last: vectors in a row that are all aligned to 16 bytes."""
SMALL = ((2, 33), (1, 4100))
MANY, LONG = 22, 100_000_000
"""Vectors of so many coordinates: together more than 2**31 numbers."""


def emulator() -> Any:
    pytest.importorskip("grokcurv._emulator", reason="grokcurv._emulator was not built: set GROKCURV_EMULATOR=ON")
    return gpu.emulator()


def samples(op: str, generator: Generator) -> list[Inputs]:
    """Those with something to compute."""
    every = cases.sample_inputs(op, generator, SHAPES)
    return [inputs for inputs in every if all(x.numel() for x in cases.run(op, inputs)[:1])]


def one_of_each_dtype(op: str, generator: Generator) -> list[Inputs]:
    chosen = {}
    for inputs in samples(op, generator):
        chosen[str([x.dtype for x in inputs.values() if isinstance(x, Tensor)])] = inputs
    return list(chosen.values())


def other_numbers(inputs: Inputs, generator: Generator) -> Inputs:
    """The same shapes, tables and options; every tensor holds its numbers in another order."""

    def shuffle(x: Any) -> Any:
        if not isinstance(x, Tensor) or is_table(x):
            return x
        return x.flatten()[torch.randperm(x.numel(), generator=generator)].view(x.shape)

    return {name: shuffle(x) for name, x in inputs.items()}


def fill(tensors: Inputs, numbers: Inputs) -> None:
    """Copies to the GPU, into tensors that are there."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and not is_table(x):
            x.copy_(numbers[name])


def in_place(op: str, inputs: Inputs, function: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
    """As cases.run, but on these very tensors."""
    results = cases.outputs((function or getattr(ops, op))(**inputs))
    return results + tuple(inputs[name] for name in cases.WRITES.get(op, ())[1:] if name in inputs)


def assert_equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """To the bit, wherever they are."""
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert_same_bits(a.cpu(), b.cpu())


# --------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("op", cases.OPS)
def test_bits_are_those_of_the_emulator(op: str, generator: Generator) -> None:
    """One source, and IEEE arithmetic as it is written down: no bit can differ."""
    for inputs in cases.sample_inputs(op, generator, SHAPES):
        with emulator():
            wanted = cases.run(op, inputs)
        assert_equal(cases.run(op, there(inputs)), wanted)


@pytest.mark.parametrize("op", cases.OPS)
def test_a_few_small_samples(op: str, generator: Generator) -> None:
    """For compute-sanitizer, under which all takes long: little of anything but the kernels."""
    for inputs in cases.sample_inputs(op, generator, SMALL):
        with emulator():
            wanted = cases.run(op, inputs)
        assert_equal(in_place(op, there(inputs)), wanted)


@pytest.mark.parametrize("op", cases.OPS)
def test_bits_do_not_change_from_run_to_run(op: str, generator: Generator) -> None:
    for inputs in map(there, samples(op, generator)):
        first = cases.run(op, inputs)
        for _ in range(3):
            assert_equal(cases.run(op, inputs), first)


@pytest.mark.parametrize("op", cases.OPS)
def test_bits_do_not_depend_on_alignment(op: str, generator: Generator) -> None:
    """Vectors that begin 2, 4 or 8 bytes after a multiple of 16 take other loads."""

    def shifted(x: Any) -> Any:
        if not isinstance(x, Tensor) or is_table(x):
            return x
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    for inputs in map(there, samples(op, generator)):
        wanted = cases.run(op, inputs)
        assert_equal(in_place(op, {name: shifted(x) for name, x in inputs.items()}), wanted)


@pytest.mark.parametrize("op", ["perturb", "commutator", "subspace_split", "subspace_filter_"])
def test_bits_do_not_depend_on_the_batch(op: str, generator: Generator) -> None:
    for inputs in map(there, samples(op, generator)):
        together = cases.run(op, inputs)
        for i in range(len(together[0])):
            alone = cases.run(op, cases.of_one(inputs, i))
            assert_equal(alone, tuple(x[i : i + 1] for x in together))


# ------------------------------------------------------------------------------------------------- streams and graphs


@pytest.mark.parametrize("op", cases.OPS)
def test_work_goes_to_the_current_stream(op: str, generator: Generator) -> None:
    """Inputs that arrive late there: on any other stream the op would come before them."""
    for inputs in one_of_each_dtype(op, generator):
        late, wanted = there(other_numbers(inputs, generator)), cases.run(op, there(inputs))
        numbers = there(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # some ten milliseconds
            fill(late, numbers)
            got = in_place(op, late)
        stream.synchronize()
        assert_equal(got, wanted)


@pytest.mark.parametrize("op", cases.OPS)
def test_capture_and_replay_with_new_numbers(op: str, generator: Generator) -> None:
    """One graph of all samples: what each of them works in is its own."""
    every = samples(op, generator)
    held = [there(inputs) for inputs in every]
    results, replay = gpu.capture(lambda: [in_place(op, inputs) for inputs in held])
    for _ in range(2):
        numbers = [other_numbers(inputs, generator) for inputs in every]
        for tensors, new in zip(held, numbers, strict=True):
            fill(tensors, new)
        replay()
        for result, new in zip(results, numbers, strict=True):
            assert_equal(result, cases.run(op, there(new)))


def test_a_replay_draws_for_the_step_that_it_finds() -> None:
    seeds, steps, n = (torch.tensor(x, device=gpu.DEVICE) for x in ([5, -1, 2**40], [0, 7, 2**31], [97, 0, 2**31 + 1]))

    def step() -> Tensor:
        drawn = ops.draw(seeds, 3, steps, n, 33)
        steps.add_(1)
        return drawn

    drawn, replay = gpu.capture(step)
    for _ in range(3):
        replay()
        assert torch.equal(drawn.cpu(), reference.draw(seeds.cpu(), 3, steps.cpu() - 1, n.cpu(), 33))


FIRST_CALL_IN_A_CAPTURE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import cases, gpu
from grokcurv import ops
generator = torch.Generator().manual_seed(0)
ops.perturb(**gpu.there(next(cases.sample_inputs("perturb", generator))))
for op in cases.OPS:
    inputs = gpu.there(next(cases.sample_inputs(op, generator)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        getattr(ops, op)(**inputs)
    graph.replay()
torch.cuda.synchronize()
print("captured", *cases.OPS)
"""


def test_the_first_call_of_an_op_may_be_in_a_capture() -> None:
    """Of any op once one has run: that loads the kernels of all, which a capture does not allow."""
    command = [sys.executable, "-c", FIRST_CALL_IN_A_CAPTURE, str(cases.__file__).removesuffix("/cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["captured", *cases.OPS]


@pytest.mark.parametrize("op", cases.OPS)
def test_nothing_waits_for_the_gpu(op: str, generator: Generator) -> None:
    for inputs in map(there, samples(op, generator)):
        with gpu.no_synchronisation():
            in_place(op, inputs)


def test_a_wait_is_noticed() -> None:
    """The test of the test above."""
    x = torch.ones(1, device=gpu.DEVICE)
    with pytest.raises(RuntimeError), gpu.no_synchronisation():
        x.item()


# ----------------------------------------------------------------------------------------------- torch around the ops


@pytest.mark.parametrize("op", cases.OPS)
def test_registration(op: str, generator: Generator) -> None:
    for inputs in map(there, one_of_each_dtype(op, generator)):
        torch.library.opcheck(getattr(torch.ops.grokcurv, op).default, (), raw_arguments(op, inputs))


def test_registration_of_perturb_out(generator: Generator) -> None:
    inputs = there(next(cases.sample_inputs("perturb", generator)))
    out = torch.empty_like(inputs["directions"])
    torch.library.opcheck(torch.ops.grokcurv.perturb_out.default, (), {**inputs, "out": out})


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", cases.OPS)
def test_compiles_into_one_graph(op: str, backend: str, generator: Generator) -> None:
    """With arithmetic around it, for which inductor makes kernels of its own."""
    if backend == "inductor":
        pytest.importorskip("triton", reason="no triton, of which inductor makes kernels for a GPU")

    def function(**inputs: Any) -> tuple[Tensor, ...]:
        return tuple(2 * x for x in cases.outputs(getattr(ops, op)(**inputs)))

    torch._dynamo.reset()
    inputs = there(samples(op, generator)[0])
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_equal(cases.run(op, inputs, compiled), cases.run(op, inputs, function))


# --------------------------------------------------------------------------------------------------- devices, refusals


def test_devices_other_than_the_current_one(generator: Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device: which one an op runs on is not in doubt")
    for op in cases.OPS:
        inputs = there(samples(op, generator)[0])
        elsewhere = {name: x.to("cuda:1") if isinstance(x, Tensor) and x.is_cuda else x for name, x in inputs.items()}
        got = in_place(op, elsewhere)
        assert {x.device for x in got} == {torch.device("cuda:1")}
        assert torch.cuda.current_device() == 0
        assert_equal(got, cases.run(op, inputs))


TABLES = {"commutator": ("rows", "segments"), "subspace_split": ("rows",), "subspace_filter_": ("rows",)}
TABLES |= {op: ("segments",) for op in ("gram", "rotate", "rotate_")}


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in TABLES.items() for name in names])
def test_tables_on_the_gpu_are_refused(op: str, name: str, generator: Generator) -> None:
    inputs = there(next(x for x in cases.sample_inputs(op, generator) if name in x))
    inputs[name] = inputs[name].to(gpu.DEVICE)
    with pytest.raises(ValueError, match=rf"{name} must be on the CPU.*{name}\.cpu\(\)"):
        getattr(ops, op)(**inputs)


@pytest.mark.parametrize("op", cases.OPS)
def test_vectors_left_on_the_cpu_are_refused(op: str, generator: Generator) -> None:
    for inputs in one_of_each_dtype(op, generator):
        _, *others = [name for name, x in inputs.items() if isinstance(x, Tensor) and not is_table(x)]
        for name in others:
            mixed = {**there(inputs), name: inputs[name]}
            with pytest.raises(ValueError, match=f"{name} must be on {gpu.DEVICE} like the other tensors, got cpu"):
                getattr(ops, op)(**mixed)


# ----------------------------------------------------------------------------------------------------- large vectors


@pytest.fixture
def much_memory() -> Iterator[None]:
    needed = 5 * MANY * LONG * 2
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(gpu.DEVICE)
    if free < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB of free GPU memory, of which there are {free / 2**30:.0f}")
    yield
    torch.cuda.empty_cache()


def whole_numbers(n: int, p: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of one digit: sums of their products are exact, in whatever order."""
    generator = torch.Generator(gpu.DEVICE).manual_seed(seed)
    return torch.randint(-9, 10, (n, p), generator=generator, device=gpu.DEVICE, dtype=torch.int8).to(dtype)


def exact_dot(x: Tensor, y: Tensor) -> float:
    """Of two vectors of whole numbers, piece by piece to save memory."""
    pieces = zip(x.split(2**24), y.split(2**24), strict=True)
    return sum((a.double() * b.double()).sum().item() for a, b in pieces)


@pytest.mark.parametrize("odd", [0, 1])
def test_more_than_2_to_the_31_numbers(much_memory: None, odd: int, generator: Generator) -> None:
    """The last of many rows, against exact sums and against the same row alone."""
    p, seed = LONG + odd, int(torch.randint(2**31, (), generator=generator))
    x, y = (whole_numbers(MANY, p, torch.bfloat16, seed + k) for k in range(2))
    eta = torch.full((MANY,), 0.5, dtype=torch.float64, device=gpu.DEVICE)
    last, u, v = MANY - 1, x[-1], y[-1]
    values, rows = whole_numbers(1, 10_000, torch.float32, seed + 2)[0], torch.tensor([[p - 10_000, 10_000, 0]])
    segments = torch.tensor([[0, p], [p - 999, 999]])
    aa, bb, ab = exact_dot(u, u), exact_dot(v, v), exact_dot(u, v)
    end = (v - u)[-10_000:].double()  # delta = eta ((a2 - g_a) - (b2 - g_b)) with a2 = g_b, b2 = g_a

    got = ops.commutator(x, y, y, x, eta, values=values, rows=rows, segments=segments)
    dd = aa + bb - 2 * ab
    assert got.sums[last].tolist() == [aa, bb, ab, dd, dd, dd]
    assert got.coefficients[last].tolist() == [(end @ values.double()).item()]
    assert got.energies[last].tolist() == [dd, end[-999:].square().sum().item()]

    norm2, coefficients = ops.subspace_split(x, values, rows)
    assert norm2[last].item() == aa
    assert coefficients[last].tolist() == [(u[-10_000:].double() @ values.double()).item()]

    gram = ops.gram(x[-2:], x)[0]
    assert gram[1, last].item() == aa
    assert gram[0, last].item() == exact_dot(x[-2], u)

    cut = p // 3
    whole, parts = ops.sketch(x, 1024, seed)[last], (x[last:, :cut].contiguous(), x[last:, cut:].contiguous())
    assert torch.equal(whole, (ops.sketch(parts[0], 1024, seed) + ops.sketch(parts[1], 1024, seed, start=cut))[0])

    combined = ops.rotate(x, torch.eye(MANY, dtype=torch.float64, device=gpu.DEVICE)[None, last:].contiguous())
    assert torch.equal(combined[0], u.float())

    for theta in (u, x):  # of all, and of each its own
        assert_equal((ops.perturb(theta, y, eta)[last],), (ops.perturb(u, v[None], eta[:1])[0],))
    alone = ops.subspace_filter_(y[last:].clone(), values, rows, 0.75)
    assert_equal((ops.subspace_filter_(y, values, rows, 0.75)[last:],), (alone,))


@pytest.mark.parametrize("odd", [0, 1])
def test_one_long_vector(much_memory: None, odd: int, generator: Generator) -> None:
    """Of P = 1e8, as large networks have them; in float32 and in float64."""
    seed = int(torch.randint(2**31, (), generator=generator))
    for p, dtype in ((LONG + odd, torch.float32), (3 * LONG + odd, torch.float64)):
        g_a, g_b = (whole_numbers(1, p, dtype, seed + k) for k in range(2))
        aa, bb, ab = exact_dot(g_a[0], g_a[0]), exact_dot(g_b[0], g_b[0]), exact_dot(g_a[0], g_b[0])
        eta = torch.full((1,), 0.5, dtype=torch.float64, device=gpu.DEVICE)
        got = ops.commutator(g_a, g_b, g_b, g_a, eta, theta=g_a[0], keep_delta=True)
        dd = aa + bb - 2 * ab
        assert got.sums[0].tolist() == [aa, bb, ab, dd, dd, dd, dd, 0.0, 0.0, 0.0]
        assert torch.equal(got.delta, g_b - g_a)
        moved = ops.perturb(g_a[0], g_b, eta)
        assert torch.equal(moved[0], g_a[0] - 0.5 * g_b[0])


# ------------------------------------------------------------------------------------------------ tests of the kernels


def assert_near_definition(op: str, inputs: Inputs) -> None:
    """Where the definition rounds a product and then a sum, rotate on a GPU rounds once."""
    magnitudes = cases.define(op, {name: x if x.dtype == torch.int64 else x.abs() for name, x in inputs.items()})
    for got, wanted, magnitude in zip(cases.run(op, inputs), cases.define(op, inputs), magnitudes, strict=True):
        last_place = torch.finfo(wanted.dtype).eps * wanted.double().abs()
        bound = 2 * cases.gamma(len(inputs["rows"]) + 1) * magnitude.double() + last_place
        assert ((got.double() - wanted.double()).abs() <= bound).all()


@pytest.fixture
def ops_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests with tensors on the CPU. New memory holds NaN, not zeros that something might count on."""
    for op in cases.OPS:
        monkeypatch.setattr(ops, op, gpu.through(getattr(ops, op)))
    monkeypatch.setattr(test_rotate, "assert_is_definition", assert_near_definition)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_the_gpu(module: ModuleType) -> type:
    tests = {name: staticmethod(test) for name, test in vars(module).items() if name.startswith("test_")}
    return pytest.mark.usefixtures("ops_on_the_gpu")(type(module.__name__, (), tests))


TestPerturb = on_the_gpu(test_perturb)
TestCommutator = on_the_gpu(test_commutator_op)
TestSubspace = on_the_gpu(test_subspace_op)
TestGram = on_the_gpu(test_gram)
TestRotate = on_the_gpu(test_rotate)
TestEigh = on_the_gpu(test_eigh)
TestSketch = on_the_gpu(test_sketch)
TestDraw = on_the_gpu(test_draw)
