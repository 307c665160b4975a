"""The block algorithms of the CUDA kernels, run on the CPU with the threads of a block in a random order.

The tests of the ops hold here too. Beside them: sizes at which a block works differently, bits that depend on no order,
and every barrier taken out in turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import pytest
import test_commutator_op
import test_draw
import test_eigh
import test_gram
import test_ops
import test_perturb
import test_sketch
import test_subspace_op
import torch
from cases import DTYPES, OWNERS, Inputs, basis, gamma, gradients, numbers, spans
from torch import Generator, Tensor

from grokcurv import _cpu, ops, reference
from grokcurv.ops import _dispatch

_emulator = pytest.importorskip(
    "grokcurv._emulator", reason="grokcurv._emulator is built with GROKCURV_EMULATOR=ON, as make does"
)

FLOAT64 = torch.float64
MANY_CHUNKS = 1025 * 4096 - 3
"""Sums run over 1024 ranges at most, so each has two chunks here."""

REPEATED: dict[ModuleType, set[str]] = {
    test_perturb: set(),
    test_commutator_op: set(),
    test_subspace_op: set(),
    test_gram: {"test_few_rows_and_many_are_summed_alike"},
    test_eigh: {
        "test_random_matrices",
        "test_rank_below_the_number_of_pairs",
        "test_what_is_not_finite_yields_nan_and_harms_no_other",
        "test_scale_does_not_matter",
        "test_crowded_eigenvalues",
        "test_equal_eigenvalues",
    },
    test_sketch: {"test_definition", "test_whole_numbers_are_exact", "test_moments"},
    test_draw: {
        "test_generator",
        "test_uniform",
        "test_refusing_is_what_makes_numbers_uniform",
        "test_bits_are_uniform",
        "test_independent",
        "test_entries_are_independent",
    },
}
"""Whose tests run here once more, but for those that take long; they have shorter ones below."""

for _module, _slow in REPEATED.items():
    _stem = _module.__name__.removeprefix("test_")
    for _name in vars(_module):
        if _name.startswith("test_") and _name not in _slow:
            globals()[f"{_name}_by_{_stem}"] = getattr(_module, _name)
test_bits_do_not_depend_on_the_batch = test_ops.test_bits_do_not_depend_on_the_batch


@pytest.fixture(autouse=True)
def emulator(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on the CPU go the way of those on a GPU; of what nobody wrote to, torch makes NaN.

    Threads of torch would wait, busily, beside the executor, which has one.
    """
    monkeypatch.setattr(_dispatch, "core_of", lambda device: _dispatch.Core(_emulator, 0, nullcontext()))
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    _emulator.set_order(seed=int(torch.randint(1, 2**62, (), generator=generator)))
    yield
    _emulator.set_order()
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def on_cpu(op: str, inputs: Inputs) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "core_of", lambda device: _dispatch.Core(_cpu, 1, nullcontext()))
        return cases.run(op, inputs)


def bits(outputs: tuple[Tensor, ...]) -> list[bytes]:
    return [x.contiguous().view(torch.uint8).numpy().tobytes() for x in outputs]


# ----------------------------------------------------------------------------------------------- beside the CPU kernels


@pytest.mark.parametrize("op", ["perturb", "sketch", "draw"])
def test_bits_of_the_cpu(op: str, generator: Generator) -> None:
    for inputs in cases.sample_inputs(op, generator):
        assert bits(cases.run(op, inputs)) == bits(on_cpu(op, inputs))


