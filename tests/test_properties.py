"""Every op over its whole input space: float64's answer within a bound from analysis, or an error that names its cause.

Sizes from nothing to past a block, every type, memory that is aligned to nothing, arguments that are one another, NaN,
infinities, subnormal and enormous numbers. One thing is then made wrong in inputs that are right.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DTYPES, OPS, WRITES, Inputs, gamma
from hypothesis import given, settings
from hypothesis import strategies as st
from test_eigh import assert_leading_pairs
from torch import Tensor

from grokcurv import ops, reference

FLOAT64 = torch.float64
TINY = 2.0**-1074
SIZES = st.integers(0, 40) | st.sampled_from([255, 256, 257, 4095, 4096, 4097])
COUNTS = st.integers(0, 5)
LARGE = {torch.float32: 3e38, torch.bfloat16: 3e38, FLOAT64: 1e140}
"""Sums of a few thousand squares are below the largest float64: what overflows on the way depends on the order."""

many = settings(max_examples=200, deadline=None, database=None)


# --------------------------------------------------------------------------------------------------------- valid inputs


@st.composite
def numbers(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, special: bool = True) -> Tensor:
    """Numbers of some decades; some of them special; memory that starts at any multiple of their size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    decades = draw(st.sampled_from([0.0, 3.0]))
    x = (
        torch.randn(shape, generator=generator, dtype=FLOAT64)
        * torch.randn(shape, generator=generator).mul(decades).exp()
    )
    x = x.to(dtype)
    if special and x.numel() and draw(st.booleans()):
        large, least = LARGE[dtype], torch.finfo(dtype).smallest_normal / 8
        values = st.sampled_from([0.0, -0.0, least, -least, large, -large, torch.inf, -torch.inf, torch.nan])
        for place in draw(st.lists(st.integers(0, x.numel() - 1), min_size=1, max_size=3)):
            x.view(-1)[place] = draw(values)
    lead = draw(st.integers(0, 3))
    return torch.cat([x.new_zeros(lead), x.flatten()])[lead:].view(shape)


@st.composite
def spans(draw: st.DrawFn, size: int, disjoint: bool = False) -> Tensor:
    """(S, 2): parts of ``size`` coordinates, empty ones among them, in any order."""
    ends = draw(st.lists(st.integers(0, size), max_size=8).filter(lambda x: len(x) % 2 == 0))
    ends = sorted(ends) if disjoint else ends
    pairs = [(min(pair), abs(pair[1] - pair[0])) for pair in zip(ends[::2], ends[1::2], strict=True)]
    return torch.tensor(draw(st.permutations(pairs)), dtype=torch.int64).view(-1, 2)


