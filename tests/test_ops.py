"""What holds for every op: registration, tracing, bits, refusals. What each computes is tested under its own name."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import Inputs

from grokcurv import _cpu, ops

FLOAT64 = torch.float64


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def raw_arguments(op: str, inputs: Inputs) -> Inputs:
    """The keyword arguments of ``torch.ops.grokcurv.<op>`` for those of ``ops.<op>``."""
    bound = inspect.signature(getattr(ops, op)).bind(**inputs)
    bound.apply_defaults()
    return {name: x for name, x in bound.arguments.items() if name != "out"}


@pytest.mark.parametrize("op", cases.OPS)
def test_registration(op: str, generator: torch.Generator) -> None:
    """Schema (what is mutated, what aliases), fake implementation and tracing, with static and dynamic shapes."""
    for inputs in islice(cases.sample_inputs(op, generator), 0, None, 5):
        torch.library.opcheck(getattr(torch.ops.grokcurv, op).default, (), raw_arguments(op, inputs))


def test_registration_of_perturb_out(generator: torch.Generator) -> None:
    inputs = next(cases.sample_inputs("perturb", generator))
    out = torch.empty_like(inputs["directions"])
    torch.library.opcheck(torch.ops.grokcurv.perturb_out.default, (), {**inputs, "out": out})


@pytest.mark.parametrize("op", cases.OPS)
def test_compiles_into_one_graph(op: str, generator: torch.Generator) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    inputs = next(cases.sample_inputs(op, generator))
    expected = cases.run(op, inputs)
    for got, wanted in zip(cases.run(op, inputs, compiled), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("op", cases.OPS)
def test_shapes_and_dtypes_of_the_definition(op: str, generator: torch.Generator) -> None:
    for inputs in cases.sample_inputs(op, generator):
        for got, wanted in zip(cases.run(op, inputs), cases.define(op, inputs), strict=True):
            assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


@pytest.mark.parametrize("op", cases.OPS)
def test_bits_do_not_depend_on_threads(op: str, generator: torch.Generator, threads: None) -> None:
    for inputs in cases.sample_inputs(op, generator):
        torch.set_num_threads(1)
        one = cases.run(op, inputs)
        for count in (2, 5):
            torch.set_num_threads(count)
            for a, b in zip(one, cases.run(op, inputs), strict=True):
                assert_same_bits(a, b)


def test_bits_do_not_depend_on_the_instruction_set() -> None:
    """Every compiled path that this processor runs, on numbers of wide range in every dtype."""
    seed = int(torch.randint(2**31, ()))
    digests = {
        isa: subprocess.run(
            [sys.executable, "cases.py", str(seed)],
            cwd=Path(__file__).parent,
            env={**os.environ, "GROKCURV_ISA": isa},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for isa, runs in _cpu.ISAS.items()
        if runs
    }
    assert len(set(digests.values())) == 1, (seed, digests)
    assert digests.keys() >= {"default"}


@pytest.mark.parametrize("op", ["perturb", "commutator", "subspace_split", "subspace_filter_"])
def test_bits_do_not_depend_on_the_batch(op: str, generator: torch.Generator) -> None:
    for inputs in cases.sample_inputs(op, generator):
        together = cases.run(op, inputs)
        for i in range(len(together[0])):
            for a, b in zip(together, cases.run(op, cases.of_one(inputs, i)), strict=True):
                assert_same_bits(a[i : i + 1], b)


def test_tensors_keep_their_values(generator: torch.Generator) -> None:
    """No op writes to what it does not say it writes to."""
    for op in cases.OPS:
        for inputs in cases.sample_inputs(op, generator):
            copies = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
            for name in cases.WRITES.get(op, ()):
                if name in copies:
                    inputs[name] = copies.pop(name).clone()
            getattr(ops, op)(**inputs)
            for name, copy in copies.items():
                assert torch.equal(inputs[name], copy), (op, name)


def test_writing_in_place_bumps_the_version(generator: torch.Generator) -> None:
    inputs = next(cases.sample_inputs("subspace_filter_", generator))
    assert ops.subspace_filter_(**inputs) is inputs["g"]
    assert inputs["g"]._version == 1

    inputs = next(cases.sample_inputs("rotate_", generator))
    assert ops.rotate_(**inputs) is inputs["rows"]
    assert (inputs["rows"]._version, inputs["mean"]._version) == (1, 1)

    inputs = next(cases.sample_inputs("perturb", generator))
    out = torch.empty_like(inputs["directions"])
    assert ops.perturb(**inputs, out=out) is out
    assert out._version == 1

    with torch.inference_mode():  # such tensors have no version, and need none
        ops.perturb(**inputs, out=torch.empty_like(out))


# Bad inputs: (op, argument, replacement, error, what its message names). A callable replaces the argument's sample.
def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.T.contiguous().T


def halved(x: torch.Tensor) -> torch.Tensor:
    return x.half()


def shortened(x: torch.Tensor) -> torch.Tensor:
    return x[..., :-1].contiguous()


def tracked(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


VECTORS = {
    "perturb": ("theta", "directions"),
    "commutator": ("g_a", "g_b", "a2", "b2", "theta"),
    "subspace_split": ("v",),
    "subspace_filter_": ("g",),
    "gram": ("x", "y", "origin"),
    "eigh": ("a",),
    "rotate": ("rows", "coefficients"),
    "rotate_": ("rows", "coefficients", "mean", "weights"),
    "sketch": ("x",),
}
BAD_VECTORS = [
    (op, name, replace, error, name)
    for op, names in VECTORS.items()
    for name in names
    for replace, error in ((halved, TypeError), (tracked, ValueError))
]
BAD_SHAPES = [
    ("perturb", "directions", shortened, ValueError, "directions must have shape"),
    ("perturb", "theta", torch.atleast_2d, ValueError, r"theta must have shape \(4099\) or \(2, 4099\), got \(1, "),
    ("perturb", "theta", torch.sum, ValueError, r"theta must have shape \(P\) or \(N, P\), got \(\)"),
    ("perturb", "theta", lambda x: torch.stack([x, x], dim=1).T, ValueError, "theta must be contiguous"),
    ("commutator", "a2", shortened, ValueError, "a2 must have shape"),
    ("commutator", "theta", shortened, ValueError, "theta must have shape"),
    ("commutator", "theta", lambda x: x.repeat(3, 1), ValueError, r"theta must have shape \(4099\) or \(2, 4099\)"),
    *(
        (op, "values", replace, ValueError, message)
        for op in ("commutator", "subspace_split", "subspace_filter_")
        for replace, message in (
            (lambda x: x.repeat(3, 1), r"values must have shape \(nnz\) or \(2, nnz\), got \(3, "),
            (lambda x: torch.stack([x, x], dim=1).T, "values must be contiguous"),
            (lambda x: x.repeat(2, 1)[:, :5].contiguous(), r"rows\[\d\] reads values.* but there are 5 values"),
        )
    ),
    ("subspace_split", "v", torch.flatten, ValueError, "v must have shape"),
    ("gram", "y", shortened, ValueError, "y must have shape"),
    ("gram", "origin", shortened, ValueError, "origin must have shape"),
    ("eigh", "a", shortened, ValueError, "a must have shape"),
    *((op, "coefficients", shortened, ValueError, "coefficients must have shape") for op in ("rotate", "rotate_")),
    ("rotate_", "mean", shortened, ValueError, "mean must have shape"),
    ("rotate_", "weights", shortened, ValueError, "weights must have shape"),
    ("rotate", "rows", torch.flatten, ValueError, "rows must have shape"),
    ("sketch", "x", torch.flatten, ValueError, "x must have shape"),
    ("sketch", "x", transposed, ValueError, "x must be contiguous"),
    ("rotate", "rows", transposed, ValueError, "rows must be contiguous"),
    ("rotate", "coefficients", lambda x: x.mT.contiguous().mT, ValueError, "coefficients must be contiguous"),
    ("perturb", "directions", transposed, ValueError, "directions must be contiguous"),
    ("commutator", "g_b", transposed, ValueError, "g_b must be contiguous"),
    ("subspace_filter_", "g", transposed, ValueError, "g must be contiguous"),
    ("gram", "x", transposed, ValueError, "x must be contiguous"),
    ("eigh", "a", lambda a: a[:, ::2, ::2], ValueError, "a must be contiguous"),
    ("perturb", "directions", lambda x: x.to("meta"), ValueError, "directions must be on cpu"),
]
BAD_OPTIONS = [
    *((op, "eta", torch.Tensor.float, TypeError, "eta must be float64") for op in ("perturb", "commutator")),
    *((op, "eta", shortened, ValueError, "eta must have shape") for op in ("perturb", "commutator")),
    ("commutator", "form", "brackets", ValueError, "form must be 'difference' or 'bracket', got 'brackets'"),
    ("commutator", "form", "bracket", ValueError, "theta belongs to form='difference'"),
    ("commutator", "values", None, ValueError, "values and rows"),
    ("commutator", "segments", torch.Tensor.int, TypeError, "segments must be int64"),
    ("commutator", "segments", torch.tensor([[-1, 2]]), ValueError, r"segments\[0\] has start -1"),
    ("commutator", "segments", torch.tensor([[0, 1], [4000, 100]]), ValueError, r"segments\[1\] .* within P = 4099"),
    ("gram", "segments", torch.tensor([[0, 2**63 - 1]]), ValueError, r"segments\[0\]"),
    ("gram", "segments", torch.tensor([[2**63 - 1, 2]]), ValueError, r"segments\[0\]"),
    *(
        (op, "values", torch.Tensor.double, TypeError, "values must be float32")
        for op in ("commutator", "subspace_split")
    ),
    ("subspace_split", "rows", torch.tensor([[0, 5, -1]]), ValueError, r"rows\[0\] reads values"),
    ("subspace_split", "rows", torch.tensor([[0, 5, 2**63 - 3]]), ValueError, r"rows\[0\] reads values"),
    ("subspace_filter_", "rows", torch.tensor([[0, -5, 0]]), ValueError, r"rows\[0\] has start 0 and length -5"),
    ("subspace_filter_", "rows", torch.tensor([[0, 5]]), ValueError, "rows must have shape"),
    ("subspace_filter_", "strength", float("nan"), ValueError, "strength must be finite"),
    ("eigh", "k", -1, ValueError, "k must lie in"),
    ("eigh", "k", 1000, ValueError, "k must lie in"),
    ("rotate", "segments", torch.Tensor.int, TypeError, "segments must be int64"),
    ("rotate", "segments", None, ValueError, r"coefficients must have shape \(1,"),
    *(
        (op, "segments", replacement, ValueError, message)
        for op in ("rotate", "rotate_")
        for replacement, message in (
            (torch.tensor([[0, 5], [9, 1], [4090, 10], [9, 0]]), r"segments\[2\] .* within P = 4099"),
            (torch.tensor([[9, 5], [1, 1], [4, 6], [9, 0]]), r"segments\[2\] and segments\[0\] overlap"),
            (torch.tensor([[9, 5], [1, 1], [9, 5], [2, 0]]), r"segments\[0\] and segments\[2\] overlap"),
        )
    ),
    *(("sketch", "size", size, ValueError, "size must be a power of two") for size in (0, -64, 32, 96, 2**21)),
    ("sketch", "seed", -1, ValueError, "seed must lie in"),
    ("sketch", "start", -1, ValueError, "start must lie in"),
    ("sketch", "start", 2**62, ValueError, "start must lie in"),
    *(
        ("draw", name, replacement, error, message)
        for name in ("seeds", "steps", "n")
        for replacement, error, message in (
            (torch.Tensor.int, TypeError, f"^{name} must be int64, got int32"),
            (torch.Tensor.double, TypeError, f"^{name} must be int64, got float64"),
            (torch.atleast_2d, ValueError, f"^{name} must have shape"),
            (lambda x: x.repeat(2)[::2], ValueError, f"^{name} must be contiguous"),
        )
    ),
    *(("draw", name, shortened, ValueError, rf"^{name} must have shape \(2\)") for name in ("steps", "n")),
    *(("draw", name, lambda x: x.to("meta"), ValueError, f"^{name} must be on cpu") for name in ("steps", "n")),
    ("draw", "steps", torch.tensor([0, -1]), ValueError, r"^steps\[1\] must lie in 0\.\.4294967295, got -1"),
    ("draw", "steps", torch.tensor([2**32, 0]), ValueError, r"^steps\[0\] must lie in 0\.\.4294967295, got 4294967296"),
    ("draw", "n", torch.tensor([-1, 0]), ValueError, r"^n\[0\] must lie in 0\.\.4294967296, got -1"),
    ("draw", "n", torch.tensor([5, 2**32 + 1]), ValueError, r"^n\[1\] must lie in .*, got 4294967297"),
    *(("draw", "purpose", purpose, ValueError, r"^purpose must lie in 0\.\.2\*\*32 - 1") for purpose in (-1, 2**32)),
    ("draw", "purpose", 2.5, TypeError, "^purpose must be an integer"),
    *(("draw", "rows", rows, ValueError, r"^rows must lie in 0\.\.2\*\*33") for rows in (-1, 2**33 + 1)),
    ("rotate_", "mean", None, ValueError, "mean and weights belong together"),
    ("rotate_", "coefficients", lambda x: x.repeat(1, 2, 1), ValueError, "28 rows, which do not fit over 18"),
]


@pytest.mark.parametrize(("op", "name", "replacement", "error", "message"), BAD_VECTORS + BAD_SHAPES + BAD_OPTIONS)
def test_bad_input(
    op: str, name: str, replacement: Any, error: type[Exception], message: str, generator: torch.Generator
) -> None:
    samples = cases.sample_inputs(op, generator)
    inputs = next(x for x in samples if x.get(name) is not None)
    inputs[name] = replacement(inputs[name]) if callable(replacement) else replacement
    with pytest.raises(error, match=message):
        getattr(ops, op)(**inputs)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("derivative", [torch.func.grad, torch.func.jacfwd])
def test_derivatives_are_refused(derivative: Callable[..., Any]) -> None:
    """Neither way round, where torch would take them for zero."""
    with pytest.raises(ValueError, match=r"^x (requires grad|carries a tangent)"):
        derivative(lambda x: ops.gram(x).sum())(torch.ones(2, 3))


def test_writing_in_place_takes_no_second_memory() -> None:
    rows, eta = torch.zeros(2, 5), torch.zeros(2, dtype=FLOAT64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        ops.perturb(torch.zeros(5), rows, eta, out=torch.zeros(2, 5))
        ops.rotate_(rows, torch.zeros(1, 2, 2, dtype=FLOAT64))
    called = {event.key for event in profiled.key_averages()}
    assert {"grokcurv::perturb_out", "grokcurv::rotate_"} <= called
    assert not called & {"aten::empty_like", "aten::new_empty"}


def test_outputs_may_not_overlap_inputs() -> None:
    memory = torch.zeros(30)
    theta, eta = torch.zeros(5), torch.zeros(2, dtype=FLOAT64)
    with pytest.raises(ValueError, match="out overlaps directions"):
        ops.perturb(theta, memory[:10].view(2, 5), eta, out=memory[9:19].view(2, 5))
    ops.perturb(theta, memory[:10].view(2, 5), eta, out=memory[10:20].view(2, 5))
    with pytest.raises(ValueError, match="out overlaps theta"):
        ops.perturb(memory[:5], memory[20:].view(2, 5), eta, out=memory[:10].view(2, 5))
    with pytest.raises(ValueError, match="out must have shape"):
        ops.perturb(theta, memory[:10].view(2, 5), eta, out=memory[10:15].view(1, 5))
    with pytest.raises(ValueError, match="g overlaps values"):
        ops.subspace_filter_(memory[:10].view(2, 5), memory[5:10], torch.tensor([[0, 5, 0]]), 1.0)
    wide = torch.zeros(30, dtype=FLOAT64)
    rows, weights, coefficients = wide[:10].view(2, 5), torch.zeros(2, dtype=FLOAT64), torch.zeros(1, 2, 2).double()
    with pytest.raises(ValueError, match="rows overlaps coefficients"):
        ops.rotate_(rows, wide[8:12].view(1, 2, 2))
    with pytest.raises(ValueError, match="rows overlaps weights"):
        ops.rotate_(rows, coefficients, mean=wide[10:15], weights=wide[9:11])
    with pytest.raises(ValueError, match="mean overlaps rows"):
        ops.rotate_(rows, coefficients, mean=wide[9:14], weights=weights)
    with pytest.raises(ValueError, match="mean overlaps weights"):
        ops.rotate_(rows, coefficients, mean=wide[10:15], weights=wide[14:16])
    ops.rotate_(rows, coefficients, mean=wide[10:15], weights=weights)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