@pytest.mark.parametrize("form", ["difference", "bracket"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_has_the_bits_of_the_cpu(dtype: torch.dtype, form: str, generator: Generator) -> None:
    inputs = {**gradients(2, 4099, dtype, generator), "form": form, "keep_delta": True}
    assert bits(cases.run("commutator", inputs)[3:]) == bits(on_cpu("commutator", inputs)[3:])


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_filter_has_the_bits_of_the_cpu(dtype: torch.dtype, owners: tuple[int, ...], generator: Generator) -> None:
    """Given the same coefficients, which themselves are summed in another order."""
    g, space = numbers((3, 4099), dtype, generator), basis(200, 4099, dtype, generator, owners)
    values, stride = _dispatch.strided(space["values"])
    coefficients, workspace = numbers((3, 200), FLOAT64, generator), torch.empty(600, dtype=FLOAT64)

    def filtered(core: Any) -> Tensor:
        out = g.clone()
        task = (out.data_ptr(), values.data_ptr(), stride, space["rows"].data_ptr(), 200, coefficients.data_ptr(), 0.75)
        core.subspace_filter(lambda _: workspace.data_ptr(), 1, _dispatch.TYPES[dtype], *g.shape, *task)
        return out

    assert bits((filtered(_emulator),)) == bits((filtered(_cpu),))


# ------------------------------------------------------------------------------ sizes at which a block works otherwise


def test_two_chunks_in_a_range(generator: Generator) -> None:
    options = {"segments": torch.tensor([[5, MANY_CHUNKS - 9], [3 * 4096 - 7, 20]])}
    test_commutator_op.assert_equals_definition(**gradients(1, MANY_CHUNKS, torch.bfloat16, generator), **options)
    v = numbers((1, MANY_CHUNKS), torch.bfloat16, generator)
    test_subspace_op.assert_split(v, **basis(1, MANY_CHUNKS, torch.bfloat16, generator))


def test_tables_of_several_uploads(generator: Generator) -> None:
    """An upload holds 240 segments, or 160 rows of a basis."""
    size = 700
    space = basis(330, size, torch.float32, generator)
    options = {**space, "segments": spans(490, size, generator), "keep_delta": True}
    test_commutator_op.assert_equals_definition(**gradients(2, size, torch.float32, generator), **options)
    x = numbers((3, size), torch.float32, generator)
    test_subspace_op.assert_split(x, **space)
    test_gram.assert_equals_definition(x, segments=spans(330, size, generator))
    disjoint = torch.tensor([[start, 1] for start in range(0, size, 2)])
    coefficients = numbers((len(disjoint), 2, 3), FLOAT64, generator)
    assert_rotates("rotate", {"rows": x, "coefficients": coefficients, "segments": disjoint})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(32, 33), (70, 5), (1, 65)])
def test_gram_of_more_rows_than_a_square(dtype: torch.dtype, n: int, m: int, generator: Generator) -> None:
    x, y = numbers((n, 131), dtype, generator), numbers((m, 131), dtype, generator)
    segments = torch.tensor([[7, 0], [0, 131], [64, 64], [131, 0]])
    test_gram.assert_equals_definition(x, segments=segments)
    test_gram.assert_equals_definition(x, y, origin=numbers((131,), dtype, generator), segments=segments)


def test_gram_entries_in_any_company(generator: Generator) -> None:
    """Over three ranges and a tail; alone, in a square and beside others."""
    x = numbers((40, 3 * 1024 + 301), torch.float32, generator)
    whole = ops.gram(x)
    assert torch.equal(whole, whole.mT)
    for count in (1, 4, 9, 33):
        assert torch.equal(ops.gram(x[:count]), whole[:, :count, :count])
        assert torch.equal(ops.gram(x[-count:], x), whole[:, -count:])
        assert torch.equal(ops.gram(x, x[-count:]), whole[:, :, -count:])


def assert_rotates(op: str, inputs: Inputs) -> None:
    """Terms in the order of the rows, as the CPU takes them, but fused: one rounding less each, then the last."""
    magnitudes = {name: x.double().abs() if x.is_floating_point() else x for name, x in inputs.items()}
    outputs = cases.run(op, inputs), cases.define(op, inputs), cases.define(op, magnitudes)
    for got, wanted, magnitude in zip(*outputs, strict=True):
        bound = 2 * gamma(len(inputs["rows"]) + 2) * magnitude + torch.finfo(got.dtype).eps * wanted.double().abs()
        assert ((got.double() - wanted.double()).abs() <= bound).all()