@st.composite
def owned(draw: st.DrawFn, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers that n vectors share, or that each has of its own."""
    return draw(numbers((*draw(st.sampled_from([(), (n,)])), *shape), dtype))


@st.composite
def basis(draw: st.DrawFn, n: int, size: int, dtype: torch.dtype) -> Inputs:
    """Rows that may share their values."""
    blocks = draw(spans(size))
    longest = int(blocks[:, 1].max()) if len(blocks) else 0
    values = draw(owned(n, (longest + draw(st.integers(0, 9)),), reference.compute_type(dtype)))
    offsets = [draw(st.integers(0, values.shape[-1] - length)) for length in blocks[:, 1].tolist()]
    return {"values": values, "rows": torch.cat([blocks, torch.tensor(offsets, dtype=torch.int64)[:, None]], dim=1)}


@st.composite
def perturb(draw: st.DrawFn) -> Inputs:
    dtype, n, p = draw(st.sampled_from(DTYPES)), draw(COUNTS), draw(SIZES)
    theta, directions = draw(owned(n, (p,), dtype)), draw(numbers((n, p), dtype))
    return {"theta": theta, "directions": directions, "eta": draw(numbers((n,), FLOAT64, special=False))}


@st.composite
def commutator(draw: st.DrawFn) -> Inputs:
    dtype, n, p = draw(st.sampled_from(DTYPES)), draw(COUNTS), draw(SIZES)
    vectors = [draw(numbers((n, p), dtype)) for _ in range(draw(st.integers(1, 4)))]  # fewer than 4: some are the same
    inputs = {name: draw(st.sampled_from(vectors)) for name in ("g_a", "g_b", "a2", "b2")}
    inputs["eta"] = draw(numbers((n,), FLOAT64, special=False))
    inputs["form"] = draw(st.sampled_from(["difference", "bracket"]))
    inputs["keep_delta"] = draw(st.booleans())
    if inputs["form"] == "difference" and draw(st.booleans()):
        inputs["theta"] = draw(owned(n, (p,), dtype))
    if draw(st.booleans()):
        inputs |= draw(basis(n, p, dtype))
    if draw(st.booleans()):
        inputs["segments"] = draw(spans(p))
    return inputs


@st.composite
def subspace_split(draw: st.DrawFn) -> Inputs:
    dtype, n, p = draw(st.sampled_from(DTYPES)), draw(COUNTS), draw(SIZES)
    return {"v": draw(numbers((n, p), dtype)), **draw(basis(n, p, dtype))}


@st.composite
def subspace_filter_(draw: st.DrawFn) -> Inputs:
    inputs = draw(subspace_split())
    return {"g": inputs.pop("v"), **inputs, "strength": draw(st.sampled_from([0, 0.75, 1.0, -2.0]))}


@st.composite
def gram(draw: st.DrawFn) -> Inputs:
    dtype, p = draw(st.sampled_from(DTYPES)), draw(SIZES)
    inputs = {"x": draw(numbers((draw(COUNTS), p), dtype))}
    if draw(st.booleans()):
        inputs["y"] = inputs["x"] if draw(st.booleans()) else draw(numbers((draw(COUNTS), p), dtype))
    if draw(st.booleans()):
        inputs["origin"] = draw(numbers((p,), dtype))
    if draw(st.booleans()):
        inputs["segments"] = draw(spans(p))
    return inputs


@st.composite
def eigh(draw: st.DrawFn) -> Inputs:
    n = draw(st.integers(0, 12) | st.sampled_from([33, 40]))
    rank = draw(st.integers(0, n))
    x = draw(numbers((draw(st.integers(0, 3)), n, rank), FLOAT64, special=False))
    signs = draw(numbers((rank,), FLOAT64, special=False)).sign()
    a = (x * signs) @ x.mT
    return {"a": (a + a.mT) / 2, "k": draw(st.integers(0, n))}


@st.composite
def rotate(draw: st.DrawFn) -> Inputs:
    dtype, m, p = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 20)), draw(SIZES)
    inputs = {"rows": draw(numbers((m, p), dtype))}
    if draw(st.booleans()):
        inputs["segments"] = draw(spans(p, disjoint=True))
    shape = (len(inputs.get("segments", [0])), draw(st.integers(0, m)), m)
    return {**inputs, "coefficients": draw(numbers(shape, FLOAT64))}


@st.composite
def rotate_(draw: st.DrawFn) -> Inputs:
    inputs = draw(rotate())
    if draw(st.booleans()):
        m, p = inputs["rows"].shape
        inputs |= {"mean": draw(numbers((p,), FLOAT64)), "weights": draw(numbers((m,), FLOAT64))}
    return inputs


@st.composite
def sketch(draw: st.DrawFn) -> Inputs:
    x = draw(numbers((draw(COUNTS), draw(SIZES)), draw(st.sampled_from(DTYPES))))
    size, seed = draw(st.sampled_from([64, 128, 4096])), draw(st.integers(0, 2**63 - 1))
    return {"x": x, "size": size, "seed": seed, "start": draw(st.integers(0, 300) | st.integers(0, 2**62 - 1))}


@st.composite
def drawn(draw: st.DrawFn) -> Inputs:
    count = draw(COUNTS)
    below = st.sampled_from([0, 1, 97, 2**31 + 1, 2**32]) | st.integers(0, 2**32)
    values = {"seeds": st.integers(-(2**63), 2**63 - 1), "steps": st.integers(0, 2**32 - 1), "n": below}
    lists = {name: draw(st.lists(each, min_size=count, max_size=count)) for name, each in values.items()}
    tensors = {name: torch.tensor(each, dtype=torch.int64) for name, each in lists.items()}
    return {**tensors, "purpose": draw(st.integers(0, 2**32 - 1)), "rows": draw(st.integers(0, 70))}


VALID: dict[str, Callable[[], st.SearchStrategy[Inputs]]] = {
    **{"perturb": perturb, "commutator": commutator, "subspace_split": subspace_split},
    **{"subspace_filter_": subspace_filter_, "gram": gram, "eigh": eigh, "rotate": rotate, "rotate_": rotate_},
    "sketch": sketch,
    "draw": drawn,
}


def test_every_op_is_here() -> None:
    assert set(VALID) == set(OPS) == set(ops.__all__) - {"Array"}


# -------------------------------------------------------------------------------------------------------------- answers


def assert_within(got: Tensor, wanted: Tensor, bound: Tensor) -> None:
    """Equal, or both NaN, or finite and within the bound."""
    finite = bound.isfinite() & wanted.isfinite()
    alike = (got == wanted) | (got.isnan() & wanted.isnan()) | (finite & ((got - wanted).abs() <= bound))
    assert alike.all(), (got[~alike], wanted[~alike], bound[~alike])


def assert_sums(got: Tensor, u: Tensor, v: Tensor) -> None:
    """``got`` is u . v over the last dimension: P products and sums, in float64, in any order."""
    terms, p = u * v, max(u.shape[-1], v.shape[-1])
    assert_within(got, terms.sum(-1), 2 * gamma(p + 1) * terms.abs().sum(-1) + p * TINY)


def assert_coefficients(got: Tensor, v: Tensor, values: Tensor, rows: Tensor) -> None:
    assert got.shape == (len(v), len(rows))
    for j, (start, length, offset) in enumerate(rows.tolist()):
        assert_sums(got[:, j], v[:, start : start + length], values[..., offset : offset + length].double())


def assert_same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@many
@given(perturb())
def test_perturb(inputs: Inputs) -> None:
    wanted = reference.perturb(**inputs)
    assert_same(ops.perturb(**inputs), wanted)
    assert_same(ops.perturb(**inputs, out=torch.empty_like(wanted)), wanted)


@many
@given(commutator())
def test_commutator(inputs: Inputs) -> None:
    """delta of the definition is right to the bit; its sums in another order are within the bound of any order."""
    got, defined = ops.commutator(**inputs), reference.commutator(**inputs)
    assert_same(got.delta, defined.delta)
    g_a, g_b, a2, b2 = (inputs[name].double() for name in ("g_a", "g_b", "a2", "b2"))
    eta = inputs["eta"][:, None]
    if inputs["form"] == "bracket":
        u, v, delta = a2, b2, eta * eta * (b2 - a2)
    else:
        u, v = a2 - g_a, b2 - g_b
        delta = eta * (u - v)
    for column, (x, y) in enumerate([(g_a, g_a), (g_b, g_b), (g_a, g_b), (delta, delta), (u, u), (v, v)]):
        assert_sums(got.sums[:, column], x, y)
    rounding = defined.sums[:, 6:]  # sums of squares
    assert_within(got.sums[:, 6:], rounding, 2 * gamma(delta.shape[1] + 1) * rounding + delta.shape[1] * TINY)
    if "rows" in inputs:
        assert_coefficients(got.coefficients, delta, inputs["values"], inputs["rows"])
    for j, (start, length) in enumerate(inputs.get("segments", torch.zeros(0, 2)).tolist()):
        part = delta[:, start : start + length]
        assert_sums(got.energies[:, j], part, part)


@many
@given(subspace_split())
def test_subspace_split(inputs: Inputs) -> None:
    norm2, coefficients = ops.subspace_split(**inputs)
    v = inputs.pop("v").double()
    assert_sums(norm2, v, v)
    assert_coefficients(coefficients, v, **inputs)


@many
@given(subspace_filter_())
def test_subspace_filter(inputs: Inputs) -> None:
    """Float64 sums, of which a coefficient's error reaches every coordinate of its row, then one rounding."""
    g, rows, s = inputs["g"], inputs["rows"], inputs["strength"]
    x, values = g.double(), inputs["values"].double()
    wanted = (1 - s) * x
    terms = wanted.abs()
    for start, length, offset in rows.tolist():
        here, b = slice(start, start + length), values[..., offset : offset + length]
        wanted[:, here] += s * (x[:, here] * b).sum(-1, keepdim=True) * b
        terms[:, here] += abs(s) * (x[:, here] * b).abs().sum(-1, keepdim=True) * b.abs()
    rounding = torch.finfo(g.dtype)
    bound = 2 * gamma(g.shape[1] + len(rows) + 8) * terms + rounding.eps * wanted.abs() + rounding.smallest_normal
    got = ops.subspace_filter_(**inputs)
    assert got is g
    assert_within(got.double(), wanted.to(g.dtype).double(), bound)


@many
@given(gram())
def test_gram(inputs: Inputs) -> None:
    x = inputs["x"].double()
    y = inputs.get("y", x).double()
    origin = inputs.get("origin", torch.zeros(x.shape[1])).double()
    u, v = (x - origin)[:, None], (y - origin)[None]
    got = ops.gram(**inputs)
    spans = inputs.get("segments", torch.tensor([[0, x.shape[1]]])).tolist()
    assert got.shape == (len(spans), len(x), len(y))
    for entry, (start, length) in zip(got, spans, strict=True):
        assert_sums(entry, u[..., start : start + length], v[..., start : start + length])


@many
@given(eigh(), st.data())
def test_eigh(inputs: Inputs, data: st.DataObject) -> None:
    """Whatever the lower triangle holds; a matrix with something in the upper one that is not finite harms no other."""
    a, k = inputs["a"], inputs["k"]
    if len(a) and k:
        assert_leading_pairs(a, k)
    alone = ops.eigh(a, k)
    below = torch.ones(a.shape[1:]).tril(-1).bool()
    if a.numel():
        spoilt = data.draw(st.integers(0, len(a) - 1))
        a[:, below] = torch.nan
        a[spoilt, 0, data.draw(st.integers(0, a.shape[1] - 1))] = data.draw(st.sampled_from([torch.nan, torch.inf]))
        for got, wanted in zip(ops.eigh(a, k), alone, strict=True):
            wanted[spoilt] = torch.nan
            assert_same(got, wanted)


@many
@given(rotate())
def test_rotate(inputs: Inputs) -> None:
    assert_same(ops.rotate(**inputs), reference.rotate(**inputs))


@many
@given(rotate_())
def test_rotate_in_place(inputs: Inputs) -> None:
    copies = {name: x.clone() for name, x in inputs.items()}
    assert ops.rotate_(**inputs) is inputs["rows"]
    assert_same(inputs["rows"], reference.rotate_(**copies))
    if "mean" in inputs:
        assert_same(inputs["mean"], copies["mean"])


@many
@given(sketch())
def test_sketch(inputs: Inputs) -> None:
    assert_same(ops.sketch(**inputs), reference.sketch(**inputs))


@many
@given(drawn())
def test_draw(inputs: Inputs) -> None:
    assert_same(ops.draw(**inputs), reference.draw(**inputs))


@many
@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_an_output_lies_apart_or_is_refused(n: int, p: int, one: int, other: int) -> None:
    memory = torch.randn(100)
    directions, out = memory[one : one + n * p].view(n, p), memory[other : other + n * p].view(n, p)
    theta, eta = torch.randn(p), torch.rand(n, dtype=FLOAT64)
    if abs(one - other) < n * p:
        before = memory.clone()
        with pytest.raises(ValueError, match=r"^out overlaps directions"):
            ops.perturb(theta, directions, eta, out=out)
        assert_same(memory, before)
    else:
        wanted = reference.perturb(theta, directions, eta)
        assert_same(ops.perturb(theta, directions, eta, out=out), wanted)


# ------------------------------------------------------------------------------------------------------- invalid inputs

NO_INTEGER = [2.5, "2", None, 1j, 2**64, -(2**70), [1], torch.ones(2)]
WRONG_SCALARS: dict[str, list[Any]] = {
    "k": [*NO_INTEGER, -1, 100],
    "size": [*NO_INTEGER, 0, -64, 96, 2**21],
    "seed": [*NO_INTEGER, -1, 2**63],
    "start": [*NO_INTEGER, -1, 2**62],
    "purpose": [*NO_INTEGER, -1, 2**32],
    "rows": [*NO_INTEGER, -1, 2**33 + 1],
    "strength": ["2", None, 1j, torch.nan, -torch.inf, 10**400, [1], torch.ones(2)],
    "form": ["brackets", None, 3],
}


def spread(x: Tensor) -> Tensor:
    """The same numbers, not side by side."""
    return torch.stack([x, x], dim=-1)[..., 0]


WRONG_ARRAYS: list[Callable[[Tensor], Any]] = [
    *(lambda x, t=dtype: x.to(t) for dtype in (torch.float16, torch.int32, torch.complex64, torch.bool)),
    lambda x: torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint8),
    lambda x: x.expand(9, *x.shape).contiguous(),  # more of them than there are vectors
    lambda x: x.sum(),
    Tensor.to_sparse,
    Tensor.tolist,
    spread,
    lambda x: np.zeros(x.shape, dtype=">f4" if x.is_floating_point() else ">i8"),
    lambda x: np.full(x.shape, None),
    lambda x: None,
    lambda x: 3.0,
]