@pytest.mark.parametrize("op", ["rotate", "rotate_"])
def test_rotate_samples(op: str, generator: Generator) -> None:
    for inputs in cases.sample_inputs(op, generator):
        assert_rotates(op, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "q", "size"),
    [
        (3, 3, 3500),  # eight blocks of 512 columns for three that take turns
        (40, 30, 130),  # two groups of threads
        (40, 40, 1100),  # two passes, the second on rows in the workspace, turn after turn
        (200, 30, 100),  # parts take turns in shared memory
        (300, 290, 129),  # ten passes
    ],
)
def test_rotate_passes_and_turns(dtype: torch.dtype, m: int, q: int, size: int, generator: Generator) -> None:
    inputs = {
        "rows": numbers((m, size), dtype, generator),
        "coefficients": numbers((2, q, m), FLOAT64, generator),
        "segments": torch.tensor([[size // 3, size - size // 3], [0, size // 3]]),
    }
    assert_rotates("rotate", inputs)
    mean, weights = numbers((size,), FLOAT64, generator), numbers((m,), FLOAT64, generator)
    assert_rotates("rotate_", {**inputs, "mean": mean, "weights": weights})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rotate_keeps_nan_and_infinity_in_their_column(value: float, generator: Generator) -> None:
    rows, coefficients = numbers((9, 300), torch.float32, generator), numbers((1, 9, 9), FLOAT64, generator)
    rows[4, 299] = value
    result = ops.rotate_(rows, coefficients)
    assert not result[:, 299].isfinite().any()
    assert result[:, :299].isfinite().all()


@pytest.mark.parametrize(("m", "q", "size"), [(0, 0, 5), (3, 0, 5), (3, 2, 0), (0, 2, 5)])
def test_little_to_rotate(m: int, q: int, size: int) -> None:
    inputs = {"rows": torch.ones(m, size), "coefficients": torch.ones((1, q, m), dtype=FLOAT64)}
    assert_rotates("rotate", inputs)
    if q <= m:
        assert_rotates("rotate_", inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("p", "size", "start"), [(1, 64, 0), (1000, 64, 2**35 + 127), (300, 1024, 5), (5003, 2048, 4095), (900, 2**14, 77)]
)
def test_sketch_has_the_bits_of_its_definition(
    dtype: torch.dtype, p: int, size: int, start: int, generator: Generator
) -> None:
    x, seed = numbers((2, p), dtype, generator), int(torch.randint(2**62, (), generator=generator))
    assert torch.equal(ops.sketch(x, size, seed, start=start), reference.sketch(x, size, seed, start=start))


@pytest.mark.parametrize(
    ("n", "k"), [(1, 1), (2, 2), (3, 1), (31, 31), (33, 8), (75, 75), (76, 76), (103, 8), (104, 8), (160, 2)]
)
def test_eigh_sizes(n: int, k: int, generator: Generator) -> None:
    """All of it lies in shared memory up to 75 for all pairs, to 103 for eight."""
    test_eigh.assert_leading_pairs(test_eigh.gram_matrices(1, n, n + 2, generator), k)
    x = torch.randn(1, n, n, generator=generator, dtype=FLOAT64)
    test_eigh.assert_leading_pairs(x + x.mT, k)


@pytest.mark.parametrize(("n", "spread"), [(24, 1e-15), (24, 1e-13), (24, 1e-10), (24, 1e-6), (120, 1e-13)])
def test_eigh_of_crowded_eigenvalues(n: int, spread: float, generator: Generator) -> None:
    test_eigh.test_crowded_eigenvalues(n, spread, generator)


@pytest.mark.parametrize(("n", "k"), [(20, 1), (20, 4), (20, 20), (160, 4)])
def test_eigh_of_equal_eigenvalues(n: int, k: int, generator: Generator) -> None:
    test_eigh.test_equal_eigenvalues(n, k, generator)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_eigh_of_a_low_rank(rank: int, generator: Generator) -> None:
    test_eigh.assert_leading_pairs(test_eigh.gram_matrices(1, 80, rank, generator), 80)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [10, 80])
def test_eigh_of_what_is_not_finite(n: int, poison: float, generator: Generator) -> None:
    test_eigh.test_what_is_not_finite_yields_nan_and_harms_no_other(n, poison, generator)


@pytest.mark.parametrize("exponent", [-1060, -400, 400, 990])
def test_eigh_at_any_scale(exponent: int, generator: Generator) -> None:
    test_eigh.test_scale_does_not_matter(40, exponent, generator)


# ---------------------------------------------------------------------------------------- what results do not depend on

WIDE_OPS = ("perturb", "commutator", "subspace_split", "subspace_filter_", "gram", "rotate", "rotate_")


@pytest.mark.parametrize("op", WIDE_OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_alignment(op: str, dtype: torch.dtype, generator: Generator) -> None:
    """Four coordinates at once, or one by one where vectors do not begin at 16 bytes, all of them or one alone."""

    def moved(x: Tensor, by: int) -> Tensor:
        return x.new_empty(x.numel() + by)[by:].view(x.shape).copy_(x)

    for inputs in cases._SAMPLES[op](2, 4100, dtype, generator):
        vectors = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}

        def shifted(by: dict[str, int]) -> list[bytes]:
            moves = {name: moved(x, by.get(name, 0)) for name, x in vectors.items()}  # noqa: B023
            return bits(cases.outputs(getattr(ops, op)(**inputs | moves)))  # noqa: B023

        aligned = shifted({})
        for by in (dict.fromkeys(vectors, 1), dict.fromkeys(vectors, 3), *({name: 1} for name in vectors)):
            assert shifted(by) == aligned


@pytest.mark.parametrize("op", ["commutator", "subspace_split", "subspace_filter_"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_where_the_values_of_a_row_lie(op: str, dtype: torch.dtype, generator: Generator) -> None:
    """By whole quads if they are aligned, else one by one."""
    size = 2 * 4096 + 5
    inputs = gradients(2, size, dtype, generator)
    if op != "commutator":
        inputs = {"v" if op == "subspace_split" else "g": inputs["g_a"]}
    options = {"strength": 0.75} if op == "subspace_filter_" else {}
    values = numbers((size,), reference.compute_type(dtype), generator)

    def placed(offset: int) -> list[bytes]:
        around = numbers((size + 4,), values.dtype, generator)
        around[offset : offset + size] = values
        rows = torch.tensor([[0, size, offset], [0, 0, 0], [7, size - 9, offset + 7]])
        return bits(cases.run(op, {**inputs, "values": around, "rows": rows, **options}))

    aligned = placed(0)
    for offset in range(1, 4):
        assert placed(offset) == aligned


def test_bits_do_not_depend_on_the_vector_beside(generator: Generator) -> None:
    """Of many blocks each has two vectors, which share the values of a basis; here the third has none beside it."""
    size = 171 * 4096 - 5
    inputs = {**gradients(3, size, torch.bfloat16, generator), **basis(2, size, torch.bfloat16, generator)}
    inputs["segments"] = torch.tensor([[5, size - 9], [4096, 1]])
    together = cases.run("commutator", inputs)
    for i in range(3):
        alone = cases.run("commutator", cases.of_one(inputs, i))
        assert [x.tolist() for x in alone[:3]] == [x[i : i + 1].tolist() for x in together[:3]]


@pytest.mark.parametrize("threads", [64, 96])
def test_fewer_threads(threads: int, generator: Generator) -> None:
    _emulator.set_order(seed=5, threads=threads)
    for inputs in islice(cases.sample_inputs("perturb", generator), 0, None, 3):
        assert bits(cases.run("perturb", inputs)) == bits(on_cpu("perturb", inputs))
    for inputs in islice(cases.sample_inputs("commutator", generator), 0, None, 2):
        test_commutator_op.assert_equals_definition(**inputs)
    for inputs in islice(cases.sample_inputs("subspace_split", generator), 0, None, 3):
        test_subspace_op.assert_split(**inputs)
    for owners in OWNERS:
        test_subspace_op.test_filter(torch.float32, 4097, 0.75, owners, generator)
    test_eigh.assert_leading_pairs(test_eigh.gram_matrices(2, 30, 32, generator), 30)


def barrier_inputs(generator: Generator) -> list[tuple[str, Inputs]]:
    """Inputs that between them need every barrier: loops go round, and no two threads do the same."""
    size, f32 = MANY_CHUNKS, torch.float32
    segments = torch.tensor([[5, size - 9]])
    return [
        ("commutator", {**gradients(1, size, torch.bfloat16, generator), "segments": segments}),
        ("subspace_split", {"v": numbers((1, size), torch.bfloat16, generator), **basis(1, size, f32, generator)}),
        ("gram", {"x": numbers((40, 300), f32, generator), "y": numbers((3, 300), f32, generator)}),
        ("eigh", {"a": test_eigh.gram_matrices(2, 40, 42, generator), "k": 40}),
        (
            "rotate",
            {"rows": numbers((3, 2000), f32, generator), "coefficients": numbers((1, 5, 3), FLOAT64, generator)},
        ),
        (
            "rotate",
            {"rows": numbers((100, 400), f32, generator), "coefficients": numbers((1, 140, 100), FLOAT64, generator)},
        ),
        ("sketch", {"x": numbers((1, 70_000), f32, generator), "size": 1024, "seed": 5}),
    ]


def test_bits_do_not_depend_on_the_order_of_threads(generator: Generator) -> None:
    samples = [
        (op, x) for op in cases.OPS if op != "eigh" for x in islice(cases.sample_inputs(op, generator), 0, None, 5)
    ]
    for op, inputs in samples + barrier_inputs(generator):
        _emulator.set_order()
        in_turn = bits(cases.run(op, inputs))
        for seed in torch.randint(1, 2**31, (2,), generator=generator).tolist():
            _emulator.set_order(seed=seed)
            assert bits(cases.run(op, inputs)) == in_turn, (op, seed)


@pytest.mark.skipif("sanitize" in _cpu.FLAGS, reason="without a barrier anything may happen, which a sanitizer ends")
def test_every_barrier_is_needed(generator: Generator) -> None:
    """Without any one of them, a result differs or threads wait for each other. So an order finds a missing one."""
    needed, met = set(), set()
    for op, inputs in barrier_inputs(generator):
        _emulator.set_order(seed=1)
        right = bits(cases.run(op, inputs))
        barriers = _emulator.barriers()
        met |= set(barriers)
        for barrier in barriers:
            for seed in range(1, 4):
                _emulator.set_order(seed=seed, skipped=barrier)
                try:
                    differs = bits(cases.run(op, inputs)) != right
                except RuntimeError as error:
                    differs = "wait at a barrier" in str(error)
                if differs:
                    needed.add(barrier)
                    break
    written = set()
    for path in (Path(__file__).parent.parent / "csrc" / "block").glob("*.h"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\.sync\(\)", line):
                written.add(f"{path.name}:{number}")
    assert met == written
    assert needed == written


def test_a_barrier_that_some_threads_miss_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="block of 64 threads: 40 wait at a barrier, 0 for their warp, and 24 have"):
        _emulator.barrier_for_some()


def test_a_block_is_made_of_warps() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        _emulator.set_order(threads=50)