@st.composite
def wrong(draw: st.DrawFn, op: str) -> tuple[Inputs, str]:
    """Inputs of which one is wrong, and its name."""
    inputs = draw(VALID[op]())
    optional = [p.name for p in inspect.signature(getattr(ops, op)).parameters.values() if p.default is None]
    name = draw(st.sampled_from(sorted(inputs.keys() - {"keep_delta"})))
    x = inputs[name]
    if not isinstance(x, Tensor):
        return {**inputs, name: draw(st.sampled_from(WRONG_SCALARS[name]))}, name
    integers = x.dtype == torch.int64
    if integers and name != "seeds" and len(x) and draw(st.booleans()):
        changed = x.clone()
        changed.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(
            st.sampled_from([-1, 10_000 if x.dim() == 2 else 2**32 + 1, 2**63 - 1, -(2**63)])
        )
        return {**inputs, name: changed}, name
    if not integers and draw(st.integers(0, 9)) == 0:
        return {**inputs, name: x.clone().requires_grad_()}, name
    changed = draw(st.sampled_from(WRONG_ARRAYS))(x)
    if changed is None and name in optional:
        changed = "no array"
    dense = isinstance(changed, Tensor) and changed.layout is torch.strided and not changed.is_quantized
    if dense and (changed.shape, changed.dtype) == (x.shape, x.dtype) and changed.is_contiguous():
        changed = object()  # nothing was spread: there was one number, or none
    return {**inputs, name: changed}, name


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:Casting complex")
@pytest.mark.parametrize("op", OPS)
@settings(many, max_examples=100)
@given(data=st.data())
def test_what_is_wrong_is_named_and_nothing_is_written(op: str, data: st.DataObject) -> None:
    inputs, name = data.draw(wrong(op))
    copies = {key: inputs[key].detach().clone() for key in WRITES.get(op, ()) if isinstance(inputs.get(key), Tensor)}
    with pytest.raises((TypeError, ValueError), match=rf"^(values and )?{re.escape(name)}\b"):
        getattr(ops, op)(**inputs)
    for key, copy in copies.items():
        if copy.layout is torch.strided and not copy.is_quantized:
            assert_same(inputs[key].detach(), copy)
